use super::*;
use crate::attest::path_template::PathTemplate;
use crate::bundle::X509Authority;
use crate::testing::*;
use crate::x509::{KeyType, PrivateKey};

const SERVER_NONCE: [u8; NONCE_SIZE] = [7; NONCE_SIZE];
const NODE_NONCE: [u8; NONCE_SIZE] = [9; NONCE_SIZE];

struct Fixture {
    key: PrivateKey,
    payload: Payload,
    roots: Vec<X509Authority>,
    root: Authority,
}

fn node_template(key: &PrivateKey) -> Template {
    let mut template = Template::new("node 1", key.public_key().spki_der());
    template.serial = vec![0x0a, 0xbc];
    template.extensions = vec![key_usage(DIGITAL_SIGNATURE)];
    template
}

impl Fixture {
    fn new(key: PrivateKey, change: impl FnOnce(Template) -> Template) -> Self {
        let root = Authority::root("pki.test");
        let leaf = root.sign(&change(node_template(&key)));
        let payload = Payload { certificates: vec![leaf.to_vec()] };
        Self { key, payload, roots: root.bundle("pki.test").x509.clone(), root }
    }

    fn verify(&self) -> Result<Node, PopError> {
        Node::verify(&self.payload, &self.roots, Policy::default(), now())
    }
}

