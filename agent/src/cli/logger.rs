//! `logger get`, `logger set`, `logger reset`.

use runtime::console::{Output, Screen};
use runtime::telemetry::Level;
use spiffe_proto::agent_logger::logger_client::LoggerClient;
use spiffe_proto::agent_logger::{GetLoggerRequest, ResetLogLevelRequest, SetLogLevelRequest};
use spiffe_proto::types::{self, LogLevel};

use super::client::{Admin, Connection, json};
use super::error::{CliError, step};

/// See and change the log level of a running agent.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Logger {
    /// Show the level in force and the one at the start.
    Get {
        #[command(flatten)]
        common: Admin,
    },
    /// Change the level.
    Set {
        #[command(flatten)]
        common: Admin,
        /// One of panic, fatal, error, warn, info, debug, trace.
        #[arg(long = "level", value_name = "LEVEL", default_value = "", hide_default_value = true)]
        level: String,
    },
    /// Go back to the level at the start.
    Reset {
        #[command(flatten)]
        common: Admin,
    },
}

impl Logger {
    pub(super) fn common(&self) -> &Admin {
        match self {
            Self::Get { common } | Self::Set { common, .. } | Self::Reset { common } => common,
        }
    }
}

pub(super) async fn run(command: &Logger, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let answer = match command {
        Logger::Get { .. } => {
            let mut client = LoggerClient::new(connection.open().await?);
            client.get_logger(GetLoggerRequest {}).await.map_err(step("error fetching logger"))?
        }
        Logger::Set { level, .. } => {
            if level.is_empty() {
                return Err(CliError::Flags("a value (-level) must be set"));
            }
            let new_level = wire_level(level)?.into();
            let mut client = LoggerClient::new(connection.open().await?);
            client.set_log_level(SetLogLevelRequest { new_level }).await.map_err(step("failed to set log level"))?
        }
        Logger::Reset { .. } => {
            let mut client = LoggerClient::new(connection.open().await?);
            client.reset_log_level(ResetLogLevelRequest {}).await.map_err(step("failed to reset logger"))?
        }
    };
    let logger = answer.into_inner();
    match command.common().output {
        Output::Json => json(screen, "spire.api.types.Logger", &logger),
        Output::Pretty => {
            pretty(&logger, screen);
            Ok(())
        }
    }
}

fn wire_level(text: &str) -> Result<LogLevel, CliError> {
    let level: Level =
        text.parse().map_err(|_| CliError::Value { what: "the log level is not valid:", value: text.to_owned() })?;
    Ok(match level {
        Level::Panic => LogLevel::Panic,
        Level::Fatal => LogLevel::Fatal,
        Level::Error => LogLevel::Error,
        Level::Warn => LogLevel::Warn,
        Level::Info => LogLevel::Info,
        Level::Debug => LogLevel::Debug,
        Level::Trace => LogLevel::Trace,
    })
}

fn pretty(logger: &types::Logger, screen: &mut Screen) {
    let name = |level: LogLevel| match level {
        LogLevel::Unspecified => "unspecified",
        LogLevel::Panic => Level::Panic.name(),
        LogLevel::Fatal => Level::Fatal.name(),
        LogLevel::Error => Level::Error.name(),
        LogLevel::Warn => Level::Warn.name(),
        LogLevel::Info => Level::Info.name(),
        LogLevel::Debug => Level::Debug.name(),
        LogLevel::Trace => Level::Trace.name(),
    };
    screen.line(format!("Logger Level : {}", name(logger.current_level())));
    screen.line(format!("Launch Level : {}\n", name(logger.launch_level())));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn golden_output() {
        let logger = types::Logger { current_level: LogLevel::Warn.into(), launch_level: LogLevel::Debug.into() };
        let mut screen = Screen::new();
        pretty(&logger, &mut screen);
        assert_eq!(screen.out, "Logger Level : warning\nLaunch Level : debug\n\n");
        let mut screen = Screen::new();
        json(&mut screen, "spire.api.types.Logger", &logger).unwrap();
        assert_eq!(screen.out, "{\"current_level\":\"WARN\",\"launch_level\":\"DEBUG\"}\n");
    }

    #[test]
    fn levels_are_read_in_any_case() {
        assert_eq!(wire_level("WARNING").unwrap(), LogLevel::Warn);
        assert!(matches!(wire_level("loud"), Err(CliError::Value { .. })));
    }
}
