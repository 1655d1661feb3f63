//! Rate limits of the network listener, per client address.
//!
//! A call over its limit *waits* for its turn instead of being refused: agents of every make back off
//! for minutes after a refusal, and a fleet that starts together should start in seconds. What bounds the
//! waiting is the deadline of the call, and [`WAITERS`] calls at once from one address. Callers of the local
//! socket are never limited.
//!
//! The arithmetic is a token bucket whose burst is one second of its rate, kept as one instant per address: the moment
//! at which the bucket will be full again.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use thiserror::Error;
use tokio::time::Instant;

/// How many calls of one address may wait in one bucket.
pub const WAITERS: u32 = 32;

/// How long a call waits when its client named no deadline.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// An address that was not seen for one to two of these is forgotten.
const GENERATION: Duration = Duration::from_secs(60);

/// Addresses remembered in one generation. Further ones share a bucket, so that memory stays bounded.
const ADDRESSES: usize = 65_536;

/// Which bucket a method draws from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Not limited.
    Unlimited,
    /// Node attestations: one a second.
    Attestation,
    /// Certificates for workloads and agents: 500 a second, one bucket for all methods that sign a CSR.
    CertificateSigning,
    /// JWT-SVIDs: 500 a second.
    JwtSigning,
    /// Status reports of agents: ten a second.
    Status,
}

/// Why a call may not go on.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum LimitError {
    /// The call wants more than the bucket ever holds.
    #[error("rate ({count}) exceeds burst size ({burst})")]
    AboveBurst {
        /// What the call asked for.
        count: u32,
        /// What the bucket holds when full.
        burst: u32,
    },
    /// Its turn would come after its deadline.
    #[error("rate: Wait(n={count}) would exceed context deadline")]
    AfterDeadline {
        /// What the call asked for.
        count: u32,
    },
    /// Too many calls of this address wait already.
    #[error("too many calls of this address are waiting ({WAITERS})")]
    TooManyWaiting,
}

/// The limits of one server.
#[derive(Clone, Debug)]
pub struct Limits {
    attestation: Option<Arc<Buckets>>,
    certificate_signing: Option<Arc<Buckets>>,
    jwt_signing: Option<Arc<Buckets>>,
    status: Option<Arc<Buckets>>,
}

impl Limits {
    /// Limits as configured: `attestation` and `signing` can be switched off, the others cannot.
    pub fn new(attestation: bool, signing: bool) -> Self {
        let at = |rate| Some(Arc::new(Buckets::new(rate)));
        Self {
            attestation: attestation.then(|| Arc::new(Buckets::new(1))),
            certificate_signing: signing.then(|| Arc::new(Buckets::new(500))),
            jwt_signing: signing.then(|| Arc::new(Buckets::new(500))),
            status: at(10),
        }
    }

    /// Waits until `count` calls of `limit` may go on for a client at `address`, not beyond `deadline`.
    ///
    /// # Errors
    /// [`LimitError`], at once, when waiting is of no use. A call that is dropped while it waits gives its
    /// place back.
    pub async fn admit(
        &self,
        limit: Limit,
        address: Option<IpAddr>,
        count: u32,
        deadline: Option<Instant>,
    ) -> Result<(), LimitError> {
        let buckets = match limit {
            Limit::Unlimited => None,
            Limit::Attestation => self.attestation.as_ref(),
            Limit::CertificateSigning => self.certificate_signing.as_ref(),
            Limit::JwtSigning => self.jwt_signing.as_ref(),
            Limit::Status => self.status.as_ref(),
        };
        match (buckets, address) {
            (Some(buckets), Some(address)) => buckets.admit(address.to_canonical(), count, deadline).await,
            _ => Ok(()),
        }
    }
}

/// One bucket an address.
#[derive(Debug)]
struct Buckets {
    rate: u32,
    known: Mutex<Generations>,
}

#[derive(Debug)]
struct Generations {
    began: Instant,
    current: HashMap<IpAddr, Bucket>,
    previous: HashMap<IpAddr, Bucket>,
    /// What addresses beyond [`ADDRESSES`] share.
    others: Bucket,
}

