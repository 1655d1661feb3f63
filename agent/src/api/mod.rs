//! What this agent serves on its sockets: the Workload API with health and reflection to every process of the node,
//! a look inside and the log level to operators.

mod debug;
mod health;
mod logger;
pub mod message;
mod reflection;
mod status;
mod streams;
mod workload;

use std::collections::BTreeSet;
use std::sync::Arc;

use runtime::clock::Clock;
use runtime::telemetry::{Limiter, LogLevel};
use transport::serve::Routes;

use crate::cache::Cache;
use crate::workload::Attestors;

pub use debug::OwnChain;

/// What operators decide about the Workload API.
#[derive(Debug, Clone, Default)]
pub struct Settings {
    /// Processes without any identity get the bundle of the own trust domain.
    pub allow_unauthenticated_verifiers: bool,
    /// Claims of foreign tokens that are shown, beside `sub`, `aud` and `exp`.
    pub allowed_foreign_jwt_claims: BTreeSet<String>,
    /// Whether the Workload API is left out of its own socket.
    pub disable_workload_api: bool,
}

/// The services of the socket that every process may open. What its callers cause in the log, `log` limits.
pub fn workload_routes(
    cache: &Cache,
    attestors: Arc<Attestors>,
    settings: Settings,
    clock: Clock,
    log: Limiter,
) -> Routes {
    let mut routes = Routes::default().with(health::service(cache.clone(), settings.disable_workload_api));
    let mut names = vec!["grpc.health.v1.Health"];
    if !settings.disable_workload_api {
        names.insert(0, workload::SERVICE);
        routes = routes.with(workload::WorkloadApi::new(cache.clone(), attestors, settings, clock, log));
    }
    reflection::add(routes, &names)
}

/// The services of the operators' socket.
pub fn admin_routes(cache: Cache, own: Arc<dyn OwnChain>, level: LogLevel, clock: Clock) -> Routes {
    Routes::default().with(debug::service(cache, own, clock)).with(logger::service(level))
}

#[cfg(test)]
mod tests;
