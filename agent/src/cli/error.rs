//! Why a command fails, in the words that are printed.

use std::path::PathBuf;

use runtime::duration::DurationError;
use runtime::flags::SocketError;
use spiffe::id::IdError;
use spiffe::verify::VerifyError;
use spiffe::x509::X509Error;
use tonic::{Code, Status};
use transport::dial::DialError;

/// Why a command fails.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub(super) enum CliError {
    /// The flags do not go together, or one is missing.
    #[error("{0}")]
    Flags(&'static str),
    /// A value cannot be used.
    #[error("{what} {value:?}")]
    Value { what: &'static str, value: String },
    /// A duration cannot be read.
    #[error("invalid value for timeout")]
    Duration { source: DurationError },
    /// No socket path follows from flags and environment.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Nobody answers on the socket.
    #[error("rpc error: code = Unavailable desc = connection error")]
    Dial { source: DialError },
    /// No answer came in time.
    #[error("rpc error: code = DeadlineExceeded desc = no answer within the timeout")]
    Late,
    /// The agent answered with an error.
    #[error(transparent)]
    Rpc(RpcError),
    /// The agent answered a step of the command with an error.
    #[error("{doing}")]
    Step { doing: &'static str, source: RpcError },
    /// A token is not valid.
    #[error("SVID is not valid: {reason}")]
    Invalid { reason: String },
    /// The agent's answer lacks what it must have.
    #[error("workload response contains no {0}")]
    Missing(&'static str),
    /// A SPIFFE ID or trust domain in the answer cannot be read.
    #[error("{id:?}")]
    Id { id: String, source: IdError },
    /// A certificate in the answer cannot be read.
    #[error("failed to parse {what} for {id:?}")]
    Certificate { what: &'static str, id: String, source: X509Error },
    /// A private key in the answer cannot be read.
    #[error("failed to parse private key for {id:?}")]
    Key { id: String, source: spiffe::x509::KeyError },
    /// An SVID in the answer does not verify.
    #[error("{id:?} SVID failed verification against bundle")]
    Unverified { id: String, source: VerifyError },
    /// A file cannot be written.
    #[error("cannot write {}", path.display())]
    File { path: PathBuf, source: std::io::Error },
    /// A private file cannot be written.
    #[error(transparent)]
    KeyFile(#[from] runtime::keyfile::KeyFileError),
    /// An answer cannot be shown as JSON.
    #[error("cannot show the answer")]
    Show(#[from] spiffe_proto::json::JsonError),
    /// The signal that ends a watch cannot be listened for.
    #[error("cannot listen for signals")]
    Signal { source: std::io::Error },
}

/// A gRPC status in the words of Go's gRPC, which scripts look for.
#[derive(Debug, thiserror::Error)]
#[error("rpc error: code = {} desc = {}", code_name(.0.code()), .0.message())]
pub(super) struct RpcError(pub(super) Box<Status>);

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        Self::Rpc(RpcError(Box::new(status)))
    }
}

/// Says what was being done when the agent answered with an error.
pub(super) fn step(doing: &'static str) -> impl FnOnce(Status) -> CliError {
    move |status| CliError::Step { doing, source: RpcError(Box::new(status)) }
}

/// The name of a gRPC code as Go prints it.
fn code_name(code: Code) -> String {
    match code {
        Code::Ok => "OK".to_owned(),
        Code::Cancelled => "Canceled".to_owned(),
        other => format!("{other:?}"),
    }
}
