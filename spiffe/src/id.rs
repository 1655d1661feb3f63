//! Trust domains and SPIFFE IDs: parsed once, then a type.
//!
//! The rules are those of SPIFFE-ID (sections 2.1 to 2.4), applied without any tolerance: no
//! upper-case scheme or trust domain, no percent-encoding, no query or fragment, at most
//! [`SpiffeId::MAX_LENGTH`] bytes. Whatever parses is already in the one form that compares equal.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

const SCHEME: &str = "spiffe://";

/// Why a text is not a trust domain or a SPIFFE ID.
///
/// The offending text is not part of the message: who prints it decides how it is escaped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IdError {
    /// The text has no bytes.
    #[error("is empty")]
    Empty,
    /// The text does not begin with `spiffe://` in lower case.
    #[error("scheme is missing or is not \"spiffe\"")]
    Scheme,
    /// Nothing stands between `spiffe://` and the path.
    #[error("trust domain is missing")]
    MissingTrustDomain,
    /// A byte outside `a-z 0-9 . - _`; user info, ports and IPv6 end up here, too.
    #[error("trust domain may only hold lower-case letters, digits, dots, dashes and underscores")]
    TrustDomainCharacter,
    /// More than [`TrustDomain::MAX_LENGTH`] bytes.
    #[error("trust domain is longer than 255 bytes")]
    TrustDomainTooLong,
    /// The path does not begin with a slash.
    #[error("path does not begin with a slash")]
    PathWithoutSlash,
    /// A byte outside `A-Z a-z 0-9 . - _` in a path segment.
    #[error("path segments may only hold letters, digits, dots, dashes and underscores")]
    PathCharacter,
    /// Two slashes in a row.
    #[error("path has an empty segment")]
    EmptySegment,
    /// A segment that is `.` or `..`.
    #[error("path has a relative segment")]
    DotSegment,
    /// The last byte is a slash.
    #[error("path ends with a slash")]
    TrailingSlash,
    /// More than [`SpiffeId::MAX_LENGTH`] bytes in all.
    #[error("SPIFFE ID is longer than 2048 bytes")]
    TooLong,
    /// A name of our own with an empty label or a final dot: Go's certificate parser refuses
    /// certificates for it, so most peers could not talk to us.
    #[error("trust domain has an empty label or a final dot, which many peers refuse")]
    EmptyLabel,
}

/// The name of a trust domain, such as `example.org` (SPIFFE-ID section 2.1).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Longest legal name in bytes.
    pub const MAX_LENGTH: usize = 255;

    /// Parses a bare name.
    pub fn parse(name: &str) -> Result<Self, IdError> {
        check_trust_domain(name.as_bytes())?;
        Ok(Self(name.into()))
    }

    /// Parses a bare name or `spiffe://name`, the two forms that SPIRE accepts in configuration
    /// and requests. A path is refused.
    pub fn parse_lenient(text: &str) -> Result<Self, IdError> {
        Self::parse(text.strip_prefix(SCHEME).unwrap_or(text))
    }

    /// The stricter rule for a trust domain of our own: no empty label, no final dot.
    pub fn check_own(&self) -> Result<(), IdError> {
        if self.0.split('.').any(str::is_empty) { Err(IdError::EmptyLabel) } else { Ok(()) }
    }

    /// The bare name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of the trust domain itself: `spiffe://name`, without path.
    pub fn id(&self) -> SpiffeId {
        SpiffeId { text: self.id_string().into(), trust_domain: self.clone() }
    }

    /// `spiffe://name` as text, the key of the bundle maps of the Workload API.
    pub fn id_string(&self) -> String {
        format!("{SCHEME}{}", self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::parse(text)
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustDomain({})", self.0)
    }
}

impl std::borrow::Borrow<str> for TrustDomain {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// A SPIFFE ID, such as `spiffe://example.org/a/b`; without a path it names the trust domain.
#[derive(Clone)]
pub struct SpiffeId {
    text: Arc<str>,
    trust_domain: TrustDomain,
}

impl SpiffeId {
    /// Longest accepted SPIFFE ID in bytes, `spiffe://` included (SPIFFE-ID section 2.3).
    pub const MAX_LENGTH: usize = 2048;

    /// Parses the full form.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        let (name, path) = split(text)?;
        check_trust_domain(name.as_bytes())?;
        check_path(path.as_bytes())?;
        Ok(Self { text: text.into(), trust_domain: TrustDomain(name.into()) })
    }

