//! Carries out what [`schedule`] asks for, one step at a time.
//!
//! Order of a preparation: the key first, durably; then journal line and bundle in one part. So a published authority
//! always has its key, and a key without a journal line is an orphan that goes one authority lifetime later. Whoever loses a
//! race removes the key that it made. Nothing in memory changes before the commit.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey,
    VerificationAlgorithm,
};
use runtime::shutdown::Shutdown;
use spiffe::bundle::Bundle;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use super::issue::self_signed;
use super::journal::{self, Cause, Ground, prunable};
use super::keys::{JWT_KEY, KEY_NUMBER, KeyType, Signer, X509_KEY};
use super::schedule::{Step, Time};
use super::{Authority, AuthorityError, Refusal};
use crate::history::Urgency;
use crate::history::committer::ProposeError;
use crate::state::State;
use crate::state::model::{AuthorityKind, AuthoritySlot, SlotStatus};

/// How often the newest position is noted beside the keys. A backup that is younger than the note and older than what was
/// lost is not known for one by the note.
const NOTE_EVERY: Duration = Duration::from_secs(60);

pub(super) fn rfc3339(at: SystemTime) -> String {
    OffsetDateTime::from(at).format(&Rfc3339).unwrap_or_default()
}

/// Whether `key` is the private half of the published public key: it signs, and the published half verifies.
fn prove(key: &dyn Signer, slot: &AuthoritySlot, challenge: &[u8; 32]) -> Result<(), AuthorityError> {
    let public = key.public_key();
    if public.spki != slot.public_key {
        return Err(AuthorityError::KeyMismatch);
    }
    let algorithm: &'static dyn VerificationAlgorithm = match public.kind {
        KeyType::EcP256 => &ECDSA_P256_SHA256_FIXED,
        KeyType::EcP384 => &ECDSA_P384_SHA384_FIXED,
        KeyType::Rsa2048 | KeyType::Rsa4096 => &RSA_PKCS1_2048_8192_SHA256,
    };
    let signature = key.sign_jws(challenge).map_err(AuthorityError::Keys)?;
    UnparsedPublicKey::new(algorithm, &public.bits)
        .verify(challenge, &signature)
        .map_err(|_| AuthorityError::KeyMismatch)
}

impl From<ProposeError<Refusal>> for AuthorityError {
    fn from(error: ProposeError<Refusal>) -> Self {
        match error {
            ProposeError::Refused(refusal) => AuthorityError::Refused(refusal),
            other => AuthorityError::Commit(other),
        }
    }
}

/// What a step did.
enum Progress {
    /// Something; look again at once.
    Stepped,
    /// Nothing is due before this time.
    Idle(Option<SystemTime>),
}

impl Authority {
    /// Makes an authority of this kind and publishes it, before its time.
    ///
    /// # Errors
    /// [`Refusal::Initializing`] while none is active; if the key cannot be made or the change not be committed.
    pub async fn prepare(&self, kind: AuthorityKind) -> Result<Arc<AuthoritySlot>, AuthorityError> {
        let slot = self.make(kind, Cause::Operator).await?;
        self.nudge();
        Ok(slot)
    }

    /// Lets the prepared authority `authority_id` sign from now on.
    ///
    /// # Errors
    /// If it is not prepared, its key is not the published one, or the change cannot be committed.
    pub async fn activate(
        &self,
        kind: AuthorityKind,
        authority_id: &str,
    ) -> Result<Arc<AuthoritySlot>, AuthorityError> {
        if authority_id.is_empty() {
            return Err(AuthorityError::Refused(Refusal::NoAuthorityId));
        }
        let slot = self.switch(kind, authority_id, Cause::Operator).await?;
        self.nudge();
        Ok(slot)
    }

    /// Finds the authorities of the last run again and returns when everything can be signed
    /// and the server has its own SVID.
    ///
    /// # Errors
    /// If keys or history fail.
    pub async fn bring_up(&self) -> Result<(), AuthorityError> {
        self.recover().await?;
        self.compare_keys_with_journal().await?;
        while let Progress::Stepped = self.step().await? {}
        self.note(true).await;
        Ok(())
    }

