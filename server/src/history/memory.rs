//! A store in memory: for tests, and for trials that may forget.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use futures_core::stream::BoxStream;
use futures_util::StreamExt;
use tokio::sync::watch;

use super::{Appended, Change, Group, HistoryId, Position, Record, RecordKey, Store, StoreError, Write};

/// How much of the log is kept: a group goes when it is both older and further back than this.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Groups.
    pub groups: u64,
    /// Age, counted from the newest stamp.
    pub age: Duration,
}

impl Keep {
    /// Whether a group that was stamped `then` is old once one is stamped `newest`. What was stamped later than the
    /// newest is old: the clock was wrong, and nothing is kept for ever because of that.
    pub(super) fn is_old(&self, then: SystemTime, newest: SystemTime) -> bool {
        newest.duration_since(then).map_or(true, |age| age > self.age)
    }
}

impl Default for Keep {
    fn default() -> Self {
        Self { groups: 100_000, age: Duration::from_secs(3600) }
    }
}

/// How many records a page of [`Store::load`] has.
const PAGE: usize = 1000;

/// A history that lives as long as this value. Cheap to clone; clones are the same store.
#[derive(Clone, Debug)]
pub struct Memory {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    held: Mutex<Held>,
    head: watch::Sender<Position>,
    keep: Keep,
}

#[derive(Debug)]
struct Held {
    head: Position,
    records: BTreeMap<RecordKey, Bytes>,
    /// Where the kept log begins, and what follows.
    oldest: Position,
    log: VecDeque<Change>,
}

impl Memory {
    /// An empty history with this id.
    pub fn new(history: HistoryId) -> Self {
        Self::keeping(history, Keep::default())
    }

    /// An empty history that keeps so much of its log.
    pub fn keeping(history: HistoryId, keep: Keep) -> Self {
        let start = Position::start(history);
        let held = Held { head: start, records: BTreeMap::new(), oldest: start, log: VecDeque::new() };
        Self { inner: Arc::new(Inner { held: Mutex::new(held), head: watch::channel(start).0, keep }) }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.inner.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl Store for Memory {
    async fn load(&self) -> Result<(Position, BoxStream<'static, Result<Vec<Record>, StoreError>>), StoreError> {
        let held = self.held();
        let records: Vec<Record> =
            held.records.iter().map(|(key, value)| Record { key: key.clone(), value: value.clone() }).collect();
        let pages: Vec<_> = records.chunks(PAGE).map(|page| Ok(page.to_vec())).collect();
        Ok((held.head, futures_util::stream::iter(pages).boxed()))
    }

    async fn append(&self, at: &Position, group: &Group) -> Result<Appended, StoreError> {
        group.check_size()?;
        let mut held = self.held();
        if held.head != *at {
            return Ok(Appended::Moved);
        }
        let position = at.after(group);
        for write in group.writes() {
            match write {
                Write::Put(record) => held.records.insert(record.key.clone(), record.value.clone()),
                Write::Delete(key) => held.records.remove(key),
            };
        }
        held.head = position;
        held.log.push_back(Change { position, group: group.clone() });
        let keep = self.inner.keep;
        while held.log.front().is_some_and(|oldest| {
            position.revision - oldest.position.revision >= keep.groups && keep.is_old(oldest.group.at(), group.at())
        }) {
            if let Some(gone) = held.log.pop_front() {
                held.oldest = gone.position;
            }
        }
        drop(held);
        self.inner.head.send_replace(position);
        Ok(Appended::Committed(position))
    }

    fn watch(&self, after: Position) -> BoxStream<'static, Result<Change, StoreError>> {
        let head = self.inner.head.subscribe();
        futures_util::stream::unfold(Some((self.clone(), head, after)), |watching| async move {
            let (store, mut head, after) = watching?;
            loop {
                let next = store.held().next_after(&after);
                match next {
                    Err(error) => return Some((Err(error), None)),
                    Ok(Some(change)) => {
                        let position = change.position;
                        return Some((Ok(change), Some((store, head, position))));
                    }
                    Ok(None) => {}
                }
                head.wait_for(|head| head.revision > after.revision).await.ok()?;
            }
        })
        .boxed()
    }

    async fn head(&self) -> Result<Position, StoreError> {
        Ok(self.held().head)
    }
}

impl Held {
    fn next_after(&self, after: &Position) -> Result<Option<Change>, StoreError> {
        if after.history != self.head.history || after.revision > self.head.revision {
            return Err(StoreError::Forked);
        }
        let Some(offset) = after.revision.checked_sub(self.oldest.revision) else {
            return Err(StoreError::Compacted);
        };
        let place = usize::try_from(offset).map_err(|_| StoreError::Forked)?;
        let before = match place.checked_sub(1) {
            None => Some(&self.oldest),
            Some(previous) => self.log.get(previous).map(|change| &change.position),
        };
        if before != Some(after) {
            return Err(StoreError::Forked);
        }
        Ok(self.log.get(place).cloned())
    }
}
