//! Lists of entries: which ones, in which order, and how they are cut into pages.
//!
//! The order is that of creation; a page token is the ordinal of the last row, so that pages stay right while entries
//! come and go.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::SystemTime;

use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::{Match, SelectorSet};

use crate::state::model::Entry;
use crate::state::{Ending, State};

/// Which entries are wanted; what is `None` is no condition.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    /// The hint; an empty one is no condition.
    pub hint: Option<String>,
    /// The parent.
    pub parent_id: Option<SpiffeId>,
    /// The identity.
    pub spiffe_id: Option<SpiffeId>,
    /// The selectors.
    pub selectors: Option<(SelectorSet, Match)>,
    /// The trust domains that the entry federates with; an entry that federates with none matches nothing here.
    pub federates_with: Option<(BTreeSet<TrustDomain>, Match)>,
    /// Only entries of downstream authorities; `false` is no condition.
    pub downstream: bool,
}

/// How a list is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Paging {
    /// Not at all.
    Everything,
    /// At most `size` rows with ordinals above `after`.
    Page {
        /// Most rows of the page.
        size: usize,
        /// The row after which it begins; 0 for the first page.
        after: u64,
    },
}

/// Rows of a list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Page {
    /// The entries, in order.
    pub entries: Vec<Arc<Entry>>,
    /// The ordinal after which the next page begins. A page with rows always has one: who has read everything sees
    /// it by an empty page.
    pub next: Option<u64>,
}

/// How many entries there are at `now`. Those that have ended are absent, though their records stay for a while.
pub fn present(state: &State, now: SystemTime) -> usize {
    let ended = state.endings().take_while(|(at, _)| *at <= now);
    let ended = ended.filter(|(_, ending)| matches!(ending, Ending::Entry(_))).count();
    state.entry_count().saturating_sub(ended)
}

/// The entries that match, as much as `paging` says. Entries that have ended are absent.
pub fn entries(state: &State, filter: &Filter, paging: Paging, now: SystemTime) -> Page {
    let (size, after) = match paging {
        Paging::Everything => (usize::MAX, 0),
        Paging::Page { size, after } => (size, after),
    };
    let entries: Vec<_> = matching(state, filter, after, now).take(size).cloned().collect();
    let next = match paging {
        Paging::Everything => None,
        Paging::Page { .. } => entries.last().map(|entry| entry.ordinal),
    };
    Page { entries, next }
}

/// How many entries match.
pub fn count(state: &State, filter: &Filter, now: SystemTime) -> usize {
    matching(state, filter, 0, now).count()
}

fn matching<'s>(
    state: &'s State,
    filter: &'s Filter,
    after: u64,
    now: SystemTime,
) -> impl Iterator<Item = &'s Arc<Entry>> {
    // The most selective index that the filter allows; the rest is compared.
    let candidates: Box<dyn Iterator<Item = &'s Arc<Entry>>> = match (&filter.spiffe_id, &filter.parent_id) {
        (Some(id), _) => Box::new(state.entries_by_spiffe_id(id).filter(move |entry| entry.ordinal > after)),
        (None, Some(parent)) => Box::new(state.entries_by_parent(parent).filter(move |entry| entry.ordinal > after)),
        (None, None) => Box::new(state.entries_after(after)),
    };
    candidates.filter(move |entry| !entry.is_expired(now) && filter.matches(entry))
}

impl Filter {
    /// Whether an entry is wanted.
    pub fn matches(&self, entry: &Entry) -> bool {
        let hint = self.hint.as_deref().filter(|hint| !hint.is_empty());
        hint.is_none_or(|hint| *entry.hint == *hint)
            && self.parent_id.as_ref().is_none_or(|parent| entry.parent_id == *parent)
            && self.spiffe_id.as_ref().is_none_or(|id| entry.spiffe_id == *id)
            && self.selectors.as_ref().is_none_or(|(wanted, how)| entry.selectors.matches(wanted, *how))
            && self.federates_with.as_ref().is_none_or(|(wanted, how)| federates(&entry.federates_with, wanted, *how))
            && (!self.downstream || entry.downstream)
    }
}

fn federates(held: &[TrustDomain], wanted: &BTreeSet<TrustDomain>, how: Match) -> bool {
    let nothing_else = || held.iter().all(|domain| wanted.contains(domain));
    let every_one = || wanted.iter().all(|domain| held.contains(domain));
    !held.is_empty()
        && match how {
            Match::Exact => nothing_else() && every_one(),
            Match::Subset => nothing_else(),
            Match::Superset => every_one(),
            Match::Any => held.iter().any(|domain| wanted.contains(domain)),
        }
}

#[cfg(test)]
#[path = "list/tests.rs"]
mod tests;
