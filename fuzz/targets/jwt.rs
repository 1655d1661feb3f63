//! Tokens, as they came and as signed by the trust domain's key.
#![no_main]

use fuzz::{AUDIENCE, BUNDLE, ROOT, halves, now};
use libfuzzer_sys::fuzz_target;
use spiffe::bundle::Bundle;
use spiffe::verify::jwt_svid;

fuzz_target!(|data: &[u8]| {
    let bundle: &Bundle = &BUNDLE;
    if let Ok(text) = std::str::from_utf8(data) {
        let _ = jwt_svid(text, AUDIENCE, bundle, now());
    }
    let (header, claims) = halves(data);
    if let Ok(token) = jwt_svid(&ROOT.token(header, claims), AUDIENCE, bundle, now()) {
        assert!(token.id.is_member_of(&bundle.trust_domain) && !token.id.path().is_empty());
        assert!(token.audience.iter().any(|audience| audience == AUDIENCE));
        assert_eq!(token.claims.get("sub").and_then(|sub| sub.as_str()), Some(token.id.as_str()));
    }
});
