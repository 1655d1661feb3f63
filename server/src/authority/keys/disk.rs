//! Signing keys in one JSON file.
//!
//! The file is an object `{"keys": {id: base64 of PKCS#8 DER}, "owner": 32 hex digits, "history": 32 hex digits, "note":
//! {…}}`, mode 0600, replaced as a whole by rename after fsync. `owner` names the key set, `history` the data store beside
//! which it was used last, `note` where that store was at the last change of the authorities, and those. Files written by SPIRE's `disk` key manager have neither: of one that was ours before, the data store
//! knows whose keys are in it; another gets both at the first start.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use async_trait::async_trait;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use runtime::entropy::Entropy;
use serde::{Deserialize, Serialize};
use spiffe::x509::PrivateKey;
use zeroize::{Zeroize as _, Zeroizing};

use super::local::{Keys, LocalKey, public_halves};
use super::note::WrittenNote;
use super::{FileError, KeyError, KeySet, KeyType, Note, PublicKey, Signer, SigningKeys, is_ours};

/// What the file says.
#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    keys: BTreeMap<String, String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    owner: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    history: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    note: Option<WrittenNote>,
}

impl File {
    fn parse(bytes: &[u8]) -> Result<Self, FileError> {
        spiffe::from_object(bytes, "{\"keys\": {…}}")
            .map_err(|error| FileError::Form { line: error.line().max(1), column: error.column().max(1) })
    }
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
    /// The file names the owner.
    named: bool,
    history: Option<[u8; 16]>,
    note: Option<Note>,
    secrets: BTreeMap<String, PrivateKey>,
    keys: Keys,
    _lock: runtime::keyfile::Lock,
}

/// Signing keys kept in a file.
pub struct DiskKeys {
    inner: Arc<Mutex<Inner>>,
}

impl DiskKeys {
    /// Reads the key file, if there is one. It is written only once it is known to whom the keys belong.
    ///
    /// # Errors
    /// If another process uses the file, if it is readable by others, is not a key file, or holds a key of an unsupported kind.
    pub fn open(path: &Path, entropy: &Entropy) -> Result<Self, KeyError> {
        let damaged = |source| KeyError::Damaged { path: path.to_owned(), source };
        // Each write replaces the whole file by what this process knows of it.
        let lock = runtime::keyfile::lock(path, "keys_path of KeyManager \"disk\"").map_err(KeyError::File)?;
        let file = match runtime::keyfile::read(path) {
            Ok(Some(bytes)) => File::parse(&bytes).map_err(damaged)?,
            Ok(None) => File::default(),
            Err(error) => return Err(KeyError::File(error)),
        };
        let mut secrets = BTreeMap::new();
        let mut keys = Keys::new();
        for (id, text) in &file.keys {
            let (key, local) = read_key(text).map_err(|error| KeyError::Stored {
                path: path.to_owned(),
                id: id.clone(),
                source: Box::new(error),
            })?;
            keys.insert(id.clone(), Arc::new(local));
            secrets.insert(id.clone(), key);
        }
        let known = name("owner", file.owner.as_deref()).map_err(damaged)?;
        let history = name("history", file.history.as_deref()).map_err(damaged)?;
        let note = file.note.as_ref().map(WrittenNote::read).transpose().map_err(damaged)?;
        let owner = known.unwrap_or_else(|| {
            let mut owner = [0; 16];
            entropy.fill(&mut owner);
            owner
        });
        let inner =
            Inner { path: path.to_owned(), owner, named: known.is_some(), history, note, secrets, keys, _lock: lock };
        Ok(Self { inner: Arc::new(Mutex::new(inner)) })
    }

