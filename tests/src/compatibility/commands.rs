//! Every command of SPIRE's two programs.

use anyhow::Result;

use super::{Row, Standing};
use crate::testkit::{Binaries, process::run};

const SERVER: &[&str] = &[
    "run",
    "validate",
    "healthcheck",
    "token generate",
    "entry create",
    "entry update",
    "entry delete",
    "entry show",
    "entry count",
    "agent list",
    "agent count",
    "agent show",
    "agent ban",
    "agent evict",
    "agent purge",
    "bundle show",
    "bundle list",
    "bundle set",
    "bundle delete",
    "bundle count",
    "federation create",
    "federation update",
    "federation list",
    "federation show",
    "federation delete",
    "federation refresh",
    "x509 mint",
    "jwt mint",
    "wit mint",
    "logger get",
    "logger set",
    "logger reset",
    "localauthority x509 show",
    "localauthority x509 prepare",
    "localauthority x509 activate",
    "localauthority x509 taint",
    "localauthority x509 revoke",
    "localauthority jwt show",
    "localauthority jwt prepare",
    "localauthority jwt activate",
    "localauthority jwt taint",
    "localauthority jwt revoke",
    "upstreamauthority taint",
    "upstreamauthority revoke",
    "debug getinfo",
];

const AGENT: &[&str] = &[
    "run",
    "validate",
    "healthcheck",
    "api fetch",
    "api fetch x509",
    "api fetch jwt",
    "api validate jwt",
    "api watch",
    "debug getinfo",
    "logger get",
    "logger set",
    "logger reset",
];

/// Which commands of `spire-server` `signet-server` has: those that explain themselves when asked for help.
pub(super) fn server(binaries: &Binaries) -> Result<Vec<Row>> {
    SERVER.iter().map(|command| row(&binaries.server, command)).collect()
}

/// Which commands of `spire-agent` `signet-agent` has.
pub(super) fn agent(binaries: &Binaries) -> Result<Vec<Row>> {
    AGENT.iter().map(|command| row(&binaries.agent, command)).collect()
}

fn row(program: &std::path::Path, command: &str) -> Result<Row> {
    let mut arguments: Vec<&str> = command.split(' ').collect();
    arguments.push("--help");
    let output = run(program, &arguments)?;
    let printed = [output.stdout, output.stderr].concat();
    let printed = String::from_utf8_lossy(&printed);
    // A program that does not know a command must not answer with the help of another one.
    let last = command.rsplit(' ').next().unwrap_or(command);
    let explains =
        output.status.success() && printed.lines().any(|line| line.starts_with("Usage:") && line.contains(last));
    Ok(Row { name: command.into(), standing: if explains { Standing::Works } else { Standing::Planned } })
}
