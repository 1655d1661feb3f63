use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use proptest::prelude::*;
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorSet};
use spiffe::x509::Serial;

use super::model::*;
use super::*;
use crate::history::record::{self, Reader, Restored};
use crate::history::{HistoryId, Position, Write};

fn own() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn start() -> State {
    State::empty(own(), Position::start(HistoryId([1; 16])))
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&own(), path).unwrap()
}

fn foreign(number: u8) -> TrustDomain {
    TrustDomain::parse(&format!("foreign-{number}.org")).unwrap()
}

fn selectors(numbers: &BTreeSet<u8>) -> SelectorSet {
    numbers.iter().map(|number| Selector::new("unix", &format!("uid:{number}")).unwrap()).collect()
}

fn entry(number: u8, shape: &Shape) -> Entry {
    Entry {
        id: format!("entry-{number}").into(),
        ordinal: 0,
        revision: i64::from(number),
        spiffe_id: id(&format!("/workload/{}", shape.name)),
        parent_id: if shape.parent == 0 { id("/spire/server") } else { id(&format!("/workload/{}", shape.parent)) },
        selectors: selectors(&shape.selectors),
        x509_svid_ttl: (shape.name.is_multiple_of(2)).then(|| Duration::from_millis(1500)),
        jwt_svid_ttl: (shape.parent.is_multiple_of(2)).then(|| Duration::from_secs(60)),
        federates_with: shape.federates.iter().map(|number| foreign(*number)).collect(),
        admin: shape.name == 1,
        downstream: shape.name == 2,
        expires_at: (shape.ends > 0).then(|| at(u64::from(shape.ends))),
        dns_names: shape.federates.iter().map(|number| Arc::from(format!("{number}.example.org"))).collect(),
        store_svid: shape.name == 3,
        hint: if shape.name == 1 { "internal".into() } else { "".into() },
        created_at: at(7),
        disable_x509_svid_prefetch: shape.parent == 1,
        jwt_svid_include_jti: shape.parent == 2,
        content: super::model::Content::default(),
    }
}

fn agent(number: u8, shape: &Shape) -> Agent {
    let serial = |number: u8| Serial::from(u128::from(number));
    let pending = vec![PendingSerial { serial: serial(shape.ends), expires_at: at(9) }];
    let active = Standing::Active { serial: serial(shape.name), expires_at: at(u64::from(shape.ends)), pending };
    Agent {
        id: id(&format!("/spire/agent/{number}")),
        ordinal: 0,
        attestation_type: "join_token".into(),
        selectors: selectors(&shape.selectors),
        standing: if shape.parent == 0 { Standing::Banned } else { active },
        expires_at: at(u64::from(shape.ends)),
        can_reattest: shape.name > 1,
        version: if shape.parent == 2 { "1.0".into() } else { "".into() },
        history: (shape.parent == 3).then_some(HistoryId([3; 16])),
    }
}

#[derive(Clone, Debug)]
struct Shape {
    name: u8,
    parent: u8,
    selectors: BTreeSet<u8>,
    federates: BTreeSet<u8>,
    ends: u8,
}

#[derive(Clone, Debug)]
enum Op {
    PutEntry(u8, Shape),
    RemoveEntry(u8),
    PutAgent(u8, Shape),
    RemoveAgent(u8),
    PutToken(u8, u8),
    RemoveToken(u8),
    PutBundle(u8, u8),
    RemoveBundle(u8),
    PutX509(u8, u8, bool),
    RemoveX509(u8, u8),
    PutJwt(u8, u8, bool),
    RemoveJwt(u8, u8),
    PutSlot(u8, u8),
    RemoveSlot(u8),
}

