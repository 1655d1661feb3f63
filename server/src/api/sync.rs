//! `signet.sync.v2`: push to agents of ours.
//!
//! [`crate::feed`] decides; here are the messages and the waiting. A stream has two halves: one judges its agent again
//! whenever the feed wakes it, so that a ban ends the stream at once, the other sends what is new.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
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
use crate::feed::look::Look;
use crate::feed::session::{Greeting, Held, Opening, Session, Step};
use crate::feed::{Feed, Place, Wake};
use crate::history::{HistoryId, Position, Urgency};
use crate::registry::agent;
use crate::restore;
use crate::state::State;
use crate::state::model::{Entry, EntryId};

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

/// Bytes that an agent may say it holds, as they are kept here. Who holds more is sent everything anew.
const MOST_HELD: usize = 32 * 1024 * 1024;

/// Bytes of an entry's id or a trust domain's name; nothing that was ever sent has a longer one.
const LONGEST_NAME: usize = 255;

/// Bytes that one thing held costs beside its name.
const HELD_OVERHEAD: usize = 128;

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
    /// An agent that was ahead has made the history begin anew.
    begun_anew: Arc<AtomicBool>,
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

/// Whether an agent at `told` is at our newest position. Any other claim proves nothing: a restored backup has the id of
/// the history it was copied from.
fn is_at_head(told: Option<&proto::Position>, ours: &Position) -> bool {
    told.is_some_and(|told| {
        *told.history == ours.history.0 && told.revision == ours.revision && *told.digest == ours.digest
    })
}

/// A step cut into parts that are applied together. Each is made when it is asked for.
struct Parts<'a> {
    number: u64,
    anew: bool,
    digest: Digest,
    at: proto::Position,
    bundles: std::slice::Iter<'a, Arc<Bundle>>,
    entries: std::slice::Iter<'a, Arc<Entry>>,
    removed_entries: std::slice::Iter<'a, EntryId>,
    removed_bundles: std::slice::Iter<'a, Arc<str>>,
    sent: &'a SentBundles,
    ended: bool,
}

impl<'a> Parts<'a> {
    fn of(step: &'a Step, at: &Position, sent: &'a SentBundles) -> Self {
        Self {
            number: step.number,
            anew: step.anew,
            digest: step.digest,
            at: position(at),
            bundles: step.delta.bundles.iter(),
            entries: step.delta.entries.iter(),
            removed_entries: step.delta.removed_entries.iter(),
            removed_bundles: step.delta.removed_bundles.iter(),
            sent,
            ended: false,
        }
    }
}

