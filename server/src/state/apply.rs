//! One revision to the next.

use std::sync::Arc;

use spiffe::id::TrustDomain;

use super::bundles::HeldBundle;
use super::index::{Index, hash_of, likeness};
use super::model::{Agent, AuthorityKind, AuthoritySlot, Change, Entry, JoinToken, KeyOwner, Part, Standing};
use super::{Ending, State};
use crate::history::{HistoryId, Position};

/// Why a change cannot be applied: the decision that made it is wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Invalid {
    /// Two entries would have one id.
    #[error("an entry with this id has another ordinal")]
    EntryId,
    /// Two entries would have one ordinal.
    #[error("the entry's ordinal is in use")]
    EntryOrdinal,
    /// Two agents would have one id.
    #[error("an agent with this id has another ordinal")]
    AgentId,
    /// Two agents would have one ordinal.
    #[error("the agent's ordinal is in use")]
    AgentOrdinal,
    /// An authority for a trust domain without a bundle.
    #[error("the authority's trust domain has no bundle")]
    NoBundle,
}

/// By how much a restore raises the revisions of entries, as far as they count updates.
pub(super) const FLOOR_STEP: i64 = 1 << 32;

/// The entry with its revision counted from `floor`. Its content stays: agents that compare by it keep what they have.
fn raised(entry: &Arc<Entry>, floor: i64) -> Arc<Entry> {
    if entry.revision >= floor {
        return Arc::clone(entry);
    }
    let revision = floor | entry.revision & (FLOOR_STEP - 1);
    Arc::new(Entry { revision, ..Entry::clone(entry) })
}

impl State {
    /// Goes on by one part; the position stays until [`State::advance`].
    ///
    /// # Errors
    /// If a change contradicts the state. The changes before it are applied, so the caller drops this state.
    pub fn apply(&mut self, part: &Part) -> Result<(), Invalid> {
        part.changes.iter().try_for_each(|change| self.apply_change(change))
    }

    /// Goes on by one change.
    ///
    /// # Errors
    /// If the change contradicts the state, which is then as it was.
    pub fn apply_change(&mut self, change: &Change) -> Result<(), Invalid> {
        match change {
            Change::PutEntry(entry) => self.put_entry(entry)?,
            Change::RemoveEntry(id) => self.remove_entry(id),
            Change::PutAgent(agent) => self.put_agent(agent)?,
            Change::RemoveAgent(id) => self.remove_agent(id.as_str()),
            Change::PutToken(token) => self.put_token(token.clone()),
            Change::RemoveToken(hash) => self.remove_token(hash),
            Change::PutBundleInfo { trust_domain, sequence, refresh_hint } => {
                let ordinal = self.bundle_ordinal(trust_domain);
                self.restore_bundle(trust_domain, Some(ordinal)).set_info(*sequence, *refresh_hint);
            }
            Change::RemoveBundle(trust_domain) => {
                self.bundles.remove(trust_domain);
            }
            Change::PutX509Authority { trust_domain, authority } => {
                let ordinal = self.x509_authority_ordinal(trust_domain, &authority.der);
                let held = self.bundles.get_mut(trust_domain).ok_or(Invalid::NoBundle)?;
                held.put_x509(ordinal, authority.clone());
                self.count_past(ordinal);
            }
            Change::RemoveX509Authority { trust_domain, sha256 } => {
                if let Some(held) = self.bundles.get_mut(trust_domain) {
                    held.remove_x509(sha256);
                }
            }
            Change::PutJwtAuthority { trust_domain, authority } => {
                let ordinal = self.jwt_authority_ordinal(trust_domain, &authority.key_id);
                let held = self.bundles.get_mut(trust_domain).ok_or(Invalid::NoBundle)?;
                held.put_jwt(ordinal, authority.clone());
                self.count_past(ordinal);
            }
            Change::RemoveJwtAuthority { trust_domain, key_id } => {
                if let Some(held) = self.bundles.get_mut(trust_domain) {
                    held.remove_jwt(key_id);
                }
            }
            Change::PutSlot(slot) => self.put_slot(slot),
            Change::RemoveSlot { owner, kind, authority_id } => self.remove_slot(*owner, *kind, authority_id),
            Change::BeginHistory(history) => {
                let from = std::mem::replace(&mut self.position.history, *history);
                self.restore_origin(self.revision_floor.saturating_add(FLOOR_STEP), Some(from));
            }
        }
        Ok(())
    }

    /// Says that all parts of the group at `position` are applied.
    pub fn advance(&mut self, position: Position) {
        self.position = position;
    }

