//! Which node is calling: one attestor for each method, each the other half of the agent's prover of the same name.
//!
//! An attestor proves and describes a node; it writes nothing. What it found becomes a record in the same part as the
//! certificate it leads to (see [`crate::registry::agent::attest`]).

pub mod join_token;
pub mod x509pop;

use std::net::IpAddr;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use spiffe::attest::x509pop::PopError;
use spiffe::id::{IdError, SpiffeId};
use spiffe::selector::SelectorSet;

use crate::history::replica::ReplicaError;

/// The other end of an attestation: answers challenges.
#[async_trait]
pub trait Challenger: Send {
    /// Sends a challenge and waits for its answer.
    ///
    /// # Errors
    /// If the node goes away or answers out of turn.
    async fn challenge(&mut self, challenge: Bytes) -> Result<Bytes, ChallengeError>;

    /// Where the node calls from, as the connection has it; nothing if it is not known.
    fn address(&self) -> Option<IpAddr>;
}

/// Why a challenge was not answered.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChallengeError {
    /// The stream ended.
    #[error("node closed the stream instead of answering the challenge")]
    Closed,
    /// Something else came than an answer.
    #[error("node sent something else than the answer to the challenge")]
    OutOfTurn,
    /// The stream failed.
    #[error("stream to the node failed")]
    Stream(#[source] tonic::Status),
}

/// A node that was proved, and what is known of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attested {
    /// Its identity, below `/spire/agent/`.
    pub agent_id: SpiffeId,
    /// What was found out about it.
    pub selectors: SelectorSet,
    /// Whether the method can attest the node again.
    pub can_reattest: bool,
    /// SHA-256 of the join token that proved it; to be used up in the part that records the node.
    pub token: Option<[u8; 32]>,
}

/// A method of node attestation.
#[async_trait]
pub trait NodeAttestor: Send + Sync {
    /// The name of the method, as agents send it.
    fn name(&self) -> &'static str;

    /// Proves the node that sent `payload`.
    ///
    /// # Errors
    /// If the node is not proved.
    async fn attest(
        &self,
        payload: &[u8],
        challenger: &mut dyn Challenger,
        now: SystemTime,
    ) -> Result<Attested, AttestError>;
}

/// Why a node was not attested.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttestError {
    /// The join token is not known. Invalid argument.
    #[error("join token does not exist or has already been used")]
    TokenUnknown,
    /// The join token has ended. Invalid argument.
    #[error("join token expired")]
    TokenExpired,
    /// The certificate or its key was not proved. The [`PopError`] tells whose fault it is.
    #[error("node did not prove possession of an accepted certificate")]
    Possession(#[source] PopError),
    /// Where the node calls from is not known, and the method needs it. Internal.
    #[error("client IP not available for verification")]
    NoAddress,
    /// The certificate does not name the address that the node calls from. Permission denied.
    #[error("client IP does not match any certificate IP SAN")]
    WrongAddress,
    /// What was found out makes no SPIFFE ID. Internal.
    #[error("failed to make the agent ID")]
    AgentId(#[source] IdError),
    /// The node did not answer. As the stream failed.
    #[error("challenge was not answered")]
    Challenge(#[source] ChallengeError),
    /// The newest state cannot be read. Unavailable.
    #[error("state of the trust domain could not be read")]
    State(#[source] ReplicaError),
}

/// What kind of failure an [`AttestError`] is, for the status that the node gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// What the node sent can never succeed.
    Request,
    /// The node may not.
    Denied,
    /// This server cannot.
    Server,
    /// This server cannot now.
    Unavailable,
}

impl AttestError {
    /// Whose fault it is.
    pub fn fault(&self) -> Fault {
        match self {
            AttestError::TokenUnknown | AttestError::TokenExpired | AttestError::Challenge(_) => Fault::Request,
            AttestError::Possession(error) => match error {
                PopError::Message(_)
                | PopError::NoCertificate
                | PopError::TooManyIntermediates
                | PopError::Certificate(_)
                | PopError::Key(_) => Fault::Request,
                PopError::Chain(_) | PopError::Unfitting | PopError::Signature(_) | PopError::Prefix => Fault::Denied,
                _ => Fault::Server,
            },
            AttestError::WrongAddress => Fault::Denied,
            AttestError::NoAddress | AttestError::AgentId(_) => Fault::Server,
            AttestError::State(_) => Fault::Unavailable,
        }
    }

    /// Whether the same attestation may succeed later.
    pub fn is_retryable(&self) -> bool {
        matches!(self, AttestError::State(_) | AttestError::Challenge(_))
    }
}

#[cfg(test)]
pub(crate) mod testing;