fn shape() -> impl Strategy<Value = Shape> {
    let some = |range: std::ops::Range<u8>| prop::collection::btree_set(range, 1..4);
    (0..4u8, 0..4u8, some(0..5), prop::collection::btree_set(0..3u8, 0..3), 0..4u8)
        .prop_map(|(name, parent, selectors, federates, ends)| Shape { name, parent, selectors, federates, ends })
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        6 => (0..8u8, shape()).prop_map(|(number, shape)| Op::PutEntry(number, shape)),
        3 => (0..8u8).prop_map(Op::RemoveEntry),
        3 => (0..5u8, shape()).prop_map(|(number, shape)| Op::PutAgent(number, shape)),
        1 => (0..5u8).prop_map(Op::RemoveAgent),
        2 => (0..4u8, 0..4u8).prop_map(|(number, ends)| Op::PutToken(number, ends)),
        1 => (0..4u8).prop_map(Op::RemoveToken),
        3 => (0..3u8, 0..9u8).prop_map(|(number, sequence)| Op::PutBundle(number, sequence)),
        1 => (0..3u8).prop_map(Op::RemoveBundle),
        3 => (0..3u8, 0..4u8, any::<bool>()).prop_map(|(domain, key, tainted)| Op::PutX509(domain, key, tainted)),
        1 => (0..3u8, 0..4u8).prop_map(|(domain, key)| Op::RemoveX509(domain, key)),
        3 => (0..3u8, 0..4u8, any::<bool>()).prop_map(|(domain, key, tainted)| Op::PutJwt(domain, key, tainted)),
        1 => (0..3u8, 0..4u8).prop_map(|(domain, key)| Op::RemoveJwt(domain, key)),
        2 => (0..4u8, 0..4u8).prop_map(|(number, status)| Op::PutSlot(number, status)),
        1 => (0..4u8).prop_map(Op::RemoveSlot),
    ]
}

/// What the state must say, kept in the simplest way.
#[derive(Default)]
struct Model {
    next: u64,
    entries: BTreeMap<u64, Arc<Entry>>,
    agents: BTreeMap<u64, Arc<Agent>>,
    tokens: BTreeMap<[u8; 32], JoinToken>,
    bundles: BTreeMap<TrustDomain, Bundle>,
    slots: BTreeMap<(KeyOwner, AuthorityKind, Arc<str>), Arc<AuthoritySlot>>,
}

