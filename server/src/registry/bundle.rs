//! What may happen to bundles by request: authorities appended to our own, foreign ones stored and removed.
//!
//! Pure. What does not fit into one proposal is a sequence of steps; each leaves a valid state and a strictly smaller
//! rest, and the same decision asked again goes on where the last one ended.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use bytes::Bytes;
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::TrustDomain;

use crate::history::Portion;
use crate::state::State;
use crate::state::model::{Change, Entry, Part, certificate_hash};

/// Why a bundle stays as it is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is a bundle of this trust domain.
    #[error("bundle already exists")]
    Exists,
    /// There is no bundle of this trust domain.
    #[error("bundle not found")]
    Absent,
    /// Entries federate with the trust domain.
    #[error("cannot delete bundle; federated with {entries} registration entries")]
    InUse {
        /// How many entries.
        entries: usize,
    },
    /// The bundle has another key of the same id: a token could be checked with either.
    #[error("key ID \"{key_id}\" belongs to another key of the bundle")]
    KeyIdTaken {
        /// The id.
        key_id: Arc<str>,
    },
}

/// One proposal of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to change now.
    pub part: Part,
    /// How many records are left to change after it; each step leaves fewer, and the last one none.
    pub rest: usize,
}

impl Step {
    /// Nothing is to be done.
    fn none() -> Self {
        Self { part: Part::unchanged(), rest: 0 }
    }

    /// As many of `changes` as one part holds, behind the bundle's own record.
    fn of(state: &State, info: Change, changes: Vec<Change>) -> Self {
        let mut portion = Portion::new(state);
        let mut rest = changes.len();
        // The bundle's record comes first: authorities need it.
        portion.add(info);
        for change in changes {
            if !portion.add(change) {
                break;
            }
            rest -= 1;
        }
        Self { part: portion.into_part(), rest }
    }
}

/// Which fields of a bundle an update replaces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fields {
    /// The X.509 authorities.
    pub x509: bool,
    /// The JWT authorities.
    pub jwt: bool,
    /// The refresh hint.
    pub refresh_hint: bool,
    /// The sequence number.
    pub sequence: bool,
}

impl Fields {
    /// Every field.
    pub const ALL: Self = Self { x509: true, jwt: true, refresh_hint: true, sequence: true };
}

/// What happens to the entries that federate with a bundle that is removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Federated {
    /// Their existence forbids the removal.
    Forbid,
    /// They are removed.
    Remove,
    /// They lose their tie to it.
    Release,
}

/// Adds what is missing of `x509` and `jwt` to a bundle; its sequence number grows if anything was missing.
///
/// # Errors
/// [`Refusal::Absent`]; [`Refusal::KeyIdTaken`] if a key id stands for another key.
pub fn append(
    state: &State,
    trust_domain: &TrustDomain,
    x509: &[Bytes],
    jwt: &[JwtAuthority],
) -> Result<Step, Refusal> {
    let bundle = state.bundle(trust_domain).ok_or(Refusal::Absent)?;
    let mut changes = Vec::new();
    let mut seen: HashSet<&[u8]> = bundle.x509.iter().map(|held| &*held.der).collect();
    for der in x509 {
        if seen.insert(der) {
            changes.push(put_x509(trust_domain, der.clone()));
        }
    }
    let mut seen: HashMap<&str, &Bytes> = bundle.jwt.iter().map(|held| (&*held.key_id, &held.public_key)).collect();
    for authority in jwt {
        match seen.insert(&authority.key_id, &authority.public_key) {
            None => changes.push(put_jwt(trust_domain, authority.clone())),
            Some(held) if *held == authority.public_key => {}
            Some(_) => return Err(Refusal::KeyIdTaken { key_id: Arc::clone(&authority.key_id) }),
        }
    }
    if changes.is_empty() {
        return Ok(Step::none());
    }
    let (sequence, refresh_hint) = (bundle.sequence + 1, bundle.refresh_hint);
    let info = Change::PutBundleInfo { trust_domain: trust_domain.clone(), sequence, refresh_hint };
    Ok(Step::of(state, info, changes))
}

/// Makes a bundle that is not there; `begun` tells that an earlier step of the same request made it.
///
/// # Errors
/// [`Refusal::Exists`].
pub fn create(state: &State, wanted: &Bundle, begun: bool) -> Result<Step, Refusal> {
    if !begun && state.bundle(&wanted.trust_domain).is_some() {
        return Err(Refusal::Exists);
    }
    Ok(set(state, wanted, Fields::ALL))
}

/// Replaces fields of a bundle that is there.
///
/// # Errors
/// [`Refusal::Absent`].
pub fn update(state: &State, wanted: &Bundle, fields: Fields) -> Result<Step, Refusal> {
    if state.bundle(&wanted.trust_domain).is_none() {
        return Err(Refusal::Absent);
    }
    Ok(set(state, wanted, fields))
}

