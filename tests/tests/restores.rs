//! A data store that was copied back from a backup, with real processes: what agents and keys of the lost branch come to.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::node::Node;
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, wait};
use nix::sys::signal::Signal;
use serde_json::Value;
use spiffe_proto::entry::GetAuthorizedEntriesRequest;
use spiffe_proto::entry::entry_client::EntryClient;

const NODE: &str = "spiffe://example.org/node";
const PATIENCE: Duration = Duration::from_secs(30);

struct House {
    server: Server,
    agent: Agent,
    history: PathBuf,
    backup: PathBuf,
    _folder: tempfile::TempDir,
}

fn copy(from: &Path, to: &Path) -> Result<()> {
    if to.exists() {
        std::fs::remove_dir_all(to)?;
    }
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy(&entry.path(), &target)?;
        } else {
            std::fs::copy(entry.path(), target)?;
        }
    }
    Ok(())
}

/// Where below `folder` the store is.
fn history_in(folder: &Path) -> Option<PathBuf> {
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            continue;
        }
        if entry.file_name() == "history" {
            return Some(entry.path());
        }
        if let Some(found) = history_in(&entry.path()) {
            return Some(found);
        }
    }
    None
}

impl House {
    async fn new(server_block: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let binaries = Binaries::signet()?;
        let options = ServerOptions { server_block: server_block.into(), ..ServerOptions::default() };
        let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
        let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
        let agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
        let history = history_in(server.folder()).context("no history folder")?;
        let backup = folder.path().join("backup");
        Ok(Self { server, agent, history, backup, _folder: folder })
    }

    async fn back_up(&mut self) -> Result<()> {
        self.server.signal(Signal::SIGTERM).await?;
        copy(&self.history, &self.backup)?;
        self.server.start_again().await
    }

    async fn restore(&mut self) -> Result<()> {
        self.server.signal(Signal::SIGTERM).await?;
        copy(&self.backup, &self.history)?;
        self.server.start_again().await
    }

    /// Registers an identity for a user; the entry has this id.
    fn register(&self, id: &str, path: &str, uid: u32) -> Result<()> {
        let (spiffe_id, selector) = (format!("spiffe://example.org{path}"), format!("unix:uid:{uid}"));
        self.server.ok(&[
            "entry",
            "create",
            "-entryID",
            id,
            "-parentID",
            NODE,
            "-spiffeID",
            &spiffe_id,
            "-selector",
            &selector,
        ])?;
        Ok(())
    }

    /// Waits until this process has an identity of `path`, or has none any more.
    async fn has(&self, path: &str, expected: bool) -> Result<()> {
        let id = format!("spiffe://example.org{path}");
        let what = format!("{path} {}", if expected { "to come" } else { "to go" });
        wait::until(&what, PATIENCE, async || {
            let output = self.agent.command(&["api", "fetch", "x509"]);
            let printed = String::from_utf8_lossy(&output.ok()?.stdout).into_owned();
            (printed.contains(&id) == expected).then_some(())
        })
        .await
    }

    fn keys(&self) -> Result<BTreeSet<String>> {
        let path = file_in(self.server.folder(), "keys.json").context("no key file")?;
        let file: Value = serde_json::from_slice(&std::fs::read(path)?)?;
        Ok(file["keys"].as_object().context("no keys")?.keys().cloned().collect())
    }
}

