//! What the configuration file says, key by key, before anything is known to be right but its form.

use std::time::Duration;

use runtime::hcl::{Document, Located, Mistakes, Plugin, Section, plugins};
use runtime::telemetry::settings::{self, HealthPages, Metrics};

/// The `server` block, the plugins, and what surrounds them.
#[derive(Debug)]
pub struct Raw<'d> {
    /// The `server` block, for its line and for mistakes.
    pub server: Section<'d>,
    /// `admin_ids`
    pub admin_ids: Vec<Located<String>>,
    /// `agent_ttl`
    pub agent_ttl: Option<Located<Duration>>,
    /// `audit_log_enabled`
    pub audit_log_enabled: bool,
    /// `bind_address`
    pub bind_address: Option<Located<String>>,
    /// `bind_port`
    pub bind_port: Option<Located<i64>>,
    /// `ca_key_type`
    pub ca_key_type: Option<Located<String>>,
    /// `jwt_key_type`
    pub jwt_key_type: Option<Located<String>>,
    /// `ca_subject { }`
    pub ca_subject: Option<Subject>,
    /// `ca_ttl`
    pub ca_ttl: Option<Located<Duration>>,
    /// `data_dir`
    pub data_dir: Option<Located<String>>,
    /// `default_x509_svid_ttl`
    pub default_x509_svid_ttl: Option<Located<Duration>>,
    /// `default_jwt_svid_ttl`
    pub default_jwt_svid_ttl: Option<Located<Duration>>,
    /// `disable_jwt_svids`
    pub disable_jwt_svids: bool,
    /// `jwt_issuer`
    pub jwt_issuer: Option<Located<String>>,
    /// `log_file`
    pub log_file: Option<Located<String>>,
    /// `log_level`
    pub log_level: Option<Located<String>>,
    /// `log_format`
    pub log_format: Option<Located<String>>,
    /// `log_source_location`
    pub log_source_location: bool,
    /// `prune_attested_nodes_expired_for`
    pub prune_attested_nodes_expired_for: Option<Located<Duration>>,
    /// `prune_attested_nodes_batch_size`
    pub prune_attested_nodes_batch_size: Option<Located<u32>>,
    /// `prune_tofu_nodes`
    pub prune_tofu_nodes: bool,
    /// `ratelimit { attestation }`
    pub limit_attestation: bool,
    /// `ratelimit { signing }`
    pub limit_signing: bool,
    /// `ratelimit { connections_per_network }`
    pub connections_per_network: Option<Located<u32>>,
    /// `socket_path`
    pub socket_path: Option<Located<String>>,
    /// `trust_domain`
    pub trust_domain: Option<Located<String>>,
    /// `experimental { agent_spiffe_id_as_selector }`
    pub agent_spiffe_id_as_selector: bool,
    /// The enabled plugins.
    pub plugins: Vec<Plugin<'d>>,
    /// `telemetry { }`
    pub metrics: Metrics,
    /// `health_checks { }`
    pub health: Option<HealthPages>,
}

/// `ca_subject { }`
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Subject {
    /// The line of the block.
    pub line: Option<u32>,
    /// `country`
    pub country: Vec<String>,
    /// `organization`
    pub organization: Vec<String>,
    /// `common_name`
    pub common_name: String,
}

impl<'d> Raw<'d> {
    /// Reads everything that can be read; what cannot is noted in `mistakes`.
    pub fn read(document: &'d Document, mistakes: &Mistakes) -> Self {
        let root = Section::root(document, mistakes);
        let missing = |block: &str, remedy: &str| {
            mistakes.refuse(None, block, format!("the {block} section is missing"), remedy);
            Section::absent(block, mistakes)
        };
        let server = root
            .section("server")
            .unwrap_or_else(|| missing("server", "add server { trust_domain = \"…\" data_dir = \"…\" }"));
        let plugins_section = root
            .section("plugins")
            .unwrap_or_else(|| missing("plugins", "add plugins { KeyManager \"disk\" { … } NodeAttestor … }"));
        let on = |key: &str| server.boolean(key).is_some_and(|on| on.value);
        let limits = server.section("ratelimit");
        let limited =
            |key: &str| limits.as_ref().and_then(|limits| limits.boolean(key)).is_none_or(|limited| limited.value);
        let raw = Raw {
            admin_ids: server.texts("admin_ids").map(|ids| ids.value).unwrap_or_default(),
            agent_ttl: server.duration("agent_ttl"),
            audit_log_enabled: on("audit_log_enabled"),
            bind_address: server.text("bind_address"),
            bind_port: server.integer("bind_port"),
            ca_key_type: server.text("ca_key_type"),
            jwt_key_type: server.text("jwt_key_type"),
            ca_subject: server.section("ca_subject").map(|section| subject(&section)),
            ca_ttl: server.duration("ca_ttl"),
            data_dir: server.text("data_dir"),
            default_x509_svid_ttl: server.duration("default_x509_svid_ttl"),
            default_jwt_svid_ttl: server.duration("default_jwt_svid_ttl"),
            disable_jwt_svids: on("disable_jwt_svids"),
            jwt_issuer: server.text("jwt_issuer"),
            log_file: server.text("log_file"),
            log_level: server.text("log_level"),
            log_format: server.text("log_format"),
            log_source_location: on("log_source_location"),
            prune_attested_nodes_expired_for: server.duration("prune_attested_nodes_expired_for"),
            prune_attested_nodes_batch_size: server.count("prune_attested_nodes_batch_size", 0),
            prune_tofu_nodes: on("prune_tofu_nodes"),
            limit_attestation: limited("attestation"),
            limit_signing: limited("signing"),
            connections_per_network: limits.as_ref().and_then(|limits| limits.count("connections_per_network", 1)),
            socket_path: server.text("socket_path"),
            trust_domain: server.text("trust_domain"),
            agent_spiffe_id_as_selector: experimental(&server),
            plugins: plugins(&plugins_section),
            metrics: settings::metrics(&root),
            health: settings::health(&root),
            server: server.clone(),
        };
        if let Some(limits) = limits {
            limits.refuse_unknown();
        }
        not_served(&server);
        server.refuse_renamed(RENAMED);
        server.refuse_unknown();
        root.refuse_unknown();
        raw
    }
}

