//! What users do, from the outside: real processes, configuration files, commands and sockets.

use std::path::Path;
use std::process::Output;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::node::{Node, reason};
use e2e::testkit::workload::Workload;
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, secured, unix, wait};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::bundle::GetBundleRequest;
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{CountEntriesRequest, GetAuthorizedEntriesRequest, SyncAuthorizedEntriesRequest};
use spiffe_proto::types;
use spiffe_proto::types::permission_denied_details::Reason;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use spiffe_proto::workload::{JwtsvidRequest, X509BundlesRequest, X509svidRequest, X509svidResponse};
use tempfile::TempDir;
use tonic::Code;

const NODE: &str = "spiffe://example.org/node";
const PATIENCE: Duration = Duration::from_secs(20);

struct House {
    agent: Agent,
    server: Server,
    folder: TempDir,
}

impl House {
    async fn new() -> Result<Self> {
        Self::with(&ServerOptions::default()).await
    }

    async fn with(options: &ServerOptions) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let binaries = Binaries::signet()?;
        let server = Server::start(&binaries, &folder.path().join("server"), options).await?;
        let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
        let agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
        Ok(Self { agent, server, folder })
    }

    /// Creates an entry for everything this user runs; the answer is its id.
    fn register(&self, path: &str, more: &[&str]) -> Result<String> {
        register(&self.server, NODE, path, more)
    }

    /// An open X.509 stream of this process, which has been registered. A registered entry is on its way to the agent,
    /// and a caller who is there before it is told that it has no identity: so the first SVID is waited for.
    async fn svids(&self) -> Result<tonic::Streaming<X509svidResponse>> {
        Workload::follow(&self.agent.socket(), None).first(PATIENCE).await?;
        Ok(self.workload_api().await?.fetch_x509svid(secured(X509svidRequest {})).await?.into_inner())
    }

    async fn workload_api(&self) -> Result<SpiffeWorkloadApiClient<tonic::transport::Channel>> {
        Ok(SpiffeWorkloadApiClient::new(unix(&self.agent.socket()).await?))
    }
}

fn me() -> String {
    format!("unix:uid:{}", nix::unistd::getuid())
}

