//! Signing keys in one JSON file.
//!
//! The file is an object `{"keys": {id: base64 of PKCS#8 DER}, "owner": 32 hex digits}`, mode 0600, replaced as a
//! whole by rename after fsync. Files written by SPIRE's `disk` key manager have no owner; one is added at the first
//! start.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use runtime::entropy::Entropy;
use serde::{Deserialize, Serialize};
use spiffe::x509::PrivateKey;
use zeroize::{Zeroize as _, Zeroizing};

use super::local::{Keys, LocalKey, public_halves};
use super::{KeyError, KeySet, KeyType, PublicKey, Signer, SigningKeys};

/// What the file says.
#[derive(Default, Serialize, Deserialize)]
struct File {
    #[serde(default)]
    keys: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
}

impl Drop for File {
    fn drop(&mut self) {
        self.keys.values_mut().for_each(|text| text.zeroize());
    }
}

/// The file and what it holds, changed together.
struct Inner {
    path: PathBuf,
    owner: [u8; 16],
    secrets: BTreeMap<String, PrivateKey>,
    keys: Keys,
}

/// Signing keys kept in a file.
pub struct DiskKeys {
    inner: Arc<Mutex<Inner>>,
}

impl DiskKeys {
    /// Reads the key file, or makes one that holds only its owner.
    ///
    /// # Errors
    /// If the file is readable by others, is not a key file, holds a key of an unsupported kind, or cannot be written.
    pub fn open(path: &Path, entropy: &Entropy) -> Result<Self, KeyError> {
        let file = match runtime::keyfile::read(path) {
            Ok(Some(bytes)) => serde_json::from_slice(&bytes).map_err(KeyError::Format)?,
            Ok(None) => File::default(),
            Err(error) => return Err(KeyError::File(error)),
        };
        let mut secrets = BTreeMap::new();
        let mut keys = Keys::new();
        for (id, text) in &file.keys {
            let pkcs8 = STANDARD.decode(text.as_bytes()).map_err(KeyError::Encoding)?;
            let key = PrivateKey::from_pkcs8(pkcs8).map_err(KeyError::Parse)?;
            keys.insert(id.clone(), Arc::new(LocalKey::new(&key)?));
            secrets.insert(id.clone(), key);
        }
        let mut owner = [0; 16];
        let known = file.owner.as_deref().and_then(parse_owner);
        match known {
            Some(stored) => owner = stored,
            None => entropy.fill(&mut owner),
        }
        let inner = Inner { path: path.to_owned(), owner, secrets, keys };
        if known.is_none() {
            inner.write()?;
        }
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    /// Runs `work` on the file where blocking is allowed; one at a time.
    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Inner) -> Result<T, KeyError> + Send + 'static,
    ) -> Result<T, KeyError> {
        let inner = Arc::clone(&self.inner);
        tokio::task::spawn_blocking(move || work(&mut inner.lock().unwrap_or_else(PoisonError::into_inner)))
            .await
            .map_err(|_| KeyError::Interrupted)?
    }
}

/// 32 lower-case hex digits to 16 bytes.
fn parse_owner(text: &str) -> Option<[u8; 16]> {
    let number = u128::from_str_radix(text, 16).ok()?;
    (text.len() == 32).then(|| number.to_be_bytes())
}

impl Inner {
    /// Replaces the file by what is in memory.
    fn write(&self) -> Result<(), KeyError> {
        let file = File {
            keys: self.secrets.iter().map(|(id, key)| (id.clone(), STANDARD.encode(key.expose_pkcs8()))).collect(),
            owner: Some(format!("{:032x}", u128::from_be_bytes(self.owner))),
        };
        let text = Zeroizing::new(serde_json::to_vec_pretty(&file).map_err(KeyError::Format)?);
        runtime::keyfile::write(&self.path, &text).map_err(KeyError::File)
    }
}

#[async_trait]
impl SigningKeys for DiskKeys {
    async fn create(&self, id: &str, kind: KeyType) -> Result<PublicKey, KeyError> {
        let id = id.to_owned();
        // The key is made before the file is locked: an RSA key takes up to a second.
        let (secret, key) = LocalKey::generate(kind).await?;
        self.blocking(move |inner| {
            if inner.secrets.contains_key(&id) {
                return Err(KeyError::Exists);
            }
            let public = key.public().clone();
            inner.secrets.insert(id.clone(), secret);
            if let Err(error) = inner.write() {
                inner.secrets.remove(&id);
                return Err(error);
            }
            inner.keys.insert(id, Arc::new(key));
            Ok(public)
        })
        .await
    }

    async fn public(&self) -> Result<KeySet, KeyError> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(KeySet { owner: inner.owner, keys: public_halves(&inner.keys) })
    }

    async fn delete(&self, id: &str) -> Result<(), KeyError> {
        let id = id.to_owned();
        self.blocking(move |inner| {
            let Some(removed) = inner.secrets.remove(&id) else {
                return Ok(());
            };
            if let Err(error) = inner.write() {
                inner.secrets.insert(id, removed);
                return Err(error);
            }
            inner.keys.remove(&id);
            Ok(())
        })
        .await
    }

    fn signer(&self, id: &str) -> Option<Arc<dyn Signer>> {
        let inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        inner.keys.get(id).map(|key| Arc::clone(key) as Arc<dyn Signer>)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[tokio::test]
    async fn keeps_the_contract_of_signing_keys() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        super::super::contract::signing_keys(|| async {
            let _ = std::fs::remove_file(&path);
            DiskKeys::open(&path, &entropy).unwrap()
        })
        .await;
    }

    #[tokio::test]
    async fn keys_and_owner_survive_a_restart() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let keys = DiskKeys::open(&path, &entropy).unwrap();
        let public = keys.create("x509-CA-1", KeyType::EcP256).await.unwrap();
        let before = keys.public().await.unwrap();
        drop(keys);
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let keys = DiskKeys::open(&path, &entropy).unwrap();
        let after = keys.public().await.unwrap();
        assert_eq!(after.owner, before.owner);
        assert_eq!(after.keys, vec![("x509-CA-1".to_owned(), public)]);
    }

    #[tokio::test]
    async fn reads_a_file_without_an_owner_and_keeps_its_keys() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let key = PrivateKey::generate(KeyType::EcP384).unwrap();
        let text =
            format!("{{\n\t\"keys\": {{\n\t\t\"JWT-Signer-A\": \"{}\"\n\t}}\n}}", STANDARD.encode(key.expose_pkcs8()));
        runtime::keyfile::write(&path, text.as_bytes()).unwrap();
        let first = DiskKeys::open(&path, &entropy).unwrap().public().await.unwrap();
        let second = DiskKeys::open(&path, &entropy).unwrap().public().await.unwrap();
        assert_eq!(first.keys.len(), 1);
        assert_eq!(first.keys[0].0, "JWT-Signer-A");
        assert_eq!(first.keys[0].1.kind, KeyType::EcP384);
        assert_eq!(first.owner, second.owner);
    }

    #[tokio::test]
    async fn a_file_that_cannot_be_written_leaves_no_key() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let inner = directory.path().join("gone");
        std::fs::create_dir(&inner).unwrap();
        let keys = DiskKeys::open(&inner.join("keys.json"), &entropy).unwrap();
        std::fs::remove_dir_all(&inner).unwrap();
        std::fs::write(&inner, b"a file where the directory was").unwrap();
        assert!(matches!(keys.create("a", KeyType::EcP256).await, Err(KeyError::File(_))));
        assert!(keys.signer("a").is_none());
        assert!(keys.public().await.unwrap().keys.is_empty());
    }
}
