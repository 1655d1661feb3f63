//! Where in which history.

use std::fmt;

use aws_lc_rs::digest;

use super::Group;

/// Names one history. Random; made with the store, and anew when a restore from a backup is noticed.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct HistoryId(pub [u8; 16]);

impl fmt::Debug for HistoryId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// A point in the history of a trust domain.
///
/// Two positions are equal if and only if everything before them is: the digest covers every group
/// since the beginning. Equal revisions with unequal digests are a fork.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Position {
    /// Which history.
    pub history: HistoryId,
    /// How many groups were committed, without gaps; 0 is the beginning.
    pub revision: u64,
    /// SHA-256 over the digest before and the group, chained from 32 zero bytes.
    pub digest: [u8; 32],
}

impl Position {
    /// The beginning of a history.
    pub fn start(history: HistoryId) -> Self {
        Self { history, revision: 0, digest: [0; 32] }
    }

    /// The position after `group` is committed here; a group may say that the history goes on under another id.
    pub fn after(&self, group: &Group) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        context.update(&self.digest);
        context.update(group.encoded());
        let mut chained = [0; 32];
        chained.copy_from_slice(context.finish().as_ref());
        Self {
            history: group.history().unwrap_or(self.history),
            revision: self.revision.saturating_add(1),
            digest: chained,
        }
    }
}

impl fmt::Debug for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}@{}#", self.history, self.revision)?;
        self.digest.iter().take(4).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
