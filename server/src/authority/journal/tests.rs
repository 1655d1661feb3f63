use std::time::Duration;

use bytes::Bytes;
use proptest::prelude::*;

use super::*;
use crate::history::{HistoryId, Position};

const START: u64 = 2_000_000_000;
const DAY: u64 = 86_400;

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// A server whose clock is set, and the world as it is.
struct World {
    kind: AuthorityKind,
    lifetime: u64,
    state: State,
    keys: BTreeSet<Arc<str>>,
    /// What time it is.
    real: u64,
    /// How far the server's clock is ahead of that.
    ahead: i64,
    /// The real time from which on the clocks agree.
    steady_from: u64,
    made: u64,
    /// What was signed: by which authority, from when and until when.
    signed: Vec<(Arc<str>, u64, u64)>,
}

impl World {
    fn new(kind: AuthorityKind, lifetime: u64) -> Self {
        let domain = TrustDomain::parse("example.org").unwrap();
        let state = State::empty(domain, Position::start(HistoryId([1; 16])));
        let (real, steady_from) = (START, START + 600);
        Self { kind, lifetime, state, keys: BTreeSet::new(), real, ahead: 0, steady_from, made: 0, signed: Vec::new() }
    }

    fn now(&self) -> u64 {
        self.real.checked_add_signed(self.ahead).unwrap()
    }

