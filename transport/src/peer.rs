//! Who is at the other end of a connection.
//!
//! On a Unix socket that is a process, and what the kernel says of it is the whole of its proof. A process can end,
//! its number can be given to another one, it can hand the socket to a child and then become a program of another
//! user. So a peer is pinned when it is accepted, before a byte of it is read, and asked again after everything that
//! was found out about it: only what was read between two looks at the same process is true of that process.
//!
//! A look can hang: the program of a process may lie on a file system whose server does not answer. So whoever accepts
//! takes the descriptor of the process only ([`Arrival`]), and each look runs on a thread of the process's [`Party`].

mod party;

use std::io::{self, Read};
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use std::{fmt, fs};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout};
use nix::sys::socket::{getsockopt, sockopt};
use runtime::pool::{Limits, Pool, PoolError};
use rustix::fs::{AtFlags, CWD, StatxFlags, makedev, statx};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::net::UnixStream;
use tokio::sync::Semaphore;

use spiffe::verify::VerifiedChain;

pub use party::Party;

/// How long whoever reads the path of a program waits for it.
const PATH_PATIENCE: Duration = Duration::from_secs(1);

/// Why nothing may be told to a process that connected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PeerError {
    /// The kernel refused to say who connected.
    #[error("the kernel does not say who connected")]
    Credentials(#[source] io::Error),
    /// The process lives in a process namespace that cannot be seen from here, so nothing can be known of it.
    #[error("the caller is in another process namespace (share the host's to attest it)")]
    ForeignNamespace,
    /// The process has ended.
    #[error("the process that connected has ended")]
    Gone,
    /// The process is there, but its user or group is not the one that connected.
    #[error("the caller's user or group changed since it connected")]
    OtherOwner,
    /// The process is there, but runs another program than the one that connected.
    #[error("the caller runs another program than the one that connected")]
    OtherProgram,
    /// A file of the process could not be read.
    #[error("reading the caller's {file} failed")]
    Read {
        /// The name below `/proc/<pid>/`.
        file: &'static str,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
    /// The process could not be looked at in time.
    #[error("the caller could not be looked at")]
    Busy(#[source] PoolError),
    /// A file of the process did not have the form that Linux documents.
    #[error("the caller's {file} has an unknown form")]
    Malformed {
        /// The name below `/proc/<pid>/`.
        file: &'static str,
    },
}

impl PeerError {
    /// Whether descriptors ran out, which says nothing about the caller.
    pub(crate) fn is_shortage(&self) -> bool {
        let (Self::Credentials(source) | Self::Read { source, .. }) = self else { return false };
        source.raw_os_error().map(Errno::from_raw).is_some_and(|errno| matches!(errno, Errno::EMFILE | Errno::ENFILE))
    }
}

/// A file, by where it is stored: unlike a path it cannot be made to mean another file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileId {
    /// Number of the device.
    pub device: u64,
    /// Number of the inode on it.
    pub inode: u64,
}

/// The user, group and further groups of a process as `/proc/<pid>/status` tells them at one moment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Credentials {
    /// The effective user.
    pub uid: u32,
    /// The effective group.
    pub gid: u32,
    /// The supplementary groups, as listed.
    pub groups: Vec<u32>,
}

/// A process at the other end of a Unix socket, held fast: its number stays its own while this value lives and
/// [`UnixPeer::still_same`] says so.
#[derive(Debug)]
pub struct UnixPeer {
    /// Number of the process in our namespace, as of `connect`.
    pub pid: i32,
    /// Effective user at `connect`.
    pub uid: u32,
    /// Effective group at `connect`.
    pub gid: u32,
    /// When the process started, in clock ticks since boot; read only where the kernel (before Linux 6.5) hands out no
    /// descriptor of the process with the socket, because such a descriptor cannot mean a successor.
    pub start_time: Option<u64>,
    /// The program it runs; unknown if we lack the right to see it.
    pub executable: Option<FileId>,
    /// Who answers for it.
    pub party: Party,
    owner: (u32, u32),
    process: AsyncFd<OwnedFd>,
    pool: Pool,
    /// One look at a time: a program on a file system that hangs takes one thread, however often it calls.
    turn: Arc<Semaphore>,
}

