//! A bundle whose authorities are records of their own, kept in the order in which they were added.

use std::sync::Arc;
use std::time::Duration;

use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::TrustDomain;

use super::model::certificate_hash;

/// A bundle and the ordinals that keep its authorities in order over a restart.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct HeldBundle {
    ordinal: u64,
    bundle: Arc<Bundle>,
    // Parallel to the authorities of the bundle, ascending.
    x509_ordinals: Vec<u64>,
    jwt_ordinals: Vec<u64>,
}

impl HeldBundle {
    pub(super) fn empty(trust_domain: TrustDomain, ordinal: u64) -> Self {
        let bundle = Arc::new(Bundle::empty(trust_domain));
        Self { ordinal, bundle, x509_ordinals: Vec::new(), jwt_ordinals: Vec::new() }
    }

    pub(super) fn bundle(&self) -> &Arc<Bundle> {
        &self.bundle
    }

    pub(super) fn ordinal(&self) -> u64 {
        self.ordinal
    }

    pub(super) fn set_ordinal(&mut self, ordinal: u64) {
        self.ordinal = ordinal;
    }

    pub(crate) fn set_info(&mut self, sequence: u64, refresh_hint: Option<Duration>) {
        let bundle = Arc::make_mut(&mut self.bundle);
        bundle.sequence = sequence;
        bundle.refresh_hint = refresh_hint;
    }

    /// The ordinal of the authority with this certificate.
    pub(super) fn x509_ordinal(&self, der: &[u8]) -> Option<u64> {
        let place = self.bundle.x509.iter().position(|held| *held.der == *der)?;
        self.x509_ordinals.get(place).copied()
    }

    /// The ordinal of the authority with this key id.
    pub(super) fn jwt_ordinal(&self, key_id: &str) -> Option<u64> {
        let place = self.bundle.jwt.iter().position(|held| *held.key_id == *key_id)?;
        self.jwt_ordinals.get(place).copied()
    }

    pub(crate) fn put_x509(&mut self, ordinal: u64, authority: X509Authority) {
        let bundle = Arc::make_mut(&mut self.bundle);
        put(&mut bundle.x509, &mut self.x509_ordinals, ordinal, authority);
    }

    pub(crate) fn put_jwt(&mut self, ordinal: u64, authority: JwtAuthority) {
        let bundle = Arc::make_mut(&mut self.bundle);
        put(&mut bundle.jwt, &mut self.jwt_ordinals, ordinal, authority);
    }

    pub(super) fn remove_x509(&mut self, sha256: &[u8; 32]) {
        let bundle = Arc::make_mut(&mut self.bundle);
        remove(&mut bundle.x509, &mut self.x509_ordinals, |held| certificate_hash(&held.der) == *sha256);
    }

    pub(super) fn remove_jwt(&mut self, key_id: &str) {
        let bundle = Arc::make_mut(&mut self.bundle);
        remove(&mut bundle.jwt, &mut self.jwt_ordinals, |held| *held.key_id == *key_id);
    }
}

/// Both vectors stay ascending by ordinal, also when records are read back in another order.
fn put<A>(authorities: &mut Vec<A>, ordinals: &mut Vec<u64>, ordinal: u64, authority: A) {
    match ordinals.binary_search(&ordinal) {
        Ok(place) => {
            if let Some(held) = authorities.get_mut(place) {
                *held = authority;
            }
        }
        Err(place) => {
            authorities.insert(place, authority);
            ordinals.insert(place, ordinal);
        }
    }
}

fn remove<A>(authorities: &mut Vec<A>, ordinals: &mut Vec<u64>, which: impl Fn(&A) -> bool) {
    if let Some(place) = authorities.iter().position(which) {
        authorities.remove(place);
        ordinals.remove(place);
    }
}
