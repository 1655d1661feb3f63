use super::*;
use crate::history::{HistoryId, Position};

fn own() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn id(path: &str) -> SpiffeId {
    SpiffeId::from_path(&own(), path).unwrap()
}

fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

fn now() -> SystemTime {
    at(1000) + Duration::from_millis(700)
}

fn start() -> State {
    State::empty(own(), Position::start(HistoryId([1; 16])))
}

fn selector(text: &str) -> Selector {
    Selector::parse(text).unwrap()
}

fn draft() -> Draft {
    Draft {
        spiffe_id: Some(id("/web")),
        parent_id: Some(id("/spire/agent/x")),
        selectors: Some(vec![selector("unix:uid:1"), selector("unix:gid:1")]),
        ..Draft::default()
    }
}

fn new(id: &str, draft: Draft) -> NewEntry {
    NewEntry::new(id.into(), draft.check(&own()).unwrap()).unwrap()
}

fn made(state: &mut State, id: &str, draft: Draft) -> Arc<Entry> {
    let (part, entry) = create(state, &new(id, draft), now()).unwrap();
    state.apply(&part).unwrap();
    entry
}

fn refused(draft: Draft) -> EntryError {
    draft.check(&own()).and_then(|update| NewEntry::new("id".into(), update)).unwrap_err()
}

#[test]
fn a_new_entry_has_the_defaults() {
    let mut state = start();
    let entry = made(&mut state, "one", draft());
    assert_eq!(
        *entry,
        Entry {
            id: "one".into(),
            ordinal: 1,
            revision: 0,
            spiffe_id: id("/web"),
            parent_id: id("/spire/agent/x"),
            selectors: [selector("unix:gid:1"), selector("unix:uid:1")].into_iter().collect(),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            federates_with: vec![],
            admin: false,
            downstream: false,
            expires_at: None,
            dns_names: vec![],
            store_svid: false,
            hint: "".into(),
            created_at: at(1000),
            disable_x509_svid_prefetch: false,
            jwt_svid_include_jti: false,
            content: crate::state::model::Content::default(),
        }
    );
    assert_eq!(state.entry("one"), Some(&entry));
    assert_eq!(made(&mut state, "two", Draft { spiffe_id: Some(id("/db")), ..draft() }).ordinal, 2);
}

#[test]
fn every_rule_has_its_refusal_and_text() {
    let foreign = SpiffeId::parse("spiffe://other.org/web").unwrap();
    let dns = |names: &[&str]| Some(names.iter().map(|name| name.to_string()).collect());
    let cases = [
        (Draft { parent_id: Some(foreign.clone()), ..draft() }, "invalid parent ID", Stage::Reading),
        (Draft { parent_id: Some(own().id()), ..draft() }, "invalid parent ID", Stage::Reading),
        (Draft { parent_id: None, ..draft() }, "invalid parent ID", Stage::Reading),
        (Draft { spiffe_id: Some(foreign), ..draft() }, "invalid spiffe ID", Stage::Reading),
        (Draft { spiffe_id: Some(own().id()), ..draft() }, "invalid spiffe ID", Stage::Reading),
        (Draft { spiffe_id: Some(id("/spire")), ..draft() }, "invalid spiffe ID", Stage::Reading),
        (Draft { spiffe_id: Some(id("/spire/agent/x")), ..draft() }, "invalid spiffe ID", Stage::Reading),
        (Draft { selectors: Some(vec![]), ..draft() }, "selector list is empty", Stage::Reading),
        (Draft { selectors: None, ..draft() }, "selector list is empty", Stage::Reading),
        (
            Draft { selectors: Some(vec![selector("a:1"), selector("b:1"), selector("a:1")]), ..draft() },
            "selector \"a:1\" is given twice",
            Stage::Reading,
        ),
        (Draft { dns_names: dns(&["ok", ""]), ..draft() }, "invalid DNS name", Stage::Reading),
        (Draft { dns_names: dns(&["a", "b", "a"]), ..draft() }, "DNS name \"a\" is given twice", Stage::Reading),
        (
            Draft { hint: Some("h".repeat(1025)), ..draft() },
            "hint is too long, max length is 1024 characters",
            Stage::Reading,
        ),
        (
            Draft { x509_svid_ttl: Some(-1), ..draft() },
            "invalid registration entry: X509SvidTtl is not set",
            Stage::Writing,
        ),
        (
            Draft { jwt_svid_ttl: Some(i32::MIN), ..draft() },
            "invalid registration entry: JwtSvidTtl is not set",
            Stage::Writing,
        ),
        (
            Draft { selectors: Some(vec![selector("a:1"), selector("b:1")]), store_svid: Some(true), ..draft() },
            "invalid registration entry: selector types must be the same when store SVID is enabled",
            Stage::Writing,
        ),
        (
            Draft {
                store_svid: Some(true),
                attributes: Some(Attributes { disable_x509_svid_prefetch: true, jwt_svid_include_jti: false }),
                ..draft()
            },
            "specifying cache behaviour is incompatible with storable SVIDs",
            Stage::Writing,
        ),
    ];
    for (draft, text, stage) in cases {
        let error = refused(draft.clone());
        assert_eq!((error.to_string().as_str(), error.stage()), (text, stage), "{draft:?}");
    }
    assert_eq!(refused(Draft { dns_names: dns(&["*"]), ..draft() }), EntryError::DnsName(DnsNameError::WildcardPlace));
}

