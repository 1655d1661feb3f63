//! What surrounds an agent fails it, with real processes: its data directory, and the addresses of its server.
//!
//! The tests need root: they mount.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, wait};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::signal::Signal;
use serde_json::Value;
use tokio::net::{TcpSocket, TcpStream};

const NODE: &str = "spiffe://example.org/node";
const PATIENCE: Duration = Duration::from_secs(60);

/// The one agent of a server: its id, and the serial number of the SVID that it used last.
fn agent_of(server: &Server) -> Result<(String, String)> {
    let listed: Value = serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?;
    ensure!(listed["agents"].as_array().is_some_and(|agents| agents.len() == 1), "not one agent: {listed}");
    let agent = &listed["agents"][0];
    let id = agent["id"]["path"].as_str().context("no id")?;
    Ok((id.to_owned(), agent["x509svid_serial_number"].as_str().context("no serial number")?.to_owned()))
}

/// Waits until the agent of before uses another SVID, which it did not attest for.
async fn renewed(server: &Server) -> Result<()> {
    let (id, serial) = agent_of(server)?;
    let next = wait::until("another SVID in use", PATIENCE, async || {
        let (id, next) = agent_of(server).ok()?;
        (next != serial).then_some(id)
    });
    ensure!(next.await? == id, "it is another agent");
    Ok(())
}

/// Waits until `words` are in the log after its first `begun` bytes.
async fn logged(agent: &Agent, begun: usize, words: &str) -> Result<()> {
    wait::until(words, PATIENCE, async || {
        let log = std::fs::read_to_string(agent.log()).unwrap_or_default();
        log.get(begun..)?.contains(words).then_some(())
    })
    .await
}

fn length(agent: &Agent) -> Result<usize> {
    Ok(std::fs::read_to_string(agent.log())?.len())
}

/// A server whose agents have to renew every few seconds, and one of them. Its token is used up: it cannot attest again.
async fn house(folder: &Path, ttl: &str) -> Result<(Server, Agent)> {
    let options = ServerOptions { server_block: format!("  agent_ttl = \"{ttl}\"\n"), ..ServerOptions::default() };
    let server = Server::start(&Binaries::signet()?, &folder.join("server"), &options).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let agent = Agent::start(&Binaries::signet()?, &folder.join("agent"), &server, &settings).await?;
    Ok((server, agent))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_directory_that_was_removed_is_made_anew() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (server, mut agent) = house(folder.path(), "20s").await?;
    let data = agent.folder().join("data");
    std::fs::remove_dir_all(&data)?;
    renewed(&server).await?;
    assert_eq!(std::fs::metadata(&data)?.permissions().mode() & 0o777, 0o700);
    for file in ["keys.json", "agent-data.json"] {
        assert_eq!(std::fs::metadata(data.join(file))?.permissions().mode() & 0o777, 0o600, "{file}");
    }
    agent.signal(Signal::SIGKILL).await?;
    agent.start_again().await?;
    renewed(&server).await
}

/// A folder that nobody can write in, root included.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn new(folder: &Path) -> Result<Self> {
        let none = None::<&str>;
        mount(Some(folder), folder, none, MsFlags::MS_BIND, none).context("mounting; the tests need root")?;
        let mounted = Self(folder.to_owned());
        mount(none, folder, none, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)?;
        Ok(mounted)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn renewal_goes_on_in_memory_while_the_data_directory_is_read_only() -> Result<()> {
    const ALARM: &str = "The agent's identity cannot be written and goes on in memory";
    let folder = tempfile::tempdir()?;
    let (server, mut agent) = house(folder.path(), "30s").await?;
    let (_, first) = agent_of(&server)?;
    let begun = length(&agent)?;
    let read_only = ReadOnly::new(&agent.folder().join("data"))?;
    // Renewed at the half of its life, and not used before the last quarter: what is on disk is what the server takes.
    logged(&agent, begun, ALARM).await?;
    assert_eq!(agent_of(&server)?.1, first);
    agent.signal(Signal::SIGKILL).await?;
    agent.start_again().await?;
    assert_eq!(agent_of(&server)?.1, first);
    // Past the end of what is on disk, in memory alone.
    renewed(&server).await?;
    renewed(&server).await?;
    let begun = length(&agent)?;
    drop(read_only);
    logged(&agent, begun, "The agent's identity is written again").await?;
    agent.signal(Signal::SIGKILL).await?;
    agent.start_again().await?;
    renewed(&server).await
}

