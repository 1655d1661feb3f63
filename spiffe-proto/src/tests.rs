use std::collections::BTreeMap;
use std::fmt::Write as _;

use bytes::Bytes;
use prost_reflect::{DescriptorPool, Kind};

use crate::{DESCRIPTORS, agent, bundle, json, localauthority, sync, types, workload};

fn pool() -> DescriptorPool {
    DescriptorPool::decode(DESCRIPTORS).unwrap()
}

/// `name=number:type` for each field of a message, in the order of the numbers.
fn fields(pool: &DescriptorPool, message: &str) -> String {
    let message = pool.get_message_by_name(message).unwrap_or_else(|| panic!("{message} is missing"));
    let mut text = String::new();
    for field in message.fields() {
        let kind = match field.kind() {
            Kind::Message(message) if message.is_map_entry() => {
                let name = |kind: Kind| format!("{kind:?}").to_lowercase();
                format!(
                    "map<{},{}>",
                    name(message.map_entry_key_field().kind()),
                    name(message.map_entry_value_field().kind())
                )
            }
            Kind::Message(message) => message.full_name().to_owned(),
            Kind::Enum(kind) => kind.full_name().to_owned(),
            other => format!("{other:?}").to_lowercase(),
        };
        let list = if field.is_list() { "*" } else { "" };
        let space = if text.is_empty() { "" } else { " " };
        write!(text, "{space}{}={}:{kind}{list}", field.name(), field.number()).unwrap();
    }
    text
}

#[test]
fn shared_types_have_the_numbers_of_spire() {
    let pool = pool();
    let table = [
        ("spire.api.types.SPIFFEID", "trust_domain=1:string path=2:string"),
        ("spire.api.types.Selector", "type=1:string value=2:string"),
        (
            "spire.api.types.SelectorMatch",
            "selectors=1:spire.api.types.Selector* match=2:spire.api.types.SelectorMatch.MatchBehavior",
        ),
        (
            "spire.api.types.FederatesWithMatch",
            "trust_domains=1:string* match=2:spire.api.types.FederatesWithMatch.MatchBehavior",
        ),
        ("spire.api.types.Status", "code=1:int32 message=2:string"),
        ("spire.api.types.PermissionDeniedDetails", "reason=1:spire.api.types.PermissionDeniedDetails.Reason"),
        (
            "spire.api.types.Entry",
            "id=1:string spiffe_id=2:spire.api.types.SPIFFEID parent_id=3:spire.api.types.SPIFFEID \
             selectors=4:spire.api.types.Selector* x509_svid_ttl=5:int32 federates_with=6:string* admin=7:bool \
             downstream=8:bool expires_at=9:int64 dns_names=10:string* revision_number=11:int64 \
             store_svid=12:bool jwt_svid_ttl=13:int32 hint=14:string created_at=15:int64 \
             additional_attributes=16:spire.api.types.Entry.AdditionalAttributes",
        ),
        ("spire.api.types.Entry.AdditionalAttributes", "disable_x509_svid_prefetch=1:bool jwt_svid_include_jti=2:bool"),
        (
            "spire.api.types.EntryMask",
            "spiffe_id=2:bool parent_id=3:bool selectors=4:bool x509_svid_ttl=5:bool federates_with=6:bool \
             admin=7:bool downstream=8:bool expires_at=9:bool dns_names=10:bool revision_number=11:bool \
             store_svid=12:bool jwt_svid_ttl=13:bool hint=14:bool created_at=15:bool additional_attributes=16:bool",
        ),
        (
            "spire.api.types.Agent",
            "id=1:spire.api.types.SPIFFEID attestation_type=2:string x509svid_serial_number=3:string \
             x509svid_expires_at=4:int64 selectors=5:spire.api.types.Selector* banned=6:bool can_reattest=7:bool \
             agent_version=8:string",
        ),
        (
            "spire.api.types.AgentMask",
            "attestation_type=2:bool x509svid_serial_number=3:bool x509svid_expires_at=4:bool selectors=5:bool \
             banned=6:bool can_reattest=7:bool agent_version=8:bool",
        ),
        (
            "spire.api.types.Bundle",
            "trust_domain=1:string x509_authorities=2:spire.api.types.X509Certificate* \
             jwt_authorities=3:spire.api.types.JWTKey* refresh_hint=4:int64 sequence_number=5:uint64 \
             wit_authorities=6:spire.api.types.WITKey*",
        ),
        (
            "spire.api.types.BundleMask",
            "x509_authorities=2:bool jwt_authorities=3:bool refresh_hint=4:bool sequence_number=5:bool \
             wit_authorities=6:bool",
        ),
        ("spire.api.types.X509Certificate", "asn1=1:bytes tainted=2:bool"),
        ("spire.api.types.JWTKey", "public_key=1:bytes key_id=2:string expires_at=3:int64 tainted=4:bool"),
        ("spire.api.types.WITKey", "public_key=1:bytes key_id=2:string expires_at=3:int64 tainted=4:bool"),
        (
            "spire.api.types.X509SVID",
            "cert_chain=1:bytes* id=2:spire.api.types.SPIFFEID expires_at=3:int64 hint=4:string",
        ),
        (
            "spire.api.types.JWTSVID",
            "token=1:string id=2:spire.api.types.SPIFFEID expires_at=3:int64 issued_at=4:int64 hint=5:string",
        ),
        (
            "spire.api.types.WITSVID",
            "token=1:string id=2:spire.api.types.SPIFFEID expires_at=3:int64 issued_at=4:int64 hint=5:string",
        ),
        ("spire.api.types.JoinToken", "value=1:string expires_at=2:int64"),
        ("spire.api.types.AttestationData", "type=1:string payload=2:bytes"),
        ("spire.api.types.Logger", "current_level=1:spire.api.types.LogLevel launch_level=2:spire.api.types.LogLevel"),
        (
            "spire.api.types.FederationRelationship",
            "trust_domain=1:string bundle_endpoint_url=2:string https_web=3:spire.api.types.HTTPSWebProfile \
             https_spiffe=4:spire.api.types.HTTPSSPIFFEProfile trust_domain_bundle=5:spire.api.types.Bundle",
        ),
        ("spire.api.types.HTTPSSPIFFEProfile", "endpoint_spiffe_id=1:string"),
        (
            "spire.api.types.FederationRelationshipMask",
            "bundle_endpoint_url=1:bool bundle_endpoint_profile=2:bool trust_domain_bundle=3:bool",
        ),
    ];
    for (message, expected) in table {
        assert_eq!(fields(&pool, message), expected, "{message}");
    }
}

