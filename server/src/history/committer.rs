//! The only way to write: propose a decision, get a receipt.

use std::fmt;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::{mpsc, oneshot};

use super::{Position, StoreError, Urgency};
use crate::state::model::Part;
use crate::state::{Invalid, State};

/// How many proposals may wait; who comes later waits to be let in.
pub(super) const MAX_WAITING: usize = 4096;

/// Proves that a proposal is committed, and carries what its decision gave.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Receipt<T> {
    /// What the decision gave beside its part.
    pub value: T,
    /// The position at which it holds.
    pub position: Position,
}

/// Why a proposal has no receipt.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProposeError<R> {
    /// The decision refused, on a state that is committed.
    #[error("the decision refused")]
    Refused(R),
    /// Free space is short, and the proposal does not shrink anything; nothing was written.
    #[error("free space on the store's disk is short")]
    Full(#[source] StoreError),
    /// The part exceeds the sizes of a part; nothing was written.
    #[error("the part is too large")]
    TooLarge,
    /// The part contradicts the state it was decided on; nothing was written.
    #[error("the part contradicts the state")]
    Invalid(#[source] Invalid),
    /// The decision panicked; nothing was written.
    #[error("the decision failed")]
    Panicked,
    /// The store is out of reach, or this server is ending; nothing was written.
    #[error("the history cannot be written now")]
    Unavailable(#[source] Option<StoreError>),
    /// The store failed while it wrote: whether the part is committed shows only after a restart.
    #[error("it is not known whether the history was written")]
    Unknown(#[source] StoreError),
}

impl<R> ProposeError<R> {
    /// Whether the same proposal may be committed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Full(_) | Self::Unavailable(_) | Self::Unknown(_) => true,
            Self::Refused(_) | Self::TooLarge | Self::Invalid(_) | Self::Panicked => false,
        }
    }
}

/// What a proposal's decision came to, as far as the writer cares.
pub(super) enum Verdict {
    /// Records change.
    Part(Part),
    /// Nothing changes: a refusal, or a part without changes. The answer waits for the group all the
    /// same, because it may rest on parts that are not committed yet.
    Nothing,
    /// The decision panicked.
    Panicked,
}

/// What becomes of a decided proposal.
#[derive(Clone, Debug)]
pub(super) enum Outcome {
    /// The state it was decided on, its own part included, is committed here.
    Committed {
        position: Position,
    },
    Full(StoreError),
    TooLarge,
    Invalid(Invalid),
    Panicked,
    Unavailable(Option<StoreError>),
    Unknown(StoreError),
}

/// A proposal, whatever it decides about.
pub(super) trait Proposal: Send {
    /// Whether nobody waits for it any more.
    fn is_abandoned(&self) -> bool;
    fn urgency(&self) -> Urgency;
    /// Decides, again if need be, and keeps what the answer will say.
    fn decide(&mut self, state: &State, now: SystemTime) -> Verdict;
    /// Ends it.
    fn answer(self: Box<Self>, outcome: Outcome);
}

type Answer<T, R> = Result<Receipt<T>, ProposeError<R>>;

struct Pending<D, T, R> {
    decide: D,
    urgency: Urgency,
    decided: Option<Result<T, R>>,
    reply: oneshot::Sender<Answer<T, R>>,
}

impl<D, T, R> Proposal for Pending<D, T, R>
where
    D: Fn(&State, SystemTime) -> Result<(Part, T), R> + Send + Sync,
    T: Send,
    R: Send,
{
    fn is_abandoned(&self) -> bool {
        self.reply.is_closed()
    }

    fn urgency(&self) -> Urgency {
        self.urgency
    }

    fn decide(&mut self, state: &State, now: SystemTime) -> Verdict {
        // A decision only reads the state, so nothing half-changed can be seen after a panic.
        match std::panic::catch_unwind(AssertUnwindSafe(|| (self.decide)(state, now))) {
            Ok(Ok((part, value))) => {
                self.decided = Some(Ok(value));
                if part.changes.is_empty() { Verdict::Nothing } else { Verdict::Part(part) }
            }
            Ok(Err(refusal)) => {
                self.decided = Some(Err(refusal));
                Verdict::Nothing
            }
            Err(_) => Verdict::Panicked,
        }
    }

    fn answer(self: Box<Self>, outcome: Outcome) {
        let answer = match (outcome, self.decided) {
            (Outcome::Committed { position }, Some(Ok(value))) => Ok(Receipt { value, position }),
            (Outcome::Committed { .. }, Some(Err(refusal))) => Err(ProposeError::Refused(refusal)),
            (Outcome::Committed { .. }, None) | (Outcome::Panicked, _) => Err(ProposeError::Panicked),
            (Outcome::Full(error), _) => Err(ProposeError::Full(error)),
            (Outcome::TooLarge, _) => Err(ProposeError::TooLarge),
            (Outcome::Invalid(invalid), _) => Err(ProposeError::Invalid(invalid)),
            (Outcome::Unavailable(error), _) => Err(ProposeError::Unavailable(error)),
            (Outcome::Unknown(error), _) => Err(ProposeError::Unknown(error)),
        };
        // Who dropped its call does not want the answer.
        let _ = self.reply.send(answer);
    }
}

/// Proposals that came together and are decided in this order.
pub(super) type Batch = Vec<Box<dyn Proposal>>;

/// The only writer of a history. Cheap to clone; clones write through the same queue.
#[derive(Clone)]
pub struct Committer {
    queue: mpsc::Sender<Batch>,
}

impl fmt::Debug for Committer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Committer").field("closed", &self.queue.is_closed()).finish()
    }
}

