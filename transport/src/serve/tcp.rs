//! TCP with TLS: connections come from anywhere, and cost most before anybody is known.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2::Builder;
use hyper_util::rt::TokioExecutor;
use nix::sys::socket::{setsockopt, sockopt};
use runtime::clock::Clock;
use runtime::shutdown::{Shutdown, Tasks};
use runtime::telemetry::Limiter;
use spiffe::id::SpiffeId;
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};
use tokio_rustls::TlsAcceptor;

use super::call::{Line, Share};
use super::connection;
use super::crowd::{Crowd, First, Party, Place, Portion};
use super::ending::{Ending, Reason};
use super::expiry::Expiries;
use super::routes::Routes;
use super::{ACCEPT_PAUSE, concerns_one_connection, descriptors};
use crate::peer::Peer;
use crate::verify;

/// What a TCP listener grants.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct TcpLimits {
    /// How long a TLS handshake may take.
    pub handshake_timeout: Duration,
    /// How long after the handshake the first request has to come.
    pub first_request_timeout: Duration,
    /// How many connections of one address (of IPv6: of one /64 network) may be before their first request.
    pub handshakes_per_address: usize,
    /// How many connections in all may be before their first request; beyond it, the oldest of the address with most
    /// of them go.
    pub handshakes: usize,
    /// After this time, give or take a tenth, a connection is closed, so that clients spread over servers and old
    /// connections do not gather. Calls that are open go on: a connection of a peer with a certificate is closed only
    /// once no call is open, because a stream that pushes changes is worth more than an even spread, and the
    /// certificate bounds its life; anonymous peers get half a minute to finish.
    pub max_connection_age: Option<Duration>,
    /// How many connections of peers with a certificate may be open; beyond it, the newest of the peer with most of them
    /// go.
    pub connections: usize,
    /// How many calls one connection of a peer with a certificate may have open.
    pub streams_per_connection: u32,
    /// What peers without a certificate get.
    pub anonymous: AnonymousLimits,
}

/// What a TCP listener grants to all peers without a certificate together: whoever can reach it is one of them.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct AnonymousLimits {
    /// How many connections may be open; beyond it, the newest of the network with most of them go.
    pub connections: usize,
    /// How many connections one network (of IPv4 a /24, of IPv6 a /64) may hold; beyond it, the newest of its heaviest
    /// address go. If nothing is set, a quarter of what other networks leave free, and at least 64.
    pub connections_per_network: Option<usize>,
    /// How many bytes of unanswered requests may be held; beyond it, connections of the network with most of them go.
    pub request_bytes: usize,
    /// How many calls one connection may have open.
    pub streams_per_connection: u32,
    /// How many bytes of a call the peer may send before anybody reads them.
    pub window: u32,
    /// A connection without an open call is closed after this time, or up to a sixth more.
    pub idle_timeout: Duration,
}

impl Default for AnonymousLimits {
    fn default() -> Self {
        Self {
            connections: (descriptors() / 4).clamp(64, 8 * 1024),
            connections_per_network: None,
            request_bytes: 32 * 1024 * 1024,
            streams_per_connection: 8,
            window: 4 * 1024,
            idle_timeout: Duration::from_secs(30),
        }
    }
}

impl Default for TcpLimits {
    fn default() -> Self {
        let anonymous = AnonymousLimits::default();
        let spare = descriptors().saturating_sub(1024).max(descriptors() / 2);
        Self {
            handshake_timeout: Duration::from_secs(10),
            first_request_timeout: Duration::from_secs(10),
            handshakes_per_address: 256,
            handshakes: 1024,
            max_connection_age: Some(Duration::from_secs(180)),
            connections: spare.saturating_sub(anonymous.connections).min(128 * 1024),
            streams_per_connection: 256,
            anonymous,
        }
    }
}

/// Where somebody comes from; one who can choose addresses in a network counts as that network.
fn network(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => {
            let [a, b, c, d, ..] = v6.segments();
            IpAddr::V6(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0))
        }
        v4 => v4,
    }
}

/// Whoever answers for a connection.
#[derive(Clone, PartialEq, Eq, Hash)]
enum Origin {
    Network(IpAddr),
    Id(SpiffeId),
}

impl Party for Origin {
    type Group = Self;

    /// Who has one address of a small IPv4 network often has them all.
    fn group(&self) -> Self {
        match self {
            Self::Network(IpAddr::V4(v4)) => Self::Network(IpAddr::V4(*v4 & Ipv4Addr::new(255, 255, 255, 0))),
            other => other.clone(),
        }
    }
}

/// The network that answers for `address`, as logs name it.
pub fn network_name(address: IpAddr) -> String {
    match network(address) {
        IpAddr::V4(v4) => format!("{}/24", v4 & Ipv4Addr::new(255, 255, 255, 0)),
        IpAddr::V6(v6) => format!("{v6}/64"),
    }
}

/// What all connections of one listener share.
struct Listener {
    tls: TlsAcceptor,
    routes: Routes,
    limits: TcpLimits,
    http2: Builder<TokioExecutor>,
    expiries: Arc<Expiries>,
    anonymous_http2: Builder<TokioExecutor>,
    limiter: Limiter,
    /// Connections before their first request.
    strangers: Arc<Crowd<Origin>>,
    /// Connections of peers without a certificate.
    anonymous: Arc<Crowd<Origin>>,
    /// Connections of peers with one.
    known: Arc<Crowd<Origin>>,
}

