//! Join tokens: any bytes may be sent as one.
#![no_main]

use fuzz::trust_domain;
use libfuzzer_sys::fuzz_target;
use spiffe::attest::join_token;

fuzz_target!(|token: &str| {
    let _ = join_token::hash(token);
    if let Ok(id) = join_token::agent_id(&trust_domain(), token) {
        assert!(id.is_agent());
        assert_eq!(id.path(), format!("/spire/agent/join_token/{token}"));
    }
});
