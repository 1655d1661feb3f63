//! The client's end: channels over TLS to a pinned server, and over Unix sockets.

mod race;

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::ClientConfig;
use rustls::pki_types::ServerName;
use tokio::net::{TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint};
use tower::service_fn;

/// How long connecting may take, handshake included.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);

/// Why there is no channel.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DialError {
    /// Host and port do not make an address.
    #[error("{host}:{port} is not an address")]
    Address {
        /// As configured.
        host: String,
        /// As configured.
        port: u16,
        /// What is wrong with it.
        #[source]
        source: tonic::transport::Error,
    },
    /// Nobody answers there, or not the one who should. A refused certificate is in the chain of sources, as
    /// [`crate::verify::PeerRefused`].
    #[error("cannot connect to {to}")]
    Connect {
        /// Address or path.
        to: String,
        /// What happened.
        #[source]
        source: tonic::transport::Error,
    },
}

fn endpoint(host: &str, port: u16) -> Result<Endpoint, DialError> {
    let authority = if host.contains(':') && !host.starts_with('[') { format!("[{host}]") } else { host.to_owned() };
    let endpoint = Endpoint::from_shared(format!("https://{authority}:{port}"))
        .map_err(|source| DialError::Address { host: host.to_owned(), port, source })?;
    // No HTTP/2 pings: servers of other makers take frequent ones for an attack. The kernel watches the connection.
    Ok(endpoint
        .connect_timeout(CONNECT_TIMEOUT)
        .initial_stream_window_size(1024 * 1024)
        .initial_connection_window_size(1024 * 1024))
}

async fn handshake(address: SocketAddr, tls: Arc<ClientConfig>) -> io::Result<TlsStream<TcpStream>> {
    // No server name is sent and none is checked; the TLS library wants one all the same.
    let name = ServerName::try_from("spiffe.invalid").map_err(io::Error::other)?;
    let stream = TcpStream::connect(address).await?;
    crate::serve::tune(&stream);
    TlsConnector::from(tls).connect(name, stream).await
}

async fn open(host: String, port: u16, tls: Arc<ClientConfig>, last: Last) -> io::Result<TokioIo<impl Stream>> {
    let attempt = async {
        let known = last.get().map(|ip| SocketAddr::new(ip, port));
        let resolved = async { Ok(tokio::net::lookup_host((host.as_str(), port)).await?.collect()) };
        let (stream, address) = race::first(known, resolved, |address| handshake(address, Arc::clone(&tls))).await?;
        last.set(address.ip());
        Ok(stream)
    };
    // The channel's own limit covers only the first attempt.
    tokio::time::timeout(CONNECT_TIMEOUT, attempt)
        .await
        .map_err(|_| io::Error::from(io::ErrorKind::TimedOut))?
        .map(TokioIo::new)
}

/// The address of a host that answered last; the next attempt begins there. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Last(Arc<Mutex<Option<IpAddr>>>);

impl Last {
    fn get(&self) -> Option<IpAddr> {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set(&self, address: IpAddr) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(address);
    }
}

trait Stream: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static {}
impl<S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Send + Unpin + 'static> Stream for S {}

/// A channel to a server that is connected now.
///
/// # Errors
/// If nobody answers, or not the server that `tls` accepts.
pub async fn tls(host: &str, port: u16, tls: &Arc<ClientConfig>) -> Result<Channel, DialError> {
    let (at, config) = (host.trim_matches(['[', ']']).to_owned(), Arc::clone(tls));
    endpoint(host, port)?
        .connect_with_connector(service_fn(move |_| open(at.clone(), port, Arc::clone(&config), Last::default())))
        .await
        .map_err(|source| DialError::Connect { to: format!("{host}:{port}"), source })
}

/// A channel over one connection, made now: once that is lost, every call on the channel fails, so that the caller decides
/// when and as whom the next connection is made. Of several addresses `last` is tried first.
///
/// # Errors
/// If nobody answers, or not the server that `tls` accepts.
pub async fn tls_once(host: &str, port: u16, tls: &Arc<ClientConfig>, last: &Last) -> Result<Channel, DialError> {
    let (at, config, last) = (host.trim_matches(['[', ']']).to_owned(), Arc::clone(tls), last.clone());
    let mut made = false;
    endpoint(host, port)?
        .connect_with_connector(service_fn(move |_| {
            let first = !std::mem::replace(&mut made, true);
            let (at, config, last) = (at.clone(), Arc::clone(&config), last.clone());
            async move { if first { open(at, port, config, last).await } else { Err(io::ErrorKind::NotConnected.into()) } }
        }))
        .await
        .map_err(|source| DialError::Connect { to: format!("{host}:{port}"), source })
}

/// A channel to a server that connects with the first call, and again when a connection is lost.
///
/// # Errors
/// If host and port are no address.
pub fn tls_lazy(host: &str, port: u16, tls: &Arc<ClientConfig>) -> Result<Channel, DialError> {
    let (at, config, last) = (host.trim_matches(['[', ']']).to_owned(), Arc::clone(tls), Last::default());
    Ok(endpoint(host, port)?
        .connect_with_connector_lazy(service_fn(move |_| open(at.clone(), port, Arc::clone(&config), last.clone()))))
}

/// A channel over a Unix socket that is connected now.
///
/// # Errors
/// If nobody answers there.
pub async fn unix(path: &Path) -> Result<Channel, DialError> {
    let at: PathBuf = path.to_owned();
    Endpoint::from_static("http://localhost")
        .connect_timeout(CONNECT_TIMEOUT)
        .connect_with_connector(service_fn(move |_| {
            let at = at.clone();
            async move { UnixStream::connect(at).await.map(TokioIo::new) }
        }))
        .await
        .map_err(|source| DialError::Connect { to: path.display().to_string(), source })
}
