//! The agent's own identity: its SVID, the bundle it knows the server by, and what both live through.
//!
//! A new SVID is written to disk before it is used, so that the process may be killed at any moment: what is on disk is
//! always an SVID that the server still takes. Where it cannot be written, it is used only when the one on disk is about
//! to end ([`succeed_stored`]), and writing it is tried again.
//!
//! [`succeed_stored`]: spiffe::renew::succeed_stored

mod data;
mod error;
mod next;
mod renewal;
mod verdict;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::reconcile::Nudge;
use spiffe::bundle::{Bundle, Bundles, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::renew::{RenewAt, Validity};
use spiffe::x509::{PrivateKey, X509Svid};
use transport::rotating::Rotating;
use transport::verify::Trust;

pub use self::data::{AgentData, DataError, DataFile};
pub use self::error::{BootstrapError, IdentityError};
pub use self::verdict::{Denial, Heard, Own, Reaction, judge};

use crate::attest::NodeProver;
use crate::keys::AgentKeys;
use crate::server_link::{DialError, Witness};
use crate::taint;

/// An SVID that has less left than this is not worth starting with.
const LEAST_LEFT: Duration = Duration::from_secs(1);
/// How often in a row a server of an unknown authority is met before that is believed.
const UNKNOWN_AUTHORITY_LIMIT: u32 = 2;

/// What is done when the server's authority is not in the agent's bundle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnknownAuthority {
    /// The process stops.
    Stop,
    /// Once it has lasted for `after`, the stored identity is deleted and the process stops, so that the next start
    /// bootstraps anew. Without `required`, an agent that cannot attest again does as with `Stop`; with it, it does
    /// not start.
    Rebootstrap {
        /// How long it has to last.
        after: Duration,
        /// Whether an agent that cannot do this may run at all.
        required: bool,
    },
}

impl IdentityError {
    /// Whether it may go better later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Attest(error) => error.is_retryable(),
            Self::Renew(error) => error.is_retryable(),
            Self::Data(_) | Self::Key(_) | Self::Svid(_) | Self::Foreign(_) | Self::ClockDisagrees | Self::Tls(_) => {
                true
            }
            Self::Denied { .. }
            | Self::Expired { .. }
            | Self::UnknownAuthority
            | Self::Rebootstrap
            | Self::CannotRebootstrap
            | Self::Bootstrap(_) => false,
        }
    }
}

/// The agent's own SVID. It never changes; a new one takes its place.
pub struct AgentSvid {
    /// Counts the SVIDs of this process from one.
    pub number: u64,
    /// The chain and what it says.
    pub svid: X509Svid,
    /// The leaf's key.
    pub key: Arc<PrivateKey>,
    /// Whether the server lets this agent attest again.
    pub reattestable: bool,
    received_at: SystemTime,
    renew_at: RenewAt,
    authority_key_id: Option<Bytes>,
}

impl AgentSvid {
    fn validity(&self) -> Validity {
        Validity { not_before: self.svid.not_before, not_after: self.svid.not_after }
    }

    /// When it is to be renewed: at the time drawn for it, or at once if an authority of `bundle` that signed it is
    /// tainted, but not sooner after its receipt than [`RenewAt::least_distance`].
    fn due_at(&self, bundle: Option<&Bundle>, now: SystemTime) -> SystemTime {
        let (not_before, not_after) = (self.svid.not_before, self.svid.not_after);
        let mut drawn = self.renew_at.at();
        let mut soonest = self.received_at + RenewAt::least_distance(not_before, not_after, self.received_at);
        if self.received_at > now {
            // The clock was ahead at the receipt, perhaps beyond the end of this SVID, and has been set right: only what
            // the server wrote into it can be relied on.
            let half = not_after.duration_since(not_before).unwrap_or_default() / 2;
            (drawn, soonest) = (drawn.min(not_before + half), now);
        }
        if not_before > now {
            // Of a clock that was ahead. The right one may be this clock or the one of before: the server knows.
            drawn = soonest;
        }
        let tainted = bundle
            .zip(self.authority_key_id.as_ref())
            .is_some_and(|(bundle, key_id)| taint::authorities(bundle).contains(key_id));
        if tainted { soonest } else { drawn.max(soonest) }
    }
}

