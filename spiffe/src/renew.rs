//! When a credential is to be renewed, drawn once when it is received.

use std::time::{Duration, SystemTime};

/// However little is left of a credential that is not over, it is not renewed sooner than this after its receipt.
const LEAST_DISTANCE: Duration = Duration::from_millis(500);

/// How far ahead a new credential may begin and still be waited for. A clock that is off by more is waited out by asking
/// again: what was signed by it may be of an authority that the server withdraws.
pub const SKEW: Duration = Duration::from_secs(600);

/// The least that one attempt to renew may take.
const LEAST_PATIENCE: Duration = Duration::from_millis(250);

/// The moment at which one credential is to be renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct RenewAt(SystemTime);

impl RenewAt {
    /// Draws the moment: from the later of notBefore and receipt, half of the time that is left,
    /// give or take a tenth of that half, so that credentials made together are not renewed
    /// together. `random` is uniform over all values. A credential that is already over is due at
    /// once.
    pub fn draw(not_before: SystemTime, not_after: SystemTime, received_at: SystemTime, random: u64) -> Self {
        let start = not_before.max(received_at);
        let left = not_after.duration_since(start).unwrap_or_default();
        // Thousandths from 900 to 1100; the modulo's bias is far below what matters here.
        let thousandths = 900 + random % 201;
        let half = left.as_nanos() / 2 * u128::from(thousandths) / 1000;
        let wait = Duration::from_nanos(u64::try_from(half).unwrap_or(u64::MAX));
        Self(start.checked_add(wait).unwrap_or(not_after))
    }

    /// The moment.
    pub fn at(self) -> SystemTime {
        self.0
    }

    /// Whether the moment has come.
    pub fn is_due(self, now: SystemTime) -> bool {
        self.0 <= now
    }

    /// The least distance between the receipt of a credential and its renewal: a tenth of its life, so that a server that
    /// hands out almost expired credentials is not stormed. But no more than a third of what was left at the receipt:
    /// of a life that began long before, a tenth may be more than that, and the credential would run out. What was over
    /// when it came cannot be saved by haste: there it is the tenth again.
    pub fn least_distance(not_before: SystemTime, not_after: SystemTime, received_at: SystemTime) -> Duration {
        let life = not_after.duration_since(not_before).unwrap_or_default();
        let left = not_after.duration_since(not_before.max(received_at)).unwrap_or_default();
        if left.is_zero() {
            return life / 10;
        }
        (life / 10).min((left / 3).max(LEAST_DISTANCE))
    }
}

/// From when to when a credential is valid, the end not included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Validity {
    /// When it begins.
    pub not_before: SystemTime,
    /// When it is over.
    pub not_after: SystemTime,
}

impl Validity {
    /// Whether it is valid at `now`.
    pub fn holds(self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }

    /// When the last quarter of its life begins.
    fn last_quarter(self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or_default();
        self.not_after.checked_sub(life / 4).unwrap_or(self.not_before)
    }
}

/// When a new credential takes the place of the one in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Succession {
    /// Now.
    Now,
    /// Not before then, if the clock is not set meanwhile.
    At(SystemTime),
    /// Never: another has to be asked for.
    Never,
}

/// Judges `next` beside `current`: one that is not valid never takes the place of one that is. What begins within
/// [`SKEW`] is waited for.
pub fn succeed(current: Option<Validity>, next: Validity, now: SystemTime) -> Succession {
    let Some(current) = current.filter(|current| current.holds(now)) else { return Succession::Now };
    if next.holds(now) {
        Succession::Now
    } else if now < next.not_before && next.not_before <= now + SKEW && next.not_before < next.not_after {
        Succession::At(next.not_before.min(current.not_after))
    } else {
        Succession::Never
    }
}

