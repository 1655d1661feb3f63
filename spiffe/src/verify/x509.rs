//! X509-SVID validation (X509-SVID, section 5; RFC 5280, section 6).
//!
//! webpki builds the path and checks signatures, times, constraints and extended key usage. It
//! does not look at key usage, nor at the dates, the CA flag and the path length of a root: those
//! are checked here.

use std::cell::RefCell;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustls_pki_types::{CertificateDer, TrustAnchor, UnixTime};
use webpki::{EndEntityCert, ExtendedKeyUsageValidator, KeyPurposeIdIter, KeyUsage};

use super::{PeerRole, VerifyError};
use crate::bundle::{Bundles, X509Authority};
use crate::id::SpiffeId;
use crate::x509::{Certificate, PublicKey, Serial, X509Error, split_certificates};

/// Longest chain that is looked at, leaf included.
const MAX_CHAIN: usize = 16;

/// How many intermediates webpki allows in a path.
const MAX_INTERMEDIATES: usize = 6;

/// How many paths the names in a chain may allow: as many as [`MAX_INTERMEDIATES`] of one name do, in any order and
/// number. A search through more of them is work that a stranger could order for nothing, since no signature is
/// checked before a path has reached a root.
const MAX_PATHS: usize = 1956;

/// A peer that may be believed to be `id`.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedChain {
    /// Who the peer is.
    pub id: SpiffeId,
    /// The certificates as they were presented, leaf first.
    pub chain: Vec<Bytes>,
    /// The leaf's serial number.
    pub serial: Serial,
    /// First moment of the leaf's validity.
    pub not_before: SystemTime,
    /// Last moment of the leaf's validity; a connection should not outlive it.
    pub not_after: SystemTime,
    /// The leaf's key.
    pub public_key: PublicKey,
    /// The certificate of the bundle that the chain leads to. Once no bundle of the trust domain has it any more, what
    /// was verified by it is to be verified anew.
    pub root: Bytes,
}

/// Verifies a chain, leaf first, as an X509-SVID against the bundle of its own trust domain.
pub fn x509_chain(
    chain: &[Bytes],
    bundles: &dyn Bundles,
    role: PeerRole,
    now: SystemTime,
) -> Result<VerifiedChain, VerifyError> {
    check_length(chain)?;
    let first = chain.first().ok_or(VerifyError::NoCertificate)?;
    let leaf = Certificate::parse(first.clone()).map_err(VerifyError::Leaf)?;
    let id = leaf.leaf_id().map_err(VerifyError::Leaf)?;
    let public_key = leaf.public_key.clone().map_err(|error| VerifyError::Leaf(X509Error::Key(error)))?;
    public_key
        .check_strength()
        .and_then(|()| public_key.check_point())
        .map_err(|error| VerifyError::Leaf(X509Error::Key(error)))?;
    let bundle = bundles.bundle(id.trust_domain()).ok_or(VerifyError::UnknownTrustDomain)?;
    let usage = match role {
        PeerRole::Client => KeyUsage::client_auth(),
        PeerRole::Server => KeyUsage::server_auth(),
    };
    let root = RefCell::new(Bytes::new());
    build(chain, &bundle.x509, usage, now, |path| {
        root.replace(path.last().cloned().unwrap_or_default());
        true
    })?;
    Ok(VerifiedChain {
        id,
        chain: chain.to_vec(),
        serial: leaf.serial,
        not_before: leaf.not_before,
        not_after: leaf.not_after,
        public_key,
        root: root.into_inner(),
    })
}

/// The certificates above a leaf on all valid paths, roots included, each once.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct VerifiedPath {
    /// DER certificates, those next to the leaf first.
    pub authorities: Vec<Bytes>,
}

/// Verifies that a certificate chain, leaf first, leads to one of `roots`, whatever its names and
/// extended key usage: for certificates that are not SVIDs, such as those that nodes attest with.
pub fn x509_path(chain: &[Bytes], roots: &[X509Authority], now: SystemTime) -> Result<VerifiedPath, VerifyError> {
    check_length(chain)?;
    let authorities = RefCell::new(Vec::<Bytes>::new());
    // Saying no to each path makes webpki look for the next one.
    let outcome = build(chain, roots, AnyUsage, now, |path| {
        let mut authorities = authorities.borrow_mut();
        for der in path {
            if !authorities.contains(der) {
                authorities.push(der.clone());
            }
        }
        false
    });
    match (outcome, authorities.into_inner()) {
        (Err(error), found) if found.is_empty() => Err(error),
        (_, authorities) => Ok(VerifiedPath { authorities }),
    }
}

