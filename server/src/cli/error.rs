//! Why a command fails, in the words that are printed after `Error: `.

use std::path::PathBuf;

use runtime::duration::DurationError;
use runtime::flags::SocketError;
use spiffe::bundle::BundleError;
use spiffe::id::IdError;
use tonic::Status;
use transport::dial::DialError;

/// Why a command fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum CliError {
    /// The flags do not go together, or one is missing.
    #[error("{0}")]
    Flags(&'static str),
    /// A flag's value cannot be used.
    #[error("{what} {value:?}")]
    Value { what: &'static str, value: String },
    /// A selector is not of the form `type:value`.
    #[error("selector {value:?} must be formatted as type:value")]
    Selector { value: String },
    /// A SPIFFE ID or trust domain cannot be read.
    #[error("{what}")]
    Id { what: String, source: IdError },
    /// A duration cannot be read.
    #[error("invalid value for TTL")]
    Duration { source: DurationError },
    /// No socket path follows from flags and environment.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Nobody answers on the socket.
    #[error("rpc error: code = Unavailable desc = connection error")]
    Dial { source: DialError },
    /// The server answered with an error.
    #[error(transparent)]
    Rpc(RpcError),
    /// The server answered a step of the command with an error.
    #[error("{doing}")]
    Step { doing: String, source: RpcError },
    /// The server refused an element of a batch.
    #[error("{what}: {message}")]
    Refused { what: String, message: String },
    /// Elements of a batch failed; each was told already.
    #[error("{0}")]
    Batch(&'static str),
    /// The server's answer lacks what it must have.
    #[error("server response missing {0}")]
    Missing(&'static str),
    /// A file cannot be read or written.
    #[error("{what} {}", path.display())]
    File { what: &'static str, path: PathBuf, source: std::io::Error },
    /// A private file cannot be written.
    #[error("unable to write key")]
    KeyFile { source: runtime::keyfile::KeyFileError },
    /// A file of entries or ids is no JSON of the expected form.
    #[error("cannot read entries")]
    Json { source: serde_json::Error },
    /// A backup cannot be made, read or restored.
    #[error("{}", path.display())]
    Backup { path: PathBuf, source: crate::backup::BackupError },
    /// The configuration cannot be used.
    #[error("cannot use the configuration")]
    Config { source: runtime::hcl::ConfigError },
    /// A bundle cannot be read.
    #[error("unable to parse bundle data")]
    Bundle { source: BundleError },
    /// A key cannot be made.
    #[error("unable to generate key")]
    Key { source: spiffe::x509::KeyError },
    /// A certificate request cannot be made.
    #[error("unable to generate CSR")]
    Request { source: rcgen::Error },
    /// An answer cannot be shown as JSON.
    #[error("cannot show the answer")]
    Show { source: spiffe_proto::json::JsonError },
}

/// A gRPC status in the words of Go's gRPC, which scripts look for.
#[derive(Debug, thiserror::Error)]
#[error("rpc error: code = {} desc = {}", code_name(.0.code() as i32), .0.message())]
pub(super) struct RpcError(pub(super) Box<Status>);

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        Self::Rpc(RpcError(Box::new(status)))
    }
}

/// Says what was being done when the server answered with an error.
pub(super) fn step(doing: impl Into<String>) -> impl FnOnce(Status) -> CliError {
    move |status| CliError::Step { doing: doing.into(), source: RpcError(Box::new(status)) }
}

/// The name of a gRPC code as Go prints it.
pub(super) fn code_name(code: i32) -> String {
    let name = match code {
        0 => "OK",
        1 => "Canceled",
        2 => "Unknown",
        3 => "InvalidArgument",
        4 => "DeadlineExceeded",
        5 => "NotFound",
        6 => "AlreadyExists",
        7 => "PermissionDenied",
        8 => "ResourceExhausted",
        9 => "FailedPrecondition",
        10 => "Aborted",
        11 => "OutOfRange",
        12 => "Unimplemented",
        13 => "Internal",
        14 => "Unavailable",
        15 => "DataLoss",
        16 => "Unauthenticated",
        other => return format!("Code({other})"),
    };
    name.to_owned()
}