/// What the identity needs.
pub struct Parts {
    /// The own trust domain.
    pub trust_domain: TrustDomain,
    /// Where SVID and bundle survive.
    pub file: DataFile,
    /// Where the keys survive.
    pub keys: Arc<dyn AgentKeys>,
    /// How the node proves what it is.
    pub prover: Arc<dyn NodeProver>,
    /// Reads the bundle to know the server by; called when none is stored. Without one, the first server that answers
    /// is believed.
    pub bootstrap: Box<dyn FnOnce() -> Result<Option<Bundle>, BootstrapError> + Send>,
    /// What is done when the server's authority is not in the bundle.
    pub unknown_authority: UnknownAuthority,
    /// The time.
    pub clock: Clock,
    /// Randomness.
    pub entropy: Entropy,
}

/// The agent's identity; clones share it.
#[derive(Clone)]
pub struct Identity {
    inner: Arc<Inner>,
}

struct Inner {
    trust_domain: TrustDomain,
    file: DataFile,
    keys: Arc<dyn AgentKeys>,
    prover: Arc<dyn NodeProver>,
    clock: Clock,
    entropy: Entropy,
    data: Mutex<Remembered>,
    unwritten: AtomicBool,
    rotating: Rotating,
    svid: ArcSwapOption<AgentSvid>,
    bundle: ArcSwapOption<Bundle>,
    judging: Mutex<Judging>,
    nudge: Nudge,
    unknown_authority: UnknownAuthority,
}

#[derive(Default)]
struct Judging {
    before: Option<Heard>,
    decided: Option<Decision>,
    unknown_authority: u32,
    // By the boot clock.
    unknown_since: Option<Duration>,
}

/// What survives a restart, and what should.
struct Remembered {
    disk: AgentData,
    wanted: AgentData,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Decision {
    Reattest(Denial),
    Forget(Denial),
    UnknownAuthority,
}

impl Identity {
    /// Takes up what is stored: the bundle, and the SVID if its key is there and it has not run out.
    pub fn open(parts: Parts) -> Result<Self, IdentityError> {
        let data = parts.file.load().map_err(IdentityError::Data)?;
        let stored = (!data.bundle.is_empty()).then(|| Bundle {
            x509: data.bundle.iter().map(|der| X509Authority { der: der.clone(), tainted: false }).collect(),
            ..Bundle::empty(parts.trust_domain.clone())
        });
        let bundle = match stored {
            Some(stored) => Some(stored),
            None => (parts.bootstrap)().map_err(IdentityError::Bootstrap)?,
        };
        let inner = Inner {
            trust_domain: parts.trust_domain,
            file: parts.file,
            keys: parts.keys,
            prover: parts.prover,
            clock: parts.clock,
            entropy: parts.entropy,
            data: Mutex::new(Remembered { disk: data.clone(), wanted: data }),
            unwritten: AtomicBool::new(false),
            rotating: Rotating::new(),
            svid: ArcSwapOption::empty(),
            bundle: ArcSwapOption::from(bundle.map(Arc::new)),
            judging: Mutex::new(Judging::default()),
            nudge: Nudge::new(),
            unknown_authority: parts.unknown_authority,
        };
        let identity = Self { inner: Arc::new(inner) };
        identity.take_up();
        Ok(identity)
    }

    fn take_up(&self) {
        let (chain, reattestable) = {
            let data = self.inner.data();
            (data.disk.svid.clone(), data.disk.reattestable)
        };
        if chain.is_empty() {
            return;
        }
        let svid = match X509Svid::from_chain(chain) {
            Ok(svid) => svid,
            Err(error) => {
                tracing::warn!(error = runtime::telemetry::chain(&error), "The stored agent SVID cannot be used");
                return;
            }
        };
        if !svid.id.is_member_of(&self.inner.trust_domain) {
            tracing::warn!(spiffe_id = %svid.id, "The stored agent SVID is of another trust domain; attesting anew");
            return;
        }
        let Some(key) = self.inner.keys.find(&svid.spki_der) else {
            tracing::info!("The key of the stored agent SVID is gone; attesting anew");
            return;
        };
        if svid.not_after <= self.inner.clock.now() + LEAST_LEFT {
            tracing::info!("The stored agent SVID has expired by this machine's clock; attesting anew");
            return;
        }
        // When it was received is not stored; its own beginning is the nearest known time.
        let received_at = svid.not_before;
        tracing::info!(spiffe_id = %svid.id, "Taking up the stored agent SVID");
        if let Err(error) = self.adopt(svid, key, reattestable, received_at) {
            tracing::warn!(error = runtime::telemetry::chain(&error), "The stored agent SVID cannot be used");
        }
    }

