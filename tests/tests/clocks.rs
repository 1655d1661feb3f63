//! Wrong clocks, with real processes: a library of a few lines, preloaded into a program, moves its wall clock.
//!
//! Ten minutes are not waited for here: within them nothing may be deleted, and that is what these tests see. What follows
//! after them is tested in virtual time.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use e2e::testkit::node::Node;
use e2e::testkit::workload::{Identity, Workload};
use e2e::testkit::{Agent, AgentOptions, Binaries, Requested, Server, ServerOptions, unix, wait};
use nix::sys::signal::Signal;
use serde_json::Value;
use spiffe::bundle::{Bundle, X509Authority};
use spiffe::id::TrustDomain;
use spiffe::verify::{PeerRole, x509_chain};
use spiffe::x509::Certificate;
use spiffe_proto::bundle::GetBundleRequest;
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::entry::GetAuthorizedEntriesRequest;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::svid::MintX509svidRequest;
use spiffe_proto::svid::svid_client::SvidClient;

const NODE: &str = "spiffe://example.org/node";
const DAY: i64 = 86_400;
const PATIENCE: Duration = Duration::from_secs(30);

/// A clock that can be set.
struct Set {
    file: PathBuf,
    library: PathBuf,
}

impl Set {
    /// Builds the library; the clock is right at first.
    fn new(folder: &Path) -> Result<Self> {
        let set = Self { file: folder.join("clock"), library: folder.join("clock.so") };
        set.ahead(0)?;
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/process/clock.c");
        let built = Command::new("cc").args(["-shared", "-fPIC", "-O1", "-o"]).arg(&set.library).arg(source).output();
        let built = built.context("running cc, which building the programs needs as well")?;
        ensure!(built.status.success(), "cc: {}", String::from_utf8_lossy(&built.stderr));
        Ok(set)
    }

    /// Sets the clock of whoever was started with it, at once.
    fn ahead(&self, seconds: i64) -> Result<()> {
        let new = self.file.with_extension("new");
        std::fs::write(&new, seconds.to_string())?;
        Ok(std::fs::rename(new, &self.file)?)
    }

    /// Our programs, with this clock.
    fn binaries(&self) -> Result<Binaries> {
        let environment: Vec<(String, OsString)> =
            vec![("LD_PRELOAD".into(), (&self.library).into()), ("SIGNET_TEST_CLOCK".into(), (&self.file).into())];
        Ok(Binaries { environment, ..Binaries::signet()? })
    }
}

fn me() -> String {
    format!("unix:uid:{}", nix::unistd::getuid())
}

fn register(server: &Server, path: &str, more: &[&str]) -> Result<String> {
    let (id, selector) = (format!("spiffe://example.org{path}"), me());
    let mut arguments = vec!["entry", "create", "-parentID", NODE, "-spiffeID", &id, "-selector", &selector];
    arguments.extend(["-output", "json"]);
    arguments.extend(more);
    let printed: Value = serde_json::from_str(&server.ok(&arguments)?)?;
    let created = &printed["results"][0];
    ensure!(created["status"]["code"] == 0, "not created: {created}");
    Ok(created["entry"]["id"].as_str().context("no id")?.to_owned())
}

/// The trust bundle that the server has.
async fn bundle(server: &Server) -> Result<Bundle> {
    let mut client = BundleClient::new(unix(&server.socket()).await?);
    let told = client.get_bundle(GetBundleRequest::default()).await?.into_inner();
    let mut bundle = Bundle::empty(TrustDomain::parse("example.org")?);
    let x509 = told.x509_authorities.into_iter();
    bundle.x509 =
        x509.map(|held| X509Authority { der: Bytes::from(held.asn1.to_vec()), tainted: held.tainted }).collect();
    Ok(bundle)
}

/// A minted certificate chain, or nothing if the server cannot sign for now.
async fn mint(server: &Server) -> Result<Option<Vec<Bytes>>> {
    let request = Requested::new(Some("spiffe://example.org/minted"))?;
    let mut client = SvidClient::new(unix(&server.socket()).await?);
    match client.mint_x509svid(MintX509svidRequest { csr: request.csr.into(), ttl: 0 }).await {
        Ok(minted) => {
            let chain = minted.into_inner().svid.context("no SVID")?.cert_chain;
            Ok(Some(chain.into_iter().map(|der| Bytes::from(der.to_vec())).collect()))
        }
        Err(status) if status.code() == tonic::Code::Unavailable => Ok(None),
        Err(status) => bail!("minting: {status:?}"),
    }
}

