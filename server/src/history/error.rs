//! What a store can fail with.

use std::path::PathBuf;
use std::sync::Arc;

use spiffe::id::TrustDomain;

use super::record::RecordError;
use crate::state::Invalid;

/// An error of a storage engine, shared because one failure is told to many.
pub type EngineError = Arc<dyn std::error::Error + Send + Sync>;

/// Why a store did not do what it was asked.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StoreError {
    /// The store could not be reached; nothing was written.
    #[error("the store is out of reach")]
    Unreachable(#[source] EngineError),
    /// A write was under way when the store failed: it may have happened, or may yet happen.
    #[error("it is not known whether the store has written")]
    Unknown(#[source] EngineError),
    /// Free space is below the reserve; nothing was written.
    #[error(
        "{free} bytes are free on the store's disk, and {reserve} are kept in reserve: only deletes, bans and evictions are accepted"
    )]
    Full {
        /// Bytes that are free, the reserve included.
        free: u64,
        /// Bytes of the reserve.
        reserve: u64,
    },
    /// The reserve is used up, and what is free is too little even for what shrinks; nothing was written.
    #[error("{free} bytes are free on the store's disk, which is too little even for deletes, bans and evictions")]
    Exhausted {
        /// Bytes that are free.
        free: u64,
    },
    /// The store failed before; what it holds on disk is intact, but this process may not touch it again.
    #[error("the store failed and is not used any more: restart the server")]
    Poisoned(#[source] EngineError),
    /// The log does not reach back as far as was asked.
    #[error("the history is no longer kept as far back as that")]
    Compacted,
    /// The position asked for is not part of this history.
    #[error("the position is not part of this history")]
    Forked,
    /// A group, part or value is larger than every back end has room for; nothing was written.
    #[error("the group exceeds the sizes of a store")]
    TooLarge,
    /// Another process has the store open.
    #[error("{} is in use by another process: only one server can run on it", directory.display())]
    InUse {
        /// Where the store is.
        directory: PathBuf,
    },
    /// The store cannot be opened.
    #[error("cannot open the store in {}", directory.display())]
    Open {
        /// Where the store is.
        directory: PathBuf,
        /// Why not.
        #[source]
        source: EngineError,
    },
    /// What is stored cannot be read.
    #[error("a stored record cannot be read")]
    Record(#[from] RecordError),
}

impl StoreError {
    /// Whether the same call may succeed later without a restart or a change of the configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Unknown(_) | Self::Full { .. } | Self::Exhausted { .. } => true,
            Self::Poisoned(_)
            | Self::Compacted
            | Self::Forked
            | Self::TooLarge
            | Self::InUse { .. }
            | Self::Open { .. }
            | Self::Record(_) => false,
        }
    }
}

/// Why a history cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The store cannot be read.
    #[error("cannot load the store")]
    Store(#[from] StoreError),
    /// The store was made for another trust domain.
    #[error("the store belongs to trust domain {found}, and the server is configured for {configured}")]
    OtherTrustDomain {
        /// Whose records it holds.
        found: TrustDomain,
        /// Whose they should be.
        configured: TrustDomain,
    },
    /// The stored records contradict each other.
    #[error("the stored records contradict each other")]
    Contradiction(#[from] Invalid),
}
