//! When an entry is there already.

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::id::SpiffeId;
use spiffe::selector::SelectorSet;

use crate::state::State;
use crate::state::model::Entry;

/// The oldest entry with exactly this parent, SPIFFE ID and selector set, whatever else it says; ended ones are absent.
pub fn similar<'a>(
    state: &'a State,
    parent: &'a SpiffeId,
    id: &'a SpiffeId,
    selectors: &'a SelectorSet,
    now: SystemTime,
) -> Option<&'a Arc<Entry>> {
    state.entries_like(parent, id, selectors).find(|entry| !entry.is_expired(now))
}
