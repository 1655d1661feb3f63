//! What to sign and what to forget: a decision on values, made anew after every change.

use std::time::{Duration, SystemTime};

use spiffe::renew::{RenewAt, SKEW, Succession, Validity, succeed};

use super::desired::EntryId;

/// Why an entry's X.509-SVID may be held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Demand {
    /// A subscriber waits for it or follows it: it is held whatever the limit says.
    Subscribed,
    /// It is held as long as there is room.
    Prefetch,
    /// It is signed when somebody asks, and kept afterwards as long as there is room.
    OnDemand,
}

/// The times of a credential that is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Held {
    /// When its successor is to be signed; drawn once.
    pub renew_at: SystemTime,
    /// When it is valid.
    pub validity: Validity,
    /// Whether it was signed for an earlier revision of the entry.
    pub outdated: bool,
}

/// One entry, as the plan sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// The entry's id.
    pub entry: EntryId,
    /// Its credential, if there is one.
    pub held: Option<Held>,
    /// Why it may be held.
    pub demand: Demand,
    /// A counter: the larger, the more recently used.
    pub last_used: u64,
    /// Whether a request for it is under way.
    pub signing: bool,
    /// Before this time it is not asked for again, because the server refused it.
    pub retry_at: Option<SystemTime>,
}

/// What to do now, and when to look again.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Entries to be signed for, most urgent first.
    pub sign: Vec<EntryId>,
    /// Entries whose credential is to be dropped: beyond the limit.
    pub forget: Vec<EntryId>,
    /// Entries whose credential is over by this clock. It is of no use now, but the clock may be wrong.
    pub over: Vec<EntryId>,
    /// The next time at which the answer changes by itself.
    pub wake: Option<SystemTime>,
}

/// Decides for all `candidates` with room for `limit` credentials; what is missing is signed in the order given.
///
/// The order of what is signed: near expiry first, by the time left; then what subscribers wait for; then prefetch.
pub fn plan(candidates: &[Candidate], limit: usize, now: SystemTime) -> Plan {
    let mut plan = Plan::default();
    let live = |candidate: &Candidate| candidate.held.filter(|held| held.validity.not_after > now);
    for candidate in candidates {
        if candidate.held.is_some() && live(candidate).is_none() {
            plan.over.push(candidate.entry.clone());
        }
    }

    let subscribed = candidates.iter().filter(|candidate| candidate.demand == Demand::Subscribed);
    let mut wanted: Vec<&Candidate> = subscribed.collect();
    let mut room = limit.saturating_sub(wanted.len());

    let unsubscribed = || candidates.iter().filter(|candidate| candidate.demand != Demand::Subscribed);
    let mut kept: Vec<&Candidate> = unsubscribed().filter(|candidate| live(candidate).is_some()).collect();
    kept.sort_by(|a, b| b.last_used.cmp(&a.last_used).then_with(|| a.entry.cmp(&b.entry)));
    plan.forget.extend(kept.iter().skip(room).map(|candidate| candidate.entry.clone()));
    kept.truncate(room);
    room -= kept.len();
    wanted.append(&mut kept);
    let missing = |candidate: &&Candidate| candidate.demand == Demand::Prefetch && live(candidate).is_none();
    wanted.extend(unsubscribed().filter(missing).take(room));

    let mut due = Vec::new();
    for candidate in wanted {
        let held = live(candidate);
        plan.wake = earliest(plan.wake, held.map(|held| held.validity.not_after));
        let rank = match held {
            // What begins that much later was signed or received by a clock that was wrong.
            Some(held) if held.renew_at <= now || held.validity.not_before > now + SKEW => {
                Rank::Renewal(held.validity.not_after)
            }
            Some(held) if !held.outdated => {
                plan.wake = earliest(plan.wake, Some(held.renew_at));
                continue;
            }
            _ if candidate.demand == Demand::Subscribed => Rank::Awaited,
            _ => Rank::Prefetch,
        };
        if candidate.signing {
            continue;
        }
        match candidate.retry_at.filter(|at| *at > now) {
            Some(at) => plan.wake = earliest(plan.wake, Some(at)),
            None => due.push((rank, candidate.entry.clone())),
        }
    }
    due.sort_unstable();
    plan.sign = due.into_iter().map(|(_, entry)| entry).collect();
    plan
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Renewal(SystemTime),
    Awaited,
    Prefetch,
}

fn earliest(one: Option<SystemTime>, other: Option<SystemTime>) -> Option<SystemTime> {
    match (one, other) {
        (Some(one), Some(other)) => Some(one.min(other)),
        (one, other) => one.or(other),
    }
}

/// When a credential that was signed takes the place of the one that is held: not before it is valid, and never if it is
/// over or begins too late to be waited for; that helps nobody, whether or not anything is held.
pub fn take(held: Option<Validity>, signed: Validity, now: SystemTime) -> Succession {
    if signed.not_after <= now || signed.not_before > now + SKEW {
        Succession::Never
    } else {
        succeed(held, signed, now)
    }
}

/// The time at which a credential is to be renewed, from the time `drawn` for it and the operator's wish to have
/// `availability_target` of validity left whenever the server goes away. `random` spreads that wish over ten minutes.
///
/// The wish counts only for credentials that outlive it by more than twelve hours, as in SPIRE. No credential is
/// renewed sooner after its receipt than [`RenewAt::least_distance`], whatever was drawn.
pub fn renewal(
    drawn: RenewAt,
    not_before: SystemTime,
    not_after: SystemTime,
    received_at: SystemTime,
    availability_target: Option<Duration>,
    random: u64,
) -> SystemTime {
    const GRACE: Duration = Duration::from_secs(12 * 3600);
    const SPREAD_SECONDS: u64 = 600;
    let life = not_after.duration_since(not_before).unwrap_or_default();
    let wished = availability_target
        .filter(|target| life.saturating_sub(*target) > GRACE)
        .and_then(|target| not_after.checked_sub(target + Duration::from_secs(random % SPREAD_SECONDS)));
    let soonest = received_at + RenewAt::least_distance(not_before, not_after, received_at);
    drawn.at().min(wished.unwrap_or(not_after)).max(soonest)
}

#[cfg(test)]
#[path = "issue/tests.rs"]
mod tests;
