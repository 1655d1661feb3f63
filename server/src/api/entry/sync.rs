//! SyncAuthorizedEntries: what an agent may have, compared by revision and fetched by id.
//!
//! Few entries are sent at once. Of many, first only the revisions are sent; the agent then asks for those that it
//! does not have. Pages of both kinds say whether more of their kind follow.

use std::collections::HashMap;
use std::sync::Arc;

use spiffe_proto::authorized::SyncAuthorizedEntriesResponse;
use spiffe_proto::entry as proto;
use spiffe_proto::types;
use tonic::Streaming;

use crate::api::status::Failure;
use crate::api::stream::Outlet;
use crate::api::wire::encode;
use crate::state::model::Entry;

/// Entries, or revisions, in one answer.
pub(super) const PAGE: usize = 500;

/// The client ended its side without asking for anything.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("EOF")]
struct EndOfRequests;

/// Answers the requests of one stream from `entries`, by pages of `page`.
pub(super) async fn answer(
    mut requests: Streaming<proto::SyncAuthorizedEntriesRequest>,
    outlet: &Outlet<SyncAuthorizedEntriesResponse>,
    entries: &[Arc<Entry>],
    page: usize,
) -> Result<(), Failure> {
    let unread = "failed to receive request from stream";
    let first = requests.message().await.map_err(|error| Failure::invalid(unread).because(error))?;
    let first = first.ok_or_else(|| Failure::invalid(unread).because(EndOfRequests))?;
    let mask = checked_mask(first)?;
    if entries.len() <= page {
        outlet.send(full(entries, mask.as_ref(), false)).await;
        return Ok(());
    }
    for (revisions, more) in pages(entries, page) {
        outlet.send(sparse(revisions, more)).await;
    }
    let by_id: HashMap<&str, &Arc<Entry>> = entries.iter().map(|entry| (&*entry.id, entry)).collect();
    // The end of the client's side is the end of the conversation, however it comes.
    while let Ok(Some(request)) = requests.message().await {
        let wanted = wanted(&by_id, request.ids);
        if wanted.is_empty() {
            outlet.send(full(&[], mask.as_ref(), false)).await;
        }
        for (entries, more) in pages(&wanted, page) {
            outlet.send(full(entries, mask.as_ref(), more)).await;
        }
    }
    Ok(())
}

/// The mask of the first request, which holds for the whole conversation.
fn checked_mask(first: proto::SyncAuthorizedEntriesRequest) -> Result<Option<types::EntryMask>, Failure> {
    if !first.ids.is_empty() {
        return Err(Failure::invalid("specifying IDs on initial request is not supported"));
    }
    if first.output_mask.as_ref().is_some_and(|mask| !mask.revision_number) {
        return Err(Failure::invalid("revision number cannot be masked"));
    }
    Ok(first.output_mask)
}

/// The entries that `ids` name, in the order of their ids; what the agent may not have is left out silently.
fn wanted(by_id: &HashMap<&str, &Arc<Entry>>, mut ids: Vec<String>) -> Vec<Arc<Entry>> {
    ids.sort_unstable();
    ids.iter().filter_map(|id| by_id.get(id.as_str()).map(|entry| Arc::clone(entry))).collect()
}

/// `items` in pages, each with whether more follow.
fn pages<T>(items: &[T], page: usize) -> impl Iterator<Item = (&[T], bool)> {
    let last = items.len().div_ceil(page).saturating_sub(1);
    items.chunks(page).enumerate().map(move |(number, chunk)| (chunk, number < last))
}

fn full(entries: &[Arc<Entry>], mask: Option<&types::EntryMask>, more: bool) -> SyncAuthorizedEntriesResponse {
    SyncAuthorizedEntriesResponse { entry_revisions: Vec::new(), entries: encode::entries(entries, mask), more }
}

fn sparse(entries: &[Arc<Entry>], more: bool) -> SyncAuthorizedEntriesResponse {
    SyncAuthorizedEntriesResponse { entry_revisions: encode::revisions(entries), entries: Vec::new(), more }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_page_says_that_nothing_follows() {
        let cut = |count: usize| -> Vec<(usize, bool)> {
            pages(&vec![0; count], 3).map(|(page, more)| (page.len(), more)).collect()
        };
        assert_eq!(cut(0), []);
        assert_eq!(cut(3), [(3, false)]);
        assert_eq!(cut(4), [(3, true), (1, false)]);
        assert_eq!(cut(6), [(3, true), (3, false)]);
    }

    #[test]
    fn the_first_request_names_no_ids_and_does_not_mask_revisions() {
        let request = |ids: &[&str], output_mask| proto::SyncAuthorizedEntriesRequest {
            ids: ids.iter().map(|id| (*id).to_owned()).collect(),
            output_mask,
        };
        let refused = |request| checked_mask(request).unwrap_err().text();
        assert_eq!(refused(request(&["a"], None)), "specifying IDs on initial request is not supported");
        let masked = types::EntryMask { spiffe_id: true, ..types::EntryMask::default() };
        assert_eq!(refused(request(&[], Some(masked))), "revision number cannot be masked");
        assert_eq!(checked_mask(request(&[], None)).unwrap(), None);
        let kept = types::EntryMask { revision_number: true, ..types::EntryMask::default() };
        assert_eq!(checked_mask(request(&[], Some(kept))).unwrap(), Some(kept));
    }
}
