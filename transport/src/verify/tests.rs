//! Hostile certificates in real handshakes, shown by a client to our server and by a server to our client.

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PublicKeyData as _, SanType, SigningKey as _,
};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{AlertDescription, ClientConfig, ServerConfig};
use spiffe::bundle::{Bundle, X509Authority};
use spiffe::id::TrustDomain;
use spiffe::x509::PrivateKey;
use time::OffsetDateTime;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;
use crate::rotating::{Rotating, client_config, server_config};

const SERVER: &str = "spiffe://example.org/spire/server";
const CLIENT: &str = "spiffe://example.org/spire/agent/x";

/// The time at which handshakes take place, in Unix seconds (2027-01-15).
const NOW: i64 = 1_800_000_000;

fn at(seconds: i64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(seconds).unwrap()
}

struct Trusted {
    bundles: std::collections::BTreeMap<TrustDomain, Arc<Bundle>>,
}

impl Trust for Trusted {
    fn bundles(&self) -> Arc<dyn Bundles + Send + Sync> {
        Arc::new(self.bundles.clone())
    }

    fn now(&self) -> SystemTime {
        at(NOW).into()
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
    params.not_before = at(NOW - 60);
    params.not_after = at(NOW + 3600);
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
    let chain = std::iter::once(leaf.der().to_vec()).chain(rest.iter().map(|authority| authority.der.to_vec()));
    shown_as(chain.collect(), &key)
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

/// Runs one handshake, after which the server sends a byte; what each side says of it, and whom the server saw.
async fn handshake(
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
) -> (std::io::Result<Option<Arc<VerifiedChain>>>, std::io::Result<()>) {
    let (near, far) = tokio::io::duplex(1 << 20);
    let serving = async {
        let (done, found) = remembering(TlsAcceptor::from(server).accept(far)).await;
        let mut stream = done?;
        // A client that refuses the server may have gone already.
        let _ = stream.write_all(b"x").await.and(stream.flush().await);
        std::io::Result::Ok((stream, found))
    };
    let calling = async {
        let name = ServerName::try_from("spiffe.invalid").unwrap();
        let mut stream = TlsConnector::from(client).connect(name, near).await?;
        // In TLS 1.3 a client learns only now that it was refused.
        stream.read_u8().await.map(|_| ())
    };
    let (served, called) = tokio::join!(serving, calling);
    (served.map(|(_, found)| found), called)
}

/// What the refused side gets to know when the verifier refuses: no more than that its certificate is the reason.
const REFUSED: AlertDescription = AlertDescription::CertificateUnknown;

impl World {
    /// What our server and a client that shows this say of a handshake.
    async fn with_client(&self, client: &Shown) -> (std::io::Result<Option<Arc<VerifiedChain>>>, std::io::Result<()>) {
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
        handshake(server, Arc::new(config)).await
    }

    /// What a server that shows this and our client say of a handshake.
    async fn with_server(&self, server: &Shown) -> (std::io::Result<Option<Arc<VerifiedChain>>>, std::io::Result<()>) {
        let plain = server_config(&Rotating::new(), ClientVerifier::new(Arc::clone(&self.trust))).unwrap();
        let mut config = (*plain).clone();
        config.cert_resolver = Arc::new(server.clone());
        let expected = SpiffeId::parse(SERVER).unwrap();
        let client = client_config(None, ServerVerifier::new(Arc::clone(&self.trust), expected)).unwrap();
        handshake(Arc::new(config), client).await
    }

    /// Asserts that our server lets in a client that shows this.
    async fn lets_in(&self, what: &str, client: &Shown) {
        let (served, called) = self.with_client(client).await;
        let found = served.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(found.map(|found| found.id.to_string()).as_deref(), Some(CLIENT), "{what}");
        called.unwrap_or_else(|error| panic!("{what}: {error}"));
    }

    /// Asserts that our client accepts a server that shows this.
    async fn accepts(&self, what: &str, server: &Shown) {
        let (served, called) = self.with_server(server).await;
        called.unwrap_or_else(|error| panic!("{what}: {error}"));
        assert_eq!(served.unwrap_or_else(|error| panic!("{what}: {error}")), None, "{what}");
    }

    /// Asserts that our server refuses a client that shows this, for a reason that begins like this.
    async fn turns_away(&self, what: &str, reason: &str, alert: AlertDescription, client: &Shown) {
        let (served, called) = self.with_client(client).await;
        assert_reason(what, reason, served.map(|_| ()));
        assert_alert(what, alert, called);
    }

    /// Asserts that our client refuses a server that shows this, for a reason that begins like this.
    async fn rejects(&self, what: &str, reason: &str, alert: AlertDescription, server: &Shown) {
        let (served, called) = self.with_server(server).await;
        assert_reason(what, reason, called);
        assert_alert(what, alert, served.map(|_| ()));
    }

    /// Asserts that what `make` makes for an id is refused by our server and by our client.
    async fn refuses_shown(&self, what: &str, reason: &str, make: impl Fn(&str) -> Shown) {
        self.turns_away(what, reason, REFUSED, &make(CLIENT)).await;
        self.rejects(what, reason, REFUSED, &make(SERVER)).await;
    }

    /// Asserts that a leaf spoiled by `spoil` is refused in both roles.
    async fn refuses(&self, what: &str, reason: &str, spoil: impl Fn(&mut CertificateParams)) {
        let make = |id: &str| {
            let mut params = leaf_params(id);
            spoil(&mut params);
            shown(&params, &self.root, &[])
        };
        self.refuses_shown(what, reason, make).await;
    }

    async fn refuses_chain(&self, what: &str, reason: &str, by: &Authority, rest: &[&Authority]) {
        self.refuses_shown(what, reason, |id| shown(&leaf_params(id), by, rest)).await;
    }

    async fn takes(&self, what: &str, change: impl Fn(&mut CertificateParams)) {
        let make = |id| {
            let mut params = leaf_params(id);
            change(&mut params);
            shown(&params, &self.root, &[])
        };
        self.lets_in(what, &make(CLIENT)).await;
        self.accepts(what, &make(SERVER)).await;
    }

    async fn takes_chain(&self, what: &str, by: &Authority, rest: &[&Authority]) {
        self.lets_in(what, &shown(&leaf_params(CLIENT), by, rest)).await;
        self.accepts(what, &shown(&leaf_params(SERVER), by, rest)).await;
    }
}

fn tls_error(what: &str, outcome: std::io::Result<()>) -> rustls::Error {
    let error = outcome.expect_err(what);
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    tls.unwrap_or_else(|| panic!("{what}: {error:?}")).clone()
}

/// Why the side that refused did so: the verifier's own words, if it was the verifier.
fn assert_reason(what: &str, reason: &str, outcome: std::io::Result<()>) {
    let error = tls_error(what, outcome);
    let found = match &error {
        rustls::Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) => {
            match cause.downcast_ref::<PeerRefused>() {
                Some(PeerRefused::Unverified(error)) => format!("{error:?}"),
                other => format!("{:?}", other.unwrap()),
            }
        }
        other => format!("{other:?}"),
    };
    assert!(found.starts_with(reason), "{what}: {found}, not {reason}");
}

fn assert_alert(what: &str, alert: AlertDescription, outcome: std::io::Result<()>) {
    assert_eq!(tls_error(what, outcome), rustls::Error::AlertReceived(alert), "{what}");
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

fn wrap(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = u32::try_from(content.len()).unwrap().to_be_bytes();
    let head = match content.len() {
        0..0x80 => vec![tag, length[3]],
        0x80..0x100 => vec![tag, 0x81, length[3]],
        0x100..0x1_0000 => vec![tag, 0x82, length[2], length[3]],
        _ => vec![tag, 0x83, length[1], length[2], length[3]],
    };
    [&head, content].concat()
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    wrap(0x30, &parts.concat())
}

/// A subject alternative name with one URI of these bytes.
fn raw_uri(bytes: &[u8]) -> Vec<u8> {
    sequence(&[&wrap(0x86, bytes)])
}

const ECDSA_SHA256: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
const ECDSA_SHA1: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x04\x01";
const RSA_MD5: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x04\x05\x00";
const RSA: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
const EC_P256: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const EC_SECP256K1: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x0a";

/// A leaf that no library would make, part by part.
struct Raw {
    version_3: bool,
    algorithm: &'static [u8],
    not_after: Vec<u8>,
    /// The key that it certifies, instead of the one that signs the handshake.
    key: Option<Vec<u8>>,
}

impl Raw {
    fn good() -> Self {
        Self { version_3: true, algorithm: ECDSA_SHA256, not_after: wrap(0x18, b"20990101000000Z"), key: None }
    }

    fn spki(algorithm: &[u8], key: &[u8]) -> Option<Vec<u8>> {
        Some(sequence(&[&sequence(&[algorithm]), &wrap(3, &[&[0], key].concat())]))
    }

    fn rsa(modulus: usize, exponent: u8) -> Option<Vec<u8>> {
        let modulus = [&[0][..], &vec![0xab; modulus]].concat();
        Self::spki(RSA, &sequence(&[&wrap(2, &modulus), &wrap(2, &[exponent])]))
    }

    fn shown(&self, id: &str, by: &Authority) -> Shown {
        let key = KeyPair::generate().unwrap();
        let extension = |oid: &[u8], content: &[u8]| sequence(&[oid, &[1, 1, 0xff], &wrap(4, content)]);
        let extensions = sequence(&[
            &extension(&[6, 3, 0x55, 0x1d, 15], &[3, 2, 7, 0x80]),
            &extension(&[6, 3, 0x55, 0x1d, 17], &raw_uri(id.as_bytes())),
        ]);
        let (version, extensions) =
            if self.version_3 { (vec![0xa0, 3, 2, 1, 2], wrap(0xa3, &extensions)) } else { Default::default() };
        let algorithm = sequence(&[self.algorithm]);
        let body = sequence(&[
            &version,
            &[2, 1, 1],
            &algorithm,
            &Certificate::parse(by.der.clone()).unwrap().subject,
            &sequence(&[&wrap(0x17, b"260101000000Z"), &self.not_after]),
            &sequence(&[]),
            &self.key.clone().unwrap_or_else(|| key.subject_public_key_info()),
            &extensions,
        ]);
        let signature = by.issuer.key().sign(&body).unwrap();
        let der = sequence(&[&body, &algorithm, &wrap(3, &[&[0], &signature[..]].concat())]);
        shown_as(vec![der], &key)
    }
}

/// Shows these bytes as certificates, and signs the handshake by `key`.
fn shown_as(chain: Vec<Vec<u8>>, key: &KeyPair) -> Shown {
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).unwrap();
    Shown(Arc::new(CertifiedKey::new(chain.into_iter().map(CertificateDer::from).collect(), signer)))
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
    world.rejects("agent as server", "AnotherId", REFUSED, &shown(&leaf_params(CLIENT), &world.root, &[])).await;
    let other = authority(|_| {});
    for (id, good) in [(SERVER, true), (CLIENT, false)] {
        let plain = server_config(&Rotating::new(), ClientVerifier::new(Arc::clone(&world.trust))).unwrap();
        let mut config = (*plain).clone();
        config.cert_resolver = Arc::new(shown(&leaf_params(id), &other, &[]));
        let verifier = ServerVerifier::insecure_bootstrap(SpiffeId::parse(SERVER).unwrap());
        let (served, called) = handshake(Arc::new(config), client_config(None, verifier).unwrap()).await;
        if good {
            called.unwrap();
        } else {
            assert_reason(id, "AnotherId", called);
            assert_alert(id, REFUSED, served.map(|_| ()));
        }
    }
}

#[tokio::test]
async fn h_13_several_uris() {
    let world = world();
    for others in ["spiffe://example.org/b", "https://x.test/", CLIENT, SERVER] {
        let reason = "Leaf(UriCount { count: 2 })";
        world.refuses(others, reason, |params| params.subject_alt_names.push(uri(others))).await;
    }
}

#[tokio::test]
async fn h_14_no_uri() {
    let world = world();
    let reason = "Leaf(UriCount { count: 0 })";
    world
        .refuses("common name", reason, |params| {
            params.subject_alt_names.clear();
            params.distinguished_name.push(DnType::CommonName, CLIENT);
        })
        .await;
    let dns = || SanType::DnsName("example.org".try_into().unwrap());
    world.refuses("DNS name", reason, |params| params.subject_alt_names = vec![dns()]).await;
    // otherName { 1.2.3, [0] UTF8String }
    let other = sequence(&[&wrap(0xa0, &[&[6, 2, 0x2a, 3][..], &wrap(0xa0, &wrap(0x0c, CLIENT.as_bytes()))].concat())]);
    world
        .refuses("otherName", reason, |params| {
            params.subject_alt_names.clear();
            params.custom_extensions.push(extension(ALT_NAME, &other, true));
        })
        .await;
}

#[tokio::test]
async fn h_15_authorities_as_leaves() {
    let world = world();
    let reason = "Leaf(LeafIsAuthority)";
    world.refuses("CA", reason, |params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)).await;
    world
        .refuses("path length without CA", reason, |params| {
            params.is_ca = IsCa::NoCa;
            params.custom_extensions.push(extension(BASIC, &[0x30, 3, 2, 1, 0], true));
        })
        .await;
}

