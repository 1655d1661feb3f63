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
    for (trust_domain, path, expected) in [
        ("Example.org", "/a", IdError::TrustDomainCharacter),
        ("example.org", "a", IdError::PathWithoutSlash),
        ("example.org", "/a/", IdError::TrailingSlash),
        ("example.org", "//a", IdError::EmptySegment),
        ("example.org", "/a/../b", IdError::DotSegment),
        ("example.org", "/a?q=1", IdError::PathCharacter),
        ("example.org", "/a#f", IdError::PathCharacter),
        ("example.org:443", "/a", IdError::TrustDomainCharacter),
        ("u@example.org", "/a", IdError::TrustDomainCharacter),
        ("example.org", "/%61", IdError::PathCharacter),
        ("example.org", "/a\n", IdError::PathCharacter),
        ("", "/a", IdError::MissingTrustDomain),
        ("spiffe://example.org/x", "/a", IdError::TrustDomainCharacter),
    ] {
        match any_id(Some(&message(trust_domain, path))) {
            Err(WireError::Id(error)) => assert_eq!(error, expected, "{trust_domain:?} {path:?}"),
            other => panic!("{trust_domain:?} {path:?}: {other:?}"),
        }
    }
    let longest = format!("/{}", "a".repeat(2_048 - "spiffe://example.org/".len()));
    assert_eq!(any_id(Some(&message("example.org", &longest))).unwrap().path(), longest);
    let longer = any_id(Some(&message("example.org", &format!("{longest}b"))));
    assert!(matches!(longer, Err(WireError::Id(IdError::TooLong))), "{longer:?}");
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
