//! TLS peers verified by SPIFFE ID against the newest bundles, never by host name.

use std::cell::RefCell;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, CipherSuite, DigitallySignedStruct, DistinguishedName, OtherError, SignatureScheme};
use spiffe::bundle::Bundles;
use spiffe::id::SpiffeId;
use spiffe::verify::{PeerRole, VerifiedChain, VerifyError, x509_chain};
use spiffe::x509::{Certificate, X509Error};

/// What peers are verified by, asked anew for every handshake.
pub trait Trust: Send + Sync {
    /// The newest bundles.
    fn bundles(&self) -> Arc<dyn Bundles + Send + Sync>;
    /// The time at which certificates have to be valid.
    fn now(&self) -> SystemTime;
    /// Whether a client with this ID, proved by its own trust domain, is let in at all.
    fn admits(&self, id: &SpiffeId) -> bool;
}

/// Why a handshake failed for want of an acceptable peer; found as the source of the TLS error.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerRefused {
    /// The peer did not prove to be anybody.
    #[error("the peer's certificate cannot be verified")]
    Unverified(#[source] VerifyError),
    /// The peer's certificate, which could not be verified for want of a bundle, is not even of the right form.
    #[error("the peer's certificate is not an X509-SVID")]
    Malformed(#[source] X509Error),
    /// The peer proved to be somebody else.
    #[error("the peer is {found}, not {wanted}")]
    AnotherId {
        /// Who it is.
        found: SpiffeId,
        /// Who it should be.
        wanted: SpiffeId,
    },
    /// The peer proved to be somebody who is not let in.
    #[error("{0} is not admitted here")]
    NotAdmitted(SpiffeId),
}

impl From<PeerRefused> for rustls::Error {
    fn from(refused: PeerRefused) -> Self {
        Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(refused))))
    }
}

/// The one cryptography provider of the project, with the signature algorithms that peers may use.
pub(crate) fn provider() -> Arc<rustls::crypto::CryptoProvider> {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    // Go's order as well. Processors hash SHA-256 in hardware and SHA-384 mostly not: with the library's order, the key
    // schedule of a handshake costs more than its signature.
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

fn algorithms() -> WebPkiSupportedAlgorithms {
    rustls::crypto::aws_lc_rs::default_provider().signature_verification_algorithms
}

fn chain(leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Vec<Bytes> {
    std::iter::once(leaf).chain(others).map(|der| Bytes::copy_from_slice(der)).collect()
}

tokio::task_local! {
    /// Where the verifier leaves what it found for the handshake that is under way in this task.
    static FOUND: RefCell<Option<Arc<VerifiedChain>>>;
}

/// Runs a handshake and returns, beside its outcome, whom [`ClientVerifier`] verified in it. The verifier is called
/// from inside the handshake's `poll`, and only its own result is believed; a certificate need not be verified twice.
pub(crate) async fn remembering<F: Future>(handshake: F) -> (F::Output, Option<Arc<VerifiedChain>>) {
    FOUND
        .scope(RefCell::new(None), async {
            let done = handshake.await;
            (done, FOUND.try_with(|found| found.take()).ok().flatten())
        })
        .await
}

/// Verifies clients that show a certificate; those that show none are served as anonymous.
pub struct ClientVerifier {
    trust: Arc<dyn Trust>,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ClientVerifier {
    /// A verifier by the newest that `trust` knows.
    pub fn new(trust: Arc<dyn Trust>) -> Self {
        Self { trust, algorithms: algorithms() }
    }
}

impl fmt::Debug for ClientVerifier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ClientVerifier").finish_non_exhaustive()
    }
}

impl ClientCertVerifier for ClientVerifier {
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // A hint would make clients hold back certificates that they think do not fit.
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        let verified = x509_chain(&chain(leaf, others), &*self.trust.bundles(), PeerRole::Client, self.trust.now())
            .map_err(PeerRefused::Unverified)?;
        if !self.trust.admits(&verified.id) {
            return Err(PeerRefused::NotAdmitted(verified.id).into());
        }
        let _ = FOUND.try_with(|found| found.replace(Some(Arc::new(verified))));
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// Verifies that a server is exactly the expected one.
pub struct ServerVerifier {
    /// None for a first contact without any bundle.
    trust: Option<Arc<dyn Trust>>,
    expected: SpiffeId,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerVerifier {
    /// Accepts only a server that proves to be `expected` by the newest that `trust` knows.
    pub fn new(trust: Arc<dyn Trust>, expected: SpiffeId) -> Self {
        Self { trust: Some(trust), expected, algorithms: algorithms() }
    }

    /// Accepts any server whose certificate *says* `expected` and that has its key: for a first contact that an
    /// operator allowed without a bundle. Whoever answers can be anybody.
    pub fn insecure_bootstrap(expected: SpiffeId) -> Self {
        Self { trust: None, expected, algorithms: algorithms() }
    }

    fn verified_id(&self, leaf: &CertificateDer<'_>, others: &[CertificateDer<'_>]) -> Result<SpiffeId, PeerRefused> {
        match &self.trust {
            Some(trust) => x509_chain(&chain(leaf, others), &*trust.bundles(), PeerRole::Server, trust.now())
                .map(|verified| verified.id)
                .map_err(PeerRefused::Unverified),
            None => Certificate::parse(Bytes::copy_from_slice(leaf))
                .and_then(|certificate| certificate.leaf_id())
                .map_err(PeerRefused::Malformed),
        }
    }
}

impl fmt::Debug for ServerVerifier {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("ServerVerifier").field("expected", &self.expected).finish_non_exhaustive()
    }
}

impl ServerCertVerifier for ServerVerifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let found = self.verified_id(leaf, others)?;
        if found != self.expected {
            return Err(PeerRefused::AnotherId { found, wanted: self.expected.clone() }.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(message, certificate, signed, &self.algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signed, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests;
