//! The server of a trust domain: its certificate and token authority, and the attestation authority of its nodes.

pub mod attest;
pub mod authority;
pub mod config;
pub mod history;
pub mod registry;
pub mod state;
