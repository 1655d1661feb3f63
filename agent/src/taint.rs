//! Recognising what a distrusted authority has signed.

use std::collections::HashSet;

use bytes::Bytes;
use spiffe::bundle::Bundle;
use spiffe::x509::Certificate;

/// The subject key ids of the tainted certificate authorities of a bundle.
pub(crate) fn authorities(bundle: &Bundle) -> HashSet<Bytes> {
    bundle
        .x509
        .iter()
        .filter(|authority| authority.tainted)
        .filter_map(|authority| Certificate::parse(authority.der.clone()).ok()?.subject_key_id)
        .collect()
}

/// The key id of the authority that signed the last certificate of a chain.
pub(crate) fn authority_of(chain: &[Bytes]) -> Option<Bytes> {
    // A copy: a slice would keep the whole certificate in memory.
    let key_id = Certificate::parse(chain.last()?.clone()).ok()?.authority_key_id?;
    Some(Bytes::copy_from_slice(&key_id))
}
