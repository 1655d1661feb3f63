//! The workload of `cargo xtask demo`: one listens, one calls, both by mutual TLS with identities fetched from the agent's socket.
//!
//! Prints one JSON event a line: `svid`, `listening`, `answer`, `failed`, `dropped`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use e2e::testkit::workload::{self, Identity, Workload};
use serde_json::json;
use spiffe::id::SpiffeId;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};

const PATIENCE: Duration = Duration::from_secs(30);

#[tokio::main]
async fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["listen", socket] => listen(&PathBuf::from(socket)).await,
        ["call", socket, address, id] => call(&PathBuf::from(socket), address, id).await,
        ["once", socket] => once(&PathBuf::from(socket)).await,
        _ => bail!("usage: signet-demo-workload listen SOCKET | call SOCKET ADDRESS ID | once SOCKET"),
    }
}

fn report(event: &serde_json::Value) {
    println!("{event}");
}

/// Reports each new SVID of the workload.
fn watch(workload: &Workload) {
    let mut updates = workload.updates();
    tokio::spawn(async move {
        let mut last = None;
        while updates.changed().await.is_ok() {
            let Some(identity) = updates.borrow_and_update().clone() else { continue };
            if last.replace(identity.svid.serial) != Some(identity.svid.serial) {
                report(&describe(&identity));
            }
        }
    });
}

fn describe(identity: &Identity) -> serde_json::Value {
    json!({"event": "svid", "id": identity.svid.id.as_str(), "serial": identity.svid.serial.to_string(),
           "not_after": e2e::testkit::utc(identity.svid.not_after)})
}

async fn once(socket: &std::path::Path) -> Result<()> {
    use spiffe_proto::workload::X509svidRequest;
    use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
    let mut client = SpiffeWorkloadApiClient::new(e2e::testkit::unix(socket).await?);
    let answer =
        async { client.fetch_x509svid(e2e::testkit::secured(X509svidRequest {})).await?.into_inner().message().await }
            .await;
    match answer {
        Ok(message) => {
            report(&describe(&Identity::from_message(&message.context("the stream ended")?, None)?));
            Ok(())
        }
        Err(status) => {
            eprintln!("refused: {:?}: {}", status.code(), status.message());
            std::process::exit(1);
        }
    }
}

/// Answers each line of each connection with the id of the caller.
async fn listen(socket: &std::path::Path) -> Result<()> {
    let workload = Workload::follow(socket, None);
    watch(&workload);
    workload.first(PATIENCE).await?;
    let listener = TcpListener::bind(("127.0.0.1", 0)).await?;
    report(&json!({"event": "listening", "address": listener.local_addr()?.to_string()}));
    loop {
        let (stream, _) = listener.accept().await?;
        let Some(identity) = workload.identity() else { continue };
        tokio::spawn(async move {
            if let Err(error) = serve(&identity, stream).await {
                report(&json!({"event": "failed", "why": format!("{error:#}")}));
            }
        });
    }
}

async fn serve(identity: &Identity, stream: TcpStream) -> Result<()> {
    let (stream, caller) = workload::accept(identity, stream).await?;
    let (read, mut write) = tokio::io::split(stream);
    let mut lines = BufReader::new(read).lines();
    while let Ok(Some(_)) = lines.next_line().await {
        write.write_all(format!("{caller}\n").as_bytes()).await?;
    }
    Ok(())
}

/// Asks once every 100 ms on one connection that stays open, and on a new connection with the newest SVID each time as well.
async fn call(socket: &std::path::Path, address: &str, id: &str) -> Result<()> {
    let workload = Workload::follow(socket, None);
    watch(&workload);
    let expected = SpiffeId::parse(id)?;
    let first = workload.first(PATIENCE).await?;
    let stream = workload::connect(&first, &expected, TcpStream::connect(address).await?).await?;
    let (read, mut write) = tokio::io::split(stream);
    let mut lines = BufReader::new(read).lines();
    for count in 1_u64.. {
        write.write_all(b"who am I?\n").await?;
        let Some(seen_as) = lines.next_line().await? else {
            report(&json!({"event": "dropped", "count": count}));
            bail!("the open connection was dropped");
        };
        report(&json!({"event": "answer", "count": count, "peer": id, "seen_as": seen_as}));
        let identity = workload.identity().context("no identity")?;
        if let Err(error) = fresh(&identity, &expected, address).await {
            report(&json!({"event": "failed", "why": format!("{error:#}")}));
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    Ok(())
}

async fn fresh(identity: &Identity, expected: &SpiffeId, address: &str) -> Result<()> {
    let stream = workload::connect(identity, expected, TcpStream::connect(address).await?).await?;
    let (read, mut write) = tokio::io::split(stream);
    write.write_all(b"who am I?\n").await?;
    let answer = BufReader::new(read).lines().next_line().await?;
    let answer = answer.context("no answer")?;
    anyhow::ensure!(answer == identity.svid.id.as_str(), "seen as {answer}");
    write.shutdown().await?;
    Ok(())
}