    /// Sets where this history came from, and raises the revisions of what is here.
    pub(crate) fn restore_origin(&mut self, revision_floor: i64, restored_from: Option<HistoryId>) {
        (self.revision_floor, self.restored_from) = (revision_floor, restored_from);
        let low: Vec<_> = self.entries.values().filter(|entry| entry.revision < revision_floor).cloned().collect();
        for entry in low {
            self.entries.insert(entry.ordinal, raised(&entry, revision_floor));
        }
    }

    /// The next ordinal is above this one.
    pub(crate) fn count_past(&mut self, ordinal: u64) {
        self.next_ordinal = self.next_ordinal.max(ordinal.saturating_add(1));
    }

    /// The ordinal that a bundle has, or would get now.
    pub(crate) fn bundle_ordinal(&self, trust_domain: &TrustDomain) -> u64 {
        self.bundles.get(trust_domain).map_or(self.next_ordinal, HeldBundle::ordinal)
    }

    /// The ordinal that an X.509 authority has, or would get now.
    pub(crate) fn x509_authority_ordinal(&self, trust_domain: &TrustDomain, der: &[u8]) -> u64 {
        self.bundles.get(trust_domain).and_then(|held| held.x509_ordinal(der)).unwrap_or(self.next_ordinal)
    }

    /// The ordinal that a JWT authority has, or would get now.
    pub(crate) fn jwt_authority_ordinal(&self, trust_domain: &TrustDomain, key_id: &str) -> u64 {
        self.bundles.get(trust_domain).and_then(|held| held.jwt_ordinal(key_id)).unwrap_or(self.next_ordinal)
    }

    /// The bundle of a trust domain, made if it is not there: records may be read back in any order, an
    /// authority before its bundle's own record, which is the one that tells the ordinal.
    pub(crate) fn restore_bundle(&mut self, trust_domain: &TrustDomain, ordinal: Option<u64>) -> &mut HeldBundle {
        if let Some(ordinal) = ordinal {
            self.count_past(ordinal);
        }
        let held =
            self.bundles.entry(trust_domain.clone()).or_insert_with(|| HeldBundle::empty(trust_domain.clone(), 0));
        if let Some(ordinal) = ordinal {
            held.set_ordinal(ordinal);
        }
        held
    }

    /// Adds many entries of a loaded store, index by index and in the order of each index: twice as fast as one
    /// entry after the other.
    ///
    /// # Errors
    /// If two of them have one ordinal.
    pub(crate) fn restore_entries(&mut self, entries: Vec<Arc<Entry>>) -> Result<(), Invalid> {
        for entry in &entries {
            if self.entries.insert(entry.ordinal, raised(entry, self.revision_floor)).is_some() {
                return Err(Invalid::EntryOrdinal);
            }
            self.count_past(entry.ordinal);
            if let Some(at) = entry.expires_at {
                self.endings.insert((at, Ending::Entry(entry.ordinal)));
            }
        }
        self.entries_by_id.insert_all(entries.iter().map(|entry| (hash_of(&*entry.id), entry.ordinal)));
        self.entries_by_parent
            .insert_all(entries.iter().map(|entry| (hash_of(entry.parent_id.as_str()), entry.ordinal)));
        self.parents.extend(entries.iter().map(|entry| hash_of(entry.parent_id.as_str())));
        self.entries_by_spiffe_id
            .insert_all(entries.iter().map(|entry| (hash_of(entry.spiffe_id.as_str()), entry.ordinal)));
        self.entries_by_likeness.insert_all(
            entries.iter().map(|entry| (likeness(&entry.parent_id, &entry.spiffe_id, &entry.selectors), entry.ordinal)),
        );
        self.entries_by_federation.insert_all(
            entries
                .iter()
                .flat_map(|entry| entry.federates_with.iter().map(|domain| (hash_of(domain.as_str()), entry.ordinal))),
        );
        let server = self.server_id.clone();
        self.aliases_by_first_selector.insert_all(
            entries
                .iter()
                .filter(|entry| entry.parent_id == server)
                .filter_map(|entry| entry.selectors.iter().next().map(|first| (hash_of(first), entry.ordinal))),
        );
        Ok(())
    }

    fn put_entry(&mut self, entry: &Arc<Entry>) -> Result<(), Invalid> {
        if self.entry(&entry.id).is_some_and(|held| held.ordinal != entry.ordinal) {
            return Err(Invalid::EntryId);
        }
        if self.entries.get(&entry.ordinal).is_some_and(|held| held.id != entry.id) {
            return Err(Invalid::EntryOrdinal);
        }
        self.count_past(entry.ordinal);
        if let Some(before) = self.entries.insert(entry.ordinal, raised(entry, self.revision_floor)) {
            self.unindex_entry(&before);
        }
        self.index_entry(entry);
        Ok(())
    }

