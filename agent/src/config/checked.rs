//! What is run: every value known to be right, every default filled in.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use runtime::duration;
use runtime::hcl::{Located, Mistake, Mistakes};
use runtime::telemetry::settings::{self, HealthPages, Logs, Metrics};
use spiffe::id::TrustDomain;
use spiffe::x509::KeyType;
use zeroize::Zeroizing;

use super::plugins::Plugins;
use super::raw::Raw;
use super::{DEFAULT_SOCKET_PATH, Overrides};
use crate::workload::unix;

/// The configuration of an agent, ready to run.
#[derive(Clone, Debug)]
pub struct Config {
    /// The file it was read from.
    pub path: PathBuf,
    /// The trust domain this agent belongs to.
    pub trust_domain: TrustDomain,
    /// Where runtime data is kept, absolute.
    pub data_dir: PathBuf,
    /// The server's address or name.
    pub server_address: String,
    /// The server's port.
    pub server_port: u16,
    /// The Workload API's socket, absolute.
    pub socket_path: PathBuf,
    /// The admin API's socket, absolute, if it is served.
    pub admin_socket_path: Option<PathBuf>,
    /// How the server is known before the first bundle has come.
    pub bootstrap: Bootstrap,
    /// What is done when the server's authority is no longer known.
    pub rebootstrap: Rebootstrap,
    /// The token to attest with; if there is one, it is used whatever `node_attestor` says.
    pub join_token: Option<Arc<JoinToken>>,
    /// Where the agent's own key is kept.
    pub key_manager: KeyManager,
    /// How this node proves who it is.
    pub node_attestor: NodeAttestor,
    /// Settings of the `unix` workload attestor; `None` if it is not configured.
    pub unix_attestor: Option<unix::Settings>,
    /// Key type of workload SVIDs.
    pub workload_key_type: KeyType,
    /// How many X.509-SVIDs are kept beyond those that somebody is subscribed to.
    pub x509_svid_cache_max_size: usize,
    /// How many JWT-SVIDs are kept.
    pub jwt_svid_cache_max_size: usize,
    /// How often a server that does not push is asked.
    pub sync_interval: Duration,
    /// Whether processes without identity may have bundles.
    pub allow_unauthenticated_verifiers: bool,
    /// Claims of foreign tokens that are handed on beside `sub`, `exp` and `aud`.
    pub allowed_foreign_jwt_claims: Vec<String>,
    /// How long SVIDs shall outlast the server's absence; at least a day.
    pub availability_target: Option<Duration>,
    /// Whether the Workload API is left out.
    pub disable_workload_api: bool,
    /// Logging.
    pub log: Logs,
    /// Metrics.
    pub telemetry: Metrics,
    /// Health pages; `None` serves none.
    pub health: Option<HealthPages>,
    /// What was not refused but should be said once at start.
    pub warnings: Vec<Mistake>,
}

/// How the server is known before the first bundle has come. A bundle kept from an earlier run wins over all of them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Bootstrap {
    /// By a bundle in a file, which is read at start.
    Bundle {
        /// The file.
        path: PathBuf,
        /// Its format.
        format: BundleFormat,
    },
    /// By nothing but the SPIFFE ID it shows: whoever answers at the address is believed.
    Insecure,
}

/// The formats of a bundle.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BundleFormat {
    /// Certificates in PEM.
    Pem,
    /// SPIFFE's JWKS document.
    Spiffe,
}

/// What is done when the server's authority is no longer known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rebootstrap {
    /// Nothing: an operator has to help.
    Never,
    /// The bootstrap source is used again after `delay`, if the agent can attest again.
    Auto {
        /// How long the failure has to last.
        delay: Duration,
    },
    /// As `Auto`, and an agent that could not attest again does not start.
    Always {
        /// How long the failure has to last.
        delay: Duration,
    },
}

/// A secret that is good for one attestation. Wiped when dropped, not copied, not shown.
pub struct JoinToken(Zeroizing<String>);

