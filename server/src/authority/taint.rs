//! Distrusting an authority: first tainted, so that everybody moves away from it, then revoked.

use std::sync::Arc;

use spiffe::bundle::{JwtAuthority, X509Authority};

use super::rotate::next_sequence;
use super::{Authority, AuthorityError, Refusal, published, slots_of};
use crate::history::Urgency;
use crate::state::State;
use crate::state::model::{AuthorityKind, AuthoritySlot, Change, KeyOwner, Part, SlotStatus, certificate_hash};

/// The part that taints an old authority.
fn taint(
    state: &State,
    owner: KeyOwner,
    kind: AuthorityKind,
    authority_id: &str,
) -> Result<(Part, Arc<AuthoritySlot>), Refusal> {
    let slots = slots_of(state, owner, kind);
    let slot = slots.iter().find(|slot| *slot.authority_id == *authority_id).ok_or(Refusal::UnexpectedAuthority)?;
    match slot.status {
        SlotStatus::Active => return Err(Refusal::TaintActive),
        SlotStatus::Prepared => return Err(Refusal::TaintNotOld),
        SlotStatus::Old | SlotStatus::Lost => {}
    }
    let bundle = state.bundle(state.trust_domain());
    match published(bundle, slot) {
        None => return Err(Refusal::NotPublished),
        Some(true) => return Err(Refusal::AlreadyTainted),
        Some(false) => {}
    }
    let trust_domain = state.trust_domain().clone();
    let change = match kind {
        AuthorityKind::X509 => Change::PutX509Authority {
            trust_domain,
            authority: X509Authority { der: slot.certificate.clone().ok_or(Refusal::NotPublished)?, tainted: true },
        },
        AuthorityKind::Jwt => {
            let held = bundle
                .and_then(|bundle| bundle.jwt.iter().find(|held| held.key_id == slot.authority_id))
                .ok_or(Refusal::NotPublished)?;
            Change::PutJwtAuthority { trust_domain, authority: JwtAuthority { tainted: true, ..held.clone() } }
        }
    };
    Ok((Part::new(vec![change, next_sequence(state)]), Arc::clone(slot)))
}

/// The part that revokes a tainted authority. A JWT authority may be any of the bundle, since downstream servers
/// publish theirs in it too.
fn revoke(
    state: &State,
    owner: KeyOwner,
    kind: AuthorityKind,
    authority_id: &str,
) -> Result<(Part, Option<Arc<AuthoritySlot>>), Refusal> {
    let slots = slots_of(state, owner, kind);
    let slot = slots.iter().find(|slot| *slot.authority_id == *authority_id);
    let trust_domain = state.trust_domain().clone();
    let bundle = state.bundle(&trust_domain).ok_or(Refusal::NotPublished)?;
    let (tainted, change) = match (kind, slot) {
        (_, Some(slot)) if slot.status == SlotStatus::Active => return Err(Refusal::RevokeActive),
        (AuthorityKind::X509, None) => return Err(Refusal::RevokeNotOld),
        (AuthorityKind::X509, Some(slot)) if slot.status == SlotStatus::Prepared => return Err(Refusal::RevokeNotOld),
        (AuthorityKind::Jwt, Some(slot)) if slot.status == SlotStatus::Prepared => return Err(Refusal::RevokePrepared),
        (AuthorityKind::X509, Some(slot)) => {
            let certificate = slot.certificate.as_ref().ok_or(Refusal::NotPublished)?;
            let tainted = published(Some(bundle), slot).ok_or(Refusal::NotPublished)?;
            (tainted, Change::RemoveX509Authority { trust_domain, sha256: certificate_hash(certificate) })
        }
        (AuthorityKind::Jwt, _) => {
            let held = bundle.jwt.iter().find(|held| *held.key_id == *authority_id).ok_or(Refusal::NotPublished)?;
            (held.tainted, Change::RemoveJwtAuthority { trust_domain, key_id: Arc::clone(&held.key_id) })
        }
    };
    if !tainted {
        return Err(Refusal::NotTainted);
    }
    Ok((Part::new(vec![change, next_sequence(state)]), slot.cloned()))
}

impl Authority {
    /// Marks an old authority as not to be used any more; it stays in the bundle.
    ///
    /// # Errors
    /// If it is not old, or tainted already, or the change cannot be committed.
    pub async fn taint(&self, kind: AuthorityKind, authority_id: &str) -> Result<Arc<AuthoritySlot>, AuthorityError> {
        self.key_type(kind)?;
        if authority_id.is_empty() {
            return Err(AuthorityError::Refused(Refusal::NoAuthorityId));
        }
        let (owner, id) = (self.inner.owner, authority_id.to_owned());
        let receipt = self
            .inner
            .committer
            .propose(Urgency::Shrinking, move |state: &State, _| taint(state, owner, kind, &id))
            .await?;
        match kind {
            AuthorityKind::X509 => {
                tracing::info!(local_authority_id = %authority_id, "X.509 authority tainted successfully");
            }
            AuthorityKind::Jwt => {
                tracing::info!(local_authority_id = %authority_id, "JWT authority tainted successfully");
            }
        }
        self.nudge();
        Ok(receipt.value)
    }

    /// Removes a tainted authority from the bundle: nothing it signed is valid any more. Gives its journal line, if it
    /// was one of this server.
    ///
    /// # Errors
    /// If it is not tainted, or signs or will sign, or the change cannot be committed.
    pub async fn revoke(
        &self,
        kind: AuthorityKind,
        authority_id: &str,
    ) -> Result<Option<Arc<AuthoritySlot>>, AuthorityError> {
        self.key_type(kind)?;
        if authority_id.is_empty() {
            return Err(AuthorityError::Refused(Refusal::NoAuthorityId));
        }
        let (owner, id) = (self.inner.owner, authority_id.to_owned());
        let receipt = self
            .inner
            .committer
            .propose(Urgency::Shrinking, move |state: &State, _| revoke(state, owner, kind, &id))
            .await?;
        match kind {
            AuthorityKind::X509 => {
                tracing::info!(local_authority_id = %authority_id, "X.509 authority revoked successfully");
            }
            AuthorityKind::Jwt => {
                tracing::info!(local_authority_id = %authority_id, "JWT authority revoked successfully");
            }
        }
        self.nudge();
        Ok(receipt.value)
    }
}
