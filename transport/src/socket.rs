//! Unix sockets that nobody else can take the place of.

use std::fs::{self, DirBuilder, Permissions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::{self, AddressFamily, SockFlag, SockType, UnixAddr};
use tokio::net::{UnixListener, UnixSocket};

/// Connections that may wait to be accepted. Whoever connects in a loop makes others wait behind this many.
const BACKLOG: u32 = 1024;
/// What Linux takes (unix(7)): 108 bytes with the zero at the end.
const MAX_PATH: usize = 107;

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
    /// A part of the path is a symbolic link, which somebody else may turn elsewhere.
    #[error("{} is a symbolic link; name the directory it leads to", path.display())]
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

/// Listens on a Unix socket. Missing directories are made with `directory_mode`; the socket gets `socket_mode` before
/// anybody can connect. A socket that nobody listens on any more is replaced. To be called inside a tokio runtime.
///
/// # Errors
/// If a part of the path is a symbolic link or belongs to somebody who is neither this process's user nor root, if the
/// socket is in use, or if the operating system refuses.
pub fn bind_unix(path: &Path, directory_mode: u32, socket_mode: u32) -> Result<UnixListener, SocketError> {
    let path = std::path::absolute(path).map_err(system("find", path))?;
    let (Some(directory), Some(_)) = (path.parent(), path.file_name()) else {
        return Err(SocketError::NotAPath { path });
    };
    let length = path.as_os_str().len();
    if length > MAX_PATH {
        return Err(SocketError::TooLong { path, length });
    }
    for part in parts(directory) {
        make(&part, directory_mode)?;
    }
    remove_stale(&path)?;
    let socket = UnixSocket::new_stream().map_err(system("make a socket for", &path))?;
    socket.bind(&path).map_err(system("bind", &path))?;
    fs::set_permissions(&path, Permissions::from_mode(socket_mode)).map_err(system("set the mode of", &path))?;
    socket.listen(BACKLOG).map_err(system("listen on", &path))
}

/// `/a`, `/a/b`, … up to the directory itself.
fn parts(directory: &Path) -> Vec<PathBuf> {
    let mut parts: Vec<PathBuf> = Vec::new();
    let mut so_far = PathBuf::new();
    for component in directory.components() {
        so_far.push(component);
        if !matches!(component, Component::RootDir) {
            parts.push(so_far.clone());
        }
    }
    parts
}

fn make(directory: &Path, mode: u32) -> Result<(), SocketError> {
    match DirBuilder::new().mode(mode).create(directory) {
        // The mask of the process may have taken rights that the callers of the socket need.
        Ok(()) => {
            fs::set_permissions(directory, Permissions::from_mode(mode)).map_err(system("set the mode of", directory))
        }
        Err(error) => {
            // If there is nothing, the first error says why it could not be made.
            let found = fs::symlink_metadata(directory).map_err(|_| system("make the directory", directory)(error))?;
            if found.is_symlink() {
                return Err(SocketError::SymbolicLink { path: directory.to_owned() });
            }
            if found.uid() != 0 && found.uid() != nix::unistd::geteuid().as_raw() {
                return Err(SocketError::ForeignDirectory { path: directory.to_owned(), owner: found.uid() });
            }
            Ok(())
        }
    }
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
}
