#![allow(clippy::disallowed_methods, reason = "a test owns its tasks by ending with them")]

use std::convert::Infallible;
use std::future::{Ready, ready};
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream as Raw;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Body as _, Frame};
use http_body_util::BodyExt as _;
use rcgen::{CertificateParams, Issuer, KeyPair};
use runtime::clock::Clock;
use runtime::shutdown::{Shutdown, Trigger};
use runtime::telemetry::Limiter;
use spiffe::bundle::{Bundle, Bundles, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::x509::PrivateKey;
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio::time::timeout;
use tonic::body::Body;
use tonic::server::NamedService;
use tower::{Service, ServiceExt as _};

use super::*;
use crate::peer::Peer;
use crate::rotating::{Rotating, client_config, server_config};
use crate::verify::{ClientVerifier, ServerVerifier, Trust};

const PATIENCE: Duration = Duration::from_secs(20);

/// Answers `/test.Service/One` with a message, `/Stream` with a message and then nothing, `/Never` not at all.
#[derive(Clone, Default)]
struct Answers {
    open: Arc<AtomicUsize>,
}

impl NamedService for Answers {
    const NAME: &'static str = "test.Service";
}

struct Talk {
    left: Option<Bytes>,
    ends: bool,
    _open: Counted,
}

struct Counted(Arc<AtomicUsize>);

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl http_body::Body for Talk {
    type Data = Bytes;
    type Error = tonic::Status;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, tonic::Status>>> {
        if let Some(message) = self.left.take() {
            return Poll::Ready(Some(Ok(Frame::data(message))));
        }
        if !self.ends {
            return Poll::Pending;
        }
        let mut trailers = HeaderMap::new();
        trailers.insert("grpc-status", "0".parse().unwrap());
        Poll::Ready(Some(Ok(Frame::trailers(trailers))))
    }
}

impl Service<Request<Body>> for Answers {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = futures_util::future::Either<
        Ready<Result<Response<Body>, Infallible>>,
        std::future::Pending<Result<Response<Body>, Infallible>>,
    >;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let who = match request.extensions().get::<Peer>().unwrap() {
            Peer::Unix(peer) => format!("pid {}", peer.pid),
            Peer::Tcp { certificate, .. } => {
                certificate.as_ref().map_or("nobody".to_owned(), |certificate| certificate.id.to_string())
            }
        };
        assert!(request.extensions().get::<Ending>().is_some());
        let ends = match request.uri().path() {
            "/test.Service/One" => true,
            "/test.Service/Stream" => false,
            _ => return futures_util::future::Either::Right(std::future::pending()),
        };
        self.open.fetch_add(1, Ordering::SeqCst);
        let talk = Talk { left: Some(who.into()), ends, _open: Counted(Arc::clone(&self.open)) };
        let mut response = Response::new(Body::new(talk));
        response.headers_mut().insert("content-type", "application/grpc".parse().unwrap());
        futures_util::future::Either::Left(ready(Ok(response)))
    }
}

fn request(path: &str) -> Request<Body> {
    Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .body(Body::empty())
        .unwrap()
}

/// What a call ended with: its data and its gRPC status.
async fn outcome(response: Response<Body>) -> (String, Option<String>) {
    let status = |headers: &HeaderMap| headers.get("grpc-status").map(|value| value.to_str().unwrap().to_owned());
    let early = status(response.headers());
    let collected = timeout(PATIENCE, response.into_body().collect()).await.unwrap().unwrap();
    let late = collected.trailers().and_then(status);
    (String::from_utf8(collected.to_bytes().to_vec()).unwrap(), early.or(late))
}

/// A stream whose first message has come.
async fn opened<S>(channel: &mut S) -> Response<Body>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: std::fmt::Debug,
{
    let mut response = channel.ready().await.unwrap().call(request("/test.Service/Stream")).await.unwrap();
    let frame = std::future::poll_fn(|context| Pin::new(response.body_mut()).poll_frame(context));
    assert!(timeout(PATIENCE, frame).await.unwrap().unwrap().unwrap().is_data());
    response
}

