//! What must hold while things rotate, die and come back. Short forms of what `cargo xtask soak` runs for minutes.

use std::net::SocketAddr;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use e2e::testkit::workload::Workload;
use e2e::testkit::{
    Agent, AgentOptions, Binaries, Presented, Requested, Server, ServerOptions, secured, tls, unix, wait,
    wire::loopback,
};
use e2e::{crash, soak};
use nix::sys::signal::Signal;
use spiffe_proto::agent::CreateJoinTokenRequest;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{BatchCreateEntryRequest, BatchDeleteEntryRequest};
use spiffe_proto::svid::svid_client::SvidClient;
use spiffe_proto::svid::{BatchNewX509svidRequest, NewX509svidParams};
use spiffe_proto::types;
use spiffe_proto::workload::X509svidRequest;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use tonic::Code;

const NODE: &str = "spiffe://example.org/node";
const PATIENCE: Duration = Duration::from_secs(30);

fn register(server: &Server, path: &str) -> Result<String> {
    let selector = format!("unix:uid:{}", nix::unistd::getuid());
    let id = format!("spiffe://example.org{path}");
    let printed = server.ok(&["entry", "create", "-parentID", NODE, "-spiffeID", &id, "-selector", &selector])?;
    let line = printed.lines().find(|line| line.starts_with("Entry ID")).context("no entry id printed")?;
    Ok(line.split_once(':').context("no colon")?.1.trim().to_owned())
}

async fn pair(folder: &Path, server_block: &str) -> Result<(Server, Agent)> {
    let binaries = Binaries::signet()?;
    let options = ServerOptions { server_block: server_block.into(), ..ServerOptions::default() };
    let server = Server::start(&binaries, folder, &options).await?;
    let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
    let agent = Agent::start(&binaries, &folder.join("agent"), &server, &settings).await?;
    Ok((server, agent))
}

/// A3 in short: no handshake fails over CA rotations, a server restart and an agent restart.
#[tokio::test(flavor = "multi_thread")]
async fn no_handshake_fails_over_rotations_and_restarts() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let plan =
        soak::Plan { duration: Duration::from_secs(36), pairs: 4, ca_ttl: "18s", svid_ttl: "6s", restarts: true };
    let outcome = soak::run(&Binaries::signet()?, folder.path(), &plan).await?;
    assert_eq!(outcome.failures, Vec::<String>::new());
    assert!(outcome.authorities >= 3, "{} authorities, {outcome:?}", outcome.authorities);
    assert!(outcome.handshakes > 0);
    Ok(())
}

/// A4 in short: what was acknowledged before a kill is there after it.
#[tokio::test(flavor = "multi_thread")]
async fn acknowledged_writes_survive_kills() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let outcome = crash::run(&Binaries::signet()?, folder.path(), 8, Duration::from_millis(400)).await?;
    assert!(outcome.entries > 0 && outcome.agents > 0, "{outcome:?}");
    Ok(())
}

/// A4: a killed agent comes back with its own identity, and streams with theirs, within 10 s.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_agent_needs_no_attestation() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (server, mut agent) = pair(folder.path(), "").await?;
    register(&server, "/web")?;
    let workload = Workload::follow(&agent.socket(), None);
    let first = workload.first(PATIENCE).await?;
    for _ in 0..5 {
        let before = workload.identity().context("no identity")?;
        agent.signal(Signal::SIGKILL).await?;
        // The token in the configuration has been used: an attestation would fail.
        agent.start_again().await?;
        let mut updates = workload.updates();
        let renewed = updates
            .wait_for(|identity| identity.as_ref().is_some_and(|identity| identity.svid.serial != before.svid.serial));
        let renewed = tokio::time::timeout(Duration::from_secs(10), renewed)
            .await
            .context("the stream did not come back within 10 s")??;
        assert_eq!(renewed.as_ref().context("no identity")?.svid.id, first.svid.id);
    }
    assert_eq!(server.ok(&["agent", "count"])?.trim(), "1 attested agent");
    Ok(())
}

