//! A workload as its author would write it: follows its X.509 stream, serves and calls by mutual TLS with what it holds now.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, anyhow};
use bytes::Bytes;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{CertificateError, DigitallySignedStruct, DistinguishedName, SignatureScheme};
use spiffe::bundle::{Bundle, Bundles, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::verify::{PeerRole, x509_chain};
use spiffe::x509::{Certificate, X509Svid};
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use spiffe_proto::workload::{X509svidRequest, X509svidResponse};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::watch;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::{secured, unix, utc};

/// What a workload holds at one moment.
#[derive(Clone)]
pub struct Identity {
    /// The SVID without its key.
    pub svid: X509Svid,
    /// Every bundle it may verify with, its own trust domain's included.
    pub bundles: Arc<BTreeMap<TrustDomain, Arc<Bundle>>>,
    /// When the message came that it was taken from.
    pub received: SystemTime,
    key: Arc<[u8]>,
}

impl Identity {
    /// Takes the SVID for `id`, or the first one, from a message of the stream.
    ///
    /// # Errors
    /// If the message does not hold it, or holds something that is not valid.
    pub fn from_message(message: &X509svidResponse, id: Option<&str>) -> Result<Self> {
        let found = match id {
            None => message.svids.first(),
            Some(id) => message.svids.iter().find(|svid| svid.spiffe_id == id),
        };
        let found = found.context("no such SVID in the message")?;
        let svid = X509Svid::from_concatenated(&found.x509_svid)?;
        let mut bundles = BTreeMap::new();
        let own = svid.id.trust_domain().clone();
        bundles.insert(own.clone(), Arc::new(bundle(own, &found.bundle)?));
        for (name, der) in &message.federated_bundles {
            let name = SpiffeId::parse(name)?.trust_domain().clone();
            bundles.insert(name.clone(), Arc::new(bundle(name, der)?));
        }
        let key = found.x509_svid_key.to_vec().into();
        Ok(Self { svid, bundles: Arc::new(bundles), received: SystemTime::now(), key })
    }

    /// Who signed this SVID and whether `other` holds that authority, for how long the SVID is valid, and since when both
    /// sides hold what they hold: what explains that `other` did not believe it.
    pub fn told_to(&self, other: &Self) -> String {
        let leaf = self.svid.chain.first().and_then(|der| Certificate::parse(der.clone()).ok());
        let authority = leaf.and_then(|leaf| leaf.authority_key_id);
        let bundle = other.bundles.get(self.svid.id.trust_domain());
        let held: Vec<String> = bundle
            .iter()
            .flat_map(|bundle| &bundle.x509)
            .filter_map(|authority| Certificate::parse(authority.der.clone()).ok())
            .map(|certificate| format!("{} until {}", certificate.authority_id(), utc(certificate.not_after)))
            .collect();
        let authority = authority.map_or("none".to_owned(), |id| id.iter().map(|byte| format!("{byte:02x}")).collect());
        let is_held = held.iter().any(|known| known.starts_with(&authority));
        format!(
            "{}, serial {}, valid {} to {}, received {}, by authority {authority}, which the other side's bundle \
             (received {}) {}: {}",
            self.svid.id,
            self.svid.serial,
            utc(self.svid.not_before),
            utc(self.svid.not_after),
            utc(self.received),
            utc(other.received),
            if is_held { "holds" } else { "does not hold" },
            held.join(", ")
        )
    }

    fn chain(&self) -> Vec<CertificateDer<'static>> {
        self.svid.chain.iter().map(|certificate| CertificateDer::from(certificate.to_vec())).collect()
    }

    fn private_key(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.key.to_vec()))
    }
}

fn bundle(trust_domain: TrustDomain, concatenated: &Bytes) -> Result<Bundle> {
    let mut bundle = Bundle::empty(trust_domain);
    let mut rest: &[u8] = concatenated;
    while !rest.is_empty() {
        let (after, _) = x509_parser::parse_x509_certificate(rest).context("malformed authority")?;
        let der = Bytes::copy_from_slice(rest.get(..rest.len() - after.len()).unwrap_or_default());
        bundle.x509.push(X509Authority { der, tainted: false });
        rest = after;
    }
    Ok(bundle)
}

