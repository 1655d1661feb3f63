//! `cargo xtask peers`: ours and SPIRE mixed, in both directions.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Args;

use crate::command::succeed;
use crate::soak;

/// Where SPIRE's programs are.
#[derive(Args)]
#[command(after_help = "Example:\n  cargo xtask peers --spire spire-1.15.3/bin\n\n\
    Covered, by join_token and x509pop: SVIDs rotating, restart of each side, ban and evict.")]
pub struct Options {
    /// Folder with spire-server and spire-agent (1.15.x).
    #[arg(long, value_name = "BIN_DIR")]
    spire: PathBuf,
}

impl Options {
    /// All of it, with SPIRE's programs from `folder`.
    pub fn with(folder: &Path) -> Self {
        Self { spire: folder.into() }
    }
}

pub fn run(options: &Options) -> Result<()> {
    let folder = std::path::absolute(&options.spire)?;
    for name in ["spire-server", "spire-agent"] {
        ensure!(folder.join(name).is_file(), "{} is missing", folder.join(name).display());
    }
    succeed(soak::soak()?.arg("peers").arg("--spire").arg(folder))
}
