//! What is run: every value known to be right, every default filled in.

use std::net::{IpAddr, Ipv4Addr, ToSocketAddrs};
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use runtime::duration;
use runtime::hcl::{Located, Mistake, Mistakes, Plugin, Section};
use runtime::telemetry::settings::{self, HealthPages, Logs, Metrics};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::x509::KeyType;

use super::raw::{Raw, Subject};
use super::{DEFAULT_SOCKET_PATH, Overrides, sqlite};

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
    /// Signing, per address.
    pub signing: bool,
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

/// Node attestors of SPIRE that come later.
const LATER_ATTESTORS: [&str; 9] =
    ["sshpop", "k8s_psat", "http_challenge", "tpm_devid", "aws_iid", "azure_msi", "azure_imds", "gcp_iit", "k8s_sat"];

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
        ratelimit: RateLimit { attestation: raw.limit_attestation, signing: raw.limit_signing },
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
    let name = given.value.trim_matches(['[', ']']);
    if let Ok(address) = name.parse() {
        return Some(address);
    }
    match (name, 0).to_socket_addrs().map(|mut found| found.next()) {
        Ok(Some(found)) => Some(found.ip()),
        Ok(None) | Err(_) => {
            let message = format!("{:?} is neither an address nor a name that resolves", given.value);
            mistakes.refuse_at(given, message, "write an IP address such as 0.0.0.0");
            None
        }
    }
}

