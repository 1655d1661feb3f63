//! What the server knows, for everybody who reads.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio::sync::{broadcast, mpsc, oneshot, watch};

use super::committer::SharedPart;
use super::{Position, Store, StoreError};
use crate::state::State;

/// How long an answer waits for the head of a shared store.
pub(super) const HEAD_DEADLINE: Duration = Duration::from_secs(2);
/// How many steps a feed keeps for those who read it slowly.
const FEED_LENGTH: usize = 256;

/// One revision, for those who follow.
#[derive(Clone, Debug)]
pub struct Step {
    /// The position after it.
    pub position: Position,
    /// What it changed, in order.
    pub parts: Vec<SharedPart>,
}

/// What a follower is told.
#[derive(Clone, Debug)]
pub enum Feed {
    /// The next revision.
    Step(Arc<Step>),
    /// Steps were missed, or the state was loaded anew: look at everything.
    Everything,
}

/// The revisions as they come. Bounded: who falls behind is told to look at everything.
#[derive(Debug)]
pub struct Changes {
    receiver: broadcast::Receiver<Feed>,
}

impl Changes {
    /// The next one; `None` when the history has ended.
    pub async fn next(&mut self) -> Option<Feed> {
        match self.receiver.recv().await {
            Ok(feed) => Some(feed),
            Err(broadcast::error::RecvError::Lagged(_)) => {
                // What is still queued belongs to what has to be looked at anyway.
                self.receiver = self.receiver.resubscribe();
                Some(Feed::Everything)
            }
            Err(broadcast::error::RecvError::Closed) => None,
        }
    }
}

/// Whether the history can be trusted to be the newest, and be written.
#[derive(Clone, Debug)]
pub enum Health {
    /// Both.
    Attached,
    /// A shared store was not reached for a while: known state is served, nothing is written.
    Detached,
    /// The store failed for good: known state is served until the operator restarts the server.
    NeedsRestart(StoreError),
    /// The writer has ended.
    Ended,
}

impl Health {
    /// Whether the history is the newest and can be written.
    pub fn is_attached(&self) -> bool {
        matches!(self, Self::Attached)
    }
}

/// Why the current state is not known.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReplicaError {
    /// The store's head could not be read.
    #[error("the head of the history cannot be read")]
    Head(#[source] StoreError),
    /// The head was not read, or not reached, in time.
    #[error("the newest state was not reached within {} s", HEAD_DEADLINE.as_secs())]
    Behind,
    /// The server is ending.
    #[error("the history is closed")]
    Ended,
}

impl ReplicaError {
    /// Whether asking again may help without a restart.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Head(error) => error.is_retryable(),
            Self::Behind => true,
            Self::Ended => false,
        }
    }
}

/// How the head is read.
#[derive(Clone)]
pub(super) enum HeadReads {
    /// At once, by everybody: a store with one process knows its head.
    Direct(Arc<dyn Store>),
    /// One at a time, for all who wait.
    Shared(mpsc::Sender<HeadRequest>),
}

/// Somebody wants a head that is read from now on.
pub(super) type HeadRequest = oneshot::Sender<Result<Position, StoreError>>;

/// What writer and readers share.
pub(super) struct Board {
    latest: ArcSwap<State>,
    woken: watch::Sender<Arc<State>>,
    feed: broadcast::Sender<Feed>,
    health: watch::Sender<Health>,
}

impl Board {
    pub(super) fn new(state: Arc<State>) -> Self {
        Self {
            latest: ArcSwap::new(Arc::clone(&state)),
            woken: watch::channel(state).0,
            feed: broadcast::channel(FEED_LENGTH).0,
            health: watch::channel(Health::Attached).0,
        }
    }

    pub(super) fn latest(&self) -> Arc<State> {
        self.latest.load_full()
    }

    /// Shows a new revision: first to those who ask, then to those who wait.
    pub(super) fn publish(&self, state: Arc<State>, feed: Feed) {
        self.latest.store(Arc::clone(&state));
        self.woken.send_replace(state);
        // Nobody may be following.
        let _ = self.feed.send(feed);
    }

    pub(super) fn set_health(&self, health: Health) {
        self.health.send_replace(health);
    }

    pub(super) fn health(&self) -> Health {
        self.health.borrow().clone()
    }
}

/// The state of the trust domain for everybody who reads. Cheap to clone.
#[derive(Clone)]
pub struct Replica {
    board: Arc<Board>,
    heads: HeadReads,
}

impl fmt::Debug for Replica {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Replica").field("position", self.latest().position()).finish()
    }
}

impl Replica {
    pub(super) fn new(board: Arc<Board>, heads: HeadReads) -> Self {
        Self { board, heads }
    }

    /// Whether other processes may write to the same store, so that this one may be behind somebody.
    pub fn is_shared(&self) -> bool {
        matches!(self.heads, HeadReads::Shared(_))
    }

    /// The newest state known here. Good for what it contains; an answer that rests on an absence
    /// takes [`Replica::current`].
    pub fn latest(&self) -> Arc<State> {
        self.board.latest()
    }

    /// A state at or beyond a head that is read after this call began: good for refusals, NotFound,
    /// lists and syncs. At once for a store with one process.
    ///
    /// # Errors
    /// If the head cannot be read or reached within two seconds. Callers answer Unavailable then, and
    /// never a refusal.
    pub async fn current(&self) -> Result<Arc<State>, ReplicaError> {
        let head = match &self.heads {
            HeadReads::Direct(store) => store.head().await.map_err(ReplicaError::Head)?,
            HeadReads::Shared(requests) => {
                let (reply, answer) = oneshot::channel();
                requests.send(reply).await.map_err(|_| ReplicaError::Ended)?;
                tokio::time::timeout(HEAD_DEADLINE, answer)
                    .await
                    .map_err(|_| ReplicaError::Behind)?
                    .map_err(|_| ReplicaError::Ended)?
                    .map_err(ReplicaError::Head)?
            }
        };
        let latest = self.latest();
        if reached(&latest, &head) {
            return Ok(latest);
        }
        let mut woken = self.board.woken.subscribe();
        let waiting = woken.wait_for(|state| reached(state, &head));
        let state = tokio::time::timeout(HEAD_DEADLINE, waiting).await.map_err(|_| ReplicaError::Behind)?;
        state.map(|state| Arc::clone(&state)).map_err(|_| ReplicaError::Ended)
    }

    /// Wakes at every revision and shows the newest.
    pub fn watch(&self) -> watch::Receiver<Arc<State>> {
        self.board.woken.subscribe()
    }

    /// Every revision from now on, as long as the reader keeps up.
    pub fn changes(&self) -> Changes {
        Changes { receiver: self.board.feed.subscribe() }
    }

    /// Whether the history is the newest and can be written; wakes when that changes.
    pub fn health(&self) -> watch::Receiver<Health> {
        self.board.health.subscribe()
    }
}

fn reached(state: &State, head: &Position) -> bool {
    state.position().history == head.history && state.position().revision >= head.revision
}
