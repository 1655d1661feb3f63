//! One certificate, read once.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;
use x509_parser::x509::X509Version;

use super::key::{KeyError, PublicKey};
use super::serial::{Serial, SerialError};
use crate::id::{IdError, SpiffeId};

/// Why bytes are not a certificate, or a certificate is not an X509-SVID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum X509Error {
    /// Not a DER certificate.
    #[error("not a DER certificate")]
    Malformed,
    /// Bytes after the certificate.
    #[error("bytes follow the certificate")]
    TrailingData,
    /// Not version 3.
    #[error("certificate is not X.509 version 3")]
    Version,
    /// More extensions than any honest certificate has.
    #[error("certificate has {count} extensions, at most 64 are looked at")]
    TooManyExtensions {
        /// How many there are.
        count: usize,
    },
    /// Two extensions of one kind (RFC 5280, section 4.2).
    #[error("certificate has the same extension twice")]
    DuplicateExtension,
    /// An extension that this crate relies on cannot be read.
    #[error("a certificate extension is malformed")]
    Extension,
    /// The serial number.
    #[error("certificate serial number is not acceptable")]
    Serial(#[source] SerialError),
    /// The public key.
    #[error("certificate public key is not acceptable")]
    Key(#[source] KeyError),
    /// notBefore lies after notAfter.
    #[error("certificate validity ends before it begins")]
    Validity,
    /// A chain without certificates.
    #[error("certificate chain is empty")]
    EmptyChain,
    /// Not exactly one URI among the subject alternative names (X509-SVID, section 2).
    #[error("certificate has {count} URI names instead of one")]
    UriCount {
        /// How many there are.
        count: usize,
    },
    /// The URI is no SPIFFE ID.
    #[error("certificate URI name is not a SPIFFE ID")]
    Id(#[source] IdError),
    /// A leaf whose SPIFFE ID has no path (X509-SVID, section 5.2).
    #[error("SPIFFE ID of a leaf certificate has no path")]
    NoPath,
    /// A leaf with the CA flag or a path length (X509-SVID, section 4.1).
    #[error("leaf certificate is marked as an authority")]
    LeafIsAuthority,
    /// A leaf that may sign certificates or revocation lists (X509-SVID, section 4.3).
    #[error("leaf certificate has key usage keyCertSign or cRLSign")]
    LeafMaySign,
    /// A leaf without the key usage digitalSignature (X509-SVID, section 4.3).
    #[error("leaf certificate lacks key usage digitalSignature")]
    NoDigitalSignature,
    /// A certificate above the leaf that is no authority.
    #[error("a certificate above the leaf is not an authority")]
    NotAuthority,
    /// An authority whose key usage does not allow it to sign certificates.
    #[error("an authority certificate lacks key usage keyCertSign")]
    NoCertSign,
    /// The private key belongs to another certificate.
    #[error("private key does not belong to the certificate")]
    ForeignKey,
}

/// How many extensions are looked at: each is compared with all before it, and strangers choose how many there are.
const MAX_EXTENSIONS: usize = 64;

/// The key usage bits of a certificate (RFC 5280, section 4.2.1.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyUsage(u16);

impl KeyUsage {
    /// Bit 0.
    pub fn digital_signature(self) -> bool {
        self.0 & 1 != 0
    }

    /// Bit 5.
    pub fn key_cert_sign(self) -> bool {
        self.0 & (1 << 5) != 0
    }

    /// Bit 6.
    pub fn crl_sign(self) -> bool {
        self.0 & (1 << 6) != 0
    }
}

/// The extended key usages that SPIFFE speaks of (RFC 5280, section 4.2.1.12).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExtendedKeyUsage {
    /// serverAuth is listed.
    pub server_auth: bool,
    /// clientAuth is listed.
    pub client_auth: bool,
}

/// A certificate and what is asked of it again and again, parsed once.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Certificate {
    /// The whole certificate, DER.
    pub der: Bytes,
    /// The serial number.
    pub serial: Serial,
    /// Subject key identifier, if there is one.
    pub subject_key_id: Option<Bytes>,
    /// Authority key identifier, if there is one.
    pub authority_key_id: Option<Bytes>,
    /// First moment of validity; 1970 if it lies before.
    pub not_before: SystemTime,
    /// Last moment of validity.
    pub not_after: SystemTime,
    /// Issuer name, DER.
    pub issuer: Bytes,
    /// Subject name, DER.
    pub subject: Bytes,
    /// Common names of the subject.
    pub common_names: Vec<String>,
    /// The key, or why it cannot be used here.
    pub public_key: Result<PublicKey, KeyError>,
    /// SubjectPublicKeyInfo, DER.
    pub spki_der: Bytes,
    /// URI names in order; bytes that are not UTF-8 appear replaced, so that none goes uncounted.
    pub uris: Vec<String>,
    /// DNS names in order.
    pub dns_names: Vec<String>,
    /// Basic constraints say that it is an authority.
    pub is_ca: bool,
    /// How many authorities may stand below, if limited.
    pub path_length: Option<u32>,
    /// Key usage, if present.
    pub key_usage: Option<KeyUsage>,
    /// Extended key usage, if present.
    pub extended_key_usage: Option<ExtendedKeyUsage>,
    /// It has a critical extension that neither webpki nor this crate understands.
    pub has_unknown_critical_extension: bool,
}

