//! What a process shows of itself: logs, metrics and health.

pub mod health;
pub mod http;
pub mod level;
pub mod limiter;
pub mod log;
pub mod metrics;
pub mod settings;

pub use health::Health;
pub use level::{Level, LogLevel};
pub use limiter::Limiter;

/// An error and its causes in one line, outermost first.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        // Some errors already quote their cause; saying it twice helps nobody.
        if !text.ends_with(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
