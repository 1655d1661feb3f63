//! Getting the first SVID and each next one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use runtime::backoff::Backoff;
use runtime::shutdown::Shutdown;
use spiffe::renew::retry_within;
use spiffe::x509::{PrivateKey, X509Svid};

use super::{AgentData, AgentSvid, Decision, Identity, IdentityError, UnknownAuthority};
use crate::keys::{KeyError, certificate_request};
use crate::server_link::{AttestError, ServerLink};

/// How long a failed attempt is waited out.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How soon after a failed attempt the next one comes when the SVID is about to run out.
const LEAST_RETRY: Duration = Duration::from_millis(250);
/// How long the first attestation is tried before the process gives up, as SPIRE's agent does.
const FIRST_PATIENCE: Duration = Duration::from_secs(60);

impl Identity {
    /// Makes sure that there are an SVID and a bundle: those that were stored, or by attesting. Without a stored
    /// identity this is given up after a minute, or as soon as it is clear that it cannot succeed.
    pub async fn establish(&self, link: &ServerLink, shutdown: &Shutdown) -> Result<(), IdentityError> {
        let give_up_at = self.inner.clock.now() + FIRST_PATIENCE;
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        while !shutdown.is_requested() {
            let result = match (self.svid(), self.bundle()) {
                (Some(svid), Some(_)) => {
                    let required =
                        matches!(self.inner.unknown_authority, UnknownAuthority::Rebootstrap { required: true, .. });
                    return if required && !svid.reattestable { Err(IdentityError::CannotRebootstrap) } else { Ok(()) };
                }
                (Some(_), None) => self.fetch_first_bundle(link).await,
                (None, _) => self.attest(link).await,
            };
            let Err(error) = result else { continue };
            let left = give_up_at.duration_since(self.inner.clock.now()).unwrap_or_default();
            if !error.is_retryable() || left.is_zero() {
                return Err(error);
            }
            let wait = backoff.next(&self.inner.entropy).min(left);
            tracing::warn!(
                error = runtime::telemetry::chain(&error),
                retry_in = ?wait,
                "Could not attest this node"
            );
            tokio::select! {
                () = self.inner.clock.sleep(wait) => {}
                () = shutdown.requested() => {}
            }
        }
        Ok(())
    }

    async fn fetch_first_bundle(&self, link: &ServerLink) -> Result<(), IdentityError> {
        let bundle = Arc::new(link.bundle_as_nobody().await.map_err(IdentityError::Attest)?);
        self.adopt_bundle(&bundle).await;
        match self.bundle() {
            Some(_) => Ok(()),
            None => Err(IdentityError::Attest(AttestError::Malformed("a bundle without authorities"))),
        }
    }

    /// Renews the SVID whenever it is due and reacts to what the server says of it, until `shutdown`. An error is the
    /// end of this identity: the process has to stop.
    pub async fn keep(&self, link: &ServerLink, shutdown: &Shutdown) -> Result<(), IdentityError> {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut retry_at: Option<SystemTime> = None;
        let mut reattest: Option<u64> = None;
        while !shutdown.is_requested() {
            let decided = self.inner.judging().decided.take();
            match decided {
                Some(Decision::Forget(denial)) => return Err(self.forget(IdentityError::Denied(denial)).await),
                Some(Decision::UnknownAuthority) => return Err(self.unknown_authority().await),
                Some(Decision::Reattest(denial)) => {
                    tracing::warn!(reason = %denial, "Attesting anew");
                    reattest = self.svid().map(|svid| svid.number);
                    retry_at = None;
                }
                None => {}
            }
            let Some(current) = self.svid() else { return Err(IdentityError::Expired) };
            let must_reattest = reattest == Some(current.number);
            let now = self.inner.clock.now();
            // A moment further off than the longest wait was noted by a clock that was ahead and has been set right.
            retry_at = retry_at.filter(|at| *at <= now + RETRY.1);
            let due_at = if must_reattest { now } else { current.due_at(self.bundle().as_deref(), now) };
            let wake_at = due_at.max(retry_at.unwrap_or(due_at));
            if wake_at > now {
                tokio::select! {
                    () = self.inner.nudge.nudged_or_at(&self.inner.clock, Some(wake_at)) => {}
                    // The clock may be set back meanwhile, and these moments were read from it.
                    () = self.inner.clock.sleep(RETRY.1) => {}
                    () = shutdown.requested() => {}
                }
                continue;
            }
            // Not cut off by shutdown: an answer that the server has committed should reach the disk.
            match self.next(link, &current, must_reattest).await {
                Ok(()) => {
                    backoff.reset();
                    retry_at = None;
                    link.renewed();
                }
                Err(error) if self.is_final(&error, &current, must_reattest) => return Err(self.forget(error).await),
                Err(error) => {
                    // Counted from here: the attempt itself may have taken long.
                    let now = self.inner.clock.now();
                    let wait = backoff.next(&self.inner.entropy);
                    let wait = retry_within(wait, current.svid.not_after, now, LEAST_RETRY);
                    retry_at = now.checked_add(wait);
                    let left = current.svid.not_after.duration_since(now).unwrap_or_default();
                    tracing::warn!(
                        error = runtime::telemetry::chain(&error),
                        retry_in = ?wait,
                        svid_ends_in = runtime::duration::format(Duration::from_secs(left.as_secs())),
                        "Could not renew the agent's SVID"
                    );
                    metrics::counter!("agent_svid.rotate.failures").increment(1);
                }
            }
        }
        Ok(())
    }

