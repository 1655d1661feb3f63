//! The agent's only client to the server: one connection, made with the newest SVID and checked against the newest
//! bundle; drained before its successor is used.

mod answered;
mod calls;
mod tls;
pub mod wire;

use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use async_trait::async_trait;
use prost::Message as _;
use spiffe_proto::rpc_status;
use spiffe_proto::types::PermissionDeniedDetails;
use spiffe_proto::types::permission_denied_details::Reason;
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::time::Instant;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

use crate::identity::{Denial, Heard, Reaction};

/// How long one call may take, dialling not counted.
pub const CALL_DEADLINE: Duration = Duration::from_secs(30);
/// How long a connection may take to come up.
const DIAL_DEADLINE: Duration = Duration::from_secs(20);
/// How long calls on the old connection may hold up the first call on the new one.
const DRAIN_DEADLINE: Duration = Duration::from_secs(30);
/// The largest message taken from the server: a full page of 500 large entries fits.
pub const LARGEST_MESSAGE: usize = 16 << 20;

pub use self::answered::Answered;
pub use self::calls::{AttestError, Attested};
pub use self::tls::TlsDial;

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// The server cannot be reached, or ended the handshake.
    #[error(transparent)]
    Unreachable(Cause),
    /// The server's certificate does not come from an authority of the trust bundle.
    #[error("the server's certificate is signed by an authority that the trust bundle does not hold")]
    UnknownAuthority(#[source] Cause),
    /// The connection did not come up in time.
    #[error("the server did not complete the connection in time")]
    Deadline,
    /// Another caller's attempt, which this one waited for, has just failed.
    #[error("another attempt to connect to the server has just failed")]
    JustFailed,
    /// There is no bundle to know the server by.
    #[error("the agent has no trust bundle, and an insecure first contact is not allowed")]
    NoBundle,
}

/// Who the agent is on a new connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presenting {
    /// The holder of its newest SVID.
    Svid,
    /// Nobody: no certificate is offered.
    Nothing,
}

/// Makes connections to the server.
#[async_trait]
pub trait Dial: Send + Sync {
    /// A new connection whose server has proved to be the server of the own trust domain. It is never made anew by
    /// itself: once it breaks, every call on it fails.
    async fn dial(&self, presenting: Presenting) -> Result<Channel, DialError>;
}

/// What the link tells about the agent's identity, and asks.
pub trait Witness: Send + Sync {
    /// The number of the newest SVID.
    fn newest_svid(&self) -> u64;
    /// The server denied a call; says what is to be done.
    fn denied(&self, heard: Heard) -> Reaction;
    /// The server served a call made with this SVID.
    fn accepted(&self, svid: u64);
    /// A connection came up, or could not.
    fn dialled(&self, result: Result<(), &DialError>);
}

/// Why a call gave nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LinkError {
    /// There is no connection.
    #[error(transparent)]
    Dial(DialError),
    /// The call took too long.
    #[error("the server did not answer in time")]
    Deadline,
    /// The server denied it to this agent.
    #[error("denied by the server: {denial}")]
    Denied {
        /// Why.
        denial: Denial,
        /// What the identity makes of it.
        reaction: Reaction,
    },
    /// The server answered with an error.
    #[error("the server answered with an error")]
    Status(#[source] Answered),
}

impl LinkError {
    /// The gRPC code of the server's answer, if it gave one.
    pub fn code(&self) -> Option<Code> {
        match self {
            Self::Status(status) => Some(status.code()),
            Self::Denied { .. } => Some(Code::PermissionDenied),
            Self::Dial(_) | Self::Deadline => None,
        }
    }

    /// Whether the same call may succeed later without anything else being done.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Dial(_) | Self::Deadline => true,
            Self::Denied { reaction, .. } => *reaction != Reaction::Forget,
            Self::Status(status) => !matches!(status.code(), Code::InvalidArgument | Code::Unimplemented),
        }
    }
}

/// The client; clones share its one connection.
#[derive(Clone)]
pub struct ServerLink {
    inner: Arc<Inner>,
}

struct Inner {
    dial: Arc<dyn Dial>,
    witness: Arc<dyn Witness>,
    slot: ArcSwap<Slot>,
    number: AtomicU64,
    renewals: watch::Sender<u64>,
}

/// The place of one connection: not made yet, in use, or retired.
struct Slot {
    number: u64,
    connected: OnceCell<Connected>,
    /// Calls on the connection before this one, to be waited for.
    before: Mutex<Option<Drain>>,
    /// When the last attempt failed, so that those who waited for it do not each try in turn.
    failed_at: Mutex<Option<Instant>>,
    retired: watch::Sender<bool>,
}

