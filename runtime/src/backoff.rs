//! Waiting longer after each failure.

use std::time::Duration;

use crate::entropy::Entropy;

/// Exponential back-off: doubles from `first` to `cap`, each wait spread by a tenth in both directions so that many
/// clients of one server that came back do not come together.
#[derive(Clone, Debug)]
pub struct Backoff {
    first: Duration,
    cap: Duration,
    next: Duration,
}

impl Backoff {
    /// A back-off whose first wait is about `first` and whose longest is `cap`.
    pub fn new(first: Duration, cap: Duration) -> Self {
        let first = first.min(cap);
        Self { first, cap, next: first }
    }

    /// The next wait; never longer than the cap.
    pub fn next(&mut self, entropy: &Entropy) -> Duration {
        let plain = self.next;
        self.next = plain.saturating_mul(2).min(self.cap);
        plain.mul_f64(0.9 + 0.2 * entropy.unit()).min(self.cap)
    }

    /// Starts again from the first wait: to be called after a success.
    pub fn reset(&mut self) {
        self.next = self.first;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn doubles_up_to_the_cap_within_a_tenth() {
        let entropy = Entropy::seeded(1);
        let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
        for plain in [1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0] {
            let wait = backoff.next(&entropy).as_secs_f64();
            assert!(wait >= plain * 0.9 - 1e-6 && wait <= (plain * 1.1).min(30.0), "{wait} around {plain}");
        }
        backoff.reset();
        assert!(backoff.next(&entropy) <= Duration::from_millis(1100));
    }

    #[test]
    fn first_above_the_cap_is_the_cap() {
        let mut backoff = Backoff::new(Duration::from_secs(60), Duration::from_secs(5));
        assert!(backoff.next(&Entropy::seeded(2)) <= Duration::from_secs(5));
    }
}