async fn one<S>(channel: &mut S) -> (String, Option<String>)
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: std::fmt::Debug,
{
    outcome(channel.ready().await.unwrap().call(request("/test.Service/One")).await.unwrap()).await
}

struct Local {
    _folder: tempfile::TempDir,
    path: PathBuf,
    trigger: Trigger,
    served: JoinHandle<()>,
    open: Arc<AtomicUsize>,
}

fn local(change: impl FnOnce(&mut UnixLimits)) -> Local {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api.sock");
    let listener = crate::socket::bind_unix(&path, 0o755, 0o777).unwrap();
    let (trigger, shutdown) = Shutdown::new();
    let mut limits = UnixLimits::for_operators();
    change(&mut limits);
    let answers = Answers::default();
    let open = Arc::clone(&answers.open);
    let served =
        tokio::spawn(unix(listener, Routes::default().with(answers), limits, Limiter::new(Clock::system()), shutdown));
    Local { _folder: folder, path, trigger, served, open }
}

async fn until(what: impl Fn() -> bool) {
    timeout(PATIENCE, async {
        while !what() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    })
    .await
    .unwrap();
}

fn me() -> String {
    format!("pid {}", std::process::id())
}

#[tokio::test]
async fn calls_carry_the_process_that_made_them() {
    let local = local(|_| {});
    let mut channel = crate::dial::unix(&local.path).await.unwrap();
    assert_eq!(one(&mut channel).await, (me(), Some("0".into())));
    let unknown = channel.ready().await.unwrap().call(request("/test.Service2/One")).await.unwrap();
    assert_eq!(outcome(unknown).await.1, Some("12".into()));
}

