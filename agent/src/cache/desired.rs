//! Which entries and bundles this agent is told to hold: the newest complete view of the server's answer.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorSet};
use spiffe::view::Digest;

/// The server's id of a registration entry.
pub type EntryId = Arc<str>;

/// A registration entry as far as an agent sees it: lifetimes, DNS names and parents stay with the server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The server's id of the entry.
    pub id: EntryId,
    /// The identity a matching process gets.
    pub spiffe_id: SpiffeId,
    /// A process matches when all of these are among its own; never empty.
    pub selectors: SelectorSet,
    /// Foreign trust domains whose bundles go with this identity.
    pub federates_with: Vec<TrustDomain>,
    /// Whether the identity may administrate servers.
    pub admin: bool,
    /// Whether the identity may obtain intermediate authorities.
    pub downstream: bool,
    /// Grows with every change of the entry.
    pub revision: i64,
    /// Unix seconds; tells an entry from a later one with the same id. 0 from servers that do not say it.
    pub created_at: i64,
    /// Whether the SVID belongs into an external store; such an entry matches no process.
    pub store_svid: bool,
    /// What the entry's author calls this identity; may be empty.
    pub hint: Arc<str>,
    /// Whether the X.509-SVID is to be signed only when a process asks for it.
    pub disable_x509_svid_prefetch: bool,
    /// Whether each JWT-SVID must be a new one.
    pub jwt_svid_include_jti: bool,
    /// What the server that pushed it says of its content, also of what agents do not see; none from servers that are
    /// polled.
    pub content: Option<Digest>,
}

impl Entry {
    /// Which form of the entry it is.
    pub fn form(&self) -> Form {
        Form { revision: self.revision, created_at: self.created_at, content: self.content }
    }
}

/// Tells one form of an entry from another: what is signed for one is to be signed anew for the other.
#[derive(Debug, Clone, Copy)]
pub struct Form {
    revision: i64,
    created_at: i64,
    content: Option<Digest>,
}

impl Form {
    /// Whether both are the same form. Numbers may come again after a restore, content does not; servers that are polled
    /// tell only numbers.
    pub fn is(&self, other: &Self) -> bool {
        match (&self.content, &other.content) {
            (Some(one), Some(other)) => one == other,
            _ => self.revision == other.revision && self.created_at == other.created_at,
        }
    }
}

/// A step from one view to the next. What is not named stays as it is.
#[derive(Debug, Clone, Default)]
pub struct Update {
    /// Entries that are new or changed.
    pub entries: Vec<Arc<Entry>>,
    /// Entries that are gone.
    pub removed_entries: Vec<EntryId>,
    /// Bundles that are new or changed, the own one among them.
    pub bundles: Vec<Arc<Bundle>>,
    /// Foreign trust domains whose bundle is gone. The own bundle is never dropped.
    pub removed_bundles: Vec<TrustDomain>,
}

impl Update {
    /// Whether the step changes nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
            && self.removed_entries.is_empty()
            && self.bundles.is_empty()
            && self.removed_bundles.is_empty()
    }
}

/// One entry before and after a step.
#[derive(Debug, Clone)]
pub struct Changed {
    /// As it was, if it was there.
    pub before: Option<Arc<Entry>>,
    /// As it is, if it is there.
    pub after: Option<Arc<Entry>>,
}

impl Changed {
    /// Says in SPIRE's words what became of the entry.
    pub fn tell(&self) {
        match (&self.before, &self.after) {
            (None, Some(entry)) => tracing::debug!(entry = %entry.id, spiffe_id = %entry.spiffe_id, "Entry created"),
            (Some(_), Some(entry)) => tracing::debug!(entry = %entry.id, spiffe_id = %entry.spiffe_id, "Entry updated"),
            (Some(entry), None) => tracing::debug!(entry = %entry.id, spiffe_id = %entry.spiffe_id, "Entry removed"),
            (None, None) => {}
        }
    }

    /// Whether credentials of the earlier form must not be used for the later one: gone, made anew, or another identity.
    pub fn ends_credentials(&self) -> bool {
        match (&self.before, &self.after) {
            (Some(before), Some(after)) => {
                before.created_at != after.created_at || before.spiffe_id != after.spiffe_id || after.store_svid
            }
            (Some(_), None) => true,
            (None, _) => false,
        }
    }
}

/// The entries and bundles held, with an index from selectors to entries.
#[derive(Debug)]
pub struct Desired {
    entries: BTreeMap<EntryId, Arc<Entry>>,
    // Each entry is filed under exactly one of its selectors: the one under which fewest others were filed.
    filed: HashMap<Selector, BTreeSet<EntryId>>,
    own: Arc<Bundle>,
    federated: BTreeMap<TrustDomain, Arc<Bundle>>,
}

impl Desired {
    /// No entries, and the bundle of the own trust domain.
    pub fn new(own: Arc<Bundle>) -> Self {
        Self { entries: BTreeMap::new(), filed: HashMap::new(), own, federated: BTreeMap::new() }
    }

