//! Log lines that strangers can cause: a few of each are written, the others are counted and told together.
//!
//! What somebody else decides how often to do must not decide how much is written. A party gets a few lines of each
//! kind in an interval, and all parties together get a bounded number, so that neither one loud party nor many quiet
//! ones fill a disk; what was left out is told by kind and party in one line an interval.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::Clock;
use crate::shutdown::Shutdown;

/// How often what was left out is told.
pub const INTERVAL: Duration = Duration::from_secs(30);
/// Lines of one kind that one party may cause in an interval.
const OF_PARTY: u32 = 3;
/// Lines of one kind that all parties may cause in an interval.
const OF_KIND: u32 = 60;
/// Parties of one kind that are told apart in an interval; further ones count as one.
const PARTIES: usize = 256;
/// Bytes of a party's name that are kept.
const NAME: usize = 96;
/// Parties of one kind that a report names.
const NAMED: usize = 8;

/// The right to write lines that strangers can cause. Cheap to clone; clones count together.
#[derive(Clone, Debug)]
pub struct Limiter {
    clock: Clock,
    counted: Arc<Mutex<Counted>>,
}

#[derive(Debug, Default)]
struct Counted {
    /// When the interval began, by the boot clock.
    began: Duration,
    kinds: HashMap<&'static str, Kind>,
}

#[derive(Debug, Default)]
struct Kind {
    written: u32,
    parties: HashMap<Box<str>, Party>,
    /// What was left out of parties that are not told apart.
    others: u64,
}

#[derive(Debug, Default)]
struct Party {
    written: u32,
    left_out: u64,
}

impl Limiter {
    /// A limiter that has counted nothing yet.
    pub fn new(clock: Clock) -> Self {
        let counted = Counted { began: clock.boot(), kinds: HashMap::new() };
        Self { clock, counted: Arc::new(Mutex::new(counted)) }
    }

    fn counted(&self) -> MutexGuard<'_, Counted> {
        self.counted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a line of this kind that `party` caused may be written now; if not, it is counted. `kind` is the line's
    /// message, and `party` whoever answers for it: a network, a cgroup, a SPIFFE ID.
    pub fn allow(&self, kind: &'static str, party: &str) -> bool {
        let mut counted = self.counted();
        let over = counted.turn(self.clock.boot());
        let allowed = counted.kinds.entry(kind).or_default().allow(party);
        drop(counted);
        tell(over);
        allowed
    }

    /// Tells what was left out at the end of each interval, and at the end of the process.
    pub async fn run(self, shutdown: Shutdown) {
        loop {
            let ended = tokio::select! {
                () = self.clock.sleep(INTERVAL) => false,
                () = shutdown.requested() => true,
            };
            let now = self.clock.boot();
            let mut counted = self.counted();
            let over = if ended { counted.end(now) } else { counted.turn(now) };
            drop(counted);
            tell(over);
            if ended {
                return;
            }
        }
    }
}

fn tell(over: Option<String>) {
    if let Some(lines) = over {
        tracing::warn!(lines, "Log lines were left out: their callers cause too many");
    }
}

impl Counted {
    /// Ends the interval if it is over; gives what it left out, if anything.
    fn turn(&mut self, now: Duration) -> Option<String> {
        if now.saturating_sub(self.began) < INTERVAL { None } else { self.end(now) }
    }

    fn end(&mut self, now: Duration) -> Option<String> {
        self.began = now;
        let mut kinds: Vec<_> = std::mem::take(&mut self.kinds).into_iter().collect();
        kinds.sort_unstable_by_key(|(name, _)| *name);
        let mut text = String::new();
        for (name, kind) in kinds {
            let mut loud: Vec<_> = kind.parties.into_iter().filter(|(_, party)| party.left_out > 0).collect();
            loud.sort_unstable_by(|(a, x), (b, y)| y.left_out.cmp(&x.left_out).then_with(|| a.cmp(b)));
            let rest = loud.split_off(loud.len().min(NAMED));
            let others = kind.others + rest.iter().map(|(_, party)| party.left_out).sum::<u64>();
            let total = others + loud.iter().map(|(_, party)| party.left_out).sum::<u64>();
            if total == 0 {
                continue;
            }
            let between = if text.is_empty() { "" } else { "; " };
            // Writing to a String does not fail.
            let _ = write!(text, "{between}{total} of {name:?} (");
            for (index, (party, counts)) in loud.iter().enumerate() {
                let between = if index == 0 { "" } else { ", " };
                let _ = write!(text, "{between}{party}: {}", counts.left_out);
            }
            if others > 0 {
                let between = if loud.is_empty() { "" } else { ", " };
                let _ = write!(text, "{between}others: {others}");
            }
            text.push(')');
        }
        (!text.is_empty()).then_some(text)
    }
}

