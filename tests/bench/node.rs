//! Simulated nodes: they attest by join token and hold one connection, as an agent does.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use e2e::testkit::{Presented, tls, unix, wire::loopback};
use spiffe_proto::agent::CreateJoinTokenRequest;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{BatchCreateEntryRequest, GetAuthorizedEntriesRequest};
use spiffe_proto::types;
use tonic::transport::Channel;

/// One attested node with an open connection of its own.
#[derive(Clone)]
pub struct Node {
    /// Its SPIFFE ID.
    pub id: types::Spiffeid,
    /// Mutual TLS connection.
    pub channel: Channel,
}

/// Makes join tokens, whose nodes also get `alias`.
pub async fn token(admin: &mut AgentClient<Channel>, alias: Option<types::Spiffeid>) -> Result<String> {
    let request = CreateJoinTokenRequest { ttl: 600, agent_id: alias, ..Default::default() };
    Ok(admin.create_join_token(request).await?.into_inner().value)
}

/// Attests with `token` from the loopback address of node `number`; the answer is what the node then presents.
pub async fn attest(server: SocketAddr, number: usize, token: String) -> Result<Presented> {
    e2e::testkit::wire::attest(server, loopback(number)?, token).await
}

/// Attests `count` nodes and connects each.
pub async fn nodes(
    server: SocketAddr,
    admin_socket: &Path,
    count: usize,
    alias: &types::Spiffeid,
) -> Result<Vec<Node>> {
    let mut admin = AgentClient::new(unix(admin_socket).await?);
    let mut nodes = Vec::with_capacity(count);
    for number in 0..count {
        let token = token(&mut admin, Some(alias.clone())).await?;
        let id = id(&format!("/spire/agent/join_token/{token}"));
        let presented = attest(server, number, token).await?;
        nodes.push(Node { id, channel: tls(server, loopback(number)?, Some(presented)).await? });
    }
    Ok(nodes)
}

/// Waits until `node` may have `count` entries (a server may read its entries anew only every few seconds), and gives their ids.
pub async fn authorized(node: &Node, count: usize) -> Result<Vec<String>> {
    let mut client = EntryClient::new(node.channel.clone());
    e2e::testkit::wait::until("the node's entries", Duration::from_secs(30), async || {
        let answer = client.get_authorized_entries(GetAuthorizedEntriesRequest { output_mask: None }).await.ok()?;
        let entries = answer.into_inner().decoded().ok()?;
        (entries.len() >= count).then(|| {
            entries
                .into_iter()
                .filter(|e| e.selectors.first().is_some_and(|s| s.r#type == "unix"))
                .map(|e| e.id)
                .collect()
        })
    })
    .await
}

/// An id below the trust domain of the bench.
pub fn id(path: &str) -> types::Spiffeid {
    types::Spiffeid { trust_domain: "example.org".into(), path: path.into() }
}

/// An entry with one `unix` selector.
pub fn entry(parent: &str, path: &str, selector: &str) -> types::Entry {
    types::Entry {
        spiffe_id: Some(id(path)),
        parent_id: Some(id(parent)),
        selectors: vec![types::Selector { r#type: "unix".into(), value: selector.into() }],
        ..Default::default()
    }
}

/// Creates entries in one call and demands that each is created.
pub async fn create(channel: &Channel, entries: Vec<types::Entry>) -> Result<Vec<types::Entry>> {
    let mut client = EntryClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    let answer = client.batch_create_entry(BatchCreateEntryRequest { entries, output_mask: None }).await?.into_inner();
    let mut created = Vec::with_capacity(answer.results.len());
    for result in answer.results {
        let status = result.status.context("result without status")?;
        if status.code != 0 {
            bail!("an entry was refused: {} {}", status.code, status.message);
        }
        created.push(result.entry.context("result without entry")?);
    }
    Ok(created)
}
