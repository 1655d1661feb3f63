use std::path::Path;
use std::time::Duration;

use runtime::flags::Environment;
use runtime::hcl::ConfigError;
use runtime::telemetry::Level;
use runtime::telemetry::log::Format;
use spiffe::x509::KeyType;

use super::checked::{Bootstrap, BundleFormat, KeyManager, NodeAttestor, Rebootstrap};
use super::{Config, Overrides, load};
use crate::workload::unix::{Settings, SizeLimit};

const PLUGINS: &str = "KeyManager \"memory\" {} NodeAttestor \"join_token\" {} WorkloadAttestor \"unix\" {}";

fn load_text(text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.conf");
    std::fs::write(&path, text).unwrap();
    load(&Overrides { config: Some(path), ..overrides.clone() }, &Environment::default())
}

fn accepted(text: &str) -> Config {
    load_text(text, &Overrides::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// Each mistake as `line key: message`.
fn mistakes(result: Result<Config, ConfigError>) -> Vec<String> {
    match result {
        Err(ConfigError::Mistakes { mistakes, .. }) => {
            mistakes.iter().map(|m| format!("{} {}: {}", m.line.unwrap_or(0), m.key, m.message)).collect()
        }
        other => panic!("{other:?}"),
    }
}

fn refused(text: &str) -> Vec<String> {
    mistakes(load_text(text, &Overrides::default()))
}

/// A configuration with `agent` lines and `plugins` lines beside the needed ones, on lines 2 and 3.
fn with(agent: &str, plugins: &str) -> String {
    format!(
        "agent {{ trust_domain = \"example.org\" server_address = \"server\" server_port = 8081\n{agent} }} plugins {{\n{plugins} }}"
    )
}

#[test]
fn defaults_are_those_of_spire() {
    let config = accepted(&with("trust_bundle_path = \"/b.pem\"", PLUGINS));
    assert_eq!(config.trust_domain.as_str(), "example.org");
    assert_eq!(config.data_dir, std::env::current_dir().unwrap());
    assert_eq!((config.server_address.as_str(), config.server_port), ("server", 8081));
    assert_eq!(config.socket_path, Path::new("/tmp/spire-agent/public/api.sock"));
    assert_eq!(config.admin_socket_path, None);
    assert_eq!(config.bootstrap, Bootstrap::Bundle { path: "/b.pem".into(), format: BundleFormat::Pem });
    assert_eq!(config.rebootstrap, Rebootstrap::Never);
    assert!(config.join_token.is_none());
    assert_eq!((config.key_manager, config.node_attestor), (KeyManager::Memory, NodeAttestor::JoinToken));
    assert_eq!(config.unix_attestor, Some(Settings::default()));
    assert_eq!(config.workload_key_type, KeyType::EcP256);
    assert_eq!((config.x509_svid_cache_max_size, config.jwt_svid_cache_max_size), (1000, 1000));
    assert_eq!(config.sync_interval, Duration::from_secs(5));
    assert_eq!(config.availability_target, None);
    assert!(!config.allow_unauthenticated_verifiers && !config.disable_workload_api);
    assert_eq!(config.allowed_foreign_jwt_claims, Vec::<String>::new());
    assert_eq!((config.log.level, config.log.format), (Level::Info, Format::Text));
    assert_eq!(config.warnings, []);
}

#[test]
fn every_key_is_read() {
    let config = accepted(
        r#"
agent {
    trust_domain = "spiffe://example.org"
    data_dir = "/data"
    server_address = "[::1]"
    server_port = "8082"
    socket_path = "/run/agent/public/api.sock"
    admin_socket_path = "/run/agent/private/admin.sock"
    trust_bundle_path = "/b.json"
    trust_bundle_format = "spiffe"
    rebootstrap_mode = "auto"
    rebootstrap_delay = "1m"
    join_token = "secret"
    workload_x509_svid_key_type = "RSA-2048"
    availability_target = "24h"
    x509_svid_cache_max_size = 5
    jwt_svid_cache_max_size = 6
    allow_unauthenticated_verifiers = true
    allowed_foreign_jwt_claims = ["email"]
    authorized_delegates = []
    disable_workload_api = true
    disable_sds_api = true
    log_level = "trace"
    log_format = "JSON"
    experimental { sync_interval = "1s" }
}
plugins {
    KeyManager "disk" { plugin_data { directory = "/data/keys" } }
    NodeAttestor "x509pop" { plugin_data { private_key_path = "/k" certificate_path = "/c" intermediates_path = "/i" } }
    WorkloadAttestor "unix" { plugin_data { discover_workload_path = true workload_size_limit = -1 path_of_other_mount_namespaces = true } }
}
telemetry { Prometheus { port = 1 } }
health_checks { listener_enabled = true bind_port = "2" }
"#,
    );
    assert_eq!((config.server_address.as_str(), config.server_port), ("::1", 8082));
    assert_eq!(config.admin_socket_path.as_deref(), Some(Path::new("/run/agent/private/admin.sock")));
    assert_eq!(config.bootstrap, Bootstrap::Bundle { path: "/b.json".into(), format: BundleFormat::Spiffe });
    assert_eq!(config.rebootstrap, Rebootstrap::Auto { delay: Duration::from_secs(60) });
    assert_eq!(config.join_token.as_ref().map(|token| token.expose()), Some("secret"));
    assert!(!format!("{config:?}").contains("secret"));
    assert_eq!(config.key_manager, KeyManager::Disk { directory: "/data/keys".into() });
    let pop = NodeAttestor::X509Pop {
        private_key_path: "/k".into(),
        certificate_path: "/c".into(),
        intermediates_path: Some("/i".into()),
    };
    assert_eq!(config.node_attestor, pop);
    let unix = Settings {
        discover_workload_path: true,
        workload_size_limit: SizeLimit::NoHash,
        path_of_other_mount_namespaces: true,
    };
    assert_eq!(config.unix_attestor, Some(unix));
    assert_eq!(config.workload_key_type, KeyType::Rsa2048);
    assert_eq!((config.x509_svid_cache_max_size, config.jwt_svid_cache_max_size), (5, 6));
    assert_eq!(config.availability_target, Some(Duration::from_secs(86_400)));
    assert!(config.allow_unauthenticated_verifiers && config.disable_workload_api);
    assert_eq!(config.allowed_foreign_jwt_claims, ["email"]);
    assert_eq!(config.sync_interval, Duration::from_secs(1));
    assert_eq!((config.log.level, config.log.format), (Level::Trace, Format::Json));
    assert_eq!(config.health.map(|health| health.port), Some(2));
    assert_eq!(config.warnings, []);
}

#[test]
fn flags_override_the_file() {
    let overrides = Overrides {
        allow_unauthenticated_verifiers: true,
        data_dir: Some("/flag".into()),
        disable_workload_api: true,
        insecure_bootstrap: true,
        join_token: Some("token".into()),
        server_address: Some("flag".into()),
        server_port: Some(7),
        socket_path: Some("/flag.sock".into()),
        trust_domain: Some("flag.org".into()),
        ..Overrides::default()
    };
    let config = load_text(&with("", PLUGINS), &overrides).unwrap();
    assert!(config.allow_unauthenticated_verifiers && config.disable_workload_api);
    assert_eq!(
        (config.data_dir.as_path(), config.socket_path.as_path()),
        (Path::new("/flag"), Path::new("/flag.sock"))
    );
    assert_eq!(config.bootstrap, Bootstrap::Insecure);
    assert_eq!(config.join_token.as_ref().map(|token| token.expose()), Some("token"));
    assert_eq!((config.server_address.as_str(), config.server_port), ("flag", 7));
    assert_eq!(config.trust_domain.as_str(), "flag.org");
    assert_eq!(config.warnings.len(), 1, "the insecure bootstrap is said");
    let overrides = Overrides {
        trust_bundle_path: Some("/b".into()),
        trust_bundle_format: Some("xml".into()),
        rebootstrap_mode: Some("sometimes".into()),
        rebootstrap_delay: Some("soon".into()),
        ..Overrides::default()
    };
    let found = mistakes(load_text(&with("", PLUGINS), &overrides));
    assert_eq!(
        found,
        [
            "0 -trustBundleFormat: \"xml\" is no format of a bundle",
            "0 -rebootstrapDelay: \"soon\" is no duration",
            "0 -rebootstrapMode: there is no mode \"sometimes\"",
        ]
    );
}

#[test]
fn tokens_come_from_a_file() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("token");
    std::fs::write(&file, " abc \n").unwrap();
    let text = with(&format!("trust_bundle_path = \"/b\" join_token_file = {file:?}"), PLUGINS);
    assert_eq!(accepted(&text).join_token.as_ref().map(|token| token.expose()), Some("abc"));
    std::fs::write(&file, " \n").unwrap();
    assert_eq!(refused(&text), [format!("2 agent.join_token_file: {file:?} is empty")]);
    std::fs::remove_file(&file).unwrap();
    assert!(refused(&text)[0].contains("cannot read"));
    let both = with("trust_bundle_path = \"/b\" join_token = \"x\" join_token_file = \"y\"", PLUGINS);
    assert_eq!(refused(&both), ["2 agent.join_token: cannot be set together with join_token_file"]);
}

#[test]
fn what_is_missing_is_told() {
    assert_eq!(
        refused("agent {}\nplugins {}"),
        [
            "1 agent.trust_domain: must be configured",
            "1 agent.server_address: must be configured",
            "1 agent.server_port: must be configured",
            "1 agent.trust_bundle_path: must be configured unless insecure_bootstrap is set",
            "0 plugins.KeyManager: must be configured",
            "0 plugins.NodeAttestor: must be configured",
            "0 plugins.WorkloadAttestor: must be configured",
        ]
    );
    assert_eq!(refused("").len(), 9);
}

#[test]
fn each_mistake_is_told_at_its_place() {
    let bundle = "trust_bundle_path = \"/b\"";
    for (agent, plugins, expected) in [
        ("odd = 1", PLUGINS, "2 agent.odd: unknown key"),
        (
            "log_level = \"x\"",
            PLUGINS,
            "2 agent.log_level: \"x\" is no log level (panic, fatal, error, warn, info, debug, trace)",
        ),
        (
            "admin_socket_path = \"/tmp/spire-agent/public/x/admin.sock\"",
            PLUGINS,
            "2 agent.admin_socket_path: is in the directory of the Workload API's socket, or below it",
        ),
        (
            "insecure_bootstrap = true",
            PLUGINS,
            "2 agent.trust_bundle_path: cannot be set together with insecure_bootstrap",
        ),
        (
            "trust_bundle_url = \"https://x\"",
            PLUGINS,
            "2 agent.trust_bundle_url: this source of the bundle is not served yet",
        ),
        (
            "trust_bundle_unix_socket = \"x\"",
            PLUGINS,
            "2 agent.trust_bundle_unix_socket: this source of the bundle is not served yet",
        ),
        (
            "trust_bundle_spiffe_workload_api = \"x\"",
            PLUGINS,
            "2 agent.trust_bundle_spiffe_workload_api: this source of the bundle is not served yet",
        ),
        ("trust_bundle_format = \"der\"", PLUGINS, "2 agent.trust_bundle_format: \"der\" is no format of a bundle"),
        (
            "workload_x509_svid_key_type = \"rsa-4096\"",
            PLUGINS,
            "2 agent.workload_x509_svid_key_type: \"rsa-4096\" is no key type for workloads",
        ),
        ("availability_target = \"23h\"", PLUGINS, "2 agent.availability_target: 23h0m0s is too short"),
        ("x509_svid_cache_max_size = -1", PLUGINS, "2 agent.x509_svid_cache_max_size: -1 is out of range"),
        ("sds { default_svid_name = \"x\" }", PLUGINS, "2 agent.sds: Envoy's SDS is not served yet"),
        (
            "authorized_delegates = [\"spiffe://example.org/x\"]",
            PLUGINS,
            "2 agent.authorized_delegates: the delegated identity API is not served yet",
        ),
        ("experimental { broker {} }", PLUGINS, "2 agent.experimental.broker: the broker API is not served yet"),
        (
            "experimental { ratelimit {} }",
            PLUGINS,
            "2 agent.experimental.ratelimit: limits per workload are not served yet",
        ),
        (
            "experimental { jwt_svid_cache_hit_timeout = \"1m\" }",
            PLUGINS,
            "2 agent.experimental.jwt_svid_cache_hit_timeout: is out of range",
        ),
        (
            "",
            "KeyManager \"disk\" {} NodeAttestor \"join_token\" {} WorkloadAttestor \"unix\" {}",
            "3 plugins.KeyManager \"disk\": directory must be configured",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"tpm_devid\" {} WorkloadAttestor \"unix\" {}",
            "3 plugins.NodeAttestor \"tpm_devid\": this node attestor is not served yet",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"join_token\" {} NodeAttestor \"x509pop\" {} WorkloadAttestor \"unix\" {}",
            "3 plugins.NodeAttestor \"x509pop\": a second NodeAttestor",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"x509pop\" { plugin_data { private_key_path = \"/k\" } } WorkloadAttestor \"unix\" {}",
            "3 plugins.NodeAttestor \"x509pop\": certificate_path must be configured",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"join_token\" {} WorkloadAttestor \"unix\" {} WorkloadAttestor \"k8s\" {}",
            "3 plugins.WorkloadAttestor \"k8s\": this workload attestor is not served yet",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"join_token\" {} WorkloadAttestor \"unix\" { plugin_data { odd = 1 } }",
            "3 plugins.WorkloadAttestor \"unix\".plugin_data.odd: unknown key",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"join_token\" {} WorkloadAttestor \"unix\" {} SVIDStore \"x\" {}",
            "3 plugins.SVIDStore \"x\": plugins of type SVIDStore are not served yet",
        ),
    ] {
        assert_eq!(refused(&with(&format!("{bundle} {agent}"), plugins)), [expected], "{agent} {plugins}");
    }
    let text = with("insecure_bootstrap = true rebootstrap_mode = \"always\"", PLUGINS);
    assert_eq!(refused(&text), ["2 agent.rebootstrap_mode: cannot be used with insecure_bootstrap"]);
}

/// The sample, and the same with every commented key switched on.
fn samples() -> [String; 2] {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/samples/agent.conf");
    let text = std::fs::read_to_string(path).unwrap();
    let switched_on = text
        .lines()
        .map(|line| match line.trim_start().strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_alphabetic()) => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    [text, switched_on]
}

#[test]
fn the_sample_is_a_configuration() {
    let [plain, switched_on] = samples();
    let config = accepted(&plain);
    assert_eq!(config.warnings, []);
    let all = accepted(&switched_on);
    assert_eq!(all.warnings, []);
    // What is shown as a default is one.
    assert_eq!((all.data_dir, all.socket_path, all.bootstrap), (config.data_dir, config.socket_path, config.bootstrap));
    assert_eq!((all.rebootstrap, all.workload_key_type), (config.rebootstrap, config.workload_key_type));
    assert_eq!(
        (all.x509_svid_cache_max_size, all.jwt_svid_cache_max_size, all.sync_interval),
        (config.x509_svid_cache_max_size, config.jwt_svid_cache_max_size, config.sync_interval)
    );
    assert_eq!(
        (all.unix_attestor, all.log.level, all.log.format),
        (config.unix_attestor, config.log.level, config.log.format)
    );
}

#[test]
fn the_sample_has_every_key() {
    let [_, switched_on] = samples();
    let missing: Vec<_> = [
        "trust_domain",
        "server_address",
        "server_port",
        "data_dir",
        "socket_path",
        "admin_socket_path",
        "trust_bundle_path",
        "trust_bundle_format",
        "insecure_bootstrap",
        "rebootstrap_mode",
        "rebootstrap_delay",
        "join_token",
        "workload_x509_svid_key_type",
        "availability_target",
        "x509_svid_cache_max_size",
        "jwt_svid_cache_max_size",
        "allow_unauthenticated_verifiers",
        "allowed_foreign_jwt_claims",
        "disable_workload_api",
        "log_file",
        "log_level",
        "log_format",
        "log_source_location",
        "sync_interval",
        "directory",
        "enabled",
        "private_key_path",
        "certificate_path",
        "intermediates_path",
        "discover_workload_path",
        "workload_size_limit",
        "path_of_other_mount_namespaces",
        "host",
        "port",
        "MetricPrefix",
        "EnableTrustDomainLabel",
        "EnableHostnameLabel",
        "AllowedPrefixes",
        "BlockedPrefixes",
        "AllowedLabels",
        "BlockedLabels",
        "listener_enabled",
        "bind_address",
        "bind_port",
        "live_path",
        "ready_path",
    ]
    .into_iter()
    .filter(|key| !switched_on.lines().any(|line| line.trim_start().starts_with(&format!("{key} ="))))
    .collect();
    assert_eq!(missing, Vec::<&str>::new());
}
