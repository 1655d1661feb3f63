#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::sync::Arc;
use std::time::Duration;

use super::contract::{self, KEEP, at, group, key, put, records};
use super::faulty::{Fault, Faulty};
use super::memory::Memory;
use super::sled::{Options, Sled};
use super::{Appended, HistoryId, Position, Store, StoreError, Urgency, Write};

mod committing;

const HISTORY: HistoryId = HistoryId([7; 16]);

fn options() -> Options {
    Options { keep: KEEP, reserve_bytes: 1024 * 1024, ..Options::default() }
}

#[tokio::test]
async fn memory_keeps_the_contract() {
    contract::run(|| async { Memory::keeping(HISTORY, KEEP) }).await;
}

#[tokio::test]
async fn a_faultless_faulty_store_keeps_the_contract() {
    contract::run(|| async { Faulty::new(Memory::keeping(HISTORY, KEEP), []) }).await;
}

#[tokio::test]
async fn sled_keeps_the_contract() {
    let root = tempfile::tempdir().unwrap();
    let number = std::cell::Cell::new(0);
    contract::run(|| {
        number.set(number.get() + 1);
        let directory = root.path().join(number.get().to_string());
        async move { Sled::open(&directory, HISTORY, options()).await.unwrap() }
    })
    .await;
}

#[tokio::test]
async fn sled_keeps_everything_over_a_restart() {
    let root = tempfile::tempdir().unwrap();
    let mut expected = None;
    let mut positions = Vec::new();
    for round in 0..4u8 {
        let store = Sled::open(root.path(), HistoryId([round; 16]), options()).await.unwrap();
        let found = records(&store).await;
        if let Some(expected) = expected {
            assert_eq!(found, expected);
        }
        let mut position = found.0;
        // The id given at the first opening stays.
        assert_eq!(position.history, HistoryId([0; 16]));
        positions.push(position);
        for number in 0..50u8 {
            let value = vec![round; 100 * usize::from(number)];
            let group = group(number, 0, vec![put(&[number], &value), put(&[round, number], b"new")]);
            let Appended::Committed(next) = store.append(&position, &group).await.unwrap() else { panic!("moved") };
            position = next;
        }
        expected = Some(records(&store).await);
        drop(store);
    }
    let store = Sled::open(root.path(), HISTORY, options()).await.unwrap();
    let seen =
        futures_util::StreamExt::collect::<Vec<_>>(futures_util::StreamExt::take(store.watch(positions[1]), 150)).await;
    let last = seen.into_iter().map(|change| change.unwrap().position).next_back();
    assert_eq!(last, expected.map(|(position, _)| position));
}

#[tokio::test]
async fn sled_refuses_a_second_process_with_a_sentence() {
    let root = tempfile::tempdir().unwrap();
    let first = Sled::open(root.path(), HISTORY, options()).await.unwrap();
    let error = Sled::open(root.path(), HISTORY, options()).await.unwrap_err();
    assert!(matches!(error, StoreError::InUse { .. }), "{error:?}");
    let directory = root.path().display();
    assert_eq!(error.to_string(), format!("{directory} is in use by another process: only one server can run on it"));
    drop(first);
    Sled::open(root.path(), HISTORY, options()).await.unwrap();
}

#[tokio::test]
async fn sled_watch_ends_with_its_store() {
    let root = tempfile::tempdir().unwrap();
    let store = Sled::open(root.path(), HISTORY, options()).await.unwrap();
    let mut watch = store.watch(store.head().await.unwrap());
    let waiting = tokio::spawn(async move { futures_util::StreamExt::next(&mut watch).await.is_none() });
    drop(store);
    assert!(waiting.await.unwrap());
}

#[tokio::test]
async fn sled_is_not_used_again_after_an_error() {
    let root = tempfile::tempdir().unwrap();
    let store = Sled::open(root.path(), HISTORY, options()).await.unwrap();
    let start = store.head().await.unwrap();
    let Appended::Committed(one) = store.append(&start, &group(1, 0, vec![put(b"a", b"1")])).await.unwrap() else {
        panic!("moved")
    };
    store.fail_next_sync().await;
    let failed = store.append(&one, &group(2, 0, vec![put(b"a", b"2")])).await;
    assert!(matches!(failed, Err(StoreError::Poisoned(_))), "{failed:?}");
    for _ in 0..2 {
        assert!(matches!(store.head().await, Err(StoreError::Poisoned(_))));
        assert!(matches!(store.load().await.map(|_| ()), Err(StoreError::Poisoned(_))));
        let again = store.append(&one, &group(3, 0, vec![put(b"a", b"3")])).await;
        assert!(matches!(again, Err(StoreError::Poisoned(_))));
    }
    drop(store);
    // Only a restart tells whether the second one was written; what was acknowledged is there in any case.
    let store = Sled::open(root.path(), HISTORY, options()).await.unwrap();
    let (position, found) = records(&store).await;
    let value = if position == one { b"1" } else { b"2" };
    assert_eq!(found, vec![super::Record { key: key(b"a"), value: bytes::Bytes::from_static(value) }]);
    assert_eq!(position, if value == b"1" { one } else { one.after(&group(2, 0, vec![put(b"a", b"2")])) });
}

