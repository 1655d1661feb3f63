//! `cargo xtask test`: everything that this machine can test.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, bail};
use clap::Args;

use crate::clients::CLIENTS;
use crate::command::{cargo, is_ci, succeed};
use crate::{check, fuzz, peers};

/// How much to test.
#[derive(Args, Default)]
#[command(
    after_help = "Examples:\n  cargo xtask test\n  cargo xtask test --quick\n  cargo xtask test --spire spire-1.15.3/bin"
)]
pub struct Options {
    /// Only unit tests and the rules of the house.
    #[arg(long)]
    quick: bool,
    /// Folder with spire-server and spire-agent; adds the suite that mixes ours with SPIRE.
    #[arg(long, value_name = "BIN_DIR")]
    spire: Option<PathBuf>,
    /// Let a missing tool fail the run (the default when CI=true).
    #[arg(long)]
    demand_all: bool,
}

impl Options {
    /// Everything, and nothing left out.
    pub fn demanding() -> Self {
        Self { demand_all: true, ..Self::default() }
    }
}

/// What has been done so far.
#[derive(Default)]
struct Report {
    lines: Vec<String>,
    failed: Vec<&'static str>,
    left_out: Vec<String>,
}

impl Report {
    fn step(&mut self, name: &'static str, work: impl FnOnce() -> Result<()>) {
        println!("\n== {name}");
        let start = Instant::now();
        let outcome = work();
        let seconds = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => self.lines.push(format!("  ok      {name} ({seconds:.0} s)")),
            Err(error) => {
                eprintln!("{error:#}");
                self.lines.push(format!("  FAILED  {name} ({seconds:.0} s)"));
                self.failed.push(name);
            }
        }
    }
}

pub fn run(options: &Options) -> Result<()> {
    let demand_all = options.demand_all || is_ci();
    let mut report = Report::default();
    report.step("unit tests", || succeed(cargo().args(["test", "--workspace", "--exclude", "e2e", "--no-fail-fast"])));
    if options.quick {
        return finish(report, demand_all);
    }

    let mut missing = Vec::new();
    report.step("stock clients", || {
        for client in CLIENTS {
            match client.prepare() {
                Ok(()) => println!("{}: ready", client.tests),
                Err(error) => {
                    println!("{}: {error:#}", client.tests);
                    missing.push(client.tests);
                }
            }
        }
        Ok(())
    });
    for name in &missing {
        report.left_out.push(format!("tests {name}_* of the conformance suite (its toolchain is missing)"));
    }
    let mut skipped = missing.clone();
    if !nix::unistd::geteuid().is_root() {
        skipped.push("as_root_");
        report.left_out.push("tests as_root_* (they change users and namespaces)".into());
    }
    report.step("programs", || {
        succeed(cargo().args(["build", "--bins", "-p", "signet-server", "-p", "signet-agent", "-p", "e2e"]))
    });
    report.step("suites", || {
        let mut suites = cargo();
        suites.args(["test", "-p", "e2e", "--no-fail-fast", "--"]);
        for name in &skipped {
            suites.args(["--skip", name]);
        }
        succeed(&mut suites)
    });
    match fuzz::missing() {
        None => report.step("fuzzing, 5 s each", || fuzz::run(&fuzz::Options::seconds(5))),
        Some(tool) => report.left_out.push(format!("fuzzing ({tool} is missing)")),
    }
    match &options.spire {
        Some(folder) => report.step("mixed with SPIRE", || peers::run(&peers::Options::with(folder))),
        None => println!("\nmixed with SPIRE: not asked for (--spire BIN_DIR)"),
    }
    if demand_all {
        report.step("cargo-deny", check::install_deny);
    }
    report.step("check", || check::run(&check::Options::default()));
    finish(report, demand_all)
}

fn finish(report: Report, demand_all: bool) -> Result<()> {
    println!("\n{}", report.lines.join("\n"));
    for text in &report.left_out {
        println!("  left out: {text}");
    }
    if !report.failed.is_empty() {
        bail!("failed: {}", report.failed.join(", "));
    }
    if demand_all && !report.left_out.is_empty() {
        bail!("{} left out, but everything is demanded here", report.left_out.len());
    }
    println!("\nAll that was run is fine.");
    Ok(())
}
