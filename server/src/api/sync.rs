//! `signet.sync.v1`: push to agents of ours.
//!
//! [`crate::feed`] decides; here are the messages and the waiting. A stream has two halves: one judges its agent again
//! whenever the feed wakes it, so that a ban ends the stream at once, the other sends what is new.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use prost::Message as _;
use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::view::{Digest, bundle_digest};
use spiffe_proto::sync as proto;
use spiffe_proto::sync::subscribe_request::Message as Said;
use spiffe_proto::sync::subscribe_response::Message as Answer;
use spiffe_proto::types;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior};
use tonic::{Request, Response, Status, Streaming};

use super::admission::Admission;
use super::core::Core;
use super::status::Failure;
use super::stream::{self, Answers, Outlet};
use super::wire;
use crate::audit::{Fields, Outcome};
use crate::feed::session::{Greeting, Opening, Session, Step};
use crate::feed::view::{Held, Version, View};
use crate::feed::{Feed, Place, Wake};
use crate::history::{Position, Urgency};
use crate::registry::agent;
use crate::state::State;

/// How often a stream without news tells that it lives.
const HEARTBEAT: Duration = Duration::from_secs(10);

/// How long an agent may take to say hello, or the next part of what it holds.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// How long an agent may take to apply a step. It reconnects after that and is compared anew.
const ACKNOWLEDGE_WITHIN: Duration = Duration::from_secs(60);

/// How long a server that is behind its agent tries to catch up.
const CATCH_UP_WITHIN: Duration = Duration::from_secs(2);

/// Bytes of a part, so that a message stays below 1 MiB whatever its last item is.
const PART_SIZE: usize = 768 * 1024;

/// Entries and bundles that an agent may say it holds.
const MOST_HELD: usize = 1_000_000;

/// The fields of an entry that an agent sees, as SPIRE's agents ask for them.
const AGENT_MASK: types::EntryMask = types::EntryMask {
    spiffe_id: true,
    parent_id: false,
    selectors: true,
    x509_svid_ttl: false,
    federates_with: true,
    admin: true,
    downstream: true,
    expires_at: false,
    dns_names: false,
    revision_number: true,
    store_svid: true,
    jwt_svid_ttl: false,
    hint: true,
    created_at: true,
    additional_attributes: true,
};

/// A bundle as it is sent, encoded once for all streams.
#[derive(Debug)]
struct SentBundle {
    of: Arc<Bundle>,
    message: types::Bundle,
    digest: Digest,
}

/// The bundles that were sent last, by trust domain.
#[derive(Debug, Default)]
struct SentBundles(Mutex<HashMap<TrustDomain, Arc<SentBundle>>>);

impl SentBundles {
    fn of(&self, bundle: &Arc<Bundle>) -> Arc<SentBundle> {
        let mut sent = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = sent.get(&bundle.trust_domain).filter(|known| Arc::ptr_eq(&known.of, bundle)) {
            return Arc::clone(known);
        }
        let message = wire::bundle(bundle, None);
        let digest = bundle_digest(&message.encode_to_vec());
        let made = Arc::new(SentBundle { of: Arc::clone(bundle), message, digest });
        sent.insert(bundle.trust_domain.clone(), Arc::clone(&made));
        made
    }
}

/// The service. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct SyncService {
    core: Arc<Core>,
    feed: Feed,
    bundles: Arc<SentBundles>,
}

fn position(position: &Position) -> proto::Position {
    proto::Position {
        history: position.history.0.to_vec().into(),
        revision: position.revision,
        digest: position.digest.to_vec().into(),
    }
}

fn digest(bytes: &[u8]) -> Result<Digest, Failure> {
    bytes.try_into().map_err(|_| Failure::invalid("digest is not 32 bytes long"))
}

fn answer(message: Answer) -> proto::SubscribeResponse {
    proto::SubscribeResponse { message: Some(message) }
}

/// Whether an agent at `told` followed the history that leads to `ours`.
fn follows(told: Option<&proto::Position>, ours: &Position) -> bool {
    told.is_some_and(|told| {
        *told.history == ours.history.0 && (told.revision != ours.revision || *told.digest == ours.digest)
    })
}

