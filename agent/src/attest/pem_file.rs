//! Keys and certificates that an operator keeps in PEM files.

use std::path::Path;

use aws_lc_rs::encoding::{AsDer as _, Pkcs8V1Der};
use aws_lc_rs::{rsa, signature};
use spiffe::x509::PrivateKey;
use zeroize::{Zeroize as _, Zeroizing};

use super::ProveError;

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, ProveError> {
    std::fs::read(path).map(Zeroizing::new).map_err(|source| ProveError::File { path: path.to_owned(), source })
}

/// All certificates of a file, DER, in their order; at least one.
pub(super) fn certificates(path: &Path) -> Result<Vec<Vec<u8>>, ProveError> {
    let wrong = || ProveError::Content { path: path.to_owned(), wanted: "certificates" };
    let blocks = pem::parse_many(read(path)?.as_slice()).map_err(|_| wrong())?;
    let certificates: Vec<Vec<u8>> =
        blocks.into_iter().filter(|block| block.tag() == "CERTIFICATE").map(pem::Pem::into_contents).collect();
    if certificates.is_empty() { Err(wrong()) } else { Ok(certificates) }
}

/// The first private key of a file: PKCS#8, or what OpenSSL calls "EC" and "RSA" private keys.
pub(super) fn private_key(path: &Path) -> Result<PrivateKey, ProveError> {
    let wrong = || ProveError::Content { path: path.to_owned(), wanted: "an unencrypted private key" };
    let blocks = pem::parse_many(read(path)?.as_slice()).map_err(|_| wrong())?;
    for block in blocks {
        let tag = block.tag().to_owned();
        let mut der = Zeroizing::new(block.into_contents());
        let pkcs8 = match tag.as_str() {
            "PRIVATE KEY" => Some(std::mem::take(&mut *der)),
            "EC PRIVATE KEY" => from_sec1(&der),
            "RSA PRIVATE KEY" => from_pkcs1(&der),
            _ => continue,
        };
        der.zeroize();
        return pkcs8.and_then(|pkcs8| PrivateKey::from_pkcs8(pkcs8).ok()).ok_or_else(wrong);
    }
    Err(wrong())
}

fn from_sec1(der: &[u8]) -> Option<Vec<u8>> {
    [
        &signature::ECDSA_P256_SHA256_FIXED_SIGNING,
        &signature::ECDSA_P384_SHA384_FIXED_SIGNING,
        &signature::ECDSA_P521_SHA512_FIXED_SIGNING,
    ]
    .into_iter()
    .find_map(|algorithm| signature::EcdsaKeyPair::from_private_key_der(algorithm, der).ok())
    .and_then(|key| key.to_pkcs8v1().ok())
    .map(|pkcs8| pkcs8.as_ref().to_vec())
}

fn from_pkcs1(der: &[u8]) -> Option<Vec<u8>> {
    let key = rsa::KeyPair::from_der(der).ok()?;
    let pkcs8: Pkcs8V1Der<'_> = key.as_der().ok()?;
    Some(pkcs8.as_ref().to_vec())
}
