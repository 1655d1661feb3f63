//! `api watch`.

use std::time::Duration;

use runtime::backoff::Backoff;
use runtime::clock::Clock;
use runtime::console::Screen;
use runtime::entropy::Entropy;
use runtime::telemetry::chain;
use spiffe_proto::workload::X509svidRequest;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use tokio::time::Instant;
use tonic::Code;

use super::super::client::{Connection, request};
use super::super::error::{CliError, RpcError};
use super::svids::Answer;

/// Prints each update as it comes, and connects again when a stream ends, until interrupted.
pub(super) async fn watch(connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let interrupted = tokio::signal::ctrl_c();
    tokio::select! {
        result = follow(connection, screen) => result,
        signal = interrupted => signal.map_err(|source| CliError::Signal { source }),
    }
}

async fn follow(connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let mut backoff = Backoff::new(Duration::from_secs(1), Duration::from_secs(30));
    let entropy = Entropy::system();
    let mut last = Instant::now();
    loop {
        match stream(connection.clone(), &mut last, &mut backoff, screen).await {
            // The agent does not know this request: asking again would not change that.
            Err(CliError::Rpc(RpcError(status))) if status.code() == Code::InvalidArgument => {
                return Err(CliError::Rpc(RpcError(status)));
            }
            Err(error) => screen.error_line(chain(&error)),
            Ok(()) => {}
        }
        screen.flush();
        tokio::time::sleep(backoff.next(&entropy)).await;
    }
}

/// One stream, to its end.
async fn stream(
    connection: Connection,
    last: &mut Instant,
    backoff: &mut Backoff,
    screen: &mut Screen,
) -> Result<(), CliError> {
    let mut client = SpiffeWorkloadApiClient::new(connection.open().await?);
    let mut stream = client.fetch_x509svid(request(X509svidRequest {})).await?.into_inner();
    while let Some(update) = stream.message().await? {
        backoff.reset();
        Answer::read(&update, Clock::system().now())?.pretty(last.elapsed(), false, screen);
        *last = Instant::now();
        screen.flush();
    }
    Ok(())
}