impl Model {
    fn change(&mut self, op: &Op) -> Change {
        match op {
            Op::PutEntry(number, shape) => {
                let mut entry = entry(*number, shape);
                let held = self.entries.values().find(|held| held.id == entry.id).map(|held| held.ordinal);
                entry.ordinal = held.unwrap_or_else(|| self.take());
                let entry = Arc::new(entry);
                self.entries.insert(entry.ordinal, Arc::clone(&entry));
                Change::PutEntry(entry)
            }
            Op::RemoveEntry(number) => {
                let id: EntryId = format!("entry-{number}").into();
                self.entries.retain(|_, held| held.id != id);
                Change::RemoveEntry(id)
            }
            Op::PutAgent(number, shape) => {
                let mut agent = agent(*number, shape);
                let held = self.agents.values().find(|held| held.id == agent.id).map(|held| held.ordinal);
                agent.ordinal = held.unwrap_or_else(|| self.take());
                let agent = Arc::new(agent);
                self.agents.insert(agent.ordinal, Arc::clone(&agent));
                Change::PutAgent(agent)
            }
            Op::RemoveAgent(number) => {
                let id = id(&format!("/spire/agent/{number}"));
                self.agents.retain(|_, held| held.id != id);
                Change::RemoveAgent(id)
            }
            Op::PutToken(number, ends) => {
                let alias = (ends % 2 == 0).then(|| id("/alias"));
                let token = JoinToken { hash: [*number; 32], expires_at: at(u64::from(*ends)), alias };
                self.tokens.insert(token.hash, token.clone());
                Change::PutToken(token)
            }
            Op::RemoveToken(number) => {
                self.tokens.remove(&[*number; 32]);
                Change::RemoveToken([*number; 32])
            }
            Op::PutBundle(number, sequence) => {
                let trust_domain = foreign(*number);
                if !self.bundles.contains_key(&trust_domain) {
                    self.take();
                }
                let refresh_hint = (sequence % 2 == 0).then(|| Duration::from_secs(300));
                let bundle = self.bundles.entry(trust_domain.clone());
                let bundle = bundle.or_insert_with(|| Bundle::empty(trust_domain.clone()));
                bundle.sequence = u64::from(*sequence);
                bundle.refresh_hint = refresh_hint;
                Change::PutBundleInfo { trust_domain, sequence: u64::from(*sequence), refresh_hint }
            }
            Op::RemoveBundle(number) => {
                self.bundles.remove(&foreign(*number));
                Change::RemoveBundle(foreign(*number))
            }
            Op::PutX509(number, key, tainted) => {
                let trust_domain = foreign(*number);
                let authority = X509Authority { der: Bytes::from(vec![*key; 3]), tainted: *tainted };
                if let Some(bundle) = self.bundles.get_mut(&trust_domain) {
                    match bundle.x509.iter_mut().find(|held| held.der == authority.der) {
                        Some(held) => *held = authority.clone(),
                        None => {
                            bundle.x509.push(authority.clone());
                            self.take();
                        }
                    }
                }
                Change::PutX509Authority { trust_domain, authority }
            }
            Op::RemoveX509(number, key) => {
                let trust_domain = foreign(*number);
                if let Some(bundle) = self.bundles.get_mut(&trust_domain) {
                    bundle.x509.retain(|held| held.der != vec![*key; 3]);
                }
                Change::RemoveX509Authority { trust_domain, sha256: certificate_hash(&[*key; 3]) }
            }
            Op::PutJwt(number, key, tainted) => {
                let trust_domain = foreign(*number);
                let expires_at = (key % 2 == 0).then(|| at(5));
                let key_id: Arc<str> = format!("key-{key}").into();
                let authority =
                    JwtAuthority { key_id, public_key: Bytes::from_static(b"k"), expires_at, tainted: *tainted };
                if let Some(bundle) = self.bundles.get_mut(&trust_domain) {
                    match bundle.jwt.iter_mut().find(|held| held.key_id == authority.key_id) {
                        Some(held) => *held = authority.clone(),
                        None => {
                            bundle.jwt.push(authority.clone());
                            self.take();
                        }
                    }
                }
                Change::PutJwtAuthority { trust_domain, authority }
            }
            Op::RemoveJwt(number, key) => {
                let (trust_domain, key_id) = (foreign(*number), Arc::from(format!("key-{key}")));
                if let Some(bundle) = self.bundles.get_mut(&trust_domain) {
                    bundle.jwt.retain(|held| held.key_id != key_id);
                }
                Change::RemoveJwtAuthority { trust_domain, key_id }
            }
            Op::PutSlot(number, status) => {
                let slot = Arc::new(slot(*number, *status));
                self.slots.insert((slot.owner, slot.kind, Arc::clone(&slot.authority_id)), Arc::clone(&slot));
                Change::PutSlot(slot)
            }
            Op::RemoveSlot(number) => {
                let slot = slot(*number, 0);
                self.slots.remove(&(slot.owner, slot.kind, Arc::clone(&slot.authority_id)));
                Change::RemoveSlot { owner: slot.owner, kind: slot.kind, authority_id: slot.authority_id }
            }
        }
    }