struct Connected {
    channel: Channel,
    svid: u64,
    /// Each lease holds a clone; when all are gone, the drain of the successor ends. Taken out when retired.
    life: Mutex<Option<mpsc::Sender<()>>>,
    ended: Mutex<Option<mpsc::Receiver<()>>>,
    used: AtomicBool,
}

/// Ends when the last lease on a connection is gone; nothing is ever sent.
struct Drain(mpsc::Receiver<()>);

/// A drain that is being waited for. Who stops waiting puts it back: the next one has to wait, too.
struct Draining<'a> {
    place: &'a Mutex<Option<Drain>>,
    drain: Option<Drain>,
}

impl Draining<'_> {
    async fn ended(mut self) {
        if let Some(Drain(ended)) = &mut self.drain
            && tokio::time::timeout(DRAIN_DEADLINE, ended.recv()).await.is_err()
        {
            tracing::warn!("Calls on the old connection did not end in time");
        }
        self.drain = None;
    }
}

impl Drop for Draining<'_> {
    fn drop(&mut self) {
        if let Some(drain) = self.drain.take() {
            *self.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(drain);
        }
    }
}

/// The right to use the connection; while it is held, no successor is used after a renewal.
pub struct Lease {
    channel: Channel,
    number: u64,
    svid: u64,
    fresh: bool,
    retired: watch::Receiver<bool>,
    _life: Option<mpsc::Sender<()>>,
}

impl Lease {
    /// The connection.
    pub fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// The number of the connection.
    pub fn connection(&self) -> u64 {
        self.number
    }

    /// Waits until the connection is to be given up for another: streams on it should end.
    pub async fn retired(&self) {
        let _ = self.retired.clone().wait_for(|retired| *retired).await;
    }
}

impl Slot {
    fn new(number: u64, before: Option<Drain>) -> Arc<Self> {
        let (retired, _) = watch::channel(false);
        Arc::new(Self {
            number,
            connected: OnceCell::new(),
            before: Mutex::new(before),
            failed_at: Mutex::new(None),
            retired,
        })
    }

    fn failed_at(&self) -> MutexGuard<'_, Option<Instant>> {
        self.failed_at.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn take<T>(place: &Mutex<Option<T>>) -> Option<T> {
    place.lock().unwrap_or_else(PoisonError::into_inner).take()
}

impl ServerLink {
    /// A link that dials at its first use.
    pub fn new(dial: Arc<dyn Dial>, witness: Arc<dyn Witness>) -> Self {
        let inner = Inner {
            dial,
            witness,
            slot: ArcSwap::new(Slot::new(1, None)),
            number: AtomicU64::new(2),
            renewals: watch::Sender::new(0),
        };
        Self { inner: Arc::new(inner) }
    }

    /// The connection, made now if there is none.
    pub async fn lease(&self) -> Result<Lease, LinkError> {
        let asked_at = Instant::now();
        loop {
            let slot = self.inner.slot.load_full();
            let connected = match slot.connected.get_or_try_init(|| self.connect(&slot, asked_at)).await {
                Ok(connected) => connected,
                Err(error) => return Err(LinkError::Dial(error)),
            };
            let life = connected.life.lock().unwrap_or_else(PoisonError::into_inner).clone();
            // Retired while we waited, or made while the SVID was being replaced: the successor is the one to use.
            if life.is_none() {
                continue;
            }
            if connected.svid != self.inner.witness.newest_svid() {
                self.retire(slot.number);
                continue;
            }
            return Ok(Lease {
                channel: connected.channel.clone(),
                number: slot.number,
                svid: connected.svid,
                fresh: !connected.used.swap(true, Ordering::Relaxed),
                retired: slot.retired.subscribe(),
                _life: life,
            });
        }
    }

    async fn connect(&self, slot: &Slot, asked_at: Instant) -> Result<Connected, DialError> {
        if slot.failed_at().is_some_and(|failed_at| failed_at > asked_at) {
            return Err(DialError::JustFailed);
        }
        Draining { place: &slot.before, drain: take(&slot.before) }.ended().await;
        let svid = self.inner.witness.newest_svid();
        let dialled = tokio::time::timeout(DIAL_DEADLINE, self.inner.dial.dial(Presenting::Svid)).await;
        let result = dialled.unwrap_or(Err(DialError::Deadline));
        self.inner.witness.dialled(result.as_ref().map(|_| ()));
        if result.is_err() {
            *slot.failed_at() = Some(Instant::now());
        }
        let channel = result?;
        tracing::debug!(connection = slot.number, "Connected to the server");
        let (life, ended) = mpsc::channel(1);
        Ok(Connected {
            channel,
            svid,
            life: Mutex::new(Some(life)),
            ended: Mutex::new(Some(ended)),
            used: AtomicBool::new(false),
        })
    }

