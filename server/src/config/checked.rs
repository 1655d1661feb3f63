//! What is run: every value known to be right, every default filled in.

use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use runtime::duration;
use runtime::hcl::{Located, Mistake, Mistakes};
use runtime::telemetry::settings::{self, HealthPages, Logs, Metrics};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::x509::KeyType;

use super::plugins::Plugins;
use super::raw::{Raw, Subject};
use super::{DEFAULT_SOCKET_PATH, Overrides};

/// The configuration of a server, ready to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it was read from.
    pub path: PathBuf,
    /// The trust domain this server is an authority of.
    pub trust_domain: TrustDomain,
    /// Where runtime data is kept, absolute.
    pub data_dir: PathBuf,
    /// Where agents and admins connect.
    pub bind_address: IpAddr,
    /// The port of `bind_address`.
    pub bind_port: u16,
    /// The admin socket, absolute.
    pub socket_path: PathBuf,
    /// Who may administer the server over TCP, entries with `admin` aside.
    pub admin_ids: Vec<SpiffeId>,
    /// Lifetime of agent SVIDs; `None` means `default_x509_svid_ttl`.
    pub agent_ttl: Option<Duration>,
    /// Lifetime of X.509-SVIDs whose entry says nothing.
    pub default_x509_svid_ttl: Duration,
    /// Lifetime of JWT-SVIDs whose entry says nothing.
    pub default_jwt_svid_ttl: Duration,
    /// Lifetime of X.509 and JWT authorities.
    pub ca_ttl: Duration,
    /// Key type of X.509 authorities.
    pub ca_key_type: KeyType,
    /// Key type of JWT authorities.
    pub jwt_key_type: KeyType,
    /// Subject of CA certificates; at least one part is there.
    pub ca_subject: CaSubject,
    /// The `iss` claim of JWT-SVIDs, if they shall have one.
    pub jwt_issuer: Option<String>,
    /// Whether JWT-SVIDs are refused.
    pub disable_jwt_svids: bool,
    /// Whether every API call is logged with its caller.
    pub audit_log_enabled: bool,
    /// Which calls are slowed down per address.
    pub ratelimit: RateLimit,
    /// Where signing keys are kept.
    pub key_manager: KeyManager,
    /// Where the history is kept.
    pub data_store: DataStore,
    /// How nodes may prove who they are; join tokens are always among them.
    pub node_attestors: Vec<NodeAttestor>,
    /// Removing records of agents that expired long ago; `None` keeps them.
    pub prune_attested_nodes: Option<PruneAttestedNodes>,
    /// Whether each agent's own SPIFFE ID is one of its selectors.
    pub agent_spiffe_id_as_selector: bool,
    /// Logging.
    pub log: Logs,
    /// Metrics.
    pub telemetry: Metrics,
    /// Health pages; `None` serves none.
    pub health: Option<HealthPages>,
    /// What was not refused but should be said once at start.
    pub warnings: Vec<Mistake>,
}

/// The subject of CA certificates.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CaSubject {
    /// `C`
    pub country: Vec<String>,
    /// `O`
    pub organization: Vec<String>,
    /// `CN`; empty for none.
    pub common_name: String,
}

/// Which calls are slowed down.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RateLimit {
    /// Attestation, per address.
    pub attestation: bool,
    /// Signing, per agent.
    pub signing: bool,
    /// Connections without a certificate that one network may hold; if not set, a quarter of what is free.
    pub connections_per_network: Option<usize>,
}

/// Where signing keys are kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyManager {
    /// In memory: every start makes a new authority.
    Memory,
    /// In one private file.
    Disk {
        /// The file, absolute.
        keys_path: PathBuf,
    },
}

/// Where the history is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataStore {
    /// Embedded, on disk.
    Sled {
        /// The directory, absolute.
        dir: PathBuf,
    },
    /// In memory, for trying things out: everything is lost at the end of the process.
    Memory,
}

/// One way for nodes to prove who they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeAttestor {
    /// A secret that is good for one attestation.
    JoinToken,
    /// Possession of the key of an X.509 certificate.
    X509Pop(X509Pop),
}

/// Options of the `x509pop` attestor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct X509Pop {
    /// What the certificates chain to.
    pub roots: X509PopRoots,
    /// Template of the agent's path below `/spire/agent`; `None` is the mode's default.
    pub agent_path_template: Option<String>,
    /// How many intermediates a chain may have.
    pub max_intermediates: usize,
    /// The largest RSA key of any certificate, in bits.
    pub max_rsa_key_size: usize,
    /// Whether the caller's address has to be among the certificate's.
    pub verify_client_ip: bool,
}

/// What the certificates of `x509pop` chain to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum X509PopRoots {
    /// Certificate authorities of the operator's, as DER.
    ExternalPki(Vec<Bytes>),
    /// The trust domain's own bundle: an SVID is exchanged for a node's identity.
    Spiffe {
        /// The path prefix that such SVIDs have and that is cut off; begins and ends with `/`.
        prefix: String,
    },
}

