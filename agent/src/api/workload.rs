//! The SPIFFE Workload API: the five stable calls.
//!
//! SPIFFE_Workload_API; SPIFFE_Workload_Endpoint, section 6.

use std::convert::Infallible;
use std::sync::Arc;
use std::task::{Context, Poll};

use futures_util::future::BoxFuture;
use http::{HeaderMap, Request, Response};
use prost_types::value::Kind;
use prost_types::{ListValue, Struct, Value};
use runtime::clock::Clock;
use runtime::telemetry::Limiter;
use serde_json::Value as Json;
use spiffe::id::SpiffeId;
use spiffe::selector::SelectorSet;
use spiffe::verify::jwt_svid;
use spiffe_proto::workload as wire;
use tokio::time::Instant;
use tonic::Status;
use tonic::body::Body;
use tonic::server::NamedService;
use transport::peer::{Peer, UnixPeer};
use transport::serve::Share;
use zeroize::Zeroize;

use super::message::{self, Answer, FETCH_LIMIT, Incoming, UNATTESTED, VALIDATE_LIMIT};
use super::streams::{Bundles, LOOK, follow_bundles, follow_svids};
use super::{Settings, status};
use crate::cache::{Cache, CacheError, Subscription};
use crate::workload::{Attestors, Refusal, look_again, visit};

/// The full name of the service; it has no package.
pub(super) const SERVICE: &str = "SpiffeWorkloadAPI";

/// What a client sends with every call, so that no web page can be made to send one.
const SECURITY_HEADER: &str = "workload.spiffe.io";
/// Audiences of one token; some client libraries take no more.
const AUDIENCES: usize = 32;
/// Selectors that are compared in no time.
const MANY: usize = 1024;
/// Bytes of one audience.
const AUDIENCE_LENGTH: usize = 4096;

/// The service. Clones share everything.
#[derive(Clone)]
pub(super) struct WorkloadApi {
    inner: Arc<Inner>,
}

struct Inner {
    cache: Cache,
    attestors: Arc<Attestors>,
    settings: Settings,
    clock: Clock,
    log: Limiter,
}

// What callers cause in the log, by the messages that operators search for.
const NO_IDENTITY: &str = "No identity issued";
const NO_TOKEN: &str = "No JWT-SVID for a caller";
const REFUSED: &str = "A caller was refused";

/// Who makes a call, and what it takes of the listener.
struct Call {
    peer: Arc<UnixPeer>,
    share: Option<Share>,
}

impl Call {
    fn holds(&self, bytes: usize) {
        if let Some(share) = &self.share {
            share.holds(bytes);
        }
    }

    fn entitled(&self) {
        if let Some(share) = &self.share {
            share.entitled();
        }
    }

    /// Whether there is an entry for the caller; its connection then comes before those of others.
    fn is_entitled(&self, subscription: &Subscription) -> bool {
        let entitled = subscription.current().entitled;
        if entitled {
            self.entitled();
        }
        entitled
    }
}

/// The bytes that a set takes, about.
fn memory(selectors: &SelectorSet) -> usize {
    selectors.iter().map(|selector| selector.value().len() + std::mem::size_of_val(selector) + 16).sum()
}

enum Method {
    FetchX509Svid,
    FetchX509Bundles,
    FetchJwtSvid,
    FetchJwtBundles,
    ValidateJwtSvid,
    Wit,
}

impl Method {
    fn of(path: &str) -> Option<Self> {
        match path.strip_prefix('/')?.strip_prefix(SERVICE)?.strip_prefix('/')? {
            "FetchX509SVID" => Some(Self::FetchX509Svid),
            "FetchX509Bundles" => Some(Self::FetchX509Bundles),
            "FetchJWTSVID" => Some(Self::FetchJwtSvid),
            "FetchJWTBundles" => Some(Self::FetchJwtBundles),
            "ValidateJWTSVID" => Some(Self::ValidateJwtSvid),
            "FetchWITSVID" | "FetchWITBundles" => Some(Self::Wit),
            _ => None,
        }
    }
}

impl WorkloadApi {
    pub(super) fn new(cache: Cache, attestors: Arc<Attestors>, settings: Settings, clock: Clock, log: Limiter) -> Self {
        Self { inner: Arc::new(Inner { cache, attestors, settings, clock, log }) }
    }
}

impl NamedService for WorkloadApi {
    const NAME: &'static str = SERVICE;
}

impl tower::Service<Request<Body>> for WorkloadApi {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<'static, Result<Response<Body>, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let inner = Arc::clone(&self.inner);
        Box::pin(async move {
            let response = match inner.answer(request).await {
                Ok(answer) => message::respond(answer),
                Err(status) => status.into_http(),
            };
            Ok(response)
        })
    }
}

