//! Unix sockets that nobody else can take the place of.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use tokio::net::unix::SocketAddr;
use tokio::net::{UnixListener, UnixSocket, UnixStream};

/// Connections that may wait to be accepted. Whoever connects in a loop makes others wait behind this many.
const BACKLOG: u32 = 1024;
/// What Linux takes (unix(7)): 108 bytes with the zero at the end.
const MAX_PATH: usize = 107;
/// Symbolic links that are followed in one path.
const MAX_LINKS: u32 = 8;

/// Why a socket cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The path has no directory and name.
    #[error("{} is not the path of a socket", path.display())]
    NotAPath {
        /// As configured.
        path: PathBuf,
    },
    /// The path is longer than the operating system takes.
    #[error("{} is {length} bytes long, and the path of a socket may have {MAX_PATH}", path.display())]
    TooLong {
        /// As configured, made absolute.
        path: PathBuf,
        /// Its bytes.
        length: usize,
    },
    /// A part of the path is a symbolic link that is not root's, or stands where others than root can write.
    #[error("{} is a symbolic link that somebody else than root could turn elsewhere; name what it leads to", path.display())]
    SymbolicLink {
        /// The part.
        path: PathBuf,
    },
    /// A directory of the path is neither ours nor root's, so its owner could put another socket in place of ours.
    #[error("{} belongs to user {owner}, who could replace the socket", path.display())]
    ForeignDirectory {
        /// The directory.
        path: PathBuf,
        /// Whose it is.
        owner: u32,
    },
    /// Everybody may write the directory, so anybody could put another socket in place of ours.
    #[error(
        "every user can write {}, and could replace the socket; take that right away (chmod o-w), or name a directory \
         that only this program's user can write", path.display()
    )]
    WorldWritable {
        /// The directory.
        path: PathBuf,
    },
    /// There is something that is not a socket.
    #[error("{} is there already and is not a socket", path.display())]
    Occupied {
        /// The path.
        path: PathBuf,
    },
    /// Somebody is listening there.
    #[error("another process is listening on {}", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
    },
    /// The operating system refused.
    #[error("cannot {action} {}", path.display())]
    System {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the operating system said.
        #[source]
        source: io::Error,
    },
}

fn system(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SocketError {
    let path = path.to_owned();
    move |source| SocketError::System { action, path, source }
}

/// A socket that is listened on. Its file is removed when this is dropped, if it is still the one that was made.
#[derive(Debug)]
pub struct Listener {
    inner: UnixListener,
    file: SocketFile,
}

impl Listener {
    /// Waits for the next connection.
    ///
    /// # Errors
    /// What the operating system says.
    pub async fn accept(&self) -> io::Result<(UnixStream, SocketAddr)> {
        self.inner.accept().await
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        // Still listening, so that nobody takes the file for a stale one and puts another in its place meanwhile.
        self.file.remove();
    }
}

/// The file of a socket, known by device and inode: a path may be somebody else's by now.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl SocketFile {
    fn of(path: &Path) -> io::Result<Self> {
        let found = fs::symlink_metadata(path)?;
        Ok(Self { path: path.to_owned(), device: found.dev(), inode: found.ino() })
    }

    fn remove(&self) {
        let ours = Self::of(&self.path).is_ok_and(|now| (now.device, now.inode) == (self.device, self.inode));
        if ours && let Err(error) = fs::remove_file(&self.path) {
            tracing::warn!(path = %self.path.display(), %error, "Cannot remove the file of a socket that is closed");
        }
    }
}