/// A4: SIGTERM ends streams with Unavailable, never with OK.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_ends_streams_with_unavailable() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (server, mut agent) = pair(folder.path(), "").await?;
    register(&server, "/web")?;
    let mut client = SpiffeWorkloadApiClient::new(unix(&agent.socket()).await?);
    let mut stream = wait::until("the first message", PATIENCE, async || {
        let mut stream = client.fetch_x509svid(secured(X509svidRequest {})).await.ok()?.into_inner();
        stream.message().await.ok().flatten().map(|_| stream)
    })
    .await?;
    agent.signal(Signal::SIGTERM).await?;
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => anyhow::bail!("the stream ended with OK"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");
    Ok(())
}

/// A5 over sockets, seconds for hours: valid SVIDs are served while the server is away, expired ones never, and its return is noticed.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_away_costs_nothing_until_expiry() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let (mut server, agent) = pair(folder.path(), "  default_x509_svid_ttl = \"16s\"\n  agent_ttl = \"120s\"").await?;
    register(&server, "/web")?;
    let workload = Workload::follow(&agent.socket(), None);
    workload.first(PATIENCE).await?;
    server.signal(Signal::SIGTERM).await?;
    let held = workload.identity().context("no identity")?;

    // A new process of a prefetched entry is served while what the agent holds is valid.
    let newcomer = Workload::follow(&agent.socket(), None);
    assert_eq!(newcomer.first(Duration::from_secs(5)).await?.svid.serial, held.svid.serial);

    // Nothing expired is served: the open stream ends with Unavailable, and so does a new call, which waits in vain.
    let ended = wait::until("the end of the SVID's life", Duration::from_secs(40), async || {
        newcomer.ended.lock().ok()?.clone()
    })
    .await?;
    assert_eq!(ended.code(), Code::Unavailable, "{ended:?}");
    assert!(SystemTime::now() >= held.svid.not_after, "the stream ended before its SVID did");
    let mut client = SpiffeWorkloadApiClient::new(unix(&agent.socket()).await?);
    let answer = async { client.fetch_x509svid(secured(X509svidRequest {})).await?.into_inner().message().await };
    let status = tokio::time::timeout(Duration::from_secs(60), answer)
        .await
        .context("no answer at all")?
        .err()
        .context("an expired SVID was served")?;
    assert_eq!(status.code(), Code::Unavailable, "{status:?}");

    server.start_again().await?;
    let mut updates = workload.updates();
    let renewed =
        updates.wait_for(|identity| identity.as_ref().is_some_and(|identity| identity.svid.serial != held.svid.serial));
    tokio::time::timeout(Duration::from_secs(45), renewed)
        .await
        .context("the server's return was not noticed within one back-off step")??;
    Ok(())
}

struct Node {
    entries: EntryClient<tonic::transport::Channel>,
    svids: SvidClient<tonic::transport::Channel>,
    presented: Presented,
    address: SocketAddr,
}

async fn node(server: &Server) -> Result<Node> {
    let admin = unix(&server.socket()).await?;
    let request = CreateJoinTokenRequest {
        ttl: 60,
        agent_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: "/node".into() }),
        ..Default::default()
    };
    let token = AgentClient::new(admin.clone()).create_join_token(request).await?.into_inner().value;
    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    let presented = e2e::testkit::wire::attest(address, loopback(1)?, token).await?;
    let svids = SvidClient::new(tls(address, loopback(1)?, Some(presented.clone())).await?);
    Ok(Node { entries: EntryClient::new(admin), svids, presented, address })
}

