//! The agent's memory: the entries and bundles it is told to hold, the SVIDs signed for them, and what subscribers see.
//!
//! One lock guards one consistent state; it is held for map operations only, never across a wait or a signature.
//! Everything here dies with the process: of workloads, nothing is written to disk.

mod desired;
mod fetch;
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

use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::reconcile::Nudge;
use runtime::steady::Steady;
use runtime::telemetry::Limiter;
use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use spiffe::selector::SelectorSet;
use tokio::sync::watch;

pub use self::desired::{Changed, Entry, EntryId, Form, Update};
pub use self::issuer::{IssueError, Issuer, SignedJwt, SigningRequest};
pub use self::jwt::JwtSvid;
pub use self::snapshot::{HeldSvid, View};
pub use self::subscription::Subscription;

use self::jwt::JwtCache;
use self::state::{State, build};

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
    Issue(#[source] Arc<IssueError>),
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
    steady: Steady,
    entropy: Entropy,
    log: Limiter,
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
        log: Limiter,
    ) -> Self {
        let inner = Inner {
            steady: Steady::new(clock.clone()),
            clock,
            entropy,
            log,
            limits,
            issuer,
            signer: Nudge::new(),
            state: Mutex::new(State::new(trust_domain)),
            jwt: Mutex::new(JwtCache::new(limits.jwt_svids)),
            synced: watch::Sender::new(None),
        };
        Self { inner: Arc::new(inner) }
    }

    /// Takes one step of the server's view. When this returns, every subscriber has been given its view of the step:
    /// whoever takes anything from the cache from now on takes nothing that the step removed.
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

    /// What is held now.
    pub fn counts(&self) -> Counts {
        let jwt_svids = self.inner.jwt().len();
        let now = self.inner.clock.now();
        let state = self.inner.state();
        Counts {
            entries: state.desired.entries().len(),
            x509_svids: state.credentials.values().filter(|held| held.svid.not_after > now).count(),
            jwt_svids,
            subscribers: state.views.subscribers(),
        }
    }

    /// How many requests for JWT-SVIDs are under way.
    #[cfg(test)]
    pub(crate) fn jwt_requests(&self) -> usize {
        self.inner.jwt().requests()
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

    /// Hands out views without what has expired.
    fn expire(&self) {
        let now = self.clock.now();
        let mut state = self.state();
        let expired: HashSet<EntryId> = state
            .credentials
            .iter()
            .filter(|(_, credential)| credential.svid.not_after <= now)
            .map(|(id, _)| Arc::clone(id))
            .collect();
        state.rebuild_around(&expired, now);
    }
}
