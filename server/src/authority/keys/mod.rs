//! Where the private keys of authorities live, behind one trait.
//!
//! A key is made under an id that is never used again and never overwritten. What signs is handed out as a
//! [`Signer`], so that a key which cannot leave its module fits behind the same trait.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;

pub mod disk;
pub mod local;
pub mod memory;
mod note;

#[cfg(test)]
mod contract;

pub use spiffe::x509::KeyType;

/// How the ids of keys begin that sign certificates, and of those that sign tokens; [`KEY_NUMBER`] letters and digits
/// follow.
pub const X509_KEY: &str = "x509-CA-";
/// See [`X509_KEY`].
pub const JWT_KEY: &str = "JWT-Signer-";
/// See [`X509_KEY`].
pub const KEY_NUMBER: usize = 16;

/// Whether a key with this id was made here. SPIRE calls its own `x509-CA-A` and `JWT-Signer-B`.
pub fn is_ours(key_id: &str) -> bool {
    let number = key_id.strip_prefix(X509_KEY).or_else(|| key_id.strip_prefix(JWT_KEY));
    number.is_some_and(|number| number.len() == KEY_NUMBER && number.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// The JWS algorithm of tokens signed by such a key (RFC 7518, section 3.1).
pub fn jws_algorithm(kind: KeyType) -> &'static str {
    match kind {
        KeyType::EcP256 => "ES256",
        KeyType::EcP384 => "ES384",
        KeyType::Rsa2048 | KeyType::Rsa4096 => "RS256",
    }
}

/// The public half of a key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PublicKey {
    /// What kind of key it is.
    pub kind: KeyType,
    /// DER of the SubjectPublicKeyInfo (RFC 5280, section 4.1.2.7).
    pub spki: Bytes,
    /// The content of the BIT STRING in `spki`: an uncompressed point, or the DER of an RSAPublicKey.
    pub bits: Bytes,
}

/// All keys of a key set, and whose they are.
#[derive(Clone, Debug)]
pub struct KeySet {
    /// Random id made with the key set and stored beside it; authorities are recorded under it.
    pub owner: [u8; 16],
    /// Key id and public half, in no promised order.
    pub keys: Vec<(String, PublicKey)>,
}

/// A private key that signs, wherever it is.
///
/// Only [`crate::authority::issue`] and the proof of a key before its activation call the signing methods.
pub trait Signer: Send + Sync {
    /// The public half.
    fn public_key(&self) -> &PublicKey;

    /// Signs `message` for a certificate: DER of an ECDSA signature, or RSA PKCS#1 v1.5 with SHA-256.
    ///
    /// # Errors
    /// [`KeyError::Sign`] if the key refuses.
    fn sign_x509(&self, message: &[u8]) -> Result<Vec<u8>, KeyError>;

    /// Signs `message` for a JWS: r and s side by side (RFC 7518, section 3.4), or RSA PKCS#1 v1.5 with SHA-256.
    ///
    /// # Errors
    /// [`KeyError::Sign`] if the key refuses.
    fn sign_jws(&self, message: &[u8]) -> Result<Vec<u8>, KeyError>;
}

/// An authority as it is noted beside the keys: enough to publish it again, and nothing secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotedAuthority {
    /// X.509: the subject key id in lower-case hex. JWT: the `kid`.
    pub authority_id: Arc<str>,
    /// Name of its key.
    pub key_id: Arc<str>,
    /// When it was made, in whole seconds.
    pub issued_at: SystemTime,
    /// When it ends, in whole seconds.
    pub not_after: SystemTime,
    /// X.509: its certificate, DER. A JWT authority has none.
    pub certificate: Option<Bytes>,
    /// X.509 below an upstream authority: the intermediates, DER, nearest first.
    pub upstream_chain: Vec<Bytes>,
    /// Its public key, PKIX DER.
    pub public_key: Bytes,
    /// Whether it is to be used no more.
    pub tainted: bool,
}

/// What is noted beside the keys after each change of their authorities: a data store that is older was restored from a
/// backup, and knows less of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// Id of the history.
    pub history: [u8; 16],
    /// The newest position then.
    pub revision: u64,
    /// Its digest.
    pub digest: [u8; 32],
    /// The published authorities of this key set, oldest first.
    pub authorities: Vec<NotedAuthority>,
}

