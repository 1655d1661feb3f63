//! Whether the wall clock can be trusted to delete by. It is held against the clock that counts from the boot of the
//! machine (suspended time included, never set by anybody): a wall clock that was set moves against it.
//!
//! A wrong clock may refuse something for as long as it is wrong; what it made a program delete stays lost. So whatever
//! is deleted because its time is over waits until both clocks have agreed for a while.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::watch;

use crate::clock::Clock;
use crate::shutdown::Shutdown;

/// How far the clocks may move against each other within [`AGREEMENT`] and still agree.
pub const TOLERANCE: Duration = Duration::from_secs(10);
/// How long the clocks must have agreed. It begins anew with each start and each step.
pub const AGREEMENT: Duration = Duration::from_secs(600);
/// How often both clocks are read.
const EVERY: Duration = Duration::from_secs(1);

/// The metadata of an answer to a health check in which a program tells how its clocks do ([`Steady::told`]).
pub const TOLD: &str = "signet-clock";

/// Tells whether the wall clock has agreed with the boot clock for ten minutes. Clones share what they have seen.
#[derive(Clone, Debug)]
pub struct Steady {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    clock: Clock,
    seen: Mutex<Seen>,
    steps: watch::Sender<u64>,
}

/// How far the wall clock is ahead of the boot clock, in nanoseconds, since both agree.
#[derive(Debug)]
struct Seen {
    /// Boot clock at which the agreement began.
    since: Duration,
    /// What was read, about once a second and at least back to [`AGREEMENT`] ago, by the boot clock. Never empty.
    ahead: VecDeque<(Duration, i128)>,
    last_step: Option<Step>,
    /// Whether the end of the wait has been logged.
    told: bool,
}

/// A step of the wall clock that was noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    /// How far, in nanoseconds: positive if the clock was set forward.
    pub nanoseconds: i128,
    /// What the boot clock showed when it was noticed.
    pub noticed: Duration,
}

impl Seen {
    fn new(boot: Duration, ahead: i128) -> Self {
        Self { since: boot, ahead: VecDeque::from([(boot, ahead)]), last_step: None, told: false }
    }

    /// Takes a reading of both clocks in; a step if the clocks disagree.
    fn observe(&mut self, boot: Duration, ahead: i128) -> Option<Step> {
        let tolerance = TOLERANCE.as_nanos() as i128;
        let begins = boot.saturating_sub(AGREEMENT);
        // One reading from before stays, so that a step while nobody looked (a suspend) is seen as well.
        while self.ahead.get(1).is_some_and(|(at, _)| *at <= begins) {
            self.ahead.pop_front();
        }
        let far = self.ahead.iter().map(|(_, then)| ahead - then).max_by_key(|moved| moved.abs()).unwrap_or(0);
        if far.abs() > tolerance {
            let step = Step { nanoseconds: far, noticed: boot };
            *self = Self { last_step: Some(step), ..Self::new(boot, ahead) };
            return Some(step);
        }
        if self.ahead.back().is_none_or(|(at, _)| boot.saturating_sub(*at) >= EVERY) {
            self.ahead.push_back((boot, ahead));
        }
        None
    }

    fn left(&self, boot: Duration) -> Duration {
        AGREEMENT.saturating_sub(boot.saturating_sub(self.since))
    }
}

impl Steady {
    /// Begins to watch `clock`: ten minutes from now it may be steady.
    pub fn new(clock: Clock) -> Self {
        let boot = clock.boot();
        let seen = Seen::new(boot, clock.ahead());
        Self { inner: Arc::new(Inner { clock, seen: Mutex::new(seen), steps: watch::Sender::new(0) }) }
    }

    /// Whether both clocks, read now, have agreed within ten seconds for ten minutes. Ask right before each deletion.
    pub fn is_steady(&self) -> bool {
        self.left().is_zero()
    }

    /// How long both clocks, read now, must go on agreeing until [`Steady::is_steady`] is true; zero if it is.
    pub fn left(&self) -> Duration {
        self.look().0
    }

