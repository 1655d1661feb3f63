#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::collections::HashSet;
use std::time::SystemTime;

use bytes::Bytes;
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Trigger};
use runtime::steady::Steady;
use spiffe::bundle::X509Authority;
use spiffe::selector::{Selector, SelectorSet};
use spiffe::x509::Serial;
use spiffe_proto::rpc_status;
use spiffe_proto::sync::sync_client::SyncClient;
use spiffe_proto::sync::sync_server::SyncServer;
use spiffe_proto::types::permission_denied_details::Reason;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;
use transport::serve::Ending;

use super::*;
use crate::api::caller::{Caller, CallerKind};
use crate::api::meters::Meters;
use crate::api::permission::{self, Role};
use crate::attest::testing::History;
use crate::audit::Audit;
use crate::limits::Limits;
use crate::state::model::{self, Agent, Change, Part, Scope, Standing};

const PATH: &str = "/signet.sync.v2.Sync/Subscribe";

fn domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn agent_id() -> SpiffeId {
    SpiffeId::parse("spiffe://example.org/spire/agent/test/1").unwrap()
}

fn entry(number: u64, revision: i64) -> Change {
    Change::PutEntry(Arc::new(model::Entry {
        id: format!("entry-{number}").into(),
        ordinal: 100 + number,
        revision,
        spiffe_id: SpiffeId::from_path(&domain(), &format!("/w/{number}")).unwrap(),
        parent_id: agent_id(),
        selectors: SelectorSet::from_iter([Selector::new("unix", "uid:1").unwrap()]),
        x509_svid_ttl: Some(Duration::from_secs(60)),
        jwt_svid_ttl: None,
        federates_with: Vec::new(),
        admin: false,
        downstream: false,
        expires_at: None,
        dns_names: vec!["w.example".into()],
        store_svid: false,
        hint: "hint".into(),
        created_at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_600_000_000),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        content: model::Content::default(),
    }))
}

fn agent(history: &History, standing: Standing) -> Change {
    Change::PutAgent(Arc::new(Agent {
        id: agent_id(),
        ordinal: 1,
        attestation_type: "test".into(),
        selectors: SelectorSet::default(),
        standing,
        expires_at: history.now() + Duration::from_secs(86_400),
        can_reattest: true,
        version: "".into(),
        history: None,
    }))
}

/// The root of the agent's certificate.
const ROOT: Bytes = Bytes::from_static(b"root");

struct Server {
    history: History,
    service: SyncService,
    _trigger: Trigger,
}

impl Server {
    async fn start() -> Self {
        let history = History::open().await;
        let active = Standing::Active {
            serial: Serial::from(7),
            expires_at: history.now() + Duration::from_secs(86_400),
            pending: Vec::new(),
        };
        let info = Change::PutBundleInfo { trust_domain: domain(), sequence: 1, refresh_hint: None };
        let authority = X509Authority { der: ROOT, tainted: false };
        let root = Change::PutX509Authority { trust_domain: domain(), authority };
        history.commit(Part::new(vec![info, root, agent(&history, active), entry(1, 0)])).await;
        let core = Core {
            trust_domain: domain(),
            replica: history.replica(),
            committer: history.committer(),
            clock: history.clock(),
            steady: runtime::steady::Steady::new(history.clock()),
            entropy: Entropy::system(),
            admin_ids: HashSet::new(),
            limits: Limits::new(false, false),
            log: runtime::telemetry::Limiter::new(history.clock()),
            audit: Audit::new(false, runtime::telemetry::Limiter::new(history.clock())),
            twice: Default::default(),
            meters: Meters::new(),
        };
        let feed = Feed::new(history.replica(), history.clock(), Steady::new(history.clock()));
        let (trigger, shutdown) = Shutdown::new();
        tokio::spawn(feed.clone().run(shutdown));
        Self { history, service: SyncService::new(Arc::new(core), feed), _trigger: trigger }
    }

