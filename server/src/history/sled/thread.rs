//! The one thread that touches sled.

use std::fs::{DirBuilder, File};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use sled::transaction::{ConflictableTransactionError, TransactionError, TransactionalTree};
use sled::{Db, Transactional, Tree};
use tokio::sync::{mpsc, oneshot, watch};

use super::super::error::EngineError;
use super::super::memory::Keep;
use super::super::record::RecordError;
use super::super::{Appended, Change, Group, HistoryId, Position, Record, StoreError, Write};
use super::Options;
use super::rows::{self, HEAD_KEY, LogHead, Row};
use super::space::Space;

/// The newest position, or why there is none any more.
pub(super) type Head = Result<Position, StoreError>;

/// What the thread is asked to do.
pub(super) enum Command {
    /// Append a group.
    Append { at: Position, group: Group, reply: oneshot::Sender<Result<Appended, StoreError>> },
    /// All records, at one position.
    Load { reply: oneshot::Sender<Result<Position, StoreError>>, pages: mpsc::Sender<Result<Vec<Record>, StoreError>> },
    /// Some groups after a position; none if it is the head.
    Log { after: Position, reply: oneshot::Sender<Result<Vec<Change>, StoreError>> },
    /// Let the sync of the next write fail.
    #[cfg(test)]
    FailNextSync,
}

/// How many records a page of a load has.
const PAGE: usize = 1000;
/// How many groups, and how many bytes of them, are read at a time.
const LOG_PAGE: usize = 64;
const LOG_PAGE_BYTES: usize = 1024 * 1024;
/// How often the log is looked over for groups to remove, and how many are removed then.
const COMPACT_EVERY: u64 = 256;
const COMPACT_AT_ONCE: usize = 1024;

/// Opens the store, says so, and works until the queue is closed.
pub(super) fn run(
    directory: &Path,
    history: HistoryId,
    options: Options,
    mut queue: mpsc::Receiver<Command>,
    opened: oneshot::Sender<Result<watch::Receiver<Head>, StoreError>>,
) {
    let mut engine = match Engine::open(directory, history, options) {
        Ok(engine) => engine,
        Err(error) => {
            // Who dropped its call does not want the answer.
            let _ = opened.send(Err(error));
            return;
        }
    };
    if opened.send(Ok(engine.head.subscribe())).is_err() {
        return;
    }
    while let Some(command) = queue.blocking_recv() {
        engine.obey(command);
    }
}

/// What sled says of damaged files helps nobody who has to do something about them.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("its files are damaged: restore the directory from a backup")]
struct Damaged;

struct Engine {
    // Closed before the lock is given back.
    db: Db,
    log: Tree,
    state: Tree,
    file: File,
    space: Space,
    keep: Keep,
    at: Position,
    head: watch::Sender<Head>,
    #[cfg(test)]
    fail_next_sync: bool,
    _lock: Flock<File>,
}

