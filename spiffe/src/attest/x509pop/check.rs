//! The server's half.

use std::time::SystemTime;

use aws_lc_rs::signature::{self as sig, RsaParameters, RsaPssSaltLength, VerificationAlgorithm};
use bytes::Bytes;

use super::{Challenge, NAME, NONCE_SIZE, Nonce, Payload, PopError, Response, signed_message};
use crate::attest::path_template::PathTemplate;
use crate::bundle::X509Authority;
use crate::der;
use crate::id::{SpiffeId, TrustDomain};
use crate::selector::{Selector, SelectorSet};
use crate::verify;
use crate::x509::{Certificate, Curve, KeyError, KeyKind, PublicKey, sha1};

/// The fields of `agent_path_template`.
pub const FIELDS: &[&str] = &[
    "PluginName",
    "TrustDomain",
    "Fingerprint",
    "SerialNumber",
    "SerialNumberHex",
    "SVIDPathTrimmed",
    "Subject",
    "URISanSelectors",
];

/// How much a node may ask the server to look at.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Policy {
    /// Certificates besides the leaf.
    pub max_intermediates: usize,
    /// Bits of an RSA key.
    pub max_rsa_key_size: usize,
}

impl Default for Policy {
    fn default() -> Self {
        Self { max_intermediates: 4, max_rsa_key_size: 8192 }
    }
}

/// A node whose certificate is good; whether it holds the key is yet to be shown.
#[derive(Debug, Clone)]
pub struct Node {
    leaf: Certificate,
    key: PublicKey,
    authorities: Vec<Bytes>,
}

impl Node {
    /// Checks the chain of `payload` against `roots` at `now`, whatever its extended key usage.
    pub fn verify(
        payload: &Payload,
        roots: &[X509Authority],
        policy: Policy,
        now: SystemTime,
    ) -> Result<Self, PopError> {
        let intermediates = payload.certificates.len().checked_sub(1).ok_or(PopError::NoCertificate)?;
        // Before anything is parsed: parsing costs, counting does not.
        if intermediates > policy.max_intermediates {
            return Err(PopError::TooManyIntermediates);
        }
        let chain: Vec<Bytes> = payload.certificates.iter().map(|der| Bytes::copy_from_slice(der)).collect();
        let mut parsed = Vec::with_capacity(chain.len());
        for der in &chain {
            let certificate = Certificate::parse_any_version(der.clone()).map_err(PopError::Certificate)?;
            if let Ok(KeyKind::Rsa { bits }) = certificate.public_key.as_ref().map(PublicKey::kind)
                && bits > policy.max_rsa_key_size
            {
                return Err(PopError::Key(KeyError::RsaSize { bits }));
            }
            parsed.push(certificate);
        }
        let leaf = parsed.into_iter().next().ok_or(PopError::NoCertificate)?;
        let key = leaf.public_key.clone().map_err(PopError::Key)?;
        key.check_strength().map_err(PopError::Key)?;
        let path = verify::node_path(&chain, roots, now).map_err(PopError::Chain)?;
        if !leaf.key_usage.is_some_and(|usage| usage.digital_signature()) {
            return Err(PopError::NoDigitalSignature);
        }
        Ok(Self { leaf, key, authorities: path.authorities })
    }

    /// The node's certificate.
    pub fn leaf(&self) -> &Certificate {
        &self.leaf
    }

    /// The challenge for the node's kind of key, with `nonce` fresh from a random source.
    pub fn challenge(&self, nonce: [u8; NONCE_SIZE]) -> Result<Challenge, PopError> {
        let nonce = Some(Nonce { nonce: nonce.to_vec() });
        match self.key.kind() {
            KeyKind::Rsa { .. } => Ok(Challenge { rsa_signature: nonce, ecdsa_signature: None }),
            KeyKind::Ec(_) => Ok(Challenge { rsa_signature: None, ecdsa_signature: nonce }),
            KeyKind::Ed25519 => Err(PopError::Key(KeyError::Unsupported)),
        }
    }

