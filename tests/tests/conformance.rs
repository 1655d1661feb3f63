//! Unmodified clients against our agent: each fetches and validates everything, and its streams survive a rotation and a
//! restart of the agent. `cargo xtask test` builds the clients first.

use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use base64::Engine;
use e2e::testkit::client::{Client, tools};
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use spiffe::x509::X509Svid;
use tempfile::TempDir;

const NODE: &str = "spiffe://example.org/node";
const WEB: &str = "spiffe://example.org/web";

/// A server, an agent, and an entry for everything this user runs.
struct House {
    agent: Agent,
    server: Server,
    _folder: TempDir,
}

impl House {
    async fn new() -> Result<Self> {
        Self::with("").await
    }

    /// SVIDs are renewed after about 6 s, and authorities get a successor after 20 s.
    async fn fast() -> Result<Self> {
        Self::with("  default_x509_svid_ttl = \"12s\"\n  ca_ttl = \"40s\"\n").await
    }

    async fn with(server_block: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let binaries = Binaries::signet()?;
        let options = ServerOptions { server_block: server_block.into(), ..ServerOptions::default() };
        let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
        let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
        let agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
        let selector = format!("unix:uid:{}", nix::unistd::getuid());
        server.ok(&["entry", "create", "-parentID", NODE, "-spiffeID", WEB, "-selector", &selector])?;
        Ok(Self { agent, server, _folder: folder })
    }

    /// The key ids in the server's own bundle.
    fn jwt_keys(&self) -> Result<Vec<String>> {
        let document: Value = serde_json::from_str(&self.server.ok(&["bundle", "show", "-format", "spiffe"])?)?;
        let keys = document["keys"].as_array().context("no keys")?;
        Ok(keys.iter().filter_map(|key| key["kid"].as_str().map(ToOwned::to_owned)).collect())
    }
}

fn is(event: &'static str) -> impl Fn(&Value) -> bool {
    move |value| value["event"] == event
}

/// Everything a client can ask once, and what it must say.
async fn fetches_everything(command: impl FnOnce(&Path) -> Command) -> Result<()> {
    let house = House::new().await?;
    let mut command = command(&tools()?);
    command.args(["once", "spiffe://example.org/db"]);
    let client = Client::start(command, &house.agent.socket())?;
    let printed = client.finish().await?;
    let one = |event: &'static str| -> Result<&Value> {
        let mut found = printed.iter().filter(|value| is(event)(value));
        let first = found.next().with_context(|| format!("no {event} in {printed:#?}"))?;
        ensure!(found.next().is_none(), "more than one {event} in {printed:#?}");
        Ok(first)
    };
    assert_eq!(one("x509_svid")?["id"], WEB);
    assert_eq!(one("x509_bundle")?["trust_domain"], "example.org");
    assert_eq!(one("x509_bundle")?["authorities"], 1);
    assert_eq!(one("jwt_svid")?["id"], WEB);
    assert_eq!(one("jwt_svid")?["audience"], json!(["spiffe://example.org/db"]));
    assert_eq!(one("jwt_bundle")?["trust_domain"], "example.org");
    assert_eq!(one("jwt_bundle")?["keys"], json!(house.jwt_keys()?));
    let valid: Vec<(&Value, &Value)> =
        printed.iter().filter(|value| is("jwt_valid")(value)).map(|value| (&value["id"], &value["by"])).collect();
    assert_eq!(valid, [(&json!(WEB), &json!("agent")), (&json!(WEB), &json!("library"))]);
    Ok(())
}

/// A watch sees a rotation, and goes on after the agent was restarted: X.509-SVIDs and JWT keys alike.
async fn watch_survives(command: impl FnOnce(&Path) -> Command) -> Result<()> {
    let mut house = House::fast().await?;
    let mut command = command(&tools()?);
    command.arg("watch");
    let mut client = Client::start(command, &house.agent.socket())?;
    let first = client.next("the first SVID", 0, is("x509_svid")).await?;
    assert_eq!(first["id"], WEB);
    let keys = client.next("the first JWT bundle", 0, is("jwt_bundle")).await?["keys"].clone();
    let rotated =
        client.next("a rotated SVID", 0, |value| is("x509_svid")(value) && value["serial"] != first["serial"]).await?;
    assert_eq!(rotated["id"], WEB);
    assert!(rotated["not_after"].as_i64() > first["not_after"].as_i64(), "{first} then {rotated}");

    house.agent.signal(Signal::SIGTERM).await?;
    let before = client.printed();
    house.agent.start_again().await?;
    let seen: Vec<&Value> = before.iter().map(|value| &value["serial"]).collect();
    let new = |value: &Value| is("x509_svid")(value) && !seen.contains(&&value["serial"]);
    assert_eq!(client.next("an SVID after the restart", before.len(), new).await?["id"], WEB);
    // Some libraries do not report what has not changed, so this waits for the next key.
    let changed = |value: &Value| is("jwt_bundle")(value) && value["keys"] != keys;
    let rotated = client.next("a new JWT key after the restart", before.len(), changed).await?;
    assert_eq!(rotated["trust_domain"], "example.org");
    client.finish().await.map(drop)
}

