//! How a node proves to the server what it is: the other half of the server's node attestors.

mod join_token;
mod pem_file;
mod x509pop;

use async_trait::async_trait;
use bytes::Bytes;

pub use self::join_token::JoinToken;
pub use self::x509pop::X509Pop;

/// Why there is no proof.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProveError {
    /// There is no join token to attest with.
    #[error(
        "no join token was given, and the agent has no identity: run `signet-server token generate -spiffeID <the \
         node's alias>` on the server, and then `signet-agent run -joinToken <token>` here"
    )]
    NoToken,
    /// The method knows no challenges.
    #[error("the server challenges a node attestation that has no challenge")]
    UnexpectedChallenge,
    /// A file cannot be read.
    #[error("could not read {}", path.display())]
    File {
        /// The file.
        path: std::path::PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} does not hold {wanted} in PEM form", path.display())]
    Content {
        /// The file.
        path: std::path::PathBuf,
        /// What it should hold.
        wanted: &'static str,
    },
    /// The proof of possession cannot be made.
    #[error("could not prove possession of the node's key")]
    Possession(#[source] spiffe::attest::x509pop::PopError),
    /// The work was cut off by the end of the process.
    #[error("the proof was not finished")]
    Interrupted,
}

impl ProveError {
    /// Whether it may go better later without a new configuration.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::NoToken | Self::UnexpectedChallenge => false,
            Self::File { .. } | Self::Content { .. } | Self::Possession(_) | Self::Interrupted => true,
        }
    }
}

/// One method of node attestation, as the node sees it.
#[async_trait]
pub trait NodeProver: Send + Sync {
    /// The name of the method, which tells the server whom to ask.
    fn name(&self) -> &'static str;

    /// Whether the proof can be given more than once.
    fn repeats(&self) -> bool;

    /// The first message.
    async fn payload(&self) -> Result<Bytes, ProveError>;

    /// The answer to a challenge.
    async fn answer(&self, challenge: Bytes) -> Result<Bytes, ProveError>;
}
