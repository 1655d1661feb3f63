use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use prost::Message as _;
use spiffe::bundle::X509Authority;
use spiffe::id::TrustDomain;
use spiffe::selector::{Selector, SelectorSet};
use transport::peer::UnixPeer;
use transport::serve::Ending;

use super::*;
use crate::history::{HistoryId, Position};
use crate::state::model::{Agent, Change, Entry, Part, PendingSerial, Scope, Standing};

const NOW: Duration = Duration::from_secs(1_000_000);

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + NOW
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&TrustDomain::parse("example.org").unwrap(), path).unwrap()
}

fn entry(state: &State, path: &str, change: impl FnOnce(&mut Entry)) -> Change {
    let mut entry = Entry {
        id: format!("entry-of{}", path.replace('/', "-")).into(),
        ordinal: state.next_ordinal(),
        revision: 0,
        spiffe_id: id(path),
        parent_id: id("/spire/agent/x"),
        selectors: SelectorSet::from_iter([Selector::new("unix", "uid:1").unwrap()]),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: Vec::new(),
        admin: false,
        downstream: false,
        expires_at: None,
        dns_names: Vec::new(),
        store_svid: false,
        hint: "".into(),
        created_at: now(),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        content: crate::state::model::Content::default(),
    };
    change(&mut entry);
    Change::PutEntry(Arc::new(entry))
}

fn agent(state: &State, name: &str, standing: Standing) -> Change {
    Change::PutAgent(Arc::new(Agent {
        id: id(&format!("/spire/agent/{name}")),
        ordinal: state.next_ordinal(),
        attestation_type: "join_token".into(),
        selectors: SelectorSet::empty(),
        standing,
        expires_at: now() + Duration::from_secs(60),
        can_reattest: false,
        version: "".into(),
        history: None,
    }))
}

/// A trust domain with one of each kind of caller.
fn state() -> State {
    let trust_domain = TrustDomain::parse("example.org").unwrap();
    let mut state = State::empty(trust_domain, Position::start(HistoryId([0; 16])));
    let active = || Standing::Active {
        serial: Serial::from(1),
        expires_at: now(),
        pending: vec![PendingSerial { serial: Serial::from(2), expires_at: now() }],
    };
    let changes: [fn(&State) -> Change; 4] = [
        |state| entry(state, "/admin", |entry| entry.admin = true),
        |state| {
            entry(state, "/ended-admin", |entry| {
                entry.admin = true;
                entry.expires_at = Some(now());
            })
        },
        |state| entry(state, "/downstream", |entry| entry.downstream = true),
        |state| agent(state, "banned", Standing::Banned),
    ];
    for change in changes {
        let change = change(&state);
        state.apply(&Part::new(vec![change])).unwrap();
    }
    let change = agent(&state, "active", active());
    state.apply(&Part::new(vec![change])).unwrap();
    state.apply(&Part::new([bundle("example.org"), bundle("other.test")].concat())).unwrap();
    state
}

fn caller(kind: CallerKind) -> Caller {
    let address = Some(IpAddr::V4(Ipv4Addr::LOCALHOST));
    Caller { kind, scope: Scope::trust_domain(), address, ending: Ending::new() }
}

fn x509(id: SpiffeId, serial: u128) -> Caller {
    let not_after = now() + Duration::from_secs(60);
    caller(CallerKind::X509 { id, serial: Serial::from(serial), not_after, root: ROOT })
}

fn expired(id: SpiffeId) -> Caller {
    let not_after = now() - Duration::from_secs(1);
    caller(CallerKind::X509 { id, serial: Serial::from(1), not_after, root: ROOT })
}

/// Verified by a root that is in no bundle any more.
fn distrusted(id: SpiffeId) -> Caller {
    let not_after = now() + Duration::from_secs(60);
    caller(CallerKind::X509 { id, serial: Serial::from(1), not_after, root: Bytes::from_static(b"revoked") })
}

/// The one root of both trust domains.
const ROOT: Bytes = Bytes::from_static(b"root");

fn bundle(trust_domain: &str) -> [Change; 2] {
    let trust_domain = TrustDomain::parse(trust_domain).unwrap();
    let authority = X509Authority { der: ROOT, tainted: false };
    let info = Change::PutBundleInfo { trust_domain: trust_domain.clone(), sequence: 1, refresh_hint: None };
    [info, Change::PutX509Authority { trust_domain, authority }]
}

