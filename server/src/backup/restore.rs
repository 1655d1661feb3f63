//! A backup becomes a data store.

use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use runtime::clock::Clock;
use runtime::entropy::Entropy;

use super::file::Contents;
use super::{BackupError, changes_of};
use crate::config::Config;
use crate::config::checked::{DataStore, KeyManager};
use crate::history::record;
use crate::history::sled::{Options, Sled};
use crate::history::{
    Appended, Group, HistoryId, MAX_GROUP_BYTES, MAX_PART_RECORDS, Store, StoreError, Urgency, Write,
};
use crate::state::State;
use crate::state::model::{Change, Part, Scope};

/// Room in a group for its head.
const GROUP_OVERHEAD: usize = 4096;

/// Where a backup goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// The directory of the data store.
    pub store: PathBuf,
    /// The key file, if keys are kept in one.
    pub keys: Option<PathBuf>,
}

impl Target {
    /// What `config` says.
    ///
    /// # Errors
    /// [`BackupError::Memory`] if it has no data store in files.
    pub fn of(config: &Config) -> Result<Self, BackupError> {
        let DataStore::Sled { dir } = &config.data_store else { return Err(BackupError::Memory) };
        let keys = match &config.key_manager {
            KeyManager::Disk { keys_path } => Some(keys_path.clone()),
            KeyManager::Memory => None,
        };
        Ok(Self { store: dir.clone(), keys })
    }

    /// Refuses a data store that is there.
    ///
    /// # Errors
    /// [`BackupError::InUse`] or [`BackupError::Occupied`].
    fn check_store(&self) -> Result<(), BackupError> {
        let directory = self.store.clone();
        match std::fs::read_dir(&directory) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(BackupError::File(error)),
            Ok(mut found) => {
                if found.next().is_none() {
                    return Ok(());
                }
            }
        }
        // The lock of a store that is open; nothing is changed by looking.
        let locked = std::fs::File::open(directory.join("db"))
            .is_ok_and(|file| matches!(Flock::lock(file, FlockArg::LockSharedNonblock), Err((_, Errno::EWOULDBLOCK))));
        if locked { Err(BackupError::InUse { directory }) } else { Err(BackupError::Occupied { directory }) }
    }
}

/// Makes a data store of `contents`, with a history of its own; the key file of the backup is written with `keys`, if there
/// is none yet. Nothing is left half-done: the store is made beside its place and moved there.
///
/// # Errors
/// If there is a data store already, or the new one cannot be written.
pub async fn restore(
    contents: Contents,
    target: &Target,
    keys: bool,
    clock: &Clock,
    entropy: &Entropy,
) -> Result<State, BackupError> {
    target.check_store()?;
    let keys = contents.keys.filter(|_| keys).zip(target.keys.as_ref());
    if let Some((_, path)) = &keys
        && path.exists()
    {
        return Err(BackupError::KeysThere { path: (*path).clone() });
    }
    let mut state = contents.state;
    // Whoever knows the old history knows a branch that is lost.
    let next = HistoryId(entropy.bytes());
    state.apply(&Part::new(vec![Change::BeginHistory(next)])).map_err(|error| {
        BackupError::State(crate::history::OpenError::Store(StoreError::from(record::RecordError::from(error))))
    })?;
    let parent = target.store.parent().unwrap_or_else(|| Path::new("."));
    let name = target.store.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let beside = parent.join(format!("{name}.restoring"));
    std::fs::create_dir_all(parent).map_err(BackupError::File)?;
    match std::fs::remove_dir_all(&beside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(BackupError::File(error)),
        _ => {}
    }
    write(&state, &beside, next, clock, entropy).await?;
    if let Some((keys, path)) = keys {
        runtime::keyfile::write(path, &keys).map_err(BackupError::Keys)?;
    }
    // An empty directory may be in the way.
    let _ = std::fs::remove_dir(&target.store);
    std::fs::rename(&beside, &target.store).map_err(BackupError::File)?;
    std::fs::File::open(parent).and_then(|parent| parent.sync_all()).map_err(BackupError::File)?;
    Ok(state)
}

async fn write(
    state: &State,
    directory: &Path,
    history: HistoryId,
    clock: &Clock,
    entropy: &Entropy,
) -> Result<(), BackupError> {
    let store = Sled::open(directory, history, Options::default()).await.map_err(BackupError::Store)?;
    let mut position = store.head().await.map_err(BackupError::Store)?;
    let scope = Scope::trust_domain();
    let now = clock.now();
    let mut writes = changes_of(state)
        .filter_map(|change| record::write_of(state, &scope, &change))
        .chain([record::meta_of(state, now)])
        .peekable();
    while writes.peek().is_some() {
        let (mut parts, mut part, mut bytes) = (Vec::new(), Vec::new(), GROUP_OVERHEAD);
        while let Some(write) = writes.next_if(|write| bytes + write.encoded_len() < MAX_GROUP_BYTES) {
            bytes += Write::encoded_len(&write);
            part.push(write);
            if part.len() == MAX_PART_RECORDS {
                parts.push(std::mem::take(&mut part));
            }
        }
        parts.push(part);
        let group = Group::new(entropy.bytes(), now, Urgency::Normal, parts);
        match store.append(&position, &group).await.map_err(BackupError::Store)? {
            Appended::Committed(next) => position = next,
            // Nobody else knows of this directory.
            Appended::Moved => return Err(BackupError::InUse { directory: directory.to_owned() }),
        }
    }
    Ok(())
}
