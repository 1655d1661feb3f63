//! `run` and `validate`.

use std::path::PathBuf;
use std::process::ExitCode;

use runtime::console::Screen;
use runtime::flags::{Environment, boolean};
use runtime::hcl::{ConfigError, report};
use runtime::telemetry::chain;

use crate::config::{self, DEFAULT_PATH, Overrides};

/// Flags override the configuration file, which overrides the defaults.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// Path of the configuration file.
    #[arg(long = "config", value_name = "PATH", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// IP address or DNS name to listen on.
    #[arg(long = "bindAddress", value_name = "ADDRESS")]
    bind_address: Option<String>,
    /// Port to listen on.
    #[arg(long = "serverPort", value_name = "PORT", allow_negative_numbers = true)]
    server_port: Option<i64>,
    /// Directory for runtime data.
    #[arg(long = "dataDir", value_name = "PATH")]
    data_dir: Option<String>,
    /// Replace $NAME and ${NAME} in the configuration file by environment variables.
    #[arg(long = "expandEnv", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    expand_env: bool,
    /// File to write logs to.
    #[arg(long = "logFile", value_name = "PATH")]
    log_file: Option<String>,
    /// 'text' or 'json'.
    #[arg(long = "logFormat", value_name = "FORMAT")]
    log_format: Option<String>,
    /// 'debug', 'info', 'warn' or 'error'.
    #[arg(long = "logLevel", value_name = "LEVEL")]
    log_level: Option<String>,
    /// Name file and line of the source in log lines.
    #[arg(long = "logSourceLocation", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    log_source_location: bool,
    /// Path of the admin socket.
    #[arg(long = "socketPath", value_name = "PATH")]
    socket_path: Option<String>,
    /// The trust domain that this server belongs to.
    #[arg(long = "trustDomain", value_name = "NAME")]
    trust_domain: Option<String>,
}

impl Run {
    /// The configuration that these flags and the file make.
    pub(super) fn load(&self, environment: &Environment) -> Result<config::Config, ConfigError> {
        config::load(&self.overrides(), environment)
    }

    fn overrides(&self) -> Overrides {
        Overrides {
            config: Some(self.config.clone()),
            expand_env: self.expand_env,
            bind_address: self.bind_address.clone(),
            bind_port: self.server_port.filter(|port| *port != 0),
            data_dir: self.data_dir.clone(),
            log_file: self.log_file.clone(),
            log_format: self.log_format.clone(),
            log_level: self.log_level.clone(),
            log_source_location: self.log_source_location,
            socket_path: self.socket_path.clone(),
            trust_domain: self.trust_domain.clone(),
        }
    }
}

/// Runs the server until it is asked to stop.
pub(super) fn run(flags: &Run, environment: &Environment) -> ExitCode {
    let mut screen = Screen::new();
    let code = match config::load(&flags.overrides(), environment) {
        Err(error) => {
            screen.error_line(chain(&error));
            ExitCode::FAILURE
        }
        Ok(config) => match crate::app::run(config) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                screen.error_line(format!("Error: {}", chain(&error)));
                ExitCode::FAILURE
            }
        },
    };
    screen.flush();
    code
}

/// Checks the configuration and says everything that is wrong with it.
pub(super) fn validate(flags: &Run, environment: &Environment) -> ExitCode {
    let mut screen = Screen::new();
    let code = check(flags, environment, &mut screen);
    screen.flush();
    code
}

pub(super) fn check(flags: &Run, environment: &Environment, screen: &mut Screen) -> ExitCode {
    match config::load(&flags.overrides(), environment) {
        Ok(config) => {
            if !config.warnings.is_empty() {
                screen.error_line(report(&config.path, &config.warnings));
            }
            screen.line("SPIRE server configuration file is valid.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            screen.error_line(format!("SPIRE server configuration file is invalid:\n{}", chain(&error)));
            ExitCode::FAILURE
        }
    }
}
