//! Trust bundles: the keys that speak for a trust domain.
//!
//! SPIFFE_Trust_Domain_and_Bundle, section 4; X509-SVID, section 6; JWT-SVID, section 6.

use std::collections::{BTreeMap, HashMap};
use std::hash::BuildHasher;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;

use crate::id::TrustDomain;

/// One certificate authority of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct X509Authority {
    /// The certificate, DER.
    pub der: Bytes,
    /// Whether operators have distrusted it: still valid, but nothing signed by it should be used on.
    pub tainted: bool,
}

/// One key that signs JWT-SVIDs of a trust domain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JwtAuthority {
    /// The `kid` of the tokens it signs.
    pub key_id: Arc<str>,
    /// The public key as SubjectPublicKeyInfo, DER.
    pub public_key: Bytes,
    /// When it stops being valid; unknown for keys that came in a bundle document.
    pub expires_at: Option<SystemTime>,
    /// Whether operators have distrusted it.
    pub tainted: bool,
}

/// All authorities of one trust domain at one time.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bundle {
    /// Whose keys these are; an authority is never valid for another domain.
    pub trust_domain: TrustDomain,
    /// Certificate authorities, oldest first.
    pub x509: Vec<X509Authority>,
    /// Token signing keys, oldest first.
    pub jwt: Vec<JwtAuthority>,
    /// How often the publisher wants to be asked for a newer bundle.
    pub refresh_hint: Option<Duration>,
    /// Grows with every change of content; 0 when the publisher gave none.
    pub sequence: u64,
}

impl Bundle {
    /// A bundle without any key: every SVID of the domain is invalid.
    pub fn empty(trust_domain: TrustDomain) -> Self {
        Self { trust_domain, x509: Vec::new(), jwt: Vec::new(), refresh_hint: None, sequence: 0 }
    }

    /// Whether there is no authority at all.
    pub fn is_empty(&self) -> bool {
        self.x509.is_empty() && self.jwt.is_empty()
    }

    /// All CA certificates, DER, one after the other: the form of the Workload API.
    pub fn x509_der_concatenated(&self) -> Bytes {
        match self.x509.as_slice() {
            [one] => one.der.clone(),
            many => many.iter().flat_map(|authority| authority.der.iter().copied()).collect(),
        }
    }
}

/// Where verification finds the bundle of a peer's trust domain.
pub trait Bundles {
    /// The newest bundle of exactly this trust domain, if it is known.
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>>;
}

impl<S: BuildHasher> Bundles for HashMap<TrustDomain, Arc<Bundle>, S> {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.get(trust_domain).cloned()
    }
}

impl Bundles for BTreeMap<TrustDomain, Arc<Bundle>> {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.get(trust_domain).cloned()
    }
}

impl Bundles for Arc<Bundle> {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        (self.trust_domain == *trust_domain).then(|| Arc::clone(self))
    }
}

impl Bundles for Bundle {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        (self.trust_domain == *trust_domain).then(|| Arc::new(self.clone()))
    }
}
