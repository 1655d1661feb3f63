//! A store that fails when it is told to. For tests: what was true before a failure must still be true after it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures_core::stream::BoxStream;

use super::error::EngineError;
use super::{Appended, Change, Group, Position, Record, Store, StoreError};

/// What happens to one write.
#[derive(Clone, Debug)]
pub enum Fault {
    /// It fails, and says that nothing was written.
    Before,
    /// It is written, and the answer is lost.
    After,
    /// It is not written, and the answer says that nobody knows.
    Unknown,
    /// Another server's group is written in its place.
    Rival(Group),
    /// There is no room for it.
    Full,
}

/// The cause that an injected fault gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("injected fault at write {0}")]
pub struct Injected(pub u64);

/// A store behind which writes fail at chosen numbers, counted from 1.
pub struct Faulty<S> {
    store: S,
    writes: AtomicU64,
    faults: Mutex<BTreeMap<u64, Fault>>,
}

impl<S: std::fmt::Debug> std::fmt::Debug for Faulty<S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Faulty").field("store", &self.store).field("faults", &self.faults).finish_non_exhaustive()
    }
}

impl<S: Store> Faulty<S> {
    /// The store with these faults, by number of the write.
    pub fn new(store: S, faults: impl IntoIterator<Item = (u64, Fault)>) -> Self {
        Self { store, writes: AtomicU64::new(0), faults: Mutex::new(faults.into_iter().collect()) }
    }

    /// How many writes were tried.
    pub fn writes(&self) -> u64 {
        self.writes.load(Ordering::SeqCst)
    }

    /// The store behind.
    pub fn store(&self) -> &S {
        &self.store
    }
}

#[async_trait]
impl<S: Store> Store for Faulty<S> {
    async fn load(&self) -> Result<(Position, BoxStream<'static, Result<Vec<Record>, StoreError>>), StoreError> {
        self.store.load().await
    }

    async fn append(&self, at: &Position, group: &Group) -> Result<Appended, StoreError> {
        let number = self.writes.fetch_add(1, Ordering::SeqCst) + 1;
        let fault = self.faults.lock().unwrap_or_else(PoisonError::into_inner).remove(&number);
        let cause = || -> EngineError { Arc::new(Injected(number)) };
        match fault {
            None => self.store.append(at, group).await,
            Some(Fault::Before) => Err(StoreError::Unreachable(cause())),
            Some(Fault::After) => {
                self.store.append(at, group).await?;
                Err(StoreError::Unknown(cause()))
            }
            Some(Fault::Unknown) => Err(StoreError::Unknown(cause())),
            Some(Fault::Rival(rival)) => {
                self.store.append(at, &rival).await?;
                self.store.append(at, group).await
            }
            Some(Fault::Full) => Err(StoreError::Full { free: 0, reserve: 0 }),
        }
    }

    fn watch(&self, after: Position) -> BoxStream<'static, Result<Change, StoreError>> {
        self.store.watch(after)
    }

    async fn head(&self) -> Result<Position, StoreError> {
        self.store.head().await
    }
}