#[tokio::test]
async fn h_16_key_usage() {
    let world = world();
    let (signs, silent) = ("Leaf(LeafMaySign)", "Leaf(NoDigitalSignature)");
    world.refuses("keyCertSign", signs, |params| params.key_usages.push(KeyUsagePurpose::KeyCertSign)).await;
    world.refuses("cRLSign", signs, |params| params.key_usages.push(KeyUsagePurpose::CrlSign)).await;
    world.refuses("missing", silent, |params| params.key_usages.clear()).await;
    world.refuses("no signature", silent, |params| params.key_usages = vec![KeyUsagePurpose::KeyAgreement]).await;
    world
        .takes("not critical", |params| {
            params.key_usages.clear();
            params.custom_extensions.push(extension(KEY_USAGE, &[3, 2, 7, 0x80], false));
        })
        .await;
}

#[tokio::test]
async fn h_17_no_path() {
    let id = "spiffe://example.org";
    world().refuses(id, "Leaf(NoPath)", |params| params.subject_alt_names = vec![uri(id)]).await;
}

#[tokio::test]
async fn h_18_foreign_domains() {
    let world = world();
    let other = authority(|_| {});
    let both = World { trust: trusting(&[("example.org", &world.root), ("other.test", &other)]), root: world.root };
    let (foreign, unknown) = ("spiffe://other.test/x", "spiffe://evil.test/a");
    let named = |id| move |params: &mut CertificateParams| params.subject_alt_names = vec![uri(id)];
    // Both roots have one name, so the foreign one is tried.
    both.refuses(foreign, "Path(InvalidSignatureForPublicKey)", named(foreign)).await;
    both.refuses(unknown, "UnknownTrustDomain", named(unknown)).await;
    // Proved by its own domain, and still nobody who is let in here, and not the server.
    let proved = shown(&leaf_params(foreign), &other, &[]);
    both.turns_away("not admitted", "NotAdmitted(SpiffeId(spiffe://other.test/x))", REFUSED, &proved).await;
    both.rejects("another domain", "AnotherId", REFUSED, &proved).await;
    let one = World { trust: trusting(&[("example.org", &both.root)]), root: both.root };
    one.refuses(foreign, "UnknownTrustDomain", named(foreign)).await;
}

