//! Wiring: a configuration becomes a running server, and a signal ends it.

mod expiry;
mod trust;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Tasks, Trigger};
use runtime::telemetry::health::Health;
use runtime::telemetry::level::LogLevel;
use runtime::telemetry::settings::HealthPages;
use runtime::telemetry::{self, http, log, metrics};
use tokio::net::{TcpListener, UnixListener};
use tonic::service::Routes;
use transport::rotating::{self, Rotating};
use transport::serve::{self, TcpLimits, UnixLimits};
use transport::socket::{self, SocketError};
use transport::verify::ClientVerifier;

use self::trust::ServerTrust;
use crate::api::Services;
use crate::api::agent::AgentService;
use crate::api::bundle::BundleService;
use crate::api::core::Core;
use crate::api::debug::DebugService;
use crate::api::entry::EntryService;
use crate::api::health::HealthService;
use crate::api::logger::LoggerService;
use crate::api::meters::Meters;
use crate::api::svid::SvidService;
use crate::api::sync::SyncService;
use crate::attest::NodeAttestor;
use crate::attest::join_token::JoinTokens;
use crate::attest::x509pop::{self, X509Pop};
use crate::audit::Audit;
use crate::authority::keys::disk::DiskKeys;
use crate::authority::keys::memory::MemoryKeys;
use crate::authority::keys::{KeyError, SigningKeys};
use crate::authority::profile::{CaSubject, Policy};
use crate::authority::{self, Authority, AuthorityError};
use crate::config::Config;
use crate::config::checked::{DataStore, KeyManager, NodeAttestor as AttestorConfig, X509PopRoots};
use crate::feed::Feed;
use crate::history::memory::Memory;
use crate::history::sled::{self, Sled};
use crate::history::{self, HistoryId, OpenError, Reach, Replica, Store, StoreError};
use crate::limits::Limits;

/// How long open calls may go on once the server is asked to stop.
const DRAIN: Duration = Duration::from_secs(10);

