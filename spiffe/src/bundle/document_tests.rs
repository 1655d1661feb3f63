use serde_json::json;

use super::*;
use crate::JsonError;
use crate::testing::*;

const DOMAIN: &str = "other.test";

fn read(document: &str) -> Result<(Bundle, Vec<BundleWarning>), BundleError> {
    Bundle::from_spiffe_json(trust_domain(DOMAIN), document.as_bytes())
}

fn read_keys(keys: &[Value]) -> Result<(Bundle, Vec<BundleWarning>), BundleError> {
    read(&json!({"keys": keys, "spiffe_sequence": 10}).to_string())
}

fn bundle_of(authority: &Authority, issuer: &Issuer) -> Bundle {
    let mut bundle = Bundle::clone(&authority.bundle(DOMAIN));
    bundle.jwt.push(issuer.authority());
    bundle.sequence = 10;
    bundle.refresh_hint = Some(Duration::from_secs(300));
    bundle
}

/// One good X.509 element and one good JWT element.
fn elements() -> [Value; 2] {
    let bundle = bundle_of(&Authority::root(DOMAIN), &Issuer::new("key-1"));
    let document: Value = serde_json::from_str(&bundle.to_spiffe_json()).unwrap();
    [document["keys"][0].clone(), document["keys"][1].clone()]
}

fn changed(element: &Value, member: &str, value: Value) -> Value {
    let mut element = element.clone();
    element[member] = value;
    element
}

fn without(element: &Value, member: &str) -> Value {
    let mut element = element.clone();
    element.as_object_mut().unwrap().shift_remove(member);
    element
}

/// Reads a good element of the other kind and `hostile` after it.
fn beside(good: &Value, hostile: Value) -> Result<(Bundle, Vec<BundleWarning>), BundleError> {
    read_keys(&[good.clone(), hostile])
}

fn ignored(outcome: Result<(Bundle, Vec<BundleWarning>), BundleError>, why: IgnoreReason) {
    let (bundle, warnings) = outcome.unwrap();
    assert_eq!(bundle.x509.len() + bundle.jwt.len(), 1);
    assert_eq!(warnings, [BundleWarning::Ignored { index: 1, why }]);
}

fn malformed(outcome: Result<(Bundle, Vec<BundleWarning>), BundleError>) {
    assert!(matches!(outcome, Err(BundleError::Element { index: 1 })), "{outcome:?}");
}

#[test]
fn bnd_01_bnd_03_bnd_07_bnd_15_the_document_has_a_fixed_form() {
    let (authority, issuer) = (Authority::root(DOMAIN), Issuer::new("key-1"));
    let bundle = bundle_of(&authority, &issuer);
    let coordinates = |key: &crate::x509::PublicKey| {
        let (x, y) = key.raw()[1..].split_at(32);
        (base64url(x), base64url(y))
    };
    let (ca_x, ca_y) = coordinates(authority.key.public_key());
    let (jwt_x, jwt_y) = coordinates(issuer.key.public_key());
    let certificate = BASE64.encode(&authority.certificate);
    let expected = format!(
        r#"{{
    "keys": [
        {{
            "use": "x509-svid",
            "kty": "EC",
            "crv": "P-256",
            "x": "{ca_x}",
            "y": "{ca_y}",
            "x5c": [
                "{certificate}"
            ]
        }},
        {{
            "use": "jwt-svid",
            "kty": "EC",
            "kid": "key-1",
            "crv": "P-256",
            "x": "{jwt_x}",
            "y": "{jwt_y}"
        }}
    ],
    "spiffe_sequence": 10,
    "spiffe_refresh_hint": 300
}}"#
    );
    assert_eq!(bundle.to_spiffe_json(), expected);
    let (back, warnings) = read(&expected).unwrap();
    assert_eq!((back, warnings), (bundle, Vec::new()));
}

#[test]
fn the_workload_api_gets_jwt_keys_only_and_no_use() {
    let bundle = bundle_of(&Authority::root(DOMAIN), &Issuer::new("key-1"));
    let document: Value = serde_json::from_str(&bundle.to_workload_jwks()).unwrap();
    let members: Vec<&String> = document["keys"][0].as_object().unwrap().keys().collect();
    assert_eq!(members, ["kty", "kid", "crv", "x", "y"]);
    assert_eq!(document.as_object().unwrap().len(), 1);
    assert_eq!(document["keys"].as_array().unwrap().len(), 1);
    assert_eq!(Bundle::empty(trust_domain(DOMAIN)).to_workload_jwks(), "{\n    \"keys\": []\n}");
    assert_eq!(Bundle::empty(trust_domain(DOMAIN)).to_spiffe_json(), "{\n    \"keys\": []\n}");
}

