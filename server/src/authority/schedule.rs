//! When an authority is prepared, activated and forgotten.
//!
//! Pure, and the same for X.509 and JWT: a list of slots and `now` in, the one next step out. Each step has an exact
//! time; doing it late changes nothing but the time.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use crate::state::model::{AuthoritySlot, SlotStatus};

/// A successor is published at the latest this long before the active authority ends.
const LONGEST_PREPARATION: Duration = Duration::from_secs(30 * 24 * 3600);

/// A successor is activated at the latest this long before the active authority ends.
const LONGEST_OVERLAP: Duration = Duration::from_secs(7 * 24 * 3600);

/// How long an authority stays published after it ended: clocks differ.
pub const PRUNE_AFTER: Duration = Duration::from_secs(24 * 3600);

/// The next thing to do for one kind of authority.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Make an authority and publish it.
    Prepare,
    /// Let the prepared authority with this id sign from now on.
    Activate(Arc<str>),
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

/// The authority of this status that lives longest and has not ended at `now`.
fn living(slots: &[Arc<AuthoritySlot>], status: SlotStatus, now: SystemTime) -> Option<&Arc<AuthoritySlot>> {
    slots.iter().filter(|slot| slot.status == status && slot.not_after > now).max_by_key(|slot| slot.not_after)
}

/// The active authority, if one can sign at `now`.
pub fn active(slots: &[Arc<AuthoritySlot>], now: SystemTime) -> Option<&Arc<AuthoritySlot>> {
    living(slots, SlotStatus::Active, now)
}

/// The published authority that will be active next, if there is one at `now`.
pub fn prepared(slots: &[Arc<AuthoritySlot>], now: SystemTime) -> Option<&Arc<AuthoritySlot>> {
    living(slots, SlotStatus::Prepared, now)
}

/// The one next step for the authorities of one key set and one kind.
pub fn next_step(slots: &[Arc<AuthoritySlot>], now: SystemTime) -> Step {
    let prepared = prepared(slots, now);
    let Some(active) = active(slots, now) else {
        return match prepared {
            Some(prepared) => Step::Activate(Arc::clone(&prepared.authority_id)),
            None => Step::Prepare,
        };
    };
    let due = match prepared {
        None => prepare_at(active),
        Some(_) => activate_at(active),
    };
    if due <= now {
        return match prepared {
            None => Step::Prepare,
            Some(prepared) => Step::Activate(Arc::clone(&prepared.authority_id)),
        };
    }
    if let Some(ended) = slots.iter().find(|slot| forget_at(slot) <= now) {
        return Step::Forget(Arc::clone(&ended.authority_id));
    }
    let next = slots.iter().map(|slot| forget_at(slot)).chain([due]).min();
    Step::Wait(next.unwrap_or(due))
}

/// Which of a bundle's authorities ended so long ago that they are to be removed, and when to look again.
///
/// `authorities` are all of one kind with their end, if it is known. `keep_one`: a bundle is never emptied of its
/// X.509 authorities, since relying parties would lose every way to see that this was a mistake.
pub fn ended<K: Clone>(
    authorities: &[(K, Option<SystemTime>)],
    keep_one: bool,
    now: SystemTime,
) -> (Vec<K>, Option<SystemTime>) {
    let due = |end: &Option<SystemTime>| end.and_then(|end| end.checked_add(PRUNE_AFTER));
    let gone: Vec<K> = authorities
        .iter()
        .filter(|(_, end)| due(end).is_some_and(|due| due <= now))
        .map(|(authority, _)| authority.clone())
        .collect();
    let next = authorities.iter().filter_map(|(_, end)| due(end)).filter(|due| *due > now).min();
    if keep_one && gone.len() == authorities.len() { (Vec::new(), next) } else { (gone, next) }
}

#[cfg(test)]
mod tests;
