//! The authority of the trust domain: its keys, what they may sign, when they change.
//!
//! [`profile`] says what may be signed, [`issue`] signs it, [`schedule`] says when authorities change and [`rotate`]
//! changes them. [`keys`] is where private keys live.
//!
//! The journal of authorities and the bundle are part of the history. A private key never is: it is found again by
//! the owner id that is stored beside it.

pub mod issue;
pub mod journal;
pub mod keys;
mod own;
pub mod profile;
mod rotate;
pub mod schedule;
mod taint;
mod tidy;

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use arc_swap::ArcSwapOption;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::reconcile::Nudge;
use runtime::steady::Steady;
use transport::rotating::Rotating;

use self::issue::{IssueError, Issuer};
use self::journal::{Ground, slots_of};
use self::keys::{KeyError, KeyType, SigningKeys};
use self::own::OwnSvid;
use self::profile::Policy;
use self::schedule::Time;
use crate::history::committer::{Committer, ProposeError};
use crate::history::replica::{Replica, ReplicaError};
use crate::state::State;
use crate::state::model::{AuthorityKind, AuthoritySlot, KeyOwner};

/// There is no active authority yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("server is initializing")]
pub struct NotReady;

/// What the authority is made of.
pub struct Parts {
    /// What operators decided.
    pub policy: Policy,
    /// Where the private keys are.
    pub keys: Arc<dyn SigningKeys>,
    /// Writes the history.
    pub committer: Committer,
    /// Reads the history.
    pub replica: Replica,
    /// Wall clock.
    pub clock: Clock,
    /// Whether that can be trusted to delete by.
    pub steady: Steady,
    /// Randomness of serial numbers and ids.
    pub entropy: Entropy,
    /// Takes the server's own X509-SVID.
    pub own_certificate: Rotating,
}

/// The authority; clones are handles of the same one.
#[derive(Clone)]
pub struct Authority {
    inner: Arc<Inner>,
}

struct Inner {
    policy: Arc<Policy>,
    keys: Arc<dyn SigningKeys>,
    owner: KeyOwner,
    committer: Committer,
    replica: Replica,
    clock: Clock,
    steady: Steady,
    entropy: Entropy,
    nudge: Nudge,
    active: ArcSwapOption<Issuer>,
    /// Which authorities the snapshot in `active` was built for; the lock makes snapshots follow each other in order.
    built_for: Mutex<Vec<Arc<str>>>,
    unrecorded: Mutex<tidy::Unrecorded>,
    own: OwnSvid,
}

/// Why an operation on an authority was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no active authority yet.
    #[error("server is initializing")]
    Initializing,
    /// The request names no authority.
    #[error("no authority ID provided")]
    NoAuthorityId,
    /// The id is of none of this server's authorities.
    #[error("unexpected authority ID")]
    UnexpectedAuthority,
    /// Only a prepared authority can be activated.
    #[error("only Prepared authorities can be activated")]
    NotPrepared,
    /// The active authority cannot be tainted.
    #[error("unable to taint current local authority")]
    TaintActive,
    /// Only an old authority can be tainted.
    #[error("only Old local authorities can be tainted")]
    TaintNotOld,
    /// It is tainted already.
    #[error("authority is already tainted")]
    AlreadyTainted,
    /// The active authority cannot be revoked.
    #[error("unable to use current authority")]
    RevokeActive,
    /// A prepared authority cannot be revoked.
    #[error("unable to use a prepared key")]
    RevokePrepared,
    /// Only an old X.509 authority can be revoked.
    #[error("only Old local authority can be revoked")]
    RevokeNotOld,
    /// Only a tainted authority can be revoked.
    #[error("it is not possible to revoke an untainted authority")]
    NotTainted,
    /// The bundle does not hold it.
    #[error("authority is not in the bundle")]
    NotPublished,
    /// Another step was faster: there is nothing to do any more.
    #[error("another rotation step was faster")]
    Overtaken,
}

