//! The persisted form of everything, and nothing else's form.
//!
//! A value is an envelope {version, CRC-32C} around a protobuf message of our own. A new field raises
//! its kind's version; a version newer than this program knows is refused, never rewritten, so that an
//! older server cannot lose what a newer one wrote.

mod keys;
mod messages;
mod reader;

use std::time::SystemTime;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use spiffe::id::IdError;
use spiffe::selector::SelectorError;

use self::keys::{authority_key, key, ordinal_key, slot_key};
use self::messages::{
    AgentRecord, BundleRecord, EntryRecord, JwtAuthorityRecord, MetaRecord, SlotRecord, TokenRecord,
    X509AuthorityRecord,
};
pub use self::reader::{Meta, Reader, Restored};
use super::group::{Kind, Record, RecordKey, Write};
use crate::state::model::{Change, Scope, certificate_hash};
use crate::state::{Invalid, State};

/// Why a stored record cannot be read.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// A key is not one of ours.
    #[error("its key is malformed")]
    Key,
    /// A kind of record that this version does not know.
    #[error(
        "it is of kind {number}, which a newer version has written: run that version, or restore a backup of this one"
    )]
    NewerKind {
        /// The number of the kind.
        number: u8,
    },
    /// A format that this version does not know.
    #[error(
        "{kind:?} records up to format {known} are known, and this one has format {found}, which a newer version has \
         written: run that version, or restore a backup of this one"
    )]
    Newer {
        /// What the record is about.
        kind: Kind,
        /// Its format.
        found: u16,
        /// The newest known format.
        known: u16,
    },
    /// A layout of rows that this version does not know.
    #[error("its layout is {found}, layouts up to {known} are known: a newer version has written it; run that version")]
    NewerLayout {
        /// Its layout.
        found: u8,
        /// The newest known layout.
        known: u8,
    },
    /// The value is not what was written.
    #[error("its checksum is wrong: the disk or the file system has damaged it")]
    Checksum,
    /// The value is no message.
    #[error("its value is malformed")]
    Value(#[source] prost::DecodeError),
    /// The group is no message.
    #[error("its group is malformed")]
    Group(#[source] prost::DecodeError),
    /// A SPIFFE ID or trust domain in it.
    #[error("it holds a malformed SPIFFE ID")]
    Id(#[from] IdError),
    /// A selector in it.
    #[error("it holds a malformed selector")]
    Selector(#[from] SelectorError),
    /// A time in it.
    #[error("it holds a time that cannot be represented")]
    Time,
    /// A number in it stands for nothing.
    #[error("it holds an unknown number where one of a few is expected")]
    Number,
    /// It does not fit the records before it.
    #[error("it contradicts another record")]
    Contradiction(#[from] Invalid),
}

/// The format that is written, and the newest that is read, of each kind.
const fn version_of(kind: Kind) -> u16 {
    match kind {
        Kind::Meta | Kind::Agent => 2,
        Kind::Entry | Kind::Token | Kind::Bundle | Kind::X509Authority | Kind::JwtAuthority | Kind::Slot => 1,
    }
}

const ENVELOPE: usize = 6;

/// Puts a message into its envelope: version (two bytes), CRC-32C (four) over kind, id and what follows.
fn seal(key: &RecordKey, message: &impl Message) -> Bytes {
    let mut value = BytesMut::with_capacity(ENVELOPE + message.encoded_len());
    value.put_u16(version_of(key.kind));
    value.put_u32(0);
    // Writing to a growing buffer cannot run out of room.
    let _ = message.encode(&mut value);
    let checksum = checksum(key, &value);
    if let Some(place) = value.get_mut(2..ENVELOPE) {
        place.copy_from_slice(&checksum.to_be_bytes());
    }
    value.freeze()
}

/// Over the key as well, so that a value under a foreign key is found.
fn checksum(key: &RecordKey, sealed: &[u8]) -> u32 {
    let version = sealed.get(..2).unwrap_or_default();
    let body = sealed.get(ENVELOPE..).unwrap_or_default();
    let mut sum = crc32c::crc32c(key.scope.as_str().as_bytes());
    for part in [&[0, key.kind as u8], key.id.as_ref(), version, body] {
        sum = crc32c::crc32c_append(sum, part);
    }
    sum
}

fn unseal<M: Message + Default>(record: &Record) -> Result<M, RecordError> {
    let value = &record.value;
    let (Some(version), Some(sum)) = (value.first_chunk::<2>(), value.get(2..ENVELOPE)) else {
        return Err(RecordError::Checksum);
    };
    if sum != checksum(&record.key, value).to_be_bytes() {
        return Err(RecordError::Checksum);
    }
    let (found, known) = (u16::from_be_bytes(*version), version_of(record.key.kind));
    if found > known {
        return Err(RecordError::Newer { kind: record.key.kind, found, known });
    }
    M::decode(value.slice(ENVELOPE..)).map_err(RecordError::Value)
}

/// The record as a newer version would have written it.
#[cfg(test)]
pub(crate) fn resealed(record: &Record, version: u16) -> Record {
    let mut value = record.value.to_vec();
    value[..2].copy_from_slice(&version.to_be_bytes());
    let sum = checksum(&record.key, &value);
    value[2..ENVELOPE].copy_from_slice(&sum.to_be_bytes());
    Record { key: record.key.clone(), value: Bytes::from(value) }
}

fn put(key: RecordKey, message: &impl Message) -> Write {
    let value = seal(&key, message);
    Write::Put(Record { key, value })
}

/// How a change is written, given the state before it. `None`: there is nothing to write.
pub fn write_of(before: &State, scope: &Scope, change: &Change) -> Option<Write> {
    Some(match change {
        Change::PutEntry(entry) => {
            let message = EntryRecord::of(entry, before.trust_domain());
            put(ordinal_key(scope, Kind::Entry, entry.ordinal), &message)
        }
        Change::RemoveEntry(id) => Write::Delete(ordinal_key(scope, Kind::Entry, before.entry(id)?.ordinal)),
        Change::PutAgent(agent) => {
            let message = AgentRecord::of(agent, before.trust_domain());
            put(ordinal_key(scope, Kind::Agent, agent.ordinal), &message)
        }
        Change::RemoveAgent(id) => Write::Delete(ordinal_key(scope, Kind::Agent, before.agent(id)?.ordinal)),
        Change::PutToken(token) => {
            let message = TokenRecord::of(token, before.trust_domain());
            put(key(scope, Kind::Token, Bytes::copy_from_slice(&token.hash)), &message)
        }
        Change::RemoveToken(hash) => Write::Delete(key(scope, Kind::Token, Bytes::copy_from_slice(hash))),
        Change::PutBundleInfo { trust_domain, sequence, refresh_hint } => {
            let ordinal = before.bundle_ordinal(trust_domain);
            let message = BundleRecord::of(ordinal, *sequence, *refresh_hint);
            put(key(scope, Kind::Bundle, trust_domain.as_str().as_bytes().to_vec()), &message)
        }
        Change::RemoveBundle(trust_domain) => {
            Write::Delete(key(scope, Kind::Bundle, trust_domain.as_str().as_bytes().to_vec()))
        }
        Change::PutX509Authority { trust_domain, authority } => {
            let ordinal = before.x509_authority_ordinal(trust_domain, &authority.der);
            let id = certificate_hash(&authority.der);
            let message = X509AuthorityRecord::of(ordinal, authority);
            put(authority_key(scope, Kind::X509Authority, trust_domain, &id), &message)
        }
        Change::RemoveX509Authority { trust_domain, sha256 } => {
            Write::Delete(authority_key(scope, Kind::X509Authority, trust_domain, sha256))
        }
        Change::PutJwtAuthority { trust_domain, authority } => {
            let ordinal = before.jwt_authority_ordinal(trust_domain, &authority.key_id);
            let message = JwtAuthorityRecord::of(ordinal, authority);
            put(authority_key(scope, Kind::JwtAuthority, trust_domain, authority.key_id.as_bytes()), &message)
        }
        Change::RemoveJwtAuthority { trust_domain, key_id } => {
            Write::Delete(authority_key(scope, Kind::JwtAuthority, trust_domain, key_id.as_bytes()))
        }
        Change::PutSlot(slot) => {
            let id = slot_key(scope, slot.owner, slot.kind, &slot.authority_id);
            put(id, &SlotRecord::of(slot))
        }
        Change::RemoveSlot { owner, kind, authority_id } => Write::Delete(slot_key(scope, *owner, *kind, authority_id)),
        // The committer's own record says so, and the group.
        Change::BeginHistory(_) => return None,
    })
}

/// All that a change writes: its own record, and those that go with it.
pub fn writes_of(before: &State, scope: &Scope, change: &Change) -> Vec<Write> {
    let mut writes: Vec<Write> = write_of(before, scope, change).into_iter().collect();
    if let Change::RemoveBundle(trust_domain) = change
        && let Some(bundle) = before.bundle(trust_domain)
    {
        writes.extend(bundle.x509.iter().map(|authority| {
            let id = certificate_hash(&authority.der);
            Write::Delete(authority_key(scope, Kind::X509Authority, trust_domain, &id))
        }));
        writes.extend(bundle.jwt.iter().map(|authority| {
            Write::Delete(authority_key(scope, Kind::JwtAuthority, trust_domain, authority.key_id.as_bytes()))
        }));
    }
    writes
}

/// The committer's own record, written with each group; `at` is for people who look into a store.
pub fn meta_of(state: &State, at: SystemTime) -> Write {
    let message = MetaRecord::of(state, at);
    put(key(&Scope::trust_domain(), Kind::Meta, Bytes::new()), &message)
}