    /// The last step of the wall clock that was noticed since the start, if any, with how long ago that was.
    pub fn last_step(&self) -> Option<(Step, Duration)> {
        let (_, step, boot) = self.look();
        step.map(|step| (step, boot.saturating_sub(step.noticed)))
    }

    /// What there is to say of the clocks, in one line of ASCII without an end.
    pub fn told(&self) -> String {
        told(self.left(), self.last_step())
    }

    /// Counts the steps of the wall clock that were noticed. Whoever has told others something that depends on the time
    /// looks at all of it again when this changes.
    pub fn steps(&self) -> watch::Receiver<u64> {
        self.inner.steps.subscribe()
    }

    /// Reads both clocks each second until `shutdown`, logs steps and keeps the metrics `clock.steps` and
    /// `clock.steady`.
    pub async fn run(self, shutdown: Shutdown) {
        loop {
            let steady = self.is_steady();
            metrics::gauge!("clock.steady").set(if steady { 1.0 } else { 0.0 });
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = shutdown.requested() => return,
            }
        }
    }

    /// Reads both clocks: what is left to wait, the last step, and the boot clock.
    fn look(&self) -> (Duration, Option<Step>, Duration) {
        let (left, last_step, boot, step, told) = {
            let mut seen = self.inner.seen.lock().unwrap_or_else(PoisonError::into_inner);
            let boot = self.inner.clock.boot();
            let step = seen.observe(boot, self.inner.clock.ahead());
            let left = seen.left(boot);
            let told = std::mem::replace(&mut seen.told, left.is_zero());
            (left, seen.last_step, boot, step, told)
        };
        if let Some(step) = step {
            metrics::counter!("clock.steps").increment(1);
            tracing::warn!(
                seconds = seconds(step),
                "The wall clock was set. What has ended by it is not deleted until it has agreed with the boot clock for \
                 ten minutes. If nobody set it on purpose, look at the time service of this machine"
            );
            self.inner.steps.send_modify(|steps| *steps = steps.wrapping_add(1));
        }
        if left.is_zero() && !told {
            tracing::debug!("The wall clock and the boot clock have agreed for ten minutes");
        }
        (left, last_step, boot)
    }
}

/// What is to be said of the clock, in one line of ASCII.
fn told(left: Duration, last_step: Option<(Step, Duration)>) -> String {
    let step = last_step.map(|(step, ago)| {
        let seconds = seconds(step);
        let direction = if seconds < 0 { "back" } else { "forward" };
        format!("it was set {direction} by {} s, {} s ago", seconds.unsigned_abs(), ago.as_secs())
    });
    match (left.is_zero(), step) {
        (true, None) => "the wall clock and the boot clock agree".to_owned(),
        (true, Some(step)) => format!("the wall clock and the boot clock agree again; {step}"),
        (false, None) => {
            format!("the server started less than ten minutes ago; nothing is deleted by time for {} s", left.as_secs())
        }
        (false, Some(step)) => format!(
            "the wall clock and the boot clock disagreed: {step}; nothing is deleted by time for {} s",
            left.as_secs()
        ),
    }
}

