//! When an authority is prepared, activated and forgotten.
//!
//! Pure, and the same for X.509 and JWT: the journal and the time in, the one next step out. Each step has an exact
//! time; doing it late changes nothing but the time.
//!
//! A clock may be wrong, in either direction and for a while. So only an authority that has begun and has not ended by
//! the present clock signs, and whatever cannot be made good again (a key, a published root) is removed only while the
//! clocks agree.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::profile::BACKDATE;
use crate::state::model::{AuthoritySlot, SlotStatus};

/// A successor is published at the latest this long before the active authority ends.
const LONGEST_PREPARATION: Duration = Duration::from_secs(30 * 24 * 3600);

/// A successor is activated at the latest this long before the active authority ends.
const LONGEST_OVERLAP: Duration = Duration::from_secs(7 * 24 * 3600);

/// How long an authority stays published after it ended: clocks differ.
pub const PRUNE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The time that decisions count with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Time {
    /// The wall clock.
    pub now: SystemTime,
    /// From when on something may be deleted by that clock, if it agrees with the boot clock until then; `now` if it may
    /// be now.
    pub steady_at: SystemTime,
}

impl Time {
    /// The time `now`, when the clocks must go on agreeing for `left` until something may be deleted.
    pub fn new(now: SystemTime, left: Duration) -> Self {
        Self { now, steady_at: now.checked_add(left).unwrap_or(now) }
    }

    /// Whether something may be deleted by time.
    pub fn is_steady(&self) -> bool {
        self.steady_at <= self.now
    }
}

/// An authority of the journal, and what else is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// What the journal says.
    pub slot: Arc<AuthoritySlot>,
    /// Whether its private key is at hand.
    pub has_key: bool,
    /// Whether it stands in the bundle, untainted.
    pub is_trusted: bool,
}

/// The next thing to do for one kind of authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make an authority and publish it.
    Prepare,
    /// Let the authority with this id sign from now on. It was prepared; or it signed until it seemed to be over, and the
    /// clock has been put right.
    Activate(Arc<str>),
    /// Take the authority with this id back, from the bundle as well: it begins in the future, so the clock was wrong when
    /// it was made.
    Withdraw(Arc<str>),
    /// Delete the private key of the authority with this id: it will not sign again.
    Retire(Arc<str>),
    /// Forget the authority with this id: it ended long ago.
    Forget(Arc<str>),
    /// Nothing before this time.
    Wait(SystemTime),
}

fn before(end: SystemTime, by: Duration) -> SystemTime {
    end.checked_sub(by).unwrap_or(SystemTime::UNIX_EPOCH)
}

fn lifetime(slot: &AuthoritySlot) -> Duration {
    slot.not_after.duration_since(slot.issued_at).unwrap_or_default()
}

/// When an authority begins: the `notBefore` of its certificate, if it has one.
pub fn begins_at(slot: &AuthoritySlot) -> SystemTime {
    before(slot.issued_at, BACKDATE)
}

/// When the successor of `active` is to be published: at half of its life, at most 30 days before its end.
pub fn prepare_at(active: &AuthoritySlot) -> SystemTime {
    before(active.not_after, (lifetime(active) / 2).min(LONGEST_PREPARATION))
}

/// When the successor of `active` is to sign: at five sixths of its life, at most 7 days before its end.
pub fn activate_at(active: &AuthoritySlot) -> SystemTime {
    before(active.not_after, (lifetime(active) / 6).min(LONGEST_OVERLAP))
}

fn forget_at(slot: &AuthoritySlot) -> SystemTime {
    slot.not_after.checked_add(PRUNE_AFTER).unwrap_or(slot.not_after)
}

/// Whether an authority has begun and has not ended.
pub fn is_valid(slot: &AuthoritySlot, now: SystemTime) -> bool {
    begins_at(slot) <= now && now < slot.not_after
}

