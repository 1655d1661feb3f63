//! The agent's memory: the entries and bundles it is told to hold, the SVIDs signed for them, and what subscribers see.
//!
//! One lock guards one consistent state; it is held for map operations only, never across a wait or a signature.
//! Everything here dies with the process: of workloads, nothing is written to disk.

mod desired;
pub mod issue;
mod jwt;
mod signer;
mod snapshot;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::reconcile::Nudge;
use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::renew::RenewAt;
use spiffe::selector::SelectorSet;
use tokio::sync::watch;
use zeroize::Zeroizing;

pub use self::desired::{Changed, Entry, EntryId, Update};
pub use self::jwt::JwtSvid;
pub use self::snapshot::{HeldSvid, View};

use crate::taint;

use self::desired::Desired;
use self::issue::{Candidate, Demand, Held, Plan};
use self::jwt::{Found, JwtCache, Key};
use self::snapshot::Views;

/// How many JWT-SVIDs one request of a workload asks the server for at the same time.
const JWT_FETCHES_AT_ONCE: usize = 8;

/// How long a renewal of a token that is still valid may hold up its caller.
const JWT_RENEWAL_PATIENCE: Duration = Duration::from_secs(5);

/// How much the cache may hold, and how early it renews.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// X.509-SVIDs held beyond those that subscribers follow.
    pub x509_svids: usize,
    /// JWT-SVIDs held.
    pub jwt_svids: usize,
    /// The validity an X.509-SVID should have left at any time.
    pub availability_target: Option<Duration>,
}

impl Default for Limits {
    fn default() -> Self {
        Self { x509_svids: 1000, jwt_svids: 1000, availability_target: None }
    }
}

/// Why a JWT-SVID could not be had.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CacheError {
    /// No entry matches the caller, or none has the wanted identity.
    #[error("no identity issued")]
    NotEntitled,
    /// The server did not sign, and no earlier token is valid.
    #[error("could not get a JWT-SVID")]
    Issue(#[source] IssueError),
}

