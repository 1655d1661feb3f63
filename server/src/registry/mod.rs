//! The rules of registration: what an entry may be, who may have it, and when things end. Pure.

pub mod agent;
pub mod authorized;
pub mod bundle;
pub mod dns;
pub mod entry;
pub mod expire;
pub mod list;
pub mod similar;
