use std::net::Ipv4Addr;

use rcgen::string::Ia5String;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair, KeyUsagePurpose, SanType};
use spiffe::attest::x509pop::{Challenge, respond};
use spiffe::x509::{KeyType, PrivateKey};

use super::*;
use crate::attest::testing::{History, Silent};
use crate::attest::{ChallengeError, Fault};

struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(DnType::CommonName, "node authority");
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        Self { issuer }
    }

    fn settings(&self) -> Settings {
        Settings::new(Mode::Authorities { certificates: vec![Bytes::copy_from_slice(self.issuer.der())] })
    }

    /// A node certificate and its key.
    fn node(&self, kind: KeyType, edit: impl FnOnce(&mut CertificateParams)) -> (Vec<u8>, PrivateKey) {
        let key = PrivateKey::generate(kind).unwrap();
        let mut parameters = CertificateParams::default();
        parameters.distinguished_name.push(DnType::CommonName, "node one");
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.serial_number = Some(vec![0x0a, 0xbc].into());
        edit(&mut parameters);
        let public = rcgen::SubjectPublicKeyInfo::from_der(key.public_key().spki_der()).unwrap();
        let certificate = parameters.signed_by(&public, &self.issuer).unwrap();
        (certificate.der().to_vec(), key)
    }
}

/// Answers as a node with this key does.
struct Answering<'a> {
    key: &'a PrivateKey,
    address: Option<IpAddr>,
}

#[async_trait]
impl Challenger for Answering<'_> {
    async fn challenge(&mut self, challenge: Bytes) -> Result<Bytes, ChallengeError> {
        let challenge = Challenge::from_json(&challenge).unwrap();
        Ok(respond(self.key, &challenge, [3; 32]).unwrap().to_json().unwrap().into())
    }

    fn address(&self) -> Option<IpAddr> {
        self.address
    }
}

async fn attest(
    settings: &Settings,
    certificate: &[u8],
    challenger: &mut dyn Challenger,
) -> Result<Attested, AttestError> {
    let history = History::open().await;
    let attestor = X509Pop::new(settings, history.replica(), Entropy::system()).unwrap();
    let payload = Payload { certificates: vec![certificate.to_vec()] }.to_json().unwrap();
    attestor.attest(&payload, challenger, history.now()).await
}

#[tokio::test]
async fn a_node_proves_its_key_and_is_described() {
    let authority = Authority::new();
    for kind in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
        let (certificate, key) = authority.node(kind, |parameters| {
            let uri = Ia5String::try_from("x509pop://example.org/cluster/east").unwrap();
            parameters.subject_alt_names = vec![SanType::URI(uri)];
        });
        let attested =
            attest(&authority.settings(), &certificate, &mut Answering { key: &key, address: None }).await.unwrap();
        let fingerprint = |der: &[u8]| {
            crate::authority::issue::hex(
                aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA1_FOR_LEGACY_USE_ONLY, der).as_ref(),
            )
        };
        assert_eq!(
            attested.agent_id.as_str(),
            format!("spiffe://example.org/spire/agent/x509pop/{}", fingerprint(&certificate))
        );
        let selectors: Vec<String> = attested.selectors.iter().map(ToString::to_string).collect();
        assert_eq!(
            selectors,
            [
                format!("x509pop:ca:fingerprint:{}", fingerprint(authority.issuer.der())),
                "x509pop:san:cluster:east".to_owned(),
                "x509pop:serialnumber:0abc".to_owned(),
                "x509pop:subject:cn:node one".to_owned(),
            ]
        );
        assert!(attested.can_reattest);
        assert_eq!(attested.token, None);
    }
}

#[tokio::test]
async fn another_key_or_no_answer_proves_nobody() {
    let authority = Authority::new();
    let (certificate, _) = authority.node(KeyType::EcP256, |_| {});
    let stranger = PrivateKey::generate(KeyType::EcP256).unwrap();
    let refused = attest(&authority.settings(), &certificate, &mut Answering { key: &stranger, address: None }).await;
    let error = refused.unwrap_err();
    assert!(matches!(error, AttestError::Possession(spiffe::attest::x509pop::PopError::Signature(_))), "{error:?}");
    assert_eq!(error.fault(), Fault::Denied);
    let silent = attest(&authority.settings(), &certificate, &mut Silent).await;
    assert!(matches!(silent, Err(AttestError::Challenge(ChallengeError::Closed))));
}

#[tokio::test]
async fn a_foreign_authority_is_denied_before_the_challenge() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (certificate, _) = theirs.node(KeyType::EcP256, |_| {});
    let error = attest(&ours.settings(), &certificate, &mut Silent).await.unwrap_err();
    assert!(matches!(error, AttestError::Possession(spiffe::attest::x509pop::PopError::Chain(_))), "{error:?}");
    assert_eq!(error.fault(), Fault::Denied);
}

#[tokio::test]
async fn the_path_follows_the_template() {
    let authority = Authority::new();
    let (certificate, key) = authority.node(KeyType::EcP256, |parameters| {
        parameters.distinguished_name.push(DnType::CommonName, "node-one");
    });
    let mut settings = authority.settings();
    settings.agent_path_template =
        Some("/{{ .PluginName }}/{{ .Subject.CommonName }}/{{ .SerialNumberHex }}".to_owned());
    let attested = attest(&settings, &certificate, &mut Answering { key: &key, address: None }).await.unwrap();
    assert_eq!(attested.agent_id.as_str(), "spiffe://example.org/spire/agent/x509pop/node-one/0abc");
}

#[tokio::test]
async fn the_address_must_be_named_if_asked_for() {
    let authority = Authority::new();
    let mut settings = authority.settings();
    settings.verify_client_ip = true;
    let (certificate, key) = authority.node(KeyType::EcP256, |parameters| {
        parameters.subject_alt_names = vec![SanType::IpAddress(Ipv4Addr::new(192, 0, 2, 1).into())];
    });
    for address in ["192.0.2.1", "::ffff:192.0.2.1"] {
        let address = Some(address.parse().unwrap());
        attest(&settings, &certificate, &mut Answering { key: &key, address }).await.unwrap();
    }
    let address = Some("192.0.2.2".parse().unwrap());
    let other = attest(&settings, &certificate, &mut Answering { key: &key, address }).await;
    assert!(matches!(other, Err(AttestError::WrongAddress)), "{other:?}");
    let unknown = attest(&settings, &certificate, &mut Answering { key: &key, address: None }).await;
    assert!(matches!(unknown, Err(AttestError::NoAddress)));
}

#[tokio::test]
async fn settings_that_cannot_be_used_are_told() {
    let authority = Authority::new();
    let history = History::open().await;
    let make = |settings: &Settings| X509Pop::new(settings, history.replica(), Entropy::system()).err();
    let none = Settings::new(Mode::Authorities { certificates: vec![] });
    assert!(matches!(make(&none), Some(SettingsError::NoBundle)));
    let mut settings = authority.settings();
    settings.agent_path_template = Some("no slash".to_owned());
    assert!(matches!(make(&settings), Some(SettingsError::Template(_))));
    assert!(make(&Settings::new(Mode::Spiffe { prefix: "/x".to_owned() })).is_none());
}
