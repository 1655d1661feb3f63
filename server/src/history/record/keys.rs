//! The keys of records, there and back.

use std::sync::Arc;

use bytes::Bytes;
use spiffe::id::TrustDomain;

use super::{RecordError, messages};
use crate::history::group::{Kind, RecordKey};
use crate::state::model::{AuthorityKind, KeyOwner, Scope};

pub(super) fn key(scope: &Scope, kind: Kind, id: impl Into<Bytes>) -> RecordKey {
    RecordKey { scope: scope.clone(), kind, id: id.into() }
}

pub(super) fn ordinal_key(scope: &Scope, kind: Kind, ordinal: u64) -> RecordKey {
    key(scope, kind, Bytes::copy_from_slice(&ordinal.to_be_bytes()))
}

/// A trust domain's name holds no zero byte, so this is unambiguous and sorts by trust domain.
pub(super) fn authority_key(scope: &Scope, kind: Kind, trust_domain: &TrustDomain, id: &[u8]) -> RecordKey {
    key(scope, kind, [trust_domain.as_str().as_bytes(), &[0], id].concat())
}

pub(super) fn slot_key(scope: &Scope, owner: KeyOwner, kind: AuthorityKind, authority_id: &str) -> RecordKey {
    let mut id = match owner {
        KeyOwner::Shared => vec![0],
        KeyOwner::Server(server) => [&[1], server.as_slice()].concat(),
    };
    id.push(messages::authority_kind_number(kind));
    id.extend_from_slice(authority_id.as_bytes());
    key(scope, Kind::Slot, id)
}

pub(super) fn ordinal_of(key: &RecordKey) -> Result<u64, RecordError> {
    key.id.as_ref().try_into().map(u64::from_be_bytes).map_err(|_| RecordError::Key)
}

pub(super) fn slot_of(key: &RecordKey) -> Result<(KeyOwner, AuthorityKind, Arc<str>), RecordError> {
    let (owner, rest) = match key.id.split_first() {
        Some((0, rest)) => (KeyOwner::Shared, rest),
        Some((1, rest)) => {
            let (server, rest) = rest.split_first_chunk::<16>().ok_or(RecordError::Key)?;
            (KeyOwner::Server(*server), rest)
        }
        _ => return Err(RecordError::Key),
    };
    let (kind, id) = rest.split_first().ok_or(RecordError::Key)?;
    let kind = messages::authority_kind(*kind)?;
    Ok((owner, kind, Arc::from(std::str::from_utf8(id).map_err(|_| RecordError::Key)?)))
}
