//! Public and private keys in the forms that SPIFFE documents carry.

use std::fmt;

use aws_lc_rs::digest;
use aws_lc_rs::signature::{self as sig, VerificationAlgorithm};
use bytes::Bytes;
use x509_parser::der_parser::asn1_rs::Any;
use x509_parser::oid_registry as oid;
use x509_parser::prelude::FromDer;
use x509_parser::x509::{AlgorithmIdentifier, SubjectPublicKeyInfo};

use crate::der;

/// Why a key cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// Not the DER encoding that is due.
    #[error("key is not valid DER of the expected form")]
    Malformed,
    /// An algorithm or curve that is not served; the message names what is.
    #[error("key is none of EC P-256, P-384, P-521, Ed25519 and RSA")]
    Unsupported,
    /// An RSA modulus that is too small to be secure or too large to be checked cheaply.
    #[error("RSA key has {bits} bits, but 2048 to 8192 are accepted")]
    RsaSize {
        /// Bits of the modulus.
        bits: usize,
    },
    /// An RSA public exponent that is even or below three.
    #[error("RSA public exponent is even or below 3")]
    RsaExponent,
    /// A PEM file without a private key, or with one that is encrypted.
    #[error("no unencrypted private key found in the PEM file")]
    NoPemKey,
    /// The public point does not lie on its curve.
    #[error("EC public key is no point of its curve")]
    NotOnCurve,
    /// The provider could not make a key.
    #[error("key could not be generated")]
    Generation,
    /// Not a name of a key type.
    #[error("key type is none of ec-p256, ec-p384, rsa-2048 and rsa-4096")]
    UnknownType,
}

/// Why a signature is not to be believed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SignatureError {
    /// The algorithm is unknown, broken (SHA-1, MD5), or not one of this kind of key.
    #[error("signature algorithm is not accepted for this key")]
    Algorithm,
    /// The signature was not made by this key over this message.
    #[error("signature does not verify")]
    Mismatch,
}

/// A NIST curve.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Curve {
    /// secp256r1.
    P256,
    /// secp384r1.
    P384,
    /// secp521r1.
    P521,
}

/// What kind of public key it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum KeyKind {
    /// Elliptic curve.
    Ec(Curve),
    /// RSA with a modulus of this many bits.
    Rsa {
        /// Bits of the modulus.
        bits: usize,
    },
    /// Edwards curve 25519.
    Ed25519,
}

/// The SHA-1 of the key's BIT STRING in a DER SubjectPublicKeyInfo, which SPIRE uses as key
/// identifier (RFC 5280, section 4.2.1.2, method 1). Bytes that are no SubjectPublicKeyInfo are
/// hashed whole.
pub fn key_id_of(spki_der: &[u8]) -> [u8; 20] {
    let parsed = SubjectPublicKeyInfo::from_der(spki_der);
    let bits = parsed.as_ref().map_or(spki_der, |(_, spki)| spki.subject_public_key.data.as_ref());
    sha1(bits)
}

pub(crate) fn sha1(bytes: &[u8]) -> [u8; 20] {
    let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, bytes);
    let mut out = [0; 20];
    for (to, from) in out.iter_mut().zip(hash.as_ref()) {
        *to = *from;
    }
    out
}

/// A public key, read once from its SubjectPublicKeyInfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PublicKey {
    spki_der: Bytes,
    /// The content of the BIT STRING: a point, an RSAPublicKey, or 32 bytes.
    raw: Bytes,
    kind: KeyKind,
}

impl PublicKey {
    /// Reads a DER SubjectPublicKeyInfo with nothing after it. The size of an RSA key is not
    /// judged here, see [`PublicKey::check_strength`].
    pub fn from_spki(spki_der: &Bytes) -> Result<Self, KeyError> {
        let (rest, spki) = SubjectPublicKeyInfo::from_der(spki_der).map_err(|_| KeyError::Malformed)?;
        if !rest.is_empty() {
            return Err(KeyError::Malformed);
        }
        Self::from_parsed(spki_der, &spki)
    }

    /// As [`PublicKey::from_spki`] for what a parser of ours has already read out of `within`.
    pub(crate) fn from_parsed(within: &Bytes, spki: &SubjectPublicKeyInfo<'_>) -> Result<Self, KeyError> {
        if spki.subject_public_key.unused_bits != 0 {
            return Err(KeyError::Malformed);
        }
        let raw: &[u8] = spki.subject_public_key.data.as_ref();
        let kind = kind_of(&spki.algorithm, raw)?;
        // Parsers forgive what DER does not allow, and each forgives something else: what is certified here has to be
        // the same key to everybody.
        if canonical(kind, raw).as_deref() != Some(spki.raw) {
            return Err(KeyError::Malformed);
        }
        let raw = match &spki.subject_public_key.data {
            std::borrow::Cow::Borrowed(bits) => within.slice_ref(bits),
            std::borrow::Cow::Owned(bits) => Bytes::copy_from_slice(bits),
        };
        Ok(Self { spki_der: within.slice_ref(spki.raw), raw, kind })
    }

