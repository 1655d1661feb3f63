//! The server of a trust domain: its certificate and token authority, and the attestation authority of its nodes.

pub mod api;
pub mod app;
pub mod attest;
pub mod audit;
pub mod authority;
pub mod backup;
pub mod cli;
pub mod config;
pub mod feed;
pub mod history;
pub mod limits;
pub mod registry;
pub mod restore;
pub mod state;
