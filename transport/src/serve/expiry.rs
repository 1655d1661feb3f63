//! Ends connections at the moment their certificate expires, with one waiting task for all of them.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use runtime::clock::Clock;
use tokio::sync::Notify;

use super::ending::{Ending, Reason};

/// By expiry, then by the order in which they came.
type Waiting = BTreeMap<(SystemTime, u64), Ending>;

#[derive(Default)]
pub(super) struct Expiries {
    waiting: Mutex<(u64, Waiting)>,
    earlier: Notify,
}

/// One connection among the [`Expiries`], until it is dropped.
pub(super) struct Expiry {
    expiries: Arc<Expiries>,
    key: (SystemTime, u64),
}

impl Expiries {
    fn waiting(&self) -> MutexGuard<'_, (u64, Waiting)> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn add(self: &Arc<Self>, at: SystemTime, ending: Ending) -> Expiry {
        let mut waiting = self.waiting();
        let key = (at, waiting.0);
        waiting.0 += 1;
        waiting.1.insert(key, ending);
        if waiting.1.keys().next() == Some(&key) {
            self.earlier.notify_one();
        }
        drop(waiting);
        Expiry { expiries: Arc::clone(self), key }
    }

    /// Ends what expires, when it expires; never returns.
    pub(super) async fn run(&self, clock: &Clock) {
        loop {
            let first = self.waiting().1.keys().next().map(|(at, _)| *at);
            let due = async {
                match first {
                    Some(at) => clock.sleep_until(at).await,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                () = due => {}
                () = self.earlier.notified() => continue,
            }
            let now = clock.now();
            let mut waiting = self.waiting();
            while let Some(entry) = waiting.1.first_entry().filter(|entry| entry.key().0 <= now) {
                entry.remove().end(Reason::CertificateExpired);
            }
        }
    }
}

impl Drop for Expiry {
    fn drop(&mut self) {
        self.expiries.waiting().1.remove(&self.key);
    }
}
