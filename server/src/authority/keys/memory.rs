//! Signing keys in memory: gone with the process, so that each start has new authorities.

use std::sync::{Arc, PoisonError, RwLock};

use async_trait::async_trait;
use runtime::entropy::Entropy;

use super::local::{Keys, LocalKey, public_halves};
use super::{KeyError, KeySet, KeyType, PublicKey, Signer, SigningKeys};

/// Signing keys that live as long as the process.
pub struct MemoryKeys {
    owner: [u8; 16],
    keys: RwLock<Keys>,
}

impl MemoryKeys {
    /// An empty key set with a new owner.
    pub fn new(entropy: &Entropy) -> Self {
        let mut owner = [0; 16];
        entropy.fill(&mut owner);
        Self { owner, keys: RwLock::default() }
    }
}

#[async_trait]
impl SigningKeys for MemoryKeys {
    async fn create(&self, id: &str, kind: KeyType) -> Result<PublicKey, KeyError> {
        let (_, key) = LocalKey::generate(kind).await?;
        let public = key.public().clone();
        let mut keys = self.keys.write().unwrap_or_else(PoisonError::into_inner);
        if keys.contains_key(id) {
            return Err(KeyError::Exists);
        }
        keys.insert(id.to_owned(), Arc::new(key));
        Ok(public)
    }

    async fn public(&self) -> Result<KeySet, KeyError> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        Ok(KeySet { owner: self.owner, keys: public_halves(&keys) })
    }

    async fn delete(&self, id: &str) -> Result<(), KeyError> {
        self.keys.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(())
    }

    fn signer(&self, id: &str) -> Option<Arc<dyn Signer>> {
        let keys = self.keys.read().unwrap_or_else(PoisonError::into_inner);
        keys.get(id).map(|key| Arc::clone(key) as Arc<dyn Signer>)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn keeps_the_contract_of_signing_keys() {
        let entropy = Entropy::system();
        super::super::contract::signing_keys(|| async { MemoryKeys::new(&entropy) }).await;
    }
}
