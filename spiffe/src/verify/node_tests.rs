use super::*;
use crate::der::wrap;
use crate::testing::*;

/// Go's zero time.
fn year_one() -> Vec<u8> {
    wrap(0x18, b"00010101000000Z")
}

/// A node certificate as no extension but key usage makes it.
fn node() -> Template {
    let mut template = Template::new("node", new_key().public_key().spki_der());
    template.extensions = vec![key_usage(DIGITAL_SIGNATURE)];
    template
}

fn trusted(certificates: &[&Bytes]) -> Vec<X509Authority> {
    certificates.iter().map(|der| X509Authority { der: (*der).clone(), tainted: false }).collect()
}

/// Judges one node certificate below one root.
fn judge(
    root: impl FnOnce(Template) -> Template,
    leaf: impl FnOnce(Template) -> Template,
) -> Result<VerifiedPath, NodePathError> {
    let root = Authority::root_with("pki.test", root);
    let leaf = root.sign(&leaf(node()));
    node_path(&[leaf], &trusted(&[&root.certificate]), now())
}

fn leaf_fault(outcome: Result<VerifiedPath, NodePathError>) -> Fault {
    match outcome {
        Err(NodePathError::Leaf(fault)) => fault,
        other => panic!("expected a fault of the leaf, got {other:?}"),
    }
}

fn authority_fault(outcome: Result<VerifiedPath, NodePathError>) -> Fault {
    match outcome {
        Err(NodePathError::Authority(fault)) => fault,
        other => panic!("expected a fault of the authority, got {other:?}"),
    }
}

fn same(template: Template) -> Template {
    template
}

#[test]
fn dates_before_1970_are_read_as_1970() {
    let from_year_one = |mut template: Template| {
        template.not_before = year_one();
        template
    };
    assert!(judge(from_year_one, from_year_one).is_ok());
    let certificate = Certificate::parse(Authority::root_with("pki.test", from_year_one).certificate).unwrap();
    assert_eq!(certificate.not_before, UNIX_EPOCH);
    let until_year_one = |mut template: Template| {
        (template.not_before, template.not_after) = (year_one(), year_one());
        template
    };
    assert_eq!(leaf_fault(judge(same, until_year_one)), Fault::Expired);
    assert_eq!(authority_fault(judge(until_year_one, same)), Fault::Expired);
}

#[test]
fn serial_number_zero_is_a_serial_number() {
    let zero = |mut template: Template| {
        template.serial = vec![0];
        template
    };
    assert!(judge(zero, zero).is_ok());
}

#[test]
fn a_trusted_certificate_is_its_own_path_authority_or_not() {
    let stranger = Authority::root("pki.test");
    for template in [node(), node().with(basic(true, None)), node().with(basic(false, None))] {
        let leaf = stranger.sign(&template);
        let path = node_path(std::slice::from_ref(&leaf), &trusted(&[&leaf]), now()).unwrap();
        assert_eq!(path.authorities, Vec::<Bytes>::new());
    }
    let over = stranger.sign(&node().valid(NOW - 10, NOW - 1));
    let outcome = node_path(std::slice::from_ref(&over), &trusted(&[&over]), now());
    assert_eq!(leaf_fault(outcome), Fault::Expired);
    // An authority that is no trusted one attests as a node, too, if a trusted one has signed it.
    assert!(judge(same, |leaf| leaf.with(basic(true, None))).is_ok());
}

#[test]
fn each_fault_is_told_by_its_name() {
    assert_eq!(leaf_fault(judge(same, |leaf| leaf.valid(NOW + 1, NOW + 9))), Fault::NotYetValid);
    assert_eq!(leaf_fault(judge(same, |leaf| leaf.valid(NOW - 9, NOW - 1))), Fault::Expired);
    let unknown = || Extension(UNKNOWN, true, vec![5, 0]);
    assert_eq!(leaf_fault(judge(same, |leaf| leaf.with(unknown()))), Fault::CriticalExtension);
    assert_eq!(authority_fault(judge(|root| root.with(unknown()), same)), Fault::CriticalExtension);
    assert_eq!(authority_fault(judge(|root| root.valid(NOW - 9, NOW - 1), same)), Fault::Expired);
    assert_eq!(authority_fault(judge(|root| root.with(basic(false, None)), same)), Fault::NotAuthority);
    assert_eq!(authority_fault(judge(|root| root.without(BASIC), same)), Fault::NotAuthority);
    assert_eq!(authority_fault(judge(|root| root.with(key_usage(CRL_SIGN)), same)), Fault::NoCertSign);
    assert!(judge(|root| root.without(KEY_USAGE), same).is_ok());
    // The inner algorithm is the outer one, so it is the signature that does not fit.
    let by_sha1 = judge(same, |mut leaf| {
        leaf.algorithm = ECDSA_SHA1;
        leaf
    });
    assert_eq!(authority_fault(by_sha1), Fault::Signature);
    let (ours, theirs) = (Authority::root("pki.test"), Authority::root("pki.test"));
    let outcome = node_path(&[theirs.sign(&node())], &trusted(&[&ours.certificate]), now());
    assert_eq!(authority_fault(outcome), Fault::Signature);
    let other = Authority::root("other.test");
    let outcome = node_path(&[theirs.sign(&node())], &trusted(&[&other.certificate]), now());
    assert!(matches!(outcome, Err(NodePathError::UnknownAuthority)), "{outcome:?}");
    assert!(matches!(node_path(&[], &[], now()), Err(NodePathError::NoCertificate)));
    let outcome = node_path(&[Bytes::from_static(b"x")], &[], now());
    assert!(matches!(outcome, Err(NodePathError::Unreadable(X509Error::Malformed))), "{outcome:?}");
}

