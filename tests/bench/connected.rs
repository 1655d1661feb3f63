//! What a connected agent holds open, and how soon it learns there that it is banned.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Server, unix};
use spiffe_proto::agent::BanAgentRequest;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::entry::SyncAuthorizedEntriesRequest;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::sync::sync_client::SyncClient;
use spiffe_proto::sync::{
    Ack, Held, Hello, SubscribeRequest, SubscribeResponse, subscribe_request, subscribe_response,
};
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};

use crate::node::{self, Node};

/// An open push stream, whose agent has everything that is its.
pub struct Stream {
    says: mpsc::Sender<SubscribeRequest>,
    answers: Streaming<SubscribeResponse>,
    first: Option<SubscribeResponse>,
}

impl Stream {
    /// Opens one as an agent that holds nothing yet, and waits for what it gets first.
    pub async fn open(node: &Node) -> Result<Self> {
        let mut stream = Self::greet(node).await?;
        stream.first = Some(stream.next().await?);
        Ok(stream)
    }

    /// Opens one as an agent that holds nothing yet.
    pub async fn greet(node: &Node) -> Result<Self> {
        let (says, said) = mpsc::channel(4);
        // A digest of no view there is, so that the server compares.
        let hello = Hello { digest: vec![0; 32].into(), ..Hello::default() };
        says.send(SubscribeRequest { message: Some(subscribe_request::Message::Hello(hello)) }).await?;
        let answers = SyncClient::new(node.channel.clone()).subscribe(ReceiverStream::new(said)).await?.into_inner();
        let mut stream = Self { says, answers, first: None };
        let first = stream.next().await?;
        if matches!(first.message, Some(subscribe_response::Message::Compare(_))) {
            let held = SubscribeRequest { message: Some(subscribe_request::Message::Held(Held::default())) };
            stream.says.send(held).await?;
        } else {
            stream.first = Some(first);
        }
        Ok(stream)
    }

    async fn next(&mut self) -> Result<SubscribeResponse> {
        match self.first.take() {
            Some(first) => Ok(first),
            None => self.answers.message().await?.context("the push stream ended"),
        }
    }

    /// Takes every step, as an agent does, and calls `taken` after each; until the stream ends.
    pub async fn follow(mut self, taken: impl Fn()) -> Result<std::convert::Infallible> {
        loop {
            let answer = self.next().await?;
            let Some(subscribe_response::Message::Part(part)) = answer.message else { continue };
            if part.last {
                let ack = subscribe_request::Message::Ack(Ack { step: part.step });
                self.says.send(SubscribeRequest { message: Some(ack) }).await?;
                taken();
            }
        }
    }

    /// Waits until the server ends it, and says when and how it did.
    async fn end(mut self) -> Result<(Instant, Status)> {
        loop {
            match self.answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => anyhow::bail!("the push stream ended without a status"),
                Err(status) => return Ok((Instant::now(), status)),
            }
        }
    }
}

/// What an agent of a peer does, which holds nothing open between two polls.
pub async fn poll(node: &Node) -> Result<()> {
    let request = SyncAuthorizedEntriesRequest::default();
    let mut client = EntryClient::new(node.channel.clone());
    let mut answers = client.sync_authorized_entries(tokio_stream::once(request)).await?.into_inner();
    while answers.message().await?.is_some() {}
    Ok(())
}

/// Bans `count` connected agents one after another; from before each call to the end of that agent's push stream. All of
/// them stay connected, and only the stream of the banned one may end.
pub async fn bans(server: &Server, count: usize) -> Result<Vec<Duration>> {
    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    let nodes = node::nodes(address, &server.socket(), count, &node::id("/bench")).await?;
    let mut open = Vec::with_capacity(count);
    for node in &nodes {
        open.push((node.id.clone(), tokio::spawn(Stream::open(node).await?.end())));
    }
    let mut admin = AgentClient::new(unix(&server.socket()).await?);
    let mut times = Vec::with_capacity(count);
    for (id, ended) in open {
        ensure!(!ended.is_finished(), "a push stream ended before its agent was banned: {:?}", ended.await?);
        let begin = Instant::now();
        admin.ban_agent(BanAgentRequest { id: Some(id) }).await?;
        let waited = tokio::time::timeout(Duration::from_secs(60), ended).await;
        let (end, status) = waited.context("a banned agent's stream was still open after a minute")???;
        ensure!(status.code() == Code::PermissionDenied, "a banned agent's stream ended otherwise: {status:?}");
        ensure!(!status.details().is_empty(), "a banned agent was not told why: {status:?}");
        times.push(end.duration_since(begin));
    }
    Ok(times)
}
