#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use spiffe::bundle::{Bundle, X509Authority};
use spiffe::id::TrustDomain;
use spiffe::selector::{Selector, SelectorSet};
use spiffe::view::{Digest, ViewDigest};
use spiffe::x509::Serial;

use super::look::{MOST_TOUCHED, ended_between, has_other_selectors, touched};
use super::session::{Greeting, Held, Opening, OutOfTurn, Session, Step};
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
        history: None,
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
    Arc::new(plain_entry(number, parent, gives, bits, federates, revision, ordinal))
}

fn plain_entry(
    number: u8,
    parent: u8,
    gives: u8,
    bits: u8,
    federates: bool,
    revision: i64,
    ordinal: u64,
) -> model::Entry {
    model::Entry {
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
        content: model::Content::default(),
    }
}

fn digest_of(bundle: &Arc<Bundle>) -> Digest {
    let mut text = format!("{}@{}", bundle.trust_domain, bundle.sequence).into_bytes();
    bundle.x509.iter().for_each(|authority| text.extend_from_slice(&authority.der));
    spiffe::view::bundle_digest(&text)
}

/// All that an agent may have, by content.
fn view(state: &State, agent: &SpiffeId, now: SystemTime) -> Held {
    let mut session = Session::default();
    session.advance(&Look::Everything, state, agent, now, digest_of);
    session.holds()
}

fn digest(held: &Held) -> Digest {
    let mut digest = ViewDigest::default();
    held.entries.iter().for_each(|(id, content)| digest.add_entry(id, content));
    held.bundles.iter().for_each(|(name, content)| digest.add_bundle(name, content));
    digest.finish()
}

/// An agent as the protocol sees it: it holds something, and applies whole steps.
#[derive(Default)]
struct Holder {
    held: Held,
    position: Option<Position>,
}

impl Holder {
    fn apply(&mut self, step: &Step, at: Position) {
        let delta = &step.delta;
        if step.anew {
            self.held = Held::default();
        }
        for id in &delta.removed_entries {
            self.held.entries.remove(id).expect("only what is held is removed");
        }
        for name in &delta.removed_bundles {
            self.held.bundles.remove(name).expect("only what is held is removed");
        }
        self.held.entries.extend(delta.entries.iter().map(|entry| (Arc::clone(&entry.id), *entry.content())));
        self.held
            .bundles
            .extend(delta.bundles.iter().map(|bundle| (bundle.trust_domain.as_str().into(), digest_of(bundle))));
        assert_eq!(digest(&self.held), step.digest, "both ends have one digest");
        self.position = Some(at);
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
        /// Seconds after the beginning; 0 for none.
        expires: u8,
        /// An entry of the same id, revision and creation time, as a lost branch may have written it.
        again: bool,
    },
    Remove(u8),
    Attest {
        number: u8,
        bits: u8,
    },
    /// The agent's record changes as by a renewal.
    Renew,
    Evict(u8),
    OwnBundle(u8),
    OtherBundle(bool),
    /// The agent reads and answers what it was sent, or the stream breaks before or after it did.
    Deliver,
    BreakBefore,
    BreakAfter,
    Look,
    /// The server takes a backup, or goes back to the one it has.
    BackUp,
    Restore {
        /// Whether it notices, so that the history has another id.
        noticed: bool,
    },
    /// The clock runs on by so many seconds, or is set.
    Pass(u8),
    SetClock(u8),
}

fn event() -> impl Strategy<Value = Event> {
    let put = (0u8..6, 0u8..8, 0u8..4, 0u8..8, any::<bool>(), 0u8..30, any::<bool>());
    prop_oneof![
        8 => put.prop_map(|(number, parent, gives, bits, federates, expires, again)| {
            let expires = if expires < 15 { 0 } else { expires };
            Event::Put { number, parent, gives, bits, federates, expires, again }
        }),
        3 => (0u8..6).prop_map(Event::Remove),
        2 => (1u8..4, 0u8..8).prop_map(|(number, bits)| Event::Attest { number, bits }),
        1 => Just(Event::Renew),
        1 => (2u8..4).prop_map(Event::Evict),
        1 => any::<u8>().prop_map(Event::OwnBundle),
        1 => any::<bool>().prop_map(Event::OtherBundle),
        4 => Just(Event::Deliver),
        1 => Just(Event::BreakBefore),
        1 => Just(Event::BreakAfter),
        4 => Just(Event::Look),
        1 => Just(Event::BackUp),
        1 => any::<bool>().prop_map(|noticed| Event::Restore { noticed }),
        2 => (1u8..20).prop_map(Event::Pass),
        1 => (0u8..60).prop_map(Event::SetClock),
    ]
}

