//! Where a server is reached. Every address is taken before anything is written: one that is wrong, or another
//! server's, is noticed while the data directory is still as it was.

use std::io::{Error, ErrorKind};
use std::net::SocketAddr;

use runtime::telemetry::settings::HealthPages;
use tokio::net::TcpListener;
use transport::socket;

use super::StartError;
use crate::config::Config;

/// Bound, and not yet answered: whoever connects waits until the server is ready.
pub(super) struct Listeners {
    /// For agents.
    pub network: TcpListener,
    /// For operators on this machine.
    pub admin: socket::Listener,
    /// For health checks, if configured.
    pub health: Option<TcpListener>,
    /// For whoever collects metrics, if configured.
    pub metrics: Option<TcpListener>,
}

impl Listeners {
    pub(super) async fn bind(config: &Config) -> Result<Self, StartError> {
        let network = SocketAddr::new(config.bind_address, config.bind_port);
        let network =
            listen(&network.ip().to_string(), network.port(), "server.bind_address, server.bind_port").await?;
        let health = match &config.health {
            Some(HealthPages { address, port, .. }) => {
                Some(listen(address, *port, "health_checks.bind_address, health_checks.bind_port").await?)
            }
            None => None,
        };
        let metrics = match &config.telemetry.prometheus {
            Some((address, port)) => {
                Some(listen(address, *port, "telemetry.Prometheus.host, telemetry.Prometheus.port").await?)
            }
            None => None,
        };
        // Last, because it leaves a file behind.
        let admin = socket::bind_unix(&config.socket_path, 0o750, 0o770).map_err(StartError::Socket)?;
        Ok(Self { network, admin, health, metrics })
    }
}

async fn listen(host: &str, port: u16, keys: &'static str) -> Result<TcpListener, StartError> {
    TcpListener::bind((host, port)).await.map_err(|source| StartError::Listen {
        address: if host.contains(':') { format!("[{host}]:{port}") } else { format!("{host}:{port}") },
        remedy: remedy(&source),
        keys,
        source,
    })
}

/// What an operator can do about an address that cannot be listened on.
fn remedy(error: &Error) -> &'static str {
    match error.kind() {
        ErrorKind::AddrInUse => "stop the process that has it, or choose another",
        ErrorKind::AddrNotAvailable => "choose an address that this machine has",
        ErrorKind::PermissionDenied => "choose a port above 1023, or grant CAP_NET_BIND_SERVICE",
        _ => "choose another",
    }
}
