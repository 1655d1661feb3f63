//! What every store must do, as one suite that each of them passes.

#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::future::Future;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt;

use super::memory::Keep;
use super::{
    Appended, Group, HistoryId, Kind, MAX_GROUP_BYTES, MAX_PART_RECORDS, MAX_VALUE_BYTES, Position, Record, RecordKey,
    Store, StoreError, Urgency, Write,
};
use crate::state::model::Scope;

/// How much of its log a store under test keeps.
pub(super) const KEEP: Keep = Keep { groups: 300, age: Duration::from_secs(60) };

pub(super) fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000 + seconds)
}

pub(super) fn key(id: &[u8]) -> RecordKey {
    RecordKey { scope: Scope::trust_domain(), kind: Kind::Entry, id: Bytes::copy_from_slice(id) }
}

pub(super) fn put(id: &[u8], value: &[u8]) -> Write {
    Write::Put(Record { key: key(id), value: Bytes::copy_from_slice(value) })
}

pub(super) fn group(number: u8, seconds: u64, writes: Vec<Write>) -> Group {
    Group::new([number; 16], at(seconds), Urgency::Normal, vec![writes])
}

pub(super) async fn records(store: &dyn Store) -> (Position, Vec<Record>) {
    let (position, mut pages) = store.load().await.unwrap();
    let mut all = Vec::new();
    while let Some(page) = pages.next().await {
        all.extend(page.unwrap());
    }
    all.sort_by(|one, other| one.key.cmp(&other.key));
    (position, all)
}

async fn commit(store: &dyn Store, at: &Position, group: &Group) -> Position {
    match store.append(at, group).await.unwrap() {
        Appended::Committed(position) => {
            assert_eq!(position, at.after(group));
            assert_eq!(store.head().await.unwrap(), position);
            position
        }
        Appended::Moved => panic!("the head moved by itself"),
    }
}

/// Runs the suite; `fresh` makes an empty store that keeps [`KEEP`] of its log.
pub(super) async fn run<S: Store + 'static, F: Future<Output = S>>(fresh: impl Fn() -> F) {
    begins_empty(&fresh().await).await;
    commits_in_order_at_one_head(&fresh().await).await;
    keeps_records_of_every_size(&fresh().await).await;
    refuses_what_is_too_large(&fresh().await).await;
    shows_every_group_to_watchers(Arc::new(fresh().await)).await;
    forgets_old_groups_and_says_so(&fresh().await).await;
    tells_a_fork(&fresh().await).await;
    goes_on_under_another_id(&fresh().await).await;
}

async fn goes_on_under_another_id(store: &dyn Store) {
    let start = store.head().await.unwrap();
    let one = commit(store, &start, &group(1, 0, vec![put(b"a", b"1")])).await;
    let next = HistoryId([0x5a; 16]);
    let begun = Group::beginning(Some(next), [2; 16], at(1), Urgency::Shrinking, vec![vec![put(b"b", b"2")]]);
    assert_eq!(Group::decode(begun.encoded().clone()).unwrap().history(), Some(next));
    let two = commit(store, &one, &begun).await;
    assert_eq!((two.history, two.revision), (next, 2));
    let three = commit(store, &two, &group(3, 2, vec![put(b"c", b"3")])).await;
    assert_eq!(three.history, next);
    let (position, records) = records(store).await;
    assert_eq!((position, records.len()), (three, 3));
    // Who followed the old history loads the new one.
    assert!(matches!(store.watch(one).next().await, Some(Err(StoreError::Forked))));
    let change = store.watch(two).next().await.unwrap().unwrap();
    assert_eq!((change.position, change.group.history()), (three, None));
    assert_eq!(store.append(&one, &group(4, 3, vec![put(b"d", b"4")])).await.unwrap(), Appended::Moved);
}

async fn begins_empty(store: &dyn Store) {
    let (position, records) = records(store).await;
    assert_eq!(position.revision, 0);
    assert_eq!(position.digest, [0; 32]);
    assert_eq!(position, store.head().await.unwrap());
    assert_eq!(records, vec![]);
}

