//! The writer: decides what waits, one proposal after another, and appends what they came to as one group.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_core::stream::BoxStream;
use futures_util::StreamExt;
use runtime::backoff::Backoff;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::Shutdown;
use spiffe::id::TrustDomain;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::committer::{Batch, Committer, MAX_WAITING, Outcome, Proposal, SharedPart, Verdict};
use super::record::{self, Reader, Restored};
use super::replica::{Board, Feed, HEAD_DEADLINE, HeadReads, HeadRequest, Health, Replica, Step};
use super::{
    Appended, Change, Group, MAX_GROUP_BYTES, MAX_PART_RECORDS, MAX_VALUE_BYTES, OpenError, Position, Store,
    StoreError, Urgency, Write,
};
use crate::state::State;

/// Room in a group for its head and the committer's own record.
const GROUP_OVERHEAD: usize = 1024;
/// How many batches are taken from the queue at a time.
const MAX_TAKEN: usize = 512;
/// How often the head of a shared store is confirmed, and after how long without it this server is detached.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
const DETACHED_AFTER: Duration = Duration::from_secs(5);
const RETRY_FIRST: Duration = Duration::from_millis(10);
const RETRY_CAP: Duration = Duration::from_secs(2);

/// Who else may write to the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// Nobody: its lock keeps other processes out.
    OneProcess,
    /// Other servers.
    Shared,
}

/// An opened history.
#[derive(Debug)]
pub struct Opened {
    /// For who writes.
    pub committer: Committer,
    /// For who reads.
    pub replica: Replica,
    /// Has to run for either of them to work.
    pub writer: Writer,
}

/// Loads the newest state of a trust domain and makes its history ready.
///
/// # Errors
/// If the store cannot be read, or is another trust domain's.
pub async fn open(
    store: Arc<dyn Store>,
    reach: Reach,
    trust_domain: TrustDomain,
    clock: Clock,
    entropy: Entropy,
) -> Result<Opened, OpenError> {
    let state = Arc::new(load(store.as_ref(), trust_domain).await?);
    let board = Arc::new(Board::new(Arc::clone(&state)));
    let (queue, waiting) = mpsc::channel(MAX_WAITING);
    let (requests, head_requests) = mpsc::channel(MAX_WAITING);
    let heads = match reach {
        Reach::OneProcess => HeadReads::Direct(Arc::clone(&store)),
        Reach::Shared => HeadReads::Shared(requests),
    };
    let replica = Replica::new(Arc::clone(&board), heads);
    let reader = Reader::new(state.trust_domain().clone());
    let core = Core { store, reach, clock, entropy, board, state, reader, confirmed: Instant::now() };
    Ok(Opened { committer: Committer::new(queue), replica, writer: Writer { core, waiting, head_requests } })
}

/// How many entries are put into the state at a time while it is loaded.
const LOAD_CHUNK: usize = 4096;

async fn load(store: &dyn Store, trust_domain: TrustDomain) -> Result<State, OpenError> {
    let (position, mut pages) = store.load().await?;
    let mut reader = Reader::new(trust_domain.clone());
    let mut state = State::empty(trust_domain.clone(), position);
    let mut entries = Vec::with_capacity(LOAD_CHUNK);
    while let Some(page) = pages.next().await {
        for record in page? {
            match reader.restore(&mut state, &record).map_err(StoreError::from)? {
                Restored::Done => {}
                Restored::Entry(entry) => entries.push(entry),
                Restored::Meta(meta) if meta.trust_domain == trust_domain => {}
                Restored::Meta(meta) => {
                    return Err(OpenError::OtherTrustDomain { found: meta.trust_domain, configured: trust_domain });
                }
            }
        }
        if entries.len() >= LOAD_CHUNK {
            state.restore_entries(std::mem::take(&mut entries))?;
        }
    }
    state.restore_entries(entries)?;
    Ok(state)
}

/// The task behind a [`Committer`] and its [`Replica`]s.
pub struct Writer {
    core: Core,
    waiting: mpsc::Receiver<Batch>,
    head_requests: mpsc::Receiver<HeadRequest>,
}

impl std::fmt::Debug for Writer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Writer").field("position", self.core.state.position()).finish()
    }
}

impl Writer {
    /// Works until `shutdown`, then finishes what is already in the queue.
    pub async fn run(mut self, shutdown: Shutdown) {
        match self.core.reach {
            Reach::OneProcess => self.run_alone(&shutdown).await,
            Reach::Shared => self.run_among_others(&shutdown).await,
        }
        self.waiting.close();
        let mut batches = Vec::new();
        while self.waiting.recv_many(&mut batches, MAX_TAKEN).await > 0 {
            self.core.settle(batches.drain(..).flatten().collect(), &mut self.waiting, &shutdown).await;
        }
        self.core.board.set_health(Health::Ended);
    }

    async fn run_alone(&mut self, shutdown: &Shutdown) {
        let mut batches = Vec::new();
        loop {
            tokio::select! {
                biased;
                taken = self.waiting.recv_many(&mut batches, MAX_TAKEN) => if taken == 0 { return },
                () = shutdown.requested() => return,
            }
            self.core.settle(batches.drain(..).flatten().collect(), &mut self.waiting, shutdown).await;
        }
    }

