#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::time::Duration;

use futures_util::StreamExt;
use runtime::shutdown::Shutdown;
use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use spiffe::verify::{PeerRole, x509_chain};
use spiffe::x509::PrivateKey;

use super::issue::Recorded;
use super::journal::published;
use super::keys::disk::DiskKeys;
use super::keys::memory::MemoryKeys;
use super::profile::{CaSubject, WorkloadProfile};
use super::*;
use crate::attest::testing::History;
use crate::history::memory::Memory;
use crate::history::{Appended, HistoryId, Position, Store};
use crate::state::model::SlotStatus;

const HOUR: Duration = Duration::from_secs(3600);

struct Proof;
impl Recorded for Proof {}

fn policy() -> Policy {
    Policy {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        ca_subject: CaSubject::default(),
        ca_ttl: 24 * HOUR,
        ca_key_type: KeyType::EcP256,
        jwt_key_type: Some(KeyType::EcP256),
        default_x509_svid_ttl: HOUR,
        default_jwt_svid_ttl: Duration::from_secs(300),
        agent_ttl: None,
        jwt_issuer: None,
    }
}

async fn open(history: &History, keys: Arc<dyn SigningKeys>) -> Authority {
    let parts = Parts {
        policy: policy(),
        keys,
        committer: history.committer(),
        replica: history.replica(),
        clock: history.clock(),
        steady: Steady::new(history.clock()),
        entropy: Entropy::system(),
        own_certificate: Rotating::new(),
    };
    Authority::open(parts).await.unwrap()
}

fn memory() -> Arc<dyn SigningKeys> {
    Arc::new(MemoryKeys::new(&Entropy::system()))
}

fn bundle(history: &History) -> Arc<Bundle> {
    let state = history.replica().latest();
    Arc::clone(state.bundle(state.trust_domain()).unwrap())
}

fn sign(authority: &Authority, now: SystemTime) -> Vec<bytes::Bytes> {
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let id = spiffe::id::SpiffeId::parse("spiffe://example.org/w").unwrap();
    let request = WorkloadProfile { id, dns_names: Vec::new(), ttl: None, subject: None };
    let issuer = authority.active().unwrap();
    issuer.workload_x509(&request, key.public_key(), now).unwrap().release(&Proof).chain
}

#[tokio::test(start_paused = true)]
async fn first_start_publishes_then_signs() {
    let history = History::open().await;
    let authority = open(&history, memory()).await;
    assert_eq!(authority.active().err(), Some(NotReady));
    assert!(matches!(authority.overview(AuthorityKind::X509), Err(AuthorityError::Refused(Refusal::Initializing))));
    authority.bring_up().await.unwrap();
    let held = bundle(&history);
    assert_eq!((held.x509.len(), held.jwt.len(), held.sequence), (1, 1, 2));
    let overview = authority.overview(AuthorityKind::X509).unwrap();
    assert_eq!(overview.active.status, SlotStatus::Active);
    assert_eq!(overview.active.authority_id.len(), 40);
    assert_eq!((overview.prepared, overview.old), (None, None));
    assert_eq!(authority.overview(AuthorityKind::Jwt).unwrap().active.authority_id.len(), 32);
    let chain = sign(&authority, history.now());
    x509_chain(&chain, &*held, PeerRole::Client, history.now()).unwrap();
    assert!(authority.inner.own.endpoint().is_set());
    assert_eq!(authority.own_svid_ends(), Some(history.now() + HOUR));
}

