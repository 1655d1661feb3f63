#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by ending with them")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use bytes::Bytes;
use rcgen::{CertificateParams, CertificateSigningRequestParams, Issuer as Ca, KeyPair};
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Trigger};
use runtime::telemetry::{Level, Limiter};
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::jwt::{Algorithm, encoded_header, signing_input, with_signature};
use spiffe::selector::{Selector, SelectorSet};
use spiffe::x509::{KeyType, PrivateKey, X509Svid};
use spiffe_proto::health::HealthCheckRequest;
use spiffe_proto::health::health_client::HealthClient;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use spiffe_proto::workload::{
    JwtBundlesRequest, JwtsvidRequest, ValidateJwtsvidRequest, WitsvidRequest, X509BundlesRequest, X509svidRequest,
    X509svidResponse,
};
use spiffe_proto::{agent_debug, agent_logger, types};
use tokio::time::timeout;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};
use transport::serve::UnixLimits;
use zeroize::Zeroizing;

use super::*;
use crate::cache::{Entry, IssueError, Issuer, Limits, SignedJwt, SigningRequest, Update};
use crate::workload::unix::Unix;
use crate::workload::{Begun, Caller, WorkloadAttestor};

const PATIENCE: Duration = Duration::from_secs(20);

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&trust_domain(), path).unwrap()
}

/// A JWT key and its public half.
struct Tokens {
    key: EcdsaKeyPair,
    authority: JwtAuthority,
}

impl Tokens {
    fn new(key_id: &str) -> Self {
        let private = PrivateKey::generate(KeyType::EcP256).unwrap();
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, private.expose_pkcs8()).unwrap();
        let public_key = private.public_key().spki_der().clone();
        let authority = JwtAuthority { key_id: key_id.into(), public_key, expires_at: None, tainted: false };
        Self { key, authority }
    }

    fn sign(&self, claims: serde_json::Value) -> String {
        let serde_json::Value::Object(claims) = claims else { panic!("claims are an object") };
        let input = signing_input(&encoded_header(Algorithm::Es256, &self.authority.key_id), &claims).unwrap();
        let signature = self.key.sign(&SystemRandom::new(), input.as_bytes()).unwrap();
        with_signature(input, signature.as_ref())
    }
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
}

/// The server: signs for the entries that it is told.
struct Signs {
    ca: Ca<'static, KeyPair>,
    root: Bytes,
    tokens: Tokens,
    ids: Mutex<HashMap<String, SpiffeId>>,
}

impl Signs {
    fn new() -> Arc<Self> {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        let root = Bytes::copy_from_slice(params.self_signed(&key).unwrap().der());
        let (ca, tokens) = (Ca::new(params, key), Tokens::new("kid-1"));
        Arc::new(Self { ca, root, tokens, ids: Mutex::default() })
    }

    fn bundle(&self) -> Bundle {
        let mut bundle = Bundle::empty(trust_domain());
        bundle.x509.push(X509Authority { der: self.root.clone(), tainted: false });
        bundle.jwt.push(self.tokens.authority.clone());
        bundle
    }

    fn id_of(&self, entry: &str) -> Option<SpiffeId> {
        self.ids.lock().unwrap().get(entry).cloned()
    }

    fn chain(&self, request: &SigningRequest) -> Option<Vec<Bytes>> {
        let id = self.id_of(&request.entry_id)?;
        let mut csr = CertificateSigningRequestParams::from_der(&request.csr.to_vec().into()).unwrap();
        csr.params.subject_alt_names = vec![rcgen::SanType::URI(id.as_str().try_into().unwrap())];
        csr.params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
        csr.params.is_ca = rcgen::IsCa::ExplicitNoCa;
        let now = time::OffsetDateTime::now_utc();
        (csr.params.not_before, csr.params.not_after) = (now - PATIENCE, now + Duration::from_secs(3600));
        Some(vec![Bytes::copy_from_slice(csr.signed_by(&self.ca).unwrap().der())])
    }
}

