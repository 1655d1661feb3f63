//! A trust domain at one revision.
//!
//! A [`State`] is made of persistent maps: a clone costs a few pointers and shares everything that
//! did not change, so a reader holds a revision as long as it likes and nobody waits for a lock.
//! Nothing here is asynchronous, persisted or sent; [`State::apply`] is the only way forward.

mod apply;
mod bundles;
mod content;
mod index;
pub mod model;

#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::SystemTime;

use imbl::{OrdMap, OrdSet};
use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorSet};

use self::bundles::HeldBundle;
use self::index::{Index, hash_of, likeness};
use self::model::{Agent, AuthorityKind, AuthoritySlot, Entry, JoinToken, KeyOwner};
use crate::history::{HistoryId, Position};

pub use self::apply::Invalid;

/// Something that is absent from its end on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Ending {
    /// The entry with this ordinal.
    Entry(u64),
    /// The join token with this hash.
    Token([u8; 32]),
}

type SlotKey = (KeyOwner, AuthorityKind, Arc<str>);

/// Everything a trust domain holds, at one position of its history.
#[derive(Clone, Debug)]
pub struct State {
    trust_domain: TrustDomain,
    server_id: SpiffeId,
    position: Position,
    next_ordinal: u64,
    revision_floor: i64,
    restored_from: Option<HistoryId>,
    entries: OrdMap<u64, Arc<Entry>>,
    entries_by_id: Index,
    entries_by_parent: Index,
    // The hashes in the index above, each once: far fewer than entries, so that asking of an entry whether anything
    // stands below it stays within the caches of a processor.
    parents: OrdSet<u64>,
    entries_by_spiffe_id: Index,
    entries_by_likeness: Index,
    entries_by_federation: Index,
    // An alias whose selectors are all among an agent's has its first selector among them: one
    // posting for each alias finds every match.
    aliases_by_first_selector: Index,
    agents: OrdMap<u64, Arc<Agent>>,
    agents_by_id: Index,
    agents_by_selector: Index,
    tokens: OrdMap<[u8; 32], Arc<JoinToken>>,
    bundles: OrdMap<TrustDomain, HeldBundle>,
    slots: OrdMap<SlotKey, Arc<AuthoritySlot>>,
    endings: OrdSet<(SystemTime, Ending)>,
    // Those that can attest again come apart from those that cannot: which of them are removed is a setting.
    agent_endings: OrdSet<(bool, SystemTime, u64)>,
}

impl State {
    /// The empty state of a trust domain whose history begins at `position`.
    pub fn empty(trust_domain: TrustDomain, position: Position) -> Self {
        Self {
            server_id: SpiffeId::server_of(&trust_domain),
            trust_domain,
            position,
            next_ordinal: 1,
            revision_floor: 0,
            restored_from: None,
            entries: OrdMap::new(),
            entries_by_id: Index::default(),
            entries_by_parent: Index::default(),
            parents: OrdSet::new(),
            entries_by_spiffe_id: Index::default(),
            entries_by_likeness: Index::default(),
            entries_by_federation: Index::default(),
            aliases_by_first_selector: Index::default(),
            agents: OrdMap::new(),
            agents_by_id: Index::default(),
            agents_by_selector: Index::default(),
            tokens: OrdMap::new(),
            bundles: OrdMap::new(),
            slots: OrdMap::new(),
            endings: OrdSet::new(),
            agent_endings: OrdSet::new(),
        }
    }

    /// The trust domain this is the state of.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The id of its servers: the parent of node aliases.
    pub fn server_id(&self) -> &SpiffeId {
        &self.server_id
    }

    /// Where in the history this is.
    pub fn position(&self) -> &Position {
        &self.position
    }

    /// The ordinal that the next new record gets. A part that makes several counts on from here.
    pub fn next_ordinal(&self) -> u64 {
        self.next_ordinal
    }

    /// The revision that a new entry has, and the least of all: a multiple of 2^32 that grows with each restore that was
    /// noticed, so that who compares revision numbers sees every entry change.
    pub fn revision_floor(&self) -> i64 {
        self.revision_floor
    }

    /// The history that this one went on from, if a restored backup began it.
    pub fn restored_from(&self) -> Option<HistoryId> {
        self.restored_from
    }

    /// The entry with this id.
    pub fn entry(&self, id: &str) -> Option<&Arc<Entry>> {
        self.entries_by_id
            .candidates(hash_of(id))
            .filter_map(|ordinal| self.entries.get(&ordinal))
            .find(|entry| *entry.id == *id)
    }