/// Every class of caller, with the letter of its column.
async fn callers() -> Vec<(char, Caller)> {
    let (socket, _other) = tokio::net::UnixStream::pair().unwrap();
    let process = Arc::new(UnixPeer::pin(&socket).unwrap());
    let foreign = SpiffeId::parse("spiffe://other.test/admin").unwrap();
    vec![
        ('a', caller(CallerKind::Anonymous)),
        ('l', Caller { address: None, ..caller(CallerKind::Local(process)) }),
        ('c', x509(id("/configured-admin"), 1)),
        ('f', x509(foreign, 1)),
        ('e', x509(id("/admin"), 1)),
        ('x', x509(id("/ended-admin"), 1)),
        ('d', x509(id("/downstream"), 1)),
        ('w', x509(id("/workload"), 1)),
        ('1', x509(id("/spire/agent/active"), 1)),
        ('2', x509(id("/spire/agent/active"), 2)),
        ('3', x509(id("/spire/agent/active"), 3)),
        ('9', expired(id("/spire/agent/active"))),
        ('b', x509(id("/spire/agent/banned"), 1)),
        ('C', distrusted(id("/configured-admin"))),
        ('E', distrusted(id("/admin"))),
        ('A', distrusted(id("/spire/agent/active"))),
        ('g', x509(SpiffeId::parse("spiffe://gone.test/admin").unwrap(), 1)),
    ]
}

fn letter(verdict: Verdict) -> char {
    match verdict {
        Verdict::Allowed(_) => 'Y',
        Verdict::Promote => 'P',
        Verdict::Distrusted => 'D',
        Verdict::Refused(None) => '-',
        Verdict::Refused(Some(Reason::AgentExpired)) => 'e',
        Verdict::Refused(Some(Reason::AgentNotAttested)) => 'n',
        Verdict::Refused(Some(Reason::AgentNotActive)) => 's',
        Verdict::Refused(Some(Reason::AgentBanned)) => 'b',
        Verdict::Refused(Some(_)) => '?',
    }
}

/// Y let in; P let in once the first use of a renewed certificate is recorded; - refused; refused with the reason
/// e expired, n not attested, s not active (superseded), b banned; D refused because its root is in no bundle.
///
/// Columns: anonymous, local process, administrator by configuration, foreign administrator by configuration,
/// administrator by entry, the same with an ended entry, downstream server, workload, agent with its current
/// certificate, with a renewed one, with a superseded one, with an expired one, banned agent; administrators by
/// configuration and by entry, and an agent, whose root was revoked; an administrator of a domain without bundle.
const GOLDEN: &str = "\
method                                                  alcfexdw1239bCEAg
/grpc.health.v1.Health/Check                            -Y-----------DDDD
/grpc.health.v1.Health/List                             -Y-----------DDDD
/grpc.health.v1.Health/Watch                            -Y-----------DDDD
/signet.backup.v1.Backup/Create                         -Y-----------DDDD
/signet.sync.v2.Sync/Subscribe                          --nnnnnnYPsebDDDD
/spire.api.server.agent.v1.Agent/AttestAgent            YYYYYYYYYYYYYYYYY
/spire.api.server.agent.v1.Agent/BanAgent               -YYYY--------DDDD
/spire.api.server.agent.v1.Agent/CountAgents            -YYYY--------DDDD
/spire.api.server.agent.v1.Agent/CreateJoinToken        -YYYY--------DDDD
/spire.api.server.agent.v1.Agent/DeleteAgent            -YYYY--------DDDD
/spire.api.server.agent.v1.Agent/GetAgent               -YYYY--------DDDD
/spire.api.server.agent.v1.Agent/ListAgents             -YYYY--------DDDD
/spire.api.server.agent.v1.Agent/PostStatus             --nnnnnnYPsebDDDD
/spire.api.server.agent.v1.Agent/RenewAgent             --nnnnnnYPsebDDDD
/spire.api.server.bundle.v1.Bundle/AppendBundle         -YYYY--------DDDD
/spire.api.server.bundle.v1.Bundle/BatchCreateFederatedBundle -YYYY--------DDDD
/spire.api.server.bundle.v1.Bundle/BatchDeleteFederatedBundle -YYYY--------DDDD
/spire.api.server.bundle.v1.Bundle/BatchSetFederatedBundle -YYYY--------DDDD
/spire.api.server.bundle.v1.Bundle/BatchUpdateFederatedBundle -YYYY--------DDDD
/spire.api.server.bundle.v1.Bundle/CountBundles         -YYYY--------DDDD
/spire.api.server.bundle.v1.Bundle/GetBundle            YYYYYYYYYYYYYYYYY
/spire.api.server.bundle.v1.Bundle/GetFederatedBundle   -YYYYnnnYPsebDDDD
/spire.api.server.bundle.v1.Bundle/ListFederatedBundles -YYYY--------DDDD
/spire.api.server.bundle.v1.Bundle/PublishJWTAuthority  ------Y------DDDD
/spire.api.server.bundle.v1.Bundle/PublishWITAuthority  ------Y------DDDD
/spire.api.server.debug.v1.Debug/GetInfo                -Y-----------DDDD
/spire.api.server.entry.v1.Entry/BatchCreateEntry       -YYYY--------DDDD
/spire.api.server.entry.v1.Entry/BatchDeleteEntry       -YYYY--------DDDD
/spire.api.server.entry.v1.Entry/BatchUpdateEntry       -YYYY--------DDDD
/spire.api.server.entry.v1.Entry/CountEntries           -YYYY--------DDDD
/spire.api.server.entry.v1.Entry/GetAuthorizedEntries   --nnnnnnYPsebDDDD
/spire.api.server.entry.v1.Entry/GetEntry               -YYYY--------DDDD
/spire.api.server.entry.v1.Entry/ListEntries            -YYYY--------DDDD
/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries  --nnnnnnYPsebDDDD
/spire.api.server.logger.v1.Logger/GetLogger            -Y-----------DDDD
/spire.api.server.logger.v1.Logger/ResetLogLevel        -Y-----------DDDD
/spire.api.server.logger.v1.Logger/SetLogLevel          -Y-----------DDDD
/spire.api.server.svid.v1.SVID/BatchNewWITSVID          --nnnnnnYPsebDDDD
/spire.api.server.svid.v1.SVID/BatchNewX509SVID         --nnnnnnYPsebDDDD
/spire.api.server.svid.v1.SVID/MintJWTSVID              -YYYY--------DDDD
/spire.api.server.svid.v1.SVID/MintWITSVID              -YYYY--------DDDD
/spire.api.server.svid.v1.SVID/MintX509SVID             -YYYY--------DDDD
/spire.api.server.svid.v1.SVID/NewDownstreamX509CA      ------Y------DDDD
/spire.api.server.svid.v1.SVID/NewJWTSVID               --nnnnnnYPsebDDDD
";

