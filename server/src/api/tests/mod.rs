//! The services as clients see them: a memory store, real keys, and calls through the gate.

mod agents;
mod audit;
mod bundles;
mod entries;
mod listeners;
mod svids;
mod trust;

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_core::stream::BoxStream;
use runtime::entropy::Entropy;
use runtime::telemetry::level::{Level, LogLevel};
use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::verify::{PeerRole, x509_chain};
use spiffe::x509::{KeyType as WorkloadKeyType, PrivateKey};
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::types::permission_denied_details::Reason;
use spiffe_proto::{agent, rpc_status, types};
use tonic::body::Body;
use tonic::{Code, Status};
use tower::Service;
use transport::peer::{Peer, UnixPeer};
use transport::rotating::Rotating;
use transport::serve::{Answer, Ending, Routes};

use super::Services;
use super::agent::AgentService;
use super::backup::BackupService;
use super::bundle::BundleService;
use super::core::Core;
use super::debug::DebugService;
use super::entry::EntryService;
use super::health::HealthService;
use super::logger::LoggerService;
use super::meters::Meters;
use super::svid::SvidService;
use super::sync::SyncService;
use crate::attest::join_token::JoinTokens;
use crate::attest::testing::History;
use crate::audit::Audit;
use crate::authority::keys::KeyType;
use crate::authority::keys::memory::MemoryKeys;
use crate::authority::profile::{CaSubject, Policy};
use crate::authority::{Authority, Parts};
use crate::history::memory::Memory;
use crate::history::{Appended, Change, Group, HistoryId, Position, Record, Store, StoreError};
use crate::limits::Limits;

const HOUR: Duration = Duration::from_secs(3600);

/// A store whose head can be put out of reach.
struct Reachable {
    store: Memory,
    away: Arc<AtomicBool>,
}

#[async_trait]
impl Store for Reachable {
    async fn load(&self) -> Result<(Position, BoxStream<'static, Result<Vec<Record>, StoreError>>), StoreError> {
        self.store.load().await
    }

    async fn append(&self, at: &Position, group: &Group) -> Result<Appended, StoreError> {
        self.store.append(at, group).await
    }

    fn watch(&self, after: Position) -> BoxStream<'static, Result<Change, StoreError>> {
        self.store.watch(after)
    }

    async fn head(&self) -> Result<Position, StoreError> {
        if self.away.load(Ordering::SeqCst) {
            return Err(StoreError::Unreachable(Arc::new(std::io::Error::other("away"))));
        }
        self.store.head().await
    }
}

/// A server without sockets.
struct Server {
    history: History,
    services: Services,
    away: Arc<AtomicBool>,
}

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

impl Server {
    async fn start() -> Self {
        Self::with(|_| {}).await
    }

