//! The `unix` attestor: user, groups and program of a process.

use std::collections::{HashMap, VecDeque};
use std::fs::{self, File, Metadata};
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aws_lc_rs::digest;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, Shared};
use runtime::pool::{Limits, Pool, PoolError};
use spiffe::selector::Selector;
use transport::peer::{FileId, Party, UnixPeer};

use super::names::{NameService, Names, Of, System};
use super::{AttestError, Begun, Caller, WorkloadAttestor};

/// Hashes kept, each of a file in one state.
const HASHES: usize = 1024;
/// Supplementary groups that are looked up by name; all of them are told by number.
const NAMED_GROUPS: usize = 1024;

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

/// What was found out about a program at one look.
struct Program {
    path: Option<Selector>,
    hash: Hash,
}

/// The `sha256` of a program.
enum Hash {
    /// None is wanted.
    Unwanted,
    Known(Arc<str>),
    /// It is being computed.
    Pending(Pending),
}

impl Unix {
    /// An attestor with empty caches.
    pub fn new(settings: Settings) -> Self {
        Self::with(settings, Box::new(System))
    }

    fn with(settings: Settings, names: Box<dyn NameService>) -> Self {
        Self { settings, names: Names::new(names), hashes: Hashes::default() }
    }

    fn program(&self, peer: &UnixPeer) -> Result<Program, AttestError> {
        if !self.settings.discover_workload_path {
            return Ok(Program { path: None, hash: Hash::Unwanted });
        }
        let link = format!("/proc/{}/exe", peer.pid);
        let read = |source| AttestError::Read { what: "program", source };
        let path = fs::read_link(&link).map_err(read)?;
        // Opened through the link, this is the file that runs, whatever stands at its path by now.
        let program = File::open(&link).map_err(read)?;
        let metadata = program.metadata().map_err(read)?;
        let path = if self.settings.path_of_other_mount_namespaces || means_the_same_here(peer, &path, &metadata)? {
            selector("path", path.as_os_str().as_bytes())
        } else {
            tracing::debug!(pid = peer.pid, "The caller's path is another file here; no path selector");
            None
        };
        match self.settings.workload_size_limit {
            SizeLimit::NoHash => return Ok(Program { path, hash: Hash::Unwanted }),
            SizeLimit::Bytes(limit) if metadata.len() > limit => {
                return Err(AttestError::TooLarge { size: metadata.len(), limit });
            }
            SizeLimit::Bytes(_) | SizeLimit::None => {}
        }
        // The file goes to the thread that hashes it, or is closed here: closing may hang, too.
        let hash = self.hashes.of(&peer.party, program, State::of(&metadata)).map_err(AttestError::Busy)?;
        Ok(Program { path, hash })
    }
}

impl WorkloadAttestor for Unix {
    fn name(&self) -> &'static str {
        "unix"
    }

    fn begin(&self, caller: &Caller) -> Begun {
        let credentials = &caller.credentials;
        let groups = &credentials.groups;
        let mut selectors = Vec::with_capacity(groups.len() + NAMED_GROUPS.min(groups.len()) + 6);
        let mut number = |kind, number: u32| selectors.extend(selector(kind, number.to_string().as_bytes()));
        number("uid", credentials.uid);
        number("gid", credentials.gid);
        groups.iter().for_each(|group| number("supplementary_gid", *group));
        let program = match self.program(&caller.peer) {
            Ok(program) => program,
            Err(error) => return Begun::Says(Err(error)),
        };
        selectors.extend(program.path);
        let named = groups.iter().take(NAMED_GROUPS).map(|group| Of::Group(*group));
        let wanted: Vec<Of> =
            [Of::User(credentials.uid), Of::Group(credentials.gid)].into_iter().chain(named).collect();
        match (self.names.known(&wanted), program.hash) {
            (Some(names), Hash::Unwanted) => Begun::Says(Ok(all(selectors, &names, None))),
            (Some(names), Hash::Known(hash)) => Begun::Says(Ok(all(selectors, &names, Some(&hash)))),
            (_, hash) => {
                let (names, party) = (self.names.clone(), caller.peer.party.clone());
                Begun::Later(Box::pin(async move {
                    let names = names.learn(&party, wanted);
                    let hash = async {
                        Ok(match hash {
                            Hash::Unwanted => None,
                            Hash::Known(hash) => Some(hash),
                            Hash::Pending(hash) => Some(hash.await?),
                        })
                    };
                    let (names, hash) = tokio::try_join!(names, hash)?;
                    Ok(all(selectors, &names, hash.as_deref()))
                }))
            }
        }
    }
}