#[test]
fn ids_of_entries() {
    for id in ["a", "A-z.0_9", &"x".repeat(255)] {
        assert_eq!(check_id(id), Ok(()));
    }
    assert_eq!(check_id(&"x".repeat(256)), Err(EntryError::IdLength));
    for id in ["", "a b", "a/b", "\u{fc}", "a:b"] {
        assert_eq!(check_id(id), Err(EntryError::IdCharacters), "{id}");
    }
}

#[test]
fn what_spire_accepts_is_accepted() {
    let long_path = format!("/{}", "x".repeat(2000));
    let kept = Draft {
        spiffe_id: Some(id(&long_path)),
        parent_id: Some(id("/spire/server")),
        x509_svid_ttl: Some(0),
        jwt_svid_ttl: Some(60),
        expires_at: Some(-5),
        federates_with: Some(vec![own(), own()]),
        dns_names: Some(vec!["b".into(), "a".into(), "*.a".into()]),
        store_svid: Some(true),
        hint: Some("h".repeat(1024)),
        ..draft()
    };
    let update = kept.check(&own()).unwrap();
    assert_eq!(update.expires_at, Some(Some(SystemTime::UNIX_EPOCH - Duration::from_secs(5))));
    assert_eq!((update.x509_svid_ttl, update.jwt_svid_ttl), (Some(None), Some(Some(Duration::from_secs(60)))));
    assert_eq!(update.federates_with, Some(vec![own()]));
    assert_eq!(update.dns_names.unwrap(), vec!["b".into(), "a".into(), "*.a".into()] as Vec<Arc<str>>);
}

#[test]
fn a_similar_entry_is_told_before_anything_else() {
    let mut state = start();
    let first = made(&mut state, "one", draft());
    let unknown = TrustDomain::parse("unknown.org").unwrap();
    let twin = Draft { hint: Some("other".into()), admin: Some(true), federates_with: Some(vec![unknown]), ..draft() };
    for id in ["one", "two"] {
        assert_eq!(create(&state, &new(id, twin.clone()), now()), Err(Refusal::Similar(Arc::clone(&first))));
    }
    // A different selector set is no twin, be it larger or smaller.
    let larger = vec![selector("unix:uid:1"), selector("unix:gid:1"), selector("unix:gid:2")];
    let smaller = vec![selector("unix:uid:1")];
    for (number, selectors) in [larger, smaller].into_iter().enumerate() {
        made(&mut state, &format!("more-{number}"), Draft { selectors: Some(selectors), ..draft() });
    }
    // Nor is one that has ended.
    let ends = Draft { spiffe_id: Some(id("/ends")), expires_at: Some(2000), ..draft() };
    made(&mut state, "ends", ends.clone());
    assert!(matches!(create(&state, &new("next", ends.clone()), at(1999)), Err(Refusal::Similar(_))));
    let (part, entry) = create(&state, &new("next", ends.clone()), at(2000)).unwrap();
    assert_eq!(part.changes, vec![Change::PutEntry(entry)]);
}

#[test]
fn an_id_is_taken_until_its_entry_ends() {
    let mut state = start();
    made(&mut state, "one", Draft { expires_at: Some(2000), ..draft() });
    let other = new("one", Draft { spiffe_id: Some(id("/db")), ..draft() });
    assert_eq!(create(&state, &other, at(1999)), Err(Refusal::IdTaken));
    let (part, entry) = create(&state, &other, at(2000)).unwrap();
    assert_eq!(part.changes, vec![Change::RemoveEntry("one".into()), Change::PutEntry(Arc::clone(&entry))]);
    state.apply(&part).unwrap();
    assert_eq!(state.entries().collect::<Vec<_>>(), vec![&entry]);
}

