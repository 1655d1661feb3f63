use std::time::{Duration, SystemTime};

use proptest::prelude::*;
use spiffe::id::SpiffeId;
use spiffe::selector::{Selector, SelectorSet};

use super::*;
use crate::history::Position;

fn domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

fn empty() -> State {
    State::empty(domain("example.org"), Position::start(crate::history::HistoryId([0; 16])))
}

/// What the steps of a removal have left: ties, authorities, the bundle itself.
fn ties(state: &State) -> usize {
    let other = domain("other.test");
    let held = state.bundle(&other).map_or(0, |bundle| bundle.x509.len() + bundle.jwt.len() + 1);
    state.entries().filter(|entry| entry.federates_with.contains(&other)).count() + held
}

/// The records that a part writes, as the committer counts them.
fn writes(state: &State, part: &Part) -> usize {
    let writes = part.changes.iter().map(|change| crate::history::record::writes_of(state, &part.scope, change));
    let writes: Vec<_> = writes.flatten().collect();
    assert!(writes.iter().map(crate::history::Write::encoded_len).sum::<usize>() <= 256 * 1024);
    writes.len()
}

/// Takes steps to the end; each must be small enough to be written, and leave less than the one before.
fn run(mut state: State, mut decide: impl FnMut(&State) -> Step) -> (State, usize) {
    let mut rest = usize::MAX;
    for steps in 1.. {
        let step = decide(&state);
        let written = writes(&state, &step.part);
        assert!(written <= 100, "{written} records in one part");
        assert!(step.rest < rest, "{} left after {rest}", step.rest);
        rest = step.rest;
        state.apply(&step.part).unwrap();
        if rest == 0 {
            return (state, steps);
        }
    }
    unreachable!()
}

fn bundle(x509: impl IntoIterator<Item = u32>, jwt: impl IntoIterator<Item = u32>, sequence: u64) -> Bundle {
    Bundle {
        x509: x509
            .into_iter()
            .map(|n| X509Authority { der: n.to_be_bytes().to_vec().into(), tainted: false })
            .collect(),
        jwt: jwt
            .into_iter()
            .map(|n| JwtAuthority {
                key_id: n.to_string().into(),
                public_key: Bytes::new(),
                expires_at: None,
                tainted: false,
            })
            .collect(),
        refresh_hint: Some(Duration::from_secs(60)),
        sequence,
        ..Bundle::empty(domain("other.test"))
    }
}

fn held(state: &State) -> Bundle {
    let mut held = Bundle::clone(state.bundle(&domain("other.test")).unwrap());
    held.x509.sort_by(|a, b| a.der.cmp(&b.der));
    held.jwt.sort_by_key(|key| key.key_id.parse::<u32>().unwrap());
    held
}

fn federating(state: &mut State, count: u64) {
    for ordinal in 1..=count {
        let id = SpiffeId::from_path(&domain("example.org"), &format!("/w{ordinal}")).unwrap();
        let entry = Entry {
            id: format!("e{ordinal}").into(),
            ordinal: state.next_ordinal(),
            revision: 0,
            spiffe_id: id.clone(),
            parent_id: id,
            selectors: SelectorSet::from_iter([Selector::new("unix", "uid:1").unwrap()]),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            federates_with: vec![domain("other.test"), domain("third.test")],
            admin: false,
            downstream: false,
            expires_at: None,
            dns_names: Vec::new(),
            store_svid: false,
            hint: "".into(),
            created_at: SystemTime::UNIX_EPOCH,
            disable_x509_svid_prefetch: false,
            jwt_svid_include_jti: false,
            content: crate::state::model::Content::default(),
        };
        state.apply(&Part::new(vec![Change::PutEntry(Arc::new(entry))])).unwrap();
    }
}

#[test]
fn a_bundle_of_any_size_is_set_in_steps_and_updated_by_field() {
    let wanted = bundle(0..200, 0..30, 7);
    let (state, steps) = run(empty(), |state| set(state, &wanted, Fields::ALL));
    assert_eq!((held(&state), steps), (wanted.clone(), 3));
    let only_jwt = Fields { x509: false, jwt: true, refresh_hint: false, sequence: false };
    let (state, steps) = run(state, |state| update(state, &bundle([], 5..6, 9), only_jwt).unwrap());
    assert_eq!((held(&state), steps), (bundle(0..200, 5..6, 7), 1));
    assert_eq!(create(&state, &wanted, false).unwrap_err(), Refusal::Exists);
    assert_eq!(update(&empty(), &wanted, Fields::ALL).unwrap_err(), Refusal::Absent);
}

#[test]
fn a_removal_is_forbidden_by_entries_or_takes_them_along_or_releases_them() {
    let (mut state, _) = run(empty(), |state| set(state, &bundle([1], [], 1), Fields::ALL));
    federating(&mut state, 120);
    let other = domain("other.test");
    assert_eq!(remove(&state, &other, Federated::Forbid).unwrap_err(), Refusal::InUse { entries: 120 });
    let (removed, steps) = run(state.clone(), |state| remove(state, &other, Federated::Remove).unwrap());
    assert_eq!((removed.entry_count(), removed.bundle(&other).is_none(), steps), (0, true, 2));
    let (released, _) = run(state, |state| remove(state, &other, Federated::Release).unwrap());
    assert_eq!((released.entry_count(), released.bundle(&other).is_none()), (120, true));
    assert!(released.entries().all(|entry| entry.federates_with == [domain("third.test")] && entry.revision == 1));
    assert_eq!(remove(&empty(), &other, Federated::Remove).unwrap_err(), Refusal::Absent);
}

