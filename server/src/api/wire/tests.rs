use proptest::prelude::*;

use super::*;

fn own() -> TrustDomain {
    TrustDomain::parse("example.org").unwrap()
}

fn message(trust_domain: &str, path: &str) -> types::Spiffeid {
    types::Spiffeid { trust_domain: trust_domain.to_owned(), path: path.to_owned() }
}

#[test]
fn ids_are_refused_in_known_words() {
    let workload = |trust_domain, path| workload_id(Some(&message(trust_domain, path)), &own());
    assert_eq!(workload("example.org", "/a").unwrap().as_str(), "spiffe://example.org/a");
    assert_eq!(workload("spiffe://example.org", "/a").unwrap().as_str(), "spiffe://example.org/a");
    let text = |result: Result<SpiffeId, WireError>| result.unwrap_err().to_string();
    assert_eq!(text(workload_id(None, &own())), "request must specify SPIFFE ID");
    assert_eq!(
        text(workload("other.test", "/a")),
        "\"spiffe://other.test/a\" is not a member of trust domain \"example.org\""
    );
    assert_eq!(
        text(workload("example.org", "")),
        "\"spiffe://example.org\" is not a member of trust domain \"example.org\"; path is empty"
    );
    assert_eq!(
        text(workload("example.org", "/spire")),
        "\"spiffe://example.org/spire\" is not a workload in trust domain \"example.org\"; \
         path is in the reserved namespace"
    );
    assert_eq!(
        text(agent_id(Some(&message("example.org", "/a")), &own())),
        "\"spiffe://example.org/a\" is not an agent in trust domain \"example.org\"; \
         path is not in the agent namespace"
    );
}

#[test]
fn h_06_h_07_h_08_hostile_ids_are_refused() {
    for (trust_domain, path) in [
        ("Example.org", "/a"),
        ("example.org", "a"),
        ("example.org", "/a/"),
        ("example.org", "//a"),
        ("example.org", "/a/../b"),
        ("example.org", "/a?q=1"),
        ("example.org", "/a#f"),
        ("example.org:443", "/a"),
        ("u@example.org", "/a"),
        ("example.org", "/%61"),
        ("example.org", "/a\n"),
        ("", "/a"),
        ("spiffe://example.org/x", "/a"),
    ] {
        let parsed = any_id(Some(&message(trust_domain, path)));
        assert!(matches!(parsed, Err(WireError::Id(_))), "{trust_domain:?} {path:?}: {parsed:?}");
    }
    let longest = format!("/{}", "a".repeat(2_048 - "spiffe://example.org/".len()));
    assert!(any_id(Some(&message("example.org", &longest))).is_ok());
    assert!(any_id(Some(&message("example.org", &format!("{longest}b")))).is_err());
}

#[test]
fn times_of_every_size_are_kept() {
    for moment in [0, 1, -1, 1_700_000_000, i64::from(i32::MIN), i64::MAX, i64::MIN] {
        assert_eq!(seconds(time(moment)), moment);
    }
    assert_eq!(lifetime(0), None);
    assert_eq!(lifetime(-5), None);
    assert_eq!(lifetime(60), Some(Duration::from_secs(60)));
}

proptest! {
    /// Whatever the size of the pages, a client that follows the tokens sees every row once, in order, and then an
    /// empty page.
    #[test]
    fn pages_cover_a_list_exactly(
        rows in proptest::collection::btree_set(1_u64..500, 0..60),
        size in 1_i32..20,
    ) {
        let rows: Vec<u64> = rows.into_iter().collect();
        let (mut token, mut seen) = (String::new(), Vec::new());
        loop {
            let page = page(size, &token).unwrap().unwrap();
            let after = rows.iter().filter(|row| **row > page.after).map(|row| (*row, row));
            let (taken, next) = cut(after, Some(page));
            prop_assert_eq!(taken.is_empty(), next.is_empty());
            seen.extend(taken.into_iter().copied());
            token = next;
            if token.is_empty() { break; }
        }
        prop_assert_eq!(seen, rows);
    }

    #[test]
    fn page_tokens_are_numbers_or_refused(token in ".{0,12}") {
        let parsed = page(1, &token);
        match token.parse::<u64>() {
            Ok(after) => prop_assert_eq!(parsed.unwrap(), Some(Page { size: 1, after })),
            Err(_) if token.is_empty() => prop_assert_eq!(parsed.unwrap(), Some(Page { size: 1, after: 0 })),
            Err(_) => prop_assert!(parsed.is_err()),
        }
        prop_assert_eq!(page(0, &token).unwrap(), None);
        prop_assert_eq!(page(-1, &token).unwrap(), None);
    }
}
