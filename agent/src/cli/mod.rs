//! The command line: SPIRE's commands, flags, output and exit codes.
//!
//! A command asks the agent over one of its sockets, collects what it has to say in a
//! [`Screen`](runtime::console::Screen), and ends with 0 or 1; an unknown command ends with 127.

mod api;
mod client;
mod debug;
mod error;
mod healthcheck;
mod logger;
mod run;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::{CommandFactory, Parser, Subcommand};
use runtime::console::Screen;
use runtime::flags::{self, Environment};
use runtime::telemetry::chain;

use self::error::CliError;

const EXAMPLES: &str = "\
Flags may be written with one dash or two, and with a space or an equals sign before the value.

Examples:
  Start an agent that joins with a token of `signet-server token generate`:
    signet-agent run -config conf/agent/agent.conf -joinToken 3b7…

  See as whom the agent knows you:
    signet-agent api fetch
    signet-agent api fetch jwt -audience my-service

  See every rotation as it happens:
    signet-agent api watch";

/// Attests local processes and streams SPIFFE identities to them.
#[derive(Debug, Parser)]
#[command(name = "signet-agent", version, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Program {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the agent.
    Run(run::Run),
    /// Check a configuration file without running it.
    Validate(run::Run),
    /// Ask a running agent whether it is healthy.
    Healthcheck(healthcheck::Healthcheck),
    /// Use the Workload API, as a workload would.
    #[command(subcommand)]
    Api(api::Api),
    /// See and change the log level of a running agent.
    #[command(subcommand)]
    Logger(logger::Logger),
    /// Look into a running agent.
    #[command(subcommand)]
    Debug(debug::Debug),
    /// Print a completion script for a shell.
    ///
    /// For bash: signet-agent completion bash > /etc/bash_completion.d/signet-agent
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
            flags::write_completion::<Program>(shell, "signet-agent");
            return ExitCode::SUCCESS;
        }
        command => command,
    };
    let mut screen = Screen::new();
    // One connection and one answer: nothing to spread over threads.
    let code = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime.block_on(ask(command, &environment, &mut screen)),
        Err(error) => {
            screen.error_line(format!("Error: cannot start: {error}"));
            ExitCode::FAILURE
        }
    };
    screen.flush();
    code
}

async fn ask(command: Command, environment: &Environment, screen: &mut Screen) -> ExitCode {
    // The groups of commands say differently that they failed, and scripts know it.
    let (result, prefix): (Result<(), CliError>, &str) = match command {
        Command::Healthcheck(check) => (healthcheck::run(&check, environment, screen).await, "Agent is unhealthy: "),
        Command::Api(command) => (api::run(&command, environment, screen).await, ""),
        Command::Logger(command) => (logger::run(&command, command.common().connection(), screen).await, "Error: "),
        Command::Debug(command) => (debug::run(&command, screen).await, "Error: "),
        Command::Run(_) | Command::Validate(_) | Command::Completion { .. } => (Ok(()), ""),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            screen.error_line(format!("{prefix}{}", chain(&error)));
            ExitCode::FAILURE
        }
    }
}

/// The whole command line, for documentation and tests.
pub fn definition() -> clap::Command {
    Program::command()
}

#[cfg(test)]
mod tests;
