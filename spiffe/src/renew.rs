//! When a credential is to be renewed, drawn once when it is received.

use std::time::{Duration, SystemTime};

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

    /// The least distance between two renewals of one credential: a tenth of its life, so that
    /// a server that hands out almost expired credentials is not stormed.
    pub fn least_distance(not_before: SystemTime, not_after: SystemTime) -> Duration {
        not_after.duration_since(not_before).unwrap_or_default() / 10
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
    fn two_renewals_are_a_tenth_of_the_life_apart() {
        assert_eq!(RenewAt::least_distance(at(100), at(700)), Duration::from_secs(60));
        assert_eq!(RenewAt::least_distance(at(700), at(100)), Duration::ZERO);
    }
}
