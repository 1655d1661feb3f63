//! Log lines that any process can cause: a few are told, the others counted.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

/// How far apart two such lines are.
const APART: Duration = Duration::from_secs(1);

/// The right to a line, given at most once a second.
#[derive(Debug, Default)]
pub(super) struct Seldom {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last: Option<Instant>,
    untold: u64,
}

impl Seldom {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many lines were not told since the last one, if one may be told now.
    pub(super) fn now(&self) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.state();
        if state.last.is_some_and(|last| now.duration_since(last) < APART) {
            state.untold += 1;
            return None;
        }
        state.last = Some(now);
        Some(std::mem::take(&mut state.untold))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn one_line_a_second_and_the_rest_is_counted() {
        let seldom = Seldom::default();
        assert_eq!([seldom.now(), seldom.now(), seldom.now()], [Some(0), None, None]);
        tokio::time::advance(APART).await;
        assert_eq!([seldom.now(), seldom.now()], [Some(2), None]);
        tokio::time::advance(10 * APART).await;
        assert_eq!(seldom.now(), Some(1));
    }
}
