use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::agent::*;
use spiffe_proto::entry::GetAuthorizedEntriesRequest;
use spiffe_proto::entry::entry_client::EntryClient;

use super::*;

async fn post_status(connection: Connection, version: &str) -> Result<(), Status> {
    let request = PostStatusRequest { current_bundle_serial: 0, agent_version: version.to_owned() };
    AgentClient::new(connection).post_status(request).await.map(drop)
}

async fn renew(connection: Connection) -> Result<types::X509svid, Status> {
    let request = RenewAgentRequest { params: Some(AgentX509svidParams { csr: csr(&[]) }) };
    AgentClient::new(connection).renew_agent(request).await.map(|answer| answer.into_inner().svid.unwrap())
}

async fn shown(server: &Server, id: &SpiffeId) -> types::Agent {
    let request = GetAgentRequest { id: wire_id(id), output_mask: None };
    AgentClient::new(server.local()).get_agent(request).await.unwrap().into_inner()
}

#[tokio::test(start_paused = true)]
async fn a_join_token_attests_once_and_its_alias_goes_with_the_node() {
    let server = Server::start().await;
    let mut local = AgentClient::new(server.local());
    let alias = SpiffeId::parse("spiffe://example.org/node").unwrap();
    let request = CreateJoinTokenRequest { ttl: 60, token: "secret".into(), agent_id: wire_id(&alias) };
    let token = local.create_join_token(request.clone()).await.unwrap().into_inner();
    assert_eq!((token.value.as_str(), token.expires_at), ("secret", 1_700_000_060));
    let again = local.create_join_token(request).await;
    assert_refused(again, Code::Internal, "failed to create token: join token exists already");

    let unknown = "failed to attest: join token does not exist or has already been used";
    assert_refused(server.attest(b"other").await, Code::InvalidArgument, unknown);
    let svid = server.attest(b"secret").await.unwrap();
    assert_eq!(svid.id.clone().unwrap().path, "/spire/agent/join_token/secret");
    assert_eq!(svid.expires_at, 1_700_003_600);
    assert_refused(server.attest(b"secret").await, Code::InvalidArgument, unknown);

    let agent = server.with_chain(&svid.cert_chain);
    let held = EntryClient::new(agent).get_authorized_entries(GetAuthorizedEntriesRequest::default()).await;
    let held = held.unwrap().into_inner().decoded().unwrap();
    assert_eq!(held.len(), 1);
    assert_eq!(held[0].spiffe_id, wire_id(&alias));

    let id = SpiffeId::parse("spiffe://example.org/spire/agent/join_token/secret").unwrap();
    let agent = shown(&server, &id).await;
    assert_eq!((agent.attestation_type.as_str(), agent.can_reattest, agent.banned), ("join_token", false, false));
    let own = "spiffe://example.org/spire/agent/join_token/secret";
    assert_eq!(agent.selectors, [types::Selector { r#type: "spiffe_id".into(), value: own.into() }]);
    local.delete_agent(DeleteAgentRequest { id: wire_id(&id) }).await.unwrap();
    assert_eq!(server.history.replica().latest().entry_count(), 0);
    let gone = local.delete_agent(DeleteAgentRequest { id: wire_id(&id) }).await;
    assert_refused(gone, Code::NotFound, "agent not found");
}

#[tokio::test(start_paused = true)]
async fn a_token_survives_an_attestation_that_failed_for_another_reason_and_then_expires() {
    let server = Server::start().await;
    let request = CreateJoinTokenRequest { ttl: 60, token: "secret".into(), agent_id: None };
    AgentClient::new(server.local()).create_join_token(request).await.unwrap();
    let mut forged = csr(&[]).to_vec();
    let last = forged.len() - 1;
    forged[last] ^= 1;
    for (csr, text) in [(b"junk".to_vec(), "failed to parse CSR: CSR is not valid DER"), (forged, "")] {
        let request = attest_request("join_token", b"secret", csr.into());
        let refused = AgentClient::new(server.anonymous()).attest_agent(tokio_stream::once(request)).await;
        let status = refused.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument);
        assert!(status.message().starts_with(if text.is_empty() { "failed to verify CSR signature" } else { text }));
    }
    tokio::time::advance(Duration::from_secs(61)).await;
    assert_refused(server.attest(b"secret").await, Code::InvalidArgument, "join token expired");
}

#[tokio::test(start_paused = true)]
async fn malformed_attestations_say_what_is_missing() {
    let server = Server::start().await;
    let refused = async |request: Option<AttestAgentRequest>| {
        let requests = tokio_stream::iter(request);
        AgentClient::new(server.anonymous()).attest_agent(requests).await.map(drop)
    };
    let invalid = Code::InvalidArgument;
    assert_refused(refused(None).await, invalid, "failed to receive request from stream: EOF");
    assert_refused(refused(Some(AttestAgentRequest { step: None })).await, invalid, "malformed param: missing params");
    let request = |kind: &str, payload: &[u8], csr| Some(attest_request(kind, payload, csr));
    for (request, text) in [
        (request("", b"x", csr(&[])), "malformed param: missing attestation data type"),
        (request("join_token", b"", csr(&[])), "malformed param: missing attestation data payload"),
        (request("join_token", b"x", Bytes::new()), "malformed param: missing CSR"),
    ] {
        assert_refused(refused(request).await, invalid, text);
    }
    assert_refused(
        refused(request("sshpop", b"x", csr(&[]))).await,
        Code::FailedPrecondition,
        "error getting node attestor: could not find node attestor type \"sshpop\"",
    );
}

#[tokio::test(start_paused = true)]
async fn the_first_use_of_a_renewed_certificate_makes_it_current_and_the_old_one_void() {
    let server = Server::start().await;
    let (first, id) = server.agent().await;
    let lost = renew(first.clone()).await.unwrap();
    let kept = renew(first.clone()).await.unwrap();
    post_status(first.clone(), "1.0").await.unwrap();
    assert_eq!(shown(&server, &id).await.agent_version, "1.0");

    let second = server.with_chain(&kept.cert_chain);
    post_status(second.clone(), "1.1").await.unwrap();
    assert_eq!(shown(&server, &id).await.x509svid_expires_at, kept.expires_at);
    for void in [first, server.with_chain(&lost.cert_chain)] {
        let status = post_status(void, "1.0").await.unwrap_err();
        assert_eq!((status.code(), reason(&status)), (Code::PermissionDenied, Some(Reason::AgentNotActive)));
        let text = "authorization denied for method /spire.api.server.agent.v1.Agent/PostStatus";
        assert_eq!(status.message(), text);
    }
    post_status(second, "1.2").await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_ban_and_an_eviction_reach_the_next_call_with_their_reason() {
    let server = Server::start().await;
    let (agent, id) = server.agent().await;
    let mut local = AgentClient::new(server.local());
    local.ban_agent(BanAgentRequest { id: wire_id(&id) }).await.unwrap();
    local.ban_agent(BanAgentRequest { id: wire_id(&id) }).await.unwrap();
    let banned = shown(&server, &id).await;
    assert_eq!((banned.banned, banned.x509svid_serial_number.as_str()), (true, ""));
    let status = post_status(agent.clone(), "1").await.unwrap_err();
    assert_eq!(reason(&status), Some(Reason::AgentBanned));
    local.delete_agent(DeleteAgentRequest { id: wire_id(&id) }).await.unwrap();
    let status = post_status(agent.clone(), "1").await.unwrap_err();
    assert_eq!(reason(&status), Some(Reason::AgentNotAttested));
    tokio::time::advance(2 * HOUR).await;
    let status = post_status(agent, "1").await.unwrap_err();
    assert_eq!(reason(&status), Some(Reason::AgentExpired));
    let invalid = local.ban_agent(BanAgentRequest { id: wire_id(&SpiffeId::server_of(&trust_domain())) }).await;
    let text = "invalid agent ID: \"spiffe://example.org/spire/server\" is not an agent in trust domain \
                \"example.org\"; path is not in the agent namespace";
    assert_refused(invalid, Code::InvalidArgument, text);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_cannot_be_confirmed_is_unavailable_and_says_nothing() {
    let server = Server::start().await;
    let (agent, id) = server.agent().await;
    server.set_away(true);
    // A known agent is served from memory.
    post_status(agent.clone(), "").await.unwrap();
    server.set_away(false);
    AgentClient::new(server.local()).ban_agent(BanAgentRequest { id: wire_id(&id) }).await.unwrap();
    server.set_away(true);
    let status = post_status(agent.clone(), "").await.unwrap_err();
    assert_eq!((status.code(), status.details()), (Code::Unavailable, &[][..]));
    server.set_away(false);
    assert_eq!(post_status(agent, "").await.unwrap_err().code(), Code::PermissionDenied);
}

#[tokio::test(start_paused = true)]
async fn agents_are_listed_by_page_and_filter() {
    let server = Server::start().await;
    let mut ids = Vec::new();
    for _ in 0..5 {
        ids.push(server.agent().await.1);
    }
    let mut local = AgentClient::new(server.local());
    local.ban_agent(BanAgentRequest { id: wire_id(&ids[1]) }).await.unwrap();
    let (mut token, mut seen, mut pages) = (String::new(), Vec::new(), 0);
    loop {
        let request = ListAgentsRequest { page_size: 2, page_token: token, ..Default::default() };
        let page = local.list_agents(request).await.unwrap().into_inner();
        pages += 1;
        token = page.next_page_token;
        assert_eq!(page.agents.is_empty(), token.is_empty());
        if token.is_empty() {
            break;
        }
        seen.extend(page.agents.into_iter().map(|agent| agent.id));
    }
    assert_eq!((pages, seen), (4, ids.iter().map(wire_id).collect()));
    let count = async |filter: count_agents_request::Filter| {
        let request = CountAgentsRequest { filter: Some(filter) };
        AgentClient::new(server.local()).count_agents(request).await.unwrap().into_inner().count
    };
    use count_agents_request::Filter;
    assert_eq!(count(Filter::default()).await, 5);
    assert_eq!(count(Filter { by_banned: Some(true), ..Filter::default() }).await, 1);
    assert_eq!(count(Filter { by_banned: Some(false), ..Filter::default() }).await, 4);
    assert_eq!(count(Filter { by_can_reattest: Some(true), ..Filter::default() }).await, 0);
    assert_eq!(count(Filter { by_attestation_type: "x509pop".into(), ..Filter::default() }).await, 0);
    let before = "2100-01-01 00:00:00 +0000 +00".to_owned();
    assert_eq!(count(Filter { by_expires_before: before, ..Filter::default() }).await, 5);
    let own = types::Selector { r#type: "spiffe_id".into(), value: ids[2].to_string() };
    let by_selector_match = Some(types::SelectorMatch { selectors: vec![own], r#match: 2 });
    assert_eq!(count(Filter { by_selector_match, ..Filter::default() }).await, 1);
    let bad = ListAgentsRequest { page_size: 1, page_token: "x".into(), ..Default::default() };
    let text = "failed to list agents: could not parse token 'x'";
    assert_refused(local.list_agents(bad).await, Code::Internal, text);
}
