//! From an error to what a client sees: the only place where either kind of status is made.
//!
//! A [`Failure`] names the operation that failed in the words that SPIRE uses, because scripts and agents read them,
//! and carries its cause. The text on the wire is the operation and then each cause behind a colon, except that
//! `NotFound` tells no cause.

use std::error::Error;
use std::fmt::Write as _;

use prost::Message as _;
use spiffe_proto::rpc_status;
use spiffe_proto::types;
use spiffe_proto::types::permission_denied_details::Reason;
use tonic::{Code, Status};

use crate::attest::{AttestError, ChallengeError, Fault};
use crate::authority::issue::IssueError;
use crate::authority::profile::ProfileError;
use crate::history::{ProposeError, ReplicaError, StoreError};
use crate::limits::LimitError;

/// Longest text that is sent, in bytes; longer ones are cut.
const LONGEST_TEXT: usize = 1024;

/// What kind of failure it is: whose fault, and what a client may do about it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Class {
    /// The request can never succeed.
    Invalid,
    /// What the request names is not there.
    Absent,
    /// What the request would make is there.
    Exists,
    /// The caller may not. Agents decide by the reason whether they attest again or give up.
    Denied(Option<Reason>),
    /// The request does not fit the state of the server.
    Precondition,
    /// A limit of the caller, or the disk.
    Exhausted,
    /// Switched off, or not served.
    Unserved,
    /// Cannot be answered now; try again.
    Unavailable,
    /// The caller's time is over.
    TooLate,
    /// Our fault.
    Internal,
}

impl Class {
    /// The gRPC status code of this class.
    pub fn code(self) -> Code {
        match self {
            Class::Invalid => Code::InvalidArgument,
            Class::Absent => Code::NotFound,
            Class::Exists => Code::AlreadyExists,
            Class::Denied(_) => Code::PermissionDenied,
            Class::Precondition => Code::FailedPrecondition,
            Class::Exhausted => Code::ResourceExhausted,
            Class::Unserved => Code::Unimplemented,
            Class::Unavailable => Code::Unavailable,
            Class::TooLate => Code::DeadlineExceeded,
            Class::Internal => Code::Internal,
        }
    }
}

/// A request, or an item of one, that failed.
#[derive(Debug)]
pub struct Failure {
    class: Class,
    operation: &'static str,
    /// What the operation was about, told behind it; empty for most.
    subject: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Failure {
    /// A failure of `operation`.
    pub fn new(class: Class, operation: &'static str) -> Self {
        Self { class, operation, subject: String::new(), cause: None }
    }

    /// The request can never succeed.
    pub fn invalid(operation: &'static str) -> Self {
        Self::new(Class::Invalid, operation)
    }

    /// What the request names is not there.
    pub fn absent(operation: &'static str) -> Self {
        Self::new(Class::Absent, operation)
    }

    /// Our fault.
    pub fn internal(operation: &'static str) -> Self {
        Self::new(Class::Internal, operation)
    }

    /// The server cannot answer now.
    pub fn unavailable(operation: &'static str) -> Self {
        Self::new(Class::Unavailable, operation)
    }

    /// The caller may not call the method at `path`.
    pub fn denied(path: &str, reason: Option<Reason>) -> Self {
        let subject = format!("for method {path}");
        Self { class: Class::Denied(reason), operation: "authorization denied", subject, cause: None }
    }

    /// The same, with what caused it.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// A proposal that `operation` made and that was not committed; `refused` says what a refusal means.
    pub fn of_proposal<R>(operation: &'static str, error: ProposeError<R>, refused: impl FnOnce(R) -> Self) -> Self {
        let (class, cause) = match error {
            ProposeError::Refused(refusal) => return refused(refusal),
            ProposeError::Full(StoreError::Exhausted { .. }) => (Class::Exhausted, StoreTrouble::Exhausted),
            ProposeError::Full(_) => (Class::Exhausted, StoreTrouble::Full),
            ProposeError::TooLarge => (Class::Exhausted, StoreTrouble::TooLarge),
            ProposeError::Invalid(_) | ProposeError::Panicked => (Class::Internal, StoreTrouble::Decision),
            ProposeError::Unavailable(_) | ProposeError::Unknown(_) => (Class::Unavailable, StoreTrouble::Away),
        };
        Self::new(class, operation).because(cause)
    }

    /// `operation` needs the newest state, and that cannot be had. Says nothing else: an agent that is told of a
    /// refusal may erase itself.
    pub fn of_replica(operation: &'static str, error: ReplicaError) -> Self {
        Self::new(Class::Unavailable, operation).because(error)
    }

    /// The limit of `operation` was reached.
    pub fn of_limit(operation: &'static str, error: LimitError) -> Self {
        Self::new(Class::Exhausted, operation).because(error)
    }

    /// `operation` could not read a request: one that is larger than its method takes or that made no progress keeps its
    /// status, anything else is no request.
    pub fn of_request(operation: &'static str, status: Status) -> Self {
        let class = match status.code() {
            Code::ResourceExhausted => Class::Exhausted,
            Code::DeadlineExceeded => Class::TooLate,
            _ => Class::Invalid,
        };
        Self::new(class, operation).because(status)
    }

    /// A node was not attested.
    pub fn of_attestation(error: AttestError) -> Self {
        if matches!(error, AttestError::TokenExpired) {
            return Self::invalid("join token expired");
        }
        if let AttestError::Challenge(ChallengeError::Stream(status)) = error {
            return Self::of_request("failed to attest", status);
        }
        let class = match error.fault() {
            Fault::Request => Class::Invalid,
            Fault::Denied => Class::Denied(None),
            Fault::Server => Class::Internal,
            Fault::Unavailable => Class::Unavailable,
        };
        Self::new(class, "failed to attest").because(error)
    }

    /// Nothing was signed for `operation`.
    pub fn of_issue(operation: &'static str, error: IssueError) -> Self {
        let class = match &error {
            IssueError::NotReady | IssueError::Profile(ProfileError::AuthorityExpired) => Class::Unavailable,
            IssueError::Profile(ProfileError::Audience | ProfileError::Subject | ProfileError::Lifetime)
            | IssueError::PublicKey
            | IssueError::Name(_)
            | IssueError::RepeatedAttribute => Class::Invalid,
            _ => Class::Internal,
        };
        Self::new(class, operation).because(error)
    }

    /// Why an agent may not act, if that is what it is.
    pub fn denial(&self) -> Option<Reason> {
        match self.class {
            Class::Denied(reason) => reason,
            _ => None,
        }
    }

    /// What kind of failure it is.
    pub fn class(&self) -> Class {
        self.class
    }

    /// The text a client sees.
    pub fn text(&self) -> String {
        let mut text = self.operation.to_owned();
        if !self.subject.is_empty() {
            text.push(' ');
            text.push_str(&self.subject);
        }
        if self.class != Class::Absent {
            let mut cause = self.cause.as_deref().map(|cause| cause as &dyn Error);
            while let Some(error) = cause {
                // Writing to a String does not fail.
                let _ = write!(text, ": {error}");
                cause = error.source();
            }
        }
        if text.len() > LONGEST_TEXT {
            let end = (0..=LONGEST_TEXT).rev().find(|&end| text.is_char_boundary(end)).unwrap_or(0);
            text.truncate(end);
        }
        text
    }

    /// The status of one item of a batch.
    pub fn item(&self) -> types::Status {
        types::Status { code: self.class.code() as i32, message: self.text() }
    }
}

/// What a client is told about the store: whether another try helps, and nothing of the place it is kept in.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum StoreTrouble {
    #[error("the data store is full; deletions, bans and evictions are still accepted")]
    Full,
    #[error("the data store is full, even for deletions")]
    Exhausted,
    #[error("the data store cannot confirm the change now")]
    Away,
    #[error("the record is too large")]
    TooLarge,
    #[error("the change could not be decided")]
    Decision,
}

