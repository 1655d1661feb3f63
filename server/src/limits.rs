//! Rate limits of the network listener, per caller: whoever proves an id draws from the bucket of that id, wherever it
//! calls from; everybody else from that of an IPv4 address, or of an IPv6 /64, since whoever has one address there has
//! them all. A /64 often is a whole site, so its share is larger.
//!
//! A call over its limit *waits* for its turn instead of being refused: agents of every make back off
//! for minutes after a refusal, and a fleet that starts together should start in seconds. What bounds the
//! waiting is the deadline of the call, and [`WAITERS`] calls at once of one caller. Callers of the local
//! socket are never limited.
//!
//! The arithmetic is a token bucket whose burst is one second of its rate, kept as one instant per caller: the moment
//! at which the bucket will be full again.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use spiffe::id::SpiffeId;
use thiserror::Error;
use tokio::time::Instant;

/// How many calls of one caller may wait in one bucket.
pub const WAITERS: u32 = 32;

/// How long a call waits when its client named no deadline.
pub const LONGEST_WAIT: Duration = Duration::from_secs(30);

/// A caller that was not seen for one to two of these is forgotten.
const GENERATION: Duration = Duration::from_secs(60);

/// Networks of one width remembered in one generation. Further ones draw from the bucket of a wider network, so that
/// memory stays bounded and whoever owns many networks shares with nobody but its neighbours.
const NETWORKS: usize = 65_536;

/// Ids remembered in one generation. There are no more than certificates that our authority signed.
const IDS: usize = 1 << 20;

/// How much larger the share of an IPv6 /64 is than that of an IPv4 address.
const SITE: u32 = 8;

/// How much larger the share of a network is than that of the next narrower one.
const WIDER: u32 = 8;

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
    /// Too many calls of this caller wait already.
    #[error("too many calls of this caller are waiting ({WAITERS})")]
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

    /// Waits until `count` calls of `limit` may go on for `party`, not beyond `deadline`.
    ///
    /// # Errors
    /// [`LimitError`], at once, when waiting is of no use. A call that is dropped while it waits gives its
    /// place back.
    pub async fn admit(
        &self,
        limit: Limit,
        party: Option<Party<'_>>,
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
        match (buckets, party) {
            (Some(buckets), Some(party)) => buckets.admit(party, count, deadline).await,
            _ => Ok(()),
        }
    }
}

/// Whoever draws from a bucket.
#[derive(Clone, Copy, Debug)]
pub enum Party<'a> {
    /// One that proved this id.
    Known(&'a SpiffeId),
    /// One of whom only the address is known.
    Stranger(IpAddr),
}

/// Whose a bucket is: of a network its first bits and how many of them count, narrow ones first.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
enum Owner {
    Id(SpiffeId),
    V4(u32, u32),
    V6(u64, u32),
    Everybody,
}

impl Owner {
    fn of(party: Party<'_>) -> Self {
        match party {
            Party::Known(id) => Self::Id(id.clone()),
            Party::Stranger(address) => match address.to_canonical() {
                IpAddr::V4(v4) => Self::V4(v4.to_bits(), 32),
                IpAddr::V6(v6) => Self::V6((v6.to_bits() >> 64) as u64, 64),
            },
        }
    }

    /// Who shares if there is no room for this one.
    fn wider(&self) -> Self {
        match *self {
            Self::V4(bits, length @ (32 | 24)) => Self::V4(bits & u32::MAX << (40 - length), length - 8),
            Self::V6(bits, length @ (64 | 48)) => Self::V6(bits & u64::MAX << (80 - length), length - 16),
            _ => Self::Everybody,
        }
    }

    /// How many times the rate it gets.
    fn share(&self) -> u32 {
        match self {
            Self::Id(_) => 1,
            Self::V4(_, length) => WIDER.pow((32 - length) / 8),
            Self::V6(_, length) => SITE * WIDER.pow((64 - length) / 16),
            Self::Everybody => SITE * WIDER.pow(3),
        }
    }

    /// In which table it is, and how many that holds.
    fn table(&self) -> (usize, usize) {
        match self {
            Self::Id(_) => (0, IDS),
            Self::V4(_, 32) => (1, NETWORKS),
            Self::V4(_, 24) => (2, NETWORKS),
            Self::V4(..) => (3, NETWORKS),
            Self::V6(_, 64) => (4, NETWORKS),
            Self::V6(_, 48) => (5, NETWORKS),
            Self::V6(..) => (6, NETWORKS),
            Self::Everybody => (7, 1),
        }
    }
}

/// The buckets of one limit.
#[derive(Debug)]
struct Buckets {
    rate: u32,
    known: Mutex<Generations>,
}

type Table = HashMap<Owner, Bucket>;

#[derive(Debug)]
struct Generations {
    began: Instant,
    current: [Table; 8],
    previous: [Table; 8],
}

