//! Bundles and chains as PEM (RFC 7468).

use bytes::Bytes;

use super::{Bundle, BundleError, X509Authority};
use crate::id::TrustDomain;
use crate::x509::Certificate;

const CERTIFICATE: &str = "CERTIFICATE";

impl Bundle {
    /// The CA certificates as PEM, one block each.
    pub fn to_pem(&self) -> String {
        certificates_to_pem(self.x509.iter().map(|authority| &authority.der))
    }

    /// Reads a PEM file of CA certificates; it carries no JWT keys, no sequence, no hint.
    pub fn from_pem(trust_domain: TrustDomain, text: &str) -> Result<Self, BundleError> {
        let mut bundle = Self::empty(trust_domain);
        for der in certificates_from_pem(text)? {
            Certificate::parse(der.clone()).map_err(BundleError::Certificate)?;
            if bundle.x509.iter().all(|known| known.der != der) {
                bundle.x509.push(X509Authority { der, tainted: false });
            }
        }
        Ok(bundle)
    }
}

/// Writes certificates as PEM blocks, one after the other.
pub fn certificates_to_pem<'a>(certificates: impl IntoIterator<Item = &'a Bytes>) -> String {
    let config = ::pem::EncodeConfig::new().set_line_ending(::pem::LineEnding::LF);
    certificates
        .into_iter()
        .map(|der| ::pem::encode_config(&::pem::Pem::new(CERTIFICATE, der.to_vec()), config))
        .collect()
}

/// Reads the certificates of a PEM text: at least one block, and no block of another kind. What
/// the blocks hold is not looked at.
pub fn certificates_from_pem(text: &str) -> Result<Vec<Bytes>, BundleError> {
    let blocks = ::pem::parse_many(text).map_err(BundleError::Pem)?;
    if blocks.is_empty() {
        return Err(BundleError::NoPemBlock);
    }
    blocks
        .into_iter()
        .map(|block| match block.tag() {
            CERTIFICATE => Ok(Bytes::from(block.into_contents())),
            _ => Err(BundleError::PemKind),
        })
        .collect()
}
