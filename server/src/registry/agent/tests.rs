use std::collections::BTreeSet;
use std::time::Duration;

use proptest::prelude::*;
use spiffe::id::TrustDomain;
use spiffe::x509::Serial;

use super::*;
use crate::history::Position;

fn domain() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&domain(), path).unwrap()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn empty() -> State {
    State::empty(domain(), Position::start(crate::history::HistoryId([0; 16])))
}

fn applied(state: &State, part: &Part) -> State {
    let mut next = state.clone();
    next.apply(part).unwrap();
    next
}

fn attestation(serial: &str, token: Option<[u8; 32]>, can_reattest: bool) -> Attestation {
    Attestation {
        id: id("/spire/agent/join_token/t"),
        attestation_type: Arc::from(if can_reattest { "x509pop" } else { "join_token" }),
        selectors: SelectorSet::empty(),
        can_reattest,
        serial: serial.parse().unwrap(),
        expires_at: at(5_000),
        token,
        alias_entry_id: Arc::from("alias"),
    }
}

fn token(alias: Option<SpiffeId>) -> JoinToken {
    JoinToken { hash: [7; 32], expires_at: at(2_000), alias }
}

fn attested(serial: &str) -> State {
    applied(&empty(), &attest(&empty(), &attestation(serial, None, false), at(1_000)).unwrap())
}

fn pending(state: &State) -> Vec<String> {
    match &state.agent(&id("/spire/agent/join_token/t")).unwrap().standing {
        Standing::Active { pending, .. } => pending.iter().map(|held| held.serial.to_string()).collect(),
        Standing::Banned => panic!("banned"),
    }
}

#[test]
fn a_token_is_used_up_in_the_part_that_records_the_node_and_makes_its_alias() {
    let state = applied(&empty(), &create_token(&empty(), &token(Some(id("/node"))), at(1_000)).unwrap());
    let part = attest(&state, &attestation("1", Some([7; 32]), false), at(1_000)).unwrap();
    assert_eq!(part.changes.len(), 3);
    let state = applied(&state, &part);
    assert!(state.token(&[7; 32]).is_none());
    let alias = state.entry("alias").unwrap();
    assert_eq!(alias.parent_id, id("/spire/agent/join_token/t"));
    assert_eq!(alias.spiffe_id, id("/node"));
    assert_eq!(
        alias.selectors.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["spiffe_id:spiffe://example.org/spire/agent/join_token/t"]
    );
    assert_eq!(attest(&state, &attestation("2", Some([7; 32]), false), at(1_000)).unwrap_err(), Refusal::TokenUnknown);
    let gone = applied(&state, &evict(&state, &id("/spire/agent/join_token/t")).unwrap());
    assert!(gone.entry("alias").is_none());
    assert_eq!(gone.agent_count(), 0);
}

#[test]
fn an_ended_token_attests_nobody() {
    let state = applied(&empty(), &create_token(&empty(), &token(None), at(1_000)).unwrap());
    assert_eq!(attest(&state, &attestation("1", Some([7; 32]), false), at(2_000)).unwrap_err(), Refusal::TokenExpired);
    assert_eq!(create_token(&state, &token(None), at(1_999)).unwrap_err(), Refusal::TokenExists);
    // One that ended makes room for a new one.
    let part = create_token(&state, &token(None), at(2_000)).unwrap();
    assert_eq!(part, Part::new(vec![Change::PutToken(token(None))]));
}

#[test]
fn a_ban_survives_attestation_and_a_second_ban_is_no_error() {
    let state = attested("1");
    let agent = id("/spire/agent/join_token/t");
    let banned = applied(&state, &ban(&state, &agent).unwrap());
    assert_eq!(attest(&banned, &attestation("2", None, false), at(1_000)).unwrap_err(), Refusal::Banned);
    assert_eq!(renew(&banned, &agent, Serial::from(2), at(9_000)).unwrap_err(), Refusal::Banned);
    assert_eq!(promote(&banned, &agent, Serial::from(1), at(5_000)).unwrap_err(), Refusal::Banned);
    assert!(ban(&banned, &agent).unwrap().changes.is_empty());
    assert_eq!(ban(&empty(), &agent).unwrap_err(), Refusal::NotAttested);
    assert_eq!(evict(&empty(), &agent).unwrap_err(), Refusal::NotAttested);
}

#[test]
fn an_agent_that_can_attest_again_may_not_renew() {
    let state = applied(&empty(), &attest(&empty(), &attestation("1", None, true), at(1_000)).unwrap());
    let agent = id("/spire/agent/join_token/t");
    assert_eq!(renew(&state, &agent, Serial::from(2), at(9_000)).unwrap_err(), Refusal::MustReattest);
}

