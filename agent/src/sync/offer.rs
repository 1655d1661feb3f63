//! Entries and bundles of the wire turned into what the plan works with.

use std::sync::Arc;

use prost::Message as _;
use spiffe::view::{Digest, bundle_digest};
use spiffe_proto::types;

use super::plan::{OfferedBundle, OfferedEntry, Version};
use crate::cache::Entry;
use crate::server_link::wire;

/// An entry as it came, with its content if the server told it. One that cannot be used is logged and held by name.
pub(super) fn entry(message: types::Entry, content: Option<Digest>) -> OfferedEntry {
    let id = message.id.clone();
    let version = Version { revision: message.revision_number, created_at: message.created_at, content };
    let entry = match wire::entry(message) {
        Ok(entry) => Some(Arc::new(Entry { content, ..entry })),
        Err(error) => {
            tracing::warn!(
                entry_id = id,
                error = runtime::telemetry::chain(&error),
                "An entry of the server cannot be used"
            );
            None
        }
    };
    OfferedEntry { id: id.into(), version, entry }
}

/// A bundle as it came; none if not even its trust domain makes sense.
pub(super) fn bundle(message: types::Bundle) -> Option<OfferedBundle> {
    let digest = bundle_digest(&message.encode_to_vec());
    let name = message.trust_domain.clone();
    let trust_domain = wire::trust_domain(&name).ok();
    let bundle = match wire::bundle(message) {
        Ok(bundle) => Some(Arc::new(bundle)),
        Err(error) => {
            tracing::warn!(
                trust_domain = name,
                error = runtime::telemetry::chain(&error),
                "A bundle of the server cannot be used; the one held before stays"
            );
            None
        }
    };
    trust_domain.map(|trust_domain| OfferedBundle { trust_domain, digest, bundle })
}
