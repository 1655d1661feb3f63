use super::*;

fn refused(text: &str) -> IdError {
    SpiffeId::parse(text).expect_err(text)
}

fn accepted(text: &str) -> SpiffeId {
    let id = SpiffeId::parse(text).unwrap_or_else(|error| panic!("{text:?}: {error}"));
    assert_eq!(id.as_str(), text);
    id
}

/// `spiffe://example.org/` and 2027 times `b`: exactly as long as allowed.
fn longest() -> String {
    format!("spiffe://example.org/{}", "b".repeat(2027))
}

#[test]
fn id_01_scheme_is_spiffe() {
    for text in ["https://example.org/a", "spiffe:example.org/a", "spiffe:/example.org/a", "example.org/a"] {
        assert_eq!(refused(text), IdError::Scheme, "{text}");
    }
}

#[test]
fn id_02_trust_domain_is_not_empty() {
    for text in ["spiffe://", "spiffe:///a"] {
        assert_eq!(refused(text), IdError::MissingTrustDomain, "{text}");
    }
}

#[test]
fn id_03_no_query_and_no_fragment() {
    for end in ["a?x=1", "a#f", "a?", "a#"] {
        assert_eq!(refused(&format!("spiffe://example.org/{end}")), IdError::PathCharacter, "{end}");
    }
}

#[test]
fn id_04_id_05_id_08_no_user_info_port_or_escape_in_the_trust_domain() {
    for name in ["u@example.org", "@example.org", ":@example.org", "example.org:8443", "example.org:", "ex%61mple.org"]
    {
        assert_eq!(refused(&format!("spiffe://{name}/a")), IdError::TrustDomainCharacter, "{name}");
    }
}

#[test]
fn id_06_d_01_trust_domain_is_lower_case() {
    assert_eq!(refused("spiffe://Example.org/a"), IdError::TrustDomainCharacter);
}

#[test]
fn id_07_trust_domain_bytes() {
    for byte in 0..=127_u8 {
        let text = format!("spiffe://a{}a/x", char::from(byte));
        let legal = matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-' | b'_');
        match byte {
            b'/' => assert_eq!(accepted(&text).path(), "/a/x"),
            _ if legal => assert_eq!(accepted(&text).path(), "/x"),
            _ => assert_eq!(refused(&text), IdError::TrustDomainCharacter, "{byte}"),
        }
    }
    for text in ["spiffe://a\u{80}a/x", "spiffe://aÿa/x"] {
        assert_eq!(refused(text), IdError::TrustDomainCharacter);
    }
}

#[test]
fn id_09_ipv4_is_a_name_and_ipv6_is_not() {
    assert_eq!(accepted("spiffe://10.0.0.1/a").trust_domain().as_str(), "10.0.0.1");
    assert_eq!(refused("spiffe://[::1]/a"), IdError::TrustDomainCharacter);
}

#[test]
fn id_10_names_are_not_judged_as_dns_names() {
    for text in ["spiffe://my_td/a", "spiffe://1/a", "spiffe://a--b/a", "spiffe://a..b/a"] {
        accepted(text);
    }
}

#[test]
fn id_11_no_percent_encoding_in_the_path() {
    for path in ["/%41", "/a%2fb", "/%2e%2e/b"] {
        assert_eq!(refused(&format!("spiffe://example.org{path}")), IdError::PathCharacter, "{path}");
    }
}

#[test]
fn id_12_id_14_no_empty_segment_and_no_trailing_slash() {
    assert_eq!(refused("spiffe://example.org//a"), IdError::EmptySegment);
    assert_eq!(refused("spiffe://example.org/a//b"), IdError::EmptySegment);
    assert_eq!(refused("spiffe://example.org/"), IdError::TrailingSlash);
    assert_eq!(refused("spiffe://example.org/a/"), IdError::TrailingSlash);
}

#[test]
fn id_13_no_dot_segments() {
    for path in ["/.", "/..", "/a/../b", "/a/."] {
        assert_eq!(refused(&format!("spiffe://example.org{path}")), IdError::DotSegment, "{path}");
    }
    for path in ["/...", "/..a", "/.a", "/a."] {
        assert_eq!(accepted(&format!("spiffe://example.org{path}")).path(), path);
    }
}

#[test]
fn id_15_path_bytes() {
    for byte in 0..=127_u8 {
        let text = format!("spiffe://example.org/a{}a", char::from(byte));
        if byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b'_' | b'/') {
            accepted(&text);
        } else {
            assert_eq!(refused(&text), IdError::PathCharacter, "{byte}");
        }
    }
    assert_eq!(refused("spiffe://example.org/aÿa"), IdError::PathCharacter);
}

