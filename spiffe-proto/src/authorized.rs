//! The answers that agents poll for. Their entries stay encoded: a server writes thousands of them for each poll, and
//! needs neither a message nor a piece of text of its own for any.

use bytes::Bytes;
use prost::{DecodeError, Message};

use crate::entry::EntryRevision;
use crate::types::Entry;

/// `GetAuthorizedEntriesResponse`: everything the agent that calls may have.
#[derive(Clone, PartialEq, Message)]
pub struct GetAuthorizedEntriesResponse {
    /// Encoded `spire.api.types.Entry` messages.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub entries: Vec<Bytes>,
}

impl GetAuthorizedEntriesResponse {
    /// The entries.
    ///
    /// # Errors
    /// If one is malformed.
    pub fn decoded(&self) -> Result<Vec<Entry>, DecodeError> {
        decoded(&self.entries)
    }
}

/// `SyncAuthorizedEntriesResponse`: revisions, when there are too many entries for one message, or entries.
#[derive(Clone, PartialEq, Message)]
pub struct SyncAuthorizedEntriesResponse {
    /// Encoded [`EntryRevision`] messages.
    #[prost(bytes = "bytes", repeated, tag = "1")]
    pub entry_revisions: Vec<Bytes>,
    /// Encoded `spire.api.types.Entry` messages.
    #[prost(bytes = "bytes", repeated, tag = "2")]
    pub entries: Vec<Bytes>,
    /// The answer goes on in the next message.
    #[prost(bool, tag = "3")]
    pub more: bool,
}

impl SyncAuthorizedEntriesResponse {
    /// The entries.
    ///
    /// # Errors
    /// If one is malformed.
    pub fn decoded(&self) -> Result<Vec<Entry>, DecodeError> {
        decoded(&self.entries)
    }

    /// The revisions.
    ///
    /// # Errors
    /// If one is malformed.
    pub fn revisions(&self) -> Result<Vec<EntryRevision>, DecodeError> {
        decoded(&self.entry_revisions)
    }
}

/// Messages as the answers above carry them.
pub fn encoded<M: Message>(messages: impl IntoIterator<Item = M>) -> Vec<Bytes> {
    messages.into_iter().map(|message| message.encode_to_vec().into()).collect()
}

fn decoded<M: Message + Default>(messages: &[Bytes]) -> Result<Vec<M>, DecodeError> {
    messages.iter().map(|message| M::decode(message.clone())).collect()
}
