//! Chains against a bundle: the fuzzer writes what is signed, for a leaf and for an authority above it.
#![no_main]

use bytes::Bytes;
use fuzz::{BUNDLE, OTHER, ROOT, halves, now};
use libfuzzer_sys::fuzz_target;
use spiffe::bundle::Bundle;
use spiffe::verify::{PeerRole, x509_chain, x509_path};
use spiffe::x509::Certificate;

fuzz_target!(|data: &[u8]| {
    let (leaf, authority) = halves(data);
    let chain: Vec<Bytes> = if authority.is_empty() {
        vec![ROOT.certify(leaf)]
    } else {
        vec![OTHER.certify(leaf), ROOT.certify(authority)]
    };
    let bundle: &Bundle = &BUNDLE;
    for role in [PeerRole::Client, PeerRole::Server] {
        if let Ok(peer) = x509_chain(&chain, bundle, role, now()) {
            assert!(peer.id.is_member_of(&bundle.trust_domain) && !peer.id.path().is_empty());
            assert!(peer.not_before <= now() && now() <= peer.not_after);
            let leaf = Certificate::parse(chain[0].clone()).expect("a believed leaf");
            assert!(!leaf.is_ca, "an authority was believed as a leaf");
            assert_eq!(leaf.uris, [peer.id.as_str()]);
        }
    }
    let _ = x509_path(&chain, &bundle.x509, now());
});