impl JoinToken {
    /// A token as it was given.
    pub fn new(token: String) -> Self {
        Self(Zeroizing::new(token))
    }

    /// The token, to be sent to the server and nowhere else.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl std::fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("JoinToken(…)")
    }
}

/// Where the agent's own key is kept.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeyManager {
    /// In memory: a restart has to attest again.
    Memory,
    /// In a private file.
    Disk {
        /// The directory of `keys.json`, absolute.
        directory: PathBuf,
    },
}

/// How this node proves who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NodeAttestor {
    /// By a join token.
    JoinToken,
    /// By possession of the key of an X.509 certificate.
    X509Pop {
        /// The key, PEM.
        private_key_path: PathBuf,
        /// The certificate, and intermediates after it, PEM.
        certificate_path: PathBuf,
        /// More intermediates, PEM.
        intermediates_path: Option<PathBuf>,
    },
}

const DEFAULT_CACHE_SIZE: u32 = 1000;
const DEFAULT_SYNC_INTERVAL: Duration = Duration::from_secs(5);
const DEFAULT_REBOOTSTRAP_DELAY: Duration = Duration::from_secs(600);
const LEAST_AVAILABILITY: Duration = Duration::from_secs(24 * 3600);
/// A token is some dozens of characters; a larger file is a mistake.
const MAX_TOKEN_FILE: u64 = 64 << 10;

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
    let agent = raw.agent.clone();
    let missing = |key: &str, remedy: &str| {
        mistakes.refuse(agent.line(), agent.key(key), "must be configured", remedy);
    };

    let trust_domain = first(overrides.trust_domain.as_ref(), "-trustDomain", raw.trust_domain.clone());
    if trust_domain.is_none() {
        missing("trust_domain", "add trust_domain = \"example.org\"");
    }
    let trust_domain = trust_domain.and_then(|given| {
        let remedy = "write a name such as example.org";
        let checked = TrustDomain::parse_lenient(&given.value).and_then(|name| name.check_own().map(|()| name));
        checked.map_err(|error| mistakes.refuse_at(&given, format!("{:?}: {error}", given.value), remedy)).ok()
    });
    let server_address = first(overrides.server_address.as_ref(), "-serverAddress", raw.server_address.clone());
    if server_address.is_none() {
        missing("server_address", "add server_address = \"spire-server.example.org\"");
    }
    let server_address = server_address.and_then(|given| settings::host(&given, mistakes));
    let server_port =
        overrides.server_port.map(|port| Located::outside("-serverPort", port)).or(raw.server_port.clone());
    let server_port = server_port.filter(|port| port.value != 0);
    if server_port.is_none() {
        missing("server_port", "add server_port = 8081");
    }
    let server_port = server_port.and_then(|given| settings::port(&agent, Some(given)));

    let path = |given: Located<String>| absolute(Path::new(&given.value));
    let data_dir = first(overrides.data_dir.as_ref(), "-dataDir", raw.data_dir.clone())
        .map_or_else(|| absolute(Path::new(".")), path);
    let socket_path = first(overrides.socket_path.as_ref(), "-socketPath", raw.socket_path.clone())
        .map_or_else(|| PathBuf::from(DEFAULT_SOCKET_PATH), path);
    let disable_workload_api = overrides.disable_workload_api || raw.disable_workload_api;
    let admin_socket_path = raw.admin_socket_path.clone().filter(|given| !given.value.is_empty());
    if let Some(given) = &admin_socket_path
        && !disable_workload_api
        && let Some(directory) = socket_path.parent()
        && absolute(Path::new(&given.value)).starts_with(directory)
    {
        let message = "is in the directory of the Workload API's socket, or below it";
        mistakes.refuse_at(given, message, "choose a directory that workloads cannot reach");
    }
    let admin_socket_path = admin_socket_path.map(path);

    let insecure = overrides.insecure_bootstrap || raw.insecure_bootstrap.as_ref().is_some_and(|on| on.value);
    let bootstrap = bootstrap(&raw, overrides, insecure, mistakes);
    let rebootstrap = rebootstrap(&raw, overrides, insecure, mistakes);
    let join_token = join_token(&raw, overrides, mistakes);

    let workload_key_type = raw.workload_x509_svid_key_type.as_ref().filter(|given| !given.value.is_empty());
    let workload_key_type =
        workload_key_type.map_or(KeyType::EcP256, |given| match KeyType::parse(&given.value.to_ascii_lowercase()) {
            Ok(known) if known != KeyType::Rsa4096 => known,
            _ => {
                let message = format!("{:?} is no key type for workloads", given.value);
                mistakes.refuse_at(given, message, "write ec-p256, ec-p384 or rsa-2048");
                KeyType::EcP256
            }
        });
    if let Some(target) = raw.availability_target.as_ref().filter(|target| target.value < LEAST_AVAILABILITY) {
        let message = format!("{} is too short", duration::format(target.value));
        mistakes.refuse_at(target, message, "write at least 24h, or remove the key");
    }
    let size = |given: &Option<Located<u32>>| {
        let size = given.as_ref().map_or(0, |size| size.value);
        usize::try_from(if size == 0 { DEFAULT_CACHE_SIZE } else { size }).unwrap_or(usize::MAX)
    };
    let log = Logs {
        file: first(overrides.log_file.as_ref(), "-logFile", raw.log_file.clone())
            .map(|file| PathBuf::from(file.value)),
        level: settings::level(&agent, first(overrides.log_level.as_ref(), "-logLevel", raw.log_level.clone())),
        format: settings::format(&agent, first(overrides.log_format.as_ref(), "-logFormat", raw.log_format.clone())),
        source_location: overrides.log_source_location || raw.log_source_location,
    };
    let plugins = Plugins::check(&raw.plugins, mistakes);
    Some(Config {
        path: PathBuf::new(),
        trust_domain: trust_domain?,
        data_dir,
        server_address: server_address?,
        server_port: server_port?,
        socket_path,
        admin_socket_path,
        bootstrap: bootstrap?,
        rebootstrap,
        join_token,
        key_manager: plugins.key_manager?,
        node_attestor: plugins.node_attestor?,
        unix_attestor: plugins.unix_attestor,
        workload_key_type,
        x509_svid_cache_max_size: size(&raw.x509_svid_cache_max_size),
        jwt_svid_cache_max_size: size(&raw.jwt_svid_cache_max_size),
        sync_interval: raw
            .sync_interval
            .filter(|every| !every.value.is_zero())
            .map_or(DEFAULT_SYNC_INTERVAL, |every| every.value),
        allow_unauthenticated_verifiers: overrides.allow_unauthenticated_verifiers
            || raw.allow_unauthenticated_verifiers,
        allowed_foreign_jwt_claims: raw.allowed_foreign_jwt_claims,
        availability_target: raw.availability_target.map(|target| target.value),
        disable_workload_api,
        log,
        telemetry: raw.metrics,
        health: raw.health,
        warnings: Vec::new(),
    })
}

