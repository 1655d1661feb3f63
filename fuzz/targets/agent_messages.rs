//! What a server may send to an agent, polled and pushed, and what it makes of its view.
#![no_main]

use libfuzzer_sys::fuzz_target;
use prost::Message;
use signet_agent::server_link::wire;
use signet_agent::sync::plan::View;
use spiffe_proto::sync::SubscribeResponse;
use spiffe_proto::sync::subscribe_response::Message as Said;
use spiffe_proto::types;

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 4 {
        0 => {
            if let Ok(message) = types::Entry::decode(data)
                && let Ok(entry) = wire::entry(message)
            {
                assert!(!entry.selectors.is_empty(), "an entry for everybody");
            }
        }
        1 => {
            if let Ok(message) = types::Bundle::decode(data) {
                let _ = wire::bundle(message);
            }
        }
        2 => drop(types::X509svid::decode(data)),
        _ => push(data),
    }
});

/// A stream of messages, each behind its length.
fn push(mut data: &[u8]) {
    let mut view = View::default();
    let mut parts = signet_agent::sync::Parts::default();
    while let Ok(message) = SubscribeResponse::decode_length_delimited(&mut data) {
        let Some(Said::Part(part)) = message.message else { continue };
        let Some(step) = parts.add(part) else { continue };
        let update = view.take(step.clone());
        assert!(update.entries.iter().all(|entry| !entry.selectors.is_empty()), "an entry for everybody");
        // Taken once more, it changes nothing that is held.
        let after = view.digest();
        view.take(step);
        assert_eq!(view.digest(), after);
    }
}