/// A process that connected, held by its descriptor and not looked at yet.
#[derive(Debug)]
pub struct Arrival {
    /// Number of the process in our namespace, as of `connect`.
    pub pid: i32,
    /// Who answers for it.
    pub party: Party,
    uid: u32,
    gid: u32,
    process: AsyncFd<OwnedFd>,
    /// Whether the descriptor was opened by number, so that the start time has to tell the process from a successor.
    by_number: bool,
}

/// Who sent a request; an extension of every request that [`crate::serve`] hands to a service.
#[derive(Debug, Clone)]
pub enum Peer {
    /// A process on this machine.
    Unix(Arc<UnixPeer>),
    /// Somebody on the network.
    Tcp {
        /// Where the connection comes from.
        address: SocketAddr,
        /// The certificate chain it proved to hold the key of, verified in the handshake; none was shown otherwise.
        certificate: Option<Arc<VerifiedChain>>,
    },
}

impl fmt::Display for Peer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(peer) => write!(formatter, "process {} of user {}", peer.pid, peer.uid),
            Self::Tcp { address, certificate: Some(known) } => write!(formatter, "{} at {address}", known.id),
            Self::Tcp { address, certificate: None } => write!(formatter, "{address}"),
        }
    }
}

/// The threads on which the callers of one listener are looked at.
pub(crate) fn threads() -> Pool {
    Pool::new("caller", Limits { threads: 64, per_party: 2, waiting_per_party: 1024 })
}

impl Arrival {
    /// Takes hold of the process that connected `stream`; inside a tokio runtime. Reads nothing that the process could
    /// make hang.
    ///
    /// # Errors
    /// If the process is gone already or cannot be seen from our process namespace.
    pub fn of(stream: &UnixStream) -> Result<Self, PeerError> {
        let credentials =
            getsockopt(stream, sockopt::PeerCredentials).map_err(|errno| PeerError::Credentials(errno.into()))?;
        let (pid, uid, gid) = (credentials.pid(), credentials.uid(), credentials.gid());
        if pid <= 0 {
            return Err(PeerError::ForeignNamespace);
        }
        let (process, by_number) = match getsockopt(stream, sockopt::PeerPidfd) {
            Ok(process) => (process, false),
            // Newer kernels tell apart whether the process was ever reaped; to us both mean that it is gone.
            Err(Errno::ESRCH | Errno::EINVAL | Errno::ENODATA) => return Err(PeerError::Gone),
            // Its number may have been given away between `connect` and here. There is no proof that it was not; the
            // start time at least keeps the two from being mixed later.
            Err(Errno::ENOPROTOOPT) => (open_process(pid)?, true),
            Err(errno) => return Err(PeerError::Credentials(errno.into())),
        };
        #[allow(deprecated, reason = "its successor is an unsafe function, whose promise an owned descriptor keeps")]
        let process = AsyncFd::with_interest(process, Interest::READABLE).map_err(PeerError::Credentials)?;
        // The kernel's own text, whatever the process does. Should the number mean another process by now, that one
        // answers until the look fails.
        let party = match read("cgroup", pid) {
            Ok(cgroups) => Party::of(&String::from_utf8_lossy(&cgroups), uid),
            Err(error) if error.is_shortage() => return Err(error),
            Err(_) => Party::of_user(uid),
        };
        Ok(Self { pid, party, uid, gid, process, by_number })
    }

    /// Looks at the process for the first time, on a thread of `pool`; before a byte is read from its connection.
    ///
    /// # Errors
    /// If the process is gone or another one by now, or if there is no thread for its party.
    pub async fn pin(self, pool: &Pool) -> Result<UnixPeer, PeerError> {
        let (party, threads) = (Arc::clone(self.party.name()), pool.clone());
        pool.run(&party, move || self.look(threads)).await.map_err(PeerError::Busy)?
    }

