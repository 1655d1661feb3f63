//! What the agent spends on its callers: first answers, cached tokens, open streams, and how fast a change arrives.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Server, secured, unix};
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{BatchDeleteEntryRequest, BatchUpdateEntryRequest};
use spiffe_proto::types;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use spiffe_proto::workload::{JwtsvidRequest, X509svidRequest, X509svidResponse};
use tokio::time::Instant;
use tonic::Streaming;
use tonic::transport::Channel;

use crate::load::{self, Done};
use crate::node;

/// Opens a connection and an X.509 stream on it, and waits for the first message.
async fn first(socket: &Path) -> Result<(Channel, Streaming<X509svidResponse>)> {
    let channel = unix(socket).await?;
    let mut stream =
        SpiffeWorkloadApiClient::new(channel.clone()).fetch_x509svid(secured(X509svidRequest {})).await?.into_inner();
    let answer = stream.message().await?.context("stream ended")?;
    ensure!(!answer.svids.is_empty(), "no SVID");
    Ok((channel, stream))
}

/// A new connection and its first X.509-SVID.
pub async fn connect(pid: u32, socket: PathBuf, callers: usize, time: Duration) -> Result<Done> {
    load::run(pid, callers, time, move |_| {
        let socket = socket.clone();
        async move {
            first(&socket).await?;
            Ok(1)
        }
    })
    .await
}

/// A JWT-SVID that the agent already holds, over open connections.
pub async fn jwt(pid: u32, socket: PathBuf, callers: usize, time: Duration) -> Result<Done> {
    let mut channels = Vec::new();
    for _ in 0..callers {
        channels.push(unix(&socket).await?);
    }
    load::run(pid, callers, time, move |caller| {
        let channel = channels.get(caller).cloned();
        async move {
            let request = JwtsvidRequest { audience: vec!["bench".into()], spiffe_id: String::new() };
            let answer =
                SpiffeWorkloadApiClient::new(channel.context("no channel")?).fetch_jwtsvid(secured(request)).await?;
            ensure!(!answer.into_inner().svids.is_empty(), "no token");
            Ok(1)
        }
    })
    .await
}

/// Memory in KiB of the agent for each of `count` open streams (resident set, after against before).
pub async fn streams(pid: u32, socket: &Path, count: usize) -> Result<f64> {
    let before = crate::stats::memory(pid, "VmRSS")?;
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        held.push(first(socket).await?);
    }
    let after = crate::stats::memory(pid, "VmRSS")?;
    Ok((after.saturating_sub(before)) as f64 / count as f64)
}

/// How long changes took to reach an open stream.
#[derive(Default)]
pub struct Propagation {
    /// New entry to its SVID.
    pub created: Vec<Duration>,
    /// Changed DNS name to the SVID that has it.
    pub changed: Vec<Duration>,
    /// Deleted entry to the message without it.
    pub deleted: Vec<Duration>,
}

/// Makes, changes and deletes an entry `count` times and watches an open stream; times run from before the call.
pub async fn propagation(server: &Server, socket: &Path, uid: u32, count: usize) -> Result<Propagation> {
    let admin = unix(&server.socket()).await?;
    let mut entries = EntryClient::new(admin.clone());
    let (_channel, mut stream) = first(socket).await?;
    let mut times = Propagation::default();
    for number in 0..count {
        let path = format!("/propagation/{number}");
        let id = format!("spiffe://example.org{path}");
        let begin = Instant::now();
        let mut entry = node::create(&admin, vec![node::entry("/node", &path, &format!("uid:{uid}"))])
            .await?
            .pop()
            .context("no entry")?;
        until(&mut stream, |answer| answer.svids.iter().any(|svid| svid.spiffe_id == id)).await?;
        times.created.push(begin.elapsed());

        let dns = format!("n{number}.example.org");
        entry.dns_names = vec![dns.clone()];
        let begin = Instant::now();
        let answer = entries
            .batch_update_entry(BatchUpdateEntryRequest {
                entries: vec![entry.clone()],
                input_mask: None,
                output_mask: None,
            })
            .await?;
        ensure!(
            answer.into_inner().results.first().and_then(|r| r.status.clone()).is_some_and(|s| s.code == 0),
            "update refused"
        );
        until(&mut stream, |answer| {
            answer.svids.iter().any(|svid| svid.spiffe_id == id && contains(&svid.x509_svid, dns.as_bytes()))
        })
        .await?;
        times.changed.push(begin.elapsed());

        let begin = Instant::now();
        entries.batch_delete_entry(BatchDeleteEntryRequest { ids: vec![entry.id.clone()] }).await?;
        until(&mut stream, |answer| answer.svids.iter().all(|svid| svid.spiffe_id != id)).await?;
        times.deleted.push(begin.elapsed());
    }
    Ok(times)
}

fn contains(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}

async fn until(stream: &mut Streaming<X509svidResponse>, holds: impl Fn(&X509svidResponse) -> bool) -> Result<()> {
    let waited = tokio::time::timeout(Duration::from_secs(60), async {
        loop {
            let answer = stream.message().await?.context("stream ended")?;
            if holds(&answer) {
                return anyhow::Ok(());
            }
        }
    });
    waited.await.context("no change arrived within a minute")?
}

/// The entry of the caller itself, so that its stream is never empty.
pub async fn register(server: &Server, uid: u32) -> Result<Vec<types::Entry>> {
    node::create(&unix(&server.socket()).await?, vec![node::entry("/node", "/self", &format!("uid:{uid}"))]).await
}
