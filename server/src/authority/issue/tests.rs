use std::time::Duration;

use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::TrustDomain;
use spiffe::verify::{PeerRole, jwt_svid, x509_chain};
use spiffe::x509::PrivateKey;

use super::super::keys::SigningKeys;
use super::super::keys::memory::MemoryKeys;
use super::super::profile::{BACKDATE, CaSubject};
use super::*;
use crate::state::model::{AuthorityKind, KeyOwner, SlotStatus};

const NOW: u64 = 1_700_000_000;

struct Fixture {
    issuer: Issuer,
    bundle: Bundle,
    root: Certificate,
    now: SystemTime,
}

struct Proof;
impl Recorded for Proof {}

fn policy(kind: KeyType) -> Policy {
    Policy {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        ca_subject: CaSubject::default(),
        ca_ttl: Duration::from_secs(86_400),
        ca_key_type: kind,
        jwt_key_type: Some(kind),
        default_x509_svid_ttl: Duration::from_secs(3600),
        default_jwt_svid_ttl: Duration::from_secs(300),
        agent_ttl: None,
        jwt_issuer: None,
    }
}

async fn fixture(policy: Policy) -> Fixture {
    let now = from_unix_seconds(NOW);
    let entropy = Entropy::system();
    let keys = MemoryKeys::new(&entropy);
    let kind = policy.ca_key_type;
    let x509_key = keys.create("x509", kind).await.unwrap();
    let jwt_key = keys.create("jwt", kind).await.unwrap();
    let made = self_signed(keys.signer("x509").unwrap(), &policy, &entropy, now).unwrap();
    let slot = |kind, id: &str, key: &super::super::keys::PublicKey, certificate| AuthoritySlot {
        owner: KeyOwner::Shared,
        kind,
        authority_id: id.into(),
        key_id: id.into(),
        status: SlotStatus::Active,
        issued_at: now,
        not_after: made.not_after,
        certificate,
        upstream_chain: Vec::new(),
        public_key: key.spki.clone(),
    };
    let x509 = slot(AuthorityKind::X509, &made.authority_id, &x509_key, Some(made.certificate.clone()));
    let jwt = slot(AuthorityKind::Jwt, "kid1", &jwt_key, None);
    let mut bundle = Bundle::empty(policy.trust_domain.clone());
    bundle.x509.push(X509Authority { der: made.certificate.clone(), tainted: false });
    bundle.jwt.push(JwtAuthority {
        key_id: "kid1".into(),
        public_key: jwt_key.spki.clone(),
        expires_at: Some(made.not_after),
        tainted: false,
    });
    let issuer = Issuer::new(
        Arc::new(policy),
        entropy,
        Some((&x509, keys.signer("x509").unwrap())),
        Some((&jwt, keys.signer("jwt").unwrap())),
    )
    .unwrap();
    Fixture { issuer, bundle, root: Certificate::parse(made.certificate).unwrap(), now }
}

fn request(dns_names: &[&str]) -> WorkloadProfile {
    WorkloadProfile {
        id: SpiffeId::parse("spiffe://example.org/w").unwrap(),
        dns_names: dns_names.iter().map(|name| (*name).into()).collect(),
        ttl: None,
        subject: None,
    }
}

#[tokio::test]
async fn every_kind_of_authority_issues_what_verifiers_accept() {
    for kind in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048, KeyType::Rsa4096] {
        let f = fixture(policy(kind)).await;
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let unreleased = f.issuer.workload_x509(&request(&[]), key.public_key(), f.now).unwrap();
        let (serial, end) = (unreleased.serial(), unreleased.not_after());
        let svid = unreleased.release(&Proof);
        assert_eq!((svid.serial, svid.not_after), (serial, end));
        let verified = x509_chain(&svid.chain, &f.bundle, PeerRole::Client, f.now).unwrap();
        assert_eq!(verified.id.as_str(), "spiffe://example.org/w");
        assert_eq!(verified.serial, serial);
        x509_chain(&svid.chain, &f.bundle, PeerRole::Server, f.now).unwrap();

        let jwt = JwtProfile { id: svid.id, audience: vec!["vault".to_owned()], ttl: None, token_id: None };
        let token = f.issuer.jwt(&jwt, f.now).unwrap().release(&Proof);
        let verified = jwt_svid(&token.token, "vault", &f.bundle, f.now).unwrap();
        assert_eq!(verified.id.as_str(), "spiffe://example.org/w");
        assert_eq!(verified.key_id.as_ref(), "kid1");
        assert_eq!(token.expires_at, f.now + Duration::from_secs(300));
    }
}

