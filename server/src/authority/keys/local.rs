//! A private key in the memory of this process.

use std::collections::HashMap;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING,
    ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm, RSA_PKCS1_SHA256, RsaKeyPair,
};
use spiffe::x509::{Curve, KeyKind, PrivateKey};

use super::{KeyError, KeyType, PublicKey, Signer};

/// The key, parsed once: parsing again for each signature would cost more than signing.
enum Pair {
    Elliptic { asn1: EcdsaKeyPair, fixed: EcdsaKeyPair },
    Rsa(RsaKeyPair),
}

/// A signing key held by this process.
pub(crate) struct LocalKey {
    public: PublicKey,
    pair: Pair,
}

impl LocalKey {
    /// Prepares a private key of a kind that authorities may have.
    pub(crate) fn new(key: &PrivateKey) -> Result<Self, KeyError> {
        let (kind, pair) = match key.public_key().kind() {
            KeyKind::Ec(Curve::P256) => (
                KeyType::EcP256,
                elliptic_pair(key, &ECDSA_P256_SHA256_ASN1_SIGNING, &ECDSA_P256_SHA256_FIXED_SIGNING)?,
            ),
            KeyKind::Ec(Curve::P384) => (
                KeyType::EcP384,
                elliptic_pair(key, &ECDSA_P384_SHA384_ASN1_SIGNING, &ECDSA_P384_SHA384_FIXED_SIGNING)?,
            ),
            KeyKind::Rsa { bits: 2048 } => (KeyType::Rsa2048, rsa_pair(key)?),
            KeyKind::Rsa { bits: 4096 } => (KeyType::Rsa4096, rsa_pair(key)?),
            _ => return Err(KeyError::Unsupported),
        };
        let public =
            PublicKey { kind, spki: key.public_key().spki_der().clone(), bits: key.public_key().raw().clone() };
        Ok(Self { public, pair })
    }

    /// Makes a key; RSA takes up to a second of CPU, so another thread does it.
    pub(crate) async fn generate(kind: KeyType) -> Result<(PrivateKey, Self), KeyError> {
        tokio::task::spawn_blocking(move || {
            let private = PrivateKey::generate(kind).map_err(KeyError::Generate)?;
            let local = Self::new(&private)?;
            Ok((private, local))
        })
        .await
        .map_err(|_| KeyError::Interrupted)?
    }

    /// The public half.
    pub(crate) fn public(&self) -> &PublicKey {
        &self.public
    }
}

fn elliptic_pair(
    key: &PrivateKey,
    asn1: &'static EcdsaSigningAlgorithm,
    fixed: &'static EcdsaSigningAlgorithm,
) -> Result<Pair, KeyError> {
    let pair = |algorithm| EcdsaKeyPair::from_pkcs8(algorithm, key.expose_pkcs8()).map_err(|_| KeyError::Unsupported);
    Ok(Pair::Elliptic { asn1: pair(asn1)?, fixed: pair(fixed)? })
}

fn rsa_pair(key: &PrivateKey) -> Result<Pair, KeyError> {
    RsaKeyPair::from_pkcs8(key.expose_pkcs8()).map(Pair::Rsa).map_err(|_| KeyError::Unsupported)
}

fn elliptic(pair: &EcdsaKeyPair, message: &[u8]) -> Result<Vec<u8>, KeyError> {
    let signature = pair.sign(&SystemRandom::new(), message).map_err(|_| KeyError::Sign)?;
    Ok(signature.as_ref().to_vec())
}

fn rsa(pair: &RsaKeyPair, message: &[u8]) -> Result<Vec<u8>, KeyError> {
    let mut signature = vec![0; pair.public_modulus_len()];
    pair.sign(&RSA_PKCS1_SHA256, &SystemRandom::new(), message, &mut signature).map_err(|_| KeyError::Sign)?;
    Ok(signature)
}

impl Signer for LocalKey {
    fn public_key(&self) -> &PublicKey {
        &self.public
    }

    fn sign_x509(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        match &self.pair {
            Pair::Elliptic { asn1, .. } => elliptic(asn1, message),
            Pair::Rsa(pair) => rsa(pair, message),
        }
    }

    fn sign_jws(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        match &self.pair {
            Pair::Elliptic { fixed, .. } => elliptic(fixed, message),
            Pair::Rsa(pair) => rsa(pair, message),
        }
    }
}

/// Key id to key: what both key places of this process keep in memory.
pub(crate) type Keys = HashMap<String, Arc<LocalKey>>;

/// The public halves of `keys`.
pub(crate) fn public_halves(keys: &Keys) -> Vec<(String, PublicKey)> {
    keys.iter().map(|(id, key)| (id.clone(), key.public().clone())).collect()
}
