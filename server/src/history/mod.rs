//! The ordered history of a trust domain: what a store must do, and who writes.
//!
//! All state is a sequence of groups. [`Store`] keeps it durably and knows nothing of its meaning;
//! [`Committer`] is the only writer and [`Replica`] the only reader of a running server. [`open`]
//! makes both from a store.

pub mod committer;
mod engine;
mod error;
pub mod faulty;
mod group;
pub mod memory;
mod meters;
mod portion;
mod position;
pub mod record;
pub mod replica;
pub mod sled;

#[cfg(test)]
mod contract;
#[cfg(test)]
mod tests;

use async_trait::async_trait;
use futures_core::stream::BoxStream;

pub use self::committer::{Committer, ProposeError, Receipt};
pub use self::engine::{Loader, Opened, Reach, Writer, open};
pub use self::error::{OpenError, StoreError};
pub use self::group::{Group, GroupId, Kind, Record, RecordKey, Urgency, Write};
pub use self::portion::Portion;
pub use self::position::{HistoryId, Position};
pub use self::replica::{Changes, Feed, Health, Replica, ReplicaError, Step};

/// How many records one part may write.
pub const MAX_PART_RECORDS: usize = 100;
/// How many bytes one record's value may have.
pub const MAX_VALUE_BYTES: usize = 60 * 1024;
/// How many bytes one group may have, encoded.
pub const MAX_GROUP_BYTES: usize = 512 * 1024;

/// The ordered history of one trust domain; a store is opened for one trust domain.
#[async_trait]
pub trait Store: Send + Sync {
    /// All records at one position, in pages, in any order.
    ///
    /// # Errors
    /// If the store cannot be read; a page that is an error is the last one.
    async fn load(&self) -> Result<(Position, BoxStream<'static, Result<Vec<Record>, StoreError>>), StoreError>;

    /// Makes `group` the revision after `at`, durably, if `at` is still the head; otherwise changes nothing.
    ///
    /// # Errors
    /// [`StoreError::Unknown`] and [`StoreError::Poisoned`] leave open whether the group was written;
    /// after every other error it was not and will not be.
    async fn append(&self, at: &Position, group: &Group) -> Result<Appended, StoreError>;

    /// Every group after `after`, in order, none left out. The stream waits for groups to come and
    /// ends after an error; after [`StoreError::Compacted`] or [`StoreError::Forked`]: load anew.
    fn watch(&self, after: Position) -> BoxStream<'static, Result<Change, StoreError>>;

    /// The newest committed position, read from where truth is (not from a replica that may lag).
    ///
    /// # Errors
    /// If truth is out of reach.
    async fn head(&self) -> Result<Position, StoreError>;
}

/// What became of an append that did not fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Appended {
    /// The group is durable, and this is its position.
    Committed(Position),
    /// The head was another one; nothing was written.
    Moved,
}

/// One revision of the history.
#[derive(Clone, Debug)]
pub struct Change {
    /// The position after it.
    pub position: Position,
    /// What was committed.
    pub group: Group,
}
