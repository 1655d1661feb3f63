//! Node attestation: proof of the node, then one part that records it, then its certificate.

use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use spiffe::id::SpiffeId;
use spiffe::selector::{Selector, SelectorSet};
use spiffe_proto::agent as proto;
use spiffe_proto::agent::attest_agent_request::{Params, Step};
use spiffe_proto::agent::attest_agent_response as response;
use tonic::Streaming;

use super::{ATTESTATION, AgentService, verified_csr};
use crate::api::admission::Admission;
use crate::api::status::{Class, Failure};
use crate::api::stream::Outlet;
use crate::api::wire;
use crate::attest::{Attested, ChallengeError, Challenger};
use crate::audit::{Fields, Outcome};
use crate::history::Urgency;
use crate::registry::agent::{self, Attestation, Refusal};

/// What an attestation request lacks.
#[derive(Clone, Copy, Debug, thiserror::Error)]
enum Missing {
    #[error("missing params")]
    Params,
    #[error("missing attestation data")]
    Data,
    #[error("missing X509-SVID parameters")]
    SvidParams,
    #[error("missing CSR")]
    Csr,
    #[error("missing attestation data type")]
    Kind,
    #[error("missing attestation data payload")]
    Payload,
}

/// The client ended its side.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("EOF")]
struct EndOfRequests;

/// No attestor has this name.
#[derive(Debug, thiserror::Error)]
#[error("could not find node attestor type {kind:?}")]
struct UnknownAttestor {
    kind: String,
}

/// What a node sends to be attested.
struct Claim {
    kind: String,
    payload: Bytes,
    csr: Bytes,
}

impl Claim {
    fn of(message: proto::AttestAgentRequest) -> Result<Self, Missing> {
        let Some(Step::Params(Params { data, params })) = message.step else { return Err(Missing::Params) };
        let data = data.ok_or(Missing::Data)?;
        let params = params.ok_or(Missing::SvidParams)?;
        if params.csr.is_empty() {
            return Err(Missing::Csr);
        }
        if data.r#type.is_empty() {
            return Err(Missing::Kind);
        }
        if data.payload.is_empty() {
            return Err(Missing::Payload);
        }
        Ok(Self { kind: data.r#type, payload: data.payload, csr: params.csr })
    }
}

/// The node at the other end, for an attestor that has questions.
struct Node<'a> {
    requests: &'a mut Streaming<proto::AttestAgentRequest>,
    outlet: &'a Outlet<proto::AttestAgentResponse>,
    address: Option<IpAddr>,
}

#[async_trait]
impl Challenger for Node<'_> {
    async fn challenge(&mut self, challenge: Bytes) -> Result<Bytes, ChallengeError> {
        self.outlet.send(proto::AttestAgentResponse { step: Some(response::Step::Challenge(challenge)) }).await;
        match self.requests.message().await {
            Ok(Some(proto::AttestAgentRequest { step: Some(Step::ChallengeResponse(answer)) })) => Ok(answer),
            Ok(Some(_)) => Err(ChallengeError::OutOfTurn),
            Ok(None) => Err(ChallengeError::Closed),
            Err(status) => Err(ChallengeError::Stream(status)),
        }
    }

    fn address(&self) -> Option<IpAddr> {
        self.address
    }
}

impl AgentService {
    /// Attests one node, and sends it its certificate.
    pub(super) async fn attest(
        &self,
        admission: &Admission,
        mut requests: Streaming<proto::AttestAgentRequest>,
        outlet: &Outlet<proto::AttestAgentResponse>,
    ) -> Result<(), Failure> {
        let attested = tokio::time::timeout(ATTESTATION, self.attest_node(admission, &mut requests, outlet)).await;
        let result = attested
            .unwrap_or_else(|_| Err(Failure::new(Class::TooLate, "node attestation took longer than a minute")));
        if let Err(failure) = &result
            && self.core.log.allow("Node attestation failed", &admission.caller.party())
        {
            tracing::warn!(
                caller_addr = admission.caller.address.map(tracing::field::display),
                reason = failure.text(),
                "Node attestation failed"
            );
        }
        result
    }

