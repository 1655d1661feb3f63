//! Removes what has ended: entries and join tokens, and records of agents as configured.
//!
//! What has ended is absent to everybody at its second. Its record goes once the clocks are steady: a clock that was
//! ahead for a while has removed nothing.

use std::sync::Arc;

use runtime::entropy::Entropy;
use runtime::reconcile::{self, Nudge};
use runtime::shutdown::Shutdown;

use crate::api::core::Core;
use crate::config::checked::PruneAttestedNodes;
use crate::history::{ProposeError, Urgency};
use crate::registry::expire::{self, Agents};
use crate::state::model::Part;

/// Nothing refuses to be removed.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("refused")]
struct Never;

/// Removes at each ending, until `stop`.
pub(super) async fn run(core: Arc<Core>, agents: Option<PruneAttestedNodes>, entropy: Entropy, stop: Shutdown) {
    let agents = agents.map_or(Agents::Keep, |prune| Agents::RemoveAfter {
        ended: prune.expired_for,
        even_if_they_cannot_reattest: prune.tofu_nodes,
        batch: usize::try_from(prune.batch_size).unwrap_or(usize::MAX),
    });
    let nudge = Nudge::new();
    let mut revisions = core.replica.watch();
    let wake = async {
        // Only an ending that is earlier than the one waited for needs a look.
        let mut awaited = None;
        loop {
            let next = expire::next_removal(&revisions.borrow_and_update(), agents);
            if next != awaited {
                awaited = next;
                nudge.nudge();
            }
            if revisions.changed().await.is_err() {
                return std::future::pending::<()>().await;
            }
        }
    };
    let step = || async {
        let left = core.steady.left();
        if !left.is_zero() {
            let due = expire::next_removal(&core.replica.latest(), agents);
            return Ok(due.map(|due| due.max(core.clock.now() + left)));
        }
        let steady = core.steady.clone();
        let proposed = core.committer.propose(Urgency::Shrinking, move |state, now| {
            // Read after `now` was: a step between the two is seen.
            let part = if steady.is_steady() { expire::prune(state, agents, now) } else { Part::unchanged() };
            let left = part.changes.len();
            Ok::<_, Never>((part, left))
        });
        let removed: Result<_, ProposeError<Never>> = proposed.await;
        let removed = removed?.value;
        if removed > 0 {
            tracing::debug!(count = removed, "Removed what has ended");
            metrics::counter!("registration_entry.manager.prune").increment(1);
            return Ok(Some(core.clock.now()));
        }
        Ok::<_, ProposeError<Never>>(expire::next_removal(&core.replica.latest(), agents))
    };
    let reconcile = reconcile::run("expiry", nudge.clone(), core.clock.clone(), entropy, stop, step);
    tokio::select! {
        () = wake => {}
        () = reconcile => {}
    }
}
