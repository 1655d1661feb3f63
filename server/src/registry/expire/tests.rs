use proptest::prelude::*;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorSet};
use spiffe::x509::Serial;

use super::*;
use crate::history::{HistoryId, Position};
use crate::state::model::{Entry, JoinToken, Standing};

fn own() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&own(), path).unwrap()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn selectors(text: &str) -> SelectorSet {
    SelectorSet::from_iter([Selector::parse(text).unwrap()])
}

fn entry(number: u64, parent: &SpiffeId, ends: Option<u64>, selectors: SelectorSet) -> Change {
    Change::PutEntry(Arc::new(Entry {
        id: format!("entry-{number}").into(),
        ordinal: number,
        revision: 0,
        spiffe_id: id(&format!("/workload/{number}")),
        parent_id: parent.clone(),
        selectors,
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: vec![],
        admin: false,
        downstream: false,
        expires_at: ends.map(at),
        dns_names: vec![],
        store_svid: false,
        hint: "".into(),
        created_at: at(0),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        content: crate::state::model::Content::default(),
    }))
}

fn agent(number: u64, kind: &str, ends: u64, can_reattest: bool, banned: bool) -> Change {
    let active = Standing::Active { serial: Serial::from(1), expires_at: at(ends), pending: vec![] };
    Change::PutAgent(Arc::new(Agent {
        id: id(&format!("/spire/agent/{kind}/{number}")),
        ordinal: number,
        attestation_type: kind.into(),
        selectors: SelectorSet::empty(),
        standing: if banned { Standing::Banned } else { active },
        expires_at: at(ends),
        can_reattest,
        version: "".into(),
        history: None,
    }))
}

fn with(changes: Vec<Change>) -> State {
    let mut state = State::empty(own(), Position::start(HistoryId([1; 16])));
    state.apply(&Part::new(changes)).unwrap();
    state
}

#[test]
fn entries_and_tokens_go_at_their_end() {
    let token =
        |number: u8, ends| Change::PutToken(JoinToken { hash: [number; 32], expires_at: at(ends), alias: None });
    let node = id("/spire/agent/x");
    let state = with(vec![
        entry(1, &node, Some(300), selectors("a:1")),
        entry(2, &node, None, selectors("a:1")),
        entry(3, &node, Some(100), selectors("a:1")),
        token(1, 200),
        token(2, 400),
    ]);
    assert_eq!(next_removal(&state, Agents::Keep), Some(at(100)));
    assert_eq!(prune(&state, Agents::Keep, at(99)), Part::unchanged());
    let gone = |now| prune(&state, Agents::Keep, at(now)).changes;
    assert_eq!(gone(100), vec![Change::RemoveEntry("entry-3".into())]);
    assert_eq!(
        gone(300),
        vec![
            Change::RemoveEntry("entry-3".into()),
            Change::RemoveToken([1; 32]),
            Change::RemoveEntry("entry-1".into())
        ]
    );
    assert_eq!(next_removal(&with(vec![]), Agents::Keep), None);
}

#[test]
fn agents_go_by_policy_and_never_when_banned() {
    let joined = id("/spire/agent/join_token/2");
    let state = with(vec![
        agent(1, "x509pop", 100, true, false),
        agent(2, "join_token", 50, false, false),
        agent(3, "x509pop", 10, true, true),
        agent(4, "x509pop", 300, true, false),
        entry(5, &joined, None, selectors(&format!("spiffe_id:{joined}"))),
        entry(6, &joined, None, selectors("unix:uid:1")),
    ]);
    let after = |seconds, all| Agents::RemoveAfter {
        ended: Duration::from_secs(seconds),
        even_if_they_cannot_reattest: all,
        batch: 100,
    };
    let gone = |policy, now| prune(&state, policy, at(now)).changes;
    assert_eq!(gone(Agents::Keep, 10_000), vec![]);
    assert_eq!(next_removal(&state, Agents::Keep), None);

    let reattesting = after(1000, false);
    assert_eq!(next_removal(&state, reattesting), Some(at(1100)));
    assert_eq!(gone(reattesting, 1099), vec![]);
    assert_eq!(gone(reattesting, 1100), vec![Change::RemoveAgent(id("/spire/agent/x509pop/1"))]);

    let all = after(1000, true);
    assert_eq!(next_removal(&state, all), Some(at(1050)));
    // With a node of a join token goes the alias that the token made, and nothing else below it.
    assert_eq!(gone(all, 1050), vec![Change::RemoveAgent(joined), Change::RemoveEntry("entry-5".into())]);
}

