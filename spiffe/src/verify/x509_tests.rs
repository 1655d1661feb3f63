use std::collections::HashMap;
use std::sync::Arc;

use super::*;
use crate::bundle::Bundle;
use crate::id::TrustDomain;
use crate::testing::*;
use crate::x509::{KeyType, PrivateKey};

const ID: &str = "spiffe://example.org/a";

fn verify_as(role: PeerRole, chain: &[Bytes], bundle: &Arc<Bundle>) -> Result<VerifiedChain, VerifyError> {
    x509_chain(chain, bundle, role, now())
}

/// Verifies one leaf of a fresh root, as client and as server, which have to agree.
fn judge(change: impl FnOnce(Template) -> Template) -> Result<VerifiedChain, VerifyError> {
    let root = Authority::root("example.org");
    let leaf = root.sign(&change(Template::leaf(ID, &new_key())));
    let bundle = root.bundle("example.org");
    let client = verify_as(PeerRole::Client, std::slice::from_ref(&leaf), &bundle);
    let server = verify_as(PeerRole::Server, &[leaf], &bundle);
    let told = |outcome: &Result<VerifiedChain, VerifyError>| format!("{outcome:?}");
    assert_eq!(told(&client), told(&server));
    client
}

fn leaf_fault(change: impl FnOnce(Template) -> Template) -> X509Error {
    match judge(change) {
        Err(VerifyError::Leaf(error)) => error,
        other => panic!("expected a fault of the leaf, got {other:?}"),
    }
}

fn path_fault(outcome: Result<VerifiedChain, VerifyError>) -> webpki::Error {
    match outcome {
        Err(VerifyError::Path(error)) => error,
        other => panic!("expected a fault of the path, got {other:?}"),
    }
}

#[test]
fn a_good_leaf_is_described() {
    let root = Authority::root("example.org");
    let key = new_key();
    let leaf = root.sign(&Template::leaf(ID, &key));
    let verified = verify_as(PeerRole::Client, std::slice::from_ref(&leaf), &root.bundle("example.org")).unwrap();
    assert_eq!(verified.id.as_str(), ID);
    assert_eq!(verified.chain, [leaf]);
    assert_eq!(verified.serial.to_string(), "4660");
    assert_eq!((verified.not_before, verified.not_after), (at(NOW - 3600), at(NOW + 3600)));
    assert_eq!(verified.public_key, *key.public_key());
}

#[test]
fn x509_04_other_names_may_be_present() {
    let names = names(&[(DNS, b"a.example.org"), (URI, ID.as_bytes()), (0x87, &[10, 0, 0, 1])]);
    assert!(judge(|leaf| leaf.with(names)).is_ok());
}

#[test]
fn x509_05_x509_13_an_authority_is_no_peer() {
    let root = Authority::root("example.org");
    let bundle = root.bundle("example.org");
    for role in [PeerRole::Client, PeerRole::Server] {
        let outcome = verify_as(role, std::slice::from_ref(&root.certificate), &bundle);
        assert!(matches!(outcome, Err(VerifyError::Leaf(X509Error::NoPath))), "{outcome:?}");
    }
}

#[test]
fn x509_07_subject_may_be_absent() {
    let outcome = judge(|mut leaf| {
        leaf.subject.clear();
        let mut name = uri(ID);
        name.1 = true;
        leaf.with(name)
    });
    assert_eq!(outcome.unwrap().id.as_str(), ID);
}

#[test]
fn x509_12_three_levels_validate_against_the_root_alone() {
    let root = Authority::root("example.org");
    let middle = root.intermediate("middle", |template| template);
    let low = middle.intermediate("low", |template| template);
    let chain = [low.leaf(ID), low.certificate.clone(), middle.certificate.clone()];
    let verified = verify_as(PeerRole::Client, &chain, &root.bundle("example.org")).unwrap();
    assert_eq!(verified.root, root.certificate);
    let missing = verify_as(PeerRole::Client, &chain[..2], &root.bundle("example.org"));
    assert_eq!(path_fault(missing), webpki::Error::UnknownIssuer);
}

#[test]
fn x509_23_extended_key_usage_may_be_critical_or_absent() {
    assert!(judge(|leaf| leaf.with(Extension(EKU, true, seq(&[SERVER_AUTH, CLIENT_AUTH])))).is_ok());
    assert!(judge(|leaf| leaf.without(EKU)).is_ok());
}

