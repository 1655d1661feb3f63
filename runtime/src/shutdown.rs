//! The end of a process: one request to stop, and an owner for every task.

use std::collections::HashMap;
use std::future::Future;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::FutureExt;
use tokio::sync::watch;
use tokio::task::AbortHandle;

/// Asks everything that holds the matching [`Shutdown`] to stop. Dropping the last one asks as well: nothing outlives
/// its owner.
#[derive(Clone, Debug)]
pub struct Trigger {
    requested: Arc<watch::Sender<bool>>,
}

impl Trigger {
    /// Asks to stop; further calls change nothing.
    pub fn request(&self) {
        self.requested.send_replace(true);
    }
}

/// Tells that a stop was asked for. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Shutdown {
    requested: watch::Receiver<bool>,
}

impl Shutdown {
    /// A new pair: who asks, and who is asked.
    #[allow(clippy::new_ret_no_self, reason = "the pair is one thing with two ends")]
    pub fn new() -> (Trigger, Shutdown) {
        let (sender, receiver) = watch::channel(false);
        (Trigger { requested: Arc::new(sender) }, Shutdown { requested: receiver })
    }

    /// Waits until a stop is asked for; returns at once if it already was.
    pub async fn requested(&self) {
        // An error means that every trigger is gone, which counts as a request.
        let _ = self.requested.clone().wait_for(|requested| *requested).await;
    }

    /// Whether a stop was asked for.
    pub fn is_requested(&self) -> bool {
        *self.requested.borrow() || self.requested.has_changed().is_err()
    }
}

/// The tasks of one owner. Every task of the process is started through one of these, so that the end of the process
/// waits for all of them. Cheap to clone; clones own the same tasks.
#[derive(Clone, Debug)]
pub struct Tasks {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    trigger: Trigger,
    next: AtomicU64,
    running: Mutex<HashMap<u64, Entry>>,
    count: watch::Sender<usize>,
}

