//! What waits is decided in turn, and written as one group.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;

use futures_util::StreamExt;
use runtime::backoff::Backoff;
use runtime::shutdown::Shutdown;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::{Core, RETRY_FIRST, Reach};
use crate::history::committer::{Batch, Outcome, Proposal, SharedPart, Verdict};
use crate::history::meters::{Ended, Tally};
use crate::history::record;
use crate::history::replica::{Feed, Health, Step};
use crate::history::{
    Appended, Change, Group, MAX_GROUP_BYTES, MAX_PART_RECORDS, MAX_VALUE_BYTES, Position, StoreError, Urgency, Write,
};
use crate::state::State;
use crate::state::model::Part;

/// Room in a group for its head and the committer's own record.
const GROUP_OVERHEAD: usize = 1024;
/// The longest wait before an open outcome is looked at again.
const RETRY_CAP: std::time::Duration = std::time::Duration::from_secs(2);

/// What an append came to in the end.
enum Done {
    Committed(Position),
    Moved,
    Full(StoreError),
    Failed(StoreError),
    Unknown(StoreError),
}

impl Done {
    /// How the write ended; not at all, if it is decided and tried again.
    fn ended(&self) -> Option<Ended> {
        match self {
            Self::Committed(_) => Some(Ended::Committed),
            Self::Moved => None,
            Self::Full(_) => Some(Ended::Full),
            Self::Failed(_) | Self::Unknown(_) => Some(Ended::Failed),
        }
    }
}

/// Proposals decided on one state, and what they come to.
struct Round {
    state: State,
    /// What is decided by, and the stamp.
    now: SystemTime,
    writes: Vec<Vec<Write>>,
    parts: Vec<SharedPart>,
    taken: Vec<Box<dyn Proposal>>,
    tally: Tally,
    urgency: Urgency,
    bytes: usize,
}

impl Core {
    /// Decides, writes and answers until nothing of `waiting` is left.
    pub(super) async fn settle(
        &mut self,
        mut waiting: VecDeque<Box<dyn Proposal>>,
        queue: &mut mpsc::Receiver<Batch>,
        shutdown: &Shutdown,
    ) {
        // Set once the store was found full: from then on only what is more urgent than that is decided.
        let mut full: Option<(StoreError, Urgency)> = None;
        while !waiting.is_empty() {
            if let Some(outcome) = self.hindrance() {
                waiting.drain(..).for_each(|proposal| proposal.answer(outcome.clone()));
                return;
            }
            let began = Instant::now();
            let round = self.decide(&mut waiting, full.as_ref());
            if round.parts.is_empty() {
                // Refusals rest on what is absent, which is only sure at the head.
                if self.reach == Reach::OneProcess || round.taken.is_empty() || self.is_current().await {
                    let outcome = Outcome::Committed { position: *self.state.position() };
                    round.taken.into_iter().for_each(|proposal| proposal.answer(outcome.clone()));
                } else {
                    self.catch_up().await;
                    put_back(&mut waiting, round.taken);
                }
                continue;
            }
            let mut writes = round.writes;
            if let Some(last) = writes.last_mut() {
                last.push(record::meta_of(&round.state, round.now));
            }
            let history = round.state.position().history;
            let begun = (history != self.state.position().history).then_some(history);
            let group = Group::beginning(begun, self.entropy.bytes(), round.now, round.urgency, writes);
            let done = self.append(&group, queue, shutdown).await;
            if let Some(ended) = done.ended() {
                self.meters.record(&round.tally, ended, began.elapsed());
            }
            match done {
                Done::Committed(position) => {
                    self.publish(round.state, position, round.parts);
                    let outcome = Outcome::Committed { position };
                    round.taken.into_iter().for_each(|proposal| proposal.answer(outcome.clone()));
                }
                Done::Moved => {
                    self.catch_up().await;
                    put_back(&mut waiting, round.taken);
                }
                Done::Full(error) => {
                    full = Some((error, round.urgency));
                    put_back(&mut waiting, round.taken);
                }
                Done::Failed(error) => {
                    self.note_failure(&error);
                    let outcome = match error {
                        StoreError::TooLarge => Outcome::TooLarge,
                        error => Outcome::Unavailable(Some(error)),
                    };
                    round.taken.into_iter().for_each(|proposal| proposal.answer(outcome.clone()));
                }
                Done::Unknown(error) => {
                    self.note_failure(&error);
                    let outcome = Outcome::Unknown(error);
                    round.taken.into_iter().for_each(|proposal| proposal.answer(outcome.clone()));
                }
            }
        }
    }

    /// Why nothing can be written now, if so.
    fn hindrance(&self) -> Option<Outcome> {
        match self.board.health() {
            Health::Attached => None,
            Health::Detached | Health::Ended => Some(Outcome::Unavailable(None)),
            Health::NeedsRestart(error) => Some(Outcome::Unavailable(Some(error))),
        }
    }

