//! Plain clients of the wire, seen from outside: no code of the server or the agent is used to load them.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use anyhow::{Context, Result, anyhow};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::{DigitallySignedStruct, SignatureScheme};
use tokio::net::{TcpSocket, TcpStream, UnixStream};
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;
use tonic::transport::{Channel, Endpoint, Uri};

/// A key pair with the certificate request that a SPIFFE agent would send for it.
pub struct Requested {
    /// PKCS#8 DER of the private key.
    pub key: Vec<u8>,
    /// DER of the certificate request.
    pub csr: Vec<u8>,
}

impl Requested {
    /// Makes a fresh P-256 key and a request, with `uri` as its only SAN if one is given.
    pub fn new(uri: Option<&str>) -> Result<Self> {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = rcgen::CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CountryName, "US");
        params.distinguished_name.push(rcgen::DnType::OrganizationName, "SPIRE");
        if let Some(uri) = uri {
            params.subject_alt_names.push(rcgen::SanType::URI(uri.try_into()?));
        }
        let csr = params.serialize_request(&key)?.der().to_vec();
        Ok(Self { key: key.serialize_der(), csr })
    }
}

/// What a client presents in mutual TLS: chain in DER, leaf first, and its PKCS#8 key.
#[derive(Clone)]
pub struct Presented {
    /// Certificates in DER, leaf first.
    pub chain: Vec<Vec<u8>>,
    /// PKCS#8 DER.
    pub key: Vec<u8>,
}

/// The load generator measures the server's work, so it accepts any server certificate and spends nothing on checking it.
#[derive(Debug)]
struct Unchecked(Arc<rustls::crypto::CryptoProvider>);

impl ServerCertVerifier for Unchecked {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// Opens one HTTP/2 connection over TLS from loopback address `from` (rate limits count addresses).
pub async fn tls(to: SocketAddr, from: SocketAddr, presented: Option<Presented>) -> Result<Channel> {
    let connector = connector(presented)?;
    let connect = tower::service_fn(move |_: Uri| {
        let connector = connector.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(shaken(&connector, to, from).await?)) }
    });
    Endpoint::from_static("http://server").connect_with_connector(connect).await.context("connecting over TLS")
}

/// Opens one connection over TLS from `from` and says nothing over it yet.
///
/// # Errors
/// If the handshake fails.
pub async fn tls_stream(
    to: SocketAddr,
    from: SocketAddr,
    presented: Option<Presented>,
) -> Result<TlsStream<TcpStream>> {
    Ok(shaken(&connector(presented)?, to, from).await?)
}

async fn shaken(connector: &TlsConnector, to: SocketAddr, from: SocketAddr) -> std::io::Result<TlsStream<TcpStream>> {
    let socket = if from.is_ipv6() { TcpSocket::new_v6()? } else { TcpSocket::new_v4()? };
    socket.bind(from)?;
    let stream = socket.connect(to).await?;
    stream.set_nodelay(true)?;
    connector.connect(ServerName::from(to.ip()), stream).await
}

fn connector(presented: Option<Presented>) -> Result<TlsConnector> {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Unchecked(provider)));
    let mut config = match presented {
        None => builder.with_no_client_auth(),
        Some(presented) => builder.with_client_auth_cert(
            presented.chain.into_iter().map(CertificateDer::from).collect(),
            PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(presented.key)),
        )?,
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config.enable_sni = false;
    Ok(TlsConnector::from(Arc::new(config)))
}

/// Opens one HTTP/2 connection over a Unix socket.
pub async fn unix(path: &Path) -> Result<Channel> {
    let path: PathBuf = path.into();
    let connect = tower::service_fn(move |_: Uri| {
        let path = path.clone();
        async move { Ok::<_, std::io::Error>(TokioIo::new(UnixStream::connect(path).await?)) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connect).await.context("connecting to the socket")
}

/// Speaks HTTP/2 over a socket that is connected already, possibly by another process.
///
/// # Errors
/// If the other side does not speak HTTP/2.
pub async fn over(stream: UnixStream) -> Result<Channel> {
    let mut stream = Some(stream);
    let connect = tower::service_fn(move |_: Uri| {
        let stream = stream.take().map(TokioIo::new);
        async move { stream.ok_or_else(|| std::io::Error::other("the connection is over")) }
    });
    Endpoint::from_static("http://localhost").connect_with_connector(connect).await.context("speaking over the socket")
}

/// A Workload API request with the security header.
pub fn secured<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("workload.spiffe.io", tonic::metadata::MetadataValue::from_static("true"));
    request
}

/// The address of simulated node `number`, inside 127.0.0.0/8, so that each has its own rate limit.
pub fn loopback(number: usize) -> Result<SocketAddr> {
    let number = u32::try_from(number).context("too many nodes")?;
    let [_, b, c, d] = (number + 2).to_be_bytes();
    if b != 0 {
        return Err(anyhow!("too many nodes for one loopback network"));
    }
    Ok(SocketAddr::from(([127, 1 + b, c, d], 0)))
}

/// Attests by join token from the loopback address `from`; the answer is what the node then presents.
///
/// # Errors
/// If the server refuses.
pub async fn attest(server: SocketAddr, from: SocketAddr, token: String) -> Result<Presented> {
    use spiffe_proto::agent::agent_client::AgentClient;
    use spiffe_proto::agent::{AgentX509svidParams, AttestAgentRequest, attest_agent_request, attest_agent_response};
    let requested = Requested::new(None)?;
    let channel = tls(server, from, None).await?;
    let params = AttestAgentRequest {
        step: Some(attest_agent_request::Step::Params(attest_agent_request::Params {
            data: Some(spiffe_proto::types::AttestationData {
                r#type: "join_token".into(),
                payload: token.into_bytes().into(),
            }),
            params: Some(AgentX509svidParams { csr: requested.csr.into() }),
        })),
    };
    let mut answers = AgentClient::new(channel).attest_agent(tokio_stream::once(params)).await?.into_inner();
    let answer = answers.message().await?.context("attestation ended without an answer")?;
    let Some(attest_agent_response::Step::Result(result)) = answer.step else {
        return Err(anyhow!("unexpected challenge"));
    };
    let chain =
        result.svid.context("no SVID")?.cert_chain.into_iter().map(|certificate| certificate.to_vec()).collect();
    Ok(Presented { chain, key: requested.key })
}
