//! JWT-SVIDs: read, described and put together. Whether to believe one is decided in
//! [`crate::verify::jwt_svid`].
//!
//! JWT-SVID, sections 2 and 3; RFC 7515; RFC 7519.

mod algorithm;
pub(crate) mod claims;

use std::sync::Arc;
use std::time::SystemTime;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use bytes::Bytes;
use serde_json::{Map, Value};

use crate::id::{IdError, SpiffeId};
use crate::json::{self, JsonError};
use crate::x509::{KeyError, PublicKey, SignatureError};

pub use algorithm::Algorithm;
pub use claims::Claims;

/// Longest accepted part of a token (header, payload or signature) in decoded bytes. Longer ones
/// are refused by their encoded length, before anything is decoded.
pub const MAX_PART: usize = 64 * 1024;

/// Why a text is not a well-formed JWT-SVID. No variant carries anything of the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum JwtError {
    /// Not three parts between two dots (JWS compact serialization).
    #[error("token does not consist of three parts")]
    Structure,
    /// A part of more than [`MAX_PART`] bytes.
    #[error("a part of the token is longer than 65536 bytes")]
    TooLong,
    /// A part that is not unpadded base64url in its one canonical form.
    #[error("a part of the token is not base64url")]
    Base64,
    /// Header or payload cannot be read.
    #[error("token header or payload cannot be read")]
    Json(#[source] JsonError),
    /// Header or payload is no JSON object.
    #[error("token header or payload is not a JSON object")]
    NotAnObject,
    /// `alg` is missing or none of the nine of JWT-SVID, section 2.1.
    #[error("token algorithm is missing or not one of RS, ES and PS with 256, 384 and 512")]
    Algorithm,
    /// `typ` is something else than `JWT` or `JOSE` (JWT-SVID, section 2.3).
    #[error("token header typ is neither JWT nor JOSE")]
    Type,
    /// `kid` is there, but empty or no text.
    #[error("token header kid is not a text")]
    KeyId,
    /// A header member besides `alg`, `kid` and `typ` (JWT-SVID, section 2).
    #[error("token header has a member besides alg, kid and typ")]
    HeaderMember,
    /// `sub` is missing or no text.
    #[error("token has no subject")]
    Subject,
    /// `sub` is not a SPIFFE ID.
    #[error("token subject is not a SPIFFE ID")]
    Id(#[source] IdError),
    /// `sub` names a trust domain, not a workload.
    #[error("SPIFFE ID of the token has no path")]
    NoPath,
    /// `aud` is missing, empty, or not texts.
    #[error("token has no audience")]
    Audience,
    /// `exp` is missing or not a date up to the year 9999.
    #[error("token has no usable expiry")]
    Expiry,
    /// `nbf` or `iat` is not a date up to the year 9999.
    #[error("token claim nbf or iat is not a date")]
    Date,
}

/// A token that has been read but not verified: good to find out what one's own server sent, never
/// to let anybody in.
#[derive(Debug)]
pub struct Unverified<'a> {
    /// The algorithm that the header names.
    pub algorithm: Algorithm,
    /// The key that the header names.
    pub key_id: Option<String>,
    /// The payload.
    pub claims: Claims,
    pub(crate) signed: &'a str,
    pub(crate) signature: Vec<u8>,
}

impl<'a> Unverified<'a> {
    /// Reads a token in compact form and checks everything about it that needs neither a key nor
    /// the time.
    pub fn parse(token: &'a str) -> Result<Self, JwtError> {
        let (signed, signature) = token.rsplit_once('.').ok_or(JwtError::Structure)?;
        let (header, payload) = signed.split_once('.').ok_or(JwtError::Structure)?;
        if [header, payload, signature].iter().any(|part| part.len() > (MAX_PART * 4).div_ceil(3)) {
            return Err(JwtError::TooLong);
        }
        if payload.contains('.') {
            return Err(JwtError::Structure);
        }
        let (algorithm, key_id) = read_header(object(header)?)?;
        let claims = Claims::read(object(payload)?)?;
        let signature = BASE64URL.decode(signature).map_err(|_| JwtError::Base64)?;
        Ok(Self { algorithm, key_id, claims, signed, signature })
    }
}