/// The status of an item that succeeded.
pub fn ok() -> types::Status {
    types::Status { code: Code::Ok as i32, message: "OK".to_owned() }
}

impl From<Failure> for tonic::Status {
    fn from(failure: Failure) -> Self {
        let (code, text) = (failure.class.code(), failure.text());
        let Class::Denied(Some(reason)) = failure.class else {
            return tonic::Status::new(code, text);
        };
        let detail = types::PermissionDeniedDetails { reason: reason as i32 };
        let status = rpc_status::Status {
            code: code as i32,
            message: text.clone(),
            details: vec![prost_types::Any {
                type_url: "type.googleapis.com/spire.api.types.PermissionDeniedDetails".to_owned(),
                value: detail.encode_to_vec(),
            }],
        };
        tonic::Status::with_details(code, text, status.encode_to_vec().into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("outer")]
    struct Outer(#[source] Inner);

    #[derive(Debug, thiserror::Error)]
    #[error("inner")]
    struct Inner;

    fn golden() -> Vec<(Failure, Code, &'static str)> {
        vec![
            (Failure::invalid("missing ID"), Code::InvalidArgument, "missing ID"),
            (
                Failure::invalid("failed to convert entry").because(Outer(Inner)),
                Code::InvalidArgument,
                "failed to convert entry: outer: inner",
            ),
            (Failure::absent("entry not found").because(Outer(Inner)), Code::NotFound, "entry not found"),
            (
                Failure::new(Class::Exists, "similar entry already exists"),
                Code::AlreadyExists,
                "similar entry already exists",
            ),
            (Failure::denied("/a.B/C", None), Code::PermissionDenied, "authorization denied for method /a.B/C"),
            (
                Failure::denied("/a.B/C", Some(Reason::AgentBanned)),
                Code::PermissionDenied,
                "authorization denied for method /a.B/C",
            ),
            (
                Failure::new(Class::Precondition, "error getting node attestor"),
                Code::FailedPrecondition,
                "error getting node attestor",
            ),
            (
                Failure::of_limit(
                    "rejecting request due to certificate signing rate limiting",
                    LimitError::AboveBurst { count: 501, burst: 500 },
                ),
                Code::ResourceExhausted,
                "rejecting request due to certificate signing rate limiting: rate (501) exceeds burst size (500)",
            ),
            (
                Failure::new(Class::Unserved, "JWT functionality is disabled"),
                Code::Unimplemented,
                "JWT functionality is disabled",
            ),
            (Failure::unavailable("server is stopping"), Code::Unavailable, "server is stopping"),
            (Failure::new(Class::TooLate, "deadline exceeded"), Code::DeadlineExceeded, "deadline exceeded"),
            (
                Failure::internal("failed to sign X509 SVID").because(Inner),
                Code::Internal,
                "failed to sign X509 SVID: inner",
            ),
            (
                Failure::of_proposal(
                    "failed to delete entry",
                    ProposeError::<Inner>::Full(StoreError::Exhausted { free: 1 }),
                    |_| unreachable!(),
                ),
                Code::ResourceExhausted,
                "failed to delete entry: the data store is full, even for deletions",
            ),
            (
                Failure::of_proposal(
                    "failed to create entry",
                    ProposeError::<Inner>::Full(StoreError::Full { free: 1, reserve: 2 }),
                    |_| unreachable!(),
                ),
                Code::ResourceExhausted,
                "failed to create entry: the data store is full; deletions, bans and evictions are still accepted",
            ),
            (
                Failure::of_proposal(
                    "failed to create entry",
                    ProposeError::<Inner>::Unavailable(None),
                    |_| unreachable!(),
                ),
                Code::Unavailable,
                "failed to create entry: the data store cannot confirm the change now",
            ),
            (
                Failure::of_proposal("failed to create entry", ProposeError::<Inner>::TooLarge, |_| unreachable!()),
                Code::ResourceExhausted,
                "failed to create entry: the record is too large",
            ),
            (
                Failure::of_proposal("failed to create entry", ProposeError::<Inner>::Panicked, |_| unreachable!()),
                Code::Internal,
                "failed to create entry: the change could not be decided",
            ),
            (
                Failure::of_attestation(AttestError::TokenUnknown),
                Code::InvalidArgument,
                "failed to attest: join token does not exist or has already been used",
            ),
            (Failure::of_attestation(AttestError::TokenExpired), Code::InvalidArgument, "join token expired"),
            (
                Failure::of_attestation(AttestError::NoAddress),
                Code::Internal,
                "failed to attest: client IP not available for verification",
            ),
            (
                Failure::of_attestation(AttestError::State(ReplicaError::Behind)),
                Code::Unavailable,
                "failed to attest: state of the trust domain could not be read: \
                 the newest state was not reached within 2 s",
            ),
            (
                Failure::of_issue("failed to sign X509-SVID", IssueError::NotReady),
                Code::Unavailable,
                "failed to sign X509-SVID: no authority is ready to sign",
            ),
            (
                Failure::of_issue("failed to sign JWT-SVID", IssueError::Profile(ProfileError::Audience)),
                Code::InvalidArgument,
                "failed to sign JWT-SVID: request does not fit the profile: \
                 at least one audience is required, and none may be empty",
            ),
            (
                Failure::of_issue("failed to sign X509-SVID", IssueError::Profile(ProfileError::AuthorityExpired)),
                Code::Unavailable,
                "failed to sign X509-SVID: request does not fit the profile: authority has expired",
            ),
            (
                Failure::of_issue("failed to sign X509-SVID", IssueError::NoCertificate),
                Code::Internal,
                "failed to sign X509-SVID: authority has no certificate",
            ),
            (
                Failure::of_proposal("failed to create entry", ProposeError::Refused(Inner), |inner| {
                    Failure::invalid("failed to create entry").because(inner)
                }),
                Code::InvalidArgument,
                "failed to create entry: inner",
            ),
        ]
    }

    #[test]
    fn every_failure_has_its_code_and_text() {
        for (failure, code, text) in golden() {
            let item = failure.item();
            assert_eq!((item.code, item.message.as_str()), (code as i32, text));
            let status = tonic::Status::from(failure);
            assert_eq!((status.code(), status.message()), (code, text));
        }
    }

    #[test]
    fn the_reason_of_a_refusal_travels_in_the_details_and_nothing_else_does() {
        for (failure, ..) in golden() {
            let class = failure.class();
            let status = tonic::Status::from(failure);
            let Class::Denied(Some(reason)) = class else {
                assert!(status.details().is_empty(), "{class:?}");
                continue;
            };
            let packed = rpc_status::Status::decode(status.details()).unwrap();
            assert_eq!((packed.code, packed.message.as_str()), (7, status.message()));
            assert_eq!(packed.details.len(), 1);
            assert_eq!(packed.details[0].type_url, "type.googleapis.com/spire.api.types.PermissionDeniedDetails");
            let detail = types::PermissionDeniedDetails::decode(&*packed.details[0].value).unwrap();
            assert_eq!(detail.reason, reason as i32);
        }
    }

    #[test]
    fn a_long_text_is_cut_between_characters() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Long(String);
        let failure = Failure::internal("x").because(Long("ü".repeat(4_000)));
        let text = failure.text();
        assert!(text.len() <= LONGEST_TEXT && text.len() > LONGEST_TEXT - 2 && text.starts_with("x: üü"));
    }
}
