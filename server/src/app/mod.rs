//! Wiring: a configuration becomes a running server, and a signal ends it.

mod expiry;
mod listeners;
mod observe;
mod parts;
mod trust;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Tasks, Trigger};
use runtime::steady::Steady;
use runtime::telemetry::Limiter;
use runtime::telemetry::health::Health;
use runtime::telemetry::level::LogLevel;
use runtime::telemetry::{self, http, log, metrics};
use tokio::net::TcpListener;
use transport::rotating::{self, Rotating};
use transport::serve::{self, TcpLimits, UnixLimits};
use transport::socket::{Listener, SocketError};
use transport::verify::ClientVerifier;

use self::listeners::Listeners;
use self::trust::ServerTrust;
use crate::api::Services;
use crate::api::agent::AgentService;
use crate::api::backup::BackupService;
use crate::api::bundle::BundleService;
use crate::api::core::Core;
use crate::api::debug::DebugService;
use crate::api::entry::EntryService;
use crate::api::health::HealthService;
use crate::api::logger::LoggerService;
use crate::api::meters::Meters;
use crate::api::svid::SvidService;
use crate::api::sync::SyncService;
use crate::attest::x509pop;
use crate::audit::Audit;
use crate::authority::keys::KeyError;
use crate::authority::{self, Authority, AuthorityError};
use crate::config::Config;
use crate::feed::Feed;
use crate::history::{self, OpenError, Reach, Replica, StoreError};
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
    #[error("cannot make the data directory {} (set by server.data_dir)", path.display())]
    DataDirectory {
        /// Where it should be.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
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
    #[error("cannot listen on {address} ({remedy}; set by {keys})")]
    Listen {
        /// The address.
        address: String,
        /// What to do about it.
        remedy: &'static str,
        /// The keys of the configuration that name the address.
        keys: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// The admin socket cannot be opened.
    #[error("cannot open the admin socket (set by server.socket_path)")]
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
    let ended = runtime.block_on(async {
        let (trigger, stop) = Shutdown::new();
        let tasks = Tasks::new(trigger.clone());
        output.answer_signals(&tasks, stop.clone());
        stop_on_signal(&tasks, trigger, stop.clone())?;
        let server = Server::build(config, level, Clock::system(), Entropy::system()).await?;
        server.run(stop).await;
        Ok(())
    });
    // Who starts the server sees standard error; who looks later has only the log.
    ended.inspect_err(|error| tracing::error!(error = telemetry::chain(error), "The server did not start"))
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
    admin: Listener,
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
    /// Binds the sockets, opens store and keys, and brings up the authority; nothing is accepted yet.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running then.
    pub async fn build(config: Config, level: LogLevel, clock: Clock, entropy: Entropy) -> Result<Self, StartError> {
        let listeners = Listeners::bind(&config).await?;
        let steady = Steady::new(clock.clone());
        std::fs::create_dir_all(&config.data_dir)
            .map_err(|source| StartError::DataDirectory { path: config.data_dir.clone(), source })?;
        tracing::info!(
            data_dir = %config.data_dir.display(),
            trust_domain = %config.trust_domain,
            launch_log_level = level.launch().name(),
            version = VERSION,
            "Configured"
        );
        let (trigger, failed) = Shutdown::new();
        let tasks = Tasks::new(trigger.clone());
        let recorded = observe::record_metrics(&config)?;

        let (writer_stop, writer_stopped) = Shutdown::new();
        let writer = Tasks::new(trigger);
        let store = parts::open_store(&config, &entropy).await?;
        let trust_domain = config.trust_domain.clone();
        let opened = history::open(store, Reach::OneProcess, trust_domain, clock.clone(), entropy.clone());
        let opened = opened.await.map_err(StartError::History)?;
        writer.spawn_critical("history", opened.writer.run(writer_stopped));

        let own = Rotating::new();
        let authority = Authority::open(authority::Parts {
            policy: parts::policy(&config),
            keys: parts::open_keys(&config, &opened.replica, &entropy)?,
            committer: opened.committer.clone(),
            replica: opened.replica.clone(),
            clock: clock.clone(),
            steady: steady.clone(),
            entropy: entropy.clone(),
            own_certificate: own.clone(),
        });
        let authority = authority.await.map_err(StartError::Authority)?;
        authority.bring_up().await.map_err(StartError::Authority)?;

        let log = Limiter::new(clock.clone());
        let core = Arc::new(Core {
            trust_domain: config.trust_domain.clone(),
            replica: opened.replica.clone(),
            committer: opened.committer,
            clock: clock.clone(),
            steady: steady.clone(),
            entropy: entropy.clone(),
            admin_ids: config.admin_ids.iter().cloned().collect(),
            limits: Limits::new(config.ratelimit.attestation, config.ratelimit.signing),
            audit: Audit::new(config.audit_log_enabled, log.clone()),
            log,
            twice: Default::default(),
            meters: Meters::new(),
        });
        let attestors = parts::attestors(&config, &opened.replica, &entropy)?;
        let width = std::thread::available_parallelism().map_or(1, usize::from);
        let feed = Feed::new(opened.replica.clone(), clock.clone(), steady.clone());
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
            backup: BackupService::new(Arc::clone(&core)),
            debug: DebugService::new(Arc::clone(&core), own.clone()),
            logger: LoggerService::new(Arc::clone(&core), level),
            health: HealthService::new(Arc::clone(&core)),
            core,
        };
        let trust = ServerTrust::new(opened.replica.clone(), clock.clone(), &config);
        let tls = rotating::server_config(&own, ClientVerifier::new(Arc::new(trust))).map_err(StartError::Tls)?;
        let health = Health::new();
        Ok(Self {
            network: listeners.network,
            tls,
            admin: listeners.admin,
            pages: observe::pages(&config, &health, listeners.health, recorded.as_ref(), listeners.metrics),
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
    fn network_routes(&self) -> transport::serve::Routes {
        self.services.network()
    }

    /// What is served on the admin socket.
    fn admin_routes(&self) -> transport::serve::Routes {
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
        let mut limits = TcpLimits::default();
        limits.anonymous.connections_per_network = self.config.ratelimit.connections_per_network;
        let log = self.services.core.log.clone();
        self.tasks.spawn("log limiter", log.clone().run(stopping.clone()));
        listeners.spawn_critical(
            "network listener",
            serve::tcp(self.network, self.tls, network, limits, log.clone(), self.clock.clone(), stopping.clone()),
        );
        listeners.spawn_critical(
            "admin listener",
            serve::unix(self.admin, admin, UnixLimits::for_operators(), log.clone(), stopping.clone()),
        );
        for (name, listener, answer) in self.pages.drain(..) {
            self.tasks.spawn(name, http::serve(name, listener, answer, self.tasks.clone(), stopping.clone()));
        }
        if let Some(recorded) = &self.recorded {
            recorded.keep_small(&self.tasks, stopping.clone());
            self.tasks.spawn("gauges", observe::gauges(self.replica.clone(), self.feed.clone(), stopping.clone()));
        }
        self.tasks.spawn_critical("clock", self.services.core.steady.clone().run(stopping.clone()));
        self.tasks.spawn_critical("authority", self.authority.clone().run(stopping.clone()));
        self.tasks.spawn_critical("feed", self.feed.clone().run(stopping.clone()));
        let expiry = expiry::run(
            Arc::clone(&self.services.core),
            self.config.prune_attested_nodes,
            self.entropy.clone(),
            stopping.clone(),
        );
        self.tasks.spawn_critical("expiry", expiry);
        self.tasks.spawn("health", observe::watch_health(self.replica.clone(), self.health.clone(), stopping.clone()));
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

#[cfg(test)]
mod tests;