#[test]
fn calls_have_the_numbers_of_spire() {
    let pool = pool();
    let filter = "by_attestation_type=1:string by_selector_match=2:spire.api.types.SelectorMatch \
                  by_banned=3:google.protobuf.BoolValue by_can_reattest=4:google.protobuf.BoolValue \
                  by_expires_before=5:string";
    let entries = "by_spiffe_id=1:spire.api.types.SPIFFEID by_parent_id=2:spire.api.types.SPIFFEID \
                   by_selectors=3:spire.api.types.SelectorMatch by_federates_with=4:spire.api.types.FederatesWithMatch \
                   by_hint=5:google.protobuf.StringValue by_downstream=6:google.protobuf.BoolValue";
    let table = [
        ("agent.v1.CountAgentsRequest.Filter", filter),
        ("agent.v1.ListAgentsRequest.Filter", filter),
        (
            "agent.v1.ListAgentsRequest",
            "filter=1:spire.api.server.agent.v1.ListAgentsRequest.Filter output_mask=2:spire.api.types.AgentMask \
             page_size=3:int32 page_token=4:string",
        ),
        ("agent.v1.ListAgentsResponse", "agents=1:spire.api.types.Agent* next_page_token=2:string"),
        (
            "agent.v1.AttestAgentRequest",
            "params=1:spire.api.server.agent.v1.AttestAgentRequest.Params challenge_response=2:bytes",
        ),
        (
            "agent.v1.AttestAgentRequest.Params",
            "data=1:spire.api.types.AttestationData params=2:spire.api.server.agent.v1.AgentX509SVIDParams",
        ),
        (
            "agent.v1.AttestAgentResponse",
            "result=1:spire.api.server.agent.v1.AttestAgentResponse.Result challenge=2:bytes",
        ),
        ("agent.v1.AttestAgentResponse.Result", "svid=1:spire.api.types.X509SVID reattestable=2:bool"),
        ("agent.v1.CreateJoinTokenRequest", "ttl=1:int32 token=2:string agent_id=3:spire.api.types.SPIFFEID"),
        ("agent.v1.PostStatusRequest", "current_bundle_serial=1:uint64 agent_version=2:string"),
        ("agent.v1.AgentX509SVIDParams", "csr=1:bytes"),
        (
            "bundle.v1.AppendBundleRequest",
            "x509_authorities=1:spire.api.types.X509Certificate* jwt_authorities=2:spire.api.types.JWTKey* \
             output_mask=3:spire.api.types.BundleMask wit_authorities=4:spire.api.types.WITKey*",
        ),
        (
            "bundle.v1.BatchUpdateFederatedBundleRequest",
            "bundle=1:spire.api.types.Bundle* input_mask=2:spire.api.types.BundleMask \
             output_mask=3:spire.api.types.BundleMask",
        ),
        (
            "bundle.v1.BatchDeleteFederatedBundleRequest",
            "trust_domains=1:string* mode=2:spire.api.server.bundle.v1.BatchDeleteFederatedBundleRequest.Mode",
        ),
        ("entry.v1.CountEntriesRequest.Filter", entries),
        ("entry.v1.ListEntriesRequest.Filter", entries),
        ("entry.v1.SyncAuthorizedEntriesRequest", "output_mask=1:spire.api.types.EntryMask ids=2:string*"),
        (
            "entry.v1.SyncAuthorizedEntriesResponse",
            "entry_revisions=1:spire.api.server.entry.v1.EntryRevision* entries=2:spire.api.types.Entry* more=3:bool",
        ),
        ("entry.v1.EntryRevision", "id=1:string revision_number=2:int64 created_at=3:int64"),
        ("svid.v1.MintX509SVIDRequest", "csr=1:bytes ttl=2:int32"),
        ("svid.v1.MintJWTSVIDRequest", "id=1:spire.api.types.SPIFFEID audience=2:string* ttl=3:int32"),
        (
            "svid.v1.MintWITSVIDRequest",
            "id=1:spire.api.types.SPIFFEID public_key=2:bytes ttl=3:int32 signing_algorithm=4:string",
        ),
        ("svid.v1.NewX509SVIDParams", "entry_id=1:string csr=2:bytes"),
        ("svid.v1.NewWITSVIDParams", "entry_id=1:string public_key=2:bytes signing_algorithm=3:string"),
        ("svid.v1.NewJWTSVIDRequest", "entry_id=1:string audience=2:string*"),
        ("svid.v1.NewDownstreamX509CARequest", "csr=1:bytes preferred_ttl=2:int32"),
        ("svid.v1.NewDownstreamX509CAResponse", "ca_cert_chain=1:bytes* x509_authorities=2:bytes*"),
        (
            "localauthority.v1.AuthorityState",
            "authority_id=1:string expires_at=2:int64 upstream_authority_subject_key_id=3:string",
        ),
        (
            "localauthority.v1.GetX509AuthorityStateResponse",
            "active=1:spire.api.server.localauthority.v1.AuthorityState \
             prepared=2:spire.api.server.localauthority.v1.AuthorityState \
             old=3:spire.api.server.localauthority.v1.AuthorityState",
        ),
        ("localauthority.v1.TaintX509UpstreamAuthorityRequest", "subject_key_id=1:string"),
        (
            "debug.v1.GetInfoResponse",
            "svid_chain=1:spire.api.server.debug.v1.GetInfoResponse.Cert* uptime=2:int32 agents_count=3:int32 \
             federated_bundles_count=4:int32 entries_count=5:int32",
        ),
        (
            "trustdomain.v1.ListFederationRelationshipsRequest",
            "output_mask=1:spire.api.types.FederationRelationshipMask page_size=2:int32 page_token=3:string",
        ),
    ];
    for (message, expected) in table {
        assert_eq!(fields(&pool, &format!("spire.api.server.{message}")), expected, "{message}");
    }
    let info = fields(&pool, "spire.agent.debug.v1.GetInfoResponse");
    assert_eq!(
        info,
        "svid_chain=1:spire.agent.debug.v1.GetInfoResponse.Cert* uptime=2:int32 svids_count=3:int32 \
         last_sync_success=4:int64 cached_x509_svids_count=5:int32 cached_jwt_svids_count=6:int32 \
         cached_svidstore_x509_svids_count=7:int32"
    );
}

