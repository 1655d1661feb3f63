//! Log lines that any process can cause: a few are told, the others counted.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use spiffe::selector::SelectorSet;
use tokio::time::Instant;

/// How far apart two such lines are.
const APART: Duration = Duration::from_secs(1);
/// How far apart two such lines about callers with the same selectors are: one that tries without a pause leaves the
/// lines in between to the others.
const SAME_APART: Duration = Duration::from_secs(30);

/// The right to a line, given at most once a second, and for the same selectors at most twice a minute.
#[derive(Debug, Default)]
pub(super) struct Seldom {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    // The lines of the last half minute, oldest first. As they are a second apart, they are few.
    told: VecDeque<(Instant, SelectorSet)>,
    untold: u64,
}

impl Seldom {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many lines were not told since the last one, if one about a caller with these selectors may be told now.
    pub(super) fn now(&self, selectors: &SelectorSet) -> Option<u64> {
        let now = Instant::now();
        let mut state = self.state();
        while state.told.front().is_some_and(|(at, _)| now.duration_since(*at) >= SAME_APART) {
            state.told.pop_front();
        }
        let too_soon = state.told.back().is_some_and(|(at, _)| now.duration_since(*at) < APART);
        if too_soon || state.told.iter().any(|(_, told)| told == selectors) {
            state.untold += 1;
            return None;
        }
        state.told.push_back((now, selectors.clone()));
        Some(std::mem::take(&mut state.untold))
    }
}

#[cfg(test)]
mod tests {
    use spiffe::selector::Selector;

    use super::*;

    fn uid(number: u64) -> SelectorSet {
        std::iter::once(Selector::parse(&format!("unix:uid:{number}")).unwrap()).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn one_line_a_second_and_the_rest_is_counted() {
        let seldom = Seldom::default();
        assert_eq!([seldom.now(&uid(1)), seldom.now(&uid(2)), seldom.now(&uid(3))], [Some(0), None, None]);
        tokio::time::advance(APART).await;
        assert_eq!([seldom.now(&uid(2)), seldom.now(&uid(3))], [Some(2), None]);
        tokio::time::advance(10 * APART).await;
        assert_eq!(seldom.now(&uid(4)), Some(1));
    }

    #[tokio::test(start_paused = true)]
    async fn one_who_tries_without_a_pause_hides_nobody() {
        let seldom = Seldom::default();
        let mut told = Vec::new();
        for tick in 0..600_u64 {
            // Ten times a second, and every fifteen seconds somebody else.
            told.extend(seldom.now(&uid(1)).map(|untold| (tick, 1, untold)));
            if tick % 150 == 20 {
                told.extend(seldom.now(&uid(2)).map(|untold| (tick, 2, untold)));
            }
            tokio::time::advance(APART / 10).await;
        }
        assert_eq!(told, [(0, 1, 0), (20, 2, 20), (300, 1, 280), (320, 2, 20)]);
        assert_eq!(seldom.state().told.len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_is_remembered_than_half_a_minute() {
        let seldom = Seldom::default();
        for number in 0..1000 {
            seldom.now(&uid(number));
            tokio::time::advance(APART / 4).await;
        }
        assert_eq!(seldom.state().told.len(), 30);
    }
}
