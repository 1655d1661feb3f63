//! A gRPC status as an error among others: in one line, with its cause.

use std::error::Error;
use std::fmt::{self, Display, Formatter};

use tonic::{Code, Status};

use super::{DialError, LinkError};

/// What the server answered instead of a result, or what became of the call on its way.
#[derive(Debug)]
pub struct Answered(Box<Status>);

impl Answered {
    /// The code.
    pub fn code(&self) -> Code {
        self.0.code()
    }

    /// Whether it comes, or may come, from the connection instead of from a handler.
    pub(super) fn is_broken(&self) -> bool {
        matches!(
            self.code(),
            Code::Unavailable
                | Code::Unknown
                | Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Internal
                | Code::DataLoss
        )
    }
}

impl LinkError {
    /// Whether no connection came up, or it broke before the server answered: so ends a call of somebody whom the
    /// server's TLS refuses, and of anybody while the server is not there.
    pub fn is_without_answer(&self) -> bool {
        match self {
            Self::Dial(error) => matches!(error, DialError::Unreachable(_) | DialError::JustFailed),
            // Only a status that was made here, of the failure of a connection, has a cause.
            Self::Status(answered) => answered.source().is_some(),
            Self::Deadline | Self::Denied { .. } => false,
        }
    }
}

impl From<Status> for Answered {
    fn from(status: Status) -> Self {
        Self(Box::new(status))
    }
}

impl Display for Answered {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        match self.0.message() {
            "" => write!(f, "{:?}", self.0.code()),
            message => write!(f, "{:?}: {message}", self.0.code()),
        }
    }
}

impl Error for Answered {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.0.source()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_status_is_told_in_one_line() {
        let told = |status: Status| runtime::telemetry::chain(&Answered::from(status));
        assert_eq!(told(Status::not_found("no such entry")), "NotFound: no such entry");
        assert_eq!(told(Status::new(Code::Unknown, "")), "Unknown");
        let broken = Status::from_error(Box::new(std::io::Error::other("reset by peer")));
        assert_eq!(told(broken), "Unknown: reset by peer");
    }
}