impl Iterator for Parts<'_> {
    type Item = proto::Part;

    fn next(&mut self) -> Option<proto::Part> {
        if self.ended {
            return None;
        }
        let mut part = proto::Part {
            step: self.number,
            position: Some(self.at.clone()),
            anew: std::mem::take(&mut self.anew),
            ..proto::Part::default()
        };
        let mut size = 0;
        // An item that begins below the limit goes in whole, and none is larger than the rest of a message.
        while size < PART_SIZE {
            if let Some(bundle) = self.bundles.next() {
                let message = self.sent.of(bundle).message.clone();
                size += message.encoded_len() + 8;
                part.bundles.push(message);
            } else if let Some(entry) = self.entries.next() {
                let message = proto::SentEntry {
                    entry: Some(wire::entry(entry, Some(&AGENT_MASK))),
                    content: entry.content().to_vec().into(),
                };
                size += message.encoded_len() + 8;
                part.entries.push(message);
            } else if let Some(id) = self.removed_entries.next() {
                size += id.len() + 8;
                part.removed_entries.push(id.to_string());
            } else if let Some(name) = self.removed_bundles.next() {
                size += name.len() + 8;
                part.removed_bundles.push(name.to_string());
            } else {
                self.ended = true;
                part.last = true;
                part.digest = self.digest.to_vec().into();
                break;
            }
        }
        Some(part)
    }
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

    /// What the agent says it holds; none if that is more than is kept of it.
    async fn held(&mut self) -> Result<Option<Held>, Failure> {
        let (mut held, mut size) = (Held::default(), 0);
        loop {
            let Said::Held(page) = self.said_in_time().await? else {
                return Err(Failure::invalid("agent did not say what it holds"));
            };
            let names =
                page.entries.iter().map(|entry| &entry.id).chain(page.bundles.iter().map(|one| &one.trust_domain));
            for name in names {
                if name.len() > LONGEST_NAME {
                    return Err(Failure::invalid("agent says that it holds something with a name above 255 bytes"));
                }
                size += name.len() + HELD_OVERHEAD;
            }
            if size > 4 * MOST_HELD {
                return Err(Failure::invalid("agent says that it holds too much"));
            }
            if size > MOST_HELD {
                // The rest is read and not kept.
                held = Held::default();
            } else {
                for entry in page.entries {
                    held.entries.insert(entry.id.into(), digest(&entry.content)?);
                }
                for bundle in page.bundles {
                    held.bundles.insert(bundle.trust_domain.into(), digest(&bundle.content)?);
                }
            }
            if !page.more {
                return Ok((size <= MOST_HELD).then_some(held));
            }
        }
    }

    /// The newest state; with a store that others write to, at least that at which the agent is.
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
        if !core.replica.is_shared() {
            // Whoever is ahead of the only server has followed a branch of the history that a restore has lost: it is compared.
            self.service.begin_anew(state.position().history).await;
            return core.current("authorized entries cannot be looked up").await;
        }
        let mut watch = core.replica.watch();
        let caught_up = tokio::time::timeout(CATCH_UP_WITHIN, watch.wait_for(|state| !behind(state))).await;
        match caught_up {
            Ok(Ok(state)) => Ok(Arc::clone(&state)),
            _ => Err(Failure::unavailable("server is behind the agent")),
        }
    }

    /// Finds out where the agent is: what it holds, what is to be looked at first, and at which state.
    async fn greet(&mut self) -> Result<(Session, Look, Arc<State>), Failure> {
        let Said::Hello(hello) = self.said_in_time().await? else {
            return Err(Failure::invalid("agent did not say hello"));
        };
        self.service.report_version(&self.agent, hello.agent_version).await;
        let state = self.caught_up(hello.position.as_ref()).await?;
        let at_head = is_at_head(hello.position.as_ref(), state.position());
        let greeting = Greeting { at_head, digest: digest(&hello.digest)? };
        let now = self.service.core.now();
        let opening =
            Session::open(greeting, &state, &self.agent, now, |bundle| self.service.bundles.of(bundle).digest);
        let session = match opening {
            Opening::Resume(session) => {
                self.send(Answer::Resume(proto::Resume { position: Some(position(state.position())) })).await;
                return Ok((session, Look::default(), state));
            }
            Opening::Fresh(session) => session,
            Opening::Compare => {
                metrics::counter!("sync.compared").increment(1);
                self.send(Answer::Compare(proto::Compare {})).await;
                self.held().await?.map_or_else(Session::anew, Session::after_comparison)
            }
        };
        Ok((session, Look::Everything, state))
    }

    /// Keeps the agent's view equal to what it may have, until the agent leaves. `looks` wakes when it may have changed.
    async fn follow(mut self, place: &Place, mut looks: watch::Receiver<u64>) -> Result<(), Failure> {
        let (mut session, mut look, mut state) = self.greet().await?;
        let mut heartbeat = tokio::time::interval_at(Instant::now() + HEARTBEAT, HEARTBEAT);
        heartbeat.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut sent_at = Instant::now();
        loop {
            let (now, bundles) = (self.service.core.now(), &self.service.bundles);
            if !look.is_nothing()
                && let Some(step) = session.advance(&look, &state, &self.agent, now, |bundle| bundles.of(bundle).digest)
            {
                sent_at = Instant::now();
                metrics::counter!("sync.steps").increment(1);
                for part in Parts::of(&step, state.position(), bundles) {
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
                        let at = if waiting { *state.position() } else { place.position(&state) };
                        let digest = session.digest().to_vec().into();
                        self.send(Answer::Heartbeat(proto::Heartbeat { position: Some(position(&at)), digest })).await;
                    }
                }
            }
            looks.mark_unchanged();
            (look, state) = place.take(&state);
        }
    }
}

impl SyncService {
    /// A service over `core` whose streams are woken by `feed`.
    pub fn new(core: Arc<Core>, feed: Feed) -> Self {
        Self { core, feed, bundles: Arc::default(), begun_anew: Arc::default() }
    }

    /// Lets the history `from` go on under another id, because an agent claims to know a later position of it than there
    /// is. Any agent can claim that, so it happens once in the life of this process.
    async fn begin_anew(&self, from: HistoryId) {
        if self.begun_anew.swap(true, Ordering::AcqRel) {
            return;
        }
        let core = &self.core;
        let begun = restore::begin_anew(&core.committer, &core.replica, &core.entropy, from, |_| Vec::new()).await;
        if let Err(error) = begun {
            self.begun_anew.store(false, Ordering::Release);
            tracing::error!(
                error = runtime::telemetry::chain(&error),
                "The history could not go on under a new id after a restore from a backup; it is tried again"
            );
        }
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
