//! What may be signed: the profile of every certificate and token, to the field.
//!
//! Pure: a request, the policy and `now` in, a complete description out. [`crate::authority::issue`] signs what these
//! functions describe and nothing else. X509-SVID, sections 2 to 5; JWT-SVID, sections 2 and 3.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use spiffe::id::{SpiffeId, TrustDomain};
use x509_parser::asn1_rs::Tag;
use x509_parser::prelude::FromDer as _;
use x509_parser::x509::X509Name;

use super::keys::KeyType;

/// How far `notBefore` lies before the time of signing, so that a verifier whose clock is behind accepts the SVID.
pub const BACKDATE: Duration = Duration::from_secs(10);

const COUNTRY: &[u64] = &[2, 5, 4, 6];
const ORGANIZATION: &[u64] = &[2, 5, 4, 10];
const ORGANIZATIONAL_UNIT: &[u64] = &[2, 5, 4, 11];
const COMMON_NAME: &[u64] = &[2, 5, 4, 3];
const SERIAL_NUMBER: &[u64] = &[2, 5, 4, 5];

/// What a requester may put into a subject: C, O, OU, L, ST, street, postal code, CN, serialNumber. Others are left
/// out, as SPIRE does.
const REQUESTABLE: [&[u64]; 9] = [
    COUNTRY,
    ORGANIZATION,
    ORGANIZATIONAL_UNIT,
    &[2, 5, 4, 7],
    &[2, 5, 4, 8],
    &[2, 5, 4, 9],
    &[2, 5, 4, 17],
    COMMON_NAME,
    SERIAL_NUMBER,
];

/// What an operator decides about everything that is signed.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The trust domain that is signed for.
    pub trust_domain: TrustDomain,
    /// Subject of the authority's own certificates; empty fields are left out, all empty means the default.
    pub ca_subject: CaSubject,
    /// Lifetime of an authority, X.509 and JWT.
    pub ca_ttl: Duration,
    /// Kind of X.509 authority keys, and of the server's own key.
    pub ca_key_type: KeyType,
    /// Kind of JWT authority keys; nothing when JWT-SVIDs are disabled.
    pub jwt_key_type: Option<KeyType>,
    /// Lifetime of an X.509-SVID whose entry or request names none.
    pub default_x509_svid_ttl: Duration,
    /// Lifetime of a JWT-SVID whose entry or request names none.
    pub default_jwt_svid_ttl: Duration,
    /// Lifetime of agent SVIDs; `default_x509_svid_ttl` if nothing.
    pub agent_ttl: Option<Duration>,
    /// The `iss` claim of JWT-SVIDs, if any.
    pub jwt_issuer: Option<String>,
}

/// The configured subject of the authority's own certificates.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CaSubject {
    /// C, one attribute for each.
    pub country: Vec<String>,
    /// O, one attribute for each.
    pub organization: Vec<String>,
    /// CN; empty for none.
    pub common_name: String,
}

/// How the text of an attribute is encoded. Verifiers compare names byte by byte, so an issuer's name must keep it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// PrintableString.
    Printable,
    /// UTF8String.
    Utf8,
    /// IA5String.
    Ia5,
}

/// One attribute of a distinguished name: its type as an object identifier, and its value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attribute {
    /// Object identifier of the type.
    pub oid: Vec<u64>,
    /// The value as text.
    pub value: String,
    /// Its encoding.
    pub encoding: Encoding,
}

impl Attribute {
    /// An attribute in the narrowest encoding that holds `value`.
    fn new(oid: &[u64], value: &str) -> Self {
        let printable = value.bytes().all(|byte| byte.is_ascii_alphanumeric() || b" '()+,-./:=?".contains(&byte));
        let encoding = if printable { Encoding::Printable } else { Encoding::Utf8 };
        Self { oid: oid.to_vec(), value: value.to_owned(), encoding }
    }
}

/// A distinguished name: attributes in order.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject(Vec<Attribute>);

impl Subject {
    fn with(mut self, oid: &[u64], value: &str) -> Self {
        self.0.push(Attribute::new(oid, value));
        self
    }

    /// The subject of every SVID that brings none of its own.
    fn svid() -> Self {
        Self::default().with(COUNTRY, "US").with(ORGANIZATION, "SPIRE")
    }

