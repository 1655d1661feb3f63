use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::bundle::*;

use super::*;

/// The server's own bundle under another name: real certificates and keys.
async fn foreign(server: &Server, name: &str) -> types::Bundle {
    let own = BundleClient::new(server.anonymous()).get_bundle(GetBundleRequest::default()).await.unwrap();
    types::Bundle { trust_domain: name.to_owned(), sequence_number: 42, refresh_hint: 60, ..own.into_inner() }
}

fn codes<'a>(statuses: impl IntoIterator<Item = &'a Option<types::Status>>) -> Vec<(i32, String)> {
    statuses.into_iter().map(|status| status.clone().map(|status| (status.code, status.message)).unwrap()).collect()
}

#[tokio::test(start_paused = true)]
async fn everybody_reads_our_bundle_masked_as_asked() {
    let server = Server::start().await;
    let mut client = BundleClient::new(server.anonymous());
    let bundle = client.get_bundle(GetBundleRequest::default()).await.unwrap().into_inner();
    assert_eq!((bundle.trust_domain.as_str(), bundle.x509_authorities.len()), ("example.org", 1));
    assert_eq!((bundle.jwt_authorities.len(), bundle.sequence_number), (1, 2));
    let output_mask = Some(types::BundleMask { jwt_authorities: true, ..types::BundleMask::default() });
    let masked = client.get_bundle(GetBundleRequest { output_mask }).await.unwrap().into_inner();
    assert_eq!((masked.x509_authorities.len(), masked.jwt_authorities.len(), masked.sequence_number), (0, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn federated_bundles_are_made_replaced_listed_and_read_by_agents() {
    let server = Server::start().await;
    let other = foreign(&server, "other.test").await;
    let mut local = BundleClient::new(server.local());
    let bundle = vec![other.clone(), other.clone(), foreign(&server, "example.org").await, foreign(&server, "").await];
    let made = local.batch_create_federated_bundle(BatchCreateFederatedBundleRequest { bundle, output_mask: None });
    let made = made.await.unwrap().into_inner().results;
    assert_eq!(
        codes(made.iter().map(|result| &result.status)),
        [
            (0, "OK".to_owned()),
            (6, "bundle already exists".to_owned()),
            (3, "creating a federated bundle for the server's own trust domain is not allowed".to_owned()),
            (3, "trust domain argument is not valid: trust domain is malformed: trust domain is missing".to_owned()),
        ]
    );
    assert_eq!(made[0].bundle.as_ref(), Some(&other));

    let changed = types::Bundle { jwt_authorities: Vec::new(), sequence_number: 43, ..other.clone() };
    let input_mask = Some(types::BundleMask { sequence_number: true, ..types::BundleMask::default() });
    let absent = types::Bundle { trust_domain: "third.test".into(), ..changed.clone() };
    let request =
        BatchUpdateFederatedBundleRequest { bundle: vec![changed.clone(), absent], input_mask, output_mask: None };
    let updated = local.batch_update_federated_bundle(request).await.unwrap().into_inner().results;
    assert_eq!(updated[0].bundle, Some(types::Bundle { sequence_number: 43, ..other.clone() }));
    assert_eq!(codes([&updated[1].status]), [(5, "bundle not found".to_owned())]);

    let request = BatchSetFederatedBundleRequest { bundle: vec![changed.clone()], output_mask: None };
    let set = local.batch_set_federated_bundle(request).await.unwrap().into_inner().results;
    assert_eq!(set[0].bundle, Some(changed.clone()));

    let listed = local.list_federated_bundles(ListFederatedBundlesRequest::default()).await.unwrap().into_inner();
    assert_eq!((listed.bundles, listed.next_page_token), (vec![changed.clone()], String::new()));
    assert_eq!(local.count_bundles(CountBundlesRequest {}).await.unwrap().into_inner().count, 2);
    let (agent, _) = server.agent().await;
    let mut agent = BundleClient::new(agent);
    let ask = |name: &str| GetFederatedBundleRequest { trust_domain: name.into(), output_mask: None };
    let got = agent.get_federated_bundle(ask("spiffe://other.test")).await.unwrap().into_inner();
    assert_eq!(got, changed);
    assert_refused(agent.get_federated_bundle(ask("third.test")).await, Code::NotFound, "bundle not found");
    let text = "getting a federated bundle for the server's own trust domain is not allowed";
    assert_refused(agent.get_federated_bundle(ask("example.org")).await, Code::InvalidArgument, text);
}

#[tokio::test(start_paused = true)]
async fn a_bundle_in_use_is_removed_only_as_the_mode_says() {
    let server = Server::start().await;
    let set = async |name: &str| {
        let bundle = vec![foreign(&server, name).await];
        let request = BatchSetFederatedBundleRequest { bundle, output_mask: None };
        BundleClient::new(server.local()).batch_set_federated_bundle(request).await.unwrap();
    };
    let remove = async |name: &str, mode| {
        let request = BatchDeleteFederatedBundleRequest { trust_domains: vec![name.to_owned()], mode };
        let answer = BundleClient::new(server.local()).batch_delete_federated_bundle(request).await?;
        Ok::<_, Status>(codes(answer.into_inner().results.iter().map(|result| &result.status)))
    };
    let parent = SpiffeId::parse("spiffe://example.org/spire/agent/x").unwrap();
    set("other.test").await;
    let message = types::Entry { federates_with: vec!["other.test".into()], ..entry(&parent, "a") };
    let request = spiffe_proto::entry::BatchCreateEntryRequest { entries: vec![message], output_mask: None };
    EntryClient::new(server.local()).batch_create_entry(request).await.unwrap();
    let text = "failed to delete federated bundle: cannot delete bundle; federated with 1 registration entries";
    assert_eq!(remove("other.test", 0).await.unwrap(), [(9, text.to_owned())]);
    assert_eq!(remove("other.test", 2).await.unwrap(), [(0, "OK".to_owned())]);
    let state = server.history.replica().latest();
    let held = state.entries().next().unwrap();
    assert_eq!((held.federates_with.len(), held.revision, state.bundles().count()), (0, 1, 1));
    assert_eq!(remove("other.test", 1).await.unwrap(), [(5, "bundle not found".to_owned())]);
    let text = "removing the bundle for the server trust domain is not allowed";
    assert_eq!(remove("example.org", 1).await.unwrap(), [(3, text.to_owned())]);
    assert_eq!(remove("other.test", 9).await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(start_paused = true)]
async fn appending_bumps_the_sequence_only_for_what_is_new() {
    let server = Server::start().await;
    let own = foreign(&server, "example.org").await;
    let mut local = BundleClient::new(server.local());
    let none = local.append_bundle(AppendBundleRequest::default()).await;
    assert_refused(none, Code::InvalidArgument, "no authorities to append");
    let request = AppendBundleRequest { x509_authorities: own.x509_authorities.clone(), ..Default::default() };
    assert_eq!(local.append_bundle(request).await.unwrap().into_inner().sequence_number, 2);
    let key = types::JwtKey { key_id: "mine".into(), ..own.jwt_authorities[0].clone() };
    let request = AppendBundleRequest { jwt_authorities: vec![key], ..Default::default() };
    let bundle = local.append_bundle(request).await.unwrap().into_inner();
    assert_eq!((bundle.jwt_authorities.len(), bundle.sequence_number), (2, 3));
    let junk = types::X509Certificate { asn1: Bytes::from_static(b"junk"), tainted: false };
    let request = AppendBundleRequest { x509_authorities: vec![junk], ..Default::default() };
    let status = local.append_bundle(request).await.unwrap_err();
    assert_eq!(status.code(), Code::InvalidArgument);
    assert!(status.message().starts_with("failed to convert X.509 authority: unable to parse X.509 authority: "));
}

/// A bundle of so many authorities of each kind, all different.
async fn large(server: &Server, name: &str, each: usize) -> types::Bundle {
    let bundle = foreign(server, name).await;
    let certificate = |_| {
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = parameters.self_signed(&key).unwrap();
        types::X509Certificate { asn1: Bytes::copy_from_slice(certificate.der()), tainted: false }
    };
    let key = |n: usize| types::JwtKey { key_id: format!("key-{n}"), ..bundle.jwt_authorities[0].clone() };
    types::Bundle {
        x509_authorities: (0..each).map(certificate).collect(),
        jwt_authorities: (0..each).map(key).collect(),
        ..bundle
    }
}

#[tokio::test(start_paused = true)]
async fn a_bundle_of_500_keys_and_5000_entries_is_removed_in_every_mode() {
    let server = Server::start().await;
    let other = large(&server, "other.test", 250).await;
    let set = async || {
        let request = BatchSetFederatedBundleRequest { bundle: vec![other.clone()], output_mask: None };
        let set = BundleClient::new(server.local()).batch_set_federated_bundle(request).await.unwrap().into_inner();
        assert_eq!(codes(set.results.iter().map(|result| &result.status)), [(0, "OK".to_owned())]);
    };
    let remove = async |mode| {
        let request = BatchDeleteFederatedBundleRequest { trust_domains: vec!["other.test".to_owned()], mode };
        let answer = BundleClient::new(server.local()).batch_delete_federated_bundle(request).await.unwrap();
        codes(answer.into_inner().results.iter().map(|result| &result.status))
    };
    let parent = SpiffeId::parse("spiffe://example.org/spire/agent/x").unwrap();
    let create = async || {
        for batch in 0..10 {
            let one = |n| types::Entry {
                federates_with: vec!["other.test".into()],
                ..entry(&parent, &format!("w{batch}-{n}"))
            };
            let entries = (0..500).map(one).collect();
            let request = spiffe_proto::entry::BatchCreateEntryRequest { entries, output_mask: None };
            EntryClient::new(server.local()).batch_create_entry(request).await.unwrap();
        }
    };
    let held = || {
        let state = server.history.replica().latest();
        (state.bundles().count(), state.entry_count())
    };
    set().await;
    assert_eq!(remove(0).await, [(0, "OK".to_owned())]);
    assert_eq!(held(), (1, 0));
    set().await;
    create().await;
    assert_eq!(held(), (2, 5000));
    let text = "failed to delete federated bundle: cannot delete bundle; federated with 5000 registration entries";
    assert_eq!(remove(0).await, [(9, text.to_owned())]);
    assert_eq!(remove(2).await, [(0, "OK".to_owned())]);
    assert_eq!(held(), (1, 5000));
    server.history.replica().latest().entries().for_each(|entry| assert_eq!(entry.federates_with, []));
}

#[tokio::test(start_paused = true)]
async fn one_key_id_for_two_keys_is_refused() {
    let server = Server::start().await;
    let other = large(&server, "other.test", 100).await;
    let [mut first, second] = [foreign(&server, "other.test").await, large(&Server::start().await, "x.test", 1).await];
    let own = first.jwt_authorities.remove(0);
    let twin = types::JwtKey { key_id: own.key_id.clone(), ..second.jwt_authorities[0].clone() };
    let text =
        format!("failed to convert bundle: JWT authority 101 repeats the key ID \"{}\" of another key", own.key_id);
    let set = async |more: Vec<types::JwtKey>| {
        let jwt_authorities = [other.jwt_authorities.clone(), more].concat();
        let bundle = vec![types::Bundle { jwt_authorities, ..other.clone() }];
        let request = BatchSetFederatedBundleRequest { bundle, output_mask: None };
        BundleClient::new(server.local()).batch_set_federated_bundle(request).await.unwrap().into_inner().results
    };
    let refused = set(vec![own.clone(), twin.clone()]).await;
    assert_eq!(codes([&refused[0].status]), [(3, text)]);
    let stored = set(vec![own.clone(), own.clone()]).await;
    assert_eq!(stored[0].bundle.as_ref().unwrap().jwt_authorities.len(), 101);

    let mut local = BundleClient::new(server.local());
    let request = AppendBundleRequest { jwt_authorities: vec![own.clone(), twin.clone()], ..Default::default() };
    let text = format!(
        "failed to convert JWT authority: JWT authority 1 repeats the key ID \"{}\" of another key",
        own.key_id
    );
    assert_refused(local.append_bundle(request).await, Code::InvalidArgument, &text);
    let request = AppendBundleRequest { jwt_authorities: vec![twin], ..Default::default() };
    let text = format!("failed to append bundle: key ID \"{}\" belongs to another key of the bundle", own.key_id);
    assert_refused(local.append_bundle(request).await, Code::InvalidArgument, &text);
}
