//! What an agent that has an identity does next: a decision on values.

use std::time::{Duration, SystemTime};

use spiffe::renew::{Succession, Validity, succeed, succeed_stored};

/// An SVID that the server signed and that is not in use yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// When it is valid.
    pub validity: Validity,
    /// Whether a restart would find it.
    pub stored: bool,
}

/// What there is to decide by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Situation {
    /// The wall clock.
    pub now: SystemTime,
    /// The boot clock.
    pub boot: Duration,
    /// The SVID in use.
    pub current: Validity,
    /// When its successor is to be asked for.
    pub due_at: SystemTime,
    /// Its successor, if there is one already.
    pub held: Option<Held>,
    /// Whether something in memory has not reached the disk.
    pub unwritten: bool,
    /// Before when, by the boot clock, the server is not asked again.
    pub ask_at: Duration,
    /// Before when, by the boot clock, nothing is written again.
    pub write_at: Duration,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Move {
    /// Ask the server for a successor.
    Ask,
    /// Store the successor that is held, if it is not, and use it if its time has come.
    Settle,
    /// Give up the successor that is held: it will not do.
    Drop,
    /// Write what has not reached the disk.
    Write,
    /// Nothing, until the wall clock shows `until`, or for `lasting` by the boot clock.
    Wait {
        /// Wall clock.
        until: Option<SystemTime>,
        /// How long.
        lasting: Option<Duration>,
    },
}

/// Decides. While a successor is held, no other is asked for: the server takes only the newest one that it signed.
pub fn next_move(situation: &Situation) -> Move {
    let Situation { now, boot, current, due_at, held, unwritten, ask_at, write_at } = *situation;
    let mut until = None;
    let mut lasting: Option<Duration> = None;
    let mut within = |at: Duration| {
        let left = at.saturating_sub(boot);
        lasting = Some(lasting.map_or(left, |lasting| lasting.min(left)));
    };
    match held {
        Some(Held { validity, stored }) => {
            match succeed_stored(Some(current), validity, stored, now) {
                Succession::Now => return Move::Settle,
                Succession::Never => return Move::Drop,
                Succession::At(at) => until = Some(at),
            }
            if !stored && succeed(Some(current), validity, now) == Succession::Now {
                if write_at <= boot {
                    return Move::Settle;
                }
                within(write_at);
            }
        }
        None if now < due_at => until = Some(due_at),
        None if ask_at <= boot => return Move::Ask,
        None => within(ask_at),
    }
    if unwritten {
        if write_at <= boot {
            return Move::Write;
        }
        within(write_at);
    }
    Move::Wait { until, lasting }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn validity(not_before: u64, not_after: u64) -> Validity {
        Validity { not_before: at(not_before), not_after: at(not_after) }
    }

    const ZERO: Duration = Duration::ZERO;

    fn plain(now: u64) -> Situation {
        Situation {
            now: at(now),
            boot: Duration::from_secs(500),
            current: validity(1000, 5000),
            due_at: at(3000),
            held: None,
            unwritten: false,
            ask_at: ZERO,
            write_at: ZERO,
        }
    }

    #[test]
    fn asks_when_it_is_due_and_waits_out_a_failure_by_the_boot_clock() {
        assert_eq!(next_move(&plain(2999)), Move::Wait { until: Some(at(3000)), lasting: None });
        assert_eq!(next_move(&plain(3000)), Move::Ask);
        let failed = Situation { ask_at: Duration::from_secs(507), ..plain(3000) };
        assert_eq!(next_move(&failed), Move::Wait { until: None, lasting: Some(Duration::from_secs(7)) });
        assert_eq!(next_move(&Situation { boot: Duration::from_secs(507), ..failed }), Move::Ask);
    }

    #[test]
    fn what_begins_soon_is_waited_for_and_what_begins_tomorrow_dropped() {
        let held = |from| Some(Held { validity: validity(from, from + 4000), stored: false });
        let soon = Situation { held: held(3040), ..plain(3000) };
        assert_eq!(next_move(&soon), Move::Wait { until: Some(at(3040)), lasting: None });
        assert_eq!(next_move(&Situation { now: at(3040), ..soon }), Move::Settle);
        assert_eq!(next_move(&Situation { held: held(90_000), ..plain(3000) }), Move::Drop);
    }

    #[test]
    fn what_cannot_be_written_is_tried_again_and_used_in_the_last_quarter() {
        let held = Some(Held { validity: validity(2990, 6990), stored: false });
        let write_at = Duration::from_secs(509);
        let unwritten = Situation { held, unwritten: true, write_at, ..plain(3000) };
        assert_eq!(next_move(&unwritten), Move::Wait { until: Some(at(4000)), lasting: Some(Duration::from_secs(9)) });
        assert_eq!(next_move(&Situation { boot: write_at, ..unwritten }), Move::Settle);
        assert_eq!(next_move(&Situation { now: at(4000), ..unwritten }), Move::Settle);
        // In use and still not written.
        let used = Situation { held: None, unwritten: true, write_at, ..plain(2000) };
        let wait = Move::Wait { until: Some(at(3000)), lasting: Some(Duration::from_secs(9)) };
        assert_eq!(next_move(&used), wait);
        assert_eq!(next_move(&Situation { boot: write_at, ..used }), Move::Write);
    }

    proptest! {
        #[test]
        fn every_wait_ends(
            now in 0_u64..9000,
            current in (0_u64..9000, 0_u64..9000),
            due_at in 0_u64..9000,
            held in prop::option::of((0_u64..9000, 0_u64..9000, any::<bool>())),
            unwritten: bool,
            ask_at in 400_u64..600,
            write_at in 400_u64..600,
        ) {
            let situation = Situation {
                now: at(now),
                boot: Duration::from_secs(500),
                current: validity(current.0, current.0 + current.1),
                due_at: at(due_at),
                held: held.map(|(from, life, stored)| Held { validity: validity(from, from + life), stored }),
                unwritten,
                ask_at: Duration::from_secs(ask_at),
                write_at: Duration::from_secs(write_at),
            };
            match next_move(&situation) {
                Move::Wait { until, lasting } => {
                    prop_assert!(until.is_some() || lasting.is_some());
                    prop_assert!(until.is_none_or(|until| until > situation.now));
                    prop_assert!(lasting.is_none_or(|lasting| lasting > ZERO));
                }
                // Only what is due and not there yet is asked for.
                Move::Ask => {
                    prop_assert!(situation.held.is_none() && situation.due_at <= situation.now);
                    prop_assert!(situation.ask_at <= situation.boot);
                }
                Move::Settle | Move::Drop => prop_assert!(situation.held.is_some()),
                Move::Write => prop_assert!(unwritten),
            }
        }
    }
}