fn absolute(path: &Path) -> PathBuf {
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

/// What the plugins say.
#[derive(Default)]
struct Plugins {
    key_manager: Option<KeyManager>,
    data_store: Option<DataStore>,
    node_attestors: Vec<NodeAttestor>,
}

impl Plugins {
    fn check(plugins: &[Plugin<'_>], data_dir: Option<&Path>, mistakes: &Mistakes) -> Self {
        let mut found = Self { node_attestors: vec![NodeAttestor::JoinToken], ..Self::default() };
        let embedded = data_dir.map(|dir| DataStore::Sled { dir: dir.join("history") });
        let of = |kind: &str| plugins.iter().filter(|plugin| plugin.kind.value == kind).collect::<Vec<_>>();
        for (kind, names) in [("KeyManager", "disk or memory"), ("DataStore", "sled")] {
            for extra in of(kind).into_iter().skip(1) {
                mistakes.refuse_at(&extra.name, format!("a second {kind}"), format!("keep one, {names}"));
            }
        }
        match of("KeyManager").first() {
            Some(plugin) => found.key_manager = key_manager(plugin, mistakes),
            None => {
                let remedy = "add KeyManager \"disk\" { plugin_data { keys_path = \"…\" } }";
                mistakes.refuse(None, "plugins.KeyManager", "must be configured", remedy);
            }
        }
        found.data_store = match of("DataStore").first() {
            Some(plugin) => data_store(plugin, embedded, mistakes),
            None => embedded,
        };
        for plugin in plugins {
            match plugin.kind.value.as_str() {
                "KeyManager" | "DataStore" => {}
                "NodeAttestor" => found.node_attestors.extend(node_attestor(plugin, mistakes)),
                "UpstreamAuthority" | "Notifier" | "BundlePublisher" | "CredentialComposer" => {
                    let message = format!("plugins of type {} are not served yet", plugin.kind.value);
                    mistakes.refuse_at(&plugin.name, message, "remove the block");
                }
                other => {
                    let remedy = "the types are KeyManager, DataStore and NodeAttestor";
                    mistakes.refuse_at(&plugin.name, format!("there is no plugin type {other:?}"), remedy);
                }
            }
        }
        found
    }
}

fn key_manager(plugin: &Plugin<'_>, mistakes: &Mistakes) -> Option<KeyManager> {
    let data = &plugin.data;
    let checked = match plugin.name.value.as_str() {
        "memory" => Some(KeyManager::Memory),
        "disk" => match data.text("keys_path").filter(|path| !path.value.is_empty()) {
            Some(path) => Some(KeyManager::Disk { keys_path: absolute(Path::new(&path.value)) }),
            None => {
                let remedy = "add plugin_data { keys_path = \"…/keys.json\" }";
                mistakes.refuse_at(&plugin.name, "keys_path must be configured", remedy);
                None
            }
        },
        "aws_kms" | "gcp_kms" | "azure_key_vault" | "hashicorp_vault" => {
            mistakes.refuse_at(&plugin.name, "this key manager is not served yet", "use disk or memory");
            return None;
        }
        other => {
            mistakes.refuse_at(&plugin.name, format!("there is no key manager {other:?}"), "use disk or memory");
            return None;
        }
    };
    data.refuse_unknown();
    checked
}

fn data_store(plugin: &Plugin<'_>, embedded: Option<DataStore>, mistakes: &Mistakes) -> Option<DataStore> {
    let data = &plugin.data;
    match plugin.name.value.as_str() {
        "sled" => {
            let dir = data.text("directory").filter(|dir| !dir.value.is_empty());
            data.refuse_unknown();
            dir.map_or(embedded, |dir| Some(DataStore::Sled { dir: absolute(Path::new(&dir.value)) }))
        }
        "memory" => {
            data.refuse_unknown();
            let message = "everything is lost when the server ends";
            mistakes.warn(plugin.name.line, plugin.name.key.clone(), message, "use DataStore \"sled\" to keep it");
            Some(DataStore::Memory)
        }
        "sql" => sql(plugin, mistakes).then_some(embedded).flatten(),
        other => {
            let message = format!("there is no data store {other:?}");
            mistakes.refuse_at(&plugin.name, message, "use DataStore \"sled\"");
            None
        }
    }
}

/// SPIRE's SQL store: SQLite stands for "embedded", unless it holds what would be missed.
fn sql(plugin: &Plugin<'_>, mistakes: &Mistakes) -> bool {
    let data = &plugin.data;
    for key in ["ro_connection_string", "root_ca_path", "client_cert_path", "client_key_path", "conn_max_lifetime"] {
        data.text(key);
    }
    data.integer("max_open_conns");
    data.integer("max_idle_conns");
    data.boolean("disable_migration");
    data.boolean("log_sql");
    let connection = data.text("connection_string");
    // `database_type "aws_postgres" { … }` is a block; it names its type by its label.
    if data.is_block("database_type") {
        data.labelled("database_type").iter().for_each(|(label, _)| refuse_database(label, mistakes));
        return false;
    }
    let Some(database) = data.text("database_type") else {
        let remedy = "use DataStore \"sled\" {}";
        mistakes.refuse_at(&plugin.name, "database_type must be configured", remedy);
        return false;
    };
    data.warn_unknown();
    if database.value != "sqlite3" {
        refuse_database(&database, mistakes);
        return false;
    }
    let file = connection.as_ref().and_then(|given| sqlite::file_of(&given.value));
    if let (Some(file), Some(given)) = (file, &connection) {
        match sqlite::holds_entries(&file) {
            Ok(false) => {}
            Ok(true) => {
                let message =
                    format!("{} holds the entries of a SPIRE server, which this server would not see", file.display());
                let remedy =
                    "export them with `spire-server entry show -output json`, or name a file that does not exist";
                mistakes.refuse_at(given, message, remedy);
                return false;
            }
            Err(error) => {
                let message = format!("cannot tell whether {} holds entries: {error}", file.display());
                mistakes.refuse_at(given, message, "make the file readable, or use DataStore \"sled\"");
                return false;
            }
        }
    }
    let message = "sqlite3 means \"embedded\" here: the history is kept by sled in data_dir";
    mistakes.warn(database.line, database.key, message, "write DataStore \"sled\" {} to silence this");
    true
}

fn refuse_database(given: &Located<String>, mistakes: &Mistakes) {
    let message = format!("the database {:?} cannot be used", given.value);
    let remedy = "one server keeps its own embedded store (DataStore \"sled\" {}); shared databases come later";
    mistakes.refuse_at(given, message, remedy);
}

fn node_attestor(plugin: &Plugin<'_>, mistakes: &Mistakes) -> Option<NodeAttestor> {
    match plugin.name.value.as_str() {
        "join_token" => {
            // It is always there; the block is accepted because configurations have it.
            plugin.data.warn_unknown();
            None
        }
        "x509pop" => x509pop(&plugin.data, plugin, mistakes).map(NodeAttestor::X509Pop),
        name if LATER_ATTESTORS.contains(&name) => {
            mistakes.refuse_at(&plugin.name, "this node attestor is not served yet", "use join_token or x509pop");
            None
        }
        other => {
            let message = format!("there is no node attestor {other:?}");
            mistakes.refuse_at(&plugin.name, message, "use join_token or x509pop");
            None
        }
    }
}

fn x509pop(data: &Section<'_>, plugin: &Plugin<'_>, mistakes: &Mistakes) -> Option<X509Pop> {
    let mode = data.text("mode").filter(|mode| !mode.value.is_empty());
    let one = data.text("ca_bundle_path").filter(|path| !path.value.is_empty());
    let many = data.texts("ca_bundle_paths").filter(|paths| !paths.value.is_empty());
    // The code of SPIRE reads `spiffe_prefix`, its documentation says `svid_prefix`; both are taken.
    let prefix = data.text("spiffe_prefix").or_else(|| data.text("svid_prefix"));
    let template = data.text("agent_path_template").filter(|template| !template.value.is_empty());
    if let Some(template) = template.as_ref().filter(|template| !template.value.starts_with('/')) {
        mistakes.refuse_at(template, "does not begin with /", format!("write \"/{}\"", template.value));
    }
    let max_intermediates = data.count("max_intermediates", 1).map_or(4, |count| count.value);
    let max_rsa_key_size = data.count("max_rsa_key_size", 1).map_or(8192, |count| count.value);
    let verify_client_ip = data.boolean("verify_client_ip").is_some_and(|on| on.value);
    if let (Some(one), Some(_)) = (&one, &many) {
        mistakes.refuse_at(one, "cannot be set together with ca_bundle_paths", "keep one of the two");
    }
    let roots = match mode.as_ref().map_or("external_pki", |mode| mode.value.as_str()) {
        "external_pki" => {
            let paths: Vec<Located<String>> =
                one.into_iter().chain(many.into_iter().flat_map(|many| many.value)).collect();
            if paths.is_empty() {
                let message = "one of ca_bundle_path or ca_bundle_paths must be configured";
                mistakes.refuse_at(&plugin.name, message, "add ca_bundle_path = \"…\"");
            }
            Some(X509PopRoots::ExternalPki(paths.iter().flat_map(|path| certificates(path, mistakes)).collect()))
        }
        "spiffe" => {
            for given in
                one.iter().map(|one| (&one.key, one.line)).chain(many.iter().map(|many| (&many.key, many.line)))
            {
                mistakes.refuse(given.1, given.0.clone(), "has no meaning in mode spiffe", "remove it");
            }
            let mut prefix = prefix.map_or_else(|| "/spire-exchange/".to_owned(), |prefix| prefix.value);
            if !prefix.ends_with('/') {
                prefix.push('/');
            }
            Some(X509PopRoots::Spiffe { prefix })
        }
        other => {
            let message = format!("there is no mode {other:?}");
            if let Some(mode) = &mode {
                mistakes.refuse_at(mode, message, "write external_pki or spiffe");
            }
            None
        }
    };
    data.refuse_unknown();
    Some(X509Pop {
        roots: roots?,
        agent_path_template: template.map(|template| template.value),
        max_intermediates: usize::try_from(max_intermediates).unwrap_or(usize::MAX),
        max_rsa_key_size: usize::try_from(max_rsa_key_size).unwrap_or(usize::MAX),
        verify_client_ip,
    })
}

fn certificates(path: &Located<String>, mistakes: &Mistakes) -> Vec<Bytes> {
    let text = match std::fs::read_to_string(&path.value) {
        Ok(text) => text,
        Err(error) => {
            let message = format!("cannot read {:?}: {error}", path.value);
            mistakes.refuse_at(path, message, "name a readable file of PEM certificates");
            return Vec::new();
        }
    };
    match spiffe::bundle::certificates_from_pem(&text) {
        Ok(found) if !found.is_empty() => found,
        Ok(_) => {
            mistakes.refuse_at(
                path,
                format!("{:?} holds no certificate", path.value),
                "name a file of PEM certificates",
            );
            Vec::new()
        }
        Err(error) => {
            let message = format!("{:?}: {error}", path.value);
            mistakes.refuse_at(path, message, "name a file of PEM certificates");
            Vec::new()
        }
    }
}
