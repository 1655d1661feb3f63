//! `spire.api.server.svid.v1.SVID`: SVIDs of workloads, asked for by agents and by administrators.

mod batch;
mod mint;

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::id::SpiffeId;
use spiffe_proto::svid as proto;
use tonic::{Request, Response, Status};

use super::admission::Admission;
use super::core::Core;
use super::status::{Class, Failure};
use super::wire;
use crate::audit::Fields;
use crate::authority::Authority;
use crate::authority::issue::Issuer;
use crate::authority::profile::JwtProfile;
use crate::registry::authorized;
use crate::state::State;
use crate::state::model::Entry;

/// The service. Clones are handles of the same one.
#[derive(Clone)]
pub struct SvidService {
    core: Arc<Core>,
    authority: Authority,
    /// How many parts of one batch may be signed at once.
    width: usize,
}

/// What an agent may not learn more precisely.
const NOT_AUTHORIZED: &str = "entry not found or not authorized";

impl SvidService {
    /// A service that signs by `authority`, one batch on up to `width` threads.
    pub fn new(core: Arc<Core>, authority: Authority, width: usize) -> Self {
        Self { core, authority, width: width.max(1) }
    }

    fn issuer(&self, operation: &'static str) -> Result<Arc<Issuer>, Failure> {
        self.authority.active().map_err(|error| Failure::unavailable(operation).because(error))
    }

    fn check_serves_jwt(&self) -> Result<(), Failure> {
        if self.authority.serves_jwt() {
            Ok(())
        } else {
            Err(Failure::new(Class::Unserved, "JWT functionality is disabled"))
        }
    }

    fn caller(admission: &Admission) -> Result<&SpiffeId, Failure> {
        admission.caller.id().ok_or_else(|| Failure::internal("caller ID missing from request context"))
    }

    /// The entries that `agent` names and may have, in the order of `ids`, at `now`.
    async fn entries<'a>(
        &self,
        agent: &SpiffeId,
        ids: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(Vec<Option<Arc<Entry>>>, SystemTime), Failure> {
        let look =
            |state: &State, now| -> Vec<Option<Arc<Entry>>> { authorized::named(state, agent, ids.clone(), now) };
        let state = self.core.replica.latest();
        let now = self.core.now();
        let found = look(&state, now);
        if found.iter().all(Option::is_some) {
            return Ok((found, now));
        }
        // What this replica does not have may have been made elsewhere a moment ago.
        let state = self.core.current("failed to fetch registration entries").await?;
        let now = self.core.now();
        Ok((look(&state, now), now))
    }
}

/// A random UUID as a token id: its bytes in base64url.
fn token_id(core: &Core) -> String {
    use base64::Engine as _;
    let mut bytes: [u8; 16] = core.entropy.bytes();
    // Version 4 and variant 10 (RFC 9562, section 5.4).
    bytes[6] = bytes[6] & 0x0f | 0x40;
    bytes[8] = bytes[8] & 0x3f | 0x80;
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}

#[tonic::async_trait]
impl proto::svid_server::Svid for SvidService {
    async fn mint_x509svid(
        &self,
        mut request: Request<proto::MintX509svidRequest>,
    ) -> Result<Response<proto::MintX509svidResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let svid = self.mint_x509(&admission, &request.into_inner())?;
        Ok(Response::new(proto::MintX509svidResponse { svid: Some(svid) }))
    }

    async fn mint_jwtsvid(
        &self,
        mut request: Request<proto::MintJwtsvidRequest>,
    ) -> Result<Response<proto::MintJwtsvidResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let svid = self.mint_jwt(&admission, request.into_inner())?;
        Ok(Response::new(proto::MintJwtsvidResponse { svid: Some(svid) }))
    }

    async fn batch_new_x509svid(
        &self,
        mut request: Request<proto::BatchNewX509svidRequest>,
    ) -> Result<Response<proto::BatchNewX509svidResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let results = self.new_x509_batch(admission, request.into_inner().params).await?;
        Ok(Response::new(proto::BatchNewX509svidResponse { results }))
    }

    async fn new_jwtsvid(
        &self,
        mut request: Request<proto::NewJwtsvidRequest>,
    ) -> Result<Response<proto::NewJwtsvidResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        self.core.limit(&admission, 1, "rejecting request due to JWT signing request rate limiting").await?;
        self.check_serves_jwt()?;
        let proto::NewJwtsvidRequest { entry_id, audience } = request.into_inner();
        let (mut entries, now) = self.entries(Self::caller(&admission)?, [entry_id.as_str()].into_iter()).await?;
        let entry = entries.pop().flatten().ok_or_else(|| Failure::absent(NOT_AUTHORIZED))?;
        if audience.is_empty() {
            return Err(Failure::invalid("at least one audience is required").into());
        }
        let operation = "failed to sign JWT-SVID";
        let profile = JwtProfile {
            id: entry.spiffe_id.clone(),
            audience,
            ttl: entry.jwt_svid_ttl,
            token_id: entry.jwt_svid_include_jti.then(|| token_id(&self.core)),
        };
        let issued = self.issuer(operation)?.jwt(&profile, now).map_err(|error| Failure::of_issue(operation, error))?;
        let receipt = self.core.audit.jwt(&admission, &issued, || Fields {
            entry_id: Some(entry.id.to_string()),
            audience: Some(profile.audience.join(",")),
            ..Fields::default()
        });
        let svid = wire::jwt_svid(issued.release(&receipt), &entry.hint);
        Ok(Response::new(proto::NewJwtsvidResponse { svid: Some(svid) }))
    }

    async fn mint_witsvid(
        &self,
        _request: Request<proto::MintWitsvidRequest>,
    ) -> Result<Response<proto::MintWitsvidResponse>, Status> {
        Err(Failure::new(Class::Unserved, "WIT functionality is disabled").into())
    }

    async fn batch_new_witsvid(
        &self,
        _request: Request<proto::BatchNewWitsvidRequest>,
    ) -> Result<Response<proto::BatchNewWitsvidResponse>, Status> {
        Err(Failure::new(Class::Unserved, "WIT functionality is disabled").into())
    }

    async fn new_downstream_x509ca(
        &self,
        _request: Request<proto::NewDownstreamX509caRequest>,
    ) -> Result<Response<proto::NewDownstreamX509caResponse>, Status> {
        Err(Failure::new(Class::Unserved, "downstream authorities are not served").into())
    }
}