/// Why the server signed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The call failed.
    #[error("the server did not answer the request to sign")]
    Call(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The call took too long.
    #[error("the server did not sign in time")]
    Deadline,
    /// The server answered this item with an error.
    #[error("the server refused to sign (code {code}): {message}")]
    Refused {
        /// The gRPC code of the item.
        code: i32,
        /// What the server says of it.
        message: String,
    },
    /// The server's answer cannot be used.
    #[error("the server's answer is malformed: {0}")]
    Malformed(&'static str),
    /// The answer is no SVID of the wanted identity and key.
    #[error("the server signed something else than what it was asked for")]
    Foreign,
    /// The local key or request could not be made.
    #[error("could not make a key")]
    Key(#[source] crate::keys::KeyError),
}

/// One X.509-SVID to be signed.
#[derive(Debug, Clone)]
pub struct SigningRequest {
    /// The entry it is for.
    pub entry_id: EntryId,
    /// A PKCS#10 request (DER) with the new key.
    pub csr: Bytes,
}

/// A token as the server signed it.
pub struct SignedJwt {
    /// Its compact form.
    pub token: Zeroizing<String>,
    /// Its subject.
    pub id: SpiffeId,
    /// When it was signed.
    pub issued_at: SystemTime,
    /// From when on it is worthless.
    pub expires_at: SystemTime,
}

/// The server, as the one who signs.
#[async_trait]
pub trait Issuer: Send + Sync {
    /// Signs X.509-SVIDs; answers with one chain (DER, leaf first) or refusal for each request, in their order.
    async fn sign_x509(&self, requests: &[SigningRequest]) -> Result<Vec<Result<Vec<Bytes>, IssueError>>, IssueError>;

    /// Signs one JWT-SVID.
    async fn sign_jwt(&self, entry: &EntryId, audience: &[String]) -> Result<SignedJwt, IssueError>;
}

/// What the cache holds, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Registration entries.
    pub entries: usize,
    /// X.509-SVIDs.
    pub x509_svids: usize,
    /// JWT-SVIDs.
    pub jwt_svids: usize,
    /// Open subscriptions.
    pub subscribers: usize,
}

/// The agent's memory; clones share it.
#[derive(Clone)]
pub struct Cache {
    inner: Arc<Inner>,
}

struct Inner {
    clock: Clock,
    entropy: Entropy,
    limits: Limits,
    issuer: Arc<dyn Issuer>,
    signer: Nudge,
    state: Mutex<State>,
    jwt: Mutex<JwtCache>,
    synced: watch::Sender<Option<SystemTime>>,
}

struct State {
    desired: Desired,
    credentials: HashMap<EntryId, Credential>,
    signing: HashSet<EntryId>,
    refused: HashMap<EntryId, Refused>,
    views: Views,
    tick: u64,
    // The server was heard from since the signer last looked: an earlier failure is no reason to wait.
    heard: bool,
    // The signer is waiting out a failure.
    waiting: bool,
}

struct Credential {
    svid: Arc<HeldSvid>,
    revision: i64,
    received_at: SystemTime,
    renew_at: SystemTime,
    // The key that signed the end of the chain, by which a tainted authority is recognised.
    authority_key_id: Option<Bytes>,
    last_used: u64,
}

#[derive(Clone, Copy)]
struct Refused {
    retry_at: SystemTime,
    wait: Duration,
}

impl Cache {
    /// An empty cache of a trust domain, which has nothing to say until the first [`Cache::apply`].
    pub fn new(
        trust_domain: TrustDomain,
        limits: Limits,
        issuer: Arc<dyn Issuer>,
        clock: Clock,
        entropy: Entropy,
    ) -> Self {
        let state = State {
            desired: Desired::new(Arc::new(Bundle::empty(trust_domain))),
            credentials: HashMap::new(),
            signing: HashSet::new(),
            refused: HashMap::new(),
            views: Views::default(),
            tick: 0,
            heard: false,
            waiting: false,
        };
        let inner = Inner {
            clock,
            entropy,
            limits,
            issuer,
            signer: Nudge::new(),
            state: Mutex::new(state),
            jwt: Mutex::new(JwtCache::new(limits.jwt_svids)),
            synced: watch::Sender::new(None),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Takes one step of the server's view. When this returns, every subscriber has been handed what the step
    /// changes: nothing that it removed is handed out any more.
    pub fn apply(&self, update: Update) {
        let now = self.inner.clock.now();
        let (ended, own) = self.inner.state().apply(update, now);
        {
            let mut jwt = self.inner.jwt();
            for entry in &ended {
                jwt.forget_entry(entry);
            }
            if let Some(own) = own {
                jwt.judge(&own);
            }
        }
        self.inner.synced.send_replace(Some(now));
        self.inner.signer.nudge();
    }

    /// The server was heard from and nothing has changed.
    pub fn confirm(&self) {
        self.inner.synced.send_replace(Some(self.inner.clock.now()));
        let waiting = {
            let mut state = self.inner.state();
            state.heard = true;
            state.waiting
        };
        // The failure that the signer waits out may be over.
        if waiting {
            self.inner.signer.nudge();
        }
    }

    /// Whether the server's view was ever taken; before that nothing can be said about any process.
    pub fn synced(&self) -> bool {
        self.inner.synced.borrow().is_some()
    }

    /// When the server's view was last taken or confirmed.
    pub fn last_sync(&self) -> Option<SystemTime> {
        *self.inner.synced.borrow()
    }

    /// Waits for the first step.
    pub async fn first_sync(&self) {
        // The sender lives in `self`: it cannot be gone.
        let _ = self.inner.synced.subscribe().wait_for(Option::is_some).await;
    }

    /// Follows the view of a process with these selectors.
    pub fn subscribe(&self, selectors: SelectorSet) -> Subscription {
        let now = self.inner.clock.now();
        let mut guard = self.inner.state();
        let State { desired, credentials, views, .. } = &mut *guard;
        let (mut receiver, selectors) = views.subscribe(&selectors, || build(desired, credentials, &selectors, now));
        receiver.mark_changed();
        let waits = receiver.borrow().entitled && !receiver.borrow().complete;
        drop(guard);
        if waits {
            self.inner.signer.nudge();
        }
        Subscription { cache: Arc::clone(&self.inner), selectors, receiver }
    }

    /// The entries a process with these selectors may use, in the order of their ids, without repeated hints.
    pub fn matching(&self, selectors: &SelectorSet) -> Vec<Arc<Entry>> {
        self.inner.state().desired.matching(selectors)
    }

    /// The own bundle and those that the matching entries federate with.
    pub fn bundles_for(&self, selectors: &SelectorSet) -> BTreeMap<TrustDomain, Arc<Bundle>> {
        let state = self.inner.state();
        let matching = state.desired.matching(selectors);
        let own = Arc::clone(state.desired.own());
        let federated = state.desired.federated(&matching);
        drop(state);
        std::iter::once(own).chain(federated).map(|bundle| (bundle.trust_domain.clone(), bundle)).collect()
    }

    /// The bundle of the own trust domain; without any key before the first step.
    pub fn own_bundle(&self) -> Arc<Bundle> {
        Arc::clone(self.inner.state().desired.own())
    }

    /// Every bundle held.
    pub fn bundles(&self) -> BTreeMap<TrustDomain, Arc<Bundle>> {
        self.inner.state().desired.bundles()
    }

    /// One JWT-SVID for each matching entry, or for the one with identity `id`, in the order of the entries' ids.
    ///
    /// A token is handed out again until its renewal time, and until it expires while the server gives no new one.
    pub async fn jwt_svids(
        &self,
        selectors: &SelectorSet,
        audience: &[String],
        id: Option<&SpiffeId>,
    ) -> Result<Vec<Arc<JwtSvid>>, CacheError> {
        let mut entries = self.matching(selectors);
        entries.retain(|entry| id.is_none_or(|id| entry.spiffe_id == *id));
        if entries.is_empty() {
            return Err(CacheError::NotEntitled);
        }
        stream::iter(entries)
            .map(|entry| self.jwt_svid(entry, audience))
            .buffered(JWT_FETCHES_AT_ONCE)
            .try_collect()
            .await
    }

    async fn jwt_svid(&self, entry: Arc<Entry>, audience: &[String]) -> Result<Arc<JwtSvid>, CacheError> {
        let key = Key::new(Arc::clone(&entry.id), audience);
        let found = if entry.jwt_svid_include_jti {
            Found::Nothing
        } else {
            self.inner.jwt().find(&key, self.inner.clock.now())
        };
        let ageing = match found {
            Found::Fresh(svid) => return Ok(svid),
            Found::Ageing(svid) => Some(svid),
            Found::Nothing => None,
        };
        let sign = self.inner.issuer.sign_jwt(&entry.id, audience);
        let signed = match &ageing {
            // There is something to fall back on, so the caller need not wait long.
            Some(_) => tokio::time::timeout(JWT_RENEWAL_PATIENCE, sign).await.unwrap_or(Err(IssueError::Deadline)),
            None => sign.await,
        };
        let signed = match signed {
            Ok(signed) => signed,
            Err(error) => {
                return match ageing.filter(|svid| svid.expires_at > self.inner.clock.now()) {
                    // The wait for the server may have outlasted the entry.
                    Some(svid) if self.inner.still_wanted(&entry) => {
                        tracing::warn!(
                            spiffe_id = %entry.spiffe_id,
                            error = runtime::telemetry::chain(&error),
                            "Could not renew a JWT-SVID; the held one is valid and is handed out"
                        );
                        Ok(svid)
                    }
                    Some(_) => Err(CacheError::NotEntitled),
                    None => Err(CacheError::Issue(error)),
                };
            }
        };
        let received_at = self.inner.clock.now();
        if signed.id != entry.spiffe_id {
            return Err(CacheError::Issue(IssueError::Foreign));
        }
        let svid = Arc::new(JwtSvid {
            entry_id: Arc::clone(&entry.id),
            id: signed.id,
            token: signed.token,
            hint: Arc::clone(&entry.hint),
            issued_at: signed.issued_at,
            expires_at: signed.expires_at,
        });
        let renew_at = RenewAt::draw(svid.issued_at, svid.expires_at, received_at, self.inner.entropy.u64());
        // Under the lock of the state, so that a step which removes the entry comes wholly before or wholly after.
        let state = self.inner.state();
        if !state.wants(&entry) {
            return Err(CacheError::NotEntitled);
        }
        if !entry.jwt_svid_include_jti {
            self.inner.jwt().insert(key, Arc::clone(&svid), renew_at.at());
        }
        drop(state);
        Ok(svid)
    }

    /// What is held now.
    pub fn counts(&self) -> Counts {
        let jwt_svids = self.inner.jwt().len();
        let state = self.inner.state();
        Counts {
            entries: state.desired.entries().len(),
            x509_svids: state.credentials.len(),
            jwt_svids,
            subscribers: state.views.subscribers(),
        }
    }
}

impl Inner {
    // A panic while the lock was held leaves values that are each whole; the next step of the server's view repairs
    // what is missing, so serving on is safer than ending every workload's stream.
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn jwt(&self) -> MutexGuard<'_, JwtCache> {
        self.jwt.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn still_wanted(&self, entry: &Entry) -> bool {
        self.state().wants(entry)
    }

    /// Drops what has expired, so that views without it are handed out.
    fn expire(&self) {
        let now = self.clock.now();
        let mut state = self.state();
        let expired: HashSet<EntryId> = state
            .credentials
            .iter()
            .filter(|(_, credential)| credential.svid.not_after <= now)
            .map(|(id, _)| Arc::clone(id))
            .collect();
        state.forget(&expired, now);
    }
}

fn build(
    desired: &Desired,
    credentials: &HashMap<EntryId, Credential>,
    selectors: &SelectorSet,
    now: SystemTime,
) -> View {
    let held = |id: &EntryId| credentials.get(id).map(|credential| Arc::clone(&credential.svid));
    View::build(desired, desired.matching(selectors), held, now)
}

impl State {
    /// Takes a step; answers the entries whose tokens end, and the own bundle if any bundle changed.
    fn apply(&mut self, update: Update, now: SystemTime) -> (Vec<EntryId>, Option<Arc<Bundle>>) {
        self.heard = true;
        let (changed, bundles_changed) = self.desired.apply(update);
        let mut ended = Vec::new();
        for change in &changed {
            let Some(id) = change.before.as_ref().or(change.after.as_ref()).map(|entry| &entry.id) else { continue };
            self.refused.remove(id);
            if change.before.is_some() {
                ended.push(Arc::clone(id));
            }
            if change.ends_credentials() {
                self.credentials.remove(id);
                self.signing.remove(id);
            }
        }
        if bundles_changed {
            self.renew_tainted(now);
        }
        let Self { desired, credentials, views, .. } = self;
        // From some number on it is cheaper to build every view than to ask which are concerned.
        let many = bundles_changed || changed.len() > 64;
        let touches = |selectors: &SelectorSet, changed: &Changed| {
            let matches = |entry: &Arc<Entry>| entry.selectors.is_subset_of(selectors);
            changed.before.iter().chain(&changed.after).any(matches)
        };
        views.rebuild(
            |selectors, _| many || changed.iter().any(|changed| touches(selectors, changed)),
            |selectors| build(desired, credentials, selectors, now),
        );
        (ended, bundles_changed.then(|| Arc::clone(self.desired.own())))
    }

    /// Draws the renewal of every credential that a tainted authority signed to now.
    fn renew_tainted(&mut self, now: SystemTime) {
        let tainted = taint::authorities(self.desired.own());
        if tainted.is_empty() {
            return;
        }
        for credential in self.credentials.values_mut() {
            if credential.authority_key_id.as_ref().is_some_and(|key_id| tainted.contains(key_id)) {
                let svid = &credential.svid;
                let soonest = credential.received_at + RenewAt::least_distance(svid.not_before, svid.not_after);
                credential.renew_at = credential.renew_at.min(soonest.max(now));
            }
        }
    }

    /// Whether exactly this form of the entry is held.
    fn wants(&self, entry: &Entry) -> bool {
        self.desired.entry(&entry.id).is_some_and(|held| {
            held.revision == entry.revision && held.created_at == entry.created_at && held.spiffe_id == entry.spiffe_id
        })
    }

    fn plan(&self, limit: usize, now: SystemTime) -> Plan {
        let followed: HashSet<EntryId> = self.views.followed().collect();
        let candidates: Vec<Candidate> = self
            .desired
            .entries()
            .filter(|entry| !entry.store_svid)
            .map(|entry| {
                let credential = self.credentials.get(&entry.id);
                Candidate {
                    held: credential.map(|credential| Held {
                        renew_at: credential.renew_at,
                        not_after: credential.svid.not_after,
                        outdated: credential.revision != entry.revision,
                    }),
                    demand: if followed.contains(&entry.id) {
                        Demand::Subscribed
                    } else if entry.disable_x509_svid_prefetch {
                        Demand::OnDemand
                    } else {
                        Demand::Prefetch
                    },
                    last_used: credential.map_or(0, |credential| credential.last_used),
                    signing: self.signing.contains(&entry.id),
                    retry_at: self.refused.get(&entry.id).map(|refused| refused.retry_at),
                    entry: Arc::clone(&entry.id),
                }
            })
            .collect();
        issue::plan(&candidates, limit, now)
    }

    fn forget(&mut self, ids: &HashSet<EntryId>, now: SystemTime) {
        if ids.is_empty() {
            return;
        }
        self.credentials.retain(|id, _| !ids.contains(id));
        self.rebuild_around(ids, now);
    }

    /// Hands new views to those who follow one of these entries.
    fn rebuild_around(&mut self, ids: &HashSet<EntryId>, now: SystemTime) {
        let Self { desired, credentials, views, .. } = self;
        views.rebuild(
            |_, view| view.entries.iter().any(|entry| ids.contains(&entry.id)),
            |selectors| build(desired, credentials, selectors, now),
        );
    }
}

/// One process's claim to its view. Dropping it ends the claim.
pub struct Subscription {
    cache: Arc<Inner>,
    selectors: SelectorSet,
    receiver: watch::Receiver<Arc<View>>,
}

impl Subscription {
    /// The view now at the first call, then the newest after each change. Views in between are skipped, and none holds
    /// anything expired. `None` when there will be no further view.
    pub async fn changed(&mut self) -> Option<Arc<View>> {
        loop {
            self.receiver.changed().await.ok()?;
            let view = Arc::clone(&self.receiver.borrow_and_update());
            if view.is_valid_at(self.cache.clock.now()) {
                return Some(view);
            }
            self.cache.expire();
            self.cache.signer.nudge();
        }
    }

    /// The view now, without anything expired, whether or not it was seen before.
    pub fn current(&self) -> Arc<View> {
        let view = Arc::clone(&self.receiver.borrow());
        if view.is_valid_at(self.cache.clock.now()) {
            return view;
        }
        self.cache.expire();
        self.cache.signer.nudge();
        Arc::clone(&self.receiver.borrow())
    }

    /// The selectors it was made with.
    pub fn selectors(&self) -> &SelectorSet {
        &self.selectors
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        let Some(last) = state.views.unsubscribe(&self.selectors) else { return };
        state.tick += 1;
        let tick = state.tick;
        for entry in &last.entries {
            if let Some(credential) = state.credentials.get_mut(&entry.id) {
                credential.last_used = tick;
            }
        }
        let beyond = state.credentials.len() > self.cache.limits.x509_svids;
        drop(state);
        if beyond {
            self.cache.signer.nudge();
        }
    }
}
