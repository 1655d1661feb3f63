//! Connections over TLS: by the own SVID or by none, to a server known by its SPIFFE ID.

use std::error::Error;
use std::io;
use std::sync::Arc;

use async_trait::async_trait;
use rustls::{CertificateError, ClientConfig};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::verify::VerifyError;
use tonic::transport::Channel;
use transport::rotating::{Rotating, TlsError, client_config};
use transport::verify::{PeerRefused, ServerVerifier, Trust};

use super::{Dial, DialError, Presenting};

/// Dials one server address.
pub struct TlsDial {
    host: String,
    port: u16,
    trust: Arc<dyn Trust>,
    trust_domain: TrustDomain,
    own: Arc<ClientConfig>,
    nobody: Arc<ClientConfig>,
    first_contact: Option<Arc<ClientConfig>>,
}

impl TlsDial {
    /// Connects to `host:port` as whoever `own` shows, and believes a server that `trust` verifies to be that of
    /// `trust_domain`. With `insecure_bootstrap`, a server is believed without verification as long as `trust` has no
    /// bundle at all.
    pub fn new(
        (host, port): (String, u16),
        trust_domain: TrustDomain,
        own: &Rotating,
        trust: Arc<dyn Trust>,
        insecure_bootstrap: bool,
    ) -> Result<Self, TlsError> {
        let server = SpiffeId::server_of(&trust_domain);
        let verifier = || ServerVerifier::new(Arc::clone(&trust), server.clone());
        let first_contact = insecure_bootstrap
            .then(|| client_config(None, ServerVerifier::insecure_bootstrap(server.clone())))
            .transpose()?;
        Ok(Self {
            own: client_config(Some(own), verifier())?,
            nobody: client_config(None, verifier())?,
            host,
            port,
            trust,
            trust_domain,
            first_contact,
        })
    }
}

#[async_trait]
impl Dial for TlsDial {
    async fn dial(&self, presenting: Presenting) -> Result<Channel, DialError> {
        let knows_server = self.trust.bundles().bundle(&self.trust_domain).is_some();
        let config = match (presenting, knows_server) {
            (Presenting::Svid, true) => &self.own,
            (Presenting::Nothing, true) => &self.nobody,
            (Presenting::Nothing, false) => self.first_contact.as_ref().ok_or(DialError::NoBundle)?,
            (Presenting::Svid, false) => return Err(DialError::NoBundle),
        };
        transport::dial::tls_once(&self.host, self.port, config).await.map_err(|error| {
            if is_unknown_authority(&error) {
                DialError::UnknownAuthority(Box::new(error))
            } else {
                DialError::Unreachable(Box::new(error))
            }
        })
    }
}

/// Whether a handshake failed because the server's chain does not lead to the bundle. A server whose certificate ran
/// out, or who is somebody else, is another matter.
fn is_unknown_authority(error: &(dyn Error + 'static)) -> bool {
    let verify = match refused(error) {
        Some(PeerRefused::Unverified(verify)) => verify,
        _ => return false,
    };
    match verify {
        VerifyError::NoAuthority => true,
        VerifyError::Path(cause) => {
            matches!(cause, webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey)
        }
        _ => false,
    }
}

/// The verifier's own error, which the layers above wrap in ways that `source` alone does not open.
fn refused<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a PeerRefused> {
    if let Some(refused) = error.downcast_ref::<PeerRefused>() {
        return Some(refused);
    }
    if let Some(rustls::Error::InvalidCertificate(CertificateError::Other(other))) = error.downcast_ref() {
        return other.0.downcast_ref();
    }
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    match inner {
        Some(inner) => refused(inner),
        None => refused(error.source()?),
    }
}
