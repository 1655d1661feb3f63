//! A server and an agent as processes, of ours or of SPIRE: both are driven by the same files, commands and sockets.

use std::ffi::OsString;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use super::wait;

/// Which implementation a binary is of; only the store's name and the log differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Signet,
    /// SPIRE, as a peer.
    Spire,
}

/// The two programs of one implementation.
#[derive(Clone, Debug)]
pub struct Binaries {
    /// Whose they are.
    pub kind: Kind,
    /// `signet-server` or `spire-server`.
    pub server: PathBuf,
    /// `signet-agent` or `spire-agent`.
    pub agent: PathBuf,
    /// What the environment of server and agent has in addition; commands run without it.
    pub environment: Vec<(String, OsString)>,
}

impl Binaries {
    /// Our programs, from the folder that the running test or bench was built into.
    ///
    /// # Errors
    /// If they have not been built; the text says by which command they are.
    pub fn signet() -> Result<Self> {
        let this = std::env::current_exe()?;
        let folder = this
            .ancestors()
            .find(|folder| folder.join("signet-server").is_file())
            .context("signet-server is not built: run `cargo build -p signet-server -p signet-agent` first")?;
        Self::signet_in(folder)
    }

    /// Our programs from `folder`.
    ///
    /// # Errors
    /// If one of them is not there.
    pub fn signet_in(folder: &Path) -> Result<Self> {
        Self::of(Kind::Signet, folder.join("signet-server"), folder.join("signet-agent"))
    }

    /// SPIRE's programs from `folder`.
    ///
    /// # Errors
    /// If one of them is not there.
    pub fn spire_in(folder: &Path) -> Result<Self> {
        Self::of(Kind::Spire, folder.join("spire-server"), folder.join("spire-agent"))
    }

    /// Any two programs.
    ///
    /// # Errors
    /// If one of them is not there.
    pub fn of(kind: Kind, server: PathBuf, agent: PathBuf) -> Result<Self> {
        for path in [&server, &agent] {
            ensure!(path.is_file(), "{} is missing", path.display());
        }
        Ok(Self { kind, server, agent, environment: Vec::new() })
    }
}

/// What a server is started with, beyond the defaults of its kind.
#[derive(Clone, Debug)]
pub struct ServerOptions {
    /// Trust domain name.
    pub trust_domain: String,
    /// More lines for the `server` block.
    pub server_block: String,
    /// More plugin blocks.
    pub plugins: String,
    /// More top-level blocks (telemetry, health checks).
    pub top_level: String,
    /// Key manager `memory` instead of `disk`.
    pub keys_in_memory: bool,
}

impl Default for ServerOptions {
    fn default() -> Self {
        Self {
            trust_domain: "example.org".into(),
            server_block: String::new(),
            plugins: String::new(),
            top_level: String::new(),
            keys_in_memory: false,
        }
    }
}

/// A process with its folder; killed when dropped.
struct Running {
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start(program: &Path, arguments: &[&str], environment: &[(String, OsString)], log: &Path) -> Result<Running> {
    let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
    let child = Command::new(program)
        .args(arguments)
        .envs(environment.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("starting {}", program.display()))?;
    Ok(Running { child })
}

/// Runs a program to its end.
///
/// # Errors
/// If it cannot be started.
pub fn run(program: &Path, arguments: &[&str]) -> Result<Output> {
    Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("running {}", program.display()))
}

