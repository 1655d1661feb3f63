//! A whole server in this process: sockets, TLS, drain, and what removes itself.

use std::path::Path;
use std::time::{Duration, SystemTime};

use runtime::flags::Environment;
use runtime::telemetry::level::Level;
use spiffe::bundle::{Bundle, Bundles};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe_proto::agent::CreateJoinTokenRequest;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::bundle::GetBundleRequest;
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{BatchCreateEntryRequest, CountEntriesRequest};
use spiffe_proto::health::HealthCheckRequest;
use spiffe_proto::health::health_client::HealthClient;
use spiffe_proto::types;
use transport::verify::{ServerVerifier, Trust};
use transport::{dial, rotating};

use super::*;
use crate::config::{Overrides, load};

fn config(directory: &Path, more: &str) -> Config {
    let path = directory.join("server.conf");
    let text = format!(
        "server {{\n trust_domain = \"example.org\"\n data_dir = \"{0}/data\"\n socket_path = \"{0}/api.sock\"\n \
         bind_address = \"127.0.0.1\"\n{more}}}\nplugins {{\n DataStore \"memory\" {{}}\n KeyManager \"memory\" {{}}\n}}\n",
        directory.display()
    );
    std::fs::write(&path, text).unwrap();
    let mut config = load(&Overrides { config: Some(path), ..Overrides::default() }, &Environment::default()).unwrap();
    // The configuration cannot ask for any free port; tests do.
    config.bind_port = 0;
    config
}

async fn build(config: Config, clock: Clock) -> Server {
    Server::build(config, LogLevel::new(Level::Info), clock, Entropy::system()).await.unwrap()
}

/// A client that believes one bundle, at one time.
struct Believes(Bundle, SystemTime);

impl Trust for Believes {
    fn bundles(&self) -> Arc<dyn Bundles + Send + Sync> {
        Arc::new(self.0.clone())
    }

    fn now(&self) -> SystemTime {
        self.1
    }