    /// Takes one step; answers which entries changed and whether any bundle did.
    pub fn apply(&mut self, update: Update) -> (Vec<Changed>, bool) {
        let mut changed = Vec::with_capacity(update.entries.len() + update.removed_entries.len());
        for id in &update.removed_entries {
            if let Some(before) = self.remove(id) {
                changed.push(Changed { before: Some(before), after: None });
            }
        }
        for entry in update.entries {
            let before = self.remove(&entry.id);
            self.file(&entry);
            self.entries.insert(Arc::clone(&entry.id), Arc::clone(&entry));
            if before.as_ref() != Some(&entry) {
                changed.push(Changed { before, after: Some(entry) });
            }
        }
        let mut bundles_changed = false;
        for bundle in update.bundles {
            // An equal bundle keeps its old place in memory: views are compared by it.
            if bundle.trust_domain == self.own.trust_domain {
                if self.own != bundle {
                    self.own = bundle;
                    bundles_changed = true;
                }
            } else if self.federated.get(&bundle.trust_domain) != Some(&bundle) {
                self.federated.insert(bundle.trust_domain.clone(), bundle);
                bundles_changed = true;
            }
        }
        for trust_domain in &update.removed_bundles {
            bundles_changed |= self.federated.remove(trust_domain).is_some();
        }
        (changed, bundles_changed)
    }

    fn remove(&mut self, id: &EntryId) -> Option<Arc<Entry>> {
        let entry = self.entries.remove(id)?;
        for selector in &entry.selectors {
            if let Some(bucket) = self.filed.get_mut(selector)
                && bucket.remove(id)
            {
                if bucket.is_empty() {
                    self.filed.remove(selector);
                }
                break;
            }
        }
        Some(entry)
    }

    fn file(&mut self, entry: &Arc<Entry>) {
        let filed = &mut self.filed;
        let least = entry.selectors.iter().min_by_key(|selector| filed.get(*selector).map_or(0, BTreeSet::len));
        if let Some(selector) = least {
            filed.entry(selector.clone()).or_default().insert(Arc::clone(&entry.id));
        }
    }

    /// One entry.
    pub fn entry(&self, id: &str) -> Option<&Arc<Entry>> {
        self.entries.get(id)
    }

    /// All entries, in the order of their ids.
    pub fn entries(&self) -> impl ExactSizeIterator<Item = &Arc<Entry>> {
        self.entries.values()
    }

    /// The entries a process with these selectors may use, in the order of their ids.
    ///
    /// Of several entries with the same hint, only the one made first stays, then the one with the lowest id
    /// (SPIFFE_Workload_API, `X509SVID.hint`: values other than the empty one are unique within a response).
    pub fn matching(&self, selectors: &SelectorSet) -> Vec<Arc<Entry>> {
        // A process may have far more groups than there are entries.
        let filed: Vec<&BTreeSet<EntryId>> = if self.filed.len() < selectors.len() / 16 {
            self.filed.iter().filter(|(selector, _)| selectors.contains(selector)).map(|(_, filed)| filed).collect()
        } else {
            selectors.iter().filter_map(|selector| self.filed.get(selector)).collect()
        };
        let mut matching: Vec<Arc<Entry>> = filed
            .into_iter()
            .flatten()
            .filter_map(|id| self.entries.get(id))
            .filter(|entry| !entry.store_svid && entry.selectors.is_subset_of(selectors))
            .cloned()
            .collect();
        matching.sort_unstable_by(|a, b| a.id.cmp(&b.id));
        let mut first: HashMap<Arc<str>, (i64, EntryId)> = HashMap::new();
        for entry in matching.iter().filter(|entry| !entry.hint.is_empty()) {
            let rank = (entry.created_at, Arc::clone(&entry.id));
            let best = first.entry(Arc::clone(&entry.hint)).or_insert_with(|| rank.clone());
            if rank < *best {
                *best = rank;
            }
        }
        matching.retain(|entry| first.get(&entry.hint).is_none_or(|(_, id)| *id == entry.id));
        matching
    }

    /// The own trust domain's bundle.
    pub fn own(&self) -> &Arc<Bundle> {
        &self.own
    }

    /// The foreign bundles that go with these entries, each once, in the order of their trust domains. A trust domain
    /// whose bundle is not known is left out.
    pub fn federated(&self, entries: &[Arc<Entry>]) -> Vec<Arc<Bundle>> {
        let wanted: BTreeSet<&TrustDomain> = entries.iter().flat_map(|entry| &entry.federates_with).collect();
        wanted.into_iter().filter_map(|trust_domain| self.federated.get(trust_domain)).cloned().collect()
    }

