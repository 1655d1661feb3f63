//! What may happen to bundles by request: authorities appended to our own, foreign ones stored and removed.
//!
//! Pure. What does not fit into one proposal is a sequence of steps; each leaves a valid state, and the same
//! decision asked again goes on where the last one ended.

use std::collections::HashSet;
use std::sync::Arc;

use bytes::Bytes;
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::TrustDomain;

use crate::state::State;
use crate::state::model::{Change, Entry, Part, certificate_hash};

/// Changes in one step, so that a proposal stays within its limits.
const STEP: usize = 90;

/// Why a bundle stays as it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
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
}

/// One proposal of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// What to change now.
    pub part: Part,
    /// Whether nothing is left to do after it.
    pub last: bool,
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
/// [`Refusal::Absent`].
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
    let mut seen: HashSet<&str> = bundle.jwt.iter().map(|held| &*held.key_id).collect();
    for authority in jwt {
        if seen.insert(&authority.key_id) {
            changes.push(put_jwt(trust_domain, authority.clone()));
        }
    }
    if changes.is_empty() {
        return Ok(Step { part: Part::unchanged(), last: true });
    }
    let last = changes.len() <= STEP;
    changes.truncate(STEP);
    let (sequence, refresh_hint) = (bundle.sequence + 1, bundle.refresh_hint);
    changes.push(Change::PutBundleInfo { trust_domain: trust_domain.clone(), sequence, refresh_hint });
    Ok(Step { part: Part::new(changes), last })
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
        let kept: HashSet<&[u8]> = wanted.x509.iter().map(|wanted| &*wanted.der).collect();
        let missing = wanted.x509.iter().filter(|wanted| !held.contains(&*wanted.der));
        changes.extend(missing.map(|wanted| put_x509(trust_domain, wanted.der.clone())));
        let gone = current.x509.iter().filter(|held| !kept.contains(&*held.der));
        changes.extend(gone.map(|held| Change::RemoveX509Authority {
            trust_domain: trust_domain.clone(),
            sha256: certificate_hash(&held.der),
        }));
    }
    if fields.jwt {
        let missing = wanted.jwt.iter().filter(|wanted| !current.jwt.contains(wanted));
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
        return Step { part: Part::unchanged(), last: true };
    }
    let last = changes.len() <= STEP;
    changes.truncate(STEP);
    changes.insert(0, info);
    Step { part: Part::new(changes), last }
}

/// Removes a bundle.
///
/// # Errors
/// [`Refusal::Absent`], or [`Refusal::InUse`] if entries forbid it.
pub fn remove(state: &State, trust_domain: &TrustDomain, federated: Federated) -> Result<Step, Refusal> {
    if state.bundle(trust_domain).is_none() {
        return Err(Refusal::Absent);
    }
    let mut entries = state.entries_federating_with(trust_domain).peekable();
    if federated == Federated::Forbid && entries.peek().is_some() {
        return Err(Refusal::InUse { entries: entries.count() });
    }
    let mut changes: Vec<Change> = entries
        .by_ref()
        .take(STEP)
        .map(|entry| match federated {
            Federated::Forbid | Federated::Remove => Change::RemoveEntry(Arc::clone(&entry.id)),
            Federated::Release => Change::PutEntry(Arc::new(released(entry, trust_domain))),
        })
        .collect();
    let last = entries.peek().is_none();
    if last {
        changes.push(Change::RemoveBundle(trust_domain.clone()));
    }
    Ok(Step { part: Part::new(changes), last })
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