    /// Notes that the keys are used beside the data store `history`; none is one that ends with the process. `journal`
    /// is what that store knows: the owners and SubjectPublicKeyInfos of all keys it has seen. So a store that was
    /// restored from a backup is known again, and so are our keys in a file that SPIRE has written meanwhile.
    ///
    /// # Errors
    /// [`KeyError::OtherStore`] if the file holds keys of ours that were used beside a store that this one does not come
    /// from, and that would be removed as unused; or if the note cannot be written.
    pub fn belong_to(&self, history: Option<[u8; 16]>, journal: &[([u8; 16], Bytes)]) -> Result<(), KeyError> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let held = |spki: &Bytes| inner.keys.values().any(|key| key.public().spki == *spki);
        let returned = journal.iter().find(|(_, spki)| !inner.named && held(spki)).map(|(owner, _)| *owner);
        inner.owner = returned.unwrap_or(inner.owner);
        let known = history.is_some() && inner.history == history;
        let seen = journal.iter().any(|(owner, _)| *owner == inner.owner);
        // Keys of ours in a file without an owner have been through SPIRE, and belong to some store. A file with an owner
        // and no history is that of a store in memory, which is gone.
        let elsewhere = inner.history.is_some() || !inner.named;
        if elsewhere && !known && !seen && inner.secrets.keys().any(|id| is_ours(id)) {
            return Err(KeyError::OtherStore { path: inner.path.clone() });
        }
        if inner.named && known {
            return Ok(());
        }
        inner.named = true;
        inner.history = history;
        inner.write()
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

fn read_key(text: &str) -> Result<(PrivateKey, LocalKey), KeyError> {
    let pkcs8 = STANDARD.decode(text.as_bytes()).map_err(KeyError::Encoding)?;
    let key = PrivateKey::from_pkcs8(pkcs8).map_err(KeyError::Parse)?;
    let local = LocalKey::new(&key)?;
    Ok((key, local))
}

/// 32 hex digits to 16 bytes.
pub(super) fn name(field: &'static str, text: Option<&str>) -> Result<Option<[u8; 16]>, FileError> {
    let Some(text) = text else { return Ok(None) };
    // The parser would take a sign, too.
    let digits = text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    let number = if digits { u128::from_str_radix(text, 16).ok() } else { None };
    number.map(|number| Some(number.to_be_bytes())).ok_or(FileError::Name { field })
}

pub(super) fn hex(name: [u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(name))
}

impl Inner {
    /// Replaces the file by what is in memory.
    fn write(&self) -> Result<(), KeyError> {
        let file = File {
            keys: self.secrets.iter().map(|(id, key)| (id.clone(), STANDARD.encode(key.expose_pkcs8()))).collect(),
            owner: Some(hex(self.owner)),
            history: self.history.map(hex),
            note: self.note.as_ref().map(WrittenNote::of),
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

    fn noted(&self) -> Option<Note> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner).note.clone()
    }

