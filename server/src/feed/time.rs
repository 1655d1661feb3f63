//! Marks what only the time changes: an entry that ends, and everything after a step of the clock.
//!
//! What has ended is absent from its second on, though its record may stay for a while. So that second is a change like
//! any other to those whose entry it was.

use std::sync::Arc;
use std::time::SystemTime;

use runtime::clock::Clock;
use runtime::shutdown::Shutdown;
use runtime::steady::Steady;

use super::Feed;
use crate::registry::authorized::{Concerned, agents_concerned_by};
use crate::state::model::Change;
use crate::state::{Ending, State};

/// Whose entries ended after `from`, up to `to`.
fn ended(state: &State, from: SystemTime, to: SystemTime) -> Concerned {
    let ended = state.endings_after(from).take_while(|(at, _)| *at <= to);
    let entries = ended.filter_map(|(_, ending)| match ending {
        Ending::Entry(ordinal) => state.entry_at(ordinal),
        Ending::Token(_) => None,
    });
    let changes: Vec<Change> = entries.map(|entry| Change::PutEntry(Arc::clone(entry))).collect();
    agents_concerned_by(state, state, &changes)
}

impl Feed {
    /// Marks streams as time passes, until shutdown is requested or the history ends.
    pub async fn run_time(self, clock: Clock, steady: Steady, shutdown: Shutdown) {
        let (mut revisions, mut steps) = (self.replica.watch(), steady.steps());
        let mut looked = clock.now();
        loop {
            let state = Arc::clone(&revisions.borrow_and_update());
            let now = clock.now();
            if steps.has_changed().is_ok_and(|changed| changed) {
                steps.mark_unchanged();
                self.mark(&Concerned::Everyone);
            } else {
                self.mark(&ended(&state, looked, now));
            }
            looked = now;
            let next = state.endings_after(now).next().map(|(at, _)| at);
            drop(state);
            let due = async {
                match next {
                    Some(at) => clock.sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                changed = revisions.changed() => if changed.is_err() { return },
                // The sender is in `steady`, which lives as long as this.
                _ = steps.changed() => steps.mark_changed(),
                () = shutdown.requested() => return,
            }
        }
    }
}
