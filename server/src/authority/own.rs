//! The server's own X509-SVID: signed by its own authority, kept in memory, renewed at half of its life and at once
//! when the authority that signed it is tainted or gone, or when it begins in the future because the clock was set back.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use spiffe::renew::RenewAt;
use spiffe::x509::PrivateKey;
use transport::rotating::Rotating;

use super::issue::Recorded;
use super::journal::{published, slots_of};
use super::{Authority, AuthorityError};
use crate::state::State;
use crate::state::model::AuthorityKind;

/// What is known of the SVID in use.
struct Held {
    not_before: SystemTime,
    renew_at: SystemTime,
    not_after: SystemTime,
    authority_id: Arc<str>,
}

/// Where the server's own SVID goes, and when it is to be renewed.
pub(super) struct OwnSvid {
    endpoint: Rotating,
    held: Mutex<Option<Held>>,
}

impl OwnSvid {
    pub(super) fn new(endpoint: Rotating) -> Self {
        Self { endpoint, held: Mutex::new(None) }
    }

    #[cfg(test)]
    pub(super) fn endpoint(&self) -> &Rotating {
        &self.endpoint
    }

    #[cfg(test)]
    pub(super) fn signed_by(&self) -> Option<Arc<str>> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().map(|held| Arc::clone(&held.authority_id))
    }
}

/// The server's own certificate changes no record and leaves this process only as part of its handshakes, where every
/// peer sees it; the log line is its record.
struct OwnUse;

impl Recorded for OwnUse {}

impl Authority {
    /// Renews the server's own SVID if that is due, and tells when it will be due next.
    pub(super) async fn renew_own(&self, state: &State, now: SystemTime) -> Result<Option<SystemTime>, AuthorityError> {
        let Ok(issuer) = self.active() else {
            return Ok(None);
        };
        let Some(authority_id) = issuer.x509_authority_id().cloned() else {
            return Ok(None);
        };
        {
            let held = self.inner.own.held.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(held) =
                held.as_ref().filter(|held| held.not_before <= now && now < held.renew_at && self.trusts(state, held))
            {
                return Ok(Some(held.renew_at));
            }
        }
        let kind = self.inner.policy.ca_key_type;
        let key = tokio::task::spawn_blocking(move || PrivateKey::generate(kind))
            .await
            .map_err(|_| AuthorityError::Keys(super::KeyError::Interrupted))?
            .map_err(AuthorityError::OwnKey)?;
        let issued = issuer.server_x509(key.public_key(), now).map_err(AuthorityError::Issue)?;
        let svid = issued.release(&OwnUse);
        let renew_at = RenewAt::draw(svid.not_before, svid.not_after, now, self.inner.entropy.u64()).at();
        self.inner.own.endpoint.set(&svid.chain, &key).map_err(AuthorityError::OwnCertificate)?;
        metrics::counter!("svid.rotate").increment(1);
        tracing::info!(
            spiffe_id = %svid.id,
            serial_num = %svid.serial,
            expiration = super::rotate::rfc3339(svid.not_after),
            local_authority_id = %authority_id,
            "Signed X509 SVID for the server"
        );
        // An SVID of an authority at its end may be due before it was made; once a second is enough then.
        let renew_at = renew_at.max(now + std::time::Duration::from_secs(1));
        let held = Held { not_before: svid.not_before, renew_at, not_after: svid.not_after, authority_id };
        *self.inner.own.held.lock().unwrap_or_else(PoisonError::into_inner) = Some(held);
        Ok(Some(renew_at))
    }

    /// Whether peers that have the newest bundle accept what `held` is signed by.
    fn trusts(&self, state: &State, held: &Held) -> bool {
        let slots = slots_of(state, self.inner.owner, AuthorityKind::X509);
        let slot = slots.iter().find(|slot| slot.authority_id == held.authority_id);
        slot.is_some_and(|slot| published(state.bundle(state.trust_domain()), slot) == Some(false))
    }

    /// When the server's own SVID ends; nothing before the first one.
    pub fn own_svid_ends(&self) -> Option<SystemTime> {
        let held = self.inner.own.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.as_ref().map(|held| held.not_after)
    }
}
