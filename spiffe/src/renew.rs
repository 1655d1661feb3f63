//! When a credential is to be renewed, drawn once when it is received.

use std::time::{Duration, SystemTime};

/// However little is left of a credential that is not over, it is not renewed sooner than this after its receipt.
const LEAST_DISTANCE: Duration = Duration::from_millis(500);

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
}

/// Whether a new credential may take the place of the one that is held. What is not valid by the own clock never replaces
/// what is: either clock may be wrong, and the holder can use only what its own says is good.
pub fn may_replace(held: Option<Validity>, next: Validity, now: SystemTime) -> bool {
    next.holds(now) || !held.is_some_and(|held| held.holds(now))
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
    use super::*;
    use std::time::UNIX_EPOCH;

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
    fn nothing_valid_is_replaced_by_what_is_not() {
        let of = |from, to| Validity { not_before: at(from), not_after: at(to) };
        let held = of(100, 200);
        for (next, now, expected) in [
            (of(150, 250), 160, true),
            (of(161, 250), 160, false),
            (of(160, 250), 160, true),
            (of(10, 160), 160, false),
            // What is held is not valid either: the newer one is the better guess.
            (of(300, 400), 200, true),
            (of(300, 400), 99, true),
            (of(10, 20), 200, true),
        ] {
            assert_eq!(may_replace(Some(held), next, at(now)), expected, "{next:?} at {now}");
        }
        assert!(may_replace(None, of(300, 400), at(5)));
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
}
