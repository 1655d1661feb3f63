//! What ends, or delays, an agent's identity.

use std::path::PathBuf;

use spiffe::bundle::BundleError;
use spiffe::id::SpiffeId;
use spiffe::x509::X509Error;
use transport::rotating::TlsError;

use super::{DataError, Denial};
use crate::keys::KeyError;
use crate::server_link::{AttestError, LinkError};

/// Why the agent has no identity, or cannot get its next one.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum IdentityError {
    /// The agent's data cannot be read or written.
    #[error("could not use the agent's data")]
    Data(#[source] DataError),
    /// No key could be made or kept.
    #[error("could not make the agent's key")]
    Key(#[source] KeyError),
    /// The node attestation failed.
    #[error("node attestation failed")]
    Attest(#[source] AttestError),
    /// The renewal failed.
    #[error("could not renew the agent's SVID")]
    Renew(#[source] LinkError),
    /// The server's answer is not an SVID for this agent and key.
    #[error("the server signed no SVID of this agent")]
    Svid(#[source] X509Error),
    /// The SVID is for somebody who is no agent of the trust domain, or for another agent.
    #[error("the server signed an SVID for {0}, which is not this agent")]
    Foreign(SpiffeId),
    /// TLS cannot use the SVID.
    #[error("could not use the agent's SVID for TLS")]
    Tls(#[source] TlsError),
    /// The server does not accept the identity, and this process cannot get another.
    #[error("{denial}; the agent's SVID was deleted{}", way_back(*denial, agent.as_ref()))]
    Denied {
        /// What the server said.
        denial: Denial,
        /// The agent, if it cannot attest again by itself.
        agent: Option<SpiffeId>,
    },
    /// The SVID ran out and can neither be renewed nor attested for again.
    #[error(
        "the agent's SVID expired before it could be renewed, and its join token is used up{}",
        way_back(Denial::Expired, Some(agent))
    )]
    Expired {
        /// The agent.
        agent: SpiffeId,
    },
    /// The new SVID is not valid by this machine's clock, and the one in use is.
    #[error(
        "the server signed an SVID that is not valid by this machine's clock, while the one in use is: the clock of one \
         of them is wrong"
    )]
    ClockDisagrees,
    /// The server cannot be known by the stored bundle any more.
    #[error("the server's authority is not in the agent's trust bundle; delete the agent's data to bootstrap anew")]
    UnknownAuthority,
    /// As before, and the stored identity was deleted so that the next start bootstraps anew.
    #[error("the server's authority is not in the agent's trust bundle; stopping to bootstrap anew")]
    Rebootstrap,
    /// Rebootstrapping was asked for always, but this agent cannot attest again.
    #[error("rebootstrap_mode is \"always\", but this agent cannot attest again")]
    CannotRebootstrap,
    /// The bundle to know the server by cannot be read.
    #[error("could not read the trust bundle to bootstrap with")]
    Bootstrap(#[source] BootstrapError),
}

/// How an agent that attested with a join token comes back: the commands for whoever reads this at night.
fn way_back(denial: Denial, agent: Option<&SpiffeId>) -> String {
    let Some(agent) = agent else { return String::new() };
    let first = match denial {
        Denial::Banned => format!("to let it back in, `signet-server agent evict -spiffeID {agent}` ends the ban, "),
        _ => "to bring it back, ".to_owned(),
    };
    format!(
        ": {first}`signet-server entry show -parentID {agent}` shows the alias of this node, `signet-server token generate \
         -spiffeID ALIAS` makes a join token for it, and `signet-agent run -joinToken TOKEN` attests with that here"
    )
}

/// Why there is no bundle to bootstrap with.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BootstrapError {
    /// The file cannot be read.
    #[error("could not read {}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file does not hold a bundle.
    #[error("{} holds no trust bundle of this trust domain", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: BundleError,
    },
    /// The bundle has no certificate authority, so nobody could be known by it.
    #[error("{} holds no X.509 authority", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
    },
}