impl Committer {
    pub(super) fn new(queue: mpsc::Sender<Batch>) -> Self {
        Self { queue }
    }

    /// Proposes a decision and waits until its part is durable.
    ///
    /// `decide` is given the newest state and the time, and may run several times: what is random,
    /// costly or outside is made before and moved in. A part without changes commits nothing and its
    /// receipt is that of the state it was decided on. Dropping the call drops the proposal, unless it
    /// is already being written.
    ///
    /// # Errors
    /// See [`ProposeError`].
    pub async fn propose<T, R>(
        &self,
        urgency: Urgency,
        decide: impl Fn(&State, SystemTime) -> Result<(Part, T), R> + Send + Sync + 'static,
    ) -> Result<Receipt<T>, ProposeError<R>>
    where
        T: Send + 'static,
        R: Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let pending = Pending { decide, urgency, decided: None, reply };
        if self.queue.send(vec![Box::new(pending)]).await.is_err() {
            return Err(ProposeError::Unavailable(None));
        }
        answer.await.unwrap_or(Err(ProposeError::Unavailable(None)))
    }

    /// Proposes several decisions at once. Each is a proposal of its own with its own verdict; they are
    /// decided in this order, each on the state that the ones before it left.
    ///
    /// # Errors
    /// See [`ProposeError`], for each.
    pub async fn propose_each<T, R, D>(
        &self,
        urgency: Urgency,
        decisions: Vec<D>,
    ) -> Vec<Result<Receipt<T>, ProposeError<R>>>
    where
        D: Fn(&State, SystemTime) -> Result<(Part, T), R> + Send + Sync + 'static,
        T: Send + 'static,
        R: Send + 'static,
    {
        let mut batch: Batch = Vec::with_capacity(decisions.len());
        let mut answers = Vec::with_capacity(decisions.len());
        for decide in decisions {
            let (reply, answer) = oneshot::channel();
            batch.push(Box::new(Pending { decide, urgency, decided: None, reply }));
            answers.push(answer);
        }
        // A closed queue drops the batch, and with it every sender of an answer.
        let _ = self.queue.send(batch).await;
        let mut results = Vec::with_capacity(answers.len());
        for answer in answers {
            results.push(answer.await.unwrap_or(Err(ProposeError::Unavailable(None))));
        }
        results
    }
}

/// The same changes behind an `Arc`, as feeds share them.
pub(super) type SharedPart = Arc<Part>;
