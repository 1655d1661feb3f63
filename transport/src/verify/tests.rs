//! Hostile certificates in real handshakes, shown by a client to our server and by a server to our client.

use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig};
use spiffe::bundle::{Bundle, X509Authority};
use spiffe::id::TrustDomain;
use spiffe::x509::PrivateKey;
use time::OffsetDateTime;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::rotating::{Rotating, client_config, server_config};

const SERVER: &str = "spiffe://example.org/spire/server";
const CLIENT: &str = "spiffe://example.org/spire/agent/x";

struct Trusted {
    bundles: std::collections::BTreeMap<TrustDomain, Arc<Bundle>>,
}

impl Trust for Trusted {
    fn bundles(&self) -> Arc<dyn Bundles + Send + Sync> {
        Arc::new(self.bundles.clone())
    }

    #[allow(clippy::disallowed_methods, reason = "certificates are made for now")]
    fn now(&self) -> SystemTime {
        SystemTime::now()
    }

    fn admits(&self, id: &SpiffeId) -> bool {
        id.trust_domain().as_str() == "example.org"
    }
}

struct Authority {
    issuer: Issuer<'static, KeyPair>,
    der: Bytes,
}

fn authority(change: impl FnOnce(&mut CertificateParams)) -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "root");
    change(&mut params);
    let der = Bytes::copy_from_slice(params.self_signed(&key).unwrap().der());
    Authority { issuer: Issuer::new(params, key), der }
}

fn below(above: &Authority, change: impl FnOnce(&mut CertificateParams)) -> Authority {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, "intermediate");
    change(&mut params);
    let der = Bytes::copy_from_slice(params.signed_by(&key, &above.issuer).unwrap().der());
    Authority { issuer: Issuer::new(params, key), der }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// A good leaf for `id`, before it is spoiled.
fn leaf_params(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.is_ca = IsCa::ExplicitNoCa;
    params.subject_alt_names = vec![uri(id)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyAgreement];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.not_before = OffsetDateTime::now_utc() - Duration::from_secs(60);
    params.not_after = OffsetDateTime::now_utc() + Duration::from_secs(3600);
    params
}

#[derive(Clone)]
struct Shown(Arc<CertifiedKey>);

impl fmt::Debug for Shown {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Shown")
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

fn shown(params: &CertificateParams, by: &Authority, rest: &[&Authority]) -> Shown {
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, &by.issuer).unwrap();
    let chain = std::iter::once(leaf.der().clone())
        .chain(rest.iter().map(|authority| CertificateDer::from(authority.der.to_vec())))
        .collect();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
    Shown(Arc::new(CertifiedKey::new(chain, signer)))
}

struct World {
    root: Authority,
    trust: Arc<dyn Trust>,
}

fn trusting(roots: &[(&str, &Authority)]) -> Arc<dyn Trust> {
    let mut bundles = std::collections::BTreeMap::new();
    for (name, root) in roots {
        let trust_domain = TrustDomain::parse(name).unwrap();
        let mut bundle = Bundle::empty(trust_domain.clone());
        bundle.x509.push(X509Authority { der: root.der.clone(), tainted: false });
        bundles.insert(trust_domain, Arc::new(bundle));
    }
    Arc::new(Trusted { bundles })
}

fn world() -> World {
    let root = authority(|_| {});
    let trust = trusting(&[("example.org", &root)]);
    World { root, trust }
}

/// Runs one handshake; what each side says of it, and whom the server saw.
async fn handshake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> (std::io::Result<Option<Arc<VerifiedChain>>>, std::io::Result<()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let serving = async {
        let (done, found) = remembering(TlsAcceptor::from(server).accept(far)).await;
        done.map(|stream| (stream, found))
    };
    let calling = async {
        let name = ServerName::try_from("spiffe.invalid").unwrap();
        TlsConnector::from(client).connect(name, near).await
    };
    let (served, called) = tokio::join!(serving, calling);
    (served.map(|(_, found)| found), called.map(|_| ()))
}

