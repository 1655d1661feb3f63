//! Waiting for something to become true, with a deadline that says what was waited for.

use std::time::Duration;

use anyhow::{Result, bail};

/// How often a predicate is asked. Short, since most of what tests wait for takes milliseconds.
const INTERVAL: Duration = Duration::from_millis(5);

/// Asks `predicate` until it answers with a value, for at most `deadline`.
///
/// # Errors
/// If the deadline passes; the error names `what` was waited for.
pub async fn until<T>(what: &str, deadline: Duration, mut predicate: impl AsyncFnMut() -> Option<T>) -> Result<T> {
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

/// A time in UTC, to the second, as people read it.
pub fn utc(time: std::time::SystemTime) -> String {
    let time = time::OffsetDateTime::from(time);
    let format = time::macros::format_description!("[year]-[month]-[day] [hour]:[minute]:[second] UTC");
    time.format(format).unwrap_or_default()
}
