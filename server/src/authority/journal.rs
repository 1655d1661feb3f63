//! What each step changes in the journal of authorities and, in the same part, in the bundle.
//!
//! Pure: a state, the keys that are at hand and the time in, a part out. [`super::schedule`] says which step is next;
//! each decision here asks it again, on the state on which it is committed. The shell makes and deletes keys.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::TrustDomain;
use spiffe::x509::Certificate;

use super::Refusal;
use super::keys::NotedAuthority;
use super::schedule::{self, Line, Step, Time};
use crate::state::State;
use crate::state::model::{AuthorityKind, AuthoritySlot, Change, KeyOwner, Part, SlotStatus, certificate_hash};

/// Who asks for a step; an operator may ask before its time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// The schedule.
    Schedule,
    /// An operator.
    Operator,
}

/// What decisions about the authorities of one key set and one kind rest on.
#[derive(Clone, Copy, Debug)]
pub struct Ground<'a> {
    /// Journal and bundle.
    pub state: &'a State,
    /// Whose authorities.
    pub owner: KeyOwner,
    /// Of which kind.
    pub kind: AuthorityKind,
    /// Names of the private keys that are at hand.
    pub keys: &'a BTreeSet<Arc<str>>,
    /// The time.
    pub time: Time,
}

impl Ground<'_> {
    /// The journal with what else is known of each line.
    pub fn lines(&self) -> Vec<Line> {
        let bundle = self.state.bundle(self.state.trust_domain());
        let line = |slot: Arc<AuthoritySlot>| Line {
            has_key: self.keys.contains(&slot.key_id),
            is_trusted: published(bundle, &slot) == Some(false),
            slot,
        };
        slots_of(self.state, self.owner, self.kind).into_iter().map(line).collect()
    }

    /// What is to be done next.
    pub fn next_step(&self) -> Step {
        schedule::next_step(&self.lines(), self.time)
    }

    fn expects(&self, step: &Step) -> Result<(), Refusal> {
        if self.next_step() == *step { Ok(()) } else { Err(Refusal::Overtaken) }
    }

    fn slot(&self, authority_id: &str) -> Option<Arc<AuthoritySlot>> {
        slots_of(self.state, self.owner, self.kind).into_iter().find(|slot| *slot.authority_id == *authority_id)
    }

    fn removal(&self, slot: &AuthoritySlot) -> Change {
        Change::RemoveSlot { owner: self.owner, kind: self.kind, authority_id: Arc::clone(&slot.authority_id) }
    }
}

/// The journal of one key set and kind, oldest first.
pub fn slots_of(state: &State, owner: KeyOwner, kind: AuthorityKind) -> Vec<Arc<AuthoritySlot>> {
    state.slots(owner, kind).into_iter().cloned().collect()
}

/// Whether `slot` stands in the bundle, and if so whether it is tainted.
pub fn published(bundle: Option<&Arc<Bundle>>, slot: &AuthoritySlot) -> Option<bool> {
    let bundle = bundle?;
    match slot.kind {
        AuthorityKind::X509 => {
            let certificate = slot.certificate.as_ref()?;
            bundle.x509.iter().find(|authority| authority.der == *certificate).map(|authority| authority.tainted)
        }
        AuthorityKind::Jwt => {
            bundle.jwt.iter().find(|authority| authority.key_id == slot.authority_id).map(|authority| authority.tainted)
        }
    }
}

/// The change that counts a new content of our own bundle.
pub fn next_sequence(state: &State) -> Change {
    let bundle = state.bundle(state.trust_domain());
    Change::PutBundleInfo {
        trust_domain: state.trust_domain().clone(),
        sequence: bundle.map_or(0, |bundle| bundle.sequence).saturating_add(1),
        refresh_hint: bundle.and_then(|bundle| bundle.refresh_hint),
    }
}