    /// Opens a stream that begins with `hello`.
    async fn connect(&self, hello: proto::Hello) -> Result<Stream, Status> {
        let caller = Caller {
            kind: CallerKind::X509 {
                id: agent_id(),
                serial: Serial::from(7),
                not_after: self.history.now() + Duration::from_secs(86_400),
                root: ROOT,
            },
            scope: Scope::trust_domain(),
            address: None,
            ending: Ending::new(),
        };
        let method = &permission::METHODS[permission::position(PATH).unwrap()];
        let admission =
            Admission { caller, role: Role::Agent, method, deadline: None, request_id: None, caller_path: None };
        let server = SyncServer::with_interceptor(self.service.clone(), move |mut request: Request<()>| {
            request.extensions_mut().insert(admission.clone());
            Ok(request)
        });
        let (says, said) = mpsc::channel(8);
        says.send(proto::SubscribeRequest { message: Some(Said::Hello(hello)) }).await.unwrap();
        let answers = SyncClient::new(server).subscribe(ReceiverStream::new(said)).await?.into_inner();
        Ok(Stream { says, answers })
    }
}

struct Stream {
    says: mpsc::Sender<proto::SubscribeRequest>,
    answers: Streaming<proto::SubscribeResponse>,
}

impl Stream {
    async fn next(&mut self) -> Result<Answer, Status> {
        Ok(self.answers.message().await?.expect("stream goes on").message.unwrap())
    }