    /// Rotates until shutdown is requested.
    pub async fn run(self, shutdown: Shutdown) {
        let inner = Arc::clone(&self.inner);
        let mut states = inner.replica.watch();
        let wake = async {
            let mut seen = self.relevant(&states.borrow_and_update().clone());
            while states.changed().await.is_ok() {
                let now = self.relevant(&states.borrow_and_update().clone());
                if now != seen {
                    seen = now;
                    self.nudge();
                }
            }
            std::future::pending::<()>().await;
        };
        let reconcile = runtime::reconcile::run(
            "authority",
            inner.nudge.clone(),
            inner.clock.clone(),
            inner.entropy.clone(),
            shutdown,
            || async {
                loop {
                    if let Progress::Idle(at) = self.step().await? {
                        self.note(false).await;
                        return Ok::<_, AuthorityError>(at);
                    }
                }
            },
        );
        let noting = async {
            loop {
                inner.clock.sleep(NOTE_EVERY).await;
                self.note(true).await;
            }
        };
        tokio::select! {
            () = wake => {}
            () = noting => {}
            () = reconcile => {}
        }
        self.note(true).await;
    }

    /// What of a state the reconciler depends on.
    fn relevant(&self, state: &State) -> (Vec<Arc<AuthoritySlot>>, Option<Arc<Bundle>>) {
        let slots = self.kinds().flat_map(|kind| self.slots(state, kind)).collect();
        (slots, state.bundle(state.trust_domain()).cloned())
    }

    /// Carries out the one next thing that is due.
    async fn step(&self) -> Result<Progress, AuthorityError> {
        let state = self.inner.replica.current().await.map_err(AuthorityError::State)?;
        let keys = self.keys_at_hand(&state);
        let mut next: Option<SystemTime> = None;
        let mut wait = |at: SystemTime| next = Some(next.map_or(at, |next| next.min(at)));
        let mut removals = Vec::new();
        for kind in self.kinds() {
            let done = match self.ground(&state, kind, &keys).next_step() {
                Step::Prepare => self.make(kind, Cause::Schedule).await.map(drop),
                Step::Activate(id) => self.switch_or_lose(kind, &id).await,
                Step::Wait(at) => {
                    wait(at);
                    continue;
                }
                removal => {
                    removals.push((kind, removal));
                    continue;
                }
            };
            return stepped(done);
        }
        // Signing comes first: what cannot be removed for now holds it up no more.
        self.refresh()?;
        if let Some(at) = self.renew_own(&state, self.now()).await? {
            wait(at);
        }
        if let Some((kind, removal)) = removals.into_iter().next() {
            return stepped(self.remove(kind, &removal, keys).await);
        }
        let time = Time::new(self.now(), self.inner.steady.left());
        let (changes, at) = prunable(&state, self.inner.owner, self.serves_jwt(), time);
        if changes.is_empty() {
            if let Some(at) = at {
                wait(at);
            }
            let Some(left) = self.unrecorded_for() else { return Ok(Progress::Idle(next)) };
            let left = left.max(self.inner.steady.left());
            if !left.is_zero() {
                wait(self.now() + left);
                return Ok(Progress::Idle(next));
            }
            self.remove_unrecorded().await?;
            return Ok(Progress::Stepped);
        }
        self.prune().await?;
        Ok(Progress::Stepped)
    }

