//! Threads for work that may never return, shared fairly between those who cause it.
//!
//! What one party causes (a look at its files, a question to a name service) can take for ever: a file system without
//! a server, a directory that does not answer. A thread in such a call cannot be taken back. So each party has a few
//! threads at most, one that hangs counts until it returns, and whoever waits may leave at any time without leaving
//! anything behind: a job owns what it holds. The threads have names, and no other work shares them.

use std::collections::{HashMap, VecDeque};
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::sync::oneshot;

/// How long a thread without work stays.
const IDLE: Duration = Duration::from_secs(10);
/// The stack of a thread: name services are foreign code of any depth.
const STACK: usize = 1 << 20;

/// How much a pool may take.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Threads in all.
    pub threads: usize,
    /// Threads that one party may occupy.
    pub per_party: usize,
    /// Jobs of one party that may wait for a thread; what comes beyond is refused.
    pub waiting_per_party: usize,
}

/// Why a job has no result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PoolError {
    /// Too many jobs of this party wait already, or no thread could be started.
    #[error("too much work of this caller waits for a thread already")]
    Full,
    /// The job panicked.
    #[error("the work ended by a panic")]
    Panicked,
}

/// A pool; clones share it.
#[derive(Clone)]
pub struct Pool {
    /// None where jobs run in place.
    inner: Option<Arc<Inner>>,
}

impl std::fmt::Debug for Pool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Pool").field("name", &self.inner.as_ref().map(|inner| inner.name)).finish_non_exhaustive()
    }
}

struct Inner {
    name: &'static str,
    limits: Limits,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Parties that have a job running or waiting.
    parties: HashMap<Arc<str>, Party>,
    /// Parties with a waiting job and room for one more thread, each once, in the order of their turns.
    turns: VecDeque<Arc<str>>,
    /// Threads without work, the one that worked last at the end.
    idle: Vec<(u64, Sender<Job>)>,
    threads: usize,
    next: u64,
}

#[derive(Default)]
struct Party {
    running: usize,
    waiting: VecDeque<Box<dyn Work>>,
    /// Whether it stands in `turns`.
    queued: bool,
}

/// One job, with whoever waits for it.
trait Work: Send {
    fn run(self: Box<Self>);
    fn abandoned(&self) -> bool;
}

struct Task<F, T> {
    work: F,
    result: oneshot::Sender<T>,
}

impl<T: Send + 'static, F: FnOnce() -> T + Send> Work for Task<F, T> {
    fn run(self: Box<Self>) {
        let Self { work, result } = *self;
        // Dropping the sender tells of the panic.
        if let Ok(value) = catch_unwind(AssertUnwindSafe(work)) {
            let _ = result.send(value);
        }
    }

    fn abandoned(&self) -> bool {
        self.result.is_closed()
    }
}

struct Job {
    party: Arc<str>,
    work: Box<dyn Work>,
}

/// A job that was started; its result once it is there. Dropping it leaves a running job alone, which keeps its thread
/// until it returns, and takes a waiting one back.
#[derive(Debug)]
pub struct Started<T>(oneshot::Receiver<T>);

impl<T> Future for Started<T> {
    type Output = Result<T, PoolError>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(context).map_err(|_| PoolError::Panicked)
    }
}

impl Pool {
    /// A pool whose threads carry `name`; they are started as they are needed.
    pub fn new(name: &'static str, limits: Limits) -> Self {
        Self { inner: Some(Arc::new(Inner { name, limits, state: Mutex::default() })) }
    }

    /// Runs each job where it is started, before that call returns: for tests, above all those whose time stands
    /// still, which cannot wait for a thread.
    pub fn in_place() -> Self {
        Self { inner: None }
    }

    /// Starts a job of `party`, at once or when it is its turn.
    ///
    /// # Errors
    /// [`PoolError::Full`].
    pub fn start<T: Send + 'static>(
        &self,
        party: &Arc<str>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<Started<T>, PoolError> {
        let (result, started) = oneshot::channel();
        let work: Box<dyn Work> = Box::new(Task { work, result });
        match &self.inner {
            Some(inner) => inner.submit(Job { party: Arc::clone(party), work })?,
            None => work.run(),
        }
        Ok(Started(started))
    }

    /// [`Pool::start`], and its result.
    ///
    /// # Errors
    /// [`PoolError`].
    pub async fn run<T: Send + 'static>(
        &self,
        party: &Arc<str>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, PoolError> {
        self.start(party, work)?.await
    }

