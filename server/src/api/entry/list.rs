//! Which entries a list or a count means.

use spiffe::id::TrustDomain;
use spiffe_proto::entry as proto;
use spiffe_proto::types;

use crate::api::status::Failure;
use crate::api::wire::{self, WireError};
use crate::registry::list::Filter;

/// The filter messages of lists and counts have the same fields.
struct Message {
    by_spiffe_id: Option<types::Spiffeid>,
    by_parent_id: Option<types::Spiffeid>,
    by_selectors: Option<types::SelectorMatch>,
    by_federates_with: Option<types::FederatesWithMatch>,
    by_hint: Option<String>,
    by_downstream: Option<bool>,
}

/// The filter of a list.
pub(super) fn of_list(
    message: Option<proto::list_entries_request::Filter>,
    own: &TrustDomain,
) -> Result<Filter, Failure> {
    let Some(message) = message else { return Ok(Filter::default()) };
    let proto::list_entries_request::Filter {
        by_spiffe_id,
        by_parent_id,
        by_selectors,
        by_federates_with,
        by_hint,
        by_downstream,
    } = message;
    let message = Message { by_spiffe_id, by_parent_id, by_selectors, by_federates_with, by_hint, by_downstream };
    filter(message, own, "failed to list entries")
}

/// The filter of a count.
pub(super) fn of_count(
    message: Option<proto::count_entries_request::Filter>,
    own: &TrustDomain,
) -> Result<Filter, Failure> {
    let Some(message) = message else { return Ok(Filter::default()) };
    let proto::count_entries_request::Filter {
        by_spiffe_id,
        by_parent_id,
        by_selectors,
        by_federates_with,
        by_hint,
        by_downstream,
    } = message;
    let message = Message { by_spiffe_id, by_parent_id, by_selectors, by_federates_with, by_hint, by_downstream };
    filter(message, own, "failed to count entries")
}

fn filter(message: Message, own: &TrustDomain, operation: &'static str) -> Result<Filter, Failure> {
    let malformed = |text: &'static str| {
        move |error: WireError| match error {
            WireError::Match { .. } => Failure::internal(operation).because(error),
            error => Failure::invalid(text).because(error),
        }
    };
    let parent_id = message.by_parent_id.as_ref().map(|id| wire::member_id(Some(id), own)).transpose();
    let spiffe_id = message.by_spiffe_id.as_ref().map(|id| wire::workload_id(Some(id), own)).transpose();
    let selectors = message.by_selectors.as_ref().map(wire::selector_match).transpose();
    let federates_with = message.by_federates_with.as_ref().map(wire::federates_with_match).transpose();
    Ok(Filter {
        hint: message.by_hint,
        parent_id: parent_id.map_err(malformed("malformed parent ID filter"))?,
        spiffe_id: spiffe_id.map_err(malformed("malformed SPIFFE ID filter"))?,
        selectors: selectors.map_err(malformed("malformed selectors filter"))?,
        federates_with: federates_with.map_err(malformed("malformed federates with filter"))?,
        downstream: message.by_downstream.unwrap_or(false),
    })
}
