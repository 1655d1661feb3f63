//! Waiting for something to become true, with a deadline that says what was waited for.

use std::future::Future;
use std::time::Duration;

use anyhow::{Result, bail};

/// How often a predicate is asked. Short, since most of what tests wait for takes milliseconds.
const INTERVAL: Duration = Duration::from_millis(5);

/// Asks `predicate` until it answers with a value, for at most `deadline`; the error names `what` was waited for.
pub async fn until<T, F, P>(what: &str, deadline: Duration, mut predicate: P) -> Result<T>
where
    P: FnMut() -> F,
    F: Future<Output = Option<T>>,
{
    let end = tokio::time::Instant::now() + deadline;
    loop {
        if let Some(value) = predicate().await {
            return Ok(value);
        }
        if tokio::time::Instant::now() >= end {
            bail!("waited {deadline:?} in vain for: {what}");
        }
        tokio::time::sleep(INTERVAL).await;
    }
}
