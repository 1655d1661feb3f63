//! Unix sockets: every connection belongs to a process of this machine.

use std::sync::Arc;
use std::time::Duration;

use runtime::pool::Pool;
use runtime::shutdown::{Shutdown, Tasks};
use runtime::telemetry::Limiter;
use tokio::net::UnixStream;
use tokio::time::timeout;

use super::call::Line;
use super::connection;
use super::crowd::{self, Crowd, First};
use super::ending::{Ending, Reason};
use super::routes::Routes;
use super::{ACCEPT_PAUSE, concerns_one_connection, descriptors};
use crate::authority::AuthorityFix;
use crate::peer::{Arrival, Party, Peer, PeerError, UnixPeer, threads};
use crate::socket::Listener;

/// What a Unix listener grants to the processes of this machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct UnixLimits {
    /// How long after `connect` the first request has to come.
    pub first_request_timeout: Duration,
    /// How many connections may be open; beyond it, some of the heaviest party go, those without an
    /// entitled call first.
    pub connections: usize,
    /// How many calls may be open in all, each 2 KiB that a call holds counted as one more; beyond it, connections go
    /// likewise.
    pub streams: usize,
    /// How many calls one connection may have open; clients wait at this limit, or are refused the call.
    pub streams_per_connection: u32,
}

impl UnixLimits {
    /// What suits a socket that every process of the machine may open: as much as descriptors allow. Raise the
    /// descriptor limit of the process first.
    pub fn for_everybody() -> Self {
        // A connection needs its own descriptor and one of its process. Our own files, the way to the server, and
        // connections that were told to go need some, too.
        let spare = descriptors().saturating_sub(1024);
        let connections = (spare.max(descriptors() / 2) / 2).clamp(16, 16 * 1024);
        Self { connections, ..Self::for_operators() }
    }

    /// What suits a socket that only operators can open.
    pub fn for_operators() -> Self {
        Self {
            first_request_timeout: Duration::from_secs(10),
            connections: 256,
            streams: 32 * 1024,
            streams_per_connection: 128,
        }
    }
}

const NOT_ACCEPTED: &str = "Cannot accept a local connection; the heaviest caller has to give";
const NOT_LOOKED_AT: &str = "Cannot look at a local caller; the heaviest has to give";
const REFUSED: &str = "Refused a local connection";

/// A process, and who answers for it.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Process {
    party: Party,
    pid: i32,
}

impl crowd::Party for Process {
    type Group = Party;

    fn group(&self) -> Party {
        self.party.clone()
    }
}

/// Serves `routes` to the processes that connect, until a shutdown is requested and every connection has ended. What
/// callers cause in the log, `log` limits.
pub async fn unix(listener: Listener, routes: Routes, limits: UnixLimits, log: Limiter, shutdown: Shutdown) {
    // A panic in one connection ends that connection only, so nobody listens to this trigger.
    let (trigger, _) = Shutdown::new();
    let tasks = Tasks::new(trigger);
    let crowd = Crowd::new(limits.connections, limits.streams, First::Newest);
    let pool = threads();
    let limits = Arc::new(limits);
    let http2 = Arc::new(connection::http2(limits.streams_per_connection, 64 * 1024));
    loop {
        let accepted = tokio::select! {
            biased;
            () = shutdown.requested() => break,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if concerns_one_connection(&error) => continue,
            Err(error) => {
                if log.allow(NOT_ACCEPTED, "everybody") {
                    tracing::warn!(%error, "{NOT_ACCEPTED}");
                }
                crowd.shed();
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let ending = Ending::new();
        let arrival = match Arrival::of(&stream) {
            Ok(arrival) => Some(arrival),
            Err(error) => {
                refuse(&error, &Party::unseen(), &ending, &crowd, &log);
                None
            }
        };
        let process = match &arrival {
            Some(arrival) => Process { party: arrival.party.clone(), pid: arrival.pid },
            None => Process { party: Party::unseen(), pid: 0 },
        };
        let Some(place) = crowd.enter(process.clone(), ending.clone()) else {
            tracing::debug!(pid = process.pid, party = %process.party, "Dropped a local connection: too many are open");
            continue;
        };
        let (http2, limits, routes) = (Arc::clone(&http2), Arc::clone(&limits), routes.clone());
        let (crowd, pool, log) = (Arc::clone(&crowd), pool.clone(), log.clone());
        tasks.spawn("local connection", async move {
            // Nothing of the connection is read before its process is known.
            let pinned = match arrival {
                Some(arrival) => pin(arrival, &pool, &ending, &crowd, &log, limits.first_request_timeout).await,
                None => None,
            };
            let peer = pinned.map(Arc::new);
            let line = Line::new(peer.clone().map(Peer::Unix), ending, routes, Box::new(place));
            serve(stream, line, peer, &http2, &limits).await;
        });
    }
    drop(listener);
    crowd.end_all(Reason::Shutdown);
    tasks.join_all(connection::DRAIN + Duration::from_secs(1)).await;
}

/// The process that connected, unless the connection has to end, which `ending` then says.
async fn pin(
    arrival: Arrival,
    pool: &Pool,
    ending: &Ending,
    crowd: &Crowd<Process>,
    log: &Limiter,
    patience: Duration,
) -> Option<UnixPeer> {
    let party = arrival.party.clone();
    tokio::select! {
        pinned = timeout(patience, arrival.pin(pool)) => match pinned {
            Ok(Ok(peer)) => return Some(peer),
            Ok(Err(error)) => refuse(&error, &party, ending, crowd, log),
            Err(_) => {
                tracing::debug!(%party, "A local caller could not be looked at in time");
                ending.end(Reason::Overload);
            }
        },
        _ = ending.ended() => {}
    }
    None
}

/// Ends a connection whose process is not known.
fn refuse(error: &PeerError, party: &Party, ending: &Ending, crowd: &Crowd<Process>, log: &Limiter) {
    let told = error as &dyn std::error::Error;
    if error.is_shortage() {
        if log.allow(NOT_LOOKED_AT, party.name()) {
            tracing::warn!(error = told, %party, "{NOT_LOOKED_AT}");
        }
        crowd.shed();
        ending.end(Reason::Overload);
    } else if matches!(error, PeerError::Busy(_)) {
        tracing::debug!(error = told, %party, "Cannot look at a local caller now");
        ending.end(Reason::Overload);
    } else {
        if log.allow(REFUSED, party.name()) {
            tracing::warn!(error = told, %party, "{REFUSED}");
        }
        ending.end(Reason::ProcessUnseen);
    }
}

async fn serve(
    stream: UnixStream,
    line: Arc<Line>,
    peer: Option<Arc<UnixPeer>>,
    http2: &hyper::server::conn::http2::Builder<hyper_util::rt::TokioExecutor>,
    limits: &UnixLimits,
) {
    let life = async {
        match peer {
            Some(peer) => peer.gone().await,
            None => std::future::pending().await,
        }
        Some(Reason::ProcessGone)
    };
    let stream = AuthorityFix::new(stream);
    connection::serve(stream, line, http2, limits.first_request_timeout, || {}, life).await;
}
