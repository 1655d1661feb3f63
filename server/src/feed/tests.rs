#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use spiffe::bundle::{Bundle, X509Authority};
use spiffe::id::TrustDomain;
use spiffe::selector::{Selector, SelectorSet};
use spiffe::view::Digest;
use spiffe::x509::Serial;

use super::session::{Greeting, Opening, OutOfTurn, Session, Step};
use super::view::{Held, Version, View};
use super::*;
use crate::attest::testing::History;
use crate::history::{HistoryId, Position};
use crate::registry::authorized::authorized_ids;
use crate::state::model::{self, Agent, Change, Part, Standing};

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

fn domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&domain("example.org"), path).unwrap()
}

fn agent_id(number: u8) -> SpiffeId {
    id(&format!("/spire/agent/test/{number}"))
}

fn agent(number: u8, selectors: u8, ordinal: u64) -> Arc<Agent> {
    Arc::new(Agent {
        id: agent_id(number),
        ordinal,
        attestation_type: "test".into(),
        selectors: set(selectors),
        standing: Standing::Active {
            serial: Serial::from(1),
            expires_at: now() + Duration::from_secs(9),
            pending: Vec::new(),
        },
        expires_at: now() + Duration::from_secs(9),
        can_reattest: true,
        version: "".into(),
    })
}

/// The selectors whose bits are set.
fn set(bits: u8) -> SelectorSet {
    (0..3).filter(|bit| bits & (1 << bit) != 0).map(|bit| Selector::new("s", &bit.to_string()).unwrap()).collect()
}

/// Names that entries give and stand below: the server, three agents, four workloads.
fn name(number: u8) -> SpiffeId {
    match number % 8 {
        0 => SpiffeId::server_of(&domain("example.org")),
        agent @ 1..=3 => agent_id(agent),
        workload => id(&format!("/w/{workload}")),
    }
}

fn entry(
    number: u8,
    parent: u8,
    gives: u8,
    bits: u8,
    federates: bool,
    revision: i64,
    ordinal: u64,
) -> Arc<model::Entry> {
    Arc::new(model::Entry {
        id: format!("entry-{number}").into(),
        ordinal,
        revision,
        spiffe_id: name(4 + gives % 4),
        parent_id: name(parent),
        selectors: set(if bits.is_multiple_of(8) { 1 } else { bits }),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: if federates { vec![domain("other.org")] } else { Vec::new() },
        admin: false,
        downstream: false,
        expires_at: None,
        dns_names: Vec::new(),
        store_svid: false,
        hint: "".into(),
        created_at: now(),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
    })
}

fn digest_of(bundle: &Arc<Bundle>) -> Digest {
    let mut text = format!("{}@{}", bundle.trust_domain, bundle.sequence).into_bytes();
    bundle.x509.iter().for_each(|authority| text.extend_from_slice(&authority.der));
    spiffe::view::bundle_digest(&text)
}

fn view(state: &State, agent: &SpiffeId) -> View {
    View::of(state, agent, now(), digest_of)
}

/// An agent as the protocol sees it: it holds something, and applies whole steps.
#[derive(Default)]
struct Holder {
    held: Held,
}

impl Holder {
    fn apply(&mut self, step: &Step) {
        let delta = &step.delta;
        for id in &delta.removed_entries {
            self.held.entries.remove(id).expect("only what is held is removed");
        }
        for name in &delta.removed_bundles {
            self.held.bundles.remove(name).expect("only what is held is removed");
        }
        self.held.entries.extend(delta.entries.iter().map(|entry| (Arc::clone(&entry.id), Version::of(entry))));
        self.held
            .bundles
            .extend(delta.bundles.iter().map(|bundle| (bundle.trust_domain.as_str().into(), digest_of(bundle))));
        assert_eq!(self.held.digest(), step.digest, "both ends have one digest");
    }
}

#[derive(Clone, Debug)]
enum Event {
    Put {
        number: u8,
        parent: u8,
        gives: u8,
        bits: u8,
        federates: bool,
    },
    Remove(u8),
    Attest {
        number: u8,
        bits: u8,
    },
    Evict(u8),
    OwnBundle(u8),
    OtherBundle(bool),
    /// The agent reads and answers what it was sent, or the stream breaks before or after it did.
    Deliver,
    BreakBefore,
    BreakAfter,
    Look,
}

