//! Compiles the protocol files without a system `protoc`.

// Build scripts are told everything by their environment.
#![allow(clippy::disallowed_methods)]

use std::env;
use std::error::Error;
use std::fs;
use std::path::PathBuf;

use protox::Compiler;
use protox::prost::Message;

/// Every protocol file; imports are found from here.
const FILES: &[&str] = &[
    "spiffe/workload/workload.proto",
    "spiffe/broker/api.proto",
    "spire/api/types/agent.proto",
    "spire/api/types/attestation.proto",
    "spire/api/types/bundle.proto",
    "spire/api/types/entry.proto",
    "spire/api/types/federateswith.proto",
    "spire/api/types/federationrelationship.proto",
    "spire/api/types/jointoken.proto",
    "spire/api/types/jwtsvid.proto",
    "spire/api/types/logger.proto",
    "spire/api/types/selector.proto",
    "spire/api/types/spiffeid.proto",
    "spire/api/types/status.proto",
    "spire/api/types/witsvid.proto",
    "spire/api/types/x509svid.proto",
    "spire/api/server/agent/v1/agent.proto",
    "spire/api/server/bundle/v1/bundle.proto",
    "spire/api/server/debug/v1/debug.proto",
    "spire/api/server/entry/v1/entry.proto",
    "spire/api/server/localauthority/v1/localauthority.proto",
    "spire/api/server/logger/v1/logger.proto",
    "spire/api/server/svid/v1/svid.proto",
    "spire/api/server/trustdomain/v1/trustdomain.proto",
    "spire/api/agent/debug/v1/debug.proto",
    "spire/api/agent/delegatedidentity/v1/delegatedidentity.proto",
    "spire/api/agent/logger/v1/logger.proto",
    "envoy/service/secret/v3/sds.proto",
    "envoy/extensions/transport_sockets/tls/v3/secret.proto",
    "grpc/health/v1/health.proto",
    "google/rpc/status.proto",
    "signet/backup/v1/backup.proto",
    "signet/sync/v2/sync.proto",
];

/// Messages that carry a key, a token or a join token: `secret.rs` writes their `Debug` by hand.
const SECRETS: &[&str] = &[
    ".X509SVID",
    ".JWTSVID",
    ".WITSVID",
    ".ValidateJWTSVIDRequest",
    ".spiffe.broker.X509SVID",
    ".spiffe.broker.JWTSVID",
    ".spire.api.types.JWTSVID",
    ".spire.api.types.WITSVID",
    ".spire.api.types.JoinToken",
    ".spire.api.types.AttestationData",
    ".spire.api.server.agent.v1.CreateJoinTokenRequest",
    ".spire.api.agent.delegatedidentity.v1.X509SVIDWithKey",
    ".envoy.extensions.transport_sockets.tls.v3.TlsCertificate",
];

fn main() -> Result<(), Box<dyn Error>> {
    println!("cargo::rerun-if-changed=proto");
    let mut compiler = Compiler::new(["proto"])?;
    compiler.include_imports(true).include_source_info(true).open_files(FILES)?;
    let mut descriptors = compiler.file_descriptor_set();
    tonic_prost_build::configure()
        .bytes(".")
        .skip_debug(SECRETS)
        .codec_path("crate::codec::Protobuf")
        .extern_path(
            ".spire.api.server.entry.v1.GetAuthorizedEntriesResponse",
            "crate::authorized::GetAuthorizedEntriesResponse",
        )
        .extern_path(
            ".spire.api.server.entry.v1.SyncAuthorizedEntriesResponse",
            "crate::authorized::SyncAuthorizedEntriesResponse",
        )
        .emit_rerun_if_changed(false)
        .compile_fds(descriptors.clone())?;

    // Comments have become documentation by now; at run time only the shapes count.
    for file in &mut descriptors.file {
        file.source_code_info = None;
    }
    fs::write(PathBuf::from(env::var("OUT_DIR")?).join("descriptors.bin"), descriptors.encode_to_vec())?;
    Ok(())
}
