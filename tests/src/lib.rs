//! The test kit: servers and agents as real processes in folders of their own, seen only from outside.

pub mod crash;
pub mod soak;
pub mod testkit;
