//! A server of tests in memory, speaking the real protocols over in-memory streams.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, UNIX_EPOCH};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use futures_util::stream::{BoxStream, StreamExt as _};
use prost::Message;
use runtime::clock::Clock;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::view::{ViewDigest, bundle_digest};
use spiffe_proto::authorized::{SyncAuthorizedEntriesResponse, encoded};
use spiffe_proto::{agent, entry, rpc_status, svid, sync, types};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Response, Status, Streaming};
use types::permission_denied_details::Reason;

use super::authority::Authority;

pub(crate) const AGENT: &str = "/spire/agent/test/1";

/// What a test may see and change.
pub(crate) struct State {
    pub authority: Authority,
    pub tainted: bool,
    pub sequence: u64,
    pub entries: BTreeMap<String, types::Entry>,
    pub federated: BTreeMap<String, types::Bundle>,
    pub agent_ttl: Duration,
    pub svid_ttl: Duration,
    pub jwt_ttl: Duration,
    pub reattestable: bool,
    /// The serial number that agents must show, or those that take its place when they are shown.
    pub active: Option<u64>,
    pub pending: BTreeSet<u64>,
    pub banned: bool,
    /// Whether somebody is there at all.
    pub away: bool,
    /// Whether agents do not know the authority any more.
    pub unknown_authority: bool,
    /// Whether the push service is served.
    pub pushes: bool,
    /// Answers to be given instead of the right ones, first to last.
    pub say: Vec<Status>,
    pub refuse_entries: BTreeSet<String>,
    pub attestations: usize,
    pub renewals: usize,
    pub signed: usize,
    pub batches: usize,
    pub polls: usize,
    pub jwt_asked: usize,
    pub jwt_signed: usize,
    /// How long the answer to a request for a token is on its way.
    pub jwt_delay: Duration,
    pub connections: usize,
    pub acked: u64,
    pub hellos: Vec<sync::Hello>,
}

pub(crate) struct Fake {
    pub clock: Clock,
    trust_domain: TrustDomain,
    state: Mutex<State>,
    changed: watch::Sender<u64>,
    pub(super) running: Mutex<Vec<JoinHandle<()>>>,
    /// Counts how often all connections of the moment were made to hang.
    pub(super) hung: watch::Sender<u64>,
}

impl Fake {
    pub(crate) fn new(trust_domain: &TrustDomain, clock: Clock) -> Arc<Self> {
        let state = State {
            authority: Authority::new(trust_domain, clock.now() - Duration::from_secs(3600)),
            tainted: false,
            sequence: 1,
            entries: BTreeMap::new(),
            federated: BTreeMap::new(),
            agent_ttl: Duration::from_secs(4 * 3600),
            svid_ttl: Duration::from_secs(3 * 3600),
            jwt_ttl: Duration::from_secs(300),
            reattestable: false,
            active: None,
            pending: BTreeSet::new(),
            banned: false,
            away: false,
            unknown_authority: false,
            pushes: true,
            say: Vec::new(),
            refuse_entries: BTreeSet::new(),
            attestations: 0,
            renewals: 0,
            signed: 0,
            batches: 0,
            polls: 0,
            jwt_asked: 0,
            jwt_signed: 0,
            jwt_delay: Duration::ZERO,
            connections: 0,
            acked: 0,
            hellos: Vec::new(),
        };
        Arc::new(Self {
            clock,
            trust_domain: trust_domain.clone(),
            state: Mutex::new(state),
            changed: watch::Sender::new(1),
            running: Mutex::default(),
            hung: watch::Sender::new(0),
        })
    }