impl World {
    /// Whether our server lets in a client that shows this.
    async fn lets_in(&self, client: &Shown) -> std::io::Result<Option<Arc<VerifiedChain>>> {
        let own = Rotating::new();
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(SERVER).signed_by(&key, &self.root.issuer).unwrap();
        let private = PrivateKey::from_pkcs8(key.serialize_der()).unwrap();
        own.set(&[Bytes::copy_from_slice(leaf.der())], &private).unwrap();
        let server = server_config(&own, ClientVerifier::new(Arc::clone(&self.trust))).unwrap();
        let expected = SpiffeId::parse(SERVER).unwrap();
        // Whether the client trusts the server is not the question here.
        let plain = client_config(None, ServerVerifier::insecure_bootstrap(expected)).unwrap();
        let mut config = (*plain).clone();
        config.client_auth_cert_resolver = Arc::new(client.clone());
        handshake(server, Arc::new(config)).await.0
    }

    /// Whether our client accepts a server that shows this.
    async fn accepts(&self, server: &Shown) -> std::io::Result<()> {
        let plain = server_config(&Rotating::new(), ClientVerifier::new(Arc::clone(&self.trust))).unwrap();
        let mut config = (*plain).clone();
        config.cert_resolver = Arc::new(server.clone());
        let expected = SpiffeId::parse(SERVER).unwrap();
        let client = client_config(None, ServerVerifier::new(Arc::clone(&self.trust), expected)).unwrap();
        handshake(Arc::new(config), client).await.1
    }

    /// Asserts that a leaf spoiled by `spoil` is refused in both roles, by the verifier.
    async fn refuses(&self, what: &str, spoil: impl Fn(&mut CertificateParams)) {
        let make = |id| {
            let mut params = leaf_params(id);
            spoil(&mut params);
            shown(&params, &self.root, &[])
        };
        assert_refused(what, self.lets_in(&make(CLIENT)).await.map(|_| ()));
        assert_refused(what, self.accepts(&make(SERVER)).await);
    }

    async fn refuses_chain(&self, what: &str, by: &Authority, rest: &[&Authority]) {
        assert_refused(what, self.lets_in(&shown(&leaf_params(CLIENT), by, rest)).await.map(|_| ()));
        assert_refused(what, self.accepts(&shown(&leaf_params(SERVER), by, rest)).await);
    }

    async fn takes(&self, what: &str, change: impl Fn(&mut CertificateParams)) {
        let make = |id| {
            let mut params = leaf_params(id);
            change(&mut params);
            shown(&params, &self.root, &[])
        };
        let found = self.lets_in(&make(CLIENT)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(found.map(|found| found.id.to_string()).as_deref(), Some(CLIENT), "{what}");
        self.accepts(&make(SERVER)).await.unwrap_or_else(|error| panic!("{what}: {error}"));
    }
}

/// Refused over its certificate, and not for a mistake of the test.
fn assert_refused(what: &str, outcome: std::io::Result<()>) {
    let error = outcome.expect_err(what);
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    assert!(
        matches!(tls, Some(rustls::Error::InvalidCertificate(_) | rustls::Error::InvalidMessage(_))),
        "{what}: {error:?}"
    );
}

fn extension(oid: &[u64], content: &[u8], critical: bool) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(oid, content.to_vec());
    extension.set_criticality(critical);
    extension
}

const KEY_USAGE: &[u64] = &[2, 5, 29, 15];
const ALT_NAME: &[u64] = &[2, 5, 29, 17];
const BASIC: &[u64] = &[2, 5, 29, 19];
const EXTENDED_USAGE: &[u64] = &[2, 5, 29, 37];

/// A subject alternative name with one URI of these bytes (fewer than 120).
fn raw_uri(bytes: &[u8]) -> Vec<u8> {
    let length = u8::try_from(bytes.len()).unwrap();
    [&[0x30, length + 2, 0x86, length][..], bytes].concat()
}