/// The change that publishes an authority.
fn publication(trust_domain: &TrustDomain, slot: &AuthoritySlot) -> Option<Change> {
    let trust_domain = trust_domain.clone();
    match slot.kind {
        AuthorityKind::X509 => Some(Change::PutX509Authority {
            trust_domain,
            authority: X509Authority { der: slot.certificate.clone()?, tainted: false },
        }),
        AuthorityKind::Jwt => Some(Change::PutJwtAuthority {
            trust_domain,
            authority: JwtAuthority {
                key_id: Arc::clone(&slot.authority_id),
                public_key: slot.public_key.clone(),
                expires_at: Some(slot.not_after),
                tainted: false,
            },
        }),
    }
}

/// The change that takes an authority out of the bundle.
fn retraction(trust_domain: &TrustDomain, slot: &AuthoritySlot) -> Option<Change> {
    let trust_domain = trust_domain.clone();
    match slot.kind {
        AuthorityKind::X509 => {
            Some(Change::RemoveX509Authority { trust_domain, sha256: certificate_hash(slot.certificate.as_ref()?) })
        }
        AuthorityKind::Jwt => Some(Change::RemoveJwtAuthority { trust_domain, key_id: Arc::clone(&slot.authority_id) }),
    }
}

fn with_status(slot: &AuthoritySlot, status: SlotStatus) -> Change {
    Change::PutSlot(Arc::new(AuthoritySlot { status, ..slot.clone() }))
}

/// The part that records and publishes `made`, a new authority.
///
/// # Errors
/// [`Refusal::Initializing`] if an operator asks while none is active, [`Refusal::Overtaken`] if it is not its time.
pub fn prepare(ground: &Ground<'_>, made: &Arc<AuthoritySlot>, cause: Cause) -> Result<Part, Refusal> {
    let lines = ground.lines();
    match cause {
        Cause::Schedule => ground.expects(&Step::Prepare)?,
        Cause::Operator if schedule::active(&lines, ground.time.now).is_none() => return Err(Refusal::Initializing),
        Cause::Operator => {}
    }
    // What was prepared before signed nothing; as an old authority it can be tainted and revoked.
    let superseded = lines.iter().filter(|line| line.slot.status == SlotStatus::Prepared);
    let mut changes: Vec<Change> = superseded.map(|line| with_status(&line.slot, SlotStatus::Old)).collect();
    // First the bundle: the first authority of all makes it.
    changes.push(next_sequence(ground.state));
    changes.extend(publication(ground.state.trust_domain(), made));
    changes.push(Change::PutSlot(Arc::clone(made)));
    Ok(Part::new(changes))
}

/// The part that lets an authority sign from now on, and that authority as it is then. Those that signed so far are old
/// then and keep their keys until [`Step::Retire`].
///
/// # Errors
/// If it is not prepared, has not begun, is over, or is not in the bundle; [`Refusal::Overtaken`] if it is not its time.
pub fn activate(
    ground: &Ground<'_>,
    authority_id: &Arc<str>,
    cause: Cause,
) -> Result<(Part, Arc<AuthoritySlot>), Refusal> {
    let slot = ground.slot(authority_id).ok_or(Refusal::UnexpectedAuthority)?;
    let may = match cause {
        Cause::Schedule => {
            ground.expects(&Step::Activate(Arc::clone(authority_id)))?;
            true
        }
        Cause::Operator => slot.status == SlotStatus::Prepared && schedule::is_valid(&slot, ground.time.now),
    };
    if !may {
        return Err(Refusal::NotPrepared);
    }
    if published(ground.state.bundle(ground.state.trust_domain()), &slot).is_none() {
        return Err(Refusal::NotPublished);
    }
    let activated = Arc::new(AuthoritySlot { status: SlotStatus::Active, ..AuthoritySlot::clone(&slot) });
    let slots = slots_of(ground.state, ground.owner, ground.kind);
    let replaced = slots.iter().filter(|slot| slot.status == SlotStatus::Active);
    let mut changes: Vec<Change> = replaced.map(|slot| with_status(slot, SlotStatus::Old)).collect();
    changes.push(Change::PutSlot(Arc::clone(&activated)));
    Ok((Part::new(changes), activated))
}

