//! Whether to believe a peer: certificate chains and tokens against bundles, at a given time.
//!
//! A credential is judged by the bundle of the trust domain that it names and by no other
//! (SPIFFE-ID, section 3; SPIFFE_Trust_Domain_and_Bundle, section 4.3).

mod jwt;
mod node;
mod x509;

use std::time::Duration;

use crate::jwt::JwtError;
use crate::x509::X509Error;

pub use jwt::jwt_svid;
pub use node::{Fault, NodePathError, node_path};
pub use x509::{VerifiedChain, VerifiedPath, x509_chain, x509_path};

/// How far clocks may be apart when tokens are checked, as in SPIRE.
pub const LEEWAY: Duration = Duration::from_secs(60);

/// The part that the verified peer plays in the connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeerRole {
    /// It connects: an extended key usage has to list clientAuth.
    Client,
    /// It serves: an extended key usage has to list serverAuth.
    Server,
}

/// Why a peer or a token is not to be believed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// No certificate.
    #[error("peer sent no certificate")]
    NoCertificate,
    /// More certificates than any honest chain has.
    #[error("peer sent {count} certificates, at most 16 are looked at")]
    TooManyCertificates {
        /// How many there are.
        count: usize,
    },
    /// The names in the chain allow more paths than are searched.
    #[error("peer certificates can be put together in too many ways")]
    TooManyPaths,
    /// The leaf is not an X509-SVID.
    #[error("peer certificate is not an X509-SVID")]
    Leaf(#[source] X509Error),
    /// An authority between leaf and root.
    #[error("intermediate certificate is not acceptable")]
    Intermediate(#[source] X509Error),
    /// There is no bundle of the credential's trust domain.
    #[error("no bundle of the trust domain is known")]
    UnknownTrustDomain,
    /// The bundle has no authority that is valid now.
    #[error("bundle of the trust domain has no valid X.509 authority")]
    NoAuthority,
    /// The bundle has the authority that signed the certificate, and it has not begun, or is over.
    #[error(
        "the authority that signed the peer's certificate is in the bundle, but it is not valid by this machine's clock; \
         compare the clocks"
    )]
    AuthorityTime,
    /// No path to an authority of the bundle holds.
    #[error("no valid certificate path to the trust domain's bundle")]
    Path(#[source] webpki::Error),
    /// A name constraint; those on URIs are not implemented, so every chain with one is refused.
    #[error("name constraints extension does not allow the certificate, or is not supported for URIs")]
    NameConstraints(#[source] webpki::Error),
    /// More authorities below a root than its path length allows.
    #[error("path length of the root is exceeded")]
    PathLength,
    /// The token is malformed.
    #[error("token is not a JWT-SVID")]
    Token(#[source] JwtError),
    /// The token is meant for somebody else.
    #[error("token is meant for another audience")]
    Audience,
    /// The token is over.
    #[error("token has expired")]
    Expired,
    /// The token's time has not come.
    #[error("token is not valid yet")]
    NotYetValid,
    /// The bundle has no key that could have signed the token.
    #[error("no key of the trust domain fits the token")]
    UnknownKey,
    /// The signature is not that of the trust domain's key.
    #[error("token signature does not verify")]
    Signature,
}
