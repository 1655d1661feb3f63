//! Real processes in temporary folders, started from the configuration files that users write, and plain clients of the wire.

pub mod client;
pub mod frames;
pub mod node;
pub mod process;
pub mod session;
pub mod wait;
pub mod wire;
pub mod workload;

pub use process::{Agent, AgentOptions, Binaries, Kind, Server, ServerOptions};
pub use wait::utc;
pub use wire::{Presented, Requested, secured, tls, unix};