    /// The attributes in order.
    pub fn attributes(&self) -> &[Attribute] {
        &self.0
    }

    /// Reads a Name in DER (RFC 5280, section 4.1.2.4). Attributes of a multi-valued component follow each other.
    ///
    /// # Errors
    /// [`ProfileError::Subject`] if it is no Name, or a value is no text.
    pub fn parse(der: &[u8]) -> Result<Self, ProfileError> {
        let (rest, name) = X509Name::from_der(der).map_err(|_| ProfileError::Subject)?;
        if !rest.is_empty() {
            return Err(ProfileError::Subject);
        }
        let mut subject = Self::default();
        for attribute in name.iter_attributes() {
            let oid = attribute.attr_type().iter().ok_or(ProfileError::Subject)?.collect::<Vec<u64>>();
            let encoding = match attribute.attr_value().header.tag() {
                Tag::PrintableString => Encoding::Printable,
                Tag::Utf8String => Encoding::Utf8,
                Tag::Ia5String => Encoding::Ia5,
                _ => return Err(ProfileError::Subject),
            };
            let value = attribute.as_str().map_err(|_| ProfileError::Subject)?.to_owned();
            subject.0.push(Attribute { oid, value, encoding });
        }
        Ok(subject)
    }

    /// Leaves only the attributes that a requester may choose.
    fn only_requestable(mut self) -> Self {
        self.0.retain(|attribute| REQUESTABLE.contains(&attribute.oid.as_slice()));
        self
    }

    /// Puts `value` in the place of the common name, or behind the last attribute.
    fn replace_common_name(&mut self, value: &str) {
        self.replace(COMMON_NAME, value);
    }

    fn replace(&mut self, oid: &[u64], value: &str) {
        let mut place = None;
        let mut index = 0;
        self.0.retain(|attribute| {
            let keep = attribute.oid != oid;
            if keep {
                index += 1;
            } else if place.is_none() {
                place = Some(index);
            }
            keep
        });
        self.0.insert(place.unwrap_or(self.0.len()), Attribute::new(oid, value));
    }
}

/// From when to when something is valid, whole seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// First second in which it is valid.
    pub not_before: SystemTime,
    /// Last second in which it is valid.
    pub not_after: SystemTime,
}

/// What a certificate is for; decides basic constraints, key usage and extended key usage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Usage {
    /// X509-SVID of a party: no CA; digitalSignature, keyEncipherment, keyAgreement; serverAuth and clientAuth.
    Svid,
    /// Certificate of an authority: CA; keyCertSign and cRLSign; no extended key usage.
    Authority,
}

/// Everything that stands in a certificate beside its key, serial number and issuer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CertificateProfile {
    /// The distinguished name.
    pub subject: Subject,
    /// The one URI name.
    pub id: SpiffeId,
    /// DNS names, in order, after the URI.
    pub dns_names: Vec<Arc<str>>,
    /// What the certificate is for.
    pub usage: Usage,
    /// Its time.
    pub validity: Validity,
}

/// What a workload certificate is asked for with.
#[derive(Clone, Debug)]
pub struct WorkloadProfile {
    /// The identity.
    pub id: SpiffeId,
    /// DNS names in order; the first becomes the common name.
    pub dns_names: Vec<Arc<str>>,
    /// Lifetime; the default if nothing or zero.
    pub ttl: Option<Duration>,
    /// DER of the Name to use as subject, where the caller may choose one; an empty Name counts as nothing.
    pub subject: Option<Bytes>,
}

/// What a JWT-SVID is asked for with.
#[derive(Clone, Debug)]
pub struct JwtProfile {
    /// The identity.
    pub id: SpiffeId,
    /// Whom the token is for; never empty.
    pub audience: Vec<String>,
    /// Lifetime; the default if nothing or zero.
    pub ttl: Option<Duration>,
    /// A unique id of the token (base64url of a random UUID), where the entry asks for one.
    pub token_id: Option<String>,
}

