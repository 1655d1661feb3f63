//! What this agent holds of the server's view, and what it has to fetch or drop: decisions on values.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use spiffe::view::{Digest, ViewDigest};

use crate::cache::{Entry, EntryId, Update};

/// One version of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Version {
    /// Grows with every change.
    pub revision: i64,
    /// Unix seconds; 0 from servers that do not say it.
    pub created_at: i64,
    /// What the server that pushed it says of its content; none if it was polled.
    pub content: Option<Digest>,
}

impl Version {
    /// Whether what is held in this version has to be fetched anew when the server has `offered`. A creation time that
    /// the server does not tell says nothing.
    fn is_stale_beside(self, offered: Version) -> bool {
        let anew = self.created_at != offered.created_at && self.created_at != 0 && offered.created_at != 0;
        self.revision != offered.revision || anew
    }
}

/// A place in the server's history.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Position {
    /// Which history.
    pub history: Vec<u8>,
    /// How many changes it had.
    pub revision: u64,
    /// What they were.
    pub digest: Vec<u8>,
}

/// An entry as it came, whether or not it can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferedEntry {
    /// Its id.
    pub id: EntryId,
    /// Its version.
    pub version: Version,
    /// Its content; none if the agent cannot make sense of it. Such an entry is held by name, so that both sides
    /// agree about what was sent, and serves nobody.
    pub entry: Option<Arc<Entry>>,
}

/// A bundle as it came, whether or not it can be used.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OfferedBundle {
    /// Whose it is.
    pub trust_domain: TrustDomain,
    /// SHA-256 of the message.
    pub digest: Digest,
    /// Its content; none if the agent cannot make sense of it.
    pub bundle: Option<Arc<Bundle>>,
}

/// A step from the server, as it came.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Step {
    /// New and changed entries.
    pub entries: Vec<OfferedEntry>,
    /// Entries that are gone.
    pub removed_entries: Vec<EntryId>,
    /// New and changed bundles.
    pub bundles: Vec<OfferedBundle>,
    /// Trust domains whose bundle is gone.
    pub removed_bundles: Vec<TrustDomain>,
    /// What is held counts for nothing: this is all there is.
    pub anew: bool,
}

#[derive(Debug, Clone)]
struct Held {
    version: Version,
    federates_with: Box<[TrustDomain]>,
}

/// What was sent to this agent and is held: names and versions. The content is in the cache.
#[derive(Debug, Clone, Default)]
pub struct View {
    entries: BTreeMap<EntryId, Held>,
    bundles: BTreeMap<TrustDomain, Digest>,
    digest: ViewDigest,
    /// Where in the server's history this view was whole; none after a poll.
    pub position: Option<Position>,
}

/// What a poll has to do about the entries.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Ids to be fetched in full, sorted.
    pub fetch: Vec<EntryId>,
    /// Ids to be dropped, sorted.
    pub drop: Vec<EntryId>,
}

impl View {
    /// Compares with all versions the server has for this agent.
    pub fn compare(&self, offered: &BTreeMap<EntryId, Version>) -> Difference {
        let is_new = |id: &EntryId, version: Version| {
            self.entries.get(id).is_none_or(|held| held.version.is_stale_beside(version))
        };
        Difference {
            fetch: offered.iter().filter(|(id, version)| is_new(id, **version)).map(|(id, _)| id.clone()).collect(),
            drop: self.entries.keys().filter(|id| !offered.contains_key(*id)).cloned().collect(),
        }
    }

    /// The foreign trust domains that the entries federate with, once `step` is taken.
    pub fn federated_after(&self, step: &Step) -> BTreeSet<TrustDomain> {
        let replaced: BTreeSet<&EntryId> =
            step.entries.iter().map(|entry| &entry.id).chain(&step.removed_entries).collect();
        let kept = self.entries.iter().filter(|(id, _)| !replaced.contains(id));
        let kept = kept.flat_map(|(_, held)| held.federates_with.iter());
        let came = step.entries.iter().filter_map(|offered| offered.entry.as_ref());
        kept.chain(came.flat_map(|entry| &entry.federates_with)).cloned().collect()
    }

    /// The trust domains whose bundles are held.
    pub fn trust_domains(&self) -> impl Iterator<Item = &TrustDomain> {
        self.bundles.keys()
    }

    /// Takes a step; answers what it means for the cache. What cannot be used is dropped there.
    pub fn take(&mut self, mut step: Step) -> Update {
        if step.anew {
            let comes: BTreeSet<&EntryId> = step.entries.iter().map(|offered| &offered.id).collect();
            step.removed_entries = self.entries.keys().filter(|id| !comes.contains(id)).cloned().collect();
            let comes: BTreeSet<&TrustDomain> = step.bundles.iter().map(|offered| &offered.trust_domain).collect();
            step.removed_bundles = self.bundles.keys().filter(|name| !comes.contains(name)).cloned().collect();
        }
        let mut update = Update { removed_entries: step.removed_entries, ..Update::default() };
        for id in &update.removed_entries {
            if let Some(held) = self.entries.remove(id) {
                self.digest.remove_entry(id, &counted(held.version));
            }
        }
        for offered in step.entries {
            let federates_with = offered.entry.iter().flat_map(|entry| &entry.federates_with).cloned().collect();
            let held = Held { version: offered.version, federates_with };
            self.digest.add_entry(&offered.id, &counted(held.version));
            if let Some(before) = self.entries.insert(Arc::clone(&offered.id), held) {
                self.digest.remove_entry(&offered.id, &counted(before.version));
            }
            match offered.entry {
                Some(entry) => update.entries.push(entry),
                None => update.removed_entries.push(offered.id),
            }
        }
        for trust_domain in step.removed_bundles {
            if let Some(held) = self.bundles.remove(&trust_domain) {
                self.digest.remove_bundle(trust_domain.as_str(), &held);
            }
            update.removed_bundles.push(trust_domain);
        }
        for offered in step.bundles {
            self.digest.add_bundle(offered.trust_domain.as_str(), &offered.digest);
            let known = self.bundles.insert(offered.trust_domain.clone(), offered.digest);
            if let Some(known) = &known {
                self.digest.remove_bundle(offered.trust_domain.as_str(), known);
            }
            if known != Some(offered.digest)
                && let Some(bundle) = offered.bundle
            {
                update.bundles.push(bundle);
            }
        }
        update
    }

    /// The digest of the whole view.
    pub fn digest(&self) -> Digest {
        self.digest.finish()
    }

    /// The versions of all entries, in the order of their ids.
    pub fn entries(&self) -> impl Iterator<Item = (&EntryId, Version)> {
        self.entries.iter().map(|(id, held)| (id, held.version))
    }

    /// The digests of all bundles, in the order of their trust domains.
    pub fn bundles(&self) -> impl Iterator<Item = (&TrustDomain, &Digest)> {
        self.bundles.iter()
    }
}

/// What counts as content: an entry that was polled has none that a server could name, so a server that pushes finds a
/// difference and sends it.
fn counted(version: Version) -> Digest {
    version.content.unwrap_or_default()
}

#[cfg(test)]
#[path = "plan/tests.rs"]
mod tests;
