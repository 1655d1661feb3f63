//! Every RPC of SPIRE's and SPIFFE's services, called by everybody who may be a caller.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::Path;

use anyhow::{Context, Result};
use bytes::{Buf, BufMut, Bytes};
use prost::Message;
use prost_types::FileDescriptorSet;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::{Row, Standing};
use crate::testkit::workload::Workload;
use crate::testkit::{
    Agent, AgentOptions, Binaries, Presented, Server, ServerOptions, secured, tls, unix, wire::loopback,
};

/// Packages whose services SPIRE serves; ours are not rows of this page.
const PACKAGES: &[&str] = &["", "spire.", "spiffe.", "grpc.health.", "envoy."];

/// Message bodies as they are.
#[derive(Clone, Copy, Default)]
struct Raw;

impl Encoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Bytes;
    type Error = Status;
    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

impl Codec for Raw {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;
    fn encoder(&mut self) -> Self {
        *self
    }
    fn decoder(&mut self) -> Self {
        *self
    }
}

/// Calls `path` with an empty message and gives the first thing that comes back.
async fn call(channel: &Channel, path: &str) -> Code {
    let mut client = tonic::client::Grpc::new(channel.clone());
    let answer = async {
        client.ready().await.map_err(|error| Status::unavailable(error.to_string()))?;
        let path = path.parse().map_err(|_| Status::internal("not a path"))?;
        let mut answers = client.streaming(secured(tokio_stream::once(Bytes::new())), path, Raw).await?.into_inner();
        answers.message().await.map(drop)
    };
    match tokio::time::timeout(std::time::Duration::from_secs(5), answer).await {
        Ok(Ok(())) => Code::Ok,
        Ok(Err(status)) => status.code(),
        // A stream that waits for more is one that is served.
        Err(_) => Code::Ok,
    }
}

/// All methods of the descriptors, as paths.
fn paths() -> Result<BTreeSet<String>> {
    let descriptors = FileDescriptorSet::decode(spiffe_proto::DESCRIPTORS)?;
    let mut paths = BTreeSet::new();
    for file in &descriptors.file {
        let package = file.package();
        let wanted = PACKAGES
            .iter()
            .any(|wanted| if wanted.is_empty() { package.is_empty() } else { package.starts_with(wanted) });
        for service in file.service.iter().filter(|_| wanted) {
            let name =
                if package.is_empty() { service.name().to_owned() } else { format!("{package}.{}", service.name()) };
            paths.extend(service.method.iter().map(|method| format!("/{name}/{}", method.name())));
        }
    }
    Ok(paths)
}

/// Asks a server and an agent with everything switched on.
pub(super) async fn rows(binaries: &Binaries, folder: &Path) -> Result<Vec<Row>> {
    let server = Server::start(binaries, folder, &ServerOptions::default()).await?;
    let admin_socket = folder.join("agent/admin/admin.sock");
    let settings = AgentOptions {
        join_token: Some(server.token(Some("spiffe://example.org/node"))?),
        agent_block: format!("  admin_socket_path = \"{}\"", admin_socket.display()),
        ..AgentOptions::default()
    };
    let selector = format!("unix:uid:{}", nix::unistd::getuid());
    server.ok(&[
        "entry",
        "create",
        "-parentID",
        "spiffe://example.org/node",
        "-spiffeID",
        "spiffe://example.org/self",
        "-selector",
        &selector,
    ])?;
    let agent = Agent::start(binaries, &folder.join("agent"), &server, &settings).await?;
    Workload::follow(&agent.socket(), None).first(std::time::Duration::from_secs(30)).await?;

    let address = SocketAddr::from(([127, 0, 0, 1], server.port));
    let callers = [
        unix(&server.socket()).await?,
        tls(address, loopback(1)?, Some(attested(&server, address).await?)).await?,
        tls(address, loopback(2)?, Some(downstream(&server, folder)?)).await?,
        unix(&agent.socket()).await?,
        unix(&admin_socket).await?,
    ];
    let mut rows = Vec::new();
    for path in paths()? {
        let mut served = false;
        for caller in &callers {
            served |= !matches!(call(caller, &path).await, Code::Unimplemented | Code::PermissionDenied);
        }
        let name = path.trim_start_matches('/').to_owned();
        rows.push(Row { name, standing: if served { Standing::Works } else { Standing::Planned } });
    }
    Ok(rows)
}

/// A node of its own, so that the calls below do not disturb the agent.
async fn attested(server: &Server, address: SocketAddr) -> Result<Presented> {
    crate::testkit::wire::attest(address, loopback(1)?, server.token(None)?).await
}

/// An SVID whose entry is a downstream server's.
fn downstream(server: &Server, folder: &Path) -> Result<Presented> {
    let id = "spiffe://example.org/downstream";
    server.ok(&[
        "entry",
        "create",
        "-downstream",
        "-parentID",
        "spiffe://example.org/node",
        "-spiffeID",
        id,
        "-selector",
        "unix:uid:4242",
    ])?;
    let written = folder.join("downstream");
    std::fs::create_dir_all(&written)?;
    server.ok(&["x509", "mint", "-spiffeID", id, "-write", written.to_str().context("folder is not UTF-8")?])?;
    let read = |name: &str| -> Result<Vec<Vec<u8>>> {
        let text = std::fs::read(written.join(name))?;
        Ok(pem_blocks(&text))
    };
    let key = read("key.pem")?.pop().context("no key")?;
    Ok(Presented { chain: read("svid.pem")?, key })
}

/// The DER blocks of a PEM text, whatever their labels.
fn pem_blocks(text: &[u8]) -> Vec<Vec<u8>> {
    x509_parser::pem::Pem::iter_from_buffer(text).filter_map(Result::ok).map(|block| block.contents).collect()
}