    /// How many threads are at work, those that hang among them.
    pub fn busy(&self) -> usize {
        self.inner.as_ref().map_or(0, |inner| {
            let state = inner.state();
            state.threads - state.idle.len()
        })
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn submit(self: &Arc<Self>, job: Job) -> Result<(), PoolError> {
        let mut guard = self.state();
        let state = &mut *guard;
        let party = state.parties.entry(Arc::clone(&job.party)).or_default();
        let may_run = party.running < self.limits.per_party;
        if may_run && let Some((_, thread)) = state.idle.pop() {
            party.running += 1;
            // Its thread waits for exactly this and cannot be gone.
            let _ = thread.send(job);
            return Ok(());
        }
        if may_run && state.threads < self.limits.threads {
            party.running += 1;
            state.threads += 1;
            state.next += 1;
            let number = state.next;
            let name = Arc::clone(&job.party);
            let this = Arc::clone(self);
            let thread = std::thread::Builder::new().name(self.name.to_owned()).stack_size(STACK);
            if thread.spawn(move || this.work(number, job)).is_ok() {
                return Ok(());
            }
            state.threads -= 1;
            state.leave(&name, self.limits.per_party);
            return Err(PoolError::Full);
        }
        if party.waiting.len() >= self.limits.waiting_per_party {
            party.waiting.retain(|work| !work.abandoned());
        }
        if party.waiting.len() >= self.limits.waiting_per_party {
            return Err(PoolError::Full);
        }
        party.waiting.push_back(job.work);
        if may_run && !party.queued {
            party.queued = true;
            state.turns.push_back(job.party);
        }
        Ok(())
    }

    /// Threads at work, those that hang among them; for whoever watches the process.
    fn busy(&self, by: f64) {
        metrics::gauge!("callers.threads", "pool" => self.name).increment(by);
    }

    /// The life of one thread.
    fn work(self: &Arc<Self>, number: u64, first: Job) {
        let (sender, jobs) = channel();
        let mut job = Some(first);
        while let Some(Job { party, work }) = job.take() {
            if !work.abandoned() {
                self.busy(1.0);
                work.run();
                self.busy(-1.0);
            }
            let mut state = self.state();
            state.leave(&party, self.limits.per_party);
            job = state.next_job(self.limits.per_party);
            if job.is_none() {
                state.idle.push((number, sender.clone()));
                drop(state);
                job = self.wait(number, &jobs);
            }
        }
    }

    /// Waits for a job; none if there was none for long enough.
    fn wait(&self, number: u64, jobs: &Receiver<Job>) -> Option<Job> {
        match jobs.recv_timeout(IDLE) {
            Ok(job) => Some(job),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => {
                let mut state = self.state();
                let before = state.idle.len();
                state.idle.retain(|(idle, _)| *idle != number);
                if state.idle.len() < before {
                    state.threads -= 1;
                    return None;
                }
                // Somebody chose this thread at the last moment.
                drop(state);
                jobs.recv().ok()
            }
        }
    }
}

impl State {
    /// A thread of this party is free.
    fn leave(&mut self, name: &Arc<str>, per_party: usize) {
        let Some(party) = self.parties.get_mut(name) else { return };
        party.running = party.running.saturating_sub(1);
        if !party.waiting.is_empty() && !party.queued && party.running < per_party {
            party.queued = true;
            self.turns.push_back(Arc::clone(name));
        } else if party.waiting.is_empty() && party.running == 0 {
            self.parties.remove(name);
        }
    }