/// Waits until the server signs at `at`, and until what it signs verifies with its bundle then.
async fn signs_at(server: &Server, at: impl Fn() -> SystemTime) -> Result<Vec<Bytes>> {
    let signed = wait::until("a signature by this clock", PATIENCE, async || {
        let minted = mint(server).await;
        match minted {
            Err(error) => Some(Err(error)),
            Ok(None) => None,
            Ok(Some(chain)) => {
                let leaf = Certificate::parse(chain.first()?.clone()).ok()?;
                (leaf.not_before <= at() && at() < leaf.not_after).then_some(Ok(chain))
            }
        }
    });
    let chain = signed.await??;
    x509_chain(&chain, &bundle(server).await?, PeerRole::Client, at())?;
    Ok(chain)
}

fn shifted(seconds: i64) -> SystemTime {
    let by = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { SystemTime::now() - by } else { SystemTime::now() + by }
}

/// Whether two identities believe each other now: mutual TLS rests on this.
fn believe_each_other(one: &Identity, other: &Identity) -> Result<()> {
    let now = SystemTime::now();
    for (shown, by) in [(one, other), (other, one)] {
        for role in [PeerRole::Client, PeerRole::Server] {
            x509_chain(&shown.svid.chain, &*by.bundles, role, now).with_context(|| shown.told_to(by))?;
        }
    }
    Ok(())
}

/// The identity of `path`, once there is one.
async fn identity(agent: &Agent, path: &str) -> Result<Identity> {
    let id = format!("spiffe://example.org{path}");
    Workload::follow(&agent.socket(), Some(&id)).first(PATIENCE).await
}

#[tokio::test]
async fn the_library_moves_the_clock() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let set = Set::new(folder.path())?;
    set.ahead(-100 * DAY)?;
    let server = Server::start(&set.binaries()?, &folder.path().join("server"), &ServerOptions::default()).await?;
    let bundle = bundle(&server).await?;
    let root = Certificate::parse(bundle.x509.first().context("no authority")?.der.clone())?;
    let behind = SystemTime::now().duration_since(root.not_before)?.as_secs() / 3600;
    assert_eq!(
        behind,
        100 * 24,
        "the program does not read its clock through the C library: build it dynamically linked"
    );
    Ok(())
}

async fn the_clock_of_the_server_is_wrong(seconds: i64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let set = Set::new(folder.path())?;
    let mut server = Server::start(&set.binaries()?, &folder.path().join("server"), &ServerOptions::default()).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let agent = Agent::start(&Binaries::signet()?, &folder.path().join("agent"), &server, &settings).await?;
    register(&server, "/before", &[])?;
    let before = identity(&agent, "/before").await?;
    let hour = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_secs() + 3600;
    let ends = register(&server, "/ends", &["-entryExpiry", &hour.to_string()])?;
    let (token, other_token) = (server.token(Some(NODE))?, server.token(None)?);
    let mut node = Node::by_token(&server, 1, &token).await?;
    let first = bundle(&server).await?;

    set.ahead(seconds)?;
    signs_at(&server, || shifted(seconds)).await?;
    register(&server, "/during", &[])?;
    assert_eq!(bundle(&server).await?.x509.len(), 2, "the authority is not valid by this clock: there is another");
    if seconds > 0 {
        let shown = server.command(&["entry", "show", "-entryID", &ends])?;
        assert!(!shown.status.success(), "it has ended by this clock");
    }
    server.signal(Signal::SIGTERM).await?;
    server.start_again().await?;
    signs_at(&server, || shifted(seconds)).await?;

    set.ahead(0)?;
    signs_at(&server, SystemTime::now).await?;
    // Nothing is gone: the authority of before, the entry that ends, the token that nobody used.
    let now = bundle(&server).await?;
    ensure!(first.x509.iter().all(|authority| now.x509.contains(authority)), "an authority was deleted");
    server.ok(&["entry", "show", "-entryID", &ends])?;
    Node::by_token(&server, 2, &other_token).await?;
    // The node of before goes on, renews, and a new one comes.
    let mut entries = EntryClient::new(node.connect().await?);
    let authorized = entries.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await?.into_inner();
    let mut paths: Vec<String> =
        authorized.decoded()?.into_iter().filter_map(|entry| Some(entry.spiffe_id?.path)).collect();
    paths.sort();
    assert_eq!(paths, ["/before", "/during", "/ends", "/node"]);
    node.renew().await?;
    Node::by_token(&server, 3, &server.token(None)?).await?;
    // And so does the agent: what it is told now, it serves.
    register(&server, "/after", &[])?;
    let after = identity(&agent, "/after").await?;
    believe_each_other(&before, &after)?;
    believe_each_other(&identity(&agent, "/before").await?, &after)?;
    let checked = server.ok(&["healthcheck", "-verbose"])?;
    let expected = "Clock: the wall clock and the boot clock disagreed: it was set ";
    assert!(checked.contains(expected), "{checked}");
    Ok(())
}

