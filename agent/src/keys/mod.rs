//! Keys of the agent: those of its own SVID, which a store keeps, and those of workloads, which live in memory only.

mod disk;
mod memory;

use std::sync::Arc;

use bytes::Bytes;
use rcgen::{CertificateParams, DistinguishedName, DnType, DnValue, KeyPair, SanType};
use spiffe::id::SpiffeId;
use spiffe::x509::{KeyType, PrivateKey};

pub use self::disk::DiskKeys;
pub use self::memory::MemoryKeys;

/// Why a key could not be made, kept or found.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// The provider made no key.
    #[error("could not make a key")]
    Generate(#[source] spiffe::x509::KeyError),
    /// No certificate request could be made.
    #[error("could not make a certificate request")]
    Request(#[source] rcgen::Error),
    /// The key file cannot be read or written.
    #[error("could not use the key file")]
    File(#[source] runtime::keyfile::KeyFileError),
    /// The directory of the key file cannot be made.
    #[error("could not make the directory {}", directory.display())]
    Directory {
        /// The directory.
        directory: std::path::PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The key file does not hold what it should.
    #[error("the key file is malformed")]
    Format(#[source] serde_json::Error),
    /// A key in the key file cannot be used.
    #[error("the key file holds a key that cannot be used")]
    Key(#[source] spiffe::x509::KeyError),
    /// The work was cut off by the end of the process.
    #[error("the key was not finished")]
    Interrupted,
}

/// The two places for the key of the agent's own SVID. A new key goes into the place the current one does not have, so
/// that the current SVID stays usable until its successor is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// `agent-svid-A`.
    A,
    /// `agent-svid-B`.
    B,
}

impl Place {
    /// The name of the key that has this place; the names are SPIRE's, so that its files can be taken over.
    pub fn key_id(self) -> &'static str {
        match self {
            Self::A => "agent-svid-A",
            Self::B => "agent-svid-B",
        }
    }

    /// The place that is not this one.
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }
}

/// Keeps the keys of the agent's own SVID. Calls may block on a disk.
pub trait AgentKeys: Send + Sync {
    /// The key with this public half (SubjectPublicKeyInfo, DER), if it is kept.
    fn find(&self, spki_der: &[u8]) -> Option<Arc<PrivateKey>>;

    /// Makes an EC P-256 key and keeps it, in memory for now, in the place that the key with the public half `current` does
    /// not have.
    fn create(&self, current: Option<&[u8]>) -> Result<Arc<PrivateKey>, KeyError>;

    /// Writes what is in memory only. When this returns, the keys outlive the process as far as the store can promise
    /// that.
    ///
    /// # Errors
    /// If they could not be written; they are usable all the same.
    fn save(&self) -> Result<(), KeyError>;
}

/// Which place a new key gets.
fn place_beside(current: Option<Place>) -> Place {
    current.map_or(Place::A, Place::other)
}

/// A PKCS#10 request (DER) for `key`, with the subject that SPIRE's agents use and, for a workload, its identity.
///
/// Servers decide identity, names and lifetime from their own records; the request matters for its key only.
pub fn certificate_request(key: &PrivateKey, id: Option<&SpiffeId>) -> Result<Bytes, KeyError> {
    let pair = KeyPair::try_from(key.expose_pkcs8()).map_err(KeyError::Request)?;
    let mut name = DistinguishedName::new();
    for (kind, text) in [(DnType::CountryName, "US"), (DnType::OrganizationName, "SPIRE")] {
        name.push(kind, DnValue::PrintableString(text.try_into().map_err(KeyError::Request)?));
    }
    let mut params = CertificateParams::default();
    params.distinguished_name = name;
    if let Some(id) = id {
        params.subject_alt_names.push(SanType::URI(id.as_str().try_into().map_err(KeyError::Request)?));
    }
    let request = params.serialize_request(&pair).map_err(KeyError::Request)?;
    Ok(Bytes::copy_from_slice(request.der()))
}

/// A new key and the request for its certificate.
pub fn new_workload_key(kind: KeyType, id: &SpiffeId) -> Result<(PrivateKey, Bytes), KeyError> {
    let key = PrivateKey::generate(kind).map_err(KeyError::Generate)?;
    let request = certificate_request(&key, Some(id))?;
    Ok((key, request))
}

#[cfg(test)]
mod tests {
    use spiffe::x509::Csr;

    use super::*;

    /// What every store promises.
    fn store_keeps_two_keys_in_turn(keys: &dyn AgentKeys) {
        let first = keys.create(None).unwrap();
        let first_spki = first.public_key().spki_der().clone();
        let second = keys.create(Some(&first_spki)).unwrap();
        let second_spki = second.public_key().spki_der().clone();
        assert_ne!(first_spki, second_spki);
        assert!(keys.find(&first_spki).is_some() && keys.find(&second_spki).is_some());
        // A renewal that was not finished is replaced; what is in use is not.
        let third = keys.create(Some(&first_spki)).unwrap();
        assert!(keys.find(&first_spki).is_some());
        assert!(keys.find(&second_spki).is_none());
        assert!(keys.find(third.public_key().spki_der()).is_some());
        assert_eq!(third.expose_pkcs8(), keys.find(third.public_key().spki_der()).unwrap().expose_pkcs8());
    }

    #[test]
    fn memory_keeps_the_promises() {
        store_keeps_two_keys_in_turn(&MemoryKeys::default());
    }

    #[test]
    fn disk_keeps_the_promises() {
        let dir = tempfile::tempdir().unwrap();
        store_keeps_two_keys_in_turn(&DiskKeys::open(dir.path()).unwrap());
    }

    #[test]
    fn requests_carry_the_key_and_the_identity() {
        let id = SpiffeId::parse("spiffe://example.org/w").unwrap();
        for kind in [KeyType::EcP256, KeyType::EcP384, KeyType::Rsa2048] {
            let (key, request) = new_workload_key(kind, &id).unwrap();
            let csr = Csr::parse(&request).unwrap();
            csr.verify_signature().unwrap();
            assert_eq!(csr.spki_der, key.public_key().spki_der());
            assert_eq!(csr.uris, ["spiffe://example.org/w"]);
        }
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        assert!(Csr::parse(&certificate_request(&key, None).unwrap()).unwrap().uris.is_empty());
    }
}
