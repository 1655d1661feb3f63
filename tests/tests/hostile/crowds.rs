//! H-71 and the shortage of descriptors: one process that takes all it can get, and another that still gets its SVID.

use std::io::Write as _;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use e2e::testkit::frames::{Frames, Outcome, PREFACE, framed, workload_call};
use e2e::testkit::{Binaries, wait};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::House;

const EMPTY_SETTINGS: &[u8] = &[0, 0, 0, 4, 0, 0, 0, 0, 0];

/// The descriptors that a crowd of `wanted` connections needs, as far as this machine grants them.
fn descriptors(wanted: u64) -> Result<usize> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(usize::try_from(wanted.min(hard.saturating_sub(512)))?)
}

/// Opens connections one after the other; every second one begins to speak.
async fn flood(socket: PathBuf, count: usize) -> Result<Vec<UnixStream>> {
    let opening = tokio::task::spawn_blocking(move || {
        let mut held = Vec::with_capacity(count);
        for number in 0..count {
            // Full queues make this wait, as any other client would.
            let mut stream = UnixStream::connect(&socket)?;
            if number % 2 == 0 {
                // Whoever is too many is hung up on.
                let _ = stream.write_all(PREFACE).and_then(|()| stream.write_all(EMPTY_SETTINGS));
            }
            held.push(stream);
        }
        anyhow::Ok(held)
    });
    opening.await?
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_ten_thousand_connections_stop_nobody_else() -> Result<()> {
    let house = House::new().await?;
    let held = flood(house.agent.socket(), descriptors(10_000)?).await?;
    house.still_served().await?;
    let more = flood(house.agent.socket(), descriptors(10_000)?.min(1000)).await?;
    house.still_served().await?;
    drop((held, more));
    house.still_served().await?;
    let memory = house.agent_memory()?;
    assert!(memory < 512 * 1024, "the agent holds {memory} KiB");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_a_thousand_streams_on_one_connection_stop_nobody_else() -> Result<()> {
    let house = House::new().await?;
    let mut frames = Frames::connect(&house.agent.socket()).await?;
    let call = workload_call("FetchX509SVID");
    for _ in 0..1000 {
        // The connection may be ended meanwhile.
        if frames.open(&call, Some(&framed(b""))).await.is_err() {
            break;
        }
    }
    house.still_served().await?;
    // Those below the limit of streams were served; here is the first.
    let first = frames.outcome(1).await?;
    assert!(matches!(first, Outcome::Message(_) | Outcome::GoneAway(_) | Outcome::Closed), "{first:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_a_client_that_resets_in_a_loop_is_told_to_go() -> Result<()> {
    let house = House::new().await?;
    let socket = house.agent.socket();
    let resetting = tokio::spawn(async move {
        let mut frames = Frames::connect(&socket).await?;
        let call = workload_call("FetchX509SVID");
        for _ in 0..100_000 {
            let Ok(stream) = frames.open(&call, Some(&framed(b""))).await else { break };
            if frames.reset(stream).await.is_err() {
                break;
            }
        }
        frames.ended().await
    });
    house.still_served().await?;
    let ended = resetting.await??;
    // ENHANCE_YOUR_CALM, unless the farewell was lost among what we never read.
    assert!(matches!(ended, Outcome::GoneAway(11) | Outcome::Closed), "{ended:?}");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_readers_that_never_read_stop_nobody_else() -> Result<()> {
    // Half of it is the time of a rotation.
    let house =
        House::with(Binaries::signet()?, "  default_x509_svid_ttl = \"2s\"\n  agent_ttl = \"1h\"\n", "").await?;
    let call = workload_call("FetchX509SVID");
    let mut silent = Vec::new();
    for _ in 0..20 {
        let mut frames = Frames::connect(&house.agent.socket()).await?;
        for _ in 0..50 {
            frames.open(&call, Some(&framed(b""))).await?;
        }
        silent.push(frames);
    }
    house.still_served().await?;
    let before = house.agent_memory()?;
    // A few rotations, each seen by somebody who reads.
    let follower = e2e::testkit::workload::Workload::follow(&house.agent.socket(), None);
    let mut last = follower.first(super::PATIENCE).await?.svid.serial;
    for _ in 0..6 {
        let next = wait::until("a rotation", super::PATIENCE, async || {
            follower.identity().map(|identity| identity.svid.serial).filter(|serial| *serial != last)
        });
        last = next.await?;
    }
    house.still_served().await?;
    let after = house.agent_memory()?;
    assert!(after < before + 64 * 1024, "the agent grew from {before} to {after} KiB");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_half_a_preface_is_hung_up_on() -> Result<()> {
    let house = House::new().await?;
    let socket = house.agent.socket();
    let mut halves = Vec::new();
    for _ in 0..200 {
        let mut stream = UnixStream::connect(&socket)?;
        stream.write_all(&PREFACE[..12])?;
        stream.set_nonblocking(true)?;
        halves.push(stream);
    }
    house.still_served().await?;
    wait::until("the end of half-open connections", super::PATIENCE, async || {
        halves.iter_mut().all(closed).then_some(())
    })
    .await?;
    house.still_served().await
}

/// Whether the other side has hung up; what it said before does not matter.
fn closed(stream: &mut UnixStream) -> bool {
    let mut said = [0; 4096];
    loop {
        match std::io::Read::read(stream, &mut said) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != std::io::ErrorKind::WouldBlock,
        }
    }
}

/// An agent that may have so many descriptors and not one more.
pub fn limited(folder: &Path, descriptors: usize) -> Result<Binaries> {
    let signet = Binaries::signet()?;
    let script = folder.join("limited-agent");
    let agent = signet.agent.to_str().context("not UTF-8")?;
    std::fs::write(&script, format!("#!/bin/sh\nulimit -n {descriptors}\nexec {agent} \"$@\"\n"))?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    Binaries::of(signet.kind, signet.server, script)
}

#[tokio::test(flavor = "multi_thread")]
async fn descriptors_that_run_short_are_taken_from_the_heaviest() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let house = House::with(limited(folder.path(), 256)?, "", "").await?;
    // A quiet process with a stream from before the crowd came.
    let mut quiet = tokio::process::Command::new(&Binaries::signet()?.agent);
    let mut quiet = quiet
        .args(["api", "watch", "-socketPath"])
        .arg(house.agent.socket())
        .stdout(std::process::Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let mut printed = tokio::io::BufReader::new(quiet.stdout.take().context("no output")?);
    let mut line = String::new();
    let first = tokio::io::AsyncBufReadExt::read_line(&mut printed, &mut line);
    tokio::time::timeout(super::PATIENCE, first).await.context("the quiet process got nothing")??;

    // Connections that all have an open call, so that none is idle.
    let call = workload_call("FetchX509SVID");
    let mut crowd = Vec::new();
    for _ in 0..400 {
        let Ok(mut frames) = Frames::connect(&house.agent.socket()).await else { continue };
        if let Ok(stream) = frames.open(&call, Some(&framed(b""))).await {
            crowd.push((frames, stream));
        }
    }
    let mut served = 0;
    let mut told = 0;
    for (frames, stream) in &mut crowd {
        match frames.outcome(*stream).await? {
            Outcome::Message(_) => served += 1,
            Outcome::Status(14) => told += 1,
            // Too many are on their way out already for a farewell.
            Outcome::Closed | Outcome::GoneAway(_) | Outcome::Reset(_) => {}
            other => anyhow::bail!("unexpected {other:?}"),
        }
    }
    assert!(served > 0, "nobody of the crowd was served");
    assert!(told > 0, "nobody of the crowd was told that it is too much");
    house.still_served().await?;
    // The quiet process has its stream still.
    assert_eq!(quiet.try_wait()?, None, "the quiet process lost its stream");
    drop(crowd);
    house.still_served().await
}