/// Cuts a step into parts that are applied together.
fn parts(step: Step, at: &Position, sent: impl Fn(&Arc<Bundle>) -> types::Bundle) -> Vec<proto::Part> {
    let begin = || proto::Part { step: step.number, position: Some(position(at)), ..proto::Part::default() };
    let mut parts = Vec::new();
    let mut part = begin();
    let mut size = 0;
    let mut room = |parts: &mut Vec<proto::Part>, part: &mut proto::Part, item: usize| {
        if size > 0 && size + item > PART_SIZE {
            parts.push(std::mem::replace(part, begin()));
            size = 0;
        }
        size += item;
    };
    for bundle in &step.delta.bundles {
        let message = sent(bundle);
        room(&mut parts, &mut part, message.encoded_len() + 8);
        part.bundles.push(message);
    }
    for entry in &step.delta.entries {
        let message = wire::entry(entry, Some(&AGENT_MASK));
        room(&mut parts, &mut part, message.encoded_len() + 8);
        part.entries.push(message);
    }
    for id in &step.delta.removed_entries {
        room(&mut parts, &mut part, id.len() + 8);
        part.removed_entries.push(id.to_string());
    }
    for name in &step.delta.removed_bundles {
        room(&mut parts, &mut part, name.len() + 8);
        part.removed_bundles.push(name.to_string());
    }
    part.last = true;
    part.digest = step.digest.to_vec().into();
    parts.push(part);
    parts
}

/// One stream of one agent.
struct Conversation {
    service: SyncService,
    agent: SpiffeId,
    requests: Streaming<proto::SubscribeRequest>,
    outlet: Outlet<proto::SubscribeResponse>,
}

impl Conversation {
    async fn said(&mut self) -> Result<Option<Said>, Failure> {
        let request = self.requests.message().await;
        match request.map_err(|status| Failure::unavailable("stream of the agent failed").because(status))? {
            None => Ok(None),
            Some(proto::SubscribeRequest { message: Some(said) }) => Ok(Some(said)),
            Some(_) => Err(Failure::invalid("message of an unknown kind")),
        }
    }

    async fn said_in_time(&mut self) -> Result<Said, Failure> {
        let said = tokio::time::timeout(ANSWER_WITHIN, self.said()).await;
        let said = said.map_err(|_| Failure::unavailable("agent did not answer in time"))??;
        said.ok_or_else(|| Failure::invalid("stream ended before its greeting"))
    }

    async fn send(&self, message: Answer) {
        self.outlet.send(answer(message)).await;
    }

    fn view(&self, state: &State) -> View {
        let core = &self.service.core;
        View::of(state, &self.agent, core.now(), |bundle| self.service.bundles.of(bundle).digest)
    }

    /// Everything the agent says it holds.
    async fn held(&mut self) -> Result<Held, Failure> {
        let mut held = Held { entries: BTreeMap::new(), bundles: BTreeMap::new() };
        loop {
            let Said::Held(page) = self.said_in_time().await? else {
                return Err(Failure::invalid("agent did not say what it holds"));
            };
            if held.entries.len() + page.entries.len() + held.bundles.len() + page.bundles.len() > MOST_HELD {
                return Err(Failure::invalid("agent says that it holds too much"));
            }
            for entry in page.entries {
                let version = Version { revision: entry.revision, created_at: entry.created_at };
                held.entries.insert(entry.id.into(), version);
            }
            for bundle in page.bundles {
                held.bundles.insert(bundle.trust_domain.into(), digest(&bundle.digest)?);
            }
            if !page.more {
                return Ok(held);
            }
        }
    }

    /// The newest state; at least that at which the agent is.
    async fn caught_up(&self, told: Option<&proto::Position>) -> Result<Arc<State>, Failure> {
        let core = &self.service.core;
        let state = core.current("authorized entries cannot be looked up").await?;
        let behind = |state: &State| {
            told.is_some_and(|told| {
                *told.history == state.position().history.0 && told.revision > state.position().revision
            })
        };
        if !behind(&state) {
            return Ok(state);
        }
        let mut watch = core.replica.watch();
        let caught_up = tokio::time::timeout(CATCH_UP_WITHIN, watch.wait_for(|state| !behind(state))).await;
        match caught_up {
            Ok(Ok(state)) => Ok(Arc::clone(&state)),
            _ => Err(Failure::unavailable("server is behind the agent")),
        }
    }

    /// Finds out where the agent is.
    async fn greet(&mut self) -> Result<(Session, Arc<State>), Failure> {
        let Said::Hello(hello) = self.said_in_time().await? else {
            return Err(Failure::invalid("agent did not say hello"));
        };
        self.service.report_version(&self.agent, hello.agent_version).await;
        let state = self.caught_up(hello.position.as_ref()).await?;
        let same_history = follows(hello.position.as_ref(), state.position());
        let greeting = Greeting { same_history, digest: digest(&hello.digest)? };
        let session = match Session::open(greeting, &self.view(&state)) {
            Opening::Resume(session) => {
                self.send(Answer::Resume(proto::Resume { position: Some(position(state.position())) })).await;
                session
            }
            Opening::Fresh(session) => session,
            Opening::Compare => {
                metrics::counter!("sync.compared").increment(1);
                self.send(Answer::Compare(proto::Compare {})).await;
                Session::after_comparison(self.held().await?, same_history)
            }
        };
        Ok((session, state))
    }

