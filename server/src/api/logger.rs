//! `spire.api.server.logger.v1.Logger`: the log level of a running server.

use std::sync::Arc;

use runtime::telemetry::level::{Level, LogLevel};
use spiffe_proto::logger as proto;
use spiffe_proto::types;
use tonic::{Request, Response, Status};

use super::admission::Admission;
use super::core::Core;
use super::status::Failure;
use crate::audit::{Fields, Outcome};

/// The service. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct LoggerService {
    core: Arc<Core>,
    level: LogLevel,
}

impl LoggerService {
    /// A service that shows and changes `level`.
    pub fn new(core: Arc<Core>, level: LogLevel) -> Self {
        Self { core, level }
    }

    fn told(&self, admission: &Admission) -> Response<types::Logger> {
        self.core.audit.record(admission, Outcome::Success, || Fields {
            detail: Some(self.level.current().name().to_owned()),
            ..Fields::default()
        });
        Response::new(types::Logger {
            current_level: wire_level(self.level.current()) as i32,
            launch_level: wire_level(self.level.launch()) as i32,
        })
    }
}

/// A level as the API names it.
fn wire_level(level: Level) -> types::LogLevel {
    match level {
        Level::Panic => types::LogLevel::Panic,
        Level::Fatal => types::LogLevel::Fatal,
        Level::Error => types::LogLevel::Error,
        Level::Warn => types::LogLevel::Warn,
        Level::Info => types::LogLevel::Info,
        Level::Debug => types::LogLevel::Debug,
        Level::Trace => types::LogLevel::Trace,
    }
}

/// The level that a request names.
fn level(number: i32) -> Result<Level, Failure> {
    match types::LogLevel::try_from(number) {
        Ok(types::LogLevel::Unspecified) => Err(Failure::invalid("newLevel value cannot be LogLevel_UNSPECIFIED")),
        Ok(types::LogLevel::Panic) => Ok(Level::Panic),
        Ok(types::LogLevel::Fatal) => Ok(Level::Fatal),
        Ok(types::LogLevel::Error) => Ok(Level::Error),
        Ok(types::LogLevel::Warn) => Ok(Level::Warn),
        Ok(types::LogLevel::Info) => Ok(Level::Info),
        Ok(types::LogLevel::Debug) => Ok(Level::Debug),
        Ok(types::LogLevel::Trace) => Ok(Level::Trace),
        Err(_) => Err(Failure::invalid("unsupported log level")),
    }
}

#[tonic::async_trait]
impl proto::logger_server::Logger for LoggerService {
    async fn get_logger(
        &self,
        mut request: Request<proto::GetLoggerRequest>,
    ) -> Result<Response<types::Logger>, Status> {
        let admission = Admission::take(&mut request)?;
        Ok(self.told(&admission))
    }

    async fn set_log_level(
        &self,
        mut request: Request<proto::SetLogLevelRequest>,
    ) -> Result<Response<types::Logger>, Status> {
        let admission = Admission::take(&mut request)?;
        let level = level(request.into_inner().new_level)?;
        tracing::info!(new_log_level = level.name(), "SetLogLevel Called");
        self.level.set(level);
        Ok(self.told(&admission))
    }

    async fn reset_log_level(
        &self,
        mut request: Request<proto::ResetLogLevelRequest>,
    ) -> Result<Response<types::Logger>, Status> {
        let admission = Admission::take(&mut request)?;
        tracing::info!(launch_log_level = self.level.launch().name(), "ResetLogLevel Called");
        self.level.reset();
        Ok(self.told(&admission))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_go_to_the_wire_and_back_and_the_unset_one_is_refused() {
        for number in 1..=7 {
            assert_eq!(wire_level(level(number).unwrap()) as i32, number);
        }
        assert_eq!(level(0).unwrap_err().text(), "newLevel value cannot be LogLevel_UNSPECIFIED");
        assert_eq!(level(8).unwrap_err().text(), "unsupported log level");
    }
}
