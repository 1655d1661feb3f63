//! Pairs of workloads that do mutual TLS without pause while CAs and SVIDs rotate under them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use spiffe::id::SpiffeId;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::Instant;

use crate::testkit::workload::{self, Workload};
use crate::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, utc};

/// How long, how many, how fast the authority rotates.
#[derive(Clone, Debug)]
pub struct Plan {
    /// How long the pairs talk.
    pub duration: Duration,
    /// Client and server pairs.
    pub pairs: usize,
    /// `ca_ttl`.
    pub ca_ttl: &'static str,
    /// `default_x509_svid_ttl`.
    pub svid_ttl: &'static str,
    /// Restart the server after a third of the time and the agent after two thirds.
    pub restarts: bool,
}

/// What happened.
#[derive(Debug)]
pub struct Outcome {
    /// Completed handshakes, each with one byte each way.
    pub handshakes: u64,
    /// Failed ones, the first few in words.
    pub failures: Vec<String>,
    /// Different CAs that signed the SVIDs seen.
    pub authorities: usize,
    /// Different SVIDs seen.
    pub svids: usize,
}

#[derive(Default)]
struct Seen {
    handshakes: AtomicU64,
    failures: Mutex<Vec<String>>,
    authorities: Mutex<BTreeSet<String>>,
    svids: Mutex<BTreeSet<String>>,
}

/// Runs the soak in `folder`.
///
/// # Errors
/// If a process does not start or a workload never gets its first identity. Failed handshakes are counted, not errors.
pub async fn run(binaries: &Binaries, folder: &Path, plan: &Plan) -> Result<Outcome> {
    let options = ServerOptions {
        server_block: format!(
            "  ca_ttl = \"{}\"\n  default_x509_svid_ttl = \"{}\"\n  agent_ttl = \"1h\"",
            plan.ca_ttl, plan.svid_ttl
        ),
        ..ServerOptions::default()
    };
    let mut server = Server::start(binaries, folder, &options).await?;
    let token = server.token(Some("spiffe://example.org/node"))?;
    let settings = AgentOptions { join_token: Some(token), ..AgentOptions::default() };
    let mut agent = Agent::start(binaries, &folder.join("agent"), &server, &settings).await?;
    let selector = format!("unix:uid:{}", nix::unistd::getuid());
    for name in ["caller", "listener"] {
        let id = format!("spiffe://example.org/{name}");
        server.ok(&[
            "entry",
            "create",
            "-parentID",
            "spiffe://example.org/node",
            "-spiffeID",
            &id,
            "-selector",
            &selector,
        ])?;
    }

    let seen = Arc::new(Seen::default());
    let end = Instant::now() + plan.duration;
    let mut pairs = tokio::task::JoinSet::new();
    for _ in 0..plan.pairs {
        let caller = Workload::follow(&agent.socket(), Some("spiffe://example.org/caller"));
        let listener = Workload::follow(&agent.socket(), Some("spiffe://example.org/listener"));
        let seen = seen.clone();
        pairs.spawn(async move { pair(&caller, &listener, &seen, end).await });
    }
    if plan.restarts {
        tokio::time::sleep(plan.duration / 3).await;
        server.signal(Signal::SIGTERM).await?;
        server.start_again().await?;
        tokio::time::sleep(plan.duration / 3).await;
        agent.signal(Signal::SIGTERM).await?;
        agent.start_again().await?;
    }
    while let Some(pair) = pairs.join_next().await {
        pair??;
    }
    let take = |set: &Mutex<BTreeSet<String>>| set.lock().unwrap_or_else(PoisonError::into_inner).len();
    Ok(Outcome {
        handshakes: seen.handshakes.load(Ordering::Relaxed),
        failures: std::mem::take(&mut *seen.failures.lock().unwrap_or_else(PoisonError::into_inner)),
        authorities: take(&seen.authorities),
        svids: take(&seen.svids),
    })
}

async fn pair(caller: &Workload, listener: &Workload, seen: &Seen, end: Instant) -> Result<()> {
    caller.first(Duration::from_secs(30)).await?;
    listener.first(Duration::from_secs(30)).await?;
    let expected = SpiffeId::parse("spiffe://example.org/listener")?;
    while Instant::now() < end {
        match handshake(caller, listener, &expected, seen).await {
            Ok(()) => {
                seen.handshakes.fetch_add(1, Ordering::Relaxed);
            }
            Err(error) => {
                let mut failures = seen.failures.lock().unwrap_or_else(PoisonError::into_inner);
                failures.push(format!("{error:#}"));
            }
        }
    }
    Ok(())
}

async fn handshake(caller: &Workload, listener: &Workload, expected: &SpiffeId, seen: &Seen) -> Result<()> {
    let calls = caller.identity().context("the caller has no identity")?;
    let listens = listener.identity().context("the listener has no identity")?;
    for identity in [&calls, &listens] {
        let leaf = identity.svid.chain.first().context("empty chain")?;
        let issuer = spiffe::x509::Certificate::parse(leaf.clone())?.authority_key_id;
        seen.svids.lock().unwrap_or_else(PoisonError::into_inner).insert(identity.svid.serial.to_string());
        seen.authorities.lock().unwrap_or_else(PoisonError::into_inner).insert(format!("{issuer:?}"));
    }
    let (near, far) = UnixStream::pair()?;
    let server = async {
        let (mut stream, who) = workload::accept(&listens, far).await.context("listener's side")?;
        ensure!(who == calls.svid.id, "the listener saw {who}");
        let byte = stream.read_u8().await?;
        stream.write_u8(byte).await?;
        stream.flush().await?;
        anyhow::Ok(())
    };
    let client = async {
        let mut stream = workload::connect(&calls, expected, near).await.context("caller's side")?;
        stream.write_u8(42).await?;
        stream.flush().await?;
        ensure!(stream.read_u8().await? == 42, "another byte came back");
        anyhow::Ok(())
    };
    let (server, client) = tokio::join!(server, client);
    server.and(client).with_context(|| {
        let now = std::time::SystemTime::now();
        let (caller, listener) = (calls.told_to(&listens), listens.told_to(&calls));
        format!("at {}; the caller is {caller}; the listener is {listener}", utc(now))
    })
}
