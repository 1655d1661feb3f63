//! The persisted form of everything, and nothing else's form.
//!
//! A value is an envelope {version, CRC-32C} around a protobuf message of our own. A new field raises
//! its kind's version; a version newer than this program knows is refused, never rewritten, so that an
//! older server cannot lose what a newer one wrote.

mod messages;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::{BufMut, Bytes, BytesMut};
use prost::Message;
use spiffe::bundle::{JwtAuthority, X509Authority};
use spiffe::id::{IdError, SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorError, SelectorSet};

use self::messages::{
    AgentRecord, BundleRecord, EntryRecord, JwtAuthorityRecord, MetaRecord, SlotRecord, TokenRecord,
    X509AuthorityRecord,
};
use super::group::{Kind, Record, RecordKey, Write};
use crate::state::model::{
    Agent, AuthorityKind, AuthoritySlot, Change, Entry, JoinToken, KeyOwner, Scope, certificate_hash,
};
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
        Kind::Meta
        | Kind::Entry
        | Kind::Agent
        | Kind::Token
        | Kind::Bundle
        | Kind::X509Authority
        | Kind::JwtAuthority
        | Kind::Slot => 1,
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

fn key(scope: &Scope, kind: Kind, id: impl Into<Bytes>) -> RecordKey {
    RecordKey { scope: scope.clone(), kind, id: id.into() }
}

fn ordinal_key(scope: &Scope, kind: Kind, ordinal: u64) -> RecordKey {
    key(scope, kind, Bytes::copy_from_slice(&ordinal.to_be_bytes()))
}

/// A trust domain's name holds no zero byte, so this is unambiguous and sorts by trust domain.
fn authority_key(scope: &Scope, kind: Kind, trust_domain: &TrustDomain, id: &[u8]) -> RecordKey {
    key(scope, kind, [trust_domain.as_str().as_bytes(), &[0], id].concat())
}

fn slot_key(scope: &Scope, owner: KeyOwner, kind: AuthorityKind, authority_id: &str) -> RecordKey {
    let mut id = match owner {
        KeyOwner::Shared => vec![0],
        KeyOwner::Server(server) => [&[1], server.as_slice()].concat(),
    };
    id.push(messages::authority_kind_number(kind));
    id.extend_from_slice(authority_id.as_bytes());
    key(scope, Kind::Slot, id)
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

/// The committer's own record, written with each group.
pub fn meta_of(state: &State) -> Write {
    let message = MetaRecord::of(state.trust_domain(), state.at(), state.next_ordinal());
    put(key(&Scope::trust_domain(), Kind::Meta, Bytes::new()), &message)
}

/// Reads records back, sharing the texts that many of them have in common.
#[derive(Debug)]
pub struct Reader {
    trust_domain: TrustDomain,
    parents: HashMap<String, SpiffeId>,
    selectors: HashMap<SelectorSet, SelectorSet>,
    empty: Arc<str>,
}

/// More shared texts than this are not remembered: a reader must not outgrow what it reads.
const MAX_SHARED: usize = 4096;

/// What a record says of the whole rather than of one thing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Meta {
    /// Whose history it is.
    pub trust_domain: TrustDomain,
    /// The newest stamp.
    pub at: SystemTime,
    /// The next ordinal.
    pub next_ordinal: u64,
}

impl Reader {
    /// A reader of one trust domain's records.
    pub fn new(trust_domain: TrustDomain) -> Self {
        Self { trust_domain, parents: HashMap::new(), selectors: HashMap::new(), empty: Arc::from("") }
    }

