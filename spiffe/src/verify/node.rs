//! The path of a certificate that is no SVID: one that a node attests with.
//!
//! SPIRE judges such certificates by Go's `crypto/x509` for any usage, and people have made their node certificates to
//! pass there. So the rules here are Go's: a trusted certificate is its own path, authority or not; every path counts,
//! whatever key ids say; dates before 1970 and the serial number 0 are no faults. webpki, which judges SVIDs, refuses
//! these. Name constraints are left to webpki all the same.

use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use x509_parser::certificate::X509Certificate;
use x509_parser::der_parser::asn1_rs::Any;
use x509_parser::oid_registry::{self as oid, Oid};
use x509_parser::prelude::FromDer;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::{VerifiedPath, VerifyError, x509_path};
use crate::bundle::X509Authority;
use crate::x509::{Certificate, X509Error, split_certificates};

/// How many signatures are checked at most, as in Go.
const MAX_SIGNATURES: usize = 100;

/// Why the certificate of a node is not to be believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum NodePathError {
    /// A chain without certificates.
    #[error("there is no certificate")]
    NoCertificate,
    /// A certificate that cannot be read.
    #[error("a certificate cannot be read")]
    Unreadable(#[source] X509Error),
    /// The node's own certificate is at fault.
    #[error("certificate of the node: {0}")]
    Leaf(Fault),
    /// A certificate has the name of the issuer, but may not be it; of several the first that was tried.
    #[error("authority that the certificate names as its issuer: {0}")]
    Authority(Fault),
    /// Nobody has the name of the issuer.
    #[error("no trusted authority has signed the certificate, directly or through the intermediates that came with it")]
    UnknownAuthority,
    /// The names in the chain allow more paths than are searched.
    #[error("certificates can be put together in too many ways")]
    TooManyWays,
    /// A path with name constraints, which do not hold.
    #[error("path with name constraints is not valid")]
    Constrained(#[source] VerifyError),
}

/// What is wrong with one certificate of a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Fault {
    /// Its time has not come.
    #[error("it is not valid yet")]
    NotYetValid,
    /// Its time is over.
    #[error("it has expired")]
    Expired,
    /// It says something that must be understood, and is not.
    #[error("it has a critical extension that is not understood")]
    CriticalExtension,
    /// Basic constraints do not say that it is an authority.
    #[error("it is not marked as an authority")]
    NotAuthority,
    /// Its key usage lacks keyCertSign.
    #[error("its key usage does not allow it to sign certificates")]
    NoCertSign,
    /// More certificates below it than it allows.
    #[error("its path length is exceeded")]
    PathLength,
    /// It did not make the signature, or by an algorithm that is not accepted.
    #[error("it has not made the signature")]
    Signature,
}

/// A certificate with what building a path asks of it.
struct Step {
    certificate: Certificate,
    /// Basic constraints are there; a certificate of version 1 cannot have them.
    is_first_version: bool,
    /// The signed part, the content of the signature's AlgorithmIdentifier, and the signature.
    signed: Bytes,
    algorithm: Bytes,
    signature: Bytes,
    /// The content of the key's AlgorithmIdentifier, and the key.
    key_algorithm: Bytes,
    key: Bytes,
    alternative_names: Option<Bytes>,
    has_name_constraints: bool,
    is_misunderstood: bool,
}

