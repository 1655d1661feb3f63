//! A server whose clock is wrong for a minute, in either direction: with writes, a rotation and a restart meanwhile.

use rustls::client::ResolvesClientCert as _;
use spiffe::verify::jwt_svid;

use super::*;
use crate::authority::profile::JwtProfile;
use crate::state::model::{Change, JoinToken, Part};

const MINUTE: Duration = Duration::from_secs(60);
const DAY: Duration = Duration::from_secs(24 * 3600);

#[derive(Clone, Copy, Debug)]
enum Off {
    Ahead(Duration),
    Behind(Duration),
}

fn set(clock: &Clock, off: Off) {
    match off {
        Off::Ahead(by) => clock.step_forward(by),
        Off::Behind(by) => clock.step_back(by),
    }
}

fn put_right(clock: &Clock, off: Off) {
    match off {
        Off::Ahead(by) => clock.step_back(by),
        Off::Behind(by) => clock.step_forward(by),
    }
}

fn token(authority: &Authority, now: SystemTime) -> String {
    let id = spiffe::id::SpiffeId::parse("spiffe://example.org/w").unwrap();
    let request = JwtProfile { id, audience: vec!["a".to_owned()], ttl: None, token_id: None };
    authority.active().unwrap().jwt(&request, now).unwrap().release(&Proof).token
}

/// Whether everything works at the time of the history: certificates, tokens, the server's own certificate.
fn works(history: &History, authority: &Authority) {
    let (now, held) = (history.now(), bundle(history));
    x509_chain(&sign(authority, now), &*held, PeerRole::Client, now).unwrap();
    jwt_svid(&token(authority, now), "a", &*held, now).unwrap();
    let shown = authority.inner.own.endpoint().resolve(&[], &[]).unwrap();
    let shown: Vec<_> = shown.cert.iter().map(|der| bytes::Bytes::copy_from_slice(der)).collect();
    x509_chain(&shown, &*held, PeerRole::Server, now).unwrap();
}

async fn a_wrong_clock_leaves_nothing_behind(off: Off) {
    let store: Arc<dyn Store> = Arc::new(Memory::new(HistoryId([1; 16])));
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("keys.json");
    let history = History::over(Arc::clone(&store)).await;
    let start = history.now();
    let authority = open(&history, Arc::new(DiskKeys::open(&path, &Entropy::system()).unwrap())).await;
    authority.bring_up().await.unwrap();
    let (trigger, shutdown) = Shutdown::new();
    let running = tokio::spawn(authority.clone().run(shutdown));
    history.clock().sleep(HOUR).await;
    let before = authority.overview(AuthorityKind::X509).unwrap().active;
    let old_chain = sign(&authority, history.now());
    let old_token = token(&authority, history.now());

    set(&history.clock(), off);
    history.clock().sleep(Duration::from_secs(3)).await;
    works(&history, &authority);
    let write = Change::PutToken(JoinToken { hash: [1; 32], expires_at: start + 30 * DAY, alias: None });
    history.commit(Part::new(vec![write.clone()])).await;
    for kind in [AuthorityKind::X509, AuthorityKind::Jwt] {
        let next = authority.prepare(kind).await.unwrap();
        authority.activate(kind, &next.authority_id).await.unwrap();
    }
    works(&history, &authority);
    trigger.request();
    running.await.unwrap();
    drop((history, authority));

    // A restart while it is wrong. The new clock begins where the first one did.
    let history = History::over(store).await;
    history.clock().step_forward(HOUR + Duration::from_secs(3));
    set(&history.clock(), off);
    let keys = Arc::new(DiskKeys::open(&path, &Entropy::system()).unwrap());
    let authority = open(&history, Arc::clone(&keys) as Arc<dyn SigningKeys>).await;
    authority.bring_up().await.unwrap();
    works(&history, &authority);
    let (trigger, shutdown) = Shutdown::new();
    let running = tokio::spawn(authority.clone().run(shutdown));
    history.commit(Part::new(vec![write])).await;
    history.clock().sleep(MINUTE).await;

    put_right(&history.clock(), off);
    history.clock().sleep(Duration::from_secs(3)).await;
    works(&history, &authority);
    let still_works = || {
        let (now, held) = (history.now(), bundle(&history));
        x509_chain(&old_chain, &*held, PeerRole::Client, now).unwrap();
        jwt_svid(&old_token, "a", &*held, start + HOUR).unwrap();
        let root = before.certificate.clone().unwrap();
        assert!(held.x509.iter().any(|authority| authority.der == root && !authority.tainted), "{off:?}");
    };
    still_works();
    assert!(keys.signer(&before.key_id).is_some(), "its key is kept until the clocks agree");

    history.clock().sleep(10 * MINUTE + Duration::from_secs(3)).await;
    works(&history, &authority);
    still_works();
    let (state, now) = (history.replica().latest(), history.now());
    assert!(state.all_slots().all(|slot| schedule::begins_at(slot) <= now), "{off:?}: what begins later is withdrawn");
    let begun = |authority: &&spiffe::bundle::X509Authority| {
        spiffe::x509::Certificate::parse(authority.der.clone()).unwrap().not_before <= now
    };
    let held = bundle(&history);
    assert_eq!(held.x509.iter().filter(begun).count(), held.x509.len(), "{off:?}");
    // And a day later rotation has gone on as ever.
    history.clock().sleep(DAY).await;
    works(&history, &authority);
    trigger.request();
    running.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_day_ahead() {
    a_wrong_clock_leaves_nothing_behind(Off::Ahead(DAY)).await;
}

#[tokio::test(start_paused = true)]
async fn a_year_ahead() {
    a_wrong_clock_leaves_nothing_behind(Off::Ahead(365 * DAY)).await;
}

#[tokio::test(start_paused = true)]
async fn a_day_behind() {
    a_wrong_clock_leaves_nothing_behind(Off::Behind(DAY)).await;
}
