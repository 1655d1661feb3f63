//! What both halves of a node attestation share: payloads, challenges, and the pure checks.

pub mod join_token;
pub mod path_template;
pub mod x509pop;
