//! Certificates by themselves: parsing, the SVID profile, chains without separators.
#![no_main]

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use spiffe::x509::{Certificate, X509Svid};

fuzz_target!(|data: &[u8]| {
    let der = Bytes::copy_from_slice(data);
    if let Ok(certificate) = Certificate::parse(der.clone()) {
        let _ = certificate.check_authority();
        if let Ok(id) = certificate.leaf_id() {
            assert_eq!(certificate.uris, [id.as_str()], "a leaf has exactly one URI, which is its id");
            assert!(!id.path().is_empty());
        }
    }
    if let Ok(svid) = X509Svid::from_concatenated(&der) {
        let first = svid.chain.first().expect("a chain has a leaf");
        assert!(data.starts_with(first));
        assert_eq!(Certificate::parse(first.clone()).and_then(|leaf| leaf.leaf_id()).expect("a leaf"), svid.id);
    }
});