    /// Decides proposals in turn, each on the state that the ones before it left, until a group is full.
    fn decide(&mut self, waiting: &mut VecDeque<Box<dyn Proposal>>, full: Option<&(StoreError, Urgency)>) -> Round {
        let base = State::clone(&self.state);
        // The stamp of the group. It may be earlier than the one before: nothing decides by it afterwards.
        let now = self.clock.now();
        let mut round = Round {
            state: base,
            now,
            writes: Vec::new(),
            parts: Vec::new(),
            taken: Vec::new(),
            tally: Tally::default(),
            urgency: Urgency::Shrinking,
            bytes: GROUP_OVERHEAD,
        };
        while let Some(mut proposal) = waiting.pop_front() {
            if proposal.is_abandoned() {
                continue;
            }
            if let Some((error, urgency)) = full
                && proposal.urgency() <= *urgency
            {
                proposal.answer(Outcome::Full(error.clone()));
                continue;
            }
            let part = match proposal.decide(&round.state, now) {
                Verdict::Part(part) => part,
                Verdict::Nothing => {
                    round.taken.push(proposal);
                    continue;
                }
                Verdict::Panicked => {
                    proposal.answer(Outcome::Panicked);
                    continue;
                }
            };
            match self.take(&mut round, part, proposal.urgency()) {
                Ok(true) => round.taken.push(proposal),
                Ok(false) => {
                    waiting.push_front(proposal);
                    break;
                }
                Err(outcome) => proposal.answer(outcome),
            }
        }
        round
    }

    /// Adds a part to the round; `false` if the group has no room left for it.
    fn take(&self, round: &mut Round, part: Part, urgency: Urgency) -> Result<bool, Outcome> {
        let mut writes = Vec::with_capacity(part.changes.len() + 1);
        let mut tally = Tally::default();
        let applied = part.changes.iter().try_for_each(|change| {
            tally.count(change, &round.state, round.now);
            writes.extend(record::writes_of(&round.state, &part.scope, change));
            round.state.apply_change(change).map_err(Outcome::Invalid)
        });
        let bytes: usize = writes.iter().map(Write::encoded_len).sum();
        let too_large = writes.len() > MAX_PART_RECORDS
            || writes.iter().any(|write| write.value_len() > MAX_VALUE_BYTES)
            || GROUP_OVERHEAD + bytes > MAX_GROUP_BYTES;
        let verdict = applied.and(if too_large { Err(Outcome::TooLarge) } else { Ok(()) });
        if verdict.is_err() || round.bytes + bytes > MAX_GROUP_BYTES {
            // The part is partly or wholly in the state: go back to what was taken.
            round.state = State::clone(&self.state);
            for taken in &round.parts {
                // Each of them was applied to the same state before.
                round.state.apply(taken).map_err(Outcome::Invalid)?;
            }
            return verdict.map(|()| false);
        }
        round.bytes += bytes;
        round.urgency = round.urgency.min(urgency);
        round.tally.add(&tally);
        round.writes.push(writes);
        round.parts.push(Arc::new(part));
        Ok(true)
    }

    /// Appends after the newest position. When the store leaves the outcome open, reads the history until it
    /// shows this group or another one in its place, and tries the same place again as long as it is free.
    async fn append(&self, group: &Group, queue: &mut mpsc::Receiver<Batch>, shutdown: &Shutdown) -> Done {
        let at = *self.state.position();
        let mut unsure: Option<StoreError> = None;
        let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
        loop {
            match (self.store.append(&at, group).await, unsure.as_ref()) {
                (Ok(Appended::Committed(position)), _) => return Done::Committed(position),
                (Ok(Appended::Moved), None) => return Done::Moved,
                // Somebody's group follows `at`; the first of them says whose.
                (Ok(Appended::Moved), Some(_)) => match self.store.watch(at).next().await {
                    Some(Ok(Change { group: found, position })) if found.id() == group.id() => {
                        return Done::Committed(position);
                    }
                    Some(Ok(_)) => return Done::Moved,
                    Some(Err(error)) if !error.is_retryable() => return Done::Unknown(error),
                    Some(Err(_)) | None => {}
                },
                (Err(StoreError::Unknown(cause)), _) => unsure = Some(StoreError::Unknown(cause)),
                (Err(error @ (StoreError::Full { .. } | StoreError::Exhausted { .. })), None) => {
                    return Done::Full(error);
                }
                (Err(error @ StoreError::Poisoned(_)), _) => return Done::Unknown(error),
                (Err(error), None) => return Done::Failed(error),
                (Err(error), Some(_)) if !error.is_retryable() => return Done::Unknown(error),
                (Err(_), Some(_)) => {}
            }
            let wait = tokio::time::sleep(backoff.next(&self.entropy));
            tokio::pin!(wait);
            loop {
                tokio::select! {
                    () = &mut wait => break,
                    () = shutdown.requested() => return unsure.map_or(Done::Moved, Done::Unknown),
                    // Nothing is decided before this is settled, and nobody is kept waiting for it.
                    Some(batch) = queue.recv() => {
                        batch.into_iter().for_each(|proposal| proposal.answer(Outcome::Unavailable(unsure.clone())));
                    }
                }
            }
        }
    }

    pub(super) fn publish(&mut self, mut state: State, position: Position, parts: Vec<SharedPart>) {
        state.advance(position);
        let step = Step { position, parts };
        self.state = Arc::new(state);
        self.board.publish(Arc::clone(&self.state), Feed::Step(Arc::new(step)));
    }
}

/// What has to be decided again comes before what came later.
fn put_back(waiting: &mut VecDeque<Box<dyn Proposal>>, taken: Vec<Box<dyn Proposal>>) {
    taken.into_iter().rev().for_each(|proposal| waiting.push_front(proposal));
}
