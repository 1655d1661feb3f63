//! PEM: bundles, certificates and keys.
#![no_main]

use fuzz::trust_domain;
use libfuzzer_sys::fuzz_target;
use spiffe::bundle::Bundle;
use spiffe::x509::PrivateKey;

fuzz_target!(|text: &str| {
    if let Ok(bundle) = Bundle::from_pem(trust_domain(), text) {
        let again = Bundle::from_pem(trust_domain(), &bundle.to_pem()).expect("our own PEM");
        assert_eq!(again, bundle);
    }
    if let Ok(key) = PrivateKey::from_pem(text) {
        let again = PrivateKey::from_pem(&key.expose_pem()).expect("our own PEM");
        assert_eq!(again.public_key().spki_der(), key.public_key().spki_der());
    }
});
