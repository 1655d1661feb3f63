use proptest::prelude::*;
use spiffe::id::SpiffeId;
use spiffe::selector::Selector;

use super::*;

fn trust_domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

fn offered(id: &str, revision: i64, created_at: i64, federates_with: &[&str]) -> OfferedEntry {
    let entry = Entry {
        id: id.into(),
        spiffe_id: SpiffeId::from_path(&trust_domain("example.org"), &format!("/{id}")).unwrap(),
        selectors: std::iter::once(Selector::parse("unix:uid:1").unwrap()).collect(),
        federates_with: federates_with.iter().map(|name| trust_domain(name)).collect(),
        admin: false,
        downstream: false,
        revision,
        created_at,
        store_svid: false,
        hint: "".into(),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        content: None,
    };
    OfferedEntry {
        id: id.into(),
        version: Version { revision, created_at, content: None },
        entry: Some(Arc::new(entry)),
    }
}

fn versions(all: &[(&str, i64, i64)]) -> BTreeMap<EntryId, Version> {
    all.iter()
        .map(|(id, revision, created_at)| {
            ((*id).into(), Version { revision: *revision, created_at: *created_at, content: None })
        })
        .collect()
}

fn view(entries: Vec<OfferedEntry>) -> View {
    let mut view = View::default();
    view.take(Step { entries, ..Step::default() });
    view
}

#[test]
fn new_changed_and_made_anew_entries_are_fetched_and_absent_ones_dropped() {
    let view = view(vec![
        offered("same", 1, 5, &[]),
        offered("changed", 1, 5, &[]),
        offered("anew", 0, 5, &[]),
        offered("gone", 1, 5, &[]),
        offered("untold", 1, 5, &[]),
    ]);
    let server = versions(&[("same", 1, 5), ("changed", 2, 5), ("anew", 0, 6), ("new", 0, 5), ("untold", 1, 0)]);
    let difference = view.compare(&server);
    assert_eq!(difference.fetch, ["anew".into(), "changed".into(), "new".into()] as [EntryId; 3]);
    assert_eq!(difference.drop, ["gone".into()] as [EntryId; 1]);
}

#[test]
fn federated_domains_follow_the_entries() {
    let view =
        view(vec![offered("a", 1, 5, &["x.org"]), offered("b", 1, 5, &["y.org"]), offered("c", 1, 5, &["z.org"])]);
    let step =
        Step { entries: vec![offered("a", 2, 5, &["w.org"])], removed_entries: vec!["b".into()], ..Step::default() };
    let federated: Vec<_> = view.federated_after(&step).into_iter().collect();
    assert_eq!(federated, [trust_domain("w.org"), trust_domain("z.org")]);
}

#[test]
fn what_cannot_be_used_is_held_by_name_only() {
    let mut view = view(vec![offered("a", 1, 5, &[])]);
    let unusable = OfferedEntry { entry: None, ..offered("a", 2, 5, &[]) };
    let update = view.take(Step { entries: vec![unusable], ..Step::default() });
    assert_eq!(update.removed_entries, ["a".into()] as [EntryId; 1]);
    assert!(update.entries.is_empty());
    assert!(view.compare(&versions(&[("a", 2, 5)])).fetch.is_empty());
}

#[test]
fn a_step_that_is_all_there_is_drops_the_rest() {
    let content = |byte| Some([byte; 32]);
    let pushed = |id: &str, byte| {
        let offered = offered(id, 1, 5, &[]);
        OfferedEntry { version: Version { content: content(byte), ..offered.version }, ..offered }
    };
    let bundle = |name: &str| OfferedBundle { trust_domain: trust_domain(name), digest: [1; 32], bundle: None };
    let mut view = View::default();
    let entries = vec![pushed("stays", 1), pushed("goes", 2)];
    view.take(Step { entries, bundles: vec![bundle("a.org"), bundle("b.org")], ..Step::default() });
    let step =
        Step { entries: vec![pushed("stays", 3)], bundles: vec![bundle("b.org")], anew: true, ..Step::default() };
    let update = view.take(step);
    assert_eq!(update.removed_entries, ["goes".into()] as [EntryId; 1]);
    assert_eq!(update.removed_bundles, [trust_domain("a.org")]);
    let mut digest = ViewDigest::default();
    digest.add_entry("stays", &[3; 32]);
    digest.add_bundle("b.org", &[1; 32]);
    assert_eq!(view.digest(), digest.finish());
}

#[test]
fn an_unchanged_bundle_is_not_handed_on() {
    let bundle = OfferedBundle {
        trust_domain: trust_domain("b.org"),
        digest: [1; 32],
        bundle: Some(Arc::new(Bundle::empty(trust_domain("b.org")))),
    };
    let mut view = View::default();
    let step = Step { bundles: vec![bundle], ..Step::default() };
    assert_eq!(view.take(step.clone()).bundles.len(), 1);
    assert!(view.take(step).is_empty());
}

prop_compose! {
    fn side()(all in proptest::collection::btree_map(0u8..20, (0i64..3, 1i64..3), 0..20)) -> BTreeMap<EntryId, Version> {
        all.into_iter()
            .map(|(id, (revision, created_at))| (format!("{id:02}").into(), Version { revision, created_at, content: None }))
            .collect()
    }
}

proptest! {
    /// Whatever is held and whatever the server has: after the difference is carried out, both are the same, and
    /// nothing was fetched that was there.
    #[test]
    fn a_poll_ends_at_what_the_server_has(held in side(), server in side()) {
        let all = |side: &BTreeMap<EntryId, Version>| {
            side.iter().map(|(id, version)| offered(id, version.revision, version.created_at, &[])).collect::<Vec<_>>()
        };
        let mut view = view(all(&held));
        let difference = view.compare(&server);
        for id in &difference.fetch {
            prop_assert!(held.get(id) != server.get(id));
        }
        let fetched: BTreeMap<_, _> = difference.fetch.iter().map(|id| (id.clone(), server[id])).collect();
        view.take(Step { entries: all(&fetched), removed_entries: difference.drop, ..Step::default() });
        let now: BTreeMap<_, _> = view.entries().map(|(id, version)| (id.clone(), version)).collect();
        prop_assert_eq!(&now, &server);
        prop_assert_eq!(view.digest(), super::tests::view(all(&server)).digest());
    }
}
