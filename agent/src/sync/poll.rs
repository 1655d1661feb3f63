//! SPIRE's way to learn the view: ask for it every few seconds (`spire.api.server.entry.v1`, `SyncAuthorizedEntries`).

use std::collections::BTreeMap;

use futures_util::{StreamExt as _, stream};
use spiffe::id::TrustDomain;
use spiffe_proto::authorized::SyncAuthorizedEntriesResponse;
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::bundle::{GetBundleRequest, GetFederatedBundleRequest};
use spiffe_proto::entry::SyncAuthorizedEntriesRequest;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::types::EntryMask;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Status, Streaming};

use super::offer;
use super::plan::{OfferedBundle, OfferedEntry, Step, Version, View};
use crate::cache::EntryId;
use crate::server_link::{CALL_DEADLINE, LARGEST_MESSAGE, Lease, LinkError, ServerLink};

/// How many entries one request asks for; what SPIRE's servers answer in one page.
const PAGE: usize = 500;
/// How many foreign bundles are asked for at the same time.
const BUNDLES_AT_ONCE: usize = 10;

/// The fields that agents read; SPIRE's agents ask for the same.
const MASK: EntryMask = EntryMask {
    spiffe_id: true,
    parent_id: false,
    selectors: true,
    x509_svid_ttl: false,
    federates_with: true,
    admin: true,
    downstream: true,
    expires_at: false,
    dns_names: false,
    revision_number: true,
    store_svid: true,
    jwt_svid_ttl: false,
    hint: true,
    created_at: true,
    additional_attributes: true,
};

/// Asks once for everything; answers the step from `view` to what the server has.
pub(super) async fn ask(link: &ServerLink, view: &View, own: &TrustDomain) -> Result<Step, LinkError> {
    let lease = link.lease().await?;
    let deadline = tokio::time::timeout(CALL_DEADLINE, entries(&lease, view)).await;
    let mut step = match deadline {
        Ok(Ok(step)) => step,
        Ok(Err(status)) => return Err(link.failed(&lease, status)),
        Err(_) => {
            link.release(lease.connection());
            return Err(LinkError::Deadline);
        }
    };
    // While it is held, the bundles' calls would wait for it to end if the connection is replaced.
    link.accepted(&lease);
    drop(lease);
    bundles(link, view, own, &mut step).await?;
    Ok(step)
}

async fn entries(lease: &Lease, view: &View) -> Result<Step, Status> {
    let (questions, requests) = mpsc::channel(1);
    let gone = |_| Status::unavailable("the stream ended");
    let first = SyncAuthorizedEntriesRequest { output_mask: Some(MASK), ids: Vec::new() };
    questions.send(first).await.map_err(gone)?;
    let mut client = EntryClient::new(lease.channel()).max_decoding_message_size(LARGEST_MESSAGE);
    let mut answers = client.sync_authorized_entries(ReceiverStream::new(requests)).await?.into_inner();

    let answer = next(&mut answers).await?;
    if answer.entry_revisions.is_empty() {
        return whole(view, answer, &mut answers).await;
    }
    let mut offered: BTreeMap<EntryId, Version> = BTreeMap::new();
    let mut answer = answer;
    loop {
        offered.extend(answer.revisions().map_err(malformed)?.into_iter().map(|entry| {
            let version = Version { revision: entry.revision_number, created_at: entry.created_at, content: None };
            (EntryId::from(entry.id), version)
        }));
        if !answer.more {
            break;
        }
        answer = next(&mut answers).await?;
    }
    let difference = view.compare(&offered);
    let mut fetched = Vec::with_capacity(difference.fetch.len());
    for page in difference.fetch.chunks(PAGE) {
        let ids = page.iter().map(ToString::to_string).collect();
        questions.send(SyncAuthorizedEntriesRequest { output_mask: None, ids }).await.map_err(gone)?;
        loop {
            let answer = next(&mut answers).await?;
            fetched.extend(sent(&answer)?);
            if !answer.more {
                break;
            }
        }
    }
    Ok(Step { entries: fetched, removed_entries: difference.drop, ..Step::default() })
}

/// A first answer with entries is the whole list.
async fn whole(
    view: &View,
    first: SyncAuthorizedEntriesResponse,
    answers: &mut Streaming<SyncAuthorizedEntriesResponse>,
) -> Result<Step, Status> {
    let (mut more, mut all) = (first.more, Vec::with_capacity(first.entries.len()));
    all.extend(sent(&first)?);
    while more {
        let answer = next(answers).await?;
        more = answer.more;
        all.extend(sent(&answer)?);
    }
    let offered: BTreeMap<EntryId, Version> = all.iter().map(|entry| (entry.id.clone(), entry.version)).collect();
    let difference = view.compare(&offered);
    let wanted = |entry: &OfferedEntry| difference.fetch.binary_search(&entry.id).is_ok();
    all.retain(wanted);
    Ok(Step { entries: all, removed_entries: difference.drop, ..Step::default() })
}

/// The entries of an answer.
fn sent(answer: &SyncAuthorizedEntriesResponse) -> Result<impl Iterator<Item = OfferedEntry>, Status> {
    Ok(answer.decoded().map_err(malformed)?.into_iter().map(|entry| offer::entry(entry, None)))
}

fn malformed(error: prost::DecodeError) -> Status {
    Status::internal(format!("the server's answer is malformed: {error}"))
}

async fn next(answers: &mut Streaming<SyncAuthorizedEntriesResponse>) -> Result<SyncAuthorizedEntriesResponse, Status> {
    answers.message().await?.ok_or_else(|| Status::unavailable("the server ended the stream before its answer"))
}

/// Adds the own bundle and those of all federated trust domains.
async fn bundles(link: &ServerLink, view: &View, own: &TrustDomain, step: &mut Step) -> Result<(), LinkError> {
    let own_bundle = link
        .call(|channel| async move { client(channel).get_bundle(GetBundleRequest { output_mask: None }).await })
        .await?;
    step.bundles.extend(offer::bundle(own_bundle));

    let mut federated = view.federated_after(step);
    federated.remove(own);
    let mut answers = stream::iter(federated.into_iter().map(|trust_domain| federated_bundle(link, trust_domain)))
        .buffer_unordered(BUNDLES_AT_ONCE);
    let mut found: Vec<OfferedBundle> = Vec::new();
    while let Some(answer) = answers.next().await {
        found.extend(answer?);
    }
    drop(answers);
    let gone = |name: &&TrustDomain| *name != own && !found.iter().any(|bundle| bundle.trust_domain == **name);
    step.removed_bundles = view.trust_domains().filter(gone).cloned().collect();
    step.bundles.append(&mut found);
    Ok(())
}

/// The bundle of a foreign trust domain, if the server has it.
async fn federated_bundle(link: &ServerLink, trust_domain: TrustDomain) -> Result<Option<OfferedBundle>, LinkError> {
    let result = link
        .call(|channel| {
            let request =
                GetFederatedBundleRequest { trust_domain: trust_domain.as_str().to_owned(), output_mask: None };
            async move { client(channel).get_federated_bundle(request).await }
        })
        .await;
    match result {
        Ok(message) => Ok(offer::bundle(message).filter(|bundle| bundle.trust_domain == trust_domain)),
        // The server does not have it (any more).
        Err(error) if error.code() == Some(Code::NotFound) => Ok(None),
        Err(error) => Err(error),
    }
}

fn client(channel: Channel) -> BundleClient<Channel> {
    BundleClient::new(channel).max_decoding_message_size(LARGEST_MESSAGE)
}
