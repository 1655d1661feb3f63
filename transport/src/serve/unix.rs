//! Unix sockets: every connection belongs to a process of this machine.

use std::collections::hash_map::DefaultHasher;
use std::fs;
use std::hash::{Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use runtime::shutdown::{Shutdown, Tasks};
use tokio::net::{UnixListener, UnixStream};

use super::call::Line;
use super::connection;
use super::crowd::{Crowd, First, Party};
use super::ending::{Ending, Reason};
use super::routes::Routes;
use super::{ACCEPT_PAUSE, concerns_one_connection, descriptors};
use crate::authority::AuthorityFix;
use crate::peer::{Peer, UnixPeer};

/// What a Unix listener grants to the processes of this machine.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct UnixLimits {
    /// How long after `connect` the first request has to come.
    pub first_request_timeout: Duration,
    /// How many connections may be open; beyond it, the newest of the heaviest user and control group go.
    pub connections: usize,
    /// How many calls may be open in all; beyond it, connections go likewise.
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

/// A process by number and user, and its control group once things run short.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Process {
    uid: u32,
    pid: i32,
}

/// All those that cannot be seen.
const UNSEEN: Process = Process { uid: u32::MAX, pid: 0 };

impl Party for Process {
    type Group = (u32, u64);

    fn group(&self) -> Self::Group {
        // Containers often share a user; a control group cannot be left by those inside.
        let cgroup = fs::read(format!("/proc/{}/cgroup", self.pid)).unwrap_or_default();
        let mut hasher = DefaultHasher::new();
        cgroup.hash(&mut hasher);
        (self.uid, hasher.finish())
    }
}

/// Serves `routes` to the processes that connect, until a shutdown is requested and every connection has ended.
pub async fn unix(listener: UnixListener, routes: Routes, limits: UnixLimits, shutdown: Shutdown) {
    // A panic in one connection ends that connection only, so nobody listens to this trigger.
    let (trigger, _) = Shutdown::new();
    let tasks = Tasks::new(trigger);
    let crowd = Crowd::new(limits.connections, limits.streams, First::Newest);
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
                tracing::warn!(%error, "Cannot accept a local connection; the heaviest caller has to give");
                crowd.shed();
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let ending = Ending::new();
        let peer = match UnixPeer::pin(&stream) {
            Ok(peer) => Some(Arc::new(peer)),
            Err(error) if error.is_shortage() => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "Cannot look at a local caller; the heaviest has to give"
                );
                crowd.shed();
                ending.end(Reason::Overload);
                None
            }
            Err(error) => {
                tracing::warn!(error = &error as &dyn std::error::Error, "Refused a local connection");
                ending.end(Reason::ProcessUnseen);
                None
            }
        };
        let party = peer.as_ref().map_or(UNSEEN, |peer| Process { uid: peer.uid, pid: peer.pid });
        let Some(place) = crowd.enter(party.clone(), ending.clone()) else {
            tracing::debug!(pid = party.pid, uid = party.uid, "Dropped a local connection: too many are open");
            continue;
        };
        let line = Line::new(peer.clone().map(Peer::Unix), ending, routes.clone(), Box::new(place));
        let (http2, limits) = (Arc::clone(&http2), Arc::clone(&limits));
        tasks.spawn("local connection", async move { serve(stream, line, peer, &http2, &limits).await });
    }
    drop(listener);
    crowd.end_all(Reason::Shutdown);
    tasks.join_all(connection::DRAIN + Duration::from_secs(1)).await;
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
