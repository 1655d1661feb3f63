//! The own certificate, which changes while listeners and clients that use it live on; and the TLS settings of both.

use std::fmt;
use std::sync::Arc;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use spiffe::x509::PrivateKey;

use crate::verify::{ClientVerifier, ServerVerifier, provider};

/// Why TLS cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TlsError {
    /// The key is of a kind that TLS does not sign with.
    #[error("TLS cannot sign with this key")]
    Key(#[source] rustls::Error),
    /// Certificate and key are not a pair.
    #[error("the certificate is not that of the key")]
    NotAPair(#[source] rustls::Error),
    /// The versions that SPIFFE peers speak are not available.
    #[error("TLS settings are not supported")]
    Settings(#[source] rustls::Error),
}

/// The certificate and key that we show now; none before the first one was set. Cheap to clone; clones show the same.
#[derive(Clone, Default)]
pub struct Rotating {
    current: Arc<ArcSwapOption<CertifiedKey>>,
}

impl Rotating {
    /// Nothing to show yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Shows `chain` (DER, leaf first) from the next handshake on.
    ///
    /// # Errors
    /// If key and leaf are not a pair, or TLS cannot use the key; what was shown before is shown on.
    pub fn set(&self, chain: &[Bytes], key: &PrivateKey) -> Result<(), TlsError> {
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.expose_pkcs8()));
        let signer = rustls::crypto::aws_lc_rs::sign::any_supported_type(&key).map_err(TlsError::Key)?;
        let chain = chain.iter().map(|der| CertificateDer::from(der.to_vec())).collect();
        let certified = CertifiedKey::new(chain, signer);
        certified.keys_match().map_err(TlsError::NotAPair)?;
        self.current.store(Some(Arc::new(certified)));
        Ok(())
    }

    /// Shows nothing any more.
    pub fn clear(&self) {
        self.current.store(None);
    }

    /// Whether there is something to show.
    pub fn is_set(&self) -> bool {
        self.current.load().is_some()
    }
}

impl fmt::Debug for Rotating {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Rotating").field("set", &self.is_set()).finish()
    }
}

impl ResolvesServerCert for Rotating {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }
}

impl ResolvesClientCert for Rotating {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        self.current.load_full()
    }

    fn has_certs(&self) -> bool {
        self.is_set()
    }
}

/// No identity of our own: what a client shows that has none yet.
#[derive(Debug)]
struct Nobody;

impl ResolvesClientCert for Nobody {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        None
    }

    fn has_certs(&self) -> bool {
        false
    }
}

const ALPN: &[u8] = b"h2";

/// TLS of a server that shows `own` and asks clients for a certificate, without demanding one. TLS 1.2 and 1.3, HTTP/2;
/// no resumption, which would let a peer in again without being verified.
///
/// # Errors
/// If the settings are not supported.
pub fn server_config(own: &Rotating, clients: ClientVerifier) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(TlsError::Settings)?
        .with_client_cert_verifier(Arc::new(clients))
        .with_cert_resolver(Arc::new(own.clone()));
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.ignore_client_order = true;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(Arc::new(config))
}

/// TLS of a client that accepts only the server that `server` accepts, and shows `own` if there is one. Settings as
/// [`server_config`]; no server name is sent, since peers are known by SPIFFE ID.
///
/// # Errors
/// If the settings are not supported.
pub fn client_config(own: Option<&Rotating>, server: ServerVerifier) -> Result<Arc<ClientConfig>, TlsError> {
    let resolver: Arc<dyn ResolvesClientCert> = match own {
        Some(own) => Arc::new(own.clone()),
        None => Arc::new(Nobody),
    };
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13, &rustls::version::TLS12])
        .map_err(TlsError::Settings)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(server))
        .with_client_cert_resolver(resolver);
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

#[cfg(test)]
mod tests {
    use rustls::pki_types::ServerName;
    use rustls::{CipherSuite, ClientConnection, ServerConnection};
    use spiffe::bundle::{Bundle, Bundles};
    use spiffe::id::SpiffeId;

    use super::*;
    use crate::verify::Trust;

    struct Nothing;

    impl Trust for Nothing {
        fn bundles(&self) -> Arc<dyn Bundles + Send + Sync> {
            Arc::new(Bundle::empty("example.org".parse().unwrap()))
        }

        fn now(&self) -> std::time::SystemTime {
            std::time::UNIX_EPOCH
        }

        fn admits(&self, _: &SpiffeId) -> bool {
            false
        }
    }

    fn own() -> Rotating {
        let key = rcgen::KeyPair::generate().unwrap();
        let leaf = rcgen::CertificateParams::default().self_signed(&key).unwrap();
        let own = Rotating::new();
        let private = PrivateKey::from_pkcs8(key.serialize_der()).unwrap();
        own.set(&[Bytes::copy_from_slice(leaf.der())], &private).unwrap();
        own
    }

    /// What a server answers the hello of a client with.
    fn agreed(client: Arc<ClientConfig>, server: Arc<ServerConfig>) -> Option<CipherSuite> {
        let mut client = ClientConnection::new(client, ServerName::try_from("spiffe.invalid").unwrap()).unwrap();
        let mut server = ServerConnection::new(server).unwrap();
        let mut hello = Vec::new();
        client.write_tls(&mut hello).unwrap();
        server.read_tls(&mut &hello[..]).unwrap();
        server.process_new_packets().unwrap();
        server.negotiated_cipher_suite().map(|suite| suite.suite())
    }

    #[test]
    fn the_suite_with_the_cheapest_key_schedule_is_taken_whatever_the_client_likes_best() {
        let ours = server_config(&own(), ClientVerifier::new(Arc::new(Nothing))).unwrap();
        let expected = SpiffeId::parse("spiffe://example.org/spire/server").unwrap();
        let client = client_config(None, ServerVerifier::insecure_bootstrap(expected)).unwrap();
        let library = rustls::crypto::aws_lc_rs::default_provider();
        assert_eq!(library.cipher_suites[0].suite(), CipherSuite::TLS13_AES_256_GCM_SHA384);
        let other = {
            let verifier = ServerVerifier::insecure_bootstrap("spiffe://example.org/spire/server".parse().unwrap());
            let mut config = ClientConfig::builder_with_provider(Arc::new(library))
                .with_protocol_versions(&[&rustls::version::TLS13])
                .unwrap()
                .dangerous()
                .with_custom_certificate_verifier(Arc::new(verifier))
                .with_no_client_auth();
            config.alpn_protocols = vec![ALPN.to_vec()];
            Arc::new(config)
        };
        for client in [client, other] {
            assert_eq!(agreed(client, Arc::clone(&ours)), Some(CipherSuite::TLS13_AES_128_GCM_SHA256));
        }
    }
}