#[test]
fn x509_25_roots_are_judged_too() {
    let cases: [(&str, Authority); 5] = [
        ("expired", Authority::root_with("example.org", |root| root.valid(NOW - 3600, NOW - 1))),
        ("not yet valid", Authority::root_with("example.org", |root| root.valid(NOW + 1, NOW + 3600))),
        ("no authority", Authority::root_with("example.org", |root| root.with(basic(false, None)))),
        ("no basic constraints", Authority::root_with("example.org", |root| root.without(BASIC))),
        ("may not sign", Authority::root_with("example.org", |root| root.with(key_usage(CRL_SIGN)))),
    ];
    for (case, root) in cases {
        let outcome = verify_as(PeerRole::Client, &[root.leaf(ID)], &root.bundle("example.org"));
        match case {
            "expired" | "not yet valid" => {
                assert!(matches!(outcome, Err(VerifyError::AuthorityTime)), "{case}: {outcome:?}");
            }
            _ => assert!(matches!(outcome, Err(VerifyError::NoAuthority)), "{case}: {outcome:?}"),
        }
    }
}

#[test]
fn x509_28_scheme_is_spiffe() {
    let error = leaf_fault(|leaf| leaf.with(uri("https://example.org/a")));
    assert_eq!(error, X509Error::Id(crate::id::IdError::Scheme));
}

#[test]
fn x509_37_bnd_10_a_bundle_without_authorities_validates_nothing() {
    let root = Authority::root("example.org");
    let empty = Arc::new(Bundle::empty(trust_domain("example.org")));
    let outcome = verify_as(PeerRole::Client, &[root.leaf(ID)], &empty);
    assert!(matches!(outcome, Err(VerifyError::NoAuthority)), "{outcome:?}");
}

#[test]
fn id_23_every_bit_of_name_and_key_is_signed() {
    let root = Authority::root("example.org");
    let bundle = root.bundle("example.org");
    let leaf = root.leaf(ID);
    let certificate = crate::x509::Certificate::parse(leaf.clone()).unwrap();
    let find = |needle: &[u8]| leaf.windows(needle.len()).position(|window| window == needle).unwrap();
    for (start, length) in [(find(ID.as_bytes()), ID.len()), (find(&certificate.spki_der), certificate.spki_der.len())]
    {
        for position in start..start + length {
            let mut flipped = leaf.to_vec();
            flipped[position] ^= 1;
            match verify_as(PeerRole::Client, &[flipped.into()], &bundle) {
                // What can still be read is no longer what was signed, or speaks for another domain.
                Err(VerifyError::Path(webpki::Error::InvalidSignatureForPublicKey)) => {}
                Err(VerifyError::Leaf(_) | VerifyError::UnknownTrustDomain) => {}
                other => panic!("byte {position}: {other:?}"),
            }
        }
    }
}

#[test]
fn h_13_two_uri_sans() {
    for pair in [[ID, "spiffe://example.org/b"], [ID, "https://x.test/"], [ID, ID]] {
        let entries = pair.map(|uri| (URI, uri.as_bytes()));
        let error = leaf_fault(|leaf| leaf.with(names(&entries)));
        assert_eq!(error, X509Error::UriCount { count: 2 }, "{pair:?}");
    }
}

#[test]
fn h_14_no_uri_san() {
    let error = leaf_fault(|mut leaf| {
        leaf.subject = ID.to_owned();
        leaf.without(SAN)
    });
    assert_eq!(error, X509Error::UriCount { count: 0 });
    let error = leaf_fault(|leaf| leaf.with(names(&[(DNS, ID.as_bytes())])));
    assert_eq!(error, X509Error::UriCount { count: 0 });
    // otherName { 1.2.3, [0] UTF8String }
    let other =
        [b"\x06\x02\x2a\x03".as_slice(), &crate::der::wrap(0xa0, &crate::der::wrap(0x0c, ID.as_bytes()))].concat();
    let error = leaf_fault(|leaf| leaf.with(names(&[(0xa0, &other)])));
    assert_eq!(error, X509Error::UriCount { count: 0 });
}