    /// As [`SpiffeId::parse`], but shares the name of `trust_domain` when it is that one, which
    /// halves the memory of many ids of one domain.
    pub fn parse_sharing(text: &str, trust_domain: &TrustDomain) -> Result<Self, IdError> {
        let (name, path) = split(text)?;
        let shared = name == trust_domain.as_str();
        if !shared {
            check_trust_domain(name.as_bytes())?;
        }
        check_path(path.as_bytes())?;
        let trust_domain = if shared { trust_domain.clone() } else { TrustDomain(name.into()) };
        Ok(Self { text: text.into(), trust_domain })
    }

    /// The id of `path` (empty, or beginning with a slash) in `trust_domain`.
    pub fn from_path(trust_domain: &TrustDomain, path: &str) -> Result<Self, IdError> {
        if SCHEME.len() + trust_domain.as_str().len() + path.len() > Self::MAX_LENGTH {
            return Err(IdError::TooLong);
        }
        check_path(path.as_bytes())?;
        Ok(Self { text: format!("{SCHEME}{trust_domain}{path}").into(), trust_domain: trust_domain.clone() })
    }

    /// The id of the servers of a trust domain: `spiffe://td/spire/server`.
    pub fn server_of(trust_domain: &TrustDomain) -> SpiffeId {
        Self { text: format!("{SCHEME}{trust_domain}/spire/server").into(), trust_domain: trust_domain.clone() }
    }

    /// The trust domain.
    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// The path: empty, or with a leading slash.
    pub fn path(&self) -> &str {
        self.text.get(SCHEME.len() + self.trust_domain.as_str().len()..).unwrap_or_default()
    }

    /// The full text.
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Whether the id belongs to `trust_domain`.
    pub fn is_member_of(&self, trust_domain: &TrustDomain) -> bool {
        self.trust_domain == *trust_domain
    }

    /// Whether the path is `/spire` or below it, which is reserved for servers and agents.
    pub fn is_reserved(&self) -> bool {
        matches!(self.path().strip_prefix("/spire"), Some(rest) if rest.is_empty() || rest.starts_with('/'))
    }

    /// Whether the path lies below `/spire/agent/`.
    pub fn is_agent(&self) -> bool {
        self.path().starts_with("/spire/agent/")
    }

    /// Whether this is the id of its trust domain's servers.
    pub fn is_server(&self) -> bool {
        self.path() == "/spire/server"
    }
}

impl PartialEq for SpiffeId {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.text, &other.text) || self.text == other.text
    }
}

impl Eq for SpiffeId {}

impl std::hash::Hash for SpiffeId {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.text.hash(state);
    }
}

impl PartialOrd for SpiffeId {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for SpiffeId {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.text.cmp(&other.text)
    }
}

impl std::borrow::Borrow<str> for SpiffeId {
    fn borrow(&self) -> &str {
        &self.text
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::parse(text)
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpiffeId({})", self.text)
    }
}

/// Splits `spiffe://name/path`; the length is judged first, so that hostile sizes cost nothing.
fn split(text: &str) -> Result<(&str, &str), IdError> {
    if text.is_empty() {
        return Err(IdError::Empty);
    }
    if text.len() > SpiffeId::MAX_LENGTH {
        return Err(IdError::TooLong);
    }
    let rest = text.strip_prefix(SCHEME).ok_or(IdError::Scheme)?;
    Ok(rest.find('/').map_or((rest, ""), |slash| rest.split_at(slash)))
}

fn check_trust_domain(name: &[u8]) -> Result<(), IdError> {
    match name {
        [] => Err(IdError::MissingTrustDomain),
        _ if name.len() > TrustDomain::MAX_LENGTH => Err(IdError::TrustDomainTooLong),
        _ if name.iter().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_')) => Ok(()),
        _ => Err(IdError::TrustDomainCharacter),
    }
}

fn check_path(path: &[u8]) -> Result<(), IdError> {
    let Some((first, rest)) = path.split_first() else { return Ok(()) };
    if *first != b'/' {
        return Err(IdError::PathWithoutSlash);
    }
    if path.last() == Some(&b'/') {
        return Err(IdError::TrailingSlash);
    }
    for segment in rest.split(|b| *b == b'/') {
        match segment {
            [] => return Err(IdError::EmptySegment),
            b"." | b".." => return Err(IdError::DotSegment),
            _ if segment.iter().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_')) => {}
            _ => return Err(IdError::PathCharacter),
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "id/tests.rs"]
mod tests;
