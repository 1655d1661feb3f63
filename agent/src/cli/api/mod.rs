//! `api fetch [x509|jwt]`, `api validate jwt`, `api watch`.

mod jwt;
mod svids;
mod watch;
mod x509;

use runtime::console::Screen;
use runtime::flags::Environment;

use super::client::SocketFlags;
use super::error::CliError;

/// Use the Workload API, as a workload would.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Api {
    /// Fetch the caller's X.509-SVIDs, or with `jwt` its JWT-SVIDs.
    #[command(args_conflicts_with_subcommands = true)]
    Fetch {
        #[command(subcommand)]
        what: Option<Fetch>,
        #[command(flatten)]
        x509: x509::FetchX509,
    },
    /// Validate what another process has shown.
    #[command(subcommand)]
    Validate(Validate),
    /// Print the caller's X.509-SVIDs at every change, until interrupted.
    Watch {
        #[command(flatten)]
        socket: SocketFlags,
    },
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum Fetch {
    /// Fetch the caller's X.509-SVIDs.
    X509(x509::FetchX509),
    /// Fetch the caller's JWT-SVIDs.
    Jwt(jwt::FetchJwt),
}

#[derive(Debug, clap::Subcommand)]
pub(super) enum Validate {
    /// Validate a JWT-SVID.
    Jwt(jwt::ValidateJwt),
}

pub(super) async fn run(command: &Api, environment: &Environment, screen: &mut Screen) -> Result<(), CliError> {
    match command {
        Api::Fetch { what: None, x509 } => x509::fetch(x509, environment, screen).await,
        Api::Fetch { what: Some(Fetch::X509(flags)), .. } => x509::fetch(flags, environment, screen).await,
        Api::Fetch { what: Some(Fetch::Jwt(flags)), .. } => jwt::fetch(flags, environment, screen).await,
        Api::Validate(Validate::Jwt(flags)) => jwt::validate(flags, environment, screen).await,
        Api::Watch { socket } => watch::watch(socket.connection(environment)?, screen).await,
    }
}
