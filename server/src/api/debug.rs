//! `spire.api.server.debug.v1.Debug`: a look into a running server.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rustls::client::ResolvesClientCert as _;
use spiffe::bundle::Bundle;
use spiffe::x509::{Certificate, X509Error};
use spiffe_proto::debug as proto;
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use transport::rotating::Rotating;

use super::admission::Admission;
use super::core::Core;
use super::status::Failure;
use super::wire;
use crate::registry::list as listing;

/// How long an answer is given again.
const FRESH: Duration = Duration::from_secs(5);

/// The service. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct DebugService {
    core: Arc<Core>,
    own: Rotating,
    started: Instant,
    last: Arc<Mutex<Option<(Instant, proto::GetInfoResponse)>>>,
}

/// A certificate that was issued and cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("certificate cannot be read")]
struct Unreadable(#[source] X509Error);

impl DebugService {
    /// A service that tells of `core`, and of the SVID that the server shows.
    pub fn new(core: Arc<Core>, own: Rotating) -> Self {
        Self { core, own, started: Instant::now(), last: Arc::default() }
    }

    async fn info(&self) -> Result<proto::GetInfoResponse, Failure> {
        let now = Instant::now();
        let last = self.last.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some((at, info)) = last
            && now.duration_since(at) < FRESH
        {
            return Ok(info);
        }
        let state = self.core.current("failed to count agents").await?;
        let bundle =
            state.bundle(&self.core.trust_domain).ok_or_else(|| Failure::absent("trust domain bundle not found"))?;
        let shown = self.own.resolve(&[], &[]).map(|certified| certified.cert.clone()).unwrap_or_default();
        let shown = shown.iter().map(|der| Bytes::copy_from_slice(der)).collect();
        let count = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        let info = proto::GetInfoResponse {
            svid_chain: chain(shown, bundle, self.core.now())
                .map_err(|error| Failure::internal("failed verification against bundle").because(error))?,
            uptime: count(usize::try_from(now.duration_since(self.started).as_secs()).unwrap_or(usize::MAX)),
            agents_count: count(state.agent_count()),
            federated_bundles_count: count(state.bundles().count()),
            entries_count: count(listing::present(&state, self.core.now())),
        };
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some((now, info.clone()));
        Ok(info)
    }
}

/// The certificates of `shown`, leaf first, and the root of `bundle` above them.
fn chain(
    shown: Vec<Bytes>,
    bundle: &Bundle,
    now: SystemTime,
) -> Result<Vec<proto::get_info_response::Cert>, Unreadable> {
    let mut chain = shown.into_iter().map(Certificate::parse).collect::<Result<Vec<_>, _>>().map_err(Unreadable)?;
    let above = chain.last().and_then(|last| last.authority_key_id.clone());
    let root = bundle
        .x509
        .iter()
        .filter_map(|authority| Certificate::parse(authority.der.clone()).ok())
        .find(|root| root.is_valid_at(now) && above.is_some() && root.subject_key_id == above);
    chain.extend(root);
    let cert = |certificate: &Certificate| proto::get_info_response::Cert {
        id: certificate.spiffe_id().ok().as_ref().map(wire::id),
        expires_at: wire::seconds(certificate.not_after),
        subject: subject(&certificate.subject),
    };
    Ok(chain.iter().map(cert).collect())
}

/// A distinguished name as text, the last part first (RFC 4514, section 2.1), or nothing if it cannot be read.
fn subject(der: &[u8]) -> String {
    use x509_parser::prelude::FromDer as _;
    let Ok((_, name)) = x509_parser::x509::X509Name::from_der(der) else { return String::new() };
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|part| {
            let values: Vec<_> = part
                .iter()
                .map(|value| {
                    format!("{}={}", attribute(&value.attr_type().to_id_string()), value.as_str().unwrap_or_default())
                })
                .collect();
            values.join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

/// The short name of an attribute type (RFC 4514, section 3), or its numbers.
fn attribute(oid: &str) -> &str {
    match oid {
        "2.5.4.3" => "CN",
        "2.5.4.5" => "SERIALNUMBER",
        "2.5.4.6" => "C",
        "2.5.4.7" => "L",
        "2.5.4.8" => "ST",
        "2.5.4.9" => "STREET",
        "2.5.4.10" => "O",
        "2.5.4.11" => "OU",
        "2.5.4.17" => "POSTALCODE",
        other => other,
    }
}

#[tonic::async_trait]
impl proto::debug_server::Debug for DebugService {
    async fn get_info(
        &self,
        mut request: Request<proto::GetInfoRequest>,
    ) -> Result<Response<proto::GetInfoResponse>, Status> {
        let _admission = Admission::take(&mut request)?;
        Ok(Response::new(self.info().await?))
    }
}