#[tokio::test]
async fn h_19_times() {
    let world = world();
    world.refuses("expired", "Path(CertExpired", |params| params.not_after = at(NOW - 1)).await;
    world.refuses("not yet", "Path(CertNotValidYet", |params| params.not_before = at(NOW + 1)).await;
    world.takes("now and never else", |params| (params.not_before, params.not_after) = (at(NOW), at(NOW))).await;
    world
        .refuses("backwards", "Path(InvalidCertValidity)", |params| {
            (params.not_before, params.not_after) = (at(NOW + 100), at(NOW - 100));
        })
        .await;
    world.takes("far", |params| params.not_after = at(253_402_300_799)).await;
    // Two digits of a year from 50 on are of the last century, before all time that webpki knows.
    let early = Raw { not_after: wrap(0x17, b"500101000000Z"), ..Raw::good() };
    world.refuses_shown("2050 as UTCTime", "Path(BadDerTime)", |id| early.shown(id, &world.root)).await;
    let late = Raw { not_after: wrap(0x17, b"491231235959Z"), ..Raw::good() };
    world.lets_in("2049 as UTCTime", &late.shown(CLIENT, &world.root)).await;
    world.accepts("2049 as UTCTime", &late.shown(SERVER, &world.root)).await;
}

#[tokio::test]
async fn h_20_intermediates_that_are_none() {
    let world = world();
    let crl_only = below(&world.root, |params| params.key_usages = vec![KeyUsagePurpose::CrlSign]);
    world.refuses_chain("cRLSign only", "Intermediate(NoCertSign)", &crl_only, &[&crl_only]).await;
    let no_ca = below(&world.root, |params| params.is_ca = IsCa::NoCa);
    world.refuses_chain("no BasicConstraints", "Path(EndEntityUsedAsCa)", &no_ca, &[&no_ca]).await;
    let leaf = below(&world.root, |params| *params = leaf_params("spiffe://example.org/a"));
    world.refuses_chain("leaf", "Path(EndEntityUsedAsCa)", &leaf, &[&leaf]).await;
    let good = below(&world.root, |_| {});
    world.takes_chain("good", &good, &[&good]).await;
    world.refuses_chain("intermediate left out", "Path(UnknownIssuer)", &good, &[]).await;
}

