//! Which entries an agent may have, and which agents a change concerns.
//!
//! An agent may have the entries whose parent it is, the entries whose parent is the SPIFFE ID of one of those, and so
//! on. To its own id come the ids of its aliases: entries below the server whose selectors are all among what
//! attestation found out about the node. The aliases themselves it does not get. Entries that have ended are absent.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::Arc;
use std::time::SystemTime;

use spiffe::id::{SpiffeId, TrustDomain};

use crate::state::State;
use crate::state::model::{Change, Entry, EntryId};

/// The entries that an agent may have; each once, in no particular order.
pub fn authorized(state: &State, agent: &SpiffeId, now: SystemTime) -> Vec<Arc<Entry>> {
    let mut names = own_names(state, agent, now);
    let mut seen: HashSet<&SpiffeId> = HashSet::new();
    let mut found = Vec::new();
    while let Some(name) = names.pop() {
        if !seen.insert(name) {
            continue;
        }
        for entry in state.entries_by_parent(name).filter(|entry| !entry.is_expired(now)) {
            if state.may_be_parent(&entry.spiffe_id) {
                names.push(&entry.spiffe_id);
            }
            found.push(Arc::clone(entry));
        }
    }
    found
}

/// The agent's own id, and those of its aliases.
fn own_names<'s>(state: &'s State, agent: &'s SpiffeId, now: SystemTime) -> Vec<&'s SpiffeId> {
    let mut names = vec![agent];
    if let Some(agent) = state.agent(agent) {
        let aliases = state.aliases_within(&agent.selectors).filter(|alias| !alias.is_expired(now));
        names.extend(aliases.map(|alias| &alias.spiffe_id));
    }
    names
}

/// The ids of the entries that an agent may have.
pub fn authorized_ids(state: &State, agent: &SpiffeId, now: SystemTime) -> BTreeSet<EntryId> {
    authorized(state, agent, now).iter().map(|entry| Arc::clone(&entry.id)).collect()
}

/// The entries with these ids, each only if the agent may have it. Looks upwards from each entry, so the cost is that
/// of the few entries above it and not of all that the agent has.
pub fn named<'i>(
    state: &State,
    agent: &SpiffeId,
    ids: impl Iterator<Item = &'i str>,
    now: SystemTime,
) -> Vec<Option<Arc<Entry>>> {
    let mut climb = Climb::new(state, agent, now);
    ids.map(|id| state.entry(id).filter(|entry| !entry.is_expired(now) && climb.reaches(&entry.parent_id)).cloned())
        .collect()
}

/// How many entries directly below the agent are looked at before climbing.
const NEAR: usize = 8;

struct Climb<'s> {
    state: &'s State,
    now: SystemTime,
    // Names of the agent, and names below it.
    own: Vec<&'s SpiffeId>,
    // Names below the agent, and names that are not.
    judged: HashMap<&'s SpiffeId, bool>,
}

impl<'s> Climb<'s> {
    /// Starts with what is near the agent. An alias, above all one that came with a join token, has its name in common
    /// with the aliases of a whole fleet: from the agent's side it is one of few, from the other side one of thousands.
    fn new(state: &'s State, agent: &'s SpiffeId, now: SystemTime) -> Self {
        let mut own = own_names(state, agent, now);
        let below = own.iter().flat_map(|name| state.entries_by_parent(name)).take(NEAR);
        let below: Vec<_> = below.filter(|entry| !entry.is_expired(now)).map(|entry| &entry.spiffe_id).collect();
        own.extend(below);
        Self { state, now, own, judged: HashMap::new() }
    }

    /// Whether the agent may have what stands below this name.
    fn reaches(&mut self, name: &'s SpiffeId) -> bool {
        if self.own.contains(&name) {
            return true;
        }
        if let Some(judged) = self.judged.get(name) {
            return *judged;
        }
        let mut names = vec![name];
        let mut seen = HashSet::new();
        let mut reached = false;
        while let Some(name) = names.pop() {
            if !seen.insert(name) || self.judged.get(name) == Some(&false) {
                continue;
            }
            if self.own.contains(&name) || self.judged.get(name) == Some(&true) {
                reached = true;
                break;
            }
            let above = self.state.entries_by_spiffe_id(name);
            names.extend(above.filter(|entry| !entry.is_expired(self.now)).map(|entry| &entry.parent_id));
        }
        if reached {
            self.judged.insert(name, true);
        } else {
            // Whatever was seen on the way reaches no further than this name does.
            self.judged.extend(seen.into_iter().map(|name| (name, false)));
        }
        reached
    }
}