/// Serves `routes` over TLS until a shutdown is requested and every connection has ended. A peer's connection ends
/// when `clock` shows that the certificate it proved itself with has expired. What strangers can cause in the log asks
/// `limiter` first.
pub async fn tcp(
    listener: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    routes: Routes,
    limits: TcpLimits,
    limiter: Limiter,
    clock: Clock,
    shutdown: Shutdown,
) {
    let (trigger, _) = Shutdown::new();
    let tasks = Tasks::new(trigger);
    let served = Arc::new(Listener {
        tls: TlsAcceptor::from(tls),
        routes,
        http2: connection::http2(limits.streams_per_connection, 1024 * 1024),
        expiries: Arc::default(),
        anonymous_http2: connection::http2(limits.anonymous.streams_per_connection, limits.anonymous.window),
        strangers: Crowd::new(limits.handshakes, usize::MAX, First::Oldest),
        anonymous: anonymous(&limits.anonymous),
        known: Crowd::new(limits.connections, usize::MAX, First::Newest),
        limiter,
        limits,
    });
    let accepting = async {
        loop {
            match listener.accept().await {
                Ok((stream, address)) => served.accept(&tasks, stream, address),
                Err(error) if concerns_one_connection(&error) => {}
                Err(error) => {
                    let kind = "Cannot accept a connection; the heaviest peer has to give";
                    if served.limiter.allow(kind, "network listener") {
                        tracing::warn!(%error, "{kind}");
                    }
                    served.strangers.shed();
                    served.anonymous.shed();
                    served.known.shed();
                    sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    };
    tokio::select! {
        biased;
        () = shutdown.requested() => {}
        () = accepting => {}
        () = served.expiries.run(&clock) => {}
    }
    drop(listener);
    served.strangers.end_all(Reason::Shutdown);
    served.anonymous.end_all(Reason::Shutdown);
    served.known.end_all(Reason::Shutdown);
    let ended = tasks.join_all(connection::DRAIN + Duration::from_secs(1));
    tokio::select! {
        _ = ended => {}
        () = served.expiries.run(&clock) => {}
    }
}

fn anonymous(limits: &AnonymousLimits) -> Arc<Crowd<Origin>> {
    let portion = limits.connections_per_network.map_or(Portion::Quarter { least: 64 }, Portion::Fixed);
    Crowd::with_portions(limits.connections, limits.request_bytes / Share::UNIT, First::Newest, portion)
}

impl Listener {
    fn accept(self: &Arc<Self>, tasks: &Tasks, stream: TcpStream, address: SocketAddr) {
        let origin = Origin::Network(network(address.ip()));
        let hurry = Ending::new();
        if self.strangers.held_by(&origin) >= self.limits.handshakes_per_address {
            tracing::debug!(%address, "Dropped a connection: too many of this address have not sent a request yet");
            return;
        }
        let Some(stranger) = self.strangers.enter(origin.clone(), hurry.clone()) else { return };
        let this = Arc::clone(self);
        tasks.spawn("connection", async move { this.serve(stream, address, origin, stranger, hurry).await });
    }

    async fn serve(
        &self,
        stream: TcpStream,
        address: SocketAddr,
        origin: Origin,
        stranger: Place<Origin>,
        hurry: Ending,
    ) {
        tune(&stream);
        // Boxed, since the connection is there for hours after it, and this task as large as its largest part.
        let handshake = Box::pin(timeout(self.limits.handshake_timeout, verify::remembering(self.tls.accept(stream))));
        let (stream, certificate) = tokio::select! {
            done = handshake => match done {
                Ok((Ok(stream), certificate)) => (Box::new(stream), certificate),
                Ok((Err(error), _)) => {
                    let kind = "TLS handshake failed";
                    if self.limiter.allow(kind, &network_name(address.ip())) {
                        tracing::info!(%address, error = &error as &dyn std::error::Error, "{kind}");
                    }
                    return;
                }
                Err(_) => {
                    tracing::debug!(%address, "TLS handshake took too long");
                    return;
                }
            },
            _ = hurry.ended() => return,
        };
        let ending = Ending::new();
        let (crowd, party, http2) = match &certificate {
            Some(certificate) => (&self.known, Origin::Id(certificate.id.clone()), &self.http2),
            None => (&self.anonymous, origin, &self.anonymous_http2),
        };
        let Some(place) = crowd.enter(party, ending.clone()) else { return };
        let _expiry = certificate.as_ref().map(|known| self.expiries.add(known.not_after, ending.clone()));
        let known = certificate.is_some();
        let line = Line::new(Some(Peer::Tcp { address, certificate }), ending, self.routes.clone(), Box::new(place));
        let life = async {
            let aged = async {
                let Some(age) = self.limits.max_connection_age else { return std::future::pending().await };
                // Spread by something that differs between connections; it need not be secret.
                sleep(age.mul_f64(0.9 + f64::from(address.port() % 200) / 1000.0)).await;
                if known {
                    line.idle().await;
                }
            };
            let quiet = async {
                if known {
                    return std::future::pending().await;
                }
                line.quiet(self.limits.anonymous.idle_timeout).await;
            };
            tokio::select! {
                () = aged => None,
                () = quiet => None,
                // Overtaken before the first request; afterwards nobody can ask for this.
                reason = hurry.ended() => Some(reason),
            }
        };
        let patience = self.limits.first_request_timeout;
        let on_first_call = move || drop(stranger);
        connection::serve(stream, Arc::clone(&line), http2, patience, on_first_call, life).await;
    }
}

/// Small messages leave at once, and a peer that vanished without a word is noticed within two minutes, by the kernel.
pub(crate) fn tune(stream: &TcpStream) {
    let _ = stream.set_nodelay(true);
    let _ = setsockopt(stream, sockopt::KeepAlive, &true);
    let _ = setsockopt(stream, sockopt::TcpKeepIdle, &60);
    let _ = setsockopt(stream, sockopt::TcpKeepInterval, &15);
    let _ = setsockopt(stream, sockopt::TcpKeepCount, &4);
}
