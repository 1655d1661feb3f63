//! Connections over TLS: by the own SVID or by none, to a server known by its SPIFFE ID.

use std::error::Error;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use rustls::pki_types::UnixTime;
use rustls::{CertificateError, ClientConfig};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::verify::VerifyError;
use tonic::transport::Channel;
use transport::dial::Last;
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
    last: Last,
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
            last: Last::default(),
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
        transport::dial::tls_once(&self.host, self.port, config, &self.last).await.map_err(|error| {
            let Some(tls) = tls_error(&error) else { return DialError::Unreachable(Box::new(error)) };
            let address = format!("{}:{}", self.host, self.port);
            let cause = Box::new(Unbelieved { address, reason: self.reason(tls) });
            if is_unknown_authority(tls) { DialError::UnknownAuthority(cause) } else { DialError::Unreachable(cause) }
        })
    }
}

/// A handshake failed.
#[derive(Debug, thiserror::Error)]
#[error("no TLS connection with {address}: {reason}")]
struct Unbelieved {
    address: String,
    reason: String,
}

impl TlsDial {
    /// Why a handshake failed, in words that say what to look at.
    fn reason(&self, tls: &rustls::Error) -> String {
        let apart = |one: UnixTime, other: UnixTime| {
            runtime::duration::format(Duration::from_secs(one.as_secs().saturating_sub(other.as_secs())))
        };
        match (tls, refused(tls)) {
            (_, Some(PeerRefused::Unverified(VerifyError::UnknownTrustDomain))) => {
                format!("who answers is of another trust domain than {}", self.trust_domain)
            }
            (_, Some(PeerRefused::Unverified(VerifyError::Path(webpki::Error::CertExpired { time, not_after })))) => {
                format!(
                    "by this machine's clock, the server's certificate ran out {} ago; compare the clocks",
                    apart(*time, *not_after)
                )
            }
            (
                _,
                Some(PeerRefused::Unverified(VerifyError::Path(webpki::Error::CertNotValidYet { time, not_before }))),
            ) => format!(
                "by this machine's clock, the server's certificate becomes valid in {}; compare the clocks",
                apart(*not_before, *time)
            ),
            (_, Some(other)) => runtime::telemetry::chain(other),
            (rustls::Error::InvalidMessage(_), None) => format!("who answers does not speak TLS ({tls})"),
            (_, None) => tls.to_string(),
        }
    }
}

/// Whether a handshake failed because the server's chain does not lead to the bundle. A server whose certificate or
/// authority ran out, by a clock that may be wrong, or who is somebody else, is another matter.
fn is_unknown_authority(tls: &rustls::Error) -> bool {
    let Some(PeerRefused::Unverified(verify)) = refused(tls) else { return false };
    match verify {
        VerifyError::NoAuthority => true,
        VerifyError::Path(cause) => {
            matches!(cause, webpki::Error::UnknownIssuer | webpki::Error::InvalidSignatureForPublicKey)
        }
        _ => false,
    }
}

/// What the verifier itself said.
fn refused(tls: &rustls::Error) -> Option<&PeerRefused> {
    match tls {
        rustls::Error::InvalidCertificate(CertificateError::Other(other)) => other.0.downcast_ref(),
        _ => None,
    }
}

/// The error of TLS, which the layers above wrap in ways that `source` alone does not open.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    if let Some(tls) = error.downcast_ref() {
        return Some(tls);
    }
    let inner = error.downcast_ref::<io::Error>().and_then(io::Error::get_ref);
    match inner {
        Some(inner) => tls_error(inner),
        None => tls_error(error.source()?),
    }
}