    /// The entry with this ordinal.
    pub fn entry_at(&self, ordinal: u64) -> Option<&Arc<Entry>> {
        self.entries.get(&ordinal)
    }

    /// How many entries there are.
    pub fn entry_count(&self) -> usize {
        self.entries.len()
    }

    /// All entries in the order of their creation.
    pub fn entries(&self) -> impl DoubleEndedIterator<Item = &Arc<Entry>> {
        self.entries.values()
    }

    /// The entries with an ordinal above `ordinal`, in the order of their creation.
    pub fn entries_after(&self, ordinal: u64) -> impl Iterator<Item = &Arc<Entry>> {
        self.entries.range((std::ops::Bound::Excluded(ordinal), std::ops::Bound::Unbounded)).map(|(_, entry)| entry)
    }

    /// The entries with this parent, in the order of their creation.
    pub fn entries_by_parent<'a>(&'a self, parent: &SpiffeId) -> impl Iterator<Item = &'a Arc<Entry>> {
        self.entries_of(&self.entries_by_parent, hash_of(parent.as_str()))
            .filter(move |entry| entry.parent_id == *parent)
    }

    /// Whether any entry has this parent. May say so without reason for an id whose hash is that of another one, and
    /// never misses one.
    pub fn may_be_parent(&self, id: &SpiffeId) -> bool {
        self.parents.contains(&hash_of(id.as_str()))
    }

    /// The entries that give this SPIFFE ID, in the order of their creation.
    pub fn entries_by_spiffe_id<'a>(&'a self, id: &SpiffeId) -> impl Iterator<Item = &'a Arc<Entry>> {
        self.entries_of(&self.entries_by_spiffe_id, hash_of(id.as_str())).filter(move |entry| entry.spiffe_id == *id)
    }

    /// The entries that federate with this trust domain, in the order of their creation.
    pub fn entries_federating_with<'a>(&'a self, domain: &TrustDomain) -> impl Iterator<Item = &'a Arc<Entry>> {
        self.entries_of(&self.entries_by_federation, hash_of(domain.as_str()))
            .filter(move |entry| entry.federates_with.contains(domain))
    }

    /// How many entries federate with this trust domain; never too few, and too many only if another name has the same
    /// hash. Looks at no entry.
    pub fn most_federating_with(&self, domain: &TrustDomain) -> usize {
        self.entries_by_federation.candidates(hash_of(domain.as_str())).count()
    }

    /// The entries with exactly this parent, SPIFFE ID and selector set, in the order of their creation.
    pub fn entries_like<'a, 'k>(
        &'a self,
        parent: &'k SpiffeId,
        id: &'k SpiffeId,
        selectors: &'k SelectorSet,
    ) -> impl Iterator<Item = &'a Arc<Entry>> {
        self.entries_of(&self.entries_by_likeness, likeness(parent, id, selectors))
            .filter(move |entry| entry.spiffe_id == *id && entry.parent_id == *parent && entry.selectors == *selectors)
    }

    /// The node aliases that an agent with these selectors has: entries below the server whose
    /// selectors are all among `selectors`.
    pub fn aliases_within<'a>(&'a self, selectors: &SelectorSet) -> impl Iterator<Item = &'a Arc<Entry>> {
        selectors.iter().flat_map(move |first| {
            self.entries_of(&self.aliases_by_first_selector, hash_of(first)).filter(move |entry| {
                entry.selectors.iter().next() == Some(first)
                    && entry.parent_id == self.server_id
                    && entry.selectors.is_subset_of(selectors)
            })
        })
    }

    /// The agent with this id.
    pub fn agent(&self, id: &SpiffeId) -> Option<&Arc<Agent>> {
        self.agents_by_id
            .candidates(hash_of(id.as_str()))
            .filter_map(|ordinal| self.agents.get(&ordinal))
            .find(|agent| agent.id == *id)
    }

    /// The agent with this ordinal.
    pub fn agent_at(&self, ordinal: u64) -> Option<&Arc<Agent>> {
        self.agents.get(&ordinal)
    }

    /// How many agents there are.
    pub fn agent_count(&self) -> usize {
        self.agents.len()
    }

    /// All agents in the order of their first attestation.
    pub fn agents(&self) -> impl DoubleEndedIterator<Item = &Arc<Agent>> {
        self.agents.values()
    }

    /// The agents with an ordinal above `ordinal`, in the order of their first attestation.
    pub fn agents_after(&self, ordinal: u64) -> impl Iterator<Item = &Arc<Agent>> {
        self.agents.range((std::ops::Bound::Excluded(ordinal), std::ops::Bound::Unbounded)).map(|(_, agent)| agent)
    }

    /// The agents whose selectors include all of `selectors`; none for the empty set.
    pub fn agents_with<'a>(&'a self, selectors: &SelectorSet) -> impl Iterator<Item = &'a Arc<Agent>> {
        selectors.iter().next().into_iter().flat_map(move |first: &Selector| {
            self.agents_by_selector
                .candidates(hash_of(first))
                .filter_map(|ordinal| self.agents.get(&ordinal))
                .filter(move |agent| selectors.is_subset_of(&agent.selectors))
        })
    }

    /// The join token with this SHA-256.
    pub fn token(&self, hash: &[u8; 32]) -> Option<&Arc<JoinToken>> {
        self.tokens.get(hash)
    }

    /// All join tokens.
    pub fn tokens(&self) -> impl Iterator<Item = &Arc<JoinToken>> {
        self.tokens.values()
    }

    /// The bundle of a trust domain, our own or a foreign one.
    pub fn bundle(&self, trust_domain: &TrustDomain) -> Option<&Arc<Bundle>> {
        self.bundles.get(trust_domain).map(HeldBundle::bundle)
    }

    /// All bundles, our own included, by name of the trust domain.
    pub fn bundles(&self) -> impl Iterator<Item = &Arc<Bundle>> {
        self.bundles.values().map(HeldBundle::bundle)
    }

    /// All bundles with their ordinals, in the order in which they were made.
    pub fn bundles_in_order(&self) -> Vec<(u64, &Arc<Bundle>)> {
        let mut bundles: Vec<_> = self.bundles.values().map(|held| (held.ordinal(), held.bundle())).collect();
        bundles.sort_unstable_by_key(|(ordinal, _)| *ordinal);
        bundles
    }

    /// The journal of one key set and kind, oldest first.
    pub fn slots(&self, owner: KeyOwner, kind: AuthorityKind) -> Vec<&Arc<AuthoritySlot>> {
        let mut slots: Vec<_> = self.slots.values().filter(|slot| slot.owner == owner && slot.kind == kind).collect();
        slots.sort_by_key(|slot| slot.issued_at);
        slots
    }

    /// The journal of all key sets, by owner, kind and authority id.
    pub fn all_slots(&self) -> impl Iterator<Item = &Arc<AuthoritySlot>> {
        self.slots.values()
    }

    /// Entries and join tokens that end, earliest first.
    pub fn endings(&self) -> impl Iterator<Item = (SystemTime, Ending)> + '_ {
        self.endings.iter().copied()
    }

    /// Entries and join tokens that end after `at`, earliest first.
    pub fn endings_after(&self, at: SystemTime) -> impl Iterator<Item = (SystemTime, Ending)> + '_ {
        let last = Ending::Token([u8::MAX; 32]);
        self.endings.range((std::ops::Bound::Excluded((at, last)), std::ops::Bound::Unbounded)).copied()
    }

    /// Agents that are not banned and can, or cannot, attest again by themselves; by the end of the certificate in use,
    /// earliest first. The first one costs a look-up, however many there are.
    pub fn agents_by_ending(&self, can_reattest: bool) -> impl Iterator<Item = &Arc<Agent>> {
        let first = (can_reattest, SystemTime::UNIX_EPOCH, 0);
        let of_kind = self.agent_endings.range(first..).take_while(move |(kind, ..)| *kind == can_reattest);
        of_kind.filter_map(|(.., ordinal)| self.agents.get(ordinal))
    }

    /// A SPIFFE ID equal to `id` that an entry already holds as its parent, else `id`: entries with one
    /// parent share its text.
    pub fn shared_parent(&self, id: &SpiffeId) -> SpiffeId {
        self.entries_by_parent(id).next().map_or_else(|| id.clone(), |entry| entry.parent_id.clone())
    }

    fn entries_of<'a>(&'a self, index: &'a Index, hash: u64) -> impl Iterator<Item = &'a Arc<Entry>> {
        index.candidates(hash).filter_map(|ordinal| self.entries.get(&ordinal))
    }
}
