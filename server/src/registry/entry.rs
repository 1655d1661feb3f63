//! What a registration entry may be, and how one is made, changed and removed.
//!
//! A registrar's words become a [`Draft`]; checked, an [`Update`]; with an id and all that an entry needs, a
//! [`NewEntry`]. Decisions on the state take the checked types only.

use std::collections::HashSet;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime};

use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorSet};

pub use super::dns::{DnsNameError, check_dns_name};
use super::similar::similar;
use crate::state::State;
use crate::state::model::{Change, Entry, EntryId, Part};

/// Bytes that a hint may have.
pub const MAX_HINT: usize = 1024;
/// Bytes that an entry id may have.
pub const MAX_ID: usize = 255;

/// At which point SPIRE finds a mistake; its answers say "failed to convert entry" or "failed to create entry" by it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// While it reads the request.
    Reading,
    /// While it writes the entry.
    Writing,
}

/// Why something cannot be an entry. The texts are those of SPIRE where it has one, because clients show them.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EntryError {
    /// The parent is not a SPIFFE ID with a path in the own trust domain.
    #[error("invalid parent ID")]
    ParentId,
    /// The SPIFFE ID is not one that a workload of the own trust domain may have.
    #[error("invalid spiffe ID")]
    SpiffeId,
    /// No selectors.
    #[error("selector list is empty")]
    NoSelectors,
    /// One selector twice.
    #[error("selector \"{0}\" is given twice")]
    SelectorTwice(Selector),
    /// A DNS name is wrong.
    #[error("invalid DNS name")]
    DnsName(#[source] DnsNameError),
    /// One DNS name twice.
    #[error("DNS name \"{0}\" is given twice")]
    DnsNameTwice(Arc<str>),
    /// The hint is too long.
    #[error("hint is too long, max length is {MAX_HINT} characters")]
    Hint,
    /// A lifetime below zero.
    #[error("invalid registration entry: X509SvidTtl is not set")]
    X509SvidTtl,
    /// A lifetime below zero.
    #[error("invalid registration entry: JwtSvidTtl is not set")]
    JwtSvidTtl,
    /// The end cannot be represented.
    #[error("invalid registration entry: the expiry is out of range")]
    ExpiresAt,
    /// The id is too long.
    #[error("invalid registration entry: entry ID too long")]
    IdLength,
    /// The id has other characters than `[-.0-9A-Z_a-z]`, or none.
    #[error("invalid registration entry: entry ID contains invalid characters")]
    IdCharacters,
    /// An SVID for a store with selectors of several stores.
    #[error("invalid registration entry: selector types must be the same when store SVID is enabled")]
    StoreTypes,
    /// An SVID for a store that is signed only when a workload asks.
    #[error("specifying cache behaviour is incompatible with storable SVIDs")]
    StorePrefetch,
}

impl EntryError {
    /// At which point SPIRE finds it.
    pub fn stage(&self) -> Stage {
        match self {
            Self::ParentId
            | Self::SpiffeId
            | Self::NoSelectors
            | Self::SelectorTwice(_)
            | Self::DnsName(_)
            | Self::DnsNameTwice(_)
            | Self::Hint => Stage::Reading,
            Self::X509SvidTtl
            | Self::JwtSvidTtl
            | Self::ExpiresAt
            | Self::IdLength
            | Self::IdCharacters
            | Self::StoreTypes
            | Self::StorePrefetch => Stage::Writing,
        }
    }
}

/// What agents are told about the handling of an entry's SVIDs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Attributes {
    /// Whether an X.509-SVID is signed only when a workload asks.
    pub disable_x509_svid_prefetch: bool,
    /// Whether each JWT-SVID gets a `jti` of its own.
    pub jwt_svid_include_jti: bool,
}

/// What a registrar says about an entry, field by field; what is `None` stays as it is, or is left at its default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Draft {
    /// The identity.
    pub spiffe_id: Option<SpiffeId>,
    /// The agent, alias or server below which it stands.
    pub parent_id: Option<SpiffeId>,
    /// What a workload must show, in the registrar's order.
    pub selectors: Option<Vec<Selector>>,
    /// Seconds; 0 is the server's default.
    pub x509_svid_ttl: Option<i32>,
    /// Seconds; 0 is the server's default.
    pub jwt_svid_ttl: Option<i32>,
    /// Foreign trust domains; one given twice counts once.
    pub federates_with: Option<Vec<TrustDomain>>,
    /// Whether the identity may administrate.
    pub admin: Option<bool>,
    /// Whether the identity may have a subordinate authority.
    pub downstream: Option<bool>,
    /// Seconds since 1970, possibly before; 0 is never.
    pub expires_at: Option<i64>,
    /// DNS names, in the registrar's order.
    pub dns_names: Option<Vec<String>>,
    /// Whether the SVID goes to a store.
    pub store_svid: Option<bool>,
    /// The hint.
    pub hint: Option<String>,
    /// What agents are told.
    pub attributes: Option<Attributes>,
}

