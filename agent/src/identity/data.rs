//! What survives a restart: `agent-data.json`, in SPIRE's format.
//!
//! Certificates are base64 of their PEM form; of the bundle only the X.509 authorities are kept. Nothing about
//! workloads is in it.

use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use runtime::keyfile::{self, KeyFileError};
use serde::{Deserialize, Serialize};

const FILE: &str = "agent-data.json";
const LABEL: &str = "CERTIFICATE";
/// What Go writes for a time that was never set.
const NO_TIME: &str = "0001-01-01T00:00:00Z";

/// Why the agent's data could not be read or written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The data directory cannot be made.
    #[error("could not make the data directory {}", directory.display())]
    Directory {
        /// The directory.
        directory: PathBuf,
        /// What the system says.
        source: std::io::Error,
    },
    /// The file cannot be read or written.
    #[error("could not use the agent's data file")]
    File(#[source] KeyFileError),
    /// The file does not hold what it should.
    #[error("the agent's data file {} is malformed; move it away to attest anew", path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: serde_json::Error,
    },
    /// The file holds something else than certificates.
    #[error("the agent's data file {} holds what is no certificate; move it away to attest anew", path.display())]
    Certificate {
        /// The file.
        path: PathBuf,
    },
    /// The work was cut off by the end of the process.
    #[error("the agent's data was not written")]
    Interrupted,
}

/// What an agent remembers of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AgentData {
    /// Its SVID, DER, leaf first; empty without one.
    pub svid: Vec<Bytes>,
    /// Whether it may attest again.
    pub reattestable: bool,
    /// The X.509 authorities of its own trust domain, DER; empty without a bundle.
    pub bundle: Vec<Bytes>,
}

#[derive(Serialize, Deserialize)]
struct Document {
    svid: Option<Vec<String>>,
    bundle: Option<Vec<String>>,
    #[serde(default)]
    reattestable: bool,
    #[serde(default)]
    bootstrap_use: i64,
    #[serde(default = "no_time")]
    bootstrap_start_time: String,
    #[serde(default)]
    connection_attempts: i64,
}

fn no_time() -> String {
    NO_TIME.to_owned()
}

/// The file.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
}

impl DataFile {
    /// The file in `directory`, which is made if it is not there.
    pub fn open(directory: &Path) -> Result<Self, DataError> {
        let file = Self { path: directory.join(FILE) };
        file.prepare()?;
        Ok(file)
    }

    fn prepare(&self) -> Result<(), DataError> {
        let Some(directory) = self.path.parent() else { return Ok(()) };
        keyfile::make_directory(directory)
            .map_err(|source| DataError::Directory { directory: directory.to_owned(), source })
    }

    /// Whether it is there. What cannot be looked at counts as not there.
    pub fn exists(&self) -> bool {
        self.path.try_exists().unwrap_or(false)
    }

    /// What it holds; nothing if it is not there.
    pub fn load(&self) -> Result<AgentData, DataError> {
        let Some(text) = keyfile::read(&self.path).map_err(DataError::File)? else { return Ok(AgentData::default()) };
        let document: Document = spiffe::from_object(&text, "{\"svid\": […], …}")
            .map_err(|source| DataError::Format { path: self.path.clone(), source })?;
        let certificates = |list: Option<Vec<String>>| {
            list.unwrap_or_default()
                .iter()
                .map(|text| certificate(text))
                .collect::<Option<Vec<_>>>()
                .ok_or_else(|| DataError::Certificate { path: self.path.clone() })
        };
        Ok(AgentData {
            svid: certificates(document.svid)?,
            bundle: certificates(document.bundle)?,
            reattestable: document.reattestable,
        })
    }

    /// Replaces what it holds. When this returns, the new content survives a crash of the machine; before, the old one.
    ///
    /// The directory is made anew if somebody has removed it.
    pub fn store(&self, data: &AgentData) -> Result<(), DataError> {
        self.prepare()?;
        let line_feeds = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
        let texts = |certificates: &[Bytes]| {
            Some(
                certificates
                    .iter()
                    .map(|der| STANDARD.encode(pem::encode_config(&pem::Pem::new(LABEL, der.to_vec()), line_feeds)))
                    .collect(),
            )
        };
        let document = Document {
            svid: texts(&data.svid),
            bundle: texts(&data.bundle),
            reattestable: data.reattestable,
            bootstrap_use: 0,
            bootstrap_start_time: no_time(),
            connection_attempts: 0,
        };
        let text =
            serde_json::to_vec(&document).map_err(|source| DataError::Format { path: self.path.clone(), source })?;
        keyfile::write(&self.path, &text).map_err(DataError::File)
    }
}

fn certificate(text: &str) -> Option<Bytes> {
    let block = pem::parse(STANDARD.decode(text).ok()?).ok()?;
    (block.tag() == LABEL).then(|| Bytes::from(block.into_contents()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> (tempfile::TempDir, DataFile) {
        let dir = tempfile::tempdir().unwrap();
        let file = DataFile::open(&dir.path().join("data")).unwrap();
        (dir, file)
    }

    #[test]
    fn what_was_stored_is_loaded() {
        let (_dir, file) = file();
        assert_eq!(file.load().unwrap(), AgentData::default());
        let data = AgentData {
            svid: vec![Bytes::from_static(b"leaf"), Bytes::from_static(b"intermediate")],
            reattestable: true,
            bundle: vec![Bytes::from_static(b"root")],
        };
        file.store(&data).unwrap();
        assert_eq!(file.load().unwrap(), data);
        file.store(&AgentData { svid: Vec::new(), ..data.clone() }).unwrap();
        assert_eq!(file.load().unwrap(), AgentData { svid: Vec::new(), ..data.clone() });
        std::fs::remove_dir_all(file.path.parent().unwrap()).unwrap();
        file.store(&data).unwrap();
        assert_eq!(file.load().unwrap(), data);
    }

    #[test]
    fn the_format_is_spires() {
        let (_dir, file) = file();
        let pem = pem::encode(&pem::Pem::new("CERTIFICATE", b"der".to_vec()));
        let text = serde_json::json!({
            "svid": [STANDARD.encode(&pem)], "bundle": null, "reattestable": true,
            "bootstrap_use": 0, "bootstrap_start_time": "0001-01-01T00:00:00Z", "connection_attempts": 0,
        });
        keyfile::write(&file.path, text.to_string().as_bytes()).unwrap();
        let data = AgentData { svid: vec![Bytes::from_static(b"der")], reattestable: true, bundle: Vec::new() };
        assert_eq!(file.load().unwrap(), data);
    }

    #[test]
    fn damage_is_an_error_not_a_new_agent() {
        let (_dir, file) = file();
        keyfile::write(&file.path, b"{").unwrap();
        assert!(matches!(file.load(), Err(DataError::Format { .. })));
        keyfile::write(&file.path, br#"{"svid":["AAAA"],"bundle":[]}"#).unwrap();
        assert!(matches!(file.load(), Err(DataError::Certificate { .. })));
    }
}
