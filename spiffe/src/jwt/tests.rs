use super::*;
use crate::testing::*;

#[test]
fn jwt_03_jwt_08_jwt_24_what_is_issued_is_read_back() {
    let issuer = Issuer::new("key-1");
    let header = encoded_header(Algorithm::Es256, "key-1");
    let mut claims = Map::new();
    claims.insert("sub".to_owned(), "spiffe://example.org/a".into());
    claims.insert("aud".to_owned(), vec!["svc"].into());
    claims.insert("exp".to_owned(), NOW.into());
    let input = signing_input(&header, &claims).unwrap();
    let signature = issuer.sign(input.as_bytes());
    let token = with_signature(input, &signature);

    let parts: Vec<Vec<u8>> = token.split('.').map(|part| BASE64URL.decode(part).unwrap()).collect();
    assert_eq!(parts[0], br#"{"alg":"ES256","kid":"key-1","typ":"JWT"}"#);
    let expected = format!(r#"{{"sub":"spiffe://example.org/a","aud":["svc"],"exp":{NOW}}}"#);
    assert_eq!(parts[1], expected.as_bytes());

    let read = Unverified::parse(&token).unwrap();
    assert_eq!((read.algorithm, read.key_id.as_deref()), (Algorithm::Es256, Some("key-1")));
    assert_eq!(read.claims.sub.as_str(), "spiffe://example.org/a");
    assert_eq!((read.claims.exp, read.claims.nbf, read.claims.iat), (at(NOW), None, None));
    assert!(crate::verify::jwt_svid(&token, "svc", &issuer.bundle("example.org"), now()).is_ok());
}

#[test]
fn key_ids_are_escaped_in_headers() {
    let header = BASE64URL.decode(encoded_header(Algorithm::Rs256, "a\"b")).unwrap();
    assert_eq!(header, br#"{"alg":"RS256","kid":"a\"b","typ":"JWT"}"#);
}

#[test]
fn jwt_04_each_kind_of_key_signs_with_its_algorithm() {
    use crate::x509::{KeyType, PrivateKey};
    let algorithm_of = |kind| {
        let key = PrivateKey::generate(kind).unwrap();
        JwtKey::from_pkix(key.public_key().spki_der()).unwrap().signing_algorithm()
    };
    assert_eq!(algorithm_of(KeyType::EcP256), Some(Algorithm::Es256));
    assert_eq!(algorithm_of(KeyType::EcP384), Some(Algorithm::Es384));
    assert_eq!(algorithm_of(KeyType::Rsa2048), Some(Algorithm::Rs256));
}

#[test]
fn weak_authorities_are_refused() {
    let weak = Bytes::from(crate::der::rsa_spki(&[0xab; 128], &[1, 0, 1]));
    assert_eq!(JwtKey::from_pkix(&weak), Err(KeyError::RsaSize { bits: 1024 }));
    assert_eq!(JwtKey::from_pkix(&Bytes::from_static(b"x")), Err(KeyError::Malformed));
}

#[test]
fn a_key_verifies_only_its_own_algorithm() {
    let issuer = Issuer::new("k");
    let key = JwtKey::from_pkix(issuer.key.public_key().spki_der()).unwrap();
    let signature = issuer.sign(b"message");
    assert_eq!(key.verify(Algorithm::Es256, b"message", &signature), Ok(()));
    assert_eq!(key.verify(Algorithm::Es256, b"massage", &signature), Err(SignatureError::Mismatch));
    assert_eq!(key.verify(Algorithm::Es384, b"message", &signature), Err(SignatureError::Algorithm));
}
