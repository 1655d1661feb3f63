use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use spiffe_proto::workload::{X509svid, X509svidResponse};
use time::OffsetDateTime;

use super::*;

const START: u64 = 1_700_000_000;

fn at(seconds: u64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).unwrap()).unwrap()
}

/// An answer with one SVID and one federated bundle.
fn response(hint: &str) -> X509svidResponse {
    let root_key = KeyPair::generate().unwrap();
    let mut root = CertificateParams::default();
    root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    root.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    root.subject_alt_names = vec![SanType::URI("spiffe://td".try_into().unwrap())];
    (root.not_before, root.not_after) = (at(START - 100), at(START + 86_400));
    let root_certificate = root.self_signed(&root_key).unwrap();
    let issuer = Issuer::new(root, root_key);
    let key = KeyPair::generate().unwrap();
    let mut leaf = CertificateParams::default();
    leaf.subject_alt_names = vec![SanType::URI("spiffe://td/a".try_into().unwrap())];
    leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    leaf.use_authority_key_identifier_extension = true;
    (leaf.not_before, leaf.not_after) = (at(START - 10), at(START + 3600));
    let leaf = leaf.signed_by(&key, &issuer).unwrap();
    let bundle = Bytes::copy_from_slice(root_certificate.der());
    X509svidResponse {
        svids: vec![X509svid {
            spiffe_id: "spiffe://td/a".into(),
            x509_svid: Bytes::copy_from_slice(leaf.der()),
            x509_svid_key: Bytes::from(key.serialize_der()),
            bundle: bundle.clone(),
            hint: hint.into(),
        }],
        crl: Vec::new(),
        federated_bundles: [("spiffe://other".to_owned(), bundle)].into_iter().collect(),
    }
}

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(START)
}

#[test]
fn golden_output() {
    let answer = Answer::read(&response("internal"), now()).unwrap();
    let mut screen = Screen::new();
    answer.pretty(Duration::from_micros(12_345), true, &mut screen);
    let rest = "\
SVID Valid After:\t2023-11-14 22:13:10 +0000 UTC
SVID Valid Until:\t2023-11-14 23:13:20 +0000 UTC
CA #1 Valid After:\t2023-11-14 22:11:40 +0000 UTC
CA #1 Valid Until:\t2023-11-15 22:13:20 +0000 UTC
[other] CA #1 Valid After:\t2023-11-14 22:11:40 +0000 UTC
[other] CA #1 Valid Until:\t2023-11-15 22:13:20 +0000 UTC

";
    let expected =
        format!("Received 1 svid after 12.345ms\n\nSPIFFE ID:\t\tspiffe://td/a\nHint:\t\t\tinternal\n{rest}");
    assert_eq!(screen.out, expected);
    let mut screen = Screen::new();
    answer.pretty(Duration::from_secs(2), false, &mut screen);
    assert_eq!(screen.out, format!("Received 1 svid after 2s\n\nSPIFFE ID:\t\tspiffe://td/a\n{rest}"));
}

#[test]
fn files_are_written() {
    let answer = Answer::read(&response(""), now()).unwrap();
    let directory = tempfile::tempdir().unwrap();
    let at = |name: &str| directory.path().join(name);
    let mut screen = Screen::new();
    write(&answer, directory.path(), &mut screen).unwrap();
    let expected = format!(
        "Writing SVID #0 to file {}.\nWriting key #0 to file {}.\nWriting bundle #0 to file {}.\nWriting federated bundle #0 for trust domain spiffe://other to file {}.\n",
        at("svid.0.pem").display(),
        at("svid.0.key").display(),
        at("bundle.0.pem").display(),
        at("federated_bundle.0.0.pem").display()
    );
    assert_eq!(screen.out, expected);
    assert_eq!(std::fs::read(at("bundle.0.pem")).unwrap(), std::fs::read(at("federated_bundle.0.0.pem")).unwrap());
    let key = keyfile::read(&at("svid.0.key")).unwrap().unwrap();
    assert_eq!(key.as_slice(), answer.svids[0].key.expose_pem().as_bytes());
    assert!(matches!(write(&answer, &at("none"), &mut Screen::new()), Err(CliError::File { .. })));
}

#[test]
fn what_does_not_verify_is_not_shown() {
    let response = response("");
    let late = now() + Duration::from_secs(7200);
    assert!(matches!(Answer::read(&response, late), Err(CliError::Unverified { .. })));
    let mut other = response.clone();
    other.svids[0].bundle = self::response("").svids[0].bundle.clone();
    assert!(matches!(Answer::read(&other, now()), Err(CliError::Unverified { .. })));
    let mut broken = response.clone();
    broken.svids[0].x509_svid_key = Bytes::from_static(b"x");
    assert!(matches!(Answer::read(&broken, now()), Err(CliError::Key { .. })));
    let mut broken = response.clone();
    broken.federated_bundles.insert("spiffe://third".into(), Bytes::new());
    assert!(matches!(Answer::read(&broken, now()), Err(CliError::Certificate { .. })));
    assert!(matches!(Answer::read(&X509svidResponse::default(), now()), Err(CliError::Missing("svids"))));
}
