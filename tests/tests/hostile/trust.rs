//! Administrators of another trust domain, whose bundle changes or goes while they are connected.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use e2e::testkit::{Binaries, Presented, Server, ServerOptions, tls, wire::loopback};
use spiffe_proto::entry::CountEntriesRequest;
use spiffe_proto::entry::entry_client::EntryClient;
use tonic::transport::Channel;
use tonic::{Code, Status};

use super::forge::Forge;

const ADMIN: &str = "spiffe://other.test/admin";
const DISTRUSTED: &str = "the certificate of this connection is no longer trusted; connect again";

async fn connect(server: &Server, presented: Presented) -> Result<Channel> {
    tls(SocketAddr::from(([127, 0, 0, 1], server.port)), loopback(1)?, Some(presented)).await
}

async fn count(channel: &Channel) -> Result<i32, Status> {
    let counted = EntryClient::new(channel.clone()).count_entries(CountEntriesRequest::default()).await?;
    Ok(counted.into_inner().count)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connected_admin_of_another_domain_loses_its_authority_with_its_bundle() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let start = async |name: &str, trust_domain: &str, server_block: String| {
        let options = ServerOptions { trust_domain: trust_domain.into(), server_block, ..ServerOptions::default() };
        Server::start(&Binaries::signet()?, &folder.path().join(name), &options).await
    };
    let server = start("server", "example.org", format!("  admin_ids = [\"{ADMIN}\"]\n")).await?;
    let other = start("other", "other.test", String::new()).await?;
    let another = start("another", "other.test", String::new()).await?;
    let file = folder.path().join("bundle.pem");
    let path = file.to_str().context("not UTF-8")?;
    let set = |of: &[&Server]| -> Result<()> {
        let shown = of.iter().map(|server| server.ok(&["bundle", "show"])).collect::<Result<Vec<_>>>()?;
        std::fs::write(&file, shown.concat())?;
        server.ok(&["bundle", "set", "-id", "spiffe://other.test", "-path", path])?;
        Ok(())
    };
    let admin = |of: &Server| Forge::of(of)?.certificate(&[ADMIN.as_bytes()]);

    set(&[&other])?;
    let deleted = connect(&server, admin(&other)?).await?;
    assert_eq!(count(&deleted).await?, 0);
    server.ok(&["bundle", "delete", "-id", "spiffe://other.test"])?;
    let status = count(&deleted).await.err().context("served without a bundle")?;
    assert_eq!((status.code(), status.message()), (Code::Unavailable, DISTRUSTED));
    // The channel connects anew, and is not let in.
    let code = count(&deleted).await.err().context("let in without a bundle")?.code();
    assert!(matches!(code, Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled), "{code:?}");

    set(&[&other])?;
    let rotated = connect(&server, admin(&other)?).await?;
    set(&[&other, &another])?;
    assert_eq!(count(&rotated).await?, 0);
    let fresh = connect(&server, admin(&another)?).await?;
    assert_eq!(count(&fresh).await?, 0);
    set(&[&another])?;
    let status = count(&rotated).await.err().context("served without its root")?;
    assert_eq!((status.code(), status.message()), (Code::Unavailable, DISTRUSTED));
    assert_eq!(count(&fresh).await?, 0);
    Ok(())
}