#[tokio::test]
async fn every_method_lets_in_exactly_these_callers() {
    let (state, callers) = (state(), callers().await);
    let foreign = ["spiffe://other.test/admin", "spiffe://gone.test/admin"];
    let mut admins = HashSet::from(foreign.map(|id| SpiffeId::parse(id).unwrap()));
    admins.insert(id("/configured-admin"));
    let columns: String = callers.iter().map(|(letter, _)| *letter).collect();
    let mut table = String::new();
    writeln!(table, "{:55} {columns}", "method").unwrap();
    for method in METHODS {
        let judged = callers.iter().map(|(_, caller)| letter(judge(method.admits, caller, &admins, &state, now())));
        writeln!(table, "{:55} {}", method.path, judged.collect::<String>()).unwrap();
    }
    assert_eq!(table, GOLDEN, "\n{table}");
}

#[test]
fn the_table_is_in_order_and_finds_its_methods() {
    assert!(METHODS.is_sorted_by(|a, b| a.path < b.path));
    for (index, method) in METHODS.iter().enumerate() {
        assert_eq!(position(method.path), Some(index));
    }
    assert_eq!(position("/spire.api.server.agent.v1.Agent/Nope"), None);
    assert_eq!(position(""), None);
}

#[test]
fn every_method_of_a_registered_service_is_in_the_table_and_nothing_else_is() {
    let registered = [
        "grpc.health.v1.Health",
        "signet.backup.v1.Backup",
        "signet.sync.v2.Sync",
        "spire.api.server.agent.v1.Agent",
        "spire.api.server.bundle.v1.Bundle",
        "spire.api.server.debug.v1.Debug",
        "spire.api.server.entry.v1.Entry",
        "spire.api.server.logger.v1.Logger",
        "spire.api.server.svid.v1.SVID",
    ];
    let files = prost_types::FileDescriptorSet::decode(spiffe_proto::DESCRIPTORS).unwrap().file;
    let mut known = BTreeSet::new();
    for file in &files {
        for service in &file.service {
            let name = format!("{}.{}", file.package(), service.name());
            if registered.contains(&name.as_str()) {
                known.extend(service.method.iter().map(|method| format!("/{name}/{}", method.name())));
            }
        }
    }
    let listed: BTreeSet<String> = METHODS.iter().map(|method| method.path.to_owned()).collect();
    assert_eq!(listed, known);
}

#[test]
fn every_method_that_strangers_may_call_says_what_it_takes() {
    let mut open: Vec<&str> = METHODS.iter().filter(|method| method.admits.anyone).map(|method| method.path).collect();
    let mut expected: Vec<&str> = EXPECTED.iter().map(|expected| expected.path).collect();
    open.sort_unstable();
    expected.sort_unstable();
    assert_eq!(open, expected);
}
