//! The writer: decides what waits, one proposal after another, and appends what they came to as one group.

mod deciding;
mod following;

use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::Shutdown;
use spiffe::id::TrustDomain;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::committer::{Batch, Committer, MAX_WAITING};
use super::meters::Meters;
use super::record::{Reader, Restored};
use super::replica::{Board, HeadReads, HeadRequest, Health, Replica};
use super::{OpenError, Position, Record, Store, StoreError};
use crate::state::State;
use crate::state::model::Entry;

/// How many batches are taken from the queue at a time.
const MAX_TAKEN: usize = 512;
/// How often the head of a shared store is confirmed, and after how long without it this server is detached.
const CONFIRM_EVERY: Duration = Duration::from_secs(1);
const DETACHED_AFTER: Duration = Duration::from_secs(5);
/// The first wait before the store is tried again.
const RETRY_FIRST: Duration = Duration::from_millis(10);

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
    let meters = Meters::default();
    let core = Core { store, reach, clock, entropy, board, state, reader, meters, confirmed: Instant::now() };
    Ok(Opened { committer: Committer::new(queue), replica, writer: Writer { core, waiting, head_requests } })
}

/// How many entries are put into the state at a time while it is loaded.
const LOAD_CHUNK: usize = 4096;

/// Makes a state of all its records, which may come in any order.
pub struct Loader {
    reader: Reader,
    state: State,
    entries: Vec<Arc<Entry>>,
}

impl Loader {
    /// Nothing yet of a trust domain's state at `position`.
    pub fn new(trust_domain: TrustDomain, position: Position) -> Self {
        Self {
            reader: Reader::new(trust_domain.clone()),
            state: State::empty(trust_domain, position),
            entries: Vec::with_capacity(LOAD_CHUNK),
        }
    }

    /// Takes one record.
    ///
    /// # Errors
    /// If it cannot be read, contradicts another, or is another trust domain's.
    pub fn take(&mut self, record: &Record) -> Result<(), OpenError> {
        match self.reader.restore(&mut self.state, record).map_err(StoreError::from)? {
            Restored::Done => {}
            Restored::Entry(entry) => self.entries.push(entry),
            Restored::Meta(meta) if meta.trust_domain == *self.state.trust_domain() => {}
            Restored::Meta(meta) => {
                let configured = self.state.trust_domain().clone();
                return Err(OpenError::OtherTrustDomain { found: meta.trust_domain, configured });
            }
        }
        if self.entries.len() >= LOAD_CHUNK {
            self.state.restore_entries(std::mem::take(&mut self.entries))?;
        }
        Ok(())
    }

    /// The state.
    ///
    /// # Errors
    /// If records contradict each other.
    pub fn finish(mut self) -> Result<State, OpenError> {
        self.state.restore_entries(self.entries)?;
        Ok(self.state)
    }
}

async fn load(store: &dyn Store, trust_domain: TrustDomain) -> Result<State, OpenError> {
    let (position, mut pages) = store.load().await?;
    let mut loader = Loader::new(trust_domain, position);
    while let Some(page) = pages.next().await {
        for record in page? {
            loader.take(&record)?;
        }
    }
    loader.finish()
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

struct Core {
    store: Arc<dyn Store>,
    reach: Reach,
    clock: Clock,
    entropy: Entropy,
    board: Arc<Board>,
    state: Arc<State>,
    reader: Reader,
    meters: Meters,
    confirmed: Instant,
}
