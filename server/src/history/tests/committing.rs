use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use futures_util::StreamExt as _;
use proptest::prelude::*;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Trigger};
use spiffe::id::TrustDomain;

use super::{HISTORY, at};
use crate::history::faulty::{Fault, Faulty};
use crate::history::memory::Memory;
use crate::history::{
    Committer, Feed, Group, Health, OpenError, ProposeError, Reach, Receipt, Replica, Store, Urgency, open, record,
};
use crate::state::State;
use crate::state::model::{Change, JoinToken, Part, Scope};

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn hash(number: u8) -> [u8; 32] {
    [number; 32]
}

fn token(number: u8, seconds: u64) -> JoinToken {
    JoinToken { hash: hash(number), expires_at: at(seconds), alias: None }
}

/// What a test needs of a running history.
struct Running {
    committer: Committer,
    replica: Replica,
    clock: Clock,
    writer: tokio::task::JoinHandle<()>,
    trigger: Trigger,
}

impl Running {
    async fn start(store: Arc<dyn Store>, reach: Reach) -> Self {
        let clock = Clock::paused(at(0));
        let opened = open(store, reach, trust_domain(), clock.clone(), Entropy::seeded(1)).await.unwrap();
        let (trigger, shutdown) = Shutdown::new();
        let writer = tokio::spawn(opened.writer.run(shutdown));
        Self { committer: opened.committer, replica: opened.replica, clock, writer, trigger }
    }

    async fn stop(self) {
        self.trigger.request();
        self.writer.await.unwrap();
    }
}

/// Adds a token that must not be there.
fn add(number: u8) -> impl Fn(&State, SystemTime) -> Result<(Part, u64), &'static str> + Send + Sync + 'static {
    move |state, _| match state.token(&hash(number)) {
        Some(_) => Err("exists"),
        None => Ok((Part::new(vec![Change::PutToken(token(number, 1000))]), state.position().revision)),
    }
}

fn tokens(state: &State) -> Vec<u8> {
    state.tokens().map(|token| token.hash[0]).collect()
}

fn rival(number: u8, seconds: u64) -> Group {
    let state = State::empty(trust_domain(), crate::history::Position::start(HISTORY));
    let write = record::write_of(&state, &Scope::trust_domain(), &Change::PutToken(token(number, 1000))).unwrap();
    Group::new([number; 16], at(seconds), Urgency::Normal, vec![vec![write]])
}