fn free_port() -> Result<u16> {
    Ok(TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

/// A server in a folder of its own.
pub struct Server {
    binaries: Binaries,
    folder: PathBuf,
    /// The port on 127.0.0.1 that agents use.
    pub port: u16,
    /// Trust domain name.
    pub trust_domain: String,
    running: Option<Running>,
}

impl Server {
    /// Writes the configuration into `folder` and starts the server; ready when this returns.
    ///
    /// # Errors
    /// If it does not become ready within 30 s; the error holds the end of its log.
    pub async fn start(binaries: &Binaries, folder: &Path, options: &ServerOptions) -> Result<Self> {
        fs::create_dir_all(folder.join("data"))?;
        let port = free_port()?;
        let mut server = Self {
            binaries: binaries.clone(),
            folder: folder.into(),
            port,
            trust_domain: options.trust_domain.clone(),
            running: None,
        };
        fs::write(server.config(), server.configuration(options))?;
        server.start_again().await?;
        Ok(server)
    }

    fn configuration(&self, options: &ServerOptions) -> String {
        let data = self.folder.join("data");
        let data = data.display();
        let store = match self.binaries.kind {
            Kind::Signet => "DataStore \"sled\" { plugin_data {} }".to_owned(),
            Kind::Spire => format!(
                "DataStore \"sql\" {{ plugin_data {{ database_type = \"sqlite3\" connection_string = \"{data}/datastore.sqlite3\" }} }}"
            ),
        };
        let keys = if options.keys_in_memory {
            "KeyManager \"memory\" { plugin_data {} }".to_owned()
        } else {
            format!("KeyManager \"disk\" {{ plugin_data {{ keys_path = \"{data}/keys.json\" }} }}")
        };
        format!(
            "server {{\n  bind_address = \"127.0.0.1\"\n  bind_port = \"{port}\"\n  socket_path = \"{socket}\"\n  trust_domain = \"{td}\"\n  \
             data_dir = \"{data}\"\n{server}\n}}\nplugins {{\n  {store}\n  {keys}\n  NodeAttestor \"join_token\" {{ plugin_data {{}} }}\n{plugins}\n}}\n{top}\n",
            port = self.port,
            socket = self.socket().display(),
            td = options.trust_domain,
            server = options.server_block,
            plugins = options.plugins,
            top = options.top_level,
        )
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("server.conf")
    }

    /// The admin socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("server/api.sock")
    }

    /// The log of all runs.
    pub fn log(&self) -> PathBuf {
        self.folder.join("server.log")
    }

    /// The folder that holds data, keys and configuration.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Process id.
    ///
    /// # Errors
    /// If the server is not running.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.running.as_ref().context("server is not running")?.child.id())
    }

    /// Starts the server once more on the same folder; ready when this returns.
    ///
    /// # Errors
    /// As [`Server::start`].
    pub async fn start_again(&mut self) -> Result<()> {
        self.start_without_waiting()?;
        self.ready().await
    }

    /// Starts the server once more and does not wait.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start_without_waiting(&mut self) -> Result<()> {
        let config = self.config();
        let config = config.to_str().context("folder is not UTF-8")?;
        self.running =
            Some(start(&self.binaries.server, &["run", "-config", config], &self.binaries.environment, &self.log())?);
        Ok(())
    }

    /// Waits until the server says it is healthy.
    ///
    /// # Errors
    /// If it ends first, or takes longer than 30 s.
    pub async fn ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let running = self.running.as_mut().context("server is not running")?;
        let waited = wait::until("the server's health", Duration::from_secs(30), async || {
            if let Ok(Some(status)) = running.child.try_wait() {
                return Some(Err(status));
            }
            healthy(&socket).await.then_some(Ok(()))
        })
        .await;
        match waited {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("the server ended with {status}:\n{}", tail(&self.log())),
            Err(error) => Err(error.context(tail(&self.log()))),
        }
    }

    /// Sends `signal`; for `SIGKILL` and `SIGTERM` waits for the end.
    ///
    /// # Errors
    /// If the server is not running or does not end within 30 s.
    pub async fn signal(&mut self, signal: Signal) -> Result<()> {
        end(&mut self.running, signal).await
    }

    /// Runs one of the server's commands against this server (`entry create`, …).
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn command(&self, arguments: &[&str]) -> Result<Output> {
        let socket = self.socket();
        let mut all = arguments.to_vec();
        all.extend(["-socketPath", socket.to_str().context("folder is not UTF-8")?]);
        run(&self.binaries.server, &all)
    }

    /// As [`Server::command`], and demands exit code 0; the answer is what it printed.
    ///
    /// # Errors
    /// If it fails; the text holds what it printed.
    pub fn ok(&self, arguments: &[&str]) -> Result<String> {
        let output = self.command(arguments)?;
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        ensure!(
            output.status.success(),
            "{arguments:?} ended with {}: {printed}{}",
            output.status,
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(printed)
    }

    /// A fresh join token; `agent` is the id that its node also gets.
    ///
    /// # Errors
    /// If the command fails.
    pub fn token(&self, agent: Option<&str>) -> Result<String> {
        let printed = match agent {
            Some(agent) => self.ok(&["token", "generate", "-spiffeID", agent])?,
            None => self.ok(&["token", "generate"])?,
        };
        let token = printed.lines().find_map(|line| line.strip_prefix("Token: ")).context("no token printed")?;
        Ok(token.trim().to_owned())
    }

    /// Writes the trust bundle in PEM beside the data and gives its path.
    ///
    /// # Errors
    /// If the command fails.
    pub fn bundle(&self) -> Result<PathBuf> {
        let path = self.folder.join("bundle.pem");
        fs::write(&path, self.ok(&["bundle", "show"])?)?;
        Ok(path)
    }
}