impl Kind {
    fn allow(&mut self, party: &str) -> bool {
        let name = party.get(..party.floor_char_boundary(NAME)).unwrap_or_default();
        if !self.parties.contains_key(name) {
            if self.parties.len() >= PARTIES {
                self.others += 1;
                return false;
            }
            self.parties.insert(name.into(), Party::default());
        }
        let Some(party) = self.parties.get_mut(name) else { return false };
        if party.written >= OF_PARTY || self.written >= OF_KIND {
            party.left_out += 1;
            return false;
        }
        party.written += 1;
        self.written += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use super::*;

    fn limiter() -> Limiter {
        Limiter::new(Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000)))
    }

    fn allowed(limiter: &Limiter, kind: &'static str, party: &str, count: usize) -> usize {
        (0..count).filter(|_| limiter.allow(kind, party)).count()
    }

    #[tokio::test(start_paused = true)]
    async fn a_party_gets_three_lines_of_a_kind_and_the_rest_is_told_once() {
        let limiter = limiter();
        assert_eq!(allowed(&limiter, "Call refused", "192.0.2.0/24", 57_850), 3);
        assert_eq!(allowed(&limiter, "TLS handshake failed", "192.0.2.0/24", 4), 3);
        // One loud party hides nobody else.
        assert_eq!(allowed(&limiter, "Call refused", "198.51.100.0/24", 2), 2);
        tokio::time::advance(INTERVAL - Duration::from_millis(1)).await;
        assert_eq!(limiter.counted().turn(limiter.clock.boot()), None);
        tokio::time::advance(Duration::from_millis(1)).await;
        let told = limiter.counted().turn(limiter.clock.boot());
        let expected =
            "57847 of \"Call refused\" (192.0.2.0/24: 57847); 1 of \"TLS handshake failed\" (192.0.2.0/24: 1)";
        assert_eq!(told.as_deref(), Some(expected));
        // Told once, and a new interval begins.
        tokio::time::advance(INTERVAL).await;
        assert_eq!(limiter.counted().turn(limiter.clock.boot()), None);
        assert_eq!(allowed(&limiter, "Call refused", "192.0.2.0/24", 5), 3);
    }

    #[tokio::test(start_paused = true)]
    async fn many_parties_cause_no_more_lines_and_no_more_memory_than_a_few() {
        let limiter = limiter();
        let many = (0..100_000).filter(|number| limiter.allow("Call refused", &format!("2001:db8:0:{number:x}::/64")));
        assert_eq!(many.count(), 60);
        let known = |counted: &Counted| counted.kinds.get("Call refused").map(|kind| (kind.parties.len(), kind.others));
        assert_eq!(known(&limiter.counted()), Some((256, 99_744)));
        tokio::time::advance(INTERVAL).await;
        let told = limiter.counted().turn(limiter.clock.boot()).unwrap();
        assert!(told.starts_with("99940 of \"Call refused\" (2001:db8:0:"), "{told}");
        assert!(told.ends_with("others: 99932)") && told.len() < 400, "{told}");
    }

    #[tokio::test(start_paused = true)]
    async fn long_names_are_cut_between_characters() {
        let limiter = limiter();
        let long = "é".repeat(5_000);
        assert_eq!(allowed(&limiter, "Call refused", &long, 4), 3);
        let told = limiter.counted().end(limiter.clock.boot()).unwrap();
        assert_eq!(told, format!("1 of \"Call refused\" ({}: 1)", "é".repeat(48)));
    }

    #[tokio::test(start_paused = true)]
    async fn the_end_of_the_process_tells_what_is_left() {
        let (trigger, shutdown) = Shutdown::new();
        let limiter = limiter();
        assert_eq!(allowed(&limiter, "Call refused", "192.0.2.0/24", 5), 3);
        trigger.request();
        limiter.clone().run(shutdown).await;
        assert!(limiter.counted().kinds.is_empty());
    }
}
