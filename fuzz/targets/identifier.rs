//! SPIFFE IDs, trust domains and selectors.
#![no_main]

use libfuzzer_sys::fuzz_target;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::Selector;

fuzz_target!(|text: &str| {
    if let Ok(id) = SpiffeId::parse(text) {
        assert_eq!(id.as_str(), text, "an id is kept byte for byte");
        assert_eq!(SpiffeId::from_path(id.trust_domain(), id.path()).expect("its own parts"), id);
        assert!(text.len() <= 2048 && id.trust_domain().as_str().len() <= 255);
        let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"./-_:".contains(&byte);
        assert!(text.bytes().all(legal));
        assert!(id.path().split('/').all(|segment| segment != "." && segment != ".."));
    }
    if let Ok(name) = TrustDomain::parse(text) {
        assert_eq!(name.as_str(), text);
        assert_eq!(TrustDomain::parse_lenient(&name.id_string()).expect("its own id"), name);
        let _ = name.check_own();
        let _ = SpiffeId::from_path(&name, text);
    }
    if let Ok(selector) = Selector::parse(text) {
        assert_eq!(selector.to_string(), text);
    }
});