    fn look(self, pool: Pool) -> Result<UnixPeer, PeerError> {
        let Self { pid, party, uid, gid, process, by_number } = self;
        let start_time = by_number.then(|| start_time(pid)).transpose()?;
        let (executable, owner) = (executable(pid)?, owner(pid)?);
        let turn = Arc::new(Semaphore::new(1));
        let peer = UnixPeer { pid, uid, gid, start_time, executable, party, owner, process, pool, turn };
        if peer.is_alive() { Ok(peer) } else { Err(PeerError::Gone) }
    }
}

impl UnixPeer {
    /// Pins the process that connected `stream`, on this thread: for whoever may wait and serves nobody else meanwhile,
    /// such as a test.
    ///
    /// # Errors
    /// If the process is gone already, cannot be seen from our process namespace, or is another one by now.
    pub fn pin(stream: &UnixStream) -> Result<Self, PeerError> {
        Arrival::of(stream)?.look(Pool::in_place())
    }

    /// Does something that may read the process's files, on a thread of its party: after what else this process has
    /// caused there, and for as long as it takes, whether or not anybody still waits for it.
    ///
    /// # Errors
    /// [`PoolError`].
    pub async fn work<T: Send + 'static>(
        self: &Arc<Self>,
        job: impl FnOnce(&Arc<Self>) -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        let turn = Arc::clone(&self.turn).acquire_owned().await;
        let peer = Arc::clone(self);
        let job = move || {
            let result = job(&peer);
            drop(turn);
            result
        };
        self.pool.run(self.party.name(), job).await
    }

    /// Whether the process has not ended (a process whose parent has not yet noticed its end has ended).
    pub fn is_alive(&self) -> bool {
        let mut watched = [PollFd::new(self.process.get_ref().as_fd(), PollFlags::POLLIN)];
        loop {
            match nix::poll::poll(&mut watched, PollTimeout::ZERO) {
                // A signal to us, such as the one to open the log again, says nothing of the caller.
                Err(Errno::EINTR) => {}
                polled => return matches!(polled, Ok(0)),
            }
        }
    }

    /// What the process may do now, by `/proc`.
    ///
    /// # Errors
    /// If it cannot be read, or if user or group are not those that connected: then the process became, through a
    /// setuid program, something that never asked for anything.
    pub fn credentials(&self) -> Result<Credentials, PeerError> {
        let status = read("status", self.pid)?;
        let credentials = parse_status(&status).ok_or(PeerError::Malformed { file: "status" })?;
        if (credentials.uid, credentials.gid) != (self.uid, self.gid) {
            return Err(PeerError::OtherOwner);
        }
        Ok(credentials)
    }

    /// The path of the program that the process runs now, as far as it can be seen; for people to read. What is to be
    /// decided is decided by [`UnixPeer::executable`], because a path can be made to mean another file.
    pub async fn executable_path(self: &Arc<Self>) -> Option<PathBuf> {
        let read = self.work(|peer| {
            let path = fs::read_link(path(peer.pid, "exe")).ok()?;
            // A number that was given away meanwhile would make it the path of a stranger.
            peer.still_same().is_ok().then_some(path)
        });
        tokio::time::timeout(PATH_PATIENCE, read).await.ok()?.ok()?
    }

    /// Whether everything read about the process since it was pinned is about the process that connected.
    ///
    /// The descriptor of a living process keeps its number from being reused, so the start time needs comparing only
    /// where the descriptor was opened by number. A program of another user makes the kernel give the process's
    /// directory to another owner, and any other program has another file. To be called within [`UnixPeer::work`].
    ///
    /// # Errors
    /// What changed.
    pub fn still_same(&self) -> Result<(), PeerError> {
        let owner_now = owner(self.pid)?;
        let executable_now = executable(self.pid)?;
        let start_now = self.start_time.map(|_| start_time(self.pid)).transpose()?;
        if !self.is_alive() || start_now != self.start_time {
            return Err(PeerError::Gone);
        }
        if owner_now != self.owner {
            return Err(PeerError::OtherOwner);
        }
        if executable_now != self.executable {
            return Err(PeerError::OtherProgram);
        }
        Ok(())
    }

    /// Waits until the process has ended.
    pub async fn gone(&self) {
        // A descriptor of a process becomes readable once and for ever; an error cannot be told from an end, and
        // taking it for one is the safe side.
        let _ = self.process.readable().await;
    }
}