#[test]
fn x509_34_rsa_keys_have_n_and_e() {
    use crate::x509::{KeyType, PrivateKey};
    let key = PrivateKey::generate(KeyType::Rsa2048).unwrap();
    let mut bundle = Bundle::empty(trust_domain(DOMAIN));
    let public_key = key.public_key().spki_der().clone();
    bundle.jwt.push(JwtAuthority { key_id: "r".into(), public_key, expires_at: None, tainted: false });
    let document: Value = serde_json::from_str(&bundle.to_spiffe_json()).unwrap();
    assert_eq!((&document["keys"][0]["kty"], &document["keys"][0]["e"]), (&json!("RSA"), &json!("AQAB")));
    assert_eq!(document["keys"][0]["n"].as_str().unwrap().len(), 342);
    assert_eq!(read(&bundle.to_spiffe_json()).unwrap().0, bundle);
}

#[test]
fn x509_30_one_element_for_each_authority() {
    let mut bundle = Bundle::clone(&Authority::root(DOMAIN).bundle(DOMAIN));
    bundle.x509.extend(Authority::root(DOMAIN).bundle(DOMAIN).x509.clone());
    let document: Value = serde_json::from_str(&bundle.to_spiffe_json()).unwrap();
    assert_eq!(document["keys"].as_array().unwrap().len(), 2);
    assert_eq!(read(&bundle.to_spiffe_json()).unwrap().0, bundle);
}

#[test]
fn bnd_02_other_members_of_the_document_do_not_matter() {
    let [x509, _] = elements();
    let (bundle, warnings) = read(&json!({"keys": [x509], "x": 1}).to_string()).unwrap();
    assert_eq!((bundle.x509.len(), bundle.sequence, bundle.refresh_hint), (1, 0, None));
    assert!(warnings.is_empty());
}