fn object(part: &str) -> Result<Map<String, Value>, JwtError> {
    let bytes = BASE64URL.decode(part).map_err(|_| JwtError::Base64)?;
    match json::parse(&bytes).map_err(JwtError::Json)? {
        Value::Object(members) => Ok(members),
        _ => Err(JwtError::NotAnObject),
    }
}

fn read_header(members: Map<String, Value>) -> Result<(Algorithm, Option<String>), JwtError> {
    // `alg` before anything else (JWT-SVID, section 2.1).
    let algorithm = members.get("alg").and_then(Value::as_str).and_then(Algorithm::parse).ok_or(JwtError::Algorithm)?;
    let mut key_id = None;
    for (name, value) in members {
        match (name.as_str(), value) {
            ("alg", _) => {}
            ("typ", Value::String(kind)) if kind == "JWT" || kind == "JOSE" => {}
            ("typ", _) => return Err(JwtError::Type),
            ("kid", Value::String(id)) if !id.is_empty() => key_id = Some(id),
            ("kid", _) => return Err(JwtError::KeyId),
            _ => return Err(JwtError::HeaderMember),
        }
    }
    Ok((algorithm, key_id))
}

/// What a verified token says.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct VerifiedToken {
    /// The workload.
    pub id: SpiffeId,
    /// Whom the token is meant for.
    pub audience: Vec<String>,
    /// All claims. Integers beyond 2^53 are texts, so that a reader with doubles cannot round them.
    pub claims: Map<String, Value>,
    /// When it ends, without leeway.
    pub expires_at: SystemTime,
    /// The key that verified it.
    pub key_id: Arc<str>,
}

/// The public key of a JWT authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtKey {
    key: PublicKey,
}

impl JwtKey {
    /// Reads a DER SubjectPublicKeyInfo; weak keys are refused.
    pub fn from_pkix(spki_der: &Bytes) -> Result<Self, KeyError> {
        let key = PublicKey::from_spki(spki_der)?;
        key.check_strength()?;
        Ok(Self { key })
    }

    /// The key.
    pub fn public_key(&self) -> &PublicKey {
        &self.key
    }

    /// The algorithm that an authority with this key signs with; none for keys that sign no JWT.
    pub fn signing_algorithm(&self) -> Option<Algorithm> {
        Algorithm::of_key(self.key.kind())
    }

    /// Verifies `signature` over `message`; the algorithm has to be one of this kind of key.
    pub fn verify(&self, algorithm: Algorithm, message: &[u8], signature: &[u8]) -> Result<(), SignatureError> {
        if !algorithm.fits(self.key.kind()) {
            return Err(SignatureError::Algorithm);
        }
        self.key.verify_with(algorithm.verification(), message, signature)
    }
}

/// The header of a token, encoded. It is the same for every token of one key, so that an issuer
/// makes it once.
pub fn encoded_header(algorithm: Algorithm, key_id: &str) -> String {
    let mut members = Map::new();
    members.insert("alg".to_owned(), algorithm.as_str().into());
    members.insert("kid".to_owned(), key_id.into());
    members.insert("typ".to_owned(), "JWT".into());
    BASE64URL.encode(Value::Object(members).to_string())
}

/// The bytes that a token's signature covers: [`encoded_header`], a dot, and the encoded claims.
pub fn signing_input(encoded_header: &str, claims: &Map<String, Value>) -> Result<String, serde_json::Error> {
    let payload = serde_json::to_vec(claims)?;
    let mut input = String::with_capacity(encoded_header.len() + 1 + payload.len().div_ceil(3) * 4 + 128);
    input.push_str(encoded_header);
    input.push('.');
    BASE64URL.encode_string(payload, &mut input);
    Ok(input)
}

/// Completes [`signing_input`] by its signature, which for ES algorithms is r and s side by side
/// (RFC 7518, section 3.4).
pub fn with_signature(mut signing_input: String, signature: &[u8]) -> String {
    signing_input.push('.');
    BASE64URL.encode_string(signature, &mut signing_input);
    signing_input
}

#[cfg(test)]
mod tests;