#[tokio::test]
async fn leaf_has_the_profile_to_the_field() {
    let f = fixture(policy(KeyType::EcP256)).await;
    let key = PrivateKey::generate(KeyType::Rsa2048).unwrap();
    let svid = f.issuer.workload_x509(&request(&["b.example", "a.example"]), key.public_key(), f.now);
    let svid = svid.unwrap().release(&Proof);
    assert_eq!(svid.chain.len(), 1, "a self-signed root is not part of the chain");
    let leaf = Certificate::parse(svid.chain[0].clone()).unwrap();
    assert_eq!(leaf.not_before, f.now - Duration::from_secs(10));
    assert_eq!(leaf.not_after, f.now + Duration::from_secs(3600));
    assert_eq!(leaf.serial, svid.serial);
    assert_eq!(leaf.uris, ["spiffe://example.org/w"]);
    assert_eq!(leaf.dns_names, ["b.example", "a.example"]);
    assert_eq!(leaf.common_names, ["b.example"]);
    assert_eq!(leaf.subject_key_id.as_deref(), Some(&key_id_of(key.public_key().spki_der())[..]));
    assert_eq!(leaf.authority_key_id, f.root.subject_key_id);
    assert_eq!(leaf.issuer, f.root.subject);
    assert!(!leaf.is_ca);
    let parsed = x509_parser::parse_x509_certificate(&svid.chain[0]).unwrap().1;
    let constraints = parsed.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical);
    let usage = parsed.key_usage().unwrap().unwrap();
    assert!(usage.critical);
    assert_eq!(usage.value.flags, 0b1_0101, "digitalSignature, keyEncipherment, keyAgreement");
    let extended = parsed.extended_key_usage().unwrap().unwrap();
    assert!(!extended.critical && extended.value.server_auth && extended.value.client_auth);
    assert!(!parsed.subject_alternative_name().unwrap().unwrap().critical);
    assert_eq!(parsed.subject().to_string(), "C=US, O=SPIRE, CN=b.example");
    assert_eq!(parsed.extensions().len(), 6);
}

#[tokio::test]
async fn root_has_the_profile_to_the_field() {
    let f = fixture(policy(KeyType::EcP384)).await;
    assert!(f.root.is_ca);
    assert_eq!(f.root.path_length, None);
    assert_eq!(f.root.uris, ["spiffe://example.org"]);
    assert_eq!(f.root.authority_key_id, None);
    assert_eq!(f.root.issuer, f.root.subject);
    assert!(f.root.key_usage.unwrap().key_cert_sign() && f.root.key_usage.unwrap().crl_sign());
    assert!(!f.root.key_usage.unwrap().digital_signature());
    assert_eq!(f.root.extended_key_usage, None);
    let parsed = x509_parser::parse_x509_certificate(&f.root.der).unwrap().1;
    assert_eq!(parsed.subject().to_string(), format!("C=US, O=SPIFFE, serialNumber={}", f.root.serial));
    assert_eq!(f.issuer.x509_authority_id().unwrap().as_ref(), hex(f.root.subject_key_id.as_ref().unwrap()));
}

#[tokio::test]
async fn a_subject_with_repeated_attributes_still_chains() {
    let mut policy = policy(KeyType::EcP256);
    policy.ca_subject = CaSubject {
        country: vec!["DE".to_owned()],
        organization: vec!["One".to_owned(), "Zwei Größen".to_owned()],
        common_name: "authority".to_owned(),
    };
    let f = fixture(policy).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let svid = f.issuer.workload_x509(&request(&[]), key.public_key(), f.now).unwrap().release(&Proof);
    x509_chain(&svid.chain, &f.bundle, PeerRole::Client, f.now).unwrap();
    let parsed = x509_parser::parse_x509_certificate(&f.root.der).unwrap().1;
    let organizations: Vec<_> = parsed.subject().iter_organization().map(|name| name.as_str().unwrap()).collect();
    assert_eq!(organizations, ["One", "Zwei Größen"]);
}

