//! Private files: keys and credentials on disk, written so that a crash leaves the old file or the new one, and read
//! only if nobody else can.

use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use nix::errno::Errno;
use nix::fcntl::{Flock, FlockArg};
use zeroize::Zeroizing;

/// The largest private file that is read, in bytes.
pub const MAX_BYTES: u64 = 16 << 20;

/// Why a private file cannot be written or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyFileError {
    /// The file could not be written.
    #[error("cannot write {}", path.display())]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file could not be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file could not be removed.
    #[error("cannot remove {}", path.display())]
    Remove {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// Everybody on the machine can read or change the file.
    #[error("{} has mode {mode:04o}: other users can use it; run chmod 600 on it, and replace what it holds if they did", path.display())]
    Exposed {
        /// The file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// Another process has locked the file.
    #[error("{} is in use by {holder}; give each program a key file of its own with {setting}, or stop the other one", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
        /// Who holds it, as far as the lock tells.
        holder: Holder,
        /// The configuration key that names the file.
        setting: &'static str,
    },
    /// The file could not be locked.
    #[error("cannot lock {}", path.display())]
    Lock {
        /// The lock beside the file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The file is larger than [`MAX_BYTES`].
    #[error("{} is larger than {MAX_BYTES} bytes", path.display())]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
}

impl KeyFileError {
    /// Whether the same call may succeed later without anybody changing the file.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Write { .. } | Self::Read { .. } | Self::Remove { .. } | Self::InUse { .. } | Self::Lock { .. } => {
                true
            }
            Self::Exposed { .. } | Self::TooLarge { .. } => false,
        }
    }
}

/// The process that has locked a private file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder(Option<(u32, String)>);

impl Holder {
    /// Reads what [`lock`] left in the lock. Anything else is nobody: the text ends up in an error message.
    fn parse(text: &str) -> Self {
        let named = text.strip_suffix('\n').and_then(|line| line.split_once(' '));
        Self(named.and_then(|(pid, program)| {
            let plain = program.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
            (plain && !program.is_empty()).then_some((pid.parse().ok()?, program.to_owned()))
        }))
    }
}

impl std::fmt::Display for Holder {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.0 {
            Some((pid, program)) => write!(f, "{program} (process {pid})"),
            None => f.write_str("another process"),
        }
    }
}

/// A private file that no other process uses as long as this value lives.
#[derive(Debug)]
pub struct Lock {
    // None where nobody can write, see `lock`.
    _held: Option<Flock<File>>,
}

/// Locks the private file at `path` for this process. `setting` is the configuration key that names it, for the message
/// to whoever comes second.
///
/// What is locked is `<path>.lock`, which stays: the file itself is replaced at each write. The kernel gives the lock
/// back when the process ends, however it does.
///
/// In a directory that this process cannot write, and that has no lock, there is nothing to lock: it cannot replace the
/// file either.
///
/// # Errors
///
/// [`KeyFileError::InUse`] if another process has it, [`KeyFileError::Lock`].
pub fn lock(path: &Path, setting: &'static str) -> Result<Lock, KeyFileError> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".lock");
    let beside = PathBuf::from(beside);
    let failed = |source| KeyFileError::Lock { path: beside.clone(), source };
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(&beside);
    let (file, writable) = match opened {
        Ok(file) => (file, true),
        Err(error) if matches!(error.kind(), ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem) => {
            match File::open(&beside) {
                Ok(file) => (file, false),
                Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Lock { _held: None }),
                Err(error) => return Err(failed(error)),
            }
        }
        Err(error) => return Err(failed(error)),
    };
    let held = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(held) => held,
        Err((file, Errno::EWOULDBLOCK)) => {
            let mut text = String::new();
            let _ = file.take(256).read_to_string(&mut text);
            return Err(KeyFileError::InUse { path: path.to_owned(), holder: Holder::parse(&text), setting });
        }
        Err((_, errno)) => return Err(failed(errno.into())),
    };
    if writable {
        // Only for the message to others: a full disk must not keep a program from its keys.
        let program = std::env::current_exe().ok();
        let program = program.as_deref().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let _ = held.set_len(0);
        let _ = (&*held).write_all(format!("{} {program}\n", std::process::id()).as_bytes());
    }
    Ok(Lock { _held: Some(held) })
}

/// Makes `directory` and those above it, for its owner only (mode 0700), as far as they are not there.
///
/// # Errors
/// What the system says.
pub fn make_directory(directory: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}

static NEXT: AtomicU64 = AtomicU64::new(0);