#[test]
fn the_three_newest_renewals_wait_and_the_first_used_clears_the_others() {
    let agent = id("/spire/agent/join_token/t");
    let mut state = attested("0");
    for serial in ["1", "2", "3", "4"] {
        state = applied(&state, &renew(&state, &agent, serial.parse().unwrap(), at(9_000)).unwrap());
    }
    assert_eq!(pending(&state), ["2", "3", "4"]);
    assert_eq!(state.agent(&agent).unwrap().serial(), Some(Serial::from(0)));
    assert_eq!(promote(&state, &agent, Serial::from(1), at(5_000)).unwrap_err(), Refusal::NotActive);
    let used = applied(&state, &promote(&state, &agent, Serial::from(3), at(5_000)).unwrap());
    assert_eq!(
        (used.agent(&agent).unwrap().serial(), used.agent(&agent).unwrap().expires_at),
        (Some(Serial::from(3)), at(9_000))
    );
    assert!(pending(&used).is_empty());
    for void in ["0", "2", "4"] {
        assert_eq!(promote(&used, &agent, void.parse().unwrap(), at(9_000)).unwrap_err(), Refusal::NotActive);
    }
    assert!(promote(&used, &agent, Serial::from(3), at(5_000)).unwrap().changes.is_empty());
}

proptest! {
    /// Whatever renewals and uses follow each other: exactly one serial is current, it was given to the agent, and no
    /// serial that was ever superseded comes back.
    #[test]
    fn superseded_serials_never_return(steps in proptest::collection::vec((any::<bool>(), 0_usize..6), 1..60)) {
        let agent = id("/spire/agent/join_token/t");
        let mut state = attested("0");
        let mut given = vec!["0".to_owned()];
        let mut superseded = BTreeSet::new();
        for (renews, pick) in steps {
            if renews {
                let serial = given.len().to_string();
                state = applied(&state, &renew(&state, &agent, serial.parse().unwrap(), at(9_000)).unwrap());
                given.push(serial);
            } else {
                let serial = given[given.len().saturating_sub(1 + pick)].clone();
                let before = state.agent(&agent).unwrap().serial().unwrap().to_string();
                match promote(&state, &agent, serial.parse().unwrap(), at(9_000)) {
                    Ok(part) => {
                        prop_assert!(!superseded.contains(&serial));
                        state = applied(&state, &part);
                        prop_assert_eq!(state.agent(&agent).unwrap().serial().unwrap().to_string(), serial.clone());
                        if before != serial { superseded.insert(before); }
                    }
                    Err(refusal) => prop_assert_eq!(refusal, Refusal::NotActive),
                }
            }
            prop_assert!(pending(&state).len() <= MAX_PENDING_SERIALS);
        }
    }
}

#[test]
fn the_first_certificate_of_a_lost_branch_that_is_used_counts_as_a_renewal() {
    let agent = id("/spire/agent/join_token/t");
    let history = |number| crate::history::HistoryId([number; 16]);
    // Certificate 1 is known until 5,000, and 2 was given to the agent and not used yet.
    let known = attested("1");
    let known = applied(&known, &renew(&known, &agent, Serial::from(2), at(6_000)).unwrap());
    let restored = applied(&known, &Part::new(vec![Change::BeginHistory(history(9))]));
    let later = |state: &State| promote(state, &agent, Serial::from(7), at(7_000));
    assert_eq!(later(&known).unwrap_err(), Refusal::NotActive);
    // One that ends no later than what is known may have been replaced before the backup.
    assert_eq!(promote(&restored, &agent, Serial::from(7), at(6_000)).unwrap_err(), Refusal::NotActive);
    let used = applied(&restored, &later(&restored).unwrap());
    assert_eq!(used.agent(&agent).unwrap().serial(), Some(Serial::from(7)));
    assert_eq!(used.agent(&agent).unwrap().expires_at, at(7_000));
    // Once: another one of the lost branch comes too late.
    assert_eq!(promote(&used, &agent, Serial::from(8), at(8_000)).unwrap_err(), Refusal::NotActive);
    for serial in [1, 2] {
        let used = applied(&restored, &promote(&restored, &agent, Serial::from(serial), at(6_000)).unwrap());
        assert_eq!(later(&used).is_err(), serial == 2, "the one in use changes nothing, a first use closes the door");
    }
    let renewed = applied(&restored, &renew(&restored, &agent, Serial::from(3), at(6_500)).unwrap());
    assert_eq!(later(&renewed).unwrap_err(), Refusal::NotActive);
    let banned = applied(&restored, &ban(&restored, &agent).unwrap());
    assert_eq!(later(&banned).unwrap_err(), Refusal::Banned);
    // The next restore opens it again, whatever was recorded since the last one.
    let again = applied(&renewed, &Part::new(vec![Change::BeginHistory(history(10))]));
    assert_eq!(applied(&again, &later(&again).unwrap()).agent(&agent).unwrap().serial(), Some(Serial::from(7)));
}