#[test]
fn h_52_bnd_09_what_is_no_bundle_is_not_an_empty_bundle() {
    for document in [r#"{}"#, r#"{"spiffe_sequence":9}"#, r#"{"keys":null}"#, r#"{"keys":{}}"#, r#"{"keys":"x"}"#] {
        assert!(matches!(read(document), Err(BundleError::NoKeys)), "{document}");
    }
    for document in ["null", "[]", r#""""#] {
        assert!(matches!(read(document), Err(BundleError::NotAnObject)), "{document}");
    }
    assert!(matches!(read(r#"{"keys":[1]}"#), Err(BundleError::Element { index: 0 })));
    let utf16: Vec<u8> = "{\"keys\":[]}".encode_utf16().flat_map(u16::to_le_bytes).collect();
    for bytes in
        [b"".as_slice(), b"<!doctype html>", &utf16, b"{\"keys\":[],\"x\":\"\xff\"}", b"\xef\xbb\xbf{\"keys\":[]}"]
    {
        let outcome = Bundle::from_spiffe_json(trust_domain(DOMAIN), bytes);
        assert!(matches!(outcome, Err(BundleError::Json(JsonError::Syntax { .. }))), "{outcome:?}");
    }
}

#[test]
fn h_53_bnd_10_bnd_11_a_bundle_may_be_empty() {
    let (bundle, warnings) = read(r#"{"keys":[],"spiffe_sequence":11}"#).unwrap();
    assert!(bundle.is_empty() && warnings.is_empty());
    assert_eq!(bundle.sequence, 11);
    let [x509, jwt] = elements();
    let unknown = [changed(&x509, "use", json!("foo")), changed(&jwt, "use", json!("wit-svid"))];
    let (bundle, warnings) = read_keys(&unknown).unwrap();
    assert!(bundle.is_empty());
    assert_eq!(warnings.len(), 2);
}

#[test]
fn h_54_repeated_and_misspelt_members() {
    let [good, evil] = [Authority::root(DOMAIN), Authority::root(DOMAIN)].map(|authority| {
        let text = authority.bundle(DOMAIN).to_spiffe_json();
        serde_json::from_str::<Value>(&text).unwrap()["keys"][0].clone()
    });
    let twice = format!(r#"{{"keys":[{good}],"keys":[{evil}]}}"#);
    assert!(matches!(read(&twice), Err(BundleError::Json(JsonError::DuplicateMember))));
    let (bundle, _) = read(&format!(r#"{{"Keys":[{evil}],"keys":[{good}]}}"#)).unwrap();
    assert_eq!(BASE64.encode(&bundle.x509[0].der), good["x5c"][0].as_str().unwrap());
    assert_eq!(bundle.x509.len(), 1);
    for document in [format!(r#"{{"keys":[{good}]}}{{"keys":[{evil}]}}"#), format!(r#"{{"keys":[{good}]}} x"#)] {
        assert!(matches!(read(&document), Err(BundleError::Json(JsonError::Syntax { .. }))));
    }
}

#[test]
fn h_55_bnd_12_bnd_13_bnd_14_unknown_elements_are_ignored_one_by_one() {
    let [x509, jwt] = elements();
    ignored(beside(&x509, without(&jwt, "kty")), IgnoreReason::KeyType);
    ignored(beside(&x509, changed(&jwt, "kty", json!("AKP"))), IgnoreReason::KeyType);
    ignored(beside(&x509, changed(&jwt, "kty", json!("OKP"))), IgnoreReason::KeyType);
    ignored(beside(&x509, without(&jwt, "use")), IgnoreReason::Use);
    ignored(beside(&x509, changed(&jwt, "use", json!("sig"))), IgnoreReason::Use);
    ignored(beside(&jwt, changed(&x509, "use", json!("X509-SVID"))), IgnoreReason::Use);
    malformed(beside(&jwt, changed(&x509, "use", json!(["x509-svid"]))));
}

#[test]
fn h_56_x509_35_x509_36_x509_elements() {
    let [x509, jwt] = elements();
    ignored(beside(&jwt, without(&x509, "x5c")), IgnoreReason::NoCertificate);
    ignored(beside(&jwt, changed(&x509, "x5c", json!([]))), IgnoreReason::NoCertificate);

    let second = BASE64.encode(&Authority::root(DOMAIN).certificate);
    let (bundle, warnings) = beside(&jwt, changed(&x509, "x5c", json!([x509["x5c"][0], second]))).unwrap();
    assert_eq!(BASE64.encode(&bundle.x509[0].der), x509["x5c"][0].as_str().unwrap());
    assert_eq!(bundle.x509.len(), 1);
    assert_eq!(warnings, [BundleWarning::SeveralCertificates { index: 1 }]);

    let standard = x509["x5c"][0].as_str().unwrap();
    let der = BASE64.decode(standard).unwrap();
    let broken = format!("{}\n{}", &standard[..64], &standard[64..]);
    let truncated = BASE64.encode(&der[..der.len() - 1]);
    let trailing = BASE64.encode([&der[..], &[0]].concat());
    for text in [base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(&der) + "-_", broken, truncated, trailing] {
        malformed(beside(&jwt, changed(&x509, "x5c", json!([text]))));
    }
    malformed(beside(&jwt, changed(&x509, "x5c", json!([1]))));
    malformed(beside(&jwt, changed(&x509, "x5c", json!("x"))));
    malformed(beside(&jwt, changed(&changed(&x509, "x", jwt["x"].clone()), "y", jwt["y"].clone())));
    malformed(beside(&jwt, without(&x509, "x")));
}

#[test]
fn h_56_certificates_that_are_odd_or_no_authorities() {
    let [_, jwt] = elements();
    let element = |change: &dyn Fn(Template) -> Template| {
        let authority = Authority::root_with(DOMAIN, change);
        let public = authority.key.public_key();
        let mut members = Map::new();
        members.insert("use".to_owned(), json!("x509-svid"));
        jwk::write_key(&mut members, public, None);
        members.insert("x5c".to_owned(), json!([BASE64.encode(&authority.certificate)]));
        Value::Object(members)
    };
    ignored(beside(&jwt, element(&|template| template.with(basic(false, None)))), IgnoreReason::NotAuthority);
    let loaded = |element: Value| {
        let (bundle, warnings) = beside(&jwt, element).unwrap();
        assert_eq!(bundle.x509.len(), 1);
        warnings
    };
    assert_eq!(loaded(element(&|template| template.valid(NOW - 10, NOW - 1))), []);
    assert_eq!(loaded(element(&|template| template.without(SAN))), []);
    let foreign = [BundleWarning::ForeignId { index: 1 }];
    assert_eq!(loaded(element(&|template| template.with(uri("spiffe://other.test/path")))), foreign);
    assert_eq!(loaded(element(&|template| template.with(uri("spiffe://example.org")))), foreign);
    let with_id = changed(&element(&|template| template), "kid", json!("x"));
    assert_eq!(loaded(with_id), [BundleWarning::KeyIdOnCertificate { index: 1 }]);
}

#[test]
fn h_57_jwt_19_jwt_elements() {
    let [x509, jwt] = elements();
    malformed(beside(&x509, without(&jwt, "kid")));
    malformed(beside(&x509, changed(&jwt, "kid", json!(""))));
    malformed(beside(&x509, changed(&jwt, "kid", json!(1))));
    let [_, other] = elements();
    let outcome = read_keys(&[jwt.clone(), other]);
    assert!(matches!(outcome, Err(BundleError::RepeatedKeyId { index: 1 })), "{outcome:?}");
    assert_eq!(read_keys(&[jwt.clone(), jwt.clone()]).unwrap().0.jwt.len(), 1);
    ignored(beside(&x509, changed(&jwt, "kty", json!("oct"))), IgnoreReason::KeyType);
    ignored(beside(&x509, changed(&jwt, "alg", json!("HS256"))), IgnoreReason::Algorithm);
    ignored(beside(&x509, changed(&jwt, "alg", json!("ES384"))), IgnoreReason::Algorithm);
    assert_eq!(beside(&x509, changed(&jwt, "alg", json!("ES256"))).unwrap().1, []);
    malformed(beside(&x509, changed(&jwt, "crv", json!("P-384"))));
    malformed(beside(&x509, changed(&jwt, "x", jwt["y"].clone())));
    ignored(beside(&x509, changed(&jwt, "crv", json!("secp256k1"))), IgnoreReason::KeyType);

    let (bundle, warnings) = beside(&x509, changed(&jwt, "d", json!("c2VjcmV0"))).unwrap();
    assert_eq!(bundle.jwt.len(), 1);
    assert_eq!(warnings, [BundleWarning::PrivateKey { index: 1 }]);
    assert!(!bundle.to_spiffe_json().contains("c2VjcmV0"));
}

#[test]
fn h_57_rsa_elements() {
    let [x509, _] = elements();
    let element = |n: &[u8]| json!({"use": "jwt-svid", "kty": "RSA", "kid": "r", "n": base64url(n), "e": "AQAB"});
    ignored(beside(&x509, element(&[0xab; 128])), IgnoreReason::KeyType);
    let plain = beside(&x509, element(&[0xab; 256])).unwrap().0;
    let padded = beside(&x509, element(&[&[0, 0], &[0xab; 256][..]].concat())).unwrap().0;
    assert_eq!(plain.jwt.len(), 1);
    assert_eq!(plain.jwt, padded.jwt);
}

#[test]
fn h_58_bnd_05_sequences() {
    let with = |sequence: &str| {
        read(&format!(r#"{{"keys":[],"spiffe_sequence":{sequence}}}"#)).map(|(bundle, _)| bundle.sequence)
    };
    for (text, sequence) in [
        ("9007199254740993", 9_007_199_254_740_993),
        ("9007199254740994", 9_007_199_254_740_994),
        ("18446744073709551615", u64::MAX),
        ("null", 0),
        ("1e3", 1000),
    ] {
        assert_eq!(with(text).unwrap(), sequence, "{text}");
    }
    assert_eq!(read(r#"{"keys":[]}"#).unwrap().0.sequence, 0);
    for text in ["-1", "1.5", r#""11""#, "true"] {
        assert!(matches!(with(text), Err(BundleError::Sequence)), "{text}");
    }
    assert!(matches!(with("18446744073709551616"), Err(BundleError::Json(JsonError::InexactNumber))));
}

#[test]
fn h_59_refresh_hints() {
    let with = |hint: &str| {
        read(&format!(r#"{{"keys":[],"spiffe_refresh_hint":{hint}}}"#)).map(|(bundle, _)| bundle.refresh_hint)
    };
    for (text, seconds) in [
        ("0", None),
        ("null", None),
        ("1", Some(1)),
        ("2147483648", Some(1 << 31)),
        ("9223372036854775807", Some(i64::MAX as u64)),
    ] {
        assert_eq!(with(text).unwrap(), seconds.map(Duration::from_secs), "{text}");
    }
    for text in ["-1", r#""300""#, "2.5"] {
        assert!(matches!(with(text), Err(BundleError::RefreshHint)), "{text}");
    }
    let beyond = with("18446744073709551616");
    assert!(matches!(beyond, Err(BundleError::Json(JsonError::InexactNumber))), "{beyond:?}");
}

#[test]
fn warnings_read_as_sentences() {
    let warning = BundleWarning::Ignored { index: 3, why: IgnoreReason::Use };
    assert_eq!(warning.to_string(), "bundle element 3 ignored: its use is missing or unknown");
}
