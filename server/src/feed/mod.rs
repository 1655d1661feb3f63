//! Push to agents: whom a change concerns, and what each stream has been sent.
//!
//! The history only says which agents to look at. What is sent is always the difference between what a stream has been
//! sent and what its agent may have now ([`session`], [`view`]). So a lost or doubled mark costs time and never
//! content.

pub mod session;
mod time;
pub mod view;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use arc_swap::ArcSwap;
use runtime::shutdown::Shutdown;
use spiffe::id::SpiffeId;
use tokio::sync::Notify;

use crate::history::replica::{self, Changes, Replica};
use crate::registry::authorized::{Concerned, agents_concerned_by};
use crate::state::State;

/// Streams that one agent may have. It needs one, and a second one while it changes connections.
const STREAMS_PER_AGENT: usize = 4;

/// Tells one stream that its agent is to be looked at.
#[derive(Debug, Default)]
struct Mark {
    dirty: AtomicBool,
    displaced: AtomicBool,
    woken: Notify,
}

impl Mark {
    fn set(&self) {
        self.dirty.store(true, Ordering::SeqCst);
        self.woken.notify_one();
    }
}

type Marks = HashMap<SpiffeId, Vec<Arc<Mark>>>;

#[derive(Debug)]
struct Shared {
    marks: Mutex<Marks>,
    /// The newest state up to which all marks have been set.
    seen: ArcSwap<State>,
}

/// The registry of open streams. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct Feed {
    shared: Arc<Shared>,
    replica: Replica,
}

/// One open stream's place in the feed; closing it is dropping it.
#[derive(Debug)]
pub struct Place {
    shared: Arc<Shared>,
    agent: SpiffeId,
    mark: Arc<Mark>,
}

/// What a stream was woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wake {
    /// Something that concerns its agent may have changed.
    Dirty,
    /// Its agent opened too many newer streams.
    Displaced,
}

impl Place {
    /// Waits until the stream is to look at its agent again. Marks set before the wait are not lost.
    pub async fn woken(&self) -> Wake {
        loop {
            if self.mark.displaced.load(Ordering::SeqCst) {
                return Wake::Displaced;
            }
            if self.mark.dirty.swap(false, Ordering::SeqCst) {
                return Wake::Dirty;
            }
            self.mark.woken.notified().await;
        }
    }

    /// The newest state up to which every concerned stream was marked.
    pub fn seen(&self) -> Arc<State> {
        self.shared.seen.load_full()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::gauge!("sync.streams").decrement(1.0);
        let mut marks = self.shared.marks.lock().unwrap_or_else(PoisonError::into_inner);
        if let Entry::Occupied(mut held) = marks.entry(self.agent.clone()) {
            held.get_mut().retain(|mark| !Arc::ptr_eq(mark, &self.mark));
            if held.get().is_empty() {
                held.remove();
            }
        }
    }
}

impl Feed {
    /// A feed of `replica` without streams.
    pub fn new(replica: Replica) -> Self {
        let shared = Shared { marks: Mutex::default(), seen: ArcSwap::new(replica.latest()) };
        Self { shared: Arc::new(shared), replica }
    }

    /// Opens a stream of `agent`. To be called before the state of its first view is read.
    pub fn open(&self, agent: &SpiffeId) -> Place {
        let mark = Arc::new(Mark::default());
        let mut marks = self.shared.marks.lock().unwrap_or_else(PoisonError::into_inner);
        let held = marks.entry(agent.clone()).or_default();
        if held.len() >= STREAMS_PER_AGENT
            && let Some(oldest) = held.first()
        {
            oldest.displaced.store(true, Ordering::SeqCst);
            oldest.woken.notify_one();
            held.remove(0);
        }
        held.push(Arc::clone(&mark));
        metrics::gauge!("sync.streams").increment(1.0);
        Place { shared: Arc::clone(&self.shared), agent: agent.clone(), mark }
    }

    /// How many streams are open.
    pub fn streams(&self) -> usize {
        self.shared.marks.lock().unwrap_or_else(PoisonError::into_inner).values().map(Vec::len).sum()
    }

    fn mark(&self, concerned: &Concerned) {
        let marks = self.shared.marks.lock().unwrap_or_else(PoisonError::into_inner);
        match concerned {
            Concerned::Everyone => marks.values().flatten().for_each(|mark| mark.set()),
            Concerned::Agents(agents) => {
                agents.iter().filter_map(|agent| marks.get(agent)).flatten().for_each(|mark| mark.set());
            }
        }
    }

    /// Marks streams as revisions come, until shutdown is requested or the history ends.
    pub async fn run(self, shutdown: Shutdown) {
        let changes = self.replica.changes();
        // What came before the subscription is in nobody's queue.
        self.shared.seen.store(self.replica.latest());
        self.mark(&Concerned::Everyone);
        tokio::select! {
            () = self.follow(changes) => {}
            () = shutdown.requested() => {}
        }
    }

    async fn follow(&self, mut changes: Changes) {
        let mut steps: Vec<Arc<replica::Step>> = Vec::new();
        while let Some(told) = changes.next().await {
            let step = match told {
                replica::Feed::Step(step) => step,
                replica::Feed::Everything => {
                    steps.clear();
                    self.shared.seen.store(self.replica.latest());
                    self.mark(&Concerned::Everyone);
                    continue;
                }
            };
            let before = self.shared.seen.load_full();
            if step.position.revision <= before.position().revision {
                continue;
            }
            let revision = step.position.revision;
            steps.push(step);
            // The concerned are found between two states, so all steps between them are taken together.
            let after = self.replica.latest();
            if revision < after.position().revision {
                continue;
            }
            let changes = steps.iter().flat_map(|step| &step.parts).flat_map(|part| &part.changes);
            let concerned = agents_concerned_by(&before, &after, changes);
            self.shared.seen.store(after);
            self.mark(&concerned);
            steps.clear();
        }
    }
}

#[cfg(test)]
mod tests;