#[cfg(test)]
#[allow(clippy::disallowed_methods, reason = "real sockets need real time")]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::time::{Duration, SystemTime};

    use runtime::clock::Clock;
    use runtime::shutdown::{Shutdown, Trigger};
    use runtime::telemetry::Limiter;
    use spiffe::bundle::{Bundle, Bundles};
    use spiffe::x509::{KeyType, PrivateKey};
    use tokio::net::TcpListener;
    use transport::rotating::server_config;
    use transport::serve::{TcpLimits, tcp};
    use transport::verify::ClientVerifier;

    use super::*;
    use crate::identity::{Heard, Reaction};
    use crate::keys::certificate_request;
    use crate::server_link::{LinkError, ServerLink, Witness};
    use crate::testing::Authority;

    /// Trust that a test may exchange.
    struct Known(Mutex<BTreeMap<TrustDomain, Arc<Bundle>>>);

    impl Trust for Known {
        fn bundles(&self) -> Arc<dyn Bundles + Send + std::marker::Sync> {
            Arc::new(self.0.lock().unwrap().clone())
        }

        fn now(&self) -> SystemTime {
            SystemTime::now()
        }

        fn admits(&self, _: &SpiffeId) -> bool {
            true
        }
    }

    fn trust_domain() -> TrustDomain {
        TrustDomain::parse("example.org").unwrap()
    }

    fn known(bundle: Option<Bundle>) -> Arc<Known> {
        let bundles = bundle.map(|bundle| (bundle.trust_domain.clone(), Arc::new(bundle)));
        Arc::new(Known(Mutex::new(bundles.into_iter().collect())))
    }

    fn dial(port: u16, known: &Arc<Known>, insecure: bool) -> TlsDial {
        let trust = Arc::clone(known) as Arc<dyn Trust>;
        TlsDial::new(("127.0.0.1".into(), port), trust_domain(), &Rotating::new(), trust, insecure).unwrap()
    }

    /// A server with a certificate of `authority` for `path`; answers its port.
    async fn serve(authority: &mut Authority, path: &str, ttl: Duration) -> (u16, Trigger) {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let id = SpiffeId::from_path(&trust_domain(), path).unwrap();
        let csr = certificate_request(&key, None).unwrap();
        let (leaf, _) = authority.sign(&csr, &id, ttl, SystemTime::now() - Duration::from_secs(60));
        let own = Rotating::new();
        own.set(&[leaf], &key).unwrap();
        let tls = server_config(&own, ClientVerifier::new(known(None))).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let (trigger, shutdown) = Shutdown::new();
        let routes = transport::serve::Routes::default();
        tokio::spawn(tcp(
            listener,
            tls,
            routes,
            TcpLimits::default(),
            Limiter::new(Clock::system()),
            Clock::system(),
            shutdown,
        ));
        (port, trigger)
    }

    const SERVER: &str = "/spire/server";
    const HOUR: Duration = Duration::from_secs(3600);

    #[tokio::test]
    async fn only_the_server_of_the_own_trust_domain_is_dialled() {
        let now = SystemTime::now() - HOUR;
        let (mut right, wrong) = (Authority::new(&trust_domain(), now), Authority::new(&trust_domain(), now));
        let (port, _serving) = serve(&mut right, SERVER, HOUR).await;
        let known = known(Some(right.bundle(1, false)));
        let dial = dial(port, &known, false);
        for presenting in [Presenting::Svid, Presenting::Nothing] {
            dial.dial(presenting).await.unwrap();
        }
        known.0.lock().unwrap().insert(trust_domain(), Arc::new(wrong.bundle(2, false)));
        for presenting in [Presenting::Svid, Presenting::Nothing] {
            assert!(matches!(dial.dial(presenting).await, Err(DialError::UnknownAuthority(_))));
        }
        known.0.lock().unwrap().clear();
        assert!(matches!(dial.dial(Presenting::Nothing).await, Err(DialError::NoBundle)));
    }

    #[tokio::test]
    async fn an_expired_or_foreign_server_is_not_an_unknown_authority() {
        let mut authority = Authority::new(&trust_domain(), SystemTime::now() - HOUR);
        let known = known(Some(authority.bundle(1, false)));
        let expired = "by this machine's clock, the server's certificate ran out 3";
        let somebody = "the peer is spiffe://example.org/somebody, not spiffe://example.org/spire/server";
        for (path, ttl, why) in [("/somebody", HOUR, somebody), (SERVER, Duration::from_secs(30), expired)] {
            let (port, _serving) = serve(&mut authority, path, ttl).await;
            let error = dial(port, &known, false).dial(Presenting::Nothing).await.unwrap_err();
            assert!(matches!(error, DialError::Unreachable(_)), "{path}");
            let told = runtime::telemetry::chain(&error);
            assert!(told.starts_with(&format!("no TLS connection with 127.0.0.1:{port}: {why}")), "{told}");
        }
    }

    /// A link's identity of which nobody wants to know.
    struct Unwatched;

    impl Witness for Unwatched {
        fn newest_svid(&self) -> u64 {
            1
        }

        fn denied(&self, _: Heard) -> Reaction {
            Reaction::Disregard
        }

        fn accepted(&self, _: u64) {}

        fn dialled(&self, _: Result<(), &DialError>) {}
    }

    #[tokio::test]
    async fn a_call_with_an_svid_that_the_server_refuses_is_without_answer() {
        let mut authority = Authority::new(&trust_domain(), SystemTime::now() - HOUR);
        let (port, _serving) = serve(&mut authority, SERVER, HOUR).await;
        let trust = known(Some(authority.bundle(1, false)));
        let own = Rotating::new();
        let renew = async || {
            let trust = Arc::clone(&trust) as Arc<dyn Trust>;
            let dial = TlsDial::new(("127.0.0.1".into(), port), trust_domain(), &own, trust, false).unwrap();
            ServerLink::new(Arc::new(dial), Arc::new(Unwatched)).renew(bytes::Bytes::new(), HOUR).await.unwrap_err()
        };
        // This server has no such service, and says so to somebody without a certificate.
        let answered = renew().await;
        assert!(matches!(answered, LinkError::Status(_)) && !answered.is_without_answer(), "{answered:?}");
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let id = SpiffeId::from_path(&trust_domain(), "/spire/agent/test/1").unwrap();
        let (leaf, _) =
            authority.sign(&certificate_request(&key, None).unwrap(), &id, HOUR, SystemTime::now() - 2 * HOUR);
        own.set(&[leaf], &key).unwrap();
        let refused = renew().await;
        assert!(refused.is_without_answer(), "{refused:?}");
    }

    #[tokio::test]
    async fn who_answers_without_tls_is_told_so() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let answer = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            tokio::io::AsyncWriteExt::write_all(&mut stream, b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
            stream
        });
        let authority = Authority::new(&trust_domain(), SystemTime::now() - HOUR);
        let known = known(Some(authority.bundle(1, false)));
        let error = dial(port, &known, false).dial(Presenting::Nothing).await.unwrap_err();
        let told = runtime::telemetry::chain(&error);
        assert!(told.contains("who answers does not speak TLS"), "{told}");
        drop(answer.await.unwrap());
    }

    #[tokio::test]
    async fn insecure_bootstrap_ends_with_the_first_bundle_and_never_shows_the_svid() {
        let now = SystemTime::now() - HOUR;
        let (mut right, wrong) = (Authority::new(&trust_domain(), now), Authority::new(&trust_domain(), now));
        let (port, _serving) = serve(&mut right, SERVER, HOUR).await;
        let known = known(None);
        let insecure = dial(port, &known, true);
        insecure.dial(Presenting::Nothing).await.unwrap();
        assert!(matches!(insecure.dial(Presenting::Svid).await, Err(DialError::NoBundle)));
        let (other, _other_serving) = serve(&mut right, "/somebody", HOUR).await;
        assert!(matches!(dial(other, &known, true).dial(Presenting::Nothing).await, Err(DialError::Unreachable(_))));
        known.0.lock().unwrap().insert(trust_domain(), Arc::new(wrong.bundle(1, false)));
        assert!(matches!(insecure.dial(Presenting::Nothing).await, Err(DialError::UnknownAuthority(_))));
    }
}