    async fn part(&mut self) -> proto::Part {
        loop {
            match self.next().await.unwrap() {
                Answer::Part(part) => return part,
                Answer::Heartbeat(_) => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn say(&self, said: Said) {
        self.says.send(proto::SubscribeRequest { message: Some(said) }).await.unwrap();
    }

    async fn acknowledge(&self, step: u64) {
        self.say(Said::Ack(proto::Ack { step })).await;
    }

    async fn status(&mut self) -> Status {
        loop {
            if let Err(status) = self.next().await {
                return status;
            }
        }
    }
}

fn hello(digest: Digest, position: Option<proto::Position>) -> proto::Hello {
    proto::Hello { position, digest: digest.to_vec().into(), agent_version: "1.2.3".to_owned() }
}

fn nothing() -> proto::Hello {
    hello([0; 32], None)
}

#[tokio::test(start_paused = true)]
async fn a_fresh_agent_gets_everything_then_what_is_new_then_resumes() {
    let server = Server::start().await;
    let mut stream = server.connect(nothing()).await.unwrap();
    let part = stream.part().await;
    assert_eq!((part.step, part.last), (1, true));
    assert_eq!(part.bundles.len(), 1);
    assert_eq!(part.entries.len(), 1);
    let sent = part.entries[0].entry.as_ref().unwrap();
    assert_eq!(part.entries[0].content.len(), 32);
    assert_eq!((sent.id.as_str(), sent.hint.as_str(), sent.created_at), ("entry-1", "hint", 1_600_000_000));
    assert_eq!((sent.parent_id.as_ref(), sent.x509_svid_ttl, sent.dns_names.len()), (None, 0, 0), "not for agents");
    stream.acknowledge(1).await;

    server.history.commit(Part::new(vec![entry(2, 0), Change::RemoveEntry("entry-1".into())])).await;
    let part = stream.part().await;
    assert_eq!((part.step, part.entries.len(), part.bundles.len()), (2, 1, 0));
    assert_eq!(part.removed_entries, ["entry-1"]);
    stream.acknowledge(2).await;
    let Answer::Heartbeat(heartbeat) = stream.next().await.unwrap() else { panic!("silence is to be told") };
    assert_eq!(heartbeat.digest, part.digest);
    assert_eq!(heartbeat.position, Some(position(server.history.replica().latest().position())));
    let known = server.history.replica().latest().agent(&agent_id()).unwrap().version.to_string();
    assert_eq!(known, "1.2.3");
    drop(stream);

    let held: Digest = part.digest.to_vec().try_into().unwrap();
    let mut stream = server.connect(hello(held, heartbeat.position)).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Resume(_)));
    server.history.commit(Part::new(vec![entry(2, 1)])).await;
    let part = stream.part().await;
    assert_eq!((part.step, part.entries[0].entry.as_ref().unwrap().revision_number), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_holds_something_else_is_compared() {
    let server = Server::start().await;
    let ours = position(server.history.replica().latest().position());
    let mut stream = server.connect(hello([9; 32], Some(ours))).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Compare(_)));
    let content = *server.history.replica().latest().entry("entry-1").unwrap().content();
    let held = |id: &str, content: Digest| proto::HeldEntry { id: id.to_owned(), content: content.to_vec().into() };
    stream.say(Said::Held(proto::Held { entries: vec![held("entry-1", content)], bundles: vec![], more: true })).await;
    let bundle = proto::HeldBundle { trust_domain: "gone.org".to_owned(), content: vec![1; 32].into() };
    stream
        .say(Said::Held(proto::Held { entries: vec![held("old", [3; 32])], bundles: vec![bundle], more: false }))
        .await;
    let part = stream.part().await;
    assert!(part.entries.is_empty(), "entry-1 is held already");
    assert_eq!(part.removed_entries, ["old"]);
    assert_eq!(part.removed_bundles, ["gone.org"]);
    assert_eq!(part.bundles.len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_ban_ends_the_stream_at_once_as_a_call_would_end() {
    let server = Server::start().await;
    let mut stream = server.connect(nothing()).await.unwrap();
    stream.part().await;
    let before = Instant::now();
    // Not acknowledged: the ban does not wait for it.
    server.history.commit(Part::new(vec![agent(&server.history, Standing::Banned)])).await;
    let status = stream.status().await;
    assert_eq!(Instant::now(), before);
    assert_eq!(status.code(), Code::PermissionDenied);
    let details = rpc_status::Status::decode(status.details()).unwrap();
    let detail = types::PermissionDeniedDetails::decode(details.details[0].value.as_slice()).unwrap();
    assert_eq!(detail.reason(), Reason::AgentBanned);
}

#[tokio::test(start_paused = true)]
async fn an_eviction_ends_the_stream_as_not_attested() {
    let server = Server::start().await;
    let mut stream = server.connect(nothing()).await.unwrap();
    stream.part().await;
    server.history.commit(Part::new(vec![Change::RemoveAgent(agent_id())])).await;
    let status = stream.status().await;
    let details = rpc_status::Status::decode(status.details()).unwrap();
    let detail = types::PermissionDeniedDetails::decode(details.details[0].value.as_slice()).unwrap();
    assert_eq!(detail.reason(), Reason::AgentNotAttested);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_ahead_of_the_only_server_is_compared_at_once() {
    let server = Server::start().await;
    let mut ahead = position(server.history.replica().latest().position());
    ahead.revision += 5;
    let before = Instant::now();
    let mut stream = server.connect(hello([9; 32], Some(ahead))).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Compare(_)));
    assert_eq!(Instant::now(), before);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_is_ahead_makes_the_history_begin_anew_once() {
    let server = Server::start().await;
    let history = || server.history.replica().latest().position().history;
    let first = history();
    let token = model::JoinToken { hash: [1; 32], expires_at: server.history.now() + HEARTBEAT, alias: None };
    server.history.commit(Part::new(vec![Change::PutToken(token)])).await;
    let ahead = || {
        let mut ahead = position(server.history.replica().latest().position());
        ahead.revision += 5;
        hello([9; 32], Some(ahead))
    };
    let mut stream = server.connect(ahead()).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Compare(_)));
    let second = history();
    let state = server.history.replica().latest();
    assert_eq!((second != first, state.restored_from(), state.tokens().count()), (true, Some(first), 0));
    assert_eq!(state.entry("entry-1").unwrap().revision, 1 << 32);
    let mut stream = server.connect(ahead()).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Compare(_)));
    assert_eq!(history(), second);
}

#[tokio::test(start_paused = true)]
async fn a_step_that_is_never_acknowledged_ends_the_stream() {
    let server = Server::start().await;
    let mut stream = server.connect(nothing()).await.unwrap();
    stream.part().await;
    let status = stream.status().await;
    assert_eq!((status.code(), status.message()), (Code::Unavailable, "step was not acknowledged in time"));
}