/// Keys of older releases of SPIRE, and how to say the same now.
const RENAMED: &[(&str, &str)] = &[
    ("svid_ttl", "write default_x509_svid_ttl and default_jwt_svid_ttl"),
    ("default_svid_ttl", "write default_x509_svid_ttl and default_jwt_svid_ttl"),
    ("registration_uds_path", "write socket_path"),
    ("bundle_endpoint", "write federation { bundle_endpoint { … } }"),
];

fn subject(section: &Section<'_>) -> Subject {
    let list = |key: &str| -> Vec<String> {
        section.texts(key).map(|list| list.value.into_iter().map(|text| text.value).collect()).unwrap_or_default()
    };
    let subject = Subject {
        line: section.line(),
        country: list("country"),
        organization: list("organization"),
        common_name: section.text("common_name").map(|name| name.value).unwrap_or_default(),
    };
    section.refuse_unknown();
    subject
}

/// Keys of SPIRE that are known here but not served (yet), or that have nothing to act on.
fn not_served(server: &Section<'_>) {
    let mistakes = server.mistakes();
    if let Some(line) = server.has("federation") {
        let remedy = "remove the block; bundles of other trust domains can be set with `bundle set`";
        mistakes.refuse(Some(line), server.key("federation"), "federation is not served yet", remedy);
    }
    if let Some(cidrs) = server.texts("proxy_protocol_trusted_cidrs").filter(|cidrs| !cidrs.value.is_empty()) {
        mistakes.refuse_at(&cidrs, "the PROXY protocol is not served yet", "remove the key");
    }
    if server.duration("max_attested_node_info_staleness").is_some_and(|staleness| !staleness.value.is_zero()) {
        let key = server.key("max_attested_node_info_staleness");
        let line = server.has("max_attested_node_info_staleness");
        mistakes.warn(line, key, "has no effect: what is known of agents is never stale", "remove it");
    }
    let profiling = server.boolean("profiling_enabled").is_some_and(|on| on.value);
    server.integer("profiling_port");
    server.integer("profiling_freq");
    server.texts("profiling_names");
    if profiling {
        let (line, key) = (server.has("profiling_enabled"), server.key("profiling_enabled"));
        mistakes.warn(line, key, "has no effect: there is no profiling endpoint", "remove it");
    }
}

/// Reads `experimental { }`; returns `agent_spiffe_id_as_selector`.
fn experimental(server: &Section<'_>) -> bool {
    let Some(section) = server.section("experimental") else { return false };
    let mistakes = section.mistakes();
    let chosen = section.boolean("agent_spiffe_id_as_selector").is_some_and(|on| on.value);
    let idle = "has no effect: every change is seen at once, there is no cache to reload";
    for key in ["cache_reload_interval", "full_cache_reload_interval", "prune_events_older_than"] {
        if let Some(given) = section.duration(key) {
            mistakes.warn(given.line, given.key, idle, "remove it");
        }
    }
    let timeouts = [section.duration("event_timeout"), section.duration("sql_transaction_timeout")];
    if let [Some(_), Some(old)] = &timeouts {
        mistakes.refuse_at(old, "cannot be set together with event_timeout", "remove it");
    }
    for given in timeouts.into_iter().flatten() {
        mistakes.warn(given.line, given.key, idle, "remove it");
    }
    if let Some(given) = section.boolean("events_based_cache").filter(|on| on.value) {
        mistakes.warn(given.line, given.key, idle, "remove it");
    }
    let refuse = |key: &str, what: &str, remedy: &str| {
        mistakes.refuse(section.has(key), section.key(key), what, remedy);
    };
    if section.has("auth_opa_policy_engine").is_some() {
        refuse("auth_opa_policy_engine", "policies by OPA are not served yet", "remove the block");
    }
    if section.boolean("require_pq_kem").is_some_and(|on| on.value) {
        refuse(
            "require_pq_kem",
            "refusing classical key exchange is not served yet",
            "remove it; hybrid key exchange is preferred anyway",
        );
    }
    for key in ["wit_key_type", "wit_issuer"] {
        if section.text(key).is_some_and(|given| !given.value.is_empty()) {
            refuse(key, "WIT-SVIDs are not served yet", "remove it");
        }
    }
    if section.texts("feature_flags").is_some_and(|flags| !flags.value.is_empty()) {
        refuse("feature_flags", "there are no feature flags", "remove it");
    }
    if section.text("named_pipe_name").is_some_and(|name| !name.value.is_empty()) {
        refuse("named_pipe_name", "named pipes exist on Windows only", "use socket_path");
    }
    section.warn_unknown();
    chosen
}
