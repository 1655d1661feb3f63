//! Whether the Workload API can answer: `grpc.health.v1`, for probes. It needs no security header.

use spiffe_proto::health::health_check_response::ServingStatus;
use spiffe_proto::health::health_server::{Health, HealthServer};
use spiffe_proto::health::{HealthCheckRequest, HealthCheckResponse, HealthListRequest, HealthListResponse};
use tokio_stream::Empty;
use tonic::{Request, Response, Status};

use super::message::UNATTESTED;
use super::status;
use crate::cache::Cache;

pub(super) struct Checks {
    cache: Cache,
    /// Without the Workload API there is nothing that could fail.
    always: bool,
}

pub(super) fn service(cache: Cache, always: bool) -> HealthServer<Checks> {
    HealthServer::new(Checks { cache, always }).max_decoding_message_size(UNATTESTED)
}

#[tonic::async_trait]
impl Health for Checks {
    /// SPIRE's agent calls its own Workload API here and counts a refusal as health. The same is known without a call:
    /// callers are answered from the first sync on.
    async fn check(&self, request: Request<HealthCheckRequest>) -> Result<Response<HealthCheckResponse>, Status> {
        if !request.into_inner().service.is_empty() {
            return Err(status::invalid("per-service health is not supported"));
        }
        let serving = self.always || self.cache.synced();
        let status = if serving { ServingStatus::Serving } else { ServingStatus::NotServing };
        Ok(Response::new(HealthCheckResponse { status: status.into() }))
    }

    async fn list(&self, _: Request<HealthListRequest>) -> Result<Response<HealthListResponse>, Status> {
        Err(Status::unimplemented("per-service health is not supported"))
    }

    type WatchStream = Empty<Result<HealthCheckResponse, Status>>;

    async fn watch(&self, _: Request<HealthCheckRequest>) -> Result<Response<Self::WatchStream>, Status> {
        Err(Status::unimplemented("health is told when asked for, and not watched"))
    }
}