impl Engine {
    fn open(directory: &Path, history: HistoryId, options: Options) -> Result<Self, StoreError> {
        let failed = |source: EngineError| StoreError::Open { directory: directory.to_owned(), source };
        let io = |error: io::Error| failed(Arc::new(error));
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io)?;
        let lock = File::options().create(true).write(true).truncate(false).open(directory.join("lock")).map_err(io)?;
        let lock = Flock::lock(lock, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| match errno {
            Errno::EWOULDBLOCK => StoreError::InUse { directory: directory.to_owned() },
            errno => io(errno.into()),
        })?;
        let space = Space::open(directory, options.reserve_bytes).map_err(io)?;
        let engine = |error: sled::Error| match error {
            sled::Error::Corruption { .. } => failed(Arc::new(Damaged)),
            error => failed(Arc::new(error)),
        };
        let db = sled::Config::new()
            .path(directory)
            .cache_capacity(options.cache_bytes)
            .flush_every_ms(None)
            .open()
            .map_err(engine)?;
        let log = db.open_tree("log").map_err(engine)?;
        let state = db.open_tree("state").map_err(engine)?;
        // The file that sled writes; a second descriptor of one inode syncs the same data.
        let file = File::options().read(true).write(true).open(directory.join("db")).map_err(io)?;
        let at = match state.get(HEAD_KEY).map_err(engine)? {
            Some(value) => rows::head_of(&value)?,
            None => {
                let start = Position::start(history);
                state.insert(HEAD_KEY, rows::head_value(&start)).map_err(engine)?;
                start
            }
        };
        db.flush().map_err(engine)?;
        // A crash may have lost what sled itself never syncs: its files' names and lengths.
        file.sync_all().map_err(io)?;
        for name in ["conf", ".", ".."] {
            File::open(directory.join(name)).and_then(|file| file.sync_all()).map_err(io)?;
        }
        let head = watch::channel(Ok(at)).0;
        Ok(Self {
            db,
            log,
            state,
            file,
            space,
            keep: options.keep,
            at,
            head,
            #[cfg(test)]
            fail_next_sync: false,
            _lock: lock,
        })
    }

    fn obey(&mut self, command: Command) {
        // Nobody waits for the answer of a dropped call.
        match command {
            Command::Append { at, group, reply } => {
                let appended = self.append(&at, &group);
                let committed = matches!(appended, Ok(Appended::Committed(_)));
                let _ = reply.send(appended);
                if committed && self.at.revision.is_multiple_of(COMPACT_EVERY) {
                    let compacted = self.usable().and_then(|()| self.compact(&group));
                    if let Err(error) = compacted {
                        tracing::error!(error = %error, "The history's log cannot be compacted");
                    }
                }
            }
            Command::Load { reply, pages } => {
                self.space.make_readable();
                if reply.send(self.usable().map(|()| self.at)).is_ok()
                    && let Err(error) = self.load(&pages)
                {
                    let _ = pages.blocking_send(Err(error));
                }
            }
            #[cfg(test)]
            Command::FailNextSync => self.fail_next_sync = true,
            Command::Log { after, reply } => {
                self.space.make_readable();
                let _ = reply.send(self.usable().and_then(|()| self.read_log(&after)));
            }
        }
    }

    fn usable(&self) -> Result<(), StoreError> {
        self.head.borrow().as_ref().map(|_| ()).map_err(StoreError::clone)
    }

    /// Never touches sled again.
    fn poison(&self, cause: EngineError) -> StoreError {
        let error = StoreError::Poisoned(cause);
        let _before = self.head.send_replace(Err(error.clone()));
        error
    }

    fn append(&mut self, at: &Position, group: &Group) -> Result<Appended, StoreError> {
        self.usable()?;
        group.check_size()?;
        if self.at != *at {
            return Ok(Appended::Moved);
        }
        self.space.admit(group.urgency(), group.encoded().len())?;
        let next = at.after(group);
        self.write(&next, group).map_err(|error| self.poison(error))?;
        self.at = next;
        let _before = self.head.send_replace(Ok(next));
        Ok(Appended::Committed(next))
    }

    /// One transaction, then sled's flush, then a sync that reaches the drive.
    fn write(&self, next: &Position, group: &Group) -> Result<(), EngineError> {
        let log_rows = rows::log_rows(next, group);
        let records: Vec<(&Write, Vec<Row>)> = group.writes().map(|write| (write, rows::record_rows(write))).collect();
        let head = rows::head_value(next);
        let written = (&self.log, &self.state).transaction(|(log, state)| {
            for (key, value) in &log_rows {
                log.insert(key.as_slice(), value.as_slice())?;
            }
            for (write, rows) in &records {
                write_record(state, write, rows)?;
            }
            state.insert(HEAD_KEY, head.as_slice())?;
            Ok(())
        });
        written.map_err(|error: TransactionError<sled::Error>| -> EngineError {
            match error {
                TransactionError::Abort(error) | TransactionError::Storage(error) => Arc::new(error),
            }
        })?;
        self.db.flush().map_err(|error| -> EngineError { Arc::new(error) })?;
        #[cfg(test)]
        if self.fail_next_sync {
            return Err(Arc::new(io::Error::other("injected")));
        }
        self.file.sync_data().map_err(|error| -> EngineError { Arc::new(error) })
    }

    fn load(&self, pages: &mpsc::Sender<Result<Vec<Record>, StoreError>>) -> Result<(), StoreError> {
        self.usable()?;
        let mut page = Vec::with_capacity(PAGE);
        let mut rows = self.state.range(HEAD_KEY..).filter(|row| !row.as_ref().is_ok_and(|(key, _)| *key == HEAD_KEY));
        while let Some(row) = rows.next() {
            let (key, first) = row.map_err(|error| self.poison(Arc::new(error)))?;
            let (key, number) = rows::record_of_row(&key)?;
            let (rows_in_all, value) = first.split_first().ok_or(RecordError::Checksum)?;
            if number != 0 {
                return Err(RecordError::Key.into());
            }
            let mut value = value.to_vec();
            for wanted in 1..*rows_in_all {
                let row = rows.next().ok_or(RecordError::Checksum)?;
                let (next_key, part) = row.map_err(|error| self.poison(Arc::new(error)))?;
                if rows::record_of_row(&next_key)? != (key.clone(), wanted) {
                    return Err(RecordError::Key.into());
                }
                value.extend_from_slice(part.get(1..).unwrap_or_default());
            }
            page.push(Record { key, value: Bytes::from(value) });
            if page.len() == PAGE && pages.blocking_send(Ok(std::mem::take(&mut page))).is_err() {
                return Ok(());
            }
        }
        if !page.is_empty() {
            // Who dropped the stream does not want the rest.
            let _ = pages.blocking_send(Ok(page));
        }
        Ok(())
    }

    fn read_log(&self, after: &Position) -> Result<Vec<Change>, StoreError> {
        if after.history != self.at.history || after.revision > self.at.revision {
            return Err(StoreError::Forked);
        }
        let mut changes: Vec<Change> = Vec::new();
        let mut position = *after;
        let mut bytes = 0;
        while position.revision < self.at.revision && changes.len() < LOG_PAGE && bytes < LOG_PAGE_BYTES {
            let Some((head, group)) = self.group_at(position.revision.saturating_add(1))? else {
                return Err(StoreError::Compacted);
            };
            position = position.after(&group);
            if position.digest != head.digest {
                return Err(StoreError::Forked);
            }
            bytes += head.length;
            changes.push(Change { position, group });
        }
        if changes.is_empty() && position != self.at {
            return Err(StoreError::Forked);
        }
        Ok(changes)
    }

    fn group_at(&self, revision: u64) -> Result<Option<(LogHead, Group)>, StoreError> {
        let read = |row: u16| self.log.get(rows::log_key(revision, row)).map_err(|error| self.poison(Arc::new(error)));
        let Some(first) = read(0)? else { return Ok(None) };
        let (head, beginning) = LogHead::read(&first)?;
        let mut encoded = beginning.to_vec();
        for row in 1..u16::try_from(head.rows()).map_err(|_| RecordError::Checksum)? {
            encoded.extend_from_slice(&read(row)?.ok_or(RecordError::Checksum)?);
        }
        let group = head.group(encoded)?;
        Ok(Some((head, group)))
    }

    /// Removes groups that are both old and far back; the next append makes that durable.
    fn compact(&self, newest: &Group) -> Result<(), StoreError> {
        for _ in 0..COMPACT_AT_ONCE {
            let oldest = self.log.first().map_err(|error| self.poison(Arc::new(error)))?;
            let Some((key, value)) = oldest else { return Ok(()) };
            let (revision, row) = rows::of_log_key(&key)?;
            // The rows of a group go in order, so a crash may leave later rows alone at the front.
            let mut last = row;
            if row == 0 {
                let (head, _) = LogHead::read(&value)?;
                if !self.keep.is_old(head.at, newest.at())
                    || self.at.revision.saturating_sub(revision) < self.keep.groups
                {
                    return Ok(());
                }
                last = u16::try_from(head.rows()).map_err(|_| RecordError::Checksum)?.saturating_sub(1);
            }
            for row in row..=last {
                self.log.remove(rows::log_key(revision, row)).map_err(|error| self.poison(Arc::new(error)))?;
            }
        }
        Ok(())
    }
}

fn write_record(
    state: &TransactionalTree,
    write: &Write,
    rows: &[Row],
) -> Result<(), ConflictableTransactionError<sled::Error>> {
    let mut before = None;
    let mut now = 0;
    for (number, (key, value)) in rows.iter().enumerate() {
        let replaced = match value {
            Some(value) => {
                now += 1;
                state.insert(key.as_slice(), value.as_slice())?
            }
            None => state.remove(key.as_slice())?,
        };
        if number == 0 {
            before = replaced;
        }
    }
    if let Some(before) = before {
        for key in rows::surplus_rows(write.key(), &before, now) {
            state.remove(key)?;
        }
    }
    Ok(())
}