#[tokio::test]
async fn downstream_authority_is_one_and_ends_with_ours() {
    let f = fixture(policy(KeyType::EcP256)).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let issued = f.issuer.downstream_x509(Some(Duration::from_secs(900_000)), key.public_key(), f.now);
    let chain = issued.unwrap().release(&Proof).chain;
    let below = Certificate::parse(chain[0].clone()).unwrap();
    assert!(below.is_ca);
    assert_eq!(below.not_after, f.root.not_after);
    assert_eq!(below.uris, ["spiffe://example.org"]);
    let parsed = x509_parser::parse_x509_certificate(&chain[0]).unwrap().1;
    assert_eq!(
        parsed.subject().to_string(),
        format!("C=US, O=SPIFFE, serialNumber={}, OU=DOWNSTREAM-1", f.root.serial)
    );
}

#[tokio::test]
async fn nothing_is_signed_beyond_the_end_or_without_an_authority() {
    let f = fixture(policy(KeyType::EcP256)).await;
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let key = key.public_key();
    let signed_at = |now| f.issuer.workload_x509(&request(&[]), key, now).map(drop);
    let (second, begins) = (Duration::from_secs(1), f.now - BACKDATE);
    assert!(matches!(signed_at(f.root.not_after), Err(IssueError::NotReady)));
    assert!(signed_at(f.root.not_after - second).is_ok());
    assert!(matches!(signed_at(begins - second), Err(IssueError::NotReady)), "it has not begun");
    assert!(signed_at(begins).is_ok());
    let empty = Issuer::new(Arc::new(policy(KeyType::EcP256)), Entropy::system(), None, None).unwrap();
    assert!(matches!(empty.workload_x509(&request(&[]), key, f.now), Err(IssueError::NotReady)));
    let jwt = JwtProfile { id: request(&[]).id, audience: vec!["a".to_owned()], ttl: None, token_id: None };
    assert!(matches!(empty.jwt(&jwt, f.now), Err(IssueError::NotReady)));
    let signed_at = |now| f.issuer.jwt(&jwt, now).map(drop);
    assert!(matches!(signed_at(f.root.not_after), Err(IssueError::NotReady)));
    assert!(matches!(signed_at(begins - second), Err(IssueError::NotReady)));
    assert!(signed_at(begins).is_ok());
}

#[tokio::test]
async fn token_header_to_the_byte() {
    let f = fixture(policy(KeyType::EcP256)).await;
    let jwt = JwtProfile { id: request(&[]).id, audience: vec!["a".to_owned()], ttl: None, token_id: None };
    let token = f.issuer.jwt(&jwt, f.now).unwrap().release(&Proof).token;
    let parts: Vec<&str> = token.split('.').collect();
    assert_eq!(parts.len(), 3);
    let header = URL_SAFE_NO_PAD.decode(parts[0]).unwrap();
    assert_eq!(String::from_utf8(header).unwrap(), r#"{"alg":"ES256","kid":"kid1","typ":"JWT"}"#);
    assert_eq!(URL_SAFE_NO_PAD.decode(parts[2]).unwrap().len(), 64, "r and s side by side");
}

#[tokio::test]
async fn a_key_of_every_kind_is_certified_as_it_is() {
    let f = fixture(policy(KeyType::EcP256)).await;
    for kind in [
        &rcgen::PKCS_ECDSA_P256_SHA256,
        &rcgen::PKCS_ECDSA_P384_SHA384,
        &rcgen::PKCS_ECDSA_P521_SHA512,
        &rcgen::PKCS_ED25519,
        &rcgen::PKCS_RSA_SHA256,
    ] {
        let spki = Bytes::from(rcgen::KeyPair::generate_for(kind).unwrap().subject_public_key_info());
        let key = PublicKey::from_spki(&spki).unwrap();
        let issued = f.issuer.workload_x509(&request(&[]), &key, f.now).unwrap().release(&Proof);
        let leaf = Certificate::parse(issued.chain[0].clone()).unwrap();
        assert_eq!(leaf.spki_der, spki, "{kind:?}");
        assert_eq!(leaf.subject_key_id.as_deref(), Some(&key_id_of(&spki)[..]), "{kind:?}");
    }
}
