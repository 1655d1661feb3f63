//! The agent of a SPIFFE trust domain: attests its node to the server and local processes by what the kernel says of
//! them, and streams identities to those processes.

pub mod api;
pub mod app;
pub mod attest;
pub mod cache;
pub mod cli;
pub mod config;
pub mod identity;
pub mod keys;
pub mod server_link;
pub mod sync;
mod taint;
#[cfg(test)]
mod testing;
pub mod workload;
