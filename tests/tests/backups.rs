//! Backups by command, with real processes: taken from a running server, checked, damaged, and restored.

use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, wait};
use nix::sys::signal::Signal;
use serde_json::Value;

const NODE: &str = "spiffe://example.org/node";
const PATIENCE: Duration = Duration::from_secs(60);

struct House {
    server: Server,
    agent: Agent,
    folder: tempfile::TempDir,
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

impl House {
    async fn new() -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let binaries = Binaries::signet()?;
        let options = ServerOptions { server_block: "  agent_ttl = \"20s\"\n".into(), ..ServerOptions::default() };
        let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
        let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
        let agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
        let house = Self { server, agent, folder };
        house.register("/kept")?;
        house.has("/kept").await?;
        Ok(house)
    }

    fn file(&self) -> PathBuf {
        self.folder.path().join("signet.backup")
    }

    fn register(&self, path: &str) -> Result<()> {
        let (id, selector) = (format!("spiffe://example.org{path}"), format!("unix:uid:{}", nix::unistd::getuid()));
        self.server.ok(&["entry", "create", "-parentID", NODE, "-spiffeID", &id, "-selector", &selector])?;
        Ok(())
    }

    async fn has(&self, path: &str) -> Result<()> {
        let id = format!("spiffe://example.org{path}");
        wait::until(path, PATIENCE, async || {
            let output = self.agent.command(&["api", "fetch", "x509"]).ok()?;
            String::from_utf8_lossy(&output.stdout).contains(&id).then_some(())
        })
        .await
    }

    /// A command without a server.
    fn local(&self, arguments: &[&str]) -> Result<Output> {
        let mut command = std::process::Command::new(Binaries::signet()?.server);
        Ok(command.args(arguments).stdin(Stdio::null()).output()?)
    }

    fn create(&self, more: &[&str]) -> Result<String> {
        let (file, config) = (self.file().display().to_string(), self.server.config().display().to_string());
        let mut arguments = vec!["backup", "create", "-config", &config];
        arguments.extend(more);
        arguments.push(&file);
        self.server.ok(&arguments)
    }

    fn restore(&self) -> Result<Output> {
        let (file, config) = (self.file().display().to_string(), self.server.config().display().to_string());
        self.local(&["backup", "restore", "-config", &config, &file])
    }

    fn entries(&self) -> Result<Vec<Value>> {
        let shown: Value = serde_json::from_str(&self.server.ok(&["entry", "show", "-output", "json"])?)?;
        Ok(shown["entries"].as_array().context("no entries")?.clone())
    }

    /// The directory of the data store, and the key file.
    fn places(&self) -> Result<(PathBuf, PathBuf)> {
        let config = std::fs::read_to_string(self.server.config())?;
        let value = |name: &str| {
            let rest = config.split(&format!("{name} = \"")).nth(1);
            rest.and_then(|rest| rest.split('"').next()).map(PathBuf::from).with_context(|| name.to_owned())
        };
        Ok((value("data_dir")?.join("history"), value("keys_path")?))
    }
}