#[test]
fn workload_api_has_the_numbers_of_the_standard() {
    let pool = pool();
    let table = [
        ("X509SVIDResponse", "svids=1:X509SVID* crl=2:bytes* federated_bundles=3:map<string,bytes>"),
        ("X509SVID", "spiffe_id=1:string x509_svid=2:bytes x509_svid_key=3:bytes bundle=4:bytes hint=5:string"),
        ("X509BundlesResponse", "crl=1:bytes* bundles=2:map<string,bytes>"),
        ("JWTSVIDRequest", "audience=1:string* spiffe_id=2:string"),
        ("JWTSVIDResponse", "svids=1:JWTSVID*"),
        ("JWTSVID", "spiffe_id=1:string svid=2:string hint=3:string"),
        ("JWTBundlesResponse", "bundles=1:map<string,bytes>"),
        ("ValidateJWTSVIDRequest", "audience=1:string svid=2:string"),
        ("ValidateJWTSVIDResponse", "spiffe_id=1:string claims=2:google.protobuf.Struct"),
        ("WITSVIDRequest", "spiffe_id=1:string"),
        ("WITSVID", "spiffe_id=1:string wit_svid=2:string wit_svid_key=3:string hint=4:string"),
        ("WITBundlesResponse", "bundles=1:map<string,string>"),
        (
            "spiffe.broker.FetchJWTSVIDRequest",
            "reference=1:spiffe.broker.WorkloadReference audience=2:string* spiffe_id=3:string",
        ),
        ("spiffe.broker.WorkloadPIDReference", "pid=1:int32"),
        (
            "spiffe.broker.KubernetesObjectReference",
            "type=1:spiffe.broker.KubernetesObjectType key=2:spiffe.broker.KubernetesObjectKey uid=3:string",
        ),
    ];
    for (message, expected) in table {
        assert_eq!(fields(&pool, message), expected, "{message}");
    }
}