/// The agents that a revision concerns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Concerned {
    /// All of them.
    Everyone,
    /// These; perhaps some too many, and none too few.
    Agents(BTreeSet<SpiffeId>),
}

impl Concerned {
    /// Whether this agent is among them.
    pub fn includes(&self, agent: &SpiffeId) -> bool {
        match self {
            Self::Everyone => true,
            Self::Agents(agents) => agents.contains(agent),
        }
    }
}

/// Whose entries, bundles or standing the changes between two states may have changed.
///
/// `before` may be older and `after` newer than the revision of the changes; then all changes between them are given.
pub fn agents_concerned_by<'c>(
    before: &State,
    after: &State,
    changes: impl IntoIterator<Item = &'c Change>,
) -> Concerned {
    let mut agents = BTreeSet::new();
    let mut above = [Above::new(before), Above::new(after)];
    for change in changes {
        match change {
            Change::PutEntry(entry) => {
                // Between the two states the entry may have stood at several places; each has a change of its own.
                above.iter_mut().for_each(|above| above.climb_from(entry, &mut agents));
                let held = [before, after].map(|state| state.entry(&entry.id));
                for held in held.into_iter().flatten() {
                    above.iter_mut().for_each(|above| above.climb_from(held, &mut agents));
                }
            }
            Change::RemoveEntry(id) => {
                if let Some(held) = before.entry(id) {
                    above.iter_mut().for_each(|above| above.climb_from(held, &mut agents));
                }
            }
            Change::PutAgent(agent) => {
                agents.insert(agent.id.clone());
            }
            Change::RemoveAgent(id) => {
                agents.insert(id.clone());
            }
            Change::PutBundleInfo { trust_domain, .. }
            | Change::RemoveBundle(trust_domain)
            | Change::PutX509Authority { trust_domain, .. }
            | Change::RemoveX509Authority { trust_domain, .. }
            | Change::PutJwtAuthority { trust_domain, .. }
            | Change::RemoveJwtAuthority { trust_domain, .. } => {
                if trust_domain == after.trust_domain() {
                    return Concerned::Everyone;
                }
                above.iter_mut().for_each(|above| above.climb_from_federating(trust_domain, &mut agents));
            }
            Change::PutToken(_)
            | Change::RemoveToken(_)
            | Change::PutSlot(_)
            | Change::RemoveSlot { .. }
            | Change::BeginHistory(_) => {}
        }
    }
    Concerned::Agents(agents)
}

/// Climbs from names to the agents above them; each name once.
struct Above<'s> {
    state: &'s State,
    seen: HashSet<SpiffeId>,
}

impl<'s> Above<'s> {
    fn new(state: &'s State) -> Self {
        Self { state, seen: HashSet::new() }
    }

    fn climb_from_federating(&mut self, domain: &TrustDomain, agents: &mut BTreeSet<SpiffeId>) {
        let entries: Vec<_> = self.state.entries_federating_with(domain).cloned().collect();
        entries.iter().for_each(|entry| self.climb_from(entry, agents));
    }

    fn climb_from(&mut self, entry: &Entry, agents: &mut BTreeSet<SpiffeId>) {
        if entry.parent_id == *self.state.server_id() {
            agents.extend(self.state.agents_with(&entry.selectors).map(|agent| agent.id.clone()));
            return;
        }
        let mut names = vec![entry.parent_id.clone()];
        while let Some(name) = names.pop() {
            if !self.seen.insert(name.clone()) {
                continue;
            }
            if name.is_agent() {
                agents.insert(name.clone());
            }
            for above in self.state.entries_by_spiffe_id(&name) {
                if above.parent_id == *self.state.server_id() {
                    agents.extend(self.state.agents_with(&above.selectors).map(|agent| agent.id.clone()));
                } else {
                    names.push(above.parent_id.clone());
                }
            }
        }
    }
}

#[cfg(test)]
#[path = "authorized/tests.rs"]
mod tests;