    fn take(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    /// Every look-up, compared with a walk over everything.
    fn check(&self, state: &State) {
        let entries: Vec<_> = self.entries.values().cloned().collect();
        let chosen = |wanted: &dyn Fn(&Entry) -> bool| -> Vec<Arc<Entry>> {
            entries.iter().filter(|entry| wanted(entry)).cloned().collect()
        };
        assert_eq!(state.entries().cloned().collect::<Vec<_>>(), entries);
        assert_eq!(state.entry_count(), entries.len());
        for number in 0..8u8 {
            let id = format!("entry-{number}");
            assert_eq!(state.entry(&id).cloned(), chosen(&|entry| *entry.id == *id).pop());
        }
        for name in 0..4u8 {
            let name = id(&format!("/workload/{name}"));
            assert_eq!(collected(state.entries_by_parent(&name)), chosen(&|entry| entry.parent_id == name));
            assert_eq!(state.may_be_parent(&name), entries.iter().any(|entry| entry.parent_id == name));
            assert_eq!(collected(state.entries_by_spiffe_id(&name)), chosen(&|entry| entry.spiffe_id == name));
        }
        for domain in (0..3).map(foreign) {
            let wanted = chosen(&|entry| entry.federates_with.contains(&domain));
            assert_eq!(state.most_federating_with(&domain), wanted.len());
            assert_eq!(collected(state.entries_federating_with(&domain)), wanted);
        }
        for one in &entries {
            let like = chosen(&|entry| {
                (&entry.parent_id, &entry.spiffe_id, &entry.selectors)
                    == (&one.parent_id, &one.spiffe_id, &one.selectors)
            });
            assert_eq!(collected(state.entries_like(&one.parent_id, &one.spiffe_id, &one.selectors)), like);
            assert_eq!(state.entries_after(one.ordinal).count(), chosen(&|entry| entry.ordinal > one.ordinal).len());
        }
        let agents: Vec<_> = self.agents.values().cloned().collect();
        assert_eq!(state.agents().cloned().collect::<Vec<_>>(), agents);
        for number in 0..5u8 {
            let id = id(&format!("/spire/agent/{number}"));
            let wanted = agents.iter().find(|agent| agent.id == id);
            assert_eq!(state.agent(&id), wanted);
        }
        for mask in 1..32u8 {
            let set = selectors(&(0..5).filter(|bit| mask & (1 << bit) != 0).collect());
            let mut aliases = collected(state.aliases_within(&set));
            aliases.sort_by_key(|entry| entry.ordinal);
            let wanted = chosen(&|entry| entry.parent_id == id("/spire/server") && entry.selectors.is_subset_of(&set));
            assert_eq!(aliases, wanted);
            let with: Vec<_> = state.agents_with(&set).cloned().collect();
            let wanted: Vec<_> = agents.iter().filter(|agent| set.is_subset_of(&agent.selectors)).cloned().collect();
            assert_eq!(with, wanted);
        }
        let tokens: Vec<_> = self.tokens.values().cloned().collect();
        assert_eq!(state.tokens().map(|token| JoinToken::clone(token)).collect::<Vec<_>>(), tokens);
        assert_eq!(
            state.bundles().map(|bundle| Bundle::clone(bundle)).collect::<Vec<_>>(),
            self.bundles.values().cloned().collect::<Vec<_>>()
        );
        assert_eq!(state.all_slots().cloned().collect::<Vec<_>>(), self.slots.values().cloned().collect::<Vec<_>>());
        let mut endings: Vec<_> = entries
            .iter()
            .filter_map(|entry| Some((entry.expires_at?, Ending::Entry(entry.ordinal))))
            .chain(tokens.iter().map(|token| (token.expires_at, Ending::Token(token.hash))))
            .collect();
        endings.sort_unstable();
        assert_eq!(state.endings().collect::<Vec<_>>(), endings);
        let mut ending_agents: Vec<_> = agents.iter().filter(|agent| !agent.is_banned()).cloned().collect();
        ending_agents.sort_by_key(|agent| (agent.expires_at, agent.ordinal));
        for can_reattest in [true, false] {
            let wanted: Vec<_> =
                ending_agents.iter().filter(|agent| agent.can_reattest == can_reattest).cloned().collect();
            assert_eq!(state.agents_by_ending(can_reattest).cloned().collect::<Vec<_>>(), wanted);
        }
        assert_eq!(state.next_ordinal(), self.next + 1);
    }
}

fn collected<'s>(entries: impl Iterator<Item = &'s Arc<Entry>>) -> Vec<Arc<Entry>> {
    entries.cloned().collect()
}

fn slot(number: u8, status: u8) -> AuthoritySlot {
    AuthoritySlot {
        owner: if number.is_multiple_of(2) { KeyOwner::Shared } else { KeyOwner::Server([number; 16]) },
        kind: if number < 2 { AuthorityKind::X509 } else { AuthorityKind::Jwt },
        authority_id: format!("authority-{number}").into(),
        key_id: format!("key-{number}").into(),
        status: [SlotStatus::Prepared, SlotStatus::Active, SlotStatus::Old, SlotStatus::Lost][usize::from(status)],
        issued_at: at(u64::from(number)),
        not_after: at(100),
        certificate: (number < 2).then(|| Bytes::from_static(b"certificate")),
        upstream_chain: vec![Bytes::from_static(b"one"), Bytes::from_static(b"two")],
        public_key: Bytes::from_static(b"public"),
    }
}

