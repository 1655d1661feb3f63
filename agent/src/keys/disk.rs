//! Keys in `keys.json`, in SPIRE's format: `{"keys": {"<id>": "<base64 of PKCS#8 DER>"}}`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use runtime::keyfile;
use serde::{Deserialize, Serialize};
use spiffe::x509::{KeyType, PrivateKey};
use zeroize::{Zeroize as _, Zeroizing};

use super::{AgentKeys, KeyError, Place, place_beside};

const FILE: &str = "keys.json";

/// Keys in a file that only this user can read.
pub struct DiskKeys {
    path: PathBuf,
    held: Mutex<Held>,
    _lock: Option<keyfile::Lock>,
}

struct Held {
    // Under their names: keys that are not ours are kept in the file as they are.
    keys: BTreeMap<String, Arc<PrivateKey>>,
    // Whether the file was written since the last change.
    saved: bool,
}

#[derive(Serialize, Deserialize)]
struct Document {
    keys: BTreeMap<String, String>,
}

impl Drop for Document {
    fn drop(&mut self) {
        self.keys.values_mut().for_each(|key| key.zeroize());
    }
}

impl DiskKeys {
    /// Reads `keys.json` in `directory`, which is made if it is not there.
    ///
    /// # Errors
    /// If another process uses the file, or if it cannot be read or understood.
    pub fn open(directory: &Path) -> Result<Self, KeyError> {
        let path = Self::prepared(directory)?;
        // Each write replaces the whole file by what this process knows of it.
        let lock = keyfile::lock(&path, "directory of KeyManager \"disk\"").map_err(KeyError::File)?;
        Self::read(path, Some(lock))
    }

    /// The same without a lock: agents of a test share a process, and one that is killed gives nothing back.
    #[cfg(test)]
    pub(crate) fn open_unlocked(directory: &Path) -> Result<Self, KeyError> {
        Self::read(Self::prepared(directory)?, None)
    }

    fn prepared(directory: &Path) -> Result<PathBuf, KeyError> {
        make_directory(directory)?;
        Ok(directory.join(FILE))
    }

