//! Reconcilers: tasks that look at what is and do what is missing. They are woken by nudges and by the clock, and take
//! their input from neither, so that a lost nudge costs delay only.

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::Notify;

use crate::backoff::Backoff;
use crate::clock::Clock;
use crate::entropy::Entropy;
use crate::shutdown::Shutdown;

/// Wakes one waiting task. Nudges do not queue: any number of them before the task waits are one.
#[derive(Clone, Debug, Default)]
pub struct Nudge {
    notify: Arc<Notify>,
}

impl Nudge {
    /// A nudge nobody has given yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Wakes the waiting task, or makes its next wait return at once.
    pub fn nudge(&self) {
        self.notify.notify_one();
    }

    /// Waits for a nudge.
    pub async fn nudged(&self) {
        self.notify.notified().await;
    }

    /// Waits for a nudge or until `clock` shows `at`, whichever comes first; without `at`, for a nudge alone.
    pub async fn nudged_or_at(&self, clock: &Clock, at: Option<SystemTime>) {
        match at {
            Some(at) => tokio::select! {
                () = self.nudged() => {}
                () = clock.sleep_until(at) => {}
            },
            None => self.nudged().await,
        }
    }
}

/// When a failed step is tried again.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_CAP: Duration = Duration::from_secs(30);

/// Runs `step` at once, then whenever it asked to be woken or `nudge` was given, until `shutdown`.
///
/// A step returns when it wants to be woken (`None`: by nudges only). When the clock is set it is woken as well, within
/// two seconds: a time that lay ahead may be past, and what was valid may not have begun. After an error, which is logged under `name`, it
/// is tried again with back-off of 1 to 30 s, whatever the clock is set to, or sooner by a nudge. A step under way is never cut off by shutdown.
pub async fn run<F, E>(
    name: &'static str,
    nudge: Nudge,
    clock: Clock,
    entropy: Entropy,
    shutdown: Shutdown,
    mut step: impl FnMut() -> F,
) where
    F: Future<Output = Result<Option<SystemTime>, E>>,
    E: std::error::Error,
{
    let mut backoff = Backoff::new(RETRY_FIRST, RETRY_CAP);
    while !shutdown.is_requested() {
        // Before the step reads the clock.
        let ahead = clock.ahead();
        let wake = match step().await {
            Ok(at) => {
                backoff.reset();
                Ok(at)
            }
            Err(error) => {
                let wait = backoff.next(&entropy);
                tracing::warn!(reconciler = name, error = crate::telemetry::chain(&error), retry_in = ?wait, "A step failed");
                Err(wait)
            }
        };
        let woken = async {
            match wake {
                Ok(at) => nudge.nudged_or_at(&clock, at).await,
                Err(wait) => tokio::select! {
                    () = nudge.nudged() => {}
                    () = clock.sleep(wait) => {}
                },
            }
        };
        tokio::select! {
            () = woken => {}
            () = clock.stepped(ahead) => {}
            () = shutdown.requested() => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[tokio::test]
    async fn nudges_before_the_wait_are_one() {
        let nudge = Nudge::new();
        nudge.nudge();
        nudge.clone().nudge();
        nudge.nudged().await;
        assert!(futures_util::FutureExt::now_or_never(nudge.nudged()).is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn runs_at_the_asked_time_and_retries_failures() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000);
        let clock = Clock::paused(start);
        let (trigger, shutdown) = Shutdown::new();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (log, watch) = (Arc::clone(&seen), clock.clone());
        run("test", Nudge::new(), clock, Entropy::seeded(1), shutdown, move || {
            let now = watch.now();
            let mut log = log.lock().unwrap();
            log.push(now.duration_since(start).unwrap().as_secs());
            let result = match log.len() {
                1 => Ok(Some(now + Duration::from_secs(100))),
                2 => Err(std::io::Error::other("not yet")),
                _ => {
                    trigger.request();
                    Ok(None)
                }
            };
            async move { result }
        })
        .await;
        let seen = seen.lock().unwrap();
        assert_eq!(seen.len(), 3);
        assert_eq!(seen[1], 100);
        assert!((100..=101).contains(&seen[2]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_that_is_set_wakes_a_step_that_waits_for_nothing() {
        let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000));
        let (trigger, shutdown) = Shutdown::new();
        let before = tokio::time::Instant::now();
        let mut runs = 0;
        let stepped = clock.clone();
        run("test", Nudge::new(), clock, Entropy::seeded(1), shutdown, move || {
            runs += 1;
            // While the step is under way: nothing is missed between its look at the clock and its wait.
            match runs {
                1 => stepped.step_back(Duration::from_secs(86_400)),
                2 => stepped.step_forward(Duration::from_secs(86_400)),
                _ => trigger.request(),
            }
            async { Ok::<_, std::io::Error>(None) }
        })
        .await;
        assert!(before.elapsed() <= Duration::from_secs(4), "{:?}", before.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_clock_set_back_does_not_put_off_a_retry() {
        let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000));
        let (trigger, shutdown) = Shutdown::new();
        let before = tokio::time::Instant::now();
        let mut failed = false;
        let stepped = clock.clone();
        run("test", Nudge::new(), clock, Entropy::seeded(1), shutdown, move || {
            let result = if std::mem::replace(&mut failed, true) {
                trigger.request();
                Ok(None)
            } else {
                // Steps once the wait has begun.
                let stepped = stepped.clone();
                #[allow(clippy::disallowed_methods, reason = "ends with the test")]
                tokio::spawn(async move { stepped.step_back(Duration::from_secs(86_400)) });
                Err(std::io::Error::other("not yet"))
            };
            async move { result }
        })
        .await;
        assert!(before.elapsed() <= Duration::from_secs(2), "{:?}", before.elapsed());
    }
}