/// Server and agent 1, with the marks that the history and the clock set.
struct World {
    state: State,
    now: SystemTime,
    revisions: i64,
    backup: Option<State>,
    agent: Holder,
    session: Option<Session>,
    sent: Option<Step>,
    look: Look,
}

fn start() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
}

impl World {
    fn new() -> Self {
        let mut state = State::empty(domain("example.org"), Position::start(HistoryId([1; 16])));
        let info = Change::PutBundleInfo { trust_domain: domain("example.org"), sequence: 1, refresh_hint: None };
        let changes = vec![info, Change::PutAgent(agent(1, 1, 1))];
        state.apply(&Part::new(changes)).unwrap();
        Self {
            state,
            now: start(),
            revisions: 0,
            backup: None,
            agent: Holder::default(),
            session: None,
            sent: None,
            look: Look::default(),
        }
    }

    /// What the feed does with changes between two states.
    fn mark(&mut self, before: &State, changes: &[Change]) {
        let one = agent_id(1);
        if agents_concerned_by(before, &self.state, changes).includes(&one) {
            let changed = has_other_selectors(before, &self.state, &one);
            self.look.add(&if changed { Look::Everything } else { touched(before, &self.state, changes) });
        }
    }

    fn commit(&mut self, change: Change) {
        let before = self.state.clone();
        self.state.apply(&Part::new(vec![change.clone()])).unwrap();
        let mut position = *self.state.position();
        position.revision += 1;
        // What was written makes the digest.
        position.digest = spiffe::view::bundle_digest(format!("{:?}{change:?}", position.digest).as_bytes());
        self.state.advance(position);
        self.mark(&before, &[change]);
    }

    fn connect(&mut self) {
        let at_head = self.agent.position == Some(*self.state.position());
        let greeting = Greeting { at_head, digest: digest(&self.agent.held) };
        self.look = Look::Everything;
        let session = match Session::open(greeting, &self.state, &agent_id(1), self.now, digest_of) {
            Opening::Resume(session) => {
                let wanted = view(&self.state, &agent_id(1), self.now);
                assert_eq!(self.agent.held, wanted, "nothing is sent to whom nothing is missing");
                self.look = Look::default();
                session
            }
            Opening::Fresh(session) => session,
            Opening::Compare => Session::after_comparison(self.agent.held.clone()),
        };
        self.session = Some(session);
        self.sent = None;
    }

    /// What the stream's handler does when it is awake.
    fn look(&mut self) {
        if self.session.is_none() {
            self.connect();
        }
        let Some(session) = self.session.as_mut() else { return };
        if !session.is_waiting() {
            let look = std::mem::take(&mut self.look);
            self.sent = session.advance(&look, &self.state, &agent_id(1), self.now, digest_of);
            let wanted = view(&self.state, &agent_id(1), self.now);
            assert_eq!(session.holds(), wanted, "what was touched is all that there was to look at");
            assert_eq!(session.digest(), digest(&wanted));
        }
    }

    fn deliver(&mut self) {
        if let (Some(session), Some(step)) = (self.session.as_mut(), self.sent.take()) {
            self.agent.apply(&step, *self.state.position());
            session.acknowledge(step.number).unwrap();
        }
    }