/// The name of a task, and how to abort it once it has been started.
type Entry = (&'static str, Option<AbortHandle>);

impl Inner {
    fn running(&self) -> MutexGuard<'_, HashMap<u64, Entry>> {
        self.running.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Takes a task out of its owner's books however it ends, aborted included.
struct Leave {
    inner: Arc<Inner>,
    number: u64,
}

impl Drop for Leave {
    fn drop(&mut self) {
        let left = {
            let mut running = self.inner.running();
            running.remove(&self.number);
            running.len()
        };
        self.inner.count.send_replace(left);
    }
}

impl Tasks {
    /// An owner without tasks; `trigger` is pulled when a critical task panics.
    pub fn new(trigger: Trigger) -> Self {
        let (count, _) = watch::channel(0);
        let inner = Inner { trigger, next: AtomicU64::new(0), running: Mutex::default(), count };
        Self { inner: Arc::new(inner) }
    }

    /// Starts a task. A panic in it is logged and ends that task only.
    pub fn spawn(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, false, task);
    }

    /// Starts a task without which the process is of no use: a panic in it is logged and asks the process to stop.
    pub fn spawn_critical(&self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.start(name, true, task);
    }

    fn start(&self, name: &'static str, critical: bool, task: impl Future<Output = ()> + Send + 'static) {
        let number = self.inner.next.fetch_add(1, Ordering::Relaxed);
        let leave = Leave { inner: Arc::clone(&self.inner), number };
        let trigger = self.inner.trigger.clone();
        // In the books before it starts, so that a task which ends at once finds itself there. The books are not held
        // open meanwhile: a runtime that is shutting down drops the task in place, and that closes its entry.
        self.inner.running().insert(number, (name, None));
        #[allow(clippy::disallowed_methods, reason = "the one place where tasks are started")]
        let handle = tokio::spawn(async move {
            let _leave = leave;
            if let Err(panic) = AssertUnwindSafe(task).catch_unwind().await {
                let message = panic
                    .downcast_ref::<&str>()
                    .map(ToString::to_string)
                    .or_else(|| panic.downcast_ref::<String>().cloned())
                    .unwrap_or_default();
                tracing::error!(task = name, critical, panic = message, "A task panicked");
                if critical {
                    trigger.request();
                }
            }
        });
        if let Some((_, known)) = self.inner.running().get_mut(&number) {
            *known = Some(handle.abort_handle());
        }
    }

    /// How many tasks are running.
    pub fn len(&self) -> usize {
        self.inner.running().len()
    }

    /// Whether no task is running.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Waits until every task has ended, at most for `patience`; what runs on is then aborted. Returns the names of
    /// the aborted tasks, sorted.
    pub async fn join_all(&self, patience: Duration) -> Vec<&'static str> {
        let ended = tokio::time::timeout(patience, self.ended()).await;
        if ended.is_ok() {
            return Vec::new();
        }
        let mut late: Vec<_> = self
            .inner
            .running()
            .values()
            .map(|(name, handle)| {
                handle.iter().for_each(AbortHandle::abort);
                *name
            })
            .collect();
        late.sort_unstable();
        if !late.is_empty() {
            tracing::warn!(tasks = late.join(","), "Tasks did not end in time and were aborted");
        }
        // An aborted task is dropped at its next await; one that never awaits is left to the end of the process.
        let _ = tokio::time::timeout(Duration::from_secs(1), self.ended()).await;
        late
    }

    async fn ended(&self) {
        let mut count = self.inner.count.subscribe();
        while !self.is_empty() {
            if count.changed().await.is_err() {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_request_reaches_every_clone() {
        let (trigger, shutdown) = Shutdown::new();
        assert!(!shutdown.is_requested());
        trigger.clone().request();
        shutdown.clone().requested().await;
        shutdown.requested().await;
        assert!(shutdown.is_requested());
    }

    #[tokio::test]
    async fn a_dropped_trigger_is_a_request() {
        let (trigger, shutdown) = Shutdown::new();
        drop(trigger);
        shutdown.requested().await;
        assert!(shutdown.is_requested());
    }

    #[tokio::test(start_paused = true)]
    async fn join_waits_and_names_the_late() {
        let (trigger, shutdown) = Shutdown::new();
        let tasks = Tasks::new(trigger.clone());
        let until = shutdown.clone();
        tasks.spawn("polite", async move { until.requested().await });
        tasks.spawn("deaf", std::future::pending());
        assert_eq!(tasks.len(), 2);
        trigger.request();
        assert_eq!(tasks.join_all(Duration::from_secs(3)).await, vec!["deaf"]);
        assert!(tasks.is_empty());
    }

    #[tokio::test]
    async fn a_panic_ends_its_task_only() {
        let (trigger, shutdown) = Shutdown::new();
        let tasks = Tasks::new(trigger);
        tasks.spawn("unlucky", async { panic!("on purpose") });
        assert_eq!(tasks.join_all(Duration::from_secs(5)).await, Vec::<&str>::new());
        assert!(!shutdown.is_requested());
    }

    #[tokio::test]
    async fn a_panic_of_a_critical_task_asks_to_stop() {
        let (trigger, shutdown) = Shutdown::new();
        let tasks = Tasks::new(trigger);
        tasks.spawn_critical("heart", async { panic!("on purpose") });
        shutdown.requested().await;
        assert_eq!(tasks.join_all(Duration::from_secs(5)).await, Vec::<&str>::new());
    }

    #[test]
    fn a_task_started_while_the_runtime_ends_is_dropped_and_holds_nobody_up() {
        struct StartsAnother(Tasks);
        impl Drop for StartsAnother {
            fn drop(&mut self) {
                self.0.spawn("too late", std::future::pending());
            }
        }
        let (done, ended) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
            let tasks = Tasks::new(Shutdown::new().0);
            let last = StartsAnother(tasks.clone());
            runtime.block_on(async {
                tasks.spawn("holder", async move {
                    let _last = last;
                    std::future::pending::<()>().await;
                });
                tokio::task::yield_now().await;
            });
            drop(runtime);
            done.send(tasks.len()).unwrap();
        });
        assert_eq!(ended.recv_timeout(Duration::from_secs(60)), Ok(0));
    }
}
