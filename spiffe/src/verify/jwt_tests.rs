use std::collections::HashMap;
use std::sync::Arc;

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::{rsa, signature as sig};
use base64::Engine as _;

use super::*;
use crate::JsonError;
use crate::bundle::Bundle;
use crate::id::{IdError, TrustDomain};
use crate::jwt::{Algorithm, JwtError, MAX_PART};
use crate::testing::*;
use crate::x509::{KeyType, PrivateKey};

const ID: &str = "spiffe://example.org/a";

fn claims() -> String {
    format!(r#"{{"sub":"{ID}","aud":["svc"],"exp":{},"iat":{NOW}}}"#, NOW + 300)
}

/// The good claims with one more member.
fn claims_and(member: &str) -> String {
    claims().replacen('{', &format!("{{{member},"), 1)
}

/// The good claims with one member replaced, or left out when `value` is empty.
fn claims_with(name: &str, value: &str) -> String {
    let mut members = vec![
        ("sub", format!("\"{ID}\"")),
        ("aud", r#"["svc"]"#.to_owned()),
        ("exp", (NOW + 300).to_string()),
        ("iat", NOW.to_string()),
    ];
    members.retain(|(known, _)| *known != name);
    if !value.is_empty() {
        members.push((name, value.to_owned()));
    }
    let members: Vec<String> = members.iter().map(|(name, value)| format!("\"{name}\":{value}")).collect();
    format!("{{{}}}", members.join(","))
}

struct Fixture {
    issuer: Issuer,
    bundle: Arc<Bundle>,
}

impl Fixture {
    fn new() -> Self {
        let issuer = Issuer::new("key-1");
        let bundle = issuer.bundle("example.org");
        Self { issuer, bundle }
    }

    fn verify(&self, token: &str) -> Result<VerifiedToken, VerifyError> {
        jwt_svid(token, "svc", &self.bundle, now())
    }

    /// Judges a token of this header and the good claims.
    fn header(&self, header: &str) -> Result<VerifiedToken, VerifyError> {
        self.verify(&self.issuer.token(header, &claims()))
    }

    /// Judges a token of the good header and these claims.
    fn payload(&self, payload: &str) -> Result<VerifiedToken, VerifyError> {
        self.verify(&self.issuer.token(&self.issuer.header(), payload))
    }

    fn header_fault(&self, header: &str) -> JwtError {
        fault(header, self.header(header))
    }

    fn payload_fault(&self, payload: &str) -> JwtError {
        fault(payload, self.payload(payload))
    }

    fn token_fault(&self, token: &str) -> JwtError {
        fault(token, self.verify(token))
    }
}

fn fault(what: &str, outcome: Result<VerifiedToken, VerifyError>) -> JwtError {
    match outcome {
        Err(VerifyError::Token(error)) => error,
        other => panic!("{:.200}: {other:?}", what),
    }
}

#[test]
fn a_good_token_is_described() {
    let fixture = Fixture::new();
    let token = fixture.payload(&claims_and(r#""example.org/role":"x""#)).unwrap();
    assert_eq!((token.id.as_str(), &*token.key_id), (ID, "key-1"));
    assert_eq!(token.audience, ["svc"]);
    assert_eq!(token.expires_at, at(NOW + 300));
    assert_eq!(token.claims.get("example.org/role"), Some(&"x".into()));
    assert_eq!(token.claims.len(), 5);
}

#[test]
fn jwt_04_jwt_05_all_nine_algorithms() {
    let rsa = PrivateKey::generate(KeyType::Rsa2048).unwrap();
    let pair = rsa::KeyPair::from_pkcs8(rsa.expose_pkcs8()).unwrap();
    for algorithm in Algorithm::ALL {
        let signed = format!(
            "{}.{}",
            base64url(format!(r#"{{"alg":"{algorithm}","kid":"k"}}"#).as_bytes()),
            base64url(claims().as_bytes())
        );
        let ec = |signing: &'static sig::EcdsaSigningAlgorithm| {
            let pair = sig::EcdsaKeyPair::generate(signing).unwrap();
            let signature = pair.sign(&SystemRandom::new(), signed.as_bytes()).unwrap().as_ref().to_vec();
            let key = PrivateKey::from_pkcs8(pair.to_pkcs8v1().unwrap().as_ref().to_vec()).unwrap();
            (key.public_key().spki_der().clone(), signature)
        };
        let by_rsa = |padding: &'static dyn sig::RsaEncoding| {
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(padding, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
            (rsa.public_key().spki_der().clone(), signature)
        };
        let (public_key, signature) = match algorithm {
            Algorithm::Es256 => ec(&sig::ECDSA_P256_SHA256_FIXED_SIGNING),
            Algorithm::Es384 => ec(&sig::ECDSA_P384_SHA384_FIXED_SIGNING),
            Algorithm::Es512 => ec(&sig::ECDSA_P521_SHA512_FIXED_SIGNING),
            Algorithm::Rs256 => by_rsa(&sig::RSA_PKCS1_SHA256),
            Algorithm::Rs384 => by_rsa(&sig::RSA_PKCS1_SHA384),
            Algorithm::Rs512 => by_rsa(&sig::RSA_PKCS1_SHA512),
            Algorithm::Ps256 => by_rsa(&sig::RSA_PSS_SHA256),
            Algorithm::Ps384 => by_rsa(&sig::RSA_PSS_SHA384),
            Algorithm::Ps512 => by_rsa(&sig::RSA_PSS_SHA512),
        };
        let mut bundle = Bundle::empty(trust_domain("example.org"));
        bundle.jwt.push(JwtAuthority { key_id: "k".into(), public_key, expires_at: None, tainted: false });
        let token = format!("{signed}.{}", base64url(&signature));
        assert_eq!(jwt_svid(&token, "svc", &bundle, now()).unwrap().id.as_str(), ID, "{algorithm}");
    }
}

#[test]
fn jwt_06_d_05_a_token_without_key_id() {
    let fixture = Fixture::new();
    let token = fixture.issuer.token(r#"{"alg":"ES256"}"#, &claims());
    assert_eq!(&*fixture.verify(&token).unwrap().key_id, "key-1");
    // The right key among others is found, up to a limit of keys that are tried.
    let with_strangers = |count: usize| {
        let mut bundle = Bundle::clone(&fixture.bundle);
        let strangers = (0..count).map(|n| Issuer::new(&format!("stranger-{n}")).authority());
        bundle.jwt.splice(0..0, strangers);
        jwt_svid(&token, "svc", &bundle, now())
    };
    assert!(with_strangers(15).is_ok());
    assert!(matches!(with_strangers(16), Err(VerifyError::Signature)));
}

#[test]
fn jwt_07_type() {
    let fixture = Fixture::new();
    for typ in ["JWT", "JOSE"] {
        assert!(fixture.header(&format!(r#"{{"alg":"ES256","typ":"{typ}"}}"#)).is_ok());
    }
    assert!(fixture.header(r#"{"alg":"ES256"}"#).is_ok());
}

#[test]
fn jwt_13_d_09_expiry_with_leeway() {
    let fixture = Fixture::new();
    let expires = |offset: i64| fixture.payload(&claims_with("exp", &(NOW + offset).to_string()));
    assert!(expires(5).is_ok() && expires(-60).is_ok());
    assert!(matches!(expires(-61), Err(VerifyError::Expired)));
}

#[test]
fn jwt_20_jwt_21_only_jwt_keys_count() {
    let fixture = Fixture::new();
    let mut bundle = Bundle::clone(&fixture.bundle);
    bundle.jwt.clear();
    let root = Authority::root("example.org");
    bundle.x509.clone_from(&root.bundle("example.org").x509);
    let token = fixture.issuer.token(&fixture.issuer.header(), &claims());
    assert!(matches!(jwt_svid(&token, "svc", &bundle, now()), Err(VerifyError::UnknownKey)));
    let by_root = Issuer { key: root.key, key_id: "root".to_owned() };
    let token = by_root.token(r#"{"alg":"ES256"}"#, &claims());
    assert!(matches!(jwt_svid(&token, "svc", &bundle, now()), Err(VerifyError::UnknownKey)));
}

#[test]
fn jwt_22_a_token_may_be_used_twice() {
    let fixture = Fixture::new();
    let token = fixture.issuer.token(&fixture.issuer.header(), &claims_and(r#""jti":"1""#));
    assert!(fixture.verify(&token).is_ok() && fixture.verify(&token).is_ok());
}

#[test]
fn keys_end_at_their_expiry() {
    let fixture = Fixture::new();
    let mut bundle = Bundle::clone(&fixture.bundle);
    let token = fixture.issuer.token(&fixture.issuer.header(), &claims());
    let mut with_end = |end: i64| {
        bundle.jwt[0].expires_at = Some(at(end));
        jwt_svid(&token, "svc", &bundle, now()).map(|_| ())
    };
    assert!(with_end(NOW - 60).is_ok());
    assert!(matches!(with_end(NOW - 61), Err(VerifyError::UnknownKey)));
}

#[test]
fn h_31_no_algorithm() {
    let fixture = Fixture::new();
    for alg in [r#""none""#, r#""None""#, r#""NONE""#, r#""nOnE""#, r#""""#, "null", r#"["ES256"]"#] {
        let header = format!(r#"{{"alg":{alg},"kid":"key-1"}}"#);
        assert_eq!(fixture.header_fault(&header), JwtError::Algorithm, "{alg}");
        let unsigned = format!("{}.{}.", base64url(header.as_bytes()), base64url(claims().as_bytes()));
        assert_eq!(fixture.token_fault(&unsigned), JwtError::Algorithm, "{alg}");
    }
    assert_eq!(fixture.header_fault(r#"{"kid":"key-1"}"#), JwtError::Algorithm);
}

#[test]
fn h_32_symmetric_algorithms_keyed_with_the_public_key() {
    let fixture = Fixture::new();
    let spki = fixture.issuer.key.public_key().spki_der();
    let pem = pem::encode(&pem::Pem::new("PUBLIC KEY", spki.to_vec()));
    let jwks = fixture.bundle.to_workload_jwks();
    for secret in [pem.as_bytes(), &spki[..], jwks.as_bytes()] {
        let signed = format!("{}.{}", base64url(br#"{"alg":"HS256","kid":"key-1"}"#), base64url(claims().as_bytes()));
        let key = aws_lc_rs::hmac::Key::new(aws_lc_rs::hmac::HMAC_SHA256, secret);
        let tag = aws_lc_rs::hmac::sign(&key, signed.as_bytes());
        let token = format!("{signed}.{}", base64url(tag.as_ref()));
        assert_eq!(fixture.token_fault(&token), JwtError::Algorithm);
    }
}

#[test]
fn h_33_other_algorithms_and_other_kinds_of_keys() {
    let fixture = Fixture::new();
    for alg in ["EdDSA", "Ed25519", "ES256K", "ML-DSA-44", "RSA-OAEP", "es256", "ES256 "] {
        let header = format!(r#"{{"alg":"{alg}","kid":"key-1"}}"#);
        assert_eq!(fixture.header_fault(&header), JwtError::Algorithm, "{alg}");
    }
    for alg in ["ES384", "RS256", "PS256", "ES512"] {
        let outcome = fixture.header(&format!(r#"{{"alg":"{alg}","kid":"key-1"}}"#));
        assert!(matches!(outcome, Err(VerifyError::UnknownKey)), "{alg}: {outcome:?}");
    }
    let rsa = PrivateKey::generate(KeyType::Rsa2048).unwrap();
    let pair = rsa::KeyPair::from_pkcs8(rsa.expose_pkcs8()).unwrap();
    let signed = format!("{}.{}", base64url(br#"{"alg":"PS256"}"#), base64url(claims().as_bytes()));
    let mut signature = vec![0; pair.public_modulus_len()];
    pair.sign(&sig::RSA_PKCS1_SHA256, &SystemRandom::new(), signed.as_bytes(), &mut signature).unwrap();
    let mut bundle = Bundle::empty(trust_domain("example.org"));
    let public_key = rsa.public_key().spki_der().clone();
    bundle.jwt.push(JwtAuthority { key_id: "r".into(), public_key, expires_at: None, tainted: false });
    let outcome = jwt_svid(&format!("{signed}.{}", base64url(&signature)), "svc", &bundle, now());
    assert!(matches!(outcome, Err(VerifyError::Signature)), "{outcome:?}");
}

#[test]
fn h_34_critical_header_members() {
    let fixture = Fixture::new();
    for member in
        [r#""crit":["exp"]"#, r#""crit":["b64"],"b64":false"#, r#""crit":[]"#, r#""crit":"exp""#, r#""crit":["x"]"#]
    {
        let header = format!(r#"{{"alg":"ES256","kid":"key-1",{member}}}"#);
        assert_eq!(fixture.header_fault(&header), JwtError::HeaderMember, "{member}");
    }
    let twice = r#"{"alg":"ES256","crit":["x"],"crit":["x"]}"#;
    assert_eq!(fixture.header_fault(twice), JwtError::Json(JsonError::DuplicateMember));
}

#[test]
fn h_35_d_06_types_and_foreign_header_members() {
    let fixture = Fixture::new();
    for typ in [r#""jwt""#, r#""at+jwt""#, r#""wit+jwt""#, r#""wpt+jwt""#, r#""application/jwt""#, r#""""#, "null", "1"]
    {
        let header = format!(r#"{{"alg":"ES256","kid":"key-1","typ":{typ}}}"#);
        assert_eq!(fixture.header_fault(&header), JwtError::Type, "{typ}");
    }
    for member in [
        r#""jku":"https://evil.test/k""#,
        r#""x5u":"https://evil.test/c""#,
        r#""jwk":{}"#,
        r#""x5c":[]"#,
        r#""x5t":"""#,
        r#""cty":"JWT""#,
    ] {
        let header = format!(r#"{{"alg":"ES256","kid":"key-1",{member}}}"#);
        assert_eq!(fixture.header_fault(&header), JwtError::HeaderMember, "{member}");
    }
}

#[test]
fn h_36_jwt_12_jwt_14_expiry() {
    let fixture = Fixture::new();
    for exp in ["", "null", r#""2000000000""#, "true", "[]", "9223372036854775807", "9223372036854775808"] {
        assert_eq!(fixture.payload_fault(&claims_with("exp", exp)), JwtError::Expiry, "{exp}");
    }
    assert_eq!(fixture.payload_fault(&claims_with("exp", "-9223372036854775808")), JwtError::Expiry);
    for exp in ["1e300", "18446744073709551616"] {
        let error = fixture.payload_fault(&claims_with("exp", exp));
        assert_eq!(error, JwtError::Json(JsonError::InexactNumber), "{exp}");
    }
    let nan = fixture.payload_fault(&claims_with("exp", "NaN"));
    assert!(matches!(nan, JwtError::Json(JsonError::Syntax { .. })), "{nan:?}");
    for exp in ["0".to_owned(), "-1".to_owned(), (NOW - 61).to_string()] {
        let outcome = fixture.payload(&claims_with("exp", &exp));
        assert!(matches!(outcome, Err(VerifyError::Expired)), "{exp}: {outcome:?}");
    }
    for exp in [(NOW + 1).to_string(), format!("{NOW}.5"), "253402300799".to_owned(), "4e9".to_owned()] {
        assert!(fixture.payload(&claims_with("exp", &exp)).is_ok(), "{exp}");
    }
}

#[test]
fn h_37_jwt_15_d_17_not_before_and_issued_at() {
    let fixture = Fixture::new();
    let outcome = fixture.payload(&claims_with("nbf", &(NOW + 61).to_string()));
    assert!(matches!(outcome, Err(VerifyError::NotYetValid)), "{outcome:?}");
    assert!(fixture.payload(&claims_with("nbf", &(NOW + 60).to_string())).is_ok());
    assert!(fixture.payload(&claims_with("nbf", "-1")).is_ok());
    assert_eq!(fixture.payload_fault(&claims_with("nbf", r#""1""#)), JwtError::Date);
    assert!(fixture.payload(&claims_with("iat", &(NOW + 3600).to_string())).is_ok());
    assert!(fixture.payload(&claims_with("iat", "-1")).is_ok());
    assert_eq!(fixture.payload_fault(&claims_with("iat", r#""1""#)), JwtError::Date);
    assert_eq!(fixture.payload_fault(&claims_with("iat", "9223372036854775808")), JwtError::Date);
}

#[test]
fn h_38_jwt_09_jwt_10_jwt_23_audience() {
    let fixture = Fixture::new();
    for aud in ["", "null", "[]", "[1]", r#"["svc",1]"#, "{}"] {
        assert_eq!(fixture.payload_fault(&claims_with("aud", aud)), JwtError::Audience, "{aud}");
    }
    for aud in [r#""""#, r#"[""]"#, r#""other""#, r#"["other"]"#, r#""SVC""#, r#""svc ""#] {
        let outcome = fixture.payload(&claims_with("aud", aud));
        assert!(matches!(outcome, Err(VerifyError::Audience)), "{aud}: {outcome:?}");
    }
    for aud in [r#""svc""#, r#"["svc"]"#, r#"["other","svc"]"#] {
        assert!(fixture.payload(&claims_with("aud", aud)).is_ok(), "{aud}");
    }
    // How many are looked at is limited by the length of the payload, which is judged before it is decoded.
    let many = |count: usize| claims_with("aud", &format!(r#"[{}"svc"]"#, r#""b","#.repeat(count - 1)));
    let most = (MAX_PART - many(1).len()) / 4 + 1;
    assert!(most > 10_000);
    for count in [10_000, most] {
        let verified = fixture.payload(&many(count)).unwrap();
        assert_eq!((verified.audience.len(), verified.audience.last().unwrap().as_str()), (count, "svc"));
    }
    assert_eq!(fixture.payload_fault(&many(most + 1)), JwtError::TooLong);
    let empty = fixture.issuer.token(&fixture.issuer.header(), &claims_with("aud", r#""""#));
    assert!(matches!(jwt_svid(&empty, "", &fixture.bundle, now()), Err(VerifyError::Audience)));
}

#[test]
fn h_39_repeated_members() {
    let fixture = Fixture::new();
    let twice = JwtError::Json(JsonError::DuplicateMember);
    for member in [
        r#""sub":"spiffe://example.org/evil""#,
        r#""su\u0062":"spiffe://example.org/evil""#,
        r#""exp":4000000000"#,
        r#""aud":"svc""#,
    ] {
        assert_eq!(fixture.payload_fault(&claims_and(member)), twice, "{member}");
        let behind = claims().replacen('}', &format!(",{member}}}"), 1);
        assert_eq!(fixture.payload_fault(&behind), twice, "{member}");
    }
    assert_eq!(fixture.payload_fault(&claims_and(r#""x":{"y":1,"y":2}"#)), twice);
    for header in [r#"{"alg":"ES256","alg":"ES256"}"#, r#"{"alg":"ES256","kid":"key-1","kid":"key-1"}"#] {
        assert_eq!(fixture.header_fault(header), twice, "{header}");
    }
}

#[test]
fn h_40_d_18_subject() {
    let fixture = Fixture::new();
    for sub in ["", "1", "null", r#"["spiffe://example.org/a"]"#] {
        assert_eq!(fixture.payload_fault(&claims_with("sub", sub)), JwtError::Subject, "{sub}");
    }
    for (sub, error) in [
        ("", JwtError::Id(IdError::Empty)),
        ("example.org/a", JwtError::Id(IdError::Scheme)),
        ("wimse://example.org/a", JwtError::Id(IdError::Scheme)),
        ("spiffe://example.org", JwtError::NoPath),
        ("SPIFFE://example.org/a", JwtError::Id(IdError::Scheme)),
        ("spiffe://EXAMPLE.org/a", JwtError::Id(IdError::TrustDomainCharacter)),
        ("spiffe://example.org/a\\n", JwtError::Id(IdError::PathCharacter)),
        ("spiffe://example.org/%61", JwtError::Id(IdError::PathCharacter)),
        ("spiffe://example.org/a/../b", JwtError::Id(IdError::DotSegment)),
        ("spiffe://example.org/a/", JwtError::Id(IdError::TrailingSlash)),
        ("spiffe://example.org/a?", JwtError::Id(IdError::PathCharacter)),
        ("spiffe://u@example.org/a", JwtError::Id(IdError::TrustDomainCharacter)),
        ("spiffe://bücher.test/a", JwtError::Id(IdError::TrustDomainCharacter)),
        ("spiffe://example.org/~", JwtError::Id(IdError::PathCharacter)),
    ] {
        assert_eq!(fixture.payload_fault(&claims_with("sub", &format!("\"{sub}\""))), error, "{sub}");
    }
    let outcome = fixture.payload(&claims_with("sub", r#""spiffe://evil.test/a""#));
    assert!(matches!(outcome, Err(VerifyError::UnknownTrustDomain)), "{outcome:?}");
}

#[test]
fn h_41_key_ids_are_looked_up_in_the_subjects_domain_only() {
    let (own, foreign) = (Issuer::new("same"), Issuer::new("same"));
    let only_foreign = Issuer::new("foreign");
    let mut other = Bundle::clone(&foreign.bundle("other.test"));
    other.jwt.push(only_foreign.authority());
    let both: HashMap<TrustDomain, Arc<Bundle>> =
        [own.bundle("example.org"), Arc::new(other)].map(|bundle| (bundle.trust_domain.clone(), bundle)).into();
    let verify = |token: String| jwt_svid(&token, "svc", &both, now());
    let in_other = claims_with("sub", r#""spiffe://other.test/a""#);

    assert!(verify(own.token(&own.header(), &claims())).is_ok());
    assert!(verify(foreign.token(&foreign.header(), &in_other)).is_ok());
    for token in [own.token(&own.header(), &in_other), foreign.token(&foreign.header(), &claims())] {
        assert!(matches!(verify(token), Err(VerifyError::Signature)));
    }
    let foreign_id = own.token(&only_foreign.header(), &claims());
    assert!(matches!(verify(foreign_id), Err(VerifyError::UnknownKey)));
    for kid in ["../../etc/passwd", "' OR 1=1", "SAME", "same "] {
        let token = own.token(&format!(r#"{{"alg":"ES256","kid":"{kid}"}}"#), &claims());
        assert!(matches!(verify(token), Err(VerifyError::UnknownKey)), "{kid}");
    }
    let fixture = Fixture::new();
    for kid in [r#""""#, "1", "null"] {
        assert_eq!(fixture.header_fault(&format!(r#"{{"alg":"ES256","kid":{kid}}}"#)), JwtError::KeyId, "{kid}");
    }
    let long = format!(r#"{{"alg":"ES256","kid":"{}"}}"#, "k".repeat(1 << 20));
    assert_eq!(fixture.header_fault(&long), JwtError::TooLong);
}

#[test]
fn h_42_jwt_01_jwt_02_structure() {
    let fixture = Fixture::new();
    let good = fixture.issuer.token(&fixture.issuer.header(), &claims());
    let parts: Vec<&str> = good.split('.').collect();
    let [header, payload, signature] = parts.as_slice() else { panic!() };
    for token in [
        String::new(),
        ".".to_owned(),
        format!("{header}.{payload}"),
        format!("{good}.{signature}"),
        format!("{good}.{signature}.{signature}"),
        format!(r#"{{"payload":"{payload}","signatures":[{{"protected":"{header}","signature":"{signature}"}}]}}"#),
    ] {
        let expected = if token == "." { JwtError::Structure } else { fixture.token_fault(&token) };
        assert_eq!(expected, JwtError::Structure, "{token}");
    }
    assert!(matches!(fixture.token_fault(".."), JwtError::Json(JsonError::Syntax { .. })));
    for token in [
        format!("{header}=.{payload}.{signature}"),
        format!("{header}.{payload}.{signature}=="),
        format!(" {good}"),
        format!("{good}\n"),
        format!("{header}.{payload}\n.{signature}"),
    ] {
        assert_eq!(fixture.token_fault(&token), JwtError::Base64, "{token}");
    }
    // The same bytes in the alphabet with + and /.
    let bytes = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(signature).unwrap();
    let mut tail = bytes.clone();
    tail[..3].copy_from_slice(&[0xfb, 0xff, 0xfe]);
    let standard = base64::engine::general_purpose::STANDARD_NO_PAD.encode(tail);
    assert_eq!(fixture.token_fault(&format!("{header}.{payload}.{standard}")), JwtError::Base64);
    // 64 bytes leave four unused bits in the last of 86 characters.
    let last = signature.chars().last().unwrap();
    let alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let next = alphabet.chars().nth(alphabet.find(last).unwrap() + 1).unwrap();
    let loose = format!("{}{next}", &signature[..signature.len() - 1]);
    assert_eq!(fixture.token_fault(&format!("{header}.{payload}.{loose}")), JwtError::Base64);

    let bom = format!("\u{feff}{}", fixture.issuer.header());
    assert!(matches!(fixture.header_fault(&bom), JwtError::Json(JsonError::Syntax { .. })));
    let trailing = format!("{}{{}}", claims());
    assert!(matches!(fixture.payload_fault(&trailing), JwtError::Json(JsonError::Syntax { .. })));
    for payload in ["null", "[]", "1", r#""x""#] {
        assert_eq!(fixture.payload_fault(payload), JwtError::NotAnObject, "{payload}");
    }
}

#[test]
fn h_43_long_tokens_are_refused_before_they_are_decoded() {
    let fixture = Fixture::new();
    for size in [1 << 20, 3_900_000] {
        assert_eq!(fixture.token_fault(&format!("{}.a.a", "!".repeat(size))), JwtError::TooLong);
        assert_eq!(fixture.token_fault(&format!("a.{}.a", "!".repeat(size))), JwtError::TooLong);
        assert_eq!(fixture.token_fault(&format!("a.a.{}", "!".repeat(size))), JwtError::TooLong);
    }
    // Not base64url, so whoever had begun to decode would have said so; as for the longest that is decoded.
    let longest = (MAX_PART * 4).div_ceil(3);
    for (length, expected) in [(longest, JwtError::Base64), (longest + 1, JwtError::TooLong)] {
        assert_eq!(fixture.token_fault(&format!("{}.a.a", "!".repeat(length))), expected);
    }
    let full = claims_and(&format!("\"x\":\"{}\"", "x".repeat(MAX_PART - claims_and("\"x\":\"\"").len())));
    assert_eq!(full.len(), MAX_PART);
    assert_eq!(fixture.payload(&full).unwrap().id.as_str(), ID);
    assert_eq!(fixture.payload_fault(&full.replacen('x', "xx", 1)), JwtError::TooLong);
    let long_header = format!(r#"{{"alg":"ES256","kid":"{}"}}"#, "k".repeat(1 << 20));
    assert_eq!(fixture.header_fault(&long_header), JwtError::TooLong);
}

#[test]
fn h_44_jwt_25_signature_forms() {
    let fixture = Fixture::new();
    let good = fixture.issuer.token(&fixture.issuer.header(), &claims());
    let (signed, signature) = good.rsplit_once('.').unwrap();
    let signature = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(signature).unwrap();
    let judge = |signature: &[u8]| fixture.verify(&format!("{signed}.{}", base64url(signature)));
    let order = {
        let digits = "ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551";
        (0..32).map(|n| u8::from_str_radix(&digits[2 * n..2 * n + 2], 16).unwrap()).collect::<Vec<u8>>()
    };
    let (r, s) = signature.split_at(32);
    let zero = [0; 32];
    for (case, bytes) in [
        ("DER", crate::der::ecdsa_signature(r, s)),
        ("63 bytes", signature[..63].to_vec()),
        ("65 bytes", [&signature[..], &[0]].concat()),
        ("none", Vec::new()),
        ("128 bytes", [&signature[..], &signature[..]].concat()),
        ("r = 0", [&zero, s].concat()),
        ("s = 0", [r, &zero].concat()),
        ("r = n", [&order, s].concat()),
        ("all zero", [zero, zero].concat()),
    ] {
        assert!(matches!(judge(&bytes), Err(VerifyError::Signature)), "{case}");
    }
    // n - s is as good as s: the one of both that is high is accepted as well.
    let mut other = vec![0_u8; 32];
    let mut borrow = 0_i16;
    for index in (0..32).rev() {
        let digit = i16::from(order[index]) - i16::from(s[index]) - borrow;
        borrow = i16::from(digit < 0);
        other[index] = u8::try_from(digit.rem_euclid(256)).unwrap();
    }
    assert!(judge(&[r, &other].concat()).is_ok());
    assert!(judge(&signature).is_ok());
}

#[test]
fn h_45_every_flipped_bit_is_noticed() {
    let fixture = Fixture::new();
    let good = fixture.issuer.token(&fixture.issuer.header(), &claims());
    assert!(fixture.verify(&good).is_ok());
    let signature = good.rfind('.').unwrap() + 1;
    for position in 0..good.len() {
        for bit in 0..8 {
            let mut bytes = good.clone().into_bytes();
            bytes[position] ^= 1 << bit;
            // What is no text any more never reaches the verifier.
            let Ok(flipped) = String::from_utf8(bytes) else { continue };
            let refusal = fixture.verify(&flipped).expect_err(&format!("bit {bit} of byte {position}"));
            // Header and payload can become anything; of the signature only its form or the key can complain.
            let of_signature =
                matches!(refusal, VerifyError::Signature | VerifyError::Token(JwtError::Base64 | JwtError::Structure));
            assert!(position < signature || of_signature, "bit {bit} of byte {position}: {refusal:?}");
        }
    }
}

#[test]
fn h_46_hostile_payloads() {
    let fixture = Fixture::new();
    let nested = |depth: usize| claims_and(&format!("\"x\":{}{}", "[".repeat(depth), "]".repeat(depth)));
    for depth in [128, 10_000] {
        let error = fixture.payload_fault(&nested(depth));
        assert!(matches!(error, JwtError::Json(JsonError::Syntax { .. })), "{depth}: {error:?}");
    }
    assert!(fixture.payload(&nested(100)).is_ok());
    for value in ["1e400", r#""\ud800""#, r#""\udc00\ud800""#] {
        let error = fixture.payload_fault(&claims_and(&format!("\"x\":{value}")));
        assert!(matches!(error, JwtError::Json(JsonError::Syntax { .. })), "{value}: {error:?}");
    }
    let read = |value: &str| fixture.payload(&claims_and(&format!("\"x\":{value}"))).unwrap().claims["x"].clone();
    assert_eq!(read("9007199254740992"), serde_json::json!(9_007_199_254_740_992_u64));
    assert_eq!(read("9007199254740993"), serde_json::json!("9007199254740993"));
    assert_eq!(read("[-9007199254740993]"), serde_json::json!(["-9007199254740993"]));
    assert_eq!(read(r#"{"y":18446744073709551615}"#), serde_json::json!({"y": "18446744073709551615"}));
    let error = fixture.payload_fault(&claims_and("\"x\":123456789012345678901234567890"));
    assert_eq!(error, JwtError::Json(JsonError::InexactNumber));
    let many: Vec<String> = (0..5000).map(|n| format!("\"m{n}\":0")).collect();
    let verified = fixture.payload(&claims_and(&many.join(","))).unwrap();
    assert_eq!(verified.claims.len(), 5004);
    let verified = fixture.payload(&claims_and(r#""__proto__":{"admin":true}"#)).unwrap();
    assert_eq!(verified.claims["__proto__"], serde_json::json!({"admin": true}));
    let text = "x".repeat(60 << 10);
    assert_eq!(
        fixture.payload(&claims_and(&format!("\"x\":\"{text}\""))).unwrap().claims["x"],
        serde_json::json!(text)
    );
}