    /// Makes a key and an authority, and publishes it.
    async fn make(&self, kind: AuthorityKind, cause: Cause) -> Result<Arc<AuthoritySlot>, AuthorityError> {
        let inner = &self.inner;
        let key_type = self.key_type(kind)?;
        let prefix = match kind {
            AuthorityKind::X509 => X509_KEY,
            AuthorityKind::Jwt => JWT_KEY,
        };
        let key_id: Arc<str> = format!("{prefix}{}", inner.entropy.alphanumeric(KEY_NUMBER)).into();
        let public = inner.keys.create(&key_id, key_type).await.map_err(AuthorityError::Keys)?;
        let slot = match self.describe(kind, &key_id, public.spki) {
            Ok(slot) => Arc::new(slot),
            Err(error) => {
                self.discard(&key_id).await;
                return Err(error);
            }
        };
        let (owner, steady, made) = (inner.owner, inner.steady.clone(), Arc::clone(&slot));
        let keys = self.keys_at_hand(&inner.replica.latest());
        let proposed = inner
            .committer
            .propose(Urgency::Vital, move |state: &State, now| {
                let ground = Ground { state, owner, kind, keys: &keys, time: Time::new(now, steady.left()) };
                journal::prepare(&ground, &made, cause).map(|part| (part, ()))
            })
            .await;
        match proposed {
            Ok(_) => {}
            // Whether it was committed is not known: the key must stay until the next start knows.
            Err(error @ ProposeError::Unknown(..)) => return Err(error.into()),
            Err(error) => {
                self.discard(&key_id).await;
                return Err(error.into());
            }
        }
        match kind {
            AuthorityKind::X509 => {
                metrics::counter!("ca.manager.x509_ca.prepare").increment(1);
                announce("X509 CA prepared", &slot);
            }
            AuthorityKind::Jwt => {
                metrics::counter!("ca.manager.jwt_key.prepare").increment(1);
                announce("JWT key prepared", &slot);
            }
        }
        Ok(slot)
    }

    /// The journal line of a new authority.
    fn describe(
        &self,
        kind: AuthorityKind,
        key_id: &Arc<str>,
        public_key: bytes::Bytes,
    ) -> Result<AuthoritySlot, AuthorityError> {
        let inner = &self.inner;
        let now = self.now();
        let (authority_id, not_after, certificate) = match kind {
            AuthorityKind::X509 => {
                let key = inner.keys.signer(key_id).ok_or(AuthorityError::KeyMismatch)?;
                let made = self_signed(key, &inner.policy, &inner.entropy, now).map_err(AuthorityError::Issue)?;
                (made.authority_id.into(), made.not_after, Some(made.certificate))
            }
            AuthorityKind::Jwt => {
                let validity = super::profile::validity(inner.policy.ca_ttl, None, now)
                    .map_err(|error| AuthorityError::Issue(super::IssueError::Profile(error)))?;
                (inner.entropy.alphanumeric(32).into(), validity.not_after, None)
            }
        };
        Ok(AuthoritySlot {
            owner: inner.owner,
            kind,
            authority_id,
            key_id: Arc::clone(key_id),
            status: SlotStatus::Prepared,
            issued_at: super::profile::from_unix_seconds(super::profile::unix_seconds(now)),
            not_after,
            certificate,
            upstream_chain: Vec::new(),
            public_key,
        })
    }

    /// Removes a key that is in no journal. A failure is no harm: the next start finds it in no record.
    async fn discard(&self, key_id: &str) {
        if let Err(error) = self.inner.keys.delete(key_id).await {
            tracing::warn!(error = runtime::telemetry::chain(&error), "Unused signing key could not be removed");
        }
    }

    /// Activates a prepared authority; if its key turns out to be gone, its line is marked as lost instead.
    async fn switch_or_lose(&self, kind: AuthorityKind, authority_id: &str) -> Result<(), AuthorityError> {
        match self.switch(kind, authority_id, Cause::Schedule).await {
            Err(AuthorityError::KeyMismatch) => self.lose(vec![(kind, authority_id.into())]).await,
            other => other.map(drop),
        }
    }