#[test]
fn agents_go_in_batches_of_the_configured_size() {
    let mut state = with((1..=7).map(|number| agent(number, "x509pop", 100, true, false)).collect());
    let policy = Agents::RemoveAfter { ended: Duration::ZERO, even_if_they_cannot_reattest: false, batch: 3 };
    let mut sizes = Vec::new();
    while state.agent_count() > 0 {
        let part = prune(&state, policy, at(100));
        sizes.push(part.changes.len());
        state.apply(&part).unwrap();
    }
    assert_eq!(sizes, [3, 3, 1]);
}

#[test]
fn much_is_removed_in_several_parts() {
    let node = id("/spire/agent/x");
    let mut state = with((1..=250).map(|number| entry(number, &node, Some(100), selectors("a:1"))).collect());
    let mut sizes = Vec::new();
    loop {
        let part = prune(&state, Agents::Keep, at(100));
        if part.changes.is_empty() {
            break;
        }
        sizes.push(part.changes.len());
        state.apply(&part).unwrap();
    }
    assert_eq!(sizes, vec![90, 90, 70]);
    assert_eq!(state.entry_count(), 0);
}

/// One random change to what ends.
fn change() -> impl Strategy<Value = Change> {
    let ends = prop_oneof![Just(None), (1_u64..60).prop_map(Some)];
    let entries =
        (1_u64..8, ends).prop_map(|(number, ends)| entry(number, &id("/spire/agent/x"), ends, selectors("a:1")));
    let agents = (10_u64..18, 1_u64..60, any::<bool>(), any::<bool>())
        .prop_map(|(number, ends, can_reattest, banned)| agent(number, "x509pop", ends, can_reattest, banned));
    let tokens = (1_u8..5, 1_u64..60).prop_map(|(number, ends)| {
        Change::PutToken(JoinToken { hash: [number; 32], expires_at: at(ends), alias: None })
    });
    prop_oneof![
        entries,
        agents,
        tokens,
        (1_u64..8).prop_map(|number| Change::RemoveEntry(format!("entry-{number}").into())),
        (10_u64..18).prop_map(|number| Change::RemoveAgent(id(&format!("/spire/agent/x509pop/{number}")))),
        (1_u8..5).prop_map(|number| Change::RemoveToken([number; 32])),
    ]
}

/// The same by looking at everything.
fn scanned(state: &State, policy: Agents) -> Option<SystemTime> {
    let entries = state.entries().filter_map(|entry| entry.expires_at);
    let tokens = state.tokens().map(|token| token.expires_at);
    let agents = state.agents().filter_map(|agent| match policy {
        Agents::RemoveAfter { ended, even_if_they_cannot_reattest: all, .. } if !agent.is_banned() => {
            (agent.can_reattest || all).then(|| agent.expires_at + ended)
        }
        _ => None,
    });
    entries.chain(tokens).chain(agents).min()
}

proptest! {
    /// The index says what a scan says, after any changes and under every policy; and pruning until nothing is left
    /// ends, each step with less, with nothing that has ended.
    #[test]
    fn the_index_of_removals_is_a_scan(
        changes in proptest::collection::vec(change(), 0..60), ended in 0_u64..30, now in 0_u64..90,
    ) {
        let mut state = with(vec![]);
        let ended = Duration::from_secs(ended);
        let policies = [
            Agents::Keep,
            Agents::RemoveAfter { ended, even_if_they_cannot_reattest: false, batch: 100 },
            Agents::RemoveAfter { ended, even_if_they_cannot_reattest: true, batch: 100 },
        ];
        for change in changes {
            state.apply_change(&change).unwrap();
            for policy in policies {
                prop_assert_eq!(next_removal(&state, policy), scanned(&state, policy));
            }
        }
        for policy in policies {
            let mut state = state.clone();
            loop {
                let part = prune(&state, policy, at(now));
                let before = state.entry_count() + state.agent_count() + state.tokens().count();
                state.apply(&part).unwrap();
                let after = state.entry_count() + state.agent_count() + state.tokens().count();
                prop_assert_eq!(after, before - part.changes.len());
                if part.changes.is_empty() {
                    break;
                }
            }
            prop_assert!(scanned(&state, policy).is_none_or(|next| next > at(now)));
        }
    }
}
