//! What an agent is to hold, what it was sent, and the difference. Pure.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::view::{Digest, ViewDigest};

use crate::registry::authorized::authorized;
use crate::state::State;
use crate::state::model::{Entry, EntryId};

/// Which version of an entry: a later entry with the same id has another time of creation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Version {
    /// The entry's revision number.
    pub revision: i64,
    /// When it was made, seconds since 1970.
    pub created_at: i64,
}

impl Version {
    /// The version of an entry.
    pub fn of(entry: &Entry) -> Self {
        Self { revision: entry.revision, created_at: unix_seconds(entry.created_at) }
    }
}

/// Seconds since 1970, negative before.
fn unix_seconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds),
    }
}

/// What somebody holds, by versions: entries by id, bundles by trust domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Version of each entry.
    pub entries: BTreeMap<EntryId, Version>,
    /// Digest of each bundle, as [`spiffe::view::bundle_digest`] makes it.
    pub bundles: BTreeMap<Arc<str>, Digest>,
}

impl Held {
    /// One digest over everything held.
    pub fn digest(&self) -> Digest {
        let mut digest = ViewDigest::new();
        for (id, version) in &self.entries {
            digest.entry(id, version.revision, version.created_at);
        }
        for (trust_domain, bundle) in &self.bundles {
            digest.bundle(trust_domain, bundle);
        }
        digest.finish()
    }
}

/// Everything an agent is to hold at one revision.
#[derive(Clone, Debug, Default)]
pub struct View {
    entries: BTreeMap<EntryId, Arc<Entry>>,
    bundles: BTreeMap<Arc<str>, (Arc<Bundle>, Digest)>,
}

impl View {
    /// What `agent` is to hold: the entries it may have, our own bundle, and those that its entries federate with.
    /// `digest_of` gives the digest of a bundle as it is sent.
    pub fn of(
        state: &State,
        agent: &SpiffeId,
        now: SystemTime,
        mut digest_of: impl FnMut(&Arc<Bundle>) -> Digest,
    ) -> Self {
        let mut view = Self::default();
        let mut add = |view: &mut Self, trust_domain: &TrustDomain| {
            if view.bundles.contains_key(trust_domain.as_str()) {
                return;
            }
            if let Some(bundle) = state.bundle(trust_domain) {
                let held = (Arc::clone(bundle), digest_of(bundle));
                view.bundles.insert(Arc::from(trust_domain.as_str()), held);
            }
        };
        add(&mut view, state.trust_domain());
        for entry in authorized(state, agent, now) {
            entry.federates_with.iter().for_each(|trust_domain| add(&mut view, trust_domain));
            view.entries.insert(Arc::clone(&entry.id), entry);
        }
        view
    }

    /// The versions of what is in it.
    pub fn versions(&self) -> Held {
        Held {
            entries: self.entries.iter().map(|(id, entry)| (Arc::clone(id), Version::of(entry))).collect(),
            bundles: self.bundles.iter().map(|(name, (_, digest))| (Arc::clone(name), *digest)).collect(),
        }
    }

    /// What leads from `held` to this view.
    pub fn beyond(&self, held: &Held) -> Delta {
        let stale = |id: &EntryId, entry: &Entry| held.entries.get(id) != Some(&Version::of(entry));
        let other = |name: &Arc<str>, digest: &Digest| held.bundles.get(name) != Some(digest);
        Delta {
            entries: self
                .entries
                .iter()
                .filter(|(id, entry)| stale(id, entry))
                .map(|(_, entry)| Arc::clone(entry))
                .collect(),
            removed_entries: held.entries.keys().filter(|id| !self.entries.contains_key(*id)).cloned().collect(),
            bundles: self
                .bundles
                .iter()
                .filter(|(name, (_, digest))| other(name, digest))
                .map(|(_, (bundle, _))| Arc::clone(bundle))
                .collect(),
            removed_bundles: held.bundles.keys().filter(|name| !self.bundles.contains_key(*name)).cloned().collect(),
        }
    }

    /// The ids of its entries, in order.
    pub fn entry_ids(&self) -> impl Iterator<Item = &EntryId> {
        self.entries.keys()
    }
}

/// What leads from one view to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Entries that are new or have changed, by id.
    pub entries: Vec<Arc<Entry>>,
    /// Entries that go.
    pub removed_entries: Vec<EntryId>,
    /// Bundles that are new or have changed, by trust domain.
    pub bundles: Vec<Arc<Bundle>>,
    /// Trust domains whose bundles go.
    pub removed_bundles: Vec<Arc<str>>,
}

impl Delta {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
            && self.removed_entries.is_empty()
            && self.bundles.is_empty()
            && self.removed_bundles.is_empty()
    }
}