impl Certificate {
    /// Reads one DER certificate with nothing after it. Of the profile only what no certificate
    /// may break is checked: version 3, few extensions and none twice, a readable serial number.
    pub fn parse(der: impl Into<Bytes>) -> Result<Self, X509Error> {
        Self::parse_version(der.into(), Some(X509Version::V3))
    }

    /// As [`Certificate::parse`], but certificates of version 1 and 2, such as old roots, are read as well.
    pub(crate) fn parse_any_version(der: Bytes) -> Result<Self, X509Error> {
        Self::parse_version(der, None)
    }

    fn parse_version(der: Bytes, version: Option<X509Version>) -> Result<Self, X509Error> {
        let (rest, parsed) = X509Certificate::from_der(&der).map_err(|_| X509Error::Malformed)?;
        if !rest.is_empty() {
            return Err(X509Error::TrailingData);
        }
        if version.is_some_and(|version| parsed.version() != version) {
            return Err(X509Error::Version);
        }
        let mut certificate = Self {
            serial: Serial::from_der_integer(parsed.raw_serial()).map_err(X509Error::Serial)?,
            subject_key_id: None,
            authority_key_id: None,
            // Go writes its zero time, the year 1, where nobody set a date.
            not_before: time_of(parsed.validity().not_before).max(UNIX_EPOCH),
            not_after: time_of(parsed.validity().not_after),
            issuer: der.slice_ref(parsed.issuer().as_raw()),
            subject: der.slice_ref(parsed.subject().as_raw()),
            common_names: parsed
                .subject()
                .iter_common_name()
                .filter_map(|name| name.as_str().ok().map(str::to_owned))
                .collect(),
            public_key: PublicKey::from_parsed(&der, parsed.public_key()),
            spki_der: der.slice_ref(parsed.public_key().raw),
            uris: Vec::new(),
            dns_names: Vec::new(),
            is_ca: false,
            path_length: None,
            key_usage: None,
            extended_key_usage: None,
            has_unknown_critical_extension: false,
            der: der.clone(),
        };
        certificate.read_extensions(&der, &parsed)?;
        Ok(certificate)
    }

