//! `cargo xtask demo`: the whole product on one machine, with nothing prepared.

mod stage;

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use stage::{Stage, Workload};

/// Lifetime of the workloads' SVIDs in the demo, so that a rotation can be watched.
const SVID_LIFETIME: &str = "20s";
/// How long the demo waits for anything before it says what did not happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Shows a server, an agent, two workloads, a call between them, a refusal and a rotation.
///
/// With `once` everything is stopped and removed at the end; otherwise it goes on until interrupted.
///
/// # Errors
/// Says in one line what is missing or what did not happen.
pub fn run(once: bool) -> Result<()> {
    stage::tools()?;
    say("Building (the first time takes a few minutes) …");
    let binaries = stage::build()?;
    let mut stage = Stage::new(&binaries)?;
    say(&format!("Everything happens in {}", stage.folder().display()));

    step("A server: the authority of trust domain example.org, with sled as its store");
    stage.start_server(SVID_LIFETIME)?;
    step("An agent on this node, attested by a join token that can be used once");
    stage.start_agent()?;

    let (payments, shop, stranger) = callers(&stage)?;
    step("Two workloads, registered by what the kernel says about them:");
    for workload in [&payments, &shop] {
        stage.register(workload)?;
        say(&format!("      {}  ⇐  {}", workload.id, workload.selector));
    }

    step("Each fetches its identity from the agent's socket, without any secret to begin with:");
    let address = stage.listen(&payments)?;
    stage.call(&shop, &address, &payments.id)?;
    let mut serials = Vec::new();
    for workload in [&payments, &shop] {
        let event = stage.event(workload, "svid", PATIENCE)?;
        say(&format!(
            "      {}\n        serial {}, valid until {}",
            text(&event, "id")?,
            text(&event, "serial")?,
            text(&event, "not_after")?
        ));
        serials.push(text(&event, "serial")?.to_owned());
    }

    step("They call each other by mutual TLS, each checking the other's SPIFFE ID:");
    let event = stage.event(&shop, "answer", PATIENCE)?;
    say(&format!("      shop asked {}, which saw its caller as {}", text(&event, "peer")?, text(&event, "seen_as")?));
    ensure!(
        text(&event, "peer")? == payments.id && text(&event, "seen_as")? == shop.id,
        "the peers saw the wrong ids: {event}"
    );

    step("A third process, registered nowhere, asks the same socket:");
    let refusal = stage.refused(&stranger)?;
    say(&format!("      {refusal}"));

    step(&format!("SVIDs live {SVID_LIFETIME} here; both workloads see a rotation while one connection stays open …"));
    for (workload, serial) in [&payments, &shop].into_iter().zip(&serials) {
        let event = stage.event_where(workload, "svid", PATIENCE, |event| {
            event["serial"].as_str().is_some_and(|new| new != serial)
        })?;
        say(&format!("      {}: serial {} replaced it", workload.name, text(&event, "serial")?));
    }
    let before = stage.last(&shop, "answer").context("no answers yet")?;
    let after =
        stage.event_where(&shop, "answer", PATIENCE, |event| event["count"].as_u64() > before["count"].as_u64())?;
    ensure!(stage.last(&shop, "dropped").is_none(), "the open connection was dropped");
    ensure!(stage.last(&shop, "failed").is_none(), "a call failed: {:?}", stage.last(&shop, "failed"));
    say(&format!("      {} calls on the connection opened at the start, none failed, never dropped", after["count"]));

    if once {
        say("\nAll of it worked. Without --once it stays running for you to look at.");
        return Ok(());
    }
    leave_running(&mut stage)
}

/// Two workloads and a stranger: of three Unix users when run as root, else of one user and told apart by their programs.
fn callers(stage: &Stage) -> Result<(Workload, Workload, Workload)> {
    let id = |name: &str| format!("spiffe://example.org/{name}");
    let of = |name: &'static str, uid: u32| -> Result<Workload> {
        let program = stage.program(name)?;
        let (uid, selector) = match stage::is_root() {
            true => (Some(uid), format!("unix:uid:{uid}")),
            false => (None, format!("unix:sha256:{}", stage.sha256(&program)?)),
        };
        Ok(Workload { name, id: id(name), program, uid, selector })
    };
    Ok((of("payments", 20_001)?, of("shop", 20_002)?, of("stranger", 20_003)?))
}

fn leave_running(stage: &mut Stage) -> Result<()> {
    let socket = stage.agent_socket();
    let admin = stage.server_socket();
    say(&format!(
        "\nAll of it is still running. Try, in another terminal:\n\n  \
         export SPIFFE_ENDPOINT_SOCKET=unix://{socket}\n  \
         {agent} api fetch x509 -socketPath {socket}\n  \
         {server} entry create -socketPath {admin} -parentID spiffe://example.org/node \\\n      \
         -spiffeID spiffe://example.org/me -selector unix:uid:$(id -u)\n  \
         {agent} api watch -socketPath {socket}\n\nCtrl-C stops it and removes the folder.",
        socket = socket.display(),
        admin = admin.display(),
        agent = stage.agent_program().display(),
        server = stage.server_program().display(),
    ));
    stage.until_interrupted()
}

fn text<'a>(event: &'a serde_json::Value, member: &str) -> Result<&'a str> {
    event[member].as_str().with_context(|| format!("{member} is missing in {event}"))
}

fn say(line: &str) {
    println!("{line}");
}

fn step(line: &str) {
    println!("\n  ● {line}");
}

/// A clear sentence for a program that ended too early.
fn ended(name: &str, log: &Path) -> anyhow::Error {
    let log = std::fs::read_to_string(log).unwrap_or_default();
    let tail: Vec<&str> = log.lines().rev().take(15).collect();
    anyhow::anyhow!("{name} ended; its last lines:\n{}", tail.into_iter().rev().collect::<Vec<_>>().join("\n"))
}

/// Refuses a result that is not a success, with what the program printed.
fn succeeded(what: &str, output: &std::process::Output) -> Result<String> {
    if !output.status.success() {
        bail!("{what} failed: {}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