/// The authority among these that lives longest and is valid at `now`.
fn living<'a>(lines: impl Iterator<Item = &'a Line>, now: SystemTime) -> Option<&'a Arc<AuthoritySlot>> {
    lines.map(|line| &line.slot).filter(|slot| is_valid(slot, now)).max_by_key(|slot| slot.not_after)
}

fn with(lines: &[Line], status: SlotStatus) -> impl Iterator<Item = &Line> {
    lines.iter().filter(move |line| line.slot.status == status)
}

/// The active authority, if one can sign at `now`.
pub fn active(lines: &[Line], now: SystemTime) -> Option<&Arc<AuthoritySlot>> {
    living(with(lines, SlotStatus::Active), now)
}

/// The published authority that will be active next, if there is one at `now`.
pub fn prepared(lines: &[Line], now: SystemTime) -> Option<&Arc<AuthoritySlot>> {
    living(with(lines, SlotStatus::Prepared), now)
}

/// One that signed before and can again: after a time with a wrong clock it may be the one that everybody knows.
fn revivable(lines: &[Line], now: SystemTime) -> Option<&Arc<AuthoritySlot>> {
    living(with(lines, SlotStatus::Old).filter(|line| line.has_key && line.is_trusted), now)
}

/// Whether an authority will not sign again, whatever the clock does.
fn is_over(slot: &AuthoritySlot) -> bool {
    matches!(slot.status, SlotStatus::Old | SlotStatus::Lost)
}

/// The one next step for the authorities of one key set and one kind.
pub fn next_step(lines: &[Line], time: Time) -> Step {
    let now = time.now;
    let active = active(lines, now);
    let outlives = |slot: &&Arc<AuthoritySlot>| active.is_none_or(|active| slot.not_after > active.not_after);
    let successor = prepared(lines, now).or_else(|| revivable(lines, now).filter(outlives));
    let due = match (active, successor) {
        (None, _) => now,
        (Some(active), None) => prepare_at(active),
        (Some(active), Some(_)) => activate_at(active),
    };
    if due <= now {
        return match successor {
            None => Step::Prepare,
            Some(successor) => Step::Activate(Arc::clone(&successor.authority_id)),
        };
    }
    // Somebody signs, and that is not at stake any more. What is left is removal.
    let removal = |line: &Line| -> Option<(SystemTime, Step)> {
        let (slot, id) = (&line.slot, Arc::clone(&line.slot.authority_id));
        if now < begins_at(slot) {
            return Some((now, Step::Withdraw(id)));
        }
        if line.has_key && is_over(slot) {
            return Some((now, Step::Retire(id)));
        }
        Some((forget_at(slot), Step::Forget(id)))
    };
    let first = lines.iter().filter_map(removal).min_by_key(|(at, _)| *at);
    match first {
        Some((at, step)) if at <= now && time.is_steady() => step,
        Some((at, _)) => Step::Wait(at.max(time.steady_at).min(due)),
        None => Step::Wait(due),
    }
}

/// Which of a bundle's authorities ended so long ago that they are to be removed, and when to look again.
///
/// `authorities` are all of one kind with their end, if it is known. `keep_one`: a bundle is never emptied of its
/// X.509 authorities, since relying parties would lose every way to see that this was a mistake.
pub fn ended<K: Clone>(
    authorities: &[(K, Option<SystemTime>)],
    keep_one: bool,
    time: Time,
) -> (Vec<K>, Option<SystemTime>) {
    let due = |end: &Option<SystemTime>| end.and_then(|end| end.checked_add(PRUNE_AFTER));
    let over: Vec<K> = authorities
        .iter()
        .filter(|(_, end)| due(end).is_some_and(|due| due <= time.now))
        .map(|(authority, _)| authority.clone())
        .collect();
    let next = authorities.iter().filter_map(|(_, end)| due(end)).filter(|due| *due > time.now).min();
    if over.is_empty() || keep_one && over.len() == authorities.len() {
        return (Vec::new(), next.map(|next| next.max(time.steady_at)));
    }
    if time.is_steady() { (over, next) } else { (Vec::new(), Some(time.steady_at)) }
}

#[cfg(test)]
mod tests;