/// When records of expired agents are removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PruneAttestedNodes {
    /// How long after expiry.
    pub expired_for: Duration,
    /// At most so many in one step.
    pub batch_size: u32,
    /// Also those that could not attest again by themselves.
    pub tofu_nodes: bool,
}

const DEFAULT_CA_TTL: Duration = Duration::from_secs(24 * 3600);
const DEFAULT_X509_SVID_TTL: Duration = Duration::from_secs(3600);
const DEFAULT_JWT_SVID_TTL: Duration = Duration::from_secs(300);
const DEFAULT_PRUNE_BATCH: u32 = 1000;

/// The value of a flag, if it was given and is not empty, else that of the file.
fn first(flag: Option<&String>, name: &str, file: Option<Located<String>>) -> Option<Located<String>> {
    flag.map(|value| Located::outside(name, value.clone()))
        .into_iter()
        .chain(file)
        .find(|given| !given.value.is_empty())
}

/// Checks what was read; `None` if something that has no default is missing or wrong. The caller decides by the
/// mistakes, of which there may be some even with a configuration.
pub fn check(raw: Raw<'_>, overrides: &Overrides, mistakes: &Mistakes) -> Option<Config> {
    let server = raw.server;
    let missing = |key: &str, remedy: &str| {
        mistakes.refuse(server.line(), server.key(key), "must be configured", remedy);
    };

    let trust_domain = first(overrides.trust_domain.as_ref(), "-trustDomain", raw.trust_domain);
    let trust_domain = match trust_domain {
        Some(given) => check_trust_domain(&given, mistakes),
        None => {
            missing("trust_domain", "add trust_domain = \"example.org\"");
            None
        }
    };
    let data_dir = first(overrides.data_dir.as_ref(), "-dataDir", raw.data_dir);
    if data_dir.is_none() {
        missing("data_dir", "add data_dir = \"/var/lib/spire/server\"");
    }
    let data_dir = data_dir.map(|given| absolute(Path::new(&given.value)));

    let bind_address = first(overrides.bind_address.as_ref(), "-bindAddress", raw.bind_address);
    let bind_address = bind_address.map_or(Some(IpAddr::V4(Ipv4Addr::UNSPECIFIED)), |given| address(&given, mistakes));
    let bind_port = overrides.bind_port.map(|port| Located::outside("-serverPort", port)).or(raw.bind_port);
    // Port 0 counts as unset, as in SPIRE.
    let bind_port = bind_port.filter(|port| port.value != 0);
    let bind_port = bind_port.map_or(Some(8081), |given| settings::port(&server, Some(given)));
    let socket_path = first(overrides.socket_path.as_ref(), "-socketPath", raw.socket_path)
        .map_or_else(|| PathBuf::from(DEFAULT_SOCKET_PATH), |given| absolute(Path::new(&given.value)));

    let ttl = |given: Option<Located<Duration>>, default: Duration| match given {
        Some(given) if given.value.is_zero() => {
            mistakes.refuse_at(&given, "nothing can live for 0s", "write a longer time, or remove the key");
            default
        }
        Some(given) => given.value,
        None => default,
    };
    let agent_ttl = raw.agent_ttl.filter(|ttl| !ttl.value.is_zero());
    let (agent_ttl_line, agent_ttl) = (agent_ttl.as_ref().and_then(|ttl| ttl.line), agent_ttl.map(|ttl| ttl.value));
    let lines = [
        ("default_x509_svid_ttl", raw.default_x509_svid_ttl.as_ref().and_then(|ttl| ttl.line)),
        ("default_jwt_svid_ttl", raw.default_jwt_svid_ttl.as_ref().and_then(|ttl| ttl.line)),
        ("agent_ttl", agent_ttl_line),
    ];
    let ca_ttl = ttl(raw.ca_ttl, DEFAULT_CA_TTL);
    let default_x509_svid_ttl = ttl(raw.default_x509_svid_ttl, DEFAULT_X509_SVID_TTL);
    let default_jwt_svid_ttl = ttl(raw.default_jwt_svid_ttl, DEFAULT_JWT_SVID_TTL);
    for ((key, line), ttl) in
        lines.into_iter().zip([Some(default_x509_svid_ttl), Some(default_jwt_svid_ttl), agent_ttl])
    {
        if let Some((message, remedy)) = ttl.and_then(|ttl| cut_short(ttl, ca_ttl)) {
            mistakes.warn(line, server.key(key), message, remedy);
        }
    }

    let key_type = |given: Option<Located<String>>, default: KeyType| {
        let Some(given) = given.filter(|given| !given.value.is_empty()) else { return default };
        KeyType::parse(&given.value.to_ascii_lowercase()).unwrap_or_else(|_| {
            let message = format!("{:?} is no key type", given.value);
            mistakes.refuse_at(&given, message, "write ec-p256, ec-p384, rsa-2048 or rsa-4096");
            default
        })
    };
    let ca_key_type = key_type(raw.ca_key_type, KeyType::EcP256);
    let jwt_key_type = key_type(raw.jwt_key_type, ca_key_type);

    let admin_ids = raw
        .admin_ids
        .iter()
        .filter_map(|given| {
            SpiffeId::parse(&given.value)
                .map_err(|error| mistakes.refuse_at(given, format!("{:?}: {error}", given.value), "write a SPIFFE ID"))
                .ok()
        })
        .collect();

    let prune_attested_nodes =
        raw.prune_attested_nodes_expired_for.filter(|after| !after.value.is_zero()).map(|after| {
            let batch_size = raw.prune_attested_nodes_batch_size.map_or(0, |size| size.value);
            PruneAttestedNodes {
                expired_for: after.value,
                batch_size: if batch_size == 0 { DEFAULT_PRUNE_BATCH } else { batch_size },
                tofu_nodes: raw.prune_tofu_nodes,
            }
        });

    let log = Logs {
        file: first(overrides.log_file.as_ref(), "-logFile", raw.log_file).map(|file| PathBuf::from(file.value)),
        level: settings::level(&server, first(overrides.log_level.as_ref(), "-logLevel", raw.log_level)),
        format: settings::format(&server, first(overrides.log_format.as_ref(), "-logFormat", raw.log_format)),
        source_location: overrides.log_source_location || raw.log_source_location,
    };

    let plugins = Plugins::check(&raw.plugins, data_dir.as_deref(), mistakes);
    Some(Config {
        path: PathBuf::new(),
        trust_domain: trust_domain?,
        data_dir: data_dir?,
        bind_address: bind_address?,
        bind_port: bind_port?,
        socket_path,
        admin_ids,
        agent_ttl,
        default_x509_svid_ttl,
        default_jwt_svid_ttl,
        ca_ttl,
        ca_key_type,
        jwt_key_type,
        ca_subject: ca_subject(raw.ca_subject, mistakes),
        jwt_issuer: raw.jwt_issuer.map(|issuer| issuer.value).filter(|issuer| !issuer.is_empty()),
        disable_jwt_svids: raw.disable_jwt_svids,
        audit_log_enabled: raw.audit_log_enabled,
        ratelimit: RateLimit {
            attestation: raw.limit_attestation,
            signing: raw.limit_signing,
            connections_per_network: raw.connections_per_network.and_then(|count| usize::try_from(count.value).ok()),
        },
        key_manager: plugins.key_manager?,
        data_store: plugins.data_store?,
        node_attestors: plugins.node_attestors,
        prune_attested_nodes,
        agent_spiffe_id_as_selector: raw.agent_spiffe_id_as_selector,
        log,
        telemetry: raw.metrics,
        health: raw.health,
        warnings: Vec::new(),
    })
}