    /// Activates a prepared authority after proving that its key is the published one.
    async fn switch(
        &self,
        kind: AuthorityKind,
        authority_id: &str,
        cause: Cause,
    ) -> Result<Arc<AuthoritySlot>, AuthorityError> {
        let inner = &self.inner;
        self.key_type(kind)?;
        let state = inner.replica.current().await.map_err(AuthorityError::State)?;
        let slots = self.slots(&state, kind);
        let slot = slots.iter().find(|slot| *slot.authority_id == *authority_id);
        let slot = slot.ok_or(AuthorityError::Refused(Refusal::UnexpectedAuthority))?;
        if cause == Cause::Operator && slot.status != SlotStatus::Prepared {
            return Err(AuthorityError::Refused(Refusal::NotPrepared));
        }
        let key = inner.keys.signer(&slot.key_id).ok_or(AuthorityError::KeyMismatch)?;
        prove(&*key, slot, &inner.entropy.bytes())?;

        let (owner, steady, wanted) = (inner.owner, inner.steady.clone(), Arc::clone(&slot.authority_id));
        let keys = self.keys_at_hand(&state);
        let receipt = inner
            .committer
            .propose(Urgency::Vital, move |state: &State, now| {
                let ground = Ground { state, owner, kind, keys: &keys, time: Time::new(now, steady.left()) };
                journal::activate(&ground, &wanted, cause)
            })
            .await?;
        let activated = receipt.value;
        self.refresh()?;
        match kind {
            AuthorityKind::X509 => {
                metrics::counter!("ca.manager.x509_ca.activate").increment(1);
                self.show_expiration(&activated);
                announce("X509 CA activated", &activated);
            }
            AuthorityKind::Jwt => {
                metrics::counter!("manager.jwt_key.activate").increment(1);
                announce("JWT key activated", &activated);
            }
        }
        Ok(activated)
    }

    /// Shows when the active X.509 authority ends, for alarms.
    fn show_expiration(&self, slot: &AuthoritySlot) {
        let end = super::profile::unix_seconds(slot.not_after);
        let left = end.saturating_sub(super::profile::unix_seconds(self.inner.clock.now()));
        let trust_domain = self.inner.policy.trust_domain.as_str();
        metrics::gauge!("manager.x509_ca.rotate.expiration", "trust_domain_id" => trust_domain.to_owned())
            .set(end as f64);
        metrics::gauge!("manager.x509_ca.rotate.ttl", "trust_domain_id" => trust_domain.to_owned()).set(left as f64);
    }

    /// Carries out one step that takes something away. Whether the clocks agree is read again for the decision.
    async fn remove(
        &self,
        kind: AuthorityKind,
        removal: &Step,
        keys: BTreeSet<Arc<str>>,
    ) -> Result<(), AuthorityError> {
        let inner = &self.inner;
        let (owner, steady, step) = (inner.owner, inner.steady.clone(), removal.clone());
        let receipt = inner
            .committer
            .propose(Urgency::Shrinking, move |state: &State, now| {
                let ground = Ground { state, owner, kind, keys: &keys, time: Time::new(now, steady.left()) };
                match &step {
                    Step::Withdraw(id) => journal::withdraw(&ground, id),
                    Step::Retire(id) => journal::retire(&ground, id),
                    Step::Forget(id) => journal::forget(&ground, id),
                    Step::Prepare | Step::Activate(_) | Step::Wait(_) => Err(Refusal::Overtaken),
                }
            })
            .await?;
        if let Step::Withdraw(id) = removal {
            tracing::warn!(
                local_authority_id = %id,
                kind = ?kind,
                "An authority that begins in the future was withdrawn: the clock was ahead when it was made"
            );
        }
        let key_id = receipt.value;
        // Who is signing with it at this moment holds the key until then.
        match removal {
            // Nothing but the key tells that this is still to be done, so its failure is one.
            Step::Retire(_) => inner.keys.delete(&key_id).await.map_err(AuthorityError::Keys),
            _ => {
                self.discard(&key_id).await;
                Ok(())
            }
        }
    }
}

/// What a step that was due came to.
fn stepped(done: Result<(), AuthorityError>) -> Result<Progress, AuthorityError> {
    match done {
        Ok(()) | Err(AuthorityError::Refused(Refusal::Overtaken)) => Ok(Progress::Stepped),
        Err(error) => Err(error),
    }
}

/// Tells operators and their scripts, in the words they know, what happened to which authority.
fn announce(message: &'static str, slot: &AuthoritySlot) {
    let (issued_at, expiration) = (rfc3339(slot.issued_at), rfc3339(slot.not_after));
    match slot.kind {
        AuthorityKind::X509 => tracing::info!(
            slot = %slot.key_id,
            issued_at,
            expiration,
            self_signed = slot.upstream_chain.is_empty(),
            local_authority_id = %slot.authority_id,
            "{message}"
        ),
        AuthorityKind::Jwt => tracing::info!(
            slot = %slot.key_id,
            issued_at,
            expiration,
            local_authority_id = %slot.authority_id,
            "{message}"
        ),
    }
}
