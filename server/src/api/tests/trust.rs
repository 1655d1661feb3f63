//! Who was verified by a root that is no longer believed.

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair, KeyUsagePurpose, SanType};
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::bundle::*;
use spiffe_proto::entry::*;
use transport::serve::Reason as EndReason;

use super::*;
use crate::state::model::{Change as StateChange, Part as StatePart, certificate_hash};

const DISTRUSTED: &str = "the certificate of this connection is no longer trusted; connect again";

/// An authority of another trust domain.
struct Foreign {
    issuer: CertifiedIssuer<'static, KeyPair>,
}

impl Foreign {
    fn new() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        parameters.subject_alt_names = vec![SanType::URI("spiffe://other.test".try_into().unwrap())];
        Self { issuer: CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap() }
    }

    fn root(&self) -> types::X509Certificate {
        types::X509Certificate { asn1: Bytes::copy_from_slice(self.issuer.der()), tainted: false }
    }

    fn admin(&self) -> Vec<Bytes> {
        let key = KeyPair::generate().unwrap();
        let mut parameters = CertificateParams::default();
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.subject_alt_names = vec![SanType::URI("spiffe://other.test/admin".try_into().unwrap())];
        vec![Bytes::copy_from_slice(parameters.signed_by(&key, &self.issuer).unwrap().der())]
    }
}

impl Server {
    async fn set_foreign(&self, roots: &[&Foreign]) {
        let x509_authorities = roots.iter().map(|foreign| foreign.root()).collect();
        let bundle = types::Bundle { trust_domain: "other.test".into(), x509_authorities, ..types::Bundle::default() };
        let request = BatchSetFederatedBundleRequest { bundle: vec![bundle], output_mask: None };
        let set = BundleClient::new(self.local()).batch_set_federated_bundle(request).await.unwrap().into_inner();
        assert_eq!(set.results[0].status.as_ref().unwrap().message, "OK");
    }
}

async fn count(connection: &Connection) -> Result<i32, Status> {
    let answer = EntryClient::new(connection.clone()).count_entries(CountEntriesRequest::default()).await?;
    Ok(answer.into_inner().count)
}

#[tokio::test(start_paused = true)]
async fn a_foreign_admin_has_no_authority_without_its_bundle_or_its_root() {
    let server = Server::start().await;
    let (old, new) = (Foreign::new(), Foreign::new());
    let other = TrustDomain::parse("other.test").unwrap();

    server.set_foreign(&[&old]).await;
    let deleted = server.with_chain_of(&other, &old.admin());
    assert_eq!(count(&deleted).await.unwrap(), 0);
    let request = BatchDeleteFederatedBundleRequest { trust_domains: vec!["other.test".into()], mode: 0 };
    BundleClient::new(server.local()).batch_delete_federated_bundle(request).await.unwrap();
    assert_eq!(deleted.ending.reason(), None);
    assert_refused(count(&deleted).await, Code::Unavailable, DISTRUSTED);
    assert_eq!(deleted.ending.reason(), Some(EndReason::Distrusted));

    server.set_foreign(&[&old]).await;
    let rotated = server.with_chain_of(&other, &old.admin());
    server.set_foreign(&[&new, &old]).await;
    assert_eq!(count(&rotated).await.unwrap(), 0);
    let fresh = server.with_chain_of(&other, &new.admin());
    server.set_foreign(&[&new]).await;
    assert_refused(count(&rotated).await, Code::Unavailable, DISTRUSTED);
    assert_eq!((count(&fresh).await.unwrap(), fresh.ending.reason()), (0, None));
}

#[tokio::test(start_paused = true)]
async fn a_revoked_root_ends_the_streams_and_calls_of_those_it_verified() {
    let server = Server::start().await;
    let (connection, id) = server.agent().await;
    let names = (0..501).map(|number| format!("w{number}"));
    server.entries(&id, names.take(500)).await;
    server.entries(&id, ["last".to_owned()]).await;
    let (says, requests) = tokio::sync::mpsc::channel(1);
    says.send(SyncAuthorizedEntriesRequest::default()).await.unwrap();
    let requests = tokio_stream::wrappers::ReceiverStream::new(requests);
    let answers = EntryClient::new(connection.clone()).sync_authorized_entries(requests).await;
    let mut answers = answers.unwrap().into_inner();
    for (count, more) in [(500, true), (1, false)] {
        let page = answers.message().await.unwrap().unwrap();
        assert_eq!((page.entry_revisions.len(), page.more), (count, more));
    }

    let root = server.history.replica().latest().bundle(&trust_domain()).unwrap().x509[0].der.clone();
    let sha256 = certificate_hash(&root);
    let revoked = StateChange::RemoveX509Authority { trust_domain: trust_domain(), sha256 };
    server.history.commit(StatePart::new(vec![revoked])).await;
    assert_refused(answers.message().await, Code::Unavailable, DISTRUSTED);
    assert_eq!(connection.ending.reason(), Some(EndReason::Distrusted));
    let call = EntryClient::new(connection).get_authorized_entries(GetAuthorizedEntriesRequest::default()).await;
    assert_refused(call, Code::Unavailable, DISTRUSTED);
}