/// Listens on a Unix socket. Missing directories are made with `directory_mode`; the socket gets `socket_mode` before
/// anybody can connect. A socket that nobody listens on any more is replaced. To be called inside a tokio runtime.
///
/// # Errors
/// If somebody who is neither this process's user nor root could put another socket in place of this one: by a symbolic
/// link or a directory of the path that is theirs, or by a directory that everybody can write (the root of a mount
/// excepted, which a container gets no other way). If the socket is in use, or if the operating system refuses.
pub fn bind_unix(path: &Path, directory_mode: u32, socket_mode: u32) -> Result<Listener, SocketError> {
    let path = std::path::absolute(path).map_err(system("find", path))?;
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(SocketError::NotAPath { path });
    };
    short_enough(&path)?;
    let found = walk(directory, directory_mode)?;
    let path = found.path.join(name);
    if !found.shared {
        short_enough(&path)?;
        remove_stale(&path)?;
        return listen(&path, socket_mode);
    }
    // Nothing is made in a directory that everybody can write but what is finished: the socket gets its rights in a
    // directory of ours, and takes its place by one step.
    remove_stale(&path)?;
    let own = found.path.join(format!(".signet-{}", std::process::id()));
    let first = own.join("s");
    short_enough(&first)?;
    make(&own, 0o700)?;
    remove_stale(&first)?;
    let mut listener = listen(&first, socket_mode)?;
    fs::rename(&first, &path).map_err(system("move the new socket to", &path))?;
    listener.file.path = path;
    fs::remove_dir(&own).map_err(system("remove the directory", &own))?;
    Ok(listener)
}

fn short_enough(path: &Path) -> Result<(), SocketError> {
    match path.as_os_str().len() {
        length if length > MAX_PATH => Err(SocketError::TooLong { path: path.to_owned(), length }),
        _ => Ok(()),
    }
}

fn listen(path: &Path, mode: u32) -> Result<Listener, SocketError> {
    let socket = UnixSocket::new_stream().map_err(system("make a socket for", path))?;
    socket.bind(path).map_err(system("bind", path))?;
    let file = SocketFile::of(path).map_err(system("look at", path))?;
    let listening = fs::set_permissions(path, Permissions::from_mode(mode))
        .map_err(system("set the mode of", path))
        .and_then(|()| socket.listen(BACKLOG).map_err(system("listen on", path)));
    match listening {
        Ok(inner) => Ok(Listener { inner, file }),
        Err(error) => {
            file.remove();
            Err(error)
        }
    }
}

/// A directory that was walked to, without symbolic links.
struct Found {
    path: PathBuf,
    /// Everybody can write it.
    shared: bool,
}

/// Goes to a directory part by part, makes what is missing, and refuses what somebody else could turn elsewhere.
fn walk(directory: &Path, mode: u32) -> Result<Found, SocketError> {
    let mut found = Found { path: PathBuf::from("/"), shared: false };
    // Whether root alone can write every directory so far.
    let mut roots = look("/".as_ref())?.is_roots_alone();
    let mut left: Vec<PathBuf> = reversed(directory);
    let mut links = 0;
    while let Some(part) = left.pop() {
        if part.as_os_str() == ".." {
            // What is above was looked at on the way down.
            found.path.pop();
            continue;
        }
        let path = found.path.join(&part);
        let seen = match DirBuilder::new().mode(mode).create(&path) {
            Ok(()) => {
                // The mask of the process may have taken rights that the callers of the socket need.
                fs::set_permissions(&path, Permissions::from_mode(mode)).map_err(system("set the mode of", &path))?;
                look(&path)?
            }
            // If there is nothing, the first error says why it could not be made.
            Err(error) => look(&path).map_err(|_| system("make the directory", &path)(error))?,
        };
        if seen.link {
            links += 1;
            if !roots || seen.owner != 0 || links > MAX_LINKS {
                return Err(SocketError::SymbolicLink { path });
            }
            let target = fs::read_link(&path).map_err(system("follow", &path))?;
            if target.is_absolute() {
                found.path = PathBuf::from("/");
            }
            left.extend(reversed(&target));
            continue;
        }
        found.shared = seen.check(&path)?;
        roots &= seen.is_roots_alone();
        found.path = path;
    }
    Ok(found)
}

