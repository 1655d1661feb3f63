//! Every developer command, as `cargo xtask COMMAND`.

// This is a tool for developers' terminals: it reads their environment and their clock directly.
#![allow(clippy::disallowed_methods)]

mod bench;
mod check;
mod clients;
mod command;
mod demo;
mod fuzz;
mod peers;
mod soak;
mod test;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Every developer command of Signet.
///
/// `demo` shows the product, `test` tests everything that this machine can test; these two are all a newcomer needs.
#[derive(Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    disable_help_subcommand = true,
    after_help = "Start with `cargo xtask demo`. `cargo xtask COMMAND --help` says more about each command."
)]
struct Arguments {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Show it: a server, an agent, two workloads, a call between them, a refusal and a rotation.
    ///
    /// Builds everything and runs it in a temporary folder, needing nothing but Rust and a C compiler. Afterwards all of
    /// it goes on running, with the socket's path printed, until you press Ctrl-C.
    Demo {
        /// Stop everything at the end instead of leaving it running.
        #[arg(long)]
        once: bool,
    },
    /// Test everything that this machine can test.
    ///
    /// Unit tests, the rules of the house, and the suites of `tests/`: journeys, conformance with stock clients, hostile input,
    /// endurance, golden files. Tools that the tests need are located or installed below target/tools. What is missing is named at the
    /// end together with the tests that were left out; with CI=true it fails the run instead.
    Test(test::Options),
    /// Check the code without running it: formatting, clippy, import rules, lengths, words, documentation, licences.
    ///
    /// Each finding is one line, FILE:LINE: what is wrong.
    Check(check::Options),
    /// Fuzz the parsers that read from the network.
    ///
    /// Coverage-guided, by libFuzzer, with the pinned toolchain; needs a C++ compiler. What is found is kept below
    /// fuzz/artifacts, the corpus below fuzz/corpus.
    Fuzz(fuzz::Options),
    /// Measure, ours alone or against another implementation in turns.
    ///
    /// Builds in release mode, prints a table of medians and writes target/bench/latest.json. What follows `--` goes to the
    /// load generator; `cargo xtask bench -- --help` lists it.
    Bench(bench::Options),
    /// Mix with real SPIRE: its agent on our server, our agent on its server.
    Peers(peers::Options),
    /// Rotate everything quickly while many pairs of workloads keep calling each other; not one handshake may fail.
    Soak(soak::Options),
    /// What continuous integration runs: `test`, with every real component demanded.
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Arguments::parse().command {
        Task::Demo { once } => demo::run(once),
        Task::Test(options) => test::run(&options),
        Task::Check(options) => check::run(&options),
        Task::Fuzz(options) => fuzz::run(&options),
        Task::Bench(options) => bench::run(&options),
        Task::Peers(options) => peers::run(&options),
        Task::Soak(options) => soak::run(&options),
        Task::Ci => test::run(&test::Options::demanding()),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nxtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}
