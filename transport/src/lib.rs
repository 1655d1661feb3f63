//! How SPIFFE parties talk, both ends: the accept loop, verification of peers, the rotating own certificate, the shim
//! that makes every gRPC library's `:authority` acceptable, and peers pinned to a process.

pub mod authority;
pub mod dial;
pub mod peer;
pub mod rotating;
pub mod serve;
pub mod socket;
pub mod verify;
