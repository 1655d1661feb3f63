//! The written form of a [`Note`].

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::disk::{hex, name};
use super::{FileError, Note, NotedAuthority};

/// More authorities than a key set ever has.
const MOST: usize = 1000;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct WrittenNote {
    history: String,
    revision: u64,
    digest: String,
    authorities: Vec<WrittenAuthority>,
}

/// Times in seconds since 1970, bytes in base64.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenAuthority {
    id: String,
    key: String,
    issued_at: u64,
    not_after: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    certificate: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    upstream_chain: Vec<String>,
    public_key: String,
    #[serde(default)]
    tainted: bool,
}

fn bytes(field: &'static str, text: &str) -> Result<Bytes, FileError> {
    STANDARD.decode(text).map(Bytes::from).map_err(|_| FileError::Note { field })
}

fn time(field: &'static str, seconds: u64) -> Result<SystemTime, FileError> {
    SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds)).ok_or(FileError::Note { field })
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

impl WrittenNote {
    pub(super) fn of(note: &Note) -> Self {
        let authority = |one: &NotedAuthority| WrittenAuthority {
            id: one.authority_id.to_string(),
            key: one.key_id.to_string(),
            issued_at: seconds(one.issued_at),
            not_after: seconds(one.not_after),
            certificate: one.certificate.as_ref().map(|der| STANDARD.encode(der)),
            upstream_chain: one.upstream_chain.iter().map(|der| STANDARD.encode(der)).collect(),
            public_key: STANDARD.encode(&one.public_key),
            tainted: one.tainted,
        };
        Self {
            history: hex(note.history),
            revision: note.revision,
            digest: STANDARD.encode(note.digest),
            authorities: note.authorities.iter().map(authority).collect(),
        }
    }

    pub(super) fn read(&self) -> Result<Note, FileError> {
        if self.authorities.len() > MOST {
            return Err(FileError::Note { field: "authorities" });
        }
        let authority = |one: &WrittenAuthority| {
            Ok(NotedAuthority {
                authority_id: Arc::from(one.id.as_str()),
                key_id: Arc::from(one.key.as_str()),
                issued_at: time("issued_at", one.issued_at)?,
                not_after: time("not_after", one.not_after)?,
                certificate: one.certificate.as_ref().map(|text| bytes("certificate", text)).transpose()?,
                upstream_chain: one
                    .upstream_chain
                    .iter()
                    .map(|text| bytes("upstream_chain", text))
                    .collect::<Result<_, _>>()?,
                public_key: bytes("public_key", &one.public_key)?,
                tainted: one.tainted,
            })
        };
        Ok(Note {
            history: name("history", Some(&self.history))?.ok_or(FileError::Note { field: "history" })?,
            revision: self.revision,
            digest: bytes("digest", &self.digest)?
                .as_ref()
                .try_into()
                .map_err(|_| FileError::Note { field: "digest" })?,
            authorities: self.authorities.iter().map(authority).collect::<Result<_, FileError>>()?,
        })
    }
}