#[tokio::test(start_paused = true)]
async fn a_restart_keeps_the_authority_and_every_key_and_unrecorded_ones_go_a_lifetime_later() {
    const OURS: &str = "x509-CA-0123456789abcdef";
    let store: Arc<dyn Store> = Arc::new(Memory::new(HistoryId([1; 16])));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    let history = History::over(Arc::clone(&store)).await;
    let authority = open(&history, Arc::new(DiskKeys::open(&path, &Entropy::system()).unwrap())).await;
    authority.bring_up().await.unwrap();
    let before = authority.overview(AuthorityKind::X509).unwrap();
    // As a backup leaves them that was taken before they were made: it does not know them.
    for id in [OURS, "x509-CA-A"] {
        authority.inner.keys.create(id, KeyType::EcP256).await.unwrap();
    }
    drop((history, authority));

    let history = History::over(store).await;
    let keys = Arc::new(DiskKeys::open(&path, &Entropy::system()).unwrap());
    let authority = open(&history, Arc::clone(&keys) as Arc<dyn SigningKeys>).await;
    authority.bring_up().await.unwrap();
    assert_eq!(authority.overview(AuthorityKind::X509).unwrap(), before);
    assert_eq!(bundle(&history).x509.len(), 1);
    assert_eq!(keys.public().await.unwrap().keys.len(), 4, "no key goes at a start");

    let lifetime = authority.policy().ca_ttl;
    assert_eq!(authority.unrecorded_for(), Some(lifetime));
    tokio::time::advance(lifetime - Duration::from_secs(1)).await;
    assert_eq!(authority.unrecorded_for(), Some(Duration::from_secs(1)));
    // A clock that is set makes no lifetime pass.
    history.clock().step_forward(lifetime * 100);
    assert_eq!(authority.unrecorded_for(), Some(Duration::from_secs(1)));
    tokio::time::advance(Duration::from_secs(1)).await;
    assert_eq!(authority.unrecorded_for(), Some(Duration::ZERO));
    authority.remove_unrecorded().await.unwrap();
    assert!(keys.signer(OURS).is_none());
    assert!(keys.signer(&before.active.key_id).is_some());
    assert!(keys.signer("x509-CA-A").is_some(), "a key of SPIRE's, for whoever goes back to it");
    assert_eq!(authority.unrecorded_for(), None);
}

/// A store that holds what `from` held at `revision`, as a copy of its files does.
async fn restored(from: &dyn Store, revision: u64) -> Arc<dyn Store> {
    let copy = Memory::new(HistoryId([1; 16]));
    let mut at = Position::start(HistoryId([1; 16]));
    let mut groups = from.watch(at);
    while at.revision < revision {
        let change = groups.next().await.unwrap().unwrap();
        assert_eq!(copy.append(&at, &change.group).await.unwrap(), Appended::Committed(change.position));
        at = change.position;
    }
    Arc::new(copy)
}

#[tokio::test(start_paused = true)]
async fn what_a_lost_branch_signed_stays_valid_after_a_restore() {
    let store: Arc<dyn Store> = Arc::new(Memory::new(HistoryId([1; 16])));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    let keys = || Arc::new(DiskKeys::open(&path, &Entropy::system()).unwrap());
    let history = History::over(Arc::clone(&store)).await;
    let authority = open(&history, keys()).await;
    authority.bring_up().await.unwrap();
    let backup = history.replica().latest().position().revision;
    let kept = authority.overview(AuthorityKind::X509).unwrap().active;

    let mut lost = Vec::new();
    for kind in [AuthorityKind::X509, AuthorityKind::Jwt, AuthorityKind::X509] {
        let made = authority.prepare(kind).await.unwrap();
        lost.push(authority.activate(kind, &made.authority_id).await.unwrap());
    }
    let first = authority.taint(AuthorityKind::X509, &lost[0].authority_id).await.unwrap();
    authority.refresh().unwrap();
    let chain = sign(&authority, history.now());
    authority.note(false).await;
    drop((history, authority));

    let store = restored(store.as_ref(), backup).await;
    let mut began = Vec::new();
    for _ in 0..2 {
        let history = History::over(Arc::clone(&store)).await;
        let authority = open(&history, keys()).await;
        authority.bring_up().await.unwrap();
        let state = history.replica().latest();
        began.push(state.position().history);
        assert_eq!(state.restored_from(), Some(HistoryId([1; 16])));
        assert_eq!(authority.overview(AuthorityKind::X509).unwrap().active.authority_id, kept.authority_id);
        let held = bundle(&history);
        x509_chain(&chain, &*held, PeerRole::Client, history.now()).unwrap();
        let tainted: Vec<bool> = held.x509.iter().map(|one| one.tainted).collect();
        assert_eq!((held.x509.len(), held.jwt.len()), (3, 2));
        assert_eq!(tainted.iter().filter(|tainted| **tainted).count(), 1);
        assert_eq!(published(Some(&held), &first), Some(true));
        for slot in &lost {
            let found = state.all_slots().find(|known| known.authority_id == slot.authority_id).unwrap();
            assert_eq!((found.status, &found.key_id), (SlotStatus::Old, &slot.key_id));
            assert!(authority.inner.keys.signer(&slot.key_id).is_some());
        }
    }
    assert_eq!((began[0] == began[1], began[0] == HistoryId([1; 16])), (true, false));
}