fn register(server: &Server, parent: &str, path: &str, more: &[&str]) -> Result<String> {
    let (id, selector) = (format!("spiffe://example.org{path}"), me());
    let mut arguments = vec!["entry", "create", "-parentID", parent, "-spiffeID", &id, "-selector", &selector];
    arguments.extend(["-output", "json"]);
    arguments.extend(more);
    let printed: Value = serde_json::from_str(&server.ok(&arguments)?)?;
    let created = &printed["results"][0];
    ensure!(created["status"]["code"] == 0, "not created: {created}");
    Ok(created["entry"]["id"].as_str().context("no id")?.to_owned())
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// The paths of the identities in the next messages, until they are `wanted`.
async fn until_paths(stream: &mut tonic::Streaming<X509svidResponse>, wanted: &[&str]) -> Result<X509svidResponse> {
    let wanted: Vec<String> = wanted.iter().map(|path| format!("spiffe://example.org{path}")).collect();
    let found = async {
        loop {
            let message = stream.message().await?.context("the stream ended with OK")?;
            let mut ids: Vec<String> = message.svids.iter().map(|svid| svid.spiffe_id.clone()).collect();
            ids.sort();
            if ids == wanted {
                return Ok(message);
            }
        }
    };
    tokio::time::timeout(PATIENCE, found).await.with_context(|| format!("{wanted:?} did not come"))?
}

#[tokio::test]
async fn a_process_gets_its_identity_by_command() -> Result<()> {
    let house = House::new().await?;
    house.register("/web", &["-dns", "web.example.org"])?;
    Workload::follow(&house.agent.socket(), None).first(PATIENCE).await?;

    let output = house.folder.path().join("written");
    std::fs::create_dir(&output)?;
    let written = output.to_str().context("not UTF-8")?;
    let fetched = house.agent.command(&["api", "fetch", "x509", "-timeout", "10s", "-write", written])?;
    ensure!(fetched.status.success(), "{}", text(&fetched));
    let printed = text(&fetched);
    assert!(printed.starts_with("Received 1 svid after "), "{printed}");
    assert!(printed.contains("SPIFFE ID:\t\tspiffe://example.org/web\n"), "{printed}");
    for name in ["svid.0.pem", "svid.0.key", "bundle.0.pem"] {
        ensure!(output.join(name).is_file(), "{name} was not written");
    }

    let audience = ["api", "fetch", "jwt", "-timeout", "10s", "-audience", "db", "-output", "json"];
    let fetched = house.agent.command(&audience)?;
    ensure!(fetched.status.success(), "{}", text(&fetched));
    let printed: Value = serde_json::from_slice(&fetched.stdout)?;
    assert_eq!(printed[0]["svids"][0]["spiffe_id"], "spiffe://example.org/web");
    let token = printed[0]["svids"][0]["svid"].as_str().context("no token")?;
    let valid = house.agent.command(&["api", "validate", "jwt", "-audience", "db", "-svid", token])?;
    ensure!(valid.status.success(), "{}", text(&valid));
    assert!(text(&valid).starts_with("SVID is valid.\nSPIFFE ID : spiffe://example.org/web\n"), "{}", text(&valid));
    let refused = house.agent.command(&["api", "validate", "jwt", "-audience", "other", "-svid", token])?;
    assert_eq!(refused.status.code(), Some(1), "{}", text(&refused));
    Ok(())
}

#[tokio::test]
async fn entries_reach_an_open_stream_as_they_are_created_changed_and_deleted() -> Result<()> {
    let house = House::new().await?;
    let first = house.register("/a", &[])?;
    let mut stream = house.svids().await?;
    until_paths(&mut stream, &["/a"]).await?;

    let second = house.register("/b", &["-hint", "internal"])?;
    let message = until_paths(&mut stream, &["/a", "/b"]).await?;
    let hints: Vec<(&str, &str)> =
        message.svids.iter().map(|svid| (svid.spiffe_id.as_str(), svid.hint.as_str())).collect();
    assert!(hints.contains(&("spiffe://example.org/b", "internal")), "{hints:?}");

    let (id, selector) = ("spiffe://example.org/c", me());
    let update = ["entry", "update", "-entryID", &second, "-parentID", NODE, "-spiffeID", id, "-selector", &selector];
    house.server.ok(&update)?;
    until_paths(&mut stream, &["/a", "/c"]).await?;

    house.server.ok(&["entry", "delete", "-entryID", &second])?;
    until_paths(&mut stream, &["/a"]).await?;
    house.server.ok(&["entry", "delete", "-entryID", &first])?;
    let ended = tokio::time::timeout(PATIENCE, async {
        loop {
            if let Err(status) = stream.message().await {
                return status;
            }
        }
    });
    let status = ended.await.context("the stream did not end")?;
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "no identity issued"));
    Ok(())
}

#[tokio::test]
async fn an_unregistered_process_is_refused_once_the_agent_has_synced() -> Result<()> {
    let house = House::new().await?;
    let mut client = house.workload_api().await?;
    let status = match client.fetch_x509svid(secured(X509svidRequest {})).await {
        Err(status) => status,
        Ok(answer) => answer.into_inner().message().await.err().context("an SVID for nobody")?,
    };
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "no identity issued"));
    let request = JwtsvidRequest { audience: vec!["db".into()], ..Default::default() };
    let status = client.fetch_jwtsvid(secured(request)).await.err().context("a token for nobody")?;
    assert_eq!((status.code(), status.message()), (Code::PermissionDenied, "no identity issued"));
    Ok(())
}