#[test]
fn messages_have_the_form_of_spire() {
    let payload = Payload { certificates: vec![vec![1, 2], vec![255]] };
    assert_eq!(payload.to_json().unwrap(), br#"{"certificates":["AQI=","/w=="]}"#);
    assert_eq!(Payload::from_json(br#"{"certificates":["AQI=","/w=="],"x":1}"#).unwrap(), payload);
    let challenge = Challenge { rsa_signature: None, ecdsa_signature: Some(Nonce { nonce: vec![1] }) };
    assert_eq!(challenge.to_json().unwrap(), br#"{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQ=="}}"#);
    let response = br#"{"rsa_signature":null,"ecdsa_signature":{"nonce":"AQ==","r":"Ag==","s":"Aw=="}}"#;
    assert_eq!(Response::from_json(response).unwrap().to_json().unwrap(), response);
    let response = br#"{"rsa_signature":{"nonce":"AQ==","signature":"Ag=="},"ecdsa_signature":null}"#;
    assert_eq!(Response::from_json(response).unwrap().to_json().unwrap(), response);
    assert_eq!(Payload::from_json(br#"{"certificates":null}"#).unwrap().certificates, Vec::<Vec<u8>>::new());
    assert!(matches!(Payload::from_json(b"{"), Err(PopError::Message(_))));
    assert!(matches!(Payload::from_json(br#"{"certificates":["?"]}"#), Err(PopError::Message(_))));
}

#[test]
fn both_halves_agree_for_every_kind_of_key() {
    let p521 =
        aws_lc_rs::signature::EcdsaKeyPair::generate(&aws_lc_rs::signature::ECDSA_P521_SHA512_ASN1_SIGNING).unwrap();
    let p521 = PrivateKey::from_pkcs8(p521.to_pkcs8v1().unwrap().as_ref().to_vec()).unwrap();
    let kinds = [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048];
    for key in kinds.map(|kind| PrivateKey::generate(kind).unwrap()).into_iter().chain([p521]) {
        let fixture = Fixture::new(key, |template| template);
        let node = fixture.verify().unwrap();
        let challenge = Challenge::from_json(&node.challenge(SERVER_NONCE).unwrap().to_json().unwrap()).unwrap();
        let response = respond(&fixture.key, &challenge, NODE_NONCE).unwrap();
        let response = Response::from_json(&response.to_json().unwrap()).unwrap();
        assert!(node.check(&challenge, &response).is_ok(), "{:?}", fixture.key.public_key().kind());
        let other = node.challenge([8; NONCE_SIZE]).unwrap();
        assert!(matches!(node.check(&other, &response), Err(PopError::Signature(_))));
    }
}

#[test]
fn ecdsa_signs_the_sha_256_of_both_nonces() {
    use aws_lc_rs::{digest, signature as sig};
    let fixture = Fixture::new(new_key(), |template| template);
    let challenge = fixture.verify().unwrap().challenge(SERVER_NONCE).unwrap();
    let response = respond(&fixture.key, &challenge, NODE_NONCE).unwrap().ecdsa_signature.unwrap();
    assert_eq!(response.nonce, NODE_NONCE);
    let hash = digest::digest(&digest::SHA256, &[SERVER_NONCE, NODE_NONCE].concat());
    let signature = crate::der::ecdsa_signature(&response.r, &response.s);
    sig::UnparsedPublicKey::new(&sig::ECDSA_P256_SHA256_ASN1, fixture.key.public_key().raw())
        .verify_digest(&hash, &signature)
        .unwrap();
}

#[test]
fn rsa_salts_of_either_length_are_accepted() {
    use aws_lc_rs::{rand::SystemRandom, rsa, signature as sig};
    let fixture = Fixture::new(PrivateKey::generate(KeyType::Rsa2048).unwrap(), |template| template);
    let node = fixture.verify().unwrap();
    let challenge = node.challenge(SERVER_NONCE).unwrap();
    let pair = rsa::KeyPair::from_pkcs8(fixture.key.expose_pkcs8()).unwrap();
    let short = || sig::RSA_PSS_SHA256;
    let long = short().with_pss_salt_length(sig::RsaPssSaltLength::Max);
    let odd = short().with_pss_salt_length(sig::RsaPssSaltLength::Custom(20));
    let judge = |encoding: sig::RsaSignatureEncoding| {
        let encoding: &'static sig::RsaSignatureEncoding = Box::leak(Box::new(encoding));
        let mut signature = vec![0; pair.public_modulus_len()];
        let message = [SERVER_NONCE, NODE_NONCE].concat();
        pair.sign(encoding, &SystemRandom::new(), &message, &mut signature).unwrap();
        let response = RsaResponse { nonce: NODE_NONCE.to_vec(), signature };
        node.check(&challenge, &Response { rsa_signature: Some(response), ecdsa_signature: None })
    };
    assert!(judge(short()).is_ok() && judge(long).is_ok());
    assert!(matches!(judge(odd), Err(PopError::Signature(_))));
}

#[test]
fn answers_that_do_not_fit_are_refused() {
    let fixture = Fixture::new(new_key(), |template| template);
    let node = fixture.verify().unwrap();
    let challenge = node.challenge(SERVER_NONCE).unwrap();
    let good = respond(&fixture.key, &challenge, NODE_NONCE).unwrap();
    let change = |change: &dyn Fn(&mut EcdsaResponse)| {
        let mut response = good.clone();
        change(response.ecdsa_signature.as_mut().unwrap());
        node.check(&challenge, &response)
    };
    assert!(matches!(change(&|response| response.nonce.truncate(31)), Err(PopError::Unfitting)));
    assert!(matches!(change(&|response| response.r.clear()), Err(PopError::Signature(_))));
    assert!(matches!(change(&|response| response.s = vec![0xff; 1000]), Err(PopError::Signature(_))));
    assert!(matches!(change(&|response| response.r.insert(0, 0)), Ok(())));
    let none = Response { rsa_signature: None, ecdsa_signature: None };
    assert!(matches!(node.check(&challenge, &none), Err(PopError::Unfitting)));
    let by_stranger = respond(&new_key(), &challenge, NODE_NONCE).unwrap();
    assert!(matches!(node.check(&challenge, &by_stranger), Err(PopError::Signature(_))));
    let rsa = Challenge { rsa_signature: challenge.ecdsa_signature.clone(), ecdsa_signature: None };
    assert!(matches!(respond(&fixture.key, &rsa, NODE_NONCE), Err(PopError::Unfitting)));
}

#[test]
fn certificates_are_judged_before_any_challenge() {
    let judge = |change: &dyn Fn(Template) -> Template| Fixture::new(new_key(), change).verify();
    assert!(judge(&|template| template).is_ok());
    let any_usage = judge(&|template| template.with(usages(&[CODE_SIGNING])));
    assert!(any_usage.is_ok(), "{any_usage:?}");
    assert!(matches!(judge(&|template| template.valid(NOW - 10, NOW - 1)), Err(PopError::Chain(_))));
    assert!(matches!(judge(&|template| template.without(KEY_USAGE)), Err(PopError::NoDigitalSignature)));
    let encipher = judge(&|template| template.with(key_usage(KEY_ENCIPHERMENT)));
    assert!(matches!(encipher, Err(PopError::NoDigitalSignature)));
    // Anybody may send a payload of megabytes: what it costs is decided by counts.
    let endless = judge(&|mut template| {
        template.extensions.extend(vec![Extension(UNKNOWN, false, vec![5, 0]); 100_000]);
        template
    });
    let Err(PopError::Certificate(X509Error::TooManyExtensions { count })) = endless else { panic!("{endless:?}") };
    assert!(count > 100_000);

    let mut fixture = Fixture::new(new_key(), |template| template);
    fixture.roots = Authority::root("pki.test").bundle("pki.test").x509.clone();
    assert!(matches!(fixture.verify(), Err(PopError::Chain(_))));
    fixture.payload.certificates.clear();
    assert!(matches!(fixture.verify(), Err(PopError::NoCertificate)));
    fixture.payload.certificates = vec![b"x".to_vec()];
    assert!(matches!(fixture.verify(), Err(PopError::Certificate(X509Error::Malformed))));
    fixture.payload.certificates = vec![b"x".to_vec(); 6];
    assert!(matches!(fixture.verify(), Err(PopError::TooManyIntermediates)));
}

#[test]
fn rsa_keys_are_bounded() {
    let fixture = Fixture::new(new_key(), |mut template| {
        template.spki = crate::der::rsa_spki(&[0xab; 1025], &[1, 0, 1]);
        template
    });
    assert!(matches!(fixture.verify(), Err(PopError::Key(KeyError::RsaSize { bits: 8200 }))));
    let fixture = Fixture::new(PrivateKey::generate(KeyType::Rsa2048).unwrap(), |template| template);
    let policy = Policy { max_rsa_key_size: 2047, ..Policy::default() };
    let outcome = Node::verify(&fixture.payload, &fixture.roots, policy, now());
    assert!(matches!(outcome, Err(PopError::Key(KeyError::RsaSize { bits: 2048 }))));
}

#[test]
fn selectors_and_agent_id() {
    let names: [(u8, &[u8]); 5] = [
        (URI, b"x509pop://example.org/rack/7/b"),
        (URI, b"x509pop://example.org/zone/a%20b?x"),
        (URI, b"x509pop://example.org/alone"),
        (URI, b"x509pop://other.test/rack/8"),
        (URI, b"https://example.org/rack/9"),
    ];
    let fixture = Fixture::new(new_key(), |template| template.with(uris(&names)));
    let node = fixture.verify().unwrap();
    let domain = trust_domain("example.org");
    let root = crate::hex(&crate::x509::sha1(&fixture.root.certificate));
    let selectors: Vec<String> = node.selectors(&domain).iter().map(ToString::to_string).collect();
    assert_eq!(
        selectors,
        [
            format!("x509pop:ca:fingerprint:{root}"),
            "x509pop:san:rack:7/b".to_owned(),
            "x509pop:san:zone:a b".to_owned(),
            "x509pop:serialnumber:0abc".to_owned(),
            "x509pop:subject:cn:node 1".to_owned(),
        ]
    );
    let id_by = |template: &str| {
        let template = PathTemplate::parse(template, FIELDS).unwrap();
        node.agent_id(&domain, &template).map(|id| id.path().to_owned())
    };
    let fingerprint = crate::hex(&crate::x509::sha1(&node.leaf().der));
    assert_eq!(id_by(DEFAULT_TEMPLATE).unwrap(), format!("/spire/agent/x509pop/{fingerprint}"));
    assert_eq!(id_by("/n/{{ .SerialNumberHex }}/{{ .SerialNumber }}").unwrap(), "/spire/agent/n/0abc/2748");
    assert_eq!(id_by("/{{ .TrustDomain }}/{{ .URISanSelectors.rack }}").unwrap(), "/spire/agent/example.org/7/b");
    assert!(matches!(id_by("/{{ .Subject.CommonName }}"), Err(PopError::AgentId(_))));
    assert!(matches!(id_by("/{{ .URISanSelectors.alone }}"), Err(PopError::AgentId(_))));
}

fn uris(entries: &[(u8, &[u8])]) -> Extension {
    names(entries)
}

#[test]
fn svids_attest_below_their_prefix() {
    let domain = trust_domain("example.org");
    let template = PathTemplate::parse(DEFAULT_SPIFFE_TEMPLATE, FIELDS).unwrap();
    let id_of = |id: &str| {
        let fixture = Fixture::new(new_key(), |template| template.with(uri(id)));
        fixture
            .verify()
            .unwrap()
            .agent_id_of_svid(&domain, &template, "/spire-exchange/")
            .map(|id| id.path().to_owned())
    };
    assert_eq!(id_of("spiffe://example.org/spire-exchange/a/b").unwrap(), "/spire/agent/x509pop/a/b");
    assert!(matches!(id_of("spiffe://example.org/other/a"), Err(PopError::Prefix)));
    assert!(matches!(id_of("spiffe://other.test/spire-exchange/a"), Err(PopError::Prefix)));
    assert!(matches!(id_of("https://example.org/"), Err(PopError::Certificate(_))));
}

#[test]
fn intermediates_are_selectors_too() {
    let mut fixture = Fixture::new(new_key(), |template| template);
    let middle = fixture.root.intermediate("middle", |template| template);
    fixture.payload.certificates =
        vec![middle.sign(&node_template(&fixture.key)).to_vec(), middle.certificate.to_vec()];
    let selectors = fixture.verify().unwrap().selectors(&trust_domain("example.org"));
    let fingerprints = [&middle.certificate, &fixture.root.certificate]
        .map(|der| format!("x509pop:ca:fingerprint:{}", crate::hex(&crate::x509::sha1(der))));
    for fingerprint in fingerprints {
        assert!(selectors.iter().any(|selector| selector.to_string() == fingerprint));
    }
}
