use std::time::Duration;

use spiffe::selector::Selector;

use super::*;
use crate::history::{HistoryId, Position};
use crate::state::model::{Change, Part};

fn own() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&own(), path).unwrap()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn set(texts: &[&str]) -> SelectorSet {
    texts.iter().map(|text| Selector::parse(text).unwrap()).collect()
}

fn entry(ordinal: u64) -> Entry {
    Entry {
        id: format!("entry-{ordinal}").into(),
        ordinal,
        revision: 0,
        spiffe_id: id(&format!("/workload/{}", ordinal % 3)),
        parent_id: id(&format!("/node/{}", ordinal % 2)),
        selectors: set(&["a:1"]),
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

fn with(entries: Vec<Entry>) -> State {
    let mut state = State::empty(own(), Position::start(HistoryId([1; 16])));
    state.apply(&Part::new(entries.into_iter().map(|entry| Change::PutEntry(Arc::new(entry))).collect())).unwrap();
    state
}

fn ordinals(state: &State, filter: &Filter) -> Vec<u64> {
    let page = entries(state, filter, Paging::Everything, at(50));
    assert_eq!(page.next, None);
    assert_eq!(count(state, filter, at(50)), page.entries.len());
    page.entries.iter().map(|entry| entry.ordinal).collect()
}

#[test]
fn pages_follow_the_order_of_creation_and_end_with_an_empty_one() {
    let state = with((1..=7).map(entry).collect());
    let mut after = 0;
    let mut seen = Vec::new();
    loop {
        let page = entries(&state, &Filter::default(), Paging::Page { size: 3, after }, at(50));
        seen.push(page.entries.iter().map(|entry| entry.ordinal).collect::<Vec<_>>());
        match page.next {
            Some(next) => after = next,
            None => break,
        }
    }
    assert_eq!(seen, vec![vec![1, 2, 3], vec![4, 5, 6], vec![7], vec![]]);
    // A page is full as long as rows are left, whatever the filter drops.
    let filter = Filter { parent_id: Some(id("/node/1")), ..Filter::default() };
    let page = entries(&state, &filter, Paging::Page { size: 3, after: 1 }, at(50));
    assert_eq!(page.entries.iter().map(|entry| entry.ordinal).collect::<Vec<_>>(), vec![3, 5, 7]);
    assert_eq!(page.next, Some(7));
}

#[test]
fn filters_are_all_to_be_met() {
    let mut downstream = entry(4);
    downstream.downstream = true;
    downstream.hint = "internal".into();
    let mut ended = entry(6);
    ended.expires_at = Some(at(50));
    let state = with(vec![entry(1), entry(2), entry(3), downstream, entry(5), ended]);
    let of = |filter: Filter| ordinals(&state, &filter);
    assert_eq!(of(Filter::default()), [1, 2, 3, 4, 5]);
    assert_eq!(of(Filter { parent_id: Some(id("/node/0")), ..Filter::default() }), [2, 4]);
    assert_eq!(of(Filter { spiffe_id: Some(id("/workload/1")), ..Filter::default() }), [1, 4]);
    let both = Filter { spiffe_id: Some(id("/workload/1")), parent_id: Some(id("/node/1")), ..Filter::default() };
    assert_eq!(of(both), [1]);
    assert_eq!(of(Filter { hint: Some("internal".into()), ..Filter::default() }), [4]);
    assert_eq!(of(Filter { hint: Some(String::new()), ..Filter::default() }), [1, 2, 3, 4, 5]);
    assert_eq!(of(Filter { downstream: true, ..Filter::default() }), [4]);
}

#[test]
fn selectors_match_in_four_ways() {
    let sets: [&[&str]; 4] = [&["a:1"], &["a:1", "b:1"], &["a:1", "b:1", "c:1"], &["c:1"]];
    let state =
        with((1..).zip(sets).map(|(ordinal, texts)| Entry { selectors: set(texts), ..entry(ordinal) }).collect());
    let of = |how| ordinals(&state, &Filter { selectors: Some((set(&["a:1", "b:1"]), how)), ..Filter::default() });
    assert_eq!(of(Match::Exact), [2]);
    assert_eq!(of(Match::Subset), [1, 2]);
    assert_eq!(of(Match::Superset), [2, 3]);
    assert_eq!(of(Match::Any), [1, 2, 3]);
}

#[test]
fn federation_matches_in_four_ways_and_never_without_federation() {
    let sets: [&[&str]; 5] = [&[], &["a.org"], &["b.org", "a.org"], &["a.org", "b.org", "c.org"], &["c.org"]];
    let federated = |ordinal, names: &[&str]| Entry {
        federates_with: names.iter().map(|name| domain(name)).collect(),
        ..entry(ordinal)
    };
    let state = with((1..).zip(sets).map(|(ordinal, names)| federated(ordinal, names)).collect());
    let of = |how| {
        let wanted = [domain("a.org"), domain("b.org")].into();
        ordinals(&state, &Filter { federates_with: Some((wanted, how)), ..Filter::default() })
    };
    assert_eq!(of(Match::Exact), [3]);
    assert_eq!(of(Match::Subset), [2, 3]);
    assert_eq!(of(Match::Superset), [3, 4]);
    assert_eq!(of(Match::Any), [2, 3, 4]);
}