fn event() -> impl Strategy<Value = Event> {
    prop_oneof![
        6 => (0u8..6, 0u8..8, 0u8..4, 0u8..8, any::<bool>()).prop_map(|(number, parent, gives, bits, federates)| {
            Event::Put { number, parent, gives, bits, federates }
        }),
        3 => (0u8..6).prop_map(Event::Remove),
        2 => (1u8..4, 0u8..8).prop_map(|(number, bits)| Event::Attest { number, bits }),
        1 => (2u8..4).prop_map(Event::Evict),
        1 => any::<u8>().prop_map(Event::OwnBundle),
        1 => any::<bool>().prop_map(Event::OtherBundle),
        4 => Just(Event::Deliver),
        1 => Just(Event::BreakBefore),
        1 => Just(Event::BreakAfter),
        4 => Just(Event::Look),
    ]
}

/// Server and agent 1, with the marks that the history sets.
struct World {
    state: State,
    revisions: i64,
    agent: Holder,
    session: Option<Session>,
    sent: Option<Step>,
    dirty: bool,
}

impl World {
    fn new() -> Self {
        let mut state = State::empty(domain("example.org"), Position::start(HistoryId([1; 16])));
        let info = Change::PutBundleInfo { trust_domain: domain("example.org"), sequence: 1, refresh_hint: None };
        let changes = vec![info, Change::PutAgent(agent(1, 1, 1))];
        state.apply(&Part::new(changes)).unwrap();
        Self { state, revisions: 0, agent: Holder::default(), session: None, sent: None, dirty: false }
    }

    fn commit(&mut self, change: Change) {
        let before = self.state.clone();
        self.state.apply(&Part::new(vec![change.clone()])).unwrap();
        if agents_concerned_by(&before, &self.state, [&change]).includes(&agent_id(1)) {
            self.dirty = true;
        }
    }

    fn connect(&mut self) {
        let view = view(&self.state, &agent_id(1));
        let greeting = Greeting { same_history: true, digest: self.agent.held.digest() };
        let session = match Session::open(greeting, &view) {
            Opening::Resume(session) => {
                assert_eq!(self.agent.held, view.versions(), "nothing is sent to whom nothing is missing");
                session
            }
            Opening::Fresh(session) => session,
            Opening::Compare => Session::after_comparison(self.agent.held.clone(), true),
        };
        self.session = Some(session);
        self.sent = None;
        self.dirty = true;
    }

    /// What the stream's handler does when it is awake.
    fn look(&mut self) {
        if self.session.is_none() {
            self.connect();
        }
        let Some(session) = self.session.as_mut() else { return };
        if self.dirty && !session.is_waiting() {
            self.dirty = false;
            self.sent = session.advance(&view(&self.state, &agent_id(1)));
        }
    }

    fn deliver(&mut self) {
        if let (Some(session), Some(step)) = (self.session.as_mut(), self.sent.take()) {
            self.agent.apply(&step);
            session.acknowledge(step.number).unwrap();
        }
    }