#[tokio::test]
async fn h_21_path_length() {
    let root = authority(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0)));
    let one = below(&root, |_| {});
    let world = World { trust: trusting(&[("example.org", &root)]), root };
    world.refuses_chain("0 with 1", "PathLength", &one, &[&one]).await;
    let root = authority(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1)));
    let one = below(&root, |_| {});
    let two = below(&one, |params| params.distinguished_name.push(DnType::OrganizationName, "two"));
    let world = World { trust: trusting(&[("example.org", &root)]), root };
    world.refuses_chain("1 with 2", "PathLength", &two, &[&two, &one]).await;
    world.takes_chain("1 with 1", &one, &[&one]).await;
}

#[tokio::test]
async fn h_22_unknown_critical_extensions() {
    let unknown = || extension(&[1, 3, 6, 1, 4, 1, 99999, 1], &[5, 0], true);
    let reason = "Path(UnsupportedCriticalExtension)";
    let world = world();
    world.refuses("leaf", reason, |params| params.custom_extensions.push(unknown())).await;
    let intermediate = below(&world.root, |params| params.custom_extensions.push(unknown()));
    world.refuses_chain("intermediate", reason, &intermediate, &[&intermediate]).await;
    let root = authority(|params| params.custom_extensions.push(unknown()));
    let spoiled = World { trust: trusting(&[("example.org", &root)]), root };
    spoiled.refuses("root", "NoAuthority", |_| {}).await;
}

