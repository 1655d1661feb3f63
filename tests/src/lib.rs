//! The test kit: servers and agents as real processes in folders of their own, seen only from outside.

pub mod compatibility;
pub mod crash;
pub mod peers;
pub mod soak;
pub mod testkit;
