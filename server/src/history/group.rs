//! What a store is given: records by key, in groups that are written whole or not at all.

use std::time::{Duration, SystemTime};

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;

use super::record::RecordError;
use super::{HistoryId, StoreError};
use crate::state::model::Scope;

/// What kind of thing a record is about. The numbers are part of the persisted form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
pub enum Kind {
    /// What concerns the whole: trust domain, newest stamp, next ordinal.
    Meta = 1,
    /// A registration entry, by ordinal.
    Entry = 2,
    /// An agent, by ordinal.
    Agent = 3,
    /// An unused join token, by hash.
    Token = 4,
    /// What a bundle has beside its authorities, by trust domain.
    Bundle = 5,
    /// An X.509 authority, by trust domain and hash of its certificate.
    X509Authority = 6,
    /// A JWT authority, by trust domain and key id.
    JwtAuthority = 7,
    /// A line of the authority journal, by owner, kind and authority id.
    Slot = 8,
}

impl Kind {
    /// The kind with this number, if this version knows it.
    pub fn from_number(number: u8) -> Option<Self> {
        Some(match number {
            1 => Self::Meta,
            2 => Self::Entry,
            3 => Self::Agent,
            4 => Self::Token,
            5 => Self::Bundle,
            6 => Self::X509Authority,
            7 => Self::JwtAuthority,
            8 => Self::Slot,
            _ => return None,
        })
    }
}

/// The key of a record: (tenant, kind, id).
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RecordKey {
    /// Whose record.
    pub scope: Scope,
    /// What it is about.
    pub kind: Kind,
    /// Which one of its kind.
    pub id: Bytes,
}

impl RecordKey {
    /// The key as ordered bytes: scope, a zero byte, kind, id.
    pub fn to_bytes(&self) -> Bytes {
        let scope = self.scope.as_str().as_bytes();
        let mut bytes = BytesMut::with_capacity(scope.len() + 2 + self.id.len());
        bytes.put_slice(scope);
        bytes.put_u8(0);
        bytes.put_u8(self.kind as u8);
        bytes.put_slice(&self.id);
        bytes.freeze()
    }

    /// The key that has these bytes.
    ///
    /// # Errors
    /// If the bytes are no key, or of a kind that only a newer version knows.
    pub fn from_bytes(bytes: &Bytes) -> Result<Self, RecordError> {
        let zero = bytes.iter().position(|byte| *byte == 0).ok_or(RecordError::Key)?;
        let scope = bytes.get(..zero).and_then(|scope| std::str::from_utf8(scope).ok()).ok_or(RecordError::Key)?;
        let number = *bytes.get(zero + 1).ok_or(RecordError::Key)?;
        let kind = Kind::from_number(number).ok_or(RecordError::NewerKind { number })?;
        Ok(Self { scope: Scope::named(scope), kind, id: bytes.slice(zero + 2..) })
    }
}

/// A record as it is stored.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Which record.
    pub key: RecordKey,
    /// Its value in its envelope; at most [`super::MAX_VALUE_BYTES`].
    pub value: Bytes,
}

/// One record's change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Write {
    /// Adds or replaces it.
    Put(Record),
    /// Removes it; it need not be there.
    Delete(RecordKey),
}

/// How much a write matters when space is short.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Urgency {
    /// Refused when free space is below the reserve.
    #[default]
    Normal,
    /// What keeps identities alive that there are: renewals and first uses of certificates, steps of authorities,
    /// attestations of known nodes. Accepted from half of the reserve.
    Vital,
    /// Deletes, bans and evictions: accepted from the whole reserve.
    Shrinking,
}

/// A random id by which a writer recognises its own group.
pub type GroupId = [u8; 16];

/// What one append commits: the parts of several proposals.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    id: GroupId,
    at: SystemTime,
    urgency: Urgency,
    history: Option<HistoryId>,
    parts: Vec<Vec<Write>>,
    encoded: Bytes,
}

