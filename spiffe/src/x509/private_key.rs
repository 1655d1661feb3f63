//! Private keys: PKCS#8 in memory, wiped when dropped.

use aws_lc_rs::encoding::{AsDer, Pkcs8V1Der, PublicKeyX509Der};
use aws_lc_rs::rsa;
use aws_lc_rs::signature::{self as sig, KeyPair};
use bytes::Bytes;
use x509_parser::der_parser::asn1_rs::Any;
use x509_parser::oid_registry as oid;
use x509_parser::prelude::FromDer;
use x509_parser::x509::AlgorithmIdentifier;
use zeroize::Zeroizing;

use super::key::{Curve, KeyError, KeyType, PublicKey};

/// A private key as PKCS#8 DER, wiped when dropped; neither shown nor copied.
pub struct PrivateKey {
    pkcs8: Zeroizing<Vec<u8>>,
    public: PublicKey,
}

impl PrivateKey {
    /// Reads an unencrypted PKCS#8 document with nothing after it.
    pub fn from_pkcs8(pkcs8: Vec<u8>) -> Result<Self, KeyError> {
        let pkcs8 = Zeroizing::new(pkcs8);
        let (algorithm, size) = pkcs8_algorithm(&pkcs8)?;
        if size != pkcs8.len() {
            return Err(KeyError::Malformed);
        }
        let spki = match algorithm {
            Pkcs8Algorithm::Ec(curve) => ec_public_key(curve, &pkcs8)?,
            Pkcs8Algorithm::Rsa => {
                let key = rsa::KeyPair::from_pkcs8(&pkcs8).map_err(|_| KeyError::Malformed)?;
                let spki: PublicKeyX509Der<'_> = key.public_key().as_der().map_err(|_| KeyError::Malformed)?;
                Bytes::copy_from_slice(spki.as_ref())
            }
        };
        let public = PublicKey::from_spki(&spki)?;
        Ok(Self { pkcs8, public })
    }

    /// Makes a new key. Its randomness is the provider's: the one thing in this crate that does
    /// not follow from its arguments.
    pub fn generate(kind: KeyType) -> Result<Self, KeyError> {
        let pkcs8 = match kind {
            KeyType::EcP256 => generate_ec(&sig::ECDSA_P256_SHA256_ASN1_SIGNING)?,
            KeyType::EcP384 => generate_ec(&sig::ECDSA_P384_SHA384_ASN1_SIGNING)?,
            KeyType::Rsa2048 => generate_rsa(rsa::KeySize::Rsa2048)?,
            KeyType::Rsa4096 => generate_rsa(rsa::KeySize::Rsa4096)?,
        };
        Self::from_pkcs8(pkcs8)
    }

    /// Reads the first private key of a PEM text: PKCS#8 (`PRIVATE KEY`), PKCS#1
    /// (`RSA PRIVATE KEY`) or SEC 1 (`EC PRIVATE KEY`), none of them encrypted.
    pub fn from_pem(text: &str) -> Result<Self, KeyError> {
        for block in pem::parse_many(text).map_err(|_| KeyError::NoPemKey)? {
            let kind = block.tag().to_owned();
            let encrypted = block.headers().iter().next().is_some();
            let der = Zeroizing::new(block.into_contents());
            return match kind.as_str() {
                _ if encrypted => Err(KeyError::NoPemKey),
                "PRIVATE KEY" => Self::from_pkcs8(der.to_vec()),
                "RSA PRIVATE KEY" => {
                    let key = rsa::KeyPair::from_der(&der).map_err(|_| KeyError::Malformed)?;
                    let pkcs8: Pkcs8V1Der<'_> = key.as_der().map_err(|_| KeyError::Malformed)?;
                    Self::from_pkcs8(pkcs8.as_ref().to_vec())
                }
                "EC PRIVATE KEY" => Self::from_sec1(&der),
                _ => continue,
            };
        }
        Err(KeyError::NoPemKey)
    }

    fn from_sec1(der: &[u8]) -> Result<Self, KeyError> {
        let key = EC_SIGNING
            .into_iter()
            .find_map(|algorithm| sig::EcdsaKeyPair::from_private_key_der(algorithm, der).ok())
            .ok_or(KeyError::Malformed)?;
        Self::from_pkcs8(key.to_pkcs8v1().map_err(|_| KeyError::Malformed)?.as_ref().to_vec())
    }

