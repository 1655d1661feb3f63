//! The calls that an agent makes, each as a function on values.

use std::time::Duration;

use async_trait::async_trait;
use bytes::Bytes;
use spiffe::bundle::Bundle;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::agent::attest_agent_request::{Params, Step as Asking};
use spiffe_proto::agent::attest_agent_response::Step as Answer;
use spiffe_proto::agent::{AgentX509svidParams, AttestAgentRequest, PostStatusRequest, RenewAgentRequest};
use spiffe_proto::bundle::GetBundleRequest;
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::svid::svid_client::SvidClient;
use spiffe_proto::svid::{BatchNewX509svidRequest, NewJwtsvidRequest, NewX509svidParams, batch_new_x509svid_response};
use spiffe_proto::types::AttestationData;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};
use zeroize::Zeroizing;

use super::{Answered, CALL_DEADLINE, DialError, LARGEST_MESSAGE, LinkError, ServerLink, wire};
use crate::attest::{NodeProver, ProveError};
use crate::cache::{EntryId, IssueError, Issuer, SignedJwt, SigningRequest};

/// What the server gave a node that proved what it is.
#[derive(Debug)]
pub struct Attested {
    /// The agent's SVID: DER certificates, leaf first.
    pub chain: Vec<Bytes>,
    /// Whether the agent may attest again.
    pub reattestable: bool,
    /// The trust bundle, if the server also gave that.
    pub bundle: Option<Bundle>,
}

/// Why a node attestation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttestError {
    /// There is no connection.
    #[error(transparent)]
    Dial(DialError),
    /// There is nothing to prove with.
    #[error("the node has no proof")]
    Prove(#[source] ProveError),
    /// The server refuses this node for good.
    #[error("the server refuses this node: {}", .0.message())]
    Refused(Box<Status>),
    /// The server answered with another error.
    #[error("the server answered the attestation with an error")]
    Status(#[source] Answered),
    /// The server's answer cannot be used.
    #[error("the server's answer is malformed: {0}")]
    Malformed(&'static str),
    /// It took too long.
    #[error("the attestation was not completed in time")]
    Deadline,
}

impl AttestError {
    /// Whether it may go better later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Prove(error) => error.is_retryable(),
            Self::Refused(_) => false,
            Self::Dial(_) | Self::Status(_) | Self::Malformed(_) | Self::Deadline => true,
        }
    }
}

fn status(status: Status) -> AttestError {
    match status.code() {
        Code::PermissionDenied => AttestError::Refused(Box::new(status)),
        _ => AttestError::Status(status.into()),
    }
}

impl ServerLink {
    /// Attests this node over a connection of its own, within `patience`, and fetches the trust bundle over the same one.
    pub async fn attest(
        &self,
        prover: &dyn NodeProver,
        csr: Bytes,
        patience: Duration,
    ) -> Result<Attested, AttestError> {
        let attempt = async {
            let payload = prover.payload().await.map_err(AttestError::Prove)?;
            let channel = self.dial_as_nobody().await.map_err(AttestError::Dial)?;
            let attested = tokio::time::timeout(CALL_DEADLINE, attest(channel.clone(), prover, payload, csr))
                .await
                .map_err(|_| AttestError::Deadline)??;
            Ok((channel, attested))
        };
        let (channel, mut attested) =
            tokio::time::timeout(patience, attempt).await.map_err(|_| AttestError::Deadline)??;
        let bundle = tokio::time::timeout(patience, bundle_over(channel)).await;
        match bundle.unwrap_or(Err(AttestError::Deadline)) {
            Ok(bundle) => attested.bundle = Some(bundle),
            // The identity is there, and a token may be used up: without the newest bundle is better than without both.
            Err(error) => {
                tracing::warn!(
                    error = runtime::telemetry::chain(&error),
                    "Attested, but could not fetch the trust bundle"
                );
            }
        }
        Ok(attested)
    }

    /// Fetches the trust bundle without an identity.
    pub async fn bundle_as_nobody(&self) -> Result<Bundle, AttestError> {
        bundle_over(self.dial_as_nobody().await.map_err(AttestError::Dial)?).await
    }

    /// Asks for a successor of the agent's SVID, for as long as `patience` says: DER certificates, leaf first.
    pub async fn renew(&self, csr: Bytes, patience: Duration) -> Result<Vec<Bytes>, LinkError> {
        let call = self.call(|channel| {
            let params = Some(AgentX509svidParams { csr: csr.clone() });
            async move { AgentClient::new(channel).renew_agent(RenewAgentRequest { params }).await }
        });
        let Ok(response) = tokio::time::timeout(patience, call).await else {
            // The next attempt is not to wait for the same one.
            self.release(self.connection());
            return Err(LinkError::Deadline);
        };
        let response = response?;
        Ok(response.svid.map(|svid| svid.cert_chain).unwrap_or_default())
    }