    fn ground(&self) -> Ground<'_> {
        let left = Duration::from_secs(self.steady_from.saturating_sub(self.real));
        let time = Time::new(at(self.now()), left);
        Ground { state: &self.state, owner: KeyOwner::Shared, kind: self.kind, keys: &self.keys, time }
    }

    fn describe(&mut self) -> Arc<AuthoritySlot> {
        self.made += 1;
        let id: Arc<str> = format!("authority-{}", self.made).into();
        self.keys.insert(Arc::clone(&id));
        Arc::new(AuthoritySlot {
            owner: KeyOwner::Shared,
            kind: self.kind,
            authority_id: Arc::clone(&id),
            key_id: Arc::clone(&id),
            status: SlotStatus::Prepared,
            issued_at: at(self.now()),
            not_after: at(self.now() + self.lifetime),
            certificate: (self.kind == AuthorityKind::X509).then(|| Bytes::copy_from_slice(id.as_bytes())),
            upstream_chain: Vec::new(),
            public_key: Bytes::copy_from_slice(id.as_bytes()),
        })
    }

    fn apply(&mut self, part: &Part) {
        let before = self.state.clone();
        self.state.apply(part).unwrap();
        let is_published = |state: &State, id: &str| {
            let bundle = state.bundle(state.trust_domain());
            bundle.is_some_and(|bundle| match self.kind {
                AuthorityKind::X509 => bundle.x509.iter().any(|held| held.der == id.as_bytes()),
                AuthorityKind::Jwt => bundle.jwt.iter().any(|held| *held.key_id == *id),
            })
        };
        for slot in slots_of(&before, KeyOwner::Shared, self.kind) {
            let id = &slot.authority_id;
            if is_published(&before, id) && !is_published(&self.state, id) {
                self.may_delete();
                assert!(
                    !schedule::is_valid(&slot, at(self.real)),
                    "{id} is valid by the right clock and was withdrawn"
                );
            }
        }
    }

    /// Nothing is deleted while the clocks do not agree. In these worlds no wrong clock stays for ten minutes.
    fn may_delete(&self) {
        assert!(self.steady_from <= self.real, "deleted while the clocks disagree");
        assert_eq!(self.ahead, 0);
    }

    /// Does all that is due, signs something, and tells when the next thing is due.
    fn settle(&mut self) -> u64 {
        for _ in 0..100 {
            match self.ground().next_step() {
                Step::Prepare => {
                    let made = self.describe();
                    let part = prepare(&self.ground(), &made, Cause::Schedule).unwrap();
                    self.apply(&part);
                }
                Step::Activate(id) => {
                    let (part, active) = activate(&self.ground(), &id, Cause::Schedule).unwrap();
                    assert_eq!(active.status, SlotStatus::Active);
                    self.apply(&part);
                }
                Step::Withdraw(id) => {
                    let (part, key) = withdraw(&self.ground(), &id).unwrap();
                    self.apply(&part);
                    self.may_delete();
                    self.keys.remove(&key);
                }
                Step::Retire(id) => {
                    let (part, key) = retire(&self.ground(), &id).unwrap();
                    assert_eq!(part, Part::unchanged());
                    self.may_delete();
                    assert!(self.keys.remove(&key));
                }
                Step::Forget(id) => {
                    let (part, key) = forget(&self.ground(), &id).unwrap();
                    self.may_delete();
                    self.apply(&part);
                    self.keys.remove(&key);
                }
                Step::Wait(next) => {
                    let (changes, prune_at) = prunable(&self.state, KeyOwner::Shared, true, self.ground().time);
                    if !changes.is_empty() {
                        self.may_delete();
                        self.apply(&Part::new(changes));
                        continue;
                    }
                    self.sign();
                    let next = prune_at.map_or(next, |at| at.min(next));
                    let next = next.duration_since(SystemTime::UNIX_EPOCH).unwrap();
                    let next = next.as_secs() + u64::from(next.subsec_nanos() > 0);
                    assert!(next > self.now(), "a wait is in the future");
                    return next.checked_add_signed(-self.ahead).unwrap();
                }
            }
        }
        panic!("it never settles");
    }

    fn sign(&mut self) {
        let ground = self.ground();
        let lines = ground.lines();
        let active = schedule::active(&lines, ground.time.now).cloned().expect("somebody can sign");
        assert!(schedule::is_valid(&active, at(self.now())));
        assert!(self.keys.contains(&active.key_id), "its key is at hand");
        let published = |id: &str| {
            let slot =
                slots_of(&self.state, KeyOwner::Shared, self.kind).into_iter().find(|slot| *slot.authority_id == *id);
            slot.is_some_and(|slot| published(self.state.bundle(self.state.trust_domain()), &slot) == Some(false))
        };
        assert!(published(&active.authority_id), "published before use");
        for (id, from, until) in &self.signed {
            if (*from..*until).contains(&self.real) {
                assert!(published(id), "what {id} signed is valid by the right clock and does not verify");
            }
        }
        let end = active.not_after.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
        let until = end.min(self.now() + self.lifetime / 4);
        // What begins in the future goes with its authority: nobody uses it in place of something valid.
        if self.ahead <= 10 {
            self.signed.push((Arc::clone(&active.authority_id), self.now() - 10, until));
        }
        let real = self.real;
        self.signed.retain(|(_, _, until)| *until > real);
    }

    /// Goes on for so long, and does everything at its time.
    fn pass(&mut self, seconds: u64) {
        let until = self.real + seconds;
        loop {
            let next = self.settle();
            if next >= until {
                break;
            }
            self.real = next.max(self.real + 1);
        }
        self.real = until;
        self.settle();
    }

    /// The clock is set. Whoever watches it sees that.
    fn set(&mut self, ahead: i64) {
        self.ahead = ahead;
        self.steady_from = self.real + 600;
        self.settle();
    }

    fn play(&mut self, event: &Event) {
        match *event {
            Event::Pass(sixths) => self.pass(self.lifetime * sixths / 6),
            Event::Restart => self.set(0),
            Event::Wrong { ahead, first, second, restart } => {
                self.set(ahead);
                self.pass(first);
                if restart {
                    self.set(ahead);
                    self.pass(second);
                }
                self.set(0);
            }
            Event::Rotate => {
                let made = self.describe();
                let part = prepare(&self.ground(), &made, Cause::Operator).unwrap();
                self.apply(&part);
                self.settle();
                let (part, _) = activate(&self.ground(), &made.authority_id, Cause::Operator).unwrap();
                self.apply(&part);
                self.settle();
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Event {
    /// Sixths of a lifetime with the right clock.
    Pass(u64),
    Restart,
    /// A wrong clock for less than ten minutes.
    Wrong {
        ahead: i64,
        first: u64,
        second: u64,
        restart: bool,
    },
    /// An operator prepares and activates.
    Rotate,
}

fn event() -> impl Strategy<Value = Event> {
    let ahead = prop_oneof![
        Just(86_400),
        Just(-86_400),
        Just(366 * 86_400),
        -30_000_000..-11i64,
        11..30_000_000i64,
        -3600..-11i64,
        11..3600i64
    ];
    prop_oneof![
        3 => (0..9u64).prop_map(Event::Pass),
        1 => Just(Event::Restart),
        4 => (ahead, 0..299u64, 0..299u64, any::<bool>())
            .prop_map(|(ahead, first, second, restart)| Event::Wrong { ahead, first, second, restart }),
        1 => Just(Event::Rotate),
    ]
}

proptest! {
    #[test]
    fn whatever_the_clock_does_somebody_valid_signs_and_nothing_valid_is_deleted(
        jwt in any::<bool>(),
        lifetime in prop_oneof![Just(DAY), 3600..90 * DAY],
        events in prop::collection::vec(event(), 1..12),
    ) {
        let mut world = World::new(if jwt { AuthorityKind::Jwt } else { AuthorityKind::X509 }, lifetime);
        world.settle();
        for event in &events {
            world.play(event);
        }
        // Ten minutes with the right clock, and nothing is left of the wrong one.
        world.pass(600);
        let lines = world.ground().lines();
        prop_assert!(lines.iter().all(|line| schedule::begins_at(&line.slot) <= at(world.real)), "{lines:?}");
        let with_key = lines.iter().filter(|line| line.has_key).count();
        prop_assert!(with_key <= 2, "one that signs and one that is prepared: {lines:?}");
    }
}

/// A day ahead for a minute, with a rotation meanwhile: the numbers of the fault that was found.
#[test]
fn a_day_ahead_for_a_minute_leaves_the_authority_of_before() {
    let mut world = World::new(AuthorityKind::Jwt, DAY);
    world.pass(3600);
    let signing = |world: &World| {
        let lines = world.ground().lines();
        schedule::active(&lines, at(world.now())).map(|slot| slot.authority_id.to_string())
    };
    assert_eq!(signing(&world).as_deref(), Some("authority-1"));
    world.set(86_400);
    assert_eq!(signing(&world).as_deref(), Some("authority-2"), "the first has ended by this clock");
    world.real += 60;
    world.settle();
    world.set(0);
    assert_eq!(signing(&world).as_deref(), Some("authority-1"));
    let held = |world: &World| {
        let bundle = world.state.bundle(world.state.trust_domain()).unwrap();
        bundle.jwt.iter().map(|key| key.key_id.to_string()).collect::<Vec<_>>()
    };
    assert_eq!(held(&world), ["authority-1", "authority-2"]);
    world.pass(599);
    assert_eq!(held(&world), ["authority-1", "authority-2"], "nothing is withdrawn before the clocks agree");
    world.pass(1);
    assert_eq!(held(&world), ["authority-1"], "tokens of the second would pass tomorrow");
    assert_eq!(world.keys.len(), 1);
}

/// A day behind for a minute: the authority has not begun, so another is made at once.
#[test]
fn a_day_behind_for_a_minute_makes_another_at_once_and_comes_back() {
    let mut world = World::new(AuthorityKind::X509, 2 * DAY);
    world.pass(3600);
    world.set(-86_400);
    let signing = |world: &World| {
        let lines = world.ground().lines();
        schedule::active(&lines, at(world.now())).map(|slot| slot.authority_id.to_string())
    };
    assert_eq!(signing(&world).as_deref(), Some("authority-2"));
    world.real += 60;
    world.set(0);
    // The second is valid by the right clock, too, and goes on; the first stays published as long as it is valid.
    assert_eq!(signing(&world).as_deref(), Some("authority-2"));
    world.pass(600);
    let bundle = world.state.bundle(world.state.trust_domain()).unwrap();
    assert!(bundle.x509.iter().any(|held| *held.der == *b"authority-1"));
}
