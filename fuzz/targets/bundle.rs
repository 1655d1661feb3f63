//! Bundle documents and maps of them: what is read is written and read again the same.
#![no_main]

use fuzz::trust_domain;
use libfuzzer_sys::fuzz_target;
use spiffe::bundle::{Bundle, BundleMap};

fuzz_target!(|data: &[u8]| {
    if let Ok((bundle, _)) = Bundle::from_spiffe_json(trust_domain(), data) {
        let written = bundle.to_spiffe_json();
        let (again, _) = Bundle::from_spiffe_json(trust_domain(), written.as_bytes()).expect("our own document");
        assert_eq!(again, bundle);
        let _ = bundle.to_workload_jwks();
        let _ = bundle.x509_der_concatenated();
        // A document that is fetched again changes nothing.
        let _ = Bundle::supersede(&bundle, again);
    }
    if let Ok((map, _)) = BundleMap::from_json(data) {
        let (again, _) = BundleMap::from_json(map.to_json().as_bytes()).expect("our own map");
        assert_eq!(again, map);
    }
});