fn file_in(folder: &Path, name: &str) -> Option<PathBuf> {
    for entry in std::fs::read_dir(folder).ok()?.flatten() {
        let path = entry.path();
        if path.is_file() && path.file_name().is_some_and(|found| found == name) {
            return Some(path);
        }
        if path.is_dir()
            && let Some(found) = file_in(&path, name)
        {
            return Some(found);
        }
    }
    None
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_is_ahead_of_a_restored_server_follows_it_at_once() -> Result<()> {
    let me = nix::unistd::getuid().as_raw();
    let mut house = House::new("").await?;
    house.register("kept", "/kept", me)?;
    house.has("/kept", true).await?;
    house.back_up().await?;
    // The lost branch is longer than what follows the restore.
    for number in 0..10 {
        house.register(&format!("lost-{number}"), &format!("/lost/{number}"), me)?;
    }
    house.has("/lost/9", true).await?;
    house.restore().await?;
    house.has("/lost/9", false).await?;
    house.register("new", "/new", me)?;
    house.has("/new", true).await?;
    house.has("/kept", true).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_entry_written_again_after_a_restore_serves_nobody_by_its_lost_form() -> Result<()> {
    let me = nix::unistd::getuid().as_raw();
    let mut house = House::new("").await?;
    house.back_up().await?;
    house.register("one", "/one", me)?;
    house.has("/one", true).await?;
    house.restore().await?;
    // The same id and SPIFFE ID, for somebody else.
    house.register("one", "/one", me + 4242)?;
    house.has("/one", false).await
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_a_restored_store_does_not_know_stay() -> Result<()> {
    let mut house = House::new("  ca_ttl = \"60s\"\n  default_x509_svid_ttl = \"10s\"\n").await?;
    house.back_up().await?;
    let before = house.keys()?;
    wait::until("the next authorities", Duration::from_secs(60), async || (house.keys().ok()? != before).then_some(()))
        .await?;
    let made = house.keys()?;
    ensure!(made.len() > before.len() || !made.is_subset(&before), "{made:?}");
    house.restore().await?;
    let after = house.keys()?;
    assert_eq!(made.difference(&after).collect::<Vec<_>>(), Vec::<&String>::new());
    let log = std::fs::read_to_string(house.server.log())?;
    assert!(log.contains("it came back from a backup"), "{log}");
    // They were published again, so they are in the records of the data store now.
    assert!(!log.contains("is in no record of its data store"), "{log}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_polls_sees_that_an_entry_was_written_again() -> Result<()> {
    let me = nix::unistd::getuid().as_raw();
    let mut house = House::new("").await?;
    let node = Node::by_token(&house.server, 1, &house.server.token(Some(NODE))?).await?;
    house.register("kept", "/kept", me)?;
    house.back_up().await?;
    house.register("one", "/one", me)?;
    let polled = async || -> Result<Vec<(String, i64)>> {
        let mut client = EntryClient::new(node.connect().await?);
        let answer = client.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await?.into_inner();
        let entries = answer.decoded()?.into_iter().filter(|entry| ["kept", "one"].contains(&entry.id.as_str()));
        let mut entries: Vec<_> = entries.map(|entry| (entry.id, entry.revision_number)).collect();
        entries.sort();
        Ok(entries)
    };
    assert_eq!(polled().await?, [("kept".to_owned(), 0), ("one".to_owned(), 0)]);
    house.restore().await?;
    // Written with the same numbers, for somebody else.
    house.register("one", "/one", me + 4242)?;
    assert_eq!(polled().await?, [("kept".to_owned(), 1 << 32), ("one".to_owned(), 1 << 32)]);
    Ok(())
}

/// The serial number of the only agent's SVID, as the server knows it.
fn serial_of_the_agent(server: &Server) -> Result<String> {
    let listed: Value = serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?;
    Ok(listed["agents"][0]["x509svid_serial_number"].as_str().context("no serial number")?.to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_join_token_agent_that_renewed_since_the_backup_goes_on() -> Result<()> {
    let me = nix::unistd::getuid().as_raw();
    let mut house = House::new("  agent_ttl = \"20s\"\n").await?;
    house.register("before", "/before", me)?;
    house.back_up().await?;
    let known = serial_of_the_agent(&house.server)?;
    wait::until("a renewal", PATIENCE, async || (serial_of_the_agent(&house.server).ok()? != known).then_some(()))
        .await?;
    let newer = serial_of_the_agent(&house.server)?;
    house.restore().await?;
    house.register("after", "/after", me)?;
    house.has("/after", true).await?;
    house.has("/before", true).await?;
    // Either the one it brought was taken, or it has renewed on with that one meanwhile.
    ensure!(serial_of_the_agent(&house.server)? != known, "the agent is known by the certificate from before: {newer}");
    ensure!(house.agent.ended()?.is_none(), "the agent has ended");
    let again = serial_of_the_agent(&house.server)?;
    wait::until("the next renewal", PATIENCE, async || {
        (serial_of_the_agent(&house.server).ok()? != again).then_some(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn join_tokens_from_before_a_restore_are_void() -> Result<()> {
    let mut house = House::new("").await?;
    let (used, unused) = (house.server.token(None)?, house.server.token(None)?);
    house.back_up().await?;
    Node::by_token(&house.server, 1, &used).await?;
    house.restore().await?;
    for token in [&used, &unused] {
        let refused = Node::by_token(&house.server, 2, token).await.err().context("a void token was taken")?;
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{refused}");
    }
    let fresh = house.server.token(None)?;
    Node::by_token(&house.server, 3, &fresh).await?;
    Ok(())
}
