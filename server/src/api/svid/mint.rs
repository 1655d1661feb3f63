//! SVIDs that an administrator asks for by name, without an entry.

use std::collections::HashSet;
use std::sync::Arc;

use spiffe::id::{IdError, SpiffeId};
use spiffe::x509::Csr;
use spiffe_proto::svid as proto;
use spiffe_proto::types;

use super::SvidService;
use crate::api::admission::Admission;
use crate::api::status::Failure;
use crate::api::wire::{self, WireError};
use crate::audit::{Fields, sha256_hex};
use crate::authority::profile::{JwtProfile, WorkloadProfile};
use crate::registry::entry::check_dns_name;

/// A name that another name of the same certificate covers.
#[derive(Debug, PartialEq, thiserror::Error)]
#[error("name \"{name}\" overlaps with an existing wildcard name in the list: wildcard overlap")]
struct WildcardOverlap {
    name: String,
}

impl SvidService {
    /// Signs for the one URI of a certificate request. Its subject and DNS names count here: the caller is trusted
    /// with any identity.
    pub(super) fn mint_x509(
        &self,
        admission: &Admission,
        request: &proto::MintX509svidRequest,
    ) -> Result<types::X509svid, Failure> {
        if request.csr.is_empty() {
            return Err(Failure::invalid("missing CSR"));
        }
        let csr = Csr::parse(&request.csr).map_err(|error| Failure::invalid("malformed CSR").because(error))?;
        csr.verify_signature().map_err(|error| Failure::invalid("failed to verify CSR signature").because(error))?;
        let uri = match csr.uris.as_slice() {
            [] => return Err(Failure::invalid("CSR URI SAN is required")),
            [uri] => uri,
            _ => return Err(Failure::invalid("only one URI SAN is expected")),
        };
        let id = SpiffeId::parse(uri)
            .map_err(|error: IdError| WireError::Id(error))
            .and_then(|id| wire::workload(id, &self.core.trust_domain))
            .map_err(|error| Failure::invalid("CSR URI SAN is invalid").because(error))?;
        for name in &csr.dns_names {
            check_dns_name(name).map_err(|error| Failure::invalid("CSR DNS name is invalid").because(error))?;
        }
        check_overlap(&csr.dns_names).map_err(|error| {
            Failure::invalid("CSR DNS name contains a wildcard that covers another non-wildcard name").because(error)
        })?;
        let operation = "failed to sign X509-SVID";
        let profile = WorkloadProfile {
            id,
            dns_names: csr.dns_names.iter().map(|name| Arc::from(&**name)).collect(),
            ttl: wire::lifetime(request.ttl),
            subject: Some(csr.subject.clone()),
        };
        let now = self.core.now();
        let issued = self
            .issuer(operation)?
            .workload_x509(&profile, csr.public_key(), now)
            .map_err(|error| Failure::of_issue(operation, error))?;
        let receipt = self.core.audit.x509(admission, &issued, || Fields {
            csr_sha256: Some(sha256_hex(&request.csr)),
            dns_names: Some(csr.dns_names.join(",")).filter(|names| !names.is_empty()),
            ttl: Some(request.ttl.into()),
            ..Fields::default()
        });
        Ok(wire::x509_svid(issued.release(&receipt)))
    }

    /// Signs a token for any workload of the trust domain.
    pub(super) fn mint_jwt(
        &self,
        admission: &Admission,
        request: proto::MintJwtsvidRequest,
    ) -> Result<types::Jwtsvid, Failure> {
        self.check_serves_jwt()?;
        let id = wire::workload_id(request.id.as_ref(), &self.core.trust_domain)
            .map_err(|error| Failure::invalid("invalid SPIFFE ID").because(error))?;
        if request.audience.is_empty() {
            return Err(Failure::invalid("at least one audience is required"));
        }
        let operation = "failed to sign JWT-SVID";
        let ttl = wire::lifetime(request.ttl);
        let profile = JwtProfile { id, audience: request.audience, ttl, token_id: None };
        let now = self.core.now();
        let issued = self.issuer(operation)?.jwt(&profile, now).map_err(|error| Failure::of_issue(operation, error))?;
        let receipt = self.core.audit.jwt(admission, &issued, || Fields {
            audience: Some(profile.audience.join(",")),
            ttl: Some(request.ttl.into()),
            ..Fields::default()
        });
        Ok(wire::jwt_svid(issued.release(&receipt), ""))
    }
}

/// A wildcard beside a name that it covers is refused: somebody meant one of the two.
fn check_overlap(names: &[String]) -> Result<(), WildcardOverlap> {
    let known: HashSet<&str> = names.iter().map(String::as_str).collect();
    for name in names.iter().filter(|name| !name.starts_with('*')) {
        let covering = match name.split_once('.') {
            Some((_, parent)) => format!("*.{parent}"),
            None => "*".to_owned(),
        };
        if known.contains(covering.as_str()) {
            return Err(WildcardOverlap { name: name.clone() });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wildcard_covers_one_label() {
        let check = |names: &[&str]| check_overlap(&names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>());
        assert_eq!(check(&["*.b.c", "a.b.c"]), Err(WildcardOverlap { name: "a.b.c".to_owned() }));
        assert_eq!(check(&["*.b.c", "x.a.b.c", "b.c", "a.b.c.d", "a.b.c.d"]), Ok(()));
        assert_eq!(check(&[]), Ok(()));
    }
}
