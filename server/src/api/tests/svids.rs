use base64::Engine as _;
use spiffe::verify::jwt_svid;
use spiffe::x509::Certificate;
use spiffe_proto::svid::svid_client::SvidClient;
use spiffe_proto::svid::*;

use super::*;

fn bundle(server: &Server) -> Bundle {
    Bundle::clone(server.history.replica().latest().bundle(&trust_domain()).unwrap())
}

#[tokio::test(start_paused = true)]
async fn a_batch_is_answered_in_order_item_by_item() {
    let server = Server::start().await;
    let (agent, id) = server.agent().await;
    let ids = server.entries(&id, (0..50).map(|n| format!("w{n}"))).await;
    let foreign =
        server.entries(&SpiffeId::parse("spiffe://example.org/spire/agent/y").unwrap(), ["f".to_owned()]).await;
    let mut forged = csr(&[]).to_vec();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    let mut params: Vec<NewX509svidParams> = ids
        .iter()
        // What a request says about names does not count.
        .map(|id| NewX509svidParams { entry_id: id.clone(), csr: csr(&["/somebody-else", "/twice"]) })
        .collect();
    params[3].csr = Bytes::new();
    params[7].entry_id = foreign[0].clone();
    params[20].csr = Bytes::from_static(b"junk");
    params[40].csr = forged.into();
    params[49].entry_id.clear();
    let answer = SvidClient::new(agent).batch_new_x509svid(BatchNewX509svidRequest { params }).await.unwrap();
    let results = answer.into_inner().results;
    assert_eq!(results.len(), 50);
    for (number, result) in results.iter().enumerate() {
        let status = result.status.as_ref().unwrap();
        let told = (status.code, status.message.as_str());
        match number {
            3 => assert_eq!(told, (3, "missing CSR")),
            7 => assert_eq!(told, (5, "entry not found or not authorized")),
            20 => assert_eq!(told, (3, "malformed CSR: CSR is not valid DER")),
            40 => assert!(status.code == 3 && status.message.starts_with("invalid CSR signature: "), "{told:?}"),
            49 => assert_eq!(told, (3, "missing entry ID")),
            _ => {
                let svid = result.svid.as_ref().unwrap();
                let verified = x509_chain(&svid.cert_chain, &bundle(&server), PeerRole::Client, server.now()).unwrap();
                assert_eq!(told, (0, "OK"));
                assert_eq!(verified.id.path(), format!("/w{number}"));
                assert_eq!(svid.expires_at, 1_700_003_600);
            }
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_batch_without_items_or_above_the_burst_is_refused_as_a_whole() {
    let server = Server::start().await;
    let (agent, _) = server.agent().await;
    let mut client = SvidClient::new(agent);
    let none = client.batch_new_x509svid(BatchNewX509svidRequest::default()).await;
    assert_refused(none, Code::InvalidArgument, "missing parameters");
    let params = vec![NewX509svidParams::default(); 501];
    let text = "rejecting request due to certificate signing rate limiting: rate (501) exceeds burst size (500)";
    assert_refused(client.batch_new_x509svid(BatchNewX509svidRequest { params }).await, Code::ResourceExhausted, text);
}

#[tokio::test(start_paused = true)]
async fn no_svid_for_an_entry_after_its_deletion_is_acknowledged() {
    let server = Server::start().await;
    let (agent, id) = server.agent().await;
    let entry_id = server.entries(&id, ["a".to_owned()]).await.remove(0);
    let request = spiffe_proto::entry::BatchDeleteEntryRequest { ids: vec![entry_id.clone()] };
    EntryClient::new(server.local()).batch_delete_entry(request).await.unwrap();
    let mut client = SvidClient::new(agent);
    let params = vec![NewX509svidParams { entry_id: entry_id.clone(), csr: csr(&[]) }];
    let results = client.batch_new_x509svid(BatchNewX509svidRequest { params }).await.unwrap().into_inner().results;
    assert_eq!(results[0].status.as_ref().unwrap().code, Code::NotFound as i32);
    let request = NewJwtsvidRequest { entry_id, audience: vec!["a".into()] };
    let text = "entry not found or not authorized";
    assert_refused(client.new_jwtsvid(request.clone()).await, Code::NotFound, text);
    server.set_away(true);
    assert_eq!(client.new_jwtsvid(request).await.unwrap_err().code(), Code::Unavailable);
}

#[tokio::test(start_paused = true)]
async fn jwt_svids_follow_their_entry() {
    let server = Server::start().await;
    let (agent, id) = server.agent().await;
    let attributes = types::entry::AdditionalAttributes { jwt_svid_include_jti: true, ..Default::default() };
    let message =
        types::Entry { jwt_svid_ttl: 30, hint: "h".into(), additional_attributes: Some(attributes), ..entry(&id, "a") };
    let request = spiffe_proto::entry::BatchCreateEntryRequest { entries: vec![message], output_mask: None };
    let made = EntryClient::new(server.local()).batch_create_entry(request).await.unwrap().into_inner();
    let entry_id = made.results[0].entry.as_ref().unwrap().id.clone();
    let mut client = SvidClient::new(agent);
    let request = NewJwtsvidRequest { entry_id, audience: vec!["one".into(), "two".into()] };
    let svid = client.new_jwtsvid(request.clone()).await.unwrap().into_inner().svid.unwrap();
    assert_eq!((svid.issued_at, svid.expires_at, svid.hint.as_str()), (1_700_000_000, 1_700_000_030, "h"));
    let verified = jwt_svid(&svid.token, "two", &bundle(&server), server.now()).unwrap();
    assert_eq!(verified.id.as_str(), "spiffe://example.org/a");
    let jti = verified.claims["jti"].as_str().unwrap().to_owned();
    let uuid = base64::engine::general_purpose::URL_SAFE_NO_PAD.decode(jti).unwrap();
    assert_eq!((uuid.len(), uuid[6] >> 4, uuid[8] >> 6), (16, 4, 2));
    let silent = NewJwtsvidRequest { audience: Vec::new(), ..request };
    assert_refused(client.new_jwtsvid(silent).await, Code::InvalidArgument, "at least one audience is required");
}

#[tokio::test(start_paused = true)]
async fn switched_off_jwt_svids_are_unimplemented() {
    let server = Server::with(|policy| policy.jwt_key_type = None).await;
    let (agent, _) = server.agent().await;
    let text = "JWT functionality is disabled";
    let request = NewJwtsvidRequest { entry_id: "x".into(), audience: vec!["a".into()] };
    assert_refused(SvidClient::new(agent).new_jwtsvid(request).await, Code::Unimplemented, text);
    let request = MintJwtsvidRequest { audience: vec!["a".into()], ..Default::default() };
    assert_refused(SvidClient::new(server.local()).mint_jwtsvid(request).await, Code::Unimplemented, text);
}

#[tokio::test(start_paused = true)]
async fn administrators_mint_what_the_request_names() {
    let server = Server::start().await;
    let mut local = SvidClient::new(server.local());
    let mint = async |csr: Bytes, ttl| {
        let request = MintX509svidRequest { csr, ttl };
        SvidClient::new(server.local()).mint_x509svid(request).await.map(|answer| answer.into_inner().svid.unwrap())
    };
    let svid = mint(csr(&["/minted"]), 60).await.unwrap();
    assert_eq!((svid.id.unwrap().path.as_str(), svid.expires_at), ("/minted", 1_700_000_060));
    assert_eq!(Certificate::parse(svid.cert_chain[0].clone()).unwrap().leaf_id().unwrap().path(), "/minted");
    assert_eq!(mint(csr(&["/minted"]), -1).await.unwrap().expires_at, 1_700_003_600);
    let invalid = Code::InvalidArgument;
    assert_refused(mint(csr(&[]), 0).await, invalid, "CSR URI SAN is required");
    assert_refused(mint(csr(&["/a", "/b"]), 0).await, invalid, "only one URI SAN is expected");
    assert_refused(mint(Bytes::new(), 0).await, invalid, "missing CSR");
    let text = "CSR URI SAN is invalid: \"spiffe://example.org/spire/server\" is not a workload in trust domain \
                \"example.org\"; path is in the reserved namespace";
    assert_refused(mint(csr(&["/spire/server"]), 0).await, invalid, text);

    let id = wire_id(&SpiffeId::parse("spiffe://example.org/minted").unwrap());
    let request = MintJwtsvidRequest { id, audience: vec!["a".into()], ttl: 60 };
    let svid = local.mint_jwtsvid(request.clone()).await.unwrap().into_inner().svid.unwrap();
    assert_eq!((svid.issued_at, svid.expires_at), (1_700_000_000, 1_700_000_060));
    let silent = MintJwtsvidRequest { audience: Vec::new(), ..request.clone() };
    assert_refused(local.mint_jwtsvid(silent).await, invalid, "at least one audience is required");
    let blank = MintJwtsvidRequest { audience: vec![String::new()], ..request };
    assert_eq!(local.mint_jwtsvid(blank).await.unwrap_err().code(), invalid);
}
