//! H-70: processes that are not, or no longer, the process that connected.
//!
//! The tests called `as_root_…` need a second user, namespaces or setuid programs; without root they are left out.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Binaries, wait};
use tokio::process::{Child, Command};

use super::House;

/// Some user who is neither root nor us.
pub const STRANGER: u32 = 65_533;

/// A copy of the odd process that any user may run.
pub fn odd_process(folder: &Path, mode: u32) -> Result<PathBuf> {
    let program = Binaries::signet()?.agent.with_file_name("signet-odd-process");
    ensure!(program.is_file(), "{} is not built: run `cargo build -p e2e --bins` first", program.display());
    let copy = folder.join(format!("odd-process-{mode:o}"));
    // By another process: whatever is forked here while the copy is open for writing would keep it from being run.
    let copied = std::process::Command::new("cp").args([&program, &copy]).status()?;
    ensure!(copied.success(), "copying {} failed", program.display());
    std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(mode))?;
    Ok(copy)
}

/// A house whose folder every user may enter.
pub async fn open_house() -> Result<House> {
    opened(House::new().await?)
}

/// `house`, with a folder that every user may enter.
pub fn opened(house: House) -> Result<House> {
    for folder in [house.folder.path(), house.agent.folder()] {
        std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?;
    }
    Ok(house)
}

/// Runs the odd process to the end of its output, its children's included; the answer is the last line.
pub async fn run(mut command: Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).stderr(Stdio::inherit()).kill_on_drop(true).output();
    let output = tokio::time::timeout(super::PATIENCE, output).await.context("the process did not end")??;
    let printed = String::from_utf8(output.stdout)?;
    Ok(printed.lines().last().context("the process printed nothing")?.to_owned())
}

/// Starts the odd process; it is killed when dropped.
pub fn start(mut command: Command) -> Result<Child> {
    Ok(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).kill_on_drop(true).spawn()?)
}

async fn said(child: &mut Child) -> Result<String> {
    let output = child.stdout.take().context("no output")?;
    let mut line = String::new();
    let mut output = tokio::io::BufReader::new(output);
    let read = tokio::io::AsyncBufReadExt::read_line(&mut output, &mut line);
    tokio::time::timeout(super::PATIENCE, read).await.context("the process said nothing")??;
    Ok(line.trim().to_owned())
}

pub fn odd(program: &Path, arguments: &[&str]) -> Command {
    let mut command = Command::new(program);
    command.args(arguments);
    command
}

pub fn path_text(path: &Path) -> Result<&str> {
    path.to_str().context("not UTF-8")
}

/// Not served: refused as somebody else, as nobody, or by a closed connection.
fn is_refused(answer: &str) -> bool {
    ["code=7 ", "code=14 ", "code=16 "].iter().any(|code| answer.starts_with(code))
}

