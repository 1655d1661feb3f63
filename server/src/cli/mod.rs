//! The command line: SPIRE's commands, flags, output and exit codes.
//!
//! A command asks the server over its admin socket, collects what it has to say in a
//! [`Screen`](runtime::console::Screen), and ends with 0 or 1; an unknown command ends with 127.

mod agent;
mod backup;
mod bundle;
mod client;
mod debug;
mod entry;
mod error;
mod healthcheck;
mod logger;
mod mint;
mod run;
mod token;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use runtime::console::Screen;
use runtime::flags::{self, Environment};
use runtime::telemetry::chain;

use self::client::Connection;
use self::error::CliError;

const EXAMPLES: &str = "\
Flags may be written with one dash or two, and with a space or an equals sign before the value.

Examples:
  Start a server:
    signet-server run -config conf/server/server.conf

  Let a node join, and register a workload that runs on it as Unix user 1000:
    signet-server token generate -spiffeID spiffe://example.org/node
    signet-server entry create -parentID spiffe://example.org/node \\
        -spiffeID spiffe://example.org/web -selector unix:uid:1000

  See what is there:
    signet-server entry show -output json
    signet-server agent list";

/// Certificate and token authority of a SPIFFE trust domain.
#[derive(Debug, Parser)]
#[command(name = "signet-server", version, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the server.
    Run(run::Run),
    /// Check a configuration file without running it.
    Validate(run::Run),
    /// Ask a running server whether it is healthy.
    Healthcheck(healthcheck::Healthcheck),
    /// Make join tokens for nodes.
    #[command(subcommand)]
    Token(token::Token),
    /// Register workloads and nodes.
    #[command(subcommand)]
    Entry(entry::EntryCommand),
    /// See and manage attested agents.
    #[command(subcommand)]
    Agent(agent::AgentCommand),
    /// Take the state of a running server away, and bring it back.
    #[command(subcommand)]
    Backup(backup::Backup),
    /// See and manage trust bundles.
    #[command(subcommand)]
    Bundle(bundle::BundleCommand),
    /// Mint X.509-SVIDs by hand.
    #[command(subcommand)]
    X509(mint::X509),
    /// Mint JWT-SVIDs by hand.
    #[command(subcommand)]
    Jwt(mint::Jwt),
    /// See and change the log level of a running server.
    #[command(subcommand)]
    Logger(logger::Logger),
    /// Look into a running server.
    #[command(subcommand)]
    Debug(debug::Debug),
    /// Print a completion script for a shell.
    ///
    /// For bash: signet-server completion bash > /etc/bash_completion.d/signet-server
    Completion {
        /// The shell.
        shell: flags::Shell,
    },
}

/// Runs the command that `arguments` name, the program's own name first.
pub fn main(arguments: impl IntoIterator<Item = OsString>) -> ExitCode {
    let program: Program = match flags::parse(arguments) {
        Ok(program) => program,
        Err(code) => return code,
    };
    let environment = Environment::read();
    let command = match program.command {
        Command::Run(run) => return run::run(&run, &environment),
        Command::Validate(run) => return run::validate(&run, &environment),
        Command::Completion { shell } => {
            flags::write_completion::<Program>(shell, "signet-server");
            return ExitCode::SUCCESS;
        }
        command => command,
    };
    // One connection and one answer: nothing to spread over threads.
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            let mut screen = Screen::new();
            screen.error_line(format!("Error: cannot start: {error}"));
            screen.flush();
            return ExitCode::FAILURE;
        }
    };
    let mut screen = Screen::new();
    let result = runtime.block_on(ask(command, &environment, &mut screen));
    if let Err(error) = &result {
        screen.error_line(format!("Error: {}", chain(error)));
    }
    screen.flush();
    if result.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

async fn ask(command: Command, environment: &Environment, screen: &mut Screen) -> Result<(), CliError> {
    let at = |socket: &client::SocketFlags| Connection::new(socket, environment);
    match command {
        Command::Healthcheck(check) => healthcheck::run(&check, at(&check.socket)?, screen).await,
        Command::Token(command) => token::run(&command, at(command.socket())?, screen).await,
        Command::Entry(command) => entry::run(&command, at(command.socket())?, screen).await,
        Command::Agent(command) => agent::run(&command, at(command.socket())?, screen).await,
        Command::Backup(command) => backup::run(&command, environment, screen).await,
        Command::Bundle(command) => bundle::run(&command, at(command.socket())?, screen).await,
        Command::X509(command) => mint::x509(&command, at(command.socket())?, screen).await,
        Command::Jwt(command) => mint::jwt(&command, at(command.socket())?, screen).await,
        Command::Logger(command) => logger::run(&command, at(command.socket())?, screen).await,
        Command::Debug(command) => debug::run(&command, at(command.socket())?, screen).await,
        Command::Run(_) | Command::Validate(_) | Command::Completion { .. } => Ok(()),
    }
}

/// The whole command line, for documentation and tests.
pub fn definition() -> clap::Command {
    Program::command()
}

#[cfg(test)]
mod tests;
