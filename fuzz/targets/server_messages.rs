//! What anybody may send to the server: messages, and the values that are made of them.
#![no_main]

use fuzz::{now, trust_domain};
use libfuzzer_sys::fuzz_target;
use prost::Message;
use signet_server::api::{page, wire};
use spiffe_proto::{agent, bundle, entry, svid, sync, types};

fuzz_target!(|data: &[u8]| {
    let Some((kind, data)) = data.split_first() else { return };
    match kind % 8 {
        0 => entry_fields(data),
        1 => {
            if let Ok(message) = types::Bundle::decode(data)
                && let Ok(read) = wire::bundle_of(&message)
            {
                let again = wire::bundle_of(&wire::bundle(&read, None)).expect("our own message");
                assert_eq!(again.trust_domain, read.trust_domain);
                assert_eq!(again.x509, read.x509);
                assert_eq!(again.jwt.len(), read.jwt.len());
            }
        }
        2 => {
            if let Ok(message) = entry::ListEntriesRequest::decode(data) {
                let _ = page::page(message.page_size, &message.page_token);
                if let Some(filter) = message.filter {
                    let _ = filter.by_selectors.as_ref().map(wire::selector_match);
                    let _ = filter.by_federates_with.as_ref().map(wire::federates_with_match);
                    let _ = wire::any_id(filter.by_spiffe_id.as_ref());
                }
            }
        }
        3 => drop(agent::AttestAgentRequest::decode(data)),
        4 => drop(svid::BatchNewX509svidRequest::decode(data)),
        5 => drop(bundle::BatchSetFederatedBundleRequest::decode(data)),
        6 => drop(sync::SubscribeRequest::decode(data)),
        _ => {
            if let Ok(message) = types::Spiffeid::decode(data)
                && let Ok(id) = wire::workload_id(Some(&message), &trust_domain())
            {
                assert!(id.is_member_of(&trust_domain()) && !id.is_reserved() && !id.path().is_empty());
                assert_eq!(wire::any_id(Some(&wire::id(&id))).expect("our own message"), id);
            }
        }
    }
});

/// What is read of an entry has to be valid, whoever sent it.
fn entry_fields(data: &[u8]) {
    let Ok(message) = types::Entry::decode(data) else { return };
    let time = wire::time(message.expires_at);
    assert!(wire::seconds(time) == message.expires_at || time == std::time::SystemTime::UNIX_EPOCH);
    let _ = (wire::lifetime(message.x509_svid_ttl), time > now());
    let Ok(new) = wire_entry(message) else { return };
    let id = new.spiffe_id();
    assert!(id.is_member_of(&trust_domain()) && !id.is_reserved() && !id.path().is_empty());
}

fn wire_entry(
    message: types::Entry,
) -> Result<signet_server::registry::entry::NewEntry, signet_server::api::status::Failure> {
    signet_server::api::entry::draft::new_entry(message, &trust_domain(), || "fresh".to_owned())
}