    fn remove_entry(&mut self, id: &str) {
        let Some(ordinal) = self.entry(id).map(|entry| entry.ordinal) else { return };
        if let Some(entry) = self.entries.remove(&ordinal) {
            self.unindex_entry(&entry);
        }
    }

    fn index_entry(&mut self, entry: &Entry) {
        self.each_entry_index(entry, Index::insert);
        self.parents.insert(hash_of(entry.parent_id.as_str()));
        if let Some(at) = entry.expires_at {
            self.endings.insert((at, Ending::Entry(entry.ordinal)));
        }
    }

    fn unindex_entry(&mut self, entry: &Entry) {
        self.each_entry_index(entry, Index::remove);
        let parent = hash_of(entry.parent_id.as_str());
        if self.entries_by_parent.candidates(parent).next().is_none() {
            self.parents.remove(&parent);
        }
        if let Some(at) = entry.expires_at {
            self.endings.remove(&(at, Ending::Entry(entry.ordinal)));
        }
    }

    /// The one list of an entry's indexes, so that adding and removing cannot differ.
    fn each_entry_index(&mut self, entry: &Entry, act: impl Fn(&mut Index, u64, u64)) {
        let ordinal = entry.ordinal;
        act(&mut self.entries_by_id, hash_of(&*entry.id), ordinal);
        act(&mut self.entries_by_parent, hash_of(entry.parent_id.as_str()), ordinal);
        act(&mut self.entries_by_spiffe_id, hash_of(entry.spiffe_id.as_str()), ordinal);
        act(&mut self.entries_by_likeness, likeness(&entry.parent_id, &entry.spiffe_id, &entry.selectors), ordinal);
        for domain in &entry.federates_with {
            act(&mut self.entries_by_federation, hash_of(domain.as_str()), ordinal);
        }
        if entry.parent_id == self.server_id
            && let Some(first) = entry.selectors.iter().next()
        {
            act(&mut self.aliases_by_first_selector, hash_of(first), ordinal);
        }
    }

    fn put_agent(&mut self, agent: &Arc<Agent>) -> Result<(), Invalid> {
        if self.agent(&agent.id).is_some_and(|held| held.ordinal != agent.ordinal) {
            return Err(Invalid::AgentId);
        }
        if self.agents.get(&agent.ordinal).is_some_and(|held| held.id != agent.id) {
            return Err(Invalid::AgentOrdinal);
        }
        self.count_past(agent.ordinal);
        if let Some(before) = self.agents.insert(agent.ordinal, Arc::clone(agent)) {
            self.unindex_agent(&before);
        }
        self.agents_by_id.insert(hash_of(agent.id.as_str()), agent.ordinal);
        for selector in &agent.selectors {
            self.agents_by_selector.insert(hash_of(selector), agent.ordinal);
        }
        if let Standing::Active { .. } = agent.standing {
            self.agent_endings.insert((agent.can_reattest, agent.expires_at, agent.ordinal));
        }
        Ok(())
    }

    fn remove_agent(&mut self, id: &str) {
        let found = self
            .agents_by_id
            .candidates(hash_of(id))
            .find(|ordinal| self.agents.get(ordinal).is_some_and(|agent| agent.id.as_str() == id));
        if let Some(agent) = found.and_then(|ordinal| self.agents.remove(&ordinal)) {
            self.unindex_agent(&agent);
        }
    }

    fn unindex_agent(&mut self, agent: &Agent) {
        self.agents_by_id.remove(hash_of(agent.id.as_str()), agent.ordinal);
        for selector in &agent.selectors {
            self.agents_by_selector.remove(hash_of(selector), agent.ordinal);
        }
        self.agent_endings.remove(&(agent.can_reattest, agent.expires_at, agent.ordinal));
    }

    fn put_token(&mut self, token: JoinToken) {
        self.endings.insert((token.expires_at, Ending::Token(token.hash)));
        if let Some(before) = self.tokens.insert(token.hash, Arc::new(token.clone()))
            && before.expires_at != token.expires_at
        {
            self.endings.remove(&(before.expires_at, Ending::Token(before.hash)));
        }
    }

    fn remove_token(&mut self, hash: &[u8; 32]) {
        if let Some(token) = self.tokens.remove(hash) {
            self.endings.remove(&(token.expires_at, Ending::Token(*hash)));
        }
    }

    fn put_slot(&mut self, slot: &Arc<AuthoritySlot>) {
        self.slots.insert((slot.owner, slot.kind, Arc::clone(&slot.authority_id)), Arc::clone(slot));
    }

    fn remove_slot(&mut self, owner: KeyOwner, kind: AuthorityKind, authority_id: &Arc<str>) {
        self.slots.remove(&(owner, kind, Arc::clone(authority_id)));
    }
}
