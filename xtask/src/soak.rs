//! `cargo xtask soak`: fast rotation under continuous mutual TLS, and many kills.

use std::process::Command;

use anyhow::Result;
use clap::{Args, Subcommand};

use crate::command::{cargo, program, succeed, target};

/// Which run, and how long.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  cargo xtask soak\n  cargo xtask soak handshakes --minutes 2 --restarts\n  cargo xtask soak kills"
)]
pub struct Options {
    #[command(subcommand)]
    kind: Option<Kind>,
}

#[derive(Subcommand)]
enum Kind {
    /// Pairs do mutual TLS without pause while CAs (2 min) and SVIDs (20 s) rotate; not one handshake may fail.
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
    /// kill -9 of the server at random moments; what was acknowledged must be there, nothing half there.
    Kills {
        /// How many.
        #[arg(long, default_value_t = 50)]
        kills: usize,
    },
}

pub fn run(options: &Options) -> Result<()> {
    let mut soak = soak()?;
    match &options.kind {
        None => soak.arg("handshakes"),
        Some(Kind::Handshakes { minutes, pairs, restarts }) => {
            soak.args(["handshakes".into(), format!("--minutes={minutes}"), format!("--pairs={pairs}")]);
            soak.args(restarts.then_some("--restarts"))
        }
        Some(Kind::Kills { kills }) => soak.args(["kills".into(), format!("--kills={kills}")]),
    };
    succeed(&mut soak)
}

/// The program of the long runs, on optimised builds of server and agent.
pub fn soak() -> Result<Command> {
    let packages = ["-p", "signet-server", "-p", "signet-agent", "-p", "e2e"];
    succeed(cargo().args(["build", "--bins", "--profile", "ci"]).args(packages))?;
    let folder = target().join("ci");
    let mut soak = program(folder.join("signet-soak"));
    soak.arg("--binaries").arg(&folder);
    Ok(soak)
}