pub(super) fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

fn bootstrap(raw: &Raw<'_>, overrides: &Overrides, insecure: bool, mistakes: &Mistakes) -> Option<Bootstrap> {
    let agent = &raw.agent;
    let file = first(overrides.trust_bundle_path.as_ref(), "-trustBundle", raw.trust_bundle_path.clone());
    let url = first(overrides.trust_bundle_url.as_ref(), "-trustBundleUrl", raw.trust_bundle_url.clone());
    let format = first(overrides.trust_bundle_format.as_ref(), "-trustBundleFormat", raw.trust_bundle_format.clone());
    let format = match format.as_ref().map_or("pem", |format| format.value.as_str()) {
        "pem" => Some(BundleFormat::Pem),
        "spiffe" => Some(BundleFormat::Spiffe),
        other => {
            if let Some(format) = &format {
                mistakes.refuse_at(format, format!("{other:?} is no format of a bundle"), "write pem or spiffe");
            }
            None
        }
    };
    if let Some(url) = &url {
        mistakes.refuse_at(url, "this source of the bundle is not served yet", "use trust_bundle_path");
    }
    match (file, insecure) {
        (Some(file), true) => {
            mistakes.refuse_at(&file, "cannot be set together with insecure_bootstrap", "keep trust_bundle_path");
            None
        }
        (Some(file), false) => Some(Bootstrap::Bundle { path: absolute(Path::new(&file.value)), format: format? }),
        (None, true) => {
            let at = raw.insecure_bootstrap.as_ref().and_then(|on| on.line);
            let message = "whoever answers at server_address first is believed to be the server";
            mistakes.warn(at, agent.key("insecure_bootstrap"), message, "use trust_bundle_path");
            Some(Bootstrap::Insecure)
        }
        (None, false) => {
            if url.is_none() {
                let message = "must be configured unless insecure_bootstrap is set";
                let remedy = "add trust_bundle_path = \"…\"; `bundle show` on the server prints the bundle";
                mistakes.refuse(agent.line(), agent.key("trust_bundle_path"), message, remedy);
            }
            None
        }
    }
}

