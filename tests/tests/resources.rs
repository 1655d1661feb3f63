//! Disks that are full, and keys that somebody else uses as well, with real processes.

use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, wait};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::Value;

const NODE: &str = "spiffe://example.org/node";
const PATIENCE: Duration = Duration::from_secs(60);

/// A file system of 24 MiB in a folder.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new() -> Result<Self> {
        let disk = Self(tempfile::tempdir()?);
        mount(Some("tmpfs"), disk.0.path(), Some("tmpfs"), MsFlags::empty(), Some("size=24m"))
            .context("mounting a small file system; the tests need root")?;
        Ok(disk)
    }

    /// Takes all the room that is left.
    fn fill(&self) -> Result<()> {
        let mut file = std::fs::OpenOptions::new().create(true).append(true).open(self.0.path().join("others"))?;
        while file.write_all(&[0; 4096]).is_ok() {}
        Ok(())
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(self.0.path(), MntFlags::MNT_DETACH);
    }
}

fn serial_of_the_agent(server: &Server) -> Result<String> {
    let listed: Value = serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?;
    Ok(listed["agents"][0]["x509svid_serial_number"].as_str().context("no serial number")?.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_entries_and_lets_agents_live_and_be_banned() -> Result<()> {
    let disk = SmallDisk::new()?;
    let folder = tempfile::tempdir()?;
    let binaries = Binaries::signet()?;
    let options = ServerOptions { server_block: "  agent_ttl = \"20s\"\n".into(), ..ServerOptions::default() };
    let server = Server::start(&binaries, &disk.0.path().join("server"), &options).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let mut agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
    disk.fill()?;
    let entry =
        ["entry", "create", "-parentID", NODE, "-spiffeID", "spiffe://example.org/a", "-selector", "unix:uid:1"];
    let refused = server.command(&entry)?;
    let said = String::from_utf8_lossy(&refused.stderr).into_owned() + &String::from_utf8_lossy(&refused.stdout);
    ensure!(!refused.status.success() && said.contains("ResourceExhausted"), "{said}");
    // Renewals, each with its first use.
    for _ in 0..3 {
        let before = serial_of_the_agent(&server)?;
        wait::until("a renewal", PATIENCE, async || (serial_of_the_agent(&server).ok()? != before).then_some(()))
            .await?;
    }
    let refused = server.command(&entry)?;
    ensure!(!refused.status.success(), "there is room again");
    ensure!(agent.ended()?.is_none(), "the agent has ended");
    let listed: Value = serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?;
    let id = listed["agents"][0]["id"]["path"].as_str().context("no id")?.to_owned();
    server.ok(&["agent", "ban", "-spiffeID", &format!("spiffe://example.org{id}")])?;
    wait::until("the end of the banned agent", PATIENCE, async || agent.ended().ok().flatten().map(drop)).await
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        std::fs::copy(entry.path(), to.join(entry.file_name()))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_agents_with_one_identity_are_told_of() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let binaries = Binaries::signet()?;
    let options = ServerOptions { server_block: "  agent_ttl = \"20s\"\n".into(), ..ServerOptions::default() };
    let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let mut first = Agent::start(&binaries, &folder.path().join("first"), &server, &settings).await?;
    let mut second = Agent::prepare(&binaries, &folder.path().join("second"), &server, &settings)?;
    copy(&folder.path().join("first/data"), &folder.path().join("second/data"))?;
    second.start_without_waiting()?;
    // Whichever renews first takes the identity from the other, which ends with advice.
    let ended = wait::until("the end of one of them", PATIENCE, async || {
        let (one, two) = (first.ended().ok()?.is_some(), second.ended().ok()?.is_some());
        (one || two).then_some(one)
    });
    let loser = if ended.await? { first.log() } else { second.log() };
    let log = std::fs::read_to_string(loser)?;
    for words in [
        "perhaps by an agent with a copy of its key",
        "`signet-server entry show -parentID spiffe://example.org/spire/agent/join_token/",
        "`signet-agent run -joinToken TOKEN`",
    ] {
        ensure!(log.contains(words), "{words:?} is not in\n{log}");
    }
    let log = std::fs::read_to_string(server.log())?;
    ensure!(log.contains("The same node key is used twice"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_file_serves_one_program() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let binaries = Binaries::signet()?;
    let mut server = Server::start(&binaries, &folder.path().join("server"), &ServerOptions::default()).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let mut agent = Agent::prepare(&binaries, &folder.path().join("agent"), &server, &settings)?;
    // The directory of the server's key file.
    let text = std::fs::read_to_string(server.config())?;
    let keys = text.split("keys_path = \"").nth(1).and_then(|rest| rest.split('"').next()).context("no keys_path")?;
    let directory = Path::new(keys).parent().context("no directory")?.display().to_string();
    let config = std::fs::read_to_string(agent.config())?;
    let own = format!("directory = \"{}\"", folder.path().join("agent/data").display());
    ensure!(config.contains(&own), "{config}");
    std::fs::write(agent.config(), config.replace(&own, &format!("directory = \"{directory}\"")))?;
    let before = std::fs::read(keys)?;
    agent.start_without_waiting()?;
    wait::until("the end of the agent", PATIENCE, async || agent.ended().ok().flatten().map(drop)).await?;
    let log = std::fs::read_to_string(agent.log())?;
    let pid = server.pid()?;
    ensure!(log.contains(&format!("{keys} is in use by signet-server (process {pid})")), "{log}");
    assert_eq!(std::fs::read(keys)?, before);
    // Killed, it leaves no lock behind.
    server.signal(Signal::SIGKILL).await?;
    server.start_again().await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_was_away_for_too_long_says_how_it_comes_back() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let binaries = Binaries::signet()?;
    let options = ServerOptions { server_block: "  agent_ttl = \"5s\"\n".into(), ..ServerOptions::default() };
    let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let mut agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
    agent.signal(Signal::SIGTERM).await?;
    let over = || -> Result<bool> {
        let listed: Value = serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?;
        let ends = listed["agents"][0]["x509svid_expires_at"].as_str().context("no end")?.parse::<i64>()?;
        Ok(time::OffsetDateTime::now_utc().unix_timestamp() > ends)
    };
    wait::until("the end of its SVID", PATIENCE, async || over().ok()?.then_some(())).await?;
    agent.start_without_waiting()?;
    // A minute is what a first attestation may take.
    wait::until("the end of the agent", 2 * PATIENCE, async || agent.ended().ok().flatten().map(drop)).await?;
    let log = std::fs::read_to_string(agent.log())?;
    for words in [
        "the agent's SVID expired before it could be renewed, and its join token is used up",
        "`signet-server entry show -parentID spiffe://example.org/spire/agent/join_token/",
        "`signet-server token generate -spiffeID ALIAS`",
        "`signet-agent run -joinToken TOKEN`",
    ] {
        ensure!(log.contains(words), "{words:?} is not in\n{log}");
    }
    Ok(())
}
