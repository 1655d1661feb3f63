//! What a process that holds keys asks of the kernel before it does anything else.

use nix::errno::Errno;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::sys::stat::{Mode, umask};

/// Why the process could not be hardened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HardenError {
    /// Core dumps could not be switched off.
    #[error("cannot switch off core dumps")]
    CoreDumps {
        /// What the system said.
        source: Errno,
    },
    /// The process could not be made untraceable for its own user.
    #[error("cannot make the process untraceable")]
    Traceable {
        /// What the system said.
        source: Errno,
    },
    /// The limit of open files could not be raised.
    #[error("cannot raise the limit of open files")]
    OpenFiles {
        /// What the system said.
        source: Errno,
    },
}

/// Keeps the memory of this process from others: no core dumps, and neither tracing nor `/proc/<pid>/mem` for other
/// processes of the same user (`prctl(2)`, `PR_SET_DUMPABLE`).
///
/// # Errors
///
/// [`HardenError`] for whichever the kernel refuses.
pub fn protect_memory() -> Result<(), HardenError> {
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(|source| HardenError::CoreDumps { source })?;
    nix::sys::prctl::set_dumpable(false).map_err(|source| HardenError::Traceable { source })
}

/// Raises the limit of open files to what the kernel allows this process, and returns it.
///
/// # Errors
///
/// [`HardenError::OpenFiles`].
pub fn raise_open_files() -> Result<u64, HardenError> {
    let failed = |source| HardenError::OpenFiles { source };
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE).map_err(failed)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard).map_err(failed)?;
    }
    Ok(hard)
}

/// Takes write access for the group and all access for others from every file made from now on; a stricter mask stays.
pub fn restrict_new_files() {
    let wanted = Mode::S_IWGRP | Mode::S_IRWXO;
    let before = umask(wanted);
    umask(before | wanted);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_agrees() {
        let hard = getrlimit(Resource::RLIMIT_NOFILE).unwrap().1;
        assert_eq!(raise_open_files().unwrap(), hard);
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
        protect_memory().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_CORE).unwrap(), (0, 0));
        assert!(!nix::sys::prctl::get_dumpable().unwrap());
        let before = umask(Mode::S_IRWXG);
        restrict_new_files();
        assert_eq!(umask(before), Mode::S_IRWXG | Mode::S_IRWXO);
    }
}
