//! The long forms of the endurance tests: minutes of mutual TLS over rotating CAs, and many kills.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Result, ensure};
use clap::{Parser, Subcommand};
use e2e::testkit::Binaries;
use e2e::{crash, peers, soak};

/// Endurance runs that take minutes.
#[derive(Parser)]
#[command(name = "soak")]
struct Arguments {
    /// Folder with signet-server and signet-agent.
    #[arg(long)]
    binaries: PathBuf,
    #[command(subcommand)]
    run: Run,
}

#[derive(Subcommand)]
enum Run {
    /// Pairs that do mutual TLS without pause while CAs (2 min) and SVIDs (20 s) rotate.
    Handshakes {
        /// How long.
        #[arg(long, default_value_t = 10)]
        minutes: u64,
        /// Client and server pairs.
        #[arg(long, default_value_t = 50)]
        pairs: usize,
        /// Restart the server after a third of the time, the agent after two thirds.
        #[arg(long)]
        restarts: bool,
    },
    /// Our server with SPIRE's agent and the reverse, by join token and x509pop.
    Peers {
        /// Folder with spire-server and spire-agent.
        #[arg(long)]
        spire: PathBuf,
    },
    /// kill -9 of the server at random moments under entry creation and attestation.
    Kills {
        /// How many.
        #[arg(long, default_value_t = 50)]
        kills: usize,
    },
}

#[tokio::main]
async fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE)?.1;
    nix::sys::resource::setrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE, limit, limit)?;
    let binaries = Binaries::signet_in(&arguments.binaries)?;
    let folder = tempfile::tempdir()?;
    match arguments.run {
        Run::Handshakes { minutes, pairs, restarts } => {
            let duration = Duration::from_secs(minutes * 60);
            println!("{pairs} pairs for {minutes} min, CAs live 2 min, SVIDs 20 s, restarts: {restarts} …");
            let plan = soak::Plan { duration, pairs, ca_ttl: "2m", svid_ttl: "20s", restarts };
            let outcome = soak::run(&binaries, folder.path(), &plan).await?;
            println!(
                "{} handshakes, {} failed, {} CAs, {} SVIDs",
                outcome.handshakes,
                outcome.failures.len(),
                outcome.authorities,
                outcome.svids
            );
            for failure in outcome.failures.iter().take(20) {
                println!("  {failure}");
            }
            ensure!(outcome.failures.is_empty(), "{} handshakes failed", outcome.failures.len());
        }
        Run::Peers { spire } => {
            let spire = Binaries::spire_in(&spire)?;
            for (number, (server, agent, attestation)) in peers::pairings(&binaries, &spire).into_iter().enumerate() {
                println!("{} server, {} agent, {attestation:?}:", peers::name(server.kind), peers::name(agent.kind));
                let folder = folder.path().join(number.to_string());
                peers::run(server, agent, attestation, &folder, &mut |step| println!("  ✓ {step}")).await?;
            }
        }
        Run::Kills { kills } => {
            println!("{kills} kills at random moments …");
            let outcome = crash::run(&binaries, folder.path(), kills, Duration::from_millis(600)).await?;
            println!(
                "{} acknowledged entries and {} attested agents, all there, none half there",
                outcome.entries, outcome.agents
            );
        }
    }
    Ok(())
}
