//! The one place that signs.
//!
//! What is signed comes out [`Unreleased`]: only proof that it was recorded opens it. So nothing leaves the server
//! that its history or its audit does not know.

mod unreleased;

use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use rcgen::string::{Ia5String, PrintableString};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, DnValue, ExtendedKeyUsagePurpose, IsCa,
    KeyIdMethod, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm, SigningKey,
};
use runtime::entropy::Entropy;
use spiffe::id::SpiffeId;
use spiffe::x509::{Certificate, Curve, KeyKind, PublicKey, Serial, X509Error, key_id_of};

use super::keys::{KeyError, KeyType, Signer, jws_algorithm};
use super::profile::{
    self, CertificateProfile, Encoding, JwtProfile, Policy, ProfileError, Subject, Usage, WorkloadProfile,
    from_unix_seconds,
};
use super::schedule::begins_at;
use crate::state::model::AuthoritySlot;

pub use self::unreleased::{IssuedJwt, IssuedX509, Recorded, Unreleased};

/// Why nothing was signed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// There is no active authority of the kind that is needed.
    #[error("no authority is ready to sign")]
    NotReady,
    /// The request may not be signed.
    #[error("request does not fit the profile")]
    Profile(#[source] ProfileError),
    /// The public key is of no kind that certificates are issued for.
    #[error("public key is not supported")]
    PublicKey,
    /// A name cannot be written into a certificate.
    #[error("name cannot be written into a certificate")]
    Name(#[source] rcgen::Error),
    /// An attribute stands in the subject more often than can be written.
    #[error("subject repeats an attribute too often")]
    RepeatedAttribute,
    /// Encoding or signing the certificate failed.
    #[error("signing the certificate failed")]
    Certificate(#[source] rcgen::Error),
    /// Signing the token failed.
    #[error("signing the token failed")]
    Token(#[source] KeyError),
    /// The token could not be encoded.
    #[error("encoding the token failed")]
    Encode(#[source] serde_json::Error),
    /// The authority's own certificate cannot be read.
    #[error("certificate of the authority cannot be read")]
    Authority(#[source] X509Error),
    /// The authority has no certificate.
    #[error("authority has no certificate")]
    NoCertificate,
}

/// An authority's key as rcgen wants it.
struct AuthorityKey(Arc<dyn Signer>);

impl PublicKeyData for AuthorityKey {
    fn der_bytes(&self) -> &[u8] {
        &self.0.public_key().bits
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        match self.0.public_key().kind {
            KeyType::EcP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyType::EcP384 => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyType::Rsa2048 | KeyType::Rsa4096 => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

impl SigningKey for AuthorityKey {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        self.0.sign_x509(message).map_err(|_| rcgen::Error::RemoteKeyError)
    }
}

/// The key of a certificate's subject as rcgen wants it; read once, by whoever checked it.
struct SubjectKey<'a> {
    bits: &'a [u8],
    algorithm: &'static SignatureAlgorithm,
}

impl<'a> SubjectKey<'a> {
    fn new(key: &'a PublicKey) -> Result<Self, IssueError> {
        // Of these, rcgen writes the kind of key only.
        let algorithm = match key.kind() {
            KeyKind::Ec(Curve::P256) => &rcgen::PKCS_ECDSA_P256_SHA256,
            KeyKind::Ec(Curve::P384) => &rcgen::PKCS_ECDSA_P384_SHA384,
            KeyKind::Ec(Curve::P521) => &rcgen::PKCS_ECDSA_P521_SHA512,
            KeyKind::Ed25519 => &rcgen::PKCS_ED25519,
            KeyKind::Rsa { .. } => &rcgen::PKCS_RSA_SHA256,
            _ => return Err(IssueError::PublicKey),
        };
        Ok(Self { bits: key.raw(), algorithm })
    }
}

impl PublicKeyData for SubjectKey<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.bits
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        self.algorithm
    }
}

/// The active X.509 authority, read and prepared once.
struct X509Issuer {
    authority_id: Arc<str>,
    issuer: rcgen::Issuer<'static, AuthorityKey>,
    subject: Subject,
    certificate: Bytes,
    upstream_chain: Vec<Bytes>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// The active JWT authority, with its header encoded once.
struct JwtIssuer {
    key_id: Arc<str>,
    header: String,
    key: Arc<dyn Signer>,
    not_before: SystemTime,
    not_after: SystemTime,
}

/// The authorities that sign now: one snapshot, replaced as a whole at each activation.
pub struct Issuer {
    policy: Arc<Policy>,
    entropy: Entropy,
    x509: Option<X509Issuer>,
    jwt: Option<JwtIssuer>,
    /// Made once: looking a meter up costs as much as a part of the signature.
    signed: Signed,
}

/// How many of each kind were signed.
struct Signed {
    x509_svids: metrics::Counter,
    x509_authorities: metrics::Counter,
    jwt_svids: metrics::Counter,
}

impl Signed {
    fn new() -> Self {
        Self {
            x509_svids: metrics::counter!("server_ca.sign.x509_svid"),
            x509_authorities: metrics::counter!("server_ca.sign.x509_ca_svid"),
            jwt_svids: metrics::counter!("server_ca.sign.jwt_svid"),
        }
    }
}

/// rcgen keeps one value per attribute type. A second one finds room under the same type spelled as a bare object
/// identifier; a third has none.
fn attribute_types(oid: &[u64]) -> (DnType, DnType) {
    (DnType::from_oid(oid), DnType::CustomDnType(oid.to_vec()))
}

fn distinguished_name(subject: &Subject) -> Result<DistinguishedName, IssueError> {
    let mut name = DistinguishedName::new();
    for attribute in subject.attributes() {
        let (first, second) = attribute_types(&attribute.oid);
        let kind = [first, second].into_iter().find(|kind| name.get(kind).is_none());
        let value = match attribute.encoding {
            Encoding::Printable => {
                DnValue::PrintableString(PrintableString::try_from(attribute.value.as_str()).map_err(IssueError::Name)?)
            }
            Encoding::Ia5 => {
                DnValue::Ia5String(Ia5String::try_from(attribute.value.as_str()).map_err(IssueError::Name)?)
            }
            Encoding::Utf8 => DnValue::Utf8String(attribute.value.clone()),
        };
        name.push(kind.ok_or(IssueError::RepeatedAttribute)?, value);
    }
    Ok(name)
}

/// 128 random bits, never zero (RFC 5280, section 4.1.2.2).
fn fresh_serial(entropy: &Entropy) -> Serial {
    loop {
        let number = u128::from_be_bytes(entropy.bytes());
        if number != 0 {
            return Serial::from(number);
        }
    }
}

/// What rcgen needs to write a certificate of this profile.
fn parameters(profile: &CertificateProfile, serial: Serial, key_id: [u8; 20]) -> Result<CertificateParams, IssueError> {
    let mut names = Vec::with_capacity(1 + profile.dns_names.len());
    names.push(SanType::URI(Ia5String::try_from(profile.id.as_str()).map_err(IssueError::Name)?));
    for name in &profile.dns_names {
        names.push(SanType::DnsName(Ia5String::try_from(&**name).map_err(IssueError::Name)?));
    }
    let mut parameters = CertificateParams::default();
    parameters.not_before = profile.validity.not_before.into();
    parameters.not_after = profile.validity.not_after.into();
    parameters.serial_number = Some(SerialNumber::from_slice(serial.as_be_bytes()));
    parameters.subject_alt_names = names;
    parameters.distinguished_name = distinguished_name(&profile.subject)?;
    parameters.key_identifier_method = KeyIdMethod::PreSpecified(key_id.to_vec());
    parameters.use_authority_key_identifier_extension = true;
    match profile.usage {
        Usage::Svid => {
            parameters.is_ca = IsCa::ExplicitNoCa;
            parameters.key_usages = vec![
                KeyUsagePurpose::DigitalSignature,
                KeyUsagePurpose::KeyEncipherment,
                KeyUsagePurpose::KeyAgreement,
            ];
            parameters.extended_key_usages =
                vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        }
        Usage::Authority => {
            parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        }
    }
    Ok(parameters)
}

/// A self-signed authority certificate, before it is published.
pub(super) struct SelfSigned {
    /// DER.
    pub(super) certificate: Bytes,
    /// Lower-case hex of the subject key id.
    pub(super) authority_id: String,
    /// When it ends.
    pub(super) not_after: SystemTime,
}

/// Signs the certificate of a new X.509 authority with its own key.
pub(super) fn self_signed(
    key: Arc<dyn Signer>,
    policy: &Policy,
    entropy: &Entropy,
    now: SystemTime,
) -> Result<SelfSigned, IssueError> {
    let serial = fresh_serial(entropy);
    let profile = profile::authority(policy, &serial.to_string(), now).map_err(IssueError::Profile)?;
    let key_id = key_id_of(&key.public_key().spki);
    let mut parameters = parameters(&profile, serial, key_id)?;
    parameters.use_authority_key_identifier_extension = false;
    let certificate = parameters.self_signed(&AuthorityKey(key)).map_err(IssueError::Certificate)?;
    Ok(SelfSigned {
        certificate: Bytes::copy_from_slice(certificate.der()),
        authority_id: hex(&key_id),
        not_after: profile.validity.not_after,
    })
}

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

impl X509Issuer {
    fn new(slot: &AuthoritySlot, key: Arc<dyn Signer>) -> Result<Self, IssueError> {
        let der = slot.certificate.clone().ok_or(IssueError::NoCertificate)?;
        let certificate = Certificate::parse(der).map_err(IssueError::Authority)?;
        let subject = Subject::parse(&certificate.subject).map_err(IssueError::Profile)?;
        let key_id = match &certificate.subject_key_id {
            Some(id) => id.to_vec(),
            None => key_id_of(&certificate.spki_der).to_vec(),
        };
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name = distinguished_name(&subject)?;
        parameters.key_identifier_method = KeyIdMethod::PreSpecified(key_id);
        Ok(Self {
            authority_id: Arc::clone(&slot.authority_id),
            issuer: rcgen::Issuer::new(parameters, AuthorityKey(key)),
            subject,
            certificate: certificate.der,
            upstream_chain: slot.upstream_chain.clone(),
            not_before: certificate.not_before,
            not_after: certificate.not_after,
        })
    }

    fn sign(
        &self,
        profile: CertificateProfile,
        key: &PublicKey,
        entropy: &Entropy,
    ) -> Result<Unreleased<IssuedX509>, IssueError> {
        let serial = fresh_serial(entropy);
        let parameters = parameters(&profile, serial, key.key_id())?;
        let leaf = parameters.signed_by(&SubjectKey::new(key)?, &self.issuer).map_err(IssueError::Certificate)?;
        let mut chain = Vec::with_capacity(1 + self.upstream_chain.len());
        chain.push(Bytes::copy_from_slice(leaf.der()));
        chain.extend(self.upstream_chain.iter().cloned());
        Ok(Unreleased::new(IssuedX509 {
            chain,
            id: profile.id,
            serial,
            not_before: profile.validity.not_before,
            not_after: profile.validity.not_after,
        }))
    }
}

impl JwtIssuer {
    fn new(slot: &AuthoritySlot, key: Arc<dyn Signer>) -> Self {
        let algorithm = jws_algorithm(key.public_key().kind);
        // Neither the algorithm nor a key id of ours has a character that JSON escapes.
        let header = format!(r#"{{"alg":"{algorithm}","kid":"{}","typ":"JWT"}}"#, slot.authority_id);
        Self {
            key_id: Arc::clone(&slot.authority_id),
            header: URL_SAFE_NO_PAD.encode(header),
            key,
            not_before: begins_at(slot),
            not_after: slot.not_after,
        }
    }
}

impl Issuer {
    /// Prepares to sign with the active authorities and their keys.
    pub(super) fn new(
        policy: Arc<Policy>,
        entropy: Entropy,
        x509: Option<(&AuthoritySlot, Arc<dyn Signer>)>,
        jwt: Option<(&AuthoritySlot, Arc<dyn Signer>)>,
    ) -> Result<Self, IssueError> {
        Ok(Self {
            policy,
            entropy,
            x509: x509.map(|(slot, key)| X509Issuer::new(slot, key)).transpose()?,
            jwt: jwt.map(|(slot, key)| JwtIssuer::new(slot, key)),
            signed: Signed::new(),
        })
    }

    /// The active X.509 authority, if it is valid at `now`: after a step of the clock it may not be, until the next one
    /// is active.
    fn x509(&self, now: SystemTime) -> Result<&X509Issuer, IssueError> {
        self.x509.as_ref().filter(|x509| x509.not_before <= now && now < x509.not_after).ok_or(IssueError::NotReady)
    }

    /// Signs a certificate of this profile and counts it.
    fn certify(
        &self,
        x509: &X509Issuer,
        profile: CertificateProfile,
        key: &PublicKey,
    ) -> Result<Unreleased<IssuedX509>, IssueError> {
        let counter = match profile.usage {
            Usage::Svid => &self.signed.x509_svids,
            Usage::Authority => &self.signed.x509_authorities,
        };
        let issued = x509.sign(profile, key, &self.entropy)?;
        counter.increment(1);
        Ok(issued)
    }

    /// Id of the active X.509 authority: its subject key id in lower-case hex.
    pub fn x509_authority_id(&self) -> Option<&Arc<str>> {
        self.x509.as_ref().map(|x509| &x509.authority_id)
    }

    /// The `kid` of the active JWT authority.
    pub fn jwt_authority_id(&self) -> Option<&Arc<str>> {
        self.jwt.as_ref().map(|jwt| &jwt.key_id)
    }

    /// DER of the active X.509 authority's own certificate.
    pub fn x509_certificate(&self) -> Option<&Bytes> {
        self.x509.as_ref().map(|x509| &x509.certificate)
    }

    /// Signs the X509-SVID of a workload for the public key `key`.
    ///
    /// # Errors
    /// If no authority is ready, the request does not fit the profile, or the key is not supported.
    pub fn workload_x509(
        &self,
        request: &WorkloadProfile,
        key: &PublicKey,
        now: SystemTime,
    ) -> Result<Unreleased<IssuedX509>, IssueError> {
        let x509 = self.x509(now)?;
        let profile = profile::workload(request, &self.policy, x509.not_after, now).map_err(IssueError::Profile)?;
        self.certify(x509, profile, key)
    }

    /// Signs the X509-SVID of an agent for the public key `key`.
    ///
    /// # Errors
    /// As [`Issuer::workload_x509`].
    pub fn agent_x509(
        &self,
        id: &SpiffeId,
        key: &PublicKey,
        now: SystemTime,
    ) -> Result<Unreleased<IssuedX509>, IssueError> {
        let x509 = self.x509(now)?;
        let profile = profile::agent(id, &self.policy, x509.not_after, now).map_err(IssueError::Profile)?;
        self.certify(x509, profile, key)
    }

    /// Signs the server's own X509-SVID for the public key `key`.
    ///
    /// # Errors
    /// As [`Issuer::workload_x509`].
    pub fn server_x509(&self, key: &PublicKey, now: SystemTime) -> Result<Unreleased<IssuedX509>, IssueError> {
        let x509 = self.x509(now)?;
        let profile = profile::server(&self.policy, x509.not_after, now).map_err(IssueError::Profile)?;
        self.certify(x509, profile, key)
    }

    /// Signs the certificate of an authority below ours for the public key `key`; the chain ends below the root.
    ///
    /// # Errors
    /// As [`Issuer::workload_x509`].
    pub fn downstream_x509(
        &self,
        ttl: Option<std::time::Duration>,
        key: &PublicKey,
        now: SystemTime,
    ) -> Result<Unreleased<IssuedX509>, IssueError> {
        let x509 = self.x509(now)?;
        let depth = x509.upstream_chain.len() + 1;
        let profile = profile::downstream(&x509.subject, depth, ttl, &self.policy, x509.not_after, now)
            .map_err(IssueError::Profile)?;
        self.certify(x509, profile, key)
    }

    /// Signs a JWT-SVID.
    ///
    /// # Errors
    /// If no JWT authority is ready, or the request does not fit the profile.
    pub fn jwt(&self, request: &JwtProfile, now: SystemTime) -> Result<Unreleased<IssuedJwt>, IssueError> {
        let jwt = self.jwt.as_ref().filter(|jwt| jwt.not_before <= now && now < jwt.not_after);
        let jwt = jwt.ok_or(IssueError::NotReady)?;
        let claims = profile::jwt(request, &self.policy, jwt.not_after, now).map_err(IssueError::Profile)?;
        let body = serde_json::to_vec(&claims).map_err(IssueError::Encode)?;
        let mut token = String::with_capacity(jwt.header.len() + body.len() * 4 / 3 + 96);
        token.push_str(&jwt.header);
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(&body, &mut token);
        let signature = jwt.key.sign_jws(token.as_bytes()).map_err(IssueError::Token)?;
        token.push('.');
        URL_SAFE_NO_PAD.encode_string(&signature, &mut token);
        self.signed.jwt_svids.increment(1);
        Ok(Unreleased::new(IssuedJwt {
            token,
            id: request.id.clone(),
            issued_at: from_unix_seconds(claims.iat),
            expires_at: from_unix_seconds(claims.exp),
            key_id: Arc::clone(&jwt.key_id),
        }))
    }
}

#[cfg(test)]
mod tests;
