//! The processes of the demo: started, watched, and stopped when dropped.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use super::{ended, succeeded};

/// A process that wants an identity.
pub struct Workload {
    /// Short name.
    pub name: &'static str,
    /// The SPIFFE ID it is registered for.
    pub id: String,
    /// Its program.
    pub program: PathBuf,
    /// The user it runs as, if not ours.
    pub uid: Option<u32>,
    /// What the kernel says about it.
    pub selector: String,
}

/// Where cargo put the programs.
pub struct Programs {
    folder: PathBuf,
}

/// Says in one line what is missing.
pub fn tools() -> Result<()> {
    let compiler = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let found = Command::new(&compiler).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    ensure!(
        found.is_ok_and(|status| status.success()),
        "a C compiler is missing: install gcc or clang (tried `{compiler}`)"
    );
    Ok(())
}

/// Builds the server, the agent and the workload of the demo.
pub fn build() -> Result<Programs> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let output = Command::new(cargo)
        .args([
            "build",
            "--message-format=json-render-diagnostics",
            "-p",
            "signet-server",
            "-p",
            "signet-agent",
            "-p",
            "e2e",
        ])
        .args(["--bin", "signet-server", "--bin", "signet-agent", "--bin", "signet-demo-workload"])
        .stderr(Stdio::inherit())
        .output()
        .context("running cargo")?;
    ensure!(output.status.success(), "the build failed");
    let folder = String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| serde_json::from_str::<Value>(line).ok())
        .find(|message| message["target"]["name"] == "signet-demo-workload")
        .and_then(|message| message["executable"].as_str().map(PathBuf::from))
        .context("cargo did not say where it put the programs")?;
    Ok(Programs { folder: folder.parent().context("no folder")?.into() })
}

/// Whether other users' processes can be started.
pub fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// What a process has printed so far: one JSON event a line.
#[derive(Default)]
struct Events {
    seen: Mutex<Vec<Value>>,
    more: Condvar,
}

struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
    events: Arc<Events>,
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Everything that runs, in one temporary folder.
pub struct Stage {
    // Order matters: workloads go first, then the agent, then the server, then the folder.
    processes: Vec<Process>,
    programs: PathBuf,
    folder: tempfile::TempDir,
}

impl Drop for Stage {
    fn drop(&mut self) {
        while self.processes.pop().is_some() {}
    }
}