struct AnyUsage;

impl ExtendedKeyUsageValidator for AnyUsage {
    fn validate(&self, _: KeyPurposeIdIter<'_, '_>) -> Result<(), webpki::Error> {
        Ok(())
    }
}

fn check_length(chain: &[Bytes]) -> Result<(), VerifyError> {
    match chain.len() {
        0 => Err(VerifyError::NoCertificate),
        1..=MAX_CHAIN => Ok(()),
        count => Err(VerifyError::TooManyCertificates { count }),
    }
}

/// Roots of which each is a CA certificate that is valid now; the others are as good as absent.
fn usable_roots(authorities: &[X509Authority], now: SystemTime) -> Vec<Certificate> {
    let certificates = authorities.iter().flat_map(|authority| split_certificates(&authority.der).unwrap_or_default());
    certificates
        .filter_map(|der| Certificate::parse(der).ok())
        .filter(|root| root.check_authority().is_ok() && root.is_valid_at(now) && !root.has_unknown_critical_extension)
        .collect()
}

/// Builds a path and offers it, without the leaf and with its root, to `accept`. An unknown authority is told apart from
/// one whose time it is not, as far as key ids, or else names, tell.
fn build(
    chain: &[Bytes],
    authorities: &[X509Authority],
    usage: impl ExtendedKeyUsageValidator,
    now: SystemTime,
    accept: impl Fn(&[Bytes]) -> bool,
) -> Result<(), VerifyError> {
    build_path(chain, authorities, usage, now, accept).map_err(|error| match error {
        VerifyError::NoAuthority
        | VerifyError::Path(webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey)
            if names_untimely(chain, authorities, now) =>
        {
            VerifyError::AuthorityTime
        }
        error => error,
    })
}

/// Whether the chain names, as the key that signed it, an authority that is not valid now.
fn names_untimely(chain: &[Bytes], authorities: &[X509Authority], now: SystemTime) -> bool {
    let certificates = authorities.iter().flat_map(|authority| split_certificates(&authority.der).unwrap_or_default());
    let untimely: Vec<Certificate> = certificates
        .filter_map(|der| Certificate::parse(der).ok())
        .filter(|root| root.check_authority().is_ok() && !root.is_valid_at(now))
        .collect();
    let names =
        |certificate: &Certificate, root: &Certificate| match (&certificate.authority_key_id, &root.subject_key_id) {
            (Some(named), Some(id)) => named == id,
            _ => certificate.issuer == root.subject,
        };
    !untimely.is_empty()
        && chain
            .iter()
            .filter_map(|der| Certificate::parse(der.clone()).ok())
            .any(|certificate| untimely.iter().any(|root| names(&certificate, root)))
}

