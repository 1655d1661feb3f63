//! The load generator: simulated agents and workloads over the real wire, ours and a peer's in turns, in one run.

mod connected;
mod hostile;
mod issuance;
mod load;
mod node;
mod push;
mod registry;
mod report;
mod stats;
mod workload;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use e2e::testkit::{Agent, AgentOptions, Binaries, Kind, Server, ServerOptions};
use report::{Limit, Report, Side};
use serde_json::json;
use tokio::time::Instant;

/// Measures issuance, entries, agents, workloads, propagation and footprint; CPU and memory are those of the process that serves.
#[derive(Parser)]
#[command(
    name = "bench",
    after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench --only issuance --rounds 1\n  \
    cargo xtask bench --peer-server PATH/spire-server --peer-agent PATH/spire-agent"
)]
struct Arguments {
    /// Folder with signet-server and signet-agent; without it only the peer is measured.
    #[arg(long, required_unless_present = "peer_server")]
    binaries: Option<PathBuf>,
    /// Another implementation's server, measured in turns with ours.
    #[arg(long, requires = "peer_agent")]
    peer_server: Option<PathBuf>,
    /// Another implementation's agent.
    #[arg(long, requires = "peer_server")]
    peer_agent: Option<PathBuf>,
    /// Rounds; the table shows medians.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Seconds of each load.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// Entries for the store measurements.
    #[arg(long, default_value_t = 100_000)]
    entries: usize,
    /// Open Workload API streams.
    #[arg(long, default_value_t = 5_000)]
    streams: usize,
    /// Connected simulated agents.
    #[arg(long, default_value_t = 1_000)]
    agents: usize,
    /// Changes of each kind for the propagation of ours (a peer that polls gets 5).
    #[arg(long, default_value_t = 200)]
    changes: usize,
    /// Only these parts.
    #[arg(long, value_enum)]
    only: Vec<Part>,
    /// Where the JSON goes.
    #[arg(long, default_value = "target/bench/latest.json")]
    json: PathBuf,
}

/// What can be measured on its own.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// X.509-SVIDs, JWT-SVIDs, attestations.
    Issuance,
    /// Entries: creation, memory, idling, syncs, restart.
    Entries,
    /// What a poll costs, with few entries in the store and with many.
    Polls,
    /// What a change costs that is pushed.
    Push,
    /// Memory of the server for each connected agent.
    Agents,
    /// Workload API: first answers, cached tokens, open streams.
    Workload,
    /// From a changed entry to an open stream, and from a ban to the end of one.
    Propagation,
    /// Sizes, idle memory, start.
    Footprint,
    /// What it costs to refuse hostile certificates, tokens and names.
    Hostile,
}

const LIMITS_OFF: &str = "  ratelimit { attestation = false signing = false }\n  log_level = \"WARN\"";

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?.1;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit, limit)?;
    tokio::runtime::Builder::new_multi_thread().enable_all().build()?.block_on(measure(&arguments))
}

