//! Names of users and groups, from this machine's database.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use nix::unistd::{Gid, Group, Uid, User};
use tokio::time::Instant;

/// How long a name, or the lack of one, is believed. Asking may mean asking a directory server.
const BELIEVED: Duration = Duration::from_secs(10);
/// How many names are kept.
const KEPT: usize = 4096;

/// What is looked up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) enum Of {
    User(u32),
    Group(u32),
}

#[derive(Default)]
pub(super) struct Names {
    known: Mutex<HashMap<Of, (Instant, Option<String>)>>,
}

impl Names {
    fn known(&self) -> MutexGuard<'_, HashMap<Of, (Instant, Option<String>)>> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The names of all these, in their order; `None` for those that have none.
    pub(super) async fn all(&self, wanted: &[Of]) -> Vec<Option<String>> {
        let now = Instant::now();
        let mut found: Vec<Option<Option<String>>> = {
            let known = self.known();
            let fresh = |of| known.get(of).filter(|(since, _)| now.duration_since(*since) < BELIEVED);
            wanted.iter().map(|of| fresh(of).map(|(_, name)| name.clone())).collect()
        };
        let missing: Vec<Of> =
            wanted.iter().zip(&found).filter(|(_, found)| found.is_none()).map(|(of, _)| *of).collect();
        if !missing.is_empty() {
            let asked = missing.clone();
            // A name service may wait for the network. Without an answer there is no name, and no selector.
            let names = tokio::task::spawn_blocking(move || asked.into_iter().map(ask).collect::<Vec<_>>());
            let names = names.await.unwrap_or_default();
            let mut known = self.known();
            if known.len() + missing.len() > KEPT {
                known.clear();
            }
            let mut names = missing.into_iter().zip(names).inspect(|(of, name)| {
                known.insert(*of, (now, name.clone()));
            });
            for slot in found.iter_mut().filter(|slot| slot.is_none()) {
                *slot = names.next().map(|(_, name)| name);
            }
        }
        found.into_iter().map(Option::flatten).collect()
    }
}

fn ask(of: Of) -> Option<String> {
    match of {
        Of::User(number) => User::from_uid(Uid::from_raw(number)).ok().flatten().map(|user| user.name),
        Of::Group(number) => Group::from_gid(Gid::from_raw(number)).ok().flatten().map(|group| group.name),
    }
}