#[test]
fn enums_have_the_numbers_of_spire() {
    use types::permission_denied_details::Reason;
    use types::selector_match::MatchBehavior;

    let reasons = ["UNKNOWN", "AGENT_EXPIRED", "AGENT_NOT_ATTESTED", "AGENT_NOT_ACTIVE", "AGENT_BANNED"];
    for (number, name) in reasons.into_iter().chain(["AGENT_MUST_REATTEST"]).enumerate() {
        assert_eq!(Reason::from_str_name(name).map(|reason| reason as usize), Some(number));
    }
    for (number, name) in ["MATCH_EXACT", "MATCH_SUBSET", "MATCH_SUPERSET", "MATCH_ANY"].into_iter().enumerate() {
        assert_eq!(MatchBehavior::from_str_name(name).map(|behavior| behavior as usize), Some(number));
    }
    let levels = ["UNSPECIFIED", "PANIC", "FATAL", "ERROR", "WARN", "INFO", "DEBUG", "TRACE"];
    for (number, name) in levels.into_iter().enumerate() {
        assert_eq!(types::LogLevel::from_str_name(name).map(|level| level as usize), Some(number));
    }
    for (number, name) in ["RESTRICT", "DELETE", "DISSOCIATE"].into_iter().enumerate() {
        let mode = bundle::batch_delete_federated_bundle_request::Mode::from_str_name(name);
        assert_eq!(mode.map(|mode| mode as usize), Some(number));
    }
}

#[test]
fn every_service_is_there_with_every_method() {
    let methods: BTreeMap<String, usize> =
        pool().services().map(|service| (service.full_name().to_owned(), service.methods().count())).collect();
    let expected = [
        ("SpiffeWorkloadAPI", 7),
        ("envoy.service.secret.v3.SecretDiscoveryService", 3),
        ("grpc.health.v1.Health", 3),
        ("signet.backup.v1.Backup", 1),
        ("signet.sync.v2.Sync", 1),
        ("spiffe.broker.API", 4),
        ("spire.agent.debug.v1.Debug", 1),
        ("spire.api.agent.delegatedidentity.v1.DelegatedIdentity", 4),
        ("spire.api.agent.logger.v1.Logger", 3),
        ("spire.api.server.agent.v1.Agent", 9),
        ("spire.api.server.bundle.v1.Bundle", 11),
        ("spire.api.server.debug.v1.Debug", 1),
        ("spire.api.server.entry.v1.Entry", 8),
        ("spire.api.server.localauthority.v1.LocalAuthority", 17),
        ("spire.api.server.logger.v1.Logger", 3),
        ("spire.api.server.svid.v1.SVID", 7),
        ("spire.api.server.trustdomain.v1.TrustDomain", 6),
    ];
    let expected: BTreeMap<String, usize> = expected.map(|(name, count)| (name.to_owned(), count)).into();
    assert_eq!(methods, expected);
}