    /// Puts a record of a loaded store into the state; the records of a store may come in any order.
    /// An entry is returned instead, so that the caller can put many at once.
    ///
    /// # Errors
    /// If the record cannot be read.
    pub fn restore(&mut self, state: &mut State, record: &Record) -> Result<Restored, RecordError> {
        match record.key.kind {
            Kind::Meta => {
                let meta = self.meta(record)?;
                state.stamp(meta.at);
                if let Some(last) = meta.next_ordinal.checked_sub(1) {
                    state.count_past(last);
                }
                return Ok(Restored::Meta(meta));
            }
            Kind::Entry => return Ok(Restored::Entry(Arc::new(self.entry(record)?))),
            Kind::Bundle => {
                let (trust_domain, message) = (self.domain(&record.key.id)?, unseal::<BundleRecord>(record)?);
                let held = state.restore_bundle(&trust_domain, Some(message.ordinal));
                held.set_info(message.sequence, message.refresh_hint()?);
            }
            Kind::X509Authority => {
                let (trust_domain, ordinal, authority) = self.x509_authority(record)?;
                state.count_past(ordinal);
                state.restore_bundle(&trust_domain, None).put_x509(ordinal, authority);
            }
            Kind::JwtAuthority => {
                let (trust_domain, ordinal, authority) = self.jwt_authority(record)?;
                state.count_past(ordinal);
                state.restore_bundle(&trust_domain, None).put_jwt(ordinal, authority);
            }
            Kind::Agent => state.apply_change(&Change::PutAgent(Arc::new(self.agent(record)?)))?,
            Kind::Token => state.apply_change(&Change::PutToken(self.token(record)?))?,
            Kind::Slot => state.apply_change(&Change::PutSlot(Arc::new(self.slot(record)?)))?,
        }
        Ok(Restored::Done)
    }

    /// The change that another server's write stands for, given the state before it; `None` for what
    /// is no change of its own.
    ///
    /// # Errors
    /// If the record cannot be read.
    pub fn change_of(&mut self, before: &State, write: &Write) -> Result<Option<Change>, RecordError> {
        Ok(Some(match write {
            Write::Put(record) => match record.key.kind {
                Kind::Meta => return Ok(None),
                Kind::Entry => Change::PutEntry(Arc::new(self.entry(record)?)),
                Kind::Agent => Change::PutAgent(Arc::new(self.agent(record)?)),
                Kind::Token => Change::PutToken(self.token(record)?),
                Kind::Bundle => {
                    let message = unseal::<BundleRecord>(record)?;
                    Change::PutBundleInfo {
                        trust_domain: self.domain(&record.key.id)?,
                        sequence: message.sequence,
                        refresh_hint: message.refresh_hint()?,
                    }
                }
                Kind::X509Authority => {
                    let (trust_domain, _, authority) = self.x509_authority(record)?;
                    Change::PutX509Authority { trust_domain, authority }
                }
                Kind::JwtAuthority => {
                    let (trust_domain, _, authority) = self.jwt_authority(record)?;
                    Change::PutJwtAuthority { trust_domain, authority }
                }
                Kind::Slot => Change::PutSlot(Arc::new(self.slot(record)?)),
            },
            Write::Delete(key) => return self.removal_of(before, key),
        }))
    }

    fn removal_of(&self, before: &State, key: &RecordKey) -> Result<Option<Change>, RecordError> {
        Ok(Some(match key.kind {
            Kind::Meta => return Ok(None),
            Kind::Entry => match before.entry_at(ordinal_of(key)?) {
                Some(entry) => Change::RemoveEntry(Arc::clone(&entry.id)),
                None => return Ok(None),
            },
            Kind::Agent => match before.agent_at(ordinal_of(key)?) {
                Some(agent) => Change::RemoveAgent(agent.id.clone()),
                None => return Ok(None),
            },
            Kind::Token => Change::RemoveToken(key.id.as_ref().try_into().map_err(|_| RecordError::Key)?),
            Kind::Bundle => Change::RemoveBundle(self.domain(&key.id)?),
            Kind::X509Authority => {
                let (trust_domain, id) = self.authority_id(key)?;
                let sha256 = id.try_into().map_err(|_| RecordError::Key)?;
                Change::RemoveX509Authority { trust_domain, sha256 }
            }
            Kind::JwtAuthority => {
                let (trust_domain, id) = self.authority_id(key)?;
                let key_id = Arc::from(std::str::from_utf8(id).map_err(|_| RecordError::Key)?);
                Change::RemoveJwtAuthority { trust_domain, key_id }
            }
            Kind::Slot => {
                let (owner, kind, authority_id) = slot_of(key)?;
                Change::RemoveSlot { owner, kind, authority_id }
            }
        }))
    }