impl Stage {
    /// An empty stage.
    pub fn new(programs: &Programs) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("signet-demo-").tempdir()?;
        // Other users' workloads must reach the socket and their programs.
        fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755))?;
        Ok(Self { processes: Vec::new(), programs: programs.folder.clone(), folder })
    }

    /// The folder of everything.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// The server's program.
    pub fn server_program(&self) -> PathBuf {
        self.programs.join("signet-server")
    }

    /// The agent's program.
    pub fn agent_program(&self) -> PathBuf {
        self.programs.join("signet-agent")
    }

    /// The admin socket of the server.
    pub fn server_socket(&self) -> PathBuf {
        self.folder().join("server/api.sock")
    }

    /// The Workload API socket.
    pub fn agent_socket(&self) -> PathBuf {
        self.folder().join("agent/api.sock")
    }

    /// Starts the server and waits until it is healthy.
    pub fn start_server(&mut self, svid_lifetime: &str) -> Result<()> {
        let port = std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port();
        let folder = self.folder().display().to_string();
        let config = self.folder().join("server.conf");
        fs::write(
            &config,
            format!(
                "server {{\n  trust_domain = \"example.org\"\n  bind_address = \"127.0.0.1\"\n  bind_port = \"{port}\"\n  \
                 socket_path = \"{folder}/server/api.sock\"\n  data_dir = \"{folder}/server-data\"\n  \
                 default_x509_svid_ttl = \"{svid_lifetime}\"\n  agent_ttl = \"1h\"\n}}\n\nplugins {{\n  DataStore \"sled\" {{ plugin_data {{}} }}\n  \
                 KeyManager \"disk\" {{ plugin_data {{ keys_path = \"{folder}/server-data/keys.json\" }} }}\n  \
                 NodeAttestor \"join_token\" {{ plugin_data {{}} }}\n}}\n"
            ),
        )?;
        fs::write(self.folder().join("port"), port.to_string())?;
        self.spawn("server", &self.server_program(), &["run", "-config", path(&config)?], None, &[])?;
        self.healthy("server", &self.server_program(), &self.server_socket())
    }

    /// Starts an agent with a fresh join token and waits until it is healthy.
    pub fn start_agent(&mut self) -> Result<()> {
        let printed = self.server(&["token", "generate", "-spiffeID", "spiffe://example.org/node"])?;
        let token = printed
            .lines()
            .find_map(|line| line.strip_prefix("Token: "))
            .context("no token printed")?
            .trim()
            .to_owned();
        let bundle = self.folder().join("bundle.pem");
        fs::write(&bundle, self.server(&["bundle", "show"])?)?;
        let folder = self.folder().display().to_string();
        let port = fs::read_to_string(self.folder().join("port"))?;
        let config = self.folder().join("agent.conf");
        fs::write(
            &config,
            format!(
                "agent {{\n  trust_domain = \"example.org\"\n  server_address = \"127.0.0.1\"\n  server_port = \"{port}\"\n  \
                 trust_bundle_path = \"{folder}/bundle.pem\"\n  socket_path = \"{folder}/agent/api.sock\"\n  data_dir = \"{folder}/agent-data\"\n}}\n\n\
                 plugins {{\n  NodeAttestor \"join_token\" {{ plugin_data {{}} }}\n  KeyManager \"disk\" {{ plugin_data {{ directory = \"{folder}/agent-data\" }} }}\n  \
                 WorkloadAttestor \"unix\" {{ plugin_data {{ discover_workload_path = true }} }}\n}}\n"
            ),
        )?;
        // The token is a secret until it is used, so it travels in a private file and not in a process list.
        let secret = self.folder().join("token");
        fs::write(&secret, token)?;
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o600))?;
        let program = self.agent_program();
        self.spawn(
            "agent",
            &program,
            &["run", "-config", path(&config)?, "-joinTokenFile", path(&secret)?],
            None,
            &[],
        )?;
        self.healthy("agent", &program, &self.agent_socket())
    }

    /// Registers `workload` under the node's id.
    pub fn register(&self, workload: &Workload) -> Result<()> {
        let entry = [
            "entry",
            "create",
            "-parentID",
            "spiffe://example.org/node",
            "-spiffeID",
            &workload.id,
            "-selector",
            &workload.selector,
        ];
        self.server(&entry).map(drop)
    }

    /// A copy of the demo's workload for `name`, different from every other by its last bytes, readable by all.
    pub fn program(&self, name: &str) -> Result<PathBuf> {
        let copy = self.folder().join(name);
        let mut bytes = fs::read(self.programs.join("signet-demo-workload"))?;
        bytes.extend_from_slice(name.as_bytes());
        fs::write(&copy, bytes)?;
        fs::set_permissions(&copy, fs::Permissions::from_mode(0o755))?;
        Ok(copy)
    }

    /// SHA-256 of a file, in lower hex.
    pub fn sha256(&self, file: &Path) -> Result<String> {
        let output = Command::new("sha256sum").arg(file).output().context("sha256sum is missing: install coreutils")?;
        let printed = succeeded("sha256sum", &output)?;
        Ok(printed.split_whitespace().next().context("sha256sum printed nothing")?.to_owned())
    }

    /// Starts `workload` as a listener; the answer is its address.
    pub fn listen(&mut self, workload: &Workload) -> Result<String> {
        let socket = self.agent_socket();
        self.spawn(workload.name, &workload.program, &["listen", path(&socket)?], workload.uid, &[])?;
        let event = self.event(workload, "listening", super::PATIENCE)?;
        Ok(event["address"].as_str().context("no address")?.to_owned())
    }

    /// Starts `workload` as a caller of `address`, which must be `id`.
    pub fn call(&mut self, workload: &Workload, address: &str, id: &str) -> Result<()> {
        let socket = self.agent_socket();
        self.spawn(workload.name, &workload.program, &["call", path(&socket)?, address, id], workload.uid, &[])
    }

    /// Runs `workload` once and demands that it is refused; the answer is what it was told.
    pub fn refused(&self, workload: &Workload) -> Result<String> {
        let socket = self.agent_socket();
        let mut command = Command::new(&workload.program);
        command.args(["once", path(&socket)?]).stdin(Stdio::null());
        if let Some(uid) = workload.uid {
            command.uid(uid).gid(uid);
        }
        let output = command.output()?;
        ensure!(!output.status.success(), "a process without an entry was given an identity");
        let said = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        ensure!(
            said.contains("PermissionDenied") && said.contains("no identity issued"),
            "refused for another reason: {said}"
        );
        Ok(said)
    }

    /// The first event `kind` of `workload`, waiting for it.
    pub fn event(&self, workload: &Workload, kind: &str, patience: Duration) -> Result<Value> {
        self.event_where(workload, kind, patience, |_| true)
    }

    /// The first event `kind` of `workload` for which `holds`, waiting for it.
    pub fn event_where(
        &self,
        workload: &Workload,
        kind: &str,
        patience: Duration,
        holds: impl Fn(&Value) -> bool,
    ) -> Result<Value> {
        let process = self.process(workload.name)?;
        let seen = process.events.seen.lock().map_err(|_| anyhow::anyhow!("a reader panicked"))?;
        let missing = |seen: &mut Vec<Value>| !seen.iter().any(|event| event["event"] == kind && holds(event));
        let (seen, waited) = process
            .events
            .more
            .wait_timeout_while(seen, patience, missing)
            .map_err(|_| anyhow::anyhow!("a reader panicked"))?;
        if waited.timed_out() {
            bail!(
                "{} did not report `{kind}` within {patience:?}; {}",
                workload.name,
                ended(workload.name, &process.log)
            );
        }
        seen.iter().find(|event| event["event"] == kind && holds(event)).cloned().context("the event has gone")
    }

    /// The newest event `kind` of `workload`.
    pub fn last(&self, workload: &Workload, kind: &str) -> Option<Value> {
        let process = self.process(workload.name).ok()?;
        let seen = process.events.seen.lock().ok()?;
        seen.iter().rev().find(|event| event["event"] == kind).cloned()
    }

    /// Waits for Ctrl-C, or for one of the processes to end.
    pub fn until_interrupted(&mut self) -> Result<()> {
        let mut signals = nix::sys::signal::SigSet::empty();
        for signal in [nix::sys::signal::SIGINT, nix::sys::signal::SIGTERM, nix::sys::signal::SIGCHLD] {
            signals.add(signal);
        }
        signals.thread_block()?;
        loop {
            let signal = signals.wait()?;
            for process in &mut self.processes {
                if process.child.try_wait()?.is_some() {
                    return Err(ended(process.name, &process.log));
                }
            }
            if signal != nix::sys::signal::SIGCHLD {
                println!("\nStopping.");
                return Ok(());
            }
        }
    }

    fn process(&self, name: &str) -> Result<&Process> {
        self.processes.iter().find(|process| process.name == name).with_context(|| format!("{name} was not started"))
    }

    fn server(&self, arguments: &[&str]) -> Result<String> {
        let socket = self.server_socket();
        let output =
            Command::new(self.server_program()).args(arguments).args(["-socketPath", path(&socket)?]).output()?;
        succeeded(&arguments.join(" "), &output)
    }

    fn spawn(
        &mut self,
        name: &'static str,
        program: &Path,
        arguments: &[&str],
        uid: Option<u32>,
        environment: &[(&str, &str)],
    ) -> Result<()> {
        let log = self.folder().join(format!("{name}.log"));
        let mut command = Command::new(program);
        command.args(arguments).envs(environment.iter().copied()).stdin(Stdio::null());
        command.stderr(fs::OpenOptions::new().create(true).append(true).open(&log)?);
        // Workloads report on standard output; the server's and the agent's is their log.
        let reports = !matches!(name, "server" | "agent");
        command.stdout(if reports { Stdio::piped() } else { fs::OpenOptions::new().append(true).open(&log)?.into() });
        if let Some(uid) = uid {
            command.uid(uid).gid(uid);
        }
        let mut child = command.spawn().with_context(|| format!("starting {name}"))?;
        let events = Arc::new(Events::default());
        if let Some(output) = child.stdout.take() {
            let events = events.clone();
            std::thread::spawn(move || {
                for line in BufReader::new(output).lines().map_while(Result::ok) {
                    if let (Ok(event), Ok(mut seen)) = (serde_json::from_str(&line), events.seen.lock()) {
                        seen.push(event);
                        events.more.notify_all();
                    }
                }
            });
        }
        self.processes.push(Process { name, child, log, events });
        Ok(())
    }

    fn healthy(&mut self, name: &'static str, program: &Path, socket: &Path) -> Result<()> {
        let socket = path(socket)?;
        let end = std::time::Instant::now() + super::PATIENCE;
        loop {
            let output: Output = Command::new(program).args(["healthcheck", "-socketPath", socket]).output()?;
            if output.status.success() {
                return Ok(());
            }
            let process = self.processes.iter_mut().find(|process| process.name == name).context("not started")?;
            if process.child.try_wait()?.is_some() || std::time::Instant::now() > end {
                return Err(ended(name, &process.log));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

fn path(path: &Path) -> Result<&str> {
    path.to_str().context("the temporary folder's path is not UTF-8")
}
