//! What every implementation of [`SigningKeys`] keeps, as a test that each of them runs.

use std::future::Future;

use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_FIXED,
    RSA_PKCS1_2048_8192_SHA256, UnparsedPublicKey, VerificationAlgorithm,
};

use super::{KeyError, KeyType, SigningKeys};

/// Runs the contract against an empty place made by `open`.
pub(crate) async fn signing_keys<K: SigningKeys, F: Future<Output = K>>(open: impl Fn() -> F) {
    let keys = open().await;
    assert!(keys.public().await.unwrap().keys.is_empty(), "a new place is empty");
    assert!(keys.signer("a").is_none());

    let kinds: [(KeyType, &'static dyn VerificationAlgorithm, &'static dyn VerificationAlgorithm); 4] = [
        (KeyType::EcP256, &ECDSA_P256_SHA256_ASN1, &ECDSA_P256_SHA256_FIXED),
        (KeyType::EcP384, &ECDSA_P384_SHA384_ASN1, &ECDSA_P384_SHA384_FIXED),
        (KeyType::Rsa2048, &RSA_PKCS1_2048_8192_SHA256, &RSA_PKCS1_2048_8192_SHA256),
        (KeyType::Rsa4096, &RSA_PKCS1_2048_8192_SHA256, &RSA_PKCS1_2048_8192_SHA256),
    ];
    for (kind, x509, jws) in kinds {
        let id = kind.as_str();
        let public = keys.create(id, kind).await.unwrap();
        assert_eq!(public.kind, kind);
        assert!(public.spki.ends_with(&public.bits), "the bit string is the end of the key information");
        let signer = keys.signer(id).unwrap();
        assert_eq!(signer.public_key(), &public);
        let signature = signer.sign_x509(b"message").unwrap();
        UnparsedPublicKey::new(x509, &public.bits).verify(b"message", &signature).unwrap();
        let signature = signer.sign_jws(b"message").unwrap();
        UnparsedPublicKey::new(jws, &public.bits).verify(b"message", &signature).unwrap();
    }

    let before = keys.public().await.unwrap();
    assert_eq!(before.keys.len(), 4);
    assert!(matches!(keys.create("ec-p256", KeyType::EcP384).await, Err(KeyError::Exists)), "never overwritten");
    assert_eq!(keys.signer("ec-p256").unwrap().public_key().kind, KeyType::EcP256);

    let signer = keys.signer("rsa-2048").unwrap();
    keys.delete("rsa-2048").await.unwrap();
    keys.delete("rsa-2048").await.unwrap();
    assert!(keys.signer("rsa-2048").is_none());
    let signature = signer.sign_x509(b"message").unwrap();
    let bits = &signer.public_key().bits;
    UnparsedPublicKey::new(&RSA_PKCS1_2048_8192_SHA256, bits).verify(b"message", &signature).unwrap();
    let after = keys.public().await.unwrap();
    assert_eq!(after.keys.len(), 3);
    assert_eq!(after.owner, before.owner);
    assert_ne!(open().await.public().await.unwrap().owner, before.owner, "another place has another owner");
}