/// As [`succeed`], for an identity that has to outlive a restart: one that could not be stored takes the place of one
/// that is in its last quarter only, so that a restart before that finds one that is good.
pub fn succeed_stored(current: Option<Validity>, next: Validity, stored: bool, now: SystemTime) -> Succession {
    let succession = succeed(current, next, now);
    match current.filter(|current| current.holds(now) && now < current.last_quarter()) {
        Some(current) if !stored && succession == Succession::Now => Succession::At(current.last_quarter()),
        _ => succession,
    }
}

/// How long one attempt to renew `current` may take: half of what is left, so that there is time for another. Nothing is
/// said of what is not valid.
pub fn patience(current: Validity, now: SystemTime) -> Option<Duration> {
    let left = current.not_after.duration_since(now).unwrap_or_default();
    current.holds(now).then(|| (left / 2).max(LEAST_PATIENCE).min(left))
}

/// How long to wait before a failed renewal is tried again, where a back-off says `wait`: no longer than half of what
/// the credential has left, so that nobody sleeps through its end, but on that account not less than `least`. What has
/// run out is in no hurry any more.
pub fn retry_within(wait: Duration, not_after: SystemTime, now: SystemTime, least: Duration) -> Duration {
    match not_after.duration_since(now) {
        Ok(left) if !left.is_zero() => wait.min((left / 2).max(least)),
        _ => wait,
    }
}

#[cfg(test)]
mod tests {
    use std::time::UNIX_EPOCH;

    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    #[test]
    fn the_moment_lies_around_the_half_of_what_is_left() {
        let earliest = RenewAt::draw(at(1000), at(3000), at(900), 0);
        let middle = RenewAt::draw(at(1000), at(3000), at(900), 100);
        let latest = RenewAt::draw(at(1000), at(3000), at(900), 200);
        assert_eq!([earliest.at(), middle.at(), latest.at()], [at(1900), at(2000), at(2100)]);
    }

    #[test]
    fn a_late_receipt_counts_from_the_receipt() {
        assert_eq!(RenewAt::draw(at(1000), at(3000), at(2000), 100).at(), at(2500));
    }

    #[test]
    fn an_expired_credential_is_due_at_once() {
        let renew = RenewAt::draw(at(1000), at(2000), at(2500), u64::MAX);
        assert_eq!(renew.at(), at(2500));
        assert!(renew.is_due(at(2500)));
        assert!(!renew.is_due(at(2499)));
    }

    #[test]
    fn the_end_of_time_does_not_overflow() {
        let end = at(253_402_300_799);
        assert!(RenewAt::draw(at(0), end, at(0), 200).at() < end);
    }

    #[test]
    fn a_renewal_is_a_tenth_of_the_life_away() {
        assert_eq!(RenewAt::least_distance(at(100), at(700), at(100)), Duration::from_secs(60));
        assert_eq!(RenewAt::least_distance(at(100), at(700), at(50)), Duration::from_secs(60));
        assert_eq!(RenewAt::least_distance(at(700), at(100), at(100)), Duration::ZERO);
    }

    #[test]
    fn a_life_that_began_long_ago_does_not_push_the_renewal_past_its_end() {
        // A tenth of the life is 366 s, and 60 s are left.
        let (not_before, not_after, received_at) = (at(0), at(3660), at(3600));
        assert_eq!(RenewAt::least_distance(not_before, not_after, received_at), Duration::from_secs(20));
        assert!(received_at + Duration::from_secs(20) < RenewAt::draw(not_before, not_after, received_at, 0).at());
        assert_eq!(RenewAt::least_distance(at(0), at(3601), received_at), LEAST_DISTANCE);
    }

    #[test]
    fn what_is_over_when_it_comes_is_not_asked_for_in_a_storm() {
        for received_at in [at(3600), at(90_000)] {
            assert_eq!(RenewAt::least_distance(at(0), at(3600), received_at), Duration::from_secs(360));
        }
    }

