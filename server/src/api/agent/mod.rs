//! `spire.api.server.agent.v1.Agent`: attestation, renewal and administration of agents.

mod attest;
mod list;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use spiffe::id::SpiffeId;
use spiffe::x509::Csr;
use spiffe_proto::agent as proto;
use spiffe_proto::types;
use tonic::{Request, Response, Status, Streaming};

use super::admission::Admission;
use super::core::{Core, reason_of};
use super::page;
use super::status::{Class, Failure};
use super::stream::{self, Answers};
use super::wire;
use crate::attest::NodeAttestor;
use crate::audit::{Fields, Outcome, sha256_hex};
use crate::authority::Authority;
use crate::history::Urgency;
use crate::registry::agent;
use crate::state::model::JoinToken;

/// Longest software version that an agent may tell, in bytes.
const LONGEST_VERSION: usize = 255;

/// The service. Clones are handles of the same one.
#[derive(Clone)]
pub struct AgentService {
    core: Arc<Core>,
    authority: Authority,
    attestors: Arc<HashMap<&'static str, Arc<dyn NodeAttestor>>>,
    /// Whether a node gets its own agent id as a selector.
    id_as_selector: bool,
}

impl AgentService {
    /// A service that attests by `attestors` and signs by `authority`.
    pub fn new(
        core: Arc<Core>,
        authority: Authority,
        attestors: Vec<Arc<dyn NodeAttestor>>,
        id_as_selector: bool,
    ) -> Self {
        let attestors = attestors.into_iter().map(|attestor| (attestor.name(), attestor)).collect();
        Self { core, authority, attestors: Arc::new(attestors), id_as_selector }
    }

    /// The id that an administrative call names.
    fn named(&self, id: Option<&types::Spiffeid>) -> Result<SpiffeId, Failure> {
        wire::agent_id(id, &self.core.trust_domain).map_err(|error| Failure::invalid("invalid agent ID").because(error))
    }

    async fn renew(
        &self,
        admission: &Admission,
        params: Option<proto::AgentX509svidParams>,
    ) -> Result<types::X509svid, Failure> {
        let operation = "rejecting request due to renew agent rate limiting";
        self.core.limit(admission, 1, operation).await?;
        let id =
            admission.caller.id().ok_or_else(|| Failure::internal("caller ID missing from request context"))?.clone();
        let state = self.core.replica.latest();
        // Asked here so that nothing is signed in vain, and decided again when the renewal is recorded.
        agent::renewable(&state, &id).map_err(renew_refused)?;
        let params = params.ok_or_else(|| Failure::invalid("params cannot be nil"))?;
        let csr = verified_csr(&params.csr)?;
        let issuer =
            self.authority.active().map_err(|error| Failure::unavailable("failed to sign X509 SVID").because(error))?;
        let issued = issuer
            .agent_x509(&id, csr.public_key(), self.core.now())
            .map_err(|error| Failure::of_issue("failed to sign X509 SVID", error))?;
        let (serial, expires_at) = (issued.serial(), issued.not_after());
        let proposed = self.core.committer.propose(Urgency::Vital, move |state, _| {
            agent::renew(state, &id, serial, expires_at).map(|part| (part, ()))
        });
        let receipt =
            proposed.await.map_err(|error| Failure::of_proposal("failed to update agent", error, renew_refused))?;
        Ok(wire::x509_svid(issued.release(&receipt)))
    }

    async fn create_token(&self, request: &proto::CreateJoinTokenRequest) -> Result<types::JoinToken, Failure> {
        let lifetime =
            wire::lifetime(request.ttl).ok_or_else(|| Failure::invalid("ttl is required, you must provide one"))?;
        let alias = match &request.agent_id {
            None => None,
            Some(_) => Some(
                wire::workload_id(request.agent_id.as_ref(), &self.core.trust_domain)
                    .map_err(|error| Failure::invalid("invalid agent ID").because(error))?,
            ),
        };
        let value = if request.token.is_empty() { self.core.entropy.uuid_v4() } else { request.token.clone() };
        if alias.is_some() {
            // The alias hangs below the id that the token gives; a token that gives none cannot have one.
            spiffe::attest::join_token::agent_id(&self.core.trust_domain, &value)
                .map_err(|error| Failure::internal("failed to create join token registration entry").because(error))?;
        }
        let hash = spiffe::attest::join_token::hash(&value);
        let receipt = self
            .core
            .committer
            .propose(Urgency::Normal, move |state, now| {
                let token = JoinToken { hash, expires_at: whole(now + lifetime), alias: alias.clone() };
                agent::create_token(state, &token, now).map(|part| (part, token.expires_at))
            })
            .await
            .map_err(|error| {
                Failure::of_proposal("failed to create token", error, |refusal| {
                    Failure::internal("failed to create token").because(refusal)
                })
            })?;
        Ok(types::JoinToken { value, expires_at: wire::seconds(receipt.value) })
    }
}

