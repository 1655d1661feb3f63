//! `spire.api.server.bundle.v1.Bundle`: our own bundle, and those of other trust domains.

mod federated;

use std::sync::Arc;

use spiffe_proto::bundle as proto;
use spiffe_proto::types;
use tonic::{Request, Response, Status};

use self::federated::Storing;
use super::admission::Admission;
use super::core::Core;
use super::page;
use super::status::{Class, Failure};
use super::wire;
use crate::audit::{Fields, Outcome};
use crate::history::Urgency;
use crate::registry::bundle::{self, Refusal, Step};
use crate::state::State;

/// The service. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct BundleService {
    core: Arc<Core>,
}

impl BundleService {
    /// A service over `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }

    /// Our own bundle out of `state`.
    fn own(&self, state: &State, mask: Option<&types::BundleMask>) -> Option<types::Bundle> {
        state.bundle(&self.core.trust_domain).map(|bundle| wire::bundle(bundle, mask))
    }

    async fn append(&self, request: &proto::AppendBundleRequest) -> Result<types::Bundle, Failure> {
        if request.jwt_authorities.is_empty() && request.x509_authorities.is_empty() {
            return Err(Failure::invalid("no authorities to append"));
        }
        let jwt = wire::jwt_authorities(&request.jwt_authorities)
            .map_err(|error| Failure::invalid("failed to convert JWT authority").because(error))?;
        let x509 = request
            .x509_authorities
            .iter()
            .map(|authority| wire::x509_authority(authority).map(|authority| authority.der))
            .collect::<Result<Vec<_>, _>>()
            .map_err(|error| Failure::invalid("failed to convert X.509 authority").because(error))?;
        let own = self.core.trust_domain.clone();
        let decide = move |state: &State, _| bundle::append(state, &own, &x509, &jwt);
        let refused = |refusal: Refusal| {
            let failure = match refusal {
                Refusal::KeyIdTaken { .. } => Failure::invalid(APPEND),
                _ => Failure::internal(APPEND),
            };
            failure.because(refusal)
        };
        self.in_steps(Urgency::Normal, APPEND, decide, refused).await?;
        let state = self.core.replica.latest();
        self.own(&state, request.output_mask.as_ref()).ok_or_else(|| Failure::absent("bundle not found"))
    }
}

/// What is said if authorities cannot be appended.
const APPEND: &str = "failed to append bundle";

/// The sequence stands still because its bundle is changed from two sides.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the bundle, or the entries that federate with it, are being changed by another request; try again")]
struct Contended;

impl BundleService {
    /// Proposes the steps of a decision until it leaves nothing to do; the decision is told whether an earlier step of
    /// the same request is done. Each step leaves less than the one before it, or somebody works against it.
    async fn in_steps(
        &self,
        urgency: Urgency,
        operation: &'static str,
        decide: impl Fn(&State, bool) -> Result<Step, Refusal> + Send + Sync + 'static,
        refused: impl Fn(Refusal) -> Failure + Send + Sync,
    ) -> Result<(), Failure> {
        let decide = Arc::new(decide);
        let mut rest = None;
        loop {
            let (decide, begun) = (Arc::clone(&decide), rest.is_some());
            let proposed = self
                .core
                .committer
                .propose(urgency, move |state, _| decide(state, begun).map(|step| (step.part, step.rest)));
            let receipt = proposed.await.map_err(|error| Failure::of_proposal(operation, error, &refused))?;
            match receipt.value {
                0 => return Ok(()),
                left if rest.is_some_and(|rest| left >= rest) => {
                    return Err(Failure::unavailable(operation).because(Contended));
                }
                left => rest = Some(left),
            }
        }
    }
}

fn about(trust_domain: &str) -> Fields {
    Fields { trust_domain_id: Some(trust_domain.to_owned()), ..Fields::default() }
}

