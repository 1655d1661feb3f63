//! Any server with any agent, ours or SPIRE's: attestation, rotation, restarts, change, eviction, ban.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use spiffe_proto::workload::{JwtBundlesRequest, JwtsvidRequest};

use crate::testkit::workload::Workload;
use crate::testkit::{Agent, AgentOptions, Binaries, Kind, Server, ServerOptions, secured, unix, wait};

/// How a node proves itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attestation {
    /// A token that can be used once.
    JoinToken,
    /// Possession of the key of a certificate.
    X509Pop,
}

/// Longer than any poll of a peer, plus signing.
const PATIENCE: Duration = Duration::from_secs(40);
const NODE: &str = "spiffe://example.org/node";

/// Everything that must hold between this server and this agent; `said` hears of each step that does.
///
/// # Errors
/// Says which step did not hold.
pub async fn run(
    server: &Binaries,
    agent: &Binaries,
    attestation: Attestation,
    folder: &Path,
    said: &mut (dyn FnMut(&str) + Send),
) -> Result<()> {
    let proof = Proof::new(folder, attestation)?;
    let options = ServerOptions {
        server_block: "  default_x509_svid_ttl = \"20s\"\n  agent_ttl = \"40s\"\n  ca_ttl = \"1h\"".into(),
        plugins: proof.server_plugin(),
        ..ServerOptions::default()
    };
    let mut server = Server::start(server, &folder.join("server"), &options).await?;
    let settings = proof.agent_options(&server)?;
    let mut agent = Agent::start(agent, &folder.join("agent"), &server, &settings).await?;
    said("the agent attested");

    let parent = proof.parent(&server)?;
    let selector = format!("unix:uid:{}", nix::unistd::getuid());
    let created = server.ok(&[
        "entry",
        "create",
        "-parentID",
        &parent,
        "-spiffeID",
        "spiffe://example.org/web",
        "-selector",
        &selector,
    ])?;
    let entry = created
        .lines()
        .find(|line| line.starts_with("Entry ID"))
        .and_then(|line| line.split_once(':'))
        .context("no entry id")?;
    let entry = entry.1.trim().to_owned();
    let workload = Workload::follow(&agent.socket(), None);
    let first = workload.first(PATIENCE).await.context("first SVID")?;
    ensure!(first.svid.id.as_str() == "spiffe://example.org/web");
    said("a workload holds an X.509-SVID");
    token(&agent).await.context("JWT-SVID")?;
    said("a workload holds a JWT-SVID that verifies with the bundle");

    renewed(&workload, &first.svid.serial.to_string()).await.context("rotation of the SVID")?;
    said("its SVID rotated");
    let serial = agent_serial(&server)?;
    wait::until("the agent's renewal", PATIENCE * 2, async || agent_serial(&server).ok().filter(|now| *now != serial))
        .await?;
    said("the agent's SVID rotated");

    let before = workload.identity().context("no identity")?.svid.serial.to_string();
    server.signal(Signal::SIGTERM).await?;
    server.start_again().await?;
    renewed(&workload, &before).await.context("rotation after the server's restart")?;
    said("rotation went on after a restart of the server");

    let before = workload.identity().context("no identity")?.svid.serial.to_string();
    agent.signal(Signal::SIGTERM).await?;
    agent.start_again().await?;
    renewed(&workload, &before).await.context("the stream after the agent's restart")?;
    ensure!(server.ok(&["agent", "count"])?.trim() == "1 attested agent", "the agent attested anew");
    said("the workload's stream came back after a restart of the agent");

    let dns = "web.example.org";
    server.ok(&[
        "entry",
        "update",
        "-entryID",
        &entry,
        "-parentID",
        &parent,
        "-spiffeID",
        "spiffe://example.org/web",
        "-selector",
        &selector,
        "-dns",
        dns,
    ])?;
    wait::until("the changed SVID", PATIENCE, async || {
        let leaf = workload.identity()?.svid.chain.first()?.clone();
        leaf.windows(dns.len()).any(|window| window == dns.as_bytes()).then_some(())
    })
    .await?;
    said("a changed entry arrived");
    server.ok(&["entry", "delete", "-entryID", &entry])?;
    wait::until("the end of the identity", PATIENCE, async || {
        let ended = workload.ended.lock().ok()?.clone()?;
        (ended.code() == tonic::Code::PermissionDenied).then_some(())
    })
    .await?;
    said("a deleted entry took its SVID with it");

    let id = agent_id(&server)?;
    server.ok(&["agent", "evict", "-spiffeID", &id])?;
    match attestation {
        Attestation::JoinToken => {
            wait::until("the evicted agent's end", PATIENCE * 2, async || agent.ended().ok().flatten()).await?;
            said("an evicted agent without a new token shut down");
            agent = Agent::start(
                &agent.binaries().clone(),
                &folder.join("second"),
                &server,
                &proof.agent_options(&server)?,
            )
            .await?;
        }
        Attestation::X509Pop => {
            wait::until("the evicted agent's attestation", PATIENCE * 2, async || agent_id(&server).ok()).await?;
            said("an evicted agent attested again by itself");
        }
    }
    let id = wait::until("the agent", PATIENCE, async || agent_id(&server).ok()).await?;
    server.ok(&["agent", "ban", "-spiffeID", &id])?;
    wait::until("the banned agent's end", PATIENCE * 2, async || agent.ended().ok().flatten()).await?;
    said("a banned agent shut down");
    Ok(())
}

