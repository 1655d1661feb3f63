//! Bundles as JWK sets: SPIFFE's own document and the one of the Workload API.
//!
//! SPIFFE_Trust_Domain_and_Bundle, section 4; X509-SVID, section 6; JWT-SVID, section 6.
//! A malformed element of a *known* use makes the whole document malformed, so that the last good
//! bundle stays; what the standard tells readers to ignore is left out one element at a time.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use serde::Serialize as _;
use serde_json::{Map, Value};

use super::jwk::{self, JwkKey};
use super::{Bundle, BundleError, BundleWarning, IgnoreReason, JwtAuthority, X509Authority};
use crate::id::TrustDomain;
use crate::json;
use crate::x509::{Certificate, KeyKind, PublicKey, X509Error};

const X509_USE: &str = "x509-svid";
const JWT_USE: &str = "jwt-svid";

impl Bundle {
    /// The SPIFFE bundle document: `use`, `kid`, `x5c`, `spiffe_sequence`, `spiffe_refresh_hint`,
    /// indented by four spaces as SPIRE writes it. Sequence and hint are left out when 0 or unset.
    /// A stored authority that cannot be read is left out: it could not validate anything.
    pub fn to_spiffe_json(&self) -> String {
        indented(&Value::Object(self.to_document()))
    }

    pub(super) fn to_document(&self) -> Map<String, Value> {
        let mut keys = Vec::with_capacity(self.x509.len() + self.jwt.len());
        for authority in &self.x509 {
            let Ok(Certificate { public_key: Ok(key), .. }) = Certificate::parse(authority.der.clone()) else {
                continue;
            };
            let mut members = Map::new();
            members.insert("use".to_owned(), X509_USE.into());
            jwk::write_key(&mut members, &key, None);
            members.insert("x5c".to_owned(), Value::Array(vec![BASE64.encode(&authority.der).into()]));
            keys.push(Value::Object(members));
        }
        keys.extend(self.jwt.iter().filter_map(|authority| jwt_element(authority, Some(JWT_USE))));
        let mut document = Map::new();
        document.insert("keys".to_owned(), Value::Array(keys));
        if self.sequence != 0 {
            document.insert("spiffe_sequence".to_owned(), self.sequence.into());
        }
        if let Some(seconds) = self.refresh_hint.map(|hint| hint.as_secs()).filter(|seconds| *seconds != 0) {
            document.insert("spiffe_refresh_hint".to_owned(), seconds.into());
        }
        document
    }

    /// The JWK set that the Workload API serves: JWT keys only, without `use`, each with `kid`,
    /// and only EC and RSA, since some clients refuse a whole set for one key of another kind.
    pub fn to_workload_jwks(&self) -> String {
        let keys = self.jwt.iter().filter_map(|authority| jwt_element(authority, None)).collect();
        let mut document = Map::new();
        document.insert("keys".to_owned(), Value::Array(keys));
        indented(&Value::Object(document))
    }

    /// Reads a SPIFFE bundle document of `trust_domain`, whose name is not part of the document.
    ///
    /// Elements that the standard says to ignore are reported as warnings, as is what is odd but
    /// harmless. An empty result is valid and means that nothing of that domain is to be believed.
    pub fn from_spiffe_json(
        trust_domain: TrustDomain,
        bytes: &[u8],
    ) -> Result<(Self, Vec<BundleWarning>), BundleError> {
        let Value::Object(document) = json::parse(bytes).map_err(BundleError::Json)? else {
            return Err(BundleError::NotAnObject);
        };
        read_document(trust_domain, &document)
    }
}

/// Reads a parsed document.
pub(super) fn read_document(
    trust_domain: TrustDomain,
    document: &Map<String, Value>,
) -> Result<(Bundle, Vec<BundleWarning>), BundleError> {
    let elements = document.get("keys").and_then(Value::as_array).ok_or(BundleError::NoKeys)?;
    let mut reader = Reader {
        bundle: Bundle::empty(trust_domain),
        certificates: HashSet::new(),
        key_ids: HashMap::new(),
        warnings: Vec::new(),
    };
    for (index, element) in elements.iter().enumerate() {
        reader.element(index, element)?;
    }
    reader.bundle.sequence = match document.get("spiffe_sequence") {
        None | Some(Value::Null) => 0,
        Some(value) => json::as_unsigned(value).ok_or(BundleError::Sequence)?,
    };
    reader.bundle.refresh_hint = match document.get("spiffe_refresh_hint") {
        None | Some(Value::Null) => None,
        Some(value) => match json::as_unsigned(value).ok_or(BundleError::RefreshHint)? {
            0 => None,
            seconds => Some(Duration::from_secs(seconds)),
        },
    };
    Ok((reader.bundle, reader.warnings))
}

fn jwt_element(authority: &JwtAuthority, key_use: Option<&str>) -> Option<Value> {
    let key = PublicKey::from_spki(&authority.public_key).ok()?;
    if !matches!(key.kind(), KeyKind::Ec(_) | KeyKind::Rsa { .. }) {
        return None;
    }
    let mut members = Map::new();
    if let Some(key_use) = key_use {
        members.insert("use".to_owned(), key_use.into());
    }
    jwk::write_key(&mut members, &key, Some(&authority.key_id));
    Some(Value::Object(members))
}