/// An address that swallows what it is sent: nobody accepts there, and the queue of those who wait is full.
async fn black_hole(address: SocketAddr) -> Result<Vec<tokio::task::JoinHandle<()>>> {
    let socket = TcpSocket::new_v4()?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    let listener = socket.listen(1)?;
    let mut held = vec![tokio::spawn(async move {
        let _listener = listener;
        std::future::pending::<()>().await;
    })];
    held.extend((0..8).map(|_| {
        tokio::spawn(async move {
            let _connected = TcpStream::connect(address).await;
            std::future::pending::<()>().await;
        })
    }));
    Ok(held)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_black_holed_first_address_keeps_no_agent_from_its_server() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let options = ServerOptions { server_block: "  agent_ttl = \"20s\"\n".into(), ..ServerOptions::default() };
    let mut server = Server::start(&Binaries::signet()?, &folder.path().join("server"), &options).await?;
    // Names resolve to 127.0.0.1 first, so the server moves to the second place.
    server.signal(Signal::SIGTERM).await?;
    let text = std::fs::read_to_string(server.config())?;
    let moved = text.replace("bind_address = \"127.0.0.1\"", "bind_address = \"127.0.0.2\"");
    ensure!(moved != text, "no address in {text}");
    std::fs::write(server.config(), moved)?;
    server.start_again().await?;
    let held = black_hole(SocketAddr::from(([127, 0, 0, 1], server.port))).await?;
    // The agent sees names of its own, by which the server has two addresses.
    let hosts = folder.path().join("hosts");
    std::fs::write(&hosts, "127.0.0.1 localhost server.test\n127.0.0.2 server.test\n")?;
    let inside = format!("mount --bind {} /etc/hosts && exec \"$@\"", hosts.display());
    let resolved = Command::new("unshare")
        .args(["--mount", "sh", "-c", &inside, "sh", "getent", "ahostsv4", "server.test"])
        .output()
        .context("running unshare; the tests need root")?;
    let resolved = String::from_utf8(resolved.stdout)?;
    let addresses: Vec<&str> = resolved
        .lines()
        .filter(|line| line.contains("STREAM"))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert_eq!(addresses, ["127.0.0.1", "127.0.0.2"], "{resolved}");

    let mut binaries = Binaries::signet()?;
    let program = folder.path().join("agent-with-names");
    let text = format!("#!/bin/sh\nexec unshare --mount sh -c '{inside}' sh {} \"$@\"\n", binaries.agent.display());
    std::fs::write(&program, text)?;
    std::fs::set_permissions(&program, std::fs::Permissions::from_mode(0o755))?;
    binaries.agent = program;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let mut agent = Agent::prepare(&binaries, &folder.path().join("agent"), &server, &settings)?;
    let text = std::fs::read_to_string(agent.config())?;
    let named = text.replace("server_address = \"127.0.0.1\"", "server_address = \"server.test\"");
    ensure!(named != text, "no address in {text}");
    std::fs::write(agent.config(), named)?;
    agent.start_again().await?;
    // Each renewal ends the connection of before.
    renewed(&server).await?;
    renewed(&server).await?;
    let log = std::fs::read_to_string(agent.log())?;
    for words in ["Could not attest this node", "Could not renew the agent's SVID"] {
        ensure!(!log.contains(words), "an attempt failed:\n{log}");
    }
    held.into_iter().for_each(|task| task.abort());
    Ok(())
}
