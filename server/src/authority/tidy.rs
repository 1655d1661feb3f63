//! Bringing keys, journal and bundle together: what is lost, what is orphaned, what ended long ago.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::journal::{self, prunable, published};
use super::keys::{Note, is_ours};
use super::rotate::rfc3339;
use super::schedule::Time;
use super::{Authority, AuthorityError, Refusal};
use crate::history::{HistoryId, Position, Urgency};
use crate::restore;
use crate::state::State;
use crate::state::model::{AuthorityKind, Part, SlotStatus};

/// Keys of ours that no journal line names. A crash between a key and its line leaves one behind; a restored backup, of
/// which keys are no part, leaves those of the branch that is lost, and they may be all that somebody still has of it.
#[derive(Debug, Default)]
pub(super) struct Unrecorded {
    ids: Vec<String>,
    /// When they were found, by the boot clock.
    since: Duration,
}

impl Unrecorded {
    /// How long they stay: nothing that any of them signed outlives one authority lifetime.
    fn left(&self, lifetime: Duration, boot: Duration) -> Option<Duration> {
        (!self.ids.is_empty()).then(|| (self.since + lifetime).saturating_sub(boot))
    }
}

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
            .propose(Urgency::Vital, move |state: &State, _| Ok::<_, Refusal>((journal::lose(state, owner, &lost), ())))
            .await?;
        Ok(())
    }

    /// Goes on from a restored backup, if the keys were used with a newer state than there is: what the lost branch signed
    /// stays valid.
    pub(super) async fn recover(&self) -> Result<(), AuthorityError> {
        let inner = &self.inner;
        let Some(noted) = inner.keys.noted() else { return Ok(()) };
        let state = inner.replica.current().await.map_err(AuthorityError::State)?;
        let position = Position { history: HistoryId(noted.history), revision: noted.revision, digest: noted.digest };
        let (owner, clock, from) = (inner.owner, inner.clock.clone(), state.position().history);
        let known = position.history == from;
        let also = move |state: &State| journal::republish(state, owner, &noted.authorities, clock.now());
        if !restore::decide::is_behind(&state, &position) {
            if !known {
                // Restored by command, or noticed by an agent: the history has begun anew already.
                let republished = inner.committer.propose(Urgency::Shrinking, move |state: &State, _| {
                    Ok::<_, Refusal>((Part::new(also(state)), ()))
                });
                let _ = republished.await?;
            }
            return Ok(());
        }
        restore::begin_anew(&inner.committer, &inner.replica, &inner.entropy, from, also)
            .await
            .map_err(AuthorityError::Restore)
    }

    /// Notes beside the keys where the history is, if authorities changed since the last note, or anything if `all` is set.
    /// A note that cannot be written is an older one, which tells of fewer restores and of none that was not.
    pub(super) async fn note(&self, all: bool) {
        let inner = &self.inner;
        let state = inner.replica.latest();
        let (authorities, position) = (journal::noted(&state, inner.owner), state.position());
        let is_known = |note: &Note| {
            note.history == position.history.0
                && note.authorities == authorities
                && (note.revision == position.revision || !all)
        };
        if inner.keys.noted().as_ref().is_some_and(is_known) {
            return;
        }
        let note =
            Note { history: position.history.0, revision: position.revision, digest: position.digest, authorities };
        if let Err(error) = inner.keys.note(note).await {
            tracing::warn!(
                error = runtime::telemetry::chain(&error),
                "The position of the data store could not be noted beside the keys: a restore from a backup may go unnoticed"
            );
        }
    }

    /// Brings keys and journal together after a start: authorities without key or publication are lost. No key is removed:
    /// those of ours that no journal line names stay for one authority lifetime, and SPIRE's for whoever goes back to it.
    pub(super) async fn compare_keys_with_journal(&self) -> Result<(), AuthorityError> {
        let inner = &self.inner;
        let state = inner.replica.current().await.map_err(AuthorityError::State)?;
        let keys = inner.keys.public().await.map_err(AuthorityError::Keys)?.keys;
        let bundle = state.bundle(state.trust_domain());
        let (mut lost, mut needed, mut unrecorded) = (Vec::new(), Vec::new(), Vec::new());
        for kind in [AuthorityKind::X509, AuthorityKind::Jwt] {
            for slot in self.slots(&state, kind) {
                if !matches!(slot.status, SlotStatus::Prepared | SlotStatus::Active) {
                    // Its key may sign once more when the clock is put right, and goes by the schedule.
                    needed.push(Arc::clone(&slot.key_id));
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
            tracing::warn!(
                key_id = %id,
                "A signing key of this server is in no record of its data store: it is left where it is for one ca_ttl, \
                 unused. Was the data store restored from a backup?"
            );
            unrecorded.push(id.clone());
        }
        *inner.unrecorded.lock().unwrap_or_else(PoisonError::into_inner) =
            Unrecorded { ids: unrecorded, since: inner.clock.boot() };
        Ok(())
    }

    /// How long the keys that were found in no record have to stay yet; none if there are none.
    pub(super) fn unrecorded_for(&self) -> Option<Duration> {
        let inner = &self.inner;
        let unrecorded = inner.unrecorded.lock().unwrap_or_else(PoisonError::into_inner);
        unrecorded.left(inner.policy.ca_ttl, inner.clock.boot())
    }

    /// Removes the keys that were found in no record, but those that have got one since.
    pub(super) async fn remove_unrecorded(&self) -> Result<(), AuthorityError> {
        let inner = &self.inner;
        let ids = inner.unrecorded.lock().unwrap_or_else(PoisonError::into_inner).ids.clone();
        let state = inner.replica.current().await.map_err(AuthorityError::State)?;
        for id in ids.iter().filter(|id| !state.all_slots().any(|slot| *slot.key_id == ***id)) {
            tracing::info!(key_id = %id, "Removing a signing key that is in no record and can have signed nothing valid");
            inner.keys.delete(id).await.map_err(AuthorityError::Keys)?;
        }
        inner.unrecorded.lock().unwrap_or_else(PoisonError::into_inner).ids.clear();
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
        let (owner, serves_jwt, steady) = (self.inner.owner, self.serves_jwt(), self.inner.steady.clone());
        let _ = self
            .inner
            .committer
            .propose(Urgency::Shrinking, move |state: &State, now| {
                let (changes, _) = prunable(state, owner, serves_jwt, Time::new(now, steady.left()));
                Ok::<_, Refusal>((Part::new(changes), ()))
            })
            .await?;
        metrics::counter!("ca.manager.bundle.pruned").increment(1);
        tracing::debug!("Expired authorities were removed from the bundle");
        Ok(())
    }
}
