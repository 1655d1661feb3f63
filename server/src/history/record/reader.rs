//! Records read back: into a state that is loaded, or as the changes of other servers.

use std::collections::HashMap;
use std::sync::Arc;

use spiffe::bundle::{JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorSet};

use super::keys::{ordinal_of, slot_of};
use super::messages::{
    self, AgentRecord, BundleRecord, EntryRecord, JwtAuthorityRecord, MetaRecord, SlotRecord, TokenRecord,
    X509AuthorityRecord,
};
use super::{RecordError, unseal};
use crate::history::HistoryId;
use crate::history::group::{Kind, Record, RecordKey, Write};
use crate::state::State;
use crate::state::model::{Agent, AuthoritySlot, Change, Entry, JoinToken};

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
    /// The next ordinal.
    pub next_ordinal: u64,
    /// See [`State::revision_floor`].
    pub revision_floor: i64,
    /// See [`State::restored_from`].
    pub restored_from: Option<HistoryId>,
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
                if let Some(last) = meta.next_ordinal.checked_sub(1) {
                    state.count_past(last);
                }
                state.restore_origin(meta.revision_floor, meta.restored_from);
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
            next_ordinal: message.next_ordinal,
            revision_floor: message.revision_floor,
            restored_from: messages::history_id(message.restored_from.as_ref())?,
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
            content: crate::state::model::Content::default(),
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
            history: messages::history_id(message.history.as_ref())?,
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
