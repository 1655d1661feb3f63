#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::SystemTime;

use metrics::{CounterFn, Gauge, HistogramFn, Key, KeyName, Metadata, Recorder, SharedString, Unit};
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::Shutdown;
use spiffe::bundle::{JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};

use super::*;
use crate::history::faulty::{Fault, Faulty};
use crate::history::memory::Memory;
use crate::history::{HistoryId, Position, Reach, Urgency, open};
use crate::state::model::{Agent, Entry, JoinToken, Part, Standing};

const NOW: u64 = 1_000;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn own() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&own(), path).unwrap()
}

fn entry(ordinal: u64, ends: u64) -> Change {
    Change::PutEntry(Arc::new(Entry {
        id: format!("entry-{ordinal}").into(),
        ordinal,
        revision: 0,
        spiffe_id: id("/workload"),
        parent_id: id("/node"),
        selectors: std::iter::empty().collect(),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: Vec::new(),
        admin: false,
        downstream: false,
        expires_at: Some(at(ends)),
        dns_names: Vec::new(),
        store_svid: false,
        hint: "".into(),
        created_at: at(1),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        content: crate::state::model::Content::default(),
    }))
}

fn agent() -> Change {
    Change::PutAgent(Arc::new(Agent {
        id: id("/spire/agent/a"),
        ordinal: 9,
        attestation_type: "join_token".into(),
        selectors: std::iter::empty().collect(),
        standing: Standing::Banned,
        expires_at: at(2_000),
        can_reattest: false,
        version: "".into(),
        history: None,
    }))
}

fn token(number: u8, ends: u64) -> Change {
    Change::PutToken(JoinToken { hash: [number; 32], expires_at: at(ends), alias: None })
}

fn bundle(sequence: u64) -> Change {
    Change::PutBundleInfo { trust_domain: own(), sequence, refresh_hint: None }
}

#[test]
fn a_change_is_counted_by_what_it_does_to_what_is_there() {
    let mut state = State::empty(own(), Position::start(HistoryId([1; 16])));
    let authority = X509Authority { der: vec![1].into(), tainted: false };
    let key = JwtAuthority { key_id: "k".into(), public_key: vec![1].into(), expires_at: None, tainted: false };
    let steps = [
        (entry(1, NOW + 1), Some("datastore.registration_entry.create")),
        (entry(2, NOW), Some("datastore.registration_entry.create")),
        (entry(1, NOW + 2), Some("datastore.registration_entry.update")),
        (Change::RemoveEntry("entry-1".into()), Some("datastore.registration_entry.delete")),
        (Change::RemoveEntry("entry-2".into()), Some("datastore.registration_entry.prune")),
        (Change::RemoveEntry("entry-3".into()), None),
        (agent(), Some("datastore.node.create")),
        (agent(), Some("datastore.node.update")),
        (Change::RemoveAgent(id("/spire/agent/a")), Some("datastore.node.delete")),
        (Change::RemoveAgent(id("/spire/agent/a")), None),
        (token(1, NOW + 1), Some("datastore.join_token.create")),
        (token(2, NOW), Some("datastore.join_token.create")),
        (Change::RemoveToken([1; 32]), Some("datastore.join_token.delete")),
        (Change::RemoveToken([2; 32]), Some("datastore.join_token.prune")),
        (Change::RemoveToken([3; 32]), None),
        (bundle(1), Some("datastore.bundle.create")),
        (Change::PutX509Authority { trust_domain: own(), authority }, None),
        (Change::PutJwtAuthority { trust_domain: own(), authority: key }, None),
        (bundle(2), Some("datastore.bundle.update")),
        (Change::RemoveBundle(own()), Some("datastore.bundle.delete")),
        (Change::RemoveBundle(own()), None),
    ];
    for (change, expected) in steps {
        let name = Operation::of(&change, &state, at(NOW)).and_then(|operation| NAMES.get(operation as usize).copied());
        assert_eq!(name, expected, "{change:?}");
        state.apply_change(&change).unwrap();
    }
}

/// The last value of each meter: of a counter its sum, of a histogram how often it was added to.
#[derive(Clone, Default)]
struct Shown(Arc<Mutex<BTreeMap<String, u64>>>);