fn path(pid: i32, file: &str) -> String {
    format!("/proc/{pid}/{file}")
}

fn read(file: &'static str, pid: i32) -> Result<Vec<u8>, PeerError> {
    let mut content = vec![0; 4096];
    let mut length = 0;
    let mut open = fs::File::open(path(pid, file)).map_err(|source| absent(file, source))?;
    // These files say that they are empty, so their size is not asked for; and they come whole if there is room.
    while let Some(room) = content.get_mut(length..).filter(|room| !room.is_empty()) {
        match open.read(room) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(absent(file, error)),
        }
        if length == content.len() {
            content.resize(2 * length, 0);
        }
    }
    content.truncate(length);
    Ok(content)
}

fn absent(file: &'static str, source: io::Error) -> PeerError {
    match source.raw_os_error().map(Errno::from_raw) {
        Some(Errno::ENOENT | Errno::ESRCH) => PeerError::Gone,
        _ => PeerError::Read { file, source },
    }
}

fn open_process(pid: i32) -> Result<OwnedFd, PeerError> {
    let number = rustix::process::Pid::from_raw(pid).ok_or(PeerError::ForeignNamespace)?;
    rustix::process::pidfd_open(number, rustix::process::PidfdFlags::empty()).map_err(|errno| match errno {
        rustix::io::Errno::SRCH => PeerError::Gone,
        other => PeerError::Credentials(other.into()),
    })
}

/// The owner of the process's directory: its effective user and group, or root if it may not be traced.
fn owner(pid: i32) -> Result<(u32, u32), PeerError> {
    let metadata = fs::metadata(path(pid, "")).map_err(|source| absent("directory", source))?;
    Ok((metadata.uid(), metadata.gid()))
}

fn executable(pid: i32) -> Result<Option<FileId>, PeerError> {
    // Only where the file is stored is asked for, which the kernel knows: a file server that hangs is not asked.
    match statx(CWD, path(pid, "exe"), AtFlags::STATX_DONT_SYNC, StatxFlags::INO) {
        Ok(found) => {
            let device = makedev(found.stx_dev_major, found.stx_dev_minor);
            Ok(Some(FileId { device, inode: found.stx_ino }))
        }
        Err(rustix::io::Errno::ACCESS | rustix::io::Errno::PERM) => Ok(None),
        Err(errno) => Err(absent("exe", errno.into())),
    }
}

fn start_time(pid: i32) -> Result<u64, PeerError> {
    parse_start_time(&read("stat", pid)?).ok_or(PeerError::Malformed { file: "stat" })
}

/// Field 22 of `/proc/<pid>/stat`. The name in field 2 may hold anything, a closing parenthesis too: so count from the
/// last one.
fn parse_start_time(stat: &[u8]) -> Option<u64> {
    let after_name = stat.iter().rposition(|byte| *byte == b')')?.checked_add(1)?;
    let rest = std::str::from_utf8(stat.get(after_name..)?).ok()?;
    rest.split_ascii_whitespace().nth(19)?.parse().ok()
}

fn parse_status(status: &[u8]) -> Option<Credentials> {
    let (mut uid, mut gid, mut groups) = (None, None, None);
    // The name of the process stands first and Linux escapes line breaks in it, so no process can add lines.
    for line in status.split(|byte| *byte == b'\n') {
        let effective = |rest: &[u8]| numbers(rest).and_then(|all| all.get(1).copied());
        if let Some(rest) = line.strip_prefix(b"Uid:") {
            uid = uid.or(effective(rest));
        } else if let Some(rest) = line.strip_prefix(b"Gid:") {
            gid = gid.or(effective(rest));
        } else if let Some(rest) = line.strip_prefix(b"Groups:") {
            groups = groups.or(numbers(rest));
            break;
        }
    }
    Some(Credentials { uid: uid?, gid: gid?, groups: groups? })
}

fn numbers(text: &[u8]) -> Option<Vec<u32>> {
    std::str::from_utf8(text).ok()?.split_ascii_whitespace().map(|number| number.parse().ok()).collect()
}

#[cfg(test)]
mod tests;