#[test]
fn h_15_x509_26_leaf_marked_as_authority() {
    assert_eq!(leaf_fault(|leaf| leaf.with(basic(true, None))), X509Error::LeafIsAuthority);
    assert_eq!(leaf_fault(|leaf| leaf.with(basic(false, Some(0)))), X509Error::LeafIsAuthority);
}

#[test]
fn h_16_x509_27_leaf_key_usage() {
    assert_eq!(leaf_fault(|leaf| leaf.with(key_usage(DIGITAL_SIGNATURE | CERT_SIGN))), X509Error::LeafMaySign);
    assert_eq!(leaf_fault(|leaf| leaf.with(key_usage(DIGITAL_SIGNATURE | CRL_SIGN))), X509Error::LeafMaySign);
    assert_eq!(leaf_fault(|leaf| leaf.without(KEY_USAGE)), X509Error::NoDigitalSignature);
    assert_eq!(leaf_fault(|leaf| leaf.with(key_usage(KEY_ENCIPHERMENT))), X509Error::NoDigitalSignature);
    let mut uncritical = key_usage(DIGITAL_SIGNATURE);
    uncritical.1 = false;
    assert!(judge(|leaf| leaf.with(uncritical)).is_ok());
}

#[test]
fn h_17_x509_29_leaf_without_path() {
    assert_eq!(leaf_fault(|leaf| leaf.with(uri("spiffe://example.org"))), X509Error::NoPath);
}

#[test]
fn h_18_id_25_bnd_17_only_the_authorities_of_the_own_domain_count() {
    let (one, two) = (Authority::root("example.org"), Authority::root("other.test"));
    let both: HashMap<TrustDomain, Arc<Bundle>> = [one.bundle("example.org"), two.bundle("other.test")]
        .map(|bundle| (bundle.trust_domain.clone(), bundle))
        .into();
    let foreign = [one.leaf("spiffe://other.test/x")];
    let outcome = x509_chain(&foreign, &both, PeerRole::Client, now());
    assert_eq!(path_fault(outcome), webpki::Error::UnknownIssuer);
    for chain in [foreign, [one.leaf("spiffe://evil.test/x")]] {
        let outcome = verify_as(PeerRole::Client, &chain, &one.bundle("example.org"));
        assert!(matches!(outcome, Err(VerifyError::UnknownTrustDomain)), "{outcome:?}");
    }
    assert!(x509_chain(&[two.leaf("spiffe://other.test/x")], &both, PeerRole::Client, now()).is_ok());
}

#[test]
fn h_19_times() {
    let expired = path_fault(judge(|leaf| leaf.valid(NOW - 3600, NOW - 1)));
    assert!(matches!(expired, webpki::Error::CertExpired { .. }), "{expired:?}");
    let early = path_fault(judge(|leaf| leaf.valid(NOW + 1, NOW + 3600)));
    assert!(matches!(early, webpki::Error::CertNotValidYet { .. }), "{early:?}");
    assert!(judge(|leaf| leaf.valid(NOW - 3600, 253_402_300_799)).is_ok());
    assert_eq!(path_fault(judge(|leaf| leaf.valid(NOW + 10, NOW - 10))), webpki::Error::InvalidCertValidity);
    // A two-digit year of 50 is 1950, whatever the issuer meant, and webpki knows no time before 1970.
    let past = judge(|mut leaf| {
        leaf.not_after = crate::der::wrap(0x17, b"500101000000Z");
        leaf
    });
    assert_eq!(path_fault(past), webpki::Error::BadDerTime);
    assert!(judge(|leaf| leaf.valid(NOW, NOW)).is_ok());
}

#[test]
fn h_20_x509_18_intermediates_that_may_not_sign() {
    let root = Authority::root("example.org");
    let bundle = root.bundle("example.org");
    let only_lists = root.intermediate("only lists", |template| template.with(key_usage(CRL_SIGN)));
    let outcome = verify_as(PeerRole::Client, &[only_lists.leaf(ID), only_lists.certificate.clone()], &bundle);
    assert!(matches!(outcome, Err(VerifyError::Intermediate(X509Error::NoCertSign))), "{outcome:?}");

    let unmarked = root.intermediate("unmarked", |template| template.without(BASIC));
    let outcome = verify_as(PeerRole::Client, &[unmarked.leaf(ID), unmarked.certificate.clone()], &bundle);
    assert_eq!(path_fault(outcome), webpki::Error::EndEntityUsedAsCa);

    let workload = new_key();
    let leaf = root.sign(&Template::leaf("spiffe://example.org/evil", &workload));
    let forged = Template::leaf(ID, &new_key()).signed("workload", &workload);
    let outcome = verify_as(PeerRole::Client, &[forged, leaf], &bundle);
    assert_eq!(path_fault(outcome), webpki::Error::EndEntityUsedAsCa);
}