    /// The certificate that TLS shows the server.
    pub fn rotating(&self) -> &Rotating {
        &self.inner.rotating
    }

    /// The newest SVID; none before the first attestation.
    pub fn svid(&self) -> Option<Arc<AgentSvid>> {
        self.inner.svid.load_full()
    }

    /// The number of the newest SVID; zero without one.
    fn newest(&self) -> u64 {
        Witness::newest_svid(&*self.inner)
    }

    /// The bundle the server is known by.
    pub fn bundle(&self) -> Option<Arc<Bundle>> {
        self.inner.bundle.load_full()
    }

    /// What TLS verifies the server against: always the newest bundle.
    pub fn trust(&self) -> Arc<dyn Trust> {
        Arc::new(OwnTrust { inner: Arc::clone(&self.inner) })
    }

    /// What the link tells denials and failures to.
    pub fn witness(&self) -> Arc<dyn Witness> {
        Arc::clone(&self.inner) as Arc<dyn Witness>
    }

    /// Takes the newest bundle of the own trust domain: stored first, then used. A bundle without certificate
    /// authorities is not taken, because nobody could be known by it.
    pub async fn adopt_bundle(&self, bundle: &Arc<Bundle>) {
        let known = self.inner.bundle.load().as_ref().is_some_and(|known| known == bundle);
        if known || bundle.x509.is_empty() || bundle.trust_domain != self.inner.trust_domain {
            return;
        }
        let authorities: Vec<Bytes> = bundle.x509.iter().map(|authority| authority.der.clone()).collect();
        // If it cannot be stored it is right to go on in memory: the stored one is used only by the next start.
        let _ = self.remember(move |data| data.bundle = authorities).await;
        self.inner.bundle.store(Some(Arc::clone(bundle)));
        // It may taint the authority of our own SVID.
        self.inner.nudge.nudge();
    }

    /// Changes what should be stored, and stores it on a thread that may block. What cannot be stored is told, stays
    /// wanted, and is tried again by [`Identity::keep`].
    async fn remember(&self, change: impl FnOnce(&mut AgentData) + Send + 'static) -> Result<(), IdentityError> {
        let inner = Arc::clone(&self.inner);
        let write = move || {
            // Held over the write, so that an older state never overwrites a newer one.
            let mut data = inner.data();
            change(&mut data.wanted);
            if !data.wanted.svid.is_empty() {
                // An SVID without its key is of no use to the next start.
                inner.keys.save().map_err(IdentityError::Key)?;
            }
            if data.wanted != data.disk || !inner.file.exists() {
                inner.file.store(&data.wanted).map_err(IdentityError::Data)?;
                data.disk = data.wanted.clone();
            }
            Ok(())
        };
        let interrupted = |_| Err(IdentityError::Data(DataError::Interrupted));
        let written = tokio::task::spawn_blocking(write).await.unwrap_or_else(interrupted);
        self.inner.told_written(&written);
        written
    }

