//! Attestation by proof of possession of an X.509 certificate's key.
//!
//! The node shows a chain; the server checks it and sends 32 random bytes; the node adds 32 of its
//! own and signs the SHA-256 of both. The messages are JSON with the names and encodings of
//! SPIRE's `x509pop` plugin, so that either half may be SPIRE's.

mod check;
mod prove;

use serde::{Deserialize, Serialize};

use crate::id::IdError;
use crate::verify::NodePathError;
use crate::x509::{KeyError, SignatureError, X509Error};

use super::path_template::TemplateError;

pub use check::{FIELDS, Node, Policy};
pub use prove::respond;

/// The name of the method, and the type of its selectors.
pub const NAME: &str = "x509pop";

/// The default of `agent_path_template` for certificates of an outer PKI.
pub const DEFAULT_TEMPLATE: &str = "/{{ .PluginName }}/{{ .Fingerprint }}";

/// The default of `agent_path_template` in mode `spiffe`.
pub const DEFAULT_SPIFFE_TEMPLATE: &str = "/{{ .PluginName }}/{{ .SVIDPathTrimmed }}";

/// Bytes of the nonces on both sides.
pub const NONCE_SIZE: usize = 32;

/// Why an attestation fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PopError {
    /// A message is not the JSON that is due.
    #[error("attestation message cannot be read")]
    Message(#[source] serde_json::Error),
    /// A payload without certificates.
    #[error("no certificate to attest")]
    NoCertificate,
    /// More intermediates than the policy allows.
    #[error("too many intermediate certificates")]
    TooManyIntermediates,
    /// A certificate that cannot be read.
    #[error("attestation certificate cannot be read")]
    Certificate(#[source] X509Error),
    /// A key that is not served, or too large.
    #[error("attestation certificate key is not acceptable")]
    Key(#[source] KeyError),
    /// The chain does not lead to a configured authority.
    #[error("certificate verification failed")]
    Chain(#[source] NodePathError),
    /// The leaf's key is not meant for signatures.
    #[error("certificate is not meant for digital signatures")]
    NoDigitalSignature,
    /// Challenge and key are of different kinds, or a nonce has a wrong length.
    #[error("challenge or response does not fit the key")]
    Unfitting,
    /// The signature is wrong.
    #[error("challenge response verification failed")]
    Signature(#[source] SignatureError),
    /// The private key could not sign.
    #[error("challenge could not be signed")]
    Signing,
    /// In mode `spiffe`: the certificate is not an SVID of a path that may attest.
    #[error("certificate does not carry a SPIFFE ID below the configured prefix")]
    Prefix,
    /// The agent id cannot be made.
    #[error("agent id cannot be made of the certificate")]
    AgentId(#[source] TemplateError),
    /// The certificate's SPIFFE ID.
    #[error("SPIFFE ID of the certificate is not legal")]
    Id(#[source] IdError),
}

/// The first message, of the node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Payload {
    /// DER certificates, leaf first, roots not needed.
    #[serde(with = "base64_list", default)]
    pub certificates: Vec<Vec<u8>>,
}

/// The server's message: exactly one of the two is set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Challenge {
    /// For RSA keys.
    #[serde(default)]
    pub rsa_signature: Option<Nonce>,
    /// For EC keys.
    #[serde(default)]
    pub ecdsa_signature: Option<Nonce>,
}

/// The server's random bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Nonce {
    /// [`NONCE_SIZE`] bytes.
    #[serde(with = "base64_bytes")]
    pub nonce: Vec<u8>,
}

/// The node's answer: the member that the challenge had is set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Response {
    /// By an RSA key.
    #[serde(default)]
    pub rsa_signature: Option<RsaResponse>,
    /// By an EC key.
    #[serde(default)]
    pub ecdsa_signature: Option<EcdsaResponse>,
}

/// RSASSA-PSS with SHA-256.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RsaResponse {
    /// The node's [`NONCE_SIZE`] random bytes.
    #[serde(with = "base64_bytes")]
    pub nonce: Vec<u8>,
    /// The signature.
    #[serde(with = "base64_bytes")]
    pub signature: Vec<u8>,
}

/// ECDSA over the SHA-256, whatever the curve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EcdsaResponse {
    /// The node's [`NONCE_SIZE`] random bytes.
    #[serde(with = "base64_bytes")]
    pub nonce: Vec<u8>,
    /// First number of the signature, big-endian.
    #[serde(with = "base64_bytes")]
    pub r: Vec<u8>,
    /// Second number of the signature, big-endian.
    #[serde(with = "base64_bytes")]
    pub s: Vec<u8>,
}

macro_rules! json_message {
    ($($message:ident),*) => {$(
        impl $message {
            /// Reads the message.
            pub fn from_json(bytes: &[u8]) -> Result<Self, PopError> {
                crate::from_object(bytes, concat!("the object of a ", stringify!($message))).map_err(PopError::Message)
            }

            /// Writes the message.
            pub fn to_json(&self) -> Result<Vec<u8>, PopError> {
                serde_json::to_vec(self).map_err(PopError::Message)
            }
        }
    )*};
}

json_message!(Payload, Challenge, Response);

/// What is signed, before hashing: both nonces, the server's first.
fn signed_message(challenge: &[u8], response: &[u8]) -> Result<[u8; 2 * NONCE_SIZE], PopError> {
    let both = [challenge, response];
    if both.iter().any(|nonce| nonce.len() != NONCE_SIZE) {
        return Err(PopError::Unfitting);
    }
    both.concat().try_into().map_err(|_| PopError::Unfitting)
}

/// Byte strings as Go's `encoding/json` writes them: padded standard base64, `null` when empty.
mod base64_bytes {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = Option::<String>::deserialize(deserializer)?.unwrap_or_default();
        STANDARD.decode(text).map_err(|_| D::Error::custom("not base64"))
    }
}

mod base64_list {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serialize as _, Serializer, de::Error as _};

    pub(super) fn serialize<S: Serializer>(list: &[Vec<u8>], serializer: S) -> Result<S::Ok, S::Error> {
        list.iter().map(|bytes| STANDARD.encode(bytes)).collect::<Vec<_>>().serialize(serializer)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<Vec<u8>>, D::Error> {
        let list = Option::<Vec<String>>::deserialize(deserializer)?.unwrap_or_default();
        list.iter().map(|text| STANDARD.decode(text).map_err(|_| D::Error::custom("not base64"))).collect()
    }
}

#[cfg(test)]
mod tests;