fn build_path(
    chain: &[Bytes],
    authorities: &[X509Authority],
    usage: impl ExtendedKeyUsageValidator,
    now: SystemTime,
    accept: impl Fn(&[Bytes]) -> bool,
) -> Result<(), VerifyError> {
    let roots = usable_roots(authorities, now);
    let root_ders: Vec<CertificateDer<'_>> = roots.iter().map(|root| CertificateDer::from(&root.der[..])).collect();
    let mut anchors: Vec<TrustAnchor<'_>> = Vec::with_capacity(roots.len());
    let mut anchored: Vec<&Certificate> = Vec::with_capacity(roots.len());
    for (der, root) in root_ders.iter().zip(&roots) {
        if let Ok(anchor) = webpki::anchor_from_trusted_cert(der) {
            anchors.push(anchor);
            anchored.push(root);
        }
    }
    if anchors.is_empty() {
        return Err(VerifyError::NoAuthority);
    }
    let (first, above) = chain.split_first().ok_or(VerifyError::NoCertificate)?;
    let first_der = CertificateDer::from(&first[..]);
    let leaf = EndEntityCert::try_from(&first_der).map_err(VerifyError::Path)?;
    // webpki reads every certificate again for every path, so it gets none that is endless; and what cannot be read here
    // may be in no path anyway.
    let (mut presented, mut unreadable) = (Vec::with_capacity(above.len()), None);
    for der in above {
        match Certificate::parse(der.clone()) {
            Ok(certificate) => presented.push(certificate),
            Err(error) => unreadable = unreadable.or(Some(error)),
        }
    }
    let intermediates: Vec<CertificateDer<'_>> =
        presented.iter().map(|certificate| CertificateDer::from(&certificate.der[..])).collect();
    check_paths(first, &presented)?;
    let time = UnixTime::since_unix_epoch(now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO));

    // What webpki cannot say by its own error type.
    let refusal = RefCell::new(None);
    let judge = |path: &webpki::VerifiedPath<'_>| {
        let position = anchors.iter().position(|anchor| std::ptr::eq(anchor, path.anchor()));
        let Some(root) = position.and_then(|index| anchored.get(index)) else {
            return Err(webpki::Error::UnknownIssuer);
        };
        match judge_path(path, &presented, root) {
            Ok(found) if accept(&found) => Ok(()),
            Ok(_) => Err(webpki::Error::UnknownIssuer),
            Err(error) => {
                refusal.replace(Some(error));
                Err(webpki::Error::UnknownIssuer)
            }
        }
    };
    let outcome =
        leaf.verify_for_usage(webpki::ALL_VERIFICATION_ALGS, &anchors, &intermediates, time, usage, None, Some(&judge));
    match outcome {
        Ok(_) => Ok(()),
        Err(error) => Err(refusal.take().unwrap_or(match error {
            webpki::Error::NameConstraintViolation | webpki::Error::MalformedNameConstraint => {
                VerifyError::NameConstraints(error)
            }
            webpki::Error::UnknownIssuer if let Some(error) = unreadable => VerifyError::Intermediate(error),
            _ => VerifyError::Path(error),
        })),
    }
}

/// Counts the paths that webpki would try if none leads to a root, up to [`MAX_PATHS`].
fn check_paths(leaf: &Bytes, presented: &[Certificate]) -> Result<(), VerifyError> {
    if presented.len() <= MAX_INTERMEDIATES {
        return Ok(());
    }
    let leaf = Certificate::parse(leaf.clone()).map_err(VerifyError::Leaf)?;
    let mut left = MAX_PATHS;
    climb(&leaf.issuer, presented, &mut Vec::with_capacity(MAX_INTERMEDIATES), &mut left)
}

/// Takes one from `left` for each way to go on from a certificate of this issuer, and from all that follow.
fn climb<'a>(
    issuer: &Bytes,
    presented: &'a [Certificate],
    path: &mut Vec<&'a Certificate>,
    left: &mut usize,
) -> Result<(), VerifyError> {
    if path.len() == MAX_INTERMEDIATES {
        return Ok(());
    }
    for step in presented.iter().filter(|step| step.subject == *issuer) {
        if path.iter().any(|known| known.spki_der == step.spki_der && known.subject == step.subject) {
            continue;
        }
        *left = left.checked_sub(1).ok_or(VerifyError::TooManyPaths)?;
        path.push(step);
        climb(&step.issuer, presented, path, left)?;
        path.pop();
    }
    Ok(())
}

/// The rules of RFC 5280 that webpki leaves out; returns the authorities of the path.
fn judge_path(
    path: &webpki::VerifiedPath<'_>,
    presented: &[Certificate],
    root: &Certificate,
) -> Result<Vec<Bytes>, VerifyError> {
    let mut found = Vec::new();
    let mut below_root = 0_usize;
    for used in path.intermediate_certificates() {
        let used = used.der();
        let Some(certificate) = presented.iter().find(|certificate| *certificate.der == *used) else {
            return Err(VerifyError::Path(webpki::Error::UnknownIssuer));
        };
        certificate.check_authority().map_err(VerifyError::Intermediate)?;
        // Section 4.2.1.9: self-issued certificates do not count.
        below_root += usize::from(!certificate.is_self_issued());
        found.push(certificate.der.clone());
    }
    if root.path_length.is_some_and(|limit| below_root > limit as usize) {
        return Err(VerifyError::PathLength);
    }
    found.push(root.der.clone());
    Ok(found)
}

#[cfg(test)]
#[path = "x509_tests.rs"]
mod tests;
