//! What ends by itself, and is then removed.
//!
//! What has ended is absent to every decision at once; removing it only frees its place and tells the agents.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::agent;
use crate::state::model::{Agent, Change, Part};
use crate::state::{Ending, State};

/// Which agents are removed some time after their certificate has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Agents {
    /// None.
    Keep,
    /// Those whose certificate ended so long ago; never banned ones, whose record is what keeps them out.
    RemoveAfter {
        /// How long ago.
        ended: Duration,
        /// Whether also those that cannot attest again by themselves.
        even_if_they_cannot_reattest: bool,
        /// At most so many in one part.
        batch: usize,
    },
}

/// Records that one part removes at most.
const STEP: usize = 90;

/// When there will be something to remove; in the past if there is now. Each of the indexes is asked for its first one,
/// so this costs the same however much there is.
pub fn next_removal(state: &State, agents: Agents) -> Option<SystemTime> {
    let ending = state.endings().map(|(at, _)| at).next();
    let kinds = removable_agents(state, agents);
    ending.into_iter().chain(kinds.filter_map(|mut kind| kind.next()).map(|(at, _)| at)).min()
}

/// Removes what has ended at `now`, as much as one part holds; to be proposed again until it is empty.
pub fn prune(state: &State, agents: Agents, now: SystemTime) -> Part {
    let ended = state.endings().take_while(|(at, _)| *at <= now).filter_map(|(_, ending)| match ending {
        Ending::Entry(ordinal) => Some(Change::RemoveEntry(Arc::clone(&state.entry_at(ordinal)?.id))),
        Ending::Token(hash) => Some(Change::RemoveToken(hash)),
    });
    let mut changes: Vec<Change> = ended.take(STEP).collect();
    let batch = match agents {
        Agents::Keep => 0,
        Agents::RemoveAfter { batch, .. } => batch,
    };
    let gone = removable_agents(state, agents).flat_map(|kind| kind.take_while(|(at, _)| *at <= now));
    for (_, gone) in gone.take(batch) {
        let Ok(mut evicted) = agent::evict(state, &gone.id) else { continue };
        if changes.len() + evicted.changes.len() > STEP && !changes.is_empty() {
            break;
        }
        changes.append(&mut evicted.changes);
    }
    Part::new(changes)
}

/// Agents that may be removed and when, each kind that the policy names by that time.
fn removable_agents(
    state: &State,
    agents: Agents,
) -> impl Iterator<Item = impl Iterator<Item = (SystemTime, &Arc<Agent>)>> {
    let policy = match agents {
        Agents::Keep => None,
        Agents::RemoveAfter { ended, even_if_they_cannot_reattest, .. } => Some((ended, even_if_they_cannot_reattest)),
    };
    policy.into_iter().flat_map(move |(ended, all)| {
        let kinds = [Some(true), all.then_some(false)].into_iter().flatten();
        kinds.map(move |can_reattest| {
            let kind = state.agents_by_ending(can_reattest);
            kind.filter_map(move |agent| Some((agent.expires_at.checked_add(ended)?, agent)))
        })
    })
}

#[cfg(test)]
#[path = "expire/tests.rs"]
mod tests;