/// Replaces the file at `path` by `contents`, readable by its owner only (mode 0600).
///
/// The new file is written beside the old one, synced, renamed over it, and the directory is synced: after a crash at
/// any moment the old or the new contents are there, whole. When this returns without error, they are the new ones.
///
/// # Errors
///
/// [`KeyFileError::Write`]; the file is then as it was before, except after a failed sync of the directory, when it may
/// be either.
pub fn write(path: &Path, contents: &[u8]) -> Result<(), KeyFileError> {
    let failed = |source| KeyFileError::Write { path: path.to_owned(), source };
    let name = path.file_name().ok_or_else(|| failed(ErrorKind::InvalidInput.into()))?;
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    // One name per write of this process; what a crash left under it is overwritten by removing it first.
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(format!(".{}.{}.tmp", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
    let temporary = directory.join(temporary);
    let written = (|| {
        match std::fs::remove_file(&temporary) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(contents)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)
    })();
    if let Err(error) = written {
        let _ = std::fs::remove_file(&temporary);
        return Err(failed(error));
    }
    sync_directory(directory).map_err(failed)
}

/// Reads the private file at `path`; `None` if there is none. The bytes are wiped when dropped.
///
/// A file that its group can read is accepted, because volumes of Kubernetes come so; one that everybody can is not.
///
/// # Errors
///
/// [`KeyFileError::Exposed`] if other users can read or write it, [`KeyFileError::TooLarge`], [`KeyFileError::Read`].
pub fn read(path: &Path) -> Result<Option<Zeroizing<Vec<u8>>>, KeyFileError> {
    let failed = |source| KeyFileError::Read { path: path.to_owned(), source };
    let mut file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let metadata = file.metadata().map_err(failed)?;
    if !metadata.is_file() {
        return Err(failed(std::io::Error::new(ErrorKind::InvalidInput, "it is not a regular file")));
    }
    let mode = metadata.mode() & 0o7777;
    if mode & 0o006 != 0 {
        return Err(KeyFileError::Exposed { path: path.to_owned(), mode });
    }
    if metadata.len() > MAX_BYTES {
        return Err(KeyFileError::TooLarge { path: path.to_owned() });
    }
    // Room for all of it at once: a buffer that grows would leave copies behind.
    let mut contents = Zeroizing::new(Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0) + 1));
    Read::by_ref(&mut file).take(MAX_BYTES + 1).read_to_end(&mut contents).map_err(failed)?;
    if contents.len() as u64 > MAX_BYTES {
        return Err(KeyFileError::TooLarge { path: path.to_owned() });
    }
    Ok(Some(contents))
}

/// Removes the file at `path`, durably. A file that is not there is no error.
///
/// # Errors
///
/// [`KeyFileError::Remove`].
pub fn remove(path: &Path) -> Result<(), KeyFileError> {
    let failed = |source| KeyFileError::Remove { path: path.to_owned(), source };
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(failed(error)),
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    sync_directory(directory).map_err(failed)
}

fn sync_directory(directory: &Path) -> std::io::Result<()> {
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn writes_privately_and_replaces() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        assert!(read(&path).unwrap().is_none());
        write(&path, b"one").unwrap();
        write(&path, b"two").unwrap();
        assert_eq!(read(&path).unwrap().unwrap().as_slice(), b"two");
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o7777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        remove(&path).unwrap();
        remove(&path).unwrap();
        assert!(read(&path).unwrap().is_none());
    }

    #[test]
    fn a_second_user_is_refused_until_the_first_has_gone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let beside = directory.path().join("keys.json.lock");
        let program = std::env::current_exe().unwrap().file_name().unwrap().to_str().unwrap().to_owned();
        // What a longer name left of an earlier process.
        std::fs::write(&beside, format!("1 {}\n", "x".repeat(200))).unwrap();
        let first = lock(&path, "keys_path").unwrap();
        let refused = |by: &str| {
            assert_eq!(
                lock(&path, "keys_path").unwrap_err().to_string(),
                format!(
                    "{} is in use by {by}; give each program a key file of its own with keys_path, or stop the other one",
                    path.display()
                )
            );
        };
        refused(&format!("{program} (process {})", std::process::id()));
        assert_eq!(std::fs::read_to_string(&beside).unwrap(), format!("{} {program}\n", std::process::id()));
        for odd in ["", "12", "12 \n", "x server\n", "12 a\u{1b}[2J\n", "12 server", "\u{e9}"] {
            std::fs::write(&beside, odd).unwrap();
            refused("another process");
        }
        std::fs::write(&beside, [0xff, 0xfe]).unwrap();
        refused("another process");
        write(&path, b"keys").unwrap();
        refused("another process");
        drop(first);
        let _second = lock(&path, "keys_path").unwrap();
        refused(&format!("{program} (process {})", std::process::id()));
    }

    #[test]
    fn a_file_that_cannot_be_locked_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        std::fs::create_dir(directory.path().join("keys.json.lock")).unwrap();
        let error = lock(&path, "keys_path").unwrap_err();
        assert_eq!(error.to_string(), format!("cannot lock {}.lock", path.display()));
        assert!(matches!(lock(&path.join("below"), "keys_path"), Err(KeyFileError::Lock { .. })));
    }

    #[test]
    fn refuses_what_others_can_use() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        write(&path, b"x").unwrap();
        for (mode, refused) in [(0o600, false), (0o640, false), (0o660, false), (0o604, true), (0o602, true)] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            match read(&path) {
                Ok(_) => assert!(!refused, "{mode:o}"),
                Err(KeyFileError::Exposed { mode: seen, .. }) => assert_eq!((seen, refused), (mode, true)),
                Err(other) => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_failed_write_leaves_nothing_behind() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken");
        std::fs::create_dir(&path).unwrap();
        std::fs::write(path.join("inside"), "x").unwrap();
        assert!(matches!(write(&path, b"x"), Err(KeyFileError::Write { .. })));
        assert!(matches!(write(Path::new("/nowhere/at/all"), b"x"), Err(KeyFileError::Write { .. })));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}