#[async_trait]
impl Issuer for Signs {
    async fn sign_x509(&self, requests: &[SigningRequest]) -> Result<Vec<Result<Vec<Bytes>, IssueError>>, IssueError> {
        let refused = || IssueError::Refused { code: 5, message: "no such entry".into() };
        Ok(requests.iter().map(|request| self.chain(request).ok_or_else(refused)).collect())
    }

    async fn sign_jwt(&self, entry: &crate::cache::EntryId, audience: &[String]) -> Result<SignedJwt, IssueError> {
        let id = self.id_of(entry).ok_or(IssueError::Refused { code: 5, message: "no such entry".into() })?;
        let issued_at = Clock::system().now();
        let expires_at = issued_at + Duration::from_secs(300);
        let claims = serde_json::json!({
            "sub": id.as_str(), "aud": audience, "iat": seconds(issued_at), "exp": seconds(expires_at),
        });
        Ok(SignedJwt { token: Zeroizing::new(self.tokens.sign(claims)), id, issued_at, expires_at })
    }
}

/// Counts how often it is asked.
#[derive(Clone, Default)]
struct Counts(Arc<std::sync::atomic::AtomicUsize>);

impl WorkloadAttestor for Counts {
    fn name(&self) -> &'static str {
        "counts"
    }

    fn begin(&self, _: &Caller) -> Begun {
        self.0.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
        Begun::Says(Ok(Vec::new()))
    }
}

struct Agent {
    _folder: tempfile::TempDir,
    path: PathBuf,
    server: Arc<Signs>,
    cache: Cache,
    asked: Counts,
    trigger: Trigger,
    served: tokio::task::JoinHandle<()>,
}

impl Agent {
    /// An agent that has not heard from its server yet.
    fn start(settings: Settings) -> Self {
        let server = Signs::new();
        let log = Limiter::new(Clock::system());
        let (clock, entropy) = (Clock::system(), Entropy::seeded(7));
        let cache = Cache::new(trust_domain(), Limits::default(), server.clone(), clock.clone(), entropy, log.clone());
        let (trigger, shutdown) = Shutdown::new();
        let (signing, until) = (cache.clone(), shutdown.clone());
        tokio::spawn(async move { signing.sign_until(until, KeyType::EcP256).await });
        let asked = Counts::default();
        let attestors: Vec<Box<dyn WorkloadAttestor>> =
            vec![Box::new(Unix::new(Default::default())), Box::new(asked.clone())];
        let routes =
            workload_routes(&cache, Arc::new(Attestors::new(attestors, log.clone())), settings, clock, log.clone());
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        let listener = transport::socket::bind_unix(&path, 0o755, 0o777).unwrap();
        let served = tokio::spawn(transport::serve::unix(listener, routes, UnixLimits::for_everybody(), log, shutdown));
        Self { _folder: folder, path, server, cache, asked, trigger, served }
    }

    /// One that knows these entries, by path of their ids, all for this process.
    fn with(settings: Settings, paths: &[&str]) -> Self {
        let agent = Self::start(settings);
        let entries = paths.iter().map(|path| agent.entry(path)).collect();
        agent.cache.apply(Update { entries, bundles: vec![Arc::new(agent.server.bundle())], ..Update::default() });
        agent
    }

    fn entry(&self, path: &str) -> Arc<Entry> {
        Arc::new(self.entry_for(path, &[&format!("unix:uid:{}", nix::unistd::geteuid())]))
    }

    fn entry_for(&self, path: &str, selectors: &[&str]) -> Entry {
        let entry_id = path.trim_start_matches('/').to_owned();
        self.server.ids.lock().unwrap().insert(entry_id.clone(), id(path));
        Entry {
            id: entry_id.into(),
            spiffe_id: id(path),
            selectors: selectors.iter().map(|text| Selector::parse(text).unwrap()).collect::<SelectorSet>(),
            federates_with: Vec::new(),
            admin: false,
            downstream: false,
            revision: 1,
            created_at: 1,
            store_svid: false,
            hint: "".into(),
            disable_x509_svid_prefetch: false,
            jwt_svid_include_jti: false,
            content: None,
        }
    }