#[tokio::test(start_paused = true)]
async fn messages_out_of_turn_are_refused() {
    let server = Server::start().await;
    let mut stream = server.connect(nothing()).await.unwrap();
    stream.part().await;
    stream.acknowledge(2).await;
    let status = stream.status().await;
    assert_eq!(status.code(), Code::InvalidArgument);
    let short = proto::Hello { position: None, digest: vec![1].into(), agent_version: String::new() };
    assert_eq!(server.connect(short).await.err().map(|status| status.code()), Some(Code::InvalidArgument));
}

#[test]
fn a_large_step_is_cut_into_messages_below_a_mebibyte() {
    use crate::feed::session::Delta;
    let Change::PutEntry(one) = entry(1, 0) else { panic!("an entry") };
    let many: Vec<_> = (0..20_000)
        .map(|number| Arc::new(model::Entry { id: format!("entry-{number:030}").into(), ..model::Entry::clone(&one) }))
        .collect();
    let removed = (0..20_000).map(|number| format!("gone-{number:030}").into()).collect();
    let delta = Delta { entries: many, removed_entries: removed, ..Delta::default() };
    let at = Position::start(crate::history::HistoryId([1; 16]));
    let step = Step { number: 3, anew: true, delta, digest: [5; 32] };
    let parts: Vec<proto::Part> = Parts::of(&step, &at, &SentBundles::default()).collect();
    assert!(parts.len() > 2);
    assert!(parts.iter().all(|part| part.encoded_len() < 1024 * 1024 && part.step == 3));
    assert_eq!(parts.iter().map(|part| part.entries.len()).sum::<usize>(), 20_000);
    assert_eq!(parts.iter().map(|part| part.removed_entries.len()).sum::<usize>(), 20_000);
    assert_eq!(parts.iter().filter(|part| part.last).count(), 1);
    assert_eq!(
        parts.iter().map(|part| part.anew).collect::<Vec<_>>(),
        [[true].as_slice(), &vec![false; parts.len() - 1]].concat()
    );
    let last = parts.last().unwrap();
    assert!(last.last && *last.digest == [5; 32]);
}

#[tokio::test(start_paused = true)]
async fn an_agent_that_claims_to_hold_too_much_is_sent_everything_anew_and_one_that_goes_on_is_refused() {
    let server = Server::start().await;
    let page = |length: usize, more| {
        let entry = |number: usize| proto::HeldEntry { id: format!("{number:0length$}"), content: vec![1; 32].into() };
        Said::Held(proto::Held { entries: (0..1000).map(entry).collect(), bundles: vec![], more })
    };
    let mut stream = server.connect(hello([9; 32], None)).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Compare(_)));
    // 37 MiB, as they would be kept here. The server reads only while its answers are read.
    let says = stream.says.clone();
    tokio::spawn(async move {
        for number in 0..=100 {
            says.send(proto::SubscribeRequest { message: Some(page(255, number < 100)) }).await.unwrap();
        }
    });
    let part = stream.part().await;
    assert_eq!((part.anew, part.entries.len(), part.removed_entries.len()), (true, 1, 0));
    stream.acknowledge(1).await;

    let mut stream = server.connect(hello([9; 32], None)).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Compare(_)));
    let says = stream.says.clone();
    let saying = tokio::spawn(async move {
        // 150 MiB, if the server reads on.
        for _ in 0..400 {
            let _ = says.send(proto::SubscribeRequest { message: Some(page(255, true)) }).await;
        }
    });
    let status = stream.status().await;
    saying.abort();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "agent says that it holds too much"));

    let mut stream = server.connect(hello([9; 32], None)).await.unwrap();
    assert!(matches!(stream.next().await.unwrap(), Answer::Compare(_)));
    stream.say(page(256, false)).await;
    let status = stream.status().await;
    assert_eq!(status.code(), Code::InvalidArgument);
}