#[tokio::test]
async fn h_23_extended_key_usage() {
    let world = world();
    let with = |purposes: &[ExtendedKeyUsagePurpose], id: &str| {
        let mut params = leaf_params(id);
        params.extended_key_usages = purposes.to_vec();
        shown(&params, &world.root, &[])
    };
    let server = || [ExtendedKeyUsagePurpose::ServerAuth];
    let client = || [ExtendedKeyUsagePurpose::ClientAuth];
    let reason = "Path(RequiredEkuNotFoundContext";
    world.turns_away("serverAuth", reason, REFUSED, &with(&server(), CLIENT)).await;
    world.rejects("clientAuth", reason, REFUSED, &with(&client(), SERVER)).await;
    world.accepts("serverAuth", &with(&server(), SERVER)).await;
    world.lets_in("clientAuth", &with(&client(), CLIENT)).await;
    let signing = || vec![ExtendedKeyUsagePurpose::CodeSigning];
    world.refuses("codeSigning", reason, |params| params.extended_key_usages = signing()).await;
    world
        .refuses("empty", "Path(EmptyEkuExtension)", |params| {
            params.extended_key_usages.clear();
            params.custom_extensions.push(extension(EXTENDED_USAGE, &[0x30, 0], false));
        })
        .await;
}

#[tokio::test]
async fn h_24_name_constraints() {
    // permittedSubtrees [0] or excludedSubtrees [1], each of one URI host.
    let constraint = |tree: u8, host: &str| {
        let subtree = sequence(&[&wrap(0x86, host.as_bytes())]);
        extension(&[2, 5, 29, 30], &sequence(&[&wrap(tree, &subtree)]), true)
    };
    for (tree, host) in [(0xa0, "example.org"), (0xa1, "example.org"), (0xa0, "other.test")] {
        let what = format!("{tree:x} {host}");
        let root = authority(|params| params.custom_extensions.push(constraint(tree, host)));
        let world = World { trust: trusting(&[("example.org", &root)]), root };
        world.refuses(&what, "NameConstraints(", |_| {}).await;
        let world = self::world();
        let middle = below(&world.root, |params| params.custom_extensions.push(constraint(tree, host)));
        world.refuses_chain(&what, "NameConstraints(", &middle, &[&middle]).await;
    }
}