/// Exactly one security header, with exactly the value `true`.
fn has_security_header(headers: &HeaderMap) -> bool {
    let mut values = headers.get_all(SECURITY_HEADER).iter();
    values.next().is_some_and(|value| value == "true") && values.next().is_none()
}

impl Inner {
    async fn answer(self: Arc<Self>, request: Request<Body>) -> Result<Answer, Status> {
        let (parts, body) = request.into_parts();
        let method = Method::of(parts.uri.path()).ok_or_else(|| Status::unimplemented("unknown method"))?;
        if !has_security_header(&parts.headers) {
            return Err(status::invalid("security header missing from request"));
        }
        let headers = &parts.headers;
        let Some(Peer::Unix(peer)) = parts.extensions.get::<Peer>() else { return Err(status::no_peer()) };
        let call = Call { peer: Arc::clone(peer), share: parts.extensions.get::<Share>().cloned() };
        match method {
            Method::FetchX509Svid => {
                message::read::<wire::X509svidRequest>(headers, body, UNATTESTED).await?;
                let selectors = self.attest(&call).await?;
                let subscription = self.subscribe(&call, selectors).await?;
                if !call.is_entitled(&subscription) {
                    self.tell_unknown(&call.peer, subscription.selectors());
                }
                Ok(Answer::Many(follow_svids(subscription, call.peer, self.log.clone())))
            }
            Method::FetchX509Bundles => {
                message::read::<wire::X509BundlesRequest>(headers, body, UNATTESTED).await?;
                self.bundles(call, Bundles::X509).await
            }
            Method::FetchJwtBundles => {
                message::read::<wire::JwtBundlesRequest>(headers, body, UNATTESTED).await?;
                self.bundles(call, Bundles::Jwt).await
            }
            Method::FetchJwtSvid => {
                let request = self.read(&call, Incoming::new(headers, body, FETCH_LIMIT)?).await?;
                let mut answer = self.fetch_jwt(&call, request).await?;
                let encoded = message::encode_secret(&answer);
                answer.svids.iter_mut().for_each(|svid| svid.svid.zeroize());
                Ok(Answer::One(Some(encoded)))
            }
            Method::ValidateJwtSvid => {
                let request = self.read(&call, Incoming::new(headers, body, VALIDATE_LIMIT)?).await?;
                let answer = self.validate_jwt(&call, request).await?;
                Ok(Answer::One(Some(message::encode(&answer))))
            }
            Method::Wit => Err(Status::unimplemented("WIT-SVIDs are not served")),
        }
    }

    /// A request that may be long. What no honest caller sends first is read only once it is known who calls, and counts
    /// for the caller.
    async fn read<M: prost::Message + Default>(&self, call: &Call, mut request: Incoming) -> Result<M, Status> {
        if let Some(length) = request.unattested().await? {
            call.holds(length);
            self.attest(call).await?;
        }
        request.message().await
    }

    /// The caller's selectors. Before the first sync nothing is known of anybody, so nobody is looked at.
    async fn attest(&self, call: &Call) -> Result<SelectorSet, Status> {
        if !self.cache.synced() {
            return Err(status::not_synced());
        }
        let selectors = self.attestors.attest(&call.peer).await.map_err(|refusal| {
            self.tell_refused(&call.peer, &refusal);
            status::refused(&refusal)
        })?;
        call.holds(memory(&selectors));
        Ok(selectors)
    }

    /// Follows the view of these selectors. Comparing very many of them takes time, which is the caller's.
    async fn subscribe(&self, call: &Call, selectors: SelectorSet) -> Result<Subscription, Status> {
        if selectors.len() <= MANY {
            return Ok(self.cache.subscribe(selectors));
        }
        let cache = self.cache.clone();
        let subscribed = visit(&call.peer, move |_| Ok(cache.subscribe(selectors))).await;
        subscribed.map_err(|refusal| status::refused(&refusal))
    }

    /// The first thing to know when a process does not get its identity. In SPIRE's words, which operators look for.
    fn tell_unknown(&self, peer: &UnixPeer, selectors: &SelectorSet) {
        if !self.log.allow(NO_IDENTITY, peer.party.name()) {
            return;
        }
        let selectors: Vec<String> = selectors.iter().map(ToString::to_string).collect();
        let selectors = selectors.join(", ");
        let party = tracing::field::display(&peer.party);
        tracing::warn!(pid = peer.pid, uid = peer.uid, party, registered = false, selectors, "{NO_IDENTITY}");
    }

    fn tell_refused(&self, peer: &UnixPeer, refusal: &Refusal) {
        if self.log.allow(REFUSED, peer.party.name()) {
            let error = runtime::telemetry::chain(refusal);
            tracing::warn!(pid = peer.pid, uid = peer.uid, party = %peer.party, error, "{REFUSED}");
        }
    }