    async fn channel(&self) -> Channel {
        transport::dial::unix(&self.path).await.unwrap()
    }

    async fn client(&self) -> SpiffeWorkloadApiClient<Channel> {
        SpiffeWorkloadApiClient::new(self.channel().await).max_decoding_message_size(64 << 20)
    }

    async fn svids(&self) -> Result<Streaming<X509svidResponse>, Status> {
        self.client().await.fetch_x509svid(asked(X509svidRequest {})).await.map(tonic::Response::into_inner)
    }
}

fn asked<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", "true".parse().unwrap());
    request
}

async fn next<T>(stream: &mut Streaming<T>) -> Result<T, Status> {
    timeout(PATIENCE, stream.message()).await.unwrap().map(|message| message.expect("never ends with OK"))
}

fn ids(message: &X509svidResponse) -> Vec<&str> {
    message.svids.iter().map(|svid| svid.spiffe_id.as_str()).collect()
}

fn status<T: std::fmt::Debug>(outcome: Result<T, Status>) -> (Code, String) {
    let status = outcome.unwrap_err();
    (status.code(), status.message().to_owned())
}

/// The status of the first message of each stream and of each call.
async fn every_code(agent: &Agent) -> Vec<Code> {
    let mut client = agent.client().await;
    let mut codes = Vec::new();
    let code = |outcome: Result<(), Status>| outcome.err().map_or(Code::Ok, |status| status.code());
    codes.push(code(match agent.svids().await {
        Ok(mut stream) => next(&mut stream).await.map(drop),
        Err(status) => Err(status),
    }));
    codes.push(code(match client.fetch_x509_bundles(asked(X509BundlesRequest {})).await {
        Ok(stream) => next(&mut stream.into_inner()).await.map(drop),
        Err(status) => Err(status),
    }));
    codes.push(code(match client.fetch_jwt_bundles(asked(JwtBundlesRequest {})).await {
        Ok(stream) => next(&mut stream.into_inner()).await.map(drop),
        Err(status) => Err(status),
    }));
    let fetch = JwtsvidRequest { audience: vec!["a".into()], spiffe_id: String::new() };
    codes.push(code(client.fetch_jwtsvid(asked(fetch)).await.map(drop)));
    codes
}

#[tokio::test]
async fn before_the_first_sync_unavailable_then_permission_denied() {
    let agent = Agent::start(Settings::default());
    assert_eq!(every_code(&agent).await, [Code::Unavailable; 4]);
    let validate = ValidateJwtsvidRequest { audience: "a".into(), svid: "x".into() };
    let refused = agent.client().await.validate_jwtsvid(asked(validate.clone())).await;
    assert_eq!(status(refused).0, Code::Unavailable);
    assert_eq!(agent.asked.0.load(std::sync::atomic::Ordering::SeqCst), 0);
    agent.cache.apply(Update { bundles: vec![Arc::new(agent.server.bundle())], ..Update::default() });
    assert_eq!(every_code(&agent).await, [Code::PermissionDenied; 4]);
    let mut stream = agent.svids().await.unwrap();
    assert_eq!(status(next(&mut stream).await), (Code::PermissionDenied, "no identity issued".into()));
    let refused = agent.client().await.validate_jwtsvid(asked(validate)).await;
    assert_eq!(status(refused).0, Code::InvalidArgument);
}