/// The state of one address.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    full_at: Instant,
    waiting: u32,
}

impl Bucket {
    fn full(now: Instant) -> Self {
        Self { full_at: now, waiting: 0 }
    }

    /// Takes `count` of a bucket that refills by `rate` a second and holds `rate`.
    /// Returns how long the caller has to wait, or why it must not; nothing is taken then.
    fn take(&mut self, rate: u32, count: u32, now: Instant, deadline: Instant) -> Result<Duration, LimitError> {
        if count > rate {
            return Err(LimitError::AboveBurst { count, burst: rate });
        }
        let full_at = self.full_at.max(now) + cost(rate, count);
        let wait = full_at.duration_since(now).saturating_sub(Duration::from_secs(1));
        if !wait.is_zero() {
            if now + wait > deadline {
                return Err(LimitError::AfterDeadline { count });
            }
            if self.waiting >= WAITERS {
                return Err(LimitError::TooManyWaiting);
            }
            self.waiting += 1;
        }
        self.full_at = full_at;
        Ok(wait)
    }
}

/// How long a bucket of `rate` a second needs to refill `count`.
fn cost(rate: u32, count: u32) -> Duration {
    Duration::from_secs(1) * count / rate
}

impl Buckets {
    fn new(rate: u32) -> Self {
        let now = Instant::now();
        let known =
            Generations { began: now, current: HashMap::new(), previous: HashMap::new(), others: Bucket::full(now) };
        Self { rate, known: Mutex::new(known) }
    }

    async fn admit(&self, address: IpAddr, count: u32, deadline: Option<Instant>) -> Result<(), LimitError> {
        let now = Instant::now();
        let deadline = deadline.map_or(now + LONGEST_WAIT, |named| named.min(now + LONGEST_WAIT));
        let wait = self.with(address, now, |bucket| bucket.take(self.rate, count, now, deadline))?;
        if wait.is_zero() {
            return Ok(());
        }
        let mut place = Place { buckets: self, address, count, reached: false };
        tokio::time::sleep(wait).await;
        place.reached = true;
        Ok(())
    }

    fn with<T>(&self, address: IpAddr, now: Instant, change: impl FnOnce(&mut Bucket) -> T) -> T {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = &mut *known;
        if now.duration_since(known.began) >= GENERATION {
            known.previous = std::mem::take(&mut known.current);
            known.began = now;
        }
        if let Some(bucket) = known.current.get_mut(&address) {
            return change(bucket);
        }
        if known.current.len() >= ADDRESSES {
            return change(&mut known.others);
        }
        let bucket = known.previous.remove(&address).unwrap_or(Bucket::full(now));
        change(known.current.entry(address).or_insert(bucket))
    }
}

