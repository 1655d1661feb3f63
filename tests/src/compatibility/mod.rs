//! What of SPIRE works here, found by asking the running programs: the page `docs/spire-compatibility.md` is made from this and
//! held against it by a test, so that it cannot lie.

mod commands;
mod keys;
mod methods;

use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;

use crate::testkit::Binaries;

/// What became of one RPC, command or key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It does what SPIRE's does.
    Works,
    /// Known, and not served yet: answered or refused by name.
    Planned,
    /// Accepted, and without effect here; a warning says so.
    NoEffect,
}

impl Standing {
    fn word(self) -> &'static str {
        match self {
            Self::Works => "works",
            Self::Planned => "planned",
            Self::NoEffect => "accepted, no effect",
        }
    }
}

/// One row of the page.
pub struct Row {
    /// What a reader searches for.
    pub name: String,
    /// What was found.
    pub standing: Standing,
}

/// The whole page, as the programs in `binaries` have it.
///
/// # Errors
/// If a program cannot be started or asked.
pub async fn page(binaries: &Binaries, folder: &Path) -> Result<String> {
    let mut page = String::from(
        "# What of SPIRE works here\n\nThis page is made by asking the programs (`BLESS=1 cargo test -p e2e --test compatibility`), and a test compares \
         it with what they answer.\n\n*works*: does what SPIRE's does; differences on purpose are in [divergences.md](divergences.md). *planned*: known, \
         not served yet, and answered or refused by name, never silently ignored.\n",
    );
    for (title, rows) in [
        ("RPCs", methods::rows(binaries, &folder.join("methods")).await?),
        ("Commands of the server", commands::server(binaries)?),
        ("Commands of the agent", commands::agent(binaries)?),
        ("Keys of server.conf", keys::server(binaries, &folder.join("server-keys"))?),
        ("Keys of agent.conf", keys::agent(binaries, &folder.join("agent-keys"))?),
    ] {
        let working = rows.iter().filter(|row| row.standing == Standing::Works).count();
        write!(page, "\n## {title}\n\n{working} of {} work.\n\n| | |\n|---|---|\n", rows.len())?;
        for row in rows {
            writeln!(page, "| `{}` | {} |", row.name, row.standing.word())?;
        }
    }
    Ok(page)
}