#[test]
fn h_21_x509_14_path_length_of_a_root() {
    let root = Authority::root_with("example.org", |root| root.with(basic(true, Some(0))));
    let middle = root.intermediate("middle", |template| template);
    assert!(verify_as(PeerRole::Client, &[root.leaf(ID)], &root.bundle("example.org")).is_ok());
    let outcome =
        verify_as(PeerRole::Client, &[middle.leaf(ID), middle.certificate.clone()], &root.bundle("example.org"));
    assert!(matches!(outcome, Err(VerifyError::PathLength)), "{outcome:?}");

    let root = Authority::root_with("example.org", |root| root.with(basic(true, Some(1))));
    let middle = root.intermediate("middle", |template| template);
    let low = middle.intermediate("low", |template| template);
    let one = [middle.leaf(ID), middle.certificate.clone()];
    assert!(verify_as(PeerRole::Client, &one, &root.bundle("example.org")).is_ok());
    let two = [low.leaf(ID), low.certificate.clone(), middle.certificate.clone()];
    let outcome = verify_as(PeerRole::Client, &two, &root.bundle("example.org"));
    assert!(matches!(outcome, Err(VerifyError::PathLength)), "{outcome:?}");
}

#[test]
fn h_22_unknown_critical_extensions() {
    let unknown = || Extension(UNKNOWN, true, vec![5, 0]);
    assert_eq!(path_fault(judge(|leaf| leaf.with(unknown()))), webpki::Error::UnsupportedCriticalExtension);
    let root = Authority::root("example.org");
    let middle = root.intermediate("middle", |template| template.with(unknown()));
    let outcome =
        verify_as(PeerRole::Client, &[middle.leaf(ID), middle.certificate.clone()], &root.bundle("example.org"));
    assert_eq!(path_fault(outcome), webpki::Error::UnsupportedCriticalExtension);
    let root = Authority::root_with("example.org", |template| template.with(unknown()));
    let outcome = verify_as(PeerRole::Client, &[root.leaf(ID)], &root.bundle("example.org"));
    assert!(matches!(outcome, Err(VerifyError::NoAuthority)), "{outcome:?}");
    assert!(judge(|leaf| leaf.with(Extension(UNKNOWN, false, vec![5, 0]))).is_ok());
}

#[test]
fn h_23_extended_key_usage_fits_the_role() {
    let root = Authority::root("example.org");
    let bundle = root.bundle("example.org");
    let with = |purposes: &[&[u8]]| [root.sign(&Template::leaf(ID, &new_key()).with(usages(purposes)))];
    let refused = |role, purposes: &[&[u8]]| path_fault(verify_as(role, &with(purposes), &bundle));
    assert!(matches!(refused(PeerRole::Client, &[SERVER_AUTH]), webpki::Error::RequiredEkuNotFoundContext(_)));
    assert!(matches!(refused(PeerRole::Server, &[CLIENT_AUTH]), webpki::Error::RequiredEkuNotFoundContext(_)));
    assert!(matches!(refused(PeerRole::Client, &[CODE_SIGNING]), webpki::Error::RequiredEkuNotFoundContext(_)));
    assert!(matches!(refused(PeerRole::Client, &[]), webpki::Error::EmptyEkuExtension));
    assert!(matches!(refused(PeerRole::Server, &[]), webpki::Error::EmptyEkuExtension));
    assert!(verify_as(PeerRole::Server, &with(&[SERVER_AUTH]), &bundle).is_ok());
    assert!(verify_as(PeerRole::Client, &with(&[CLIENT_AUTH]), &bundle).is_ok());
}

