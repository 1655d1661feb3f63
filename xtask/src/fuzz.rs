//! `cargo xtask fuzz`: libFuzzer on the parsers that read from the network.

use std::fs;

use anyhow::{Context, Result, ensure};
use clap::Args;

use crate::command::{answers, cargo, program, quiet, root, succeed, target};

/// The counters that libFuzzer reads, as rustc inserts them.
const COVERAGE: &str = "--cfg fuzzing -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table \
    -Cllvm-args=-sanitizer-coverage-trace-compares -Ccodegen-units=1 -Cdebug-assertions -Coverflow-checks";

/// What to fuzz, and for how long.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  cargo xtask fuzz\n  cargo xtask fuzz certificate --seconds 600\n  cargo xtask fuzz --list"
)]
pub struct Options {
    /// Only this target.
    target: Option<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 120)]
    seconds: u64,
    /// Print the targets and do nothing else.
    #[arg(long)]
    list: bool,
}

impl Options {
    /// All targets, for so long each.
    pub fn seconds(seconds: u64) -> Self {
        Self { target: None, seconds, list: false }
    }
}

/// The tool that is missing for fuzzing, if one is.
pub fn missing() -> Option<&'static str> {
    (!answers("c++", "--version")).then_some("a C++ compiler")
}

pub fn run(options: &Options) -> Result<()> {
    let targets = targets()?;
    if options.list {
        println!("{}", targets.join("\n"));
        return Ok(());
    }
    if let Some(only) = &options.target {
        ensure!(targets.contains(only), "no target is called {only}; there are: {}", targets.join(", "));
    }
    let host = quiet(program("rustc").args(["--print", "host-tuple"]))?;
    let host = host.trim();
    let mut build = cargo();
    build.args(["build", "--manifest-path", "fuzz/Cargo.toml", "--bins"]);
    // With a target named, build scripts and macros are built without the counters: those of the workspace are used.
    build.args(["--target", host, "--target-dir"]).arg(target());
    succeed(build.env("RUSTFLAGS", COVERAGE))?;
    for name in targets {
        if options.target.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        let corpus = root().join("fuzz/corpus").join(&name);
        let artifacts = root().join("fuzz/artifacts").join(&name);
        fs::create_dir_all(&corpus)?;
        fs::create_dir_all(&artifacts)?;
        let mut fuzzer = program(target().join(host).join("debug").join(&name));
        fuzzer.arg(&corpus);
        let seeds = root().join("fuzz/seeds").join(&name);
        if seeds.is_dir() {
            fuzzer.arg(seeds);
        }
        fuzzer.arg(format!("-artifact_prefix={}/", artifacts.display()));
        fuzzer.args([
            format!("-max_total_time={}", options.seconds),
            "-timeout=10".into(),
            "-rss_limit_mb=1024".into(),
        ]);
        fuzzer.args(["-max_len=65536", "-verbosity=0", "-print_final_stats=1"]);
        println!("fuzzing {name} for {} s", options.seconds);
        quiet(&mut fuzzer).with_context(|| format!("{name}: the input is below {}", artifacts.display()))?;
    }
    Ok(())
}

/// The names in fuzz/targets.
fn targets() -> Result<Vec<String>> {
    let folder = root().join("fuzz/targets");
    let mut names: Vec<String> = fs::read_dir(&folder)
        .with_context(|| folder.display().to_string())?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok()?.strip_suffix(".rs").map(ToOwned::to_owned))
        .collect();
    names.sort();
    Ok(names)
}