/// The parts of a path, the last first, without the root.
fn reversed(path: &Path) -> Vec<PathBuf> {
    let parts = path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    let mut parts: Vec<PathBuf> = parts.map(|part| PathBuf::from(part.as_os_str())).collect();
    parts.reverse();
    parts
}

fn make(directory: &Path, mode: u32) -> Result<(), SocketError> {
    if let Err(error) = DirBuilder::new().mode(mode).create(directory) {
        let seen = look(directory).map_err(|_| system("make the directory", directory)(error))?;
        if seen.link {
            return Err(SocketError::SymbolicLink { path: directory.to_owned() });
        }
        seen.check(directory)?;
    }
    Ok(())
}

/// What is seen of a part of the path.
struct Seen {
    link: bool,
    owner: u32,
    group: u32,
    mode: u32,
}

fn look(path: &Path) -> Result<Seen, SocketError> {
    let found = fs::symlink_metadata(path).map_err(system("look at", path))?;
    Ok(Seen { link: found.is_symlink(), owner: found.uid(), group: found.gid(), mode: found.mode() })
}

impl Seen {
    /// Whether nobody but root can change what is in this directory.
    fn is_roots_alone(&self) -> bool {
        self.owner == 0 && self.mode & 0o002 == 0 && (self.group == 0 || self.mode & 0o020 == 0)
    }

    /// Refuses a directory in which somebody else could replace what is ours; whether everybody can write it and it is
    /// accepted all the same, as the root of a mount.
    fn check(&self, path: &Path) -> Result<bool, SocketError> {
        if self.owner != 0 && self.owner != nix::unistd::geteuid().as_raw() {
            return Err(SocketError::ForeignDirectory { path: path.to_owned(), owner: self.owner });
        }
        let shared = self.mode & 0o002 != 0 && self.mode & 0o1000 == 0;
        if shared && !is_mount(path) {
            return Err(SocketError::WorldWritable { path: path.to_owned() });
        }
        Ok(shared)
    }
}

/// Whether something is mounted at `path`; no, if the kernel (before 5.8) does not tell.
fn is_mount(path: &Path) -> bool {
    use rustix::fs::{AtFlags, CWD, StatxAttributes, StatxFlags, statx};
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    statx(CWD, path, flags, StatxFlags::empty())
        .is_ok_and(|told| told.stx_attributes.contains(StatxAttributes::MOUNT_ROOT))
}

fn remove_stale(path: &Path) -> Result<(), SocketError> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(system("look at", path)(error)),
    };
    if found.is_symlink() {
        return Err(SocketError::SymbolicLink { path: path.to_owned() });
    }
    if !found.file_type().is_socket() {
        return Err(SocketError::Occupied { path: path.to_owned() });
    }
    match connect(path) {
        // Whoever is too busy to accept, or speaks in datagrams, is there all the same.
        Ok(()) | Err(Errno::EAGAIN | Errno::EPROTOTYPE) => Err(SocketError::InUse { path: path.to_owned() }),
        Err(Errno::ENOENT) => Ok(()),
        Err(Errno::ECONNREFUSED) => fs::remove_file(path).map_err(system("remove the old socket", path)),
        Err(errno) => Err(system("find out who listens on", path)(errno.into())),
    }
}