    async fn bundles(&self, call: Call, kind: Bundles) -> Result<Answer, Status> {
        let selectors = self.attest(&call).await?;
        let anybody = self.settings.allow_unauthenticated_verifiers;
        let subscription = self.subscribe(&call, selectors).await?;
        if !call.is_entitled(&subscription) && !anybody {
            self.tell_unknown(&call.peer, subscription.selectors());
        }
        Ok(Answer::Many(follow_bundles(subscription, call.peer, self.log.clone(), kind, anybody)))
    }

    async fn fetch_jwt(&self, call: &Call, request: wire::JwtsvidRequest) -> Result<wire::JwtsvidResponse, Status> {
        let peer = &call.peer;
        check_audience(&request.audience)?;
        let id = match request.spiffe_id.as_str() {
            "" => None,
            text => Some(SpiffeId::parse(text).map_err(|error| status::malformed_id(&error))?),
        };
        let selectors = self.attest(call).await?;
        let attested_at = Instant::now();
        let svids = self.cache.jwt_svids(&selectors, &request.audience, id.as_ref()).await.map_err(|error| {
            match &error {
                CacheError::NotEntitled => self.tell_unknown(peer, &selectors),
                CacheError::Issue(_) => {
                    if self.log.allow(NO_TOKEN, peer.party.name()) {
                        let error = runtime::telemetry::chain(&error);
                        tracing::warn!(pid = peer.pid, party = %peer.party, error, "{NO_TOKEN}");
                    }
                }
            }
            status::jwt(&error)
        })?;
        call.entitled();
        // The server may have taken its time; a token from memory takes none.
        if attested_at.elapsed() > LOOK {
            look_again(peer).await.map_err(|refusal| status::refused(&refusal))?;
        }
        for svid in &svids {
            tracing::debug!(
                method = "FetchJWTSVID",
                pid = peer.pid,
                spiffe_id = %svid.id,
                audience = ?request.audience,
                "Fetched JWT SVID"
            );
        }
        let svids = svids.iter().map(|svid| wire::Jwtsvid {
            spiffe_id: svid.id.to_string(),
            svid: svid.token.to_string(),
            hint: svid.hint.to_string(),
        });
        Ok(wire::JwtsvidResponse { svids: svids.collect() })
    }

    async fn validate_jwt(
        &self,
        call: &Call,
        request: wire::ValidateJwtsvidRequest,
    ) -> Result<wire::ValidateJwtsvidResponse, Status> {
        if request.audience.is_empty() {
            return Err(status::invalid("audience must be specified"));
        }
        if request.svid.is_empty() {
            return Err(status::invalid("svid must be specified"));
        }
        let selectors = self.attest(call).await?;
        let bundles = self.cache.bundles_for(&selectors);
        let token = jwt_svid(&request.svid, &request.audience, &bundles, self.clock.now())
            .map_err(|error| status::token(&error))?;
        let foreign = token.id.trust_domain() != &self.cache.own_bundle().trust_domain;
        let shown = |name: &str| {
            !foreign || matches!(name, "sub" | "aud" | "exp") || self.settings.allowed_foreign_jwt_claims.contains(name)
        };
        let mut fields: std::collections::BTreeMap<String, Value> = token
            .claims
            .into_iter()
            .filter(|(name, _)| shown(name))
            .map(|(name, value)| (name, to_value(value)))
            .collect();
        // Clients rely on a list, also where the token has a single text.
        let audience = token.audience.into_iter().map(|one| Value { kind: Some(Kind::StringValue(one)) }).collect();
        fields.insert("aud".into(), Value { kind: Some(Kind::ListValue(ListValue { values: audience })) });
        Ok(wire::ValidateJwtsvidResponse { spiffe_id: token.id.to_string(), claims: Some(Struct { fields }) })
    }
}

fn check_audience(audience: &[String]) -> Result<(), Status> {
    if audience.is_empty() || audience.iter().any(String::is_empty) {
        return Err(status::invalid("audience must be specified"));
    }
    if audience.len() > AUDIENCES {
        return Err(status::invalid(format!("more than {AUDIENCES} audiences for one token")));
    }
    if audience.iter().any(|one| one.len() > AUDIENCE_LENGTH) {
        return Err(status::invalid(format!("an audience of more than {AUDIENCE_LENGTH} bytes")));
    }
    Ok(())
}

fn to_value(json: Json) -> Value {
    let kind = match json {
        Json::Null => Kind::NullValue(0),
        Json::Bool(value) => Kind::BoolValue(value),
        // Verification has made texts of the integers that a double does not hold.
        Json::Number(number) => Kind::NumberValue(number.as_f64().unwrap_or(f64::NAN)),
        Json::String(text) => Kind::StringValue(text),
        Json::Array(values) => Kind::ListValue(ListValue { values: values.into_iter().map(to_value).collect() }),
        Json::Object(fields) => Kind::StructValue(Struct {
            fields: fields.into_iter().map(|(name, value)| (name, to_value(value))).collect(),
        }),
    };
    Value { kind: Some(kind) }
}