    fn play(&mut self, event: Event) {
        self.revisions += 1;
        match event {
            Event::Put { number, parent, gives, bits, federates, expires, again } => {
                let known = self.state.entry(&format!("entry-{number}")).map(|entry| entry.ordinal);
                let ordinal = known.unwrap_or_else(|| self.state.next_ordinal());
                let revision = if again { 0 } else { self.revisions };
                let mut entry = plain_entry(number, parent, gives, bits, federates, revision, ordinal);
                entry.expires_at = (expires > 0).then(|| start() + Duration::from_secs(expires.into()));
                self.commit(Change::PutEntry(Arc::new(entry)));
            }
            Event::Remove(number) => self.commit(Change::RemoveEntry(format!("entry-{number}").into())),
            Event::Attest { number, bits } => {
                let known = self.state.agent(&agent_id(number)).map(|agent| agent.ordinal);
                let ordinal = known.unwrap_or_else(|| self.state.next_ordinal());
                self.commit(Change::PutAgent(agent(number, bits, ordinal)));
            }
            Event::Renew => {
                let mut renewed = Agent::clone(self.state.agent(&agent_id(1)).unwrap());
                renewed.expires_at += Duration::from_secs(1);
                self.commit(Change::PutAgent(Arc::new(renewed)));
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
                    self.agent.apply(&step, *self.state.position());
                }
                self.session = None;
            }
            Event::Look => self.look(),
            Event::BackUp => self.backup = Some(self.state.clone()),
            Event::Restore { noticed } => {
                let Some(backup) = &self.backup else { return };
                self.state = backup.clone();
                if noticed {
                    let history = HistoryId([self.revisions.to_le_bytes()[0]; 16]);
                    self.state.advance(Position { history, ..*self.state.position() });
                }
                // The server was stopped for it.
                self.session = None;
            }
            Event::Pass(seconds) => {
                let from = self.now;
                self.now += Duration::from_secs(seconds.into());
                let ended = ended_between(&self.state, from, self.now);
                let state = self.state.clone();
                self.mark(&state, &ended);
            }
            Event::SetClock(seconds) => {
                self.now = start() + Duration::from_secs(seconds.into());
                self.look = Look::Everything;
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]
    #[test]
    fn any_history_with_any_forks_disconnects_and_clocks_ends_at_what_is_authorized(
        events in prop::collection::vec(event(), 0..80),
    ) {
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
        prop_assert_eq!(held, authorized_ids(&world.state, &agent_id(1), world.now));
        prop_assert_eq!(&world.agent.held, &view(&world.state, &agent_id(1), world.now));
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
fn an_entry_written_again_after_a_restore_is_another_one_though_its_numbers_are_the_same() {
    let mut world = World::new();
    let backup = world.state.clone();
    let lost = entry(0, 1, 0, 1, false, 0, world.state.next_ordinal());
    world.commit(Change::PutEntry(Arc::clone(&lost)));
    world.look();
    world.deliver();
    let position = world.agent.position;
    // The restored server writes the same id, revision and creation time for another user, at the same revision.
    world.state = backup;
    world.session = None;
    let mut again = plain_entry(0, 1, 0, 2, false, 0, lost.ordinal);
    again.created_at = lost.created_at;
    world.commit(Change::PutEntry(Arc::new(again)));
    assert_eq!(position.map(|at| at.revision), Some(world.state.position().revision));
    world.look();
    let step = world.sent.clone().unwrap();
    assert_eq!(step.delta.entries.iter().map(|entry| &*entry.id).collect::<Vec<_>>(), ["entry-0"]);
    assert_eq!(step.delta.entries[0].selectors, set(2));
    world.deliver();
    assert_eq!(world.agent.held, view(&world.state, &agent_id(1), world.now));
}

#[test]
fn only_the_newest_position_is_followed_and_only_with_the_right_digest() {
    let mut world = World::new();
    world.commit(Change::PutEntry(entry(0, 1, 0, 1, false, 0, world.state.next_ordinal())));
    world.look();
    world.deliver();
    let open = |at_head, digest| {
        let greeting = Greeting { at_head, digest };
        Session::open(greeting, &world.state, &agent_id(1), world.now, digest_of)
    };
    let right = digest(&world.agent.held);
    assert!(matches!(open(true, right), Opening::Resume(_)));
    assert!(matches!(open(false, right), Opening::Compare));
    assert!(matches!(open(true, [9; 32]), Opening::Compare));
    assert!(matches!(open(false, [0; 32]), Opening::Fresh(_)));
}

#[test]
fn who_holds_more_than_is_kept_of_it_gets_everything_anew() {
    let world = World::new();
    let mut session = Session::anew();
    let step = session.advance(&Look::Everything, &world.state, &agent_id(1), world.now, digest_of).unwrap();
    assert!(step.anew);
    assert_eq!((step.delta.entries.len(), step.delta.bundles.len()), (0, 1));
    session.acknowledge(1).unwrap();
    assert_eq!(session.advance(&Look::Everything, &world.state, &agent_id(1), world.now, digest_of), None);
}

#[test]
fn what_decides_about_others_is_looked_at_in_full() {
    let mut world = World::new();
    let put = |world: &World, number, parent, gives| {
        Change::PutEntry(entry(number, parent, gives, 1, false, 0, world.state.next_ordinal()))
    };
    let look = |world: &mut World, change: Change| {
        let before = world.state.clone();
        world.commit(change.clone());
        touched(&before, &world.state, [&change])
    };
    let only = |id: &str| Look::Touched { entries: BTreeSet::from([id.into()]), bundles: false };
    let leaf = put(&world, 0, 1, 0);
    assert_eq!(look(&mut world, leaf), only("entry-0"));
    let child = put(&world, 1, 4, 1);
    assert_eq!(look(&mut world, child), only("entry-1"), "nobody stands below the new one");
    assert_eq!(look(&mut world, Change::RemoveEntry("entry-0".into())), Look::Everything, "entry-1 stood below it");
    let alias = put(&world, 2, 0, 3);
    assert_eq!(look(&mut world, alias), Look::Everything);
    let many: Vec<Change> =
        (0..=MOST_TOUCHED).map(|number| Change::RemoveEntry(format!("x-{number}").into())).collect();
    let state = &world.state;
    assert_eq!(touched(state, state, &many), Look::Everything);
    let mut sum = touched(state, state, &many[..MOST_TOUCHED]);
    assert!(matches!(&sum, Look::Touched { entries, .. } if entries.len() == MOST_TOUCHED));
    sum.add(&touched(state, state, &many[MOST_TOUCHED..]));
    assert_eq!(sum, Look::Everything);
}

#[tokio::test(start_paused = true)]
async fn an_entry_that_ends_marks_its_streams_at_its_second_and_a_set_clock_all() {
    let history = History::open().await;
    let info = Change::PutBundleInfo { trust_domain: domain("example.org"), sequence: 1, refresh_hint: None };
    let mut ends = plain_entry(0, 1, 0, 1, false, 0, 3);
    ends.expires_at = Some(history.now() + Duration::from_secs(30));
    let changes = vec![info, Change::PutAgent(agent(1, 1, 1)), Change::PutAgent(agent(2, 2, 2))];
    history.commit(Part::new([changes, vec![Change::PutEntry(Arc::new(ends))]].concat())).await;
    let (clock, steady) = (history.clock(), Steady::new(history.clock()));
    let feed = Feed::new(history.replica(), clock.clone(), steady.clone());
    let (trigger, shutdown) = Shutdown::new();
    let running = tokio::spawn(feed.clone().run(shutdown.clone()));
    let watching = tokio::spawn(steady.run(shutdown));
    let (one, two) = (feed.open(&agent_id(1)), feed.open(&agent_id(2)));
    assert_eq!((one.woken().await, two.woken().await), (Wake::Dirty, Wake::Dirty), "the feed had not begun");
    let state = history.replica().latest();
    assert_eq!(one.take(&state).0, Look::Everything);
    two.take(&state);

    let before = tokio::time::Instant::now();
    assert_eq!(one.woken().await, Wake::Dirty);
    assert_eq!(tokio::time::Instant::now() - before, Duration::from_secs(30));
    let only = Look::Touched { entries: BTreeSet::from(["entry-0".into()]), bundles: false };
    assert_eq!(one.take(&state).0, only);
    assert_eq!(two.take(&state).0, Look::default(), "it was none of its entries");

    clock.step_back(Duration::from_secs(3600));
    assert_eq!((one.woken().await, two.woken().await), (Wake::Dirty, Wake::Dirty));
    assert_eq!((one.take(&state).0, two.take(&state).0), (Look::Everything, Look::Everything));
    trigger.request();
    running.await.unwrap();
    watching.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn the_feed_wakes_whom_a_revision_concerns() {
    let history = History::open().await;
    let info = Change::PutBundleInfo { trust_domain: domain("example.org"), sequence: 1, refresh_hint: None };
    history.commit(Part::new(vec![info, Change::PutAgent(agent(1, 1, 1)), Change::PutAgent(agent(2, 2, 2))])).await;
    let feed = Feed::new(history.replica(), history.clock(), Steady::new(history.clock()));
    let (trigger, shutdown) = Shutdown::new();
    let running = tokio::spawn(feed.clone().run(shutdown));
    let (one, two) = (feed.open(&agent_id(1)), feed.open(&agent_id(2)));
    assert_eq!(feed.streams(), 2);
    assert_eq!(one.woken().await, Wake::Dirty, "the feed had not begun");
    assert_eq!(two.woken().await, Wake::Dirty);

    history.commit(Part::new(vec![Change::PutEntry(entry(0, 1, 0, 1, false, 0, 3))])).await;
    assert_eq!(one.woken().await, Wake::Dirty);
    let (look, at) = one.take(&history.replica().latest());
    assert_eq!(at.position(), history.replica().latest().position());
    assert_eq!(look, Look::Everything, "the feed had not begun at the last look");
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