/// A9: no SVID is issued for an entry after its deletion was acknowledged.
#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_issued_after_an_acknowledged_deletion() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let options = ServerOptions { server_block: "  ratelimit { signing = false }".into(), ..ServerOptions::default() };
    let server = Server::start(&Binaries::signet()?, folder.path(), &options).await?;
    let mut node = node(&server).await?;
    let csr = bytes::Bytes::from(Requested::new(None)?.csr);
    for number in 0..30 {
        let entry = types::Entry {
            spiffe_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: format!("/short/{number}") }),
            parent_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: "/node".into() }),
            selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1".into() }],
            ..Default::default()
        };
        let created = node
            .entries
            .batch_create_entry(BatchCreateEntryRequest { entries: vec![entry], output_mask: None })
            .await?;
        let id = created
            .into_inner()
            .results
            .first()
            .and_then(|result| result.entry.as_ref())
            .context("not created")?
            .id
            .clone();
        let params = vec![NewX509svidParams { entry_id: id.clone(), csr: csr.clone() }];
        let code = async |svids: &mut SvidClient<_>| -> Result<i32> {
            let answer =
                svids.batch_new_x509svid(BatchNewX509svidRequest { params: params.clone() }).await?.into_inner();
            Ok(answer.results.first().and_then(|result| result.status.as_ref()).context("no status")?.code)
        };
        assert_eq!(code(&mut node.svids).await?, 0, "the entry's own agent was refused");
        // Calls are under way while the entry goes.
        let mut busy = node.svids.clone();
        let racing = tokio::spawn({
            let params = params.clone();
            async move { busy.batch_new_x509svid(BatchNewX509svidRequest { params }).await.map(drop) }
        });
        let deleted = node.entries.batch_delete_entry(BatchDeleteEntryRequest { ids: vec![id] }).await?.into_inner();
        ensure!(
            deleted.results.first().and_then(|result| result.status.as_ref()).is_some_and(|status| status.code == 0)
        );
        assert_eq!(code(&mut node.svids).await?, i32::from(Code::NotFound), "an SVID was issued after the deletion");
        racing.await??;
    }
    Ok(())
}

/// A6: a banned agent's open push stream ends at once with the detail that a call would get.
#[tokio::test(flavor = "multi_thread")]
async fn a_ban_ends_open_streams_with_its_reason() -> Result<()> {
    use spiffe_proto::sync::sync_client::SyncClient;
    use spiffe_proto::sync::{Hello, SubscribeRequest, subscribe_request};
    let folder = tempfile::tempdir()?;
    let server = Server::start(&Binaries::signet()?, folder.path(), &ServerOptions::default()).await?;
    let node = node(&server).await?;
    let channel = tls(node.address, loopback(1)?, Some(node.presented.clone())).await?;
    let (send, receive) = tokio::sync::mpsc::channel(1);
    send.send(SubscribeRequest {
        message: Some(subscribe_request::Message::Hello(Hello { digest: vec![0; 32].into(), ..Hello::default() })),
    })
    .await?;
    let mut stream =
        SyncClient::new(channel).subscribe(tokio_stream::wrappers::ReceiverStream::new(receive)).await?.into_inner();
    stream.message().await?.context("no first message")?;

    let listed = server.ok(&["agent", "list", "-output", "json"])?;
    let listed: serde_json::Value = serde_json::from_str(&listed)?;
    let path = listed["agents"][0]["id"]["path"].as_str().context("no agent listed")?;
    server.ok(&["agent", "ban", "-spiffeID", &format!("spiffe://example.org{path}")])?;
    let status = loop {
        match stream.message().await {
            Ok(Some(_)) => {}
            Ok(None) => anyhow::bail!("the stream ended with OK"),
            Err(status) => break status,
        }
    };
    assert_eq!(status.code(), Code::PermissionDenied);
    let details: spiffe_proto::rpc_status::Status = prost::Message::decode(status.details())?;
    let detail = details.details.first().context("no detail")?;
    assert_eq!(detail.type_url, "type.googleapis.com/spire.api.types.PermissionDeniedDetails");
    let detail: types::PermissionDeniedDetails = prost::Message::decode(detail.value.as_ref())?;
    assert_eq!(detail.reason, i32::from(types::permission_denied_details::Reason::AgentBanned));
    Ok(())
}
