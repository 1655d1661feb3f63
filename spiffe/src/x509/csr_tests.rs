use super::*;
use crate::testing::*;
use crate::x509::{KeyType, PrivateKey};

const ID: &str = "spiffe://example.org/a";

fn good(key: &PrivateKey, extensions: &[Extension]) -> Vec<u8> {
    request(key, key.public_key().spki_der(), extensions, ECDSA_SHA256)
}

fn refused(der: &[u8]) -> CsrError {
    match Csr::parse(der) {
        Err(error) => error,
        Ok(csr) => csr.verify_signature().expect_err("accepted"),
    }
}

#[test]
fn key_and_names_are_read() {
    let key = new_key();
    let csr = Csr::parse(&good(&key, &[names(&[(URI, ID.as_bytes()), (DNS, b"a.test"), (DNS, b"a.test")])])).unwrap();
    assert_eq!(csr.verify_signature(), Ok(()));
    assert_eq!(csr.spki_der, key.public_key().spki_der());
    assert_eq!(csr.uris, [ID]);
    assert_eq!(csr.dns_names, ["a.test", "a.test"]);
    assert_eq!(csr.subject, name("requester"));
}

#[test]
fn a_request_without_names_is_legal() {
    let csr = Csr::parse(&good(&new_key(), &[])).unwrap();
    assert_eq!(csr.verify_signature(), Ok(()));
    assert!(csr.uris.is_empty() && csr.dns_names.is_empty());
}

#[test]
fn h_29_requests_not_signed_by_their_key() {
    let (key, other) = (new_key(), new_key());
    let stolen = request(&key, other.public_key().spki_der(), &[uri(ID)], ECDSA_SHA256);
    assert_eq!(refused(&stolen), CsrError::Signature(SignatureError::Mismatch));
    let mut flipped = good(&key, &[uri(ID)]);
    *flipped.last_mut().unwrap() ^= 1;
    assert_eq!(refused(&flipped), CsrError::Signature(SignatureError::Mismatch));
    let sha1 = request(&key, key.public_key().spki_der(), &[uri(ID)], ECDSA_SHA1);
    assert_eq!(refused(&sha1), CsrError::Signature(SignatureError::Algorithm));
}

#[test]
fn h_29_weak_and_monstrous_keys() {
    let key = new_key();
    let with = |spki: &[u8]| refused(&request(&key, spki, &[uri(ID)], ECDSA_SHA256));
    let rsa = |bytes: usize, exponent: &[u8]| with(&crate::der::rsa_spki(&vec![0xab; bytes], exponent));
    assert_eq!(rsa(128, &[1, 0, 1]), CsrError::Key(KeyError::RsaSize { bits: 1024 }));
    assert_eq!(rsa(2048, &[1, 0, 1]), CsrError::Key(KeyError::RsaSize { bits: 16384 }));
    assert_eq!(rsa(256, &[1]), CsrError::Key(KeyError::RsaExponent));
    let p224 = seq(&[b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x21"]);
    assert_eq!(with(&seq(&[&p224, &bit_string(&[4; 57])])), CsrError::Key(KeyError::Unsupported));
    let off_curve = crate::der::ec_spki(crate::x509::Curve::P256, &[7; 32], &[7; 32]);
    assert_eq!(with(&off_curve), CsrError::Signature(SignatureError::Mismatch));
}

#[test]
fn h_29_bytes_that_are_no_request() {
    assert_eq!(refused(b""), CsrError::Malformed);
    assert_eq!(refused(&vec![0; 5 << 20]), CsrError::TooLarge);
    let request = good(&new_key(), &[uri(ID)]);
    assert_eq!(refused(&[&request[..], &[0]].concat()), CsrError::TrailingData);
    assert_eq!(refused(request.get(..request.len() - 1).unwrap()), CsrError::Malformed);
}

#[test]
fn h_29_what_else_is_asked_for_is_ignored() {
    let key = new_key();
    let mut extensions = vec![uri(ID), basic(true, None), key_usage(CERT_SIGN)];
    extensions.extend((0..2000).map(|_| Extension(UNKNOWN, true, vec![5, 0])));
    let csr = Csr::parse(&good(&key, &extensions)).unwrap();
    assert_eq!(csr.verify_signature(), Ok(()));
    assert_eq!(csr.uris, [ID]);
    let ten_thousand = vec![Extension(UNKNOWN, true, vec![5, 0]); 10_000];
    assert_eq!(refused(&good(&key, &ten_thousand)), CsrError::TooLarge);
}

#[test]
fn h_29_several_and_unreadable_uris_stay_countable() {
    let entries: [(u8, &[u8]); 3] = [(URI, ID.as_bytes()), (URI, b"spiffe://example.org/b"), (URI, b"\xff")];
    let csr = Csr::parse(&good(&new_key(), &[names(&entries)])).unwrap();
    assert_eq!(csr.uris, [ID, "spiffe://example.org/b", "\u{fffd}"]);
}

#[test]
fn requests_of_other_libraries_and_keys_verify() {
    for kind in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
        let key = PrivateKey::generate(kind).unwrap();
        let pair = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(
            &key.expose_pkcs8().into(),
            match kind {
                KeyType::EcP256 => &rcgen::PKCS_ECDSA_P256_SHA256,
                KeyType::EcP384 => &rcgen::PKCS_ECDSA_P384_SHA384,
                _ => &rcgen::PKCS_RSA_SHA256,
            },
        )
        .unwrap();
        let params = rcgen::CertificateParams::new(vec!["a.test".to_owned()]).unwrap();
        let der = params.serialize_request(&pair).unwrap();
        let csr = Csr::parse(der.der()).unwrap();
        assert_eq!(csr.verify_signature(), Ok(()), "{kind}");
        assert_eq!(csr.dns_names, ["a.test"]);
        assert_eq!(csr.spki_der, key.public_key().spki_der());
    }
}

/// The parameter that names the curve may only be an object identifier; a parser took its bytes under any tag.
#[test]
fn found_by_fuzzing_keys_that_are_not_der() {
    let key = new_key();
    let spki = key.public_key().spki_der();
    let with = |spki: &[u8]| refused(&request(&key, spki, &[uri(ID)], ECDSA_SHA256));
    let curve = spki.windows(2).rposition(|pair| pair == b"\x06\x08").unwrap();
    let mut octets = spki.to_vec();
    octets[curve] = OCTETS;
    assert_eq!(with(&octets), CsrError::Key(KeyError::Malformed));

    let rsa = crate::der::rsa_spki(&[0xab; 256], &[1, 0, 1]);
    let null = rsa.windows(2).position(|pair| pair == b"\x05\x00").unwrap();
    let mut not_null = rsa.clone();
    not_null[null] = OCTETS;
    assert_eq!(with(&not_null), CsrError::Key(KeyError::Malformed));
}
