//! The embedded store: sled 0.34, used in the one way in which it is safe.
//!
//! - One thread touches sled, and only one: 0.34 can deadlock under parallel reads and inserts.
//! - A group is one transaction over the trees `log` and `state`.
//! - A blocking `flush`, then our own `sync_data` on `DIR/db`: sled's flush starts the write-out and does not
//!   wait for the drive. Never `flush_async`, which hangs with two callers.
//! - No row above 5 KiB: a leaf of large rows would be written to a file of its own, which sled never syncs.
//! - After any error the handle is poisoned: what is on disk is intact, what is in sled's memory may not be.
//! - A file of reserved space is given up, step by step, to renewals, deletes and bans when the disk is full.

mod rows;
mod space;
mod thread;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use futures_core::stream::BoxStream;
use futures_util::StreamExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::ReceiverStream;

use self::thread::{Command, Head};
use super::memory::Keep;
use super::{Appended, Change, Group, HistoryId, Position, Record, Store, StoreError};

/// How a store is kept.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// How much of the log is kept.
    pub keep: Keep,
    /// Memory for sled's page cache, in bytes; it takes about twice as much. Reads are served from the
    /// state in memory, so this only serves loading and rewriting.
    pub cache_bytes: u64,
    /// The largest reserve for renewals, deletes and bans, in bytes; on a small disk it is an eighth of the disk.
    pub reserve_bytes: u64,
}

impl Default for Options {
    fn default() -> Self {
        Self { keep: Keep::default(), cache_bytes: 4 * 1024 * 1024, reserve_bytes: 16 * 1024 * 1024 }
    }
}

/// A store in a directory of its own. Dropping it closes it; the drop waits for a write that is under way.
pub struct Sled {
    directory: PathBuf,
    commands: Option<mpsc::Sender<Command>>,
    head: watch::Receiver<Head>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
}

impl std::fmt::Debug for Sled {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sled").field("directory", &self.directory).finish_non_exhaustive()
    }
}

/// Commands that may wait for the thread; who comes later waits to be let in.
const QUEUE: usize = 64;

impl Sled {
    /// Opens the store in `directory`, which is made if it is not there; a new store gets the id `history`.
    ///
    /// # Errors
    /// [`StoreError::InUse`] if another process has it open; [`StoreError::Open`] if it cannot be read.
    pub async fn open(directory: &Path, history: HistoryId, options: Options) -> Result<Self, StoreError> {
        let (commands, queue) = mpsc::channel(QUEUE);
        let (opened, answer) = oneshot::channel();
        let place = directory.to_owned();
        let failed = |source| StoreError::Open { directory: directory.to_owned(), source };
        let thread = std::thread::Builder::new()
            .name("history".to_owned())
            .spawn(move || thread::run(&place, history, options, queue, opened))
            .map_err(|error| failed(Arc::new(error)))?;
        let head = answer.await.map_err(|error| failed(Arc::new(error)))??;
        Ok(Self { directory: directory.to_owned(), commands: Some(commands), head, thread: Mutex::new(Some(thread)) })
    }

    /// Where it is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    #[cfg(test)]
    pub(super) async fn fail_next_sync(&self) {
        let Some(commands) = &self.commands else { return };
        commands.send(Command::FailNextSync).await.ok();
    }

    async fn ask<A>(&self, command: impl FnOnce(oneshot::Sender<A>) -> Command) -> Result<A, StoreError> {
        let (reply, answer) = oneshot::channel();
        let commands = self.commands.as_ref().ok_or_else(|| self.gone())?;
        commands.send(command(reply)).await.map_err(|_| self.gone())?;
        answer.await.map_err(|_| self.gone())
    }

    /// The thread ends by itself only after a panic in sled.
    fn gone(&self) -> StoreError {
        StoreError::Poisoned(Arc::new(ThreadGone))
    }
}

/// The thread that owns sled has ended.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the store's thread has ended")]
struct ThreadGone;

impl Drop for Sled {
    fn drop(&mut self) {
        // Closing the queue ends the thread, which closes sled and gives the lock back before this returns.
        self.commands = None;
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take()
            && thread.join().is_err()
        {
            tracing::error!("The store's thread panicked");
        }
    }
}

/// Pages of a load that are read ahead of whoever takes them.
const PAGES_AHEAD: usize = 4;

#[async_trait]
impl Store for Sled {
    /// Appends wait until the pages are taken, or the stream is dropped.
    async fn load(&self) -> Result<(Position, BoxStream<'static, Result<Vec<Record>, StoreError>>), StoreError> {
        let (pages, stream) = mpsc::channel(PAGES_AHEAD);
        let position = self.ask(|reply| Command::Load { reply, pages }).await??;
        Ok((position, ReceiverStream::new(stream).boxed()))
    }

    async fn append(&self, at: &Position, group: &Group) -> Result<Appended, StoreError> {
        let (at, group) = (*at, group.clone());
        self.ask(|reply| Command::Append { at, group, reply }).await?
    }

    fn watch(&self, after: Position) -> BoxStream<'static, Result<Change, StoreError>> {
        let Some(commands) = self.commands.clone() else {
            return futures_util::stream::iter([Err(self.gone())]).boxed();
        };
        // A watcher must not keep the thread alive when the store is dropped.
        let watching =
            Watching { commands: commands.downgrade(), head: self.head.clone(), after, ready: VecDeque::new() };
        futures_util::stream::unfold(Some(watching), |watching| async move {
            let mut watching = watching?;
            match watching.next().await? {
                Ok(change) => Some((Ok(change), Some(watching))),
                Err(error) => Some((Err(error), None)),
            }
        })
        .boxed()
    }

    async fn head(&self) -> Result<Position, StoreError> {
        self.head.borrow().clone()
    }
}

struct Watching {
    commands: mpsc::WeakSender<Command>,
    head: watch::Receiver<Head>,
    after: Position,
    ready: VecDeque<Change>,
}

impl Watching {
    /// The next group; waits for one to come. `None` when the store is closed.
    async fn next(&mut self) -> Option<Result<Change, StoreError>> {
        loop {
            if let Some(change) = self.ready.pop_front() {
                self.after = change.position;
                return Some(Ok(change));
            }
            let (reply, answer) = oneshot::channel();
            self.commands.upgrade()?.send(Command::Log { after: self.after, reply }).await.ok()?;
            match answer.await.ok()? {
                Ok(changes) if changes.is_empty() => {}
                Ok(changes) => {
                    self.ready = changes.into();
                    continue;
                }
                Err(error) => return Some(Err(error)),
            }
            let revision = self.after.revision;
            let moved = |head: &Head| head.as_ref().map_or(true, |head| head.revision > revision);
            if let Err(error) = self.head.wait_for(moved).await.ok()?.as_ref() {
                return Some(Err(error.clone()));
            }
        }
    }
}