#[tokio::test]
async fn svids_are_complete_and_follow_every_change() {
    let agent = Agent::with(Settings::default(), &["/b", "/a"]);
    let mut stream = agent.svids().await.unwrap();
    let first = next(&mut stream).await.unwrap();
    assert_eq!(ids(&first), [id("/a").as_str(), id("/b").as_str()]);
    for svid in &first.svids {
        let held = X509Svid::from_concatenated(&svid.x509_svid).unwrap();
        assert_eq!((held.id.as_str(), held.chain.len()), (svid.spiffe_id.as_str(), 1));
        held.check_key(&PrivateKey::from_pkcs8(svid.x509_svid_key.to_vec()).unwrap()).unwrap();
        assert_eq!((&svid.bundle, svid.hint.as_str()), (&agent.server.root, ""));
    }
    assert!(first.crl.is_empty() && first.federated_bundles.is_empty());

    // A foreign domain with authorities is shown, one without is not; the own one is never repeated.
    let foreign = TrustDomain::parse("other.test").unwrap();
    let empty = TrustDomain::parse("empty.test").unwrap();
    let mut bundle = Bundle::empty(foreign.clone());
    bundle.x509.push(X509Authority { der: agent.server.root.clone(), tainted: true });
    let federating = Entry {
        federates_with: vec![foreign, empty.clone(), trust_domain()],
        revision: 2,
        ..(*agent.entry("/a")).clone()
    };
    let bundles = vec![Arc::new(bundle), Arc::new(Bundle::empty(empty))];
    agent.cache.apply(Update { entries: vec![Arc::new(federating)], bundles, ..Update::default() });
    let federated = loop {
        let message = next(&mut stream).await.unwrap();
        if !message.federated_bundles.is_empty() {
            break message;
        }
    };
    assert_eq!(federated.federated_bundles, HashMap::from([("spiffe://other.test".into(), agent.server.root.clone())]));

    agent.cache.apply(Update { removed_entries: vec!["b".into()], ..Update::default() });
    while ids(&next(&mut stream).await.unwrap()) != [id("/a").as_str()] {}
    agent.cache.apply(Update { removed_entries: vec!["a".into()], ..Update::default() });
    let ended = loop {
        match next(&mut stream).await {
            Ok(message) => assert_eq!(ids(&message), [id("/a").as_str()]),
            Err(status) => break status,
        }
    };
    assert_eq!((ended.code(), ended.message()), (Code::PermissionDenied, "no identity issued"));
}

#[tokio::test]
async fn the_first_message_waits_for_the_last_svid_and_later_ones_do_not() {
    let agent = Agent::with(Settings::default(), &["/a"]);
    let mut settled = agent.svids().await.unwrap();
    next(&mut settled).await.unwrap();
    // An entry that the server does not sign for.
    let unsigned = agent.entry("/unsigned");
    agent.server.ids.lock().unwrap().remove("unsigned");
    agent.cache.apply(Update { entries: vec![unsigned], ..Update::default() });
    let mut waiting = agent.svids().await.unwrap();
    assert!(timeout(Duration::from_millis(300), waiting.message()).await.is_err());
    // Who has an identity keeps it fresh meanwhile.
    let mut bundle = agent.server.bundle();
    bundle.x509.push(X509Authority { der: agent.server.root.clone(), tainted: true });
    agent.cache.apply(Update { bundles: vec![Arc::new(bundle)], ..Update::default() });
    let message = next(&mut settled).await.unwrap();
    assert_eq!((ids(&message), message.svids[0].bundle.len()), (vec![id("/a").as_str()], 2 * agent.server.root.len()));
    agent.cache.apply(Update { removed_entries: vec!["unsigned".into()], ..Update::default() });
    assert_eq!(ids(&next(&mut waiting).await.unwrap()), [id("/a").as_str()]);
}

#[tokio::test]
async fn h_65_security_header() {
    let agent = Agent::with(Settings::default(), &["/a"]);
    let mut client = agent.client().await;
    for values in [&[][..], &["True"], &["TRUE"], &["1"], &[""], &["true,true"], &["true", "true"]] {
        let mut request = Request::new(X509svidRequest {});
        for value in values {
            request.metadata_mut().append("workload.spiffe.io", value.parse().unwrap());
        }
        request.metadata_mut().insert("broker.spiffe.io", "true".parse().unwrap());
        let refused = status(client.fetch_x509svid(request).await);
        assert_eq!(refused, (Code::InvalidArgument, "security header missing from request".into()), "{values:?}");
    }
    let refused = client.fetch_witsvid(Request::new(WitsvidRequest::default())).await;
    assert_eq!(status(refused).0, Code::InvalidArgument);
    assert_eq!(agent.asked.0.load(std::sync::atomic::Ordering::SeqCst), 0);
    assert_eq!(status(client.fetch_witsvid(asked(WitsvidRequest::default())).await).0, Code::Unimplemented);
}

