use spiffe_proto::agent::BanAgentRequest;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::*;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;

use super::*;

fn parent() -> SpiffeId {
    SpiffeId::parse("spiffe://example.org/spire/agent/x").unwrap()
}

async fn create(server: &Server, entries: Vec<types::Entry>) -> Vec<(i32, String, Option<types::Entry>)> {
    let request = BatchCreateEntryRequest { entries, output_mask: None };
    let made = EntryClient::new(server.local()).batch_create_entry(request).await.unwrap().into_inner();
    made.results
        .into_iter()
        .map(|result| {
            let status = result.status.unwrap();
            (status.code, status.message, result.entry)
        })
        .collect()
}

#[tokio::test(start_paused = true)]
async fn each_item_of_a_batch_has_its_own_verdict_and_a_similar_entry_is_given_back() {
    let server = Server::start().await;
    let first = entry(&parent(), "a");
    let made = create(
        &server,
        vec![
            types::Entry { id: "mine".into(), hint: "first".into(), ..first.clone() },
            types::Entry { hint: "second".into(), ..first.clone() },
            types::Entry { id: "mine".into(), ..entry(&parent(), "b") },
            types::Entry { federates_with: vec!["other.test".into()], ..entry(&parent(), "c") },
            types::Entry { spiffe_id: None, ..entry(&parent(), "d") },
        ],
    )
    .await;
    let told: Vec<(i32, &str)> = made.iter().map(|(code, text, _)| (*code, text.as_str())).collect();
    assert_eq!(
        told,
        [
            (0, "OK"),
            (6, "similar entry already exists"),
            (6, "failed to create entry: an entry with this id exists"),
            (13, "failed to create entry: unable to find federated bundle \"spiffe://other.test\""),
            (3, "failed to convert entry: invalid spiffe ID: request must specify SPIFFE ID"),
        ]
    );
    let (entry, existing) = (made[0].2.as_ref().unwrap(), made[1].2.as_ref().unwrap());
    assert_eq!((entry.id.as_str(), entry.revision_number, entry.created_at), ("mine", 0, 1_700_000_000));
    assert_eq!(entry, existing);
    assert!(made[2..].iter().all(|(.., entry)| entry.is_none()));
    assert_eq!(server.history.replica().latest().entry_count(), 1);
}

#[tokio::test(start_paused = true)]
async fn updates_follow_their_mask_and_bump_the_revision() {
    let server = Server::start().await;
    let id = server.entries(&parent(), ["a".to_owned()]).await.remove(0);
    let update = async |message: types::Entry, input_mask| {
        let request = BatchUpdateEntryRequest { entries: vec![message], input_mask, output_mask: None };
        let answer = EntryClient::new(server.local()).batch_update_entry(request).await.unwrap().into_inner();
        let result = answer.results.into_iter().next().unwrap();
        (result.status.unwrap(), result.entry)
    };
    let message = types::Entry { id: id.clone(), hint: "h".into(), admin: true, ..types::Entry::default() };
    let mask = types::EntryMask { hint: true, ..types::EntryMask::default() };
    let (status, changed) = update(message.clone(), Some(mask)).await;
    let changed = changed.unwrap();
    assert_eq!((status.code, changed.hint.as_str(), changed.admin, changed.revision_number), (0, "h", false, 1));
    let (_, unchanged) = update(message.clone(), Some(types::EntryMask::default())).await;
    assert_eq!(unchanged.unwrap().revision_number, 2);
    let (status, _) = update(types::Entry { id: "none".into(), ..message.clone() }, Some(mask)).await;
    assert_eq!((status.code, status.message.as_str()), (5, "failed to update entry"));
    let (status, _) = update(message, None).await;
    assert_eq!(status.message, "failed to convert entry: invalid parent ID: request must specify SPIFFE ID");
}

#[tokio::test(start_paused = true)]
async fn deletions_are_told_by_id() {
    let server = Server::start().await;
    let id = server.entries(&parent(), ["a".to_owned()]).await.remove(0);
    let request = BatchDeleteEntryRequest { ids: vec![id.clone(), id.clone(), String::new()] };
    let told = EntryClient::new(server.local()).batch_delete_entry(request).await.unwrap().into_inner().results;
    let told: Vec<_> = told
        .into_iter()
        .map(|result| {
            let status = result.status.unwrap();
            (result.id, status.code, status.message)
        })
        .collect();
    let expected = [
        (id.clone(), 0, "OK".to_owned()),
        (id, 5, "entry not found".to_owned()),
        (String::new(), 3, "missing entry ID".to_owned()),
    ];
    assert_eq!(told, expected);
}