pub(super) fn indented(document: &Value) -> String {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
    // Writing a `Value` of text keys into memory has no way to fail.
    let _ = document.serialize(&mut serde_json::Serializer::with_formatter(&mut out, formatter));
    String::from_utf8(out).unwrap_or_default()
}

struct Reader {
    bundle: Bundle,
    // What the bundle has so far, by what makes an element a repetition.
    certificates: HashSet<Bytes>,
    key_ids: HashMap<Arc<str>, Bytes>,
    warnings: Vec<BundleWarning>,
}

impl Reader {
    fn element(&mut self, index: usize, element: &Value) -> Result<(), BundleError> {
        let malformed = BundleError::Element { index };
        let Value::Object(members) = element else { return Err(malformed) };
        let text = |name: &str| match members.get(name) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.as_str())),
            Some(_) => Err(BundleError::Element { index }),
        };
        let (key_use, kind) = (text("use")?, text("kty")?);
        match (key_use, kind) {
            (Some(X509_USE), Some(kind @ ("EC" | "RSA"))) => self.x509(index, kind, members),
            (Some(JWT_USE), Some(kind @ ("EC" | "RSA"))) => self.jwt(index, kind, members),
            (Some(X509_USE | JWT_USE), _) => {
                self.leave(index, IgnoreReason::KeyType);
                Ok(())
            }
            _ => {
                self.leave(index, IgnoreReason::Use);
                Ok(())
            }
        }
    }

    fn leave(&mut self, index: usize, why: IgnoreReason) {
        self.warnings.push(BundleWarning::Ignored { index, why });
    }

    fn x509(&mut self, index: usize, kind: &str, members: &Map<String, Value>) -> Result<(), BundleError> {
        let malformed = || BundleError::Element { index };
        let certificates = match members.get("x5c") {
            None => &[][..],
            Some(Value::Array(certificates)) => certificates,
            Some(_) => return Err(malformed()),
        };
        let Some(first) = certificates.first() else {
            self.leave(index, IgnoreReason::NoCertificate);
            return Ok(());
        };
        let der = first.as_str().and_then(|text| BASE64.decode(text).ok()).map(Bytes::from).ok_or_else(malformed)?;
        let certificate = Certificate::parse(der.clone()).map_err(|_| malformed())?;
        match jwk::read_key(kind, members) {
            JwkKey::Key(key) if *key.raw() == certificate.public_key.as_ref().map_or(&Bytes::new(), PublicKey::raw) => {
            }
            JwkKey::Key(_) | JwkKey::Malformed => return Err(malformed()),
            JwkKey::Unserved => {
                self.leave(index, IgnoreReason::KeyType);
                return Ok(());
            }
        }
        if certificate.check_authority().is_err() {
            // A leaf in the place of a root would make its holder an authority.
            self.leave(index, IgnoreReason::NotAuthority);
            return Ok(());
        }
        if certificates.len() > 1 {
            self.warnings.push(BundleWarning::SeveralCertificates { index });
        }
        if members.contains_key("kid") {
            self.warnings.push(BundleWarning::KeyIdOnCertificate { index });
        }
        match certificate.spiffe_id() {
            Ok(id) if id == self.bundle.trust_domain.id() => {}
            // Roots of an outer PKI often have no URI at all.
            Err(X509Error::UriCount { count: 0 }) => {}
            _ => self.warnings.push(BundleWarning::ForeignId { index }),
        }
        if self.certificates.insert(der.clone()) {
            self.bundle.x509.push(X509Authority { der, tainted: false });
        }
        Ok(())
    }

    fn jwt(&mut self, index: usize, kind: &str, members: &Map<String, Value>) -> Result<(), BundleError> {
        let malformed = BundleError::Element { index };
        let key_id = match members.get("kid") {
            Some(Value::String(id)) if !id.is_empty() => id.as_str(),
            _ => return Err(malformed),
        };
        let key = match jwk::read_key(kind, members) {
            JwkKey::Key(key) => key,
            JwkKey::Malformed => return Err(malformed),
            JwkKey::Unserved => {
                self.leave(index, IgnoreReason::KeyType);
                return Ok(());
            }
        };
        let fits = match members.get("alg") {
            None => true,
            Some(Value::String(name)) => {
                crate::jwt::Algorithm::parse(name).is_some_and(|algorithm| algorithm.fits(key.kind()))
            }
            Some(_) => return Err(malformed),
        };
        if !fits {
            self.leave(index, IgnoreReason::Algorithm);
            return Ok(());
        }
        if ["d", "p", "q", "dp", "dq", "qi", "oth"].iter().any(|member| members.contains_key(*member)) {
            self.warnings.push(BundleWarning::PrivateKey { index });
        }
        if let Some(known) = self.key_ids.get(key_id) {
            // Two keys of one name: a token could be checked with either, so neither is taken.
            return if known == key.spki_der() { Ok(()) } else { Err(BundleError::RepeatedKeyId { index }) };
        }
        let (key_id, public_key) = (Arc::<str>::from(key_id), key.spki_der().clone());
        self.key_ids.insert(Arc::clone(&key_id), public_key.clone());
        self.bundle.jwt.push(JwtAuthority { key_id, public_key, expires_at: None, tainted: false });
        Ok(())
    }
}

#[cfg(test)]
#[path = "document_tests.rs"]
mod tests;