    async fn note(&self, note: Note) -> Result<(), KeyError> {
        self.blocking(move |inner| {
            let before = (inner.note.replace(note.clone()), inner.history.replace(note.history));
            inner.write().inspect_err(|_| (inner.note, inner.history) = before)
        })
        .await
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;
    use std::time::{Duration, SystemTime};

    use super::super::NotedAuthority;
    use super::*;

    /// The id of a key as this server makes them.
    const OURS: &str = "x509-CA-0123456789abcdef";

    #[tokio::test]
    async fn keeps_the_contract_of_signing_keys() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let number = std::sync::atomic::AtomicU32::new(0);
        super::super::contract::signing_keys(|| async {
            let number = number.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            DiskKeys::open(&directory.path().join(format!("keys-{number}.json")), &entropy).unwrap()
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
        let open = || {
            let keys = DiskKeys::open(&path, &entropy).unwrap();
            keys.belong_to(Some([1; 16]), &[]).unwrap();
            keys
        };
        let first = open().public().await.unwrap();
        let second = open().public().await.unwrap();
        assert_eq!(first.keys.len(), 1);
        assert_eq!(first.keys[0].0, "JWT-Signer-A");
        assert_eq!(first.keys[0].1.kind, KeyType::EcP384);
        assert_eq!(first.owner, second.owner);
    }

    #[test]
    fn a_file_that_is_no_key_file_is_refused_and_left_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let form = |line, column| FileError::Form { line, column };
        for (text, expected) in [
            ("", form(1, 1)),
            ("[]", form(1, 1)),
            ("[{}]", form(1, 1)),
            ("{}", form(1, 2)),
            (r#"{"keys": {}, "newer": 1}"#, form(1, 20)),
            (r#"{"keys": "secret"}"#, form(1, 17)),
            ("{\n\"keys\": {\"a\": \"AAAA", form(2, 19)),
            (r#"{"keys": {}, "owner": "1"}"#, FileError::Name { field: "owner" }),
            (r#"{"keys": {}, "history": "+0000000000000000000000000000000"}"#, FileError::Name { field: "history" }),
        ] {
            runtime::keyfile::write(&path, text.as_bytes()).unwrap();
            match DiskKeys::open(&path, &Entropy::system()).err() {
                Some(KeyError::Damaged { path: named, source }) => {
                    assert_eq!((named, source), (path.clone(), expected), "{text}");
                }
                other => panic!("{text}: {other:?}"),
            }
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
        runtime::keyfile::write(&path, br#"{"keys": {"a": "AAAA"}}"#).unwrap();
        match DiskKeys::open(&path, &Entropy::system()).err() {
            Some(KeyError::Stored { id, source, .. }) => {
                assert!(id == "a" && matches!(*source, KeyError::Parse(_)), "{id} {source:?}");
            }
            other => panic!("{other:?}"),
        }
    }

    #[tokio::test]
    async fn keys_of_another_store_are_refused_and_kept() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let open = || DiskKeys::open(&path, &entropy).unwrap();
        // As long as there are no keys that could be removed, there is nothing to lose.
        open().belong_to(Some([1; 16]), &[]).unwrap();
        open().create("x509-CA-A", KeyType::EcP256).await.unwrap();
        let keys = open();
        keys.belong_to(Some([2; 16]), &[]).unwrap();
        let public = keys.create(OURS, KeyType::EcP256).await.unwrap();
        let owner = keys.public().await.unwrap().owner;
        drop(keys);

        open().belong_to(Some([2; 16]), &[]).unwrap();
        let before = std::fs::read(&path).unwrap();
        for other in [Some([3; 16]), None] {
            let refused = open().belong_to(other, &[([7; 16], public.spki.clone())]);
            assert!(matches!(refused, Err(KeyError::OtherStore { path: named }) if named == path));
            assert_eq!(std::fs::read(&path).unwrap(), before);
        }
        // A restored store has another name, and remembers whose keys it had.
        open().belong_to(Some([3; 16]), &[(owner, Bytes::new())]).unwrap();
        open().belong_to(Some([3; 16]), &[]).unwrap();
        assert_eq!(open().public().await.unwrap().keys.len(), 2);
    }

    #[tokio::test]
    async fn keys_that_spire_has_written_back_are_ours_again() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let keys = DiskKeys::open(&path, &entropy).unwrap();
        keys.belong_to(Some([1; 16]), &[]).unwrap();
        let public = keys.create(OURS, KeyType::EcP256).await.unwrap();
        let owner = keys.public().await.unwrap().owner;
        let file: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let theirs = serde_json::json!({"keys": file["keys"]});
        runtime::keyfile::write(&path, theirs.to_string().as_bytes()).unwrap();
        drop(keys);

        for other in [Some([3; 16]), None] {
            let refused = DiskKeys::open(&path, &entropy).unwrap().belong_to(other, &[]);
            assert!(matches!(refused, Err(KeyError::OtherStore { path: named }) if named == path));
        }
        let keys = DiskKeys::open(&path, &entropy).unwrap();
        keys.belong_to(Some([1; 16]), &[(owner, public.spki)]).unwrap();
        assert_eq!(keys.public().await.unwrap().owner, owner);
        drop(keys);
        assert_eq!(DiskKeys::open(&path, &entropy).unwrap().public().await.unwrap().owner, owner);
    }

    #[tokio::test]
    async fn a_note_survives_a_restart_and_names_the_history() {
        let entropy = Entropy::system();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys.json");
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let x509 = NotedAuthority {
            authority_id: "aa".into(),
            key_id: OURS.into(),
            issued_at: at(1_700_000_000),
            not_after: at(1_800_000_000),
            certificate: Some(Bytes::from_static(b"certificate")),
            upstream_chain: vec![Bytes::from_static(b"above")],
            public_key: Bytes::from_static(b"key"),
            tainted: true,
        };
        let jwt = NotedAuthority { certificate: None, upstream_chain: Vec::new(), tainted: false, ..x509.clone() };
        let note = Note { history: [3; 16], revision: 7, digest: [9; 32], authorities: vec![x509, jwt] };
        let keys = DiskKeys::open(&path, &entropy).unwrap();
        assert_eq!(keys.noted(), None);
        keys.belong_to(Some([1; 16]), &[]).unwrap();
        keys.create(OURS, KeyType::EcP256).await.unwrap();
        keys.note(note.clone()).await.unwrap();
        drop(keys);
        let keys = DiskKeys::open(&path, &entropy).unwrap();
        assert_eq!(keys.noted(), Some(note));
        assert_eq!(keys.public().await.unwrap().keys.len(), 1);
        keys.belong_to(Some([3; 16]), &[]).unwrap();
        drop(keys);
        let written: serde_json::Value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        for (field, wrong, expected) in [
            ("digest", "AAAA", FileError::Note { field: "digest" }),
            ("digest", "?", FileError::Note { field: "digest" }),
            ("history", "x", FileError::Name { field: "history" }),
        ] {
            let mut file = written.clone();
            file["note"][field] = wrong.into();
            runtime::keyfile::write(&path, file.to_string().as_bytes()).unwrap();
            match DiskKeys::open(&path, &entropy).err() {
                Some(KeyError::Damaged { source, .. }) => assert_eq!(source, expected),
                other => panic!("{other:?}"),
            }
        }
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
