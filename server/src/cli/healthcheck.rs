//! `healthcheck`.

use runtime::console::Screen;
use runtime::flags::boolean;
use runtime::steady::TOLD;
use spiffe_proto::health::HealthCheckRequest;
use spiffe_proto::health::health_check_response::ServingStatus;
use spiffe_proto::health::health_client::HealthClient;

use super::client::{Connection, SocketFlags};
use super::error::CliError;

/// Ask a running server whether it is healthy.
#[derive(Debug, clap::Args)]
pub(super) struct Healthcheck {
    #[command(flatten)]
    pub(super) socket: SocketFlags,
    /// Accepted for the sake of scripts; the check is the same.
    #[arg(long = "shallow", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    _shallow: bool,
    /// Say what is done, and why it failed.
    #[arg(long = "verbose", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    verbose: bool,
}

pub(super) async fn run(flags: &Healthcheck, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    if flags.verbose {
        screen.line("Checking server health...");
    }
    let answer = async {
        let mut client = HealthClient::new(connection.open().await?);
        Ok::<_, CliError>(client.check(HealthCheckRequest::default()).await?)
    };
    let answer = answer.await.map(|answer| {
        // SPIRE's server says nothing of it.
        let clock = answer.metadata().get(TOLD).and_then(|told| told.to_str().ok());
        if let Some(clock) = clock.filter(|_| flags.verbose) {
            screen.line(format!("Clock: {clock}."));
        }
        answer.into_inner()
    });
    match answer {
        Ok(answer) if answer.status() == ServingStatus::Serving => {
            screen.line("Server is healthy.");
            Ok(())
        }
        Ok(answer) => Err(CliError::Value {
            what: "server is unhealthy: server returned status",
            value: answer.status().as_str_name().to_owned(),
        }),
        Err(error) => {
            if flags.verbose {
                screen.error_line(format!("Failed to check health: {}", runtime::telemetry::chain(&error)));
            }
            Err(CliError::Flags("server is unhealthy: unable to determine health"))
        }
    }
}