/// The part that takes back an authority that begins in the future, and the name of its key.
///
/// # Errors
/// [`Refusal::Overtaken`] if that is not the next step.
pub fn withdraw(ground: &Ground<'_>, authority_id: &Arc<str>) -> Result<(Part, Arc<str>), Refusal> {
    ground.expects(&Step::Withdraw(Arc::clone(authority_id)))?;
    let slot = ground.slot(authority_id).ok_or(Refusal::Overtaken)?;
    let mut changes = vec![ground.removal(&slot)];
    if published(ground.state.bundle(ground.state.trust_domain()), &slot).is_some() {
        changes.extend(retraction(ground.state.trust_domain(), &slot));
        changes.push(next_sequence(ground.state));
    }
    Ok((Part::new(changes), Arc::clone(&slot.key_id)))
}

/// The name of the key that is not needed any more; the journal stays as it is.
///
/// # Errors
/// [`Refusal::Overtaken`] if that is not the next step.
pub fn retire(ground: &Ground<'_>, authority_id: &Arc<str>) -> Result<(Part, Arc<str>), Refusal> {
    ground.expects(&Step::Retire(Arc::clone(authority_id)))?;
    let slot = ground.slot(authority_id).ok_or(Refusal::Overtaken)?;
    Ok((Part::unchanged(), Arc::clone(&slot.key_id)))
}

/// The part that removes the journal line of an authority that ended long ago, and the name of its key.
///
/// # Errors
/// [`Refusal::Overtaken`] if that is not the next step.
pub fn forget(ground: &Ground<'_>, authority_id: &Arc<str>) -> Result<(Part, Arc<str>), Refusal> {
    ground.expects(&Step::Forget(Arc::clone(authority_id)))?;
    let slot = ground.slot(authority_id).ok_or(Refusal::Overtaken)?;
    Ok((Part::new(vec![ground.removal(&slot)]), Arc::clone(&slot.key_id)))
}

/// The authorities of one key set that are published, as they are noted beside its keys, oldest first.
pub fn noted(state: &State, owner: KeyOwner) -> Vec<NotedAuthority> {
    let bundle = state.bundle(state.trust_domain());
    let whole = |time: SystemTime| {
        let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
    };
    let mut noted: Vec<NotedAuthority> = state
        .all_slots()
        .filter(|slot| slot.owner == owner)
        .filter_map(|slot| {
            Some(NotedAuthority {
                authority_id: Arc::clone(&slot.authority_id),
                key_id: Arc::clone(&slot.key_id),
                issued_at: whole(slot.issued_at),
                not_after: whole(slot.not_after),
                certificate: slot.certificate.clone(),
                upstream_chain: slot.upstream_chain.clone(),
                public_key: slot.public_key.clone(),
                tainted: published(bundle, slot)?,
            })
        })
        .collect();
    noted.sort_by(|one, other| (one.issued_at, &one.authority_id).cmp(&(other.issued_at, &other.authority_id)));
    noted
}

/// At most this many lost authorities are published again; a key set has a few at a time.
const MOST_LOST: usize = 20;

/// The changes that publish again, as old ones, the authorities of `noted` that a restored backup does not know: what they
/// signed in the branch that is lost goes on being verified until it ends.
pub fn republish(state: &State, owner: KeyOwner, noted: &[NotedAuthority], now: SystemTime) -> Vec<Change> {
    let kind_of =
        |one: &NotedAuthority| if one.certificate.is_some() { AuthorityKind::X509 } else { AuthorityKind::Jwt };
    let unknown = noted.iter().rev().filter(|one| {
        one.not_after > now
            && !slots_of(state, owner, kind_of(one)).iter().any(|slot| slot.authority_id == one.authority_id)
    });
    let changes = unknown.take(MOST_LOST).flat_map(|one| {
        let slot = AuthoritySlot {
            owner,
            kind: kind_of(one),
            authority_id: Arc::clone(&one.authority_id),
            key_id: Arc::clone(&one.key_id),
            status: SlotStatus::Old,
            issued_at: one.issued_at,
            not_after: one.not_after,
            certificate: one.certificate.clone(),
            upstream_chain: one.upstream_chain.clone(),
            public_key: one.public_key.clone(),
        };
        let mut published = publication(state.trust_domain(), &slot);
        match &mut published {
            Some(Change::PutX509Authority { authority, .. }) => authority.tainted = one.tainted,
            Some(Change::PutJwtAuthority { authority, .. }) => authority.tainted = one.tainted,
            _ => {}
        }
        published.into_iter().chain([Change::PutSlot(Arc::new(slot))])
    });
    let changes: Vec<Change> = changes.collect();
    // First the bundle, which may not be there.
    if changes.is_empty() { changes } else { [next_sequence(state)].into_iter().chain(changes).collect() }
}

