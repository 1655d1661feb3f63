use super::*;

const NOW: u64 = 1_700_000_000;

fn now() -> SystemTime {
    from_unix_seconds(NOW) + Duration::from_millis(750)
}

fn policy() -> Policy {
    Policy {
        trust_domain: TrustDomain::parse("example.org").unwrap(),
        ca_subject: CaSubject::default(),
        ca_ttl: Duration::from_secs(86_400),
        ca_key_type: KeyType::EcP256,
        jwt_key_type: Some(KeyType::EcP256),
        default_x509_svid_ttl: Duration::from_secs(3600),
        default_jwt_svid_ttl: Duration::from_secs(300),
        agent_ttl: None,
        jwt_issuer: None,
    }
}

fn request(id: &str) -> WorkloadProfile {
    WorkloadProfile { id: SpiffeId::parse(id).unwrap(), dns_names: Vec::new(), ttl: None, subject: None }
}

fn names(subject: &Subject) -> Vec<(Vec<u64>, &str)> {
    subject.attributes().iter().map(|attribute| (attribute.oid.clone(), attribute.value.as_str())).collect()
}

#[test]
fn workload_has_the_default_subject_lifetime_and_backdate() {
    let profile =
        workload(&request("spiffe://example.org/w"), &policy(), from_unix_seconds(NOW + 9000), now()).unwrap();
    assert_eq!(names(&profile.subject), [(COUNTRY.to_vec(), "US"), (ORGANIZATION.to_vec(), "SPIRE")]);
    assert_eq!(profile.usage, Usage::Svid);
    assert_eq!(profile.validity.not_before, from_unix_seconds(NOW - 10));
    assert_eq!(profile.validity.not_after, from_unix_seconds(NOW + 3600));
}

#[test]
fn first_dns_name_becomes_the_common_name() {
    let mut request = request("spiffe://example.org/w");
    request.dns_names = vec!["b.example".into(), "a.example".into()];
    let profile = workload(&request, &policy(), from_unix_seconds(NOW + 9000), now()).unwrap();
    assert_eq!(names(&profile.subject).last().unwrap(), &(COMMON_NAME.to_vec(), "b.example"));
    assert_eq!(profile.dns_names, vec!["b.example".into(), "a.example".into()] as Vec<Arc<str>>);
}

#[test]
fn common_name_of_a_given_subject_is_replaced_in_its_place() {
    // SEQUENCE { SET { CN "x" }, SET { O "org" } }
    let der = [
        0x30, 0x1a, 0x31, 0x0a, 0x30, 0x08, 0x06, 0x03, 0x55, 0x04, 0x03, 0x0c, 0x01, b'x', 0x31, 0x0c, 0x30, 0x0a,
        0x06, 0x03, 0x55, 0x04, 0x0a, 0x0c, 0x03, b'o', b'r', b'g',
    ];
    let mut request = request("spiffe://example.org/w");
    request.subject = Some(Bytes::copy_from_slice(&der));
    let limit = from_unix_seconds(NOW + 9000);
    let profile = workload(&request, &policy(), limit, now()).unwrap();
    assert_eq!(names(&profile.subject), [(COMMON_NAME.to_vec(), "x"), (ORGANIZATION.to_vec(), "org")]);
    request.dns_names = vec!["a.example".into()];
    let profile = workload(&request, &policy(), limit, now()).unwrap();
    assert_eq!(names(&profile.subject), [(COMMON_NAME.to_vec(), "a.example"), (ORGANIZATION.to_vec(), "org")]);
    request.subject = Some(Bytes::from_static(&[0x30, 0x00]));
    request.dns_names = Vec::new();
    let profile = workload(&request, &policy(), limit, now()).unwrap();
    assert_eq!(profile.subject, Subject::svid());
    request.subject = Some(Bytes::from_static(b"no name"));
    assert_eq!(workload(&request, &policy(), limit, now()), Err(ProfileError::Subject));
}

#[test]
fn lifetime_is_capped_by_the_authority_and_ends_with_it() {
    let mut request = request("spiffe://example.org/w");
    request.ttl = Some(Duration::from_secs(7200));
    let profile = workload(&request, &policy(), from_unix_seconds(NOW + 60), now()).unwrap();
    assert_eq!(profile.validity.not_after, from_unix_seconds(NOW + 60));
    let at_its_end = workload(&request, &policy(), from_unix_seconds(NOW), now());
    assert_eq!(at_its_end, Err(ProfileError::AuthorityExpired));
    request.ttl = Some(Duration::ZERO);
    let profile = workload(&request, &policy(), from_unix_seconds(NOW + 9000), now()).unwrap();
    assert_eq!(profile.validity.not_after, from_unix_seconds(NOW + 3600), "zero is the default");
}