    /// The agent has a new SVID: calls under way end on the old connection, then the next call dials anew.
    pub fn renewed(&self) {
        let slot = self.inner.slot.load_full();
        let newest = self.inner.witness.newest_svid();
        // Somebody may have been first and dialled anew already.
        if slot.connected.get().is_none_or(|connected| connected.svid != newest) {
            self.retire(slot.number);
        }
        self.inner.renewals.send_modify(|count| *count += 1);
    }

    /// Changes whenever the agent has a new SVID.
    pub fn renewals(&self) -> watch::Receiver<u64> {
        self.inner.renewals.subscribe()
    }

    /// The number of the newest connection, made or to be made.
    pub fn connection(&self) -> u64 {
        self.inner.slot.load().number
    }

    /// Gives up connection `number` for a successor that waits for the calls under way.
    fn retire(&self, number: u64) {
        self.replace(number, |slot| slot.connected.get().and_then(|connected| take(&connected.ended)).map(Drain));
    }

    /// Gives up connection `number`, which failed: there is nothing to wait for.
    pub fn release(&self, number: u64) {
        self.replace(number, |_| None);
    }

    fn replace(&self, number: u64, drain: impl FnOnce(&Slot) -> Option<Drain>) {
        let slot = self.inner.slot.load_full();
        if slot.number != number {
            return;
        }
        let successor = Slot::new(self.inner.number.fetch_add(1, Ordering::Relaxed), drain(&slot));
        let previous = self.inner.slot.compare_and_swap(&slot, successor);
        if Arc::ptr_eq(&previous, &slot) {
            slot.retired.send_replace(true);
            if let Some(connected) = slot.connected.get() {
                drop(take(&connected.life));
            }
        }
    }

    /// One unary call. On a connection that turned out to be dead, and after a denial that is to be asked for again,
    /// it is made a second time, on a fresh one.
    pub async fn call<T, F>(&self, make: impl Fn(Channel) -> F) -> Result<T, LinkError>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut repeated = false;
        loop {
            let lease = self.lease().await?;
            let error = match tokio::time::timeout(CALL_DEADLINE, make(lease.channel())).await {
                Ok(Ok(response)) => {
                    self.inner.witness.accepted(lease.svid);
                    return Ok(response.into_inner());
                }
                Ok(Err(status)) => self.failed(&lease, status),
                Err(_) => {
                    self.release(lease.number);
                    return Err(LinkError::Deadline);
                }
            };
            let again = match &error {
                LinkError::Denied { reaction, .. } => {
                    matches!(reaction, Reaction::AskAgain | Reaction::Disregard)
                }
                LinkError::Status(answered) => !lease.fresh && answered.is_broken(),
                LinkError::Dial(_) | LinkError::Deadline => false,
            };
            if repeated || !again {
                return Err(error);
            }
            repeated = true;
        }
    }

    /// Tells that a stream on `lease` is served.
    pub fn accepted(&self, lease: &Lease) {
        self.inner.witness.accepted(lease.svid);
    }

    /// Judges the failure of a call or stream on `lease`: a denial is passed on to the identity, and a connection that
    /// no longer serves is given up.
    pub fn failed(&self, lease: &Lease, status: Status) -> LinkError {
        match denial(&status) {
            Some(denial) => {
                let heard = Heard { denial, connection: lease.number, svid: lease.svid };
                let reaction = self.inner.witness.denied(heard);
                self.release(lease.number);
                LinkError::Denied { denial, reaction }
            }
            None => {
                let answered = Answered::from(status);
                if answered.is_broken() {
                    self.release(lease.number);
                }
                LinkError::Status(answered)
            }
        }
    }

    /// A connection of its own without a certificate, for attestation.
    pub async fn dial_as_nobody(&self) -> Result<Channel, DialError> {
        tokio::time::timeout(DIAL_DEADLINE, self.inner.dial.dial(Presenting::Nothing))
            .await
            .unwrap_or(Err(DialError::Deadline))
    }
}

/// The reason that a server gives an agent in the details of PermissionDenied.
pub fn denial(status: &Status) -> Option<Denial> {
    if status.code() != Code::PermissionDenied {
        return None;
    }
    let details = rpc_status::Status::decode(status.details()).ok()?;
    details
        .details
        .iter()
        .filter(|any| any.type_url.rsplit('/').next() == Some("spire.api.types.PermissionDeniedDetails"))
        .find_map(|any| PermissionDeniedDetails::decode(any.value.as_slice()).ok())
        .and_then(|details| match details.reason() {
            Reason::Unknown => None,
            Reason::AgentExpired => Some(Denial::Expired),
            Reason::AgentNotAttested => Some(Denial::NotAttested),
            Reason::AgentNotActive => Some(Denial::NotActive),
            Reason::AgentBanned => Some(Denial::Banned),
            Reason::AgentMustReattest => Some(Denial::MustReattest),
        })
}