    async fn with(change: impl FnOnce(&mut Policy)) -> Self {
        let away = Arc::new(AtomicBool::new(false));
        let store = Reachable { store: Memory::new(HistoryId([1; 16])), away: Arc::clone(&away) };
        let history = History::over(Arc::new(store)).await;
        let mut policy = Policy {
            trust_domain: trust_domain(),
            ca_subject: CaSubject::default(),
            ca_ttl: 24 * HOUR,
            ca_key_type: KeyType::EcP256,
            jwt_key_type: Some(KeyType::EcP256),
            default_x509_svid_ttl: HOUR,
            default_jwt_svid_ttl: Duration::from_secs(300),
            agent_ttl: None,
            jwt_issuer: None,
        };
        change(&mut policy);
        let (entropy, own) = (Entropy::system(), Rotating::new());
        let authority = Authority::open(Parts {
            policy,
            keys: Arc::new(MemoryKeys::new(&entropy)),
            committer: history.committer(),
            replica: history.replica(),
            clock: history.clock(),
            steady: runtime::steady::Steady::new(history.clock()),
            entropy: entropy.clone(),
            own_certificate: own.clone(),
        });
        let authority = authority.await.unwrap();
        authority.bring_up().await.unwrap();
        let core = Arc::new(Core {
            trust_domain: trust_domain(),
            replica: history.replica(),
            committer: history.committer(),
            clock: history.clock(),
            steady: runtime::steady::Steady::new(history.clock()),
            entropy,
            admin_ids: ["spiffe://example.org/admin", "spiffe://other.test/admin"]
                .map(|id| SpiffeId::parse(id).unwrap())
                .into(),
            limits: Limits::new(false, true),
            log: runtime::telemetry::Limiter::new(history.clock()),
            audit: Audit::new(true, runtime::telemetry::Limiter::new(history.clock())),
            twice: Default::default(),
            meters: Meters::new(),
        });
        let tokens = Arc::new(JoinTokens::new(history.replica()));
        let services = Services {
            agent: AgentService::new(Arc::clone(&core), authority.clone(), vec![tokens], true),
            bundle: BundleService::new(Arc::clone(&core)),
            entry: EntryService::new(Arc::clone(&core)),
            svid: SvidService::new(Arc::clone(&core), authority, 2),
            sync: SyncService::new(
                Arc::clone(&core),
                crate::feed::Feed::new(
                    history.replica(),
                    history.clock(),
                    runtime::steady::Steady::new(history.clock()),
                ),
            ),
            backup: BackupService::new(Arc::clone(&core)),
            debug: DebugService::new(Arc::clone(&core), own),
            logger: LoggerService::new(Arc::clone(&core), LogLevel::new(Level::Info)),
            health: HealthService::new(Arc::clone(&core)),
            core,
        };
        Self { history, services, away }
    }

    fn now(&self) -> SystemTime {
        self.history.now()
    }

    /// Puts the head of the store out of reach, or back.
    fn set_away(&self, away: bool) {
        self.away.store(away, Ordering::SeqCst);
    }

    /// As a process on the admin socket.
    fn local(&self) -> Connection {
        let (socket, other) = tokio::net::UnixStream::pair().unwrap();
        let process = UnixPeer::pin(&socket).unwrap();
        drop(other);
        Connection::new(self.services.local(), Peer::Unix(Arc::new(process)))
    }

    /// As somebody on the network without a certificate.
    fn anonymous(&self) -> Connection {
        let peer = Peer::Tcp { address: ([192, 0, 2, 1], 4_000).into(), certificate: None };
        Connection::new(self.services.network(), peer)
    }

    /// As somebody on the network who was given this chain by the server.
    fn with_chain(&self, chain: &[Bytes]) -> Connection {
        self.with_chain_of(&trust_domain(), chain)
    }

    /// The same of a trust domain.
    fn with_chain_of(&self, trust_domain: &TrustDomain, chain: &[Bytes]) -> Connection {
        let bundle = Bundle::clone(self.history.replica().latest().bundle(trust_domain).unwrap());
        let verified = x509_chain(chain, &bundle, PeerRole::Client, self.now()).unwrap();
        let certificate = Some(Arc::new(verified));
        let peer = Peer::Tcp { address: ([192, 0, 2, 2], 4_000).into(), certificate };
        Connection::new(self.services.network(), peer)
    }

    /// As the workload or administrator with this id.
    async fn with_id(&self, path: &str) -> Connection {
        let minted = spiffe_proto::svid::svid_client::SvidClient::new(self.local())
            .mint_x509svid(spiffe_proto::svid::MintX509svidRequest { csr: csr(&[path]), ttl: 0 })
            .await
            .unwrap();
        self.with_chain(&minted.into_inner().svid.unwrap().cert_chain)
    }

    /// A node attested by a fresh join token: its connection, its id, its chain.
    async fn agent(&self) -> (Connection, SpiffeId) {
        let token = AgentClient::new(self.local())
            .create_join_token(agent::CreateJoinTokenRequest { ttl: 60, ..Default::default() })
            .await
            .unwrap()
            .into_inner();
        let svid = self.attest(token.value.as_bytes()).await.unwrap();
        let id = svid.id.clone().unwrap();
        (self.with_chain(&svid.cert_chain), SpiffeId::from_path(&trust_domain(), &id.path).unwrap())
    }