#[tokio::test]
async fn the_clock_of_the_server_is_a_day_ahead() -> Result<()> {
    the_clock_of_the_server_is_wrong(DAY).await
}

#[tokio::test]
async fn the_clock_of_the_server_is_a_year_ahead() -> Result<()> {
    the_clock_of_the_server_is_wrong(365 * DAY).await
}

#[tokio::test]
async fn the_clock_of_the_server_is_a_day_behind() -> Result<()> {
    the_clock_of_the_server_is_wrong(-DAY).await
}

async fn the_clock_of_the_agent_is_wrong(seconds: i64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let set = Set::new(folder.path())?;
    let server = Server::start(&Binaries::signet()?, &folder.path().join("server"), &ServerOptions::default()).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let mut agent = Agent::start(&set.binaries()?, &folder.path().join("agent"), &server, &settings).await?;
    register(&server, "/before", &[])?;
    let before = identity(&agent, "/before").await?;

    set.ahead(seconds)?;
    // Told to a server that this agent may not believe for now.
    register(&server, "/during", &[])?;
    agent.signal(Signal::SIGTERM).await?;
    let begun = std::fs::read_to_string(agent.log())?.len();
    agent.start_without_waiting()?;
    wait::until("the agent to have looked at its clock", PATIENCE, async || {
        let ended = agent.ended().ok().flatten().is_some();
        let log = std::fs::read_to_string(agent.log()).unwrap_or_default();
        let warned = log.get(begun..).is_some_and(|log| log.contains("level=warn") || log.contains("level=error"));
        (ended || warned).then_some(())
    })
    .await?;

    set.ahead(0)?;
    if agent.ended()?.is_some() {
        agent.start_without_waiting()?;
    }
    agent.ready().await?;
    register(&server, "/after", &[])?;
    for path in ["/before", "/during", "/after"] {
        believe_each_other(&before, &identity(&agent, path).await?)?;
    }
    Ok(())
}

#[tokio::test]
async fn the_clock_of_the_agent_is_a_day_ahead() -> Result<()> {
    the_clock_of_the_agent_is_wrong(DAY).await
}

#[tokio::test]
async fn the_clock_of_the_agent_is_a_year_ahead() -> Result<()> {
    the_clock_of_the_agent_is_wrong(365 * DAY).await
}

#[tokio::test]
async fn the_clock_of_the_agent_is_a_day_behind() -> Result<()> {
    the_clock_of_the_agent_is_wrong(-DAY).await
}

/// A running agent whose clock is wrong gives nothing up that is good by the right one.
async fn the_clock_of_a_running_agent_is_wrong(seconds: i64) -> Result<()> {
    let folder = tempfile::tempdir()?;
    let set = Set::new(folder.path())?;
    let server = Server::start(&Binaries::signet()?, &folder.path().join("server"), &ServerOptions::default()).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let mut agent = Agent::start(&set.binaries()?, &folder.path().join("agent"), &server, &settings).await?;
    register(&server, "/before", &[])?;
    let before = identity(&agent, "/before").await?;
    let begun = std::fs::read_to_string(agent.log())?.len();

    set.ahead(seconds)?;
    // By this clock the agent's own SVID is due, and hardly anybody can be believed.
    wait::until("a renewal and a complaint about the clock", PATIENCE, async || {
        let log = std::fs::read_to_string(agent.log()).unwrap_or_default();
        let since = log.get(begun..)?;
        let renewed =
            since.contains("Successfully rotated agent SVID") || since.contains("Could not renew the agent's SVID");
        (renewed && since.contains("not valid by this machine's clock")).then_some(())
    })
    .await?;
    register(&server, "/during", &[])?;

    set.ahead(0)?;
    // The one that the workload had, or a newer one: what is served is good by the right clock.
    believe_each_other(&before, &identity(&agent, "/before").await?)?;
    register(&server, "/after", &[])?;
    for path in ["/during", "/after"] {
        believe_each_other(&before, &identity(&agent, path).await?)?;
    }
    assert!(agent.ended()?.is_none());
    agent.signal(Signal::SIGKILL).await?;
    agent.start_again().await?;
    believe_each_other(&before, &identity(&agent, "/before").await?)
}

#[tokio::test]
async fn the_clock_of_a_running_agent_is_a_day_ahead() -> Result<()> {
    the_clock_of_a_running_agent_is_wrong(DAY).await
}

#[tokio::test]
async fn the_clock_of_a_running_agent_is_a_day_behind() -> Result<()> {
    the_clock_of_a_running_agent_is_wrong(-DAY).await
}