fn check_trust_domain(given: &Located<String>, mistakes: &Mistakes) -> Option<TrustDomain> {
    let remedy = "write a name of lower-case letters, digits, dots, dashes and underscores";
    let checked = TrustDomain::parse_lenient(&given.value).and_then(|name| name.check_own().map(|()| name));
    checked.map_err(|error| mistakes.refuse_at(given, format!("{:?}: {error}", given.value), remedy)).ok()
}

/// An address as it stands, in brackets, or by name.
fn address(given: &Located<String>, mistakes: &Mistakes) -> Option<IpAddr> {
    let name = settings::host(given, mistakes)?;
    if let Ok(address) = name.parse() {
        return Some(address);
    }
    match (name.as_str(), 0).to_socket_addrs().map(|mut found| found.next()) {
        Ok(Some(found)) => Some(found.ip()),
        Ok(None) | Err(_) => {
            let message = format!("{:?} is neither an address nor a name that resolves", given.value);
            mistakes.refuse_at(given, message, "write an IP address such as 0.0.0.0");
            None
        }
    }
}

pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn ca_subject(given: Option<Subject>, mistakes: &Mistakes) -> CaSubject {
    let default = CaSubject {
        country: vec!["US".to_owned()],
        organization: vec!["SPIFFE".to_owned()],
        common_name: String::new(),
    };
    match given {
        None => default,
        Some(given) if given.country.is_empty() && given.organization.is_empty() && given.common_name.is_empty() => {
            mistakes.warn(given.line, "server.ca_subject", "is empty; the default is used", "remove it or fill it in");
            default
        }
        Some(Subject { country, organization, common_name, .. }) => CaSubject { country, organization, common_name },
    }
}

/// An authority is replaced when a sixth of its life, at most seven days, is left; what lives longer may be cut short.
fn cut_short(ttl: Duration, ca_ttl: Duration) -> Option<(String, String)> {
    const CAP: Duration = Duration::from_secs(7 * 24 * 3600);
    let guaranteed = (ca_ttl / 6).min(CAP);
    if ttl <= guaranteed {
        return None;
    }
    let ttl_text = duration::format(ttl);
    let message =
        format!("{ttl_text} is not guaranteed with ca_ttl = {:?}; SVIDs may live shorter", duration::format(ca_ttl));
    let shorter = duration::format(Duration::from_secs(guaranteed.as_secs()));
    let remedy = if ttl <= CAP {
        format!("set it to {shorter} or less, or ca_ttl to {} or more", duration::format(ttl * 6))
    } else {
        format!("set it to {shorter} or less; more than {} is never guaranteed", duration::format(CAP))
    };
    Some((message, remedy))
}