#[tokio::test(start_paused = true)]
async fn callers_read_their_own_writes() {
    let running = Running::start(Arc::new(Memory::new(HISTORY)), Reach::OneProcess).await;
    let mut changes = running.replica.changes();
    let receipt = running.committer.propose(Urgency::Normal, add(1)).await.unwrap();
    assert_eq!(receipt.value, 0);
    assert_eq!(running.replica.latest().position(), &receipt.position);
    assert_eq!(running.replica.current().await.unwrap().position(), &receipt.position);
    assert_eq!(tokens(&running.replica.latest()), vec![1]);
    let Some(Feed::Step(step)) = changes.next().await else { panic!("no step") };
    assert_eq!(step.position, receipt.position);
    assert_eq!(step.parts, vec![Arc::new(Part::new(vec![Change::PutToken(token(1, 1000))]))]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn proposals_that_wait_together_are_one_group_and_decided_in_turn() {
    let store = Arc::new(Faulty::new(Memory::new(HISTORY), []));
    let running = Running::start(store.clone(), Reach::OneProcess).await;
    let decisions: Vec<_> = [1, 2, 1, 3, 2].into_iter().map(add).collect();
    let answers = running.committer.propose_each(Urgency::Normal, decisions).await;
    let refused: Vec<_> = answers
        .iter()
        .map(|answer| match answer {
            Ok(_) => false,
            Err(ProposeError::Refused("exists")) => true,
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(refused, vec![false, false, true, false, true]);
    assert_eq!(store.writes(), 1);
    let positions: Vec<_> = answers.iter().flatten().map(|receipt| receipt.position).collect();
    assert_eq!(positions, vec![*running.replica.latest().position(); 3]);
    assert_eq!(tokens(&running.replica.latest()), vec![1, 2, 3]);
    // What changes nothing writes nothing.
    let nothing =
        running.committer.propose(Urgency::Normal, |_, _| Ok::<_, ()>((Part::unchanged(), ()))).await.unwrap();
    assert_eq!(nothing.position, positions[0]);
    assert_eq!(store.writes(), 1);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_moved_head_decides_again_on_what_was_missed() {
    for reach in [Reach::OneProcess, Reach::Shared] {
        let faults = [(1, Fault::Rival(rival(1, 5))), (3, Fault::Rival(rival(3, 5)))];
        let store = Arc::new(Faulty::new(Memory::new(HISTORY), faults));
        let running = Running::start(store, reach).await;
        // The rival took 1, so this is refused on the newer state.
        let refused = running.committer.propose(Urgency::Normal, add(1)).await;
        assert!(matches!(refused, Err(ProposeError::Refused("exists"))), "{refused:?}");
        assert_eq!(tokens(&running.replica.latest()), vec![1]);
        // And this is decided twice.
        let second = running.committer.propose(Urgency::Normal, add(2)).await.unwrap();
        assert_eq!((second.value, second.position.revision), (1, 2));
        let third = running.committer.propose(Urgency::Normal, add(4)).await.unwrap();
        assert_eq!((third.value, third.position.revision), (3, 4));
        assert_eq!(tokens(&running.replica.latest()), vec![1, 2, 3, 4]);
        running.stop().await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_unknown_outcome_is_settled_before_anything_else() {
    // Written although the answer was lost; lost together with the answer; a rival in its place.
    for (fault, expected) in [(Fault::After, 1), (Fault::Unknown, 1)] {
        let store = Arc::new(Faulty::new(Memory::new(HISTORY), [(1, fault)]));
        let runs = Arc::new(AtomicUsize::new(0));
        let running = Running::start(store, Reach::OneProcess).await;
        let counted = Arc::clone(&runs);
        let decide = add(1);
        let receipt = running
            .committer
            .propose(Urgency::Normal, move |state, now| {
                counted.fetch_add(1, Ordering::SeqCst);
                decide(state, now)
            })
            .await
            .unwrap();
        assert_eq!(receipt.position.revision, 1);
        assert_eq!(runs.load(Ordering::SeqCst), expected);
        assert_eq!(tokens(&running.replica.latest()), vec![1]);
        running.stop().await;
    }
    let faults = [(1, Fault::Unknown), (2, Fault::Rival(rival(9, 0)))];
    let store = Arc::new(Faulty::new(Memory::new(HISTORY), faults));
    let running = Running::start(store, Reach::Shared).await;
    let receipt = running.committer.propose(Urgency::Normal, add(1)).await.unwrap();
    assert_eq!((receipt.value, receipt.position.revision), (1, 2));
    assert_eq!(tokens(&running.replica.latest()), vec![1, 9]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_failed_write_changes_nothing() {
    let store = Arc::new(Faulty::new(Memory::new(HISTORY), [(2, Fault::Before)]));
    let running = Running::start(store, Reach::OneProcess).await;
    running.committer.propose(Urgency::Normal, add(1)).await.unwrap();
    let before = running.replica.latest();
    let failed = running.committer.propose(Urgency::Normal, add(2)).await.unwrap_err();
    assert!(matches!(failed, ProposeError::Unavailable(Some(_))), "{failed:?}");
    assert!(failed.is_retryable());
    assert!(Arc::ptr_eq(&before, &running.replica.latest()));
    assert!(running.replica.health().borrow().is_attached());
    running.committer.propose(Urgency::Normal, add(2)).await.unwrap();
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_full_store_takes_what_shrinks() {
    let store = Arc::new(Faulty::new(Memory::new(HISTORY), [(2, Fault::Full)]));
    let running = Running::start(store, Reach::OneProcess).await;
    running.committer.propose(Urgency::Normal, add(1)).await.unwrap();
    let (committer, other) = (running.committer.clone(), running.committer.clone());
    let remove = |_: &State, _| Ok::<_, ()>((Part::new(vec![Change::RemoveToken(hash(1))]), ()));
    let (full, removed) =
        tokio::join!(committer.propose(Urgency::Normal, add(2)), other.propose(Urgency::Shrinking, remove));
    assert!(matches!(full, Err(ProposeError::Full(_))), "{full:?}");
    removed.unwrap();
    assert_eq!(tokens(&running.replica.latest()), Vec::<u8>::new());
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_full_store_refuses_the_least_urgent_first() {
    let store = Arc::new(Faulty::new(Memory::new(HISTORY), [(2, Fault::Full), (5, Fault::Full), (6, Fault::Full)]));
    let running = Running::start(store, Reach::OneProcess).await;
    running.committer.propose(Urgency::Normal, add(1)).await.unwrap();
    let remove = || |_: &State, _| Ok::<_, ()>((Part::new(vec![Change::RemoveToken(hash(1))]), ()));
    let committer = || running.committer.clone();
    let (one, two, three) = (committer(), committer(), committer());
    // Full for what is ordinary.
    let (full, vital, removed) = tokio::join!(
        one.propose(Urgency::Normal, add(2)),
        two.propose(Urgency::Vital, add(3)),
        three.propose(Urgency::Shrinking, remove())
    );
    assert!(matches!(full, Err(ProposeError::Full(_))), "{full:?}");
    vital.unwrap();
    removed.unwrap();
    assert_eq!(tokens(&running.replica.latest()), [3]);
    running.committer.propose(Urgency::Normal, add(1)).await.unwrap();
    // Full for what is vital as well.
    let (full, vital, removed) = tokio::join!(
        one.propose(Urgency::Normal, add(2)),
        two.propose(Urgency::Vital, add(4)),
        three.propose(Urgency::Shrinking, remove())
    );
    assert!(matches!(full, Err(ProposeError::Full(_))), "{full:?}");
    assert!(matches!(vital, Err(ProposeError::Full(_))), "{vital:?}");
    removed.unwrap();
    assert_eq!(tokens(&running.replica.latest()), [3]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn a_dropped_proposal_is_not_run() {
    let running = Running::start(Arc::new(Memory::new(HISTORY)), Reach::OneProcess).await;
    let runs = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&runs);
    let decide = move |_: &State, _| {
        counted.fetch_add(1, Ordering::SeqCst);
        Ok::<_, ()>((Part::new(vec![Change::PutToken(token(1, 1000))]), ()))
    };
    // Polled once, so that it is in the queue, and then dropped before the writer had its turn.
    let call = running.committer.propose(Urgency::Normal, decide);
    assert!(futures_util::FutureExt::now_or_never(call).is_none());
    running.committer.propose(Urgency::Normal, add(2)).await.unwrap();
    assert_eq!(runs.load(Ordering::SeqCst), 0);
    assert_eq!(tokens(&running.replica.latest()), vec![2]);
    running.stop().await;
}

/// The stamps of the whole log.
async fn stamps(store: &Memory) -> Vec<SystemTime> {
    let head = store.head().await.unwrap();
    let changes = store.watch(crate::history::Position::start(HISTORY));
    let revisions = usize::try_from(head.revision).unwrap();
    changes.take(revisions).map(|change| change.unwrap().group.at()).collect().await
}

#[tokio::test(start_paused = true)]
async fn a_clock_that_was_ahead_leaves_no_trace_in_the_time_of_later_decisions() {
    let store = Arc::new(Memory::new(HISTORY));
    let running = Running::start(store.clone(), Reach::OneProcess).await;
    let seen = |_: &State, now: SystemTime| Ok::<_, ()>((Part::new(vec![Change::PutToken(token(1, 1000))]), now));
    running.clock.step_forward(Duration::from_secs(86_400));
    assert_eq!(running.committer.propose(Urgency::Normal, seen).await.unwrap().value, at(86_400));
    running.clock.step_back(Duration::from_secs(86_350));
    assert_eq!(running.committer.propose(Urgency::Normal, seen).await.unwrap().value, at(50));
    running.stop().await;
    let again = Running::start(store.clone(), Reach::OneProcess).await;
    assert_eq!(again.committer.propose(Urgency::Normal, seen).await.unwrap().value, at(0));
    again.stop().await;
    assert_eq!(stamps(&store).await, vec![at(86_400), at(50), at(0)]);
}

#[tokio::test(start_paused = true)]
async fn a_wrong_decision_harms_only_itself() {
    let running = Running::start(Arc::new(Memory::new(HISTORY)), Reach::OneProcess).await;
    type Decide = Box<dyn Fn(&State, SystemTime) -> Result<(Part, ()), ()> + Send + Sync>;
    let good =
        |number| -> Decide { Box::new(move |_, _| Ok((Part::new(vec![Change::PutToken(token(number, 9))]), ()))) };
    let orphan = Change::PutJwtAuthority {
        trust_domain: trust_domain(),
        authority: spiffe::bundle::JwtAuthority {
            key_id: "key".into(),
            public_key: bytes::Bytes::new(),
            expires_at: None,
            tainted: false,
        },
    };
    let half = vec![Change::PutToken(token(7, 9)), orphan];
    let decisions: Vec<Decide> = vec![
        good(1),
        Box::new(|_, _| panic!("on purpose")),
        Box::new(move |_, _| Ok((Part::new(half.clone()), ()))),
        Box::new(|_, _| Ok((Part::new((0..101).map(|number| Change::PutToken(token(number, 9))).collect()), ()))),
        good(2),
    ];
    let answers = running.committer.propose_each(Urgency::Normal, decisions).await;
    assert!(
        matches!(
            answers.as_slice(),
            [
                Ok(_),
                Err(ProposeError::Panicked),
                Err(ProposeError::Invalid(_)),
                Err(ProposeError::TooLarge),
                Ok(Receipt { .. })
            ]
        ),
        "{answers:?}"
    );
    assert_eq!(tokens(&running.replica.latest()), vec![1, 2]);
    running.stop().await;
}

#[tokio::test(start_paused = true)]
async fn more_than_a_group_holds_is_several_groups() {
    let store = Arc::new(Faulty::new(Memory::new(HISTORY), []));
    let running = Running::start(store.clone(), Reach::OneProcess).await;
    let decisions: Vec<_> = (0..20u8)
        .map(|number| {
            move |_: &State, _| {
                let authority = spiffe::bundle::X509Authority { der: vec![number; 50_000].into(), tainted: false };
                let trust_domain = trust_domain();
                let info =
                    Change::PutBundleInfo { trust_domain: trust_domain.clone(), sequence: 1, refresh_hint: None };
                let put = Change::PutX509Authority { trust_domain, authority };
                Ok::<_, ()>((Part::new(vec![info, put]), number))
            }
        })
        .collect();
    let answers = running.committer.propose_each(Urgency::Normal, decisions).await;
    let revisions: Vec<_> = answers.into_iter().map(|answer| answer.unwrap().position.revision).collect();
    assert_eq!(revisions, (0..20).map(|number| 1 + number / 10).collect::<Vec<_>>());
    assert_eq!(store.writes(), 2);
    // Authorities stay in the order in which they came, over a restart as well.
    let order = |state: &State| -> Vec<u8> {
        state.bundle(&trust_domain()).unwrap().x509.iter().map(|authority| authority.der[0]).collect()
    };
    assert_eq!(order(&running.replica.latest()), (0..20).collect::<Vec<_>>());
    running.stop().await;
    let again = Running::start(store, Reach::OneProcess).await;
    assert_eq!(order(&again.replica.latest()), (0..20).collect::<Vec<_>>());
    again.stop().await;
}

#[tokio::test(start_paused = true)]
async fn shutdown_finishes_what_is_in_the_queue() {
    let running = Running::start(Arc::new(Memory::new(HISTORY)), Reach::OneProcess).await;
    let committer = running.committer.clone();
    let proposed = committer.propose(Urgency::Normal, add(1));
    tokio::pin!(proposed);
    assert!(futures_util::poll!(proposed.as_mut()).is_pending());
    let (replica, health) = (running.replica.clone(), running.replica.health());
    running.stop().await;
    proposed.await.unwrap();
    assert_eq!(tokens(&replica.latest()), vec![1]);
    assert!(matches!(*health.borrow(), Health::Ended));
    let late = committer.propose(Urgency::Normal, add(2)).await;
    assert!(matches!(late, Err(ProposeError::Unavailable(None))), "{late:?}");
}

#[tokio::test(start_paused = true)]
async fn another_trust_domain_is_refused() {
    let store: Arc<dyn Store> = Arc::new(Memory::new(HISTORY));
    let running = Running::start(Arc::clone(&store), Reach::OneProcess).await;
    running.committer.propose(Urgency::Normal, add(1)).await.unwrap();
    running.stop().await;
    let other = TrustDomain::parse("other.org").unwrap();
    let error = open(store, Reach::OneProcess, other, Clock::paused(at(0)), Entropy::seeded(1)).await.unwrap_err();
    assert!(matches!(error, OpenError::OtherTrustDomain { .. }), "{error:?}");
    assert_eq!(
        error.to_string(),
        "the store belongs to trust domain example.org, and the server is configured for other.org"
    );
}

/// A store whose head cannot be read while the flag is set.
struct Distant {
    store: Memory,
    away: Mutex<bool>,
}

#[async_trait::async_trait]
impl Store for Distant {
    async fn load(
        &self,
    ) -> Result<
        (
            crate::history::Position,
            futures_core::stream::BoxStream<'static, Result<Vec<crate::history::Record>, crate::history::StoreError>>,
        ),
        crate::history::StoreError,
    > {
        self.store.load().await
    }

    async fn append(
        &self,
        at: &crate::history::Position,
        group: &Group,
    ) -> Result<crate::history::Appended, crate::history::StoreError> {
        self.store.append(at, group).await
    }

    fn watch(
        &self,
        after: crate::history::Position,
    ) -> futures_core::stream::BoxStream<'static, Result<crate::history::Change, crate::history::StoreError>> {
        self.store.watch(after)
    }

    async fn head(&self) -> Result<crate::history::Position, crate::history::StoreError> {
        if *self.away.lock().unwrap() {
            return Err(crate::history::StoreError::Unreachable(Arc::new(std::io::Error::other("away"))));
        }
        self.store.head().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_shared_store_is_followed_and_its_absence_noticed() {
    let memory = Memory::new(HISTORY);
    let store = Arc::new(Distant { store: memory.clone(), away: Mutex::new(false) });
    let running = Running::start(store.clone(), Reach::Shared).await;
    // Another server writes: `current` has it, whatever this one has seen so far.
    let other = rival(5, 3);
    memory.append(running.replica.latest().position(), &other).await.unwrap();
    let state = running.replica.current().await.unwrap();
    assert_eq!(tokens(&state), vec![5]);

    *store.away.lock().unwrap() = true;
    let unknown = running.replica.current().await.unwrap_err();
    assert!(unknown.is_retryable());
    let mut health = running.replica.health();
    let before = tokio::time::Instant::now();
    health.wait_for(|health| matches!(health, Health::Detached)).await.unwrap();
    let waited = before.elapsed();
    assert!(Duration::from_secs(4) <= waited && waited <= Duration::from_secs(7), "{waited:?}");
    let refused = running.committer.propose(Urgency::Normal, add(6)).await;
    assert!(matches!(refused, Err(ProposeError::Unavailable(None))), "{refused:?}");
    *store.away.lock().unwrap() = false;
    health.wait_for(Health::is_attached).await.unwrap();
    running.committer.propose(Urgency::Normal, add(6)).await.unwrap();
    assert_eq!(tokens(&running.replica.latest()), vec![5, 6]);
    running.stop().await;
}

#[derive(Clone, Copy, Debug)]
enum Op {
    Add(u8),
    Remove(u8),
    Touch(u8, u8),
}

impl Op {
    fn decide(self, held: Option<u64>) -> Result<Option<u64>, &'static str> {
        match (self, held) {
            (Self::Add(_), Some(_)) => Err("exists"),
            (Self::Add(_), None) => Ok(Some(0)),
            (Self::Remove(_) | Self::Touch(..), None) => Err("absent"),
            (Self::Remove(_), Some(_)) => Ok(None),
            (Self::Touch(_, by), Some(count)) => Ok(Some(count + u64::from(by))),
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Add(number) | Self::Remove(number) | Self::Touch(number, _) => number,
        }
    }
}

fn ops() -> impl Strategy<Value = Vec<Vec<Op>>> {
    let op = prop_oneof![
        (0..6u8).prop_map(Op::Add),
        (0..6u8).prop_map(Op::Remove),
        ((0..6u8), (1..9u8)).prop_map(|(number, by)| Op::Touch(number, by)),
    ];
    prop::collection::vec(prop::collection::vec(op, 1..6), 1..12)
}

fn faults() -> impl Strategy<Value = BTreeMap<u64, Fault>> {
    let fault = prop_oneof![
        Just(Fault::Before),
        Just(Fault::After),
        Just(Fault::Unknown),
        Just(Fault::Full),
        (100..250u8).prop_map(|number| Fault::Rival(rival(number, 0))),
    ];
    prop::collection::btree_map(1..20u64, fault, 0..8)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    /// Whatever fails, the answers are those of decisions one after another, and the store holds just their sum.
    #[test]
    fn history_equals_sequential_decisions(batches in ops(), faults in faults(), shared: bool) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(async move {
            let memory = Memory::new(HISTORY);
            let store = Arc::new(Faulty::new(memory.clone(), faults));
            let reach = if shared { Reach::Shared } else { Reach::OneProcess };
            let running = Running::start(store, reach).await;
            let mut model: BTreeMap<u8, u64> = BTreeMap::new();
            for batch in batches {
                let decisions = batch.iter().map(|op| {
                    let op = *op;
                    move |state: &State, _: SystemTime| {
                        let held = state.token(&hash(op.number())).map(|token| {
                            token.expires_at.duration_since(at(0)).unwrap().as_secs()
                        });
                        let change = match op.decide(held)? {
                            Some(count) => Change::PutToken(token(op.number(), count)),
                            None => Change::RemoveToken(hash(op.number())),
                        };
                        Ok::<_, &'static str>((Part::new(vec![change]), held))
                    }
                }).collect();
                let answers = running.committer.propose_each(Urgency::Normal, decisions).await;
                for (op, answer) in batch.iter().zip(answers) {
                    let held = model.get(&op.number()).copied();
                    match answer {
                        Ok(receipt) => {
                            assert_eq!(receipt.value, held);
                            match op.decide(held).unwrap() {
                                Some(count) => model.insert(op.number(), count),
                                None => model.remove(&op.number()),
                            };
                        }
                        Err(ProposeError::Refused(reason)) => assert_eq!(op.decide(held), Err(reason)),
                        Err(ProposeError::Unavailable(_) | ProposeError::Full(_)) => {}
                        Err(other) => panic!("{other:?}"),
                    }
                }
            }
            let counts = |state: &State| -> BTreeMap<u8, u64> {
                let ours = state.tokens().filter(|token| token.hash[0] < 100);
                ours.map(|token| (token.hash[0], token.expires_at.duration_since(at(0)).unwrap().as_secs())).collect()
            };
            let current = running.replica.current().await.unwrap();
            assert_eq!(counts(&current), model);
            running.stop().await;
            let again = Running::start(Arc::new(memory), Reach::OneProcess).await;
            assert_eq!(again.replica.latest().position(), current.position());
            assert_eq!(counts(&again.replica.latest()), model);
            again.stop().await;
        });
    }
}
