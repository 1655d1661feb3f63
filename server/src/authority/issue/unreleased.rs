//! What was signed, kept shut until it is on record.

use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use spiffe::id::SpiffeId;
use spiffe::x509::Serial;

/// Proof that what was signed is on record: the receipt of a commit, or of the audit.
pub trait Recorded {}

impl<T> Recorded for crate::history::committer::Receipt<T> {}

/// A credential that was signed and that nobody may have yet.
#[must_use = "what was signed and is not released is lost"]
#[derive(Debug)]
pub struct Unreleased<T>(T);

impl<T> Unreleased<T> {
    /// For what was just signed.
    pub(super) fn new(signed: T) -> Self {
        Self(signed)
    }

    /// Gives the credential out; `by` proves that it is on record.
    pub fn release(self, by: &dyn Recorded) -> T {
        let _ = by;
        self.0
    }
}

impl Unreleased<IssuedX509> {
    /// The serial number, to be recorded.
    pub fn serial(&self) -> Serial {
        self.0.serial
    }

    /// The end, to be recorded.
    pub fn not_after(&self) -> SystemTime {
        self.0.not_after
    }

    /// The identity, to be recorded.
    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }
}

impl Unreleased<IssuedJwt> {
    /// The end, to be recorded.
    pub fn expires_at(&self) -> SystemTime {
        self.0.expires_at
    }

    /// The identity, to be recorded.
    pub fn id(&self) -> &SpiffeId {
        &self.0.id
    }

    /// The key that signed, to be recorded.
    pub fn key_id(&self) -> &Arc<str> {
        &self.0.key_id
    }
}

/// A signed certificate.
#[derive(Clone, Debug)]
pub struct IssuedX509 {
    /// DER, leaf first, then the intermediates; never a root.
    pub chain: Vec<Bytes>,
    /// Whose it is.
    pub id: SpiffeId,
    /// The leaf's serial number.
    pub serial: Serial,
    /// First second in which it is valid.
    pub not_before: SystemTime,
    /// Last second in which it is valid.
    pub not_after: SystemTime,
}

/// A signed token.
#[derive(Clone)]
pub struct IssuedJwt {
    /// Compact serialization (RFC 7515, section 7.1).
    pub token: String,
    /// Whose it is.
    pub id: SpiffeId,
    /// When it was signed; whole seconds.
    pub issued_at: SystemTime,
    /// When it ends; whole seconds.
    pub expires_at: SystemTime,
    /// The `kid` of the key that signed it.
    pub key_id: Arc<str>,
}

impl std::fmt::Debug for IssuedJwt {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // A bearer token is a secret.
        f.debug_struct("IssuedJwt").field("id", &self.id).field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}