#[test]
fn path_lengths_count_the_certificates_between() {
    let judge = |limit: u8, between: usize| {
        let root = Authority::root_with("pki.test", |root| root.with(basic(true, Some(limit))));
        let mut authorities: Vec<Authority> = Vec::new();
        for number in 0..between {
            let above = authorities.last().unwrap_or(&root);
            authorities.push(above.intermediate(&format!("intermediate {number}"), same));
        }
        let mut chain = vec![authorities.last().unwrap_or(&root).sign(&node())];
        chain.extend(authorities.iter().rev().map(|authority| authority.certificate.clone()));
        node_path(&chain, &trusted(&[&root.certificate]), now())
    };
    assert_eq!(judge(1, 1).unwrap().authorities.len(), 2);
    assert_eq!(authority_fault(judge(0, 1)), Fault::PathLength);
    assert_eq!(judge(0, 0).unwrap().authorities.len(), 1);
    assert_eq!(authority_fault(judge(1, 2)), Fault::PathLength);
}

#[test]
fn every_path_counts_and_a_ring_ends() {
    let (first, second) = (Authority::root("first.test"), Authority::root("second.test"));
    let key = new_key();
    let template = Template::authority("between", "spiffe://pki.test", &key);
    let between = Authority { name: "between".to_owned(), certificate: first.sign(&template), key };
    let crossed = second.sign(&template);
    // The two roots sign each other, which is a ring.
    let ring = [
        second.sign(&Template::authority(&first.name, "spiffe://first.test", &first.key)),
        first.sign(&Template::authority(&second.name, "spiffe://second.test", &second.key)),
    ];
    let chain = [vec![between.sign(&node()), between.certificate.clone(), crossed.clone()], ring.to_vec()].concat();
    let roots = trusted(&[&first.certificate, &second.certificate]);
    let mut found = node_path(&chain, &roots, now()).unwrap().authorities;
    found.sort();
    let mut all = vec![between.certificate.clone(), crossed, first.certificate.clone(), second.certificate.clone()];
    all.extend(ring);
    all.sort();
    assert_eq!(found, all);
}

#[test]
fn a_crowd_of_intermediates_of_one_name_is_not_searched_to_the_end() {
    let stranger = Authority::root("stranger.test");
    let root = Authority::root("pki.test");
    let crowd: Vec<Authority> = (0..16)
        .map(|_| {
            let key = new_key();
            let template = Template::authority("crowd", "spiffe://pki.test", &key);
            Authority { name: "crowd".to_owned(), certificate: template.signed("crowd", &stranger.key), key }
        })
        .collect();
    let last = crowd.last().unwrap();
    let mut chain = vec![last.sign(&node())];
    chain.extend(crowd.iter().map(|authority| authority.certificate.clone()));
    let outcome = node_path(&chain, &trusted(&[&root.certificate]), now());
    assert_eq!(authority_fault(outcome), Fault::Signature);
    // All of one key: each leads to all others.
    let key = new_key();
    let alike: Vec<Bytes> = (0..16)
        .map(|number| {
            let mut template = Template::authority("crowd", &format!("spiffe://pki.test/{number}"), &key);
            template.serial = vec![number + 1];
            template.signed("crowd", &key)
        })
        .collect();
    let leaf = node().signed("crowd", &key);
    let chain = [vec![leaf], alike].concat();
    let outcome = node_path(&chain, &trusted(&[&root.certificate]), now());
    assert!(matches!(outcome, Err(NodePathError::TooManyWays)), "{outcome:?}");
}

#[test]
fn old_roots_of_version_1_are_authorities_if_they_are_trusted() {
    let first_version = |mut template: Template| {
        template.version = None;
        template.extensions.clear();
        template
    };
    assert!(judge(first_version, same).is_ok());
    let root = Authority::root("pki.test");
    let between = root.intermediate("between", first_version);
    let chain = [between.sign(&node()), between.certificate.clone()];
    assert_eq!(authority_fault(node_path(&chain, &trusted(&[&root.certificate]), now())), Fault::NotAuthority);
}

#[test]
fn name_constraints_are_judged_as_for_svids() {
    let permitted = |name: &str| {
        let subtree = wrap(0xa0, &seq(&[&wrap(0x82, name.as_bytes())]));
        Extension(NAME_CONSTRAINTS, true, seq(&[&subtree]))
    };
    let named = |leaf: Template| leaf.with(names(&[(DNS, b"node.pki.test")]));
    assert!(judge(|root| root.with(permitted("pki.test")), named).is_ok());
    let outcome = judge(|root| root.with(permitted("other.test")), named);
    assert!(matches!(outcome, Err(NodePathError::Constrained(VerifyError::NameConstraints(_)))), "{outcome:?}");
}