fn go(tools: &Path) -> Command {
    Command::new(tools.join("bin/client-go"))
}

fn python(tools: &Path) -> Command {
    let mut command = Command::new(tools.join("python/bin/python"));
    command.arg(Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/python/client.py"));
    command
}

fn java(tools: &Path) -> Command {
    let mut command = Command::new("java");
    command.arg("-jar").arg(tools.join("java/client-java.jar"));
    command
}

fn rust(tools: &Path) -> Command {
    Command::new(tools.join("rust/debug/client-rust"))
}

#[tokio::test]
async fn go_spiffe_fetches_everything() -> Result<()> {
    fetches_everything(go).await
}

#[tokio::test]
async fn go_spiffe_watch_survives_rotation_and_restart() -> Result<()> {
    watch_survives(go).await
}

#[tokio::test]
async fn py_spiffe_fetches_everything() -> Result<()> {
    fetches_everything(python).await
}

#[tokio::test]
async fn py_spiffe_watch_survives_rotation_and_restart() -> Result<()> {
    watch_survives(python).await
}

#[tokio::test]
async fn java_spiffe_fetches_everything() -> Result<()> {
    fetches_everything(java).await
}

#[tokio::test]
async fn java_spiffe_watch_survives_rotation_and_restart() -> Result<()> {
    watch_survives(java).await
}

#[tokio::test]
async fn rust_spiffe_fetches_everything() -> Result<()> {
    fetches_everything(rust).await
}

#[tokio::test]
async fn rust_spiffe_watch_survives_rotation_and_restart() -> Result<()> {
    watch_survives(rust).await
}

/// grpcurl has no file of ours: it learns the API by reflection.
fn grpcurl(socket: &Path, request: &Value, method: &str) -> Result<Client> {
    let mut command = Command::new(tools()?.join("bin/grpcurl"));
    command.args(["-plaintext", "-unix", "-H", "workload.spiffe.io: true", "-d", &request.to_string()]);
    command.arg(socket).arg(format!("SpiffeWorkloadAPI/{method}"));
    Client::start(command, socket)
}

fn decoded(value: &Value) -> Result<Vec<u8>> {
    let text = value.as_str().with_context(|| format!("not bytes: {value}"))?;
    Ok(base64::engine::general_purpose::STANDARD.decode(text)?)
}

fn serial(message: &Value) -> Result<String> {
    let svid = X509Svid::from_concatenated(&decoded(&message["svids"][0]["x509Svid"])?.into())?;
    Ok(svid.serial.to_string())
}

#[tokio::test]
async fn grpcurl_fetches_everything() -> Result<()> {
    let house = House::new().await?;
    let socket = house.agent.socket();
    let any = |_: &Value| true;

    let x509 = grpcurl(&socket, &json!({}), "FetchX509SVID")?.next("X.509-SVIDs", 0, any).await?;
    assert_eq!(x509["svids"][0]["spiffeId"], WEB);
    let bundles = grpcurl(&socket, &json!({}), "FetchX509Bundles")?.next("X.509 bundles", 0, any).await?;
    assert_eq!(bundles["bundles"]["spiffe://example.org"], x509["svids"][0]["bundle"]);

    let jwt = grpcurl(&socket, &json!({"audience": ["db"]}), "FetchJWTSVID")?.next("a JWT-SVID", 0, any).await?;
    assert_eq!(jwt["svids"][0]["spiffeId"], WEB);
    let jwks = grpcurl(&socket, &json!({}), "FetchJWTBundles")?.next("JWT bundles", 0, any).await?;
    let jwks: Value = serde_json::from_slice(&decoded(&jwks["bundles"]["spiffe://example.org"])?)?;
    assert_eq!(jwks["keys"][0]["kid"], json!(house.jwt_keys()?[0]));

    let request = json!({"audience": "db", "svid": jwt["svids"][0]["svid"]});
    let valid = grpcurl(&socket, &request, "ValidateJWTSVID")?.next("the verdict", 0, any).await?;
    assert_eq!(valid["spiffeId"], WEB);
    assert_eq!(valid["claims"]["aud"], json!(["db"]));
    Ok(())
}

/// grpcurl does not reconnect; the stream ends with Unavailable, and the next one works.
#[tokio::test]
async fn grpcurl_watch_survives_rotation_and_ends_unavailable_at_restart() -> Result<()> {
    let mut house = House::fast().await?;
    let socket = house.agent.socket();
    let mut client = grpcurl(&socket, &json!({}), "FetchX509SVID")?;
    let first = serial(&client.next("the first SVID", 0, |_| true).await?)?;
    client.next("a rotated SVID", 1, |message| serial(message).is_ok_and(|serial| serial != first)).await?;
    house.agent.signal(Signal::SIGTERM).await?;
    // grpcurl's exit code is 64 and the gRPC code.
    assert_eq!(client.ended().await?.code(), Some(64 + 14));
    house.agent.start_again().await?;
    let again = grpcurl(&socket, &json!({}), "FetchX509SVID")?.next("an SVID after the restart", 0, |_| true).await?;
    assert_ne!(serial(&again)?, first);
    Ok(())
}