/// A time cut to whole seconds, as it is told to clients.
fn whole(time: std::time::SystemTime) -> std::time::SystemTime {
    wire::time(wire::seconds(time))
}

/// A certificate request whose key is strong enough and signed it. Everything else in it is ignored.
fn verified_csr(der: &[u8]) -> Result<Csr, Failure> {
    if der.is_empty() {
        return Err(Failure::invalid("missing CSR"));
    }
    let csr = Csr::parse(der).map_err(|error| Failure::invalid("failed to parse CSR").because(error))?;
    csr.verify_signature().map_err(|error| Failure::invalid("failed to verify CSR signature").because(error))?;
    Ok(csr)
}

fn renew_refused(refusal: agent::Refusal) -> Failure {
    match refusal {
        agent::Refusal::NotAttested => Failure::absent("agent not found"),
        agent::Refusal::MustReattest => {
            Failure::new(Class::Denied(Some(reason_of(refusal))), "agent must reattest instead of renew")
        }
        refusal => Failure::new(Class::Denied(Some(reason_of(refusal))), "failed to update agent").because(refusal),
    }
}

fn about(id: &SpiffeId) -> Fields {
    Fields { spiffe_id: Some(id.to_string()), ..Fields::default() }
}

#[tonic::async_trait]
impl proto::agent_server::Agent for AgentService {
    type AttestAgentStream = Answers<proto::AttestAgentResponse>;

