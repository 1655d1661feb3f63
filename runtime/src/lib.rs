//! What a long-running process needs and what knows nothing of SPIFFE: time, randomness, tasks and their end,
//! back-off, logs, metrics and health, configuration text, command-line flags and private files.
//!
//! The bans in `clippy.toml` (wall clock, environment, unowned tasks) are lifted only here, once each.

pub mod backoff;
pub mod clock;
pub mod console;
pub mod duration;
pub mod entropy;
pub mod flags;
pub mod harden;
pub mod hcl;
pub mod keyfile;
pub mod pool;
pub mod reconcile;
pub mod shutdown;
pub mod steady;
pub mod telemetry;
