//! Wiring: a configuration becomes a running agent, and a signal or the end of its identity ends it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Tasks, Trigger};
use runtime::telemetry::health::Health;
use runtime::telemetry::level::LogLevel;
use runtime::telemetry::settings::HealthPages;
use runtime::telemetry::{self, Limiter, http, log, metrics};
use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use tokio::net::TcpListener;
use transport::rotating::TlsError;
use transport::serve::{self, UnixLimits};
use transport::socket::{self, Listener, SocketError};
use zeroize::Zeroizing;

use crate::api::{self, OwnChain};
use crate::attest::{JoinToken, NodeProver, X509Pop};
use crate::cache::{Cache, Limits};
use crate::config::Config;
use crate::config::checked::{Bootstrap, BundleFormat, KeyManager, NodeAttestor, Rebootstrap};
use crate::identity::{self, BootstrapError, DataError, DataFile, Identity, IdentityError, UnknownAuthority};
use crate::keys::{AgentKeys, DiskKeys, KeyError, MemoryKeys};
use crate::server_link::{ServerLink, TlsDial};
use crate::sync::Sync;
use crate::workload::unix::Unix;
use crate::workload::{Attestors, WorkloadAttestor};

/// How long open calls of workloads may go on once the agent is asked to stop.
const DRAIN: Duration = Duration::from_secs(5);
/// How long a renewal that is under way then may take to reach the disk.
const LAST_WRITES: Duration = Duration::from_secs(5);
/// The part of the health page that stands for the whole agent.
const HEALTH: &str = "agent";

/// The version that metrics, logs and the server are told.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");