async fn commits_in_order_at_one_head(store: &dyn Store) {
    let start = store.head().await.unwrap();
    let one = commit(store, &start, &group(1, 0, vec![put(b"a", b"1"), put(b"b", b"1")])).await;
    // Neither the past nor a position that never was is a head.
    let late = group(2, 0, vec![put(b"a", b"2")]);
    assert_eq!(store.append(&start, &late).await.unwrap(), Appended::Moved);
    let mut never = one;
    never.digest[0] ^= 1;
    assert_eq!(store.append(&never, &late).await.unwrap(), Appended::Moved);
    assert_eq!(store.head().await.unwrap(), one);

    let writes = vec![put(b"a", b"3"), Write::Delete(key(b"b")), put(b"c", b"3"), Write::Delete(key(b"none"))];
    let two = commit(store, &one, &group(3, 1, writes)).await;
    assert_eq!((one.revision, two.revision), (1, 2));
    assert_eq!(two.history, start.history);
    let expected = vec![
        Record { key: key(b"a"), value: Bytes::from_static(b"3") },
        Record { key: key(b"c"), value: Bytes::from_static(b"3") },
    ];
    assert_eq!(records(store).await, (two, expected));
    // The last write of one key counts, whatever came before in the group.
    let writes = vec![put(b"d", b"1"), Write::Delete(key(b"d")), Write::Delete(key(b"c")), put(b"c", b"4")];
    let three = commit(store, &two, &group(4, 1, writes)).await;
    let expected = vec![
        Record { key: key(b"a"), value: Bytes::from_static(b"3") },
        Record { key: key(b"c"), value: Bytes::from_static(b"4") },
    ];
    assert_eq!(records(store).await, (three, expected));
}

async fn keeps_records_of_every_size(store: &dyn Store) {
    let sizes = [0, 1, 5118, 5119, 5120, 5121, 10_238, 10_239, 30_000, MAX_VALUE_BYTES];
    let mut position = store.head().await.unwrap();
    // Growing and shrinking leaves nothing of the older value behind; keys that begin alike stay apart.
    for (round, shift) in [0, 3, 7, 5].into_iter().enumerate() {
        let value = |number: usize| vec![round as u8; sizes[(number + shift) % sizes.len()]];
        for number in 0..sizes.len() {
            let writes = vec![put(&vec![0; number], &value(number)), put(&[1, number as u8], b"")];
            position = commit(store, &position, &group(1, 0, writes)).await;
        }
        let (_, records) = records(store).await;
        assert_eq!(records.len(), 2 * sizes.len());
        for number in 0..sizes.len() {
            let id = vec![0; number];
            let found = records.iter().find(|record| record.key.id == id).unwrap();
            assert!(found.value == value(number), "round {round}, record {number}");
        }
    }
    for number in 0..sizes.len() {
        let writes = vec![Write::Delete(key(&vec![0; number])), Write::Delete(key(&[1, number as u8]))];
        position = commit(store, &position, &group(2, 0, writes)).await;
    }
    assert_eq!(records(store).await, (position, vec![]));
}

async fn refuses_what_is_too_large(store: &dyn Store) {
    let start = store.head().await.unwrap();
    let part = |records: usize| (0..records).map(|id| put(&id.to_be_bytes(), b"x")).collect::<Vec<_>>();
    let value = vec![put(b"a", &vec![0; MAX_VALUE_BYTES + 1])];
    let many: Vec<_> = (0..10u8).map(|id| vec![put(&[id], &vec![0; MAX_VALUE_BYTES])]).collect();
    assert!(many.len() * MAX_VALUE_BYTES > MAX_GROUP_BYTES);
    for parts in [vec![part(MAX_PART_RECORDS + 2)], vec![value], many] {
        let group = Group::new([9; 16], at(0), Urgency::Normal, parts);
        assert!(matches!(store.append(&start, &group).await, Err(StoreError::TooLarge)));
    }
    assert_eq!(records(store).await, (start, vec![]));
    // The largest that is allowed.
    let fitting: Vec<_> = (0..8u8).map(|id| vec![put(&[id], &vec![id; MAX_VALUE_BYTES])]).collect();
    let group = Group::new([8; 16], at(0), Urgency::Normal, fitting);
    commit(store, &start, &group).await;
    let follows = store.watch(start).next().await.unwrap().unwrap();
    assert_eq!(follows.group, group);
}

