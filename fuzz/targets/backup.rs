//! Backup files: whatever comes is answered, and what is taken has a state.

#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    if let Ok(contents) = signet_server::backup::file::read(bytes) {
        assert_eq!(contents.head.trust_domain, contents.state.trust_domain().as_str());
    }
    // Behind the first line more of it is reached.
    let _ = signet_server::backup::file::read(&[b"signet backup 1\n", bytes].concat()[..]);
});
