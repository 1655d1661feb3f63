//! The agent's memory: the entries and bundles it is told to hold, the SVIDs signed for them, and what subscribers see.
//!
//! One lock guards one consistent state; it is held for map operations only, never across a wait or a signature.
//! Everything here dies with the process: of workloads, nothing is written to disk.

mod desired;
pub mod issue;
mod issuer;
mod jwt;
mod signer;
mod snapshot;
mod state;
mod subscription;

use std::collections::{BTreeMap, HashSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::reconcile::Nudge;
use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::renew::RenewAt;
use spiffe::selector::SelectorSet;
use tokio::sync::watch;

pub use self::desired::{Changed, Entry, EntryId, Update};
pub use self::issuer::{IssueError, Issuer, SignedJwt, SigningRequest};
pub use self::jwt::JwtSvid;
pub use self::snapshot::{HeldSvid, View};
pub use self::subscription::Subscription;

use self::jwt::{Found, JwtCache, Key};
use self::state::{State, build};

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

impl Cache {
    /// An empty cache of a trust domain, which has nothing to say until the first [`Cache::apply`].
    pub fn new(
        trust_domain: TrustDomain,
        limits: Limits,
        issuer: Arc<dyn Issuer>,
        clock: Clock,
        entropy: Entropy,
    ) -> Self {
        let inner = Inner {
            clock,
            entropy,
            limits,
            issuer,
            signer: Nudge::new(),
            state: Mutex::new(State::new(trust_domain)),
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