#[tokio::test]
async fn good_peers_know_each_other_and_nobody_is_anonymous() {
    let world = world();
    world.takes("a good leaf", |_| {}).await;
    let nobody = client_config(None, ServerVerifier::new(Arc::clone(&world.trust), SpiffeId::parse(SERVER).unwrap()));
    let server = server_config(&Rotating::new(), ClientVerifier::new(Arc::clone(&world.trust))).unwrap();
    let mut server = (*server).clone();
    server.cert_resolver = Arc::new(shown(&leaf_params(SERVER), &world.root, &[]));
    let (served, called) = handshake(Arc::new(server), nobody.unwrap()).await;
    assert_eq!(served.unwrap(), None);
    called.unwrap();
}

#[tokio::test]
async fn another_server_of_the_same_domain_is_refused() {
    let world = world();
    assert_refused("agent as server", world.accepts(&shown(&leaf_params(CLIENT), &world.root, &[])).await);
    let insecure = ServerVerifier::insecure_bootstrap(SpiffeId::parse(SERVER).unwrap());
    let other = authority(|_| {});
    for (id, good) in [(SERVER, true), (CLIENT, false)] {
        let plain = server_config(&Rotating::new(), ClientVerifier::new(Arc::clone(&world.trust))).unwrap();
        let mut config = (*plain).clone();
        config.cert_resolver = Arc::new(shown(&leaf_params(id), &other, &[]));
        let verifier = ServerVerifier { trust: None, expected: insecure.expected.clone(), algorithms: algorithms() };
        let client = client_config(None, verifier).unwrap();
        assert_eq!(handshake(Arc::new(config), client).await.1.is_ok(), good, "{id}");
    }
}

#[tokio::test]
async fn h_13_several_uris() {
    let world = world();
    for others in ["spiffe://example.org/b", "https://x.test/", CLIENT, SERVER] {
        world.refuses(others, |params| params.subject_alt_names.push(uri(others))).await;
    }
}

#[tokio::test]
async fn h_14_no_uri() {
    let world = world();
    world
        .refuses("common name", |params| {
            params.subject_alt_names.clear();
            params.distinguished_name.push(DnType::CommonName, CLIENT);
        })
        .await;
    world
        .refuses("DNS name", |params| {
            params.subject_alt_names = vec![SanType::DnsName("example.org".try_into().unwrap())]
        })
        .await;
}

#[tokio::test]
async fn h_15_authorities_as_leaves() {
    let world = world();
    world.refuses("CA", |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)).await;
    world
        .refuses("path length without CA", |params| {
            params.is_ca = IsCa::NoCa;
            params.custom_extensions.push(extension(BASIC, &[0x30, 3, 2, 1, 0], true));
        })
        .await;
}

#[tokio::test]
async fn h_16_key_usage() {
    let world = world();
    world.refuses("keyCertSign", |params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)).await;
    world.refuses("cRLSign", |params| params.key_usages.push(KeyUsagePurpose::CrlSign)).await;
    world.refuses("missing", |params| params.key_usages.clear()).await;
    world.refuses("no signature", |params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement]).await;
    world
        .takes("not critical", |params| {
            params.key_usages.clear();
            params.custom_extensions.push(extension(KEY_USAGE, &[3, 2, 7, 0x80], false));
        })
        .await;
}

#[tokio::test]
async fn h_17_no_path() {
    world().refuses("trust domain", |params| params.subject_alt_names = vec![uri("spiffe://example.org")]).await;
}

#[tokio::test]
async fn h_18_foreign_domains() {
    let world = world();
    let other = authority(|_| {});
    let both = World { trust: trusting(&[("example.org", &world.root), ("other.test", &other)]), root: world.root };
    for id in ["spiffe://other.test/x", "spiffe://evil.test/a"] {
        both.refuses(id, |params| params.subject_alt_names = vec![uri(id)]).await;
    }
    // Proved by its own domain, and still nobody who is let in here.
    let mut params = leaf_params("spiffe://other.test/x");
    params.distinguished_name.push(DnType::CommonName, "x");
    assert_refused("not admitted", both.lets_in(&shown(&params, &other, &[])).await.map(|_| ()));
}