    /// Checks that `response` answers `challenge` by the key of the node's certificate.
    pub fn check(&self, challenge: &Challenge, response: &Response) -> Result<(), PopError> {
        match (self.key.kind(), challenge, response) {
            (
                KeyKind::Rsa { .. },
                Challenge { rsa_signature: Some(challenge), .. },
                Response { rsa_signature: Some(response), .. },
            ) => {
                let message = signed_message(&challenge.nonce, &response.nonce)?;
                // SPIRE signs with the largest salt the key allows, other tools with one as long
                // as the hash. A verifier cannot know, so it tries both.
                self.key
                    .verify_with(&PSS_MAXIMAL_SALT, &message, &response.signature)
                    .or_else(|_| self.key.verify_with(&sig::RSA_PSS_2048_8192_SHA256, &message, &response.signature))
                    .map_err(PopError::Signature)
            }
            (
                KeyKind::Ec(curve),
                Challenge { ecdsa_signature: Some(challenge), .. },
                Response { ecdsa_signature: Some(response), .. },
            ) => {
                let message = signed_message(&challenge.nonce, &response.nonce)?;
                let algorithm: &'static dyn VerificationAlgorithm = match curve {
                    Curve::P256 => &sig::ECDSA_P256_SHA256_ASN1,
                    Curve::P384 => &sig::ECDSA_P384_SHA256_ASN1,
                    Curve::P521 => &sig::ECDSA_P521_SHA256_ASN1,
                };
                let signature = der::ecdsa_signature(&response.r, &response.s);
                self.key.verify_with(algorithm, &message, &signature).map_err(PopError::Signature)
            }
            _ => Err(PopError::Unfitting),
        }
    }

    /// The selectors of the node; `trust_domain` is the server's own.
    pub fn selectors(&self, trust_domain: &TrustDomain) -> SelectorSet {
        let common_name = self.common_name().map(|name| format!("subject:cn:{name}"));
        let authorities = self.authorities.iter().map(|der| format!("ca:fingerprint:{}", crate::hex(&sha1(der))));
        let serial = format!("serialnumber:{}", self.leaf.serial.to_hex());
        let names = self.uri_selectors(trust_domain).into_iter().map(|(key, value)| format!("san:{key}:{value}"));
        let values = common_name.into_iter().chain(authorities).chain([serial]).chain(names);
        values.filter_map(|value| Selector::new(NAME, &value).ok()).collect()
    }

    /// The agent id of a node of an outer PKI.
    pub fn agent_id(&self, trust_domain: &TrustDomain, template: &PathTemplate) -> Result<SpiffeId, PopError> {
        self.fill(trust_domain, template, "")
    }

    /// The agent id in mode `spiffe`, in which the certificate is an SVID of a path below
    /// `prefix` (which ends with a slash).
    pub fn agent_id_of_svid(
        &self,
        trust_domain: &TrustDomain,
        template: &PathTemplate,
        prefix: &str,
    ) -> Result<SpiffeId, PopError> {
        let id = self.leaf.spiffe_id().map_err(PopError::Certificate)?;
        let rest = id.path().strip_prefix(prefix).filter(|_| id.is_member_of(trust_domain));
        self.fill(trust_domain, template, rest.ok_or(PopError::Prefix)?)
    }

    fn fill(&self, trust_domain: &TrustDomain, template: &PathTemplate, svid_path: &str) -> Result<SpiffeId, PopError> {
        let value = |names: &[String]| {
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            match names.as_slice() {
                ["PluginName"] => Some(NAME.to_owned()),
                ["TrustDomain"] => Some(trust_domain.to_string()),
                ["Fingerprint"] => Some(crate::hex(&sha1(&self.leaf.der))),
                ["SerialNumber"] => Some(self.leaf.serial.to_string()),
                ["SerialNumberHex"] => Some(self.leaf.serial.to_hex()),
                ["SVIDPathTrimmed"] => Some(svid_path.to_owned()),
                ["Subject", "CommonName"] => self.common_name().map(str::to_owned),
                ["URISanSelectors", key] => {
                    let selectors = self.uri_selectors(trust_domain);
                    selectors.into_iter().find(|(name, _)| name == key).map(|(_, value)| value)
                }
                _ => None,
            }
        };
        template.agent_id(trust_domain, value).map_err(PopError::AgentId)
    }

    /// Of several common names the last counts, as in Go.
    fn common_name(&self) -> Option<&str> {
        self.leaf.common_names.last().map(String::as_str).filter(|name| !name.is_empty())
    }

    /// Key and value of each URI name `x509pop://<trust domain>/<key>/<value>`.
    fn uri_selectors(&self, trust_domain: &TrustDomain) -> Vec<(String, String)> {
        let prefix = format!("{NAME}://{trust_domain}/");
        let of_uri = |uri: &String| {
            let path = uri.strip_prefix(&prefix)?.split(['?', '#']).next()?;
            let path = percent_decoded(path)?;
            let (key, value) = path.trim_matches('/').split_once('/')?;
            Some((key.to_owned(), value.to_owned()))
        };
        let mut found: Vec<(String, String)> = Vec::new();
        for (key, value) in self.leaf.uris.iter().filter_map(of_uri) {
            // Of several with one key the last counts.
            found.retain(|(known, _)| *known != key);
            found.push((key, value));
        }
        found
    }
}

static PSS_MAXIMAL_SALT: RsaParameters = sig::RSA_PSS_2048_8192_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);

fn percent_decoded(text: &str) -> Option<String> {
    let mut out = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let Some((first, tail)) = rest.split_first() {
        if *first != b'%' {
            out.push(*first);
            rest = tail;
            continue;
        }
        let (digits, tail) = tail.split_first_chunk::<2>()?;
        let digits = std::str::from_utf8(digits).ok()?;
        if !digits.bytes().all(|b| b.is_ascii_hexdigit()) {
            return None;
        }
        out.push(u8::from_str_radix(digits, 16).ok()?);
        rest = tail;
    }
    String::from_utf8(out).ok()
}
