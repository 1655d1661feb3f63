//! A node without an agent: attests and calls the server's API over the wire as an agent would.

use std::net::SocketAddr;

use anyhow::{Context, Result, bail};
use prost::Message;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::agent::{
    AgentX509svidParams, AttestAgentRequest, RenewAgentRequest, attest_agent_request, attest_agent_response,
};
use spiffe_proto::{rpc_status, types};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::wire::loopback;
use super::{Presented, Requested, Server, tls};

/// An attested node.
pub struct Node {
    /// Its SPIFFE ID.
    pub id: types::Spiffeid,
    /// Its SVID and key.
    pub presented: Presented,
    /// Whether it may attest again.
    pub reattestable: bool,
    number: usize,
    server: SocketAddr,
}

impl Node {
    /// Attests node `number` (each has an address of its own) by a join token.
    ///
    /// # Errors
    /// What the server answered, as a status.
    pub async fn by_token(server: &Server, number: usize, token: &str) -> Result<Self, Status> {
        Self::attest(server, number, "join_token", token.as_bytes(), |_| Err(Status::internal("unexpected challenge")))
            .await
    }

    /// Attests by any method; `respond` answers its challenges.
    ///
    /// # Errors
    /// What the server answered, as a status.
    pub async fn attest(
        server: &Server,
        number: usize,
        method: &str,
        payload: &[u8],
        mut respond: impl FnMut(&[u8]) -> Result<Vec<u8>, Status>,
    ) -> Result<Self, Status> {
        let address = SocketAddr::from(([127, 0, 0, 1], server.port));
        let requested = Requested::new(None).map_err(unexpected)?;
        let channel = tls(address, loopback(number).map_err(unexpected)?, None).await.map_err(unexpected)?;
        let (send, receive) = mpsc::channel(1);
        let data = types::AttestationData { r#type: method.to_owned(), payload: payload.to_vec().into() };
        let params = AgentX509svidParams { csr: requested.csr.into() };
        let first = attest_agent_request::Params { data: Some(data), params: Some(params) };
        send_step(&send, attest_agent_request::Step::Params(first)).await?;
        let mut answers = AgentClient::new(channel).attest_agent(ReceiverStream::new(receive)).await?.into_inner();
        loop {
            let answer =
                answers.message().await?.ok_or_else(|| Status::internal("the stream ended without a result"))?;
            match answer.step {
                Some(attest_agent_response::Step::Challenge(challenge)) => {
                    let response = respond(&challenge)?;
                    send_step(&send, attest_agent_request::Step::ChallengeResponse(response.into())).await?;
                }
                Some(attest_agent_response::Step::Result(result)) => {
                    let svid = result.svid.ok_or_else(|| Status::internal("no SVID in the result"))?;
                    return Ok(Self {
                        id: svid.id.ok_or_else(|| Status::internal("no id in the SVID"))?,
                        presented: Presented {
                            chain: svid.cert_chain.iter().map(|certificate| certificate.to_vec()).collect(),
                            key: requested.key,
                        },
                        reattestable: result.reattestable,
                        number,
                        server: address,
                    });
                }
                None => return Err(Status::internal("an empty step")),
            }
        }
    }

    /// The id as text.
    #[must_use]
    pub fn name(&self) -> String {
        format!("spiffe://{}{}", self.id.trust_domain, self.id.path)
    }

    /// A fresh connection with the node's SVID.
    ///
    /// # Errors
    /// If the handshake fails.
    pub async fn connect(&self) -> Result<Channel> {
        tls(self.server, loopback(self.number)?, Some(self.presented.clone())).await
    }

    /// Asks for a fresh SVID and takes it.
    ///
    /// # Errors
    /// What the server answered, as a status.
    pub async fn renew(&mut self) -> Result<(), Status> {
        let requested = Requested::new(None).map_err(unexpected)?;
        let params = Some(AgentX509svidParams { csr: requested.csr.into() });
        let channel = self.connect().await.map_err(unexpected)?;
        let answer = AgentClient::new(channel).renew_agent(RenewAgentRequest { params }).await?.into_inner();
        let svid = answer.svid.ok_or_else(|| Status::internal("no SVID"))?;
        let chain = svid.cert_chain.iter().map(|certificate| certificate.to_vec()).collect();
        self.presented = Presented { chain, key: requested.key };
        Ok(())
    }
}

async fn send_step(send: &mpsc::Sender<AttestAgentRequest>, step: attest_agent_request::Step) -> Result<(), Status> {
    let request = AttestAgentRequest { step: Some(step) };
    send.send(request).await.map_err(|_| Status::internal("the stream is closed"))
}

fn unexpected(error: anyhow::Error) -> Status {
    Status::new(Code::Unavailable, format!("{error:#}"))
}

/// The reason that travels with a PermissionDenied.
///
/// # Errors
/// If the status carries none.
pub fn reason(status: &Status) -> Result<types::permission_denied_details::Reason> {
    let details = rpc_status::Status::decode(status.details())?;
    let detail = details.details.first().with_context(|| format!("no detail in {status:?}"))?;
    if detail.type_url != "type.googleapis.com/spire.api.types.PermissionDeniedDetails" {
        bail!("unexpected detail {}", detail.type_url);
    }
    Ok(types::PermissionDeniedDetails::decode(detail.value.as_ref())?.reason())
}