    /// The next job, of the party whose turn it is.
    fn next_job(&mut self, per_party: usize) -> Option<Job> {
        while let Some(name) = self.turns.pop_front() {
            let Some(party) = self.parties.get_mut(&name) else { continue };
            party.queued = false;
            let work = loop {
                match party.waiting.pop_front() {
                    Some(work) if work.abandoned() => {}
                    other => break other,
                }
            };
            match work {
                Some(work) => {
                    party.running += 1;
                    if !party.waiting.is_empty() && party.running < per_party {
                        party.queued = true;
                        self.turns.push_back(Arc::clone(&name));
                    }
                    return Some(Job { party: name, work });
                }
                None if party.running == 0 => drop(self.parties.remove(&name)),
                None => {}
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn pool(threads: usize) -> Pool {
        Pool::new("test", Limits { threads, per_party: 2, waiting_per_party: 4 })
    }

    fn party(name: &str) -> Arc<str> {
        Arc::from(name)
    }

    async fn until(what: impl Fn() -> bool) {
        let happened = async {
            while !what() {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(Duration::from_secs(20), happened).await.unwrap();
    }

    /// Jobs that hang until they are let go.
    struct Hung {
        hold: Sender<()>,
        held: Arc<Mutex<Receiver<()>>>,
        inside: Arc<AtomicUsize>,
    }

    impl Hung {
        fn new() -> Self {
            let (hold, held) = channel();
            Self { hold, held: Arc::new(Mutex::new(held)), inside: Arc::default() }
        }

        fn job(&self) -> impl FnOnce() + Send + 'static {
            let (held, inside) = (Arc::clone(&self.held), Arc::clone(&self.inside));
            move || {
                inside.fetch_add(1, Ordering::SeqCst);
                let _ = held.lock().unwrap().recv();
                inside.fetch_sub(1, Ordering::SeqCst);
            }
        }

        async fn until(&self, count: usize) {
            until(|| self.inside.load(Ordering::SeqCst) == count).await;
        }
    }

    #[tokio::test]
    async fn jobs_run_on_threads_of_this_name() {
        let pool = pool(4);
        let name = pool.run(&party("a"), || std::thread::current().name().map(ToOwned::to_owned)).await.unwrap();
        assert_eq!(name.as_deref(), Some("test"));
        assert_eq!(Pool::in_place().run(&party("a"), || 7).await, Ok(7));
    }

    #[tokio::test]
    async fn a_party_whose_jobs_hang_has_two_threads_and_the_others_go_on() {
        let (pool, hung) = (pool(8), Hung::new());
        let slow = party("slow");
        let abandoned = [pool.start(&slow, hung.job()).unwrap(), pool.start(&slow, hung.job()).unwrap()];
        hung.until(2).await;
        // Those who waited for the hung ones have gone: their threads count all the same.
        drop(abandoned);
        let waiting: Vec<_> = (0..4).map(|number| pool.start(&slow, move || number).unwrap()).collect();
        assert_eq!(pool.start(&slow, || 9).unwrap_err(), PoolError::Full);
        for number in 0..20 {
            assert_eq!(pool.run(&party(&format!("quick {number}")), || 1).await, Ok(1));
        }
        assert_eq!(hung.inside.load(Ordering::SeqCst), 2);
        hung.hold.send(()).unwrap();
        for (number, waits) in waiting.into_iter().enumerate() {
            assert_eq!(waits.await, Ok(number));
        }
        hung.hold.send(()).unwrap();
        hung.until(0).await;
        until(|| pool.busy() == 0).await;
        assert!(pool.inner.as_ref().unwrap().state().parties.is_empty());
    }

    #[tokio::test]
    async fn a_job_that_nobody_waits_for_any_more_is_not_begun() {
        let (pool, hung) = (pool(1), Hung::new());
        let first = pool.start(&party("a"), hung.job()).unwrap();
        hung.until(1).await;
        let ran = Arc::new(AtomicUsize::new(0));
        let count = |ran: &Arc<AtomicUsize>| {
            let ran = Arc::clone(ran);
            move || ran.fetch_add(1, Ordering::SeqCst)
        };
        for _ in 0..100 {
            // Room is made for the living among those who left.
            drop(pool.start(&party("b"), count(&ran)).unwrap());
        }
        let last = pool.start(&party("b"), count(&ran)).unwrap();
        hung.hold.send(()).unwrap();
        first.await.unwrap();
        assert_eq!(last.await, Ok(0));
    }

    #[tokio::test]
    async fn parties_take_turns() {
        let (pool, hung) = (pool(1), Hung::new());
        let first = pool.start(&party("a"), hung.job()).unwrap();
        hung.until(1).await;
        let order: Arc<Mutex<Vec<&str>>> = Arc::default();
        let mut started = Vec::new();
        for name in ["a", "a", "a", "b", "b", "c"] {
            let order = Arc::clone(&order);
            started.push(pool.start(&party(name), move || order.lock().unwrap().push(name)).unwrap());
        }
        hung.hold.send(()).unwrap();
        first.await.unwrap();
        for one in started {
            one.await.unwrap();
        }
        assert_eq!(*order.lock().unwrap(), ["a", "b", "c", "a", "b", "a"]);
    }

    #[tokio::test]
    async fn a_panic_is_told_and_costs_no_thread() {
        let pool = pool(1);
        assert_eq!(pool.run(&party("a"), || panic!("on purpose")).await, Err::<(), _>(PoolError::Panicked));
        assert_eq!(pool.run(&party("a"), || 1).await, Ok(1));
    }
}
