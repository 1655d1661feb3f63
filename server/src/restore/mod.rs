//! What follows once it is noticed that the data store came back from a backup.
//!
//! Whoever followed the branch that is lost may know a later position of the history than we do. From here on the history
//! has another id, so that nothing that was said of the old one is taken for something of this one.

pub mod decide;

use std::convert::Infallible;

use runtime::entropy::Entropy;

use crate::history::{Committer, HistoryId, ProposeError, Replica, Urgency};
use crate::state::State;
use crate::state::model::{Change, Part};

/// Drops unused join tokens, and lets the history `from` go on under an id of its own, in one part with what `also` wants.
/// Does nothing if somebody else did.
///
/// # Errors
/// If the changes cannot be committed. It can be called again.
pub async fn begin_anew(
    committer: &Committer,
    replica: &Replica,
    entropy: &Entropy,
    from: HistoryId,
    also: impl Fn(&State) -> Vec<Change> + Send + Sync + 'static,
) -> Result<(), ProposeError<Infallible>> {
    while replica.latest().tokens().next().is_some() && replica.latest().position().history == from {
        let dropped = committer.propose(Urgency::Shrinking, |state: &State, _| Ok((decide::drop_tokens(state), ())));
        let _ = dropped.await?;
    }
    let next = HistoryId(entropy.bytes());
    let begun = committer.propose(Urgency::Shrinking, move |state: &State, _| {
        let mut changes = decide::begin(state, from, next);
        if !changes.is_empty() {
            changes.extend(also(state));
        }
        Ok((Part::new(changes), ()))
    });
    let _ = begun.await?;
    tracing::warn!(
        history = ?next,
        "The data store is older than what was seen of it: it came back from a backup. Its history goes on under a new id; \
         join tokens that were not used are void; bans, evictions, revocations and deletions since the backup have to be \
         repeated"
    );
    Ok(())
}