#[test]
fn foreign_ids_and_trust_domain_ids_are_refused() {
    let limit = from_unix_seconds(NOW + 9000);
    let foreign = workload(&request("spiffe://other.org/w"), &policy(), limit, now());
    assert_eq!(foreign, Err(ProfileError::ForeignTrustDomain { trust_domain: "example.org".to_owned() }));
    assert_eq!(workload(&request("spiffe://example.org"), &policy(), limit, now()), Err(ProfileError::NoPath));
}

#[test]
fn agent_ttl_overrides_the_default() {
    let mut policy = policy();
    let id = SpiffeId::parse("spiffe://example.org/spire/agent/join_token/t").unwrap();
    let limit = from_unix_seconds(NOW + 90_000);
    assert_eq!(agent(&id, &policy, limit, now()).unwrap().validity.not_after, from_unix_seconds(NOW + 3600));
    policy.agent_ttl = Some(Duration::from_secs(60));
    assert_eq!(agent(&id, &policy, limit, now()).unwrap().validity.not_after, from_unix_seconds(NOW + 60));
    assert_eq!(server(&policy, limit, now()).unwrap().id.as_str(), "spiffe://example.org/spire/server");
}

#[test]
fn authority_has_its_serial_number_in_the_subject() {
    let mut policy = policy();
    let profile = authority(&policy, "77", now()).unwrap();
    assert_eq!(
        names(&profile.subject),
        [(COUNTRY.to_vec(), "US"), (ORGANIZATION.to_vec(), "SPIFFE"), (SERIAL_NUMBER.to_vec(), "77")]
    );
    assert_eq!(profile.usage, Usage::Authority);
    assert_eq!(profile.id.as_str(), "spiffe://example.org");
    assert_eq!(profile.validity.not_after, from_unix_seconds(NOW + 86_400));
    policy.ca_subject.common_name = "authority".to_owned();
    let profile = authority(&policy, "78", now()).unwrap();
    assert_eq!(names(&profile.subject), [(COMMON_NAME.to_vec(), "authority"), (SERIAL_NUMBER.to_vec(), "78")]);
}

#[test]
fn downstream_replaces_the_unit_and_keeps_the_rest() {
    let own = authority(&policy(), "77", now()).unwrap().subject;
    let limit = from_unix_seconds(NOW + 100);
    let profile = downstream(&own, 1, None, &policy(), limit, now()).unwrap();
    assert_eq!(names(&profile.subject).last().unwrap(), &(ORGANIZATIONAL_UNIT.to_vec(), "DOWNSTREAM-1"));
    assert_eq!(profile.validity.not_after, limit);
    let again = downstream(&profile.subject, 2, Some(Duration::from_secs(5)), &policy(), limit, now()).unwrap();
    assert_eq!(again.subject.attributes().len(), 4);
    assert_eq!(names(&again.subject).last().unwrap(), &(ORGANIZATIONAL_UNIT.to_vec(), "DOWNSTREAM-2"));
    assert_eq!(again.validity.not_after, from_unix_seconds(NOW + 5));
}

#[test]
fn jwt_claims_to_the_byte() {
    let mut policy = policy();
    let mut request = JwtProfile {
        id: SpiffeId::parse("spiffe://example.org/w").unwrap(),
        audience: vec!["vault".to_owned()],
        ttl: None,
        token_id: None,
    };
    let limit = from_unix_seconds(NOW + 9000);
    let claims = jwt(&request, &policy, limit, now()).unwrap();
    assert_eq!(
        serde_json::to_string(&claims).unwrap(),
        r#"{"aud":["vault"],"exp":1700000300,"iat":1700000000,"sub":"spiffe://example.org/w"}"#
    );
    policy.jwt_issuer = Some("https://issuer".to_owned());
    request.token_id = Some("id".to_owned());
    let claims = jwt(&request, &policy, from_unix_seconds(NOW + 9), now()).unwrap();
    assert_eq!(
        serde_json::to_string(&claims).unwrap(),
        r#"{"aud":["vault"],"exp":1700000009,"iat":1700000000,"iss":"https://issuer","jti":"id","sub":"spiffe://example.org/w"}"#
    );
    request.audience.push(String::new());
    assert_eq!(jwt(&request, &policy, limit, now()), Err(ProfileError::Audience));
    request.audience.clear();
    assert_eq!(jwt(&request, &policy, limit, now()), Err(ProfileError::Audience));
}

#[test]
fn a_lifetime_beyond_all_dates_is_refused() {
    let mut policy = policy();
    policy.ca_ttl = Duration::MAX;
    assert_eq!(authority(&policy, "1", now()), Err(ProfileError::Lifetime));
}
