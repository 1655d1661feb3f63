//! The rules of registration: what an entry may be, who may have it, and when things end. Pure.

pub mod agent;
pub mod bundle;