#[test]
fn appending_what_is_there_leaves_the_sequence_number() {
    let (state, _) = run(empty(), |state| set(state, &bundle([1, 2], [1], 4), Fields::ALL));
    let other = domain("other.test");
    let add = bundle([2, 3, 3], [1, 2], 0);
    let ders: Vec<Bytes> = add.x509.iter().map(|authority| authority.der.clone()).collect();
    let (state, _) = run(state, |state| append(state, &other, &ders, &add.jwt).unwrap());
    assert_eq!(held(&state), bundle([1, 2, 3], [1, 2], 5));
    let again = append(&state, &other, &ders, &add.jwt).unwrap();
    assert_eq!(again, Step { part: Part::unchanged(), rest: 0 });
    assert_eq!(append(&empty(), &other, &ders, &[]).unwrap_err(), Refusal::Absent);
}

#[test]
fn the_same_key_id_twice_does_not_go_on_for_ever() {
    let mut wanted = bundle([], 0..100, 1);
    let firsts = wanted.clone();
    wanted.jwt.extend(
        bundle([], 0..100, 1)
            .jwt
            .into_iter()
            .map(|authority| JwtAuthority { public_key: Bytes::from_static(b"another"), ..authority }),
    );
    let (state, steps) = run(empty(), |state| set(state, &wanted, Fields::ALL));
    assert_eq!((held(&state), steps), (firsts, 2));
    let other = domain("other.test");
    let refused = append(&state, &other, &[], &wanted.jwt[100..]).unwrap_err();
    assert_eq!(refused, Refusal::KeyIdTaken { key_id: "0".into() });
    assert_eq!(refused.to_string(), "key ID \"0\" belongs to another key of the bundle");
}

#[test]
fn large_certificates_make_small_parts() {
    let mut wanted = bundle(0..60, [], 1);
    for (n, authority) in wanted.x509.iter_mut().enumerate() {
        authority.der = Bytes::from(vec![u8::try_from(n).unwrap(); 20_000]);
    }
    let (state, steps) = run(empty(), |state| set(state, &wanted, Fields::ALL));
    assert_eq!((held(&state).x509.len(), steps), (60, 5));
}

#[test]
fn a_bundle_of_500_keys_is_removed_with_its_5000_entries_in_every_mode() {
    let (state, _) = run(empty(), |state| set(state, &bundle(0..250, 0..250, 1), Fields::ALL));
    let other = domain("other.test");
    let (removed, steps) = run(state.clone(), |state| remove(state, &other, Federated::Forbid).unwrap());
    assert_eq!((removed.bundle(&other), steps), (None, 6));
    let mut state = state;
    federating(&mut state, 5000);
    assert_eq!(remove(&state, &other, Federated::Forbid).unwrap_err(), Refusal::InUse { entries: 5000 });
    let (removed, steps) = run(state.clone(), |state| remove(state, &other, Federated::Remove).unwrap());
    assert_eq!((removed.bundle(&other), removed.entry_count(), steps), (None, 0, 56));
    let (released, steps) = run(state, |state| remove(state, &other, Federated::Release).unwrap());
    assert_eq!((released.bundle(&other), released.entry_count(), ties(&released), steps), (None, 5000, 0, 56));
}

proptest! {
    // A case takes many steps, each checked record by record.
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// From any start a removal ends, in the mode's own way, and what it says is left is what is left.
    #[test]
    fn removing_always_arrives(
        x509 in 0_u32..260, jwt in 0_u32..260, entries in 0_u64..260, mode in 0_u8..3,
    ) {
        let (mut state, _) = run(empty(), |state| set(state, &bundle(0..x509, 0..jwt, 1), Fields::ALL));
        let mode = [Federated::Forbid, Federated::Remove, Federated::Release][usize::from(mode)];
        let entries = if mode == Federated::Forbid { 0 } else { entries };
        federating(&mut state, entries);
        let other = domain("other.test");
        let (state, _) = run(state, |state| {
            let step = remove(state, &other, mode).unwrap();
            let mut after = state.clone();
            after.apply(&step.part).unwrap();
            assert_eq!(step.rest, ties(&after));
            step
        });
        let kept = if mode == Federated::Release { usize::try_from(entries).unwrap() } else { 0 };
        prop_assert_eq!((state.bundle(&other), ties(&state), state.entry_count()), (None, 0, kept));
    }

    /// From any bundle to any other, the steps end at exactly what was wanted.
    #[test]
    fn setting_always_arrives(
        from in proptest::collection::btree_set(0_u32..400, 0..250),
        to in proptest::collection::btree_set(0_u32..400, 0..250),
        keys in proptest::collection::btree_set(0_u32..50, 0..50),
    ) {
        let (state, _) = run(empty(), |state| set(state, &bundle(from.clone(), [3, 4], 1), Fields::ALL));
        let wanted = bundle(to, keys, 2);
        let (state, _) = run(state, |state| set(state, &wanted, Fields::ALL));
        prop_assert_eq!(held(&state), wanted.clone());
        prop_assert_eq!(set(&state, &wanted, Fields::ALL), Step { part: Part::unchanged(), rest: 0 });
    }
}