#[tokio::test(start_paused = true)]
async fn lists_are_filtered_masked_and_paged() {
    let server = Server::start().await;
    let ids = server.entries(&parent(), (0..5).map(|n| format!("w{n}"))).await;
    let mut local = EntryClient::new(server.local());
    let mask = types::EntryMask { spiffe_id: true, ..types::EntryMask::default() };
    let request = ListEntriesRequest { output_mask: Some(mask), page_size: 3, ..Default::default() };
    let page = local.list_entries(request).await.unwrap().into_inner();
    assert_eq!(page.entries.iter().map(|entry| entry.id.clone()).collect::<Vec<_>>(), ids[..3]);
    assert!(page.entries.iter().all(|entry| entry.spiffe_id.is_some() && entry.selectors.is_empty()));
    assert!(!page.next_page_token.is_empty());
    let filter = list_entries_request::Filter {
        by_spiffe_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: "/w4".into() }),
        ..Default::default()
    };
    let request = ListEntriesRequest { filter: Some(filter), ..Default::default() };
    let page = local.list_entries(request).await.unwrap().into_inner();
    assert_eq!((page.entries.len(), page.entries[0].id.as_str()), (1, ids[4].as_str()));
    assert_eq!(local.count_entries(CountEntriesRequest::default()).await.unwrap().into_inner().count, 5);
    let empty =
        count_entries_request::Filter { by_selectors: Some(types::SelectorMatch::default()), ..Default::default() };
    let refused = local.count_entries(CountEntriesRequest { filter: Some(empty) }).await;
    assert_refused(refused, Code::InvalidArgument, "malformed selectors filter: empty selector set");
    let found = local.get_entry(GetEntryRequest { id: ids[0].clone(), output_mask: None }).await.unwrap();
    assert_eq!(found.into_inner().parent_id, wire_id(&parent()));
    let missing = local.get_entry(GetEntryRequest { id: "none".into(), output_mask: None }).await;
    assert_refused(missing, Code::NotFound, "entry not found");
    assert_refused(local.get_entry(GetEntryRequest::default()).await, Code::InvalidArgument, "missing ID");
}

#[tokio::test(start_paused = true)]
async fn few_entries_are_synced_at_once() {
    let server = Server::start().await;
    let (agent, id) = server.agent().await;
    let mut ids = server.entries(&id, (0..3).map(|n| format!("w{n}"))).await;
    let first = tokio_stream::once(SyncAuthorizedEntriesRequest::default());
    let mut answers = EntryClient::new(agent).sync_authorized_entries(first).await.unwrap().into_inner();
    let answer = answers.message().await.unwrap().unwrap();
    let mut got: Vec<String> = answer.decoded().unwrap().into_iter().map(|entry| entry.id).collect();
    got.sort();
    ids.sort();
    assert_eq!((got, answer.more, answer.entry_revisions.len()), (ids, false, 0));
    assert_eq!(answers.message().await.unwrap(), None);
}

#[tokio::test(start_paused = true)]
async fn many_entries_are_compared_by_revision_and_fetched_by_id_until_the_agent_is_banned() {
    let server = Server::start().await;
    let (agent, id) = server.agent().await;
    let mut ids = server.entries(&id, (0..501).map(|n| format!("w{n}"))).await;
    ids.sort();
    let (requests, stream) = mpsc::channel(4);
    requests.send(SyncAuthorizedEntriesRequest::default()).await.unwrap();
    let mut answers =
        EntryClient::new(agent).sync_authorized_entries(ReceiverStream::new(stream)).await.unwrap().into_inner();
    let (mut revisions, mut more) = (Vec::new(), Vec::new());
    for _ in 0..2 {
        let answer = answers.message().await.unwrap().unwrap();
        more.push((answer.entry_revisions.len(), answer.more, answer.entries.len()));
        revisions.extend(answer.revisions().unwrap().into_iter().map(|entry| {
            assert_eq!((entry.revision_number, entry.created_at), (0, 1_700_000_000));
            entry.id
        }));
    }
    revisions.sort();
    assert_eq!((revisions, more), (ids.clone(), vec![(500, true, 0), (1, false, 0)]));

    let mut wanted: Vec<String> = ids[..2].iter().rev().cloned().collect();
    wanted.push("not-mine".to_owned());
    requests.send(SyncAuthorizedEntriesRequest { output_mask: None, ids: wanted }).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    let entries = answer.decoded().unwrap();
    assert_eq!(entries.iter().map(|entry| entry.id.clone()).collect::<Vec<_>>(), ids[..2]);
    assert!(!answer.more && entries[0].spiffe_id.is_some());

    requests.send(SyncAuthorizedEntriesRequest { output_mask: None, ids: vec!["not-mine".into()] }).await.unwrap();
    let answer = answers.message().await.unwrap().unwrap();
    assert_eq!((answer.entries.len(), answer.more), (0, false));

    let mut local = spiffe_proto::agent::agent_client::AgentClient::new(server.local());
    local.ban_agent(BanAgentRequest { id: wire_id(&id) }).await.unwrap();
    let status = answers.message().await.unwrap_err();
    assert_eq!((status.code(), reason(&status)), (Code::PermissionDenied, Some(Reason::AgentBanned)));
}