/// The claims of a JWT-SVID, before they are encoded.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct JwtClaims {
    /// Audiences; an array even for one.
    pub aud: Vec<String>,
    /// Seconds since 1970 after which the token is refused.
    pub exp: u64,
    /// Seconds since 1970 at which it was signed.
    pub iat: u64,
    /// The configured issuer.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iss: Option<String>,
    /// The token's own id.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub jti: Option<String>,
    /// The SPIFFE ID.
    pub sub: String,
}

/// Why nothing may be signed for a request.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProfileError {
    /// The id is not of the trust domain that is signed for.
    #[error("identity is not a member of trust domain {trust_domain:?}")]
    ForeignTrustDomain {
        /// The trust domain that is signed for.
        trust_domain: String,
    },
    /// The id names a trust domain where a party is needed.
    #[error("identity of an SVID needs a path")]
    NoPath,
    /// The authority has ended, so nothing signed by it could be valid.
    #[error("authority has expired")]
    AuthorityExpired,
    /// The lifetime reaches beyond what a certificate can say.
    #[error("lifetime reaches beyond the year 9999")]
    Lifetime,
    /// The subject is no distinguished name of texts.
    #[error("subject is not a distinguished name")]
    Subject,
    /// A token needs at least one audience, and none may be empty.
    #[error("at least one audience is required, and none may be empty")]
    Audience,
}

/// Last second that a GeneralizedTime of RFC 5280 can name: 9999-12-31T23:59:59Z.
const END_OF_TIME: u64 = 253_402_300_799;

/// Whole seconds since 1970.
pub(crate) fn unix_seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

/// The time this many seconds after 1970.
pub(crate) fn from_unix_seconds(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).unwrap_or(SystemTime::UNIX_EPOCH)
}

/// When something signed at `now` for `ttl` ends, capped by `limit`; whole seconds.
fn end(ttl: Duration, limit: Option<SystemTime>, now: SystemTime) -> Result<u64, ProfileError> {
    let wanted = unix_seconds(now).saturating_add(ttl.as_secs());
    let end = match limit.map(unix_seconds) {
        Some(limit) if limit <= unix_seconds(now) => return Err(ProfileError::AuthorityExpired),
        Some(limit) => wanted.min(limit),
        None => wanted,
    };
    if end > END_OF_TIME { Err(ProfileError::Lifetime) } else { Ok(end) }
}

/// The time of a certificate: [`BACKDATE`] before `now` until `ttl` after it, never beyond `limit`.
///
/// # Errors
/// [`ProfileError::AuthorityExpired`] if `limit` has come, [`ProfileError::Lifetime`] for an end no date can name.
pub fn validity(ttl: Duration, limit: Option<SystemTime>, now: SystemTime) -> Result<Validity, ProfileError> {
    let not_after = from_unix_seconds(end(ttl, limit, now)?);
    let not_before = from_unix_seconds(unix_seconds(now).saturating_sub(BACKDATE.as_secs()));
    Ok(Validity { not_before, not_after })
}

fn or_default(ttl: Option<Duration>, default: Duration) -> Duration {
    ttl.filter(|ttl| !ttl.is_zero()).unwrap_or(default)
}

fn member(id: &SpiffeId, policy: &Policy) -> Result<(), ProfileError> {
    if !id.is_member_of(&policy.trust_domain) {
        return Err(ProfileError::ForeignTrustDomain { trust_domain: policy.trust_domain.as_str().to_owned() });
    }
    if id.path().is_empty() { Err(ProfileError::NoPath) } else { Ok(()) }
}

/// The X509-SVID of a workload; `authority_end` is when the signing authority ends.
///
/// # Errors
/// For a foreign id, an id without path, a subject that cannot be read, or an authority at its end.
pub fn workload(
    request: &WorkloadProfile,
    policy: &Policy,
    authority_end: SystemTime,
    now: SystemTime,
) -> Result<CertificateProfile, ProfileError> {
    member(&request.id, policy)?;
    let mut subject = match &request.subject {
        Some(der) => Subject::parse(der)?.only_requestable(),
        None => Subject::default(),
    };
    if subject.0.is_empty() {
        subject = Subject::svid();
    }
    if let Some(first) = request.dns_names.first() {
        subject.replace_common_name(first);
    }
    let ttl = or_default(request.ttl, policy.default_x509_svid_ttl);
    Ok(CertificateProfile {
        subject,
        id: request.id.clone(),
        dns_names: request.dns_names.clone(),
        usage: Usage::Svid,
        validity: validity(ttl, Some(authority_end), now)?,
    })
}

