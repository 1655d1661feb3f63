//! `cargo xtask bench`: the load generator on release builds.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use crate::command::{cargo, program, succeed, target};

/// What to measure against, and what to hand through.
#[derive(Args)]
#[command(after_help = "Examples:\n  cargo xtask bench\n  cargo xtask bench -- --only issuance --rounds 1\n  \
    cargo xtask bench --peer-server spire/bin/spire-server --peer-agent spire/bin/spire-agent")]
pub struct Options {
    /// Another implementation's server; the same load runs against it in turns.
    #[arg(long, value_name = "BIN", requires = "peer_agent")]
    peer_server: Option<PathBuf>,
    /// Another implementation's agent.
    #[arg(long, value_name = "BIN", requires = "peer_server")]
    peer_agent: Option<PathBuf>,
    /// Build without link-time optimisation: figures of a working day, not of a release.
    #[arg(long)]
    quick: bool,
    /// Options of the load generator.
    #[arg(last = true, value_name = "OPTIONS")]
    rest: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    let profile = if options.quick { "ci" } else { "release" };
    let packages = ["-p", "signet-server", "-p", "signet-agent", "-p", "e2e"];
    succeed(cargo().args(["build", "--bins", "--profile", profile]).args(packages))?;
    let folder = target().join(profile);
    let mut bench = program(folder.join("signet-bench"));
    bench.arg("--binaries").arg(&folder);
    if let (Some(server), Some(agent)) = (&options.peer_server, &options.peer_agent) {
        // Relative paths are the caller's, not the checkout's.
        bench.arg("--peer-server").arg(std::path::absolute(server)?);
        bench.arg("--peer-agent").arg(std::path::absolute(agent)?);
    }
    succeed(bench.args(&options.rest))
}
