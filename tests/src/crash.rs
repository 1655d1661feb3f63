//! Killing the server without warning while entries are created and nodes attest: what was acknowledged is there, nothing is half there.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::agent::{
    AgentX509svidParams, AttestAgentRequest, CreateJoinTokenRequest, ListAgentsRequest, attest_agent_request,
    attest_agent_response,
};
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{BatchCreateEntryRequest, ListEntriesRequest};
use spiffe_proto::types;
use tonic::transport::Channel;

use crate::testkit::wire::loopback;
use crate::testkit::{Binaries, Requested, Server, ServerOptions, tls, unix};

/// What was acknowledged before the kills.
#[derive(Default)]
struct Acknowledged {
    entries: Mutex<BTreeMap<String, types::Entry>>,
    agents: Mutex<BTreeMap<String, String>>,
    next: AtomicUsize,
}

/// What the run saw.
#[derive(Debug)]
pub struct Outcome {
    /// Acknowledged entries, each found unchanged after every kill that followed.
    pub entries: usize,
    /// Acknowledged attestations, each found with its alias entry.
    pub agents: usize,
}

/// Kills the server `kills` times, each at a moment between 0 and `longest` after it became ready and busy.
///
/// # Errors
/// If an acknowledged write is missing, changed or half there; the text says which.
pub async fn run(binaries: &Binaries, folder: &Path, kills: usize, longest: Duration) -> Result<Outcome> {
    let options =
        ServerOptions { server_block: "  ratelimit { attestation = false }".into(), ..ServerOptions::default() };
    let mut server = Server::start(binaries, folder, &options).await?;
    let acknowledged = Arc::new(Acknowledged::default());
    for kill in 0..kills {
        let mut writers = tokio::task::JoinSet::new();
        for _ in 0..4 {
            writers.spawn(create_entries(server.socket(), acknowledged.clone()));
        }
        for _ in 0..2 {
            writers.spawn(attest_nodes(server.socket(), server.port, acknowledged.clone()));
        }
        tokio::time::sleep(longest.mul_f64(fraction()?)).await;
        server.signal(Signal::SIGKILL).await?;
        while let Some(writer) = writers.join_next().await {
            writer?;
        }
        server.start_again().await.with_context(|| format!("restart after kill {kill}"))?;
        check(&server, &acknowledged).await.with_context(|| format!("after kill {kill}"))?;
    }
    let entries = acknowledged.entries.lock().unwrap_or_else(PoisonError::into_inner).len();
    let agents = acknowledged.agents.lock().unwrap_or_else(PoisonError::into_inner).len();
    Ok(Outcome { entries, agents })
}

/// A random number between 0 and 1.
fn fraction() -> Result<f64> {
    let mut bytes = [0; 4];
    aws_lc_rs::rand::fill(&mut bytes)?;
    Ok(f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX))
}

/// Creates entries until the server goes away; remembers the acknowledged ones.
async fn create_entries(socket: std::path::PathBuf, acknowledged: Arc<Acknowledged>) {
    let Ok(channel) = unix(&socket).await else { return };
    let mut client = EntryClient::new(channel);
    loop {
        let number = acknowledged.next.fetch_add(1, Ordering::Relaxed);
        let entries = (0..3)
            .map(|part| types::Entry {
                spiffe_id: Some(id(&format!("/crash/{number}/{part}"))),
                parent_id: Some(id("/node")),
                selectors: ["uid:1", "gid:2", "user:three"]
                    .map(|value| types::Selector { r#type: "unix".into(), value: value.into() })
                    .into(),
                dns_names: vec![format!("n{number}.example.org")],
                ..Default::default()
            })
            .collect();
        let Ok(answer) = client.batch_create_entry(BatchCreateEntryRequest { entries, output_mask: None }).await else {
            return;
        };
        let mut known = acknowledged.entries.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in answer.into_inner().results.into_iter().filter_map(|result| result.entry) {
            known.insert(entry.id.clone(), entry);
        }
    }
}

/// Attests nodes until the server goes away; remembers those that were given an SVID.
async fn attest_nodes(socket: std::path::PathBuf, port: u16, acknowledged: Arc<Acknowledged>) {
    let Ok(channel) = unix(&socket).await else { return };
    let mut admin = AgentClient::new(channel);
    loop {
        let number = acknowledged.next.fetch_add(1, Ordering::Relaxed);
        let alias = format!("/alias/{number}");
        let Ok(agent) = attest(&mut admin, port, number, &alias).await else { return };
        acknowledged.agents.lock().unwrap_or_else(PoisonError::into_inner).insert(agent, alias);
    }
}

async fn attest(admin: &mut AgentClient<Channel>, port: u16, number: usize, alias: &str) -> Result<String> {
    let request = CreateJoinTokenRequest { ttl: 600, agent_id: Some(id(alias)), ..Default::default() };
    let token = admin.create_join_token(request).await?.into_inner().value;
    let channel = tls(SocketAddr::from(([127, 0, 0, 1], port)), loopback(number)?, None).await?;
    let params = AttestAgentRequest {
        step: Some(attest_agent_request::Step::Params(attest_agent_request::Params {
            data: Some(types::AttestationData { r#type: "join_token".into(), payload: token.into_bytes().into() }),
            params: Some(AgentX509svidParams { csr: Requested::new(None)?.csr.into() }),
        })),
    };
    let mut answers = AgentClient::new(channel).attest_agent(tokio_stream::once(params)).await?.into_inner();
    let step = answers.message().await?.and_then(|answer| answer.step);
    let Some(attest_agent_response::Step::Result(result)) = step else { bail!("no result") };
    Ok(result.svid.and_then(|svid| svid.id).context("no id")?.path)
}

async fn check(server: &Server, acknowledged: &Acknowledged) -> Result<()> {
    let channel = unix(&server.socket()).await?;
    let mut entries = EntryClient::new(channel.clone()).max_decoding_message_size(256 << 20);
    let listed = entries.list_entries(ListEntriesRequest::default()).await?.into_inner().entries;
    let listed: BTreeMap<String, types::Entry> = listed.into_iter().map(|entry| (entry.id.clone(), entry)).collect();
    for (id, entry) in acknowledged.entries.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        let found = listed.get(id).with_context(|| format!("acknowledged entry {id} is missing"))?;
        ensure!(found == entry, "entry {id} changed: {found:?} instead of {entry:?}");
    }
    for entry in listed.values().filter(|entry| path(entry).starts_with("/crash/")) {
        ensure!(
            entry.selectors.len() == 3 && entry.dns_names.len() == 1,
            "entry {} is half there: {entry:?}",
            entry.id
        );
    }
    let mut agents = AgentClient::new(channel).max_decoding_message_size(256 << 20);
    let agents = agents.list_agents(ListAgentsRequest::default()).await?.into_inner().agents;
    let agents: Vec<String> = agents.into_iter().filter_map(|agent| agent.id).map(|id| id.path).collect();
    for (agent, alias) in acknowledged.agents.lock().unwrap_or_else(PoisonError::into_inner).iter() {
        ensure!(agents.contains(agent), "acknowledged agent {agent} is missing");
        ensure!(listed.values().any(|entry| path(entry) == alias), "agent {agent} is there without its alias {alias}");
    }
    Ok(())
}

fn path(entry: &types::Entry) -> &str {
    entry.spiffe_id.as_ref().map_or("", |id| &id.path)
}

fn id(path: &str) -> types::Spiffeid {
    types::Spiffeid { trust_domain: "example.org".into(), path: path.into() }
}
