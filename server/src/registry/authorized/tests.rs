use proptest::prelude::*;
use spiffe::selector::{Selector, SelectorSet};
use spiffe::x509::Serial;
use std::time::Duration;

use super::*;
use crate::history::{HistoryId, Position};
use crate::state::model::{Agent, Part, Standing};

fn own() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&own(), path).unwrap()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn set(numbers: &[u8]) -> SelectorSet {
    numbers.iter().map(|number| Selector::new("node", &number.to_string()).unwrap()).collect()
}

fn start() -> State {
    State::empty(own(), Position::start(HistoryId([1; 16])))
}

fn entry(name: &str, ordinal: u64, parent: &str, spiffe_id: &str, selectors: &[u8]) -> Entry {
    Entry {
        id: name.into(),
        ordinal,
        revision: 0,
        spiffe_id: id(spiffe_id),
        parent_id: id(parent),
        selectors: set(selectors),
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: vec![],
        admin: false,
        downstream: false,
        expires_at: None,
        dns_names: vec![],
        store_svid: false,
        hint: "".into(),
        created_at: at(0),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        content: crate::state::model::Content::default(),
    }
}

fn agent(name: &str, ordinal: u64, selectors: &[u8]) -> Agent {
    Agent {
        id: id(name),
        ordinal,
        attestation_type: "x509pop".into(),
        selectors: set(selectors),
        standing: Standing::Active { serial: Serial::from(1), expires_at: at(100), pending: vec![] },
        expires_at: at(100),
        can_reattest: true,
        version: "".into(),
        history: None,
    }
}

fn with(entries: Vec<Entry>, agents: Vec<Agent>) -> State {
    let mut state = start();
    let entries = entries.into_iter().map(|entry| Change::PutEntry(Arc::new(entry)));
    let agents = agents.into_iter().map(|agent| Change::PutAgent(Arc::new(agent)));
    state.apply(&Part::new(entries.chain(agents).collect())).unwrap();
    state
}

fn names(state: &State, agent: &str) -> Vec<String> {
    authorized_ids(state, &id(agent), at(50)).iter().map(ToString::to_string).collect()
}

const NODE: &str = "/spire/agent/one";

#[test]
fn an_agent_has_its_descendants() {
    let state = with(
        vec![
            entry("child", 1, NODE, "/a", &[1]),
            entry("grandchild", 2, "/a", "/b", &[1]),
            entry("same-name", 3, "/b", "/a", &[2]),
            entry("elsewhere", 4, "/spire/agent/two", "/c", &[1]),
            entry("orphan", 5, "/nowhere", "/d", &[1]),
        ],
        vec![agent(NODE, 6, &[])],
    );
    assert_eq!(names(&state, NODE), ["child", "grandchild", "same-name"]);
    assert_eq!(names(&state, "/spire/agent/two"), ["elsewhere"]);
    assert_eq!(names(&state, "/spire/agent/three"), Vec::<String>::new());
}

#[test]
fn aliases_count_by_their_selectors_and_are_not_handed_out() {
    let state = with(
        vec![
            entry("alias", 1, "/spire/server", "/cluster", &[1, 2]),
            entry("other-alias", 2, "/spire/server", "/zone", &[1, 9]),
            entry("workload", 3, "/cluster", "/a", &[5]),
            entry("zoned", 4, "/zone", "/b", &[5]),
        ],
        vec![agent(NODE, 5, &[1, 2, 3]), agent("/spire/agent/two", 6, &[2])],
    );
    assert_eq!(names(&state, NODE), ["workload"]);
    assert_eq!(names(&state, "/spire/agent/two"), Vec::<String>::new());
}

#[test]
fn cycles_end() {
    let state = with(
        vec![
            entry("one", 1, "/b", "/a", &[1]),
            entry("two", 2, "/a", "/b", &[1]),
            entry("self", 3, "/c", "/c", &[1]),
            entry("into", 4, NODE, "/a", &[1]),
        ],
        vec![agent(NODE, 5, &[])],
    );
    assert_eq!(names(&state, NODE), ["into", "one", "two"]);
    let named = named(&state, &id(NODE), ["two", "self", "none"].into_iter(), at(50));
    assert_eq!(
        named.iter().map(|found| found.as_ref().map(|entry| &*entry.id)).collect::<Vec<_>>(),
        [Some("two"), None, None]
    );
}

#[test]
fn what_has_ended_is_absent_and_takes_its_descendants_with_it() {
    let ending = |entry: Entry| Entry { expires_at: Some(at(50)), ..entry };
    let state = with(
        vec![
            ending(entry("child", 1, NODE, "/a", &[1])),
            entry("grandchild", 2, "/a", "/b", &[1]),
            ending(entry("alias", 3, "/spire/server", "/cluster", &[1])),
            entry("workload", 4, "/cluster", "/c", &[1]),
        ],
        vec![agent(NODE, 5, &[1])],
    );
    let ids = |now| authorized_ids(&state, &id(NODE), now).len();
    assert_eq!((ids(at(49)), ids(at(50))), (3, 0));
    for name in ["child", "grandchild", "workload"] {
        let found = |now| named(&state, &id(NODE), [name].into_iter(), now).pop().flatten().is_some();
        assert_eq!((found(at(49)), found(at(50))), (true, false), "{name}");
    }
}

