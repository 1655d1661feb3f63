//! Counters of what is written, under the names by which dashboards of SPIRE know them.
//!
//! SPIRE counts calls of its data store. Here reads are answered from memory and are not counted; a write is counted
//! once for each entry, node, join token or bundle that it changes, when it is known how the write ended.

use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use metrics::{Counter, Histogram};

use crate::state::State;
use crate::state::model::Change;

/// What a change does, as far as it is counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Operation {
    EntryCreate,
    EntryUpdate,
    EntryDelete,
    EntryPrune,
    NodeCreate,
    NodeUpdate,
    NodeDelete,
    TokenCreate,
    TokenDelete,
    TokenPrune,
    BundleCreate,
    BundleUpdate,
    BundleDelete,
}

/// The names, in the order of [`Operation`].
const NAMES: [&str; 13] = [
    "datastore.registration_entry.create",
    "datastore.registration_entry.update",
    "datastore.registration_entry.delete",
    "datastore.registration_entry.prune",
    "datastore.node.create",
    "datastore.node.update",
    "datastore.node.delete",
    "datastore.join_token.create",
    "datastore.join_token.delete",
    "datastore.join_token.prune",
    "datastore.bundle.create",
    "datastore.bundle.update",
    "datastore.bundle.delete",
];

impl Operation {
    /// What `change` does to `state` at `now`; none if nobody counts it.
    fn of(change: &Change, state: &State, now: SystemTime) -> Option<Self> {
        Some(match change {
            Change::PutEntry(entry) if state.entry(&entry.id).is_none() => Self::EntryCreate,
            Change::PutEntry(_) => Self::EntryUpdate,
            Change::RemoveEntry(id) if state.entry(id)?.is_expired(now) => Self::EntryPrune,
            Change::RemoveEntry(_) => Self::EntryDelete,
            Change::PutAgent(agent) if state.agent(&agent.id).is_none() => Self::NodeCreate,
            Change::PutAgent(_) => Self::NodeUpdate,
            Change::RemoveAgent(id) => state.agent(id).map(|_| Self::NodeDelete)?,
            Change::PutToken(_) => Self::TokenCreate,
            Change::RemoveToken(hash) if state.token(hash)?.is_expired(now) => Self::TokenPrune,
            Change::RemoveToken(_) => Self::TokenDelete,
            // Whatever a part changes of a bundle, it says so once by this.
            Change::PutBundleInfo { trust_domain, .. } if state.bundle(trust_domain).is_none() => Self::BundleCreate,
            Change::PutBundleInfo { .. } => Self::BundleUpdate,
            Change::RemoveBundle(trust_domain) => state.bundle(trust_domain).map(|_| Self::BundleDelete)?,
            Change::PutX509Authority { .. }
            | Change::RemoveX509Authority { .. }
            | Change::PutJwtAuthority { .. }
            | Change::RemoveJwtAuthority { .. }
            | Change::PutSlot(_)
            | Change::RemoveSlot { .. }
            | Change::BeginHistory(_) => return None,
        })
    }
}

/// How often each operation stands in what is to be written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Tally([usize; NAMES.len()]);

impl Tally {
    /// Counts a change that is about to be applied to `state` at `now`.
    pub(super) fn count(&mut self, change: &Change, state: &State, now: SystemTime) {
        let operation = Operation::of(change, state, now).and_then(|operation| self.0.get_mut(operation as usize));
        if let Some(times) = operation {
            *times += 1;
        }
    }

    pub(super) fn add(&mut self, other: &Self) {
        self.0.iter_mut().zip(other.0).for_each(|(times, more)| *times += more);
    }
}

/// How a write ended, by the status that its caller is given.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ended {
    Committed,
    Full,
    /// Not written, or nobody knows.
    Failed,
}

/// The labels, in the order of [`Ended`].
const STATUSES: [&str; 3] = ["OK", "ResourceExhausted", "Unavailable"];

/// One meter an operation and ending; made when first needed, and then only added to.
#[derive(Default)]
pub(super) struct Meters([[OnceLock<(Counter, Histogram)>; STATUSES.len()]; NAMES.len()]);

impl Meters {
    /// Counts what was in a write that took so long.
    pub(super) fn record(&self, tally: &Tally, ended: Ended, took: Duration) {
        for ((name, meters), times) in NAMES.iter().zip(&self.0).zip(tally.0).filter(|(_, times)| *times > 0) {
            let (Some(meter), Some(status)) = (meters.get(ended as usize), STATUSES.get(ended as usize)) else {
                continue;
            };
            let (counter, elapsed) = meter.get_or_init(|| {
                let elapsed = metrics::histogram!(format!("{name}.elapsed_time"), "status" => *status);
                (metrics::counter!(*name, "status" => *status), elapsed)
            });
            counter.increment(times as u64);
            elapsed.record_many(took.as_secs_f64() * 1_000.0, times);
        }
    }
}

#[cfg(test)]
mod tests;