#[test]
fn id_17_id_18_d_02_length_of_an_id() {
    let id = longest();
    assert_eq!(id.len(), 2048);
    accepted(&id);
    let ftd255 = format!("spiffe://{}/{}", "a".repeat(255), "b".repeat(1783));
    assert_eq!(ftd255.len(), 2048);
    accepted(&ftd255);
    assert_eq!(refused(&format!("{id}b")), IdError::TooLong);
    let example = TrustDomain::parse("example.org").unwrap();
    let path = format!("/{}", "b".repeat(2027));
    assert_eq!(SpiffeId::from_path(&example, &path).unwrap().as_str(), id);
    assert_eq!(SpiffeId::from_path(&example, &format!("{path}b")), Err(IdError::TooLong));
}

#[test]
fn id_19_length_of_a_trust_domain() {
    assert!(TrustDomain::parse(&"a".repeat(255)).is_ok());
    assert_eq!(TrustDomain::parse(&"a".repeat(256)), Err(IdError::TrustDomainTooLong));
    assert_eq!(refused(&format!("spiffe://{}/a", "a".repeat(256))), IdError::TrustDomainTooLong);
}

#[test]
fn id_20_paths_differ_by_case() {
    assert_ne!(accepted("spiffe://example.org/A"), accepted("spiffe://example.org/a"));
}

#[test]
fn h_01_empty_string() {
    assert_eq!(refused(""), IdError::Empty);
    assert_eq!(TrustDomain::parse(""), Err(IdError::MissingTrustDomain));
}

#[test]
fn h_02_wrong_or_missing_scheme() {
    for text in ["spiffe:/example.org/a", "spiffe:example.org/a", "//example.org/a", "https://example.org/a"] {
        assert_eq!(refused(text), IdError::Scheme, "{text}");
    }
    for text in ["spiffe://", "spiffe:///a"] {
        assert_eq!(refused(text), IdError::MissingTrustDomain, "{text}");
    }
}

#[test]
fn h_03_upper_case() {
    assert_eq!(refused("SPIFFE://example.org/a"), IdError::Scheme);
    assert_eq!(refused("spiffe://EXAMPLE.org/a"), IdError::TrustDomainCharacter);
}

#[test]
fn h_04_invisible_characters_around() {
    for extra in ["\n", "\r\n", " ", "\t", "\0", "\u{200b}", "\u{feff}"] {
        assert_eq!(refused(&format!("spiffe://example.org/a{extra}")), IdError::PathCharacter, "{extra:?}");
        assert_eq!(refused(&format!("{extra}spiffe://example.org/a")), IdError::Scheme, "{extra:?}");
        assert_eq!(refused(&format!("spiffe://example.org{extra}")), IdError::TrustDomainCharacter, "{extra:?}");
    }
}

#[test]
fn h_05_percent_encoding() {
    for path in ["/%61", "/a%2Fb", "/%2e%2e/a", "/%00", "/%"] {
        assert_eq!(refused(&format!("spiffe://example.org{path}")), IdError::PathCharacter, "{path}");
    }
    assert_eq!(refused("spiffe://ex%61mple.org/a"), IdError::TrustDomainCharacter);
}

#[test]
fn h_06_dot_segments() {
    for path in ["/.", "/..", "/a/./b", "/a/../b", "/../a", "/a/.."] {
        assert_eq!(refused(&format!("spiffe://example.org{path}")), IdError::DotSegment, "{path}");
    }
    for path in ["/...", "/..a", "/a..", "/.a"] {
        accepted(&format!("spiffe://example.org{path}"));
    }
}

#[test]
fn h_07_slashes_queries_fragments() {
    for (path, error) in [
        ("/a/", IdError::TrailingSlash),
        ("//a", IdError::EmptySegment),
        ("/a//b", IdError::EmptySegment),
        ("/", IdError::TrailingSlash),
        ("/a?", IdError::PathCharacter),
        ("/a?q=1", IdError::PathCharacter),
        ("/a#", IdError::PathCharacter),
        ("/a#f", IdError::PathCharacter),
    ] {
        assert_eq!(refused(&format!("spiffe://example.org{path}")), error, "{path}");
    }
}

#[test]
fn h_08_user_info_and_ports() {
    for name in [
        "u:p@example.org",
        "@example.org",
        "example.org:443",
        "example.org:",
        "evil.test@example.org",
        "example.org@evil.test",
    ] {
        assert_eq!(refused(&format!("spiffe://{name}/a")), IdError::TrustDomainCharacter, "{name}");
    }
}