/// A file system of its own, so full that only the reserve is left.
struct SmallDisk {
    root: tempfile::TempDir,
}

impl SmallDisk {
    /// `None` without the right to mount.
    fn mount(size: &str) -> Option<Self> {
        let root = tempfile::tempdir().unwrap();
        let none: Option<&str> = None;
        let flags = nix::mount::MsFlags::MS_NOSUID;
        nix::mount::mount(none, root.path(), Some("tmpfs"), flags, Some(size)).ok().map(|()| Self { root })
    }

    /// Lets a file of somebody else grow until `bytes` more are taken, or nothing is left.
    fn take(&self, bytes: usize) -> std::path::PathBuf {
        use std::io::Write as _;
        let path = self.root.path().join("somebody-elses");
        let mut file = std::fs::File::options().create(true).append(true).open(&path).unwrap();
        for block in std::iter::repeat_n([0; 4096], bytes / 4096) {
            if file.write_all(&block).is_err() {
                break;
            }
        }
        path
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = nix::mount::umount2(self.root.path(), nix::mount::MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn the_smallest_reserve_is_enough_for_renewals_and_then_for_deletes() {
    let Some(disk) = SmallDisk::mount("size=6m") else {
        eprintln!("not run: mounting a file system needs root");
        return;
    };
    let store = Sled::open(&disk.root.path().join("store"), HISTORY, Options::default()).await.unwrap();
    let start = store.head().await.unwrap();
    let appended = store.append(&start, &group(1, 0, vec![put(b"a", b"1")])).await.unwrap();
    let Appended::Committed(mut position) = appended else { panic!("moved") };
    let delete = || super::Group::new([3; 16], at(1), Urgency::Shrinking, vec![vec![Write::Delete(key(b"a"))]]);

    disk.take(usize::MAX);
    let ordinary = store.append(&position, &group(2, 0, vec![put(b"late", b"x")])).await;
    assert!(matches!(ordinary, Err(StoreError::Full { .. })), "{ordinary:?}");
    let vital = || super::Group::new([4; 16], at(1), Urgency::Vital, vec![vec![put(b"a", b"2")]]);
    for _ in 0..50 {
        let Appended::Committed(next) = store.append(&position, &vital()).await.unwrap() else { panic!("moved") };
        position = next;
    }
    // Somebody else takes what is given up for renewals: half of the reserve stays for deletes.
    let refusal = loop {
        disk.take(usize::MAX);
        match store.append(&position, &vital()).await {
            Ok(Appended::Committed(next)) => position = next,
            Ok(Appended::Moved) => panic!("moved"),
            Err(error) => break error,
        }
    };
    assert!(matches!(refusal, StoreError::Full { reserve: 1_572_864, .. }), "{refusal:?}");
    for _ in 0..50 {
        let Appended::Committed(next) = store.append(&position, &delete()).await.unwrap() else { panic!("moved") };
        position = next;
    }
    // Somebody else takes what is given up for them, until nothing is left of the reserve.
    let refusal = loop {
        disk.take(usize::MAX);
        match store.append(&position, &delete()).await {
            Ok(Appended::Committed(next)) => position = next,
            Ok(Appended::Moved) => panic!("moved"),
            Err(error) => break error,
        }
    };
    assert!(matches!(refusal, StoreError::Exhausted { .. }), "{refusal:?}");
    assert!(refusal.is_retryable());
    assert_eq!(store.head().await.unwrap(), position, "it is not poisoned");
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_still_takes_deletes() {
    let Some(disk) = SmallDisk::mount("size=24m") else {
        eprintln!("not run: mounting a file system needs root");
        return;
    };
    let directory = disk.root.path().join("store");
    disk.take(8 * 1024 * 1024);
    let options = Options { keep: super::memory::Keep::default(), ..Options::default() };
    let mut store = Sled::open(&directory, HISTORY, options).await.unwrap();
    let mut position = store.head().await.unwrap();

    // Written until it is refused.
    let mut written = Vec::new();
    let refusal = loop {
        let number = u32::try_from(written.len()).unwrap();
        let writes = (0..50u8).map(|part| put(&[&number.to_be_bytes()[..], &[part]].concat(), &[part; 400])).collect();
        match store.append(&position, &group(1, 0, writes)).await {
            Ok(Appended::Committed(next)) => {
                position = next;
                written.push(number);
            }
            Ok(Appended::Moved) => panic!("moved"),
            Err(error) => break error,
        }
    };
    assert!(matches!(refusal, StoreError::Full { .. }), "{refusal:?}");
    assert!(refusal.is_retryable());
    assert!(written.len() > 20, "{} groups", written.len());

    // Somebody else takes even the rest, and the server is restarted on the full disk.
    let foreign = disk.take(usize::MAX);
    let before = records(&store).await;
    assert_eq!(before.1.len(), 50 * written.len());
    drop(store);
    store = Sled::open(&directory, HISTORY, options).await.unwrap();
    assert_eq!(records(&store).await, before);

    // Ordinary writes are refused, and deletes are taken.
    let ordinary = store.append(&position, &group(2, 0, vec![put(b"late", b"x")])).await;
    assert!(matches!(ordinary, Err(StoreError::Full { .. })), "{ordinary:?}");
    for number in 0..20u32 {
        let id = [&number.to_be_bytes()[..], &[0]].concat();
        let delete = super::Group::new([3; 16], at(1), Urgency::Shrinking, vec![vec![Write::Delete(key(&id))]]);
        let Appended::Committed(next) = store.append(&position, &delete).await.unwrap() else { panic!("moved") };
        position = next;
    }
    let after = records(&store).await;
    assert_eq!(after.1.len(), 50 * written.len() - 20);
    drop(store);
    store = Sled::open(&directory, HISTORY, options).await.unwrap();
    assert_eq!(records(&store).await, after);

    // With room again, the reserve is made whole and everything is accepted.
    std::fs::remove_file(foreign).unwrap();
    let late = store.append(&position, &group(5, 2, vec![put(b"late", b"x")])).await;
    assert!(matches!(late, Ok(Appended::Committed(_))), "{late:?}");
}

#[tokio::test]
async fn faults_are_what_they_say() {
    let faults = [(1, Fault::Before), (2, Fault::Unknown), (3, Fault::After), (5, Fault::Full)];
    let store = Faulty::new(Memory::new(HISTORY), faults);
    let start = Position::start(HISTORY);
    let one = group(1, 0, vec![put(b"a", b"1")]);
    assert!(matches!(store.append(&start, &one).await, Err(StoreError::Unreachable(_))));
    assert!(matches!(store.append(&start, &one).await, Err(StoreError::Unknown(_))));
    assert_eq!(store.head().await.unwrap(), start);
    assert!(matches!(store.append(&start, &one).await, Err(StoreError::Unknown(_))));
    let after = start.after(&one);
    assert_eq!(store.head().await.unwrap(), after);
    assert_eq!(store.append(&start, &one).await.unwrap(), Appended::Moved);
    assert!(matches!(store.append(&after, &one).await, Err(StoreError::Full { .. })));
    assert_eq!(store.writes(), 5);
}

#[test]
fn positions_chain_over_everything_before() {
    let start = Position::start(HISTORY);
    let (one, two) = (group(1, 0, vec![put(b"a", b"1")]), group(1, 0, vec![put(b"a", b"2")]));
    assert_eq!(start.after(&one), start.after(&one));
    assert_ne!(start.after(&one), start.after(&two));
    assert_ne!(start.after(&one).after(&two), start.after(&two).after(&two));
    assert_eq!(start.after(&one).after(&two).revision, 2);
}

#[test]
fn groups_survive_their_bytes() {
    let whole = super::Group::new(
        [3; 16],
        at(5) + Duration::from_nanos(17),
        Urgency::Normal,
        vec![vec![put(b"", b""), Write::Delete(key(b"\0x"))], vec![], vec![put(b"k", &[0xff; 70])]],
    );
    assert_eq!(super::Group::decode(whole.encoded().clone()).unwrap(), whole);
    let before = std::time::SystemTime::UNIX_EPOCH - Duration::from_millis(1500);
    let early = super::Group::new([0; 16], before, Urgency::Normal, vec![]);
    assert_eq!(super::Group::decode(early.encoded().clone()).unwrap().at(), before);
}

#[tokio::test]
async fn memory_is_shared_by_its_clones() {
    let store = Memory::new(HISTORY);
    let other: Arc<dyn Store> = Arc::new(store.clone());
    let start = store.head().await.unwrap();
    assert!(matches!(other.append(&start, &group(1, 0, vec![])).await.unwrap(), Appended::Committed(_)));
    assert_eq!(store.head().await.unwrap().revision, 1);
}
