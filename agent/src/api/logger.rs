//! How much the agent logs, on its operators' socket: `spire.api.agent.logger.v1`.

use runtime::telemetry::{Level, LogLevel as Handle};
use spiffe_proto::agent_logger::logger_server::{Logger, LoggerServer};
use spiffe_proto::agent_logger::{GetLoggerRequest, ResetLogLevelRequest, SetLogLevelRequest};
use spiffe_proto::types::{self, LogLevel};
use tonic::{Request, Response, Status};

use super::status;

pub(super) struct Levels {
    level: Handle,
}

pub(super) fn service(level: Handle) -> LoggerServer<Levels> {
    LoggerServer::new(Levels { level })
}

impl Levels {
    fn both(&self) -> Response<types::Logger> {
        Response::new(types::Logger {
            current_level: to_wire(self.level.current()).into(),
            launch_level: to_wire(self.level.launch()).into(),
        })
    }
}

fn to_wire(level: Level) -> LogLevel {
    match level {
        Level::Panic => LogLevel::Panic,
        Level::Fatal => LogLevel::Fatal,
        Level::Error => LogLevel::Error,
        Level::Warn => LogLevel::Warn,
        Level::Info => LogLevel::Info,
        Level::Debug => LogLevel::Debug,
        Level::Trace => LogLevel::Trace,
    }
}

fn from_wire(level: LogLevel) -> Option<Level> {
    Some(match level {
        LogLevel::Unspecified => return None,
        LogLevel::Panic => Level::Panic,
        LogLevel::Fatal => Level::Fatal,
        LogLevel::Error => Level::Error,
        LogLevel::Warn => Level::Warn,
        LogLevel::Info => Level::Info,
        LogLevel::Debug => Level::Debug,
        LogLevel::Trace => Level::Trace,
    })
}

#[tonic::async_trait]
impl Logger for Levels {
    async fn get_logger(&self, _: Request<GetLoggerRequest>) -> Result<Response<types::Logger>, Status> {
        Ok(self.both())
    }

    async fn set_log_level(&self, request: Request<SetLogLevelRequest>) -> Result<Response<types::Logger>, Status> {
        let wanted = request.into_inner().new_level;
        let level = LogLevel::try_from(wanted).ok().and_then(from_wire);
        self.level.set(level.ok_or_else(|| status::invalid("newLevel value cannot be LogLevel_UNSPECIFIED"))?);
        tracing::info!(level = self.level.current().name(), "The log level was changed");
        Ok(self.both())
    }

    async fn reset_log_level(&self, _: Request<ResetLogLevelRequest>) -> Result<Response<types::Logger>, Status> {
        self.level.reset();
        tracing::info!(level = self.level.current().name(), "The log level was reset");
        Ok(self.both())
    }
}