/// The part that says that the keys of these authorities are gone. Their roots stay published until they end.
pub fn lose(state: &State, owner: KeyOwner, lost: &[(AuthorityKind, Arc<str>)]) -> Part {
    let slots = lost.iter().filter_map(|(kind, id)| {
        slots_of(state, owner, *kind)
            .into_iter()
            .find(|slot| slot.authority_id == *id && slot.status != SlotStatus::Lost)
    });
    Part::new(slots.map(|slot| with_status(&slot, SlotStatus::Lost)).collect())
}

/// The part that taints an old authority, and its journal line.
///
/// # Errors
/// If it is none of ours, not old, not in the bundle, or tainted already.
pub fn taint(
    state: &State,
    owner: KeyOwner,
    kind: AuthorityKind,
    authority_id: &str,
) -> Result<(Part, Arc<AuthoritySlot>), Refusal> {
    let slots = slots_of(state, owner, kind);
    let slot = slots.iter().find(|slot| *slot.authority_id == *authority_id).ok_or(Refusal::UnexpectedAuthority)?;
    match slot.status {
        SlotStatus::Active => return Err(Refusal::TaintActive),
        SlotStatus::Prepared => return Err(Refusal::TaintNotOld),
        SlotStatus::Old | SlotStatus::Lost => {}
    }
    let bundle = state.bundle(state.trust_domain());
    match published(bundle, slot) {
        None => return Err(Refusal::NotPublished),
        Some(true) => return Err(Refusal::AlreadyTainted),
        Some(false) => {}
    }
    let trust_domain = state.trust_domain().clone();
    let change = match kind {
        AuthorityKind::X509 => Change::PutX509Authority {
            trust_domain,
            authority: X509Authority { der: slot.certificate.clone().ok_or(Refusal::NotPublished)?, tainted: true },
        },
        AuthorityKind::Jwt => {
            let held = bundle
                .and_then(|bundle| bundle.jwt.iter().find(|held| held.key_id == slot.authority_id))
                .ok_or(Refusal::NotPublished)?;
            Change::PutJwtAuthority { trust_domain, authority: JwtAuthority { tainted: true, ..held.clone() } }
        }
    };
    Ok((Part::new(vec![change, next_sequence(state)]), Arc::clone(slot)))
}

/// The part that revokes a tainted authority. A JWT authority may be any of the bundle, since downstream servers
/// publish theirs in it too. Gives its journal line, if it has one.
///
/// # Errors
/// If it is not tainted, or signs or will sign, or is not in the bundle.
pub fn revoke(
    state: &State,
    owner: KeyOwner,
    kind: AuthorityKind,
    authority_id: &str,
) -> Result<(Part, Option<Arc<AuthoritySlot>>), Refusal> {
    let slots = slots_of(state, owner, kind);
    let slot = slots.iter().find(|slot| *slot.authority_id == *authority_id);
    let trust_domain = state.trust_domain().clone();
    let bundle = state.bundle(&trust_domain).ok_or(Refusal::NotPublished)?;
    let (tainted, change) = match (kind, slot) {
        (_, Some(slot)) if slot.status == SlotStatus::Active => return Err(Refusal::RevokeActive),
        (AuthorityKind::X509, None) => return Err(Refusal::RevokeNotOld),
        (AuthorityKind::X509, Some(slot)) if slot.status == SlotStatus::Prepared => return Err(Refusal::RevokeNotOld),
        (AuthorityKind::Jwt, Some(slot)) if slot.status == SlotStatus::Prepared => return Err(Refusal::RevokePrepared),
        (AuthorityKind::X509, Some(slot)) => {
            let certificate = slot.certificate.as_ref().ok_or(Refusal::NotPublished)?;
            let tainted = published(Some(bundle), slot).ok_or(Refusal::NotPublished)?;
            (tainted, Change::RemoveX509Authority { trust_domain, sha256: certificate_hash(certificate) })
        }
        (AuthorityKind::Jwt, _) => {
            let held = bundle.jwt.iter().find(|held| *held.key_id == *authority_id).ok_or(Refusal::NotPublished)?;
            (held.tainted, Change::RemoveJwtAuthority { trust_domain, key_id: Arc::clone(&held.key_id) })
        }
    };
    if !tainted {
        return Err(Refusal::NotTainted);
    }
    Ok((Part::new(vec![change, next_sequence(state)]), slot.cloned()))
}