#[tokio::test]
async fn h_19_times() {
    let world = world();
    let now = OffsetDateTime::now_utc();
    world.refuses("expired", |params| params.not_after = now - Duration::from_secs(2)).await;
    world.refuses("not yet", |params| params.not_before = now + Duration::from_secs(30)).await;
    world
        .refuses("backwards", |params| {
            params.not_before = now + Duration::from_secs(100);
            params.not_after = now - Duration::from_secs(100);
        })
        .await;
    world.takes("far", |params| params.not_after = rcgen::date_time_ymd(9999, 12, 31)).await;
}

#[tokio::test]
async fn h_20_intermediates_that_are_none() {
    let world = world();
    let crl_only = below(&world.root, |params| params.key_usages = vec![KeyUsagePurpose::CrlSign]);
    world.refuses_chain("cRLSign only", &crl_only, &[&crl_only]).await;
    let no_ca = below(&world.root, |params| params.is_ca = IsCa::NoCa);
    world.refuses_chain("no BasicConstraints", &no_ca, &[&no_ca]).await;
    let leaf = below(&world.root, |params| *params = leaf_params("spiffe://example.org/a"));
    world.refuses_chain("leaf", &leaf, &[&leaf]).await;
    let good = below(&world.root, |_| {});
    world.lets_in(&shown(&leaf_params(CLIENT), &good, &[&good])).await.unwrap();
    world.refuses_chain("intermediate left out", &good, &[]).await;
}

#[tokio::test]
async fn h_21_path_length() {
    let root = authority(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let one = below(&root, |_| {});
    let world = World { trust: trusting(&[("example.org", &root)]), root };
    world.refuses_chain("0 with 1", &one, &[&one]).await;
    let root = authority(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1)));
    let one = below(&root, |_| {});
    let two = below(&one, |params| params.distinguished_name.push(DnType::OrganizationName, "two"));
    let world = World { trust: trusting(&[("example.org", &root)]), root };
    world.refuses_chain("1 with 2", &two, &[&two, &one]).await;
    world.lets_in(&shown(&leaf_params(CLIENT), &one, &[&one])).await.unwrap();
}

#[tokio::test]
async fn h_22_unknown_critical_extensions() {
    let unknown = || extension(&[1, 3, 6, 1, 4, 1, 99999, 1], &[5, 0], true);
    let world = world();
    world.refuses("leaf", |params| params.custom_extensions.push(unknown())).await;
    let intermediate = below(&world.root, |params| params.custom_extensions.push(unknown()));
    world.refuses_chain("intermediate", &intermediate, &[&intermediate]).await;
    let root = authority(|params| params.custom_extensions.push(unknown()));
    let spoiled = World { trust: trusting(&[("example.org", &root)]), root };
    spoiled.refuses("root", |_| {}).await;
}

#[tokio::test]
async fn h_23_extended_key_usage() {
    let world = world();
    let with = |purposes: &[ExtendedKeyUsagePurpose], id: &str| {
        let mut params = leaf_params(id);
        params.extended_key_usages = purposes.to_vec();
        shown(&params, &world.root, &[])
    };
    let (server, client) = (ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth);
    assert_refused("serverAuth", world.lets_in(&with(std::slice::from_ref(&server), CLIENT)).await.map(|_| ()));
    assert_refused("clientAuth", world.accepts(&with(std::slice::from_ref(&client), SERVER)).await);
    world.accepts(&with(&[server], SERVER)).await.unwrap();
    world.lets_in(&with(&[client], CLIENT)).await.unwrap();
    world
        .refuses("codeSigning", |params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning])
        .await;
    world
        .refuses("empty", |params| {
            params.extended_key_usages.clear();
            params.custom_extensions.push(extension(EXTENDED_USAGE, &[0x30, 0], false));
        })
        .await;
}