#[test]
fn h_24_x509_16_uri_name_constraints_are_refused_by_name() {
    // permittedSubtrees [0] or excludedSubtrees [1], each of one uniformResourceIdentifier.
    let constraint = |tree: u8, host: &str| {
        let subtree = seq(&[&crate::der::wrap(URI, host.as_bytes())]);
        Extension(NAME_CONSTRAINTS, true, seq(&[&crate::der::wrap(tree, &subtree)]))
    };
    for (tree, host) in [(0xa0, "example.org"), (0xa1, "example.org"), (0xa0, "other.test")] {
        let root = Authority::root("example.org");
        let middle = root.intermediate("middle", |template| template.with(constraint(tree, host)));
        let chain = [middle.leaf(ID), middle.certificate.clone()];
        let error = verify_as(PeerRole::Client, &chain, &root.bundle("example.org")).unwrap_err();
        assert!(matches!(error, VerifyError::NameConstraints(_)), "{error:?}");
        assert!(error.to_string().contains("name constraints"));
        let root = Authority::root_with("example.org", |template| template.with(constraint(tree, host)));
        let error = verify_as(PeerRole::Client, &[root.leaf(ID)], &root.bundle("example.org")).unwrap_err();
        assert!(matches!(error, VerifyError::NameConstraints(_)), "{error:?}");
    }
}

#[test]
fn h_25_repeated_extensions() {
    for extension in [uri(ID), key_usage(DIGITAL_SIGNATURE)] {
        let error = leaf_fault(|mut leaf| {
            leaf.extensions.push(extension);
            leaf
        });
        assert_eq!(error, X509Error::DuplicateExtension);
    }
}

