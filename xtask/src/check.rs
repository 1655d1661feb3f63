//! `cargo xtask check`: what can be said about the code without running it.

mod imports;
mod manifests;
mod paths;
mod scan;
mod texts;

use std::fmt;
use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::{Args, ValueEnum};

use crate::command::{answers, cargo, quiet, root, succeed, tools};

/// Which checks to run.
#[derive(Args, Default)]
#[command(
    after_help = "Examples:\n  cargo xtask check\n  cargo xtask check --only rules\n  cargo xtask check --only format --only clippy"
)]
pub struct Options {
    /// Only these checks.
    #[arg(long, value_enum, value_name = "CHECK")]
    only: Vec<Check>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Check {
    /// rustfmt would change nothing.
    Format,
    /// Who may import whom, file lengths, words, lints switched off.
    Rules,
    /// clippy finds nothing, in tests neither.
    Clippy,
    /// Every public item is documented and every link in the documentation leads somewhere.
    Docs,
    /// Licences, duplicates and advisories of all dependencies, by cargo-deny where it is installed.
    Deny,
}

/// One thing that is wrong, at one place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Finding {
    file: PathBuf,
    line: usize,
    text: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.text)
    }
}

impl Finding {
    fn new(file: &Path, line: usize, text: impl Into<String>) -> Self {
        Self { file: file.into(), line, text: text.into() }
    }
}

pub fn run(options: &Options) -> Result<()> {
    let mut failed = Vec::new();
    for check in Check::value_variants().iter().copied() {
        if !options.only.is_empty() && !options.only.contains(&check) {
            continue;
        }
        let name = format!("{check:?}").to_lowercase();
        match check.run() {
            Ok(Verdict::Clean) => println!("check {name}: clean"),
            Ok(Verdict::LeftOut(reason)) => println!("check {name}: left out, {reason}"),
            Err(error) => {
                println!("check {name}: failed\n{error:#}");
                failed.push(name);
            }
        }
    }
    if failed.is_empty() { Ok(()) } else { bail!("not clean: {}", failed.join(", ")) }
}

enum Verdict {
    Clean,
    LeftOut(&'static str),
}

impl Check {
    fn run(self) -> Result<Verdict> {
        match self {
            Self::Format => {
                // Names of files only; `cargo fmt` shows the rest by doing it.
                quiet(cargo().args(["fmt", "--all", "--", "--check", "--files-with-diff"])).map(drop)?;
            }
            Self::Rules => {
                let findings = rules(root())?;
                if !findings.is_empty() {
                    bail!("{}", findings.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n"));
                }
            }
            Self::Clippy => {
                let product = [
                    "clippy",
                    "--quiet",
                    "--keep-going",
                    "--workspace",
                    "--exclude",
                    "e2e",
                    "--exclude",
                    "xtask",
                    "--lib",
                    "--bins",
                ];
                quiet(cargo().args(product).args(["--", "-D", "warnings"])).map(drop)?;
                // Tests own real clocks and tasks; what is banned in the product is not banned there.
                let all = ["clippy", "--quiet", "--keep-going", "--workspace", "--all-targets", "--", "-D", "warnings"];
                quiet(cargo().args(all).args(["-A", "clippy::disallowed_methods"])).map(drop)?;
            }
            Self::Docs => {
                let ours = [
                    "spiffe-proto",
                    "signet-spiffe",
                    "signet-runtime",
                    "signet-transport",
                    "signet-server",
                    "signet-agent",
                ];
                let mut doc = cargo();
                doc.args(["doc", "--quiet", "--no-deps", "--lib"]).env(
                    "RUSTDOCFLAGS",
                    "-D warnings -A rustdoc::private_intra_doc_links -A rustdoc::redundant_explicit_links",
                );
                for package in ours {
                    doc.args(["-p", package]);
                }
                quiet(&mut doc).map(drop)?;
            }
            Self::Deny => return deny(),
        }
        Ok(Verdict::Clean)
    }
}

/// What is installed where nothing may be left out.
const CARGO_DENY: &str = "cargo-deny@0.20.2";

/// Our own cargo-deny, or the machine's.
fn deny_tool() -> Option<PathBuf> {
    [tools().join("bin/cargo-deny"), "cargo-deny".into()].into_iter().find(|name| answers(name, "--version"))
}

/// Installs cargo-deny below target/tools, unless there is one.
///
/// # Errors
/// If it cannot be built.
pub fn install_deny() -> Result<()> {
    if deny_tool().is_some() {
        return Ok(());
    }
    let mut install = cargo();
    // It runs for a second; an optimised build would take minutes more than that saves.
    install.args(["install", "--quiet", "--locked", "--debug", CARGO_DENY, "--root"]).arg(tools());
    succeed(install.env("CARGO_TARGET_DIR", tools().join("cargo-deny-build")))
}

fn deny() -> Result<Verdict> {
    let Some(name) = &deny_tool() else {
        return Ok(Verdict::LeftOut("cargo-deny is not installed (cargo install --locked cargo-deny)"));
    };
    // It reads the manifests of all crates in the lock file, also of those for other platforms, which no build here fetches.
    quiet(cargo().args(["fetch", "--quiet", "--locked"])).map(drop)?;
    quiet(crate::command::program(name).args(["--offline", "check", "bans", "licenses", "sources"])).map(drop)?;
    // The advisory database is a repository of its own, which cannot be reached from everywhere.
    match quiet(crate::command::program(name).args(["check", "advisories"])) {
        Ok(_) => Ok(Verdict::Clean),
        Err(error) if format!("{error:#}").contains("failed to fetch advisory database") => {
            Ok(Verdict::LeftOut("the rest is clean, but the advisory database cannot be reached"))
        }
        Err(error) => Err(error),
    }
}

/// Everything that is wrong in the tree below `root`, sorted by place.
///
/// # Errors
/// If a file cannot be read.
pub fn rules(root: &Path) -> Result<Vec<Finding>> {
    let files = scan::files(root)?;
    let mut findings = Vec::new();
    for file in &files {
        findings.extend(texts::findings(file));
        findings.extend(manifests::findings(file));
        findings.extend(imports::findings(file));
    }
    findings.sort();
    Ok(findings)
}

#[cfg(test)]
mod tests;
