//! The `unix` attestor: user, groups and program of a process.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use aws_lc_rs::digest;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use spiffe::selector::Selector;
use tokio::sync::Semaphore;
use transport::peer::{FileId, UnixPeer};

use super::names::{Names, Of};
use super::{AttestError, Caller, WorkloadAttestor};

/// Hashes kept, each of a file in one state.
const HASHES: usize = 1024;
/// Files hashed at a time: nobody's huge program takes all threads.
const HASHED_AT_ONCE: usize = 2;

/// What the attestor says of programs.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Settings {
    /// Whether `path` and `sha256` are told at all.
    pub discover_workload_path: bool,
    /// The largest program that is hashed; a larger one is an error.
    pub workload_size_limit: SizeLimit,
    /// Whether a caller in another mount namespace gets its `path` although that path names another file, or none, in
    /// ours. Whoever may mount things chooses such paths freely.
    pub path_of_other_mount_namespaces: bool,
}

/// How much of a program may be hashed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SizeLimit {
    /// Any program is hashed.
    #[default]
    None,
    /// Programs of at most so many bytes are hashed; larger ones fail the attestation.
    Bytes(u64),
    /// No program is hashed.
    NoHash,
}

impl From<i64> for SizeLimit {
    /// As configurations say it: 0 for no limit, less for no hash.
    fn from(configured: i64) -> Self {
        match u64::try_from(configured) {
            Ok(0) => Self::None,
            Ok(bytes) => Self::Bytes(bytes),
            Err(_) => Self::NoHash,
        }
    }
}

/// The `unix` attestor.
pub struct Unix {
    settings: Settings,
    names: Names,
    hashes: Hashes,
}

impl Unix {
    /// An attestor with empty caches.
    pub fn new(settings: Settings) -> Self {
        Self { settings, names: Names::default(), hashes: Hashes::default() }
    }

    async fn program(&self, peer: &UnixPeer, selectors: &mut Vec<Selector>) -> Result<(), AttestError> {
        let link = format!("/proc/{}/exe", peer.pid);
        let read = |source| AttestError::Read { what: "program", source };
        let path = fs::read_link(&link).map_err(read)?;
        // Opened through the link, this is the file that runs, whatever stands at its path by now.
        let program = File::open(&link).map_err(read)?;
        let metadata = program.metadata().map_err(read)?;
        if self.settings.path_of_other_mount_namespaces || means_the_same_here(peer, &path, &metadata)? {
            selectors.extend(selector("path", path.as_os_str().as_bytes()));
        } else {
            tracing::debug!(pid = peer.pid, "The caller's path is another file here; no path selector");
        }
        match self.settings.workload_size_limit {
            SizeLimit::NoHash => return Ok(()),
            SizeLimit::Bytes(limit) if metadata.len() > limit => {
                return Err(AttestError::TooLarge { size: metadata.len(), limit });
            }
            SizeLimit::Bytes(_) | SizeLimit::None => {}
        }
        let hash = self.hashes.of(program, &metadata).await?;
        selectors.extend(selector("sha256", hash.as_bytes()));
        Ok(())
    }
}

#[async_trait]
impl WorkloadAttestor for Unix {
    fn name(&self) -> &'static str {
        "unix"
    }

    async fn attest(&self, caller: &Caller) -> Result<Vec<Selector>, AttestError> {
        let credentials = &caller.credentials;
        let (uid, gid, groups) = (credentials.uid, credentials.gid, &credentials.groups);
        let wanted: Vec<Of> =
            [Of::User(uid), Of::Group(gid)].into_iter().chain(groups.iter().map(|gid| Of::Group(*gid))).collect();
        let names = self.names.all(&wanted).await;
        let mut selectors = Vec::with_capacity(2 * wanted.len() + 2);
        let kinds = [("uid", "user"), ("gid", "group")].into_iter();
        let kinds = kinds.chain(std::iter::repeat(("supplementary_gid", "supplementary_group")));
        for ((of, name), (number_kind, name_kind)) in wanted.iter().zip(names).zip(kinds) {
            let (Of::User(number) | Of::Group(number)) = of;
            selectors.extend(selector(number_kind, number.to_string().as_bytes()));
            selectors.extend(name.and_then(|name| selector(name_kind, name.as_bytes())));
        }
        if self.settings.discover_workload_path {
            self.program(&caller.peer, &mut selectors).await?;
        }
        Ok(selectors)
    }
}