    /// Uses an SVID from now on.
    fn adopt(
        &self,
        svid: X509Svid,
        key: Arc<PrivateKey>,
        reattestable: bool,
        received_at: SystemTime,
    ) -> Result<(), IdentityError> {
        self.inner.rotating.set(&svid.chain, &key).map_err(IdentityError::Tls)?;
        let number = self.inner.newest_svid() + 1;
        let renew_at = RenewAt::draw(svid.not_before, svid.not_after, received_at, self.inner.entropy.u64());
        let authority_key_id = taint::authority_of(&svid.chain);
        let next = AgentSvid { number, svid, key, reattestable, received_at, renew_at, authority_key_id };
        self.inner.svid.store(Some(Arc::new(next)));
        *self.inner.judging() = Judging::default();
        Ok(())
    }
}

impl Inner {
    fn data(&self) -> MutexGuard<'_, Remembered> {
        self.data.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells operators when writing begins to fail, and when it works again.
    fn told_written(&self, written: &Result<(), IdentityError>) {
        let before = self.unwritten.swap(written.is_err(), Ordering::SeqCst);
        metrics::gauge!("agent_svid.unwritten").set(if written.is_err() { 1.0 } else { 0.0 });
        match written {
            Err(error) => {
                metrics::counter!("agent_svid.write.failures").increment(1);
                tracing::error!(
                    error = runtime::telemetry::chain(error),
                    "The agent's identity cannot be written and goes on in memory. A restart may not find it: make the data \
                     directory writable and look whether its disk is full. Writing is tried again"
                );
            }
            Ok(()) if before => tracing::info!("The agent's identity is written again"),
            Ok(()) => {}
        }
    }

    fn judging(&self) -> MutexGuard<'_, Judging> {
        self.judging.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_reattestable(&self) -> bool {
        self.svid.load().as_ref().is_some_and(|svid| svid.reattestable)
    }

    fn decide(&self, judging: &mut Judging, decision: Decision) {
        // The first decision stands until it is carried out, unless a later one ends everything.
        if judging.decided.is_none() || matches!(decision, Decision::Forget(_)) {
            judging.decided = Some(decision);
        }
        self.nudge.nudge();
    }
}

impl Witness for Inner {
    fn newest_svid(&self) -> u64 {
        self.svid.load().as_ref().map_or(0, |svid| svid.number)
    }

    fn denied(&self, heard: Heard) -> Reaction {
        let mut judging = self.judging();
        let own = Own {
            newest_svid: self.newest_svid(),
            reattestable: self.is_reattestable(),
            prover_repeats: self.prover.repeats(),
        };
        let reaction = judge(judging.before.as_ref(), &heard, &own);
        tracing::warn!(denial = %heard.denial, connection = heard.connection, ?reaction, "The server denied a call");
        match reaction {
            Reaction::Disregard => {}
            Reaction::AskAgain => judging.before = Some(heard),
            Reaction::Reattest => self.decide(&mut judging, Decision::Reattest(heard.denial)),
            Reaction::Forget => self.decide(&mut judging, Decision::Forget(heard.denial)),
        }
        reaction
    }

    fn accepted(&self, svid: u64) {
        let mut judging = self.judging();
        if judging.before.is_some_and(|before| before.svid == svid) {
            judging.before = None;
        }
    }

    fn dialled(&self, result: Result<(), &DialError>) {
        let mut judging = self.judging();
        match result {
            Ok(()) => {
                judging.unknown_authority = 0;
                judging.unknown_since = None;
            }
            Err(DialError::UnknownAuthority(_)) => {
                let now = self.clock.boot();
                let since = *judging.unknown_since.get_or_insert(now);
                judging.unknown_authority += 1;
                let patience = match self.unknown_authority {
                    UnknownAuthority::Rebootstrap { after, .. } if self.is_reattestable() => after,
                    _ => Duration::ZERO,
                };
                if judging.unknown_authority >= UNKNOWN_AUTHORITY_LIMIT && since + patience <= now {
                    self.decide(&mut judging, Decision::UnknownAuthority);
                }
            }
            Err(_) => {}
        }
    }
}

struct OwnTrust {
    inner: Arc<Inner>,
}

impl Trust for OwnTrust {
    fn bundles(&self) -> Arc<dyn Bundles + Send + Sync> {
        match self.inner.bundle.load_full() {
            Some(bundle) => Arc::new(bundle),
            None => Arc::new(std::collections::BTreeMap::<TrustDomain, Arc<Bundle>>::new()),
        }
    }

    fn now(&self) -> SystemTime {
        self.inner.clock.now()
    }

    fn admits(&self, id: &SpiffeId) -> bool {
        *id == SpiffeId::server_of(&self.inner.trust_domain)
    }
}