    /// Attests by a join token.
    async fn attest(&self, token: &[u8]) -> Result<types::X509svid, Status> {
        let request = attest_request("join_token", token, csr(&[]));
        let mut answers =
            AgentClient::new(self.anonymous()).attest_agent(tokio_stream::once(request)).await?.into_inner();
        match answers.message().await?.and_then(|answer| answer.step) {
            Some(agent::attest_agent_response::Step::Result(result)) => {
                assert_eq!(answers.message().await?, None);
                Ok(result.svid.unwrap())
            }
            other => panic!("{other:?}"),
        }
    }

    /// Makes entries below `parent` and gives their ids.
    async fn entries(&self, parent: &SpiffeId, names: impl IntoIterator<Item = String>) -> Vec<String> {
        let entries = names.into_iter().map(|name| entry(parent, &name)).collect();
        let request = spiffe_proto::entry::BatchCreateEntryRequest { entries, output_mask: None };
        let made = EntryClient::new(self.local()).batch_create_entry(request).await.unwrap().into_inner();
        made.results
            .into_iter()
            .map(|result| {
                assert_eq!(result.status.unwrap().message, "OK");
                result.entry.unwrap().id
            })
            .collect()
    }
}

fn attest_request(kind: &str, payload: &[u8], csr: Bytes) -> agent::AttestAgentRequest {
    let params = agent::attest_agent_request::Params {
        data: Some(types::AttestationData { r#type: kind.to_owned(), payload: Bytes::copy_from_slice(payload) }),
        params: Some(agent::AgentX509svidParams { csr }),
    };
    agent::AttestAgentRequest { step: Some(agent::attest_agent_request::Step::Params(params)) }
}

fn wire_id(id: &SpiffeId) -> Option<types::Spiffeid> {
    Some(super::wire::id(id))
}

fn entry(parent: &SpiffeId, name: &str) -> types::Entry {
    types::Entry {
        spiffe_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: format!("/{name}") }),
        parent_id: wire_id(parent),
        selectors: vec![types::Selector { r#type: "unix".into(), value: format!("user:{name}") }],
        ..types::Entry::default()
    }
}

/// A certificate request of a fresh P-256 key, with these paths of our trust domain as URIs.
fn csr(paths: &[&str]) -> Bytes {
    let key = PrivateKey::generate(WorkloadKeyType::EcP256).unwrap();
    let der = rustls_pki_types::PrivatePkcs8KeyDer::from(key.expose_pkcs8().to_vec());
    let key = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&der, &rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    let mut params = rcgen::CertificateParams::default();
    for path in paths {
        let uri = format!("spiffe://example.org{path}");
        params.subject_alt_names.push(rcgen::SanType::URI(uri.try_into().unwrap()));
    }
    Bytes::copy_from_slice(params.serialize_request(&key).unwrap().der())
}

/// A connection as a client sees it.
#[derive(Clone)]
struct Connection {
    routes: Routes,
    peer: Peer,
    ending: Ending,
}

impl Connection {
    fn new(routes: Routes, peer: Peer) -> Self {
        Self { routes, peer, ending: Ending::new() }
    }
}

impl Service<http::Request<Body>> for Connection {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, mut request: http::Request<Body>) -> Self::Future {
        request.extensions_mut().insert(self.peer.clone());
        request.extensions_mut().insert(self.ending.clone());
        self.routes.call(request)
    }
}

/// The reason in the details of a refusal.
fn reason(status: &Status) -> Option<Reason> {
    use prost::Message as _;
    if status.details().is_empty() {
        return None;
    }
    let packed = rpc_status::Status::decode(status.details()).unwrap();
    let detail = types::PermissionDeniedDetails::decode(&*packed.details[0].value).unwrap();
    Some(Reason::try_from(detail.reason).unwrap())
}

/// Asserts code and text of a refusal.
#[track_caller]
fn assert_refused<T: std::fmt::Debug>(answer: Result<T, Status>, code: Code, text: &str) {
    let status = answer.unwrap_err();
    assert_eq!((status.code(), status.message()), (code, text));
}