/// The state of one caller.
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
        let known = Generations { began: Instant::now(), current: Default::default(), previous: Default::default() };
        Self { rate, known: Mutex::new(known) }
    }

    async fn admit(&self, party: Party<'_>, count: u32, deadline: Option<Instant>) -> Result<(), LimitError> {
        let now = Instant::now();
        let deadline = deadline.map_or(now + LONGEST_WAIT, |named| named.min(now + LONGEST_WAIT));
        // A single call is never too much for a wider share; what one caller may ask for at once is the same for all.
        if count > self.rate {
            return Err(LimitError::AboveBurst { count, burst: self.rate });
        }
        let (owner, wait) = self
            .with(Owner::of(party), now, |owner, bucket| bucket.take(self.rate * owner.share(), count, now, deadline));
        let wait = wait?;
        if wait.is_zero() {
            return Ok(());
        }
        let mut place = Place { buckets: self, owner, count, reached: false };
        tokio::time::sleep(wait).await;
        place.reached = true;
        Ok(())
    }

    /// Changes the bucket of `owner`, or of the narrowest network around it that has one or gets one; says whose it was.
    fn with<T>(&self, owner: Owner, now: Instant, change: impl FnOnce(&Owner, &mut Bucket) -> T) -> (Owner, T) {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let known = &mut *known;
        if now.duration_since(known.began) >= GENERATION {
            known.previous = std::mem::take(&mut known.current);
            known.began = now;
        }
        let mut owner = owner;
        loop {
            let (number, room) = owner.table();
            let (Some(current), Some(previous)) = (known.current.get_mut(number), known.previous.get_mut(number))
            else {
                // There is a table for every owner.
                let changed = change(&owner, &mut Bucket::full(now));
                return (owner, changed);
            };
            if let Some(bucket) = current.get_mut(&owner) {
                let changed = change(&owner, bucket);
                return (owner, changed);
            }
            if current.len() < room {
                let bucket = previous.remove(&owner).unwrap_or(Bucket::full(now));
                let changed = change(&owner, current.entry(owner.clone()).or_insert(bucket));
                return (owner, changed);
            }
            owner = owner.wider();
        }
    }
}

