//! A part that is filled until it is as large as a part may be.
//!
//! What one request asks for may be more than one part holds. Its size counts in *writes*: the removal of a bundle is
//! one change and removes every authority of it.

use super::record::writes_of;
use super::{MAX_GROUP_BYTES, MAX_PART_RECORDS, Write};
use crate::state::State;
use crate::state::model::{Change, Part, Scope};

/// Half of a group, so that others find room in it.
const MOST_BYTES: usize = MAX_GROUP_BYTES / 2;

/// Changes that fit into one part together.
#[derive(Debug)]
pub struct Portion<'s> {
    state: &'s State,
    scope: Scope,
    changes: Vec<Change>,
    records: usize,
    bytes: usize,
}

impl<'s> Portion<'s> {
    /// An empty one, to be proposed on `state`.
    pub fn new(state: &'s State) -> Self {
        Self { state, scope: Scope::trust_domain(), changes: Vec::new(), records: 0, bytes: 0 }
    }

    /// Adds a change if there is room for all that it writes, and says whether there was. The first one that writes no
    /// more records than a part may have always finds room, so a sequence of portions cannot stand still; if a record
    /// of it is larger than records may be, the committer refuses the part.
    pub fn add(&mut self, change: Change) -> bool {
        let writes = writes_of(self.state, &self.scope, &change);
        let records = self.records + writes.len();
        let bytes = self.bytes + writes.iter().map(Write::encoded_len).sum::<usize>();
        let first = self.changes.is_empty();
        if records > MAX_PART_RECORDS || (bytes > MOST_BYTES && !first) {
            return false;
        }
        self.changes.push(change);
        (self.records, self.bytes) = (records, bytes);
        true
    }

    /// How many changes it has.
    pub fn len(&self) -> usize {
        self.changes.len()
    }

    /// Whether it has none.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The part.
    pub fn into_part(self) -> Part {
        Part::new(self.changes)
    }
}