    async fn run_among_others(&mut self, shutdown: &Shutdown) {
        let mut batches = Vec::new();
        let mut requests = Vec::new();
        let mut confirm = tokio::time::interval(CONFIRM_EVERY);
        confirm.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut others = self.core.store.watch(*self.core.state.position());
        loop {
            tokio::select! {
                taken = self.waiting.recv_many(&mut batches, MAX_TAKEN) => {
                    if taken == 0 { return }
                    self.core.settle(batches.drain(..).flatten().collect(), &mut self.waiting, shutdown).await;
                }
                change = others.next() => if !self.core.follow(change).await {
                    others = self.core.store.watch(*self.core.state.position());
                },
                _ = self.head_requests.recv_many(&mut requests, MAX_WAITING) => {
                    let head = self.core.confirm().await;
                    for request in requests.drain(..) {
                        // Who dropped its call does not want the answer.
                        let _ = request.send(head.clone());
                    }
                }
                _ = confirm.tick() => {
                    // A failure shows in the health, and everything else is unchanged by it.
                    let _ = self.core.confirm().await;
                }
                () = shutdown.requested() => return,
            }
        }
    }
}

/// What an append came to in the end.
enum Done {
    Committed(Position),
    Moved,
    Full(StoreError),
    Failed(StoreError),
    Unknown(StoreError),
}

/// Proposals decided on one state, and what they come to.
struct Round {
    state: State,
    writes: Vec<Vec<Write>>,
    parts: Vec<SharedPart>,
    taken: Vec<Box<dyn Proposal>>,
    urgency: Urgency,
    bytes: usize,
}

struct Core {
    store: Arc<dyn Store>,
    reach: Reach,
    clock: Clock,
    entropy: Entropy,
    board: Arc<Board>,
    state: Arc<State>,
    reader: Reader,
    confirmed: Instant,
}

