//! The agent's sockets, seen from a command, and what all commands share.

use std::path::PathBuf;
use std::time::Duration;

use prost::Message;
use runtime::console::{Output, Screen};
use runtime::duration;
use runtime::flags::{self, Environment};
use spiffe_proto::types::Spiffeid;
use tonic::Request;
use tonic::metadata::MetadataValue;
use tonic::transport::Channel;

use super::error::CliError;
use crate::config::{DEFAULT_ADMIN_SOCKET_PATH, DEFAULT_SOCKET_PATH};

/// Where the Workload API is.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct SocketFlags {
    /// Path of the Workload API's socket [env: SPIRE_AGENT_PUBLIC_SOCKET].
    #[arg(long = "socketPath", value_name = "PATH", default_value = DEFAULT_SOCKET_PATH)]
    socket_path: String,
    /// Name of the instance, put in place of %i into SPIRE_AGENT_PUBLIC_SOCKET_TEMPLATE.
    #[arg(long = "instance", value_name = "NAME")]
    instance: Option<String>,
}

impl SocketFlags {
    pub(super) fn connection(&self, environment: &Environment) -> Result<Connection, CliError> {
        let instance = self.instance.as_deref();
        let variable = "SPIRE_AGENT_PUBLIC_SOCKET";
        let path = flags::socket_path(&self.socket_path, instance, variable, DEFAULT_SOCKET_PATH, environment)?;
        Ok(Connection { path })
    }
}

/// Where the Workload API is, and how long it may take to answer.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Workload {
    #[command(flatten)]
    pub(super) socket: SocketFlags,
    /// How long to wait for each answer; 0s for ever.
    #[arg(long = "timeout", value_name = "DURATION", default_value = "5s")]
    timeout: String,
    /// Form of the output.
    #[arg(long = "output", value_name = "FORM", value_enum, default_value_t = Output::Pretty)]
    pub(super) output: Output,
}

impl Workload {
    pub(super) fn timeout(&self) -> Result<Duration, CliError> {
        let timeout = duration::parse(&self.timeout).map_err(|source| CliError::Duration { source })?;
        // As good as for ever.
        Ok(if timeout.is_zero() { Duration::from_secs(u64::from(u32::MAX)) } else { timeout })
    }
}

/// Where the admin API is, and how the answer is shown.
#[derive(Clone, Debug, clap::Args)]
pub(super) struct Admin {
    /// Path of the agent's admin socket.
    #[arg(long = "socketPath", value_name = "PATH", default_value = DEFAULT_ADMIN_SOCKET_PATH)]
    socket_path: PathBuf,
    /// Form of the output.
    #[arg(long = "output", value_name = "FORM", value_enum, default_value_t = Output::Pretty)]
    pub(super) output: Output,
}

impl Admin {
    pub(super) fn connection(&self) -> Connection {
        Connection { path: self.socket_path.clone() }
    }
}

/// A connection that is made when a command is sure that it has something to ask.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    path: PathBuf,
}

impl Connection {
    pub(super) async fn open(self) -> Result<Channel, CliError> {
        transport::dial::unix(&self.path).await.map_err(|source| CliError::Dial { source })
    }
}

/// A request to the Workload API, with the header that every one must have (SPIFFE Workload Endpoint, section 4).
pub(super) fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", MetadataValue::from_static("true"));
    request
}

/// Waits for an answer, at most for `timeout`.
pub(super) async fn within<T, E>(timeout: Duration, answer: impl Future<Output = Result<T, E>>) -> Result<T, CliError>
where
    CliError: From<E>,
{
    tokio::time::timeout(timeout, answer).await.map_err(|_| CliError::Late)?.map_err(CliError::from)
}

/// One line of JSON for a message whose full protobuf name is `name`.
pub(super) fn json(screen: &mut Screen, name: &str, message: &impl Message) -> Result<(), CliError> {
    screen.line(spiffe_proto::json::to_line(name, message)?);
    Ok(())
}

/// A SPIFFE ID as text, `(none)` if there is none.
pub(super) fn id_text(id: Option<&Spiffeid>) -> String {
    id.map_or_else(|| "(none)".to_owned(), |id| format!("spiffe://{}{}", id.trust_domain, id.path))
}
