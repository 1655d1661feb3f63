//! `run` and `validate`.

use std::path::PathBuf;
use std::process::ExitCode;

use runtime::console::Screen;
use runtime::flags::{Environment, boolean};
use runtime::hcl::report;
use runtime::telemetry::chain;

use crate::config::{self, DEFAULT_PATH, Overrides};

/// Flags override the configuration file, which overrides the defaults.
#[derive(Debug, clap::Args)]
pub(super) struct Run {
    /// Path of the configuration file.
    #[arg(long = "config", value_name = "PATH", default_value = DEFAULT_PATH)]
    config: PathBuf,
    /// Give bundles to processes without identity too.
    #[arg(long = "allowUnauthenticatedVerifiers", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    allow_unauthenticated_verifiers: bool,
    /// Directory for runtime data.
    #[arg(long = "dataDir", value_name = "PATH")]
    data_dir: Option<String>,
    /// Accepted for the sake of scripts: Envoy's SDS is not served yet.
    #[arg(long = "disableSDSAPI", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    disable_sds_api: bool,
    /// Leave the Workload API out.
    #[arg(long = "disableWorkloadAPI", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    disable_workload_api: bool,
    /// Replace $NAME and ${NAME} in the configuration file by environment variables.
    #[arg(long = "expandEnv", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    expand_env: bool,
    /// Believe whoever answers at the server's address first to be the server.
    #[arg(long = "insecureBootstrap", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    insecure_bootstrap: bool,
    /// Join token of the server.
    #[arg(long = "joinToken", value_name = "TOKEN")]
    join_token: Option<String>,
    /// File of a join token; unlike a flag, it is not seen in the list of processes.
    #[arg(long = "joinTokenFile", value_name = "PATH")]
    join_token_file: Option<String>,
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
    /// How long the server has to be unknown before the bootstrap bundle is used again.
    #[arg(long = "rebootstrapDelay", value_name = "DURATION")]
    rebootstrap_delay: Option<String>,
    /// 'never', 'auto' or 'always'.
    #[arg(long = "rebootstrapMode", value_name = "MODE")]
    rebootstrap_mode: Option<String>,
    /// Address or name of the server.
    #[arg(long = "serverAddress", value_name = "ADDRESS")]
    server_address: Option<String>,
    /// Port of the server.
    #[arg(long = "serverPort", value_name = "PORT", allow_negative_numbers = true)]
    server_port: Option<i64>,
    /// Path of the Workload API's socket.
    #[arg(long = "socketPath", value_name = "PATH")]
    socket_path: Option<String>,
    /// File of the bundle by which the server is known at first.
    #[arg(long = "trustBundle", value_name = "PATH")]
    trust_bundle: Option<String>,
    /// Form of that bundle: 'pem' or 'spiffe'.
    #[arg(long = "trustBundleFormat", value_name = "FORMAT")]
    trust_bundle_format: Option<String>,
    /// URL of that bundle.
    #[arg(long = "trustBundleUrl", value_name = "URL")]
    trust_bundle_url: Option<String>,
    /// The trust domain that this agent belongs to.
    #[arg(long = "trustDomain", value_name = "NAME")]
    trust_domain: Option<String>,
}

impl Run {
    fn overrides(&self) -> Overrides {
        Overrides {
            config: Some(self.config.clone()),
            expand_env: self.expand_env,
            allow_unauthenticated_verifiers: self.allow_unauthenticated_verifiers,
            data_dir: self.data_dir.clone(),
            disable_sds_api: self.disable_sds_api,
            disable_workload_api: self.disable_workload_api,
            insecure_bootstrap: self.insecure_bootstrap,
            join_token: self.join_token.clone(),
            join_token_file: self.join_token_file.clone(),
            log_file: self.log_file.clone(),
            log_format: self.log_format.clone(),
            log_level: self.log_level.clone(),
            log_source_location: self.log_source_location,
            rebootstrap_delay: self.rebootstrap_delay.clone(),
            rebootstrap_mode: self.rebootstrap_mode.clone(),
            server_address: self.server_address.clone(),
            server_port: self.server_port.filter(|port| *port != 0),
            socket_path: self.socket_path.clone(),
            trust_bundle_path: self.trust_bundle.clone(),
            trust_bundle_format: self.trust_bundle_format.clone(),
            trust_bundle_url: self.trust_bundle_url.clone(),
            trust_domain: self.trust_domain.clone(),
        }
    }
}

/// Runs the agent until it is asked to stop.
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
            screen.line("SPIRE agent configuration file is valid.");
            ExitCode::SUCCESS
        }
        Err(error) => {
            screen.error_line(format!("SPIRE agent configuration file is invalid:\n{}", chain(&error)));
            ExitCode::FAILURE
        }
    }
}
