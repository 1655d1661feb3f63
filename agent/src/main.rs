//! `signet-agent`: everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    signet_agent::cli::main(std::env::args_os())
}
