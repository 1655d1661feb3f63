//! Callers without a certificate on the server's network listener: what they hold, draw and write is bounded, and nobody
//! else notices them.

use std::future::Future;
use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use e2e::testkit::frames::{Fields, Frames, Outcome, call, framed, with, workload_call};
use e2e::testkit::node::Node;
use e2e::testkit::wire::tls_stream;
use e2e::testkit::{Binaries, Server, ServerOptions, tls, wait};
use nix::sched::{CloneFlags, unshare};
use spiffe_proto::agent::ListAgentsRequest;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::sync::subscribe_request::Message as Said;
use spiffe_proto::sync::subscribe_response::Message as Told;
use spiffe_proto::sync::sync_client::SyncClient;
use spiffe_proto::sync::{Held, HeldEntry, Hello, SubscribeRequest, SubscribeResponse};
use tempfile::TempDir;
use tokio_stream::StreamExt as _;
use tonic::Code;

use super::{House, PATIENCE};

const ATTEST: &str = "/spire.api.server.agent.v1.Agent/AttestAgent";
const BUNDLE: &str = "/spire.api.server.bundle.v1.Bundle/GetBundle";

async fn server(server_block: &str) -> Result<(TempDir, Server)> {
    let folder = tempfile::tempdir()?;
    let options = ServerOptions { server_block: server_block.into(), ..ServerOptions::default() };
    let server = Server::start(&Binaries::signet()?, folder.path(), &options).await?;
    Ok((folder, server))
}

/// A connection without a certificate from 127.0.0.0/8.
async fn stranger(server: &Server, from: [u8; 4]) -> Result<Frames> {
    let to = SocketAddr::from(([127, 0, 0, 1], server.port));
    Frames::over(tls_stream(to, SocketAddr::from((from, 0)), None).await?).await
}

/// The head of a message of `announced` bytes and the first `sent` of them.
fn unfinished(announced: usize, sent: usize) -> Result<Vec<u8>> {
    Ok([&[0][..], &u32::try_from(announced)?.to_be_bytes(), &vec![0x0a; sent]].concat())
}

/// Resident memory of the server in KiB.
fn memory(server: &Server) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.pid()?))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
}