/// A checked draft: what is given keeps the rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Update {
    spiffe_id: Option<SpiffeId>,
    parent_id: Option<SpiffeId>,
    selectors: Option<SelectorSet>,
    x509_svid_ttl: Option<Option<Duration>>,
    jwt_svid_ttl: Option<Option<Duration>>,
    federates_with: Option<Vec<TrustDomain>>,
    admin: Option<bool>,
    downstream: Option<bool>,
    expires_at: Option<Option<SystemTime>>,
    dns_names: Option<Vec<Arc<str>>>,
    store_svid: Option<bool>,
    hint: Option<Arc<str>>,
    attributes: Option<Attributes>,
}

/// A checked draft with an id and all that an entry needs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewEntry {
    id: EntryId,
    spiffe_id: SpiffeId,
    parent_id: SpiffeId,
    selectors: SelectorSet,
    rest: Update,
}

/// Why an entry is not made, changed or removed, although the request is well-formed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// An entry with the same parent, SPIFFE ID and selectors is there.
    #[error("similar entry already exists")]
    Similar(Arc<Entry>),
    /// The id is taken by another entry.
    #[error("an entry with this id exists")]
    IdTaken,
    /// There is no such entry.
    #[error("entry not found")]
    NotFound,
    /// A trust domain that the entry federates with has no bundle here.
    #[error("unable to find federated bundle \"{}\"", .0.id_string())]
    NoBundle(TrustDomain),
    /// What the entry would become breaks a rule.
    #[error(transparent)]
    Rule(#[from] EntryError),
}

static NO_HINT: LazyLock<Arc<str>> = LazyLock::new(|| Arc::from(""));

impl Draft {
    /// Checks every field that is given; `own` is the server's trust domain.
    ///
    /// # Errors
    /// The first rule that is broken, in SPIRE's order.
    pub fn check(self, own: &TrustDomain) -> Result<Update, EntryError> {
        let parent_id = self.parent_id.map(|id| member(id, own).ok_or(EntryError::ParentId)).transpose()?;
        let spiffe_id = self
            .spiffe_id
            .map(|id| member(id, own).filter(|id| !id.is_reserved()).ok_or(EntryError::SpiffeId))
            .transpose()?;
        let dns_names = self.dns_names.map(dns_names).transpose()?;
        let selectors = self.selectors.map(selectors).transpose()?;
        if self.hint.as_ref().is_some_and(|hint| hint.len() > MAX_HINT) {
            return Err(EntryError::Hint);
        }
        let update = Update {
            spiffe_id,
            parent_id,
            selectors,
            x509_svid_ttl: self.x509_svid_ttl.map(|ttl| lifetime(ttl).ok_or(EntryError::X509SvidTtl)).transpose()?,
            jwt_svid_ttl: self.jwt_svid_ttl.map(|ttl| lifetime(ttl).ok_or(EntryError::JwtSvidTtl)).transpose()?,
            federates_with: self.federates_with.map(once_each),
            admin: self.admin,
            downstream: self.downstream,
            expires_at: self.expires_at.map(ending).transpose()?,
            dns_names,
            store_svid: self.store_svid,
            hint: self.hint.map(|hint| if hint.is_empty() { Arc::clone(&NO_HINT) } else { Arc::from(hint) }),
            attributes: self.attributes,
        };
        Ok(update)
    }
}

/// An id of the own trust domain with a path, sharing the trust domain's text.
fn member(id: SpiffeId, own: &TrustDomain) -> Option<SpiffeId> {
    if !id.is_member_of(own) || id.path().is_empty() {
        return None;
    }
    SpiffeId::parse_sharing(id.as_str(), own).ok()
}

fn dns_names(names: Vec<String>) -> Result<Vec<Arc<str>>, EntryError> {
    let mut seen = HashSet::with_capacity(names.len());
    for name in &names {
        check_dns_name(name).map_err(EntryError::DnsName)?;
        if !seen.insert(name.as_str()) {
            return Err(EntryError::DnsNameTwice(Arc::from(name.as_str())));
        }
    }
    Ok(names.iter().map(|name| Arc::from(name.as_str())).collect())
}