/// Why an agent does not run, or no longer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The log cannot be written.
    #[error("cannot set up logging")]
    Log(#[source] log::LogError),
    /// The asynchronous runtime cannot start.
    #[error("cannot start the runtime")]
    Runtime(#[source] std::io::Error),
    /// Signals cannot be received.
    #[error("cannot listen for signals")]
    Signals(#[source] std::io::Error),
    /// Metrics are recorded by somebody else.
    #[error("cannot record metrics")]
    Metrics(#[source] metrics::AlreadyInstalled),
    /// The data directory cannot be used.
    #[error("cannot use the data directory")]
    Data(#[source] DataError),
    /// The key manager cannot be used.
    #[error("cannot open the agent's keys")]
    Keys(#[source] KeyError),
    /// TLS cannot be set up.
    #[error("cannot set up TLS")]
    Tls(#[source] TlsError),
    /// A network address cannot be listened on.
    #[error("cannot listen on {address} (set by {keys})")]
    Listen {
        /// The address.
        address: String,
        /// The keys of the configuration that name the address.
        keys: &'static str,
        /// What the system said.
        source: std::io::Error,
    },
    /// A socket cannot be opened.
    #[error("cannot open a socket")]
    Socket(#[source] SocketError),
    /// The agent has no identity, or lost it.
    #[error("the agent has no identity")]
    Identity(#[source] IdentityError),
    /// A task without which the agent is of no use has failed.
    #[error("an essential task failed")]
    Task,
}

/// Runs an agent in this process until SIGTERM or SIGINT.
///
/// # Errors
/// If it does not start, or if its identity is at its end.
pub fn run(config: Config) -> Result<(), RunError> {
    let level = LogLevel::new(config.log.level);
    let output = match &config.log.file {
        Some(path) => log::Output::file(path).map_err(RunError::Log)?,
        None => log::Output::stdout(),
    };
    log::install(level.clone(), config.log.format, config.log.source_location, output.clone())
        .map_err(RunError::Log)?;
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
        .thread_name("agent")
        .build()
        .map_err(RunError::Runtime)?;
    runtime.block_on(async {
        let (trigger, stop) = Shutdown::new();
        let tasks = Tasks::new(trigger.clone());
        output.answer_signals(&tasks, stop.clone());
        stop_on_signal(&tasks, trigger, stop.clone())?;
        let agent = Agent::build(config, level, Clock::system(), Entropy::system()).await?;
        agent.run(stop).await
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

fn stop_on_signal(tasks: &Tasks, trigger: Trigger, stop: Shutdown) -> Result<(), RunError> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Signals)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Signals)?;
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

/// An agent that is ready to run: its data is read and its sockets are bound. It has not spoken to the server yet.
pub struct Agent {
    life: Life,
    listening: Listening,
}

/// What makes the agent one.
struct Life {
    config: Config,
    clock: Clock,
    entropy: Entropy,
    identity: Identity,
    link: ServerLink,
    cache: Cache,
    health: Health,
    /// Of lines that callers cause.
    log: Limiter,
}

/// What is bound and not served yet.
struct Listening {
    workloads: Listener,
    admin: Option<Listener>,
    level: LogLevel,
    pages: Vec<(&'static str, TcpListener, http::Answer)>,
    recorded: Option<metrics::Recorded>,
}

impl Agent {
    /// Binds the sockets, so that a second agent is refused before it does anything, and reads what is stored.
    ///
    /// # Errors
    /// [`RunError`]; nothing is left running then.
    pub async fn build(config: Config, level: LogLevel, clock: Clock, entropy: Entropy) -> Result<Self, RunError> {
        tracing::info!(
            data_dir = %config.data_dir.display(),
            trust_domain = %config.trust_domain,
            version = VERSION,
            "Starting agent"
        );
        let workloads = socket::bind_unix(&config.socket_path, 0o755, 0o777).map_err(RunError::Socket)?;
        let admin = config
            .admin_socket_path
            .as_ref()
            .map(|path| socket::bind_unix(path, 0o750, 0o770))
            .transpose()
            .map_err(RunError::Socket)?;
        let recorded = record_metrics(&config)?;
        let health = Health::new();
        health.waiting(HEALTH, "not in touch with the server yet");
        let pages = pages(&config, &health, recorded.as_ref()).await?;

        let identity = Identity::open(parts(&config, &clock, &entropy)?).map_err(RunError::Identity)?;
        let dial = TlsDial::new(
            (config.server_address.clone(), config.server_port),
            config.trust_domain.clone(),
            identity.rotating(),
            identity.trust(),
            config.bootstrap == Bootstrap::Insecure,
        )
        .map_err(RunError::Tls)?;
        let link = ServerLink::new(Arc::new(dial), identity.witness());
        let limits = Limits {
            x509_svids: config.x509_svid_cache_max_size,
            jwt_svids: config.jwt_svid_cache_max_size,
            availability_target: config.availability_target,
        };
        let issuer = Arc::new(link.clone());
        let log = Limiter::new(clock.clone());
        let cache =
            Cache::new(config.trust_domain.clone(), limits, issuer, clock.clone(), entropy.clone(), log.clone());
        let listening = Listening { workloads, admin, level, pages, recorded };
        Ok(Self { life: Life { config, clock, entropy, identity, link, cache, health, log }, listening })
    }

    /// Runs until `stop` is requested.
    ///
    /// # Errors
    /// If the identity cannot be had or kept, or an essential task fails.
    pub async fn run(self, stop: Shutdown) -> Result<(), RunError> {
        let (trigger, stopping) = Shutdown::new();
        let (tasks, listeners) = (Tasks::new(trigger.clone()), Tasks::new(trigger.clone()));
        let Self { life, listening } = self;
        // Before there is an identity: workloads are told Unavailable, which they wait out, instead of finding nobody.
        life.serve(listening, &listeners, &tasks, &stopping);
        let mut living = std::pin::pin!(life.live(&tasks, &stopping));
        let ended = tokio::select! {
            ended = &mut living => Some(ended),
            () = stop.requested() => None,
        };
        let failed = stopping.is_requested() && !stop.is_requested();
        life.health.waiting(HEALTH, "stopping");
        if let Some(Err(error)) = &ended {
            tracing::error!(error = telemetry::chain(error), "Stopping: the agent has no identity");
        }
        trigger.request();
        // A renewal that is under way should reach the disk: the server may have committed it.
        let last_write = async {
            if ended.is_none() {
                let _ = tokio::time::timeout(LAST_WRITES, living).await;
            }
        };
        tokio::join!(last_write, listeners.join_all(DRAIN));
        tasks.join_all(LAST_WRITES).await;
        tracing::info!("Agent stopped");
        match ended {
            Some(Err(error)) => Err(RunError::Identity(error)),
            _ if failed => Err(RunError::Task),
            _ => Ok(()),
        }
    }
}

impl Life {
    /// Serves on everything that is bound, until `stopping`.
    fn serve(&self, listening: Listening, listeners: &Tasks, tasks: &Tasks, stopping: &Shutdown) {
        let attestors: Vec<Box<dyn WorkloadAttestor>> = match &self.config.unix_attestor {
            Some(settings) => vec![Box::new(Unix::new(settings.clone()))],
            None => Vec::new(),
        };
        let settings = api::Settings {
            allow_unauthenticated_verifiers: self.config.allow_unauthenticated_verifiers,
            allowed_foreign_jwt_claims: self.config.allowed_foreign_jwt_claims.iter().cloned().collect(),
            disable_workload_api: self.config.disable_workload_api,
        };
        let attestors = Arc::new(Attestors::new(attestors, self.log.clone()));
        let routes = api::workload_routes(&self.cache, attestors, settings, self.clock.clone(), self.log.clone());
        tracing::info!(network = "unix", address = %self.config.socket_path.display(), "Starting Workload and SDS APIs");
        let limits = UnixLimits::for_everybody();
        let served = serve::unix(listening.workloads, routes, limits, self.log.clone(), stopping.clone());
        listeners.spawn_critical("workload listener", served);
        tasks.spawn("log limiter", self.log.clone().run(stopping.clone()));
        if let Some(admin) = listening.admin {
            let own = Arc::new(self.identity.clone());
            let routes = api::admin_routes(self.cache.clone(), own, listening.level, self.clock.clone());
            let served = serve::unix(admin, routes, UnixLimits::for_operators(), self.log.clone(), stopping.clone());
            listeners.spawn_critical("admin listener", served);
        }
        for (name, listener, answer) in listening.pages {
            tasks.spawn(name, http::serve(name, listener, answer, tasks.clone(), stopping.clone()));
        }
        if let Some(recorded) = &listening.recorded {
            recorded.keep_small(tasks, stopping.clone());
        }
        ::metrics::gauge!("started", "version" => VERSION, "trust_domain_id" => self.config.trust_domain.to_string())
            .set(1.0);
    }

    /// Gets an identity and keeps it; returns when it is at its end, or at a stop.
    async fn live(&self, tasks: &Tasks, stopping: &Shutdown) -> Result<(), IdentityError> {
        self.identity.establish(&self.link, stopping).await?;
        let sync = Sync {
            link: self.link.clone(),
            identity: self.identity.clone(),
            cache: self.cache.clone(),
            trust_domain: self.config.trust_domain.clone(),
            interval: self.config.sync_interval,
            version: VERSION,
            clock: self.clock.clone(),
            entropy: self.entropy.clone(),
        };
        let until = stopping.clone();
        tasks.spawn_critical("sync", async move { sync.run(until).await });
        let (cache, until, key_type) = (self.cache.clone(), stopping.clone(), self.config.workload_key_type);
        tasks.spawn_critical("signer", async move { cache.sign_until(until, key_type).await });
        let (cache, health, until) = (self.cache.clone(), self.health.clone(), stopping.clone());
        tasks.spawn("health", async move {
            tokio::select! {
                () = cache.first_sync() => {
                    tracing::info!("In touch with the server: workloads are served");
                    health.ready(HEALTH);
                }
                () = until.requested() => {}
            }
        });
        self.identity.keep(&self.link, stopping).await
    }
}

fn parts(config: &Config, clock: &Clock, entropy: &Entropy) -> Result<identity::Parts, RunError> {
    let keys: Arc<dyn AgentKeys> = match &config.key_manager {
        KeyManager::Memory => Arc::new(MemoryKeys::default()),
        KeyManager::Disk { directory } => Arc::new(DiskKeys::open(directory).map_err(RunError::Keys)?),
    };
    let (source, trust_domain) = (config.bootstrap.clone(), config.trust_domain.clone());
    let unknown_authority = match config.rebootstrap {
        Rebootstrap::Never => UnknownAuthority::Stop,
        Rebootstrap::Auto { delay } => UnknownAuthority::Rebootstrap { after: delay, required: false },
        Rebootstrap::Always { delay } => UnknownAuthority::Rebootstrap { after: delay, required: true },
    };
    Ok(identity::Parts {
        trust_domain: config.trust_domain.clone(),
        file: DataFile::open(&config.data_dir).map_err(RunError::Data)?,
        keys,
        prover: prover(config, entropy),
        bootstrap: Box::new(move || match source {
            Bootstrap::Bundle { path, format } => read_bundle(&path, format, trust_domain).map(Some),
            Bootstrap::Insecure => Ok(None),
        }),
        unknown_authority,
        clock: clock.clone(),
        entropy: entropy.clone(),
    })
}

fn prover(config: &Config, entropy: &Entropy) -> Arc<dyn NodeProver> {
    if let Some(token) = &config.join_token {
        return Arc::new(JoinToken::new(Some(Zeroizing::new(token.expose().to_owned()))));
    }
    match &config.node_attestor {
        NodeAttestor::JoinToken => Arc::new(JoinToken::new(None)),
        NodeAttestor::X509Pop { private_key_path, certificate_path, intermediates_path } => Arc::new(X509Pop::new(
            private_key_path.clone(),
            certificate_path.clone(),
            intermediates_path.clone(),
            entropy.clone(),
        )),
    }
}

fn read_bundle(path: &Path, format: BundleFormat, trust_domain: TrustDomain) -> Result<Bundle, BootstrapError> {
    let text = std::fs::read(path).map_err(|source| BootstrapError::File { path: path.to_owned(), source })?;
    let wrong = |source| BootstrapError::Content { path: path.to_owned(), source };
    let bundle = match format {
        BundleFormat::Pem => Bundle::from_pem(trust_domain, &String::from_utf8_lossy(&text)).map_err(wrong)?,
        BundleFormat::Spiffe => {
            let (bundle, warnings) = Bundle::from_spiffe_json(trust_domain, &text).map_err(wrong)?;
            for warning in warnings {
                tracing::warn!(file = %path.display(), ?warning, "The bootstrap bundle is odd");
            }
            bundle
        }
    };
    if bundle.x509.is_empty() { Err(BootstrapError::Empty { path: path.to_owned() }) } else { Ok(bundle) }
}

fn record_metrics(config: &Config) -> Result<Option<metrics::Recorded>, RunError> {
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
    metrics::install("spire_agent", &config.telemetry, &labels).map(Some).map_err(RunError::Metrics)
}

/// The pages that are served over HTTP, their listeners bound.
async fn pages(
    config: &Config,
    health: &Health,
    recorded: Option<&metrics::Recorded>,
) -> Result<Vec<(&'static str, TcpListener, http::Answer)>, RunError> {
    let mut pages = Vec::new();
    if let Some(HealthPages { address, port, live_path, ready_path }) = &config.health {
        let answer = health.answer(live_path.clone(), ready_path.clone());
        pages.push((
            "health checks",
            listen(address, *port, "health_checks.bind_address, health_checks.bind_port").await?,
            answer,
        ));
    }
    if let (Some((address, port)), Some(recorded)) = (&config.telemetry.prometheus, recorded) {
        pages.push((
            "metrics",
            listen(address, *port, "telemetry.Prometheus.host, telemetry.Prometheus.port").await?,
            recorded.answer(),
        ));
    }
    Ok(pages)
}

async fn listen(host: &str, port: u16, keys: &'static str) -> Result<TcpListener, RunError> {
    let bound = TcpListener::bind((host, port)).await;
    bound.map_err(|source| {
        let address = if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") };
        RunError::Listen { address, keys, source }
    })
}

impl OwnChain for Identity {
    fn own_chain(&self) -> Vec<Bytes> {
        self.svid().map(|svid| svid.svid.chain.clone()).unwrap_or_default()
    }
}