async fn renewed(workload: &Workload, serial: &str) -> Result<()> {
    let mut updates = workload.updates();
    let other = updates
        .wait_for(|identity| identity.as_ref().is_some_and(|identity| identity.svid.serial.to_string() != serial));
    tokio::time::timeout(PATIENCE, other).await.context("no new SVID")??;
    Ok(())
}

async fn token(agent: &Agent) -> Result<()> {
    let mut client = SpiffeWorkloadApiClient::new(unix(&agent.socket()).await?);
    let request = JwtsvidRequest { audience: vec!["peers".into()], spiffe_id: String::new() };
    let answer = client.fetch_jwtsvid(secured(request)).await?.into_inner();
    let token = answer.svids.first().context("no token")?.svid.clone();
    let bundles = client
        .fetch_jwt_bundles(secured(JwtBundlesRequest {}))
        .await?
        .into_inner()
        .message()
        .await?
        .context("no bundles")?;
    let jwks = bundles.bundles.get("spiffe://example.org").context("no bundle of the own trust domain")?;
    let trust_domain = TrustDomain::parse("example.org")?;
    // The Workload API's key sets carry no `use`; a SPIFFE bundle document needs one.
    let mut jwks: serde_json::Value = serde_json::from_slice(jwks)?;
    for key in jwks["keys"].as_array_mut().context("no keys")? {
        key["use"] = "jwt-svid".into();
    }
    let (bundle, _) = Bundle::from_spiffe_json(trust_domain, jwks.to_string().as_bytes())?;
    let verified = spiffe::verify::jwt_svid(&token, "peers", &bundle, SystemTime::now())?;
    ensure!(verified.id.as_str() == "spiffe://example.org/web");
    Ok(())
}

fn agents(server: &Server) -> Result<serde_json::Value> {
    let listed: serde_json::Value = serde_json::from_str(&server.ok(&["agent", "list", "-output", "json"])?)?;
    let newest = listed["agents"].as_array().and_then(|agents| agents.iter().find(|agent| agent["banned"] != true));
    newest.cloned().context("no agent listed")
}

fn agent_id(server: &Server) -> Result<String> {
    Ok(format!("spiffe://example.org{}", agents(server)?["id"]["path"].as_str().context("no id")?))
}

fn agent_serial(server: &Server) -> Result<String> {
    Ok(agents(server)?["x509svid_serial_number"].as_str().context("no serial")?.to_owned())
}

/// What the node attests by.
pub enum Proof {
    /// A token of the server that it attests to.
    JoinToken,
    /// Paths of the authority's certificate, of the node's, and of the node's key.
    X509Pop {
        /// PEM.
        authority: String,
        /// PEM.
        certificate: String,
        /// PEM of PKCS#8.
        key: String,
    },
}

impl Proof {
    /// Prepares whatever the method needs in `folder`.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn new(folder: &Path, attestation: Attestation) -> Result<Self> {
        if attestation == Attestation::JoinToken {
            return Ok(Self::JoinToken);
        }
        use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose};
        fs::create_dir_all(folder)?;
        let write = |name: &str, text: String| -> Result<String> {
            let path = folder.join(name);
            fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let authority_key = KeyPair::generate()?;
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        authority.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        authority.distinguished_name.push(DnType::CommonName, "nodes");
        let authority_certificate = authority.self_signed(&authority_key)?;
        let issuer = Issuer::new(authority, &authority_key);
        let key = KeyPair::generate()?;
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name.push(DnType::CommonName, "node-1");
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        leaf.use_authority_key_identifier_extension = true;
        let certificate = leaf.signed_by(&key, &issuer)?;
        Ok(Self::X509Pop {
            authority: write("nodes-ca.pem", authority_certificate.pem())?,
            certificate: write("node.pem", certificate.pem())?,
            key: write("node.key", key.serialize_pem())?,
        })
    }

    /// The plugin block of the server.
    #[must_use]
    pub fn server_plugin(&self) -> String {
        match self {
            Self::JoinToken => String::new(),
            Self::X509Pop { authority, .. } => {
                format!("  NodeAttestor \"x509pop\" {{ plugin_data {{ ca_bundle_path = \"{authority}\" }} }}")
            }
        }
    }

    /// What the agent is started with.
    ///
    /// # Errors
    /// If the server does not give a token.
    pub fn agent_options(&self, server: &Server) -> Result<AgentOptions> {
        Ok(match self {
            Self::JoinToken => AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() },
            Self::X509Pop { certificate, key, .. } => AgentOptions {
                node_attestor: Some(format!(
                    "NodeAttestor \"x509pop\" {{ plugin_data {{ private_key_path = \"{key}\" certificate_path = \"{certificate}\" }} }}"
                )),
                ..AgentOptions::default()
            },
        })
    }

    /// The id to register workloads under: the token's alias, or an alias made for the node's selector.
    fn parent(&self, server: &Server) -> Result<String> {
        if matches!(self, Self::X509Pop { .. }) {
            server.ok(&["entry", "create", "-node", "-spiffeID", NODE, "-selector", "x509pop:subject:cn:node-1"])?;
        }
        Ok(NODE.to_owned())
    }
}

/// The four pairings of two implementations that mix them.
pub fn pairings<'a>(ours: &'a Binaries, theirs: &'a Binaries) -> [(&'a Binaries, &'a Binaries, Attestation); 4] {
    use Attestation::{JoinToken, X509Pop};
    [(ours, theirs, JoinToken), (ours, theirs, X509Pop), (theirs, ours, JoinToken), (theirs, ours, X509Pop)]
}

/// A name for people.
pub fn name(kind: Kind) -> &'static str {
    match kind {
        Kind::Signet => "Signet",
        Kind::Spire => "SPIRE",
    }
}