#[test]
fn federation_needs_a_bundle() {
    let mut state = start();
    let other = TrustDomain::parse("other.org").unwrap();
    let federated = Draft { federates_with: Some(vec![other.clone()]), ..draft() };
    let refusal = create(&state, &new("one", federated.clone()), now()).unwrap_err();
    assert_eq!(refusal, Refusal::NoBundle(other.clone()));
    assert_eq!(refusal.to_string(), "unable to find federated bundle \"spiffe://other.org\"");
    let bundle = Change::PutBundleInfo { trust_domain: other.clone(), sequence: 1, refresh_hint: None };
    state.apply(&Part::new(vec![bundle])).unwrap();
    assert_eq!(made(&mut state, "one", federated).federates_with, vec![other.clone()]);
    let missing = TrustDomain::parse("missing.org").unwrap();
    let more = Draft { federates_with: Some(vec![other, missing.clone()]), ..Draft::default() };
    let refusal = update(&state, "one", &more.check(&own()).unwrap(), now()).unwrap_err();
    assert_eq!(refusal, Refusal::NoBundle(missing));
}

#[test]
fn an_update_changes_what_is_given_and_always_the_revision() {
    let mut state = start();
    let before = made(&mut state, "one", Draft { hint: Some("old".into()), x509_svid_ttl: Some(60), ..draft() });
    let nothing = Draft::default().check(&own()).unwrap();
    let (part, after) = update(&state, "one", &nothing, now()).unwrap();
    assert_eq!(*after, Entry { revision: 1, ..Entry::clone(&before) });
    state.apply(&part).unwrap();
    let some = Draft {
        hint: Some(String::new()),
        x509_svid_ttl: Some(0),
        parent_id: Some(id("/spire/server")),
        expires_at: Some(5000),
        attributes: Some(Attributes { disable_x509_svid_prefetch: true, jwt_svid_include_jti: true }),
        ..Draft::default()
    };
    let (_, after) = update(&state, "one", &some.check(&own()).unwrap(), now()).unwrap();
    let expected = Entry {
        revision: 2,
        hint: "".into(),
        x509_svid_ttl: None,
        parent_id: id("/spire/server"),
        expires_at: Some(at(5000)),
        disable_x509_svid_prefetch: true,
        jwt_svid_include_jti: true,
        ..Entry::clone(&before)
    };
    assert_eq!(*after, expected);
}

#[test]
fn an_update_is_judged_by_what_the_entry_becomes() {
    let mut state = start();
    made(&mut state, "one", Draft { selectors: Some(vec![selector("a:1"), selector("b:1")]), ..draft() });
    let store = Draft { store_svid: Some(true), ..Draft::default() }.check(&own()).unwrap();
    assert_eq!(update(&state, "one", &store, now()), Err(Refusal::Rule(EntryError::StoreTypes)));
    // It may become a twin of another one.
    made(&mut state, "two", Draft { spiffe_id: Some(id("/two")), selectors: Some(vec![selector("a:1")]), ..draft() });
    let twin = Draft {
        spiffe_id: Some(id("/web")),
        selectors: Some(vec![selector("b:1"), selector("a:1")]),
        ..Draft::default()
    };
    let (part, two) = update(&state, "two", &twin.check(&own()).unwrap(), now()).unwrap();
    assert_eq!((&*two.id, &two.spiffe_id, two.selectors.len()), ("two", &id("/web"), 2));
    assert_eq!(part, Part::new(vec![Change::PutEntry(two)]));
}

#[test]
fn what_is_not_there_or_has_ended_is_not_found() {
    let mut state = start();
    made(&mut state, "one", Draft { expires_at: Some(2000), ..draft() });
    let nothing = Draft::default().check(&own()).unwrap();
    assert_eq!(remove(&state, "one", at(1999)), Ok(Part::new(vec![Change::RemoveEntry("one".into())])));
    for (id, now) in [("one", at(2000)), ("none", now())] {
        assert_eq!(update(&state, id, &nothing, now), Err(Refusal::NotFound));
        assert_eq!(remove(&state, id, now), Err(Refusal::NotFound));
    }
    let part = remove(&state, "one", now()).unwrap();
    state.apply(&part).unwrap();
    assert_eq!(state.entry_count(), 0);
}

#[test]
fn parents_share_their_text() {
    let mut state = start();
    let first = made(&mut state, "one", draft());
    let second = made(&mut state, "two", Draft { spiffe_id: Some(id("/db")), ..draft() });
    assert!(std::ptr::eq(first.parent_id.as_str(), second.parent_id.as_str()));
}