    pub(crate) fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Looks at several things at once.
    pub(crate) fn count<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&self.state())
    }

    /// Changes the state and wakes every stream.
    pub(crate) fn change(&self, change: impl FnOnce(&mut State)) -> u64 {
        change(&mut self.state());
        self.changed.send_modify(|revision| *revision += 1);
        *self.changed.borrow()
    }

    /// Waits until the step of this revision was acknowledged.
    pub(crate) async fn acknowledged(&self, revision: u64) {
        let look = async {
            while self.state().acked < revision {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), look).await.expect("never acknowledged");
    }

    /// Nobody is there any more: connections break, new ones are refused.
    pub(crate) fn go_away(&self) {
        self.state().away = true;
        self.break_connections();
    }

    pub(crate) fn break_connections(&self) {
        for task in self.running.lock().unwrap().drain(..) {
            task.abort();
        }
    }

    /// Connections carry nothing any more, in either direction, and nobody is told; new ones work.
    pub(crate) fn hang_connections(&self) {
        self.hung.send_modify(|times| *times += 1);
    }

    pub(crate) fn come_back(&self) {
        self.state().away = false;
    }

    pub(crate) fn put_entry(&self, id: &str, selector: &str) -> u64 {
        let entry = entry_message(&self.trust_domain, id, selector);
        self.change(|state| {
            state.entries.insert(id.into(), entry);
        })
    }

    pub(crate) fn remove_entry(&self, id: &str) -> u64 {
        self.change(|state| {
            state.entries.remove(id);
        })
    }

    pub(super) fn own_bundle(&self) -> types::Bundle {
        let state = self.state();
        let bundle = state.authority.bundle(state.sequence, state.tainted);
        types::Bundle {
            trust_domain: bundle.trust_domain.as_str().into(),
            x509_authorities: bundle
                .x509
                .iter()
                .map(|authority| types::X509Certificate { asn1: authority.der.clone(), tainted: authority.tainted })
                .collect(),
            jwt_authorities: bundle
                .jwt
                .iter()
                .map(|key| types::JwtKey {
                    public_key: key.public_key.clone(),
                    key_id: key.key_id.to_string(),
                    ..types::JwtKey::default()
                })
                .collect(),
            sequence_number: bundle.sequence,
            ..types::Bundle::default()
        }
    }

    /// Who calls, as SPIRE's servers decide it.
    pub(super) fn admit(&self, serial: Option<u64>) -> Result<(), Status> {
        let mut state = self.state();
        if let Some(status) = (!state.say.is_empty()).then(|| state.say.remove(0)) {
            return Err(status);
        }
        let Some(serial) = serial else { return Err(denied(Reason::AgentNotAttested)) };
        if state.banned {
            return Err(denied(Reason::AgentBanned));
        }
        if state.pending.contains(&serial) {
            state.active = Some(serial);
            state.pending.clear();
        }
        match state.active {
            None => Err(denied(Reason::AgentNotAttested)),
            Some(active) if active == serial => Ok(()),
            Some(_) => Err(denied(Reason::AgentNotActive)),
        }
    }

    fn sign_agent(&self, csr: &[u8]) -> (types::X509svid, u64) {
        let id = SpiffeId::from_path(&self.trust_domain, AGENT).unwrap();
        let mut state = self.state();
        let ttl = state.agent_ttl;
        let (leaf, serial) = state.authority.sign(csr, &id, ttl, self.clock.now());
        (types::X509svid { cert_chain: vec![leaf], ..types::X509svid::default() }, serial)
    }

    pub(super) async fn attest(
        self: Arc<Self>,
        request: Request<Streaming<agent::AttestAgentRequest>>,
    ) -> Result<Response<BoxStream<'static, Result<agent::AttestAgentResponse, Status>>>, Status> {
        let mut steps = request.into_inner();
        let Some(agent::attest_agent_request::Step::Params(params)) = steps.message().await?.and_then(|m| m.step)
        else {
            return Err(Status::invalid_argument("malformed param"));
        };
        if self.state().banned {
            return Err(Status::permission_denied("failed to attest: agent is banned"));
        }
        let (answers, stream) = mpsc::channel(4);
        let challenge = agent::attest_agent_response::Step::Challenge(Bytes::from_static(b"who?"));
        answers.send(Ok(agent::AttestAgentResponse { step: Some(challenge) })).await.unwrap();
        tokio::spawn(async move {
            let response = steps.message().await.ok().flatten().and_then(|message| message.step);
            let Some(agent::attest_agent_request::Step::ChallengeResponse(response)) = response else { return };
            assert_eq!(response, "me");
            let csr = params.params.unwrap().csr;
            let (svid, serial) = self.sign_agent(&csr);
            let reattestable = {
                let mut state = self.state();
                state.attestations += 1;
                state.active = Some(serial);
                state.pending.clear();
                state.reattestable
            };
            let result = agent::attest_agent_response::Result { svid: Some(svid), reattestable };
            let step = Some(agent::attest_agent_response::Step::Result(result));
            let _ = answers.send(Ok(agent::AttestAgentResponse { step })).await;
        });
        Ok(Response::new(ReceiverStream::new(stream).boxed()))
    }

    pub(super) fn renew(&self, request: agent::RenewAgentRequest) -> Result<agent::RenewAgentResponse, Status> {
        if self.state().reattestable {
            return Err(denied(Reason::AgentMustReattest));
        }
        let (svid, serial) = self.sign_agent(&request.params.unwrap().csr);
        let mut state = self.state();
        state.renewals += 1;
        state.pending.insert(serial);
        Ok(agent::RenewAgentResponse { svid: Some(svid) })
    }

    pub(super) fn sign_batch(&self, request: svid::BatchNewX509svidRequest) -> svid::BatchNewX509svidResponse {
        let mut state = self.state();
        state.batches += 1;
        let now = self.clock.now();
        let mut one = |params: svid::NewX509svidParams| {
            let refused = |code: Code, message: &str| svid::batch_new_x509svid_response::Result {
                status: Some(types::Status { code: code as i32, message: message.into() }),
                svid: None,
            };
            let Some(entry) = state.entries.get(&params.entry_id) else {
                return refused(Code::NotFound, "entry not found or not authorized");
            };
            if state.refuse_entries.contains(&params.entry_id) {
                return refused(Code::Internal, "on purpose");
            }
            let path = entry.spiffe_id.as_ref().unwrap().path.clone();
            let id = SpiffeId::from_path(&self.trust_domain, &path).unwrap();
            let ttl = state.svid_ttl;
            let (leaf, _) = state.authority.sign(&params.csr, &id, ttl, now);
            state.signed += 1;
            svid::batch_new_x509svid_response::Result {
                status: Some(types::Status::default()),
                svid: Some(types::X509svid { cert_chain: vec![leaf], ..types::X509svid::default() }),
            }
        };
        svid::BatchNewX509svidResponse { results: request.params.into_iter().map(&mut one).collect() }
    }

    pub(super) fn sign_jwt(&self, request: svid::NewJwtsvidRequest) -> Result<svid::NewJwtsvidResponse, Status> {
        let mut state = self.state();
        let entry = state.entries.get(&request.entry_id).ok_or_else(|| Status::not_found("entry not found"))?;
        let id = entry.spiffe_id.clone();
        state.jwt_signed += 1;
        let header = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","kid":"jwt-key"}"#);
        let now = self.clock.now().duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
        let svid = types::Jwtsvid {
            token: format!("{header}.e30.{}", state.jwt_signed),
            id,
            issued_at: now,
            expires_at: now + state.jwt_ttl.as_secs() as i64,
            ..types::Jwtsvid::default()
        };
        Ok(svid::NewJwtsvidResponse { svid: Some(svid) })
    }

    pub(super) async fn poll(
        self: Arc<Self>,
        request: Request<Streaming<entry::SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<BoxStream<'static, Result<SyncAuthorizedEntriesResponse, Status>>>, Status> {
        const PAGE: usize = 500;
        self.state().polls += 1;
        let mut questions = request.into_inner();
        questions.message().await?.ok_or_else(|| Status::unknown("EOF"))?;
        let all = self.state().entries.clone();
        let (answers, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            if all.len() <= PAGE {
                let entries = encoded(all.into_values());
                let answer = SyncAuthorizedEntriesResponse { entries, ..Default::default() };
                let _ = answers.send(Ok(answer)).await;
                return;
            }
            let revisions: Vec<entry::EntryRevision> = all
                .values()
                .map(|entry| entry::EntryRevision {
                    id: entry.id.clone(),
                    revision_number: entry.revision_number,
                    created_at: entry.created_at,
                })
                .collect();
            let pages = revisions.chunks(PAGE).len();
            for (number, page) in revisions.chunks(PAGE).enumerate() {
                let answer = SyncAuthorizedEntriesResponse {
                    entry_revisions: encoded(page.to_vec()),
                    more: number + 1 < pages,
                    ..Default::default()
                };
                let _ = answers.send(Ok(answer)).await;
            }
            while let Ok(Some(question)) = questions.message().await {
                assert!(question.ids.len() <= PAGE && question.ids.is_sorted());
                let entries = encoded(question.ids.iter().filter_map(|id| all.get(id)).cloned());
                let answer = SyncAuthorizedEntriesResponse { entries, ..Default::default() };
                let _ = answers.send(Ok(answer)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream).boxed()))
    }

    pub(super) async fn push(
        self: Arc<Self>,
        serial: Option<u64>,
        request: Request<Streaming<sync::SubscribeRequest>>,
    ) -> Result<Response<BoxStream<'static, Result<sync::SubscribeResponse, Status>>>, Status> {
        if !self.state().pushes {
            return Err(Status::unimplemented("unknown service"));
        }
        self.admit(serial)?;
        let (answers, stream) = mpsc::channel(4);
        tokio::spawn(async move {
            if let Err(status) = self.feed(serial, request.into_inner(), &answers).await {
                let _ = answers.send(Err(status)).await;
            }
        });
        Ok(Response::new(ReceiverStream::new(stream).boxed()))
    }

    async fn feed(
        &self,
        serial: Option<u64>,
        mut says: Streaming<sync::SubscribeRequest>,
        answers: &mpsc::Sender<Result<sync::SubscribeResponse, Status>>,
    ) -> Result<(), Status> {
        use sync::subscribe_request::Message as Said;
        use sync::subscribe_response::Message as Answer;
        let answer = |message| Ok(sync::SubscribeResponse { message: Some(message) });
        let gone = |_| Status::cancelled("gone");
        let Some(Said::Hello(hello)) = says.message().await?.and_then(|said| said.message) else {
            return Err(Status::invalid_argument("no hello"));
        };
        self.state().hellos.push(hello.clone());
        let mut sent: BTreeMap<String, [u8; 32]> = BTreeMap::new();
        let mut sent_bundles: BTreeMap<String, [u8; 32]> = BTreeMap::new();
        if hello.digest != self.digest().as_slice() {
            answers.send(answer(Answer::Compare(sync::Compare {}))).await.map_err(gone)?;
            loop {
                let Some(Said::Held(held)) = says.message().await?.and_then(|said| said.message) else {
                    return Err(Status::invalid_argument("no held"));
                };
                sent.extend(held.entries.into_iter().map(|entry| (entry.id, (&entry.content[..]).try_into().unwrap())));
                sent_bundles.extend(
                    held.bundles
                        .into_iter()
                        .map(|bundle| (bundle.trust_domain, (&bundle.content[..]).try_into().unwrap())),
                );
                if !held.more {
                    break;
                }
            }
        } else {
            let entries = self.state().entries.clone();
            sent.extend(entries.into_values().map(|entry| (entry.id.clone(), content_of(&entry))));
            sent_bundles.extend(self.bundles().into_iter().map(|(name, bundle)| (name, digest_of(&bundle))));
            answers.send(answer(Answer::Resume(sync::Resume { position: None }))).await.map_err(gone)?;
        }
        let mut changed = self.changed.subscribe();
        loop {
            self.admit(serial)?;
            let revision = *changed.borrow_and_update();
            let entries = self.state().entries.clone();
            let bundles = self.bundles();
            let new: Vec<types::Entry> =
                entries.values().filter(|entry| sent.get(&entry.id) != Some(&content_of(entry))).cloned().collect();
            let removed: Vec<String> = sent.keys().filter(|id| !entries.contains_key(*id)).cloned().collect();
            let new_bundles: Vec<types::Bundle> = bundles
                .iter()
                .filter(|(name, bundle)| sent_bundles.get(*name) != Some(&digest_of(bundle)))
                .map(|(_, bundle)| bundle.clone())
                .collect();
            let removed_bundles: Vec<String> =
                sent_bundles.keys().filter(|name| !bundles.contains_key(*name)).cloned().collect();
            if new.is_empty() && removed.is_empty() && new_bundles.is_empty() && removed_bundles.is_empty() {
                self.state().acked = revision;
            } else {
                sent = entries.values().map(|entry| (entry.id.clone(), content_of(entry))).collect();
                sent_bundles = bundles.iter().map(|(name, bundle)| (name.clone(), digest_of(bundle))).collect();
                let digest = Bytes::copy_from_slice(&self.digest());
                // Two parts, so that their joining is looked at, too.
                let sent = |entry: types::Entry| sync::SentEntry {
                    content: Bytes::copy_from_slice(&content_of(&entry)),
                    entry: Some(entry),
                };
                let new = new.into_iter().map(sent).collect();
                let first = sync::Part { step: revision, entries: new, removed_entries: removed, ..Default::default() };
                let last = sync::Part {
                    step: revision,
                    bundles: new_bundles,
                    removed_bundles,
                    last: true,
                    digest,
                    ..Default::default()
                };
                for part in [first, last] {
                    answers.send(answer(Answer::Part(part))).await.map_err(gone)?;
                }
                match says.message().await?.and_then(|said| said.message) {
                    Some(Said::Ack(ack)) if ack.step == revision => self.state().acked = revision,
                    other => return Err(Status::invalid_argument(format!("no ack: {other:?}"))),
                }
            }
            tokio::select! {
                _ = changed.changed() => {}
                () = tokio::time::sleep(Duration::from_secs(10)) => {
                    let digest = Bytes::copy_from_slice(&self.digest());
                    let heartbeat = sync::Heartbeat { position: None, digest };
                    answers.send(answer(Answer::Heartbeat(heartbeat))).await.map_err(gone)?;
                }
            }
        }
    }

    fn bundles(&self) -> BTreeMap<String, types::Bundle> {
        let mut bundles = self.state().federated.clone();
        bundles.insert(self.trust_domain.as_str().into(), self.own_bundle());
        bundles
    }

    fn digest(&self) -> [u8; 32] {
        let mut digest = ViewDigest::default();
        for entry in self.state().entries.values() {
            digest.add_entry(&entry.id, &content_of(entry));
        }
        for (name, bundle) in self.bundles() {
            digest.add_bundle(&name, &digest_of(&bundle));
        }
        digest.finish()
    }
}