    fn read_extensions(&mut self, der: &Bytes, parsed: &X509Certificate<'_>) -> Result<(), X509Error> {
        let extensions = parsed.extensions();
        if extensions.len() > MAX_EXTENSIONS {
            return Err(X509Error::TooManyExtensions { count: extensions.len() });
        }
        for (index, extension) in extensions.iter().enumerate() {
            if extensions.iter().take(index).any(|earlier| earlier.oid == extension.oid) {
                return Err(X509Error::DuplicateExtension);
            }
            match extension.parsed_extension() {
                ParsedExtension::SubjectKeyIdentifier(id) => self.subject_key_id = Some(der.slice_ref(id.0)),
                ParsedExtension::AuthorityKeyIdentifier(id) => {
                    self.authority_key_id = id.key_identifier.as_ref().map(|id| der.slice_ref(id.0));
                }
                ParsedExtension::BasicConstraints(constraints) => {
                    self.is_ca = constraints.ca;
                    self.path_length = constraints.path_len_constraint;
                }
                ParsedExtension::KeyUsage(usage) => self.key_usage = Some(KeyUsage(usage.flags)),
                ParsedExtension::ExtendedKeyUsage(usage) => {
                    self.extended_key_usage =
                        Some(ExtendedKeyUsage { server_auth: usage.server_auth, client_auth: usage.client_auth });
                }
                ParsedExtension::SubjectAlternativeName(names) => self.read_names(&names.general_names),
                ParsedExtension::ParseError { .. } => return Err(X509Error::Extension),
                // webpki looks at these itself.
                ParsedExtension::NameConstraints(_) => {}
                _ => self.has_unknown_critical_extension |= extension.critical,
            }
        }
        Ok(())
    }

    fn read_names(&mut self, names: &[GeneralName<'_>]) {
        for name in names {
            match name {
                GeneralName::URI(uri) => self.uris.push((*uri).to_owned()),
                GeneralName::DNSName(name) => self.dns_names.push((*name).to_owned()),
                GeneralName::Invalid(tag, bytes) if tag.0 == 6 => {
                    self.uris.push(String::from_utf8_lossy(bytes).into_owned());
                }
                _ => {}
            }
        }
    }

    /// Whether issuer and subject are the same name.
    pub fn is_self_issued(&self) -> bool {
        self.issuer == self.subject
    }

    /// Whether `now` lies within the validity, ends included.
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now <= self.not_after
    }

    /// The SPIFFE ID in the only URI name, of a leaf or of an authority.
    pub fn spiffe_id(&self) -> Result<SpiffeId, X509Error> {
        match self.uris.as_slice() {
            [uri] => SpiffeId::parse(uri).map_err(X509Error::Id),
            many => Err(X509Error::UriCount { count: many.len() }),
        }
    }

    /// Checks the profile of a leaf (X509-SVID, sections 2, 4 and 5.2) and returns its SPIFFE ID.
    /// Signature, time and extended key usage are not looked at.
    pub fn leaf_id(&self) -> Result<SpiffeId, X509Error> {
        let id = self.spiffe_id()?;
        if id.path().is_empty() {
            return Err(X509Error::NoPath);
        }
        if self.is_ca || self.path_length.is_some() {
            return Err(X509Error::LeafIsAuthority);
        }
        match self.key_usage {
            Some(usage) if usage.key_cert_sign() || usage.crl_sign() => Err(X509Error::LeafMaySign),
            Some(usage) if usage.digital_signature() => Ok(id),
            _ => Err(X509Error::NoDigitalSignature),
        }
    }

    /// Checks that this certificate may sign others: CA flag, and keyCertSign if its key usage
    /// says anything.
    pub fn check_authority(&self) -> Result<(), X509Error> {
        if !self.is_ca {
            return Err(X509Error::NotAuthority);
        }
        match self.key_usage {
            Some(usage) if !usage.key_cert_sign() => Err(X509Error::NoCertSign),
            _ => Ok(()),
        }
    }

    /// Lower-case hexadecimal of the subject key identifier, which names an authority in SPIRE's
    /// APIs; computed from the key if the certificate carries none.
    pub fn authority_id(&self) -> String {
        match &self.subject_key_id {
            Some(id) => crate::hex(id),
            None => crate::hex(&super::key::key_id_of(&self.spki_der)),
        }
    }
}

fn time_of(time: ASN1Time) -> SystemTime {
    let seconds = time.timestamp();
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds >= 0 { UNIX_EPOCH + distance } else { UNIX_EPOCH - distance }
}

#[cfg(test)]
#[path = "certificate_tests.rs"]
mod tests;
