//! What the server spends on entries: creation, size, idling, agents' syncs, restart.

use std::net::SocketAddr;
use std::ops::Range;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Server, unix};
use nix::sys::signal::Signal;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{GetAuthorizedEntriesRequest, SyncAuthorizedEntriesRequest};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use crate::load::{self, Done};
use crate::node::{self, Node};
use crate::stats;

/// Creates the entries of these numbers, which belong to no node, in batches of 50 by one caller.
pub async fn create(server: &Server, numbers: Range<usize>) -> Result<Done> {
    let channel = unix(&server.socket()).await?;
    let pid = server.pid()?;
    let (before, begin) = (stats::cpu(pid)?, Instant::now());
    let mut calls = Vec::new();
    let count = numbers.len();
    for first in numbers.clone().step_by(50) {
        let entries = (first..numbers.end.min(first + 50))
            .map(|n| {
                let mut entry = node::entry(
                    &format!("/other/{}", n / 100),
                    &format!("/workload/{n}"),
                    &format!("uid:{}", 1000 + n % 50_000),
                );
                entry.selectors.push(spiffe_proto::types::Selector {
                    r#type: "unix".into(),
                    value: format!("path:/usr/bin/service-{}", n % 1000),
                });
                entry
            })
            .collect();
        let start = Instant::now();
        node::create(&channel, entries).await?;
        calls.push(start.elapsed());
    }
    Ok(Done { items: count as u64, elapsed: begin.elapsed(), cpu: stats::cpu(pid)? - before, calls })
}

/// CPU cores used while nothing is asked for.
pub async fn idle(pid: u32, time: Duration) -> Result<f64> {
    let (before, begin) = (stats::cpu(pid)?, Instant::now());
    tokio::time::sleep(time).await;
    Ok((stats::cpu(pid)? - before).as_secs_f64() / begin.elapsed().as_secs_f64())
}

/// `SyncAuthorizedEntries` from nothing, by one node.
pub async fn sync(pid: u32, node: &Node, time: Duration) -> Result<Done> {
    let channel = node.channel.clone();
    load::run(pid, 1, time, move |_| {
        let mut client = EntryClient::new(channel.clone());
        async move {
            let request = SyncAuthorizedEntriesRequest::default();
            let mut answers = client.sync_authorized_entries(tokio_stream::once(request)).await?.into_inner();
            while answers.message().await?.is_some() {}
            Ok(1)
        }
    })
    .await
}

/// How an agent of a peer asks what it may have.
#[derive(Clone, Copy)]
pub enum Poll {
    /// Everything in one answer.
    Get,
    /// What differs: everything, for one that begins with nothing.
    Sync,
}

/// Polls by one node that may have `count` entries and holds none, one after another.
pub async fn poll(pid: u32, node: &Node, count: usize, poll: Poll, time: Duration) -> Result<Done> {
    let channel = node.channel.clone();
    load::run(pid, 1, time, move |_| {
        let client = EntryClient::new(channel.clone()).max_decoding_message_size(64 << 20);
        async move {
            let got = match poll {
                Poll::Get => get(client).await?,
                Poll::Sync => full_sync(client).await?,
            };
            ensure!(got == count, "a node that may have {count} entries was given {got}");
            Ok(1)
        }
    })
    .await
}

async fn get(mut client: EntryClient<Channel>) -> Result<usize> {
    let answer = client.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await?;
    Ok(answer.into_inner().entries.len())
}

/// As an agent does: the revisions of everything first if there are many, then the entries by id, by pages.
async fn full_sync(mut client: EntryClient<Channel>) -> Result<usize> {
    let (asks, asked) = mpsc::channel(4);
    asks.send(SyncAuthorizedEntriesRequest::default()).await?;
    let mut answers = client.sync_authorized_entries(ReceiverStream::new(asked)).await?.into_inner();
    let (mut ids, mut entries, mut more) = (Vec::new(), 0, true);
    while more {
        let answer = answers.message().await?.context("the sync ended early")?;
        ids.extend(answer.revisions()?.into_iter().map(|revision| revision.id));
        entries += answer.entries.len();
        more = answer.more;
    }
    ids.sort_unstable();
    for page in ids.chunks(500) {
        asks.send(SyncAuthorizedEntriesRequest { ids: page.to_vec(), output_mask: None }).await?;
        more = true;
        while more {
            let answer = answers.message().await?.context("the sync ended early")?;
            entries += answer.entries.len();
            more = answer.more;
        }
    }
    // Its end is read as well: a stream that is dropped before is reset.
    drop(asks);
    while answers.message().await?.is_some() {}
    Ok(entries)
}

/// Ends the server, starts it again on the same data and waits for the first entries a node is given; from exec to then.
pub async fn restart(server: &mut Server, presented: &e2e::testkit::Presented) -> Result<Duration> {
    server.signal(Signal::SIGTERM).await?;
    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    let begin = Instant::now();
    server.start_without_waiting()?;
    e2e::testkit::wait::until("the first sync after a restart", Duration::from_secs(60), async || {
        let from = e2e::testkit::wire::loopback(0).ok()?;
        let channel = e2e::testkit::tls(address, from, Some(presented.clone())).await.ok()?;
        let request = SyncAuthorizedEntriesRequest::default();
        let mut answers =
            EntryClient::new(channel).sync_authorized_entries(tokio_stream::once(request)).await.ok()?.into_inner();
        answers.message().await.ok().flatten()
    })
    .await?;
    let elapsed = begin.elapsed();
    server.ready().await?;
    Ok(elapsed)
}
