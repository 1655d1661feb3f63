//! Trust bundles: the keys that speak for a trust domain.
//!
//! SPIFFE_Trust_Domain_and_Bundle, section 4; X509-SVID, section 6; JWT-SVID, section 6.

mod document;
mod jwk;
mod map;
mod pem;
mod supersede;

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::id::{IdError, TrustDomain};
use crate::json::JsonError;
use crate::x509::X509Error;

pub use map::BundleMap;
pub use pem::{certificates_from_pem, certificates_to_pem};
pub use supersede::Supersede;

/// Why bytes are not a bundle; whoever holds an older one keeps it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// Not JSON, or JSON that readers could understand differently.
    #[error("bundle document cannot be read")]
    Json(#[source] JsonError),
    /// JSON, but not an object.
    #[error("bundle document is not a JSON object")]
    NotAnObject,
    /// `keys` is missing or not a list; a document without it is never an empty bundle.
    #[error("bundle document has no list \"keys\"")]
    NoKeys,
    /// An element with a known use is malformed.
    #[error("bundle element {index} is malformed")]
    Element {
        /// Position in `keys`, from 0.
        index: usize,
    },
    /// Two different keys under one `kid`.
    #[error("bundle element {index} repeats the key id of another key")]
    RepeatedKeyId {
        /// Position in `keys`, from 0.
        index: usize,
    },
    /// `spiffe_sequence` is not a whole number of 64 bits.
    #[error("spiffe_sequence is not an unsigned 64-bit integer")]
    Sequence,
    /// `spiffe_refresh_hint` is not a whole number of seconds.
    #[error("spiffe_refresh_hint is not an unsigned number of seconds")]
    RefreshHint,
    /// A bundle map without `trust_domains`.
    #[error("bundle map has no object \"trust_domains\"")]
    NoTrustDomains,
    /// A member of `trust_domains` is not named like a trust domain.
    #[error("bundle map has a name that is not a trust domain")]
    TrustDomainName(#[source] IdError),
    /// Not PEM.
    #[error("PEM cannot be read")]
    Pem(#[source] ::pem::PemError),
    /// PEM without any block.
    #[error("no PEM block found")]
    NoPemBlock,
    /// A PEM block that is not a certificate.
    #[error("PEM block is not a CERTIFICATE")]
    PemKind,
    /// A PEM block whose content is not a certificate.
    #[error("PEM block does not hold a certificate")]
    Certificate(#[source] X509Error),
}

/// Why an element of a bundle document was ignored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum IgnoreReason {
    /// `use` is missing, or none that is known here.
    Use,
    /// `kty` or curve is missing, unknown or too weak.
    KeyType,
    /// `alg` names no algorithm of JWT-SVID that fits the key.
    Algorithm,
    /// `x5c` is missing or empty.
    NoCertificate,
    /// The certificate is not an authority.
    NotAuthority,
}

/// What an operator should know about a document that was read nevertheless.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum BundleWarning {
    /// An element was ignored.
    Ignored {
        /// Position in `keys`, from 0.
        index: usize,
        /// The reason.
        why: IgnoreReason,
    },
    /// `x5c` holds more than one certificate; the first counts.
    SeveralCertificates {
        /// Position in `keys`, from 0.
        index: usize,
    },
    /// An `x509-svid` element has a `kid`.
    KeyIdOnCertificate {
        /// Position in `keys`, from 0.
        index: usize,
    },
    /// A CA certificate does not carry the plain SPIFFE ID of this trust domain.
    ForeignId {
        /// Position in `keys`, from 0.
        index: usize,
    },
    /// The publisher has published a private key. Only its public half was read.
    PrivateKey {
        /// Position in `keys`, from 0.
        index: usize,
    },
}

impl std::fmt::Display for BundleWarning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Ignored { index, why } => {
                let why = match why {
                    IgnoreReason::Use => "its use is missing or unknown",
                    IgnoreReason::KeyType => "its key type is missing, unknown or too weak",
                    IgnoreReason::Algorithm => "its alg is none of JWT-SVID that fits the key",
                    IgnoreReason::NoCertificate => "it has no certificate",
                    IgnoreReason::NotAuthority => "its certificate is not an authority",
                };
                write!(f, "bundle element {index} ignored: {why}")
            }
            Self::SeveralCertificates { index } => {
                write!(f, "bundle element {index} has several certificates, the first counts")
            }
            Self::KeyIdOnCertificate { index } => write!(f, "bundle element {index} has a key id on a certificate"),
            Self::ForeignId { index } => {
                write!(f, "bundle element {index} has a certificate without the SPIFFE ID of its trust domain")
            }
            Self::PrivateKey { index } => write!(f, "bundle element {index} discloses a PRIVATE key"),
        }
    }
}

/// One certificate authority of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X509Authority {
    /// The certificate, DER.
    pub der: Bytes,
    /// Whether operators have distrusted it: still valid, but nothing signed by it should be used on.
    pub tainted: bool,
}

/// One key that signs JWT-SVIDs of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtAuthority {
    /// The `kid` of the tokens it signs.
    pub key_id: Arc<str>,
    /// The public key as SubjectPublicKeyInfo, DER.
    pub public_key: Bytes,
    /// When it stops being valid; unknown for keys that came in a bundle document.
    pub expires_at: Option<SystemTime>,
    /// Whether operators have distrusted it.
    pub tainted: bool,
}

/// All authorities of one trust domain at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// Whose keys these are; an authority is never valid for another domain.
    pub trust_domain: TrustDomain,
    /// Certificate authorities, oldest first.
    pub x509: Vec<X509Authority>,
    /// Token signing keys, oldest first.
    pub jwt: Vec<JwtAuthority>,
    /// How often the publisher wants to be asked for a newer bundle.
    pub refresh_hint: Option<Duration>,
    /// Grows with every change of content; 0 when the publisher gave none.
    pub sequence: u64,
}

impl Bundle {
    /// A bundle without any key: every SVID of the domain is invalid.
    pub fn empty(trust_domain: TrustDomain) -> Self {
        Self { trust_domain, x509: Vec::new(), jwt: Vec::new(), refresh_hint: None, sequence: 0 }
    }

    /// Whether there is no authority at all.
    pub fn is_empty(&self) -> bool {
        self.x509.is_empty() && self.jwt.is_empty()
    }

    /// All CA certificates, DER, one after the other: the form of the Workload API.
    pub fn x509_der_concatenated(&self) -> Bytes {
        match self.x509.as_slice() {
            [one] => one.der.clone(),
            many => many.iter().flat_map(|authority| authority.der.iter().copied()).collect(),
        }
    }
}

/// Where verification finds the bundle of a peer's trust domain.
pub trait Bundles {
    /// The newest bundle of exactly this trust domain, if it is known.
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>>;
}

impl<S: BuildHasher> Bundles for HashMap<TrustDomain, Arc<Bundle>, S> {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.get(trust_domain).cloned()
    }
}

impl Bundles for BTreeMap<TrustDomain, Arc<Bundle>> {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.get(trust_domain).cloned()
    }
}

impl Bundles for Arc<Bundle> {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        (self.trust_domain == *trust_domain).then(|| Arc::clone(self))
    }
}

impl Bundles for Bundle {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        (self.trust_domain == *trust_domain).then(|| Arc::new(self.clone()))
    }
}

#[cfg(test)]
mod tests;