#[tokio::test]
async fn h_67_unknown_methods() {
    let agent = Agent::with(Settings::default(), &["/a"]);
    let mut client = tonic::client::Grpc::new(agent.channel().await);
    for path in [
        "/SpiffeWorkloadAPI/Nope",
        "/spiffe.workload.SpiffeWorkloadAPI/FetchX509SVID",
        "/spiffeworkloadapi/FetchX509SVID",
    ] {
        client.ready().await.unwrap();
        let codec = tonic_prost::ProstCodec::<X509svidRequest, X509svidResponse>::default();
        let refused = client.unary(asked(X509svidRequest {}), path.parse().unwrap(), codec).await;
        assert_eq!(status(refused).0, Code::Unimplemented, "{path}");
    }
}

#[tokio::test]
async fn h_72_jwt_requests() {
    let agent = Agent::with(Settings::default(), &["/a", "/b"]);
    let mut client = agent.client().await;
    let fetch = |audience: &[&str], id: &str| {
        asked(JwtsvidRequest { audience: audience.iter().map(ToString::to_string).collect(), spiffe_id: id.into() })
    };
    let numbers: Vec<String> = (0..33).map(|number| number.to_string()).collect();
    let many: Vec<&str> = numbers.iter().map(String::as_str).collect();
    let huge = "a".repeat(1 << 20);
    for (audience, id, code) in [
        (&[][..], "", Code::InvalidArgument),
        (&[""], "", Code::InvalidArgument),
        (&["a", ""], "", Code::InvalidArgument),
        (&many, "", Code::InvalidArgument),
        (&[&huge], "", Code::InvalidArgument),
        (&["a"], "spiffe://example.org/c", Code::PermissionDenied),
        (&["a"], "spiffe://a/../b", Code::InvalidArgument),
        (&["a"], "spiffe://EXAMPLE.org/a", Code::InvalidArgument),
    ] {
        assert_eq!(status(client.fetch_jwtsvid(fetch(audience, id)).await).0, code, "{id}");
    }
    let both = client.fetch_jwtsvid(fetch(&["x", "y"], "")).await.unwrap().into_inner().svids;
    assert_eq!(
        both.iter().map(|svid| svid.spiffe_id.as_str()).collect::<Vec<_>>(),
        [id("/a").as_str(), id("/b").as_str()]
    );
    let one = client.fetch_jwtsvid(fetch(&many[..32], id("/b").as_str())).await.unwrap().into_inner().svids;
    assert_eq!(one.len(), 1);
    let validate = ValidateJwtsvidRequest { audience: "y".into(), svid: both[0].svid.clone() };
    let valid = client.validate_jwtsvid(asked(validate)).await.unwrap().into_inner();
    assert_eq!(valid.spiffe_id, id("/a").as_str());
}

