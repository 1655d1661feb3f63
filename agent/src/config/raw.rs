//! What the configuration file says, key by key, before anything is known to be right but its form.

use std::time::Duration;

use runtime::hcl::{Document, Located, Mistakes, Plugin, Section, plugins};
use runtime::telemetry::settings::{self, HealthPages, Metrics};

/// The `agent` block, the plugins, and what surrounds them.
#[derive(Debug)]
pub struct Raw<'d> {
    /// The `agent` block, for its line and for mistakes.
    pub agent: Section<'d>,
    /// `admin_socket_path`
    pub admin_socket_path: Option<Located<String>>,
    /// `allow_unauthenticated_verifiers`
    pub allow_unauthenticated_verifiers: bool,
    /// `allowed_foreign_jwt_claims`
    pub allowed_foreign_jwt_claims: Vec<String>,
    /// `availability_target`
    pub availability_target: Option<Located<Duration>>,
    /// `data_dir`
    pub data_dir: Option<Located<String>>,
    /// `disable_workload_api`
    pub disable_workload_api: bool,
    /// `insecure_bootstrap`
    pub insecure_bootstrap: Option<Located<bool>>,
    /// `join_token`
    pub join_token: Option<Located<String>>,
    /// `join_token_file`
    pub join_token_file: Option<Located<String>>,
    /// `jwt_svid_cache_max_size`
    pub jwt_svid_cache_max_size: Option<Located<u32>>,
    /// `log_file`
    pub log_file: Option<Located<String>>,
    /// `log_level`
    pub log_level: Option<Located<String>>,
    /// `log_format`
    pub log_format: Option<Located<String>>,
    /// `log_source_location`
    pub log_source_location: bool,
    /// `rebootstrap_delay`
    pub rebootstrap_delay: Option<Located<String>>,
    /// `rebootstrap_mode`
    pub rebootstrap_mode: Option<Located<String>>,
    /// `server_address`
    pub server_address: Option<Located<String>>,
    /// `server_port`
    pub server_port: Option<Located<i64>>,
    /// `socket_path`
    pub socket_path: Option<Located<String>>,
    /// `trust_bundle_format`
    pub trust_bundle_format: Option<Located<String>>,
    /// `trust_bundle_path`
    pub trust_bundle_path: Option<Located<String>>,
    /// `trust_bundle_url`
    pub trust_bundle_url: Option<Located<String>>,
    /// `trust_domain`
    pub trust_domain: Option<Located<String>>,
    /// `workload_x509_svid_key_type`
    pub workload_x509_svid_key_type: Option<Located<String>>,
    /// `x509_svid_cache_max_size`
    pub x509_svid_cache_max_size: Option<Located<u32>>,
    /// `experimental { sync_interval }`
    pub sync_interval: Option<Located<Duration>>,
    /// The enabled plugins.
    pub plugins: Vec<Plugin<'d>>,
    /// `telemetry { }`
    pub metrics: Metrics,
    /// `health_checks { }`
    pub health: Option<HealthPages>,
}

impl<'d> Raw<'d> {
    /// Reads everything that can be read; what cannot is noted in `mistakes`.
    pub fn read(document: &'d Document, mistakes: &Mistakes) -> Self {
        let root = Section::root(document, mistakes);
        let missing = |block: &str, remedy: &str| {
            mistakes.refuse(None, block, format!("the {block} section is missing"), remedy);
            Section::absent(block, mistakes)
        };
        let agent = root
            .section("agent")
            .unwrap_or_else(|| missing("agent", "add agent { trust_domain = \"…\" server_address = \"…\" … }"));
        let plugins_section = root
            .section("plugins")
            .unwrap_or_else(|| missing("plugins", "add plugins { KeyManager … NodeAttestor … WorkloadAttestor … }"));
        let on = |key: &str| agent.boolean(key).is_some_and(|on| on.value);
        let raw = Raw {
            admin_socket_path: agent.text("admin_socket_path"),
            allow_unauthenticated_verifiers: on("allow_unauthenticated_verifiers"),
            allowed_foreign_jwt_claims: agent
                .texts("allowed_foreign_jwt_claims")
                .map(|claims| claims.value.into_iter().map(|claim| claim.value).collect())
                .unwrap_or_default(),
            availability_target: agent.duration("availability_target"),
            data_dir: agent.text("data_dir"),
            disable_workload_api: on("disable_workload_api"),
            insecure_bootstrap: agent.boolean("insecure_bootstrap"),
            join_token: agent.text("join_token"),
            join_token_file: agent.text("join_token_file"),
            jwt_svid_cache_max_size: agent.count("jwt_svid_cache_max_size", 0),
            log_file: agent.text("log_file"),
            log_level: agent.text("log_level"),
            log_format: agent.text("log_format"),
            log_source_location: on("log_source_location"),
            rebootstrap_delay: agent.text("rebootstrap_delay"),
            rebootstrap_mode: agent.text("rebootstrap_mode"),
            server_address: agent.text("server_address"),
            server_port: agent.integer("server_port"),
            socket_path: agent.text("socket_path"),
            trust_bundle_format: agent.text("trust_bundle_format"),
            trust_bundle_path: agent.text("trust_bundle_path"),
            trust_bundle_url: agent.text("trust_bundle_url"),
            trust_domain: agent.text("trust_domain"),
            workload_x509_svid_key_type: agent.text("workload_x509_svid_key_type"),
            x509_svid_cache_max_size: agent.count("x509_svid_cache_max_size", 0),
            sync_interval: experimental(&agent),
            plugins: plugins(&plugins_section),
            metrics: settings::metrics(&root),
            health: settings::health(&root),
            agent: agent.clone(),
        };
        not_served(&agent);
        agent.refuse_unknown();
        root.refuse_unknown();
        raw
    }
}