/// The selectors by number and path, and those by name and hash; names in the order of user, group, further groups.
fn all(mut selectors: Vec<Selector>, names: &[Option<Arc<str>>], hash: Option<&str>) -> Vec<Selector> {
    let kinds = ["user", "group"].into_iter().chain(std::iter::repeat("supplementary_group"));
    let named = names.iter().zip(kinds).filter_map(|(name, kind)| selector(kind, name.as_ref()?.as_bytes()));
    selectors.extend(named);
    selectors.extend(hash.and_then(|hash| selector("sha256", hash.as_bytes())));
    selectors
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
type Hashed = Result<Arc<str>, Failure>;
type Pending = Shared<BoxFuture<'static, Hashed>>;

#[derive(Debug, Clone)]
enum Failure {
    Busy(PoolError),
    Read(Arc<io::Error>),
}

impl From<Failure> for AttestError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Busy(error) => Self::Busy(error),
            Failure::Read(error) if error.kind() == io::ErrorKind::InvalidData => Self::Changing,
            Failure::Read(error) => Self::Read { what: "program", source: io::Error::new(error.kind(), error) },
        }
    }
}

/// Hashes of programs, each computed once for all callers of a party that ask, and to its end even if all who asked
/// have gone: the next one who asks finds it. A party hashes one file at a time on a thread of its own, so nobody's
/// huge program, nor one that never comes to its end, keeps another party waiting.
#[derive(Clone)]
struct Hashes {
    inner: Arc<Mutex<Kept>>,
    pool: Pool,
}

#[derive(Default)]
struct Kept {
    known: HashMap<State, Arc<str>>,
    /// The same, in the order in which they came.
    order: VecDeque<State>,
    pending: HashMap<(Party, State), Pending>,
}

impl Default for Hashes {
    fn default() -> Self {
        let pool = Pool::new("hashing", Limits { threads: 32, per_party: 1, waiting_per_party: 16 });
        Self { inner: Arc::default(), pool }
    }
}

impl Hashes {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The hash of a file in this state, which is begun if nobody did so yet: one owned job reads, hashes and puts the
    /// result where the next one finds it.
    fn of(&self, party: &Party, program: File, state: State) -> Result<Hash, PoolError> {
        let mut kept = self.kept();
        if let Some(known) = kept.known.get(&state) {
            return Ok(Hash::Known(Arc::clone(known)));
        }
        let key = (party.clone(), state);
        if let Some(pending) = kept.pending.get(&key) {
            return Ok(Hash::Pending(pending.clone()));
        }
        let (this, done) = (self.clone(), key.clone());
        let started = self.pool.start(party.name(), move || {
            let hashed = hash(program, state);
            let mut kept = this.kept();
            kept.pending.remove(&done);
            if let Ok(hash) = &hashed {
                kept.keep(state, hash);
            }
            hashed
        })?;
        let hashed =
            started.map(|hashed| hashed.map_err(Failure::Busy)?.map_err(|error| Failure::Read(Arc::new(error))));
        let pending = hashed.boxed().shared();
        kept.pending.insert(key, pending.clone());
        Ok(Hash::Pending(pending))
    }
}

impl Kept {
    fn keep(&mut self, state: State, hash: &Arc<str>) {
        if self.order.len() >= HASHES
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
        if self.known.insert(state, Arc::clone(hash)).is_none() {
            self.order.push_back(state);
        }
    }
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