fn selectors(given: Vec<Selector>) -> Result<SelectorSet, EntryError> {
    if given.is_empty() {
        return Err(EntryError::NoSelectors);
    }
    let set: SelectorSet = given.iter().cloned().collect();
    if set.len() < given.len() {
        let mut seen = HashSet::with_capacity(given.len());
        if let Some(twice) = given.iter().find(|selector| !seen.insert(*selector)) {
            return Err(EntryError::SelectorTwice(twice.clone()));
        }
    }
    Ok(set)
}

fn lifetime(seconds: i32) -> Option<Option<Duration>> {
    let seconds = u64::try_from(seconds).ok()?;
    Some((seconds > 0).then(|| Duration::from_secs(seconds)))
}

fn ending(seconds: i64) -> Result<Option<SystemTime>, EntryError> {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    match seconds {
        0 => Ok(None),
        1.. => SystemTime::UNIX_EPOCH.checked_add(distance).map(Some).ok_or(EntryError::ExpiresAt),
        _ => SystemTime::UNIX_EPOCH.checked_sub(distance).map(Some).ok_or(EntryError::ExpiresAt),
    }
}

fn once_each(domains: Vec<TrustDomain>) -> Vec<TrustDomain> {
    let mut seen = HashSet::with_capacity(domains.len());
    domains.into_iter().filter(|domain| seen.insert(domain.clone())).collect()
}

/// Checks an entry id.
///
/// # Errors
/// [`EntryError::IdLength`] or [`EntryError::IdCharacters`].
pub fn check_id(id: &str) -> Result<(), EntryError> {
    if id.len() > MAX_ID {
        return Err(EntryError::IdLength);
    }
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_');
    if id.is_empty() || !id.bytes().all(allowed) { Err(EntryError::IdCharacters) } else { Ok(()) }
}

impl NewEntry {
    /// An entry to be made under `id`, which is the registrar's or a fresh one.
    ///
    /// # Errors
    /// If the id is malformed, a field without default is missing, or the fields contradict each other.
    pub fn new(id: EntryId, mut update: Update) -> Result<Self, EntryError> {
        let parent_id = update.parent_id.take().ok_or(EntryError::ParentId)?;
        let spiffe_id = update.spiffe_id.take().ok_or(EntryError::SpiffeId)?;
        let selectors = update.selectors.take().ok_or(EntryError::NoSelectors)?;
        check_id(&id)?;
        let attributes = update.attributes.unwrap_or_default();
        check_store(update.store_svid.unwrap_or_default(), &selectors, attributes.disable_x509_svid_prefetch)?;
        Ok(Self { id, spiffe_id, parent_id, selectors, rest: update })
    }

    /// The id it will have.
    pub fn id(&self) -> &EntryId {
        &self.id
    }

    /// The identity it will give.
    pub fn spiffe_id(&self) -> &SpiffeId {
        &self.spiffe_id
    }

    fn entry(&self, state: &State, now: SystemTime) -> Entry {
        let rest = &self.rest;
        let attributes = rest.attributes.unwrap_or_default();
        Entry {
            id: Arc::clone(&self.id),
            ordinal: state.next_ordinal(),
            revision: state.revision_floor(),
            spiffe_id: self.spiffe_id.clone(),
            parent_id: state.shared_parent(&self.parent_id),
            selectors: self.selectors.clone(),
            x509_svid_ttl: rest.x509_svid_ttl.flatten(),
            jwt_svid_ttl: rest.jwt_svid_ttl.flatten(),
            federates_with: rest.federates_with.clone().unwrap_or_default(),
            admin: rest.admin.unwrap_or_default(),
            downstream: rest.downstream.unwrap_or_default(),
            expires_at: rest.expires_at.flatten(),
            dns_names: rest.dns_names.clone().unwrap_or_default(),
            store_svid: rest.store_svid.unwrap_or_default(),
            hint: rest.hint.clone().unwrap_or_else(|| Arc::clone(&NO_HINT)),
            created_at: whole_seconds(now),
            disable_x509_svid_prefetch: attributes.disable_x509_svid_prefetch,
            jwt_svid_include_jti: attributes.jwt_svid_include_jti,
            content: crate::state::model::Content::default(),
        }
    }
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + Duration::from_secs(since.as_secs())
}