#[test]
fn h_26_old_versions_and_weak_keys() {
    let error = leaf_fault(|mut leaf| {
        leaf.version = None;
        leaf
    });
    assert_eq!(error, X509Error::Version);
    for algorithm in [ECDSA_SHA1, RSA_MD5] {
        let weak = path_fault(judge(|mut leaf| {
            leaf.algorithm = algorithm;
            leaf
        }));
        assert!(matches!(weak, webpki::Error::UnsupportedSignatureAlgorithmContext(_)), "{weak:?}");
    }

    let with_key = |spki: Vec<u8>| {
        leaf_fault(move |mut leaf| {
            leaf.spki = spki;
            leaf
        })
    };
    use crate::x509::KeyError;
    let modulus = [0xab; 128];
    assert_eq!(with_key(crate::der::rsa_spki(&modulus, &[1, 0, 1])), X509Error::Key(KeyError::RsaSize { bits: 1024 }));
    let modulus = [0xab; 256];
    assert_eq!(with_key(crate::der::rsa_spki(&modulus, &[1])), X509Error::Key(KeyError::RsaExponent));
    assert_eq!(with_key(crate::der::rsa_spki(&modulus, &[2])), X509Error::Key(KeyError::RsaExponent));
    let off_curve = crate::der::ec_spki(crate::x509::Curve::P256, &[7; 32], &[7; 32]);
    assert_eq!(with_key(off_curve), X509Error::Key(KeyError::NotOnCurve));
    // secp256k1
    let algorithm = seq(&[b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x0a"]);
    let strange = seq(&[&algorithm, &bit_string(&[4; 65])]);
    assert_eq!(with_key(strange), X509Error::Key(KeyError::Unsupported));
}

#[test]
fn h_27_long_chains_are_counted_and_not_read() {
    let root = Authority::root("example.org");
    let bundle = root.bundle("example.org");
    // No certificates at all, as whoever had begun to read them would have said.
    for count in [17, 100, 501] {
        let outcome = verify_as(PeerRole::Client, &vec![Bytes::from_static(b"x"); count], &bundle);
        assert!(
            matches!(outcome, Err(VerifyError::TooManyCertificates { count: said }) if said == count),
            "{outcome:?}"
        );
    }
    let middle = root.intermediate("middle", |template| template);
    let same = |count| -> Vec<Bytes> {
        std::iter::once(middle.leaf(ID)).chain(std::iter::repeat_n(middle.certificate.clone(), count)).collect()
    };
    assert_eq!(verify_as(PeerRole::Client, &same(15), &bundle).unwrap().id.as_str(), ID);
    let outcome = verify_as(PeerRole::Client, &same(500), &bundle);
    assert!(matches!(outcome, Err(VerifyError::TooManyCertificates { count: 501 })), "{outcome:?}");
    assert!(matches!(verify_as(PeerRole::Client, &[], &bundle), Err(VerifyError::NoCertificate)));
}

/// A leaf and so many intermediates of one name, each of which could be the issuer of each, and none of which leads to
/// a root.
fn twins(count: usize) -> Vec<Bytes> {
    let keys: Vec<PrivateKey> = (0..count).map(|_| new_key()).collect();
    let next = |index: usize| &keys[(index + 1) % count];
    let twins = keys
        .iter()
        .enumerate()
        .map(|(index, key)| Template::authority("twin", "spiffe://example.org", key).signed("twin", next(index)));
    std::iter::once(Template::leaf(ID, &new_key()).signed("twin", &keys[0])).chain(twins).collect()
}

#[test]
fn h_27_intermediates_that_sign_each_other() {
    let bundle = Authority::root("example.org").bundle("example.org");
    // Six make as many paths as are ever searched; one more would make four times as many, ten more two thousand times.
    assert_eq!(path_fault(verify_as(PeerRole::Client, &twins(6), &bundle)), webpki::Error::UnknownIssuer);
    for count in [7, 15] {
        let outcome = verify_as(PeerRole::Client, &twins(count), &bundle);
        assert!(matches!(outcome, Err(VerifyError::TooManyPaths)), "{count}: {outcome:?}");
    }

    // Signed by the root, so that every path is tried: each stands for itself, so there are as many as twins.
    let root = Authority::root("example.org");
    let twins: Vec<Authority> = (0..15).map(|_| root.intermediate("twin", |template| template)).collect();
    let leaf = Template::leaf(ID, &new_key()).signed("twin", &new_key());
    let chain: Vec<Bytes> = std::iter::once(leaf).chain(twins.into_iter().map(|twin| twin.certificate)).collect();
    let outcome = verify_as(PeerRole::Client, &chain, &root.bundle("example.org"));
    assert_eq!(path_fault(outcome), webpki::Error::InvalidSignatureForPublicKey);
}

#[test]
fn h_27_authorities_of_one_name_above_each_other_are_honest() {
    // Nested servers that keep the default subject have one name on all levels.
    let mut levels = vec![Authority::root("example.org")];
    levels[0].name = "twin".to_owned();
    levels[0].certificate =
        Template::authority("twin", "spiffe://example.org", &levels[0].key).signed("twin", &levels[0].key);
    for _ in 0..6 {
        let next = levels.last().unwrap().intermediate("twin", |template| template);
        levels.push(next);
    }
    let above = levels[1..].iter().rev().map(|level| level.certificate.clone());
    let chain: Vec<Bytes> = std::iter::once(levels[6].leaf(ID)).chain(above).collect();
    let verified = verify_as(PeerRole::Client, &chain, &levels[0].bundle("example.org")).unwrap();
    assert_eq!(verified.id.as_str(), ID);
}

#[test]
fn h_27_endless_extensions_are_counted_and_not_compared() {
    // All alike: whoever compares finds the second to be a repetition.
    let with = |mut template: Template, count: usize| {
        let missing = count - template.extensions.len();
        template.extensions.extend(vec![Extension(UNKNOWN, false, vec![5, 0]); missing]);
        template
    };
    assert_eq!(leaf_fault(|leaf| with(leaf, 65)), X509Error::TooManyExtensions { count: 65 });
    assert_eq!(leaf_fault(|leaf| with(leaf, 9_000)), X509Error::TooManyExtensions { count: 9_000 });
    assert_eq!(leaf_fault(|leaf| with(leaf, 64)), X509Error::DuplicateExtension);

    let root = Authority::root("example.org");
    let middle = root.intermediate("middle", |template| with(template, 65));
    let chain = [root.leaf(ID), middle.certificate.clone()];
    let outcome = verify_as(PeerRole::Client, &chain, &root.bundle("example.org"));
    // It is in no path, so it is not looked at again; and the leaf is the root's own.
    assert_eq!(outcome.unwrap().id.as_str(), ID);
    let outcome = verify_as(PeerRole::Client, &[middle.leaf(ID), chain[1].clone()], &root.bundle("example.org"));
    let expected = X509Error::TooManyExtensions { count: 65 };
    assert!(matches!(outcome, Err(VerifyError::Intermediate(error)) if error == expected), "{outcome:?}");
}

#[test]
fn h_30_hostile_uris() {
    use crate::id::IdError;
    let with = |bytes: &[u8]| leaf_fault(|leaf| leaf.with(names(&[(URI, bytes)])));
    assert_eq!(with(b"spiffe://example.org/a\0b"), X509Error::Id(IdError::PathCharacter));
    assert_eq!(with(b"spiffe://example.org/\xc3"), X509Error::Id(IdError::PathCharacter));
    assert_eq!(with(b""), X509Error::Id(IdError::Empty));
    assert_eq!(with(&vec![b'a'; 1 << 20]), X509Error::Id(IdError::TooLong));
    let two: [(u8, &[u8]); 2] = [(URI, ID.as_bytes()), (URI, b"\xff")];
    assert_eq!(leaf_fault(|leaf| leaf.with(names(&two))), X509Error::UriCount { count: 2 });
}

#[test]
fn h_01_to_h_10_as_uri_names() {
    for text in [
        "",
        "spiffe://",
        "spiffe:///a",
        "//example.org/a",
        "SPIFFE://example.org/a",
        "spiffe://EXAMPLE.org/a",
        "spiffe://example.org/a\n",
        "\u{feff}spiffe://example.org/a",
        "spiffe://example.org/%61",
        "spiffe://example.org/a/../b",
        "spiffe://example.org/a/",
        "spiffe://example.org/a?",
        "spiffe://example.org/a#",
        "spiffe://u:p@example.org/a",
        "spiffe://example.org:443/a",
        "spiffe://[::1]/a",
        "spiffe://example.org/~",
    ] {
        let error = leaf_fault(|leaf| leaf.with(uri(text)));
        assert!(matches!(error, X509Error::Id(_)), "{text:?}: {error:?}");
    }
}

#[test]
fn id_17_the_longest_ids_validate() {
    let td = "a".repeat(255);
    let ids = [
        ("example.org".to_owned(), format!("spiffe://example.org/{}", "b".repeat(2027))),
        (td.clone(), format!("spiffe://{td}/{}", "b".repeat(1783))),
    ];
    for (name, id) in ids {
        let root = Authority::root(&name);
        let verified = verify_as(PeerRole::Server, &[root.leaf(&id)], &root.bundle(&name)).unwrap();
        assert_eq!(verified.id.as_str(), id);
    }
}

#[test]
fn leaves_with_other_keys_validate() {
    let root = Authority::root("example.org");
    for kind in [KeyType::EcP384, KeyType::Rsa2048] {
        let leaf = root.sign(&Template::leaf(ID, &PrivateKey::generate(kind).unwrap()));
        assert!(verify_as(PeerRole::Client, &[leaf], &root.bundle("example.org")).is_ok(), "{kind}");
    }
}

#[test]
fn several_roots_of_one_name_are_told_apart() {
    // After a rotation both roots have one subject, and the first limits its path.
    let old = Authority::root_with("example.org", |root| root.with(basic(true, Some(0))));
    let new = Authority::root("example.org");
    let mut bundle = Bundle::clone(&old.bundle("example.org"));
    bundle.x509.extend(new.bundle("example.org").x509.clone());
    let bundle = Arc::new(bundle);
    let middle = new.intermediate("middle", |template| template);
    assert!(verify_as(PeerRole::Client, &[middle.leaf(ID), middle.certificate.clone()], &bundle).is_ok());
    assert!(verify_as(PeerRole::Client, &[old.leaf(ID)], &bundle).is_ok());
}

#[test]
fn a_path_for_other_certificates_lists_every_authority() {
    let root = Authority::root("example.org");
    let middle = root.intermediate("middle", |template| template);
    let leaf = middle.sign(&Template::new("node 1", new_key().public_key().spki_der()).with(usages(&[CODE_SIGNING])));
    let chain = [leaf, middle.certificate.clone()];
    let roots = &root.bundle("example.org").x509;
    let path = x509_path(&chain, roots, now()).unwrap();
    assert_eq!(path.authorities, [middle.certificate.clone(), root.certificate.clone()]);
    let stranger = Authority::root("example.org").bundle("example.org");
    assert!(matches!(x509_path(&chain, &stranger.x509, now()), Err(VerifyError::Path(_))));
}
