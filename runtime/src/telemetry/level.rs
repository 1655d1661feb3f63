//! Log levels by the names that operators know, and the one that is in force.

use std::str::FromStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use tracing::Metadata;
use tracing::level_filters::LevelFilter;

/// How much is logged, from least to most. `Panic` and `Fatal` exist for the sake of configurations; nothing is logged
/// at them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    /// Nothing.
    Panic,
    /// Nothing.
    Fatal,
    /// What failed and needs somebody.
    Error,
    /// What may need somebody.
    Warn,
    /// What happened.
    Info,
    /// How it happened.
    Debug,
    /// Every step.
    Trace,
}

/// A text that names no level.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is no log level (panic, fatal, error, warn, info, debug, trace)")]
pub struct UnknownLevel {
    /// The text.
    pub text: String,
}

impl FromStr for Level {
    type Err = UnknownLevel;

    /// Reads a level without regard to case; `warning` is `warn`.
    fn from_str(text: &str) -> Result<Self, UnknownLevel> {
        match text.to_ascii_lowercase().as_str() {
            "panic" => Ok(Self::Panic),
            "fatal" => Ok(Self::Fatal),
            "error" => Ok(Self::Error),
            "warn" | "warning" => Ok(Self::Warn),
            "info" => Ok(Self::Info),
            "debug" => Ok(Self::Debug),
            "trace" => Ok(Self::Trace),
            _ => Err(UnknownLevel { text: text.to_owned() }),
        }
    }
}

impl Level {
    const ALL: [Self; 7] = [Self::Panic, Self::Fatal, Self::Error, Self::Warn, Self::Info, Self::Debug, Self::Trace];

    /// The name, as logs show it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Panic => "panic",
            Self::Fatal => "fatal",
            Self::Error => "error",
            Self::Warn => "warning",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }

    fn filter(self) -> LevelFilter {
        match self {
            Self::Panic | Self::Fatal => LevelFilter::OFF,
            Self::Error => LevelFilter::ERROR,
            Self::Warn => LevelFilter::WARN,
            Self::Info => LevelFilter::INFO,
            Self::Debug => LevelFilter::DEBUG,
            Self::Trace => LevelFilter::TRACE,
        }
    }
}

/// The level in force, which can be changed while the process runs. Cheap to clone; clones change together.
#[derive(Clone, Debug)]
pub struct LogLevel {
    launch: Level,
    current: Arc<AtomicU8>,
}

impl LogLevel {
    /// A level as the configuration says.
    pub fn new(launch: Level) -> Self {
        Self { launch, current: Arc::new(AtomicU8::new(launch as u8)) }
    }

    /// The level in force.
    pub fn current(&self) -> Level {
        Level::ALL.get(usize::from(self.current.load(Ordering::Relaxed))).copied().unwrap_or(self.launch)
    }

    /// The level with which the process started.
    pub fn launch(&self) -> Level {
        self.launch
    }

    /// Changes the level.
    pub fn set(&self, level: Level) {
        self.current.store(level as u8, Ordering::Relaxed);
        tracing::callsite::rebuild_interest_cache();
    }

    /// Goes back to the level with which the process started.
    pub fn reset(&self) {
        self.set(self.launch);
    }

    pub(super) fn filter(&self) -> LevelFilter {
        self.current().filter()
    }

    /// Other people's crates may warn but not chat: at debug, an HTTP/2 stack logs every frame.
    pub(super) fn allows(&self, metadata: &Metadata<'_>) -> bool {
        const OURS: [&str; 6] = ["signet", "runtime", "transport", "spiffe", "e2e", "audit"];
        let ours = OURS.iter().any(|name| metadata.target().starts_with(name));
        let filter = if ours { self.filter() } else { self.filter().min(LevelFilter::WARN) };
        *metadata.level() <= filter
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_in_any_case() {
        for (text, level) in
            [("WARN", Level::Warn), ("warning", Level::Warn), ("Info", Level::Info), ("PANIC", Level::Panic)]
        {
            assert_eq!(text.parse(), Ok(level));
        }
        assert_eq!("loud".parse::<Level>(), Err(UnknownLevel { text: "loud".into() }));
    }

    #[test]
    fn set_and_reset() {
        let level = LogLevel::new(Level::Info);
        level.clone().set(Level::Trace);
        assert_eq!((level.current(), level.launch()), (Level::Trace, Level::Info));
        level.reset();
        assert_eq!(level.current(), Level::Info);
    }
}