#[tokio::test]
async fn entries_come_by_token_alias_by_agent_id_and_by_node_alias() -> Result<()> {
    let server_block = "  experimental { agent_spiffe_id_as_selector = true }\n".into();
    let house = House::with(&ServerOptions { server_block, ..ServerOptions::default() }).await?;
    let listed: Value = serde_json::from_str(&house.server.ok(&["agent", "list", "-output", "json"])?)?;
    let path = listed["agents"][0]["id"]["path"].as_str().context("no agent")?;
    let (agent, cluster) = (format!("spiffe://example.org{path}"), "spiffe://example.org/cluster");
    let selector = format!("spiffe_id:{agent}");
    house.server.ok(&["entry", "create", "-node", "-spiffeID", cluster, "-selector", &selector])?;
    register(&house.server, NODE, "/by-token-alias", &[])?;
    register(&house.server, &agent, "/by-agent-id", &[])?;
    register(&house.server, cluster, "/by-node-alias", &[])?;
    let mut stream = house.svids().await?;
    until_paths(&mut stream, &["/by-agent-id", "/by-node-alias", "/by-token-alias"]).await?;
    Ok(())
}

#[tokio::test]
async fn a_join_token_attests_one_node_once() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let token = server.token(None)?;
    let node = Node::by_token(&server, 1, &token).await?;
    assert_eq!(node.name(), format!("spiffe://example.org/spire/agent/join_token/{token}"));
    assert!(!node.reattestable);

    let used = Node::by_token(&server, 2, &token).await.err().context("a token was used twice")?;
    assert_eq!(used.code(), Code::InvalidArgument);
    assert_eq!(used.message(), "failed to attest: join token does not exist or has already been used");
    let unknown = Node::by_token(&server, 3, "no-such-token").await.err().context("an unknown token was accepted")?;
    assert_eq!((unknown.code(), unknown.message()), (used.code(), used.message()));

    let listed = server.ok(&["agent", "count"])?;
    assert_eq!(listed.trim(), "1 attested agent");
    Ok(())
}

#[tokio::test]
async fn a_join_token_survives_an_attestation_that_failed_for_another_reason() -> Result<()> {
    use spiffe_proto::agent::{AgentX509svidParams, AttestAgentRequest, attest_agent_request};
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let token = server.token(None)?;
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], server.port));
    let channel = e2e::testkit::tls(address, e2e::testkit::wire::loopback(1)?, None).await?;
    let data = types::AttestationData { r#type: "join_token".into(), payload: token.clone().into_bytes().into() };
    let step = attest_agent_request::Step::Params(attest_agent_request::Params {
        data: Some(data),
        params: Some(AgentX509svidParams { csr: bytes::Bytes::from_static(b"no request") }),
    });
    let request = tokio_stream::once(AttestAgentRequest { step: Some(step) });
    let status = match AgentClient::new(channel).attest_agent(request).await {
        Err(status) => status,
        Ok(answers) => answers.into_inner().message().await.err().context("a malformed request was signed")?,
    };
    assert_eq!(status.code(), Code::InvalidArgument, "{status:?}");
    Node::by_token(&server, 2, &token).await?;
    Ok(())
}

#[tokio::test]
async fn a_node_renews_is_banned_and_is_evicted() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let mut node = Node::by_token(&server, 1, &server.token(None)?).await?;
    let authorized = async |node: &Node| {
        let channel = node.connect().await.map_err(|error| tonic::Status::unavailable(format!("{error:#}")))?;
        EntryClient::new(channel).get_authorized_entries(GetAuthorizedEntriesRequest::default()).await
    };
    authorized(&node).await?;

    let old = node.presented.clone();
    node.renew().await?;
    authorized(&node).await?;
    // The first use of the new one has ended the old one.
    let new = std::mem::replace(&mut node.presented, old);
    let status = authorized(&node).await.err().context("a superseded SVID was accepted")?;
    assert_eq!((status.code(), reason(&status)?), (Code::PermissionDenied, Reason::AgentNotActive));
    node.presented = new;

    server.ok(&["agent", "ban", "-spiffeID", &node.name()])?;
    let status = authorized(&node).await.err().context("a banned agent was served")?;
    assert_eq!((status.code(), reason(&status)?), (Code::PermissionDenied, Reason::AgentBanned));
    // The bundle is for everybody, banned agents included.
    BundleClient::new(node.connect().await?).get_bundle(GetBundleRequest::default()).await?;

    server.ok(&["agent", "evict", "-spiffeID", &node.name()])?;
    let status = authorized(&node).await.err().context("an evicted agent was served")?;
    assert_eq!((status.code(), reason(&status)?), (Code::PermissionDenied, Reason::AgentNotAttested));
    Ok(())
}

