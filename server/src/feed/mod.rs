//! Push to agents: whom a change concerns, and what each stream has been sent.
//!
//! The history only says which agents to look at, and at what ([`look`]). What is sent is always the difference between
//! what a stream has been sent and what its agent may have now ([`session`]). So a lost or doubled mark costs time and
//! never content.

pub mod look;
pub mod session;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use runtime::clock::Clock;
use runtime::shutdown::Shutdown;
use runtime::steady::Steady;
use spiffe::id::SpiffeId;
use tokio::sync::Notify;

use self::look::Look;
use crate::history::Position;
use crate::history::replica::{self, Replica};
use crate::registry::authorized::{Concerned, agents_concerned_by};
use crate::state::State;
use crate::state::model::Change;

/// Streams that one agent may have. It needs one, and a second one while it changes connections.
const STREAMS_PER_AGENT: usize = 4;

/// Tells one stream that its agent is to be looked at.
#[derive(Debug, Default)]
struct Mark {
    dirty: AtomicBool,
    displaced: AtomicBool,
    woken: Notify,
    /// What its next look is to cover. Touched only by who holds the table.
    look: Mutex<Look>,
}

impl Mark {
    fn set(&self, look: &Look) {
        self.look.lock().unwrap_or_else(PoisonError::into_inner).add(look);
        self.dirty.store(true, Ordering::SeqCst);
        self.woken.notify_one();
    }
}

type Marks = HashMap<SpiffeId, Vec<Arc<Mark>>>;

/// The open streams, and the newest state up to which all their marks have been set: one lock, so that whoever takes a
/// mark knows up to where it reaches.
#[derive(Debug)]
struct Table {
    marks: Marks,
    seen: Arc<State>,
}

#[derive(Debug)]
struct Shared(Mutex<Table>);

impl Shared {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The registry of open streams. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct Feed {
    shared: Arc<Shared>,
    replica: Replica,
    clock: Clock,
    steady: Steady,
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

    /// What the stream is to look at, and the state at which: everything that was touched up to there is covered.
    /// `last` is the state of its last look; it never goes back behind that.
    pub fn take(&self, last: &Arc<State>) -> (Look, Arc<State>) {
        let table = self.shared.table();
        let look = std::mem::take(&mut *self.mark.look.lock().unwrap_or_else(PoisonError::into_inner));
        let is_behind = table.seen.position().history == last.position().history
            && table.seen.position().revision < last.position().revision;
        (look, Arc::clone(if is_behind { last } else { &table.seen }))
    }

    /// The newest position at which a stream is whole whose last look was at `last`.
    pub fn position(&self, last: &State) -> Position {
        let table = self.shared.table();
        let is_whole = self.mark.look.lock().unwrap_or_else(PoisonError::into_inner).is_nothing();
        let is_ahead = table.seen.position().history == last.position().history
            && table.seen.position().revision > last.position().revision;
        if is_whole && is_ahead { *table.seen.position() } else { *last.position() }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        metrics::gauge!("sync.streams").decrement(1.0);
        let mut table = self.shared.table();
        if let Entry::Occupied(mut held) = table.marks.entry(self.agent.clone()) {
            held.get_mut().retain(|mark| !Arc::ptr_eq(mark, &self.mark));
            if held.get().is_empty() {
                held.remove();
            }
        }
    }
}

impl Feed {
    /// A feed of `replica` without streams. Entries end by `clock`, and whenever `steady` notices that it was set,
    /// everybody looks at everything again.
    pub fn new(replica: Replica, clock: Clock, steady: Steady) -> Self {
        let table = Table { marks: Marks::default(), seen: replica.latest() };
        Self { shared: Arc::new(Shared(Mutex::new(table))), replica, clock, steady }
    }

    /// Opens a stream of `agent`. To be called before the state of its first view is read.
    pub fn open(&self, agent: &SpiffeId) -> Place {
        let mark = Arc::new(Mark::default());
        let mut table = self.shared.table();
        let held = table.marks.entry(agent.clone()).or_default();
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
        self.shared.table().marks.values().map(Vec::len).sum()
    }

    /// Shows the streams of all agents `state`, of which they have to look at everything.
    fn mark_all(&self, state: Arc<State>) {
        let mut table = self.shared.table();
        table.seen = state;
        table.marks.values().flatten().for_each(|mark| mark.set(&Look::Everything));
    }

    /// Marks the streams that changes between two states concern.
    fn mark<'c>(&self, before: &State, after: Arc<State>, changes: impl Iterator<Item = &'c Change> + Clone) {
        let concerned = agents_concerned_by(before, &after, changes.clone());
        let look = look::touched(before, &after, changes);
        let mut table = self.shared.table();
        match concerned {
            Concerned::Everyone => table.marks.values().flatten().for_each(|mark| mark.set(&look)),
            Concerned::Agents(agents) => {
                for agent in agents {
                    let Some(marks) = table.marks.get(&agent) else { continue };
                    let changed = look::has_other_selectors(before, &after, &agent);
                    marks.iter().for_each(|mark| mark.set(if changed { &Look::Everything } else { &look }));
                }
            }
        }
        table.seen = after;
    }

    /// Marks streams as revisions come and entries end, until shutdown is requested or the history ends.
    pub async fn run(self, shutdown: Shutdown) {
        let mut changes = self.replica.changes();
        let mut steps_of_clock = self.steady.steps();
        // What came before the subscription is in nobody's queue.
        self.mark_all(self.replica.latest());
        let mut steps: Vec<Arc<replica::Step>> = Vec::new();
        let mut ended_until = self.clock.now();
        loop {
            let seen = Arc::clone(&self.shared.table().seen);
            let next_end = look::next_end(&seen, ended_until);
            tokio::select! {
                told = changes.next() => match told {
                    Some(replica::Feed::Step(step)) => self.follow(step, &mut steps),
                    Some(replica::Feed::Everything) => {
                        steps.clear();
                        self.mark_all(self.replica.latest());
                    }
                    None => return,
                },
                () = self.sleep_until(next_end) => {
                    let now = self.clock.now();
                    self.mark_ended(&seen, ended_until, now);
                    ended_until = now;
                }
                stepped = steps_of_clock.changed() => {
                    if stepped.is_err() {
                        return;
                    }
                    ended_until = self.clock.now();
                    self.mark_all(seen);
                }
                () = shutdown.requested() => return,
            }
        }
    }

    async fn sleep_until(&self, at: Option<SystemTime>) {
        match at {
            Some(at) => self.clock.sleep_until(at).await,
            None => std::future::pending().await,
        }
    }

    /// An entry that has ended is gone to agents, though its record may stay for a while.
    fn mark_ended(&self, seen: &Arc<State>, from: SystemTime, to: SystemTime) {
        let ended = look::ended_between(seen, from, to);
        if !ended.is_empty() {
            self.mark(seen, Arc::clone(seen), ended.iter());
        }
    }

    fn follow(&self, step: Arc<replica::Step>, steps: &mut Vec<Arc<replica::Step>>) {
        let before = Arc::clone(&self.shared.table().seen);
        if step.position.revision <= before.position().revision {
            return;
        }
        let revision = step.position.revision;
        steps.push(step);
        // The concerned are found between two states, so all steps between them are taken together.
        let after = self.replica.latest();
        if revision < after.position().revision {
            return;
        }
        let changes = steps.iter().flat_map(|step| &step.parts).flat_map(|part| &part.changes);
        self.mark(&before, after, changes);
        steps.clear();
    }
}

#[cfg(test)]
mod tests;
