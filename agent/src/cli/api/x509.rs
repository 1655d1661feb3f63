//! `api fetch x509`.

use std::path::{Path, PathBuf};

use runtime::clock::Clock;
use runtime::console::{Output, Screen};
use runtime::flags::{Environment, boolean};
use runtime::keyfile;
use spiffe::bundle::certificates_to_pem;
use spiffe::x509::Certificate;
use spiffe_proto::workload::X509svidRequest;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use tokio::time::Instant;

use super::super::client::{Workload, json, request, within};
use super::super::error::CliError;
use super::svids::Answer;

#[derive(Debug, clap::Args)]
pub(in super::super) struct FetchX509 {
    #[command(flatten)]
    common: Workload,
    /// Print nothing.
    #[arg(long = "silent", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    silent: bool,
    /// Directory to write SVIDs, keys and bundles to (with pretty output only).
    #[arg(long = "write", value_name = "DIRECTORY")]
    write: Option<PathBuf>,
}

pub(super) async fn fetch(flags: &FetchX509, environment: &Environment, screen: &mut Screen) -> Result<(), CliError> {
    let timeout = flags.common.timeout()?;
    let start = Instant::now();
    let connection = flags.common.socket.connection(environment)?;
    let answer = within(timeout, async {
        let mut client = SpiffeWorkloadApiClient::new(connection.open().await?);
        let mut stream = client.fetch_x509svid(request(X509svidRequest {})).await?.into_inner();
        Ok::<_, CliError>(stream.message().await?)
    });
    let answer = answer.await?.ok_or(CliError::Missing("svids"))?;
    let took = start.elapsed();
    if flags.common.output == Output::Json {
        return json(screen, "X509SVIDResponse", &answer);
    }
    let answer = Answer::read(&answer, Clock::system().now())?;
    if !flags.silent {
        answer.pretty(took, true, screen);
    }
    if let Some(directory) = &flags.write {
        write(&answer, directory, screen)?;
    }
    Ok(())
}

/// Writes `svid.N.pem`, `svid.N.key`, `bundle.N.pem` and `federated_bundle.N.M.pem`.
fn write(answer: &Answer, directory: &Path, screen: &mut Screen) -> Result<(), CliError> {
    let public = |path: &Path, certificates: &[Certificate]| {
        let text = certificates_to_pem(certificates.iter().map(|certificate| &certificate.der));
        std::fs::write(path, text).map_err(|source| CliError::File { path: path.to_owned(), source })
    };
    for (index, svid) in answer.svids.iter().enumerate() {
        let path = directory.join(format!("svid.{index}.pem"));
        screen.line(format!("Writing SVID #{index} to file {}.", path.display()));
        public(&path, &svid.chain)?;
        let path = directory.join(format!("svid.{index}.key"));
        screen.line(format!("Writing key #{index} to file {}.", path.display()));
        keyfile::write(&path, svid.key.expose_pem().as_bytes())?;
        let path = directory.join(format!("bundle.{index}.pem"));
        screen.line(format!("Writing bundle #{index} to file {}.", path.display()));
        public(&path, &svid.bundle)?;
        for (number, (id, bundle)) in answer.federated.iter().enumerate() {
            let path = directory.join(format!("federated_bundle.{index}.{number}.pem"));
            let file = path.display();
            screen.line(format!("Writing federated bundle #{number} for trust domain {id} to file {file}."));
            public(&path, bundle)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