    /// Keeps the agent's view equal to what it may have, until the agent leaves. `looks` wakes when it may have changed.
    async fn follow(mut self, place: &Place, mut looks: watch::Receiver<u64>) -> Result<(), Failure> {
        let (mut session, mut state) = self.greet().await?;
        let mut heartbeat = tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sent_at = Instant::now();
        loop {
            if let Some(step) = session.advance(&self.view(&state)) {
                sent_at = Instant::now();
                metrics::counter!("sync.steps").increment(1);
                for part in parts(step, state.position(), |bundle| self.service.bundles.of(bundle).message.clone()) {
                    self.send(Answer::Part(part)).await;
                }
            }
            loop {
                let waiting = session.is_waiting();
                tokio::select! {
                    said = self.said() => match said? {
                        None => return Ok(()),
                        Some(Said::Ack(proto::Ack { step })) => {
                            session.acknowledge(step).map_err(|error| {
                                Failure::invalid("acknowledgement is out of turn").because(error)
                            })?;
                            // What changed while the step was on its way has waited for this.
                            break;
                        }
                        Some(_) => return Err(Failure::invalid("message is out of turn")),
                    },
                    changed = looks.changed(), if !waiting => match changed {
                        Ok(()) => break,
                        Err(_) => return Err(Failure::unavailable("server is stopping")),
                    },
                    () = tokio::time::sleep_until(sent_at + ACKNOWLEDGE_WITHIN), if waiting => {
                        return Err(Failure::unavailable("step was not acknowledged in time"));
                    }
                    _ = heartbeat.tick() => {
                        let at = position(place.seen().position());
                        let digest = session.digest().to_vec().into();
                        self.send(Answer::Heartbeat(proto::Heartbeat { position: Some(at), digest })).await;
                    }
                }
            }
            looks.mark_unchanged();
            state = self.service.core.replica.latest();
        }
    }
}

impl SyncService {
    /// A service over `core` whose streams are woken by `feed`.
    pub fn new(core: Arc<Core>, feed: Feed) -> Self {
        Self { core, feed, bundles: Arc::default() }
    }

    /// Records what software the agent runs, if that is news. Nobody waits for it to succeed.
    async fn report_version(&self, id: &SpiffeId, version: String) {
        let known = self.core.replica.latest().agent(id).is_some_and(|agent| *agent.version == *version);
        if known || version.is_empty() {
            return;
        }
        let id = id.clone();
        let decide = move |state: &State, _| agent::report_version(state, &id, &version).map(|part| (part, ()));
        if let Err(error) = self.core.committer.propose(Urgency::Normal, decide).await {
            tracing::debug!(error = runtime::telemetry::chain(&error), "Version of an agent was not recorded");
        }
    }

    /// Judges the agent whenever the feed wakes, and lets the other half look; ends when the agent may not go on.
    async fn guard(&self, admission: &Admission, place: &Place, look: watch::Sender<u64>) -> Failure {
        loop {
            if place.woken().await == Wake::Displaced {
                return Failure::unavailable("agent opened a newer stream");
            }
            if let Err(failure) = self.core.authorize(admission.method, &admission.caller).await {
                return failure;
            }
            look.send_modify(|looks| *looks += 1);
        }
    }
}

#[tonic::async_trait]
impl proto::sync_server::Sync for SyncService {
    type SubscribeStream = Answers<proto::SubscribeResponse>;

    async fn subscribe(
        &self,
        mut request: Request<Streaming<proto::SubscribeRequest>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let admission = Admission::take(&mut request)?;
        let agent = admission.caller.id().cloned().ok_or_else(|| Failure::internal("caller is not an agent"))?;
        let (service, requests) = (self.clone(), request.into_inner());
        let answers = stream::start(move |outlet| async move {
            service.core.audit.record(&admission, Outcome::Success, Fields::default);
            // Open before the first view is read: what changes from now on wakes it.
            let place = service.feed.open(&agent);
            let (look, looks) = watch::channel(0);
            let conversation = Conversation { service: service.clone(), agent, requests, outlet };
            tokio::select! {
                failure = service.guard(&admission, &place, look) => Err(failure.into()),
                ended = conversation.follow(&place, looks) => ended.map_err(Status::from),
            }
        });
        answers.await.map(Response::new)
    }
}

#[cfg(test)]
#[path = "sync/tests.rs"]
mod tests;
