//! Backups: the whole state of a trust domain in one file.
//!
//! The file is the line `signet backup 1`, then frames: a byte that says what it is, four bytes of length, the content.
//! First comes the head, then pages of records as the store has them, then, if the operator wants it, the key file, and at
//! the end the SHA-256 of everything before. Join tokens are left out: they would be void after a restore.

pub mod file;
pub mod restore;

use bytes::Bytes;
use prost::Message as _;

use crate::history::record::{self, RecordError};
use crate::history::{OpenError, StoreError, Write};
use crate::state::State;
use crate::state::model::{Change, Scope};

/// What a frame is. The numbers are part of the file's form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// [`Head`].
    Head = 1,
    /// [`Page`].
    Records = 2,
    /// A key file as it is, with private keys.
    Keys = 3,
    /// SHA-256 of everything before; from a server, nothing.
    End = 9,
}

/// The most bytes a frame has.
pub const MOST_FRAME: usize = 1024 * 1024;
/// A page is closed once it has so many bytes; no record is larger than the rest of a frame.
const PAGE: usize = 256 * 1024;

/// What a backup is of.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Head {
    /// Whose state.
    #[prost(string, tag = "1")]
    pub trust_domain: String,
    /// Id of the history.
    #[prost(bytes = "bytes", tag = "2")]
    pub history: Bytes,
    /// The position in it.
    #[prost(uint64, tag = "3")]
    pub revision: u64,
    /// Its digest.
    #[prost(bytes = "bytes", tag = "4")]
    pub digest: Bytes,
    /// When it was taken, in seconds since 1970.
    #[prost(int64, tag = "5")]
    pub taken_at: i64,
}

/// Records.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Page {
    /// In any order.
    #[prost(message, repeated, tag = "1")]
    pub records: Vec<Stored>,
}

/// One record as the store has it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct Stored {
    /// Its key.
    #[prost(bytes = "bytes", tag = "1")]
    pub key: Bytes,
    /// Its value in its envelope.
    #[prost(bytes = "bytes", tag = "2")]
    pub value: Bytes,
}

/// Why there is no backup, or none can be restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackupError {
    /// The file cannot be read or written.
    #[error("the file cannot be read or written")]
    File(#[source] std::io::Error),
    /// The file does not begin as a backup does.
    #[error("it is no backup of a Signet server, or a newer version has written it")]
    Form,
    /// The file ends before its end, or goes on behind it.
    #[error("it is cut off, or something was added to it")]
    Cut,
    /// The file is not as it was written.
    #[error("its checksum is wrong: it was damaged or changed")]
    Checksum,
    /// A frame is not where it belongs, is too large, or of a kind that a newer version knows.
    #[error("it is damaged at byte {at}")]
    Frame {
        /// Where the frame begins.
        at: u64,
    },
    /// A record in it cannot be read.
    #[error("a record in it cannot be read")]
    Record(#[from] RecordError),
    /// Its records do not go together.
    #[error("its records do not make a state")]
    State(#[source] OpenError),
    /// It is another trust domain's.
    #[error("it is a backup of trust domain {found}, and {configured} is configured")]
    OtherTrustDomain {
        /// The backup's.
        found: String,
        /// That of the configuration.
        configured: String,
    },
    /// There is a data store where it would be restored.
    #[error("{} holds a data store; move it away first (`mv`), so that nothing is lost", directory.display())]
    Occupied {
        /// Where.
        directory: std::path::PathBuf,
    },
    /// A server uses the data store where it would be restored.
    #[error("{} is in use by a running server; stop it first", directory.display())]
    InUse {
        /// Where.
        directory: std::path::PathBuf,
    },
    /// A store in memory has nothing to restore into.
    #[error("the configured data store is in memory; a backup is restored into files")]
    Memory,
    /// The backup has keys, and there is a key file.
    #[error("{} is there, and is not replaced; move it away to use the keys of the backup, or leave it and say -withoutKeys", path.display())]
    KeysThere {
        /// The key file.
        path: std::path::PathBuf,
    },
    /// The key file cannot be read or written.
    #[error("the key file cannot be read or written")]
    Keys(#[source] runtime::keyfile::KeyFileError),
    /// The new data store cannot be written.
    #[error("the data store cannot be written")]
    Store(#[source] StoreError),
}

/// The head of a backup of `state`.
pub fn head_of(state: &State, now: std::time::SystemTime) -> Head {
    let position = state.position();
    let since = now.duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Head {
        trust_domain: state.trust_domain().as_str().to_owned(),
        history: Bytes::copy_from_slice(&position.history.0),
        revision: position.revision,
        digest: Bytes::copy_from_slice(&position.digest),
        taken_at: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
    }
}

/// What makes `state`, but its join tokens, bundles before their authorities.
pub fn changes_of(state: &State) -> impl Iterator<Item = Change> + '_ {
    let bundles = state.bundles_in_order().into_iter().flat_map(|(_, bundle)| {
        let info = Change::PutBundleInfo {
            trust_domain: bundle.trust_domain.clone(),
            sequence: bundle.sequence,
            refresh_hint: bundle.refresh_hint,
        };
        let x509 = bundle.x509.iter().map(|authority| Change::PutX509Authority {
            trust_domain: bundle.trust_domain.clone(),
            authority: authority.clone(),
        });
        let jwt = bundle.jwt.iter().map(|authority| Change::PutJwtAuthority {
            trust_domain: bundle.trust_domain.clone(),
            authority: authority.clone(),
        });
        std::iter::once(info).chain(x509).chain(jwt).collect::<Vec<_>>()
    });
    let agents = state.agents().map(|agent| Change::PutAgent(agent.clone()));
    let entries = state.entries().map(|entry| Change::PutEntry(entry.clone()));
    let slots = state.all_slots().map(|slot| Change::PutSlot(slot.clone()));
    bundles.chain(agents).chain(entries).chain(slots)
}

/// The pages of a backup of `state`, each made when it is asked for.
pub fn pages(state: &State, now: std::time::SystemTime) -> impl Iterator<Item = Page> + '_ {
    let scope = Scope::trust_domain();
    let meta = std::iter::once(record::meta_of(state, now));
    let others = changes_of(state).filter_map(move |change| record::write_of(state, &scope, &change));
    let mut records = meta.chain(others).filter_map(|write| match write {
        Write::Put(record) => Some(Stored { key: record.key.to_bytes(), value: record.value }),
        Write::Delete(_) => None,
    });
    std::iter::from_fn(move || {
        let mut page = Page::default();
        let mut size = 0;
        while size < PAGE
            && let Some(record) = records.next()
        {
            size += record.encoded_len() + 8;
            page.records.push(record);
        }
        (!page.records.is_empty()).then_some(page)
    })
}

/// What is told of a backup, or of what was restored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Counts {
    /// Registration entries.
    pub entries: usize,
    /// Agents.
    pub agents: usize,
    /// Bundles, the own one included.
    pub bundles: usize,
    /// X.509 and JWT authorities of the own bundle.
    pub authorities: (usize, usize),
}

impl Counts {
    /// What `state` holds.
    pub fn of(state: &State) -> Self {
        let own = state.bundle(state.trust_domain());
        Self {
            entries: state.entry_count(),
            agents: state.agent_count(),
            bundles: state.bundles().count(),
            authorities: own.map_or((0, 0), |bundle| (bundle.x509.len(), bundle.jwt.len())),
        }
    }
}