#[tokio::test(start_paused = true)]
async fn a_lost_key_is_replaced_and_its_root_stays_published() {
    let store: Arc<dyn Store> = Arc::new(Memory::new(HistoryId([1; 16])));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    let history = History::over(Arc::clone(&store)).await;
    let keys = Arc::new(DiskKeys::open(&path, &Entropy::system()).unwrap());
    let authority = open(&history, Arc::clone(&keys) as Arc<dyn SigningKeys>).await;
    authority.bring_up().await.unwrap();
    let lost = authority.overview(AuthorityKind::X509).unwrap().active;
    keys.delete(&lost.key_id).await.unwrap();
    drop((history, authority, keys));

    let history = History::over(store).await;
    let authority = open(&history, Arc::new(DiskKeys::open(&path, &Entropy::system()).unwrap())).await;
    authority.bring_up().await.unwrap();
    let overview = authority.overview(AuthorityKind::X509).unwrap();
    assert_ne!(overview.active.authority_id, lost.authority_id);
    let held = bundle(&history);
    assert_eq!(held.x509.len(), 2, "what the lost one signed is still valid");
    let state = history.replica().latest();
    let slots = authority.slots(&state, AuthorityKind::X509);
    let status = slots.iter().find(|slot| slot.authority_id == lost.authority_id).map(|slot| slot.status);
    assert_eq!(status, Some(SlotStatus::Lost));
}

#[tokio::test(start_paused = true)]
async fn rotation_happens_at_its_exact_times_and_old_svids_stay_valid() {
    let history = History::open().await;
    let authority = open(&history, memory()).await;
    authority.bring_up().await.unwrap();
    let (start, first) = (history.now(), authority.overview(AuthorityKind::X509).unwrap().active);
    let (trigger, shutdown) = Shutdown::new();
    let running = tokio::spawn(authority.clone().run(shutdown));
    let old_chain = sign(&authority, start);

    history.clock().sleep_until(start + 12 * HOUR - Duration::from_secs(1)).await;
    assert_eq!(authority.overview(AuthorityKind::X509).unwrap().prepared, None);
    until(&history, || authority.overview(AuthorityKind::X509).unwrap().prepared.is_some()).await;
    assert!(history.now() < start + 12 * HOUR + Duration::from_secs(1));
    assert_eq!(bundle(&history).x509.len(), 2, "published before it signs");
    assert_eq!(authority.overview(AuthorityKind::X509).unwrap().active, first);

    history.clock().sleep_until(start + 20 * HOUR - Duration::from_secs(1)).await;
    assert_eq!(authority.overview(AuthorityKind::X509).unwrap().active, first);
    until(&history, || authority.overview(AuthorityKind::X509).unwrap().active != first).await;
    assert!(history.now() < start + 20 * HOUR + Duration::from_secs(1));
    let overview = authority.overview(AuthorityKind::X509).unwrap();
    assert_eq!(overview.old.unwrap().authority_id, first.authority_id);
    until(&history, || authority.active().unwrap().x509_authority_id() == Some(&overview.active.authority_id)).await;
    let new_chain = sign(&authority, history.now());
    x509_chain(&new_chain, &*bundle(&history), PeerRole::Client, history.now()).unwrap();
    x509_chain(&old_chain, &*bundle(&history), PeerRole::Client, start).unwrap();

    history.clock().sleep_until(start + 48 * HOUR - Duration::from_secs(1)).await;
    let root = first.certificate.clone().unwrap();
    let holds = || bundle(&history).x509.iter().any(|authority| authority.der == root);
    assert!(holds(), "published until a day after its end");
    until(&history, || !holds()).await;
    assert!(history.now() < start + 48 * HOUR + Duration::from_secs(1));
    let ends = authority.own_svid_ends().unwrap();
    assert!(ends > history.now(), "the server's own SVID was renewed all the time");
    trigger.request();
    running.await.unwrap();
}

