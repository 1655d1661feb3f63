//! What a change costs that is pushed to the agents it concerns.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, unix, wait};
use tonic::transport::Channel;

use crate::connected::Stream;
use crate::node::{self, Node};
use crate::stats;

const PATIENCE: Duration = Duration::from_secs(120);
/// The alias that all nodes here have.
const ALIAS: &str = "/bench";

/// Open streams whose agents take every step, and how many they took.
pub struct Followers {
    taken: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
    nodes: Vec<Node>,
}

impl Followers {
    /// Connects `count` nodes; all have their first view when this returns.
    pub async fn connect(server: &Server, count: usize) -> Result<Self> {
        let address = SocketAddr::from(([127, 0, 0, 1], server.port));
        let nodes = node::nodes(address, &server.socket(), count, &node::id(ALIAS)).await?;
        let mut followers = Self { taken: Arc::default(), tasks: Vec::new(), nodes };
        for node in &followers.nodes {
            let (stream, taken) = (Stream::greet(node).await?, Arc::clone(&followers.taken));
            let followed = stream.follow(move || {
                taken.fetch_add(1, Ordering::Relaxed);
            });
            followers.tasks.push(tokio::spawn(async {
                let Err(error) = followed.await;
                eprintln!("a push stream ended: {error:#}");
            }));
        }
        followers.have_taken(count).await?;
        // Each alias that came with a later token was told to those before.
        followers.settle().await?;
        Ok(followers)
    }

    async fn have_taken(&self, steps: usize) -> Result<()> {
        let lost = || self.tasks.iter().any(tokio::task::JoinHandle::is_finished);
        wait::until("the steps of all streams", PATIENCE, async || {
            (self.taken.load(Ordering::Relaxed) >= steps || lost()).then_some(())
        })
        .await?;
        ensure!(!lost(), "a push stream ended");
        Ok(())
    }

    /// Waits until nothing comes any more.
    async fn settle(&self) -> Result<()> {
        let mut before = usize::MAX;
        while std::mem::replace(&mut before, self.taken.load(Ordering::Relaxed)) != before {
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        Ok(())
    }
}

impl Drop for Followers {
    fn drop(&mut self) {
        self.tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// Entries of the nodes here, numbered from `from`, in batches.
pub async fn fill(server: &Server, from: usize, to: usize) -> Result<()> {
    let admin = unix(&server.socket()).await?;
    for first in (from..to).step_by(50) {
        let entries = (first..to.min(first + 50)).map(mine).collect();
        node::create(&admin, entries).await?;
    }
    Ok(())
}

fn mine(number: usize) -> spiffe_proto::types::Entry {
    node::entry(ALIAS, &format!("/pushed/{number}"), &format!("uid:{}", 100_000 + number))
}

async fn create_one(admin: &Channel, number: usize) -> Result<()> {
    node::create(admin, vec![mine(number)]).await.map(drop)
}

/// CPU of the server in ms for each of `count` entries that are created one after another, all told, with every step of
/// each taken.
pub async fn changes(server: &Server, followers: &Followers, from: usize, count: usize) -> Result<f64> {
    let (admin, pid) = (unix(&server.socket()).await?, server.pid()?);
    followers.settle().await?;
    let (before, mut taken) = (stats::cpu(pid)?, followers.taken.load(Ordering::Relaxed));
    for number in from..from + count {
        create_one(&admin, number).await?;
        taken += followers.nodes.len();
        followers.have_taken(taken).await?;
    }
    Ok((stats::cpu(pid)? - before).as_secs_f64() * 1e3 / count as f64)
}

/// CPU of an agent in ms for each change, where it may have `held` entries.
pub async fn applied(
    server: &Server,
    binaries: &Binaries,
    folder: &std::path::Path,
    held: usize,
    changes: usize,
) -> Result<f64> {
    let token = server.token(Some(&format!("spiffe://example.org{ALIAS}")))?;
    let settings = AgentOptions {
        join_token: Some(token),
        agent_block: "  log_level = \"WARN\"".into(),
        ..AgentOptions::default()
    };
    let agent = Agent::start(binaries, folder, server, &settings).await?;
    let pid = agent.pid()?;
    fill(server, 0, held).await?;
    let idle = async || -> Result<()> {
        let mut before = stats::cpu(pid)?;
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let now = stats::cpu(pid)?;
            if now - before < Duration::from_millis(5) {
                return Ok(());
            }
            before = now;
        }
    };
    tokio::time::timeout(PATIENCE, idle()).await.context("the agent does not come to rest")??;
    let (admin, before) = (unix(&server.socket()).await?, stats::cpu(pid)?);
    for number in held..held + changes {
        create_one(&admin, number).await?;
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    tokio::time::timeout(PATIENCE, idle()).await.context("the agent does not come to rest")??;
    Ok((stats::cpu(pid)? - before).as_secs_f64() * 1e3 / changes as f64)
}