#[tonic::async_trait]
impl proto::bundle_server::Bundle for BundleService {
    async fn count_bundles(
        &self,
        mut request: Request<proto::CountBundlesRequest>,
    ) -> Result<Response<proto::CountBundlesResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let state = self.core.current("failed to count bundles").await?;
        let count = i32::try_from(state.bundles().count()).unwrap_or(i32::MAX);
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        Ok(Response::new(proto::CountBundlesResponse { count }))
    }

    async fn get_bundle(
        &self,
        mut request: Request<proto::GetBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        let admission = Admission::take(&mut request)?;
        let mask = request.into_inner().output_mask;
        // An authority that is missing from an old bundle is an absence, too.
        let state = self.core.current("failed to fetch bundle").await?;
        let bundle = self.own(&state, mask.as_ref()).ok_or_else(|| Failure::absent("bundle not found"))?;
        self.core.audit.record(&admission, Outcome::Success, || about(self.core.trust_domain.as_str()));
        Ok(Response::new(bundle))
    }

    async fn append_bundle(
        &self,
        mut request: Request<proto::AppendBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        let admission = Admission::take(&mut request)?;
        let bundle = self.append(&request.into_inner()).await?;
        self.core.audit.record(&admission, Outcome::Success, || about(self.core.trust_domain.as_str()));
        Ok(Response::new(bundle))
    }

    async fn list_federated_bundles(
        &self,
        mut request: Request<proto::ListFederatedBundlesRequest>,
    ) -> Result<Response<proto::ListFederatedBundlesResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let operation = "failed to list bundles";
        let page = page::page(request.page_size, &request.page_token)
            .map_err(|error| Failure::internal(operation).because(error))?;
        let state = self.core.current(operation).await?;
        let after = page.map_or(0, |page| page.after);
        let foreign = state
            .bundles_in_order()
            .into_iter()
            .filter(|(ordinal, bundle)| *ordinal > after && bundle.trust_domain != self.core.trust_domain);
        let (bundles, next_page_token) = page::cut(foreign, page);
        let bundles = bundles.into_iter().map(|bundle| wire::bundle(bundle, request.output_mask.as_ref())).collect();
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        Ok(Response::new(proto::ListFederatedBundlesResponse { bundles, next_page_token }))
    }

    async fn get_federated_bundle(
        &self,
        mut request: Request<proto::GetFederatedBundleRequest>,
    ) -> Result<Response<types::Bundle>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let trust_domain = wire::trust_domain(&request.trust_domain)
            .map_err(|error| Failure::invalid("trust domain argument is not valid").because(error))?;
        if trust_domain == self.core.trust_domain {
            let refusal = "getting a federated bundle for the server's own trust domain is not allowed";
            return Err(Failure::invalid(refusal).into());
        }
        let state = self.core.current("failed to fetch bundle").await?;
        let bundle = state.bundle(&trust_domain).ok_or_else(|| Failure::absent("bundle not found"))?;
        self.core.audit.record(&admission, Outcome::Success, || about(trust_domain.as_str()));
        Ok(Response::new(wire::bundle(bundle, request.output_mask.as_ref())))
    }

    async fn batch_create_federated_bundle(
        &self,
        mut request: Request<proto::BatchCreateFederatedBundleRequest>,
    ) -> Result<Response<proto::BatchCreateFederatedBundleResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let stored = self.store_each(&admission, &request.bundle, Storing::Create, request.output_mask.as_ref()).await;
        let results = stored
            .into_iter()
            .map(|(status, bundle)| proto::batch_create_federated_bundle_response::Result {
                status: Some(status),
                bundle,
            })
            .collect();
        Ok(Response::new(proto::BatchCreateFederatedBundleResponse { results }))
    }

    async fn batch_update_federated_bundle(
        &self,
        mut request: Request<proto::BatchUpdateFederatedBundleRequest>,
    ) -> Result<Response<proto::BatchUpdateFederatedBundleResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let storing = Storing::Update(federated::fields(request.input_mask.as_ref()));
        let stored = self.store_each(&admission, &request.bundle, storing, request.output_mask.as_ref()).await;
        let results = stored
            .into_iter()
            .map(|(status, bundle)| proto::batch_update_federated_bundle_response::Result {
                status: Some(status),
                bundle,
            })
            .collect();
        Ok(Response::new(proto::BatchUpdateFederatedBundleResponse { results }))
    }

    async fn batch_set_federated_bundle(
        &self,
        mut request: Request<proto::BatchSetFederatedBundleRequest>,
    ) -> Result<Response<proto::BatchSetFederatedBundleResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let stored = self.store_each(&admission, &request.bundle, Storing::Set, request.output_mask.as_ref()).await;
        let results = stored
            .into_iter()
            .map(|(status, bundle)| proto::batch_set_federated_bundle_response::Result { status: Some(status), bundle })
            .collect();
        Ok(Response::new(proto::BatchSetFederatedBundleResponse { results }))
    }

    async fn batch_delete_federated_bundle(
        &self,
        mut request: Request<proto::BatchDeleteFederatedBundleRequest>,
    ) -> Result<Response<proto::BatchDeleteFederatedBundleResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let mode = federated::mode(request.mode)?;
        let results = self.remove_each(&admission, request.trust_domains, mode).await;
        Ok(Response::new(proto::BatchDeleteFederatedBundleResponse { results }))
    }

    async fn publish_jwt_authority(
        &self,
        _request: Request<proto::PublishJwtAuthorityRequest>,
    ) -> Result<Response<proto::PublishJwtAuthorityResponse>, Status> {
        Err(Failure::new(Class::Unserved, "downstream authorities are not served").into())
    }

    async fn publish_wit_authority(
        &self,
        _request: Request<proto::PublishWitAuthorityRequest>,
    ) -> Result<Response<proto::PublishWitAuthorityResponse>, Status> {
        Err(Failure::new(Class::Unserved, "WIT-SVID functionality is not yet implemented").into())
    }
}
