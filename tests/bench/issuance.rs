//! What the server spends on credentials: X.509-SVIDs by batch size, JWT-SVIDs, attestations.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Requested, Server, unix};
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::svid::svid_client::SvidClient;
use spiffe_proto::svid::{BatchNewX509svidRequest, NewJwtsvidRequest, NewX509svidParams};

use crate::load::{self, Done};
use crate::node::{self, Node};

/// Nodes with 50 entries that all of them may have.
pub struct Bench {
    pid: u32,
    address: SocketAddr,
    admin: PathBuf,
    nodes: Vec<Node>,
    entries: Vec<String>,
    csrs: Vec<bytes::Bytes>,
    joined: Arc<AtomicUsize>,
}

impl Bench {
    /// Attests `callers` nodes and gives them 50 entries.
    pub async fn new(server: &Server, callers: usize) -> Result<Self> {
        let address = SocketAddr::from(([127, 0, 0, 1], server.port));
        let admin = server.socket();
        let channel = unix(&admin).await?;
        let entries =
            (0..50).map(|n| node::entry("/bench", &format!("/issue/{n}"), &format!("uid:{}", 90_000 + n))).collect();
        node::create(&channel, entries).await?;
        let nodes = node::nodes(address, &admin, callers, &node::id("/bench")).await?;
        let mut entries = Vec::new();
        for node in &nodes {
            entries = node::authorized(node, 50).await?;
        }
        ensure!(entries.len() >= 50, "only {} entries are authorized", entries.len());
        let csrs =
            (0..50).map(|_| Ok(Requested::new(Some("spiffe://example.org/any"))?.csr.into())).collect::<Result<_>>()?;
        Ok(Self {
            pid: server.pid()?,
            address,
            admin,
            nodes,
            entries,
            csrs,
            joined: Arc::new(AtomicUsize::new(callers)),
        })
    }

    /// `BatchNewX509SVID` with `batch` items a call.
    pub async fn x509(&self, batch: usize, callers: usize, time: Duration) -> Result<Done> {
        let params: Vec<NewX509svidParams> = (self.entries.iter().zip(&self.csrs))
            .take(batch)
            .map(|(entry, csr)| NewX509svidParams { entry_id: entry.clone(), csr: csr.clone() })
            .collect();
        let nodes = self.nodes.clone();
        load::run(self.pid, callers, time, move |caller| {
            let node = nodes.get(caller % nodes.len()).cloned();
            let params = params.clone();
            async move {
                let mut client = SvidClient::new(node.context("no node")?.channel);
                let answer = client.batch_new_x509svid(BatchNewX509svidRequest { params }).await?.into_inner();
                for result in &answer.results {
                    let status = result.status.as_ref().context("result without status")?;
                    ensure!(status.code == 0 && result.svid.is_some(), "refused: {} {}", status.code, status.message);
                }
                Ok(answer.results.len() as u64)
            }
        })
        .await
    }

    /// `NewJWTSVID`, a new audience list each caller.
    pub async fn jwt(&self, callers: usize, time: Duration) -> Result<Done> {
        let (nodes, entries) = (self.nodes.clone(), self.entries.clone());
        load::run(self.pid, callers, time, move |caller| {
            let node = nodes.get(caller % nodes.len()).cloned();
            let entry_id = entries.get(caller % entries.len()).cloned();
            async move {
                let mut client = SvidClient::new(node.context("no node")?.channel);
                let request = NewJwtsvidRequest {
                    entry_id: entry_id.context("no entry")?,
                    audience: vec![format!("audience-{caller}")],
                };
                let answer = client.new_jwtsvid(request).await?.into_inner();
                ensure!(answer.svid.is_some_and(|svid| !svid.token.is_empty()), "no token");
                Ok(1)
            }
        })
        .await
    }

    /// `CreateJoinToken` and the attestation that uses it, each from an address of its own.
    pub async fn attestation(&self, callers: usize, time: Duration) -> Result<Done> {
        let admin = unix(&self.admin).await?;
        let (address, joined) = (self.address, self.joined.clone());
        load::run(self.pid, callers, time, move |_| {
            let mut admin = AgentClient::new(admin.clone());
            let number = joined.fetch_add(1, Ordering::Relaxed);
            async move {
                let token = node::token(&mut admin, None).await?;
                node::attest(address, number, token).await?;
                Ok(1)
            }
        })
        .await
    }
}
