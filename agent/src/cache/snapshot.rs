//! What subscribers see: one view per selector set, shared by all who have that set.

use std::collections::HashMap;
use std::sync::{Arc, OnceLock};
use std::time::SystemTime;

use bytes::Bytes;
use spiffe::bundle::Bundle;
use spiffe::id::SpiffeId;
use spiffe::selector::SelectorSet;
use spiffe::x509::PrivateKey;
use tokio::sync::watch;

use super::desired::{Desired, Entry, EntryId};

/// An X.509-SVID in memory, with its key. It is written nowhere.
pub struct HeldSvid {
    /// The entry it was signed for.
    pub entry_id: EntryId,
    /// The identity it proves.
    pub id: SpiffeId,
    /// What the entry's author calls it; may be empty.
    pub hint: Arc<str>,
    /// DER certificates, leaf first, without the root.
    pub chain: Vec<Bytes>,
    /// The leaf's key.
    pub key: Arc<PrivateKey>,
    /// From when on it is valid.
    pub not_before: SystemTime,
    /// From when on it is worthless.
    pub not_after: SystemTime,
}

impl std::fmt::Debug for HeldSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HeldSvid")
            .field("entry_id", &self.entry_id)
            .field("id", &self.id)
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// Everything a process with one selector set may have, at one moment. A view never changes; a new one takes its place.
#[derive(Debug)]
pub struct View {
    /// Valid SVIDs in the order of their entries' ids.
    pub svids: Vec<Arc<HeldSvid>>,
    /// The entries themselves, in the same order, also those without an SVID.
    pub entries: Vec<Arc<Entry>>,
    /// The bundle of the own trust domain.
    pub bundle: Arc<Bundle>,
    /// The bundles of trust domains that the entries federate with, in the order of their names.
    pub federated: Vec<Arc<Bundle>>,
    /// Whether there is any entry, and every one has its SVID.
    pub complete: bool,
    /// Whether there is any entry.
    pub entitled: bool,
    /// The encoded answer to a workload, made by whoever needs it first.
    pub encoded: OnceLock<Bytes>,
    /// The encoded X.509 bundles, likewise.
    pub encoded_x509_bundles: OnceLock<Bytes>,
    /// The encoded JWT bundles, likewise.
    pub encoded_jwt_bundles: OnceLock<Bytes>,
}

impl View {
    /// The view of `entries` with the SVIDs that are held and valid at `now`.
    pub(super) fn build(
        desired: &Desired,
        entries: Vec<Arc<Entry>>,
        held: impl Fn(&EntryId) -> Option<Arc<HeldSvid>>,
        now: SystemTime,
    ) -> Self {
        let svids: Vec<_> =
            entries.iter().filter_map(|entry| held(&entry.id)).filter(|svid| svid.not_after > now).collect();
        Self {
            complete: !entries.is_empty() && svids.len() == entries.len(),
            entitled: !entries.is_empty(),
            svids,
            bundle: Arc::clone(desired.own()),
            federated: desired.federated(&entries),
            entries,
            encoded: OnceLock::new(),
            encoded_x509_bundles: OnceLock::new(),
            encoded_jwt_bundles: OnceLock::new(),
        }
    }

    /// Whether nothing in it has expired at `now`.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.svids.iter().all(|svid| svid.not_after > now)
    }

    /// Whether a subscriber could tell the two apart.
    pub(super) fn differs_from(&self, other: &Self) -> bool {
        fn same<T>(one: &[Arc<T>], other: &[Arc<T>]) -> bool {
            one.len() == other.len() && one.iter().zip(other).all(|(one, other)| Arc::ptr_eq(one, other))
        }
        // What an entry says of itself is not compared: a change that matters comes with a new SVID.
        let same_entries = self.entries.len() == other.entries.len()
            && self.entries.iter().zip(&other.entries).all(|(one, other)| one.id == other.id);
        !same_entries
            || self.complete != other.complete
            || self.entitled != other.entitled
            || !Arc::ptr_eq(&self.bundle, &other.bundle)
            || !same(&self.svids, &other.svids)
            || !same(&self.federated, &other.federated)
    }
}

/// The views that somebody subscribes to.
#[derive(Default)]
pub(super) struct Views {
    slots: HashMap<SelectorSet, Slot>,
}

struct Slot {
    view: watch::Sender<Arc<View>>,
    subscribers: usize,
}

impl Views {
    /// One more subscriber to `selectors`; the view is built if nobody had it yet. Also answers the selectors as all
    /// subscribers share them.
    pub(super) fn subscribe(
        &mut self,
        selectors: &SelectorSet,
        build: impl FnOnce() -> View,
    ) -> (watch::Receiver<Arc<View>>, SelectorSet) {
        let shared = match self.slots.get_key_value(selectors) {
            Some((shared, _)) => shared.clone(),
            None => selectors.clone(),
        };
        let slot = self
            .slots
            .entry(shared.clone())
            .or_insert_with(|| Slot { view: watch::Sender::new(Arc::new(build())), subscribers: 0 });
        slot.subscribers += 1;
        (slot.view.subscribe(), shared)
    }

    /// One subscriber fewer; the last one's view is given back.
    pub(super) fn unsubscribe(&mut self, selectors: &SelectorSet) -> Option<Arc<View>> {
        let slot = self.slots.get_mut(selectors)?;
        slot.subscribers = slot.subscribers.saturating_sub(1);
        if slot.subscribers > 0 {
            return None;
        }
        self.slots.remove(selectors).map(|slot| Arc::clone(&slot.view.borrow()))
    }

    /// Builds those views anew that `concerned` points out and hands each that differs to its subscribers.
    pub(super) fn rebuild(
        &mut self,
        concerned: impl Fn(&SelectorSet, &View) -> bool,
        build: impl Fn(&SelectorSet) -> View,
    ) {
        for (selectors, slot) in &self.slots {
            if !concerned(selectors, &slot.view.borrow()) {
                continue;
            }
            let view = build(selectors);
            let differs = view.differs_from(&slot.view.borrow());
            if differs {
                slot.view.send_replace(Arc::new(view));
            }
        }
    }

    /// The entries that subscribers follow, with repetition.
    pub(super) fn followed(&self) -> impl Iterator<Item = EntryId> {
        self.slots.values().flat_map(|slot| {
            let view = Arc::clone(&slot.view.borrow());
            (0..view.entries.len()).filter_map(move |at| view.entries.get(at).map(|entry| Arc::clone(&entry.id)))
        })
    }

    /// How many subscribers there are.
    pub(super) fn subscribers(&self) -> usize {
        self.slots.values().map(|slot| slot.subscribers).sum()
    }
}
