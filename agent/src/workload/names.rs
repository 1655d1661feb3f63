//! Names of users and groups, from this machine's database.
//!
//! Asking may mean asking a directory server that does not answer. So it happens on threads of its own, two for each
//! party: one whose names are slow to come loses no thread that looks at it, and nobody else waits.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::unistd::{Gid, Group, Uid, User};
use runtime::pool::{Limits, Pool};
use tokio::time::Instant;
use transport::peer::Party;

use super::AttestError;

/// How long a name, or the lack of one, is believed.
const BELIEVED: Duration = Duration::from_secs(10);
/// How many names are kept.
const KEPT: usize = 16 * 1024;

/// What is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Of {
    User(u32),
    Group(u32),
}

/// Who knows names.
pub(super) trait NameService: Send + Sync {
    /// The name, if there is one. May take any time.
    fn name(&self, of: Of) -> io::Result<Option<String>>;
}

/// The name service of this machine (`nsswitch.conf(5)`).
pub(super) struct System;

impl NameService for System {
    fn name(&self, of: Of) -> io::Result<Option<String>> {
        let found = match of {
            Of::User(number) => User::from_uid(Uid::from_raw(number)).map(|user| user.map(|user| user.name)),
            Of::Group(number) => Group::from_gid(Gid::from_raw(number)).map(|group| group.map(|group| group.name)),
        };
        match found {
            Ok(name) => Ok(name),
            // Services say "there is none" in many ways (getpwnam(3)); these say that they do not know.
            Err(
                errno @ (Errno::EAGAIN
                | Errno::EINTR
                | Errno::EIO
                | Errno::EMFILE
                | Errno::ENFILE
                | Errno::ENOMEM
                | Errno::ETIMEDOUT),
            ) => Err(errno.into()),
            Err(_) => Ok(None),
        }
    }
}

/// A name, or the proof that there is none.
type Name = Option<Arc<str>>;

#[derive(Clone)]
pub(super) struct Names {
    inner: Arc<Inner>,
    pool: Pool,
}

struct Inner {
    service: Box<dyn NameService>,
    known: Mutex<HashMap<Of, (Instant, Name)>>,
}

impl Names {
    pub(super) fn new(service: Box<dyn NameService>) -> Self {
        let pool = Pool::new("names", Limits { threads: 64, per_party: 2, waiting_per_party: 256 });
        Self { inner: Arc::new(Inner { service, known: Mutex::default() }), pool }
    }

    /// The names of all these, in their order, if every one is known.
    pub(super) fn known(&self, wanted: &[Of]) -> Option<Vec<Name>> {
        self.inner.names(wanted, Instant::now())
    }

    /// The names of all these, in their order; what is not known is asked for.
    ///
    /// # Errors
    /// If the name service fails, or too many callers of this party wait for it.
    pub(super) async fn learn(&self, party: &Party, wanted: Vec<Of>) -> Result<Vec<Name>, AttestError> {
        let (inner, waits) = (Arc::clone(&self.inner), Arc::new(()));
        let waiting = Arc::downgrade(&waits);
        let asked = self.pool.run(party.name(), move || inner.ask(&wanted, || waiting.strong_count() > 0)).await;
        drop(waits);
        asked.map_err(AttestError::Busy)?.map_err(AttestError::Names)
    }
}

impl Inner {
    fn kept(&self) -> MutexGuard<'_, HashMap<Of, (Instant, Name)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn names(&self, wanted: &[Of], now: Instant) -> Option<Vec<Name>> {
        let known = self.kept();
        let fresh = |of| known.get(of).filter(|(since, _)| now.duration_since(*since) < BELIEVED);
        wanted.iter().map(|of| fresh(of).map(|(_, name)| name.clone())).collect()
    }

    /// Asks as long as anybody waits. Each name is kept as soon as it is there, so that who gave up finds it at the next
    /// attempt.
    fn ask(&self, wanted: &[Of], anybody_waits: impl Fn() -> bool) -> io::Result<Vec<Name>> {
        let mut names = Vec::with_capacity(wanted.len());
        for of in wanted {
            if !anybody_waits() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let now = Instant::now();
            let known = self.names(std::slice::from_ref(of), now).and_then(|mut one| one.pop());
            let name = match known {
                Some(name) => name,
                None => {
                    let name: Name = self.service.name(*of)?.map(Into::into);
                    let mut known = self.kept();
                    if known.len() >= KEPT {
                        known.retain(|_, (since, _)| now.duration_since(*since) < BELIEVED);
                    }
                    if known.len() >= KEPT {
                        known.clear();
                    }
                    known.insert(*of, (Instant::now(), name.clone()));
                    name
                }
            };
            names.push(name);
        }
        Ok(names)
    }
}