    fn play(&mut self, event: Event) {
        self.revisions += 1;
        match event {
            Event::Put { number, parent, gives, bits, federates } => {
                let known = self.state.entry(&format!("entry-{number}")).map(|entry| entry.ordinal);
                let ordinal = known.unwrap_or_else(|| self.state.next_ordinal());
                let entry = entry(number, parent, gives, bits, federates, self.revisions, ordinal);
                self.commit(Change::PutEntry(entry));
            }
            Event::Remove(number) => self.commit(Change::RemoveEntry(format!("entry-{number}").into())),
            Event::Attest { number, bits } => {
                let known = self.state.agent(&agent_id(number)).map(|agent| agent.ordinal);
                let ordinal = known.unwrap_or_else(|| self.state.next_ordinal());
                self.commit(Change::PutAgent(agent(number, bits, ordinal)));
            }
            Event::Evict(number) => self.commit(Change::RemoveAgent(agent_id(number))),
            Event::OwnBundle(byte) => {
                let authority = X509Authority { der: vec![byte].into(), tainted: false };
                self.commit(Change::PutX509Authority { trust_domain: domain("example.org"), authority });
            }
            Event::OtherBundle(there) => {
                let trust_domain = domain("other.org");
                self.commit(if there {
                    Change::PutBundleInfo { trust_domain, sequence: self.revisions.unsigned_abs(), refresh_hint: None }
                } else {
                    Change::RemoveBundle(trust_domain)
                });
            }
            Event::Deliver => self.deliver(),
            Event::BreakBefore => self.session = None,
            Event::BreakAfter => {
                if let Some(step) = self.sent.take() {
                    self.agent.apply(&step);
                }
                self.session = None;
            }
            Event::Look => self.look(),
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn any_history_with_any_disconnects_ends_at_what_is_authorized(events in prop::collection::vec(event(), 0..60)) {
        let mut world = World::new();
        for event in events {
            world.play(event);
        }
        // Nothing more happens, and the stream is given the time to settle.
        for _ in 0..3 {
            world.look();
            world.deliver();
        }
        let held: BTreeSet<_> = world.agent.held.entries.keys().cloned().collect();
        prop_assert_eq!(held, authorized_ids(&world.state, &agent_id(1), now()));
        prop_assert_eq!(&world.agent.held, &view(&world.state, &agent_id(1)).versions());
    }
}

#[test]
fn one_step_is_unacknowledged_at_most() {
    let mut world = World::new();
    world.look();
    let first = world.sent.clone().unwrap();
    assert_eq!(first.number, 1);
    world.commit(Change::PutEntry(entry(0, 1, 0, 1, false, 0, world.state.next_ordinal())));
    world.commit(Change::PutEntry(entry(1, 1, 1, 1, false, 0, world.state.next_ordinal())));
    world.look();
    assert_eq!(world.sent.as_ref(), Some(&first), "the second waits for the first");
    let session = world.session.as_mut().unwrap();
    assert_eq!(session.acknowledge(2), Err(OutOfTurn { step: 2 }));
    world.deliver();
    assert_eq!(world.session.as_mut().unwrap().acknowledge(1), Err(OutOfTurn { step: 1 }));
    world.look();
    let second = world.sent.clone().unwrap();
    assert_eq!((second.number, second.delta.entries.len()), (2, 2), "both changes are one step");
}

#[test]
fn an_alias_that_goes_takes_its_descendants_with_it() {
    let mut world = World::new();
    // An alias /w/4 of nodes with selector 0, and an entry below it.
    world.commit(Change::PutEntry(entry(0, 0, 0, 1, false, 0, world.state.next_ordinal())));
    world.commit(Change::PutEntry(entry(1, 4, 1, 1, false, 0, world.state.next_ordinal())));
    world.look();
    world.deliver();
    assert_eq!(world.agent.held.entries.len(), 1);
    world.commit(Change::RemoveEntry("entry-0".into()));
    world.look();
    assert_eq!(world.sent.as_ref().unwrap().delta.removed_entries, ["entry-1".into()]);
}

#[test]
fn another_history_is_compared_and_everything_sent_again() {
    let mut world = World::new();
    world.commit(Change::PutEntry(entry(0, 1, 0, 1, false, 0, world.state.next_ordinal())));
    world.look();
    world.deliver();
    let view = view(&world.state, &agent_id(1));
    let digest = world.agent.held.digest();
    assert!(matches!(Session::open(Greeting { same_history: true, digest }, &view), Opening::Resume(_)));
    assert!(matches!(Session::open(Greeting { same_history: false, digest }, &view), Opening::Compare));
    let mut held = world.agent.held.clone();
    held.entries.insert("gone".into(), Version { revision: 0, created_at: 0 });
    let step = Session::after_comparison(held, false).advance(&view).unwrap();
    assert_eq!(step.delta.entries.len(), 1);
    assert_eq!(step.delta.bundles.len(), 1);
    assert_eq!(step.delta.removed_entries, ["gone".into()]);
    assert_eq!(step.digest, digest);
}

#[tokio::test(start_paused = true)]
async fn the_feed_wakes_whom_a_revision_concerns() {
    let history = History::open().await;
    let info = Change::PutBundleInfo { trust_domain: domain("example.org"), sequence: 1, refresh_hint: None };
    history.commit(Part::new(vec![info, Change::PutAgent(agent(1, 1, 1)), Change::PutAgent(agent(2, 2, 2))])).await;
    let feed = Feed::new(history.replica());
    let (trigger, shutdown) = Shutdown::new();
    let running = tokio::spawn(feed.clone().run(shutdown));
    let (one, two) = (feed.open(&agent_id(1)), feed.open(&agent_id(2)));
    assert_eq!(feed.streams(), 2);
    assert_eq!(one.woken().await, Wake::Dirty, "the feed had not begun");
    assert_eq!(two.woken().await, Wake::Dirty);

    history.commit(Part::new(vec![Change::PutEntry(entry(0, 1, 0, 1, false, 0, 3))])).await;
    assert_eq!(one.woken().await, Wake::Dirty);
    assert_eq!(one.seen().position(), history.replica().latest().position());
    assert!(tokio::time::timeout(Duration::from_secs(1), two.woken()).await.is_err(), "it is none of its entries");

    let authority = X509Authority { der: vec![1].into(), tainted: false };
    history.commit(Part::new(vec![Change::PutX509Authority { trust_domain: domain("example.org"), authority }])).await;
    assert_eq!((one.woken().await, two.woken().await), (Wake::Dirty, Wake::Dirty));

    history.commit(Part::new(vec![Change::RemoveAgent(agent_id(2))])).await;
    assert_eq!(two.woken().await, Wake::Dirty, "who is evicted is told");
    drop(two);
    assert_eq!(feed.streams(), 1);

    let newer: Vec<Place> = (0..STREAMS_PER_AGENT).map(|_| feed.open(&agent_id(1))).collect();
    assert_eq!(one.woken().await, Wake::Displaced);
    drop(one);
    assert_eq!(feed.streams(), newer.len());
    trigger.request();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_feed_wakes_whose_entry_ends_at_its_second_and_everybody_after_a_step() {
    let history = History::open().await;
    let clock = history.clock();
    let steady = runtime::steady::Steady::new(clock.clone());
    let info = Change::PutBundleInfo { trust_domain: domain("example.org"), sequence: 1, refresh_hint: None };
    let ends = |number: u8, seconds| {
        let ends = Some(history.now() + Duration::from_secs(seconds));
        let ordinal = 2 + u64::from(number);
        Change::PutEntry(Arc::new(model::Entry {
            expires_at: ends,
            ..model::Entry::clone(&entry(number, number, 0, 1, false, 0, ordinal))
        }))
    };
    let agents = [Change::PutAgent(agent(1, 1, 1)), Change::PutAgent(agent(2, 2, 2))];
    history.commit(Part::new([vec![info], agents.to_vec(), vec![ends(1, 60), ends(2, 3600)]].concat())).await;
    let feed = Feed::new(history.replica());
    let (trigger, shutdown) = Shutdown::new();
    let tasks = runtime::shutdown::Tasks::new(trigger);
    tasks.spawn("time", feed.clone().run_time(clock.clone(), steady.clone(), shutdown.clone()));
    tasks.spawn("clock", steady.run(shutdown));
    let (one, two) = (feed.open(&agent_id(1)), feed.open(&agent_id(2)));
    let begun = history.now();
    let since = || history.now().duration_since(begun).unwrap().as_millis();
    assert_eq!(one.woken().await, Wake::Dirty);
    assert!((60_000..60_100).contains(&since()), "{}", since());
    assert!(tokio::time::timeout(Duration::from_secs(60), two.woken()).await.is_err(), "its entry goes on");

    // A step wakes both within a second: what ended by the wrong clock, and what is there again by the right one.
    let before = tokio::time::Instant::now();
    clock.step_forward(Duration::from_secs(86_400));
    assert_eq!((one.woken().await, two.woken().await), (Wake::Dirty, Wake::Dirty));
    clock.step_back(Duration::from_secs(86_400));
    assert_eq!((one.woken().await, two.woken().await), (Wake::Dirty, Wake::Dirty));
    assert!(before.elapsed() <= Duration::from_millis(2_100), "{:?}", before.elapsed());
    assert_eq!(two.woken().await, Wake::Dirty);
    assert!((3_600_000..3_600_100).contains(&since()), "{}", since());
}