/// What an agent is started with.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// Join token, if the agent attests by one.
    pub join_token: Option<String>,
    /// More lines for the `agent` block.
    pub agent_block: String,
    /// The whole `NodeAttestor` block, if it is not `join_token`.
    pub node_attestor: Option<String>,
    /// Lines for the plugin data of the `unix` workload attestor.
    pub unix: String,
    /// More top-level blocks (telemetry, health checks).
    pub top_level: String,
}

/// An agent in a folder of its own.
pub struct Agent {
    binaries: Binaries,
    folder: PathBuf,
    running: Option<Running>,
}

impl Agent {
    /// Writes the configuration into `folder` and starts the agent; healthy when this returns.
    ///
    /// # Errors
    /// If it does not become healthy within 30 s; the error holds the end of its log.
    pub async fn start(binaries: &Binaries, folder: &Path, server: &Server, options: &AgentOptions) -> Result<Self> {
        let mut agent = Self::prepare(binaries, folder, server, options)?;
        agent.start_again().await?;
        Ok(agent)
    }

    /// Writes the configuration into `folder` and starts nothing.
    ///
    /// # Errors
    /// If a file cannot be written or the server does not hand out its bundle.
    pub fn prepare(binaries: &Binaries, folder: &Path, server: &Server, options: &AgentOptions) -> Result<Self> {
        fs::create_dir_all(folder.join("data"))?;
        let agent = Self { binaries: binaries.clone(), folder: folder.into(), running: None };
        let bundle = server.bundle()?;
        let token =
            options.join_token.as_ref().map(|token| format!("  join_token = \"{token}\"\n")).unwrap_or_default();
        let attestor =
            options.node_attestor.clone().unwrap_or_else(|| "NodeAttestor \"join_token\" { plugin_data {} }".into());
        let text = format!(
            "agent {{\n  data_dir = \"{data}\"\n  server_address = \"127.0.0.1\"\n  server_port = \"{port}\"\n  socket_path = \"{socket}\"\n  \
             trust_bundle_path = \"{bundle}\"\n  trust_domain = \"{td}\"\n{token}{more}\n}}\nplugins {{\n  {attestor}\n  \
             KeyManager \"disk\" {{ plugin_data {{ directory = \"{data}\" }} }}\n  WorkloadAttestor \"unix\" {{ plugin_data {{ {unix} }} }}\n}}\n{top}\n",
            data = folder.join("data").display(),
            port = server.port,
            socket = agent.socket().display(),
            bundle = bundle.display(),
            td = server.trust_domain,
            more = options.agent_block,
            unix = options.unix,
            top = options.top_level,
        );
        fs::write(agent.config(), text)?;
        Ok(agent)
    }

    /// The programs it was started from.
    pub fn binaries(&self) -> &Binaries {
        &self.binaries
    }