    async fn attest_node(
        &self,
        admission: &Admission,
        requests: &mut Streaming<proto::AttestAgentRequest>,
        outlet: &Outlet<proto::AttestAgentResponse>,
    ) -> Result<(), Failure> {
        self.core.limit(admission, 1, "rejecting request due to attest agent rate limiting").await?;
        let unread = "failed to receive request from stream";
        let first = requests.message().await.map_err(|status| Failure::of_request(unread, status))?;
        let first = first.ok_or_else(|| Failure::invalid(unread).because(EndOfRequests))?;
        let claim = Claim::of(first).map_err(|missing| Failure::invalid("malformed param").because(missing))?;
        let attestor = self.attestors.get(claim.kind.as_str()).ok_or_else(|| {
            Failure::new(Class::Precondition, "error getting node attestor")
                .because(UnknownAttestor { kind: claim.kind.clone() })
        })?;
        let now = self.core.now();
        let mut node = Node { requests, outlet, address: admission.caller.address };
        let attested = attestor.attest(&claim.payload, &mut node, now).await.map_err(Failure::of_attestation)?;
        let svid = self.record(&claim, attested).await?;
        let id = svid.0.id.as_ref().map(|id| format!("spiffe://{}{}", id.trust_domain, id.path)).unwrap_or_default();
        tracing::info!(
            agent_id = %id,
            node_attestor_type = %claim.kind,
            address = admission.caller.address.map(tracing::field::display),
            "Agent attestation request completed"
        );
        self.core.audit.record(admission, Outcome::Success, || Fields {
            agent_id: Some(id),
            node_attestor_type: Some(claim.kind.clone()),
            ..Fields::default()
        });
        let result = response::Result { svid: Some(svid.0), reattestable: svid.1 };
        outlet.send(proto::AttestAgentResponse { step: Some(response::Step::Result(result)) }).await;
        Ok(())
    }

    /// Signs for an attested node and records it; gives the SVID and whether the node can attest again.
    async fn record(
        &self,
        claim: &Claim,
        attested: Attested,
    ) -> Result<(spiffe_proto::types::X509svid, bool), Failure> {
        let Attested { agent_id: id, selectors, can_reattest, token, .. } = attested;
        self.check_id(&id, &claim.kind)?;
        let csr = verified_csr(&claim.csr)?;
        let selectors = if self.id_as_selector { with_id(&selectors, &id)? } else { selectors };
        let state = self.core.current("failed to fetch agent").await?;
        if state.agent(&id).is_some_and(|agent| agent.is_banned()) {
            return Err(refused(Refusal::Banned));
        }
        let issuer =
            self.authority.active().map_err(|error| Failure::unavailable("failed to sign X509 SVID").because(error))?;
        let issued = issuer
            .agent_x509(&id, csr.public_key(), self.core.now())
            .map_err(|error| Failure::of_issue("failed to sign X509 SVID", error))?;
        let attestation = Attestation {
            id,
            attestation_type: Arc::from(&*claim.kind),
            selectors,
            can_reattest,
            serial: issued.serial(),
            expires_at: issued.not_after(),
            token,
            alias_entry_id: Arc::from(self.core.entropy.uuid_v4()),
        };
        let urgency = if state.agent(&attestation.id).is_some() { Urgency::Vital } else { Urgency::Normal };
        let proposed = self
            .core
            .committer
            .propose(urgency, move |state, now| agent::attest(state, &attestation, now).map(|part| (part, ())));
        let receipt =
            proposed.await.map_err(|error| Failure::of_proposal("failed to create attested agent", error, refused))?;
        Ok((wire::x509_svid(issued.release(&receipt)), can_reattest))
    }

    /// An attestor may name any agent of ours, but not the server; one outside its own part of the names is odd.
    fn check_id(&self, id: &SpiffeId, kind: &str) -> Result<(), Failure> {
        wire::member(id.clone(), &self.core.trust_domain)
            .map_err(|error| Failure::internal("invalid agent ID").because(error))?;
        if id.is_server() {
            return Err(Failure::internal("agent ID cannot collide with the server ID"));
        }
        let own = id.path().strip_prefix("/spire/agent/").and_then(|path| path.strip_prefix(kind));
        if !own.is_some_and(|rest| rest.starts_with('/')) {
            tracing::warn!(agent_id = %id, node_attestor_type = kind, "Agent ID is outside the names of its attestor");
        }
        Ok(())
    }
}

/// The selectors and the node's own id.
fn with_id(selectors: &SelectorSet, id: &SpiffeId) -> Result<SelectorSet, Failure> {
    let own = Selector::new("spiffe_id", id.as_str())
        .map_err(|error| Failure::internal("failed to update selectors").because(error))?;
    Ok(selectors.union(&SelectorSet::from_iter([own])))
}

/// What a node is told that was refused after it had proved itself. Without a reason in the details: those are for
/// agents that have an identity to give up.
fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Banned => Failure::new(Class::Denied(None), "failed to attest: agent is banned"),
        Refusal::TokenUnknown => {
            Failure::invalid("failed to attest: join token does not exist or has already been used")
        }
        Refusal::TokenExpired => Failure::invalid("join token expired"),
        refusal => Failure::internal("failed to create attested agent").because(refusal),
    }
}