/// A waiting call. Dropped before its turn it gives back what it had reserved.
struct Place<'a> {
    buckets: &'a Buckets,
    owner: Owner,
    count: u32,
    reached: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let (rate, count, reached) = (self.buckets.rate, self.count, self.reached);
        self.buckets.with(self.owner.clone(), Instant::now(), |owner, bucket| {
            let back = if reached { Duration::ZERO } else { cost(rate * owner.share(), count) };
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
        assert_eq!(limits.admit(Limit::Attestation, Some(Party::Stranger(A)), 1, far()).await, Ok(()));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(limits.admit(Limit::Attestation, Some(Party::Stranger(B)), 1, far()).await, Ok(()));
        assert_eq!(began.elapsed(), Duration::ZERO);
        assert_eq!(limits.admit(Limit::Attestation, Some(Party::Stranger(A)), 1, far()).await, Ok(()));
        assert!(began.elapsed() >= Duration::from_secs(1) && began.elapsed() < Duration::from_millis(1010));
    }

    #[tokio::test(start_paused = true)]
    async fn a_cost_above_the_burst_is_refused_at_once() {
        let limits = Limits::new(true, true);
        let refused = limits.admit(Limit::CertificateSigning, Some(Party::Stranger(A)), 501, far()).await;
        assert_eq!(refused, Err(LimitError::AboveBurst { count: 501, burst: 500 }));
        assert_eq!(refused.unwrap_err().to_string(), "rate (501) exceeds burst size (500)");
        assert_eq!(limits.admit(Limit::CertificateSigning, Some(Party::Stranger(A)), 500, far()).await, Ok(()));
    }

    #[tokio::test(start_paused = true)]
    async fn local_callers_and_switched_off_limits_never_wait() {
        let limits = Limits::new(false, false);
        let began = Instant::now();
        for _ in 0..2_000 {
            assert_eq!(limits.admit(Limit::Attestation, Some(Party::Stranger(A)), 1, far()).await, Ok(()));
            assert_eq!(limits.admit(Limit::CertificateSigning, Some(Party::Stranger(A)), 501, far()).await, Ok(()));
            assert_eq!(limits.admit(Limit::Status, None, 1, far()).await, Ok(()));
        }
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_whose_turn_comes_after_its_deadline_is_told_at_once_and_takes_nothing() {
        let limits = Limits::new(true, true);
        assert_eq!(limits.admit(Limit::Attestation, Some(Party::Stranger(A)), 1, far()).await, Ok(()));
        let soon = Some(Instant::now() + Duration::from_millis(300));
        let refused = limits.admit(Limit::Attestation, Some(Party::Stranger(A)), 1, soon).await;
        assert_eq!(refused, Err(LimitError::AfterDeadline { count: 1 }));
        let began = Instant::now();
        assert_eq!(limits.admit(Limit::Attestation, Some(Party::Stranger(A)), 1, far()).await, Ok(()));
        assert!(began.elapsed() < Duration::from_millis(1010));
    }

    #[tokio::test(start_paused = true)]
    async fn the_thirty_third_waiter_is_refused_and_a_dropped_one_gives_its_place_back() {
        let limits = Limits::new(true, true);
        // A rate of ten a second: thirty-two waiters fit well within the longest wait.
        for _ in 0..10 {
            assert_eq!(limits.admit(Limit::Status, Some(Party::Stranger(A)), 1, far()).await, Ok(()));
        }
        let mut waiting = Vec::new();
        for _ in 0..WAITERS {
            let mut call = Box::pin(limits.admit(Limit::Status, Some(Party::Stranger(A)), 1, far()));
            assert!(futures_util::poll!(&mut call).is_pending());
            waiting.push(call);
        }
        let refused = limits.admit(Limit::Status, Some(Party::Stranger(A)), 1, far()).await;
        assert_eq!(refused, Err(LimitError::TooManyWaiting));
        drop(waiting);
        let began = Instant::now();
        assert_eq!(limits.admit(Limit::Status, Some(Party::Stranger(A)), 1, far()).await, Ok(()));
        assert!(began.elapsed() < Duration::from_millis(120), "{:?}", began.elapsed());
    }

    fn at(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn known_callers_draw_from_their_id_and_an_ipv6_network_from_one_larger_bucket() {
        let limits = Limits::new(true, true);
        let began = Instant::now();
        let soon = || Some(Instant::now() + Duration::from_millis(100));
        // Two agents behind one address do not share, and neither does the address itself.
        for id in ["spiffe://td/a", "spiffe://td/b"] {
            let id = SpiffeId::parse(id).unwrap();
            assert_eq!(limits.admit(Limit::Attestation, Some(Party::Known(&id)), 1, soon()).await, Ok(()));
            let again = limits.admit(Limit::Attestation, Some(Party::Known(&id)), 1, soon()).await;
            assert_eq!(again, Err(LimitError::AfterDeadline { count: 1 }));
        }
        assert_eq!(limits.admit(Limit::Attestation, Some(Party::Stranger(A)), 1, soon()).await, Ok(()));
        let mapped = Party::Stranger(at("::ffff:192.0.2.1"));
        let again = limits.admit(Limit::Attestation, Some(mapped), 1, soon()).await;
        assert_eq!(again, Err(LimitError::AfterDeadline { count: 1 }));
        for number in 0..8 {
            let one = Party::Stranger(at(&format!("2001:db8::{number:x}")));
            assert_eq!(limits.admit(Limit::Attestation, Some(one), 1, soon()).await, Ok(()), "{number}");
        }
        let ninth = Party::Stranger(at("2001:db8::ffff"));
        let refused = limits.admit(Limit::Attestation, Some(ninth), 1, soon()).await;
        assert_eq!(refused, Err(LimitError::AfterDeadline { count: 1 }));
        let neighbour = Party::Stranger(at("2001:db8:0:1::1"));
        assert_eq!(limits.admit(Limit::Attestation, Some(neighbour), 1, soon()).await, Ok(()));
        assert_eq!(began.elapsed(), Duration::ZERO);
    }

    #[test]
    fn networks_widen_to_everybody() {
        let widths = |text: &str| {
            let mut owner = Owner::of(Party::Stranger(at(text)));
            let mut seen = vec![(owner.clone(), owner.share())];
            while owner != Owner::Everybody {
                owner = owner.wider();
                seen.push((owner.clone(), owner.share()));
            }
            seen
        };
        let v4 = [(0xc000_0281, 32, 1), (0xc000_0200, 24, 8), (0xc000_0000, 16, 64)];
        let mut expected: Vec<_> = v4.map(|(bits, length, share)| (Owner::V4(bits, length), share)).into();
        expected.push((Owner::Everybody, 4096));
        assert_eq!(widths("192.0.2.129"), expected);
        let v6 = [(0x2001_0db8_1234_5678, 64, 8), (0x2001_0db8_1234_0000, 48, 64), (0x2001_0db8_0000_0000, 32, 512)];
        let mut expected: Vec<_> = v6.map(|(bits, length, share)| (Owner::V6(bits, length), share)).into();
        expected.push((Owner::Everybody, 4096));
        assert_eq!(widths("2001:db8:1234:5678::1"), expected);
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_owns_a_hundred_thousand_networks_pushes_nobody_else_out() {
        let limits = Limits::new(true, true);
        let soon = || Some(Instant::now() + Duration::from_millis(1));
        for number in 0..100_000_u32 {
            let one = at(&format!("2001:db8:{:x}:{:x}::1", number >> 16, number & 0xffff));
            let _ = limits.admit(Limit::Attestation, Some(Party::Stranger(one)), 1, soon()).await;
        }
        // Nobody was forgotten, and the table did not grow.
        let buckets = limits.attestation.as_ref().unwrap();
        let sizes: Vec<usize> = buckets.known.lock().unwrap().current.iter().map(HashMap::len).collect();
        assert_eq!(sizes, [0, 0, 0, 0, NETWORKS, 1, 0, 0]);
        // Somebody else's network, of version 6 and of version 4, and a known agent.
        let id = SpiffeId::parse("spiffe://td/a").unwrap();
        for party in [Party::Stranger(at("2001:db9::1")), Party::Stranger(A), Party::Known(&id)] {
            assert_eq!(limits.admit(Limit::Attestation, Some(party), 1, soon()).await, Ok(()), "{party:?}");
        }
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
