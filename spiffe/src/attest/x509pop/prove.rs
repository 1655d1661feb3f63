//! The node's half.

use aws_lc_rs::signature::{self as sig, RsaPssSaltLength, RsaSignatureEncoding};
use aws_lc_rs::{digest, rand, rsa};

use super::{Challenge, EcdsaResponse, NONCE_SIZE, PopError, Response, RsaResponse, signed_message};
use crate::x509::{Curve, KeyKind, PrivateKey, without_leading_zeros};

/// Go verifies either salt length; the largest is what SPIRE's own agents send.
static PSS_MAXIMAL_SALT: RsaSignatureEncoding = sig::RSA_PSS_SHA256.with_pss_salt_length(RsaPssSaltLength::Max);

/// Answers `challenge` by `key`, with `nonce` fresh from a random source.
pub fn respond(key: &PrivateKey, challenge: &Challenge, nonce: [u8; NONCE_SIZE]) -> Result<Response, PopError> {
    match (key.public_key().kind(), challenge) {
        (KeyKind::Rsa { .. }, Challenge { rsa_signature: Some(challenge), .. }) => {
            let message = signed_message(&challenge.nonce, &nonce)?;
            let pair = rsa::KeyPair::from_pkcs8(key.expose_pkcs8()).map_err(|_| PopError::Signing)?;
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(&PSS_MAXIMAL_SALT, &rand::SystemRandom::new(), &message, &mut signature)
                .map_err(|_| PopError::Signing)?;
            let response = RsaResponse { nonce: nonce.to_vec(), signature };
            Ok(Response { rsa_signature: Some(response), ecdsa_signature: None })
        }
        (KeyKind::Ec(curve), Challenge { ecdsa_signature: Some(challenge), .. }) => {
            let message = signed_message(&challenge.nonce, &nonce)?;
            let (r, s) = sign_ecdsa(curve, key, &message)?;
            let response = EcdsaResponse { nonce: nonce.to_vec(), r, s };
            Ok(Response { rsa_signature: None, ecdsa_signature: Some(response) })
        }
        _ => Err(PopError::Unfitting),
    }
}

/// Signs the SHA-256 of `message` on any curve and returns r and s without leading zeros.
fn sign_ecdsa(curve: Curve, key: &PrivateKey, message: &[u8]) -> Result<(Vec<u8>, Vec<u8>), PopError> {
    let (algorithm, hash) = match curve {
        Curve::P256 => (&sig::ECDSA_P256_SHA256_FIXED_SIGNING, &digest::SHA256),
        Curve::P384 => (&sig::ECDSA_P384_SHA384_FIXED_SIGNING, &digest::SHA384),
        Curve::P521 => (&sig::ECDSA_P521_SHA512_FIXED_SIGNING, &digest::SHA512),
    };
    let pair = sig::EcdsaKeyPair::from_pkcs8(algorithm, key.expose_pkcs8()).map_err(|_| PopError::Signing)?;
    // The provider pairs each curve with the hash of its size. ECDSA reads a hash as a number, so
    // a SHA-256 with zeros in front is the same number in the larger form.
    let short = digest::digest(&digest::SHA256, message);
    let mut padded = vec![0; hash.output_len().saturating_sub(short.as_ref().len())];
    padded.extend_from_slice(short.as_ref());
    let digest = digest::Digest::import_less_safe(&padded, hash).map_err(|_| PopError::Signing)?;
    let signature = pair.sign_digest(&digest).map_err(|_| PopError::Signing)?;
    let (r, s) = signature.as_ref().split_at(signature.as_ref().len() / 2);
    Ok((without_leading_zeros(r).to_vec(), without_leading_zeros(s).to_vec()))
}