/// The state that a store would give back: the written records, in the store's order.
fn reloaded(records: &BTreeMap<crate::history::RecordKey, Bytes>) -> State {
    let mut state = start();
    let mut reader = Reader::new(own());
    let mut entries = Vec::new();
    for (key, value) in records {
        let record = crate::history::Record { key: key.clone(), value: value.clone() };
        if let Restored::Entry(entry) = reader.restore(&mut state, &record).unwrap() {
            entries.push(entry);
        }
    }
    state.restore_entries(entries).unwrap();
    state
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 150, failure_persistence: None, ..ProptestConfig::default() })]

    /// After any changes: every look-up equals a walk over a plain model, the records give back the same state, and
    /// another server that reads the writes comes to it as well.
    #[test]
    fn indexes_equal_a_recomputed_model(ops in prop::collection::vec(op(), 1..60)) {
        let mut model = Model::default();
        let mut state = start();
        let mut follower = start();
        let mut reader = Reader::new(own());
        let mut records = BTreeMap::new();
        for op in &ops {
            let change = model.change(op);
            let scope = Scope::trust_domain();
            let mut writes = record::writes_of(&state, &scope, &change);
            let mut next = state.clone();
            match next.apply(&Part::new(vec![change.clone()])) {
                Ok(()) => state = next,
                Err(Invalid::NoBundle) => continue,
                Err(error) => panic!("{error:?} of {change:?}"),
            }
            writes.push(record::meta_of(&state, at(1000)));
            for write in &writes {
                if let Some(change) = reader.change_of(&follower, write).unwrap() {
                    follower.apply_change(&change).unwrap();
                }
                match write {
                    Write::Put(record) => records.insert(record.key.clone(), record.value.clone()),
                    Write::Delete(key) => records.remove(key),
                };
            }
        }
        for state in [&state, &follower, &reloaded(&records)] {
            model.check(state);
        }
        let orders = [&state, &follower, &reloaded(&records)].map(|state| {
            state.bundles_in_order().iter().map(|(ordinal, bundle)| (*ordinal, bundle.trust_domain.clone())).collect::<Vec<_>>()
        });
        assert_eq!(orders[0], orders[1]);
        assert_eq!(orders[0], orders[2]);
    }
}

#[test]
fn a_state_that_is_held_does_not_change() {
    let shape = Shape { name: 1, parent: 1, selectors: [1].into(), federates: [].into(), ends: 0 };
    let mut one = entry(1, &shape);
    one.ordinal = 1;
    let mut state = start();
    state.apply(&Part::new(vec![Change::PutEntry(Arc::new(one.clone()))])).unwrap();
    let held = state.clone();
    one.revision = 99;
    state.apply(&Part::new(vec![Change::PutEntry(Arc::new(one))])).unwrap();
    state.apply(&Part::new(vec![Change::RemoveEntry("entry-1".into())])).unwrap();
    assert_eq!(held.entry("entry-1").unwrap().revision, 1);
    assert_eq!(state.entry_count(), 0);
}

#[test]
fn contradictions_are_refused() {
    let shape = Shape { name: 1, parent: 1, selectors: [1].into(), federates: [].into(), ends: 1 };
    let with = |number: u8, ordinal| Change::PutEntry(Arc::new(Entry { ordinal, ..entry(number, &shape) }));
    let node = |number: u8, ordinal| Change::PutAgent(Arc::new(Agent { ordinal, ..agent(number, &shape) }));
    let mut state = start();
    state.apply(&Part::new(vec![with(1, 1), node(1, 2)])).unwrap();
    assert_eq!(state.apply_change(&with(1, 3)), Err(Invalid::EntryId));
    assert_eq!(state.apply_change(&with(2, 1)), Err(Invalid::EntryOrdinal));
    assert_eq!(state.apply_change(&node(1, 3)), Err(Invalid::AgentId));
    assert_eq!(state.apply_change(&node(2, 2)), Err(Invalid::AgentOrdinal));
    let authority = X509Authority { der: Bytes::new(), tainted: false };
    let orphan = Change::PutX509Authority { trust_domain: foreign(1), authority };
    assert_eq!(state.apply_change(&orphan), Err(Invalid::NoBundle));
}