async fn shows_every_group_to_watchers(store: Arc<dyn Store>) {
    let start = store.head().await.unwrap();
    let early = Arc::clone(&store);
    let watcher =
        tokio::spawn(
            async move { early.watch(start).take(150).map(|change| change.unwrap()).collect::<Vec<_>>().await },
        );
    let mut position = start;
    let mut expected = Vec::new();
    for number in 0..150u8 {
        let group = group(number, u64::from(number), vec![put(&[number], &vec![number; 40 * usize::from(number)])]);
        position = commit(store.as_ref(), &position, &group).await;
        expected.push((position, group));
    }
    let seen = watcher.await.unwrap();
    let late: Vec<_> = store.watch(start).take(150).map(|change| change.unwrap()).collect().await;
    for seen in [seen, late] {
        let seen: Vec<_> = seen.into_iter().map(|change| (change.position, change.group)).collect();
        assert!(seen == expected);
    }
    let (middle, _) = expected[74];
    let rest: Vec<_> = store.watch(middle).take(75).map(|change| change.unwrap().position).collect().await;
    assert_eq!(rest, expected[75..].iter().map(|(position, _)| *position).collect::<Vec<_>>());
    // At the head there is nothing to see yet.
    assert!(futures_util::FutureExt::now_or_never(store.watch(position).next()).is_none());
}

async fn forgets_old_groups_and_says_so(store: &dyn Store) {
    let start = store.head().await.unwrap();
    let mut position = start;
    let mut positions = vec![start];
    // Far back, but not old: everything is kept.
    for number in 0..600u64 {
        position = commit(store, &position, &group(1, 0, vec![put(&number.to_be_bytes(), b"x")])).await;
        positions.push(position);
    }
    assert_eq!(store.watch(start).next().await.unwrap().unwrap().position, positions[1]);
    // Old as well: what is further back than 300 groups goes, now or at the next look.
    for _ in 0..300u64 {
        position = commit(store, &position, &group(2, 3600, vec![put(b"y", b"y")])).await;
        positions.push(position);
    }
    let mut watch = store.watch(start);
    assert!(matches!(watch.next().await, Some(Err(StoreError::Compacted))));
    assert!(watch.next().await.is_none());
    // The newest 300 are all there.
    let kept = positions[positions.len() - 301];
    let seen: Vec<_> = store.watch(kept).take(300).map(|change| change.unwrap().position).collect().await;
    assert_eq!(seen, positions[positions.len() - 300..]);
    // Stamps from the future are old too: a clock that was ahead makes nothing stay.
    for _ in 0..600u64 {
        position = commit(store, &position, &group(3, 120, vec![put(b"y", b"y")])).await;
    }
    assert!(matches!(store.watch(kept).next().await, Some(Err(StoreError::Compacted))));
    assert_eq!(records(store).await.1.len(), 601);
}

async fn tells_a_fork(store: &dyn Store) {
    let start = store.head().await.unwrap();
    let one = commit(store, &start, &group(1, 0, vec![put(b"a", b"1")])).await;
    let two = commit(store, &one, &group(2, 0, vec![put(b"a", b"2")])).await;
    let mut other_history = start;
    other_history.history.0[0] ^= 1;
    let mut other_past = one;
    other_past.digest[0] ^= 1;
    let mut other_head = two;
    other_head.digest[31] ^= 1;
    let ahead = two.after(&group(3, 0, vec![]));
    for elsewhere in [other_history, other_past, other_head, ahead] {
        let mut watch = store.watch(elsewhere);
        assert!(matches!(watch.next().await, Some(Err(StoreError::Forked))), "{elsewhere:?}");
        assert!(watch.next().await.is_none());
    }
}