#[tokio::test]
async fn h_25_an_extension_twice() {
    let world = world();
    let reason = "Leaf(DuplicateExtension)";
    let name = || extension(ALT_NAME, &raw_uri(CLIENT.as_bytes()), false);
    world.refuses("two SANs", reason, |params| params.custom_extensions.push(name())).await;
    let usage = || extension(KEY_USAGE, &[3, 2, 7, 0x80], true);
    world.refuses("two KeyUsages", reason, |params| params.custom_extensions.push(usage())).await;
    let middle = below(&world.root, |params| params.custom_extensions.push(usage()));
    world.refuses_chain("intermediate", "Intermediate(DuplicateExtension)", &middle, &[&middle]).await;
}

#[tokio::test]
async fn h_26_old_versions_and_weak_keys() {
    let world = world();
    world.lets_in("nothing wrong", &Raw::good().shown(CLIENT, &world.root)).await;
    world.accepts("nothing wrong", &Raw::good().shown(SERVER, &world.root)).await;
    // All of these sign the handshake well; whether they could is not asked any more.
    let off_curve = [&[4][..], &[7; 64]].concat();
    for (what, reason, raw) in [
        ("version 1", "Leaf(Version)", Raw { version_3: false, ..Raw::good() }),
        ("SHA-1", "Path(UnsupportedSignatureAlgorithmContext", Raw { algorithm: ECDSA_SHA1, ..Raw::good() }),
        ("MD5", "Path(UnsupportedSignatureAlgorithmContext", Raw { algorithm: RSA_MD5, ..Raw::good() }),
        ("RSA-1024", "Leaf(Key(RsaSize { bits: 1024 }))", Raw { key: Raw::rsa(128, 3), ..Raw::good() }),
        ("RSA with e=1", "Leaf(Key(RsaExponent))", Raw { key: Raw::rsa(256, 1), ..Raw::good() }),
        ("secp256k1", "Leaf(Key(Unsupported))", Raw { key: Raw::spki(EC_SECP256K1, &off_curve), ..Raw::good() }),
        ("off the curve", "Leaf(Key(NotOnCurve))", Raw { key: Raw::spki(EC_P256, &off_curve), ..Raw::good() }),
    ] {
        world.refuses_shown(what, reason, |id| raw.shown(id, &world.root)).await;
    }
}

#[tokio::test]
async fn h_27_chains_beyond_the_limits() {
    let world = world();
    let mut levels = vec![below(&world.root, |_| {})];
    for number in 0..12 {
        let next = below(levels.last().unwrap(), |params| {
            params.distinguished_name.push(DnType::OrganizationName, format!("level {number}"));
        });
        levels.push(next);
    }
    let top_down = |count: usize| -> Vec<&Authority> { levels[..count].iter().rev().collect() };
    world.takes_chain("six intermediates", &levels[5], &top_down(6)).await;
    world.refuses_chain("a chain of 14", "Path(MaximumPathDepthExceeded)", &levels[12], &top_down(13)).await;

    let same = |count| -> Vec<&Authority> { std::iter::repeat_n(&levels[0], count).collect() };
    world.takes_chain("15 times the same", &levels[0], &same(15)).await;
    for count in [16, 99] {
        let reason = format!("TooManyCertificates {{ count: {} }}", count + 1);
        world.refuses_chain("too many times the same", &reason, &levels[0], &same(count)).await;
    }

    // Self-issued authorities of one name: each could be the issuer of each.
    let twin = |_| authority(|params| params.distinguished_name.push(DnType::CommonName, "twin"));
    let twins: Vec<Authority> = (0..15).map(twin).collect();
    world.refuses_chain("twins", "TooManyPaths", &twins[0], &twins.iter().collect::<Vec<_>>()).await;

    // What TLS itself does not take, whoever sends it: 1000 intermediates, and 15 MiB in one.
    let key = KeyPair::generate().unwrap();
    let thousand = shown_as(vec![levels[0].der.to_vec(); 1000], &key);
    let huge = shown_as(vec![vec![0; 15 << 20]], &key);
    for (what, shown) in [("1000", &thousand), ("15 MiB", &huge)] {
        let reason = "InvalidMessage(HandshakePayloadTooLarge)";
        assert_reason(what, reason, world.with_client(shown).await.0.map(|_| ()));
        assert_reason(what, reason, world.with_server(shown).await.1);
    }
}