/// The X509-SVID of an agent.
///
/// # Errors
/// As [`workload`].
pub fn agent(
    id: &SpiffeId,
    policy: &Policy,
    authority_end: SystemTime,
    now: SystemTime,
) -> Result<CertificateProfile, ProfileError> {
    let ttl = policy.agent_ttl.or(Some(policy.default_x509_svid_ttl));
    let request = WorkloadProfile { id: id.clone(), dns_names: Vec::new(), ttl, subject: None };
    workload(&request, policy, authority_end, now)
}

/// The server's own X509-SVID.
///
/// # Errors
/// [`ProfileError::AuthorityExpired`] if the authority is at its end.
pub fn server(policy: &Policy, authority_end: SystemTime, now: SystemTime) -> Result<CertificateProfile, ProfileError> {
    let id = SpiffeId::server_of(&policy.trust_domain);
    workload(&WorkloadProfile { id, dns_names: Vec::new(), ttl: None, subject: None }, policy, authority_end, now)
}

/// The self-signed certificate of an X.509 authority; `serial` is its serial number in decimal, which is also a
/// serialNumber attribute of the subject: two authorities of one configuration must not have one name, since
/// verifiers look issuers up by name.
///
/// # Errors
/// [`ProfileError::Lifetime`].
pub fn authority(policy: &Policy, serial: &str, now: SystemTime) -> Result<CertificateProfile, ProfileError> {
    let configured = &policy.ca_subject;
    let mut subject = Subject::default();
    for country in &configured.country {
        subject = subject.with(COUNTRY, country);
    }
    for organization in &configured.organization {
        subject = subject.with(ORGANIZATION, organization);
    }
    if !configured.common_name.is_empty() {
        subject = subject.with(COMMON_NAME, &configured.common_name);
    }
    if subject.0.is_empty() {
        subject = Subject::default().with(COUNTRY, "US").with(ORGANIZATION, "SPIFFE");
    }
    Ok(CertificateProfile {
        subject: subject.with(SERIAL_NUMBER, serial),
        id: policy.trust_domain.id(),
        dns_names: Vec::new(),
        usage: Usage::Authority,
        validity: validity(policy.ca_ttl, None, now)?,
    })
}

/// The certificate of an authority below ours: our own subject, its organizational unit replaced by the depth.
///
/// `chain_length` counts the certificates of our chain, leaf side first, root included or not as our chain has it.
///
/// # Errors
/// [`ProfileError::AuthorityExpired`] if the authority is at its end.
pub fn downstream(
    issuer: &Subject,
    chain_length: usize,
    ttl: Option<Duration>,
    policy: &Policy,
    authority_end: SystemTime,
    now: SystemTime,
) -> Result<CertificateProfile, ProfileError> {
    let mut subject = issuer.clone();
    subject.replace(ORGANIZATIONAL_UNIT, &format!("DOWNSTREAM-{chain_length}"));
    Ok(CertificateProfile {
        subject,
        id: policy.trust_domain.id(),
        dns_names: Vec::new(),
        usage: Usage::Authority,
        validity: validity(or_default(ttl, policy.ca_ttl), Some(authority_end), now)?,
    })
}

/// The claims of a JWT-SVID; `key_end` is when the signing key ends.
///
/// # Errors
/// For a foreign id, an id without path, no audience, or a key at its end.
pub fn jwt(
    request: &JwtProfile,
    policy: &Policy,
    key_end: SystemTime,
    now: SystemTime,
) -> Result<JwtClaims, ProfileError> {
    member(&request.id, policy)?;
    if request.audience.is_empty() || request.audience.iter().any(String::is_empty) {
        return Err(ProfileError::Audience);
    }
    let ttl = or_default(request.ttl, policy.default_jwt_svid_ttl);
    Ok(JwtClaims {
        aud: request.audience.clone(),
        exp: end(ttl, Some(key_end), now)?,
        iat: unix_seconds(now),
        iss: policy.jwt_issuer.clone(),
        jti: request.token_id.clone(),
        sub: request.id.as_str().to_owned(),
    })
}

#[cfg(test)]
mod tests;
