//! The protocols Signet speaks, and the code generated from them.
//!
//! The files below `proto/` have the packages, names and numbers of the SPIFFE standards, of SPIRE's API and
//! of the other protocols they stand for, so that everybody who speaks those can be spoken to. Each public
//! module here is one package; `bytes` fields are [`bytes::Bytes`].

pub mod authorized;
pub mod codec;
pub mod json;
mod secret;

/// The encoded `google.protobuf.FileDescriptorSet` of every protocol file and its imports.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

/// Declares the module of one protobuf package; `_` is the package without a name.
macro_rules! package {
    ($(#[$doc:meta])* $visibility:vis $module:ident = $package:literal) => {
        $(#[$doc])*
        #[allow(missing_docs, clippy::all, clippy::unwrap_used, rustdoc::all)]
        $visibility mod $module {
            include!(concat!(env!("OUT_DIR"), "/", $package, ".rs"));
        }
    };
}

package!(
    /// The SPIFFE Workload API (no package), served by agents to workloads.
    pub workload = "_"
);

// The generated code finds other packages by walking up their names, so packages that refer to one another
// need this tree; the aliases after it are what everybody else uses.
mod spire {
    pub mod api {
        package!(pub types = "spire.api.types");
        pub mod server {
            pub mod agent {
                package!(pub v1 = "spire.api.server.agent.v1");
            }
            pub mod bundle {
                package!(pub v1 = "spire.api.server.bundle.v1");
            }
            pub mod debug {
                package!(pub v1 = "spire.api.server.debug.v1");
            }
            pub mod entry {
                package!(pub v1 = "spire.api.server.entry.v1");
            }
            pub mod localauthority {
                package!(pub v1 = "spire.api.server.localauthority.v1");
            }
            pub mod logger {
                package!(pub v1 = "spire.api.server.logger.v1");
            }
            pub mod svid {
                package!(pub v1 = "spire.api.server.svid.v1");
            }
            pub mod trustdomain {
                package!(pub v1 = "spire.api.server.trustdomain.v1");
            }
        }
        pub mod agent {
            pub mod delegatedidentity {
                package!(pub v1 = "spire.api.agent.delegatedidentity.v1");
            }
            pub mod logger {
                package!(pub v1 = "spire.api.agent.logger.v1");
            }
        }
    }
    pub mod agent {
        pub mod debug {
            package!(pub v1 = "spire.agent.debug.v1");
        }
    }
}

mod envoy {
    pub mod config {
        pub mod core {
            package!(pub v3 = "envoy.config.core.v3");
        }
    }
    pub mod r#type {
        package!(pub v3 = "envoy.r#type.v3");
    }
    pub mod extensions {
        pub mod transport_sockets {
            pub mod tls {
                package!(pub v3 = "envoy.extensions.transport_sockets.tls.v3");
            }
        }
    }
    pub mod service {
        pub mod discovery {
            package!(pub v3 = "envoy.service.discovery.v3");
        }
        pub mod secret {
            package!(pub v3 = "envoy.service.secret.v3");
        }
    }
}

mod google {
    package!(pub rpc = "google.rpc");
}

mod signet {
    pub mod backup {
        package!(pub v1 = "signet.backup.v1");
    }
    pub mod sync {
        package!(pub v2 = "signet.sync.v2");
    }
}

package!(
    /// `spiffe.broker`: the SPIFFE Broker API (incubating).
    pub broker = "spiffe.broker"
);

package!(
    /// `grpc.health.v1`: the health protocol of gRPC servers.
    pub health = "grpc.health.v1"
);

/// `spire.api.types`: what the services of server and agent have in common.
pub use spire::api::types;

/// `spire.api.server.agent.v1`: attestation and administration of agents.
pub use spire::api::server::agent::v1 as agent;
/// `spire.api.server.bundle.v1`: the own bundle and the federated ones.
pub use spire::api::server::bundle::v1 as bundle;
/// `spire.api.server.debug.v1`: a look into a running server.
pub use spire::api::server::debug::v1 as debug;
/// `spire.api.server.entry.v1`: registration entries.
pub use spire::api::server::entry::v1 as entry;
/// `spire.api.server.localauthority.v1`: rotation by hand.
pub use spire::api::server::localauthority::v1 as localauthority;
/// `spire.api.server.logger.v1`: the server's log level.
pub use spire::api::server::logger::v1 as logger;
/// `spire.api.server.svid.v1`: issuing SVIDs.
pub use spire::api::server::svid::v1 as svid;
/// `spire.api.server.trustdomain.v1`: federation relationships.
pub use spire::api::server::trustdomain::v1 as trustdomain;

/// `spire.agent.debug.v1`: a look into a running agent.
pub use spire::agent::debug::v1 as agent_debug;
/// `spire.api.agent.delegatedidentity.v1`: SVIDs for other workloads.
pub use spire::api::agent::delegatedidentity::v1 as delegatedidentity;
/// `spire.api.agent.logger.v1`: the agent's log level.
pub use spire::api::agent::logger::v1 as agent_logger;

/// `google.rpc`: the status details that travel beside a gRPC error.
pub use google::rpc as rpc_status;

/// `signet.backup.v1`: the state of a running server, for a backup.
pub use signet::backup::v1 as backup;
/// `signet.sync.v2`: push between our server and our agent.
pub use signet::sync::v2 as sync;

/// `envoy.config.core.v3`: what the secret discovery service needs of it.
pub use envoy::config::core::v3 as envoy_core;
/// `envoy.extensions.transport_sockets.tls.v3`: what the secret discovery service needs of it.
pub use envoy::extensions::transport_sockets::tls::v3 as envoy_tls;
/// `envoy.service.discovery.v3`: what the secret discovery service needs of it.
pub use envoy::service::discovery::v3 as envoy_discovery;
/// `envoy.service.secret.v3`: Envoy's secret discovery service.
pub use envoy::service::secret::v3 as sds;
/// `envoy.type.v3`: what the secret discovery service needs of it.
pub use envoy::r#type::v3 as envoy_type;

#[cfg(test)]
mod tests;
