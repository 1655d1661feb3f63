//! Getting the first SVID and each next one.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use runtime::backoff::Backoff;
use runtime::shutdown::Shutdown;
use spiffe::renew::{Succession, Validity, patience, retry_within, succeed, succeed_stored};
use spiffe::x509::{PrivateKey, X509Svid};

use super::next::{Held, Move, Situation, next_move};
use super::{AgentData, AgentSvid, Decision, Denial, Identity, IdentityError, UnknownAuthority};
use crate::keys::{KeyError, certificate_request};
use crate::server_link::{AttestError, ServerLink};

/// How long a failed attempt is waited out.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How soon after a failed attempt the next one comes when the SVID is about to run out.
const LEAST_RETRY: Duration = Duration::from_millis(250);
/// How long the first attestation is tried before the process gives up, as SPIRE's agent does.
const FIRST_PATIENCE: Duration = Duration::from_secs(60);
/// How long one attempt may take when there is no valid SVID that it could outlive.
const ATTEMPT: Duration = Duration::from_secs(120);

/// An SVID that the server signed, and its key.
struct Next {
    svid: X509Svid,
    key: Arc<PrivateKey>,
    reattestable: bool,
    stored: bool,
}

impl Next {
    fn held(&self) -> Held {
        let validity = Validity { not_before: self.svid.not_before, not_after: self.svid.not_after };
        Held { validity, stored: self.stored }
    }
}

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
                (None, _) => self.attest(link, ATTEMPT).await.map(drop),
            };
            let Err(error) = result else { continue };
            let left = give_up_at.saturating_sub(self.inner.clock.boot());
            if !error.is_retryable() || left.is_zero() {
                return Err(self.without_way_back(error));
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

    /// What ends this start: for an agent whose stored SVID is over and whose join token is used up, that, with the commands
    /// that bring it back. A server that cannot be reached says nothing about either.
    fn without_way_back(&self, error: IdentityError) -> IdentityError {
        let answered = matches!(
            &error,
            IdentityError::Attest(AttestError::Status(_) | AttestError::Refused(_) | AttestError::Prove(_))
        );
        let stored = {
            let data = self.inner.data();
            (!data.disk.reattestable).then(|| data.disk.svid.clone())
        };
        let agent = stored.and_then(|chain| X509Svid::from_chain(chain).ok()).map(|svid| svid.id);
        match agent.filter(|id| answered && id.is_member_of(&self.inner.trust_domain)) {
            Some(agent) => {
                tracing::error!(error = runtime::telemetry::chain(&error), "The stored identity has ended");
                IdentityError::Expired { agent }
            }
            None => error,
        }
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
        let (mut asking, mut writing) = (Backoff::new(RETRY.0, RETRY.1), Backoff::new(RETRY.0, RETRY.1));
        let (mut ask_at, mut write_at) = (Duration::ZERO, Duration::ZERO);
        let mut next: Option<Next> = None;
        let mut reattest: Option<u64> = None;
        let mut replaced_at: Option<Duration> = None;
        while !shutdown.is_requested() {
            let decided = self.inner.judging().decided.take();
            match decided {
                Some(Decision::Forget(denial)) => {
                    // Scripts wait for these words of SPIRE's, and for those below.
                    match denial {
                        Denial::Banned => tracing::error!("Agent is banned: removing SVID and shutting down"),
                        _ => tracing::error!(
                            reason = %denial,
                            "Agent needs to re-attest: removing SVID and shutting down"
                        ),
                    }
                    let agent = self.svid().filter(|svid| !svid.reattestable).map(|svid| svid.svid.id.clone());
                    return Err(self.forget(IdentityError::Denied { denial, agent }).await);
                }
                Some(Decision::UnknownAuthority) => return Err(self.unknown_authority().await),
                Some(Decision::Reattest(denial)) => {
                    tracing::warn!(reason = %denial, "Agent needs to re-attest; will attempt to re-attest");
                    if denial == Denial::NotActive {
                        self.replaced(&mut replaced_at);
                    }
                    reattest = self.svid().map(|svid| svid.number);
                    ask_at = Duration::ZERO;
                    self.withdraw(&mut next);
                }
                None => {}
            }
            let Some(current) = self.svid() else {
                self.attest(link, ATTEMPT).await?;
                continue;
            };
            let must_reattest = reattest == Some(current.number);
            let (ahead, now, boot) = (self.inner.clock.ahead(), self.inner.clock.now(), self.inner.clock.boot());
            let due_at = if must_reattest { now } else { current.due_at(self.bundle().as_deref(), now) };
            let move_ = next_move(&Situation {
                now,
                boot,
                current: current.validity(),
                due_at,
                held: next.as_ref().map(Next::held),
                unwritten: self.inner.unwritten.load(Ordering::SeqCst),
                ask_at,
                write_at,
            });
            let asked = match move_ {
                Move::Wait { until, lasting } => {
                    self.wait(until, lasting, ahead, shutdown).await;
                    if self.inner.clock.was_set_since(ahead) {
                        // What failed by a wrong clock may go well at once.
                        asking.reset();
                        ask_at = Duration::ZERO;
                    }
                    continue;
                }
                Move::Drop => {
                    tracing::info!("The clock was set: the agent's next SVID is not valid by it and is asked for anew");
                    self.withdraw(&mut next);
                    continue;
                }
                Move::Write => {
                    let _ = self.remember(|_| {}).await;
                    Ok(next.take())
                }
                // Not cut off by shutdown: an answer that the server has committed should reach the disk.
                Move::Ask => self.ask(link, &current, must_reattest).await,
                Move::Settle => match next.take() {
                    Some(next) => self.settle(next).await,
                    None => Ok(None),
                },
            };
            if self.inner.unwritten.load(Ordering::SeqCst) {
                write_at = self.inner.clock.boot() + writing.next(&self.inner.entropy);
            } else {
                writing.reset();
            }
            match asked {
                Ok(held) => {
                    next = held;
                    if self.newest() != current.number {
                        asking.reset();
                        ask_at = Duration::ZERO;
                        link.renewed();
                    }
                }
                Err(error) if self.is_final(&error, &current, must_reattest) => return Err(self.forget(error).await),
                Err(error) => {
                    // Counted from here: the attempt itself may have taken long.
                    let now = self.inner.clock.now();
                    let wait = asking.next(&self.inner.entropy);
                    let wait = retry_within(wait, current.svid.not_after, now, LEAST_RETRY);
                    ask_at = self.inner.clock.boot() + wait;
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

    /// Waits until the wall clock shows `until`, for `lasting`, for a nudge, or until the clock, which was `ahead`, is set:
    /// every moment that was read from it has to be looked at again then.
    async fn wait(&self, until: Option<SystemTime>, lasting: Option<Duration>, ahead: i128, shutdown: &Shutdown) {
        let clock = &self.inner.clock;
        let lasted = async {
            match lasting {
                Some(lasting) => clock.sleep(lasting).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.inner.nudge.nudged_or_at(clock, until) => {}
            () = lasted => {}
            () = clock.stepped(ahead) => {}
            () = shutdown.requested() => {}
        }
    }

    /// Gives up what was signed and is not in use, on disk as well.
    fn withdraw(&self, next: &mut Option<Next>) {
        if next.take().is_none() {
            return;
        }
        if let Some(current) = self.svid() {
            let mut data = self.inner.data();
            data.wanted.svid = current.svid.chain.clone();
            data.wanted.reattestable = current.reattestable;
        }
    }

    /// Asks for the next SVID. An attempt never outlasts the one that is valid.
    async fn ask(
        &self,
        link: &ServerLink,
        current: &AgentSvid,
        must_reattest: bool,
    ) -> Result<Option<Next>, IdentityError> {
        let left = patience(current.validity(), self.inner.clock.now());
        let patience = left.map_or(ATTEMPT, |left| left.min(ATTEMPT));
        if must_reattest || current.reattestable {
            return self.attest(link, patience).await;
        }
        if current.svid.not_after > self.inner.clock.now() {
            return self.renew(link, current, patience).await;
        }
        // Without a valid SVID it cannot be renewed, nor attested for again. But it is this machine's clock that says so,
        // and what workloads hold may still be good: this process ends only when the server says the same, by being
        // there, before and after, for anybody but the holder of this SVID.
        link.bundle_as_nobody().await.map_err(IdentityError::Attest)?;
        match self.renew(link, current, patience).await {
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
                problem
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
            Err(problem) => problem,
        }
    }

    async fn attest(&self, link: &ServerLink, patience: Duration) -> Result<Option<Next>, IdentityError> {
        let again = self.svid().is_some();
        let (key, csr) = self.new_key().await?;
        let attested = link.attest(&*self.inner.prover, csr, patience).await.map_err(IdentityError::Attest)?;
        let bundle = attested.bundle.filter(|bundle| !bundle.x509.is_empty()).map(Arc::new);
        let next = self.offer(attested.chain, key, attested.reattestable).await?;
        if let Some(bundle) = bundle {
            self.adopt_bundle(&bundle).await;
        }
        if let Some(svid) = self.svid() {
            let (spiffe_id, reattestable) = (&svid.svid.id, svid.reattestable);
            if again {
                tracing::info!(%spiffe_id, reattestable, "Successfully reattested node");
            } else {
                tracing::info!(%spiffe_id, reattestable, "Node attestation was successful");
            }
        }
        Ok(next)
    }

    async fn renew(
        &self,
        link: &ServerLink,
        current: &AgentSvid,
        patience: Duration,
    ) -> Result<Option<Next>, IdentityError> {
        let (key, csr) = self.new_key().await?;
        let chain = link.renew(csr, patience).await.map_err(IdentityError::Renew)?;
        let next = self.offer(chain, key, current.reattestable).await?;
        tracing::info!(spiffe_id = %current.svid.id, in_use = next.is_none(), "Successfully rotated agent SVID");
        Ok(next)
    }

    /// A new key, kept before anybody signs for it, and its request. An agent that has an identity goes on with a key that
    /// cannot be written; one that has none must not spend its proof on that.
    async fn new_key(&self) -> Result<(Arc<PrivateKey>, Bytes), IdentityError> {
        let keys = Arc::clone(&self.inner.keys);
        let svid = self.svid();
        let goes_on = svid.is_some();
        let current = match svid {
            Some(svid) => Some(svid.svid.spki_der.clone()),
            // What is stored may seem to be over because the clock is wrong: until it has a successor, its key stays.
            None => {
                let stored = self.inner.data().disk.svid.clone();
                X509Svid::from_chain(stored).ok().map(|svid| svid.spki_der)
            }
        };
        let make = move || {
            let key = keys.create(current.as_deref())?;
            let csr = certificate_request(&key, None)?;
            match keys.save() {
                Err(error) if !goes_on => Err(error),
                // Told when the SVID is to be written, which needs the key.
                _ => Ok((key, csr)),
            }
        };
        tokio::task::spawn_blocking(make)
            .await
            .map_err(|_| KeyError::Interrupted)
            .and_then(|made| made)
            .map_err(IdentityError::Key)
    }

    /// Checks what the server signed, and uses it if its time has come. Else it is given back.
    async fn offer(
        &self,
        chain: Vec<Bytes>,
        key: Arc<PrivateKey>,
        reattestable: bool,
    ) -> Result<Option<Next>, IdentityError> {
        let svid = X509Svid::from_chain(chain).map_err(IdentityError::Svid)?;
        svid.check_key(&key).map_err(IdentityError::Svid)?;
        let trust_domain = &self.inner.trust_domain;
        if !svid.id.is_member_of(trust_domain) || svid.id.is_server() {
            return Err(IdentityError::Foreign(svid.id));
        }
        self.settle(Next { svid, key, reattestable, stored: false }).await
    }

    /// Stores what is good enough to take the place of the SVID in use, then uses it.
    async fn settle(&self, mut next: Next) -> Result<Option<Next>, IdentityError> {
        let current = self.svid().map(|svid| svid.validity());
        let (validity, now) = (next.held().validity, self.inner.clock.now());
        if succeed(current, validity, now) == Succession::Now {
            let (stored, reattestable) = (next.svid.chain.clone(), next.reattestable);
            let written = self.remember(move |data| {
                data.svid = stored;
                data.reattestable = reattestable;
            });
            next.stored = written.await.is_ok();
        }
        let now = self.inner.clock.now();
        match succeed_stored(current, validity, next.stored, now) {
            Succession::Now => self.adopt(next.svid, next.key, next.reattestable, now).map(|()| None),
            Succession::At(_) => Ok(Some(next)),
            Succession::Never => Err(IdentityError::ClockDisagrees),
        }
    }
}