    fn admits(&self, _: &SpiffeId) -> bool {
        true
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_serves_both_listeners_and_drains_when_it_is_asked_to_stop() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("api.sock");
    let server = build(config(directory.path(), ""), Clock::system()).await;
    let (port, clock) = (server.address().unwrap().port(), server.clock.clone());
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let bundle = Bundle::clone(server.replica.latest().bundle(&trust_domain).unwrap());
    let (trigger, stop) = Shutdown::new();
    let tasks = Tasks::new(trigger.clone());
    tasks.spawn("server", server.run(stop));

    let local = dial::unix(&socket).await.unwrap();
    let health = HealthClient::new(local.clone()).check(HealthCheckRequest::default()).await.unwrap();
    assert_eq!(health.into_inner().status, 1);

    let verifier = ServerVerifier::new(Arc::new(Believes(bundle, clock.now())), SpiffeId::server_of(&trust_domain));
    let tls = rotating::client_config(None, verifier).unwrap();
    let network = dial::tls("127.0.0.1", port, &tls).await.unwrap();
    let got = BundleClient::new(network.clone()).get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!(got.trust_domain, "example.org");
    let refused = EntryClient::new(network.clone()).count_entries(CountEntriesRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::PermissionDenied);
    let unknown = HealthClient::new(network).check(HealthCheckRequest::default()).await.unwrap_err();
    assert_eq!(unknown.code(), tonic::Code::Unimplemented);

    trigger.request();
    assert!(tasks.join_all(DRAIN).await.is_empty());
    assert!(dial::unix(&socket).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn what_ends_is_absent_at_once_and_removed_once_the_clocks_agree() {
    let directory = tempfile::tempdir().unwrap();
    let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
    let server = build(config(directory.path(), ""), clock.clone()).await;
    let (trigger, stop) = Shutdown::new();
    let core = Arc::clone(&server.services.core);
    server.tasks.spawn("clock", core.steady.clone().run(stop.clone()));
    server.tasks.spawn("expiry", expiry::run(Arc::clone(&core), None, Entropy::system(), stop.clone()));

    let (socket, _other) = tokio::net::UnixStream::pair().unwrap();
    let process = Arc::new(transport::peer::UnixPeer::pin(&socket).unwrap());
    let routes = server.services.local();
    let local = tower::service_fn(move |mut request: ::http::Request<tonic::body::Body>| {
        request.extensions_mut().insert(transport::peer::Peer::Unix(Arc::clone(&process)));
        tower::Service::call(&mut routes.clone(), request)
    });
    let id = |path: &str| Some(types::Spiffeid { trust_domain: "example.org".into(), path: path.into() });
    let entry = |name: &str, expires_at| types::Entry {
        spiffe_id: id(name),
        parent_id: id("/spire/agent/x"),
        selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1".into() }],
        expires_at,
        ..types::Entry::default()
    };
    let soon = |seconds: i64| 1_700_000_000 + seconds;
    let entries =
        vec![entry("/never", 0), entry("/soon", soon(60)), entry("/later", soon(700)), entry("/day", soon(5000))];
    let request = BatchCreateEntryRequest { entries, output_mask: None };
    EntryClient::new(local.clone()).batch_create_entry(request).await.unwrap();
    let request = CreateJoinTokenRequest { ttl: 90, ..Default::default() };
    AgentClient::new(local.clone()).create_join_token(request).await.unwrap();

    let counted = async || {
        let mut client = EntryClient::new(local.clone());
        client.count_entries(CountEntriesRequest::default()).await.unwrap().into_inner().count
    };
    let pass = |seconds: u64| clock.sleep(Duration::from_secs(seconds));
    let mut states = core.replica.watch();
    let held = |state: &crate::state::State| (state.entry_count(), state.tokens().count());
    let boot = clock.boot();
    let since = || (clock.boot() - boot).as_secs();
    pass(60).await;
    assert_eq!((counted().await, held(&states.borrow())), (3, (4, 1)), "absent, and the record is there");
    states.wait_for(|state| held(state) == (3, 0)).await.unwrap();
    assert!((600..=601).contains(&since()), "ten minutes after the start: {}", since());
    states.wait_for(|state| held(state) == (2, 0)).await.unwrap();
    assert!((700..=701).contains(&since()), "at its second: {}", since());

    // A day ahead for a minute, and a write meanwhile.
    clock.step_forward(Duration::from_secs(86_400));
    assert_eq!(counted().await, 1);
    let request = BatchCreateEntryRequest { entries: vec![entry("/new", 0)], output_mask: None };
    EntryClient::new(local.clone()).batch_create_entry(request).await.unwrap();
    pass(60).await;
    assert_eq!(held(&states.borrow()), (3, 0));
    clock.step_back(Duration::from_secs(86_400));
    assert_eq!(counted().await, 3);
    pass(3600).await;
    assert_eq!((counted().await, held(&states.borrow())), (3, (3, 0)));
    states.wait_for(|state| held(state) == (2, 0)).await.unwrap();
    assert!((5000..=5001).contains(&since()), "at its second: {}", since());
    trigger.request();
    server.tasks.join_all(LAST_WRITES).await;
}

async fn refused(config: Config) -> String {
    let built = Server::build(config, LogLevel::new(Level::Info), Clock::system(), Entropy::system()).await;
    telemetry::chain(&built.err().unwrap())
}

/// A server with everything on disk.
fn on_disk(directory: &Path) -> Config {
    let data = directory.join("data");
    let mut config = config(directory, "");
    config.data_store = crate::config::checked::DataStore::Sled { dir: data.join("store") };
    config.key_manager = crate::config::checked::KeyManager::Disk { keys_path: data.join("keys.json") };
    config
}

#[tokio::test]
async fn a_port_that_is_taken_is_named_before_anything_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let mut config = on_disk(directory.path());
    config.bind_port = address.port();
    let expected = format!(
        "cannot listen on {address} (stop the process that has it, or choose another; set by server.bind_address, \
         server.bind_port): Address already in use (os error 98)"
    );
    assert_eq!(refused(config.clone()).await, expected);
    let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|file| file.unwrap().file_name()).collect();
    assert_eq!(left, ["server.conf"]);

    drop(taken);
    let server = build(config, Clock::system()).await;
    assert_eq!(server.address().unwrap(), address);
    assert!(directory.path().join("data/keys.json").exists());
}

#[tokio::test]
async fn an_admin_socket_or_page_that_is_taken_is_named_before_anything_is_made() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = on_disk(directory.path());
    let taken = std::os::unix::net::UnixListener::bind(&config.socket_path).unwrap();
    let expected = format!(
        "cannot open the admin socket (set by server.socket_path): another process is listening on {}",
        config.socket_path.display()
    );
    assert_eq!(refused(config.clone()).await, expected);
    drop(taken);

    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port();
    config.telemetry.prometheus = Some(("127.0.0.1".to_owned(), port));
    let expected = format!(
        "cannot listen on 127.0.0.1:{port} (stop the process that has it, or choose another; set by \
         telemetry.Prometheus.host, telemetry.Prometheus.port): Address already in use (os error 98)"
    );
    assert_eq!(refused(config).await, expected);
    assert!(!directory.path().join("data").exists());
}

#[tokio::test]
async fn keys_are_not_used_up_by_a_server_on_another_store() {
    let directory = tempfile::tempdir().unwrap();
    let config = on_disk(directory.path());
    let keys = directory.path().join("data/keys.json");
    drop(build(config.clone(), Clock::system()).await);
    let before = std::fs::read(&keys).unwrap();
    let mut wrong = config.clone();
    wrong.data_store = crate::config::checked::DataStore::Sled { dir: directory.path().join("elsewhere") };
    let expected = format!(
        "cannot open the signing keys: {} holds the keys of another data store; see that data_dir is the right one, or, \
         if that store is gone for good, move the key file away to begin with new authorities",
        keys.display()
    );
    assert_eq!(refused(wrong).await, expected);
    assert_eq!(std::fs::read(&keys).unwrap(), before);
    let server = build(config, Clock::system()).await;
    assert_eq!(server.replica.latest().all_slots().count(), 2, "the authorities of the first start sign on");
}

#[tokio::test]
async fn a_data_directory_that_cannot_be_made_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let mut config = on_disk(directory.path());
    config.data_dir = directory.path().join("server.conf");
    let expected = format!(
        "cannot make the data directory {} (set by server.data_dir): File exists (os error 17)",
        config.data_dir.display()
    );
    assert_eq!(refused(config).await, expected);
}
