//! The gRPC services.
//!
//! Every service stands behind [`admission::Gate`]: [`permission`] says who may call what, [`caller`] who calls.
//! [`wire`] turns messages into values and back, [`status`] errors into statuses.

pub mod admission;
pub mod agent;
pub mod backup;
pub mod bundle;
pub mod caller;
pub mod core;
pub mod debug;
pub mod entry;
pub mod health;
pub mod logger;
pub mod meters;
pub mod page;
pub mod permission;
pub mod status;
pub mod stream;
pub mod svid;
pub mod sync;
mod twice;
pub mod wire;

use std::sync::Arc;

use spiffe_proto::agent::agent_server::AgentServer;
use spiffe_proto::backup::backup_server::BackupServer;
use spiffe_proto::bundle::bundle_server::BundleServer;
use spiffe_proto::debug::debug_server::DebugServer;
use spiffe_proto::entry::entry_server::EntryServer;
use spiffe_proto::health::health_server::HealthServer;
use spiffe_proto::logger::logger_server::LoggerServer;
use spiffe_proto::svid::svid_server::SvidServer;
use spiffe_proto::sync::sync_server::SyncServer;
use transport::serve::Routes;

use self::admission::Gate;
use self::agent::AgentService;
use self::backup::BackupService;
use self::bundle::BundleService;
use self::core::Core;
use self::debug::DebugService;
use self::entry::EntryService;
use self::health::HealthService;
use self::logger::LoggerService;
use self::svid::SvidService;
use self::sync::SyncService;

/// All services of a server.
#[derive(Clone)]
pub struct Services {
    /// What they share.
    pub core: Arc<Core>,
    /// Agents.
    pub agent: AgentService,
    /// Bundles.
    pub bundle: BundleService,
    /// Registration entries.
    pub entry: EntryService,
    /// SVIDs.
    pub svid: SvidService,
    /// Push to agents of ours.
    pub sync: SyncService,
    /// The whole state, for a backup; on the admin socket only.
    pub backup: BackupService,
    /// A look inside; on the admin socket only.
    pub debug: DebugService,
    /// The log level; on the admin socket only.
    pub logger: LoggerService,
    /// Health; on the admin socket only.
    pub health: HealthService,
}

impl Services {
    /// What is served on the network.
    pub fn network(&self) -> Routes {
        Routes::default()
            .expecting(permission::EXPECTED)
            .with(Gate::new(AgentServer::new(self.agent.clone()), &self.core))
            .with(Gate::new(BundleServer::new(self.bundle.clone()), &self.core))
            .with(Gate::new(EntryServer::new(self.entry.clone()), &self.core))
            .with(Gate::new(SvidServer::new(self.svid.clone()), &self.core))
            .with(Gate::new(SyncServer::new(self.sync.clone()), &self.core))
    }

    /// What is served on the admin socket.
    pub fn local(&self) -> Routes {
        self.network()
            .with(Gate::new(BackupServer::new(self.backup.clone()), &self.core))
            .with(Gate::new(DebugServer::new(self.debug.clone()), &self.core))
            .with(Gate::new(LoggerServer::new(self.logger.clone()), &self.core))
            .with(Gate::new(HealthServer::new(self.health.clone()), &self.core))
    }
}

#[cfg(test)]
mod tests;