/// Follows an X.509 stream and keeps the newest identity; reconnects when the stream ends.
pub struct Workload {
    identity: watch::Receiver<Option<Identity>>,
    follower: tokio::task::JoinHandle<()>,
    /// Why the stream ended last.
    pub ended: Arc<Mutex<Option<tonic::Status>>>,
}

impl Drop for Workload {
    fn drop(&mut self) {
        self.follower.abort();
    }
}

impl Workload {
    /// Follows the stream behind `socket` for the SVID of `id`, or the first one.
    pub fn follow(socket: &Path, id: Option<&str>) -> Self {
        let (send, identity) = watch::channel(None);
        let (socket, id): (PathBuf, Option<String>) = (socket.into(), id.map(Into::into));
        let ended = Arc::new(Mutex::new(None));
        let why = ended.clone();
        let follower = tokio::spawn(async move {
            loop {
                if let Err(error) = stream(&socket, id.as_deref(), &send).await {
                    let status = error
                        .downcast::<tonic::Status>()
                        .unwrap_or_else(|error| tonic::Status::unknown(error.to_string()));
                    *why.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
                }
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        });
        Self { identity, follower, ended }
    }

    /// The newest identity, waiting at most `deadline` for the first.
    ///
    /// # Errors
    /// If none comes in time; the text says how the stream ended last.
    pub async fn first(&self, deadline: Duration) -> Result<Identity> {
        let mut identity = self.identity.clone();
        let waited = tokio::time::timeout(deadline, identity.wait_for(Option::is_some)).await;
        match waited {
            Ok(Ok(found)) => found.clone().context("no identity"),
            _ => Err(anyhow!(
                "no identity within {deadline:?}; last: {:?}",
                self.ended.lock().unwrap_or_else(PoisonError::into_inner)
            )),
        }
    }

    /// The newest identity, if there is one.
    pub fn identity(&self) -> Option<Identity> {
        self.identity.borrow().clone()
    }

    /// Wakes at each new identity.
    pub fn updates(&self) -> watch::Receiver<Option<Identity>> {
        self.identity.clone()
    }
}

async fn stream(socket: &Path, id: Option<&str>, send: &watch::Sender<Option<Identity>>) -> Result<()> {
    let mut client = SpiffeWorkloadApiClient::new(unix(socket).await?);
    let mut messages = client.fetch_x509svid(secured(X509svidRequest {})).await?.into_inner();
    while let Some(message) = messages.message().await? {
        if let Ok(identity) = Identity::from_message(&message, id) {
            send.send_replace(Some(identity));
        }
    }
    Err(anyhow!("the stream ended with OK"))
}

/// Serves one connection by mutual TLS; the answer also names the caller.
///
/// # Errors
/// If the handshake fails.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    identity: &Identity,
    stream: S,
) -> Result<(server::TlsStream<S>, SpiffeId)> {
    let provider = provider();
    let verifier = Arc::new(Verifier::new(identity, None));
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(identity.chain(), identity.private_key())?;
    let stream = TlsAcceptor::from(Arc::new(config)).accept(stream).await?;
    let caller = verifier.seen().context("no caller")?;
    Ok((stream, caller))
}

/// Calls by mutual TLS a peer that must be `expected`.
///
/// # Errors
/// If the handshake fails, or the peer is somebody else.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    identity: &Identity,
    expected: &SpiffeId,
    stream: S,
) -> Result<client::TlsStream<S>> {
    let mut config = rustls::ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Verifier::new(identity, Some(expected.clone()))))
        .with_client_auth_cert(identity.chain(), identity.private_key())?;
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    let name = ServerName::try_from("workload.invalid")?;
    Ok(TlsConnector::from(Arc::new(config)).connect(name, stream).await?)
}

/// An error with everything that led to it, since TLS hands on one text.
fn with_causes(error: impl std::error::Error + Send + Sync + 'static) -> String {
    format!("{:#}", anyhow::Error::new(error))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::aws_lc_rs::default_provider())
}

/// Checks a peer by the SPIFFE rules, and remembers who it is.
#[derive(Debug)]
struct Verifier {
    bundles: Arc<BTreeMap<TrustDomain, Arc<Bundle>>>,
    expected: Option<SpiffeId>,
    provider: Arc<CryptoProvider>,
    seen: Mutex<Option<SpiffeId>>,
}