fn rebootstrap(raw: &Raw<'_>, overrides: &Overrides, insecure: bool, mistakes: &Mistakes) -> Rebootstrap {
    let delay = first(overrides.rebootstrap_delay.as_ref(), "-rebootstrapDelay", raw.rebootstrap_delay.clone());
    let delay = delay.map_or(DEFAULT_REBOOTSTRAP_DELAY, |given| {
        duration::parse(&given.value).unwrap_or_else(|error| {
            mistakes.refuse_at(&given, error.to_string(), "write it like 90s, 30m or 24h");
            DEFAULT_REBOOTSTRAP_DELAY
        })
    });
    let mode = first(overrides.rebootstrap_mode.as_ref(), "-rebootstrapMode", raw.rebootstrap_mode.clone());
    let Some(given) = mode else { return Rebootstrap::Never };
    let chosen = match given.value.as_str() {
        "never" => Rebootstrap::Never,
        "auto" => Rebootstrap::Auto { delay },
        "always" => Rebootstrap::Always { delay },
        other => {
            mistakes.refuse_at(&given, format!("there is no mode {other:?}"), "write never, auto or always");
            Rebootstrap::Never
        }
    };
    if chosen != Rebootstrap::Never && insecure {
        let message = "cannot be used with insecure_bootstrap";
        mistakes.refuse_at(&given, message, "use trust_bundle_path, or write never");
    }
    chosen
}

fn join_token(raw: &Raw<'_>, overrides: &Overrides, mistakes: &Mistakes) -> Option<Arc<JoinToken>> {
    let token = first(overrides.join_token.as_ref(), "-joinToken", raw.join_token.clone());
    let file = first(overrides.join_token_file.as_ref(), "-joinTokenFile", raw.join_token_file.clone());
    match (token, file) {
        (Some(token), Some(_)) => {
            mistakes.refuse_at(&token, "cannot be set together with join_token_file", "keep one of the two");
            None
        }
        (Some(token), None) => Some(Arc::new(JoinToken::new(token.value))),
        (None, Some(file)) => token_of(&file, mistakes).map(|token| Arc::new(JoinToken::new(token))),
        (None, None) => None,
    }
}

fn token_of(file: &Located<String>, mistakes: &Mistakes) -> Option<String> {
    use std::io::Read;
    let mut text = Zeroizing::new(String::new());
    let read = std::fs::File::open(&file.value).and_then(|open| open.take(MAX_TOKEN_FILE).read_to_string(&mut text));
    match read {
        Err(error) => {
            mistakes.refuse_at(file, format!("cannot read {:?}: {error}", file.value), "name a readable file");
            None
        }
        Ok(_) if text.trim().is_empty() => {
            let remedy = "write the token of `token generate` into it";
            mistakes.refuse_at(file, format!("{:?} is empty", file.value), remedy);
            None
        }
        Ok(_) => Some(text.trim().to_owned()),
    }
}
