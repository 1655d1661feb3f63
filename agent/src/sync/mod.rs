//! Keeps the agent's view equal to what the server authorises it for: pushed where the server can, polled where not.

mod offer;
pub mod plan;
mod poll;
mod push;

use std::time::Duration;

use runtime::backoff::Backoff;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::Shutdown;
use spiffe::id::TrustDomain;
use tokio::sync::watch;
use tonic::Code;

use self::plan::{Step, View};
use self::push::Ended;
pub use self::push::Parts;
use crate::cache::Cache;
use crate::identity::{Identity, Reaction};
use crate::server_link::{LinkError, ServerLink};

/// How long a server that does not answer is left alone; its return is noticed within the longest of these waits.
const RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The synchroniser of one agent.
pub struct Sync {
    /// The way to the server.
    pub link: ServerLink,
    /// Takes the own bundle.
    pub identity: Identity,
    /// Takes the view.
    pub cache: Cache,
    /// The own trust domain.
    pub trust_domain: TrustDomain,
    /// How often a server that does not push is asked.
    pub interval: Duration,
    /// This agent's version.
    pub version: &'static str,
    /// The time.
    pub clock: Clock,
    /// Randomness.
    pub entropy: Entropy,
}

impl Sync {
    /// Follows the server until `shutdown`.
    pub async fn run(&self, shutdown: Shutdown) {
        let mut view = View::default();
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut renewals = self.link.renewals();
        let mut announced = false;
        let mut asked_again = false;
        while !shutdown.is_requested() {
            renewals.mark_unchanged();
            announced = announced || self.announce().await;
            let mut served = false;
            let ended = push::follow(self, &mut view, &mut served, &shutdown).await;
            let failure = match ended {
                Ended::Retired => None,
                Ended::NotServed(connection) => self.poll(connection, &mut view, &mut served, &shutdown).await.err(),
                Ended::Failed(error) => Some(error),
                Ended::Silent | Ended::Differs | Ended::Malformed => {
                    tracing::warn!(reason = ?ended, "The stream of changes has to begin anew");
                    metrics::counter!("manager.sync.restarts").increment(1);
                    Some(LinkError::Deadline)
                }
            };
            if served {
                backoff.reset();
                asked_again = false;
            }
            let Some(error) = failure else { continue };
            // A denial that is to be asked for again is asked at once, but only once.
            if let LinkError::Denied { reaction: Reaction::AskAgain | Reaction::Disregard, .. } = error
                && !std::mem::replace(&mut asked_again, true)
            {
                continue;
            }
            let wait = backoff.next(&self.entropy);
            tracing::warn!(error = runtime::telemetry::chain(&error), retry_in = ?wait, "Not in touch with the server");
            metrics::counter!("manager.sync.failures").increment(1);
            self.wait(wait, &mut renewals, &shutdown).await;
        }
    }

    /// Waits, but no longer than until the agent has a new SVID, or until the clock is set: by a wrong one nobody could be
    /// believed.
    async fn wait(&self, wait: Duration, renewals: &mut watch::Receiver<u64>, shutdown: &Shutdown) {
        tokio::select! {
            () = self.clock.sleep(wait) => {}
            () = self.clock.stepped(self.clock.ahead()) => {}
            _ = renewals.changed() => {}
            () = shutdown.requested() => {}
        }
    }

    /// Tells the server which version this is; old servers do not want to know. Says whether that is done.
    async fn announce(&self) -> bool {
        match self.link.post_status(self.version).await {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(
                    error = runtime::telemetry::chain(&error),
                    "Could not tell the server this agent's version"
                );
                matches!(error, LinkError::Status(status) if !matches!(status.code(), Code::Unavailable | Code::Unknown))
            }
        }
    }

    /// Polls for as long as connection `number` lasts: its successor may be to a server that pushes.
    async fn poll(
        &self,
        number: u64,
        view: &mut View,
        served: &mut bool,
        shutdown: &Shutdown,
    ) -> Result<(), LinkError> {
        let mut renewals = self.link.renewals();
        tracing::debug!("The server does not push; polling");
        while !shutdown.is_requested() {
            let step = poll::ask(&self.link, view, &self.trust_domain).await?;
            view.position = None;
            self.take(view, step).await;
            *served = true;
            if self.link.connection() != number {
                break;
            }
            let interval = self.interval.mul_f64(0.9 + 0.2 * self.entropy.unit());
            self.wait(interval, &mut renewals, shutdown).await;
        }
        Ok(())
    }

    /// Takes a step: the own bundle first, because what comes after is believed by it.
    async fn take(&self, view: &mut View, step: Step) {
        let own = step.bundles.iter().find(|offered| offered.trust_domain == self.trust_domain);
        if let Some(own) = own.and_then(|offered| offered.bundle.as_ref()) {
            self.identity.adopt_bundle(own).await;
        }
        // From here on nothing waits: view and cache are never caught apart.
        let mut update = view.take(step);
        // Without any authority nobody could be believed, the server included: the one held before stays.
        update.bundles.retain(|bundle| bundle.trust_domain != self.trust_domain || !bundle.x509.is_empty());
        if !update.is_empty() {
            tracing::debug!(
                entries = update.entries.len(),
                removed_entries = update.removed_entries.len(),
                bundles = update.bundles.len(),
                removed_bundles = update.removed_bundles.len(),
                "Taking a step"
            );
        }
        self.cache.apply(update);
        metrics::gauge!("cache_manager.entries").set(self.cache.counts().entries as f64);
    }
}