impl Verifier {
    fn new(identity: &Identity, expected: Option<SpiffeId>) -> Self {
        Self { bundles: identity.bundles.clone(), expected, provider: provider(), seen: Mutex::new(None) }
    }

    fn seen(&self) -> Option<SpiffeId> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn check(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        role: PeerRole,
    ) -> Result<(), rustls::Error> {
        let chain: Vec<Bytes> = std::iter::once(leaf).chain(others).map(|der| Bytes::copy_from_slice(der)).collect();
        let bundles: &dyn Bundles = &*self.bundles;
        let refused = |error: String| {
            rustls::Error::InvalidCertificate(CertificateError::Other(rustls::OtherError(Arc::new(
                std::io::Error::other(error),
            ))))
        };
        let verified =
            x509_chain(&chain, bundles, role, SystemTime::now()).map_err(|error| refused(with_causes(error)))?;
        if self.expected.as_ref().is_some_and(|expected| *expected != verified.id) {
            return Err(refused(format!("the peer is {}", verified.id)));
        }
        *self.seen.lock().unwrap_or_else(PoisonError::into_inner) = Some(verified.id);
        Ok(())
    }
}

impl ServerCertVerifier for Verifier {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        self.check(leaf, others, PeerRole::Server).map(|()| ServerCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        m: &[u8],
        c: &CertificateDer<'_>,
        s: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(m, c, s, &self.provider.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        m: &[u8],
        c: &CertificateDer<'_>,
        s: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(m, c, s, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for Verifier {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }
    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        others: &[CertificateDer<'_>],
        _: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.check(leaf, others, PeerRole::Client).map(|()| ClientCertVerified::assertion())
    }
    fn verify_tls12_signature(
        &self,
        m: &[u8],
        c: &CertificateDer<'_>,
        s: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls12_signature(m, c, s, &self.provider.signature_verification_algorithms)
    }
    fn verify_tls13_signature(
        &self,
        m: &[u8],
        c: &CertificateDer<'_>,
        s: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(m, c, s, &self.provider.signature_verification_algorithms)
    }
    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
    use spiffe_proto::workload::X509svid;

    use super::*;

    /// An authority, and its own certificate.
    fn authority(name: &str) -> (Issuer<'static, KeyPair>, Vec<u8>) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        params.distinguished_name.push(DnType::CommonName, name);
        let der = params.self_signed(&key).unwrap().der().to_vec();
        (Issuer::new(params, key), der)
    }

    fn identity(id: &str, by: &Issuer<'_, KeyPair>, bundle: &[u8]) -> Identity {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
        params.use_authority_key_identifier_extension = true;
        let svid = X509svid {
            spiffe_id: id.to_owned(),
            x509_svid: params.signed_by(&key, by).unwrap().der().to_vec().into(),
            x509_svid_key: key.serialize_der().into(),
            bundle: bundle.to_vec().into(),
            ..X509svid::default()
        };
        Identity::from_message(&X509svidResponse { svids: vec![svid], ..X509svidResponse::default() }, None).unwrap()
    }

    #[tokio::test]
    async fn a_failed_handshake_explains_itself() {
        let ((old, old_der), (new, new_der)) = (authority("old"), authority("new"));
        let both = [&old_der[..], &new_der].concat();
        // One that has not heard of the new authority, and one that has an SVID of it already.
        let late = identity("spiffe://example.org/late", &old, &old_der);
        let early = identity("spiffe://example.org/early", &new, &both);
        let (near, far) = tokio::net::UnixStream::pair().unwrap();
        let expected = early.svid.id.clone();
        let (accepted, connected) = tokio::join!(accept(&early, far), connect(&late, &expected, near));
        let error = format!("{:#}", connected.unwrap_err());
        assert!(error.contains("no valid certificate path to the trust domain's bundle: UnknownIssuer"), "{error}");
        assert!(format!("{:#}", accepted.unwrap_err()).contains("CertificateUnknown"));
        let told = early.told_to(&late);
        assert!(told.starts_with("spiffe://example.org/early, serial ") && told.contains(" does not hold: "), "{told}");
        let told = late.told_to(&early);
        assert!(told.contains(") holds: "), "{told}");
    }
}