/// `unix:kind:value`; nothing for what cannot be text, which no entry can ask for either.
fn selector(kind: &str, value: &[u8]) -> Option<Selector> {
    let value = std::str::from_utf8(value).ok()?;
    Selector::new("unix", &format!("{kind}:{value}")).ok()
}

/// Whether `path` is the running program for us, too. In our own mount namespace the kernel vouches for it.
fn means_the_same_here(peer: &UnixPeer, path: &Path, program: &Metadata) -> Result<bool, AttestError> {
    let namespace = |of: &str| {
        fs::metadata(format!("/proc/{of}/ns/mnt"))
            .map(|found| (found.dev(), found.ino()))
            .map_err(|source| AttestError::Read { what: "mount namespace", source })
    };
    if namespace(&peer.pid.to_string())? == namespace("self")? {
        return Ok(true);
    }
    Ok(fs::metadata(path).is_ok_and(|here| (here.dev(), here.ino()) == (program.dev(), program.ino())))
}

/// A file in one state: any write changes it, and no program can set a file's ctime.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct State {
    file: FileId,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

impl State {
    fn of(metadata: &Metadata) -> Self {
        Self {
            file: FileId { device: metadata.dev(), inode: metadata.ino() },
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

/// The hash in hexadecimal, or why there is none.
type Hashed = Result<Arc<str>, Arc<io::Error>>;
type Pending = Shared<BoxFuture<'static, Hashed>>;

/// Hashes of programs, each computed once however many ask, and computed to its end even if all who asked have gone:
/// the next one who asks finds it.
struct Hashes {
    known: Mutex<(HashMap<State, Pending>, VecDeque<State>)>,
    turns: Arc<Semaphore>,
}

impl Default for Hashes {
    fn default() -> Self {
        Self { known: Mutex::default(), turns: Arc::new(Semaphore::new(HASHED_AT_ONCE)) }
    }
}

impl Hashes {
    async fn of(&self, program: File, metadata: &Metadata) -> Result<Arc<str>, AttestError> {
        let state = State::of(metadata);
        let pending = {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            let (hashes, order) = &mut *known;
            match hashes.get(&state) {
                Some(pending) => pending.clone(),
                None => {
                    let pending = start(program, state, Arc::clone(&self.turns));
                    if order.len() >= HASHES
                        && let Some(oldest) = order.pop_front()
                    {
                        hashes.remove(&oldest);
                    }
                    order.push_back(state);
                    hashes.insert(state, pending.clone());
                    pending
                }
            }
        };
        pending.await.map_err(|error| {
            let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
            known.0.remove(&state);
            known.1.retain(|kept| *kept != state);
            match error.kind() {
                io::ErrorKind::InvalidData => AttestError::Changing,
                kind => AttestError::Read { what: "program", source: io::Error::new(kind, error) },
            }
        })
    }
}

fn start(program: File, state: State, turns: Arc<Semaphore>) -> Pending {
    let work = async move {
        let _turn = turns.acquire_owned().await.map_err(io::Error::other)?;
        tokio::task::spawn_blocking(move || hash(program, state)).await.map_err(io::Error::other)?
    };
    work.map(|hashed| hashed.map_err(Arc::new)).boxed().shared()
}

fn hash(mut program: File, state: State) -> io::Result<Arc<str>> {
    let mut context = digest::Context::new(&digest::SHA256);
    let mut buffer = vec![0; 128 * 1024];
    loop {
        match program.read(&mut buffer)? {
            0 => break,
            read => context.update(buffer.get(..read).unwrap_or_default()),
        }
    }
    if State::of(&program.metadata()?) != state {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let digits = context.finish().as_ref().iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    Ok(digits.into())
}

#[cfg(test)]
mod tests;