/// At most this many journal lines, and as many authorities, are removed in one part.
const LARGEST_PRUNING: usize = 40;
/// At most this many authorities that begin in the future are withdrawn in one part.
const MOST_EARLY: usize = 5;

/// The changes that remove what ended long ago, and when there will be more. The authorities of this key set are forgotten
/// and withdrawn by the schedule of their kind, unless their kind is switched off; all others here.
pub fn prunable(state: &State, owner: KeyOwner, serves_jwt: bool, time: Time) -> (Vec<Change>, Option<SystemTime>) {
    let scheduled = |slot: &AuthoritySlot| slot.owner == owner && (slot.kind == AuthorityKind::X509 || serves_jwt);
    let foreign: Vec<_> = state
        .all_slots()
        .filter(|slot| !scheduled(slot))
        .map(|slot| ((slot.owner, slot.kind, Arc::clone(&slot.authority_id)), Some(slot.not_after)))
        .collect();
    let (slots, slots_at) = schedule::ended(&foreign, false, time);
    let mut changes: Vec<Change> = slots
        .into_iter()
        .take(LARGEST_PRUNING)
        .map(|(owner, kind, authority_id)| Change::RemoveSlot { owner, kind, authority_id })
        .collect();
    let Some(bundle) = state.bundle(state.trust_domain()) else {
        return (changes, slots_at);
    };
    let trust_domain = state.trust_domain();
    let early: Vec<_> = state
        .all_slots()
        .filter(|slot| !scheduled(slot) && time.now < schedule::begins_at(slot))
        .take(MOST_EARLY)
        .collect();
    let early_at = (!early.is_empty()).then_some(time.steady_at);
    if time.is_steady() {
        for slot in &early {
            let (owner, kind, authority_id) = (slot.owner, slot.kind, Arc::clone(&slot.authority_id));
            changes.push(Change::RemoveSlot { owner, kind, authority_id });
            changes.extend(retraction(trust_domain, slot));
        }
    }
    let end = |der: &bytes::Bytes| Certificate::parse(der.clone()).ok().map(|certificate| certificate.not_after);
    let x509: Vec<_> =
        bundle.x509.iter().map(|authority| (certificate_hash(&authority.der), end(&authority.der))).collect();
    let jwt: Vec<_> =
        bundle.jwt.iter().map(|authority| (Arc::clone(&authority.key_id), authority.expires_at)).collect();
    let (x509, x509_at) = schedule::ended(&x509, true, time);
    let (jwt, jwt_at) = schedule::ended(&jwt, false, time);
    if !x509.is_empty() || !jwt.is_empty() || time.is_steady() && !early.is_empty() {
        let removed_x509 =
            x509.into_iter().map(|sha256| Change::RemoveX509Authority { trust_domain: trust_domain.clone(), sha256 });
        let removed_jwt =
            jwt.into_iter().map(|key_id| Change::RemoveJwtAuthority { trust_domain: trust_domain.clone(), key_id });
        changes.extend(removed_x509.chain(removed_jwt).take(LARGEST_PRUNING));
        changes.push(next_sequence(state));
    }
    (changes, [slots_at, early_at, x509_at, jwt_at].into_iter().flatten().min())
}

#[cfg(test)]
#[path = "journal/tests.rs"]
mod tests;
