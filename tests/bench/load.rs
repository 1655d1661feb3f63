//! Closed-loop load: so many callers, each with one call under way, for so long; CPU is read from the process that serves.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::Instant;

use crate::stats;

/// What one load did.
pub struct Done {
    /// Items served (a call may hold several).
    pub items: u64,
    /// Wall time.
    pub elapsed: Duration,
    /// CPU time of the process that served.
    pub cpu: Duration,
    /// Time of each call.
    pub calls: Vec<Duration>,
}

impl Done {
    /// CPU milliseconds of the serving process for one item.
    pub fn cpu_ms(&self) -> f64 {
        self.cpu.as_secs_f64() * 1000.0 / self.items.max(1) as f64
    }

    /// Items for one second of CPU.
    pub fn per_core_second(&self) -> f64 {
        self.items as f64 / self.cpu.as_secs_f64().max(1e-9)
    }

    /// Items a second of wall time.
    pub fn rate(&self) -> f64 {
        self.items as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Runs `call` (caller number → items served) by `callers` at once for `time`; a failing call fails the load.
pub async fn run<F, C>(pid: u32, callers: usize, time: Duration, call: C) -> Result<Done>
where
    C: Fn(usize) -> F + Send + Sync + 'static,
    F: Future<Output = Result<u64>> + Send,
{
    let call = Arc::new(call);
    let items = Arc::new(AtomicU64::new(0));
    let before = stats::cpu(pid)?;
    let begin = Instant::now();
    let mut tasks = tokio::task::JoinSet::new();
    for caller in 0..callers {
        let (call, items) = (call.clone(), items.clone());
        tasks.spawn(async move {
            let mut calls = Vec::new();
            while begin.elapsed() < time {
                let start = Instant::now();
                items.fetch_add(call(caller).await?, Ordering::Relaxed);
                calls.push(start.elapsed());
            }
            anyhow::Ok(calls)
        });
    }
    let mut calls = Vec::new();
    while let Some(task) = tasks.join_next().await {
        calls.extend(task??);
    }
    let done =
        Done { items: items.load(Ordering::Relaxed), elapsed: begin.elapsed(), cpu: stats::cpu(pid)? - before, calls };
    ensure!(done.items > 0, "nothing was served");
    Ok(done)
}