#[tokio::test]
async fn a_shutdown_ends_streams_with_unavailable_and_then_the_listener() {
    let local = local(|_| {});
    let mut channel = crate::dial::unix(&local.path).await.unwrap();
    let stream = opened(&mut channel).await;
    local.trigger.request();
    assert_eq!(outcome(stream).await.1, Some("14".into()));
    timeout(PATIENCE, local.served).await.unwrap().unwrap();
    assert_eq!(local.open.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn h_67_what_is_no_grpc_call_is_refused_and_others_go_on() {
    let local = local(|_| {});
    let mut channel = crate::dial::unix(&local.path).await.unwrap();
    let mut get = request("/test.Service/One");
    *get.method_mut() = http::Method::GET;
    assert_eq!(channel.ready().await.unwrap().call(get).await.unwrap().status(), 405);
    for kind in ["application/json", "application/grpcx", ""] {
        let mut other = request("/test.Service/One");
        other.headers_mut().insert("content-type", kind.parse().unwrap());
        assert_eq!(channel.ready().await.unwrap().call(other).await.unwrap().status(), 415, "{kind}");
    }
    for bytes in
        [&b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"[..], b"\x16\x03\x01\x00\xa5\x01\x00\x00\xa1\x03\x03abcdefghijklmnop"]
    {
        let mut raw = Raw::connect(&local.path).unwrap();
        raw.write_all(bytes).unwrap();
        let closed = tokio::task::spawn_blocking(move || read_all(raw)).await.unwrap();
        assert!(closed.len() < 100);
    }
    assert_eq!(one(&mut channel).await, (me(), Some("0".into())));
}

#[tokio::test(flavor = "multi_thread")]
async fn h_69_time_and_size_of_requests() {
    let local = local(|_| {});
    // A client that keeps no time itself.
    let io = hyper_util::rt::TokioIo::new(tokio::net::UnixStream::connect(&local.path).await.unwrap());
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake::<_, _, Body>(hyper_util::rt::TokioExecutor::new(), io).await.unwrap();
    let _driven = tokio::spawn(connection);
    for (given, status) in [("0n", "4"), ("1m", "4"), ("99999999H", "0"), ("1x", "3"), ("", "3")] {
        let path = if status == "4" { "/test.Service/Never" } else { "/test.Service/One" };
        let mut timed = request(path);
        timed.headers_mut().insert("grpc-timeout", given.parse().unwrap());
        let answer = sender.send_request(timed).await.unwrap().map(Body::new);
        assert_eq!(outcome(answer).await.1, Some(status.into()), "{given:?}");
    }
    let mut raw = RawClient::connect(&local.path);
    for fields in
        [vec![("x".to_owned(), "y".repeat(64 * 1024))], (0..10_000).map(|n| (format!("k{n}"), "v".into())).collect()]
    {
        let stream = raw.call(Some(b"localhost"), &fields);
        assert!(raw.is_refused(stream));
        let stream = raw.call(Some(b"localhost"), &[]);
        assert!(raw.is_served(stream));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn h_66_every_authority_is_served_and_none_hurts_another_stream() {
    let local = local(|_| {});
    let mut raw = RawClient::connect(&local.path);
    let before = raw.call(Some(b"localhost"), &[]);
    for authority in [&b"localhost"[..], b"%2Frun%2Fagent.sock", b"/run/agent.sock", b"", b"a b"] {
        let stream = raw.call(Some(authority), &[]);
        assert!(raw.is_served(stream), "{authority:?}");
    }
    for fields in [vec![("host".to_owned(), "localhost".to_owned())], vec![]] {
        let stream = raw.call(None, &fields);
        assert!(raw.is_served(stream));
    }
    let stream = raw.call(Some(&[b'a'; 64 * 1024]), &[]);
    assert!(raw.is_refused(stream));
    assert!(raw.is_served(before));
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_rapid_resets_are_told_to_calm_down() {
    let local = local(|_| {});
    let mut raw = RawClient::connect(&local.path);
    let mut flood = Vec::new();
    for _ in 0..200 {
        let stream = raw.next_stream();
        flood.extend(raw.head_frames(stream, Some(b"localhost"), &[]));
        flood.extend(frame(3, 0, stream, &8_u32.to_be_bytes()));
    }
    raw.socket.write_all(&flood).unwrap();
    assert_eq!(raw.goaway(), Some(11));
    let mut channel = crate::dial::unix(&local.path).await.unwrap();
    assert_eq!(one(&mut channel).await, (me(), Some("0".into())));
}

#[tokio::test]
async fn h_71_a_half_written_preface_does_not_stay() {
    let local = local(|limits| limits.first_request_timeout = Duration::from_millis(100));
    let mut raw = Raw::connect(&local.path).unwrap();
    raw.write_all(b"PRI * HTTP/2.0\r\n").unwrap();
    tokio::task::spawn_blocking(move || read_all(raw)).await.unwrap();
    // One that has said all it must but calls nothing goes likewise.
    let mut raw = RawClient::connect(&local.path);
    tokio::task::spawn_blocking(move || raw.goaway()).await.unwrap();
}

#[tokio::test]
async fn h_71_beyond_the_limit_the_newest_of_the_heaviest_is_answered_unavailable() {
    let local = local(|limits| limits.connections = 4);
    let mut held = Vec::new();
    for _ in 0..4 {
        let mut channel = crate::dial::unix(&local.path).await.unwrap();
        held.push((opened(&mut channel).await, channel));
    }
    let mut fifth = crate::dial::unix(&local.path).await.unwrap();
    assert_eq!(one(&mut fifth).await.1, Some("14".into()));
    for (_, channel) in &mut held {
        assert_eq!(one(channel).await.1, Some("0".into()));
    }
    drop(held);
    until(|| local.open.load(Ordering::SeqCst) == 0).await;
    let mut again = crate::dial::unix(&local.path).await.unwrap();
    assert_eq!(one(&mut again).await.1, Some("0".into()));
}

#[tokio::test]
async fn h_71_calls_beyond_the_limit_end_the_connection_that_has_most() {
    let local = local(|limits| limits.streams = 3);
    let mut loud = crate::dial::unix(&local.path).await.unwrap();
    let mut quiet = crate::dial::unix(&local.path).await.unwrap();
    let kept = opened(&mut quiet).await;
    let streams = [opened(&mut loud).await, opened(&mut loud).await];
    // The fourth call of the process takes the loud connection down, with a status.
    let fourth = loud.ready().await.unwrap().call(request("/test.Service/Stream")).await.unwrap();
    assert_eq!(outcome(fourth).await.1, Some("14".into()));
    for stream in streams {
        assert_eq!(outcome(stream).await.1, Some("14".into()));
    }
    assert_eq!(local.open.load(Ordering::SeqCst), 1);
    drop(kept);
}

// TLS.

struct Trusted(Arc<Bundle>);

impl Trust for Trusted {
    fn bundles(&self) -> Arc<dyn Bundles + Send + Sync> {
        Arc::new(Arc::clone(&self.0))
    }

    fn now(&self) -> SystemTime {
        Clock::system().now()
    }

    fn admits(&self, _: &SpiffeId) -> bool {
        true
    }
}

struct Remote {
    issuer: Issuer<'static, KeyPair>,
    trust: Arc<dyn Trust>,
    port: u16,
    trigger: Trigger,
    served: JoinHandle<()>,
}

const SERVER: &str = "spiffe://example.org/spire/server";
const AGENT: &str = "spiffe://example.org/spire/agent/x";

fn identity(issuer: &Issuer<'static, KeyPair>, id: &str, lasting: Duration) -> Rotating {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::ExplicitNoCa;
    params.subject_alt_names = vec![rcgen::SanType::URI(id.try_into().unwrap())];
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    let now = time::OffsetDateTime::now_utc();
    params.not_before = now - Duration::from_secs(60);
    params.not_after = now + lasting;
    let leaf = params.signed_by(&key, issuer).unwrap();
    let rotating = Rotating::new();
    let private = PrivateKey::from_pkcs8(key.serialize_der()).unwrap();
    rotating.set(&[Bytes::copy_from_slice(leaf.der())], &private).unwrap();
    rotating
}

async fn remote(change: impl FnOnce(&mut TcpLimits)) -> Remote {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
    let der = Bytes::copy_from_slice(params.self_signed(&key).unwrap().der());
    let issuer = Issuer::new(params, key);
    let mut bundle = Bundle::empty(TrustDomain::parse("example.org").unwrap());
    bundle.x509.push(X509Authority { der, tainted: false });
    let trust: Arc<dyn Trust> = Arc::new(Trusted(Arc::new(bundle)));
    let own = identity(&issuer, SERVER, Duration::from_secs(3600));
    let tls = server_config(&own, ClientVerifier::new(Arc::clone(&trust))).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let (trigger, shutdown) = Shutdown::new();
    let mut limits = TcpLimits::default();
    change(&mut limits);
    let routes = Routes::default().with(Answers::default());
    let served =
        tokio::spawn(tcp(listener, tls, routes, limits, Limiter::new(Clock::system()), Clock::system(), shutdown));
    Remote { issuer, trust, port, trigger, served }
}

impl Remote {
    async fn dial(&self, own: Option<&Rotating>) -> tonic::transport::Channel {
        let verifier = ServerVerifier::new(Arc::clone(&self.trust), SpiffeId::parse(SERVER).unwrap());
        crate::dial::tls("127.0.0.1", self.port, &client_config(own, verifier).unwrap()).await.unwrap()
    }
}

#[tokio::test]
async fn over_tls_calls_carry_the_certificate_or_none() {
    let remote = remote(|_| {}).await;
    assert_eq!(one(&mut remote.dial(None).await).await, ("nobody".into(), Some("0".into())));
    let agent = identity(&remote.issuer, AGENT, Duration::from_secs(3600));
    let mut channel = remote.dial(Some(&agent)).await;
    let stream = opened(&mut channel).await;
    assert_eq!(one(&mut channel).await, (AGENT.into(), Some("0".into())));
    remote.trigger.request();
    assert_eq!(outcome(stream).await.1, Some("14".into()));
    timeout(PATIENCE, remote.served).await.unwrap().unwrap();
}

#[tokio::test]
async fn an_expired_certificate_ends_streams_with_unavailable() {
    let remote = remote(|_| {}).await;
    let lasting = Duration::from_secs(2);
    let agent = identity(&remote.issuer, AGENT, lasting);
    let expires = Clock::system().now() + lasting;
    let mut channel = remote.dial(Some(&agent)).await;
    let stream = opened(&mut channel).await;
    assert_eq!(outcome(stream).await.1, Some("14".into()));
    // Certificates count whole seconds.
    let late = Clock::system().now().duration_since(expires - Duration::from_secs(1)).unwrap();
    assert!(late < Duration::from_secs(3), "{late:?}");
    // The same channel comes back with the certificate that took the place of the old one.
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.is_ca = rcgen::IsCa::ExplicitNoCa;
    params.subject_alt_names = vec![rcgen::SanType::URI(AGENT.try_into().unwrap())];
    params.key_usages = vec![rcgen::KeyUsagePurpose::DigitalSignature];
    let leaf = params.signed_by(&key, &remote.issuer).unwrap();
    agent.set(&[Bytes::copy_from_slice(leaf.der())], &PrivateKey::from_pkcs8(key.serialize_der()).unwrap()).unwrap();
    assert_eq!(one(&mut channel).await.1, Some("0".into()));
}

#[tokio::test]
async fn an_aged_connection_is_closed_when_no_call_is_open() {
    let remote = remote(|limits| limits.max_connection_age = Some(Duration::from_millis(200))).await;
    let agent = identity(&remote.issuer, AGENT, Duration::from_secs(3600));
    let verifier = ServerVerifier::new(Arc::clone(&remote.trust), SpiffeId::parse(SERVER).unwrap());
    let tls = tokio_rustls::TlsConnector::from(client_config(Some(&agent), verifier).unwrap());
    let socket = tokio::net::TcpStream::connect(("127.0.0.1", remote.port)).await.unwrap();
    let name = rustls::pki_types::ServerName::try_from("spiffe.invalid").unwrap();
    let io = hyper_util::rt::TokioIo::new(tls.connect(name, socket).await.unwrap());
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake::<_, _, Body>(hyper_util::rt::TokioExecutor::new(), io).await.unwrap();
    let mut connection = tokio::spawn(connection);
    let response = sender.send_request(request("/test.Service/Stream")).await.unwrap();
    assert!(timeout(Duration::from_millis(600), &mut connection).await.is_err(), "closed with a call open");
    drop(response);
    timeout(PATIENCE, connection).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn connections_that_say_nothing_leave_room_for_others() {
    let remote = remote(|limits| {
        limits.handshakes = 4;
        limits.handshakes_per_address = 100;
        limits.handshake_timeout = Duration::from_secs(600);
    })
    .await;
    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(tokio::net::TcpStream::connect(("127.0.0.1", remote.port)).await.unwrap());
    }
    // Another address takes the place of one of them.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.2:0".parse().unwrap()).unwrap();
    let other = socket.connect(([127, 0, 0, 1], remote.port).into()).await.unwrap();
    // The kernel may have queued them in another order than ours.
    let closed = silent.iter_mut().map(|stream| {
        Box::pin(async move {
            let mut buffer = [0; 1];
            assert!(matches!(tokio::io::AsyncReadExt::read(stream, &mut buffer).await, Ok(0) | Err(_)));
        })
    });
    timeout(PATIENCE, futures_util::future::select_all(closed)).await.unwrap();
    drop(other);
}

// A client that says what no library would.

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    let mut bytes = vec![length[1], length[2], length[3], kind, flags];
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn read_all(mut raw: Raw) -> Vec<u8> {
    raw.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    loop {
        match raw.read(&mut part) {
            Ok(0) => return bytes,
            Ok(read) => bytes.extend_from_slice(&part[..read]),
            Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => return bytes,
            Err(error) => panic!("not closed: {error}"),
        }
    }
}

struct RawClient {
    socket: Raw,
    last: u32,
    /// Frames that were read: kind, flags, stream, payload.
    seen: Vec<(u8, u8, u32, Vec<u8>)>,
    encoder: loona_hpack::Encoder<'static>,
}

impl RawClient {
    fn connect(path: &Path) -> Self {
        let mut socket = Raw::connect(path).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").unwrap();
        socket.write_all(&frame(4, 0, 0, b"")).unwrap();
        Self { socket, last: 0, seen: Vec::new(), encoder: loona_hpack::Encoder::new() }
    }

    fn next_stream(&mut self) -> u32 {
        self.last = if self.last == 0 { 1 } else { self.last + 2 };
        self.last
    }

    fn head_frames(&mut self, stream: u32, authority: Option<&[u8]>, more: &[(String, String)]) -> Vec<u8> {
        let mut fields: Vec<(&[u8], &[u8])> =
            vec![(b":method", b"POST"), (b":scheme", b"http"), (b":path", b"/test.Service/One")];
        fields.extend(authority.map(|value| (&b":authority"[..], value)));
        fields.push((b"content-type", b"application/grpc"));
        fields.extend(more.iter().map(|(name, value)| (name.as_bytes(), value.as_bytes())));
        let block = self.encoder.encode(fields);
        let mut parts = block.chunks(16_384).peekable();
        let mut bytes = Vec::new();
        let (mut kind, mut flags) = (1, 1);
        while let Some(part) = parts.next() {
            let end = if parts.peek().is_none() { 4 } else { 0 };
            bytes.extend(frame(kind, flags | end, stream, part));
            (kind, flags) = (9, 0);
        }
        bytes
    }

    fn call(&mut self, authority: Option<&[u8]>, more: &[(String, String)]) -> u32 {
        let stream = self.next_stream();
        let bytes = self.head_frames(stream, authority, more);
        self.socket.write_all(&bytes).unwrap();
        stream
    }

    fn read_frame(&mut self) -> bool {
        let mut head = [0; 9];
        if self.socket.read_exact(&mut head).is_err() {
            return false;
        }
        let mut payload = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]) as usize];
        if self.socket.read_exact(&mut payload).is_err() {
            return false;
        }
        self.seen.push((head[3], head[4], u32::from_be_bytes(head[5..9].try_into().unwrap()), payload));
        true
    }

    /// Reads until the stream ends; its frames.
    fn ended(&mut self, stream: u32) -> Vec<(u8, u8, Vec<u8>)> {
        loop {
            let frames: Vec<_> = self
                .seen
                .iter()
                .filter(|seen| seen.2 == stream)
                .map(|(kind, flags, _, payload)| (*kind, *flags, payload.clone()))
                .collect();
            if frames.iter().any(|(kind, flags, _)| *kind == 3 || (*kind <= 1 && flags & 1 != 0)) {
                return frames;
            }
            assert!(self.read_frame(), "the connection ended: {:?}", self.seen);
        }
    }

    fn is_served(&mut self, stream: u32) -> bool {
        self.ended(stream).iter().any(|(kind, ..)| *kind == 0)
    }

    fn is_refused(&mut self, stream: u32) -> bool {
        !self.is_served(stream)
    }

    /// Reads to the end; the code of the GOAWAY, if there was one.
    fn goaway(&mut self) -> Option<u32> {
        while self.read_frame() {}
        let goaway = self.seen.iter().rev().find(|seen| seen.0 == 7)?;
        Some(u32::from_be_bytes(goaway.3[4..8].try_into().unwrap()))
    }
}