#[test]
fn bundles_concern_who_federates() {
    let other = TrustDomain::parse("other.org").unwrap();
    let federated = Entry { federates_with: vec![other.clone()], ..entry("one", 1, "/cluster", "/a", &[1]) };
    let state = with(
        vec![federated, entry("alias", 2, "/spire/server", "/cluster", &[1])],
        vec![agent(NODE, 3, &[1]), agent("/spire/agent/two", 4, &[2])],
    );
    let foreign = Change::RemoveJwtAuthority { trust_domain: other, key_id: "k".into() };
    assert_eq!(agents_concerned_by(&state, &state, [&foreign]), Concerned::Agents([id(NODE)].into()));
    let ours = Change::PutBundleInfo { trust_domain: own(), sequence: 1, refresh_hint: None };
    assert_eq!(agents_concerned_by(&state, &state, [&foreign, &ours]), Concerned::Everyone);
    assert_eq!(agents_concerned_by(&state, &state, [&Change::RemoveToken([0; 32])]), Concerned::Agents([].into()));
}

/// The rule once more, in its plainest form.
fn naive(state: &State, agent: &SpiffeId, now: SystemTime) -> BTreeSet<EntryId> {
    let mut reachable = BTreeSet::from([agent.clone()]);
    let present: Vec<_> = state.entries().filter(|entry| !entry.is_expired(now)).collect();
    if let Some(agent) = state.agents().find(|held| held.id == *agent) {
        for alias in present.iter().filter(|entry| entry.parent_id == id("/spire/server")) {
            if alias.selectors.iter().all(|selector| agent.selectors.contains(selector)) {
                reachable.insert(alias.spiffe_id.clone());
            }
        }
    }
    loop {
        let before = reachable.len();
        for entry in &present {
            if reachable.contains(&entry.parent_id) {
                reachable.insert(entry.spiffe_id.clone());
            }
        }
        if reachable.len() == before {
            break;
        }
    }
    present.iter().filter(|entry| reachable.contains(&entry.parent_id)).map(|entry| Arc::clone(&entry.id)).collect()
}

#[derive(Clone, Debug)]
enum Op {
    Put { entry: u8, parent: u8, name: u8, selectors: Vec<u8>, ends: bool },
    Remove(u8),
    PutAgent(u8, Vec<u8>),
    RemoveAgent(u8),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let selectors = || prop::collection::vec(0..3u8, 1..3);
    let op = prop_oneof![
        6 => (0..10u8, 0..8u8, 0..5u8, selectors(), prop::bool::weighted(0.15))
            .prop_map(|(entry, parent, name, selectors, ends)| Op::Put { entry, parent, name, selectors, ends }),
        2 => (0..10u8).prop_map(Op::Remove),
        2 => (0..2u8, selectors()).prop_map(|(agent, selectors)| Op::PutAgent(agent, selectors)),
        1 => (0..2u8).prop_map(Op::RemoveAgent),
    ];
    prop::collection::vec(op, 1..40)
}

fn change(state: &State, op: &Op) -> Change {
    match op {
        Op::Put { entry: number, parent, name, selectors, ends } => {
            let text = format!("entry-{number}");
            let parent = match parent {
                0 | 1 => format!("/spire/agent/{parent}"),
                2 => "/spire/server".to_owned(),
                other => format!("/name/{}", other - 3),
            };
            let ordinal = state.entry(&text).map_or(state.next_ordinal(), |held| held.ordinal);
            let entry = entry(&text, ordinal, &parent, &format!("/name/{name}"), selectors);
            Change::PutEntry(Arc::new(Entry { expires_at: ends.then(|| at(40)), ..entry }))
        }
        Op::Remove(number) => Change::RemoveEntry(format!("entry-{number}").into()),
        Op::PutAgent(number, selectors) => {
            let name = format!("/spire/agent/{number}");
            let ordinal = state.agent(&id(&name)).map_or(state.next_ordinal(), |held| held.ordinal);
            Change::PutAgent(Arc::new(agent(&name, ordinal, selectors)))
        }
        Op::RemoveAgent(number) => Change::RemoveAgent(id(&format!("/spire/agent/{number}"))),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn authorized_equals_the_naive_rule_and_concerns_whom_it_changes(ops in ops(), step in 1..5usize) {
        let agents = ["/spire/agent/0", "/spire/agent/1"].map(id);
        let mut state = start();
        let mut before = state.clone();
        let mut pending = Vec::new();
        for (number, op) in ops.iter().enumerate() {
            let change = change(&state, op);
            state.apply(&Part::new(vec![change.clone()])).unwrap();
            pending.push(change);
            for agent in &agents {
                let wanted = naive(&state, agent, at(50));
                prop_assert_eq!(&authorized_ids(&state, agent, at(50)), &wanted);
                prop_assert_eq!(authorized(&state, agent, at(50)).len(), wanted.len());
                let ids: Vec<_> = (0..10).map(|number| format!("entry-{number}")).collect();
                let named = named(&state, agent, ids.iter().map(String::as_str), at(50));
                for (id, found) in ids.iter().zip(named) {
                    prop_assert_eq!(found.is_some(), wanted.contains(id.as_str()), "{}", id);
                    prop_assert_eq!(found.as_ref(), state.entry(id).filter(|_| wanted.contains(id.as_str())));
                }
            }
            // Several revisions may be looked at together.
            if number % step == 0 {
                let concerned = agents_concerned_by(&before, &state, &pending);
                for agent in &agents {
                    let held = |state: &State| {
                        let entries = authorized(state, agent, at(50));
                        entries.into_iter().map(|entry| (Arc::clone(&entry.id), entry)).collect::<std::collections::BTreeMap<_, _>>()
                    };
                    if held(&before) != held(&state) {
                        prop_assert!(concerned.includes(agent), "{:?} changed by {:?}", agent, pending);
                    }
                }
                before = state.clone();
                pending.clear();
            }
        }
    }
}