#[tokio::test(flavor = "multi_thread")]
async fn h_70_a_connection_outlives_its_process_without_an_identity() -> Result<()> {
    let house = open_house().await?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let socket = house.agent.socket();
    assert_eq!(run(odd(&program, &["ask", path_text(&socket)?])).await?, format!("id={}", super::A));
    for _ in 0..20 {
        let answer = run(odd(&program, &["leave", path_text(&socket)?])).await?;
        assert!(is_refused(&answer), "{answer}");
    }
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_70_a_process_that_exits_right_after_connect_harms_nobody() -> Result<()> {
    let house = open_house().await?;
    for _ in 0..300 {
        // Connects and is gone before a byte was said.
        drop(tokio::net::UnixStream::connect(house.agent.socket()).await?);
    }
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_70_a_passed_connection_stays_with_the_process_that_connected() -> Result<()> {
    let house = open_house().await?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let receiver = house.folder.path().join("receiver.sock");
    let (socket, receiver) = (house.agent.socket(), path_text(&receiver)?.to_owned());

    let mut taker = start(odd(&program, &["take", &receiver, "--later"]))?;
    wait::until("the receiver", super::PATIENCE, async || Path::new(&receiver).exists().then_some(())).await?;
    let passed = odd(&program, &["pass", path_text(&socket)?, &receiver, "--exit"]).status().await?;
    ensure!(passed.success(), "passing failed");
    let answer = said(&mut taker).await?;
    assert!(is_refused(&answer), "{answer}");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_h_70_whoever_takes_a_connection_gets_no_identity_of_its_own_by_it() -> Result<()> {
    let house = open_house().await?;
    house.register("/stranger", &format!("unix:uid:{STRANGER}"))?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let socket = house.agent.socket();
    let mut ask = odd(&program, &["ask", path_text(&socket)?]);
    ask.uid(STRANGER).gid(STRANGER);
    assert_eq!(run(ask).await?, "id=spiffe://example.org/stranger");

    // The stranger connects and goes on living; we take its connection and ask.
    let receiver = house.folder.path().join("receiver.sock");
    let receiver = path_text(&receiver)?;
    let mut taker = start(odd(&program, &["take", receiver]))?;
    wait::until("the receiver", super::PATIENCE, async || Path::new(receiver).exists().then_some(())).await?;
    std::fs::set_permissions(receiver, std::fs::Permissions::from_mode(0o777))?;
    let mut pass = odd(&program, &["pass", path_text(&socket)?, receiver]);
    pass.uid(STRANGER).gid(STRANGER);
    let _passing = start(pass)?;
    // It is the stranger's connection, whoever speaks over it.
    assert_eq!(said(&mut taker).await?, "id=spiffe://example.org/stranger");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_a_child_gets_nothing_once_its_parent_runs_a_setuid_program() -> Result<()> {
    let house = open_house().await?;
    house.register("/stranger", &format!("unix:uid:{STRANGER}"))?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let setuid = odd_process(house.folder.path(), 0o4755)?;
    let socket = house.agent.socket();
    for _ in 0..10 {
        let mut become_root = odd(&program, &["become", path_text(&socket)?, path_text(&setuid)?]);
        become_root.uid(STRANGER).gid(STRANGER);
        let mut parent = start(become_root)?;
        let answer = said(&mut parent).await?;
        assert!(is_refused(&answer), "{answer}");
        let id = parent.id().context("the parent has ended")?;
        let status = std::fs::read_to_string(format!("/proc/{id}/status"))?;
        let users = status.lines().find(|line| line.starts_with("Uid:")).context("no user")?;
        ensure!(users.split_whitespace().nth(2) == Some("0"), "setuid does not work here: {users}");
    }
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_child_gets_nothing_once_its_parent_runs_another_program() -> Result<()> {
    let house = open_house().await?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let other = odd_process(house.folder.path(), 0o711)?;
    let socket = house.agent.socket();
    for _ in 0..10 {
        let mut parent = start(odd(&program, &["become", path_text(&socket)?, path_text(&other)?]))?;
        let answer = said(&mut parent).await?;
        // Where the agent pinned the connection only after the change, the caller is honestly the other program.
        assert!(is_refused(&answer) || answer == format!("id={}", super::A), "{answer}");
    }
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_h_70_a_process_in_an_inner_namespace_is_seen() -> Result<()> {
    let house = open_house().await?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let mut inner = Command::new("unshare");
    inner.args(["--pid", "--fork", "--mount-proc"]).arg(&program).arg("ask").arg(house.agent.socket());
    assert_eq!(run(inner).await?, format!("id={}", super::A));
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_h_70_a_process_that_cannot_be_seen_gets_nothing() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let signet = Binaries::signet()?;
    // An agent in a process namespace of its own sees no process of ours.
    let script = folder.path().join("hidden-agent");
    let agent = path_text(&signet.agent)?;
    // Unless the agent itself is the first process there, killing the script would leave it behind.
    let text = format!("#!/bin/sh\nexec unshare --pid --fork --kill-child --mount-proc {agent} \"$@\"\n");
    std::fs::write(&script, text)?;
    std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755))?;
    let house = House::new().await?;
    let hidden = Binaries::of(signet.kind, signet.server, script)?;
    let token = Some(house.server.token(Some("spiffe://example.org/hidden"))?);
    let options = e2e::testkit::AgentOptions { join_token: token, ..Default::default() };
    let mut hidden = e2e::testkit::Agent::prepare(&hidden, &folder.path().join("agent"), &house.server, &options)?;
    hidden.start_without_waiting()?;
    wait::until("the socket", super::PATIENCE, async || hidden.socket().exists().then_some(())).await?;
    let program = odd_process(folder.path(), 0o755)?;
    for _ in 0..5 {
        let answer = run(odd(&program, &["ask", path_text(&hidden.socket())?])).await?;
        assert!(is_refused(&answer), "{answer}");
    }
    let log = std::fs::read_to_string(hidden.log())?;
    ensure!(log.contains("Refused a local connection"), "nothing about it in the log:\n{log}");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn as_root_a_path_of_another_mount_namespace_is_not_believed() -> Result<()> {
    let house = House::with(Binaries::signet()?, "", "discover_workload_path = true").await?;
    let program = odd_process(house.folder.path(), 0o755)?;
    let victim = house.folder.path().join("victim");
    std::fs::copy(&program, &victim)?;
    house.register("/victim", &format!("unix:path:{}", victim.display()))?;
    let socket = house.agent.socket();
    let both = format!("id={},spiffe://example.org/victim", super::A);
    wait::until("the victim's identity", super::PATIENCE, async || {
        run(odd(&victim, &["ask", path_text(&socket).ok()?]))
            .await
            .ok()
            .filter(|answer| sorted(answer) == sorted(&both))
    })
    .await?;
    // Elsewhere, another program stands at the victim's path.
    let mut inner = Command::new("unshare");
    let script = "mount --bind \"$1\" \"$2\" && exec \"$2\" ask \"$3\"";
    inner.args(["--mount", "sh", "-c", script, "sh"]).arg(&program).arg(&victim).arg(&socket);
    assert_eq!(run(inner).await?, format!("id={}", super::A));
    house.still_served().await
}

fn sorted(answer: &str) -> Vec<&str> {
    let mut ids: Vec<&str> = answer.trim_start_matches("id=").split(',').collect();
    ids.sort_unstable();
    ids
}