#[tokio::test]
async fn only_administrators_administer_over_the_network() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let node = Node::by_token(&server, 1, &server.token(None)?).await?;
    let count = CountEntriesRequest::default();
    let status = EntryClient::new(node.connect().await?)
        .count_entries(count.clone())
        .await
        .err()
        .context("an agent counted entries")?;
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");

    let address = std::net::SocketAddr::from(([127, 0, 0, 1], server.port));
    let anonymous = e2e::testkit::tls(address, e2e::testkit::wire::loopback(2)?, None).await?;
    let status = EntryClient::new(anonymous).count_entries(count).await.err().context("nobody counted entries")?;
    assert_eq!(status.code(), Code::PermissionDenied, "{status:?}");
    Ok(())
}

#[tokio::test]
async fn an_admin_workload_administers_over_the_network() -> Result<()> {
    let house = House::new().await?;
    house.register("/operator", &["-admin"])?;
    let mut stream = house.svids().await?;
    let message = until_paths(&mut stream, &["/operator"]).await?;
    let svid = message.svids.first().context("no SVID")?;
    let presented = e2e::testkit::Presented {
        chain: spiffe::x509::X509Svid::from_concatenated(&svid.x509_svid)?
            .chain
            .iter()
            .map(|part| part.to_vec())
            .collect(),
        key: svid.x509_svid_key.to_vec(),
    };
    let address = std::net::SocketAddr::from(([127, 0, 0, 1], house.server.port));
    let channel = e2e::testkit::tls(address, e2e::testkit::wire::loopback(1)?, Some(presented)).await?;
    let counted = EntryClient::new(channel).count_entries(CountEntriesRequest::default()).await?.into_inner();
    // The entry, and the one that the join token made.
    assert_eq!(counted.count, 2);
    Ok(())
}

#[tokio::test]
async fn more_than_500_entries_are_synced_by_revision() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let node = Node::by_token(&server, 1, &server.token(Some(NODE))?).await?;
    let entries: Vec<Value> = (0..510)
        .map(|number| {
            json!({"parent_id": NODE, "spiffe_id": format!("spiffe://example.org/{number}"),
                "selectors": [{"type": "unix", "value": format!("uid:{number}")}]})
        })
        .collect();
    let file = folder.path().join("entries.json");
    std::fs::write(&file, json!({ "entries": entries }).to_string())?;
    server.ok(&["entry", "create", "-data", file.to_str().context("not UTF-8")?])?;

    let (send, receive) = tokio::sync::mpsc::channel(1);
    send.send(SyncAuthorizedEntriesRequest::default()).await?;
    let requests = tokio_stream::wrappers::ReceiverStream::new(receive);
    let mut answers = EntryClient::new(node.connect().await?).sync_authorized_entries(requests).await?.into_inner();
    let mut revisions = Vec::new();
    loop {
        let answer = answers.message().await?.context("the stream ended")?;
        assert!(answer.entries.is_empty(), "whole entries were sent unasked");
        revisions.extend(answer.revisions()?);
        if !answer.more {
            break;
        }
    }
    // One more: the alias that the token's use made is an entry below the agent as well.
    assert_eq!(revisions.len(), 511);
    let wanted: Vec<String> = revisions.iter().take(3).map(|revision| revision.id.clone()).collect();
    send.send(SyncAuthorizedEntriesRequest { ids: wanted.clone(), ..Default::default() }).await?;
    let answer = answers.message().await?.context("the stream ended")?;
    let mut ids: Vec<String> = answer.decoded()?.into_iter().map(|entry| entry.id).collect();
    ids.sort();
    let mut wanted = wanted;
    wanted.sort();
    assert_eq!(ids, wanted);
    Ok(())
}

