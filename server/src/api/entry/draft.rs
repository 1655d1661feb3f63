//! Entries as registrars send them.

use std::sync::Arc;

use spiffe::id::TrustDomain;
use spiffe_proto::types;

use crate::api::status::{Class, Failure};
use crate::api::wire::{self, WireError};
use crate::registry::entry::{Attributes, Draft, EntryError, NewEntry, Refusal, Stage, Update};

/// Why a message is not a draft of an entry.
#[derive(Debug, thiserror::Error)]
pub(super) enum DraftError {
    #[error("invalid parent ID")]
    ParentId(#[source] WireError),
    #[error("invalid spiffe ID")]
    SpiffeId(#[source] WireError),
    #[error("invalid federated trust domain")]
    FederatesWith(#[source] WireError),
    #[error(transparent)]
    Selector(#[from] WireError),
}

const ALL: types::EntryMask = types::EntryMask {
    spiffe_id: true,
    parent_id: true,
    selectors: true,
    x509_svid_ttl: true,
    federates_with: true,
    admin: true,
    downstream: true,
    expires_at: true,
    dns_names: true,
    revision_number: true,
    store_svid: true,
    jwt_svid_ttl: true,
    hint: true,
    created_at: true,
    additional_attributes: true,
};

/// The fields of `message` that `mask` names, or all of them.
fn draft(message: types::Entry, mask: Option<&types::EntryMask>, own: &TrustDomain) -> Result<Draft, DraftError> {
    let mask = mask.unwrap_or(&ALL);
    let parent_id = mask
        .parent_id
        .then(|| wire::member_id(message.parent_id.as_ref(), own).map_err(DraftError::ParentId))
        .transpose()?;
    let spiffe_id = mask
        .spiffe_id
        .then(|| wire::workload_id(message.spiffe_id.as_ref(), own).map_err(DraftError::SpiffeId))
        .transpose()?;
    let federates_with = mask
        .federates_with
        .then(|| message.federates_with.iter().map(|text| wire::trust_domain(text)).collect::<Result<Vec<_>, _>>())
        .transpose()
        .map_err(DraftError::FederatesWith)?;
    let selectors = mask
        .selectors
        .then(|| message.selectors.iter().map(wire::selector).collect::<Result<Vec<_>, _>>())
        .transpose()?;
    let attributes = mask.additional_attributes.then(|| {
        let given = message.additional_attributes.unwrap_or_default();
        Attributes {
            disable_x509_svid_prefetch: given.disable_x509_svid_prefetch,
            jwt_svid_include_jti: given.jwt_svid_include_jti,
        }
    });
    Ok(Draft {
        spiffe_id,
        parent_id,
        selectors,
        x509_svid_ttl: mask.x509_svid_ttl.then_some(message.x509_svid_ttl),
        jwt_svid_ttl: mask.jwt_svid_ttl.then_some(message.jwt_svid_ttl),
        federates_with,
        admin: mask.admin.then_some(message.admin),
        downstream: mask.downstream.then_some(message.downstream),
        expires_at: mask.expires_at.then_some(message.expires_at),
        dns_names: mask.dns_names.then_some(message.dns_names),
        store_svid: mask.store_svid.then_some(message.store_svid),
        hint: mask.hint.then_some(message.hint),
        attributes,
    })
}

fn broken(error: EntryError, writing: &'static str) -> Failure {
    let operation = match error.stage() {
        Stage::Reading => "failed to convert entry",
        Stage::Writing => writing,
    };
    Failure::invalid(operation).because(error)
}

fn update(
    message: types::Entry,
    mask: Option<&types::EntryMask>,
    own: &TrustDomain,
    writing: &'static str,
) -> Result<Update, Failure> {
    let draft =
        draft(message, mask, own).map_err(|error| Failure::invalid("failed to convert entry").because(error))?;
    draft.check(own).map_err(|error| broken(error, writing))
}

/// A new entry; `fresh` is its id if the registrar gives none.
///
/// # Errors
/// If a field is missing, malformed, or breaks a rule of registration.
pub fn new_entry(
    mut message: types::Entry,
    own: &TrustDomain,
    fresh: impl FnOnce() -> String,
) -> Result<NewEntry, Failure> {
    let writing = "failed to create entry";
    let given = std::mem::take(&mut message.id);
    let id = if given.is_empty() { fresh() } else { given };
    let update = update(message, None, own, writing)?;
    NewEntry::new(Arc::from(id), update).map_err(|error| broken(error, writing))
}

/// What is to be changed of the entry with the message's id.
pub(super) fn changes(
    message: types::Entry,
    mask: Option<&types::EntryMask>,
    own: &TrustDomain,
) -> Result<Update, Failure> {
    update(message, mask, own, "failed to update entry")
}

/// What a registrar is told whose entry was refused.
pub(super) fn refused(operation: &'static str, refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Similar(_) => Failure::new(Class::Exists, "similar entry already exists"),
        Refusal::IdTaken => Failure::new(Class::Exists, operation).because(refusal),
        Refusal::NotFound => Failure::absent(operation),
        Refusal::NoBundle(_) => Failure::internal(operation).because(refusal),
        Refusal::Rule(error) => Failure::invalid(operation).because(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn own() -> TrustDomain {
        TrustDomain::parse("example.org").unwrap()
    }

    fn id(path: &str) -> Option<types::Spiffeid> {
        Some(types::Spiffeid { trust_domain: "example.org".into(), path: path.into() })
    }

    fn message() -> types::Entry {
        types::Entry {
            spiffe_id: id("/a"),
            parent_id: id("/spire/agent/x"),
            selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1".into() }],
            ..types::Entry::default()
        }
    }

    #[test]
    fn mistakes_are_told_in_the_words_that_tools_know() {
        let told = |change: fn(&mut types::Entry)| {
            let mut message = message();
            change(&mut message);
            let failure = new_entry(message, &own(), || "fresh".to_owned()).unwrap_err();
            assert_eq!(failure.item().code, tonic::Code::InvalidArgument as i32);
            failure.text()
        };
        assert_eq!(
            told(|entry| entry.parent_id = None),
            "failed to convert entry: invalid parent ID: request must specify SPIFFE ID"
        );
        assert_eq!(
            told(|entry| entry.spiffe_id = id("/spire/agent/a")),
            "failed to convert entry: invalid spiffe ID: \"spiffe://example.org/spire/agent/a\" is not a workload in \
             trust domain \"example.org\"; path is in the reserved namespace"
        );
        assert_eq!(told(|entry| entry.selectors.clear()), "failed to convert entry: selector list is empty");
        assert_eq!(told(|entry| entry.selectors[0].value.clear()), "failed to convert entry: missing selector value");
        assert_eq!(
            told(|entry| entry.x509_svid_ttl = -1),
            "failed to create entry: invalid registration entry: X509SvidTtl is not set"
        );
        assert_eq!(
            told(|entry| entry.dns_names = vec!["*".into()]),
            "failed to convert entry: invalid DNS name: wildcard must be first label"
        );
    }

    #[test]
    fn a_mask_leaves_fields_as_they_are() {
        let masked = |mask| draft(message(), Some(&mask), &own()).unwrap();
        assert_eq!(masked(types::EntryMask::default()), Draft::default());
        let only = masked(types::EntryMask { admin: true, ..types::EntryMask::default() });
        assert_eq!(only, Draft { admin: Some(false), ..Draft::default() });
    }

    #[test]
    fn an_id_that_is_given_is_kept() {
        let entry = new_entry(types::Entry { id: "mine".into(), ..message() }, &own(), || unreachable!()).unwrap();
        assert_eq!(&**entry.id(), "mine");
        let entry = new_entry(message(), &own(), || "fresh".to_owned()).unwrap();
        assert_eq!(&**entry.id(), "fresh");
    }
}
