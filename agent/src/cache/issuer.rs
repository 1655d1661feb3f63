//! The server as the cache sees it: the one who signs.

use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use spiffe::id::SpiffeId;
use zeroize::Zeroizing;

use super::desired::EntryId;

/// Why the server signed nothing.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IssueError {
    /// The call failed.
    #[error("the server did not answer the request to sign")]
    Call(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The call took too long.
    #[error("the server did not sign in time")]
    Deadline,
    /// The server answered this item with an error.
    #[error("the server refused to sign (code {code}): {message}")]
    Refused {
        /// The gRPC code of the item.
        code: i32,
        /// What the server says of it.
        message: String,
    },
    /// The server's answer cannot be used.
    #[error("the server's answer is malformed: {0}")]
    Malformed(&'static str),
    /// The answer is no SVID of the wanted identity and key.
    #[error("the server signed something else than what it was asked for")]
    Foreign,
    /// What was signed is not valid by this machine's clock, so it replaces nothing.
    #[error("the server signed what is not valid by this machine's clock: the clock of one of them is wrong")]
    ClockDisagrees,
    /// What was signed is for a form of the entry that is no longer held, time and again.
    #[error("the entry was changed again while its token was being signed")]
    Outdated,
    /// The local key or request could not be made.
    #[error("could not make a key")]
    Key(#[source] crate::keys::KeyError),
}

/// One X.509-SVID to be signed.
#[derive(Debug, Clone)]
pub struct SigningRequest {
    /// The entry it is for.
    pub entry_id: EntryId,
    /// A PKCS#10 request (DER) with the new key.
    pub csr: Bytes,
}

/// A token as the server signed it.
pub struct SignedJwt {
    /// Its compact form.
    pub token: Zeroizing<String>,
    /// Its subject.
    pub id: SpiffeId,
    /// When it was signed.
    pub issued_at: SystemTime,
    /// From when on it is worthless.
    pub expires_at: SystemTime,
}

/// The server, as the one who signs.
#[async_trait]
pub trait Issuer: Send + Sync {
    /// Signs X.509-SVIDs; answers with one chain (DER, leaf first) or refusal for each request, in their order.
    async fn sign_x509(&self, requests: &[SigningRequest]) -> Result<Vec<Result<Vec<Bytes>, IssueError>>, IssueError>;

    /// Signs one JWT-SVID.
    async fn sign_jwt(&self, entry: &EntryId, audience: &[String]) -> Result<SignedJwt, IssueError>;
}