#[tokio::test]
async fn a_federated_bundle_comes_with_the_entries_that_ask_for_it() -> Result<()> {
    let house = House::new().await?;
    let other = tempfile::tempdir()?;
    let options = ServerOptions { trust_domain: "other.test".into(), ..ServerOptions::default() };
    let other = Server::start(&Binaries::signet()?, other.path(), &options).await?;
    let path = other.bundle()?;
    let path = path.to_str().context("not UTF-8")?;
    let set = house.server.ok(&["bundle", "set", "-id", "spiffe://other.test", "-path", path])?;
    assert_eq!(set, "bundle set.\n");

    house.register("/web", &["-federatesWith", "spiffe://other.test"])?;
    let mut stream = house.svids().await?;
    let message = until_paths(&mut stream, &["/web"]).await?;
    assert_eq!(message.federated_bundles.keys().collect::<Vec<_>>(), ["spiffe://other.test"]);
    let bundles = house
        .workload_api()
        .await?
        .fetch_x509_bundles(secured(X509BundlesRequest {}))
        .await?
        .into_inner()
        .message()
        .await?;
    let mut known: Vec<String> = bundles.context("no bundles")?.bundles.into_keys().collect();
    known.sort();
    assert_eq!(known, ["spiffe://example.org", "spiffe://other.test"]);

    let restricted = house.server.command(&["bundle", "delete", "-id", "spiffe://other.test"])?;
    assert_eq!(restricted.status.code(), Some(1), "{}", text(&restricted));
    let deleted = house.server.ok(&["bundle", "delete", "-id", "spiffe://other.test", "-mode", "dissociate"])?;
    assert_eq!(deleted, "bundle deleted.\n");
    let gone = async {
        loop {
            let message = stream.message().await?.context("the stream ended with OK")?;
            if message.federated_bundles.is_empty() {
                return anyhow::Ok(());
            }
        }
    };
    tokio::time::timeout(PATIENCE, gone).await.context("the bundle stayed")?
}

#[tokio::test]
async fn a_restarted_server_has_everything_it_had() -> Result<()> {
    let mut house = House::new().await?;
    house.register("/web", &["-dns", "web.example.org", "-x509SVIDTTL", "600"])?;
    let state = |server: &Server| -> Result<[String; 3]> {
        Ok([
            server.ok(&["entry", "show", "-output", "json"])?,
            server.ok(&["agent", "list", "-output", "json"])?,
            server.ok(&["bundle", "show", "-format", "spiffe"])?,
        ])
    };
    let before = state(&house.server)?;
    house.server.signal(Signal::SIGTERM).await?;
    assert!(!house.server.socket().exists(), "a graceful stop removes the socket file");
    house.server.start_again().await?;
    assert_eq!(state(&house.server)?, before);
    house.register("/later", &[])?;
    let mut stream = house.svids().await?;
    until_paths(&mut stream, &["/later", "/web"]).await?;
    Ok(())
}

#[tokio::test]
async fn an_evicted_join_token_agent_ends() -> Result<()> {
    let mut house = House::new().await?;
    let listed: Value = serde_json::from_str(&house.server.ok(&["agent", "list", "-output", "json"])?)?;
    let path = listed["agents"][0]["id"]["path"].as_str().context("no agent")?;
    house.server.ok(&["agent", "evict", "-spiffeID", &format!("spiffe://example.org{path}")])?;
    let ended = wait::until("the agent's end", Duration::from_secs(60), async || house.agent.ended().ok().flatten());
    let status = ended.await?;
    assert!(!status.success(), "{status}");
    Ok(())
}

