//! A look into the running agent, on its operators' socket: `spire.agent.debug.v1`.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use runtime::clock::Clock;
use spiffe::verify::x509_path;
use spiffe::x509::Certificate;
use spiffe_proto::agent_debug::debug_server::{Debug, DebugServer};
use spiffe_proto::agent_debug::{GetInfoRequest, GetInfoResponse, get_info_response::Cert};
use spiffe_proto::types::Spiffeid;
use tokio::time::Instant;
use tonic::{Request, Response, Status};
use x509_parser::prelude::{FromDer, X509Name};

use crate::cache::Cache;

/// How long an answer is good enough.
const CACHED: Duration = Duration::from_secs(5);

/// The agent's own SVID.
pub trait OwnChain: Send + Sync {
    /// Its certificates now, DER, leaf first; none before the agent was attested.
    fn own_chain(&self) -> Vec<Bytes>;
}

pub(super) struct Look {
    cache: Cache,
    own: Arc<dyn OwnChain>,
    clock: Clock,
    started: Instant,
    answer: Mutex<Option<(Instant, GetInfoResponse)>>,
}

pub(super) fn service(cache: Cache, own: Arc<dyn OwnChain>, clock: Clock) -> DebugServer<Look> {
    DebugServer::new(Look { cache, own, clock, started: Instant::now(), answer: Mutex::default() })
}

impl Look {
    fn look(&self) -> GetInfoResponse {
        let counts = self.cache.counts();
        let small = |count: usize| i32::try_from(count).unwrap_or(i32::MAX);
        #[allow(deprecated, reason = "read by old tools")]
        GetInfoResponse {
            svid_chain: self.chain().iter().map(describe).collect(),
            uptime: i32::try_from(self.started.elapsed().as_secs()).unwrap_or(i32::MAX),
            svids_count: small(counts.x509_svids),
            last_sync_success: self.cache.last_sync().map_or(0, seconds),
            cached_x509_svids_count: small(counts.x509_svids),
            cached_jwt_svids_count: small(counts.jwt_svids),
            cached_svidstore_x509_svids_count: 0,
        }
    }

    /// The own certificates, and the root they lead to.
    fn chain(&self) -> Vec<Certificate> {
        let own = self.own.own_chain();
        let mut chain: Vec<Certificate> = own.iter().filter_map(|der| Certificate::parse(der.clone()).ok()).collect();
        if let Ok(path) = x509_path(&own, &self.cache.own_bundle().x509, self.clock.now()) {
            let roots = path.authorities.into_iter().filter(|der| !own.contains(der));
            chain.extend(roots.filter_map(|der| Certificate::parse(der).ok()));
        }
        chain
    }
}

#[tonic::async_trait]
impl Debug for Look {
    async fn get_info(&self, _: Request<GetInfoRequest>) -> Result<Response<GetInfoResponse>, Status> {
        let mut answer = self.answer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, answer)) = answer.as_ref().filter(|(since, _)| since.elapsed() < CACHED) {
            return Ok(Response::new(answer.clone()));
        }
        let fresh = self.look();
        *answer = Some((Instant::now(), fresh.clone()));
        Ok(Response::new(fresh))
    }
}

fn seconds(time: SystemTime) -> i64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX))
}

fn describe(certificate: &Certificate) -> Cert {
    Cert {
        id: certificate
            .spiffe_id()
            .ok()
            .map(|id| Spiffeid { trust_domain: id.trust_domain().as_str().to_owned(), path: id.path().to_owned() }),
        expires_at: seconds(certificate.not_after),
        subject: subject(&certificate.subject),
    }
}

/// A name as RFC 4514 writes it: last part first, with short attribute names.
fn subject(der: &[u8]) -> String {
    let Ok((_, name)) = X509Name::from_der(der) else { return String::new() };
    let mut parts: Vec<String> = name
        .iter_rdn()
        .map(|part| {
            let attributes = part.iter().map(|attribute| {
                let kind = match attribute.attr_type().to_id_string().as_str() {
                    "2.5.4.3" => "CN",
                    "2.5.4.5" => "SERIALNUMBER",
                    "2.5.4.6" => "C",
                    "2.5.4.7" => "L",
                    "2.5.4.8" => "ST",
                    "2.5.4.9" => "STREET",
                    "2.5.4.10" => "O",
                    "2.5.4.11" => "OU",
                    "2.5.4.17" => "POSTALCODE",
                    "2.5.4.45" => "2.5.4.45",
                    _ => "UNKNOWN",
                };
                format!("{kind}={}", escaped(attribute.as_str().unwrap_or_default()))
            });
            attributes.collect::<Vec<_>>().join("+")
        })
        .collect();
    parts.reverse();
    parts.join(",")
}

/// RFC 4514, section 2.4.
fn escaped(value: &str) -> String {
    let mut text = String::with_capacity(value.len());
    for (at, character) in value.char_indices() {
        let edge = at == 0 && matches!(character, ' ' | '#') || at + 1 == value.len() && character == ' ';
        if edge || matches!(character, '"' | '+' | ',' | ';' | '<' | '>' | '\\') {
            text.push('\\');
        }
        text.push(character);
    }
    text
}