    #[test]
    fn a_retry_comes_before_the_end() {
        let (long, least) = (Duration::from_secs(30), Duration::from_secs(1));
        let within = |left: u64| retry_within(long, at(1000 + left), at(1000), least).as_secs();
        assert_eq!([100, 60, 50, 20, 2, 1].map(within), [30, 30, 25, 10, 1, 1]);
        assert_eq!(within(0), 30);
        assert_eq!(retry_within(long, at(900), at(1000), least), long);
        assert_eq!(retry_within(Duration::ZERO, at(1100), at(1000), least), Duration::ZERO);
    }

    fn from_to(not_before: u64, not_after: u64) -> Validity {
        Validity { not_before: at(not_before), not_after: at(not_after) }
    }

    #[test]
    fn what_is_not_valid_waits_or_is_refused() {
        let current = Some(from_to(1000, 4600));
        let judge = |from, until| succeed(current, from_to(from, until), at(2000));
        assert_eq!(judge(1990, 5590), Succession::Now);
        assert_eq!(judge(2001, 5601), Succession::At(at(2001)));
        assert_eq!(judge(2600, 6200), Succession::At(at(2600)));
        assert_eq!(judge(2601, 6201), Succession::Never);
        assert_eq!(judge(88_390, 91_990), Succession::Never);
        assert_eq!(judge(100, 2000), Succession::Never);
        assert_eq!(succeed(Some(from_to(1000, 2100)), from_to(2200, 9000), at(2000)), Succession::At(at(2100)));
    }

    #[test]
    fn what_is_not_valid_gives_way_to_anything() {
        for current in [None, Some(from_to(0, 2000)), Some(from_to(2001, 9000))] {
            for next in [from_to(1990, 9000), from_to(90_000, 99_000), from_to(0, 1)] {
                assert_eq!(succeed(current, next, at(2000)), Succession::Now);
            }
        }
    }

    #[test]
    fn what_was_not_stored_waits_for_the_last_quarter() {
        let (current, next) = (from_to(1000, 5000), from_to(2990, 6990));
        let judge = |stored, now| succeed_stored(Some(current), next, stored, at(now));
        assert_eq!(judge(true, 3000), Succession::Now);
        assert_eq!(judge(false, 3000), Succession::At(at(4000)));
        assert_eq!(judge(false, 3999), Succession::At(at(4000)));
        assert_eq!(judge(false, 4000), Succession::Now);
        assert_eq!(judge(false, 5000), Succession::Now);
        assert_eq!(succeed_stored(None, next, false, at(3000)), Succession::Now);
    }

    #[test]
    fn an_attempt_ends_before_the_svid() {
        let current = from_to(1000, 2000);
        assert_eq!(patience(current, at(1000)), Some(Duration::from_secs(500)));
        assert_eq!(patience(current, at(1990)), Some(Duration::from_secs(5)));
        assert_eq!(patience(current, at(2000) - Duration::from_millis(300)), Some(Duration::from_millis(250)));
        assert_eq!(patience(current, at(2000) - Duration::from_millis(100)), Some(Duration::from_millis(100)));
        assert_eq!(patience(current, at(2000)), None);
        assert_eq!(patience(current, at(999)), None);
    }

    proptest! {
        #[test]
        fn nothing_good_is_given_up_for_what_is_not(
            current in prop::option::of((0_u64..9000, 0_u64..9000)),
            next in (0_u64..9000, 0_u64..9000),
            stored: bool,
            now in 0_u64..9000,
        ) {
            let current = current.map(|(from, life)| from_to(from, from + life));
            let next = from_to(next.0, next.0 + next.1);
            let good = current.is_some_and(|current| current.holds(at(now)));
            match succeed_stored(current, next, stored, at(now)) {
                Succession::Now => {
                    prop_assert!(!good || next.holds(at(now)));
                    prop_assert!(!good || stored || current.is_some_and(|current| current.last_quarter() <= at(now)));
                }
                // The wait ends, and before the end of what is in use.
                Succession::At(then) => {
                    prop_assert!(good && at(now) < then && current.is_some_and(|current| then <= current.not_after));
                }
                Succession::Never => prop_assert!(good && !next.holds(at(now))),
            }
        }
    }
}
