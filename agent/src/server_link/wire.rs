//! Messages of the server turned into values of ours.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::{IdError, SpiffeId, TrustDomain};
use spiffe::selector::{Selector, SelectorError, SelectorSet};
use spiffe::x509::{Certificate, X509Error};
use spiffe_proto::types;

use crate::cache::Entry;

/// Why a message of the server cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WireError {
    /// Something that must be there is not.
    #[error("{0} is missing")]
    Missing(&'static str),
    /// A SPIFFE ID or trust domain is none.
    #[error("{what} is malformed")]
    Id {
        /// What it should be.
        what: &'static str,
        /// Why it is not.
        source: IdError,
    },
    /// A selector is none.
    #[error("a selector is malformed")]
    Selector(#[source] SelectorError),
    /// An authority is no certificate.
    #[error("an X.509 authority is no certificate")]
    Authority(#[source] X509Error),
}

/// A time in Unix seconds; none for zero and below.
pub fn time(unix_seconds: i64) -> Option<SystemTime> {
    let seconds = u64::try_from(unix_seconds).ok().filter(|seconds| *seconds > 0)?;
    UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
}

/// A SPIFFE ID.
pub fn id(id: Option<types::Spiffeid>) -> Result<SpiffeId, WireError> {
    let id = id.ok_or(WireError::Missing("a SPIFFE ID"))?;
    let wrong = |source| WireError::Id { what: "a SPIFFE ID", source };
    let trust_domain = TrustDomain::parse_lenient(&id.trust_domain).map_err(wrong)?;
    SpiffeId::from_path(&trust_domain, &id.path).map_err(wrong)
}

/// A trust domain.
pub fn trust_domain(name: &str) -> Result<TrustDomain, WireError> {
    TrustDomain::parse_lenient(name).map_err(|source| WireError::Id { what: "a trust domain", source })
}

/// A registration entry as servers show it to agents.
pub fn entry(entry: types::Entry) -> Result<Entry, WireError> {
    if entry.id.is_empty() {
        return Err(WireError::Missing("an entry id"));
    }
    let selectors: SelectorSet = entry
        .selectors
        .iter()
        .map(|selector| Selector::new(&selector.r#type, &selector.value).map_err(WireError::Selector))
        .collect::<Result<_, _>>()?;
    // Without selectors an entry would match every process.
    if selectors.is_empty() {
        return Err(WireError::Missing("a selector"));
    }
    let attributes = entry.additional_attributes.unwrap_or_default();
    Ok(Entry {
        id: entry.id.into(),
        spiffe_id: id(entry.spiffe_id)?,
        selectors,
        federates_with: entry.federates_with.iter().map(|name| trust_domain(name)).collect::<Result<_, _>>()?,
        admin: entry.admin,
        downstream: entry.downstream,
        revision: entry.revision_number,
        created_at: entry.created_at,
        store_svid: entry.store_svid,
        hint: entry.hint.into(),
        disable_x509_svid_prefetch: attributes.disable_x509_svid_prefetch,
        jwt_svid_include_jti: attributes.jwt_svid_include_jti,
        content: None,
    })
}

/// A trust bundle.
pub fn bundle(bundle: types::Bundle) -> Result<Bundle, WireError> {
    let x509 = bundle
        .x509_authorities
        .into_iter()
        .map(|authority| match Certificate::parse(authority.asn1.clone()) {
            Ok(_) => Ok(X509Authority { der: authority.asn1, tainted: authority.tainted }),
            Err(error) => Err(WireError::Authority(error)),
        })
        .collect::<Result<_, _>>()?;
    let jwt = bundle
        .jwt_authorities
        .into_iter()
        .map(|key| JwtAuthority {
            key_id: Arc::from(key.key_id),
            public_key: key.public_key,
            expires_at: time(key.expires_at),
            tainted: key.tainted,
        })
        .collect();
    Ok(Bundle {
        trust_domain: trust_domain(&bundle.trust_domain)?,
        x509,
        jwt,
        refresh_hint: u64::try_from(bundle.refresh_hint).ok().filter(|hint| *hint > 0).map(Duration::from_secs),
        sequence: bundle.sequence_number,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message() -> types::Entry {
        types::Entry {
            id: "e".into(),
            spiffe_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: "/w".into() }),
            selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1".into() }],
            federates_with: vec!["spiffe://b.org".into()],
            revision_number: 3,
            created_at: 9,
            hint: "h".into(),
            additional_attributes: Some(types::entry::AdditionalAttributes {
                disable_x509_svid_prefetch: true,
                jwt_svid_include_jti: true,
            }),
            ..types::Entry::default()
        }
    }

    #[test]
    fn an_entry_keeps_what_agents_see() {
        let entry = entry(message()).unwrap();
        assert_eq!(entry.spiffe_id.as_str(), "spiffe://example.org/w");
        assert_eq!(entry.federates_with, [TrustDomain::parse("b.org").unwrap()]);
        assert_eq!((entry.revision, entry.created_at, &*entry.hint), (3, 9, "h"));
        assert!(entry.disable_x509_svid_prefetch && entry.jwt_svid_include_jti);
    }

    #[test]
    fn an_entry_that_would_match_everybody_is_refused() {
        let wrong = types::Entry { selectors: Vec::new(), ..message() };
        assert!(matches!(entry(wrong), Err(WireError::Missing("a selector"))));
        let wrong = types::Entry { spiffe_id: None, ..message() };
        assert!(matches!(entry(wrong), Err(WireError::Missing("a SPIFFE ID"))));
    }

    #[test]
    fn a_bundle_with_a_bad_authority_is_refused() {
        let bad = types::X509Certificate { asn1: bytes::Bytes::from_static(b"x"), tainted: false };
        let wrong = types::Bundle {
            trust_domain: "example.org".into(),
            x509_authorities: vec![bad],
            ..types::Bundle::default()
        };
        assert!(matches!(bundle(wrong), Err(WireError::Authority(_))));
    }
}