    /// The secret as a PEM block `PRIVATE KEY`, for files that only their owner may read.
    pub fn expose_pem(&self) -> Zeroizing<String> {
        let config = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        Zeroizing::new(pem::encode_config(&pem::Pem::new("PRIVATE KEY", self.pkcs8.to_vec()), config))
    }

    /// The secret itself, PKCS#8 DER. Every use of it can be found by this name.
    pub fn expose_pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The public half.
    pub fn public_key(&self) -> &PublicKey {
        &self.public
    }
}

fn generate_ec(algorithm: &'static sig::EcdsaSigningAlgorithm) -> Result<Vec<u8>, KeyError> {
    let key = sig::EcdsaKeyPair::generate(algorithm).map_err(|_| KeyError::Generation)?;
    Ok(key.to_pkcs8v1().map_err(|_| KeyError::Generation)?.as_ref().to_vec())
}

fn generate_rsa(size: rsa::KeySize) -> Result<Vec<u8>, KeyError> {
    let key = rsa::KeyPair::generate(size).map_err(|_| KeyError::Generation)?;
    let der: Pkcs8V1Der<'_> = key.as_der().map_err(|_| KeyError::Generation)?;
    Ok(der.as_ref().to_vec())
}

const EC_SIGNING: [&sig::EcdsaSigningAlgorithm; 3] =
    [&sig::ECDSA_P256_SHA256_ASN1_SIGNING, &sig::ECDSA_P384_SHA384_ASN1_SIGNING, &sig::ECDSA_P521_SHA512_ASN1_SIGNING];

enum Pkcs8Algorithm {
    Ec(Curve),
    Rsa,
}

/// The algorithm of a PrivateKeyInfo (RFC 5208) and the length of the whole document.
fn pkcs8_algorithm(der: &[u8]) -> Result<(Pkcs8Algorithm, usize), KeyError> {
    let (rest, info) = Any::from_der(der).map_err(|_| KeyError::Malformed)?;
    if info.header.tag().0 != 16 {
        return Err(KeyError::Malformed);
    }
    let (after_version, version) = Any::from_der(info.data).map_err(|_| KeyError::Malformed)?;
    if version.header.tag().0 != 2 {
        return Err(KeyError::Malformed);
    }
    let (_, algorithm) = AlgorithmIdentifier::from_der(after_version).map_err(|_| KeyError::Malformed)?;
    let size = der.len() - rest.len();
    if algorithm.algorithm == oid::OID_PKCS1_RSAENCRYPTION {
        return Ok((Pkcs8Algorithm::Rsa, size));
    }
    if algorithm.algorithm != oid::OID_KEY_TYPE_EC_PUBLIC_KEY {
        return Err(KeyError::Unsupported);
    }
    let curve = algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok()).ok_or(KeyError::Unsupported)?;
    let curve = if curve == oid::OID_EC_P256 {
        Curve::P256
    } else if curve == oid::OID_NIST_EC_P384 {
        Curve::P384
    } else if curve == oid::OID_NIST_EC_P521 {
        Curve::P521
    } else {
        return Err(KeyError::Unsupported);
    };
    Ok((Pkcs8Algorithm::Ec(curve), size))
}

fn ec_public_key(curve: Curve, pkcs8: &[u8]) -> Result<Bytes, KeyError> {
    let algorithm = match curve {
        Curve::P256 => &sig::ECDSA_P256_SHA256_ASN1_SIGNING,
        Curve::P384 => &sig::ECDSA_P384_SHA384_ASN1_SIGNING,
        Curve::P521 => &sig::ECDSA_P521_SHA512_ASN1_SIGNING,
    };
    let key = sig::EcdsaKeyPair::from_pkcs8(algorithm, pkcs8).map_err(|_| KeyError::Malformed)?;
    let spki: PublicKeyX509Der<'_> = key.public_key().as_der().map_err(|_| KeyError::Malformed)?;
    Ok(Bytes::copy_from_slice(spki.as_ref()))
}
