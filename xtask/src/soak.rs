//! `cargo xtask soak`: fast rotation under continuous mutual TLS.

use anyhow::Result;
use clap::Args;

use crate::command::{cargo, program, succeed, target};

/// What follows `--` goes to the soak program.
#[derive(Args)]
#[command(after_help = "Examples:\n  cargo xtask soak\n  cargo xtask soak -- --help")]
pub struct Options {
    /// Options of the soak program.
    #[arg(last = true, value_name = "OPTIONS")]
    rest: Vec<String>,
}

pub fn run(options: &Options) -> Result<()> {
    let packages = ["-p", "signet-server", "-p", "signet-agent", "-p", "e2e"];
    succeed(cargo().args(["build", "--bins", "--profile", "ci"]).args(packages))?;
    let folder = target().join("ci");
    succeed(program(folder.join("signet-soak")).arg("--binaries").arg(&folder).args(&options.rest))
}
