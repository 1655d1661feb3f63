//! Certificate signing requests, as they came and as signed by their own key.
#![no_main]

use fuzz::OTHER;
use libfuzzer_sys::fuzz_target;
use spiffe::x509::Csr;

fuzz_target!(|data: &[u8]| {
    if let Ok(csr) = Csr::parse(data) {
        let _ = csr.verify_signature();
    }
    // The seeds ask for a certificate of this key: so the signature is a good one.
    if let Ok(csr) = Csr::parse(&OTHER.certify(data)) {
        let verified = csr.verify_signature();
        assert!(csr.public_key().spki_der() == &csr.spki_der);
        assert!(verified.is_err() || csr.spki_der == OTHER.spki(), "a request of another key was signed by ours");
    }
});
