//! Certificate signing requests (RFC 2986).

use std::borrow::Cow;

use aws_lc_rs::signature::VerificationAlgorithm;
use bytes::Bytes;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::cri_attributes::ParsedCriAttribute;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

use super::key::{KeyError, PublicKey, SignatureError, x509_algorithm};

/// Why a signing request is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CsrError {
    /// Larger than any honest request.
    #[error("CSR is larger than 65536 bytes")]
    TooLarge,
    /// Not a DER request.
    #[error("CSR is not valid DER")]
    Malformed,
    /// Bytes after the request.
    #[error("bytes follow the CSR")]
    TrailingData,
    /// The key is too weak, too large or of an unknown kind.
    #[error("CSR public key is not acceptable")]
    Key(#[source] KeyError),
    /// It was not signed by the key it asks a certificate for.
    #[error("CSR signature is not acceptable")]
    Signature(#[source] SignatureError),
}

/// A parsed request. Only key and names are kept: everything else a requester may ask for is
/// decided by its registration, never by the request.
#[derive(Debug, Clone)]
pub struct Csr {
    /// SubjectPublicKeyInfo, DER.
    pub spki_der: Bytes,
    /// URI names in order; bytes that are not UTF-8 appear replaced.
    pub uris: Vec<String>,
    /// DNS names in order.
    pub dns_names: Vec<String>,
    /// Subject name, DER.
    pub subject: Bytes,
    public_key: PublicKey,
    signed: Bytes,
    signature: Bytes,
    /// None when the request names an algorithm that is not accepted for its key.
    algorithm: Option<&'static dyn VerificationAlgorithm>,
}

impl Csr {
    /// Largest accepted request in bytes. The largest honest one, with an RSA-8192 key and a
    /// SPIFFE ID of 2048 bytes, stays below 5 KiB.
    pub const MAX_SIZE: usize = 64 * 1024;

    /// Reads one DER request and judges the strength of its key. Extensions that are not
    /// understood are ignored; a request that asks for names twice keeps them twice.
    pub fn parse(der: &[u8]) -> Result<Self, CsrError> {
        if der.len() > Self::MAX_SIZE {
            return Err(CsrError::TooLarge);
        }
        let der = Bytes::copy_from_slice(der);
        let (rest, request) = X509CertificationRequest::from_der(&der).map_err(|_| CsrError::Malformed)?;
        if !rest.is_empty() {
            return Err(CsrError::TrailingData);
        }
        let info = &request.certification_request_info;
        let public_key = PublicKey::from_parsed(&der, &info.subject_pki).map_err(CsrError::Key)?;
        public_key.check_strength().map_err(CsrError::Key)?;
        let mut uris = Vec::new();
        let mut dns_names = Vec::new();
        for attribute in info.iter_attributes() {
            let ParsedCriAttribute::ExtensionRequest(requested) = attribute.parsed_attribute() else { continue };
            for extension in &requested.extensions {
                let ParsedExtension::SubjectAlternativeName(names) = extension.parsed_extension() else { continue };
                for name in &names.general_names {
                    match name {
                        GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                        GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
                        GeneralName::Invalid(tag, bytes) if tag.0 == 6 => {
                            uris.push(String::from_utf8_lossy(bytes).into_owned());
                        }
                        _ => {}
                    }
                }
            }
        }
        Ok(Self {
            spki_der: der.slice_ref(info.subject_pki.raw),
            uris,
            dns_names,
            subject: der.slice_ref(info.subject.as_raw()),
            signed: der.slice_ref(info.raw),
            signature: match &request.signature_value.data {
                Cow::Borrowed(bits) => der.slice_ref(bits),
                Cow::Owned(bits) => Bytes::copy_from_slice(bits),
            },
            algorithm: x509_algorithm(public_key.kind(), &request.signature_algorithm),
            public_key,
        })
    }

    /// The key that a certificate is asked for.
    pub fn public_key(&self) -> &PublicKey {
        &self.public_key
    }

    /// Checks that the request was signed by its own key, which proves possession of the private
    /// half. SHA-1 and MD5 are refused. Kept apart from [`Csr::parse`], since it costs forty times
    /// as much.
    pub fn verify_signature(&self) -> Result<(), CsrError> {
        let algorithm = self.algorithm.ok_or(CsrError::Signature(SignatureError::Algorithm))?;
        self.public_key.verify_with(algorithm, &self.signed, &self.signature).map_err(CsrError::Signature)
    }
}

#[cfg(test)]
#[path = "csr_tests.rs"]
mod tests;
