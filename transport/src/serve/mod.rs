//! The one accept loop: gRPC over HTTP/2, on TCP with TLS and on Unix sockets.
//!
//! Each request carries its [`crate::peer::Peer`], its connection's [`Ending`] and its own [`Share`] as extensions. When a connection has
//! to end, every response that is still open ends with Unavailable, which makes clients of every library come back,
//! then the client is told to go away, and after a grace the connection is dropped.

mod call;
mod connection;
mod crowd;
mod ending;
mod expiry;
mod gather;
mod intake;
mod routes;
mod tcp;
mod unix;

pub use call::Share;
pub use ending::{Ending, Reason};
pub use intake::Expected;
pub use routes::{Answer, Routes};
pub(crate) use tcp::tune;
pub use tcp::{AnonymousLimits, TcpLimits, network_name, tcp};
pub use unix::{UnixLimits, unix};

use std::io;
use std::time::Duration;

/// How long to wait after `accept` failed for want of descriptors or memory: some are given back meanwhile.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// Whether `accept` failed because of the connection it would have returned, so that the next one may work at once.
fn concerns_one_connection(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted | io::ErrorKind::ConnectionReset | io::ErrorKind::Interrupted
    )
}

/// How many descriptors the process may have.
fn descriptors() -> usize {
    let limit = nix::sys::resource::getrlimit(nix::sys::resource::Resource::RLIMIT_NOFILE);
    limit.map_or(1024, |(soft, _)| usize::try_from(soft).unwrap_or(usize::MAX))
}

#[cfg(test)]
mod tests;
