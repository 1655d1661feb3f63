//! What a restore from a backup is, and what it changes.

use crate::history::{HistoryId, Position};
use crate::state::State;
use crate::state::model::{Change, Part};

/// How many join tokens one part removes.
const MOST_TOKENS: usize = 90;

/// Whether `state` came from a backup that is older than `noted`, a position that was noted beside the keys. A position
/// of the history that this one went on from was noted before the restore was noticed.
pub fn is_behind(state: &State, noted: &Position) -> bool {
    let head = state.position();
    if noted.history != head.history {
        return state.restored_from() != Some(noted.history);
    }
    noted.revision > head.revision || noted.revision == head.revision && noted.digest != head.digest
}

/// The part that removes unused join tokens, as many as go into one: one that was used in the lost branch would be valid
/// again. Nothing changes once none is left.
pub fn drop_tokens(state: &State) -> Part {
    Part::new(state.tokens().take(MOST_TOKENS).map(|token| Change::RemoveToken(token.hash)).collect())
}

/// The changes by which the history of `state` goes on as `next`; none if that history is not `from` any more.
pub fn begin(state: &State, from: HistoryId, next: HistoryId) -> Vec<Change> {
    if state.position().history == from { vec![Change::BeginHistory(next)] } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use spiffe::id::TrustDomain;

    use super::*;
    use crate::state::model::JoinToken;

    const ONE: HistoryId = HistoryId([1; 16]);
    const TWO: HistoryId = HistoryId([2; 16]);
    const THREE: HistoryId = HistoryId([3; 16]);

    fn state(history: HistoryId, revision: u64) -> State {
        State::empty(TrustDomain::parse("example.org").unwrap(), at(history, revision))
    }

    fn at(history: HistoryId, revision: u64) -> Position {
        Position { history, revision, digest: [7; 32] }
    }

    #[test]
    fn only_a_position_that_the_state_cannot_have_passed_tells_of_a_restore() {
        let here = state(ONE, 5);
        assert!(!is_behind(&here, &at(ONE, 4)));
        assert!(!is_behind(&here, &at(ONE, 5)));
        assert!(is_behind(&here, &at(ONE, 6)));
        assert!(is_behind(&here, &Position { digest: [8; 32], ..at(ONE, 5) }));
        assert!(is_behind(&here, &at(TWO, 1)));
    }

    #[test]
    fn a_restore_is_noticed_once() {
        let mut here = state(ONE, 5);
        let noted = at(ONE, 9);
        here.apply(&Part::new(begin(&here, ONE, TWO))).unwrap();
        assert_eq!((here.position().history, here.restored_from()), (TWO, Some(ONE)));
        assert!(!is_behind(&here, &noted));
        assert_eq!(begin(&here, ONE, THREE), []);
        // The same backup once more, beside keys that were used with what followed it.
        assert!(is_behind(&state(ONE, 5), &at(TWO, 6)));
    }

    #[test]
    fn every_unused_token_goes() {
        let mut here = state(ONE, 5);
        let ends = SystemTime::UNIX_EPOCH + Duration::from_secs(1);
        for number in 0..200_u8 {
            let token = JoinToken { hash: [number; 32], expires_at: ends, alias: None };
            here.apply(&Part::new(vec![Change::PutToken(token)])).unwrap();
        }
        let mut sizes = Vec::new();
        loop {
            let part = drop_tokens(&here);
            sizes.push(part.changes.len());
            if part.changes.is_empty() {
                break;
            }
            here.apply(&part).unwrap();
        }
        assert_eq!(sizes, [90, 90, 20, 0]);
        assert_eq!(here.tokens().count(), 0);
    }
}