    /// The configuration file.
    pub fn config(&self) -> PathBuf {
        self.folder.join("agent.conf")
    }

    /// The Workload API socket.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("agent/api.sock")
    }

    /// The log of all runs.
    pub fn log(&self) -> PathBuf {
        self.folder.join("agent.log")
    }

    /// The folder that holds data and configuration.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Process id.
    ///
    /// # Errors
    /// If the agent is not running.
    pub fn pid(&self) -> Result<u32> {
        Ok(self.running.as_ref().context("agent is not running")?.child.id())
    }

    /// Starts the agent once more on the same folder; healthy when this returns.
    ///
    /// # Errors
    /// As [`Agent::start`].
    pub async fn start_again(&mut self) -> Result<()> {
        self.start_without_waiting()?;
        self.ready().await
    }

    /// Starts the agent once more and does not wait.
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn start_without_waiting(&mut self) -> Result<()> {
        let config = self.config();
        let config = config.to_str().context("folder is not UTF-8")?;
        self.running =
            Some(start(&self.binaries.agent, &["run", "-config", config], &self.binaries.environment, &self.log())?);
        Ok(())
    }

    /// Waits until the agent says it is healthy.
    ///
    /// # Errors
    /// If it ends first, or takes longer than 30 s.
    pub async fn ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let running = self.running.as_mut().context("agent is not running")?;
        let waited = wait::until("the agent's health", Duration::from_secs(30), async || {
            if let Ok(Some(status)) = running.child.try_wait() {
                return Some(Err(status));
            }
            healthy(&socket).await.then_some(Ok(()))
        })
        .await;
        match waited {
            Ok(Ok(())) => Ok(()),
            Ok(Err(status)) => bail!("the agent ended with {status}:\n{}", tail(&self.log())),
            Err(error) => Err(error.context(tail(&self.log()))),
        }
    }

    /// Sends `signal`; for `SIGKILL` and `SIGTERM` waits for the end.
    ///
    /// # Errors
    /// If the agent is not running or does not end within 30 s.
    pub async fn signal(&mut self, signal: Signal) -> Result<()> {
        end(&mut self.running, signal).await
    }

    /// Whether the process has ended, and how.
    ///
    /// # Errors
    /// If it cannot be asked.
    pub fn ended(&mut self) -> Result<Option<std::process::ExitStatus>> {
        match &mut self.running {
            None => bail!("agent was not started"),
            Some(running) => Ok(running.child.try_wait()?),
        }
    }

    /// Runs one of the agent's commands against this agent (`api fetch`, …).
    ///
    /// # Errors
    /// If the program cannot be started.
    pub fn command(&self, arguments: &[&str]) -> Result<Output> {
        let socket = self.socket();
        let mut all = arguments.to_vec();
        all.extend(["-socketPath", socket.to_str().context("folder is not UTF-8")?]);
        run(&self.binaries.agent, &all)
    }
}

async fn end(running: &mut Option<Running>, signal: Signal) -> Result<()> {
    let process = running.as_mut().context("not running")?;
    kill(Pid::from_raw(i32::try_from(process.child.id())?), signal)?;
    if matches!(signal, Signal::SIGKILL | Signal::SIGTERM) {
        wait::until("the process to end", Duration::from_secs(30), async || process.child.try_wait().ok().flatten())
            .await?;
        *running = None;
    }
    Ok(())
}

/// Whether the standard health service behind `socket` says SERVING.
pub async fn healthy(socket: &Path) -> bool {
    let Ok(channel) = super::unix(socket).await else { return false };
    let mut client = spiffe_proto::health::health_client::HealthClient::new(channel);
    let request = spiffe_proto::health::HealthCheckRequest::default();
    client.check(request).await.is_ok_and(|answer| {
        answer.into_inner().status == i32::from(spiffe_proto::health::health_check_response::ServingStatus::Serving)
    })
}

/// The last lines of a log, for error texts.
pub fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines.get(lines.len().saturating_sub(30)..).unwrap_or_default().join("\n")
}
