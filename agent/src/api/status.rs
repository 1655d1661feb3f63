//! What callers are told when something does not work: the one place of the agent that makes gRPC statuses of errors.

use spiffe::id::IdError;
use spiffe::verify::VerifyError;
use tonic::Status;

use crate::cache::CacheError;
use crate::workload::Refusal;

/// The caller has no identity. Client libraries look for exactly this text.
pub(super) fn no_identity() -> Status {
    Status::permission_denied("no identity issued")
}

/// Nothing can be said about any caller yet.
pub(super) fn not_synced() -> Status {
    Status::unavailable("the agent has not heard from its server yet")
}

/// An identity is due and has not come.
pub(super) fn not_issued() -> Status {
    Status::unavailable("the identity could not be issued yet")
}

/// A mandatory field of a request is missing or beyond all bounds.
pub(super) fn invalid(why: impl Into<String>) -> Status {
    Status::invalid_argument(why)
}

/// The caller could not be attested. A process that is another one by now gets no second chance on its connection;
/// anything else may work later.
pub(super) fn refused(refusal: &Refusal) -> Status {
    match refusal {
        Refusal::NotTheSame(_) => Status::unauthenticated("the caller is not the process that connected"),
        Refusal::NoAnswer(_) => Status::unavailable("workload attestation failed"),
        Refusal::Unseen(_) => Status::unavailable("the caller could not be looked at in time"),
    }
}

/// A connection without a process at its other end.
pub(super) fn no_peer() -> Status {
    Status::unauthenticated("the caller is not a process of this machine")
}

/// An identity was asked for by a text that is none.
pub(super) fn malformed_id(error: &IdError) -> Status {
    Status::invalid_argument(format!("invalid requested SPIFFE ID: {error}"))
}

/// A JWT-SVID could not be had.
pub(super) fn jwt(error: &CacheError) -> Status {
    match error {
        CacheError::NotEntitled => no_identity(),
        CacheError::Issue(_) => Status::unavailable("could not fetch a JWT-SVID"),
    }
}

/// A token is not to be believed; the text holds nothing of the token.
pub(super) fn token(error: &VerifyError) -> Status {
    Status::invalid_argument(runtime::telemetry::chain(error))
}

/// The answer is larger than what client libraries take. A part of it would look like a revocation of the rest.
pub(super) fn too_large(bytes: usize, entries: usize) -> Status {
    Status::resource_exhausted(format!(
        "the answer for {entries} matching entries has {bytes} bytes, more than clients accept; use narrower selectors"
    ))
}
