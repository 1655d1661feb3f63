//! One X509-SVID: a chain whose leaf keeps the profile.

use std::time::SystemTime;

use bytes::Bytes;

use super::certificate::{Certificate, X509Error};
use super::private_key::PrivateKey;
use super::serial::Serial;
use crate::id::SpiffeId;

/// A leaf and the intermediates between it and a root, without the private key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X509Svid {
    /// DER certificates, leaf first; never a root.
    pub chain: Vec<Bytes>,
    /// The SPIFFE ID of the leaf.
    pub id: SpiffeId,
    /// First moment of the leaf's validity.
    pub not_before: SystemTime,
    /// Last moment of the leaf's validity.
    pub not_after: SystemTime,
    /// The leaf's serial number.
    pub serial: Serial,
    /// The leaf's SubjectPublicKeyInfo, DER.
    pub spki_der: Bytes,
}

impl X509Svid {
    /// Reads a chain, leaf first. The leaf's profile is checked, and that all above are
    /// authorities; signatures and times are not. A self-issued certificate at the end is left
    /// out: roots travel in bundles.
    pub fn from_chain(mut chain: Vec<Bytes>) -> Result<Self, X509Error> {
        let (first, above) = chain.split_first().ok_or(X509Error::EmptyChain)?;
        let leaf = Certificate::parse(first.clone())?;
        let id = leaf.leaf_id()?;
        let mut ends_with_root = false;
        for der in above {
            let certificate = Certificate::parse(der.clone())?;
            certificate.check_authority()?;
            ends_with_root = certificate.is_self_issued();
        }
        if ends_with_root {
            chain.pop();
        }
        Ok(Self {
            chain,
            id,
            not_before: leaf.not_before,
            not_after: leaf.not_after,
            serial: leaf.serial,
            spki_der: leaf.spki_der,
        })
    }

    /// Reads certificates that follow one another without separator, the form of the Workload API.
    pub fn from_concatenated(der: &Bytes) -> Result<Self, X509Error> {
        Self::from_chain(split_certificates(der)?)
    }

    /// Whether `key` is the one that the leaf certifies.
    pub fn check_key(&self, key: &PrivateKey) -> Result<(), X509Error> {
        if key.public_key().spki_der() == &self.spki_der { Ok(()) } else { Err(X509Error::ForeignKey) }
    }
}

/// Splits concatenated DER certificates, the form of the Workload API, at their outer lengths, without reading them
/// further.
pub fn split_certificates(der: &Bytes) -> Result<Vec<Bytes>, X509Error> {
    use x509_parser::der_parser::asn1_rs::{Any, FromDer};
    let mut certificates = Vec::new();
    let mut rest: &[u8] = der;
    while !rest.is_empty() {
        let (after, any) = Any::from_der(rest).map_err(|_| X509Error::Malformed)?;
        if any.header.tag().0 != 16 {
            return Err(X509Error::Malformed);
        }
        let size = rest.len() - after.len();
        certificates.push(der.slice_ref(rest.get(..size).unwrap_or_default()));
        rest = after;
    }
    Ok(certificates)
}

#[cfg(test)]
#[path = "svid_tests.rs"]
mod tests;
