//! The wall clock, as a value that is passed in, so that tests own the time.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, SystemTime};

use tokio::time::Instant;

/// How long a sleep trusts the clock before it reads it again: a suspended machine or a stepped clock costs at most this.
const REREAD: Duration = Duration::from_secs(5);

/// How often [`Clock::stepped`] looks.
const LOOK: Duration = Duration::from_secs(2);

/// By how much the clock must have been set to be noticed there.
const STEP: Duration = Duration::from_secs(1);

/// A source of wall-clock time. Cheap to clone; clones show the same time.
#[derive(Clone, Debug)]
pub struct Clock {
    source: Source,
}

#[derive(Clone, Debug)]
enum Source {
    System,
    /// Wall time that runs with tokio's clock, which tests may pause; `stepped` is in nanoseconds.
    Derived {
        origin: Instant,
        start: SystemTime,
        stepped: Arc<AtomicI64>,
    },
}

impl Clock {
    /// The clock of the operating system.
    pub fn system() -> Self {
        Self { source: Source::System }
    }

    /// A clock that shows `start` now and from then on advances with tokio's clock: with paused tokio time it stands
    /// still until the test advances it.
    pub fn paused(start: SystemTime) -> Self {
        Self { source: Source::Derived { origin: Instant::now(), start, stepped: Arc::new(AtomicI64::new(0)) } }
    }

    /// The time now.
    pub fn now(&self) -> SystemTime {
        match &self.source {
            #[allow(clippy::disallowed_methods, reason = "the one place where the system's clock is read")]
            Source::System => SystemTime::now(),
            Source::Derived { origin, start, stepped } => {
                let elapsed = Instant::now().saturating_duration_since(*origin);
                let stepped = stepped.load(Ordering::SeqCst);
                let shown = start.checked_add(elapsed).unwrap_or(*start);
                let by = Duration::from_nanos(stepped.unsigned_abs());
                let moved = if stepped < 0 { shown.checked_sub(by) } else { shown.checked_add(by) };
                moved.unwrap_or(shown)
            }
        }
    }

    /// The time since the machine was booted, suspended time included: nobody sets this clock. For a derived clock, the
    /// time since it was made by tokio's clock, whatever it was stepped by.
    pub fn boot(&self) -> Duration {
        match &self.source {
            // A kernel without this clock does not exist any more; there it would stand still, and nothing be steady.
            Source::System => {
                nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).map(Duration::from).unwrap_or_default()
            }
            Source::Derived { origin, .. } => Instant::now().saturating_duration_since(*origin),
        }
    }

    /// How far the wall clock is ahead of the boot clock, in nanoseconds: it changes only when the wall clock is set or
    /// steered.
    pub fn ahead(&self) -> i128 {
        let boot = self.boot();
        let wall = match self.now().duration_since(SystemTime::UNIX_EPOCH) {
            Ok(after) => after.as_nanos() as i128,
            Err(before) => -(before.duration().as_nanos() as i128),
        };
        wall - boot.as_nanos() as i128
    }

    /// Whether the wall clock has moved by more than a second against the boot clock since [`Clock::ahead`] gave `ahead`.
    pub fn was_set_since(&self, ahead: i128) -> bool {
        self.ahead().abs_diff(ahead) > STEP.as_nanos()
    }

    /// Waits until [`Clock::was_set_since`]; looks every other second. Whoever sleeps until a time looks again then: what is due by the new time may be past already, and what
    /// was valid may not have begun.
    pub async fn stepped(&self, ahead: i128) {
        while !self.was_set_since(ahead) {
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Steps a derived clock forward, as an operator or NTP would; waiting tasks notice within five seconds of tokio
    /// time. Does nothing to the system's clock.
    pub fn step_forward(&self, by: Duration) {
        self.step(i64::try_from(by.as_nanos()).unwrap_or(i64::MAX));
    }

    /// Steps a derived clock back. Does nothing to the system's clock.
    pub fn step_back(&self, by: Duration) {
        self.step(-i64::try_from(by.as_nanos()).unwrap_or(i64::MAX));
    }

    fn step(&self, nanoseconds: i64) {
        if let Source::Derived { stepped, .. } = &self.source {
            stepped.fetch_add(nanoseconds, Ordering::SeqCst);
        }
    }

    /// Waits until this clock shows `at` or later. The clock is read again at least every five seconds, so that a
    /// suspended machine or a stepped clock delays the wake-up by seconds only.
    pub async fn sleep_until(&self, at: SystemTime) {
        while let Ok(left) = at.duration_since(self.now()) {
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(REREAD)).await;
        }
    }

    /// Waits for `duration`, whatever the wall clock is set to meanwhile. Time in which the machine was suspended counts,
    /// and is noticed within five seconds.
    pub async fn sleep(&self, duration: Duration) {
        let begun = self.boot();
        loop {
            let left = duration.saturating_sub(self.boot().saturating_sub(begun));
            if left.is_zero() {
                return;
            }
            tokio::time::sleep(left.min(REREAD)).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start() -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)
    }

    #[tokio::test(start_paused = true)]
    async fn derived_clock_follows_paused_time() {
        let clock = Clock::paused(start());
        assert_eq!(clock.now(), start());
        tokio::time::advance(Duration::from_secs(90)).await;
        assert_eq!(clock.now(), start() + Duration::from_secs(90));
    }

    #[tokio::test(start_paused = true)]
    async fn sleep_ends_at_the_exact_time() {
        let clock = Clock::paused(start());
        clock.sleep_until(start() + Duration::from_millis(12_345)).await;
        assert_eq!(clock.now(), start() + Duration::from_millis(12_345));
        clock.sleep_until(start()).await;
        assert_eq!(clock.now(), start() + Duration::from_millis(12_345));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stepped_clock_is_noticed_within_five_seconds() {
        let clock = Clock::paused(start());
        let waiting = clock.clone();
        let before = Instant::now();
        tokio::join!(waiting.sleep_until(start() + Duration::from_secs(3600)), async {
            clock.step_forward(Duration::from_secs(3600));
        });
        assert!(Instant::now() - before <= REREAD);
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_set_back_waits_longer() {
        let clock = Clock::paused(start());
        clock.step_back(Duration::from_secs(60));
        assert_eq!(clock.now(), start() - Duration::from_secs(60));
        let before = Instant::now();
        clock.sleep_until(start()).await;
        assert_eq!(Instant::now() - before, Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn a_stepped_clock_does_not_change_a_duration() {
        let clock = Clock::paused(start());
        let before = Instant::now();
        tokio::join!(clock.sleep(Duration::from_secs(30)), async {
            clock.step_back(Duration::from_secs(86_400));
        });
        assert_eq!(Instant::now() - before, Duration::from_secs(30));
        tokio::join!(clock.sleep(Duration::from_secs(30)), async {
            clock.step_forward(Duration::from_secs(86_400));
        });
        assert_eq!(Instant::now() - before, Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn the_boot_clock_is_not_stepped() {
        let clock = Clock::paused(start());
        tokio::time::advance(Duration::from_secs(7)).await;
        clock.step_forward(Duration::from_secs(86_400));
        assert_eq!(clock.boot(), Duration::from_secs(7));
        clock.step_back(Duration::from_secs(172_800));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(clock.clone().boot(), Duration::from_secs(8));
    }

    #[test]
    fn the_system_has_a_boot_clock() {
        assert!(Clock::system().boot() > Duration::ZERO);
    }
}
