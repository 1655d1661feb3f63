//! Between the messages of the wire and the values of the domain.

pub mod encode;

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::{IdError, SpiffeId, TrustDomain};
use spiffe::jwt::JwtKey;
use spiffe::selector::{Match, Selector, SelectorError, SelectorSet};
use spiffe::x509::{Certificate, KeyError, X509Error};
use spiffe_proto::types;
use spiffe_proto::types::federates_with_match::MatchBehavior as FederatesWithBehavior;
use spiffe_proto::types::selector_match::MatchBehavior;

use crate::authority::issue::{IssuedJwt, IssuedX509};
use crate::state::model::{Agent, Entry};

/// Why a message is not a value.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// A SPIFFE ID is not there.
    #[error("request must specify SPIFFE ID")]
    IdMissing,
    /// A SPIFFE ID is malformed.
    #[error("SPIFFE ID is malformed")]
    Id(#[source] IdError),
    /// A SPIFFE ID is of another trust domain.
    #[error("\"{id}\" is not a member of trust domain \"{trust_domain}\"")]
    Foreign {
        /// The id.
        id: SpiffeId,
        /// Ours.
        trust_domain: TrustDomain,
    },
    /// A SPIFFE ID names a trust domain where a member is wanted.
    #[error("\"{id}\" is not a member of trust domain \"{}\"; path is empty", id.trust_domain())]
    NoPath {
        /// The id.
        id: SpiffeId,
    },
    /// A SPIFFE ID is not one of an agent.
    #[error("\"{id}\" is not an agent in trust domain \"{}\"; path is not in the agent namespace", id.trust_domain())]
    NotAgent {
        /// The id.
        id: SpiffeId,
    },
    /// A SPIFFE ID is one that only servers and agents have.
    #[error("\"{id}\" is not a workload in trust domain \"{}\"; path is in the reserved namespace", id.trust_domain())]
    Reserved {
        /// The id.
        id: SpiffeId,
    },
    /// A trust domain is malformed.
    #[error("trust domain is malformed")]
    TrustDomain(#[source] IdError),
    /// The trust domain of a bundle is malformed.
    #[error("invalid trust domain")]
    BundleTrustDomain(#[source] IdError),
    /// A selector has no type.
    #[error("missing selector type")]
    SelectorType,
    /// A selector's type cannot be told from its value.
    #[error("selector type contains ':'")]
    SelectorColon,
    /// A selector has no value.
    #[error("missing selector value")]
    SelectorValue,
    /// A filter by selectors names none.
    #[error("empty selector set")]
    NoSelectors,
    /// A filter by trust domains names none.
    #[error("empty trust domain set")]
    NoTrustDomains,
    /// A filter compares in a way that is not known.
    #[error("unhandled match behavior {behavior}")]
    Match {
        /// The number on the wire.
        behavior: i32,
    },
    /// An authority is not a certificate.
    #[error("unable to parse X.509 authority")]
    X509Authority(#[source] X509Error),
    /// An authority is not a public key.
    #[error("unable to parse JWT authority")]
    JwtAuthority(#[source] KeyError),
    /// A JWT authority has no key id.
    #[error("missing key ID")]
    KeyId,
    /// Two different keys under one id, as the reader of bundle documents refuses them.
    #[error("JWT authority {index} repeats the key ID \"{key_id}\" of another key")]
    RepeatedKeyId {
        /// Position among the JWT authorities, from 0.
        index: usize,
        /// The id.
        key_id: Arc<str>,
    },
}

/// Whole seconds since 1970; negative before.
pub fn seconds(time: SystemTime) -> i64 {
    match time.duration_since(SystemTime::UNIX_EPOCH) {
        Ok(since) => i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        Err(before) => i64::try_from(before.duration().as_secs()).map_or(i64::MIN, |seconds| -seconds),
    }
}

/// The time `seconds` after 1970, or before if negative; the epoch if no date can say it.
pub fn time(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    let time = if seconds < 0 {
        SystemTime::UNIX_EPOCH.checked_sub(distance)
    } else {
        SystemTime::UNIX_EPOCH.checked_add(distance)
    };
    time.unwrap_or(SystemTime::UNIX_EPOCH)
}

/// A lifetime in seconds; what is not positive stands for the default.
pub fn lifetime(seconds: i32) -> Option<Duration> {
    u64::try_from(seconds).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs)
}

fn short(duration: Option<Duration>) -> i32 {
    duration.map_or(0, |duration| i32::try_from(duration.as_secs()).unwrap_or(i32::MAX))
}

// ---- SPIFFE IDs and trust domains

/// A SPIFFE ID as a message.
pub fn id(id: &SpiffeId) -> types::Spiffeid {
    types::Spiffeid { trust_domain: id.trust_domain().as_str().to_owned(), path: id.path().to_owned() }
}

/// Any SPIFFE ID. The trust domain may be written as `spiffe://td`.
///
/// # Errors
/// If it is missing or malformed.
pub fn any_id(message: Option<&types::Spiffeid>) -> Result<SpiffeId, WireError> {
    let message = message.ok_or(WireError::IdMissing)?;
    let trust_domain = TrustDomain::parse_lenient(&message.trust_domain).map_err(WireError::Id)?;
    SpiffeId::from_path(&trust_domain, &message.path).map_err(WireError::Id)
}

/// A SPIFFE ID with a path, of our own trust domain.
///
/// # Errors
/// If it is none.
pub fn member_id(message: Option<&types::Spiffeid>, own: &TrustDomain) -> Result<SpiffeId, WireError> {
    member(any_id(message)?, own)
}

/// The same of an id that is parsed.
///
/// # Errors
/// If it is of another trust domain, or has no path.
pub fn member(id: SpiffeId, own: &TrustDomain) -> Result<SpiffeId, WireError> {
    if !id.is_member_of(own) {
        return Err(WireError::Foreign { id, trust_domain: own.clone() });
    }
    if id.path().is_empty() { Err(WireError::NoPath { id }) } else { Ok(id) }
}

/// A SPIFFE ID of an agent of our own trust domain.
///
/// # Errors
/// If it is none.
pub fn agent_id(message: Option<&types::Spiffeid>, own: &TrustDomain) -> Result<SpiffeId, WireError> {
    let id = member_id(message, own)?;
    if id.is_agent() { Ok(id) } else { Err(WireError::NotAgent { id }) }
}

/// A SPIFFE ID that a workload of our own trust domain may have.
///
/// # Errors
/// If it is none.
pub fn workload_id(message: Option<&types::Spiffeid>, own: &TrustDomain) -> Result<SpiffeId, WireError> {
    workload(any_id(message)?, own)
}

/// The same of an id that is parsed.
///
/// # Errors
/// If it is of another trust domain, has no path, or is reserved.
pub fn workload(id: SpiffeId, own: &TrustDomain) -> Result<SpiffeId, WireError> {
    let id = member(id, own)?;
    if id.is_reserved() { Err(WireError::Reserved { id }) } else { Ok(id) }
}

/// A trust domain, bare or as `spiffe://td`.
///
/// # Errors
/// If it is malformed.
pub fn trust_domain(text: &str) -> Result<TrustDomain, WireError> {
    TrustDomain::parse_lenient(text).map_err(WireError::TrustDomain)
}

// ---- selectors

/// Selectors as messages.
pub fn selectors(set: &SelectorSet) -> Vec<types::Selector> {
    set.iter()
        .map(|selector| types::Selector { r#type: selector.kind().to_owned(), value: selector.value().to_owned() })
        .collect()
}

/// One selector.
///
/// # Errors
/// If a part is missing, or the type holds a colon.
pub fn selector(message: &types::Selector) -> Result<Selector, WireError> {
    Selector::new(&message.r#type, &message.value).map_err(|error| match error {
        SelectorError::EmptyType => WireError::SelectorType,
        SelectorError::EmptyValue => WireError::SelectorValue,
        _ => WireError::SelectorColon,
    })
}

/// A filter by selectors.
///
/// # Errors
/// If it names none, one is malformed, or the comparison is not known.
pub fn selector_match(message: &types::SelectorMatch) -> Result<(SelectorSet, Match), WireError> {
    let wanted = message.selectors.iter().map(selector).collect::<Result<SelectorSet, _>>()?;
    if wanted.is_empty() {
        return Err(WireError::NoSelectors);
    }
    let behavior =
        MatchBehavior::try_from(message.r#match).map_err(|_| WireError::Match { behavior: message.r#match })?;
    let how = match behavior {
        MatchBehavior::MatchExact => Match::Exact,
        MatchBehavior::MatchSubset => Match::Subset,
        MatchBehavior::MatchSuperset => Match::Superset,
        MatchBehavior::MatchAny => Match::Any,
    };
    Ok((wanted, how))
}

/// A filter by the trust domains that entries federate with.
///
/// # Errors
/// If it names none, one is malformed, or the comparison is not known.
pub fn federates_with_match(message: &types::FederatesWithMatch) -> Result<(BTreeSet<TrustDomain>, Match), WireError> {
    let wanted = message.trust_domains.iter().map(|text| trust_domain(text)).collect::<Result<BTreeSet<_>, _>>()?;
    if wanted.is_empty() {
        return Err(WireError::NoTrustDomains);
    }
    let behavior =
        FederatesWithBehavior::try_from(message.r#match).map_err(|_| WireError::Match { behavior: message.r#match })?;
    let how = match behavior {
        FederatesWithBehavior::MatchExact => Match::Exact,
        FederatesWithBehavior::MatchSubset => Match::Subset,
        FederatesWithBehavior::MatchSuperset => Match::Superset,
        FederatesWithBehavior::MatchAny => Match::Any,
    };
    Ok((wanted, how))
}

// ---- entries

/// An entry as a message, with the fields of `mask`, or all; the id is always there.
pub fn entry(entry: &Entry, mask: Option<&types::EntryMask>) -> types::Entry {
    let wants = |field: fn(&types::EntryMask) -> bool| mask.is_none_or(field);
    let mut message = types::Entry { id: entry.id.to_string(), ..types::Entry::default() };
    if wants(|mask| mask.spiffe_id) {
        message.spiffe_id = Some(id(&entry.spiffe_id));
    }
    if wants(|mask| mask.parent_id) {
        message.parent_id = Some(id(&entry.parent_id));
    }
    if wants(|mask| mask.selectors) {
        message.selectors = selectors(&entry.selectors);
    }
    if wants(|mask| mask.x509_svid_ttl) {
        message.x509_svid_ttl = short(entry.x509_svid_ttl);
    }
    if wants(|mask| mask.federates_with) {
        message.federates_with = entry.federates_with.iter().map(|domain| domain.as_str().to_owned()).collect();
    }
    if wants(|mask| mask.admin) {
        message.admin = entry.admin;
    }
    if wants(|mask| mask.downstream) {
        message.downstream = entry.downstream;
    }
    if wants(|mask| mask.expires_at) {
        message.expires_at = entry.expires_at.map_or(0, seconds);
    }
    if wants(|mask| mask.dns_names) {
        message.dns_names = entry.dns_names.iter().map(|name| name.to_string()).collect();
    }
    if wants(|mask| mask.revision_number) {
        message.revision_number = entry.revision;
    }
    if wants(|mask| mask.store_svid) {
        message.store_svid = entry.store_svid;
    }
    if wants(|mask| mask.jwt_svid_ttl) {
        message.jwt_svid_ttl = short(entry.jwt_svid_ttl);
    }
    if wants(|mask| mask.hint) {
        message.hint = entry.hint.to_string();
    }
    if wants(|mask| mask.created_at) {
        message.created_at = seconds(entry.created_at);
    }
    let has_attributes = entry.disable_x509_svid_prefetch || entry.jwt_svid_include_jti;
    if has_attributes && wants(|mask| mask.additional_attributes) {
        message.additional_attributes = Some(types::entry::AdditionalAttributes {
            disable_x509_svid_prefetch: entry.disable_x509_svid_prefetch,
            jwt_svid_include_jti: entry.jwt_svid_include_jti,
        });
    }
    message
}

// ---- agents

/// An agent as a message, with the fields of `mask`, or all; the id is always there.
pub fn agent(agent: &Agent, mask: Option<&types::AgentMask>) -> types::Agent {
    let wants = |field: fn(&types::AgentMask) -> bool| mask.is_none_or(field);
    let mut message = types::Agent { id: Some(id(&agent.id)), ..types::Agent::default() };
    if wants(|mask| mask.attestation_type) {
        message.attestation_type = agent.attestation_type.to_string();
    }
    if wants(|mask| mask.x509svid_serial_number) {
        message.x509svid_serial_number = agent.serial().map(|serial| serial.to_string()).unwrap_or_default();
    }
    if wants(|mask| mask.x509svid_expires_at) {
        message.x509svid_expires_at = seconds(agent.expires_at);
    }
    if wants(|mask| mask.selectors) {
        message.selectors = selectors(&agent.selectors);
    }
    if wants(|mask| mask.banned) {
        message.banned = agent.is_banned();
    }
    if wants(|mask| mask.can_reattest) {
        message.can_reattest = agent.can_reattest;
    }
    if wants(|mask| mask.agent_version) {
        message.agent_version = agent.version.to_string();
    }
    message
}

// ---- bundles

/// A bundle as a message, with the fields of `mask`, or all; the trust domain is always there.
pub fn bundle(bundle: &Bundle, mask: Option<&types::BundleMask>) -> types::Bundle {
    let wants = |field: fn(&types::BundleMask) -> bool| mask.is_none_or(field);
    let mut message =
        types::Bundle { trust_domain: bundle.trust_domain.as_str().to_owned(), ..types::Bundle::default() };
    if wants(|mask| mask.x509_authorities) {
        let certificate =
            |held: &X509Authority| types::X509Certificate { asn1: held.der.clone(), tainted: held.tainted };
        message.x509_authorities = bundle.x509.iter().map(certificate).collect();
    }
    if wants(|mask| mask.jwt_authorities) {
        message.jwt_authorities = bundle.jwt.iter().map(jwt_key).collect();
    }
    if wants(|mask| mask.refresh_hint) {
        message.refresh_hint = bundle.refresh_hint.map_or(0, |hint| i64::try_from(hint.as_secs()).unwrap_or(i64::MAX));
    }
    if wants(|mask| mask.sequence_number) {
        message.sequence_number = bundle.sequence;
    }
    message
}

fn jwt_key(held: &JwtAuthority) -> types::JwtKey {
    types::JwtKey {
        public_key: held.public_key.clone(),
        key_id: held.key_id.to_string(),
        expires_at: held.expires_at.map_or(0, seconds),
        tainted: held.tainted,
    }
}

/// A bundle that a caller sends. Taint is not the caller's to say, and WIT authorities are not kept.
///
/// # Errors
/// If the trust domain or an authority is malformed.
pub fn bundle_of(message: &types::Bundle) -> Result<Bundle, WireError> {
    let trust_domain = TrustDomain::parse_lenient(&message.trust_domain).map_err(WireError::BundleTrustDomain)?;
    Ok(Bundle {
        x509: message.x509_authorities.iter().map(x509_authority).collect::<Result<_, _>>()?,
        jwt: jwt_authorities(&message.jwt_authorities)?,
        refresh_hint: u64::try_from(message.refresh_hint).ok().filter(|hint| *hint > 0).map(Duration::from_secs),
        sequence: message.sequence_number,
        ..Bundle::empty(trust_domain)
    })
}

/// An X.509 authority that a caller sends: exactly one certificate.
///
/// # Errors
/// If it is none.
pub fn x509_authority(message: &types::X509Certificate) -> Result<X509Authority, WireError> {
    let certificate = Certificate::parse(message.asn1.clone()).map_err(WireError::X509Authority)?;
    Ok(X509Authority { der: certificate.der, tainted: false })
}

/// The JWT authorities that a caller sends: each once, however often it comes.
///
/// # Errors
/// If one of them is malformed, or two differ and have one key id.
pub fn jwt_authorities(messages: &[types::JwtKey]) -> Result<Vec<JwtAuthority>, WireError> {
    let mut places: HashMap<Arc<str>, usize> = HashMap::new();
    let mut authorities: Vec<JwtAuthority> = Vec::new();
    for (index, message) in messages.iter().enumerate() {
        let authority = jwt_authority(message)?;
        match places.get(&authority.key_id).and_then(|place| authorities.get(*place)) {
            None => {
                places.insert(Arc::clone(&authority.key_id), authorities.len());
                authorities.push(authority);
            }
            Some(known) if *known == authority => {}
            Some(_) => return Err(WireError::RepeatedKeyId { index, key_id: authority.key_id }),
        }
    }
    Ok(authorities)
}

/// A JWT authority that a caller sends.
///
/// # Errors
/// If it has no key id, or its key cannot be read.
pub fn jwt_authority(message: &types::JwtKey) -> Result<JwtAuthority, WireError> {
    JwtKey::from_pkix(&message.public_key).map_err(WireError::JwtAuthority)?;
    if message.key_id.is_empty() {
        return Err(WireError::KeyId);
    }
    Ok(JwtAuthority {
        key_id: Arc::from(&*message.key_id),
        public_key: message.public_key.clone(),
        expires_at: Some(message.expires_at).filter(|seconds| *seconds != 0).map(time),
        tainted: false,
    })
}

// ---- credentials

/// An X509-SVID as a message.
pub fn x509_svid(issued: IssuedX509) -> types::X509svid {
    types::X509svid {
        id: Some(id(&issued.id)),
        expires_at: seconds(issued.not_after),
        cert_chain: issued.chain,
        hint: String::new(),
    }
}

/// A JWT-SVID as a message.
pub fn jwt_svid(issued: IssuedJwt, hint: &str) -> types::Jwtsvid {
    types::Jwtsvid {
        id: Some(id(&issued.id)),
        expires_at: seconds(issued.expires_at),
        issued_at: seconds(issued.issued_at),
        token: issued.token,
        hint: hint.to_owned(),
    }
}

#[cfg(test)]
mod tests;