fn content_of(entry: &types::Entry) -> [u8; 32] {
    bundle_digest(&entry.encode_to_vec())
}

fn digest_of(bundle: &types::Bundle) -> [u8; 32] {
    bundle_digest(&bundle.encode_to_vec())
}

pub(crate) fn entry_message(trust_domain: &TrustDomain, id: &str, selector: &str) -> types::Entry {
    let (kind, value) = selector.split_once(':').unwrap();
    types::Entry {
        id: id.into(),
        spiffe_id: Some(types::Spiffeid { trust_domain: trust_domain.as_str().into(), path: format!("/{id}") }),
        selectors: vec![types::Selector { r#type: kind.into(), value: value.into() }],
        created_at: 100,
        ..types::Entry::default()
    }
}

pub(crate) fn denied(reason: Reason) -> Status {
    let details = types::PermissionDeniedDetails { reason: reason as i32 };
    let status = rpc_status::Status {
        code: Code::PermissionDenied as i32,
        message: "denied".into(),
        details: vec![prost_types::Any {
            type_url: "type.googleapis.com/spire.api.types.PermissionDeniedDetails".into(),
            value: details.encode_to_vec(),
        }],
    };
    Status::with_details(Code::PermissionDenied, "denied", status.encode_to_vec().into())
}