    async fn count_agents(
        &self,
        mut request: Request<proto::CountAgentsRequest>,
    ) -> Result<Response<proto::CountAgentsResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let filter = list::Filter::of_count(request.into_inner().filter)?;
        let state = self.core.current("failed to count agents").await?;
        let count = if filter.is_none() { state.agent_count() } else { filter.apply(state.agents()).count() };
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        Ok(Response::new(proto::CountAgentsResponse { count: i32::try_from(count).unwrap_or(i32::MAX) }))
    }

    async fn list_agents(
        &self,
        mut request: Request<proto::ListAgentsRequest>,
    ) -> Result<Response<proto::ListAgentsResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let filter = list::Filter::of_list(request.filter)?;
        let page = page::page(request.page_size, &request.page_token)
            .map_err(|error| Failure::internal("failed to list agents").because(error))?;
        let state = self.core.current("failed to list agents").await?;
        let rows = filter.apply(state.agents_after(page.map_or(0, |page| page.after)));
        let (agents, next_page_token) = page::cut(rows.map(|agent| (agent.ordinal, agent)), page);
        let agents = agents.into_iter().map(|agent| wire::agent(agent, request.output_mask.as_ref())).collect();
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        Ok(Response::new(proto::ListAgentsResponse { agents, next_page_token }))
    }

    async fn get_agent(&self, mut request: Request<proto::GetAgentRequest>) -> Result<Response<types::Agent>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let id = self.named(request.id.as_ref())?;
        let state = self.core.current("failed to fetch agent").await?;
        let agent = state.agent(&id).ok_or_else(|| Failure::absent("agent not found"))?;
        self.core.audit.record(&admission, Outcome::Success, || about(&id));
        Ok(Response::new(wire::agent(agent, request.output_mask.as_ref())))
    }

    async fn delete_agent(&self, mut request: Request<proto::DeleteAgentRequest>) -> Result<Response<()>, Status> {
        let admission = Admission::take(&mut request)?;
        let id = self.named(request.into_inner().id.as_ref())?;
        let evicted = id.clone();
        let proposed = self
            .core
            .committer
            .propose(Urgency::Shrinking, move |state, _| agent::evict(state, &evicted).map(|part| (part, ())));
        let _receipt = proposed.await.map_err(|error| {
            Failure::of_proposal("failed to remove agent", error, |refusal| {
                Failure::absent("agent not found").because(refusal)
            })
        })?;
        tracing::info!(spiffe_id = %id, "Agent deleted");
        self.core.audit.record(&admission, Outcome::Success, || about(&id));
        Ok(Response::new(()))
    }

    async fn ban_agent(&self, mut request: Request<proto::BanAgentRequest>) -> Result<Response<()>, Status> {
        let admission = Admission::take(&mut request)?;
        let id = self.named(request.into_inner().id.as_ref())?;
        let banned = id.clone();
        let proposed = self
            .core
            .committer
            .propose(Urgency::Shrinking, move |state, _| agent::ban(state, &banned).map(|part| (part, ())));
        let _receipt = proposed.await.map_err(|error| {
            Failure::of_proposal("failed to ban agent", error, |refusal| {
                Failure::absent("agent not found").because(refusal)
            })
        })?;
        tracing::info!(spiffe_id = %id, "Agent banned");
        self.core.audit.record(&admission, Outcome::Success, || about(&id));
        Ok(Response::new(()))
    }

    async fn attest_agent(
        &self,
        mut request: Request<Streaming<proto::AttestAgentRequest>>,
    ) -> Result<Response<Self::AttestAgentStream>, Status> {
        let admission = Admission::take(&mut request)?;
        let (service, requests) = (self.clone(), request.into_inner());
        let answers = stream::start(move |outlet| async move {
            service.attest(&admission, requests, &outlet).await.map_err(Status::from)
        });
        answers.await.map(Response::new)
    }

    async fn renew_agent(
        &self,
        mut request: Request<proto::RenewAgentRequest>,
    ) -> Result<Response<proto::RenewAgentResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let params = request.into_inner().params;
        let hash = self.core.audit.writes_lines().then(|| params.as_ref().map(|params| sha256_hex(&params.csr)));
        let svid = self.renew(&admission, params).await?;
        self.core.audit.record(&admission, Outcome::Success, || Fields {
            csr_sha256: hash.flatten(),
            expires_at: Some(svid.expires_at),
            ..Fields::default()
        });
        Ok(Response::new(proto::RenewAgentResponse { svid: Some(svid) }))
    }

    async fn create_join_token(
        &self,
        mut request: Request<proto::CreateJoinTokenRequest>,
    ) -> Result<Response<types::JoinToken>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let token = self.create_token(&request).await?;
        self.core.audit.record(&admission, Outcome::Success, || Fields {
            ttl: Some(request.ttl.into()),
            expires_at: Some(token.expires_at),
            ..Fields::default()
        });
        Ok(Response::new(token))
    }

    async fn post_status(
        &self,
        mut request: Request<proto::PostStatusRequest>,
    ) -> Result<Response<proto::PostStatusResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        self.core.limit(&admission, 1, "rejecting request due to post status rate limiting").await?;
        let id =
            admission.caller.id().ok_or_else(|| Failure::internal("caller ID missing from request context"))?.clone();
        let version = request.into_inner().agent_version;
        if version.len() > LONGEST_VERSION {
            return Err(Failure::invalid("agent version is too long (max 255 characters)").into());
        }
        if !version.is_empty() && !self.reports(&id, &version) {
            let proposed = self.core.committer.propose(Urgency::Normal, move |state, _| {
                agent::report_version(state, &id, &version).map(|part| (part, ()))
            });
            let _receipt = proposed.await.map_err(|error| {
                Failure::of_proposal("failed to update agent", error, |refusal| {
                    Failure::absent("agent not found").because(refusal)
                })
            })?;
        }
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        Ok(Response::new(proto::PostStatusResponse {}))
    }
}

impl AgentService {
    /// Whether the agent has told this version before.
    fn reports(&self, id: &SpiffeId, version: &str) -> bool {
        self.core.replica.latest().agent(id).is_some_and(|agent| *agent.version == *version)
    }
}

/// How long an attestation may take in all, challenges included.
const ATTESTATION: Duration = Duration::from_secs(60);
