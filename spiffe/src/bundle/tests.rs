use super::*;
use crate::testing::*;

fn bundle(sequence: u64) -> Bundle {
    let mut bundle = Bundle::clone(&Issuer::new("k").bundle("other.test"));
    bundle.sequence = sequence;
    bundle
}

#[test]
fn h_58_d_04_fed_08_which_bundle_replaces_which() {
    let (stored, other) = (bundle(10), |sequence| bundle(sequence));
    let same = |sequence| Bundle { sequence, ..stored.clone() };
    assert_eq!(Bundle::supersede(&stored, same(10)), Supersede::Unchanged);
    let newer = other(11);
    assert_eq!(Bundle::supersede(&stored, newer.clone()), Supersede::Replace(newer));
    assert_eq!(Bundle::supersede(&stored, same(11)), Supersede::Replace(same(11)));
    assert_eq!(Bundle::supersede(&stored, other(9)), Supersede::Older { current: 10, fetched: 9 });
    let equal = other(10);
    assert_eq!(Bundle::supersede(&stored, equal.clone()), Supersede::ReplaceSameSequence(equal));
}

#[test]
fn without_a_sequence_the_latest_fetched_counts() {
    let stored = bundle(10);
    let unnumbered = bundle(0);
    assert_eq!(Bundle::supersede(&stored, unnumbered.clone()), Supersede::Replace(unnumbered.clone()));
    assert_eq!(Bundle::supersede(&unnumbered, stored.clone()), Supersede::Replace(stored.clone()));
    assert_eq!(Bundle::supersede(&stored, Bundle { sequence: 0, ..stored.clone() }), Supersede::Unchanged);
}

#[test]
fn what_was_learnt_otherwise_does_not_make_a_change() {
    let mut stored = bundle(10);
    let fetched = stored.clone();
    stored.jwt[0].expires_at = Some(now());
    assert_eq!(Bundle::supersede(&stored, fetched), Supersede::Unchanged);
}

#[test]
fn bundles_of_other_domains_are_refused() {
    let fetched = Bundle::empty(trust_domain("example.org"));
    assert_eq!(Bundle::supersede(&bundle(1), fetched), Supersede::OtherTrustDomain);
}

#[test]
fn pem_is_read_back() {
    let (one, two) = (Authority::root("example.org"), Authority::root("example.org"));
    let mut bundle = Bundle::clone(&one.bundle("example.org"));
    bundle.x509.extend(two.bundle("example.org").x509.clone());
    let text = bundle.to_pem();
    assert!(text.starts_with("-----BEGIN CERTIFICATE-----\n") && text.ends_with("-----END CERTIFICATE-----\n"));
    assert_eq!(text.matches("BEGIN CERTIFICATE").count(), 2);
    assert_eq!(Bundle::from_pem(trust_domain("example.org"), &text).unwrap(), bundle);
    let repeated = format!("# comment\n{text}\n{text}");
    assert_eq!(Bundle::from_pem(trust_domain("example.org"), &repeated).unwrap(), bundle);
}

#[test]
fn other_pem_is_refused() {
    let read = |text: &str| Bundle::from_pem(trust_domain("example.org"), text);
    assert!(matches!(read(""), Err(BundleError::NoPemBlock)));
    assert!(matches!(read("{}"), Err(BundleError::NoPemBlock)));
    let block = |kind: &str, bytes: &[u8]| ::pem::encode(&::pem::Pem::new(kind, bytes.to_vec()));
    assert!(matches!(read(&block("PRIVATE KEY", b"x")), Err(BundleError::PemKind)));
    assert!(matches!(read(&block("CERTIFICATE", b"x")), Err(BundleError::Certificate(X509Error::Malformed))));
}

#[test]
fn certificates_are_concatenated_for_the_workload_api() {
    let (one, two) = (Authority::root("example.org"), Authority::root("example.org"));
    let mut bundle = Bundle::clone(&one.bundle("example.org"));
    assert_eq!(bundle.x509_der_concatenated(), one.certificate);
    bundle.x509.extend(two.bundle("example.org").x509.clone());
    assert_eq!(bundle.x509_der_concatenated(), [&one.certificate[..], &two.certificate].concat());
    assert_eq!(Bundle::empty(trust_domain("example.org")).x509_der_concatenated(), Bytes::new());
}

#[test]
fn bundles_are_found_by_exact_domain() {
    let bundle = Authority::root("example.org").bundle("example.org");
    let map: BTreeMap<_, _> = [(bundle.trust_domain.clone(), Arc::clone(&bundle))].into();
    for source in [&map as &dyn Bundles, &bundle, &*bundle] {
        assert_eq!(source.bundle(&trust_domain("example.org")).as_deref(), Some(&*bundle));
        assert_eq!(source.bundle(&trust_domain("other.test")), None);
    }
}