#[test]
fn h_09_other_alphabets_and_backslashes() {
    for text in
        ["spiffe://[::1]/a", "spiffe://bücher.test/a", "spiffe://ex\u{430}mple.org/a", "spiffe://example.org\\a"]
    {
        assert_eq!(refused(text), IdError::TrustDomainCharacter, "{text}");
    }
    for text in ["spiffe://example.org/\u{430}", "spiffe://example.org/a\\b"] {
        assert_eq!(refused(text), IdError::PathCharacter, "{text}");
    }
}

#[test]
fn h_10_characters_that_were_legal_once() {
    for character in "~+@:;,=*!$&'()".chars() {
        assert_eq!(refused(&format!("spiffe://example.org/{character}")), IdError::PathCharacter, "{character}");
    }
}

#[test]
fn h_11_hostile_lengths_are_refused_at_once() {
    accepted(&longest());
    assert_eq!(refused(&format!("{}b", longest())), IdError::TooLong);
    for text in [
        format!("spiffe://example.org/{}", "a".repeat(1 << 20)),
        format!("spiffe://example.org{}", "/a".repeat(1 << 20)),
    ] {
        let error = refused(&text);
        assert_eq!(error, IdError::TooLong);
        assert!(error.to_string().len() <= 256);
    }
    // Nothing of a long text is looked at: each of these has a fault that reading would find.
    let long = "?".repeat(1 << 20);
    let example = TrustDomain::parse("example.org").unwrap();
    assert_eq!(refused(&long), IdError::TooLong);
    assert_eq!(SpiffeId::parse_sharing(&long, &example), Err(IdError::TooLong));
    assert_eq!(SpiffeId::from_path(&example, &long), Err(IdError::TooLong));
    assert_eq!(TrustDomain::parse(&long), Err(IdError::TrustDomainTooLong));
    assert_eq!(TrustDomain::parse_lenient(&long), Err(IdError::TrustDomainTooLong));
    // And nothing of it is kept: an error is as large as its variants.
    assert_eq!(size_of::<IdError>(), 1);
}

#[test]
fn h_12_d_16_unusual_trust_domains() {
    for name in ["a..b", ".a", "a.", ".", "..", "-", "_", "10.0.0.1", "1"] {
        let parsed = TrustDomain::parse(name).unwrap();
        let own = match name {
            "a..b" | ".a" | "a." | "." | ".." => Err(IdError::EmptyLabel),
            _ => Ok(()),
        };
        assert_eq!(parsed.check_own(), own, "{name}");
        accepted(&format!("spiffe://{name}/a"));
    }
}

#[test]
fn trust_domains_in_both_forms() {
    for text in ["example.org", "spiffe://example.org"] {
        assert_eq!(TrustDomain::parse_lenient(text).unwrap().as_str(), "example.org");
    }
    for text in ["spiffe://example.org/", "spiffe://example.org/a", "spiffe://spiffe://example.org"] {
        assert_eq!(TrustDomain::parse_lenient(text), Err(IdError::TrustDomainCharacter), "{text}");
    }
    assert_eq!(TrustDomain::parse("spiffe://example.org"), Err(IdError::TrustDomainCharacter));
}

#[test]
fn reserved_and_special_paths() {
    let id = |path: &str| accepted(&format!("spiffe://example.org{path}"));
    assert!(id("/spire").is_reserved() && id("/spire/x").is_reserved());
    assert!(!id("/spirex").is_reserved() && !id("/a/spire").is_reserved() && !id("").is_reserved());
    assert!(id("/spire/agent/x").is_agent() && !id("/spire/agent").is_agent());
    let example = TrustDomain::parse("example.org").unwrap();
    assert_eq!(SpiffeId::server_of(&example), id("/spire/server"));
    assert!(id("/spire/server").is_server());
    assert_eq!(example.id(), id(""));
    assert_eq!(example.id().path(), "");
}

#[test]
fn sharing_does_not_change_the_judgement() {
    let example = TrustDomain::parse("example.org").unwrap();
    for text in
        ["spiffe://example.org/a", "spiffe://other.test/a", "spiffe://Example.org/a", "spiffe://example.org/", ""]
    {
        assert_eq!(SpiffeId::parse_sharing(text, &example), SpiffeId::parse(text), "{text}");
    }
}

#[test]
fn from_path_needs_a_slash() {
    let example = TrustDomain::parse("example.org").unwrap();
    assert_eq!(SpiffeId::from_path(&example, "a"), Err(IdError::PathWithoutSlash));
    assert_eq!(SpiffeId::from_path(&example, "").unwrap(), example.id());
}