/// Keys of SPIRE that are known here but not served (yet), or that have nothing to act on.
fn not_served(agent: &Section<'_>) {
    let mistakes = agent.mistakes();
    for key in ["trust_bundle_spiffe_workload_api", "trust_bundle_unix_socket"] {
        if let Some(given) = agent.text(key).filter(|given| !given.value.is_empty()) {
            mistakes.refuse_at(&given, "this source of the bundle is not served yet", "use trust_bundle_path");
        }
    }
    if let Some(line) = agent.has("sds") {
        mistakes.refuse(Some(line), agent.key("sds"), "Envoy's SDS is not served yet", "remove the block");
    }
    // Switching off what is not served is as it should be.
    agent.boolean("disable_sds_api");
    if let Some(given) = agent.texts("authorized_delegates").filter(|given| !given.value.is_empty()) {
        mistakes.refuse_at(&given, "the delegated identity API is not served yet", "remove the key");
    }
    if let Some(given) = agent.texts("log_selectors").filter(|given| !given.value.is_empty()) {
        mistakes.warn(given.line, given.key, "has no effect: selectors are logged at debug level", "remove it");
    }
    let profiling = agent.boolean("profiling_enabled").filter(|on| on.value);
    agent.integer("profiling_port");
    agent.integer("profiling_freq");
    agent.texts("profiling_names");
    if let Some(given) = profiling {
        mistakes.warn(given.line, given.key, "has no effect: there is no profiling endpoint", "remove it");
    }
}

/// Reads `experimental { }`; returns `sync_interval`.
fn experimental(agent: &Section<'_>) -> Option<Located<Duration>> {
    let section = agent.section("experimental")?;
    let mistakes = section.mistakes();
    let sync_interval = section.duration("sync_interval");
    if let Some(given) = section.boolean("use_sync_authorized_entries") {
        mistakes.warn(given.line, given.key, "has no effect: the server says what it can do", "remove it");
    }
    if let Some(given) = section.duration("jwt_svid_cache_hit_timeout") {
        let (least, most) = (Duration::from_secs(5), Duration::from_secs(30));
        if given.value < least || given.value >= most {
            mistakes.refuse_at(&given, "is out of range", "write at least 5s and less than 30s");
        } else {
            mistakes.warn(given.line, given.key, "has no effect", "remove it");
        }
    }
    let refuse = |key: &str, what: &str, remedy: &str| {
        mistakes.refuse(section.has(key), section.key(key), what, remedy);
    };
    if section.boolean("require_pq_kem").is_some_and(|on| on.value) {
        let remedy = "remove it; hybrid key exchange is preferred anyway";
        refuse("require_pq_kem", "refusing classical key exchange is not served yet", remedy);
    }
    if section.has("ratelimit").is_some() {
        refuse("ratelimit", "limits per workload are not served yet", "remove the block");
    }
    if section.has("broker").is_some() {
        refuse("broker", "the broker API is not served yet", "remove the block");
    }
    if section.texts("feature_flags").is_some_and(|flags| !flags.value.is_empty()) {
        refuse("feature_flags", "there are no feature flags", "remove it");
    }
    for (key, instead) in [("named_pipe_name", "socket_path"), ("admin_named_pipe_name", "admin_socket_path")] {
        if section.text(key).is_some_and(|name| !name.value.is_empty()) {
            refuse(key, "named pipes exist on Windows only", &format!("use {instead}"));
        }
    }
    section.warn_unknown();
    sync_interval
}