#[test]
fn a_newer_record_is_refused_with_a_sentence() {
    let write = record::write_of(&start(), &Scope::trust_domain(), &Change::RemoveToken([0; 32])).unwrap();
    let token = JoinToken { hash: [0; 32], expires_at: at(1), alias: None };
    let Some(Write::Put(sound)) = record::write_of(&start(), &Scope::trust_domain(), &Change::PutToken(token)) else {
        panic!("not written")
    };
    assert_eq!(*write.key(), sound.key);
    let read = |record: &crate::history::Record| Reader::new(own()).restore(&mut start(), record).map(|_| ());
    read(&sound).unwrap();

    // Every flipped bit is found, and so is a value under another key.
    for place in 0..sound.value.len() {
        let mut value = sound.value.to_vec();
        value[place] ^= 0x10;
        let record = crate::history::Record { key: sound.key.clone(), value: Bytes::from(value) };
        assert!(matches!(read(&record), Err(record::RecordError::Checksum)), "byte {place}");
    }
    let mut elsewhere = sound.clone();
    elsewhere.key.id = Bytes::from(vec![1; 32]);
    assert!(matches!(read(&elsewhere), Err(record::RecordError::Checksum)));

    let newer = record::resealed(&sound, 2);
    let error = read(&newer).unwrap_err();
    assert!(matches!(error, record::RecordError::Newer { found: 2, known: 1, .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "Token records up to format 1 are known, and this one has format 2, which a newer version has written: run \
         that version, or restore a backup of this one"
    );
    let bytes = Bytes::from_static(b"-\0\x63id");
    let error = crate::history::RecordKey::from_bytes(&bytes).unwrap_err();
    assert!(matches!(error, record::RecordError::NewerKind { number: 0x63 }), "{error:?}");
}

#[test]
fn a_restore_raises_every_revision_and_changes_no_content() {
    let shape = Shape { name: 1, parent: 1, selectors: [1].into(), federates: BTreeSet::new(), ends: 9 };
    let mut state = start();
    let put = |number: u8, revision| {
        let entry = Entry { ordinal: u64::from(number), revision, ..entry(number, &shape) };
        Change::PutEntry(Arc::new(entry))
    };
    state.apply(&Part::new(vec![put(1, 0), put(2, 7)])).unwrap();
    let contents = |state: &State| state.entries().map(|entry| *entry.content()).collect::<Vec<_>>();
    let revisions = |state: &State| state.entries().map(|entry| entry.revision).collect::<Vec<_>>();
    let before = contents(&state);
    state.apply(&Part::new(vec![Change::BeginHistory(HistoryId([9; 16]))])).unwrap();
    let floor = 1_i64 << 32;
    assert_eq!((state.revision_floor(), state.restored_from()), (floor, Some(HistoryId([1; 16]))));
    assert_eq!(state.position().history, HistoryId([9; 16]));
    assert_eq!(revisions(&state), [floor, floor + 7]);
    assert_eq!(contents(&state), before);
    state.apply(&Part::new(vec![put(2, floor + 8), put(3, 0)])).unwrap();
    assert_eq!(revisions(&state), [floor, floor + 8, floor]);
    state.apply(&Part::new(vec![Change::BeginHistory(HistoryId([8; 16]))])).unwrap();
    assert_eq!(revisions(&state), [2 * floor, 2 * floor + 8, 2 * floor]);
    // As it is read back: what was written before a restore has its old revision.
    let mut loaded = start();
    loaded.restore_origin(floor, Some(HistoryId([1; 16])));
    loaded.restore_entries(vec![Arc::new(Entry { ordinal: 2, revision: 7, ..entry(2, &shape) })]).unwrap();
    assert_eq!(revisions(&loaded), [floor + 7]);
}