/// Why an operation on an authority failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AuthorityError {
    /// JWT-SVIDs are switched off.
    #[error("JWT functionality is disabled")]
    JwtDisabled,
    /// The operation is not possible as things are.
    #[error("operation on the authority was refused")]
    Refused(#[source] Refusal),
    /// The signing keys failed.
    #[error("signing keys failed")]
    Keys(#[source] KeyError),
    /// The private key at hand is not the one that was published.
    #[error("private key is not the published one")]
    KeyMismatch,
    /// The authority's own certificate or the server's own SVID could not be signed.
    #[error("signing for the server itself failed")]
    Issue(#[source] IssueError),
    /// The change was not committed, or it is not known whether it was.
    #[error("authority change was not committed")]
    Commit(#[source] ProposeError<Refusal>),
    /// What a restore from a backup asks for was not committed.
    #[error("data store was restored from a backup and could not be made ready")]
    Restore(#[source] ProposeError<std::convert::Infallible>),
    /// The state of the trust domain could not be read.
    #[error("state of the trust domain could not be read")]
    State(#[source] ReplicaError),
    /// The server's own key could not be made.
    #[error("key of the server could not be made")]
    OwnKey(#[source] spiffe::x509::KeyError),
    /// The server's own certificate was not accepted by the TLS endpoint.
    #[error("certificate of the server could not be installed")]
    OwnCertificate(#[source] transport::rotating::TlsError),
}

impl AuthorityError {
    /// Whether the same call may succeed later without anything being changed by a person.
    pub fn is_retryable(&self) -> bool {
        match self {
            AuthorityError::Commit(_)
            | AuthorityError::Restore(_)
            | AuthorityError::State(_)
            | AuthorityError::OwnKey(_) => true,
            AuthorityError::Keys(error) => error.is_retryable(),
            AuthorityError::Refused(refusal) => {
                matches!(refusal, Refusal::Initializing | Refusal::Overtaken)
            }
            AuthorityError::JwtDisabled
            | AuthorityError::KeyMismatch
            | AuthorityError::Issue(_)
            | AuthorityError::OwnCertificate(_) => false,
        }
    }
}

/// The authorities of one kind as an operator sees them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overview {
    /// The one that signs.
    pub active: Arc<AuthoritySlot>,
    /// The one that will sign next, if it is published already.
    pub prepared: Option<Arc<AuthoritySlot>>,
    /// The one that signed last.
    pub old: Option<Arc<AuthoritySlot>>,
}

impl Authority {
    /// Reads whose keys these are. Nothing can be signed before [`Authority::bring_up`].
    ///
    /// # Errors
    /// If the signing keys cannot be read.
    pub async fn open(parts: Parts) -> Result<Self, AuthorityError> {
        let keys = parts.keys.public().await.map_err(AuthorityError::Keys)?;
        let inner = Inner {
            policy: Arc::new(parts.policy),
            keys: parts.keys,
            owner: KeyOwner::Server(keys.owner),
            committer: parts.committer,
            replica: parts.replica,
            clock: parts.clock,
            steady: parts.steady,
            entropy: parts.entropy,
            nudge: Nudge::new(),
            active: ArcSwapOption::empty(),
            built_for: Mutex::new(Vec::new()),
            unrecorded: Mutex::default(),
            own: OwnSvid::new(parts.own_certificate),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// The authorities that sign now.
    ///
    /// # Errors
    /// [`NotReady`] until the first activation.
    pub fn active(&self) -> Result<Arc<Issuer>, NotReady> {
        self.inner.active.load_full().ok_or(NotReady)
    }

    /// Whether JWT-SVIDs are served.
    pub fn serves_jwt(&self) -> bool {
        self.inner.policy.jwt_key_type.is_some()
    }

    /// What operators decided about what is signed.
    pub fn policy(&self) -> &Policy {
        &self.inner.policy
    }

    /// The authorities of one kind as they are.
    ///
    /// # Errors
    /// [`AuthorityError::JwtDisabled`], or [`Refusal::Initializing`] while none is active.
    pub fn overview(&self, kind: AuthorityKind) -> Result<Overview, AuthorityError> {
        use crate::state::model::SlotStatus;
        self.key_type(kind)?;
        let state = self.inner.replica.latest();
        let keys = self.keys_at_hand(&state);
        let ground = self.ground(&state, kind, &keys);
        let (lines, now) = (ground.lines(), ground.time.now);
        let active = schedule::active(&lines, now).cloned();
        let active = active.ok_or(AuthorityError::Refused(Refusal::Initializing))?;
        let prepared = schedule::prepared(&lines, now).cloned();
        let old = lines.into_iter().map(|line| line.slot).filter(|slot| slot.status == SlotStatus::Old);
        let old = old.max_by_key(|slot| slot.issued_at);
        Ok(Overview { active, prepared, old })
    }

    /// Lets the reconciler look at everything again, soon.
    pub fn nudge(&self) {
        self.inner.nudge.nudge();
    }

    fn key_type(&self, kind: AuthorityKind) -> Result<KeyType, AuthorityError> {
        match kind {
            AuthorityKind::X509 => Ok(self.inner.policy.ca_key_type),
            AuthorityKind::Jwt => self.inner.policy.jwt_key_type.ok_or(AuthorityError::JwtDisabled),
        }
    }

    /// The kinds of authority that this server has.
    fn kinds(&self) -> impl Iterator<Item = AuthorityKind> + use<> {
        let jwt = self.serves_jwt().then_some(AuthorityKind::Jwt);
        [AuthorityKind::X509].into_iter().chain(jwt)
    }

    fn slots(&self, state: &State, kind: AuthorityKind) -> Vec<Arc<AuthoritySlot>> {
        slots_of(state, self.inner.owner, kind)
    }

    /// The time that is signed by.
    fn now(&self) -> SystemTime {
        self.inner.clock.now()
    }

    /// Names of the private keys of the journal that are at hand.
    fn keys_at_hand(&self, state: &State) -> BTreeSet<Arc<str>> {
        let ours = state.all_slots().filter(|slot| slot.owner == self.inner.owner);
        ours.map(|slot| &slot.key_id).filter(|id| self.inner.keys.signer(id).is_some()).cloned().collect()
    }

    /// What decisions on `state` rest on, now.
    fn ground<'a>(&self, state: &'a State, kind: AuthorityKind, keys: &'a BTreeSet<Arc<str>>) -> Ground<'a> {
        let time = Time::new(self.now(), self.inner.steady.left());
        Ground { state, owner: self.inner.owner, kind, keys, time }
    }

    /// Builds the signing snapshot anew if other authorities are active than it was built for.
    fn refresh(&self) -> Result<(), AuthorityError> {
        let inner = &self.inner;
        let mut built_for = inner.built_for.lock().unwrap_or_else(PoisonError::into_inner);
        let state = inner.replica.latest();
        let keys = self.keys_at_hand(&state);
        let pick = |kind| {
            let ground = self.ground(&state, kind, &keys);
            let slot = schedule::active(&ground.lines(), ground.time.now).cloned()?;
            let signer = inner.keys.signer(&slot.key_id)?;
            Some((slot, signer))
        };
        let x509 = pick(AuthorityKind::X509);
        let jwt = if self.serves_jwt() { pick(AuthorityKind::Jwt) } else { None };
        let wanted: Vec<Arc<str>> =
            [&x509, &jwt].into_iter().flatten().map(|(slot, _)| Arc::clone(&slot.key_id)).collect();
        if x509.is_none() || *built_for == wanted {
            return Ok(());
        }
        let issuer = Issuer::new(
            Arc::clone(&inner.policy),
            inner.entropy.clone(),
            x509.as_ref().map(|(slot, key)| (&**slot, Arc::clone(key))),
            jwt.as_ref().map(|(slot, key)| (&**slot, Arc::clone(key))),
        )
        .map_err(AuthorityError::Issue)?;
        inner.active.store(Some(Arc::new(issuer)));
        *built_for = wanted;
        Ok(())
    }
}

#[cfg(test)]
mod tests;