    /// Tells the server which version this agent is.
    pub async fn post_status(&self, version: &str) -> Result<(), LinkError> {
        self.call(|channel| {
            let request = PostStatusRequest { agent_version: version.to_owned(), ..PostStatusRequest::default() };
            async move { AgentClient::new(channel).post_status(request).await }
        })
        .await
        .map(|_| ())
    }
}

async fn attest(
    channel: Channel,
    prover: &dyn NodeProver,
    payload: Bytes,
    csr: Bytes,
) -> Result<Attested, AttestError> {
    let (steps, requests) = mpsc::channel(1);
    let params = Params {
        data: Some(AttestationData { r#type: prover.name().to_owned(), payload }),
        params: Some(AgentX509svidParams { csr }),
    };
    let ended = |_| AttestError::Malformed("the stream ended without a result");
    steps.send(AttestAgentRequest { step: Some(Asking::Params(params)) }).await.map_err(ended)?;
    let mut client = AgentClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE);
    let mut answers = client.attest_agent(ReceiverStream::new(requests)).await.map_err(status)?.into_inner();
    while let Some(answer) = answers.message().await.map_err(status)? {
        match answer.step {
            Some(Answer::Challenge(challenge)) => {
                let response = prover.answer(challenge).await.map_err(AttestError::Prove)?;
                let step = Some(Asking::ChallengeResponse(response));
                // If the server has ended the stream, the next message says why.
                let _ = steps.send(AttestAgentRequest { step }).await;
            }
            Some(Answer::Result(result)) => {
                let svid = result.svid.ok_or(AttestError::Malformed("a result without SVID"))?;
                return Ok(Attested { chain: svid.cert_chain, reattestable: result.reattestable, bundle: None });
            }
            None => return Err(AttestError::Malformed("an empty step")),
        }
    }
    Err(AttestError::Malformed("the stream ended without a result"))
}

async fn bundle_over(channel: Channel) -> Result<Bundle, AttestError> {
    let mut client = BundleClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE);
    let response = tokio::time::timeout(CALL_DEADLINE, client.get_bundle(GetBundleRequest { output_mask: None }))
        .await
        .map_err(|_| AttestError::Deadline)?
        .map_err(|status| AttestError::Status(status.into()))?;
    wire::bundle(response.into_inner()).map_err(|_| AttestError::Malformed("the bundle"))
}

#[async_trait]
impl Issuer for ServerLink {
    async fn sign_x509(&self, requests: &[SigningRequest]) -> Result<Vec<Result<Vec<Bytes>, IssueError>>, IssueError> {
        let params: Vec<NewX509svidParams> = requests
            .iter()
            .map(|request| NewX509svidParams { entry_id: request.entry_id.to_string(), csr: request.csr.clone() })
            .collect();
        let response = self
            .call(|channel| {
                let request = BatchNewX509svidRequest { params: params.clone() };
                async move {
                    let mut client = SvidClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE);
                    client.batch_new_x509svid(request).await
                }
            })
            .await
            .map_err(|error| IssueError::Call(Box::new(error)))?;
        Ok(response.results.into_iter().map(one_result).collect())
    }

    async fn sign_jwt(&self, entry: &EntryId, audience: &[String]) -> Result<SignedJwt, IssueError> {
        let response = self
            .call(|channel| {
                let request = NewJwtsvidRequest { entry_id: entry.to_string(), audience: audience.to_vec() };
                async move { SvidClient::new(channel).new_jwtsvid(request).await }
            })
            .await
            .map_err(|error| IssueError::Call(Box::new(error)))?;
        let svid = response.svid.ok_or(IssueError::Malformed("an answer without SVID"))?;
        let token = Zeroizing::new(svid.token);
        if token.is_empty() {
            return Err(IssueError::Malformed("an empty token"));
        }
        Ok(SignedJwt {
            token,
            id: wire::id(svid.id).map_err(|_| IssueError::Malformed("a token without identity"))?,
            issued_at: wire::time(svid.issued_at).ok_or(IssueError::Malformed("a token without time of issue"))?,
            expires_at: wire::time(svid.expires_at).ok_or(IssueError::Malformed("a token without expiry"))?,
        })
    }
}

fn one_result(result: batch_new_x509svid_response::Result) -> Result<Vec<Bytes>, IssueError> {
    match (result.status, result.svid) {
        (Some(status), _) if status.code != 0 => {
            Err(IssueError::Refused { code: status.code, message: status.message })
        }
        (_, Some(svid)) => Ok(svid.cert_chain),
        (_, None) => Err(IssueError::Malformed("a result without SVID")),
    }
}
