//! What the server spends on entries: creation, size, idling, agents' syncs, restart.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Result;
use e2e::testkit::{Server, unix};
use nix::sys::signal::Signal;
use spiffe_proto::entry::SyncAuthorizedEntriesRequest;
use spiffe_proto::entry::entry_client::EntryClient;
use tokio::time::Instant;

use crate::load::{self, Done};
use crate::node::{self, Node};
use crate::stats;

/// Creates `count` entries in batches of 50 by one caller; every tenth thousand belongs to the nodes of the bench.
pub async fn create(server: &Server, count: usize) -> Result<Done> {
    let channel = unix(&server.socket()).await?;
    let pid = server.pid()?;
    let (before, begin) = (stats::cpu(pid)?, Instant::now());
    let mut calls = Vec::new();
    for first in (0..count).step_by(50) {
        let entries = (first..count.min(first + 50))
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