async fn attests(server: &Server, number: usize) -> Result<Node> {
    Ok(Node::by_token(server, number, &server.token(None)?).await?)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_method_for_strangers_takes_what_it_needs_and_no_more() -> Result<()> {
    let (_folder, server) = server("").await?;
    for (path, most) in [(BUNDLE, 1024), (ATTEST, 128 * 1024)] {
        let mut frames = stranger(&server, [127, 9, 0, 1]).await?;
        let stream = frames.begin(&call(path), &unfinished(most + 1, 0)?).await?;
        assert_eq!(frames.outcome(stream).await?, Outcome::Status(Code::ResourceExhausted as u32), "{path}");
        // The connection lives on.
        let bundle = frames.call(&call(BUNDLE), Some(&framed(b""))).await?;
        ensure!(matches!(bundle, Outcome::Message(_)), "{bundle:?}");
    }
    // Everybody else is refused without a byte of the request being waited for.
    let mut frames = stranger(&server, [127, 9, 0, 1]).await?;
    let stream = frames.begin(&call("/spire.api.server.entry.v1.Entry/ListEntries"), &unfinished(64, 0)?).await?;
    assert_eq!(frames.outcome(stream).await?, Outcome::Status(Code::PermissionDenied as u32));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn unfinished_requests_of_strangers_hold_little_and_end() -> Result<()> {
    let (_folder, server) = server("  ratelimit { attestation = false }\n").await?;
    attests(&server, 1).await?;
    let before = memory(&server)?;
    // 8 calls on each of 250 connections: 250 MiB are announced, and as much is sent as the windows take.
    let mut held = Vec::new();
    for number in 0..250_u8 {
        let mut frames = stranger(&server, [127, 9, number / 50, number % 50 + 1]).await?;
        for _ in 0..8 {
            frames.begin(&call(ATTEST), &unfinished(128 * 1024, 7_000)?).await?;
        }
        held.push(frames);
    }
    attests(&server, 2).await?;
    let after = memory(&server)?;
    // One budget of 32 MiB, and what the connections themselves cost.
    ensure!(after < before + 64 * 1024, "the server grew from {before} to {after} KiB");
    for mut frames in held {
        let outcome = frames.outcome(1).await?;
        let ends = matches!(outcome, Outcome::Status(4) | Outcome::GoneAway(_) | Outcome::Closed);
        ensure!(ends, "an unfinished request ended with {outcome:?}");
    }
    attests(&server, 3).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stranger_has_eight_streams_and_half_a_minute() -> Result<()> {
    let (_folder, server) = server("  ratelimit { attestation = false }\n").await?;
    let mut frames = stranger(&server, [127, 9, 0, 1]).await?;
    for _ in 0..8 {
        frames.begin(&call(ATTEST), b"").await?;
    }
    let ninth = frames.begin(&call(ATTEST), b"").await?;
    // REFUSED_STREAM
    assert_eq!(frames.outcome(ninth).await?, Outcome::Reset(7));
    drop(frames);
    let mut quiet = stranger(&server, [127, 9, 0, 1]).await?;
    let bundle = quiet.call(&call(BUNDLE), Some(&framed(b""))).await?;
    ensure!(matches!(bundle, Outcome::Message(_)), "{bundle:?}");
    // A call that fails at once if the connection is over; those with a certificate stay.
    let node = attests(&server, 1).await?;
    let mut known = Frames::over(
        tls_stream(
            SocketAddr::from(([127, 0, 0, 1], server.port)),
            SocketAddr::from(([127, 9, 0, 2], 0)),
            Some(node.presented.clone()),
        )
        .await?,
    )
    .await?;
    let bundle = known.call(&call(BUNDLE), Some(&framed(b""))).await?;
    ensure!(matches!(bundle, Outcome::Message(_)), "{bundle:?}");
    let ended = wait::until("the end of a quiet connection", PATIENCE, async || quiet.ended().await.ok()).await?;
    ensure!(matches!(ended, Outcome::GoneAway(0) | Outcome::Closed), "{ended:?}");
    let bundle = known.call(&call(BUNDLE), Some(&framed(b""))).await?;
    ensure!(matches!(bundle, Outcome::Message(_)), "{bundle:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_network_has_its_portion_of_connections_and_no_more() -> Result<()> {
    let (_folder, server) = server("  ratelimit { connections_per_network = 40 }\n").await?;
    let node = attests(&server, 1).await?;
    let mut held = Vec::new();
    for number in 0..60_u8 {
        let mut frames = stranger(&server, [127, 9, 7, number + 1]).await?;
        // From the 41st on, one of the network's has to go; which one is not the point.
        frames.open(&call(BUNDLE), Some(&framed(b""))).await?;
        held.push(frames);
    }
    let mut neighbour = stranger(&server, [127, 9, 8, 1]).await?;
    let bundle = neighbour.call(&call(BUNDLE), Some(&framed(b""))).await?;
    ensure!(matches!(bundle, Outcome::Message(_)), "{bundle:?}");
    node.connect().await?;
    let mut open = 0;
    for frames in &mut held {
        open += usize::from(matches!(frames.call(&call(BUNDLE), Some(&framed(b""))).await?, Outcome::Message(_)));
    }
    assert_eq!(open, 40);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_rate_of_strangers_is_their_address_and_that_of_agents_their_id() -> Result<()> {
    let (_folder, server) = server("").await?;
    let soon = with(call(ATTEST), "grpc-timeout", Some(b"10m"));
    let mut frames = stranger(&server, [127, 9, 0, 1]).await?;
    let refused = framed(b"");
    // The first takes the place of this second; the others would wait longer than they may.
    let mut outcomes = Vec::new();
    for _ in 0..4 {
        outcomes.push(frames.call(&soon, Some(&refused)).await?);
    }
    let invalid = Outcome::Status(Code::InvalidArgument as u32);
    ensure!(outcomes.iter().any(|outcome| *outcome != invalid), "{outcomes:?}");
    // An agent at the very same address has a place of its own, by its id, and so has a neighbour in the same network.
    let node = attests(&server, 1).await?;
    let to = SocketAddr::from(([127, 0, 0, 1], server.port));
    let known = tls_stream(to, SocketAddr::from(([127, 9, 0, 1], 0)), Some(node.presented.clone())).await?;
    assert_eq!(Frames::over(known).await?.call(&soon, Some(&refused)).await?, invalid);
    let mut neighbour = stranger(&server, [127, 9, 0, 2]).await?;
    assert_eq!(neighbour.call(&call(ATTEST), Some(&refused)).await?, invalid);
    Ok(())
}

/// Runs `test` on a thread with a network of its own, which has a loopback interface with these IPv6 addresses.
fn in_a_network<F: Future<Output = Result<()>>>(
    addresses: &'static [&'static str],
    test: impl FnOnce() -> F + Send + 'static,
) -> Result<()> {
    let run = move || -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNET).context("making a network; the tests need root")?;
        let ip = |arguments: &[&str]| -> Result<()> {
            let output = std::process::Command::new("ip").args(arguments).output().context("running ip")?;
            ensure!(output.status.success(), "ip {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
            Ok(())
        };
        ip(&["link", "set", "lo", "up"])?;
        for address in addresses {
            ip(&["-6", "address", "add", address, "dev", "lo", "nodad"])?;
        }
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(test())
    };
    std::thread::spawn(run).join().map_err(|_| anyhow::anyhow!("the test panicked"))?
}

#[test]
fn an_ipv6_network_is_one_caller() -> Result<()> {
    in_a_network(&["2001:db8:0:1::1/128", "2001:db8:0:1::2/128", "2001:db8:0:2::1/128"], || async {
        let (_folder, mut server) = server("").await?;
        server.signal(nix::sys::signal::Signal::SIGTERM).await?;
        let text = std::fs::read_to_string(server.config())?;
        std::fs::write(server.config(), text.replace("bind_address = \"127.0.0.1\"", "bind_address = \"[::]\""))?;
        server.start_again().await?;
        let port = server.port;
        let connect = |from: &'static str| async move {
            let from = SocketAddr::new(from.parse()?, 0);
            Frames::over(tls_stream(SocketAddr::new(from.ip(), port), from, None).await?).await
        };
        let exhausted = Outcome::Status(Code::ResourceExhausted as u32);
        let invalid = Outcome::Status(Code::InvalidArgument as u32);
        // Eight a second pass, 32 may wait: the first address fills that for its whole network.
        let mut open = Vec::new();
        for _ in 0..10 {
            let mut frames = connect("2001:db8:0:1::1").await?;
            for _ in 0..8 {
                frames.open(&call(ATTEST), Some(&framed(b""))).await?;
            }
            open.push(frames);
        }
        let mut refused = 0;
        for _ in 0..5 {
            let mut frames = connect("2001:db8:0:1::2").await?;
            for _ in 0..8 {
                frames.open(&call(ATTEST), Some(&framed(b""))).await?;
            }
            refused += usize::from(frames.outcome(15).await? == exhausted);
        }
        ensure!(refused > 0, "a neighbour in the same network is served as if nobody else were there");
        let mut other = connect("2001:db8:0:2::1").await?;
        assert_eq!(other.call(&call(ATTEST), Some(&framed(b""))).await?, invalid);
        Ok(())
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_agent_says_it_holds_is_bounded() -> Result<()> {
    let (_folder, server) = server("").await?;
    let node = attests(&server, 1).await?;
    let before = memory(&server)?;
    let hello = || Hello { digest: vec![9; 32].into(), ..Hello::default() };
    let say = |message| SubscribeRequest { message: Some(message) };
    let held = |ids: Vec<String>, more| {
        let entries = ids.into_iter().map(|id| HeldEntry { id, content: vec![1; 32].into() }).collect();
        say(Said::Held(Held { entries, bundles: Vec::new(), more }))
    };
    let subscribe = async |messages: Vec<SubscribeRequest>| -> Result<Vec<SubscribeResponse>, tonic::Status> {
        let channel = node.connect().await.map_err(|error| tonic::Status::unknown(format!("{error:#}")))?;
        // What was said is not the end: the stream stays open.
        let said = tokio_stream::iter(messages).chain(tokio_stream::pending());
        let mut answers = SyncClient::new(channel).subscribe(said).await?.into_inner();
        let mut told = Vec::new();
        while let Some(answer) = answers.message().await? {
            let ends = matches!(answer.message, Some(Told::Part(_)));
            told.push(answer);
            if ends {
                break;
            }
        }
        Ok(told)
    };
    // About 40 MiB of what is kept of it, in messages of 3 MiB.
    let mut messages = vec![say(Said::Hello(hello()))];
    for page in 0..10 {
        let ids = (0..13_000).map(|number| format!("{page}-{number:0>190}")).collect();
        messages.push(held(ids, page < 9));
    }
    let told = subscribe(messages).await?;
    let Some(SubscribeResponse { message: Some(Told::Part(part)) }) = told.last() else {
        anyhow::bail!("no part: {told:?}");
    };
    ensure!(part.anew, "the view is sent anew to who holds too much");
    let after = memory(&server)?;
    ensure!(after < before + 96 * 1024, "the server grew from {before} to {after} KiB");
    let messages = vec![say(Said::Hello(hello())), held(vec!["x".repeat(256)], false)];
    let refused = subscribe(messages).await.err().context("a name of 256 bytes was taken")?;
    assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    attests(&server, 2).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_strangers_cause_in_the_log_is_counted_not_written() -> Result<()> {
    let (_folder, mut server) = server("  audit_log_enabled = true\n").await?;
    let before = std::fs::metadata(server.log())?.len();
    let to = SocketAddr::from(([127, 0, 0, 1], server.port));
    for network in 0..20_u8 {
        let channel = tls(to, SocketAddr::from(([127, 9, network, 1], 0)), None).await?;
        for _ in 0..100 {
            let refused = AgentClient::new(channel.clone()).list_agents(ListAgentsRequest::default()).await;
            assert_eq!(refused.err().map(|status| status.code()), Some(Code::PermissionDenied));
        }
    }
    server.signal(nix::sys::signal::Signal::SIGTERM).await?;
    let log = std::fs::read_to_string(server.log())?;
    let written = u64::try_from(log.len())? - before;
    ensure!(written < 96 * 1024, "2000 refused calls wrote {written} bytes");
    let count = |words: &str| log.lines().filter(|line| line.contains(words)).count();
    let told = log.lines().filter(|line| line.contains("Log lines were left out")).collect::<Vec<_>>();
    ensure!(!told.is_empty() && told.iter().all(|line| line.contains("Call refused")), "{told:?}");
    ensure!((60..=120).contains(&count("Call refused")), "{} lines", count("Call refused"));
    ensure!(log.lines().all(|line| line.len() <= 4096 + 64), "a line is too long");
    Ok(())
}

/// Three SDKs open a stream, take its first message and cancel. However often they do, it is no offence.
async fn fetch_and_cancel(frames: &mut Frames, fields: &Fields, times: usize) -> Result<()> {
    for number in 0..times {
        let stream = frames.open(fields, Some(&framed(b""))).await?;
        let outcome = frames.outcome(stream).await?;
        ensure!(matches!(outcome, Outcome::Message(_)), "fetch {number}: {outcome:?}");
        frames.reset(stream).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_fetch_once_and_cancel_go_on_for_ever() -> Result<()> {
    let house = House::new().await?;
    let mut frames = Frames::connect(&house.agent.socket()).await?;
    fetch_and_cancel(&mut frames, &workload_call("FetchX509SVID"), 1500).await?;
    fetch_and_cancel(&mut frames, &workload_call("FetchX509Bundles"), 1500).await?;
    house.still_served().await
}
