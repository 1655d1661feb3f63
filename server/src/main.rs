//! The server's program; everything is in the library.

use std::process::ExitCode;

fn main() -> ExitCode {
    signet_server::cli::main(std::env::args_os())
}