/// Connects without waiting, which one that does not accept could make last for ever.
fn connect(path: &Path) -> Result<(), Errno> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let socket = socket::socket(AddressFamily::Unix, SockType::Stream, flags, None)?;
    socket::connect(socket.as_raw_fd(), &UnixAddr::new(path)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stale_sockets_are_replaced_and_living_ones_are_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/b/api.sock");
        let first = bind_unix(&path, 0o750, 0o770).unwrap();
        assert!(matches!(bind_unix(&path, 0o750, 0o770), Err(SocketError::InUse { .. })));
        drop(first);
        // As a killed program leaves it: the file is there, and nobody listens.
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        assert!(path.exists());
        let _second = bind_unix(&path, 0o750, 0o777).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o777);
        assert_eq!(fs::metadata(folder.path().join("a")).unwrap().mode() & 0o777, 0o750);
    }

    #[tokio::test]
    async fn whoever_does_not_accept_is_there_all_the_same() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("busy.sock");
        let busy = UnixSocket::new_stream().unwrap();
        busy.bind(&path).unwrap();
        let _busy = busy.listen(0).unwrap();
        let _waiting = std::os::unix::net::UnixStream::connect(&path).unwrap();
        assert_eq!(connect(&path), Err(Errno::EAGAIN));
        assert!(matches!(bind_unix(&path, 0o755, 0o777), Err(SocketError::InUse { .. })));

        let path = folder.path().join("datagrams.sock");
        let datagrams = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        assert!(matches!(bind_unix(&path, 0o755, 0o777), Err(SocketError::InUse { .. })));
        assert!(fs::symlink_metadata(&path).unwrap().file_type().is_socket());
        drop(datagrams);
        let _ours = bind_unix(&path, 0o755, 0o777).unwrap();
    }

    #[tokio::test]
    async fn a_path_that_is_too_long_is_refused_before_directories_are_made() {
        let folder = tempfile::tempdir().unwrap();
        let room = MAX_PATH - folder.path().as_os_str().len() - "/a/".len();
        let path = |bytes| folder.path().join("a").join("x".repeat(bytes));
        let refused = bind_unix(&path(room + 1), 0o750, 0o770);
        assert!(matches!(refused, Err(SocketError::TooLong { length: 108, .. })), "{refused:?}");
        assert!(!folder.path().join("a").exists());
        bind_unix(&path(room), 0o750, 0o770).unwrap();
    }

    #[tokio::test]
    async fn symbolic_links_and_other_files_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("real")).unwrap();
        std::os::unix::fs::symlink(folder.path().join("real"), folder.path().join("link")).unwrap();
        let refused = bind_unix(&folder.path().join("link/api.sock"), 0o755, 0o777);
        assert!(matches!(refused, Err(SocketError::SymbolicLink { path }) if path.ends_with("link")));
        let refused = bind_unix(&folder.path().join("link/deeper/api.sock"), 0o755, 0o777);
        assert!(matches!(refused, Err(SocketError::SymbolicLink { .. })));
        fs::write(folder.path().join("file"), "precious").unwrap();
        let refused = bind_unix(&folder.path().join("file"), 0o755, 0o777);
        assert!(matches!(refused, Err(SocketError::Occupied { .. })));
        assert_eq!(fs::read_to_string(folder.path().join("file")).unwrap(), "precious");
    }

    #[tokio::test]
    async fn directories_of_others_are_refused() {
        if !nix::unistd::geteuid().is_root() {
            return; // Only root can give a directory away.
        }
        let folder = tempfile::tempdir().unwrap();
        let theirs = folder.path().join("theirs");
        fs::create_dir(&theirs).unwrap();
        std::os::unix::fs::chown(&theirs, Some(12345), None).unwrap();
        let refused = bind_unix(&theirs.join("ours/api.sock"), 0o755, 0o777);
        assert!(matches!(refused, Err(SocketError::ForeignDirectory { owner: 12345, .. })));
    }

    #[tokio::test]
    async fn a_stop_removes_the_socket_file_if_it_is_still_ours() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api.sock");
        drop(bind_unix(&path, 0o750, 0o770).unwrap());
        assert!(!path.exists());

        let ours = bind_unix(&path, 0o750, 0o770).unwrap();
        fs::remove_file(&path).unwrap();
        let theirs = bind_unix(&path, 0o750, 0o770).unwrap();
        drop(ours);
        assert!(matches!(bind_unix(&path, 0o750, 0o770), Err(SocketError::InUse { .. })));
        drop(theirs);
        assert!(!path.exists());
    }

    fn are_root() -> bool {
        nix::unistd::geteuid().is_root()
    }

    #[tokio::test]
    async fn links_of_root_where_only_root_can_write_are_followed() {
        // `/root` stands for `/var`: what is below the folder for temporary files is below one that everybody can write.
        let Ok(folder) = tempfile::tempdir_in("/root") else { return };
        let link = |target: &Path, name: &str| {
            let path = folder.path().join(name);
            std::os::unix::fs::symlink(target, &path).unwrap();
            path
        };
        fs::create_dir_all(folder.path().join("run/deep")).unwrap();
        let run = link("run".as_ref(), "var-run");
        let absolute = link(&folder.path().join("run/deep/.."), "absolute");
        let round = link("round".as_ref(), "round");
        for path in [run.join("signet/api.sock"), absolute.join("b/api.sock")] {
            let bound = bind_unix(&path, 0o750, 0o770).unwrap();
            assert!(matches!(bind_unix(&path, 0o750, 0o770), Err(SocketError::InUse { .. })));
            drop(bound);
            assert!(!path.exists());
        }
        assert!(folder.path().join("run/signet").is_dir() && folder.path().join("run/b").is_dir());
        let refused = |path: &Path| match bind_unix(&path.join("api.sock"), 0o750, 0o770) {
            Err(SocketError::SymbolicLink { path }) => path,
            other => panic!("{other:?}"),
        };
        assert_eq!(refused(&round), round);
        // A link that another user owns, and one of root's in a directory that another user's group can write.
        let theirs = link("run".as_ref(), "theirs");
        std::os::unix::fs::lchown(&theirs, Some(12345), None).unwrap();
        assert_eq!(refused(&theirs), theirs);
        std::os::unix::fs::chown(folder.path(), None, Some(12345)).unwrap();
        fs::set_permissions(folder.path(), Permissions::from_mode(0o770)).unwrap();
        assert_eq!(refused(&run), run);
    }

    #[tokio::test]
    async fn world_writable_directories_are_refused_unless_sticky() {
        let folder = tempfile::tempdir().unwrap();
        let open = folder.path().join("open");
        fs::create_dir(&open).unwrap();
        fs::set_permissions(&open, Permissions::from_mode(0o777)).unwrap();
        for path in [open.join("api.sock"), open.join("deeper/api.sock")] {
            let refused = bind_unix(&path, 0o755, 0o777);
            assert!(matches!(&refused, Err(SocketError::WorldWritable { path }) if *path == open), "{refused:?}");
        }
        fs::set_permissions(&open, Permissions::from_mode(0o1777)).unwrap();
        bind_unix(&open.join("api.sock"), 0o755, 0o777).unwrap();
    }

    #[tokio::test]
    async fn an_empty_dir_of_kubernetes_is_the_root_of_a_mount_and_accepted() {
        if !are_root() {
            return; // Only root can mount.
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_owned();
        // In a thread with mounts of its own, of which nobody else sees anything.
        let tried = std::thread::spawn(move || {
            use nix::mount::{MsFlags, mount};
            let none = None::<&str>;
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNS).ok()?;
            mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).ok()?;
            mount(Some("emptydir"), &path, Some("tmpfs"), MsFlags::empty(), Some("mode=0777")).ok()?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let _inside = runtime.enter();
            let socket = path.join("api.sock");
            let bound = bind_unix(&socket, 0o755, 0o777).unwrap();
            std::os::unix::net::UnixStream::connect(&socket).unwrap();
            let mode = fs::metadata(&socket).unwrap().mode() & 0o777;
            let others: Vec<_> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().file_name()).collect();
            let in_use = matches!(bind_unix(&socket, 0o755, 0o777), Err(SocketError::InUse { .. }));
            drop(bound);
            let below = bind_unix(&path.join("own/api.sock"), 0o755, 0o777).is_ok();
            Some((mode, others, in_use, socket.exists(), below))
        });
        let Some(seen) = tried.join().unwrap() else { return };
        assert_eq!(seen, (0o777, vec!["api.sock".into()], true, false, true));
    }
}