impl Step {
    fn parse(der: &Bytes) -> Result<Self, X509Error> {
        let certificate = Certificate::parse_any_version(der.clone())?;
        let (_, parsed) = X509Certificate::from_der(der).map_err(|_| X509Error::Malformed)?;
        let body: &[u8] = parsed.tbs_certificate.as_ref();
        let content = |bytes: &[u8]| -> Result<Bytes, X509Error> {
            let (_, any) = Any::from_der(bytes).map_err(|_| X509Error::Malformed)?;
            Ok(der.slice_ref(any.data))
        };
        let (_, whole) = Any::from_der(der).map_err(|_| X509Error::Malformed)?;
        let algorithm = content(whole.data.get(body.len()..).unwrap_or_default())?;
        if parsed.tbs_certificate.signature != parsed.signature_algorithm {
            return Err(X509Error::Malformed);
        }
        let (_, spki) = SubjectPublicKeyInfo::from_der(&certificate.spki_der).map_err(|_| X509Error::Malformed)?;
        let (_, spki_whole) = Any::from_der(&certificate.spki_der).map_err(|_| X509Error::Malformed)?;
        let spki_content = der.slice_ref(spki_whole.data);
        let key_algorithm = content(&spki_content)?;
        let bits = |bits: &[u8]| Bytes::copy_from_slice(bits);
        let extension = |oid: &Oid<'_>| parsed.extensions().iter().find(|extension| extension.oid == *oid);
        Ok(Self {
            is_first_version: parsed.version().0 == 0,
            signed: der.slice_ref(body),
            algorithm,
            signature: bits(parsed.signature_value.data.as_ref()),
            key_algorithm,
            key: bits(spki.subject_public_key.data.as_ref()),
            alternative_names: extension(&oid::OID_X509_EXT_SUBJECT_ALT_NAME).map(|found| bits(found.value)),
            has_name_constraints: extension(&oid::OID_X509_EXT_NAME_CONSTRAINTS).is_some(),
            // Policies say nothing to us, so that a demand for one of them cannot be met.
            is_misunderstood: extension(&oid::OID_X509_EXT_POLICY_CONSTRAINTS).is_some()
                || parsed.extensions().iter().any(|extension| extension.critical && !is_understood(&extension.oid)),
            certificate,
        })
    }

    /// What is wrong with it wherever it stands.
    fn check(&self, now: SystemTime) -> Result<(), Fault> {
        if self.is_misunderstood {
            Err(Fault::CriticalExtension)
        } else if now < self.certificate.not_before {
            Err(Fault::NotYetValid)
        } else if now > self.certificate.not_after || self.certificate.not_after < UNIX_EPOCH {
            Err(Fault::Expired)
        } else {
            Ok(())
        }
    }

    /// Whether it signed `child` and may have.
    fn check_signed(&self, child: &Self) -> Result<(), Fault> {
        if !self.certificate.is_ca && !self.is_first_version {
            return Err(Fault::NotAuthority);
        }
        if self.certificate.key_usage.is_some_and(|usage| !usage.key_cert_sign()) {
            return Err(Fault::NoCertSign);
        }
        let fits = webpki::ALL_VERIFICATION_ALGS.iter().any(|algorithm| {
            algorithm.signature_alg_id().as_ref() == child.algorithm
                && algorithm.public_key_alg_id().as_ref() == self.key_algorithm
                && algorithm.verify_signature(&self.key, &child.signed, &child.signature).is_ok()
        });
        if fits { Ok(()) } else { Err(Fault::Signature) }
    }

    /// Whether it is the same authority as `other`, perhaps by another certificate.
    fn is_same(&self, other: &Self) -> bool {
        self.certificate.subject == other.certificate.subject
            && self.certificate.spki_der == other.certificate.spki_der
            && self.alternative_names == other.alternative_names
    }

    /// The lower, the likelier it is that `child` was signed by this one.
    fn distance(&self, child: &Self) -> u8 {
        match (&self.certificate.subject_key_id, &child.certificate.authority_key_id) {
            (own, named) if own == named => 0,
            (None, _) | (_, None) => 1,
            _ => 2,
        }
    }
}

fn is_understood(name: &Oid<'_>) -> bool {
    [
        oid::OID_X509_EXT_SUBJECT_KEY_IDENTIFIER,
        oid::OID_X509_EXT_AUTHORITY_KEY_IDENTIFIER,
        oid::OID_X509_EXT_KEY_USAGE,
        oid::OID_X509_EXT_EXTENDED_KEY_USAGE,
        oid::OID_X509_EXT_BASIC_CONSTRAINTS,
        oid::OID_X509_EXT_SUBJECT_ALT_NAME,
        oid::OID_X509_EXT_NAME_CONSTRAINTS,
        oid::OID_X509_EXT_CERTIFICATE_POLICIES,
        oid::OID_X509_EXT_CRL_DISTRIBUTION_POINTS,
    ]
    .contains(name)
}

/// What is found while paths are built.
struct Search<'a> {
    roots: &'a [Step],
    presented: &'a [Step],
    now: SystemTime,
    signatures: usize,
    authorities: Vec<Bytes>,
    /// The first candidate that had the right name and was refused.
    refused: Option<Fault>,
    /// A path would be good, but for name constraints that are yet to be looked at.
    constrained: bool,
    exhausted: bool,
}

