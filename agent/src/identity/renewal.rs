//! Getting the first SVID and each next one.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use runtime::backoff::Backoff;
use runtime::shutdown::Shutdown;
use spiffe::renew::{Validity, may_replace, retry_within};
use spiffe::x509::{PrivateKey, X509Svid};

use super::{AgentData, AgentSvid, Decision, Denial, Identity, IdentityError, UnknownAuthority, Unwritten};
use crate::keys::{KeyError, certificate_request, new_agent_key};
use crate::server_link::{AttestError, LinkError, ServerLink};

/// How long a failed attempt is waited out.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How soon after a failed attempt the next one comes when the SVID is about to run out.
const LEAST_RETRY: Duration = Duration::from_millis(250);
/// An attempt gets at least this long, however little is left of the SVID.
const SHORTEST_ATTEMPT: Duration = Duration::from_secs(1);
/// How long the first attestation is tried before the process gives up, as SPIRE's agent does.
const FIRST_PATIENCE: Duration = Duration::from_secs(60);

impl Identity {
    /// Makes sure that there are an SVID and a bundle: those that were stored, or by attesting. Without a stored
    /// identity this is given up after a minute, or as soon as it is clear that it cannot succeed.
    pub async fn establish(&self, link: &ServerLink, shutdown: &Shutdown) -> Result<(), IdentityError> {
        let give_up_at = self.inner.clock.boot() + FIRST_PATIENCE;
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        while !shutdown.is_requested() {
            let ahead = self.inner.clock.ahead();
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
            let left = give_up_at.saturating_sub(self.inner.clock.boot());
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
                // What is stored may be valid now.
                () = self.inner.clock.stepped(ahead) => {}
                () = shutdown.requested() => {}
            }
            if self.svid().is_none() {
                self.take_up();
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
        let mut write_backoff = Backoff::new(RETRY.0, RETRY.1);
        // Moments of the boot clock, which nobody sets.
        let (mut retry_at, mut write_at) = (Duration::ZERO, Duration::ZERO);
        let mut reattest: Option<u64> = None;
        let mut replaced_at: Option<Duration> = None;
        while !shutdown.is_requested() {
            let decided = self.inner.judging().decided.take();
            match decided {
                Some(Decision::Forget(denial)) => {
                    let agent = self.svid().filter(|svid| !svid.reattestable).map(|svid| svid.svid.id.clone());
                    return Err(self.forget(IdentityError::Denied { denial, agent }).await);
                }
                Some(Decision::UnknownAuthority) => return Err(self.unknown_authority().await),
                Some(Decision::Reattest(denial)) => {
                    tracing::warn!(reason = %denial, "Attesting anew");
                    if denial == Denial::NotActive {
                        self.replaced(&mut replaced_at);
                    }
                    reattest = self.svid().map(|svid| svid.number);
                    retry_at = Duration::ZERO;
                }
                None => {}
            }
            let Some(current) = self.svid() else {
                self.attest(link).await?;
                continue;
            };
            let must_reattest = reattest == Some(current.number);
            let (ahead, now, boot) = (self.inner.clock.ahead(), self.inner.clock.now(), self.inner.clock.boot());
            let until = |at: SystemTime| at.duration_since(now).unwrap_or_default();
            let unwritten = self.inner.unwritten().as_ref().map(|unwritten| unwritten.adopted);
            let waits = unwritten == Some(false) && !must_reattest;
            let until_next = if must_reattest {
                Duration::ZERO
            } else if waits {
                until(adopt_unwritten_at(current.validity()))
            } else {
                until(current.due_at(self.bundle().as_deref(), now)).max(retry_at.saturating_sub(boot))
            };
            let until_write = unwritten.map(|_| write_at.saturating_sub(boot));
            let wait = until_write.map_or(until_next, |write| until_next.min(write));
            if !wait.is_zero() {
                tokio::select! {
                    () = self.inner.nudge.nudged() => {}
                    () = self.inner.clock.sleep(wait) => {}
                    // What is due, and what is valid, are others now.
                    () = self.inner.clock.stepped(ahead) => {}
                    () = shutdown.requested() => {}
                }
                continue;
            }
            if until_write.is_some_and(|left| left.is_zero()) {
                let before = current.number;
                if self.write_again().await {
                    write_backoff.reset();
                } else {
                    write_at = self.inner.clock.boot() + write_backoff.next(&self.inner.entropy);
                }
                if self.svid().is_some_and(|svid| svid.number != before) {
                    link.renewed();
                }
                continue;
            }
            if waits {
                self.adopt_unwritten()?;
                link.renewed();
                continue;
            }
            // Not cut off by shutdown: an answer that the server has committed should reach the disk.
            match self.next(link, &current, must_reattest).await {
                Ok(()) => {
                    backoff.reset();
                    retry_at = Duration::ZERO;
                    if self.svid().is_some_and(|svid| svid.number != current.number) {
                        link.renewed();
                    }
                }
                Err(error) if self.is_final(&error, &current, must_reattest) => return Err(self.forget(error).await),
                Err(error) => {
                    // Counted from here: the attempt itself may have taken long.
                    let now = self.inner.clock.now();
                    let wait = backoff.next(&self.inner.entropy);
                    let wait = retry_within(wait, current.svid.not_after, now, LEAST_RETRY);
                    retry_at = self.inner.clock.boot() + wait;
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

    /// Notes that another SVID of this agent has taken the place of its newest one. Twice within the life of one, that is
    /// nobody's crash.
    fn replaced(&self, before: &mut Option<Duration>) {
        let Some(current) = self.svid() else { return };
        let (boot, life) = (self.inner.clock.boot(), current.svid.not_after.duration_since(current.svid.not_before));
        let last = before.replace(boot);
        if last.is_some_and(|last| boot.saturating_sub(last) < life.unwrap_or_default()) {
            metrics::counter!("agent_svid.node_key_used_twice").increment(1);
            tracing::error!(
                spiffe_id = %current.svid.id,
                "The same node key is used twice: another agent keeps replacing this agent's SVID. Two agents share one data \
                 directory, a copy of it, or one node certificate; give each its own, and attest both anew"
            );
        }
    }

    /// Tries once more to write the SVID that could not be written, and uses it then; whether it is written.
    async fn write_again(&self) -> bool {
        let Some(unwritten) = self.inner.unwritten().clone() else { return true };
        if let Err(error) = self.write(&unwritten).await {
            tell_unwritten(&error, unwritten.adopted);
            return false;
        }
        tracing::info!(spiffe_id = %unwritten.svid.id, "The agent's SVID is on disk again");
        *self.inner.unwritten() = None;
        if !unwritten.adopted {
            let Unwritten { svid, key, reattestable, received_at, .. } = unwritten;
            if let Err(error) = self.adopt(svid, key, reattestable, received_at) {
                tracing::error!(error = runtime::telemetry::chain(&error), "The agent's new SVID cannot be used");
            }
        }
        true
    }

    /// Uses the SVID that could not be written: the one before it is almost over.
    fn adopt_unwritten(&self) -> Result<(), IdentityError> {
        let unwritten = {
            let mut unwritten = self.inner.unwritten();
            let Some(unwritten) = unwritten.as_mut() else { return Ok(()) };
            unwritten.adopted = true;
            unwritten.clone()
        };
        tracing::error!(
            spiffe_id = %unwritten.svid.id,
            "The agent's new SVID is used although it could not be written: an agent that is started anew before it can be \
             has to attest anew. Make the data directory writable"
        );
        self.adopt(unwritten.svid, unwritten.key, unwritten.reattestable, unwritten.received_at)
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
        Err(IdentityError::Expired { agent: current.svid.id.clone() })
    }

    /// Whether nothing that this process can do will help.
    fn is_final(&self, error: &IdentityError, current: &AgentSvid, must_reattest: bool) -> bool {
        let expired = current.svid.not_after <= self.inner.clock.now();
        match error {
            IdentityError::Expired { .. } => true,
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
        let attested = self.in_time(link.attest(&*self.inner.prover, csr)).await;
        let attested = attested.unwrap_or(Err(AttestError::Deadline)).map_err(IdentityError::Attest)?;
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
        let chain = self.in_time(link.renew(csr)).await;
        let chain = chain.unwrap_or(Err(LinkError::Deadline)).map_err(IdentityError::Renew)?;
        self.take(chain, key, current.reattestable).await?;
        tracing::info!(spiffe_id = %current.svid.id, "Renewed the agent's SVID");
        Ok(())
    }

    /// Waits for the server no longer than half of what is left of the SVID in use, so that there is time for another
    /// attempt: perhaps another address answers.
    async fn in_time<T>(&self, attempt: impl Future<Output = T>) -> Option<T> {
        let left =
            self.svid().map(|svid| svid.svid.not_after.duration_since(self.inner.clock.now()).unwrap_or_default());
        match left.filter(|left| !left.is_zero()) {
            Some(left) => tokio::time::timeout((left / 2).max(SHORTEST_ATTEMPT), attempt).await.ok(),
            None => Some(attempt.await),
        }
    }

    /// A new key, kept before anybody signs for it if that can be done, and its request.
    async fn new_key(&self) -> Result<(Arc<PrivateKey>, Bytes), IdentityError> {
        let (keys, current) = (Arc::clone(&self.inner.keys), self.current_key());
        let in_use = self.svid().is_some();
        let make = move || {
            let key = new_agent_key()?;
            match keys.keep(&key, current.as_deref()) {
                Ok(()) => {}
                // Whoever has an identity goes on with it: the key is written with its SVID, as soon as that can be done.
                Err(error) if in_use => tell_unwritten(&error, false),
                Err(error) => return Err(error),
            }
            let csr = certificate_request(&key, None)?;
            Ok((key, csr))
        };
        tokio::task::spawn_blocking(make)
            .await
            .map_err(|_| KeyError::Interrupted)
            .and_then(|made| made)
            .map_err(IdentityError::Key)
    }

    /// The public half of the key that must not be overwritten: that of the SVID which the next start would use.
    fn current_key(&self) -> Option<Bytes> {
        // What is stored may seem to be over because the clock is wrong: until it has a successor, its key stays.
        let stored = self.inner.data().svid.clone();
        X509Svid::from_chain(stored).ok().map(|svid| svid.spki_der)
    }

    /// Checks what the server signed, stores it, then uses it. What cannot be stored waits, as long as the one in use has
    /// more than a quarter of its life left.
    async fn take(&self, chain: Vec<Bytes>, key: Arc<PrivateKey>, reattestable: bool) -> Result<(), IdentityError> {
        let svid = X509Svid::from_chain(chain).map_err(IdentityError::Svid)?;
        svid.check_key(&key).map_err(IdentityError::Svid)?;
        let trust_domain = &self.inner.trust_domain;
        if !svid.id.is_member_of(trust_domain) || svid.id.is_server() {
            return Err(IdentityError::Foreign(svid.id));
        }
        let (held, now) = (self.svid().map(|svid| svid.validity()), self.inner.clock.now());
        let validity = Validity { not_before: svid.not_before, not_after: svid.not_after };
        if !may_replace(held, validity, now) {
            return Err(IdentityError::ClockDisagrees);
        }
        let mut taken = Unwritten { svid, key, reattestable, received_at: now, adopted: false };
        if let Err(error) = self.write(&taken).await {
            let Some(held) = held else { return Err(error) };
            taken.adopted = now >= adopt_unwritten_at(held);
            tell_unwritten(&error, taken.adopted);
            let adopted = taken.adopted;
            *self.inner.unwritten() = Some(taken.clone());
            if !adopted {
                return Ok(());
            }
        } else {
            *self.inner.unwritten() = None;
        }
        self.adopt(taken.svid, taken.key, taken.reattestable, taken.received_at)
    }

    /// Writes an SVID and its key.
    async fn write(&self, new: &Unwritten) -> Result<(), IdentityError> {
        let (keys, key, current) = (Arc::clone(&self.inner.keys), Arc::clone(&new.key), self.current_key());
        let keep = move || match keys.find(key.public_key().spki_der()) {
            Some(_) => Ok(()),
            None => keys.keep(&key, current.as_deref()),
        };
        let kept = tokio::task::spawn_blocking(keep).await.map_err(|_| KeyError::Interrupted).and_then(|kept| kept);
        kept.map_err(IdentityError::Key)?;
        let (stored, reattestable) = (new.svid.chain.clone(), new.reattestable);
        self.remember(move |data| {
            data.svid = stored;
            data.reattestable = reattestable;
        })
        .await
        .map_err(IdentityError::Data)
    }
}

/// From when on an SVID that could not be written is used: in the last quarter of the life of the one before, so that an
/// agent that is started anew sooner finds one on disk that the server still takes.
fn adopt_unwritten_at(held: Validity) -> SystemTime {
    let life = held.not_after.duration_since(held.not_before).unwrap_or_default();
    held.not_after.checked_sub(life / 4).unwrap_or(held.not_after)
}

fn tell_unwritten(error: &dyn std::error::Error, adopted: bool) {
    metrics::counter!("agent_svid.write.failures").increment(1);
    tracing::error!(
        error = runtime::telemetry::chain(error),
        in_use = adopted,
        "The agent's new SVID cannot be written; it is kept in memory and tried again. Make the data directory writable"
    );
}
