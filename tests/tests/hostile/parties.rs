//! Whoever calls pays: what one party causes in the kernel, on files, in name services and in logs costs nobody else.
//!
//! The tests called `as_root_…` need other users, groups and mounts; without root they are left out.

use std::path::Path;

use anyhow::{Context, Result};
use bytes::Bytes;
use e2e::testkit::frames::{Frames, Outcome, framed, workload_call};
use e2e::testkit::{Binaries, unix, wait};
use http::Request;
use http_body::Frame;
use http_body_util::StreamBody;
use tokio::io::{AsyncBufReadExt, BufReader, Lines};
use tokio::process::{Child, ChildStdout};

use super::House;
use super::callers::{STRANGER, odd, odd_process, open_house, opened, path_text, run, start};

/// A process whose program lies on a file system that does not answer any more, and what it prints.
struct Silent {
    process: Child,
    printed: Lines<BufReader<ChildStdout>>,
    _folder: tempfile::TempDir,
}

impl Silent {
    async fn start(program: &Path, socket: &Path) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let user = STRANGER.to_string();
        let arguments = ["silent", path_text(socket)?, path_text(folder.path())?, &user];
        let mut process = start(odd(program, &arguments))?;
        let printed = BufReader::new(process.stdout.take().context("no output")?).lines();
        let mut silent = Self { process, printed, _folder: folder };
        assert_eq!(silent.said().await?, "silent");
        Ok(silent)
    }

    async fn said(&mut self) -> Result<String> {
        let line = tokio::time::timeout(super::PATIENCE, self.printed.next_line()).await;
        line.context("the process said nothing")??.context("the process ended")
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_a_program_on_a_file_system_that_hangs_holds_nobody_up() -> Result<()> {
    let house = open_house().await?;
    house.register("/stranger", &format!("unix:uid:{STRANGER}"))?;
    let program = odd_process(house.folder.path(), 0o755)?;
    // Who it is can be told without its file system.
    let mut silent = Silent::start(&program, &house.agent.socket()).await?;
    assert_eq!(silent.said().await?, "id=spiffe://example.org/stranger");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_programs_on_file_systems_that_hang_cost_their_own_party_only() -> Result<()> {
    let house = opened(House::with(Binaries::signet()?, "", "discover_workload_path = true").await?)?;
    house.register("/stranger", &format!("unix:uid:{STRANGER}"))?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let socket = house.agent.socket();
    let mut ask = odd(&program, &["ask", path_text(&socket)?]);
    ask.uid(STRANGER).gid(STRANGER);
    assert_eq!(run(ask).await?, "id=spiffe://example.org/stranger");
    let before = house.agent_memory()?;

    let mut silent = Vec::new();
    for _ in 0..4 {
        silent.push(Silent::start(&program, &socket).await?);
    }
    // Others are served while the agent waits for files that do not come, and after it has given up.
    for _ in 0..3 {
        house.still_served().await?;
    }
    for silent in &mut silent {
        let refused = silent.said().await?;
        assert!(refused.starts_with("code=14 "), "{refused}");
    }
    house.still_served().await?;
    // What hangs counts until it returns: there is no thread left for this user.
    let mut ask = odd(&program, &["ask", path_text(&socket)?]);
    ask.uid(STRANGER).gid(STRANGER);
    let refused = run(ask).await?;
    assert!(refused.starts_with("code=14 "), "{refused}");
    let after = house.agent_memory()?;
    assert!(after < before + 32 * 1024, "the agent grew from {before} to {after} KiB");
    // With the end of the file systems all of it is over.
    for silent in &mut silent {
        silent.process.kill().await?;
    }
    wait::until("the identity of an honest process of this user", super::PATIENCE, async || {
        let mut ask = odd(&program, &["ask", path_text(&socket).ok()?]);
        ask.uid(STRANGER).gid(STRANGER);
        run(ask).await.ok().filter(|answer| answer == "id=spiffe://example.org/stranger")
    })
    .await?;
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_a_process_of_sixty_thousand_groups_costs_its_own_party_only() -> Result<()> {
    let house = open_house().await?;
    house.register("/stranger", "unix:supplementary_gid:75535")?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let socket = house.agent.socket();
    let before = house.agent_memory()?;
    let user = STRANGER.to_string();
    let mut crowd = tokio::task::JoinSet::new();
    for _ in 0..32 {
        let grouped = odd(&program, &["grouped", path_text(&socket)?, "65536", &user]);
        crowd.spawn(run(grouped));
    }
    for _ in 0..5 {
        house.still_served().await?;
    }
    // Each of its groups is a selector; whoever comes while others of the party hold as much as all may is told to wait.
    while let Some(answer) = crowd.join_next().await {
        let answer = answer??;
        assert!(answer == "id=spiffe://example.org/stranger" || answer.starts_with("code=14 "), "{answer}");
    }
    let grouped = odd(&program, &["grouped", path_text(&socket)?, "65536", &user]);
    assert_eq!(run(grouped).await?, "id=spiffe://example.org/stranger");
    house.still_served().await?;
    let after = house.agent_memory()?;
    assert!(after < before + 192 * 1024, "the agent grew from {before} to {after} KiB");
    Ok(())
}

/// A call whose message never comes to its end: one byte is kept back.
fn unfinished(method: &str, message: &Bytes) -> Result<Request<tonic::body::Body>> {
    let mut bytes = message.slice(..message.len() - 1);
    let mut pieces = Vec::new();
    while !bytes.is_empty() {
        pieces.push(Ok::<_, tonic::Status>(Frame::data(bytes.split_to(bytes.len().min(16 * 1024)))));
    }
    let pieces = tokio_stream::StreamExt::chain(tokio_stream::iter(pieces), tokio_stream::pending());
    let request = Request::post(format!("http://localhost/SpiffeWorkloadAPI/{method}"));
    let request = request.header("content-type", "application/grpc").header("workload.spiffe.io", "true");
    Ok(request.body(tonic::body::Body::new(StreamBody::new(pieces)))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn calls_that_never_end_hold_little_memory() -> Result<()> {
    let house = House::new().await?;
    let before = house.agent_memory()?;
    let (mut calls, mut channels) = (tokio::task::JoinSet::new(), Vec::new());
    for (method, length) in [("ValidateJWTSVID", 255 * 1024), ("FetchJWTSVID", 159 * 1024)] {
        let message = Bytes::from(framed(&vec![0; length]));
        for _ in 0..8 {
            let channel = unix(&house.agent.socket()).await?;
            for _ in 0..100 {
                let (mut channel, request) = (channel.clone(), unfinished(method, &message)?);
                calls.spawn(async move {
                    tower::ServiceExt::ready(&mut channel).await?;
                    let answer = tower::Service::call(&mut channel, request).await?;
                    anyhow::Ok(answer.headers().get("grpc-status").map(|status| status.as_bytes().to_vec()))
                });
            }
            channels.push(channel);
        }
    }
    let mut most = before;
    for _ in 0..10 {
        house.still_served().await?;
        most = most.max(house.agent_memory()?);
    }
    // Each ends, for want of an end, or because the listener runs short.
    while let Some(call) = calls.join_next().await {
        if let Ok(status) = call? {
            let status = status.context("no status")?;
            assert!([&b"4"[..], b"14"].contains(&status.as_slice()), "{status:?}");
        }
        most = most.max(house.agent_memory()?);
    }
    assert!(most < before + 160 * 1024, "the agent grew from {before} to {most} KiB");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_have_the_size_that_their_method_needs() -> Result<()> {
    let house = House::new().await?;
    let mut frames = Frames::connect(&house.agent.socket()).await?;
    for (method, limit) in [
        ("FetchX509SVID", 4 * 1024),
        ("FetchX509Bundles", 4 * 1024),
        ("FetchJWTBundles", 4 * 1024),
        ("FetchJWTSVID", 160 * 1024),
        ("ValidateJWTSVID", 256 * 1024),
    ] {
        let announced = [&[0][..], &u32::try_from(limit + 1)?.to_be_bytes()].concat();
        let outcome = frames.call(&workload_call(method), Some(&announced)).await?;
        assert_eq!(outcome, Outcome::Status(3), "{method}");
    }
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn connecting_and_exiting_fills_no_log() -> Result<()> {
    let house = open_house().await?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let socket = house.agent.socket();
    let lines = || -> Result<usize> { Ok(std::fs::read_to_string(house.agent.log())?.lines().count()) };
    let before = lines()?;
    let mut crowd = tokio::task::JoinSet::new();
    for _ in 0..4 {
        let mut vanish = odd(&program, &["vanish", path_text(&socket)?, "150"]);
        crowd.spawn(async move { vanish.status().await });
    }
    while let Some(ended) = crowd.join_next().await {
        assert!(ended??.success());
    }
    house.still_served().await?;
    // A few lines of each kind, and one that says what was left out.
    let grown = lines()? - before;
    assert!(grown <= 24, "{grown} lines:\n{}", e2e::testkit::process::tail(&house.agent.log()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_one_who_asks_without_an_identity_fills_no_log() -> Result<()> {
    let house = open_house().await?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let socket = house.agent.socket();
    for _ in 0..40 {
        let mut ask = odd(&program, &["ask", path_text(&socket)?]);
        ask.uid(STRANGER).gid(STRANGER);
        assert_eq!(run(ask).await?, "code=7 no identity issued");
    }
    let log = std::fs::read_to_string(house.agent.log())?;
    let told: Vec<&str> = log.lines().filter(|line| line.contains("No identity issued")).collect();
    assert!((1..=7).contains(&told.len()), "{told:#?}");
    assert!(
        told[0].contains(&format!("user {STRANGER}")) && told[0].contains(&format!("unix:uid:{STRANGER}")),
        "{}",
        told[0]
    );
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_who_is_served_an_identity_outlasts_a_crowd_that_is_not() -> Result<()> {
    let folder = tempfile::tempdir()?;
    // Room for 64 connections.
    let house = opened(House::with(super::crowds::limited(folder.path(), 256)?, "", "").await?)?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let socket = house.agent.socket();
    let call = workload_call("FetchX509SVID");
    let mut served = Vec::new();
    for _ in 0..40 {
        let mut frames = Frames::connect(&socket).await?;
        assert!(matches!(frames.call(&call, Some(&framed(b""))).await?, Outcome::Message(_)));
        served.push(frames);
    }
    // More than half of the room is ours, so we are the heaviest; but the others have nothing to lose.
    let mut hold = odd(&program, &["hold", path_text(&socket)?, "200"]);
    hold.uid(STRANGER).gid(STRANGER);
    let mut crowd = start(hold)?;
    let mut printed = BufReader::new(crowd.stdout.take().context("no output")?).lines();
    let held = tokio::time::timeout(super::PATIENCE, printed.next_line()).await.context("the crowd said nothing")??;
    assert_eq!(held.as_deref(), Some("held"));
    house.still_served().await?;
    for frames in &mut served {
        let outcome = frames.call(&call, Some(&framed(b""))).await?;
        assert!(matches!(outcome, Outcome::Message(_)), "{outcome:?}");
    }
    crowd.kill().await?;
    house.still_served().await
}
