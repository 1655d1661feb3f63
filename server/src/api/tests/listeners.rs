use spiffe_proto::debug::GetInfoRequest;
use spiffe_proto::debug::debug_client::DebugClient;
use spiffe_proto::health::HealthCheckRequest;
use spiffe_proto::health::health_client::HealthClient;
use spiffe_proto::logger::logger_client::LoggerClient;
use spiffe_proto::logger::*;
use tonic::client::Grpc;
use tonic_prost::ProstCodec;

use super::*;

/// Calls a method by its path, with an empty message.
async fn call(connection: Connection, path: &'static str) -> Result<(), Status> {
    let mut client = Grpc::new(connection);
    client.ready().await.unwrap();
    let codec: ProstCodec<(), ()> = ProstCodec::default();
    client.unary(tonic::Request::new(()), path.parse().unwrap(), codec).await.map(drop)
}

#[tokio::test(start_paused = true)]
async fn unknown_methods_and_services_are_unimplemented_for_everybody() {
    let server = Server::start().await;
    let admin = server.with_id("/admin").await;
    let (agent, _) = server.agent().await;
    for connection in [server.anonymous(), admin, agent, server.local()] {
        for path in [
            "/spire.api.server.agent.v1.Agent/Nope",
            "/spire.api.server.nope.v1.Nope/Nope",
            "/spire.api.server.trustdomain.v1.TrustDomain/RefreshBundle",
            "/spire.api.server.localauthority.v1.LocalAuthority/PrepareX509Authority",
            "/",
        ] {
            let status = call(connection.clone(), path).await.unwrap_err();
            assert_eq!(status.code(), Code::Unimplemented, "{path}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn services_of_the_admin_socket_are_unknown_on_the_network() {
    let server = Server::start().await;
    let admin = server.with_id("/admin").await;
    for connection in [server.anonymous(), admin] {
        for path in [
            "/spire.api.server.debug.v1.Debug/GetInfo",
            "/spire.api.server.logger.v1.Logger/GetLogger",
            "/grpc.health.v1.Health/Check",
        ] {
            assert_eq!(call(connection.clone(), path).await.unwrap_err().code(), Code::Unimplemented, "{path}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn methods_that_are_not_served_yet_say_so_to_those_who_may_call_them() {
    let server = Server::start().await;
    let (agent, _) = server.agent().await;
    let path = "/spire.api.server.svid.v1.SVID/MintWITSVID";
    assert_eq!(call(server.local(), path).await.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(call(agent.clone(), path).await.unwrap_err().code(), Code::PermissionDenied);
    let path = "/spire.api.server.svid.v1.SVID/BatchNewWITSVID";
    assert_eq!(call(agent, path).await.unwrap_err().code(), Code::Unimplemented);
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_deadline_has_passed_is_not_made() {
    let server = Server::start().await;
    let mut request = tonic::Request::new(spiffe_proto::bundle::GetBundleRequest::default());
    request.metadata_mut().insert("grpc-timeout", "0n".parse().unwrap());
    let mut client = spiffe_proto::bundle::bundle_client::BundleClient::new(server.anonymous());
    assert_eq!(client.get_bundle(request).await.unwrap_err().code(), Code::DeadlineExceeded);
}

#[tokio::test(start_paused = true)]
async fn the_debug_answer_counts_and_is_kept_for_five_seconds() {
    let server = Server::start().await;
    let mut debug = DebugClient::new(server.local());
    let info = debug.get_info(GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.agents_count, info.entries_count, info.federated_bundles_count), (0, 0, 1));
    let paths: Vec<String> = info.svid_chain.iter().map(|cert| cert.id.as_ref().unwrap().path.clone()).collect();
    assert_eq!(paths, ["/spire/server", ""]);
    assert!(info.svid_chain[0].subject.contains("SPIRE"));
    server.agent().await;
    assert_eq!(debug.get_info(GetInfoRequest {}).await.unwrap().into_inner().agents_count, 0);
    tokio::time::advance(Duration::from_secs(5)).await;
    let info = debug.get_info(GetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.agents_count, info.uptime), (1, 5));
}

#[tokio::test(start_paused = true)]
async fn the_log_level_is_changed_and_reset() {
    let server = Server::start().await;
    let mut logger = LoggerClient::new(server.local());
    let levels = |answer: tonic::Response<types::Logger>| {
        let logger = answer.into_inner();
        (logger.current_level, logger.launch_level)
    };
    assert_eq!(levels(logger.get_logger(GetLoggerRequest {}).await.unwrap()), (5, 5));
    assert_eq!(levels(logger.set_log_level(SetLogLevelRequest { new_level: 6 }).await.unwrap()), (6, 5));
    assert_eq!(levels(logger.reset_log_level(ResetLogLevelRequest {}).await.unwrap()), (5, 5));
    let unset = logger.set_log_level(SetLogLevelRequest { new_level: 0 }).await;
    assert_refused(unset, Code::InvalidArgument, "newLevel value cannot be LogLevel_UNSPECIFIED");
}

#[tokio::test(start_paused = true)]
async fn health_follows_the_store() {
    let server = Server::start().await;
    let mut health = HealthClient::new(server.local());
    let check = HealthCheckRequest::default();
    assert_eq!(health.check(check.clone()).await.unwrap().into_inner().status, 1);
    server.set_away(true);
    assert_eq!(health.check(check).await.unwrap().into_inner().status, 2);
    let named = health.check(HealthCheckRequest { service: "x".into() }).await;
    assert_refused(named, Code::InvalidArgument, "per-service health is not supported");
    assert_eq!(health.watch(HealthCheckRequest::default()).await.unwrap_err().code(), Code::Unimplemented);
}