    async fn next(&self, link: &ServerLink, current: &AgentSvid, must_reattest: bool) -> Result<(), IdentityError> {
        if must_reattest || current.reattestable {
            return self.attest(link).await;
        }
        if current.svid.not_after > self.inner.clock.now() {
            return self.renew(link, current).await;
        }
        // Without a valid SVID it cannot be renewed, nor attested for again. But it is this machine's clock that says so,
        // and what workloads hold may still be good: this process ends only when the server says the same, by being
        // there, before and after, for anybody but the holder of this SVID.
        link.bundle_as_nobody().await.map_err(IdentityError::Attest)?;
        match self.renew(link, current).await {
            Err(IdentityError::Renew(error)) if error.is_without_answer() => {}
            result => return result,
        }
        link.bundle_as_nobody().await.map_err(IdentityError::Attest)?;
        Err(IdentityError::Expired)
    }

    /// Whether nothing that this process can do will help.
    fn is_final(&self, error: &IdentityError, current: &AgentSvid, must_reattest: bool) -> bool {
        let expired = current.svid.not_after <= self.inner.clock.now();
        match error {
            IdentityError::Expired => true,
            // While the SVID is good, an attestation that is refused is no reason to stop.
            IdentityError::Attest(error) => (must_reattest || expired) && !error.is_retryable(),
            _ => false,
        }
    }

    /// Deletes the SVID, because of `error`.
    async fn forget(&self, error: IdentityError) -> IdentityError {
        self.inner.rotating.clear();
        let deleted = self.remember(|data| {
            data.svid = Vec::new();
            data.reattestable = false;
        });
        match deleted.await {
            Ok(()) => error,
            Err(problem) => {
                tracing::error!(error = runtime::telemetry::chain(&error), "The agent's identity is at its end");
                IdentityError::Data(problem)
            }
        }
    }

    async fn unknown_authority(&self) -> IdentityError {
        let rebootstraps = matches!(self.inner.unknown_authority, UnknownAuthority::Rebootstrap { .. });
        if !rebootstraps || !self.inner.is_reattestable() {
            return IdentityError::UnknownAuthority;
        }
        match self.remember(|data| *data = AgentData::default()).await {
            Ok(()) => IdentityError::Rebootstrap,
            Err(problem) => IdentityError::Data(problem),
        }
    }

    async fn attest(&self, link: &ServerLink) -> Result<(), IdentityError> {
        let (key, csr) = self.new_key().await?;
        let attested = link.attest(&*self.inner.prover, csr).await.map_err(IdentityError::Attest)?;
        let bundle = attested.bundle.filter(|bundle| !bundle.x509.is_empty()).map(Arc::new);
        self.take(attested.chain, key, attested.reattestable).await?;
        if let Some(bundle) = bundle {
            self.adopt_bundle(&bundle).await;
        }
        if let Some(svid) = self.svid() {
            tracing::info!(spiffe_id = %svid.svid.id, reattestable = svid.reattestable, "Node attestation succeeded");
        }
        Ok(())
    }

    async fn renew(&self, link: &ServerLink, current: &AgentSvid) -> Result<(), IdentityError> {
        let (key, csr) = self.new_key().await?;
        let chain = link.renew(csr).await.map_err(IdentityError::Renew)?;
        self.take(chain, key, current.reattestable).await?;
        tracing::info!(spiffe_id = %current.svid.id, "Renewed the agent's SVID");
        Ok(())
    }

    /// A new key, kept before anybody signs for it, and its request.
    async fn new_key(&self) -> Result<(Arc<PrivateKey>, Bytes), IdentityError> {
        let keys = Arc::clone(&self.inner.keys);
        let current = match self.svid() {
            Some(svid) => Some(svid.svid.spki_der.clone()),
            // What is stored may seem to be over because the clock is wrong: until it has a successor, its key stays.
            None => {
                let stored = self.inner.data().svid.clone();
                X509Svid::from_chain(stored).ok().map(|svid| svid.spki_der)
            }
        };
        let make = move || {
            let key = keys.create(current.as_deref())?;
            let csr = certificate_request(&key, None)?;
            Ok((key, csr))
        };
        tokio::task::spawn_blocking(make)
            .await
            .map_err(|_| KeyError::Interrupted)
            .and_then(|made| made)
            .map_err(IdentityError::Key)
    }

    /// Checks what the server signed, stores it, then uses it.
    async fn take(&self, chain: Vec<Bytes>, key: Arc<PrivateKey>, reattestable: bool) -> Result<(), IdentityError> {
        let svid = X509Svid::from_chain(chain).map_err(IdentityError::Svid)?;
        svid.check_key(&key).map_err(IdentityError::Svid)?;
        let trust_domain = &self.inner.trust_domain;
        if !svid.id.is_member_of(trust_domain) || svid.id.is_server() {
            return Err(IdentityError::Foreign(svid.id));
        }
        let stored = svid.chain.clone();
        self.remember(move |data| {
            data.svid = stored;
            data.reattestable = reattestable;
        })
        .await
        .map_err(IdentityError::Data)?;
        self.adopt(svid, key, reattestable, self.inner.clock.now())
    }
}
