//! Bundles of other trust domains: stored, replaced, removed, one proposal or more for each.

use futures_util::future::join_all;
use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use spiffe_proto::bundle as proto;
use spiffe_proto::bundle::batch_delete_federated_bundle_request::Mode;
use spiffe_proto::types;
use tonic::Code;

use super::{BundleService, about};
use crate::api::admission::Admission;
use crate::api::status::{self, Class, Failure};
use crate::api::wire;
use crate::audit::Outcome;
use crate::history::Urgency;
use crate::registry::bundle::{self, Federated, Fields, Refusal, Step};
use crate::state::State;

/// What is to be done with a bundle that a caller sends.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Storing {
    /// Keep it if there is none.
    Create,
    /// Replace fields of the one that is there.
    Update(Fields),
    /// Keep it, whatever is there.
    Set,
}

impl Storing {
    /// What is said if it fails in the store.
    fn operation(self) -> &'static str {
        match self {
            Storing::Create => "unable to create bundle",
            Storing::Update(_) => "failed to update bundle",
            Storing::Set => "failed to set bundle",
        }
    }

    /// What is said of our own trust domain.
    fn not_own(self) -> &'static str {
        match self {
            Storing::Create => "creating a federated bundle for the server's own trust domain is not allowed",
            Storing::Update(_) => "updating a federated bundle for the server's own trust domain is not allowed",
            Storing::Set => "setting a federated bundle for the server's own trust domain is not allowed",
        }
    }

    fn step(self, state: &State, wanted: &Bundle, begun: bool) -> Result<Step, Refusal> {
        match self {
            Storing::Create => bundle::create(state, wanted, begun),
            Storing::Update(fields) => bundle::update(state, wanted, fields),
            Storing::Set => Ok(bundle::set(state, wanted, Fields::ALL)),
        }
    }
}

/// The fields that an update's mask names; all without a mask.
pub(super) fn fields(mask: Option<&types::BundleMask>) -> Fields {
    mask.map_or(Fields::ALL, |mask| Fields {
        x509: mask.x509_authorities,
        jwt: mask.jwt_authorities,
        refresh_hint: mask.refresh_hint,
        sequence: mask.sequence_number,
    })
}

/// How a deletion treats the entries that federate with the bundle.
pub(super) fn mode(number: i32) -> Result<Federated, Failure> {
    match Mode::try_from(number) {
        Ok(Mode::Restrict) => Ok(Federated::Forbid),
        Ok(Mode::Delete) => Ok(Federated::Remove),
        Ok(Mode::Dissociate) => Ok(Federated::Release),
        Err(error) => Err(Failure::invalid("failed to parse deletion mode").because(error)),
    }
}

fn refused(refusal: Refusal) -> Failure {
    match refusal {
        Refusal::Exists => Failure::new(Class::Exists, "bundle already exists"),
        Refusal::Absent => Failure::absent("bundle not found"),
        Refusal::KeyIdTaken { .. } => Failure::invalid("failed to convert bundle").because(refusal),
        Refusal::InUse { .. } => {
            Failure::new(Class::Precondition, "failed to delete federated bundle").because(refusal)
        }
    }
}

impl BundleService {
    /// A foreign trust domain.
    fn foreign(&self, text: &str, not_own: &'static str) -> Result<TrustDomain, Failure> {
        let trust_domain = wire::trust_domain(text)
            .map_err(|error| Failure::invalid("trust domain argument is not valid").because(error))?;
        if trust_domain == self.core.trust_domain { Err(Failure::invalid(not_own)) } else { Ok(trust_domain) }
    }

    /// Stores bundles side by side; one result each, in order.
    pub(super) async fn store_each(
        &self,
        admission: &Admission,
        bundles: &[types::Bundle],
        storing: Storing,
        mask: Option<&types::BundleMask>,
    ) -> Vec<(types::Status, Option<types::Bundle>)> {
        let stored = join_all(bundles.iter().map(|bundle| self.store(bundle, storing, mask))).await;
        let told = bundles.iter().zip(stored).map(|(bundle, stored)| match stored {
            Ok(stored) => {
                self.core.audit.record(admission, Outcome::Success, || about(&bundle.trust_domain));
                (status::ok(), Some(stored))
            }
            Err(failure) => (self.item(admission, &bundle.trust_domain, &failure), None),
        });
        told.collect()
    }

    async fn store(
        &self,
        message: &types::Bundle,
        storing: Storing,
        mask: Option<&types::BundleMask>,
    ) -> Result<types::Bundle, Failure> {
        let trust_domain = self.foreign(&message.trust_domain, storing.not_own())?;
        let wanted =
            wire::bundle_of(message).map_err(|error| Failure::invalid("failed to convert bundle").because(error))?;
        let decide = move |state: &State, begun| storing.step(state, &wanted, begun);
        self.in_steps(Urgency::Normal, storing.operation(), decide, refused).await?;
        let state = self.core.replica.latest();
        let stored = state.bundle(&trust_domain).ok_or_else(|| Failure::absent("bundle not found"))?;
        Ok(wire::bundle(stored, mask))
    }

    /// Removes bundles side by side; one result each, in order.
    pub(super) async fn remove_each(
        &self,
        admission: &Admission,
        trust_domains: Vec<String>,
        federated: Federated,
    ) -> Vec<proto::batch_delete_federated_bundle_response::Result> {
        let removed = join_all(trust_domains.iter().map(|text| self.remove(text, federated))).await;
        let told = trust_domains.into_iter().zip(removed).map(|(trust_domain, removed)| {
            let status = match removed {
                Ok(()) => {
                    self.core.audit.record(admission, Outcome::Success, || about(&trust_domain));
                    status::ok()
                }
                Err(failure) => self.item(admission, &trust_domain, &failure),
            };
            proto::batch_delete_federated_bundle_response::Result { status: Some(status), trust_domain }
        });
        told.collect()
    }

    async fn remove(&self, text: &str, federated: Federated) -> Result<(), Failure> {
        let not_own = "removing the bundle for the server trust domain is not allowed";
        let trust_domain = self.foreign(text, not_own)?;
        let decide = move |state: &State, _| bundle::remove(state, &trust_domain, federated);
        self.in_steps(Urgency::Shrinking, "failed to delete federated bundle", decide, refused).await
    }

    fn item(&self, admission: &Admission, trust_domain: &str, failure: &Failure) -> types::Status {
        let status = failure.item();
        let outcome = Outcome::Failed { code: Code::from_i32(status.code), text: &status.message };
        self.core.audit.record(admission, outcome, || about(trust_domain));
        status
    }
}