/// All selectors of an SVID for a store name that store, and it is always signed ahead.
fn check_store(store_svid: bool, selectors: &SelectorSet, disable_prefetch: bool) -> Result<(), EntryError> {
    if !store_svid {
        return Ok(());
    }
    if disable_prefetch {
        return Err(EntryError::StorePrefetch);
    }
    let mut kinds = selectors.iter().map(Selector::kind);
    let first = kinds.next();
    if kinds.all(|kind| Some(kind) == first) { Ok(()) } else { Err(EntryError::StoreTypes) }
}

fn check_bundles(state: &State, domains: &[TrustDomain]) -> Result<(), Refusal> {
    match domains.iter().find(|domain| state.bundle(domain).is_none()) {
        Some(unknown) => Err(Refusal::NoBundle(unknown.clone())),
        None => Ok(()),
    }
}

/// Makes an entry.
///
/// # Errors
/// [`Refusal::Similar`] before all others, as clients rely on it; then [`Refusal::IdTaken`], [`Refusal::NoBundle`].
pub fn create(state: &State, new: &NewEntry, now: SystemTime) -> Result<(Part, Arc<Entry>), Refusal> {
    if let Some(found) = similar(state, &new.parent_id, &new.spiffe_id, &new.selectors, now) {
        return Err(Refusal::Similar(Arc::clone(found)));
    }
    let mut changes = Vec::with_capacity(1);
    match state.entry(&new.id) {
        // It has ended and is only not removed yet.
        Some(ended) if ended.is_expired(now) => changes.push(Change::RemoveEntry(Arc::clone(&ended.id))),
        Some(_) => return Err(Refusal::IdTaken),
        None => {}
    }
    check_bundles(state, new.rest.federates_with.as_deref().unwrap_or_default())?;
    let entry = Arc::new(new.entry(state, now));
    changes.push(Change::PutEntry(Arc::clone(&entry)));
    Ok((Part::new(changes), entry))
}

/// Changes an entry; its revision grows by one even if nothing else does.
///
/// # Errors
/// [`Refusal::NotFound`], [`Refusal::NoBundle`], or [`Refusal::Rule`] if the whole would break a rule. There is no check
/// for similar entries: an update may make a twin.
pub fn update(state: &State, id: &str, update: &Update, now: SystemTime) -> Result<(Part, Arc<Entry>), Refusal> {
    let mut entry = Entry::clone(present(state, id, now)?);
    entry.revision = entry.revision.saturating_add(1);
    set(&mut entry.spiffe_id, &update.spiffe_id);
    if let Some(parent) = &update.parent_id {
        entry.parent_id = state.shared_parent(parent);
    }
    set(&mut entry.selectors, &update.selectors);
    set(&mut entry.x509_svid_ttl, &update.x509_svid_ttl);
    set(&mut entry.jwt_svid_ttl, &update.jwt_svid_ttl);
    set(&mut entry.admin, &update.admin);
    set(&mut entry.downstream, &update.downstream);
    set(&mut entry.expires_at, &update.expires_at);
    set(&mut entry.dns_names, &update.dns_names);
    set(&mut entry.store_svid, &update.store_svid);
    set(&mut entry.hint, &update.hint);
    if let Some(attributes) = update.attributes {
        entry.disable_x509_svid_prefetch = attributes.disable_x509_svid_prefetch;
        entry.jwt_svid_include_jti = attributes.jwt_svid_include_jti;
    }
    if let Some(domains) = &update.federates_with {
        check_bundles(state, domains)?;
        entry.federates_with.clone_from(domains);
    }
    check_store(entry.store_svid, &entry.selectors, entry.disable_x509_svid_prefetch)?;
    let entry = Arc::new(entry);
    Ok((Part::new(vec![Change::PutEntry(Arc::clone(&entry))]), entry))
}

fn set<T: Clone>(field: &mut T, given: &Option<T>) {
    if let Some(value) = given {
        field.clone_from(value);
    }
}

/// Removes an entry.
///
/// # Errors
/// [`Refusal::NotFound`].
pub fn remove(state: &State, id: &str, now: SystemTime) -> Result<Part, Refusal> {
    let entry = present(state, id, now)?;
    Ok(Part::new(vec![Change::RemoveEntry(Arc::clone(&entry.id))]))
}

/// The entry with this id, unless it has ended.
///
/// # Errors
/// [`Refusal::NotFound`].
pub fn present<'a>(state: &'a State, id: &str, now: SystemTime) -> Result<&'a Arc<Entry>, Refusal> {
    state.entry(id).filter(|entry| !entry.is_expired(now)).ok_or(Refusal::NotFound)
}

#[cfg(test)]
#[path = "entry/tests.rs"]
mod tests;