    /// Every bundle held, the own one among them.
    pub fn bundles(&self) -> BTreeMap<TrustDomain, Arc<Bundle>> {
        let mut all = self.federated.clone();
        all.insert(self.own.trust_domain.clone(), Arc::clone(&self.own));
        all
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn trust_domain() -> TrustDomain {
        TrustDomain::parse("example.org").unwrap()
    }

    pub(crate) fn selectors(all: &[&str]) -> SelectorSet {
        all.iter().map(|text| Selector::parse(text).unwrap()).collect()
    }

    pub(crate) fn entry(id: &str, wants: &[&str]) -> Entry {
        Entry {
            id: id.into(),
            spiffe_id: SpiffeId::from_path(&trust_domain(), &format!("/{id}")).unwrap(),
            selectors: selectors(wants),
            federates_with: Vec::new(),
            admin: false,
            downstream: false,
            revision: 0,
            created_at: 100,
            store_svid: false,
            hint: "".into(),
            disable_x509_svid_prefetch: false,
            jwt_svid_include_jti: false,
            content: None,
        }
    }

    fn desired(entries: Vec<Entry>) -> Desired {
        let mut desired = Desired::new(Arc::new(Bundle::empty(trust_domain())));
        desired.apply(Update { entries: entries.into_iter().map(Arc::new).collect(), ..Update::default() });
        desired
    }

    fn ids(entries: &[Arc<Entry>]) -> Vec<&str> {
        entries.iter().map(|entry| &*entry.id).collect()
    }

    #[test]
    fn an_entry_matches_when_the_process_has_all_its_selectors() {
        let desired = desired(vec![
            entry("c", &["unix:uid:1"]),
            entry("a", &["unix:uid:1", "unix:gid:1"]),
            entry("b", &["unix:uid:2"]),
        ]);
        assert_eq!(ids(&desired.matching(&selectors(&["unix:uid:1"]))), ["c"]);
        assert_eq!(ids(&desired.matching(&selectors(&["unix:uid:1", "unix:gid:1", "unix:user:x"]))), ["a", "c"]);
        assert!(desired.matching(&selectors(&[])).is_empty());
    }

    #[test]
    fn an_entry_without_selectors_or_for_a_store_matches_nobody() {
        let mut stored = entry("s", &["unix:uid:1"]);
        stored.store_svid = true;
        let desired = desired(vec![entry("none", &[]), stored]);
        assert!(desired.matching(&selectors(&["unix:uid:1"])).is_empty());
    }

    #[test]
    fn of_equal_hints_the_oldest_entry_stays_then_the_lowest_id() {
        let with = |id, hint: &str, created_at| Entry { hint: hint.into(), created_at, ..entry(id, &["unix:uid:1"]) };
        let desired = desired(vec![
            with("a", "x", 9),
            with("b", "x", 5),
            with("c", "x", 5),
            with("d", "", 1),
            with("e", "", 2),
            with("f", "y", 1),
        ]);
        assert_eq!(ids(&desired.matching(&selectors(&["unix:uid:1"]))), ["b", "d", "e", "f"]);
    }

    #[test]
    fn a_changed_entry_leaves_its_old_place_in_the_index() {
        let mut desired = desired(vec![entry("a", &["unix:uid:1"])]);
        let moved = Entry { revision: 1, ..entry("a", &["unix:uid:2"]) };
        let (changed, bundles) = desired.apply(Update { entries: vec![Arc::new(moved.clone())], ..Update::default() });
        assert_eq!((changed.len(), bundles), (1, false));
        assert!(!changed[0].ends_credentials());
        assert!(desired.matching(&selectors(&["unix:uid:1"])).is_empty());
        assert_eq!(ids(&desired.matching(&selectors(&["unix:uid:2"]))), ["a"]);
        let (changed, _) = desired.apply(Update { entries: vec![Arc::new(moved)], ..Update::default() });
        assert!(changed.is_empty());
        let (changed, _) = desired.apply(Update { removed_entries: vec!["a".into()], ..Update::default() });
        assert!(changed[0].ends_credentials());
        assert!(desired.filed.is_empty() && desired.entries.is_empty());
    }

    #[test]
    fn an_entry_made_anew_or_renamed_ends_its_credentials() {
        let before = Some(Arc::new(entry("a", &["unix:uid:1"])));
        let anew = Entry { created_at: 200, ..entry("a", &["unix:uid:1"]) };
        let renamed = Entry { spiffe_id: entry("other", &[]).spiffe_id, ..entry("a", &["unix:uid:1"]) };
        for after in [anew, renamed] {
            assert!(Changed { before: before.clone(), after: Some(Arc::new(after)) }.ends_credentials());
        }
    }

    #[test]
    fn only_bundles_of_federated_domains_go_with_entries() {
        let foreign = |name: &str| Arc::new(Bundle::empty(TrustDomain::parse(name).unwrap()));
        let federating = Entry {
            federates_with: vec![foreign("b.org").trust_domain.clone(), foreign("z.org").trust_domain.clone()],
            ..entry("a", &["unix:uid:1"])
        };
        let mut desired = desired(vec![federating]);
        desired.apply(Update { bundles: vec![foreign("b.org"), foreign("c.org")], ..Update::default() });
        let matching = desired.matching(&selectors(&["unix:uid:1"]));
        assert_eq!(desired.federated(&matching), vec![foreign("b.org")]);
        assert_eq!(desired.bundles().len(), 3);
        let (_, changed) =
            desired.apply(Update { removed_bundles: vec![foreign("b.org").trust_domain.clone()], ..Update::default() });
        assert!(changed && desired.federated(&matching).is_empty());
    }
}