#[tokio::test]
async fn tokens_are_validated_for_anybody() {
    // A caller without identity may validate.
    let agent = Agent::with(Settings::default(), &[]);
    let mut client = agent.client().await;
    let now = seconds(Clock::system().now());
    let claims = |change: serde_json::Value| {
        let mut claims = serde_json::json!({"sub": "spiffe://example.org/a", "aud": "svc", "exp": now + 60});
        let serde_json::Value::Object(change) = change else { panic!() };
        claims.as_object_mut().unwrap().extend(change);
        claims
    };
    let mut validate = async |svid: String| {
        let request = ValidateJwtsvidRequest { audience: "svc".into(), svid };
        client.validate_jwtsvid(asked(request)).await.map(tonic::Response::into_inner)
    };
    let tokens = &agent.server.tokens;
    let good = validate(tokens.sign(claims(serde_json::json!({"n": 9007199254740993_u64, "deep": [{"x": null}]}))))
        .await
        .unwrap();
    let fields = good.claims.unwrap().fields;
    use prost_types::value::Kind;
    let kind = |name: &str| fields[name].kind.clone().unwrap();
    assert!(matches!(kind("aud"), Kind::ListValue(list) if list.values.len() == 1));
    assert!(matches!(kind("exp"), Kind::NumberValue(_)));
    // H-46: an integer that a double does not hold is not rounded.
    assert_eq!(kind("n"), Kind::StringValue("9007199254740993".into()));
    assert!(matches!(kind("deep"), Kind::ListValue(_)));

    let stranger = Tokens::new("kid-1");
    for (what, svid) in [
        ("h_31 none", "eyJhbGciOiJub25lIiwia2lkIjoia2lkLTEifQ.e30.".to_owned()),
        ("h_36 expired", tokens.sign(claims(serde_json::json!({"exp": now - 62})))),
        ("h_37 not yet", tokens.sign(claims(serde_json::json!({"nbf": now + 120})))),
        ("h_38 audience", tokens.sign(claims(serde_json::json!({"aud": ["other"]})))),
        ("h_40 subject", tokens.sign(claims(serde_json::json!({"sub": "spiffe://example.org"})))),
        ("h_40 unknown domain", tokens.sign(claims(serde_json::json!({"sub": "spiffe://evil.test/a"})))),
        ("h_41 another key", stranger.sign(claims(serde_json::json!({})))),
        ("h_42 structure", "a.b".into()),
        ("h_42 empty", String::new()),
        ("h_43 long", "a".repeat(1 << 20)),
        ("h_43 longer", "a".repeat(4_000_000)),
        ("h_43 header", format!("{}.e30.c2ln", "A".repeat(200_000))),
    ] {
        let refused = validate(svid).await;
        assert_eq!(status(refused).0, Code::InvalidArgument, "{what}");
    }
    let refused = validate("a".repeat(5 << 20)).await;
    assert_eq!(status(refused).0, Code::OutOfRange);
    validate(tokens.sign(claims(serde_json::json!({})))).await.unwrap();
}

#[tokio::test]
async fn foreign_claims_are_shown_as_allowed() {
    let settings = Settings { allowed_foreign_jwt_claims: ["team".to_owned()].into(), ..Settings::default() };
    let agent = Agent::with(settings, &[]);
    let foreign = TrustDomain::parse("other.test").unwrap();
    let tokens = Tokens::new("kid-1");
    let mut bundle = Bundle::empty(foreign.clone());
    bundle.jwt.push(tokens.authority.clone());
    let entry = Entry { federates_with: vec![foreign], ..(*agent.entry("/a")).clone() };
    agent.cache.apply(Update { entries: vec![Arc::new(entry)], bundles: vec![Arc::new(bundle)], ..Update::default() });
    let svid = tokens.sign(serde_json::json!({
        "sub": "spiffe://other.test/a", "aud": "svc", "exp": seconds(Clock::system().now()) + 60,
        "iat": 1, "team": "blue", "secret": "x",
    }));
    let request = ValidateJwtsvidRequest { audience: "svc".into(), svid };
    let valid = agent.client().await.validate_jwtsvid(asked(request)).await.unwrap().into_inner();
    let mut names: Vec<_> = valid.claims.unwrap().fields.into_keys().collect();
    names.sort();
    assert_eq!(names, ["aud", "exp", "sub", "team"]);
}