impl Core {
    /// Decides, writes and answers until nothing of `waiting` is left.
    async fn settle(
        &mut self,
        mut waiting: VecDeque<Box<dyn Proposal>>,
        queue: &mut mpsc::Receiver<Batch>,
        shutdown: &Shutdown,
    ) {
        // Set once the store was found full: from then on only what shrinks is decided.
        let mut full: Option<StoreError> = None;
        while !waiting.is_empty() {
            if let Some(outcome) = self.hindrance() {
                waiting.drain(..).for_each(|proposal| proposal.answer(outcome.clone()));
                return;
            }
            let round = self.decide(&mut waiting, full.as_ref());
            if round.parts.is_empty() {
                // Refusals rest on what is absent, which is only sure at the head.
                if self.reach == Reach::OneProcess || round.taken.is_empty() || self.is_current().await {
                    let outcome = Outcome::Committed { position: *self.state.position(), at: self.state.at() };
                    round.taken.into_iter().for_each(|proposal| proposal.answer(outcome.clone()));
                } else {
                    self.catch_up().await;
                    put_back(&mut waiting, round.taken);
                }
                continue;
            }
            let mut writes = round.writes;
            if let Some(last) = writes.last_mut() {
                last.push(record::meta_of(&round.state));
            }
            let group = Group::new(self.entropy.bytes(), round.state.at(), round.urgency, writes);
            match self.append(&group, queue, shutdown).await {
                Done::Committed(position) => {
                    self.publish(round.state, position, round.parts);
                    let outcome = Outcome::Committed { position, at: group.at() };
                    round.taken.into_iter().for_each(|proposal| proposal.answer(outcome.clone()));
                }
                Done::Moved => {
                    self.catch_up().await;
                    put_back(&mut waiting, round.taken);
                }
                Done::Full(error) => {
                    if full.is_some() {
                        // Nothing but shrinking proposals is left, and even for them there is no room.
                        let outcome = Outcome::Full(error);
                        round.taken.into_iter().for_each(|proposal| proposal.answer(outcome.clone()));
                    } else {
                        full = Some(error);
                        put_back(&mut waiting, round.taken);
                    }
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
    fn decide(&mut self, waiting: &mut VecDeque<Box<dyn Proposal>>, full: Option<&StoreError>) -> Round {
        let base = State::clone(&self.state);
        let now = self.clock.now().max(base.at());
        let mut round = Round {
            state: base,
            writes: Vec::new(),
            parts: Vec::new(),
            taken: Vec::new(),
            urgency: Urgency::Shrinking,
            bytes: GROUP_OVERHEAD,
        };
        round.state.stamp(now);
        while let Some(mut proposal) = waiting.pop_front() {
            if proposal.is_abandoned() {
                continue;
            }
            if let (Some(error), Urgency::Normal) = (full, proposal.urgency()) {
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
    fn take(&self, round: &mut Round, part: crate::state::model::Part, urgency: Urgency) -> Result<bool, Outcome> {
        let mut writes = Vec::with_capacity(part.changes.len() + 1);
        let applied = part.changes.iter().try_for_each(|change| {
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
            let now = round.state.at();
            round.state = State::clone(&self.state);
            round.state.stamp(now);
            for taken in &round.parts {
                // Each of them was applied to the same state before.
                round.state.apply(now, taken).map_err(Outcome::Invalid)?;
            }
            return verdict.map(|()| false);
        }
        round.bytes += bytes;
        round.urgency = round.urgency.min(urgency);
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
                (Err(error @ StoreError::Full { .. }), None) => return Done::Full(error),
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

    fn publish(&mut self, mut state: State, position: Position, parts: Vec<SharedPart>) {
        state.advance(position);
        let step = Step { position, at: state.at(), parts };
        self.state = Arc::new(state);
        self.board.publish(Arc::clone(&self.state), Feed::Step(Arc::new(step)));
    }

    fn note_failure(&mut self, error: &StoreError) {
        if !error.is_retryable() && !matches!(error, StoreError::TooLarge) {
            tracing::error!(error = %error, cause = ?error, "The store failed; restart the server");
            self.board.set_health(Health::NeedsRestart(error.clone()));
        }
    }

    async fn is_current(&mut self) -> bool {
        self.confirm().await.is_ok_and(|head| head == *self.state.position())
    }

    /// Reads the head of a shared store, and notes whether this server is attached to it.
    async fn confirm(&mut self) -> Result<Position, StoreError> {
        let head = match tokio::time::timeout(HEAD_DEADLINE, self.store.head()).await {
            Ok(head) => head,
            Err(elapsed) => Err(StoreError::Unreachable(Arc::new(elapsed))),
        };
        let health = self.board.health();
        match &head {
            Ok(_) => {
                self.confirmed = Instant::now();
                if matches!(health, Health::Detached) {
                    tracing::info!("The store is reached again");
                    self.board.set_health(Health::Attached);
                }
            }
            Err(error) => {
                self.note_failure(error);
                if health.is_attached() && error.is_retryable() && self.confirmed.elapsed() >= DETACHED_AFTER {
                    tracing::error!(error = %error, "The store is out of reach: nothing is written until it is back");
                    self.board.set_health(Health::Detached);
                }
            }
        }
        head
    }

    /// Applies what others committed, up to the head; as far as it gets, when the store fails on the way.
    async fn catch_up(&mut self) {
        let before = *self.state.position();
        if let Ok(head) = self.confirm().await {
            let mut changes: BoxStream<'static, _> = self.store.watch(before);
            while self.state.position().revision < head.revision || self.state.position().history != head.history {
                let next = tokio::time::timeout(HEAD_DEADLINE, changes.next()).await;
                let Ok(change) = next else { break };
                if !self.follow(change).await {
                    break;
                }
            }
        }
        if *self.state.position() == before {
            // No way forward for now: the caller comes again, and not at once.
            tokio::time::sleep(RETRY_FIRST).await;
        }
    }

    /// Applies one change of others; `false` if the stream it came from is of no more use.
    async fn follow(&mut self, change: Option<Result<Change, StoreError>>) -> bool {
        match change {
            Some(Ok(change)) if change.position.revision <= self.state.position().revision => true,
            Some(Ok(change)) => match self.applied(&change) {
                Ok((state, parts)) => {
                    self.publish(state, change.position, parts);
                    true
                }
                Err(error) => {
                    self.note_failure(&error);
                    false
                }
            },
            Some(Err(StoreError::Compacted | StoreError::Forked)) => {
                self.reload().await;
                false
            }
            Some(Err(error)) => {
                self.note_failure(&error);
                false
            }
            None => false,
        }
    }

    fn applied(&mut self, change: &Change) -> Result<(State, Vec<SharedPart>), StoreError> {
        let mut state = State::clone(&self.state);
        state.stamp(change.group.at());
        let mut parts = Vec::new();
        for writes in change.group.parts() {
            let mut changes = Vec::new();
            for write in writes {
                if let Some(change) = self.reader.change_of(&state, write)? {
                    state.apply_change(&change).map_err(record::RecordError::from)?;
                    changes.push(change);
                }
            }
            let scope =
                writes.first().map_or_else(crate::state::model::Scope::trust_domain, |write| write.key().scope.clone());
            parts.push(Arc::new(crate::state::model::Part { scope, changes }));
        }
        Ok((state, parts))
    }

    async fn reload(&mut self) {
        match load(self.store.as_ref(), self.state.trust_domain().clone()).await {
            Ok(state) => {
                tracing::warn!(position = ?state.position(), "The history was loaded anew");
                self.state = Arc::new(state);
                self.board.publish(Arc::clone(&self.state), Feed::Everything);
            }
            Err(OpenError::Store(error)) => self.note_failure(&error),
            Err(error) => {
                let error = StoreError::Poisoned(Arc::new(error));
                self.note_failure(&error);
            }
        }
    }
}

/// What has to be decided again comes before what came later.
fn put_back(waiting: &mut VecDeque<Box<dyn Proposal>>, taken: Vec<Box<dyn Proposal>>) {
    taken.into_iter().rev().for_each(|proposal| waiting.push_front(proposal));
}