/// Makes a bundle what is wanted of it, whether it is there or not.
pub fn set(state: &State, wanted: &Bundle, fields: Fields) -> Step {
    let trust_domain = &wanted.trust_domain;
    let none = Bundle::empty(trust_domain.clone());
    let held = state.bundle(trust_domain);
    let current = held.map_or(&none, |held| &**held);
    let sequence = if fields.sequence { wanted.sequence } else { current.sequence };
    let refresh_hint = if fields.refresh_hint { wanted.refresh_hint } else { current.refresh_hint };
    let info = Change::PutBundleInfo { trust_domain: trust_domain.clone(), sequence, refresh_hint };
    let mut changes = Vec::new();
    if fields.x509 {
        // What comes is put first and what goes is removed last: no step leaves fewer authorities than it must.
        let held: HashSet<&[u8]> = current.x509.iter().map(|held| &*held.der).collect();
        let mut kept: HashSet<&[u8]> = HashSet::new();
        let first = wanted.x509.iter().filter(|wanted| kept.insert(&*wanted.der));
        let missing: Vec<_> = first.filter(|wanted| !held.contains(&*wanted.der)).collect();
        changes.extend(missing.into_iter().map(|wanted| put_x509(trust_domain, wanted.der.clone())));
        let gone = current.x509.iter().filter(|held| !kept.contains(&*held.der));
        changes.extend(gone.map(|held| Change::RemoveX509Authority {
            trust_domain: trust_domain.clone(),
            sha256: certificate_hash(&held.der),
        }));
    }
    if fields.jwt {
        let held: HashMap<&str, &JwtAuthority> = current.jwt.iter().map(|held| (&*held.key_id, held)).collect();
        // Of two keys with one id the first counts, so that what is held is what was wanted in the end.
        let mut named = HashSet::new();
        let first = wanted.jwt.iter().filter(|wanted| named.insert(&*wanted.key_id));
        let missing = first.filter(|wanted| held.get(&*wanted.key_id) != Some(wanted));
        changes.extend(missing.map(|wanted| put_jwt(trust_domain, wanted.clone())));
        let kept: HashSet<&str> = wanted.jwt.iter().map(|wanted| &*wanted.key_id).collect();
        let gone = current.jwt.iter().filter(|held| !kept.contains(&*held.key_id));
        changes.extend(gone.map(|held| Change::RemoveJwtAuthority {
            trust_domain: trust_domain.clone(),
            key_id: Arc::clone(&held.key_id),
        }));
    }
    let same_info = held.is_some() && sequence == current.sequence && refresh_hint == current.refresh_hint;
    if changes.is_empty() && same_info {
        return Step::none();
    }
    Step::of(state, info, changes)
}

/// Removes a bundle: first its ties to entries, then its authorities, and last itself.
///
/// # Errors
/// [`Refusal::Absent`], or [`Refusal::InUse`] if entries forbid it. An entry that comes between two steps forbids the
/// next one; what is gone by then was to go, and fewer authorities make nobody believed.
pub fn remove(state: &State, trust_domain: &TrustDomain, federated: Federated) -> Result<Step, Refusal> {
    let bundle = state.bundle(trust_domain).ok_or(Refusal::Absent)?;
    let mut entries = state.entries_federating_with(trust_domain).peekable();
    if federated == Federated::Forbid && entries.peek().is_some() {
        return Err(Refusal::InUse { entries: entries.count() });
    }
    let all = state.most_federating_with(trust_domain) + bundle.x509.len() + bundle.jwt.len() + 1;
    let mut portion = Portion::new(state);
    for entry in entries {
        let change = match federated {
            Federated::Forbid | Federated::Remove => Change::RemoveEntry(Arc::clone(&entry.id)),
            Federated::Release => Change::PutEntry(Arc::new(released(entry, trust_domain))),
        };
        if !portion.add(change) {
            return Ok(Step { rest: all - portion.len(), part: portion.into_part() });
        }
    }
    if portion.add(Change::RemoveBundle(trust_domain.clone())) {
        return Ok(Step { part: portion.into_part(), rest: 0 });
    }
    let x509 = bundle.x509.iter().map(|held| Change::RemoveX509Authority {
        trust_domain: trust_domain.clone(),
        sha256: certificate_hash(&held.der),
    });
    let jwt = bundle.jwt.iter().map(|held| Change::RemoveJwtAuthority {
        trust_domain: trust_domain.clone(),
        key_id: Arc::clone(&held.key_id),
    });
    for change in x509.chain(jwt) {
        if !portion.add(change) {
            break;
        }
    }
    Ok(Step { rest: all - portion.len(), part: portion.into_part() })
}

/// The entry without its tie to a trust domain; a new revision, so that agents notice.
fn released(entry: &Entry, trust_domain: &TrustDomain) -> Entry {
    let mut entry = entry.clone();
    entry.federates_with.retain(|tied| tied != trust_domain);
    entry.revision += 1;
    entry
}

fn put_x509(trust_domain: &TrustDomain, der: Bytes) -> Change {
    let authority = X509Authority { der, tainted: false };
    Change::PutX509Authority { trust_domain: trust_domain.clone(), authority }
}

fn put_jwt(trust_domain: &TrustDomain, authority: JwtAuthority) -> Change {
    Change::PutJwtAuthority { trust_domain: trust_domain.clone(), authority }
}

#[cfg(test)]
#[path = "bundle/tests.rs"]
mod tests;