    fn meta(&self, record: &Record) -> Result<Meta, RecordError> {
        let message = unseal::<MetaRecord>(record)?;
        Ok(Meta {
            trust_domain: TrustDomain::parse(&message.trust_domain)?,
            at: messages::time(message.at.as_ref())?,
            next_ordinal: message.next_ordinal,
        })
    }

    fn entry(&mut self, record: &Record) -> Result<Entry, RecordError> {
        let ordinal = ordinal_of(&record.key)?;
        let message = unseal::<EntryRecord>(record)?;
        Ok(Entry {
            id: Arc::from(message.id.as_str()),
            ordinal,
            revision: message.revision,
            spiffe_id: self.id(&message.spiffe_id)?,
            parent_id: self.parent(&message.parent_id)?,
            selectors: self.selector_set(&message.selectors)?,
            x509_svid_ttl: messages::duration(message.x509_svid_ttl.as_ref())?,
            jwt_svid_ttl: messages::duration(message.jwt_svid_ttl.as_ref())?,
            federates_with: message
                .federates_with
                .iter()
                .map(|name| self.domain(name.as_bytes()))
                .collect::<Result<_, _>>()?,
            admin: message.admin,
            downstream: message.downstream,
            expires_at: messages::optional_time(message.expires_at.as_ref())?,
            dns_names: message.dns_names.iter().map(|name| Arc::from(name.as_str())).collect(),
            store_svid: message.store_svid,
            hint: self.text(&message.hint),
            created_at: messages::time(message.created_at.as_ref())?,
            disable_x509_svid_prefetch: message.disable_x509_svid_prefetch,
            jwt_svid_include_jti: message.jwt_svid_include_jti,
        })
    }

    fn agent(&mut self, record: &Record) -> Result<Agent, RecordError> {
        let ordinal = ordinal_of(&record.key)?;
        let message = unseal::<AgentRecord>(record)?;
        Ok(Agent {
            id: self.id(&message.id)?,
            ordinal,
            attestation_type: Arc::from(message.attestation_type.as_str()),
            selectors: self.selector_set(&message.selectors)?,
            standing: message.standing()?,
            expires_at: messages::time(message.expires_at.as_ref())?,
            can_reattest: message.can_reattest,
            version: self.text(&message.version),
        })
    }

    fn token(&self, record: &Record) -> Result<JoinToken, RecordError> {
        let hash = record.key.id.as_ref().try_into().map_err(|_| RecordError::Key)?;
        let message = unseal::<TokenRecord>(record)?;
        Ok(JoinToken {
            hash,
            expires_at: messages::time(message.expires_at.as_ref())?,
            alias: message.alias.as_deref().map(|id| self.id(id)).transpose()?,
        })
    }

    fn x509_authority(&self, record: &Record) -> Result<(TrustDomain, u64, X509Authority), RecordError> {
        let (trust_domain, _) = self.authority_id(&record.key)?;
        let message = unseal::<X509AuthorityRecord>(record)?;
        Ok((trust_domain, message.ordinal, X509Authority { der: message.certificate, tainted: message.tainted }))
    }

