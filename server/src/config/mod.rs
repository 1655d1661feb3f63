//! The server's configuration: what the file and the flags say ([`raw`]), and what is run ([`checked`]).
//!
//! The dialect, the keys and the defaults are SPIRE's, so that its configurations start unchanged. A mistake never ends
//! the reading: all of them are reported at once, with file, line, key and remedy.

pub mod checked;
mod plugins;
pub mod raw;
mod sqlite;

use std::path::PathBuf;

use runtime::flags::Environment;
use runtime::hcl::{ConfigError, Document, Mistakes};

pub use checked::Config;

/// Where the configuration is looked for without `-config`.
pub const DEFAULT_PATH: &str = "conf/server/server.conf";
/// Where the admin socket is without `socket_path`.
pub const DEFAULT_SOCKET_PATH: &str = "/tmp/spire-server/private/api.sock";

/// What the command line says; it overrides the file, which overrides the defaults.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `-config`
    pub config: Option<PathBuf>,
    /// `-expandEnv`
    pub expand_env: bool,
    /// `-bindAddress`
    pub bind_address: Option<String>,
    /// `-serverPort`
    pub bind_port: Option<i64>,
    /// `-dataDir`
    pub data_dir: Option<String>,
    /// `-logFile`
    pub log_file: Option<String>,
    /// `-logFormat`
    pub log_format: Option<String>,
    /// `-logLevel`
    pub log_level: Option<String>,
    /// `-logSourceLocation`
    pub log_source_location: bool,
    /// `-socketPath`
    pub socket_path: Option<String>,
    /// `-trustDomain`
    pub trust_domain: Option<String>,
}

/// Reads and checks the configuration.
///
/// # Errors
///
/// [`ConfigError`]; [`ConfigError::Mistakes`] has everything that is wrong.
pub fn load(overrides: &Overrides, environment: &Environment) -> Result<Config, ConfigError> {
    let path = overrides.config.clone().unwrap_or_else(|| PathBuf::from(DEFAULT_PATH));
    let document = Document::load(&path, overrides.expand_env.then_some(environment))?;
    let mistakes = Mistakes::new();
    let raw = raw::Raw::read(&document, &mistakes);
    let config = checked::check(raw, overrides, &mistakes);
    let (refused, warnings) = mistakes.take();
    match config {
        Some(mut config) if refused.is_empty() => {
            config.warnings = warnings;
            config.path = path;
            Ok(config)
        }
        _ => Err(ConfigError::Mistakes { path, mistakes: refused }),
    }
}

#[cfg(test)]
mod tests;