#[tokio::test]
async fn an_evicted_x509pop_agent_attests_again() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let proof = e2e::peers::Proof::new(folder.path(), e2e::peers::Attestation::X509Pop)?;
    let options = ServerOptions { plugins: proof.server_plugin(), ..ServerOptions::default() };
    let binaries = Binaries::signet()?;
    let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
    let agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &proof.agent_options(&server)?).await?;
    let agents = || -> Result<Value> { Ok(serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?) };
    let before = agents()?;
    let path = before["agents"][0]["id"]["path"].as_str().context("no agent")?.to_owned();
    let id = format!("spiffe://example.org{path}");
    register(&server, &id, "/web", &[])?;
    Workload::follow(&agent.socket(), None).first(PATIENCE).await?;

    server.ok(&["agent", "evict", "-spiffeID", &id])?;
    let back = wait::until("the agent's return", Duration::from_secs(60), async || {
        agents().ok().filter(|now| now["agents"][0]["id"]["path"] == path.as_str())
    });
    let after = back.await?;
    assert_ne!(after["agents"][0]["x509svid_serial_number"], before["agents"][0]["x509svid_serial_number"]);
    Workload::follow(&agent.socket(), None).first(PATIENCE).await?;
    Ok(())
}

#[tokio::test]
async fn sigusr1_ends_neither_program() -> Result<()> {
    let mut house = House::new().await?;
    for (pid, log) in [(house.server.pid()?, house.server.log()), (house.agent.pid()?, house.agent.log())] {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(i32::try_from(pid)?), Signal::SIGUSR1)?;
        let told = async || std::fs::read_to_string(&log).ok().filter(|text| text.contains("SIGUSR1 changes nothing"));
        wait::until("the answer to SIGUSR1", Duration::from_secs(60), told).await?;
    }
    assert_eq!(house.agent.ended()?, None);
    house.register("/web", &[])?;
    until_paths(&mut house.svids().await?, &["/web"]).await?;
    Ok(())
}

#[tokio::test]
async fn the_log_level_changes_while_the_server_runs() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let levels = |arguments: &[&str]| -> Result<Value> { Ok(serde_json::from_str(&server.ok(arguments)?)?) };
    let set = levels(&["logger", "set", "-level", "debug", "-output", "json"])?;
    assert_eq!(set, json!({"current_level": "DEBUG", "launch_level": "INFO"}));
    assert_eq!(levels(&["logger", "get", "-output", "json"])?, set);
    let reset = levels(&["logger", "reset", "-output", "json"])?;
    assert_eq!(reset, json!({"current_level": "INFO", "launch_level": "INFO"}));
    Ok(())
}

#[tokio::test]
async fn a_spire_configuration_with_sqlite_starts_unchanged() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let binaries = Binaries::signet()?;
    let mut server = Server::start(&binaries, folder.path(), &ServerOptions::default()).await?;
    server.ok(&["entry", "create", "-node", "-spiffeID", NODE, "-selector", "a:b"])?;
    server.signal(Signal::SIGTERM).await?;
    let text = std::fs::read_to_string(server.config())?;
    let database = folder.path().join("data/datastore.sqlite3");
    let sql = format!(
        "DataStore \"sql\" {{ plugin_data {{ database_type = \"sqlite3\" connection_string = \"{}\" }} }}",
        database.display()
    );
    let changed = text.replace("DataStore \"sled\" { plugin_data {} }", &sql);
    assert_ne!(changed, text);
    std::fs::write(server.config(), changed)?;
    server.start_again().await?;
    assert_eq!(server.ok(&["entry", "count"])?, "1 registration entry\n");
    let log = std::fs::read_to_string(server.log())?;
    let warnings = log.lines().filter(|line| line.contains("level=warn") && line.contains("sqlite3")).count();
    assert_eq!(warnings, 1, "{log}");

    server.signal(Signal::SIGTERM).await?;
    // A database that holds something is not passed over.
    std::fs::write(&database, spire_database())?;
    let refused = run_config(&binaries.server, &server.config())?;
    assert_eq!(refused.status.code(), Some(1), "{}", text_of(&refused));
    assert!(text_of(&refused).contains("datastore.sqlite3"), "{}", text_of(&refused));
    Ok(())
}