#[derive(Clone, PartialEq, prost::Message)]
struct GroupRecord {
    #[prost(bytes = "bytes", tag = "1")]
    id: Bytes,
    #[prost(sint64, tag = "2")]
    at_seconds: i64,
    #[prost(uint32, tag = "3")]
    at_nanoseconds: u32,
    #[prost(message, repeated, tag = "4")]
    parts: Vec<PartRecord>,
    #[prost(bytes = "bytes", optional, tag = "5")]
    history: Option<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct PartRecord {
    #[prost(message, repeated, tag = "1")]
    writes: Vec<WriteRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct WriteRecord {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", optional, tag = "2")]
    value: Option<Bytes>,
}

impl Group {
    /// A group of parts, stamped `at`.
    pub fn new(id: GroupId, at: SystemTime, urgency: Urgency, parts: Vec<Vec<Write>>) -> Self {
        Self::beginning(None, id, at, urgency, parts)
    }

    /// A group of parts, stamped `at`, from which on the history has the id `history` if one is given.
    pub fn beginning(
        history: Option<HistoryId>,
        id: GroupId,
        at: SystemTime,
        urgency: Urgency,
        parts: Vec<Vec<Write>>,
    ) -> Self {
        let (at_seconds, at_nanoseconds) = seconds_of(at);
        let record = GroupRecord {
            id: Bytes::copy_from_slice(&id),
            at_seconds,
            at_nanoseconds,
            parts: parts
                .iter()
                .map(|writes| PartRecord { writes: writes.iter().map(WriteRecord::of).collect() })
                .collect(),
            history: history.map(|history| Bytes::copy_from_slice(&history.0)),
        };
        let encoded = Bytes::from(record.encode_to_vec());
        Self { id, at, urgency, history, parts, encoded }
    }

    /// Reads back what [`Group::encoded`] gave.
    ///
    /// # Errors
    /// If the bytes are no group, or hold what only a newer version knows.
    pub fn decode(encoded: Bytes) -> Result<Self, RecordError> {
        let record = GroupRecord::decode(encoded.clone()).map_err(RecordError::Group)?;
        let id = GroupId::try_from(record.id.as_ref()).map_err(|_| RecordError::Key)?;
        let at = time_of(record.at_seconds, record.at_nanoseconds).ok_or(RecordError::Time)?;
        let history = record.history.map(|id| id.as_ref().try_into().map(HistoryId)).transpose();
        let history = history.map_err(|_| RecordError::Key)?;
        let parts = record
            .parts
            .into_iter()
            .map(|part| part.writes.into_iter().map(WriteRecord::write).collect())
            .collect::<Result<_, _>>()?;
        Ok(Self { id, at, urgency: Urgency::Normal, history, parts, encoded })
    }

    /// The random id.
    pub fn id(&self) -> GroupId {
        self.id
    }

    /// The stamp.
    pub fn at(&self) -> SystemTime {
        self.at
    }

    /// The id that the history has from here on, if that changes.
    pub fn history(&self) -> Option<HistoryId> {
        self.history
    }

    /// How much it matters when space is short; not part of what is stored.
    pub fn urgency(&self) -> Urgency {
        self.urgency
    }

    /// The parts, each of one proposal.
    pub fn parts(&self) -> &[Vec<Write>] {
        &self.parts
    }

    /// All writes, in order.
    pub fn writes(&self) -> impl Iterator<Item = &Write> {
        self.parts.iter().flatten()
    }

    /// The whole group as bytes: what the log keeps and the digest covers.
    pub fn encoded(&self) -> &Bytes {
        &self.encoded
    }

    /// Whether it keeps to the sizes that every back end has room for.
    ///
    /// # Errors
    /// [`StoreError::TooLarge`] if it does not.
    pub fn check_size(&self) -> Result<(), StoreError> {
        let part = self.parts.iter().map(Vec::len).max().unwrap_or(0);
        let value = self.writes().map(Write::value_len).max().unwrap_or(0);
        // One more record than a part may have: the committer's own.
        if part > super::MAX_PART_RECORDS + 1
            || value > super::MAX_VALUE_BYTES
            || self.encoded.len() > super::MAX_GROUP_BYTES
        {
            return Err(StoreError::TooLarge);
        }
        Ok(())
    }
}

impl Write {
    /// The key that is written.
    pub fn key(&self) -> &RecordKey {
        match self {
            Self::Put(record) => &record.key,
            Self::Delete(key) => key,
        }
    }

    /// How many bytes the new value has.
    pub fn value_len(&self) -> usize {
        match self {
            Self::Put(record) => record.value.len(),
            Self::Delete(_) => 0,
        }
    }

    /// About how many bytes it adds to a group; never too few.
    pub fn encoded_len(&self) -> usize {
        let key = self.key();
        self.value_len() + key.id.len() + key.scope.as_str().len() + 24
    }
}

impl WriteRecord {
    fn of(write: &Write) -> Self {
        match write {
            Write::Put(record) => Self { key: record.key.to_bytes(), value: Some(record.value.clone()) },
            Write::Delete(key) => Self { key: key.to_bytes(), value: None },
        }
    }

    fn write(self) -> Result<Write, RecordError> {
        let key = RecordKey::from_bytes(&self.key)?;
        Ok(match self.value {
            Some(value) => Write::Put(Record { key, value }),
            None => Write::Delete(key),
        })
    }
}

/// A time as seconds since 1970, and the nanoseconds after that second.
pub(super) fn seconds_of(time: SystemTime) -> (i64, u32) {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => (i64::try_from(since.as_secs()).unwrap_or(i64::MAX), since.subsec_nanos()),
        Err(before) => {
            let before = before.duration();
            let whole = i64::try_from(before.as_secs()).unwrap_or(i64::MAX);
            match before.subsec_nanos() {
                0 => (-whole, 0),
                part => (-whole - 1, 1_000_000_000 - part),
            }
        }
    }
}

/// The time that [`seconds_of`] took apart; `None` if it cannot be represented.
pub(super) fn time_of(seconds: i64, nanoseconds: u32) -> Option<SystemTime> {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let second = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(whole)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(whole)
    }?;
    second.checked_add(Duration::from_nanos(u64::from(nanoseconds)))
}