#[tokio::test]
async fn h_28_what_is_not_one_chain_of_certificates() {
    let world = world();
    let spoilt = |id: &str, spoil: &dyn Fn(&[u8]) -> Vec<u8>| {
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(id).signed_by(&key, &world.root.issuer).unwrap();
        shown_as(vec![spoil(leaf.der())], &key)
    };
    let pem = |der: &[u8]| spiffe::bundle::certificates_to_pem([&Bytes::copy_from_slice(der)]).into_bytes();
    let trailing = |der: &[u8]| [der, &[0]].concat();
    // The outer sequence without a length, which only BER allows.
    let indefinite = |der: &[u8]| [&[0x30, 0x80], &der[4..], &[0, 0]].concat();
    let empty = |_: &[u8]| Vec::new();
    for (what, reason, spoil) in [
        ("PEM", "Leaf(Malformed)", &pem as &dyn Fn(&[u8]) -> Vec<u8>),
        ("trailing byte", "Leaf(TrailingData)", &trailing),
        ("indefinite length", "Leaf(Malformed)", &indefinite),
        ("empty certificate", "Leaf(Malformed)", &empty),
    ] {
        world.refuses_shown(what, reason, |id| spoilt(id, spoil)).await;
    }

    // The key of another pair: the certificate is good, the proof that it is the sender's is not.
    let stolen = |id: &str| {
        let key = KeyPair::generate().unwrap();
        let leaf = leaf_params(id).signed_by(&key, &world.root.issuer).unwrap();
        shown_as(vec![leaf.der().to_vec()], &KeyPair::generate().unwrap())
    };
    let (reason, alert) = ("InvalidCertificate(BadSignature)", AlertDescription::DecryptError);
    world.turns_away("stolen", reason, alert, &stolen(CLIENT)).await;
    world.rejects("stolen", reason, alert, &stolen(SERVER)).await;

    world.takes_chain("root appended", &world.root, &[&world.root]).await;
    // An empty chain is no certificate, and who shows none has nothing to prove; a server has to show one.
    let nobody = shown_as(Vec::new(), &KeyPair::generate().unwrap());
    let alert = AlertDescription::UnexpectedMessage;
    world.turns_away("a proof of nothing", "InappropriateHandshakeMessage", alert, &nobody).await;
    assert_reason("no certificate", "NoCertificatesPresented", world.with_server(&nobody).await.1);
}

#[tokio::test]
async fn h_30_uris_that_are_no_text() {
    let world = world();
    let with = |bytes: Vec<u8>| {
        move |params: &mut CertificateParams| {
            params.subject_alt_names.clear();
            params.custom_extensions.push(extension(ALT_NAME, &raw_uri(&bytes), true));
        }
    };
    for (what, reason, bytes) in [
        ("NUL", "Leaf(Id(PathCharacter))", b"spiffe://example.org/a\0b".to_vec()),
        ("eight bits", "Leaf(Id(PathCharacter))", b"spiffe://example.org/a\xc3".to_vec()),
        ("empty", "Leaf(Id(Empty))", Vec::new()),
        ("not SPIFFE", "Leaf(Id(Scheme))", b"https://example.org/a".to_vec()),
        ("as long as TLS takes", "Leaf(Id(TooLong))", vec![b'a'; 60_000]),
    ] {
        world.refuses(what, reason, with(bytes)).await;
    }
    let mut params = leaf_params(CLIENT);
    with(vec![b'a'; 1 << 20])(&mut params);
    let huge = shown(&params, &world.root, &[]);
    let reason = "InvalidMessage(HandshakePayloadTooLarge)";
    assert_reason("1 MiB", reason, world.with_client(&huge).await.0.map(|_| ()));
    assert_reason("1 MiB", reason, world.with_server(&huge).await.1);
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