#[tokio::test]
async fn bundles_are_told_once_and_again_when_they_change() {
    let agent = Agent::with(Settings::default(), &["/a"]);
    let mut client = agent.client().await;
    let mut x509 = client.fetch_x509_bundles(asked(X509BundlesRequest {})).await.unwrap().into_inner();
    let mut jwt = client.fetch_jwt_bundles(asked(JwtBundlesRequest {})).await.unwrap().into_inner();
    let key = "spiffe://example.org";
    assert_eq!(next(&mut x509).await.unwrap().bundles, HashMap::from([(key.into(), agent.server.root.clone())]));
    let jwks: serde_json::Value = serde_json::from_slice(&next(&mut jwt).await.unwrap().bundles[key]).unwrap();
    assert_eq!((&jwks["keys"][0]["kid"], jwks["keys"][0].get("use")), (&serde_json::json!("kid-1"), None));
    // Another entry changes no bundle, a new key does; and only of its kind.
    agent.cache.apply(Update { entries: vec![agent.entry("/b")], ..Update::default() });
    let mut bundle = agent.server.bundle();
    bundle.jwt.push(Tokens::new("kid-2").authority);
    agent.cache.apply(Update { bundles: vec![Arc::new(bundle.clone())], ..Update::default() });
    let jwks: serde_json::Value = serde_json::from_slice(&next(&mut jwt).await.unwrap().bundles[key]).unwrap();
    assert_eq!(jwks["keys"].as_array().unwrap().len(), 2);
    bundle.x509.clear();
    bundle.jwt.clear();
    agent.cache.apply(Update { bundles: vec![Arc::new(bundle)], ..Update::default() });
    assert_eq!(next(&mut x509).await.unwrap().bundles, HashMap::from([(key.into(), Bytes::new())]));
    let jwks: serde_json::Value = serde_json::from_slice(&next(&mut jwt).await.unwrap().bundles[key]).unwrap();
    assert_eq!(jwks, serde_json::json!({"keys": []}));
}

#[tokio::test]
async fn verifiers_without_identity_get_the_own_bundle_if_allowed() {
    let agent = Agent::with(Settings { allow_unauthenticated_verifiers: true, ..Settings::default() }, &[]);
    assert_eq!(every_code(&agent).await, [Code::PermissionDenied, Code::Ok, Code::Ok, Code::PermissionDenied]);
}

#[tokio::test]
async fn an_answer_that_no_client_takes_is_not_cut() {
    let agent = Agent::with(Settings::default(), &["/a"]);
    let mut bundle = agent.server.bundle();
    bundle.x509.push(X509Authority { der: vec![0x30; 5 << 20].into(), tainted: false });
    agent.cache.apply(Update { bundles: vec![Arc::new(bundle)], ..Update::default() });
    let mut stream = agent.svids().await.unwrap();
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::ResourceExhausted);
}

