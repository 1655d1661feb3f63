//! Keys that end with the process: the agent attests anew after each start.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use spiffe::x509::{KeyType, PrivateKey};

use super::{AgentKeys, KeyError, Place, place_beside};

/// Keys in memory.
#[derive(Default)]
pub struct MemoryKeys {
    keys: Mutex<BTreeMap<Place, Arc<PrivateKey>>>,
}

impl MemoryKeys {
    fn keys(&self) -> MutexGuard<'_, BTreeMap<Place, Arc<PrivateKey>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AgentKeys for MemoryKeys {
    fn find(&self, spki_der: &[u8]) -> Option<Arc<PrivateKey>> {
        self.keys().values().find(|key| key.public_key().spki_der() == spki_der).cloned()
    }

    fn create(&self, current: Option<&[u8]>) -> Result<Arc<PrivateKey>, KeyError> {
        let key = Arc::new(PrivateKey::generate(KeyType::EcP256).map_err(KeyError::Generate)?);
        let mut keys = self.keys();
        let taken = current
            .and_then(|spki| keys.iter().find(|(_, key)| key.public_key().spki_der() == spki).map(|(place, _)| *place));
        keys.insert(place_beside(taken), Arc::clone(&key));
        Ok(key)
    }

    fn save(&self) -> Result<(), KeyError> {
        Ok(())
    }
}