async fn measure(arguments: &Arguments) -> Result<()> {
    let mut sides = Vec::new();
    if let Some(folder) = &arguments.binaries {
        sides.push((Side::Ours, Binaries::signet_in(folder)?));
    }
    if let (Some(server), Some(agent)) = (&arguments.peer_server, &arguments.peer_agent) {
        sides.push((Side::Peer, Binaries::of(Kind::Spire, server.clone(), agent.clone())?));
    }
    let mut report = Report::default();
    let mut floors = Vec::new();
    for round in 1..=arguments.rounds {
        let floor = stats::floor()?;
        floors.push(floor.as_secs_f64() * 1e6);
        eprintln!(
            "round {round} of {}; one CSR check and one signature cost {:.1} µs here",
            arguments.rounds,
            floor.as_secs_f64() * 1e6
        );
        for (side, binaries) in &sides {
            one_round(arguments, *side, binaries, &mut report).await?;
        }
    }
    let floor = stats::median(&floors);
    println!("{}", report.table(floor));
    println!(
        "floor: one check + one signature {floor:.1} µs of CPU (median); limits per core were set where it is 53 µs"
    );
    println!(
        "conditions: {} rounds, {} s a load, 127.0.0.1, rate limits off, EC P-256, {} cores",
        arguments.rounds,
        arguments.seconds,
        cores()
    );
    let conditions = json!({"rounds": arguments.rounds, "seconds": arguments.seconds, "cores": cores(), "floor_us": floors,
        "peer": arguments.peer_server.is_some()});
    report.write(&arguments.json, floor, &conditions)?;
    println!("written to {}", arguments.json.display());
    Ok(())
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

fn wanted(arguments: &Arguments, part: Part) -> bool {
    arguments.only.is_empty() || arguments.only.contains(&part)
}

async fn one_round(arguments: &Arguments, side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    if wanted(arguments, Part::Footprint) {
        footprint(side, binaries, report).await.context("footprint")?;
    }
    if wanted(arguments, Part::Issuance) {
        issuance(arguments, side, binaries, report).await.context("issuance")?;
    }
    if wanted(arguments, Part::Entries) {
        entries(arguments, side, binaries, report).await.context("entries")?;
    }
    if wanted(arguments, Part::Polls) {
        polls(arguments, side, binaries, report).await.context("polls")?;
    }
    // A peer's agents poll.
    if wanted(arguments, Part::Push) && binaries.kind == Kind::Signet {
        pushes(arguments, side, binaries, report).await.context("push")?;
    }
    if wanted(arguments, Part::Agents) {
        agents(arguments, side, binaries, report).await.context("agents")?;
    }
    if wanted(arguments, Part::Workload) || wanted(arguments, Part::Propagation) {
        workloads(arguments, side, binaries, report).await.context("workloads")?;
    }
    if wanted(arguments, Part::Hostile) && binaries.kind == Kind::Signet {
        hostile_inputs(side, report).context("hostile inputs")?;
    }
    // A peer without push streams has none to end.
    if wanted(arguments, Part::Propagation) && binaries.kind == Kind::Signet {
        bans(side, binaries, report).await.context("bans")?;
    }
    Ok(())
}

/// These are checked by a library that both programs share, in this process.
fn hostile_inputs(side: Side, report: &mut Report) -> Result<()> {
    use Limit::{AtMost, None};
    let ms = |cost: &hostile::Cost| cost.cpu.as_secs_f64() * 1e3;
    report.add(side, "H-11: SPIFFE ID of 1 MiB refused", "cpu-ms", AtMost(50.0), None, ms(&hostile::ids()?));
    let chains = hostile::chains()?;
    report.add(side, "H-27: endless certificate chains refused", "cpu-ms", AtMost(100.0), None, ms(&chains));
    let growth = chains.growth as f64 / 1024.0;
    report.add(side, "H-27: growth of memory", "MiB", AtMost(32.0), None, growth);
    let audiences = hostile::audiences()?;
    report.add(side, "H-38: token for 10,000 audiences", "cpu-ms", AtMost(50.0), None, ms(&audiences));
    Ok(())
}

fn options() -> ServerOptions {
    ServerOptions { server_block: LIMITS_OFF.into(), ..ServerOptions::default() }
}

async fn footprint(side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{AtMost, None};
    let mib = |path: &std::path::Path| -> Result<f64> { Ok(std::fs::metadata(path)?.len() as f64 / 1048576.0) };
    report.add(side, "binary of the server", "MiB", AtMost(25.0), None, mib(&binaries.server)?);
    report.add(side, "binary of the agent", "MiB", AtMost(25.0), None, mib(&binaries.agent)?);
    let folder = tempfile::tempdir()?;
    let begin = Instant::now();
    let mut server = Server::start(binaries, folder.path(), &options()).await?;
    report.add(side, "server: exec to ready, first start", "s", AtMost(0.1), None, begin.elapsed().as_secs_f64());
    let token = server.token(Option::None)?;
    let settings = AgentOptions { join_token: Some(token), ..AgentOptions::default() };
    let agent = Agent::start(binaries, &folder.path().join("agent"), &server, &settings).await?;
    server.signal(nix::sys::signal::Signal::SIGTERM).await?;
    let begin = Instant::now();
    server.start_again().await?;
    report.add(side, "server: exec to ready, restart", "s", AtMost(0.1), None, begin.elapsed().as_secs_f64());
    tokio::time::sleep(Duration::from_secs(3)).await;
    report.add(
        side,
        "server: idle RSS",
        "MiB",
        AtMost(25.0),
        AtMost(15.0),
        stats::memory(server.pid()?, "VmRSS")? as f64 / 1024.0,
    );
    report.add(
        side,
        "agent: idle RSS",
        "MiB",
        AtMost(15.0),
        AtMost(10.0),
        stats::memory(agent.pid()?, "VmRSS")? as f64 / 1024.0,
    );
    Ok(())
}

async fn issuance(arguments: &Arguments, side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{CpuAtMost, None, PerCore};
    let time = Duration::from_secs(arguments.seconds);
    let folder = tempfile::tempdir()?;
    let server = Server::start(binaries, folder.path(), &options()).await?;
    let bench = issuance::Bench::new(&server, 32).await?;
    for (batch, callers, must, aim) in [
        (50, 32, PerCore { value: 12_500.0, times: 3.0 }, PerCore { value: 15_000.0, times: 3.7 }),
        (50, 8, None, None),
        (10, 8, None, None),
        (1, 32, PerCore { value: 7_200.0, times: 3.5 }, PerCore { value: 12_000.0, times: 6.0 }),
        (1, 1, None, None),
    ] {
        let done = bench.x509(batch, callers, time).await?;
        let name = format!("X.509-SVIDs, {batch} a call, {callers} callers");
        report.add(side, &name, "per core-s", must, aim, done.per_core_second());
        report.add(side, &format!("{name}: rate"), "/s", None, None, done.rate());
    }
    let done = bench.jwt(32, time).await?;
    report.add(
        side,
        "JWT-SVIDs, 32 callers",
        "per core-s",
        PerCore { value: 12_800.0, times: 4.5 },
        PerCore { value: 23_000.0, times: 8.0 },
        done.per_core_second(),
    );
    report.add(side, "JWT-SVIDs, 32 callers: rate", "/s", None, None, done.rate());
    let done = bench.attestation(8, time).await?;
    report.add(side, "join token made and used, 8 callers", "cpu-ms", CpuAtMost(1.0), CpuAtMost(0.5), done.cpu_ms());
    report.add(side, "join token made and used, 8 callers: rate", "/s", None, None, done.rate());
    report.add(
        side,
        "server: peak RSS of issuance",
        "MiB",
        None,
        None,
        stats::memory(server.pid()?, "VmHWM")? as f64 / 1024.0,
    );
    Ok(())
}

async fn entries(arguments: &Arguments, side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{AtLeast, AtMost, CpuAtMost, None};
    let time = Duration::from_secs(arguments.seconds);
    let folder = tempfile::tempdir()?;
    let mut server = Server::start(binaries, folder.path(), &options()).await?;
    let bench =
        node::nodes(SocketAddr::from(([127, 0, 0, 1], server.port)), &server.socket(), 1, &node::id("/bench")).await?;
    let mut done = registry::create(&server, 0..arguments.entries).await?;
    let many = format!("{} entries", arguments.entries);
    report.add(side, "entries created, 50 a call", "cpu-ms each", CpuAtMost(0.12), CpuAtMost(0.05), done.cpu_ms());
    report.add(side, "entries created, 50 a call: rate", "/s", AtLeast(5_000.0), AtLeast(20_000.0), done.rate());
    report.add(
        side,
        "entries created, 50 a call: p99 of a call",
        "ms",
        None,
        None,
        stats::percentile(&mut done.calls, 0.99).as_secs_f64() * 1e3,
    );
    tokio::time::sleep(Duration::from_secs(2)).await;
    report.add(
        side,
        &format!("server RSS with {many}"),
        "MiB",
        AtMost(170.0),
        AtMost(120.0),
        stats::memory(server.pid()?, "VmRSS")? as f64 / 1024.0,
    );
    let cores = registry::idle(server.pid()?, Duration::from_secs(15)).await?;
    report.add(side, &format!("idle with {many}"), "cores", AtMost(0.005), None, cores);
    let admin = e2e::testkit::unix(&server.socket()).await?;
    node::create(&admin, (0..100).map(|n| node::entry("/bench", &format!("/mine/{n}"), &format!("uid:{n}"))).collect())
        .await?;
    let first = bench.first().context("no node")?;
    node::authorized(first, 100).await?;
    let mut done = registry::sync(server.pid()?, first, time).await?;
    report.add(side, "sync of 100 entries", "cpu-ms", None, None, done.cpu_ms());
    report.add(
        side,
        "sync of 100 entries: p50",
        "ms",
        None,
        None,
        stats::percentile(&mut done.calls, 0.5).as_secs_f64() * 1e3,
    );
    let mut admin = spiffe_proto::agent::agent_client::AgentClient::new(admin);
    let token = node::token(&mut admin, Option::None).await?;
    let presented = node::attest(SocketAddr::from(([127, 0, 0, 1], server.port)), 77, token).await?;
    let restart = registry::restart(&mut server, &presented).await?;
    report.add(side, &format!("restart to first sync with {many}"), "s", AtMost(1.0), None, restart.as_secs_f64());
    report.add(
        side,
        &format!("server RSS with {many}, after restart"),
        "MiB",
        AtMost(170.0),
        AtMost(120.0),
        stats::memory(server.pid()?, "VmRSS")? as f64 / 1024.0,
    );
    Ok(())
}

/// Nodes that may have 10, 100 and 1,000 entries poll: beside a tenth of the other entries, and beside all of them.
async fn polls(arguments: &Arguments, side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{AtMost, None, OfPeer};
    let time = Duration::from_secs(arguments.seconds);
    let folder = tempfile::tempdir()?;
    let server = Server::start(binaries, folder.path(), &options()).await?;
    let (pid, address) = (server.pid()?, SocketAddr::from(([127, 0, 0, 1], server.port)));
    let admin = e2e::testkit::unix(&server.socket()).await?;
    let mut nodes = Vec::new();
    for count in [10, 100, 1000] {
        let alias = format!("/bench/{count}");
        let node = node::nodes(address, &server.socket(), 1, &node::id(&alias)).await?.pop().context("no node")?;
        let mine = |n: usize| node::entry(&alias, &format!("/of/{count}/{n}"), &format!("uid:{n}"));
        for first in (0..count).step_by(50) {
            node::create(&admin, (first..count.min(first + 50)).map(mine).collect()).await?;
        }
        // The name that came with the token is an entry of its own.
        nodes.push((count, count + 1, node));
    }
    let mut few = std::collections::BTreeMap::new();
    let mut there = 0;
    for store in [arguments.entries / 10, arguments.entries] {
        registry::create(&server, there..store).await?;
        there = store;
        for (count, all, node) in &nodes {
            node::authorized(node, *all).await?;
            for (name, poll) in [("GetAuthorizedEntries", registry::Poll::Get), ("full sync", registry::Poll::Sync)] {
                let done = registry::poll(pid, node, *all, poll, time).await?;
                let what = format!("{name}, {count} entries");
                report.add(side, &format!("{what}, store of {store}"), "cpu-ms", None, OfPeer(0.6), done.cpu_ms());
                match few.insert(what.clone(), done.cpu_ms()) {
                    Option::None => {}
                    Some(before) => {
                        let growth = done.cpu_ms() / before;
                        report.add(side, &format!("{what}: ten times the store"), "times", None, AtMost(1.2), growth);
                    }
                }
            }
        }
    }
    Ok(())
}

/// One entry after another, each told at once: to one agent of few entries and of many, to many agents, and in an agent.
async fn pushes(arguments: &Arguments, side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{AtMost, CpuAtMost, None};
    const CHANGES: usize = 200;
    let folder = tempfile::tempdir()?;
    let server = Server::start(binaries, &folder.path().join("one"), &options()).await?;
    push::fill(&server, 0, 1000).await?;
    let one = push::Followers::connect(&server, 1).await?;
    let few = push::changes(&server, &one, 1000, CHANGES).await?;
    report.add(side, "push: an entry to an agent of 1,000", "cpu-ms", None, None, few);
    let held = 20_000.min(arguments.entries / 5);
    push::fill(&server, 1000 + CHANGES, held).await?;
    registry::create(&server, held..arguments.entries).await?;
    let many = push::changes(&server, &one, held, CHANGES).await?;
    let what = format!("push: an entry to an agent of {held}, store of {}", arguments.entries);
    report.add(side, &what, "cpu-ms", None, CpuAtMost(0.3), many);
    report.add(side, "push: the same, to that of 1,000", "times", None, AtMost(1.5), many / few);
    drop((one, server));

    let server = Server::start(binaries, &folder.path().join("crowd"), &options()).await?;
    push::fill(&server, 0, 1000).await?;
    let crowd = push::Followers::connect(&server, arguments.agents).await?;
    let each = push::changes(&server, &crowd, 1000, 20).await? * 1e3 / arguments.agents as f64;
    let what = format!("push: an entry to each of {} agents of 1,000", arguments.agents);
    report.add(side, &what, "cpu-us", None, CpuAtMost(80.0), each);
    drop((crowd, server));

    let server = Server::start(binaries, &folder.path().join("agent"), &options()).await?;
    let applied = push::applied(&server, binaries, &folder.path().join("applying"), held, CHANGES).await?;
    report.add(side, &format!("push: an entry in an agent of {held}"), "cpu-ms", None, CpuAtMost(1.5), applied);
    Ok(())
}

async fn agents(arguments: &Arguments, side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{AtMost, None};
    let folder = tempfile::tempdir()?;
    let server = Server::start(binaries, folder.path(), &options()).await?;
    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    node::create(
        &e2e::testkit::unix(&server.socket()).await?,
        (0..10).map(|n| node::entry("/bench", &format!("/ten/{n}"), &format!("uid:{n}"))).collect(),
    )
    .await?;
    let pid = server.pid()?;
    let before = stats::memory(pid, "VmRSS")?;
    let nodes = node::nodes(address, &server.socket(), arguments.agents, &node::id("/bench")).await?;
    let mut open = Vec::new();
    for node in &nodes {
        match binaries.kind {
            Kind::Signet => open.push(connected::Stream::open(node).await?),
            Kind::Spire => connected::poll(node).await?,
        }
    }
    let after = stats::memory(pid, "VmRSS")?;
    let each = after.saturating_sub(before) as f64 / nodes.len() as f64;
    report.add(
        side,
        &format!("server memory for each of {} agents", nodes.len()),
        "KiB",
        AtMost(60.0),
        AtMost(50.0),
        each,
    );
    report.add(
        side,
        &format!("idle with {} agents connected", nodes.len()),
        "cores",
        None,
        None,
        registry::idle(pid, Duration::from_secs(10)).await?,
    );
    Ok(())
}

async fn workloads(arguments: &Arguments, side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{AtMost, CpuAtMost, None};
    let time = Duration::from_secs(arguments.seconds);
    let folder = tempfile::tempdir()?;
    let server = Server::start(binaries, folder.path(), &options()).await?;
    let uid = nix::unistd::getuid().as_raw();
    workload::register(&server, uid).await?;
    let settings = AgentOptions {
        join_token: Some(server.token(Some("spiffe://example.org/node"))?),
        agent_block: "  log_level = \"WARN\"".into(),
        ..AgentOptions::default()
    };
    let agent = Agent::start(binaries, &folder.path().join("agent"), &server, &settings).await?;
    let (pid, socket) = (agent.pid()?, agent.socket());
    e2e::testkit::wait::until("the first SVID", Duration::from_secs(30), async || {
        workload::streams(pid, &socket, 1).await.ok()
    })
    .await?;
    if wanted(arguments, Part::Workload) {
        // First, while the agent is fresh: memory that earlier loads left behind would hide what streams need.
        let each = workload::streams(pid, &socket, arguments.streams).await?;
        report.add(
            side,
            &format!("agent memory for each of {} streams", arguments.streams),
            "KiB",
            AtMost(48.0),
            AtMost(40.0),
            each,
        );
        for callers in [1, 16] {
            let (must, aim) = if callers == 16 { (CpuAtMost(0.20), CpuAtMost(0.12)) } else { (None, None) };
            let done = workload::connect(pid, socket.clone(), callers, time).await?;
            report.add(
                side,
                &format!("connection + first X.509-SVID, {callers} callers"),
                "agent cpu-ms",
                must,
                aim,
                done.cpu_ms(),
            );
            report.add(
                side,
                &format!("connection + first X.509-SVID, {callers} callers: rate"),
                "/s",
                None,
                None,
                done.rate(),
            );
        }
        let done = workload::jwt(pid, socket.clone(), 16, time).await?;
        report.add(
            side,
            "JWT-SVID from the cache, 16 callers",
            "agent cpu-ms",
            CpuAtMost(0.10),
            CpuAtMost(0.05),
            done.cpu_ms(),
        );
    }
    if wanted(arguments, Part::Propagation) {
        let count = if binaries.kind == Kind::Signet { arguments.changes } else { 5 };
        let times = workload::propagation(&server, &socket, uid, count).await?;
        for (name, mut times) in [("new", times.created), ("changed", times.changed), ("deleted", times.deleted)] {
            let slow = times.iter().filter(|time| **time > Duration::from_millis(50)).count();
            report.add(
                side,
                &format!("{name} entry to open stream: p50"),
                "ms",
                None,
                None,
                stats::percentile(&mut times, 0.5).as_secs_f64() * 1e3,
            );
            report.add(
                side,
                &format!("{name} entry to open stream: worst"),
                "ms",
                None,
                None,
                stats::percentile(&mut times, 1.0).as_secs_f64() * 1e3,
            );
            if binaries.kind == Kind::Signet {
                report.add(
                    side,
                    &format!("{name} entry to open stream: above 50 ms of {count}"),
                    "changes",
                    AtMost(2.0),
                    None,
                    slow as f64,
                );
            }
        }
    }
    Ok(())
}

/// How many connected agents are banned.
const BANS: usize = 50;

async fn bans(side: Side, binaries: &Binaries, report: &mut Report) -> Result<()> {
    use Limit::{AtMost, None};
    let folder = tempfile::tempdir()?;
    let server = Server::start(binaries, folder.path(), &options()).await?;
    let mut times = connected::bans(&server, BANS).await?;
    let slow = times.iter().filter(|time| **time > Duration::from_millis(50)).count();
    for (name, share) in [("p50", 0.5), ("worst", 1.0)] {
        let value = stats::percentile(&mut times, share).as_secs_f64() * 1e3;
        report.add(side, &format!("ban to end of the push stream: {name}"), "ms", None, None, value);
    }
    report.add(
        side,
        &format!("ban to end of the push stream: above 50 ms of {BANS}"),
        "bans",
        AtMost(0.0),
        None,
        slow as f64,
    );
    Ok(())
}