#[tokio::test]
async fn h_24_name_constraints() {
    // permittedSubtrees with one URI host.
    let permitting = |host: &[u8]| {
        let length = u8::try_from(host.len()).unwrap();
        let mut content = vec![0x30, length + 6, 0xa0, length + 4, 0x30, length + 2, 0x86, length];
        content.extend_from_slice(host);
        extension(&[2, 5, 29, 30], &content, true)
    };
    for host in [&b"example.org"[..], b"other.test"] {
        let root = authority(|params| params.custom_extensions.push(permitting(host)));
        let world = World { trust: trusting(&[("example.org", &root)]), root };
        world.refuses("name constraints", |_| {}).await;
    }
}

#[tokio::test]
async fn h_25_an_extension_twice() {
    let world = world();
    world
        .refuses("two SANs", |params| {
            params.custom_extensions.push(extension(ALT_NAME, &raw_uri(CLIENT.as_bytes()), false))
        })
        .await;
    world
        .refuses("two KeyUsages", |params| params.custom_extensions.push(extension(KEY_USAGE, &[3, 2, 7, 0x80], true)))
        .await;
}

#[tokio::test]
async fn h_27_many_certificates_cost_little() {
    let world = world();
    let mut chain = vec![below(&world.root, |_| {})];
    for number in 0..12 {
        let next = below(chain.last().unwrap(), |params| {
            params.distinguished_name.push(DnType::OrganizationName, format!("level {number}"));
        });
        chain.push(next);
    }
    let by = chain.last().unwrap();
    let rest: Vec<&Authority> = chain.iter().rev().collect();
    let before = tokio::time::Instant::now();
    world.refuses_chain("a chain of 14", by, &rest).await;
    let same: Vec<&Authority> = std::iter::repeat_n(&chain[0], 60).collect();
    assert!(world.lets_in(&shown(&leaf_params(CLIENT), by, &same)).await.is_err());
    assert!(before.elapsed() < Duration::from_secs(2), "{:?}", before.elapsed());
}

#[tokio::test]
async fn h_30_uris_that_are_no_text() {
    let world = world();
    for (what, bytes) in [
        ("NUL", &b"spiffe://example.org/a\0b"[..]),
        ("eight bits", b"spiffe://example.org/a\xc3\xa4"),
        ("empty", b""),
        ("not SPIFFE", b"https://example.org/a"),
    ] {
        world
            .refuses(what, |params| {
                params.subject_alt_names.clear();
                params.custom_extensions.push(extension(ALT_NAME, &raw_uri(bytes), true));
            })
            .await;
    }
}

#[tokio::test]
async fn tls_1_2_is_spoken_and_nothing_is_resumed() {
    let world = world();
    let plain = server_config(&Rotating::new(), ClientVerifier::new(Arc::clone(&world.trust))).unwrap();
    assert_eq!((plain.send_tls13_tickets, plain.alpn_protocols.clone()), (0, vec![b"h2".to_vec()]));
    assert!(!plain.session_storage.can_cache());
    let mut server = (*plain).clone();
    server.cert_resolver = Arc::new(shown(&leaf_params(SERVER), &world.root, &[]));
    let verifier = ServerVerifier::new(Arc::clone(&world.trust), SpiffeId::parse(SERVER).unwrap());
    let client = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_client_cert_resolver(Arc::new(shown(&leaf_params(CLIENT), &world.root, &[])));
    let (served, called) = handshake(Arc::new(server), Arc::new(client)).await;
    called.unwrap();
    assert_eq!(served.unwrap().unwrap().id.as_str(), CLIENT);
}

#[tokio::test]
async fn a_key_of_another_pair_is_not_shown() {
    let world = world();
    let own = Rotating::new();
    let (one, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
    let leaf = leaf_params(SERVER).signed_by(&one, &world.root.issuer).unwrap();
    let chain = [Bytes::copy_from_slice(leaf.der())];
    let key = |pair: &KeyPair| PrivateKey::from_pkcs8(pair.serialize_der()).unwrap();
    assert!(matches!(own.set(&chain, &key(&other)), Err(crate::rotating::TlsError::NotAPair(_))));
    assert!(!own.is_set());
    own.set(&chain, &key(&one)).unwrap();
    assert!(own.is_set());
}