    /// What kind of key it is.
    pub fn kind(&self) -> KeyKind {
        self.kind
    }

    /// The DER SubjectPublicKeyInfo.
    pub fn spki_der(&self) -> &Bytes {
        &self.spki_der
    }

    /// The content of the BIT STRING.
    pub fn raw(&self) -> &Bytes {
        &self.raw
    }

    /// The SHA-1 key identifier, as [`key_id_of`].
    pub fn key_id(&self) -> [u8; 20] {
        sha1(&self.raw)
    }

    /// Whether the key is strong enough to be certified, and not so large that checking a
    /// signature becomes an attack.
    pub fn check_strength(&self) -> Result<(), KeyError> {
        match self.kind {
            KeyKind::Ec(_) | KeyKind::Ed25519 => Ok(()),
            KeyKind::Rsa { bits } if !(2048..=8192).contains(&bits) => Err(KeyError::RsaSize { bits }),
            KeyKind::Rsa { .. } => {
                let (_, exponent) = rsa_numbers(&self.raw).ok_or(KeyError::Malformed)?;
                match exponent {
                    [] | [0..=2] => Err(KeyError::RsaExponent),
                    _ if exponent.last().is_some_and(|last| last % 2 == 0) => Err(KeyError::RsaExponent),
                    _ => Ok(()),
                }
            }
        }
    }

    /// Whether an EC point lies on its curve, an RSA key is well formed.
    pub fn check_point(&self) -> Result<(), KeyError> {
        let algorithm: &'static dyn VerificationAlgorithm = match self.kind {
            KeyKind::Ec(Curve::P256) => &sig::ECDSA_P256_SHA256_ASN1,
            KeyKind::Ec(Curve::P384) => &sig::ECDSA_P384_SHA384_ASN1,
            KeyKind::Ec(Curve::P521) => &sig::ECDSA_P521_SHA512_ASN1,
            KeyKind::Ed25519 => &sig::ED25519,
            KeyKind::Rsa { .. } => &sig::RSA_PKCS1_2048_8192_SHA256,
        };
        match sig::ParsedPublicKey::new(algorithm, &self.raw[..]) {
            Ok(_) => Ok(()),
            Err(_) if matches!(self.kind, KeyKind::Ec(_)) => Err(KeyError::NotOnCurve),
            Err(_) => Err(KeyError::Malformed),
        }
    }

    /// Modulus and exponent of an RSA key, big-endian without leading zeros.
    pub(crate) fn rsa_numbers(&self) -> Option<(&[u8], &[u8])> {
        matches!(self.kind, KeyKind::Rsa { .. }).then(|| rsa_numbers(&self.raw)).flatten()
    }

    /// Verifies with an algorithm of the provider that the caller has matched to the kind.
    pub(crate) fn verify_with(
        &self,
        algorithm: &'static dyn VerificationAlgorithm,
        message: &[u8],
        signature: &[u8],
    ) -> Result<(), SignatureError> {
        sig::UnparsedPublicKey::new(algorithm, &self.raw)
            .verify(message, signature)
            .map_err(|_| SignatureError::Mismatch)
    }
}

fn kind_of(algorithm: &AlgorithmIdentifier<'_>, raw: &[u8]) -> Result<KeyKind, KeyError> {
    let name = &algorithm.algorithm;
    if *name == oid::OID_KEY_TYPE_EC_PUBLIC_KEY {
        let curve = algorithm.parameters.as_ref().and_then(|any| any.as_oid().ok()).ok_or(KeyError::Unsupported)?;
        let (curve, size) = if curve == oid::OID_EC_P256 {
            (Curve::P256, 65)
        } else if curve == oid::OID_NIST_EC_P384 {
            (Curve::P384, 97)
        } else if curve == oid::OID_NIST_EC_P521 {
            (Curve::P521, 133)
        } else {
            return Err(KeyError::Unsupported);
        };
        // Only uncompressed points: compressed ones are not allowed in the key forms of JOSE, and
        // no SPIFFE library writes them.
        if raw.len() != size || raw.first() != Some(&4) {
            return Err(KeyError::Malformed);
        }
        Ok(KeyKind::Ec(curve))
    } else if *name == oid::OID_PKCS1_RSAENCRYPTION {
        let (modulus, _) = rsa_numbers(raw).ok_or(KeyError::Malformed)?;
        let leading = modulus.first().map_or(0, |byte| byte.leading_zeros());
        Ok(KeyKind::Rsa { bits: (modulus.len() * 8).saturating_sub(leading as usize) })
    } else if *name == oid::OID_SIG_ED25519 {
        if raw.len() == 32 { Ok(KeyKind::Ed25519) } else { Err(KeyError::Malformed) }
    } else {
        Err(KeyError::Unsupported)
    }
}