impl<'a> Search<'a> {
    /// Goes on from the last certificate of `path` to all that may have signed it.
    fn climb(&mut self, path: &mut Vec<&'a Step>) {
        let Some(child) = path.last().copied() else { return };
        for (steps, trusted) in [(self.roots, true), (self.presented, false)] {
            let mut candidates: Vec<&Step> =
                steps.iter().filter(|step| step.certificate.subject == child.certificate.issuer).collect();
            candidates.sort_by_key(|step| step.distance(child));
            for candidate in candidates {
                if self.signatures == MAX_SIGNATURES {
                    self.exhausted = true;
                    return;
                }
                self.signatures += 1;
                if path.iter().any(|known| known.is_same(candidate)) {
                    continue;
                }
                if let Err(fault) = self.check(candidate, trusted, path) {
                    self.refused = self.refused.or(Some(fault));
                    continue;
                }
                path.push(candidate);
                if trusted {
                    self.note(path)
                } else {
                    self.climb(path)
                }
                path.pop();
            }
        }
    }

    fn check(&self, candidate: &Step, trusted: bool, path: &[&Step]) -> Result<(), Fault> {
        let child = path.last().ok_or(Fault::Signature)?;
        candidate.check_signed(child)?;
        candidate.check(self.now)?;
        // A root of version 1 has no way to say that it is an authority: being trusted says it.
        if !trusted && !candidate.certificate.is_ca {
            return Err(Fault::NotAuthority);
        }
        let below = path.len().saturating_sub(1);
        match candidate.certificate.path_length {
            Some(limit) if candidate.certificate.is_ca && below > limit as usize => Err(Fault::PathLength),
            _ => Ok(()),
        }
    }

    fn note(&mut self, path: &[&Step]) {
        let above = path.get(1..).unwrap_or_default();
        if above.iter().any(|step| step.has_name_constraints) {
            self.constrained = true;
            return;
        }
        self.add(above.iter().map(|step| step.certificate.der.clone()));
    }

    fn add(&mut self, path: impl IntoIterator<Item = Bytes>) {
        for der in path {
            if !self.authorities.contains(&der) {
                self.authorities.push(der);
            }
        }
    }
}

/// Verifies that the certificate of a node, followed by the intermediates that came with it, leads to one of `roots`.
///
/// # Errors
/// [`NodePathError`] says which certificate is at fault, and why.
pub fn node_path(chain: &[Bytes], roots: &[X509Authority], now: SystemTime) -> Result<VerifiedPath, NodePathError> {
    let (first, above) = chain.split_first().ok_or(NodePathError::NoCertificate)?;
    let leaf = Step::parse(first).map_err(NodePathError::Unreadable)?;
    let presented: Vec<Step> =
        above.iter().map(Step::parse).collect::<Result<_, _>>().map_err(NodePathError::Unreadable)?;
    let trusted = roots.iter().flat_map(|authority| split_certificates(&authority.der).unwrap_or_default());
    let trusted: Vec<Step> = trusted.filter_map(|der| Step::parse(&der).ok()).collect();
    leaf.check(now).map_err(NodePathError::Leaf)?;
    if trusted.iter().any(|root| root.certificate.der == leaf.certificate.der) {
        return Ok(VerifiedPath { authorities: Vec::new() });
    }
    let mut search = Search {
        roots: &trusted,
        presented: &presented,
        now,
        signatures: 0,
        authorities: Vec::new(),
        refused: None,
        constrained: false,
        exhausted: false,
    };
    search.climb(&mut vec![&leaf]);
    let constraints =
        if search.constrained { x509_path(chain, roots, now).map(|path| search.add(path.authorities)) } else { Ok(()) };
    match constraints {
        _ if !search.authorities.is_empty() => Ok(VerifiedPath { authorities: search.authorities }),
        Err(error) => Err(NodePathError::Constrained(error)),
        Ok(()) if search.exhausted => Err(NodePathError::TooManyWays),
        Ok(()) => Err(search.refused.map_or(NodePathError::UnknownAuthority, NodePathError::Authority)),
    }
}

#[cfg(test)]
#[path = "node_tests.rs"]
mod tests;