    fn jwt_authority(&self, record: &Record) -> Result<(TrustDomain, u64, JwtAuthority), RecordError> {
        let (trust_domain, id) = self.authority_id(&record.key)?;
        let key_id = Arc::from(std::str::from_utf8(id).map_err(|_| RecordError::Key)?);
        let message = unseal::<JwtAuthorityRecord>(record)?;
        let expires_at = messages::optional_time(message.expires_at.as_ref())?;
        let authority = JwtAuthority { key_id, public_key: message.public_key, expires_at, tainted: message.tainted };
        Ok((trust_domain, message.ordinal, authority))
    }

    fn slot(&self, record: &Record) -> Result<AuthoritySlot, RecordError> {
        let (owner, kind, authority_id) = slot_of(&record.key)?;
        unseal::<SlotRecord>(record)?.slot(owner, kind, authority_id)
    }

    fn authority_id<'k>(&self, key: &'k RecordKey) -> Result<(TrustDomain, &'k [u8]), RecordError> {
        let zero = key.id.iter().position(|byte| *byte == 0).ok_or(RecordError::Key)?;
        let (domain, id) = key.id.split_at(zero);
        Ok((self.domain(domain)?, id.get(1..).unwrap_or_default()))
    }

    fn domain(&self, name: &[u8]) -> Result<TrustDomain, RecordError> {
        if name == self.trust_domain.as_str().as_bytes() {
            return Ok(self.trust_domain.clone());
        }
        let name = std::str::from_utf8(name).map_err(|_| RecordError::Key)?;
        Ok(TrustDomain::parse(name)?)
    }

    /// Ids of our own trust domain are stored as their path.
    fn id(&self, text: &str) -> Result<SpiffeId, RecordError> {
        if text.starts_with("spiffe://") {
            Ok(SpiffeId::parse(text)?)
        } else {
            Ok(SpiffeId::from_path(&self.trust_domain, text)?)
        }
    }

    fn parent(&mut self, text: &str) -> Result<SpiffeId, RecordError> {
        if let Some(shared) = self.parents.get(text) {
            return Ok(shared.clone());
        }
        let id = self.id(text)?;
        if self.parents.len() < MAX_SHARED {
            self.parents.insert(text.to_owned(), id.clone());
        }
        Ok(id)
    }

    fn selector_set(&mut self, texts: &[String]) -> Result<SelectorSet, RecordError> {
        let set: SelectorSet =
            texts.iter().map(|text| Selector::parse(text)).collect::<Result<Vec<_>, _>>()?.into_iter().collect();
        if let Some(shared) = self.selectors.get(&set) {
            return Ok(shared.clone());
        }
        if self.selectors.len() < MAX_SHARED {
            self.selectors.insert(set.clone(), set.clone());
        }
        Ok(set)
    }

    fn text(&self, text: &str) -> Arc<str> {
        if text.is_empty() { Arc::clone(&self.empty) } else { Arc::from(text) }
    }
}

/// What became of a restored record.
#[derive(Clone, Debug)]
pub enum Restored {
    /// It is in the state.
    Done,
    /// It is an entry, not in the state yet.
    Entry(Arc<Entry>),
    /// It concerns the whole, and is in the state.
    Meta(Meta),
}

fn ordinal_of(key: &RecordKey) -> Result<u64, RecordError> {
    key.id.as_ref().try_into().map(u64::from_be_bytes).map_err(|_| RecordError::Key)
}

fn slot_of(key: &RecordKey) -> Result<(KeyOwner, AuthorityKind, Arc<str>), RecordError> {
    let (owner, rest) = match key.id.split_first() {
        Some((0, rest)) => (KeyOwner::Shared, rest),
        Some((1, rest)) => {
            let (server, rest) = rest.split_first_chunk::<16>().ok_or(RecordError::Key)?;
            (KeyOwner::Server(*server), rest)
        }
        _ => return Err(RecordError::Key),
    };
    let (kind, id) = rest.split_first().ok_or(RecordError::Key)?;
    let kind = messages::authority_kind(*kind)?;
    Ok((owner, kind, Arc::from(std::str::from_utf8(id).map_err(|_| RecordError::Key)?)))
}