/// A place for signing keys.
#[async_trait]
pub trait SigningKeys: Send + Sync {
    /// Makes a key under a fresh `id`; when this returns, the key survives a power cut if the place is durable.
    ///
    /// # Errors
    /// [`KeyError::Exists`] if the id is taken; the others if the key cannot be made or kept, and then no key is there.
    async fn create(&self, id: &str, kind: KeyType) -> Result<PublicKey, KeyError>;

    /// Every key that is there, and the owner they belong to.
    ///
    /// # Errors
    /// If the place cannot be read.
    async fn public(&self) -> Result<KeySet, KeyError>;

    /// Removes the key; removing what is not there is no error.
    ///
    /// # Errors
    /// If the removal cannot be made durable; the key is then still there.
    async fn delete(&self, id: &str) -> Result<(), KeyError>;

    /// What signs with key `id`, or nothing if there is no such key.
    fn signer(&self, id: &str) -> Option<Arc<dyn Signer>>;

    /// What was noted last; none if nothing was, or if this place ends with the process.
    fn noted(&self) -> Option<Note> {
        None
    }

    /// Replaces the note, durably, if this place does not end with the process.
    ///
    /// # Errors
    /// If it cannot be written; the note before it stays.
    async fn note(&self, _note: Note) -> Result<(), KeyError> {
        Ok(())
    }
}

/// What is wrong with a key file. Nothing of its content is told: it may be a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum FileError {
    /// It does not have the form of a key file.
    #[error("unexpected content in line {line}, column {column}")]
    Form {
        /// Where that shows, counted from 1.
        line: usize,
        /// Where in the line, counted from 1.
        column: usize,
    },
    /// Something of its note cannot be read.
    #[error("its \"note\" has a malformed \"{field}\"")]
    Note {
        /// The field.
        field: &'static str,
    },
    /// What names its key set or data store is no such name.
    #[error("its \"{field}\" is not 32 hexadecimal digits")]
    Name {
        /// The field.
        field: &'static str,
    },
}

/// Why a key operation failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum KeyError {
    /// A key with this id exists; keys are never overwritten.
    #[error("a signing key with this id exists already")]
    Exists,
    /// The cryptographic module made no key.
    #[error("making a signing key failed")]
    Generate(#[source] spiffe::x509::KeyError),
    /// Stored bytes are no private key.
    #[error("stored signing key is not PKCS#8")]
    Parse(#[source] spiffe::x509::KeyError),
    /// Stored bytes are a private key of a kind that signs nothing here.
    #[error("stored signing key is none of ec-p256, ec-p384, rsa-2048 and rsa-4096")]
    Unsupported,
    /// Stored text is not base64.
    #[error("stored signing key is not base64")]
    Encoding(#[source] base64::DecodeError),
    /// Keys cannot be written as text.
    #[error("signing keys cannot be written as JSON")]
    Format(#[source] serde_json::Error),
    /// The key file is there and is not what it should be.
    #[error("{} is not a key file or is damaged; restore it, or move it away to begin with new authorities", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        source: FileError,
    },
    /// A key in the key file is not what it should be.
    #[error("key \"{id}\" in {} cannot be used; restore the file, or move it away to begin with new authorities", path.display())]
    Stored {
        /// The file.
        path: PathBuf,
        /// The key.
        id: String,
        /// What is wrong with it.
        source: Box<KeyError>,
    },
    /// The key file was made beside another data store. Going on would remove its keys, which this one does not know.
    #[error(
        "{} holds the keys of another data store; see that data_dir is the right one, or, if that store is gone for \
         good, move the key file away to begin with new authorities",
        path.display()
    )]
    OtherStore {
        /// The file.
        path: PathBuf,
    },
    /// The key file could not be read or written.
    #[error("key file could not be read or written")]
    File(#[source] runtime::keyfile::KeyFileError),
    /// The key did not sign.
    #[error("signing failed")]
    Sign,
    /// The worker that makes keys ended before its work was done.
    #[error("key worker was interrupted")]
    Interrupted,
}

impl KeyError {
    /// Whether the same call may succeed later.
    pub fn is_retryable(&self) -> bool {
        match self {
            KeyError::File(error) => error.is_retryable(),
            KeyError::Generate(_) | KeyError::Sign | KeyError::Interrupted => true,
            KeyError::Exists
            | KeyError::Parse(_)
            | KeyError::Unsupported
            | KeyError::Encoding(_)
            | KeyError::Format(_)
            | KeyError::Damaged { .. }
            | KeyError::Stored { .. }
            | KeyError::OtherStore { .. } => false,
        }
    }
}