/// How long what runs behind the listeners may take to end after them.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// The version that metrics and logs tell.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Why a server does not run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StartError {
    /// The log cannot be written.
    #[error("cannot set up logging")]
    Log(#[source] log::LogError),
    /// The asynchronous runtime cannot start.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
    /// The data directory cannot be made.
    #[error("cannot make the data directory")]
    DataDirectory(#[source] std::io::Error),
    /// Metrics are recorded by somebody else.
    #[error("cannot record metrics")]
    Metrics(#[source] metrics::AlreadyInstalled),
    /// The store cannot be opened.
    #[error("cannot open the data store")]
    Store(#[source] StoreError),
    /// The store's content cannot be used.
    #[error("cannot load the data store")]
    History(#[source] OpenError),
    /// The signing keys cannot be opened.
    #[error("cannot open the signing keys")]
    Keys(#[source] KeyError),
    /// The authority cannot sign.
    #[error("cannot bring up the authority")]
    Authority(#[source] AuthorityError),
    /// A node attestor cannot be used as configured.
    #[error("cannot set up node attestor x509pop")]
    X509Pop(#[source] x509pop::SettingsError),
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] rotating::TlsError),
    /// A network address cannot be listened on.
    #[error("cannot listen on {address}")]
    Listen {
        /// The address.
        address: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The admin socket cannot be opened.
    #[error("cannot open the admin socket")]
    Socket(#[source] SocketError),
}

/// Runs a server in this process until SIGTERM or SIGINT.
///
/// # Errors
/// If it does not start.
pub fn run(config: Config) -> Result<(), StartError> {
    let level = LogLevel::new(config.log.level);
    let output = match &config.log.file {
        Some(path) => log::Output::file(path).map_err(StartError::Log)?,
        None => log::Output::stdout(),
    };
    log::install(level.clone(), config.log.format, config.log.source_location, output.clone())
        .map_err(StartError::Log)?;
    harden();
    for warning in &config.warnings {
        tracing::warn!(
            file = %config.path.display(),
            line = warning.line,
            key = warning.key,
            remedy = warning.remedy,
            "{}",
            warning.message
        );
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        // Frames are small everywhere: what recurses is bounded by its parser.
        .thread_stack_size(1 << 20)
        .max_blocking_threads(16)
        .thread_name("server")
        .build()
        .map_err(StartError::Runtime)?;
    runtime.block_on(async {
        let (trigger, stop) = Shutdown::new();
        let tasks = Tasks::new(trigger.clone());
        output.reopen_on_signal(&tasks, stop.clone());
        stop_on_signal(&tasks, trigger, stop.clone())?;
        let server = Server::build(config, level, Clock::system(), Entropy::system()).await?;
        server.run(stop).await;
        Ok(())
    })
}

/// Makes the process what one that holds keys should be. What the kernel refuses is told and not fatal.
fn harden() {
    runtime::harden::restrict_new_files();
    let told = [runtime::harden::protect_memory(), runtime::harden::raise_open_files().map(drop)];
    for error in told.into_iter().filter_map(Result::err) {
        tracing::warn!(error = telemetry::chain(&error), "Cannot harden the process");
    }
}

fn stop_on_signal(tasks: &Tasks, trigger: Trigger, stop: Shutdown) -> Result<(), StartError> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(StartError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(StartError::Signals)?;
    tasks.spawn("signals", async move {
        let name = tokio::select! {
            _ = terminate.recv() => "SIGTERM",
            _ = interrupt.recv() => "SIGINT",
            () = stop.requested() => return,
        };
        tracing::info!(signal = name, "Stopping");
        trigger.request();
    });
    Ok(())
}

/// A server that is ready to serve: its store is open, its authority signs, its sockets are bound.
pub struct Server {
    config: Config,
    clock: Clock,
    services: Services,
    replica: Replica,
    authority: Authority,
    feed: Feed,
    entropy: Entropy,
    network: TcpListener,
    tls: Arc<rustls::ServerConfig>,
    admin: UnixListener,
    pages: Vec<(&'static str, TcpListener, http::Answer)>,
    recorded: Option<metrics::Recorded>,
    health: Health,
    /// Stops the writer of the history, which outlives everything that writes.
    writer_stop: Trigger,
    /// What ends before the writer.
    tasks: Tasks,
    /// Asks this server to stop when one of its tasks fails.
    failed: Shutdown,
    writer: Tasks,
}

impl Server {
    /// Opens store and keys, brings up the authority and binds the sockets.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running then.
    pub async fn build(config: Config, level: LogLevel, clock: Clock, entropy: Entropy) -> Result<Self, StartError> {
        std::fs::create_dir_all(&config.data_dir).map_err(StartError::DataDirectory)?;
        tracing::info!(
            data_dir = %config.data_dir.display(),
            trust_domain = %config.trust_domain,
            launch_log_level = level.launch().name(),
            version = VERSION,
            "Configured"
        );
        let (trigger, failed) = Shutdown::new();
        let tasks = Tasks::new(trigger.clone());
        let recorded = record_metrics(&config)?;

        let (writer_stop, writer_stopped) = Shutdown::new();
        let writer = Tasks::new(trigger);
        let store = open_store(&config, &entropy).await?;
        let trust_domain = config.trust_domain.clone();
        let opened = history::open(store, Reach::OneProcess, trust_domain, clock.clone(), entropy.clone());
        let opened = opened.await.map_err(StartError::History)?;
        writer.spawn_critical("history", opened.writer.run(writer_stopped));

        let own = Rotating::new();
        let authority = Authority::open(authority::Parts {
            policy: policy(&config),
            keys: open_keys(&config, &entropy)?,
            committer: opened.committer.clone(),
            replica: opened.replica.clone(),
            clock: clock.clone(),
            entropy: entropy.clone(),
            own_certificate: own.clone(),
        });
        let authority = authority.await.map_err(StartError::Authority)?;
        authority.bring_up().await.map_err(StartError::Authority)?;

        let core = Arc::new(Core {
            trust_domain: config.trust_domain.clone(),
            replica: opened.replica.clone(),
            committer: opened.committer,
            clock: clock.clone(),
            entropy: entropy.clone(),
            admin_ids: config.admin_ids.iter().cloned().collect(),
            limits: Limits::new(config.ratelimit.attestation, config.ratelimit.signing),
            audit: Audit::new(config.audit_log_enabled),
            meters: Meters::new(),
        });
        let attestors = attestors(&config, &opened.replica, &entropy)?;
        let width = std::thread::available_parallelism().map_or(1, usize::from);
        let feed = Feed::new(opened.replica.clone());
        let services = Services {
            agent: AgentService::new(
                Arc::clone(&core),
                authority.clone(),
                attestors,
                config.agent_spiffe_id_as_selector,
            ),
            bundle: BundleService::new(Arc::clone(&core)),
            entry: EntryService::new(Arc::clone(&core)),
            svid: SvidService::new(Arc::clone(&core), authority.clone(), width),
            sync: SyncService::new(Arc::clone(&core), feed.clone()),
            debug: DebugService::new(Arc::clone(&core), own.clone()),
            logger: LoggerService::new(Arc::clone(&core), level),
            health: HealthService::new(Arc::clone(&core)),
            core,
        };
        let trust = ServerTrust::new(opened.replica.clone(), clock.clone(), &config);
        let tls = rotating::server_config(&own, ClientVerifier::new(Arc::new(trust))).map_err(StartError::Tls)?;
        let health = Health::new();
        Ok(Self {
            network: listen(SocketAddr::new(config.bind_address, config.bind_port)).await?,
            tls,
            admin: socket::bind_unix(&config.socket_path, 0o750, 0o770).map_err(StartError::Socket)?,
            pages: pages(&config, &health, recorded.as_ref()).await?,
            recorded,
            health,
            config,
            clock,
            services,
            replica: opened.replica,
            authority,
            feed,
            entropy,
            writer_stop,
            tasks,
            failed,
            writer,
        })
    }

    /// Where the network listener is; useful if the configuration left the port open.
    pub fn address(&self) -> Option<SocketAddr> {
        self.network.local_addr().ok()
    }

    /// What is served on the network.
    fn network_routes(&self) -> Routes {
        self.services.network()
    }

    /// What is served on the admin socket.
    fn admin_routes(&self) -> Routes {
        self.services.local()
    }

    /// Serves until `stop` is requested or an essential task fails, then drains within [`DRAIN`].
    pub async fn run(mut self, stop: Shutdown) {
        let (trigger, stopping) = Shutdown::new();
        let network = format!("{}:{}", self.config.bind_address, self.config.bind_port);
        let address = self.address().map_or(network, |address| address.to_string());
        tracing::info!(network = "tcp", address, "Starting Server APIs");
        tracing::info!(network = "unix", address = %self.config.socket_path.display(), "Starting Server APIs");
        let listeners = Tasks::new(trigger.clone());
        let (network, admin) = (self.network_routes(), self.admin_routes());
        listeners.spawn_critical(
            "network listener",
            serve::tcp(self.network, self.tls, network, TcpLimits::default(), self.clock.clone(), stopping.clone()),
        );
        listeners.spawn_critical(
            "admin listener",
            serve::unix(self.admin, admin, UnixLimits::for_operators(), stopping.clone()),
        );
        for (name, listener, answer) in self.pages.drain(..) {
            self.tasks.spawn(name, http::serve(name, listener, answer, self.tasks.clone(), stopping.clone()));
        }
        if let Some(recorded) = &self.recorded {
            recorded.keep_small(&self.tasks, stopping.clone());
        }
        self.tasks.spawn_critical("authority", self.authority.clone().run(stopping.clone()));
        self.tasks.spawn_critical("feed", self.feed.clone().run(stopping.clone()));
        let expiry = expiry::run(
            Arc::clone(&self.services.core),
            self.config.prune_attested_nodes,
            self.entropy.clone(),
            stopping.clone(),
        );
        self.tasks.spawn_critical("expiry", expiry);
        self.tasks.spawn("health", watch_health(self.replica.clone(), self.health.clone(), stopping.clone()));
        self.health.ready("server");
        self.health.ready("server.ca");
        ::metrics::gauge!("started", "version" => VERSION, "trust_domain_id" => self.config.trust_domain.to_string())
            .set(1.0);

        tokio::select! {
            () = stop.requested() => {}
            () = self.failed.requested() => tracing::error!("An essential task failed"),
            () = stopping.requested() => tracing::error!("A listener failed"),
        }
        self.health.waiting("server", "stopping");
        trigger.request();
        let late = listeners.join_all(DRAIN).await;
        if !late.is_empty() {
            tracing::warn!(tasks = ?late, "Listeners did not drain in time");
        }
        self.tasks.join_all(LAST_WRITES).await;
        self.writer_stop.request();
        self.writer.join_all(LAST_WRITES).await;
        tracing::info!("Server stopped");
    }
}

async fn listen(address: SocketAddr) -> Result<TcpListener, StartError> {
    TcpListener::bind(address).await.map_err(|source| StartError::Listen { address: address.to_string(), source })
}

async fn open_store(config: &Config, entropy: &Entropy) -> Result<Arc<dyn Store>, StartError> {
    let history = HistoryId(entropy.bytes());
    Ok(match &config.data_store {
        DataStore::Sled { dir } => {
            Arc::new(Sled::open(dir, history, sled::Options::default()).await.map_err(StartError::Store)?)
        }
        DataStore::Memory => Arc::new(Memory::new(history)),
    })
}

fn open_keys(config: &Config, entropy: &Entropy) -> Result<Arc<dyn SigningKeys>, StartError> {
    Ok(match &config.key_manager {
        KeyManager::Disk { keys_path } => Arc::new(DiskKeys::open(keys_path, entropy).map_err(StartError::Keys)?),
        KeyManager::Memory => Arc::new(MemoryKeys::new(entropy)),
    })
}

fn policy(config: &Config) -> Policy {
    Policy {
        trust_domain: config.trust_domain.clone(),
        ca_subject: CaSubject {
            country: config.ca_subject.country.clone(),
            organization: config.ca_subject.organization.clone(),
            common_name: config.ca_subject.common_name.clone(),
        },
        ca_ttl: config.ca_ttl,
        ca_key_type: config.ca_key_type,
        jwt_key_type: (!config.disable_jwt_svids).then_some(config.jwt_key_type),
        default_x509_svid_ttl: config.default_x509_svid_ttl,
        default_jwt_svid_ttl: config.default_jwt_svid_ttl,
        agent_ttl: config.agent_ttl,
        jwt_issuer: config.jwt_issuer.clone(),
    }
}

fn attestors(config: &Config, replica: &Replica, entropy: &Entropy) -> Result<Vec<Arc<dyn NodeAttestor>>, StartError> {
    let attestor = |configured: &AttestorConfig| -> Result<Arc<dyn NodeAttestor>, StartError> {
        match configured {
            AttestorConfig::JoinToken => Ok(Arc::new(JoinTokens::new(replica.clone()))),
            AttestorConfig::X509Pop(options) => {
                let mode = match &options.roots {
                    X509PopRoots::ExternalPki(certificates) => {
                        x509pop::Mode::Authorities { certificates: certificates.clone() }
                    }
                    X509PopRoots::Spiffe { prefix } => x509pop::Mode::Spiffe { prefix: prefix.clone() },
                };
                let settings = x509pop::Settings {
                    mode,
                    agent_path_template: options.agent_path_template.clone(),
                    max_intermediates: options.max_intermediates,
                    max_rsa_key_size: options.max_rsa_key_size,
                    verify_client_ip: options.verify_client_ip,
                };
                let made = X509Pop::new(&settings, replica.clone(), entropy.clone());
                Ok(Arc::new(made.map_err(StartError::X509Pop)?))
            }
        }
    };
    config.node_attestors.iter().map(attestor).collect()
}

/// Starts to record metrics if they are to be shown; without a reader nothing is recorded.
fn record_metrics(config: &Config) -> Result<Option<metrics::Recorded>, StartError> {
    if config.telemetry.prometheus.is_none() {
        return Ok(None);
    }
    let mut labels = Vec::new();
    if config.telemetry.trust_domain_label {
        labels.push(("trust_domain", config.trust_domain.to_string()));
    }
    if config.telemetry.hostname_label
        && let Ok(host) = std::fs::read_to_string("/proc/sys/kernel/hostname")
    {
        labels.push(("host", host.trim().to_owned()));
    }
    metrics::install("spire_server", &config.telemetry, &labels).map(Some).map_err(StartError::Metrics)
}

/// The pages that are served over HTTP, their listeners bound.
async fn pages(
    config: &Config,
    health: &Health,
    recorded: Option<&metrics::Recorded>,
) -> Result<Vec<(&'static str, TcpListener, http::Answer)>, StartError> {
    let mut pages = Vec::new();
    if let Some(HealthPages { address, port, live_path, ready_path }) = &config.health {
        let answer = health.answer(live_path.clone(), ready_path.clone());
        pages.push(("health checks", listen_by_name(address, *port).await?, answer));
    }
    if let (Some((address, port)), Some(recorded)) = (&config.telemetry.prometheus, recorded) {
        pages.push(("metrics", listen_by_name(address, *port).await?, recorded.answer()));
    }
    Ok(pages)
}

async fn listen_by_name(host: &str, port: u16) -> Result<TcpListener, StartError> {
    TcpListener::bind((host, port))
        .await
        .map_err(|source| StartError::Listen { address: format!("{host}:{port}"), source })
}

/// Says how the store does, whenever that changes.
async fn watch_health(replica: Replica, health: Health, stop: Shutdown) {
    const PART: &str = "catalog.datastore";
    let mut standing = replica.health();
    loop {
        match &*standing.borrow_and_update() {
            history::Health::Attached => health.ready(PART),
            history::Health::Detached => {
                tracing::error!("The data store is out of reach: nothing is written until it is back");
                health.waiting(PART, "out of reach");
            }
            history::Health::NeedsRestart(error) => {
                tracing::error!(error = telemetry::chain(error), "The data store failed: restart the server");
                health.failed(PART, telemetry::chain(error));
            }
            history::Health::Ended => health.waiting(PART, "closed"),
        }
        tokio::select! {
            changed = standing.changed() => if changed.is_err() { return },
            () = stop.requested() => return,
        }
    }
}

#[cfg(test)]
mod tests;
