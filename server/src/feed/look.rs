//! What a revision touched, and what a stream is therefore to look at. Pure.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use spiffe::id::SpiffeId;

use crate::state::model::{Change, Entry, EntryId};
use crate::state::{Ending, State};

/// How many touched entries a stream compares one by one; beyond that it takes the whole difference.
pub const MOST_TOUCHED: usize = 256;

/// What a stream has to look at to be right again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Look {
    /// At these and at nothing else.
    Touched {
        /// Entries that may be others, or somebody else's, than they were.
        entries: BTreeSet<EntryId>,
        /// Any bundle may be another one.
        bundles: bool,
    },
    /// At all that its agent may have.
    Everything,
}

impl Default for Look {
    /// At nothing.
    fn default() -> Self {
        Self::Touched { entries: BTreeSet::new(), bundles: false }
    }
}

impl Look {
    /// Whether there is nothing to look at.
    pub fn is_nothing(&self) -> bool {
        matches!(self, Self::Touched { entries, bundles: false } if entries.is_empty())
    }

    /// Adds what another revision touched.
    pub fn add(&mut self, other: &Self) {
        if let (Self::Touched { entries, bundles }, Self::Touched { entries: more, bundles: also }) =
            (&mut *self, other)
            && entries.len() + more.len() <= MOST_TOUCHED
        {
            entries.extend(more.iter().map(Arc::clone));
            *bundles |= also;
        } else {
            *self = Self::Everything;
        }
    }
}

/// What the changes between two states touched, for all agents alike.
///
/// A touched entry that is an alias, or that others stand below, before or after, decides about entries that are not
/// touched: then everything is to be looked at.
pub fn touched<'c>(before: &State, after: &State, changes: impl IntoIterator<Item = &'c Change>) -> Look {
    let states = [before, after];
    let decides = |entry: &Entry| {
        entry.parent_id == *after.server_id()
            || states.iter().any(|state| state.entries_by_parent(&entry.spiffe_id).next().is_some())
    };
    let (mut touched, mut any_bundle) = (BTreeSet::new(), false);
    for change in changes {
        let (id, put) = match change {
            Change::PutEntry(entry) => (&entry.id, Some(entry)),
            Change::RemoveEntry(id) => (id, None),
            Change::PutBundleInfo { .. }
            | Change::RemoveBundle(_)
            | Change::PutX509Authority { .. }
            | Change::RemoveX509Authority { .. }
            | Change::PutJwtAuthority { .. }
            | Change::RemoveJwtAuthority { .. } => {
                any_bundle = true;
                continue;
            }
            // An agent's own record is asked for by [`has_other_selectors`].
            Change::PutAgent(_)
            | Change::RemoveAgent(_)
            | Change::PutToken(_)
            | Change::RemoveToken(_)
            | Change::PutSlot(_)
            | Change::RemoveSlot { .. }
            | Change::BeginHistory(_) => continue,
        };
        let held = states.into_iter().filter_map(|state| state.entry(id));
        if held.chain(put).any(|entry| decides(entry)) || touched.len() == MOST_TOUCHED {
            return Look::Everything;
        }
        touched.insert(Arc::clone(id));
    }
    Look::Touched { entries: touched, bundles: any_bundle }
}

/// Whether the agent shows other selectors than before, so that other aliases may be its own. A record changes with each
/// renewal, and nearly always in this respect not.
pub fn has_other_selectors(before: &State, after: &State, agent: &SpiffeId) -> bool {
    match (before.agent(agent), after.agent(agent)) {
        (Some(before), Some(after)) => before.selectors != after.selectors,
        (before, after) => before.is_some() || after.is_some(),
    }
}

/// The entries that ended after `from` and up to `to`, as changes: to agents they are gone from their second on.
pub fn ended_between(state: &State, from: SystemTime, to: SystemTime) -> Vec<Change> {
    let ended = state.endings_after(from).take_while(|(at, _)| *at <= to);
    ended.filter_map(|(_, ending)| entry_of(state, ending)).map(|entry| Change::PutEntry(Arc::clone(entry))).collect()
}

/// When the next entry ends after `now`.
pub fn next_end(state: &State, now: SystemTime) -> Option<SystemTime> {
    state.endings_after(now).find(|(_, ending)| entry_of(state, *ending).is_some()).map(|(at, _)| at)
}

fn entry_of(state: &State, ending: Ending) -> Option<&Arc<Entry>> {
    match ending {
        Ending::Entry(ordinal) => state.entry_at(ordinal),
        Ending::Token(_) => None,
    }
}
