//! Hostile inputs against real servers and agents, by their ids in the requirements. Each test ends by fetching an SVID
//! once more: whatever came before, it still works.

mod callers;
mod crowds;
mod endpoint;
mod forge;
mod ids;
mod issuing;
mod network;
mod parties;
mod strangers;
mod trust;

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, secured, unix, wait};
use serde_json::Value;
use spiffe_proto::workload::X509svidRequest;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use tempfile::TempDir;

const NODE: &str = "spiffe://example.org/node";
const A: &str = "spiffe://example.org/a";
/// Generous: what is asserted is that something succeeds, not how fast on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

/// A server, an agent, and the entry `/a` for what this user runs.
struct House {
    agent: Agent,
    server: Server,
    folder: TempDir,
}

impl House {
    async fn new() -> Result<Self> {
        Self::with(Binaries::signet()?, "", "").await
    }

    async fn with(agents: Binaries, server_block: &str, unix: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let options = ServerOptions { server_block: server_block.into(), ..ServerOptions::default() };
        let server = Server::start(&Binaries::signet()?, &folder.path().join("server"), &options).await?;
        let token = Some(server.token(Some(NODE))?);
        let settings = AgentOptions { join_token: token, unix: unix.into(), ..AgentOptions::default() };
        let agent = Agent::start(&agents, &folder.path().join("agent"), &server, &settings).await?;
        let house = Self { agent, server, folder };
        house.register("/a", &format!("unix:uid:{}", nix::unistd::getuid()))?;
        house.still_served().await?;
        Ok(house)
    }

    fn register(&self, path: &str, selector: &str) -> Result<()> {
        let id = format!("spiffe://example.org{path}");
        self.server.ok(&["entry", "create", "-parentID", NODE, "-spiffeID", &id, "-selector", selector])?;
        Ok(())
    }

    /// A process of its own fetches its SVID.
    async fn still_served(&self) -> Result<()> {
        let socket = self.agent.socket();
        let arguments = ["api", "fetch", "x509", "-timeout", "20s", "-socketPath"];
        let mut last = String::new();
        let fetched = wait::until("another process's SVID", PATIENCE, async || {
            let mut command = tokio::process::Command::new(&self.agent.binaries().agent);
            let output = command.args(arguments).arg(&socket).output().await.ok()?;
            last = text(&output);
            (output.status.success() && last.contains(A)).then_some(())
        });
        let fetched = fetched.await;
        fetched.with_context(|| format!("{last}\n{}", e2e::testkit::process::tail(&self.agent.log())))
    }

    async fn workload_api(&self) -> Result<SpiffeWorkloadApiClient<tonic::transport::Channel>> {
        Ok(SpiffeWorkloadApiClient::new(unix(&self.agent.socket()).await?))
    }

    /// Resident memory of the agent in KiB.
    fn agent_memory(&self) -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.agent.pid()?))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
    }

    /// The ids of all entries, sorted.
    fn entries(&self) -> Result<Vec<String>> {
        let shown: Value = serde_json::from_str(&self.server.ok(&["entry", "show", "-output", "json"])?)?;
        let entries = shown["entries"].as_array().context("no entries")?;
        let mut ids: Vec<String> = entries.iter().map(|entry| entry["spiffe_id"].to_string()).collect();
        ids.sort();
        Ok(ids)
    }
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The ids that this process gets, in the order of the first message.
async fn fetch(socket: &Path) -> Result<Vec<String>> {
    let mut client = SpiffeWorkloadApiClient::new(unix(socket).await?);
    let mut stream = client.fetch_x509svid(secured(X509svidRequest {})).await?.into_inner();
    let message = tokio::time::timeout(PATIENCE, stream.message()).await.context("no first message")??;
    Ok(message.context("the stream ended with OK")?.svids.into_iter().map(|svid| svid.spiffe_id).collect())
}

/// No log of `house` holds control characters but line breaks and tabs.
fn logs_are_clean(house: &House) -> Result<()> {
    for log in [house.server.log(), house.agent.log()] {
        let bytes = std::fs::read(&log)?;
        let wild = bytes.iter().position(|byte| byte.is_ascii_control() && !b"\n\t".contains(byte));
        ensure!(wild.is_none(), "{} has a control character at {wild:?}", log.display());
    }
    Ok(())
}
