//! Bringing keys, journal and bundle together: what is lost, what is orphaned, what ended long ago.

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::x509::Certificate;

use super::keys::is_ours;
use super::rotate::{next_sequence, rfc3339, with_status};
use super::{Authority, AuthorityError, Refusal, published, schedule, slots_of};
use crate::history::Urgency;
use crate::state::State;
use crate::state::model::{AuthorityKind, AuthoritySlot, Change, KeyOwner, Part, SlotStatus, certificate_hash};

impl Authority {
    /// Marks authorities as lost: their keys are gone, their roots stay published until they end.
    pub(super) async fn lose(&self, lost: Vec<(AuthorityKind, Arc<str>)>) -> Result<(), AuthorityError> {
        let owner = self.inner.owner;
        for (kind, id) in &lost {
            tracing::error!(local_authority_id = %id, kind = ?kind, "Private key of an authority is gone");
        }
        let _ = self
            .inner
            .committer
            .propose(Urgency::Normal, move |state: &State, _| {
                let changes = lost
                    .iter()
                    .flat_map(|(kind, id)| {
                        slots_of(state, owner, *kind).into_iter().find(|slot| slot.authority_id == *id)
                    })
                    .filter(|slot| matches!(slot.status, SlotStatus::Prepared | SlotStatus::Active))
                    .map(|slot| with_status(&slot, SlotStatus::Lost))
                    .collect();
                Ok((Part::new(changes), ()))
            })
            .await?;
        Ok(())
    }

    /// Brings keys and journal together after a start: authorities without key or publication are lost, keys of ours
    /// without authority are removed. Others stay: whoever goes back to SPIRE needs SPIRE's.
    pub(super) async fn compare_keys_with_journal(&self) -> Result<(), AuthorityError> {
        let inner = &self.inner;
        let state = inner.replica.current().await.map_err(AuthorityError::State)?;
        let keys = inner.keys.public().await.map_err(AuthorityError::Keys)?.keys;
        let bundle = state.bundle(state.trust_domain());
        let (mut lost, mut needed) = (Vec::new(), Vec::new());
        for kind in [AuthorityKind::X509, AuthorityKind::Jwt] {
            for slot in self.slots(&state, kind) {
                if !matches!(slot.status, SlotStatus::Prepared | SlotStatus::Active) {
                    continue;
                }
                let held = keys.iter().any(|(id, public)| **id == *slot.key_id && public.spki == slot.public_key);
                if held && published(bundle, &slot).is_some() {
                    needed.push(Arc::clone(&slot.key_id));
                } else {
                    lost.push((kind, Arc::clone(&slot.authority_id)));
                }
            }
        }
        if !lost.is_empty() {
            self.lose(lost).await?;
        }
        self.tell_of_other_keys(&state);
        for (id, _) in keys.iter().filter(|(id, _)| !needed.iter().any(|needed| **needed == **id)) {
            if !is_ours(id) {
                tracing::warn!(key_id = %id, "A signing key that this server did not make is left where it is, unused");
                continue;
            }
            tracing::info!(key_id = %id, "Removing a signing key that no authority uses");
            inner.keys.delete(id).await.map_err(AuthorityError::Keys)?;
        }
        Ok(())
    }

    /// Says so if this key set is a new one in a trust domain that has had another.
    fn tell_of_other_keys(&self, state: &State) {
        let (owner, now) = (self.inner.owner, self.inner.clock.now());
        if state.all_slots().any(|slot| slot.owner == owner) {
            return;
        }
        let active = state.all_slots().filter(|slot| slot.status == SlotStatus::Active && slot.not_after > now);
        if let Some(last) = active.max_by_key(|slot| slot.not_after) {
            tracing::warn!(
                local_authority_id = %last.authority_id,
                expiration = rfc3339(last.not_after),
                "The signing keys are new, and those of the authorities so far are not among them: what they signed stays \
                 valid, and new authorities sign from now on. If the key file was moved or lost by mistake, stop the \
                 server and put it back"
            );
        }
    }

    /// Removes authorities that ended long ago from our bundle, and the journals of key sets that are no more.
    pub(super) async fn prune(&self) -> Result<(), AuthorityError> {
        let (owner, serves_jwt) = (self.inner.owner, self.serves_jwt());
        let _ = self
            .inner
            .committer
            .propose(Urgency::Shrinking, move |state: &State, now| {
                let (changes, _) = prunable(state, owner, serves_jwt, now);
                Ok::<_, Refusal>((Part::new(changes), ()))
            })
            .await?;
        metrics::counter!("ca.manager.bundle.pruned").increment(1);
        tracing::debug!("Expired authorities were removed from the bundle");
        Ok(())
    }
}

/// At most this many removals in one part.
const LARGEST_PRUNING: usize = 50;

/// The changes that remove what ended long ago, and when there will be more. Journal lines of this key set are forgotten
/// by the schedule of their kind, unless their kind is switched off.
pub(super) fn prunable(
    state: &State,
    owner: KeyOwner,
    serves_jwt: bool,
    now: SystemTime,
) -> (Vec<Change>, Option<SystemTime>) {
    let scheduled = |slot: &AuthoritySlot| slot.owner == owner && (slot.kind == AuthorityKind::X509 || serves_jwt);
    let foreign: Vec<_> = state
        .all_slots()
        .filter(|slot| !scheduled(slot))
        .map(|slot| ((slot.owner, slot.kind, Arc::clone(&slot.authority_id)), Some(slot.not_after)))
        .collect();
    let (slots, slots_at) = schedule::ended(&foreign, false, now);
    let mut changes: Vec<Change> = slots
        .into_iter()
        .take(LARGEST_PRUNING)
        .map(|(owner, kind, authority_id)| Change::RemoveSlot { owner, kind, authority_id })
        .collect();
    let Some(bundle) = state.bundle(state.trust_domain()) else {
        return (changes, slots_at);
    };
    let trust_domain = state.trust_domain();
    let end = |der: &bytes::Bytes| Certificate::parse(der.clone()).ok().map(|certificate| certificate.not_after);
    let x509: Vec<_> =
        bundle.x509.iter().map(|authority| (certificate_hash(&authority.der), end(&authority.der))).collect();
    let jwt: Vec<_> =
        bundle.jwt.iter().map(|authority| (Arc::clone(&authority.key_id), authority.expires_at)).collect();
    let (x509, x509_at) = schedule::ended(&x509, true, now);
    let (jwt, jwt_at) = schedule::ended(&jwt, false, now);
    if !x509.is_empty() || !jwt.is_empty() {
        let removed_x509 =
            x509.into_iter().map(|sha256| Change::RemoveX509Authority { trust_domain: trust_domain.clone(), sha256 });
        let removed_jwt =
            jwt.into_iter().map(|key_id| Change::RemoveJwtAuthority { trust_domain: trust_domain.clone(), key_id });
        changes.extend(removed_x509.chain(removed_jwt).take(LARGEST_PRUNING - 1));
        changes.push(next_sequence(state));
    }
    (changes, [slots_at, x509_at, jwt_at].into_iter().flatten().min())
}