    fn read(path: PathBuf, lock: Option<keyfile::Lock>) -> Result<Self, KeyError> {
        let mut keys = BTreeMap::new();
        if let Some(text) = keyfile::read(&path).map_err(KeyError::File)? {
            let document: Document = spiffe::from_object(&text, "{\"keys\": {…}}").map_err(KeyError::Format)?;
            for (id, key) in &document.keys {
                let pkcs8 = STANDARD.decode(key).map_err(|_| KeyError::Key(spiffe::x509::KeyError::Malformed))?;
                keys.insert(id.clone(), Arc::new(PrivateKey::from_pkcs8(pkcs8).map_err(KeyError::Key)?));
            }
        }
        Ok(Self { path, held: Mutex::new(Held { keys, saved: true }), _lock: lock })
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl AgentKeys for DiskKeys {
    fn find(&self, spki_der: &[u8]) -> Option<Arc<PrivateKey>> {
        self.held().keys.values().find(|key| key.public_key().spki_der() == spki_der).cloned()
    }

    fn create(&self, current: Option<&[u8]>) -> Result<Arc<PrivateKey>, KeyError> {
        let key = Arc::new(PrivateKey::generate(KeyType::EcP256).map_err(KeyError::Generate)?);
        let mut held = self.held();
        let taken = [Place::A, Place::B].into_iter().find(|place| {
            held.keys.get(place.key_id()).is_some_and(|key| Some(&**key.public_key().spki_der()) == current)
        });
        held.keys.insert(place_beside(taken).key_id().to_owned(), Arc::clone(&key));
        held.saved = false;
        Ok(key)
    }

    fn save(&self) -> Result<(), KeyError> {
        // Held over the write, so that an older state never overwrites a newer one.
        let mut held = self.held();
        // Somebody may have removed the file, or the whole directory.
        if held.saved && self.path.try_exists().unwrap_or(false) {
            return Ok(());
        }
        let encoded = held.keys.iter().map(|(id, key)| (id.clone(), STANDARD.encode(key.expose_pkcs8())));
        let document = Document { keys: encoded.collect() };
        let text = Zeroizing::new(serde_json::to_vec_pretty(&document).map_err(KeyError::Format)?);
        if let Some(directory) = self.path.parent() {
            make_directory(directory)?;
        }
        keyfile::write(&self.path, &text).map_err(KeyError::File)?;
        held.saved = true;
        Ok(())
    }
}

fn make_directory(directory: &Path) -> Result<(), KeyError> {
    keyfile::make_directory(directory).map_err(|source| KeyError::Directory { directory: directory.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_outlive_the_process_and_are_private() {
        let dir = tempfile::tempdir().unwrap();
        let keys = DiskKeys::open(dir.path()).unwrap();
        let spki = keys.create(None).unwrap().public_key().spki_der().clone();
        keys.save().unwrap();
        drop(keys);
        assert!(DiskKeys::open(dir.path()).unwrap().find(&spki).is_some());
        let file = dir.path().join("keys.json");
        assert_eq!(std::fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
        let document: serde_json::Value = serde_json::from_slice(&std::fs::read(&file).unwrap()).unwrap();
        assert!(document["keys"]["agent-svid-A"].is_string());
    }

    #[test]
    fn a_file_that_another_program_uses_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("keys.json");
        let server = keyfile::lock(&path, "keys_path").unwrap();
        match DiskKeys::open(dir.path()).err() {
            Some(KeyError::File(keyfile::KeyFileError::InUse { path: named, setting, .. })) => {
                assert_eq!((named, setting), (path, "directory of KeyManager \"disk\""));
            }
            other => panic!("{other:?}"),
        }
        drop(server);
        DiskKeys::open(dir.path()).unwrap();
    }

    #[test]
    fn keys_of_others_stay_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let other = PrivateKey::generate(KeyType::EcP384).unwrap();
        let text = serde_json::json!({"keys": {"other": STANDARD.encode(other.expose_pkcs8())}}).to_string();
        keyfile::write(&dir.path().join("keys.json"), text.as_bytes()).unwrap();
        let keys = DiskKeys::open(dir.path()).unwrap();
        keys.create(None).unwrap();
        keys.save().unwrap();
        drop(keys);
        let keys = DiskKeys::open(dir.path()).unwrap();
        assert!(keys.find(other.public_key().spki_der()).is_some());
        assert_eq!(keys.held().keys.len(), 2);
    }

    #[test]
    fn a_directory_that_was_removed_is_made_anew_with_every_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data");
        let keys = DiskKeys::open(&path).unwrap();
        let first = keys.create(None).unwrap().public_key().spki_der().clone();
        keys.save().unwrap();
        std::fs::remove_dir_all(&path).unwrap();
        // Something else lies where the directory was.
        std::fs::write(&path, b"").unwrap();
        let second = keys.create(Some(&first)).unwrap().public_key().spki_der().clone();
        assert!(matches!(keys.save(), Err(KeyError::Directory { .. })));
        assert!(keys.find(&first).is_some() && keys.find(&second).is_some());
        std::fs::remove_file(&path).unwrap();
        keys.save().unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        drop(keys);
        let keys = DiskKeys::open(&path).unwrap();
        assert!(keys.find(&first).is_some() && keys.find(&second).is_some());
        std::fs::remove_file(path.join("keys.json")).unwrap();
        keys.save().unwrap();
        assert!(path.join("keys.json").exists());
    }

    #[test]
    fn a_damaged_file_is_an_error_not_an_empty_store() {
        let dir = tempfile::tempdir().unwrap();
        for (text, key) in [("{", false), (r#"{"keys":{"a":"AAAA"}}"#, true)] {
            keyfile::write(&dir.path().join("keys.json"), text.as_bytes()).unwrap();
            match DiskKeys::open(dir.path()) {
                Err(KeyError::Format(_)) => assert!(!key),
                Err(KeyError::Key(_)) => assert!(key),
                _ => panic!("accepted {text}"),
            }
        }
    }
}
