//! `grpc.health.v1.Health`: whether this server can do its work, for probes on the admin socket.

use std::sync::Arc;

use runtime::steady::TOLD;
use spiffe_proto::health as proto;
use spiffe_proto::health::health_check_response::ServingStatus;
use tonic::{Request, Response, Status};

use super::admission::Admission;
use super::core::Core;
use super::status::{Class, Failure};
use super::stream::Answers;

/// The service. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct HealthService {
    core: Arc<Core>,
}

impl HealthService {
    /// A service over `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

#[tonic::async_trait]
impl proto::health_server::Health for HealthService {
    type WatchStream = Answers<proto::HealthCheckResponse>;

    async fn check(
        &self,
        mut request: Request<proto::HealthCheckRequest>,
    ) -> Result<Response<proto::HealthCheckResponse>, Status> {
        let _admission = Admission::take(&mut request)?;
        if !request.into_inner().service.is_empty() {
            return Err(Failure::invalid("per-service health is not supported").into());
        }
        let reason = match self.core.replica.current().await {
            Err(error) => Some(runtime::telemetry::chain(&error)),
            Ok(state) if state.bundle(&self.core.trust_domain).is_none() => Some("bundle is missing".to_owned()),
            Ok(_) => None,
        };
        let status = match reason {
            None => ServingStatus::Serving,
            Some(reason) => {
                tracing::warn!(reason, "Health check failed");
                ServingStatus::NotServing
            }
        };
        let mut response = Response::new(proto::HealthCheckResponse { status: status as i32 });
        if let Ok(told) = self.core.steady.told().parse() {
            response.metadata_mut().insert(TOLD, told);
        }
        Ok(response)
    }

    async fn list(
        &self,
        _request: Request<proto::HealthListRequest>,
    ) -> Result<Response<proto::HealthListResponse>, Status> {
        Err(Failure::new(Class::Unserved, "unimplemented").into())
    }

    async fn watch(&self, _request: Request<proto::HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Failure::new(Class::Unserved, "unimplemented").into())
    }
}