/// The one DER form of a key.
fn canonical(kind: KeyKind, raw: &[u8]) -> Option<Vec<u8>> {
    Some(match kind {
        KeyKind::Ec(curve) => der::point_spki(curve, raw),
        KeyKind::Ed25519 => der::ed25519_spki(raw),
        KeyKind::Rsa { .. } => {
            let (modulus, exponent) = rsa_numbers(raw)?;
            der::rsa_spki(modulus, exponent)
        }
    })
}

/// The two integers of an RSAPublicKey (RFC 8017, appendix A.1.1), without leading zeros.
fn rsa_numbers(raw: &[u8]) -> Option<(&[u8], &[u8])> {
    let (rest, sequence) = Any::from_der(raw).ok()?;
    if !rest.is_empty() || sequence.header.tag().0 != 16 {
        return None;
    }
    let (rest, modulus) = Any::from_der(sequence.data).ok()?;
    let (rest, exponent) = Any::from_der(rest).ok()?;
    let positive = |any: &Any<'_>| any.header.tag().0 == 2 && any.data.first().is_some_and(|first| first & 0x80 == 0);
    if !rest.is_empty() || !positive(&modulus) || !positive(&exponent) {
        return None;
    }
    Some((without_leading_zeros(modulus.data), without_leading_zeros(exponent.data)))
}

pub(crate) fn without_leading_zeros(bytes: &[u8]) -> &[u8] {
    let first = bytes.iter().position(|byte| *byte != 0).unwrap_or(bytes.len());
    bytes.get(first..).unwrap_or_default()
}

/// The provider's algorithm for a kind of key and a signature algorithm of X.509; none for SHA-1,
/// MD5 and combinations that do not belong together.
pub(crate) fn x509_algorithm(
    kind: KeyKind,
    algorithm: &AlgorithmIdentifier<'_>,
) -> Option<&'static dyn VerificationAlgorithm> {
    let name = &algorithm.algorithm;
    let sha2 = |sha256, sha384, sha512, algorithms: [&'static dyn VerificationAlgorithm; 3]| {
        let [first, second, third] = algorithms;
        if *name == sha256 {
            Some(first)
        } else if *name == sha384 {
            Some(second)
        } else if *name == sha512 {
            Some(third)
        } else {
            None
        }
    };
    let ecdsa = |algorithms| {
        sha2(oid::OID_SIG_ECDSA_WITH_SHA256, oid::OID_SIG_ECDSA_WITH_SHA384, oid::OID_SIG_ECDSA_WITH_SHA512, algorithms)
    };
    match kind {
        KeyKind::Ec(Curve::P256) => {
            ecdsa([&sig::ECDSA_P256_SHA256_ASN1, &sig::ECDSA_P256_SHA384_ASN1, &sig::ECDSA_P256_SHA512_ASN1])
        }
        KeyKind::Ec(Curve::P384) => {
            ecdsa([&sig::ECDSA_P384_SHA256_ASN1, &sig::ECDSA_P384_SHA384_ASN1, &sig::ECDSA_P384_SHA512_ASN1])
        }
        KeyKind::Ec(Curve::P521) => {
            ecdsa([&sig::ECDSA_P521_SHA256_ASN1, &sig::ECDSA_P521_SHA384_ASN1, &sig::ECDSA_P521_SHA512_ASN1])
        }
        KeyKind::Rsa { .. } => sha2(
            oid::OID_PKCS1_SHA256WITHRSA,
            oid::OID_PKCS1_SHA384WITHRSA,
            oid::OID_PKCS1_SHA512WITHRSA,
            [&sig::RSA_PKCS1_2048_8192_SHA256, &sig::RSA_PKCS1_2048_8192_SHA384, &sig::RSA_PKCS1_2048_8192_SHA512],
        ),
        KeyKind::Ed25519 => (*name == oid::OID_SIG_ED25519).then_some(&sig::ED25519 as _),
    }
}

/// The types of keys that are made and configured here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub enum KeyType {
    /// EC P-256.
    #[default]
    EcP256,
    /// EC P-384.
    EcP384,
    /// RSA with 2048 bits.
    Rsa2048,
    /// RSA with 4096 bits.
    Rsa4096,
}

impl KeyType {
    /// Reads the name that configuration files use.
    pub fn parse(name: &str) -> Result<Self, KeyError> {
        match name {
            "ec-p256" => Ok(Self::EcP256),
            "ec-p384" => Ok(Self::EcP384),
            "rsa-2048" => Ok(Self::Rsa2048),
            "rsa-4096" => Ok(Self::Rsa4096),
            _ => Err(KeyError::UnknownType),
        }
    }

    /// The name that configuration files use.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::EcP256 => "ec-p256",
            Self::EcP384 => "ec-p384",
            Self::Rsa2048 => "rsa-2048",
            Self::Rsa4096 => "rsa-4096",
        }
    }
}

impl fmt::Display for KeyType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