/// A step in whole seconds, rounded towards zero: for people.
pub fn seconds(step: Step) -> i64 {
    i64::try_from(step.nanoseconds / 1_000_000_000).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    const DAY: Duration = Duration::from_secs(86_400);

    fn clock() -> Clock {
        Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000))
    }

    async fn pass(seconds: u64) {
        tokio::time::advance(Duration::from_secs(seconds)).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_start_waits_ten_minutes() {
        let steady = Steady::new(clock());
        assert_eq!(steady.left(), Duration::from_secs(600));
        pass(599).await;
        assert!(!steady.is_steady());
        pass(1).await;
        assert!(steady.is_steady());
        assert_eq!((steady.left(), steady.last_step()), (Duration::ZERO, None));
        // A restart knows nothing of before.
        assert!(!Steady::new(clock()).is_steady());
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_in_either_direction_begins_the_wait_anew() {
        let clock = clock();
        let steady = Steady::new(clock.clone());
        let steps = steady.steps();
        pass(600).await;
        assert!(steady.is_steady());
        clock.step_forward(DAY);
        assert!(!steady.is_steady());
        assert_eq!(*steps.borrow(), 1);
        let step = Step { nanoseconds: 86_400_000_000_000, noticed: Duration::from_secs(600) };
        pass(60).await;
        assert_eq!(steady.last_step(), Some((step, Duration::from_secs(60))));
        clock.step_back(DAY);
        assert!(!steady.is_steady());
        assert_eq!(*steps.borrow(), 2);
        assert_eq!(steady.last_step().map(|(step, _)| seconds(step)), Some(-86_400));
        pass(599).await;
        assert!(!steady.is_steady());
        pass(1).await;
        assert!(steady.is_steady());
        assert_eq!(*steps.borrow(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn ten_seconds_are_agreement_and_more_is_a_step() {
        let clock = clock();
        let steady = Steady::new(clock.clone());
        pass(600).await;
        clock.step_back(Duration::from_secs(10));
        assert!(steady.is_steady());
        clock.step_back(Duration::from_nanos(1));
        assert!(!steady.is_steady());
        assert_eq!(*steady.steps().borrow(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn small_steps_add_up_within_ten_minutes_and_not_beyond() {
        let clock = clock();
        let steady = Steady::new(clock.clone());
        // 500 millionths, as fast as a time service lets a clock run, for a day.
        for _ in 0..1_440 {
            pass(60).await;
            clock.step_forward(Duration::from_millis(30));
            steady.left();
        }
        assert!(steady.is_steady());
        assert_eq!(*steady.steps().borrow(), 0);
        for _ in 0..11 {
            pass(50).await;
            clock.step_forward(Duration::from_secs(1));
            steady.left();
        }
        assert_eq!(*steady.steps().borrow(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_that_nobody_saw_happen_is_noticed_later() {
        let clock = clock();
        let steady = Steady::new(clock.clone());
        pass(900).await;
        clock.step_forward(DAY);
        // A suspend: no reading for a week, and both clocks went on.
        pass(7 * 86_400).await;
        assert!(!steady.is_steady());
        assert_eq!(*steady.steps().borrow(), 1);
        pass(600).await;
        assert!(steady.is_steady());
        pass(7 * 86_400).await;
        assert!(steady.is_steady());
    }

    #[tokio::test(start_paused = true)]
    async fn the_task_looks_each_second() {
        let clock = clock();
        let steady = Steady::new(clock.clone());
        let (trigger, shutdown) = Shutdown::new();
        let mut steps = steady.steps();
        let run = steady.clone().run(shutdown);
        let before = tokio::time::Instant::now();
        tokio::join!(run, async {
            clock.step_back(DAY);
            steps.changed().await.unwrap();
            assert!(before.elapsed() <= EVERY, "{:?}", before.elapsed());
            clock.step_forward(DAY);
            steps.changed().await.unwrap();
            assert!(before.elapsed() <= 2 * EVERY, "{:?}", before.elapsed());
            trigger.request();
        });
    }

    #[test]
    fn what_is_said_of_the_clock() {
        let seconds = Duration::from_secs;
        let step = |days: i128| Step { nanoseconds: days * 86_400_000_000_000, noticed: seconds(7) };
        assert_eq!(told(seconds(0), None), "the wall clock and the boot clock agree");
        assert_eq!(
            told(seconds(0), Some((step(-1), seconds(700)))),
            "the wall clock and the boot clock agree again; it was set back by 86400 s, 700 s ago"
        );
        assert_eq!(
            told(seconds(540), None),
            "the server started less than ten minutes ago; nothing is deleted by time for 540 s"
        );
        assert_eq!(
            told(seconds(540), Some((step(1), seconds(60)))),
            "the wall clock and the boot clock disagreed: it was set forward by 86400 s, 60 s ago; nothing is deleted by \
             time for 540 s"
        );
    }
}
