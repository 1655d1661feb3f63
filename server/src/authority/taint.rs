//! Distrusting an authority: first tainted, so that everybody moves away from it, then revoked.

use std::sync::Arc;

use super::journal::{revoke, taint};
use super::{Authority, AuthorityError, Refusal};
use crate::history::Urgency;
use crate::state::State;
use crate::state::model::{AuthorityKind, AuthoritySlot};

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