fn aside(path: &Path) -> Result<()> {
    Ok(std::fs::rename(path, path.with_extension("lost"))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restored_backup_serves_the_agents_that_were_there() -> Result<()> {
    let mut house = House::new().await?;
    let said = house.create(&[])?;
    for line in
        ["Trust domain    : example.org", "Entries         : 2", "Agents          : 1", "Private keys    : not in it"]
    {
        ensure!(said.contains(line), "{line:?} is not in\n{said}");
    }
    let bytes = std::fs::read(house.file())?;
    ensure!(!String::from_utf8_lossy(&bytes).contains("PRIVATE KEY"), "a private key");
    let verified = house.local(&["backup", "verify", &house.file().display().to_string()])?;
    ensure!(verified.status.success() && text(&verified).contains("Entries         : 2"), "{}", text(&verified));
    let before = house.entries()?;

    // A lost branch: an entry, and renewals of the agent.
    house.register("/lost")?;
    house.has("/lost").await?;
    let refused = house.restore()?;
    ensure!(text(&refused).contains("is in use by a running server; stop it first"), "{}", text(&refused));
    house.server.signal(Signal::SIGTERM).await?;
    let refused = house.restore()?;
    ensure!(text(&refused).contains("holds a data store; move it away first"), "{}", text(&refused));
    let (store, keys) = house.places()?;
    aside(&store)?;
    let restored = house.restore()?;
    ensure!(restored.status.success(), "{}", text(&restored));
    ensure!(text(&restored).contains(&format!("Keys            : {} stays", keys.display())), "{}", text(&restored));
    house.server.start_again().await?;

    let after = house.entries()?;
    assert_eq!(after.len(), before.len());
    for (before, after) in before.iter().zip(&after) {
        let revision = |entry: &Value| entry["revision_number"].as_str().and_then(|text| text.parse::<i64>().ok());
        assert_eq!(revision(after), revision(before).map(|revision| revision + (1 << 32)));
        let mut same = before.clone();
        same["revision_number"] = after["revision_number"].clone();
        assert_eq!(same, *after);
    }
    house.register("/new")?;
    house.has("/new").await?;
    house.has("/kept").await?;
    ensure!(house.agent.ended()?.is_none(), "the agent has ended");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_with_keys_brings_a_lost_machine_back() -> Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    let mut house = House::new().await?;
    // A name that can be guessed, put there by somebody else, gets no keys.
    let (trap, part) = (house.folder.path().join("trap"), house.folder.path().join("signet.backup.part"));
    std::fs::write(&trap, b"")?;
    std::fs::set_permissions(&trap, std::fs::Permissions::from_mode(0o666))?;
    std::os::unix::fs::symlink(&trap, &part)?;
    house.create(&["-withKeys"])?;
    ensure!(std::fs::read(&trap)?.is_empty() && std::fs::symlink_metadata(&part).is_err(), "keys went through a link");
    assert_eq!(std::fs::metadata(house.file())?.permissions().mode() & 0o777, 0o600);
    let bundle = house.server.ok(&["bundle", "show"])?;
    house.server.signal(Signal::SIGKILL).await?;
    let (store, keys) = house.places()?;
    aside(&store)?;
    aside(&keys)?;
    let restored = house.restore()?;
    ensure!(restored.status.success(), "{}", text(&restored));
    house.server.start_again().await?;
    // The same authority signs on.
    assert_eq!(house.server.ok(&["bundle", "show"])?, bundle);
    house.register("/new")?;
    house.has("/new").await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_damaged_backup_restores_nothing() -> Result<()> {
    let mut house = House::new().await?;
    house.create(&[])?;
    let again = house.local(&["backup", "create", &house.file().display().to_string()])?;
    ensure!(!again.status.success() && text(&again).contains("the file is there already"), "{}", text(&again));
    house.server.signal(Signal::SIGTERM).await?;
    let (store, _) = house.places()?;
    aside(&store)?;
    let whole = std::fs::read(house.file())?;
    let mut damaged = whole.clone();
    let last = damaged.len() - 1;
    damaged[last] ^= 1;
    for (bytes, words) in [
        (damaged, "its checksum is wrong"),
        (whole[..whole.len() - 1].to_vec(), "it is cut off"),
        (b"hello".to_vec(), "it is no backup of a Signet server"),
    ] {
        std::fs::write(house.file(), bytes)?;
        let refused = house.restore()?;
        ensure!(!refused.status.success() && text(&refused).contains(words), "{}", text(&refused));
        ensure!(!store.exists() && !store.with_extension("restoring").exists(), "something was left");
    }
    std::fs::write(house.file(), whole)?;
    let restored = house.restore()?;
    ensure!(restored.status.success(), "{}", text(&restored));
    house.server.start_again().await
}

#[tokio::test(flavor = "multi_thread")]
async fn entries_that_were_shown_can_be_created_again() -> Result<()> {
    let house = House::new().await?;
    let file = house.folder.path().join("bundle.pem");
    std::fs::write(&file, house.server.ok(&["bundle", "show"])?)?;
    house.server.ok(&["bundle", "set", "-id", "other.test", "-path", &file.display().to_string()])?;
    let every: &[&str] = &[
        "entry",
        "create",
        "-entryID",
        "every",
        "-parentID",
        NODE,
        "-spiffeID",
        "spiffe://example.org/every",
        "-selector",
        "unix:uid:7",
        "-selector",
        "unix:gid:8",
        "-x509SVIDTTL",
        "77",
        "-jwtSVIDTTL",
        "88",
        "-federatesWith",
        "other.test",
        "-admin",
        "-downstream",
        "-dns",
        "a.test",
        "-dns",
        "b.test",
        "-hint",
        "first",
        "-entryExpiry",
        "4102444800",
    ];
    house.server.ok(every)?;
    let shown = house.server.ok(&["entry", "show", "-output", "json"])?;
    let before = house.entries()?;
    for entry in &before {
        house.server.ok(&["entry", "delete", "-entryID", entry["id"].as_str().context("no id")?])?;
    }
    assert_eq!(house.entries()?.len(), 0);
    let data = house.folder.path().join("entries.json");
    std::fs::write(&data, shown)?;
    house.server.ok(&["entry", "create", "-data", &data.display().to_string()])?;
    let plain = |entries: Vec<Value>| {
        let mut entries = entries;
        for entry in &mut entries {
            entry["created_at"] = Value::Null;
            entry["revision_number"] = Value::Null;
        }
        entries.sort_by_key(|entry| entry["id"].to_string());
        entries
    };
    assert_eq!(plain(house.entries()?), plain(before));
    Ok(())
}
