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

fn run(mut state: State, mut decide: impl FnMut(&State) -> Step) -> (State, usize) {
    for steps in 1.. {
        let step = decide(&state);
        assert!(step.part.changes.len() <= 100);
        state.apply(&step.part).unwrap();
        if step.last {
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
    assert_eq!(again, Step { part: Part::unchanged(), last: true });
    assert_eq!(append(&empty(), &other, &ders, &[]).unwrap_err(), Refusal::Absent);
}

proptest! {
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
        prop_assert_eq!(set(&state, &wanted, Fields::ALL), Step { part: Part::unchanged(), last: true });
    }
}
