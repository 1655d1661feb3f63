//! The agent's configuration: what the file and the flags say ([`raw`]), and what is run ([`checked`]).
//!
//! The dialect, the keys and the defaults are SPIRE's, so that its configurations start unchanged. A mistake never ends
//! the reading: all of them are reported at once, with file, line, key and remedy.

pub mod checked;
mod plugins;
pub mod raw;

use std::path::PathBuf;

use runtime::flags::Environment;
use runtime::hcl::{ConfigError, Document, Mistakes};

pub use checked::Config;

/// Where the configuration is looked for without `-config`.
pub const DEFAULT_PATH: &str = "conf/agent/agent.conf";
/// Where the Workload API is without `socket_path`.
pub const DEFAULT_SOCKET_PATH: &str = "/tmp/spire-agent/public/api.sock";
/// Where commands look for the admin API without `-socketPath`.
pub const DEFAULT_ADMIN_SOCKET_PATH: &str = "/tmp/spire-agent/private/admin.sock";

/// What the command line says; it overrides the file, which overrides the defaults.
#[derive(Clone, Debug, Default)]
pub struct Overrides {
    /// `-config`
    pub config: Option<PathBuf>,
    /// `-expandEnv`
    pub expand_env: bool,
    /// `-allowUnauthenticatedVerifiers`
    pub allow_unauthenticated_verifiers: bool,
    /// `-dataDir`
    pub data_dir: Option<String>,
    /// `-disableSDSAPI`
    pub disable_sds_api: bool,
    /// `-disableWorkloadAPI`
    pub disable_workload_api: bool,
    /// `-insecureBootstrap`
    pub insecure_bootstrap: bool,
    /// `-joinToken`
    pub join_token: Option<String>,
    /// `-joinTokenFile`
    pub join_token_file: Option<String>,
    /// `-logFile`
    pub log_file: Option<String>,
    /// `-logFormat`
    pub log_format: Option<String>,
    /// `-logLevel`
    pub log_level: Option<String>,
    /// `-logSourceLocation`
    pub log_source_location: bool,
    /// `-rebootstrapDelay`
    pub rebootstrap_delay: Option<String>,
    /// `-rebootstrapMode`
    pub rebootstrap_mode: Option<String>,
    /// `-serverAddress`
    pub server_address: Option<String>,
    /// `-serverPort`
    pub server_port: Option<i64>,
    /// `-socketPath`
    pub socket_path: Option<String>,
    /// `-trustBundle`
    pub trust_bundle_path: Option<String>,
    /// `-trustBundleFormat`
    pub trust_bundle_format: Option<String>,
    /// `-trustBundleUrl`
    pub trust_bundle_url: Option<String>,
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