/// A waiting call. Dropped before its turn it gives back what it had reserved.
struct Place<'a> {
    buckets: &'a Buckets,
    address: IpAddr,
    count: u32,
    reached: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let back = if self.reached { Duration::ZERO } else { cost(self.buckets.rate, self.count) };
        self.buckets.with(self.address, Instant::now(), |bucket| {
            bucket.waiting = bucket.waiting.saturating_sub(1);
            bucket.full_at = bucket.full_at.checked_sub(back).unwrap_or(bucket.full_at);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const A: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 1));
    const B: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(192, 0, 2, 2));

    fn far() -> Option<Instant> {
        Some(Instant::now() + Duration::from_secs(600))
    }

    #[tokio::test(start_paused = true)]
    async fn the_second_attestation_waits_a_second_and_another_address_does_not() {
        let limits = Limits::new(true, true);
        let began = Instant::now();
        assert_eq!(limits.admit(Limit::Attestation, Some(A), 1, far()).await, Ok(()));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(limits.admit(Limit::Attestation, Some(B), 1, far()).await, Ok(()));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(limits.admit(Limit::Attestation, Some(A), 1, far()).await, Ok(()));
        assert!(began.elapsed() >= Duration::from_secs(1) && began.elapsed() < Duration::from_millis(1010));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cost_above_the_burst_is_refused_at_once() {
        let limits = Limits::new(true, true);
        let refused = limits.admit(Limit::CertificateSigning, Some(A), 501, far()).await;
        assert_eq!(refused, Err(LimitError::AboveBurst { count: 501, burst: 500 }));
        assert_eq!(refused.unwrap_err().to_string(), "rate (501) exceeds burst size (500)");
        assert_eq!(limits.admit(Limit::CertificateSigning, Some(A), 500, far()).await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn local_callers_and_switched_off_limits_never_wait() {
        let limits = Limits::new(false, false);
        let began = Instant::now();
        for _ in 0..2_000 {
            assert_eq!(limits.admit(Limit::Attestation, Some(A), 1, far()).await, Ok(()));
            assert_eq!(limits.admit(Limit::CertificateSigning, Some(A), 501, far()).await, Ok(()));
            assert_eq!(limits.admit(Limit::Status, None, 1, far()).await, Ok(()));
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_turn_comes_after_its_deadline_is_told_at_once_and_takes_nothing() {
        let limits = Limits::new(true, true);
        assert_eq!(limits.admit(Limit::Attestation, Some(A), 1, far()).await, Ok(()));
        let soon = Some(Instant::now() + Duration::from_millis(300));
        let refused = limits.admit(Limit::Attestation, Some(A), 1, soon).await;
        assert_eq!(refused, Err(LimitError::AfterDeadline { count: 1 }));
        let began = Instant::now();
        assert_eq!(limits.admit(Limit::Attestation, Some(A), 1, far()).await, Ok(()));
        assert!(began.elapsed() < Duration::from_millis(1010));
    }

    #[tokio::test(start_paused = true)]
    async fn the_thirty_third_waiter_is_refused_and_a_dropped_one_gives_its_place_back() {
        let limits = Limits::new(true, true);
        // A rate of ten a second: thirty-two waiters fit well within the longest wait.
        for _ in 0..10 {
            assert_eq!(limits.admit(Limit::Status, Some(A), 1, far()).await, Ok(()));
        }
        let mut waiting = Vec::new();
        for _ in 0..WAITERS {
            let mut call = Box::pin(limits.admit(Limit::Status, Some(A), 1, far()));
            assert!(futures_util::poll!(&mut call).is_pending());
            waiting.push(call);
        }
        let refused = limits.admit(Limit::Status, Some(A), 1, far()).await;
        assert_eq!(refused, Err(LimitError::TooManyWaiting));
        drop(waiting);
        let began = Instant::now();
        assert_eq!(limits.admit(Limit::Status, Some(A), 1, far()).await, Ok(()));
        assert!(began.elapsed() < Duration::from_millis(120), "{:?}", began.elapsed());
    }

    proptest! {
        /// In any order of calls, what has been let through by any moment is at most the burst and what was
        /// refilled until then.
        #[test]
        fn never_more_than_burst_and_rate(
            rate in 1_u32..600,
            calls in proptest::collection::vec((0_u64..3_000, 1_u32..600), 1..60),
        ) {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build()?;
            let _entered = runtime.enter();
            let start = Instant::now();
            let mut bucket = Bucket::full(start);
            let mut now = start;
            let mut through: Vec<(Duration, u32)> = Vec::new();
            for (pause, count) in calls {
                now += Duration::from_millis(pause);
                let deadline = now + Duration::from_secs(20);
                match bucket.take(rate, count, now, deadline) {
                    Ok(wait) => {
                        prop_assert!(now + wait <= deadline);
                        if !wait.is_zero() { bucket.waiting -= 1; }
                        through.push(((now + wait).duration_since(start), count));
                    }
                    Err(LimitError::AboveBurst { .. }) => prop_assert!(count > rate),
                    Err(_) => {}
                }
            }
            for (until, _) in &through {
                let passed: u64 = through.iter().filter(|(at, _)| at <= until).map(|(_, n)| u64::from(*n)).sum();
                let allowed = f64::from(rate) * (1.0 + until.as_secs_f64());
                #[allow(clippy::cast_precision_loss)]
                let passed = passed as f64;
                prop_assert!(passed <= allowed + 0.01, "{passed} of {allowed}");
            }
        }
    }
}