#[tokio::test]
async fn a_shutdown_ends_streams_with_unavailable() {
    let agent = Agent::with(Settings::default(), &["/a"]);
    let mut stream = agent.svids().await.unwrap();
    next(&mut stream).await.unwrap();
    agent.trigger.request();
    assert_eq!(next(&mut stream).await.unwrap_err().code(), Code::Unavailable);
    timeout(PATIENCE, agent.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn health_and_reflection_need_no_header() {
    use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
    use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
    use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
    use tonic_reflection::pb::v1::{self, ServerReflectionRequest};

    let agent = Agent::start(Settings::default());
    let mut health = HealthClient::new(agent.channel().await);
    let mut check = async |service: &str| health.check(HealthCheckRequest { service: service.into() }).await;
    assert_eq!(check("").await.unwrap().into_inner().status, 2);
    agent.cache.apply(Update::default());
    assert_eq!(check("").await.unwrap().into_inner().status, 1);
    assert_eq!(status(check("x").await).0, Code::InvalidArgument);

    let list = |_: ()| ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut reflection = ServerReflectionClient::new(agent.channel().await);
    let answer = reflection.server_reflection_info(tokio_stream::once(list(()))).await.unwrap();
    let answer: v1::ServerReflectionResponse = answer.into_inner().message().await.unwrap().unwrap();
    let Some(MessageResponse::ListServicesResponse(services)) = answer.message_response else { panic!() };
    let names: Vec<&str> = services.service.iter().map(|service| service.name.as_str()).collect();
    assert!(names.contains(&"SpiffeWorkloadAPI") && names.contains(&"grpc.health.v1.Health"), "{names:?}");
    assert!(!names.iter().any(|name| name.starts_with("spire.")), "{names:?}");

    use tonic_reflection::pb::v1alpha::server_reflection_client::ServerReflectionClient as Alpha;
    use tonic_reflection::pb::v1alpha::server_reflection_request::MessageRequest as AlphaRequest;
    let mut alpha = Alpha::new(agent.channel().await);
    let request = tonic_reflection::pb::v1alpha::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(AlphaRequest::FileContainingSymbol("SpiffeWorkloadAPI".into())),
    };
    let answer = alpha.server_reflection_info(tokio_stream::once(request)).await.unwrap().into_inner().message().await;
    assert!(format!("{:?}", answer.unwrap().unwrap().message_response).contains("FileDescriptorResponse"));
}

struct Own(Vec<Bytes>);

impl OwnChain for Own {
    fn own_chain(&self) -> Vec<Bytes> {
        self.0.clone()
    }
}

#[tokio::test]
async fn operators_look_inside_and_change_the_log_level() {
    let server = Signs::new();
    let clock = Clock::system();
    let log = Limiter::new(clock.clone());
    let cache =
        Cache::new(trust_domain(), Limits::default(), server.clone(), clock.clone(), Entropy::seeded(7), log.clone());
    cache.apply(Update { bundles: vec![Arc::new(server.bundle())], ..Update::default() });
    server.ids.lock().unwrap().insert("own".into(), id("/spire/agent/x"));
    let key = PrivateKey::generate(KeyType::EcP256).unwrap();
    let pair = KeyPair::try_from(key.expose_pkcs8()).unwrap();
    let csr = CertificateParams::default().serialize_request(&pair).unwrap();
    let request = SigningRequest { entry_id: "own".into(), csr: Bytes::copy_from_slice(csr.der()) };
    let own = Own(server.chain(&request).unwrap());
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("admin.sock");
    let listener = transport::socket::bind_unix(&path, 0o750, 0o770).unwrap();
    let (_trigger, shutdown) = Shutdown::new();
    let routes = admin_routes(cache, Arc::new(own), LogLevel::new(Level::Info), clock);
    tokio::spawn(transport::serve::unix(listener, routes, UnixLimits::for_operators(), log, shutdown));
    let channel = transport::dial::unix(&path).await.unwrap();

    let mut debug = agent_debug::debug_client::DebugClient::new(channel.clone());
    let info = debug.get_info(agent_debug::GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.svid_chain.len(), 2);
    assert_eq!(info.svid_chain[0].id.as_ref().unwrap().path, "/spire/agent/x");
    assert_eq!(info.svid_chain[1].subject, "CN=rcgen self signed cert");
    assert!(info.last_sync_success > 0);

    let mut logger = agent_logger::logger_client::LoggerClient::new(channel);
    let set = |level: types::LogLevel| agent_logger::SetLogLevelRequest { new_level: level.into() };
    let levels = |logger: types::Logger| (logger.current_level(), logger.launch_level());
    let (debug, info) = (types::LogLevel::Debug, types::LogLevel::Info);
    assert_eq!(levels(logger.set_log_level(set(debug)).await.unwrap().into_inner()), (debug, info));
    assert_eq!(status(logger.set_log_level(set(types::LogLevel::Unspecified)).await).0, Code::InvalidArgument);
    assert_eq!(levels(logger.get_logger(agent_logger::GetLoggerRequest {}).await.unwrap().into_inner()), (debug, info));
    let reset = logger.reset_log_level(agent_logger::ResetLogLevelRequest {}).await.unwrap().into_inner();
    assert_eq!(levels(reset), (info, info));
}