/// Lets paused time run until `done`, at most an hour.
async fn until(history: &History, done: impl Fn() -> bool) {
    let limit = history.now() + HOUR;
    while !done() {
        assert!(history.now() < limit, "it never happened");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn an_operator_prepares_activates_taints_and_revokes() {
    for kind in [AuthorityKind::X509, AuthorityKind::Jwt] {
        let history = History::open().await;
        let authority = open(&history, memory()).await;
        let refused = |result: Result<_, AuthorityError>| match result {
            Err(AuthorityError::Refused(refusal)) => refusal,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(authority.prepare(kind).await.map(drop)), Refusal::Initializing);
        authority.bring_up().await.unwrap();
        let first = authority.overview(kind).unwrap().active;
        let superseded = authority.prepare(kind).await.unwrap();
        let second = authority.prepare(kind).await.unwrap();
        assert_eq!(authority.overview(kind).unwrap().prepared, Some(Arc::clone(&second)));
        let id = |slot: &AuthoritySlot| slot.authority_id.to_string();

        assert_eq!(refused(authority.activate(kind, "").await.map(drop)), Refusal::NoAuthorityId);
        assert_eq!(refused(authority.activate(kind, "nope").await.map(drop)), Refusal::UnexpectedAuthority);
        assert_eq!(refused(authority.activate(kind, &id(&superseded)).await.map(drop)), Refusal::NotPrepared);
        assert_eq!(refused(authority.taint(kind, &id(&first)).await.map(drop)), Refusal::TaintActive);
        assert_eq!(refused(authority.taint(kind, &id(&second)).await.map(drop)), Refusal::TaintNotOld);
        assert_eq!(refused(authority.revoke(kind, &id(&first)).await.map(drop)), Refusal::RevokeActive);
        let active = authority.activate(kind, &id(&second)).await.unwrap();
        assert_eq!((active.status, &active.authority_id), (SlotStatus::Active, &second.authority_id));
        assert!(authority.inner.keys.signer(&first.key_id).is_some(), "the old key stays until the clocks agree");
        history.clock().sleep(Duration::from_secs(600)).await;
        authority.bring_up().await.unwrap();
        assert!(authority.inner.keys.signer(&first.key_id).is_none(), "the old key is gone");
        assert_eq!(refused(authority.revoke(kind, &id(&first)).await.map(drop)), Refusal::NotTainted);

        let sequence = bundle(&history).sequence;
        authority.taint(kind, &id(&first)).await.unwrap();
        assert_eq!(bundle(&history).sequence, sequence + 1);
        assert_eq!(published(Some(&bundle(&history)), &first), Some(true));
        assert_eq!(refused(authority.taint(kind, &id(&first)).await.map(drop)), Refusal::AlreadyTainted);
        let revoked = authority.revoke(kind, &id(&first)).await.unwrap().unwrap();
        assert_eq!(revoked.authority_id, first.authority_id);
        assert_eq!(published(Some(&bundle(&history)), &first), None);
        assert_eq!(refused(authority.revoke(kind, &id(&first)).await.map(drop)), Refusal::NotPublished);
        assert!(authority.active().unwrap().x509_authority_id().is_some());
    }
}

#[tokio::test(start_paused = true)]
async fn tainting_what_signed_the_server_renews_its_own_svid_at_once() {
    let history = History::open().await;
    let authority = open(&history, memory()).await;
    authority.bring_up().await.unwrap();
    let first = authority.overview(AuthorityKind::X509).unwrap().active;
    let (trigger, shutdown) = Shutdown::new();
    let running = tokio::spawn(authority.clone().run(shutdown));
    let second = authority.prepare(AuthorityKind::X509).await.unwrap();
    authority.activate(AuthorityKind::X509, &second.authority_id).await.unwrap();
    assert_eq!(authority.inner.own.signed_by(), Some(Arc::clone(&first.authority_id)));
    authority.taint(AuthorityKind::X509, &first.authority_id).await.unwrap();
    until(&history, || authority.inner.own.signed_by() == Some(Arc::clone(&second.authority_id))).await;
    trigger.request();
    running.await.unwrap();
}

#[path = "tests/clocks.rs"]
mod clocks;