struct Meter {
    name: String,
    shown: Shown,
}

impl Meter {
    fn add(&self, value: u64) {
        *self.shown.0.lock().unwrap().entry(self.name.clone()).or_default() += value;
    }
}

impl CounterFn for Meter {
    fn increment(&self, value: u64) {
        self.add(value);
    }

    fn absolute(&self, _: u64) {}
}

impl HistogramFn for Meter {
    fn record(&self, _: f64) {
        self.add(1);
    }
}

impl Shown {
    fn meter(&self, key: &Key) -> Arc<Meter> {
        let labels: Vec<_> = key.labels().map(|label| format!("{}={}", label.key(), label.value())).collect();
        Arc::new(Meter { name: format!("{} {}", key.name(), labels.join(",")), shown: self.clone() })
    }
}

impl Recorder for Shown {
    fn describe_counter(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_gauge(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}
    fn describe_histogram(&self, _: KeyName, _: Option<Unit>, _: SharedString) {}

    fn register_counter(&self, key: &Key, _: &Metadata<'_>) -> Counter {
        Counter::from_arc(self.meter(key))
    }

    fn register_gauge(&self, _: &Key, _: &Metadata<'_>) -> Gauge {
        Gauge::noop()
    }

    fn register_histogram(&self, key: &Key, _: &Metadata<'_>) -> Histogram {
        Histogram::from_arc(self.meter(key))
    }
}

#[tokio::test(start_paused = true)]
async fn writes_are_counted_when_they_end_and_refused_ones_are_not() {
    let shown = Shown::default();
    let _guard = metrics::set_default_local_recorder(&shown);
    let store = Faulty::new(Memory::new(HistoryId([1; 16])), [(2, Fault::Full), (3, Fault::Before)]);
    let clock = Clock::paused(at(NOW));
    let opened = open(Arc::new(store), Reach::OneProcess, own(), clock, Entropy::seeded(1)).await.unwrap();
    let (trigger, shutdown) = Shutdown::new();
    let writer = tokio::spawn(opened.writer.run(shutdown));
    let committer = opened.committer;
    let propose = async |changes: Vec<Change>| {
        let decide = move |_: &State, _| Ok::<_, &str>((Part::new(changes.clone()), ()));
        committer.propose(Urgency::Normal, decide).await.is_ok()
    };

    assert!(propose(vec![entry(1, NOW + 9), entry(2, NOW + 9), token(1, NOW + 9)]).await);
    assert!(!propose(vec![entry(3, NOW + 9)]).await, "full");
    assert!(!propose(vec![entry(4, NOW + 9)]).await, "out of reach");
    // A part that contradicts itself is taken back, and with it what was counted of it.
    let Change::PutEntry(twin) = entry(1, NOW + 9) else { unreachable!() };
    let twin = Change::PutEntry(Arc::new(Entry { ordinal: 7, ..Entry::clone(&twin) }));
    assert!(!propose(vec![token(2, NOW + 9), twin]).await, "invalid");

    let shown = shown.0.lock().unwrap().clone();
    let shown: Vec<_> = shown.iter().map(|(name, value)| (name.as_str(), *value)).collect();
    assert_eq!(
        shown,
        [
            ("datastore.join_token.create status=OK", 1),
            ("datastore.join_token.create.elapsed_time status=OK", 1),
            ("datastore.registration_entry.create status=OK", 2),
            ("datastore.registration_entry.create status=ResourceExhausted", 1),
            ("datastore.registration_entry.create status=Unavailable", 1),
            ("datastore.registration_entry.create.elapsed_time status=OK", 2),
            ("datastore.registration_entry.create.elapsed_time status=ResourceExhausted", 1),
            ("datastore.registration_entry.create.elapsed_time status=Unavailable", 1),
        ]
    );
    trigger.request();
    writer.await.unwrap();
}

#[test]
fn what_is_counted_is_documented() {
    let page = include_str!("../../../../docs/metrics.md");
    for name in NAMES {
        assert!(page.contains(&format!("`{name}`")), "{name}");
    }
}