#[test]
fn json_shows_defaults_sorts_members_and_leaves_nulls_out() {
    let entry = types::Entry {
        id: "e1".into(),
        spiffe_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: "/a".into() }),
        selectors: vec![types::Selector { r#type: "unix".into(), value: "uid:1000".into() }],
        x509_svid_ttl: 60,
        expires_at: 1_700_000_000,
        ..types::Entry::default()
    };
    assert_eq!(
        json::to_line("spire.api.types.Entry", &entry).unwrap(),
        r#"{"admin":false,"created_at":"0","dns_names":[],"downstream":false,"expires_at":"1700000000","federates_with":[],"hint":"","id":"e1","jwt_svid_ttl":0,"revision_number":"0","selectors":[{"type":"unix","value":"uid:1000"}],"spiffe_id":{"path":"/a","trust_domain":"example.org"},"store_svid":false,"x509_svid_ttl":60}"#
    );
}

#[test]
fn json_writes_bytes_enums_maps_and_structs() {
    let key =
        types::JwtKey { public_key: Bytes::from_static(&[251, 255]), key_id: "<k&>".into(), ..Default::default() };
    assert_eq!(
        json::to_line("spire.api.types.JWTKey", &key).unwrap(),
        r#"{"expires_at":"0","key_id":"\u003ck\u0026\u003e","public_key":"+/8=","tainted":false}"#
    );
    let logger = types::Logger { current_level: types::LogLevel::Debug as i32, launch_level: 0 };
    assert_eq!(
        json::to_line("spire.api.types.Logger", &logger).unwrap(),
        r#"{"current_level":"DEBUG","launch_level":"UNSPECIFIED"}"#
    );
    let bundles = workload::JwtBundlesResponse {
        bundles: [("spiffe://example.org".to_owned(), Bytes::from_static(b"{}"))].into(),
    };
    assert_eq!(
        json::to_line("JWTBundlesResponse", &bundles).unwrap(),
        r#"{"bundles":{"spiffe://example.org":"e30="}}"#
    );
    let number = |number| prost_types::Value { kind: Some(prost_types::value::Kind::NumberValue(number)) };
    let claims = [("iat".to_owned(), number(1_700_000_000.0)), ("half".to_owned(), number(0.5))];
    let answer = workload::ValidateJwtsvidResponse {
        spiffe_id: "spiffe://example.org/a".into(),
        claims: Some(prost_types::Struct { fields: claims.into() }),
    };
    assert_eq!(
        json::to_line("ValidateJWTSVIDResponse", &answer).unwrap(),
        r#"{"claims":{"half":0.5,"iat":1700000000},"spiffe_id":"spiffe://example.org/a"}"#
    );
}

#[test]
fn json_refuses_a_name_that_nothing_has() {
    let error = json::to_line("spire.api.types.Nothing", &types::Entry::default()).unwrap_err();
    assert!(matches!(error, json::JsonError::UnknownMessage(name) if &*name == "spire.api.types.Nothing"));
}

#[test]
fn debug_shows_no_secret() {
    let svid = workload::X509svid { x509_svid_key: Bytes::from_static(b"secret"), ..Default::default() };
    let token = types::JoinToken { value: "secret".into(), expires_at: 7 };
    let first = agent::AttestAgentRequest {
        step: Some(agent::attest_agent_request::Step::Params(agent::attest_agent_request::Params {
            data: Some(types::AttestationData { r#type: "join_token".into(), payload: Bytes::from_static(b"secret") }),
            params: None,
        })),
    };
    for text in [format!("{svid:?}"), format!("{token:?}"), format!("{first:?}")] {
        assert!(!text.contains("secret"), "{text}");
    }
    assert_eq!(format!("{token:?}"), "JoinToken { expires_at: 7, value: (hidden) }");
}

#[test]
fn push_has_the_numbers_it_was_given() {
    let pool = pool();
    assert_eq!(
        fields(&pool, "signet.sync.v2.Part"),
        "step=1:uint64 position=2:signet.sync.v2.Position entries=3:signet.sync.v2.SentEntry* removed_entries=4:string* \
         bundles=5:spire.api.types.Bundle* removed_bundles=6:string* last=7:bool digest=8:bytes anew=9:bool"
    );
    assert_eq!(fields(&pool, "signet.sync.v2.Position"), "history=1:bytes revision=2:uint64 digest=3:bytes");
    // Both ends compile against these names.
    let _ = sync::SubscribeRequest { message: Some(sync::subscribe_request::Message::Ack(sync::Ack { step: 1 })) };
    let _ = localauthority::AuthorityState::default();
}