/// The beginning of a SQLite file whose schema names SPIRE's tables.
fn spire_database() -> Vec<u8> {
    let mut page = vec![0_u8; 4096];
    page.splice(..16, *b"SQLite format 3\0");
    page.splice(16..18, 4096_u16.to_be_bytes());
    page.splice(18..24, [1, 1, 0, 64, 32, 32]);
    // The schema table's only page is a leaf.
    page[100] = 0x0D;
    let statement = b"CREATE TABLE \"registered_entries\" (\"id\" integer primary key autoincrement)";
    let at = 4096 - statement.len();
    page.splice(at.., *statement);
    page.truncate(4096);
    page
}

fn run_config(server: &Path, config: &Path) -> Result<Output> {
    e2e::testkit::process::run(server, &["run", "-config", config.to_str().context("not UTF-8")?])
}

fn text_of(output: &Output) -> String {
    text(output)
}

/// The lines of a log that hold `words`, as far as they have all of `fields`.
fn lines_with(log: &Path, words: &str, fields: &[&str]) -> Result<usize> {
    let log = std::fs::read_to_string(log)?;
    let quoted = |line: &str| line.contains(&format!("msg=\"{words}\"")) || line.contains(&format!("msg={words} "));
    Ok(log.lines().filter(|line| quoted(line) && fields.iter().all(|field| line.contains(field))).count())
}

/// What scripts and SPIRE's own integration suites wait for, word by word.
#[tokio::test]
async fn logs_say_what_scripts_wait_for() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let proof = e2e::peers::Proof::new(folder.path(), e2e::peers::Attestation::X509Pop)?;
    let options = ServerOptions { plugins: proof.server_plugin(), ..ServerOptions::default() };
    let binaries = Binaries::signet()?;
    let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
    let mut settings = proof.agent_options(&server)?;
    settings.agent_block = format!("{}\n  log_level = \"DEBUG\"", settings.agent_block);
    let mut agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
    let listed: Value = serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?;
    let id = format!("spiffe://example.org{}", listed["agents"][0]["id"]["path"].as_str().context("no agent")?);
    let told = async |words: &str, fields: &[&str]| {
        wait::until(words, Duration::from_secs(60), async || {
            lines_with(&agent.log(), words, fields).is_ok_and(|count| count > 0).then_some(())
        })
        .await
    };
    let node = format!("spiffe_id=\"{id}\"");
    told("Node attestation was successful", &["level=info", &node]).await?;
    told("Starting Workload and SDS APIs", &["level=info", "network=unix"]).await?;
    register(&server, &id, "/web", &["-entryID", "web"])?;
    let web = ["level=debug", "entry=web", "spiffe_id=\"spiffe://example.org/web\""];
    told("Entry created", &web).await?;
    let fetched = agent.command(&["api", "fetch", "x509"])?;
    assert!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    told("Fetched X.509 SVID", &web).await?;
    let token = agent.command(&["api", "fetch", "jwt", "-audience", "reader"])?;
    assert!(token.status.success(), "{}", String::from_utf8_lossy(&token.stderr));
    told("Fetched JWT SVID", &["level=debug", "reader", "spiffe_id=\"spiffe://example.org/web\""]).await?;
    let token = String::from_utf8_lossy(&token.stdout).into_owned();
    let token = token.split_whitespace().find(|word| word.starts_with("eyJ")).context("no token")?;
    assert!(!std::fs::read_to_string(agent.log())?.contains(token), "the token itself is in the log");
    server.ok(&["entry", "delete", "-entryID", "web"])?;
    told("Entry removed", &web).await?;
    server.ok(&["agent", "evict", "-spiffeID", &id])?;
    told("Agent needs to re-attest; will attempt to re-attest", &["level=warning"]).await?;
    told("Successfully reattested node", &["level=info", &node]).await?;
    server.ok(&["agent", "ban", "-spiffeID", &id])?;
    told("Agent is banned: removing SVID and shutting down", &["level=error"]).await?;
    let ended = wait::until("the agent's end", Duration::from_secs(60), async || agent.ended().ok().flatten()).await?;
    assert!(!ended.success(), "{ended}");
    Ok(())
}
