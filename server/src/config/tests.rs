use std::path::Path;
use std::time::Duration;

use runtime::flags::Environment;
use runtime::hcl::ConfigError;
use runtime::telemetry::Level;
use runtime::telemetry::log::Format;
use spiffe::x509::KeyType;

use super::checked::{DataStore, KeyManager, NodeAttestor, PruneAttestedNodes, X509PopRoots};
use super::{Config, Overrides, load};

const MINIMAL: &str =
    "server {\n trust_domain = \"example.org\"\n data_dir = \"/data\"\n}\nplugins {\n KeyManager \"memory\" {}\n}\n";

fn load_text(text: &str, overrides: &Overrides) -> Result<Config, ConfigError> {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server.conf");
    std::fs::write(&path, text).unwrap();
    load(&Overrides { config: Some(path), ..overrides.clone() }, &Environment::default())
}

fn accepted(text: &str) -> Config {
    load_text(text, &Overrides::default()).unwrap_or_else(|error| panic!("{error}"))
}

/// Each mistake as `line key: message`.
fn refused(text: &str) -> Vec<String> {
    match load_text(text, &Overrides::default()) {
        Err(ConfigError::Mistakes { mistakes, .. }) => {
            mistakes.iter().map(|m| format!("{} {}: {}", m.line.unwrap_or(0), m.key, m.message)).collect()
        }
        other => panic!("{other:?}"),
    }
}

/// A configuration with `server` lines and `plugins` lines beside the needed ones, on lines 2 and 3.
fn with(server: &str, plugins: &str) -> String {
    format!("server {{ trust_domain = \"example.org\" data_dir = \"/data\"\n{server} }} plugins {{\n{plugins} }}")
}

#[test]
fn renamed_keys_of_older_releases_are_answered_with_the_new_name() {
    let text =
        with("default_svid_ttl = \"1h\" registration_uds_path = \"/s\"\nsvid_ttl = \"1h\"", "KeyManager \"memory\" {}");
    let Err(ConfigError::Mistakes { mistakes, .. }) = load_text(&text, &Overrides::default()) else { panic!() };
    let told: Vec<_> = mistakes.iter().map(|m| format!("{}: {}; {}", m.key, m.message, m.remedy)).collect();
    let ttls = "is the name of an older release; write default_x509_svid_ttl and default_jwt_svid_ttl";
    let expected = [
        format!("server.default_svid_ttl: {ttls}"),
        "server.registration_uds_path: is the name of an older release; write socket_path".to_owned(),
        format!("server.svid_ttl: {ttls}"),
    ];
    let mut told = told;
    told.sort();
    assert_eq!(told, expected);
}

#[test]
fn bind_address_may_be_ipv6_in_brackets() {
    for (given, read_as) in [("[::]", "::"), ("[::1]", "::1"), ("::1", "::1"), ("127.0.0.1", "127.0.0.1")] {
        let config = accepted(&with(&format!("bind_address = \"{given}\""), "KeyManager \"memory\" {}"));
        assert_eq!(config.bind_address.to_string(), read_as);
    }
    assert_eq!(
        refused(&with("bind_address = \"[::1]:8081\"", "KeyManager \"memory\" {}")),
        ["2 server.bind_address: \"[::1]:8081\" is neither a name nor an IP address"]
    );
}

#[test]
fn defaults_are_those_of_spire() {
    let config = accepted(MINIMAL);
    assert_eq!(config.trust_domain.as_str(), "example.org");
    assert_eq!(config.data_dir, Path::new("/data"));
    assert_eq!((config.bind_address.to_string().as_str(), config.bind_port), ("0.0.0.0", 8081));
    assert_eq!(config.socket_path, Path::new("/tmp/spire-server/private/api.sock"));
    assert_eq!(config.admin_ids, []);
    assert_eq!(config.agent_ttl, None);
    assert_eq!(config.default_x509_svid_ttl, Duration::from_secs(3600));
    assert_eq!(config.default_jwt_svid_ttl, Duration::from_secs(300));
    assert_eq!(config.ca_ttl, Duration::from_secs(86_400));
    assert_eq!((config.ca_key_type, config.jwt_key_type), (KeyType::EcP256, KeyType::EcP256));
    assert_eq!((config.ca_subject.country, config.ca_subject.organization), (vec!["US".into()], vec!["SPIFFE".into()]));
    assert!(config.ca_subject.common_name.is_empty() && config.jwt_issuer.is_none());
    assert!(!config.disable_jwt_svids && !config.audit_log_enabled && !config.agent_spiffe_id_as_selector);
    assert!(config.ratelimit.attestation && config.ratelimit.signing);
    assert_eq!(config.ratelimit.connections_per_network, None);
    assert_eq!(config.key_manager, KeyManager::Memory);
    assert_eq!(config.data_store, DataStore::Sled { dir: "/data/history".into() });
    assert_eq!(config.node_attestors, [NodeAttestor::JoinToken]);
    assert_eq!(config.prune_attested_nodes, None);
    assert_eq!((config.log.level, config.log.format, config.log.file), (Level::Info, Format::Text, None));
    assert!(config.telemetry.prometheus.is_none() && config.health.is_none());
    assert_eq!(config.warnings, []);
}

#[test]
fn every_key_is_read() {
    let config = accepted(
        r#"
server {
    admin_ids = ["spiffe://example.org/admin", "spiffe://other.org/admin"]
    agent_ttl = "3h"
    audit_log_enabled = true
    bind_address = "127.0.0.1"
    bind_port = "9999"
    ca_key_type = "RSA-2048"
    jwt_key_type = "ec-p384"
    ca_subject { country = ["CH"] organization = ["Org"] common_name = "Name" }
    ca_ttl = "48h"
    data_dir = "relative"
    default_x509_svid_ttl = "1h30m"
    default_jwt_svid_ttl = "1m"
    disable_jwt_svids = true
    jwt_issuer = "https://issuer"
    log_file = "/var/log/x.log"
    log_level = "DEBUG"
    log_format = "json"
    log_source_location = true
    prune_attested_nodes_expired_for = "720h"
    prune_attested_nodes_batch_size = 7
    prune_tofu_nodes = true
    ratelimit { attestation = false signing = false connections_per_network = 500 }
    socket_path = "/run/s.sock"
    trust_domain = "spiffe://example.org"
    max_attested_node_info_staleness = "0s"
    proxy_protocol_trusted_cidrs = []
    experimental { agent_spiffe_id_as_selector = true }
}
plugins {
    KeyManager "disk" { plugin_data { keys_path = "/keys.json" } }
    DataStore "sled" { plugin_data { directory = "/elsewhere" } }
    NodeAttestor "join_token" { plugin_data {} }
    NodeAttestor "x509pop" { plugin_data { mode = "spiffe" svid_prefix = "/x" max_intermediates = 2 max_rsa_key_size = 4096 verify_client_ip = true agent_path_template = "/a/{{ .Fingerprint }}" } }
    UpstreamAuthority "disk" { enabled = false }
}
telemetry { Prometheus { port = 9988 } }
health_checks { listener_enabled = true }
"#,
    );
    assert_eq!(config.admin_ids.len(), 2);
    assert_eq!(config.agent_ttl, Some(Duration::from_secs(3 * 3600)));
    assert_eq!((config.bind_address.to_string().as_str(), config.bind_port), ("127.0.0.1", 9999));
    assert_eq!((config.ca_key_type, config.jwt_key_type), (KeyType::Rsa2048, KeyType::EcP384));
    assert_eq!(config.ca_subject.common_name, "Name");
    assert!(config.data_dir.is_absolute() && config.data_dir.ends_with("relative"));
    assert!(config.disable_jwt_svids && config.audit_log_enabled && config.agent_spiffe_id_as_selector);
    assert_eq!(config.jwt_issuer.as_deref(), Some("https://issuer"));
    assert_eq!((config.log.level, config.log.format, config.log.source_location), (Level::Debug, Format::Json, true));
    let prune = PruneAttestedNodes { expired_for: Duration::from_secs(720 * 3600), batch_size: 7, tofu_nodes: true };
    assert_eq!(config.prune_attested_nodes, Some(prune));
    assert!(!config.ratelimit.attestation && !config.ratelimit.signing);
    assert_eq!(config.ratelimit.connections_per_network, Some(500));
    assert_eq!(config.trust_domain.as_str(), "example.org");
    assert_eq!(config.key_manager, KeyManager::Disk { keys_path: "/keys.json".into() });
    assert_eq!(config.data_store, DataStore::Sled { dir: "/elsewhere".into() });
    let [NodeAttestor::JoinToken, NodeAttestor::X509Pop(pop)] = config.node_attestors.as_slice() else { panic!() };
    assert_eq!(pop.roots, X509PopRoots::Spiffe { prefix: "/x/".into() });
    assert_eq!((pop.max_intermediates, pop.max_rsa_key_size, pop.verify_client_ip), (2, 4096, true));
    assert_eq!(pop.agent_path_template.as_deref(), Some("/a/{{ .Fingerprint }}"));
    assert_eq!(config.telemetry.prometheus, Some(("localhost".into(), 9988)));
    assert_eq!(config.health.map(|health| health.port), Some(80));
    assert_eq!(config.warnings, []);
}

#[test]
fn json_is_the_same_configuration() {
    let config = accepted(
        r#"{"server": {"trust_domain": "example.org", "data_dir": "/data", "bind_port": "8082"},
            "plugins": {"KeyManager": {"memory": {"plugin_data": {}}}, "NodeAttestor": [{"join_token": {"plugin_data": {}}}]}}"#,
    );
    assert_eq!((config.bind_port, config.key_manager), (8082, KeyManager::Memory));
}

#[test]
fn flags_override_the_file() {
    let overrides = Overrides {
        trust_domain: Some("flag.org".into()),
        data_dir: Some("/flag".into()),
        bind_address: Some("[::1]".into()),
        bind_port: Some(1),
        socket_path: Some("/flag.sock".into()),
        log_level: Some("error".into()),
        log_format: Some("JSON".into()),
        log_file: Some("/flag.log".into()),
        log_source_location: true,
        ..Overrides::default()
    };
    let config = load_text(MINIMAL, &overrides).unwrap();
    assert_eq!((config.trust_domain.as_str(), config.data_dir.as_path()), ("flag.org", Path::new("/flag")));
    assert_eq!((config.bind_address.to_string().as_str(), config.bind_port), ("::1", 1));
    assert_eq!(config.socket_path, Path::new("/flag.sock"));
    assert_eq!((config.log.level, config.log.format, config.log.source_location), (Level::Error, Format::Json, true));
    assert_eq!(config.log.file.as_deref(), Some(Path::new("/flag.log")));
    let Err(ConfigError::Mistakes { mistakes, .. }) =
        load_text(MINIMAL, &Overrides { log_level: Some("loud".into()), ..Overrides::default() })
    else {
        panic!()
    };
    assert_eq!((mistakes[0].line, mistakes[0].key.as_str()), (None, "-logLevel"));
}

#[test]
fn all_mistakes_are_told_at_once() {
    let text = "server {\n trust_domain = \"Example.org\"\n bind_port = 70000\n ca_ttl = \"1\"\n agnet_ttl = \"1h\"\n log_level = \"loud\"\n log_format = \"xml\"\n admin_ids = [\"x\"]\n ca_key_type = \"dsa\"\n default_x509_svid_ttl = \"0s\"\n bind_address = \"not an address\"\n ratelimit { sining = true }\n ca_subject { state = \"x\" }\n}\nplugins {\n KeyManager \"tape\" {}\n}\nodd {}\n";
    let found = refused(text);
    let expected = [
        "1 server.data_dir: must be configured",
        "2 server.trust_domain: \"Example.org\": ",
        "3 server.bind_port: 70000 is no port",
        "4 server.ca_ttl: \"1\" has a number without a unit (ns, us, ms, s, m, h)",
        "5 server.agnet_ttl: unknown key",
        "6 server.log_level: \"loud\" is no log level",
        "7 server.log_format: \"xml\" is no log format",
        "8 server.admin_ids[0]: \"x\": ",
        "9 server.ca_key_type: \"dsa\" is no key type",
        "10 server.default_x509_svid_ttl: nothing can live for 0s",
        "11 server.bind_address: \"not an address\" is neither an address nor a name that resolves",
        "12 server.ratelimit.sining: unknown key",
        "13 server.ca_subject.state: unknown key",
        "16 plugins.KeyManager \"tape\": there is no key manager \"tape\"",
        "18 odd: unknown key",
    ];
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found} should start with {expected}");
    }
}

#[test]
fn what_is_missing_is_told() {
    assert_eq!(
        refused(""),
        [
            "0 server: the server section is missing",
            "0 plugins: the plugins section is missing",
            "0 server.trust_domain: must be configured",
            "0 server.data_dir: must be configured",
            "0 plugins.KeyManager: must be configured",
        ]
    );
    assert_eq!(
        refused(&with("", "KeyManager \"disk\" {}")),
        ["3 plugins.KeyManager \"disk\": keys_path must be configured"]
    );
}

#[test]
fn h_12_own_trust_domain_without_empty_labels() {
    for name in ["a..b", ".a", "a.", ".", ".."] {
        let text = MINIMAL.replace("example.org", name);
        let found = refused(&text);
        assert!(found.len() == 1 && found[0].starts_with("2 server.trust_domain"), "{found:?}");
    }
    for name in ["-", "_", "10.0.0.1", "1"] {
        assert_eq!(accepted(&MINIMAL.replace("example.org", name)).trust_domain.as_str(), name);
    }
}

#[test]
fn what_is_not_served_is_refused_by_name() {
    let memory = "KeyManager \"memory\" {}";
    for (server, plugins, expected) in [
        ("federation {}", memory, "2 server.federation: federation is not served yet"),
        (
            "proxy_protocol_trusted_cidrs = [\"10.0.0.0/8\"]",
            memory,
            "2 server.proxy_protocol_trusted_cidrs: the PROXY protocol is not served yet",
        ),
        (
            "experimental { auth_opa_policy_engine {} }",
            memory,
            "2 server.experimental.auth_opa_policy_engine: policies by OPA are not served yet",
        ),
        (
            "experimental { require_pq_kem = true }",
            memory,
            "2 server.experimental.require_pq_kem: refusing classical key exchange is not served yet",
        ),
        (
            "experimental { wit_issuer = \"x\" }",
            memory,
            "2 server.experimental.wit_issuer: WIT-SVIDs are not served yet",
        ),
        (
            "experimental { feature_flags = [\"x\"] }",
            memory,
            "2 server.experimental.feature_flags: there are no feature flags",
        ),
        (
            "experimental { named_pipe_name = \"x\" }",
            memory,
            "2 server.experimental.named_pipe_name: named pipes exist on Windows only",
        ),
        (
            "experimental { event_timeout = \"1m\" sql_transaction_timeout = \"1m\" }",
            memory,
            "2 server.experimental.sql_transaction_timeout: cannot be set together with event_timeout",
        ),
        ("", "KeyManager \"aws_kms\" {}", "3 plugins.KeyManager \"aws_kms\": this key manager is not served yet"),
        (
            "",
            "KeyManager \"memory\" {} UpstreamAuthority \"disk\" {}",
            "3 plugins.UpstreamAuthority \"disk\": plugins of type UpstreamAuthority are not served yet",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"k8s_psat\" {}",
            "3 plugins.NodeAttestor \"k8s_psat\": this node attestor is not served yet",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"mine\" {}",
            "3 plugins.NodeAttestor \"mine\": there is no node attestor \"mine\"",
        ),
        ("", "KeyManager \"memory\" {} Thing \"x\" {}", "3 plugins.Thing \"x\": there is no plugin type \"Thing\""),
        (
            "",
            "KeyManager \"memory\" {} KeyManager \"disk\" { plugin_data { keys_path = \"x\" } }",
            "3 plugins.KeyManager \"disk\": a second KeyManager",
        ),
        (
            "",
            "KeyManager \"memory\" { plugin_data { odd = 1 } }",
            "3 plugins.KeyManager \"memory\".plugin_data.odd: unknown key",
        ),
        (
            "",
            "KeyManager \"memory\" {} DataStore \"redis\" {}",
            "3 plugins.DataStore \"redis\": there is no data store \"redis\"",
        ),
        (
            "",
            "KeyManager \"memory\" {} DataStore \"sql\" { plugin_data {} }",
            "3 plugins.DataStore \"sql\": database_type must be configured",
        ),
        (
            "",
            "KeyManager \"memory\" {} DataStore \"sql\" { plugin_data { database_type = \"postgres\" } }",
            "3 plugins.DataStore \"sql\".plugin_data.database_type: the database \"postgres\" cannot be used",
        ),
        (
            "",
            "KeyManager \"memory\" {} DataStore \"sql\" { plugin_data { database_type \"aws_mysql\" { region = \"x\" } } }",
            "3 plugins.DataStore \"sql\".plugin_data.database_type \"aws_mysql\": the database \"aws_mysql\" cannot be used",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"x509pop\" { plugin_data { mode = \"other\" } }",
            "3 plugins.NodeAttestor \"x509pop\".plugin_data.mode: there is no mode \"other\"",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"x509pop\" {}",
            "3 plugins.NodeAttestor \"x509pop\": one of ca_bundle_path or ca_bundle_paths must be configured",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"x509pop\" { plugin_data { mode = \"spiffe\" max_intermediates = 0 } }",
            "3 plugins.NodeAttestor \"x509pop\".plugin_data.max_intermediates: 0 is out of range",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"x509pop\" { plugin_data { mode = \"spiffe\" agent_path_template = \"x\" } }",
            "3 plugins.NodeAttestor \"x509pop\".plugin_data.agent_path_template: does not begin with /",
        ),
        (
            "",
            "KeyManager \"memory\" {} NodeAttestor \"x509pop\" { plugin_data { mode = \"spiffe\" ca_bundle_path = \"x\" } }",
            "3 plugins.NodeAttestor \"x509pop\".plugin_data.ca_bundle_path: has no meaning in mode spiffe",
        ),
    ] {
        assert_eq!(refused(&with(server, plugins)), [expected], "{server} {plugins}");
    }
}

#[test]
fn x509pop_reads_its_authorities() {
    let directory = tempfile::tempdir().unwrap();
    let good = directory.path().join("good.pem");
    std::fs::write(&good, "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n").unwrap();
    let bad = directory.path().join("bad.pem");
    std::fs::write(&bad, "nothing").unwrap();
    let text = |data: String| {
        with("", &format!("KeyManager \"memory\" {{}} NodeAttestor \"x509pop\" {{ plugin_data {{ {data} }} }}"))
    };
    let config = accepted(&text(format!("ca_bundle_paths = [{good:?}, {good:?}]")));
    let [_, NodeAttestor::X509Pop(pop)] = config.node_attestors.as_slice() else { panic!() };
    let X509PopRoots::ExternalPki(roots) = &pop.roots else { panic!() };
    assert_eq!((roots.len(), &roots[0][..]), (2, &[0u8, 1, 2][..]));
    assert_eq!((pop.max_intermediates, pop.max_rsa_key_size), (4, 8192));
    assert_eq!(refused(&text(format!("ca_bundle_path = {bad:?}"))).len(), 1);
    let found = refused(&text(format!("ca_bundle_path = {:?}", directory.path().join("none"))));
    assert!(found[0].contains("cannot read"), "{found:?}");
    let found = refused(&text(format!("ca_bundle_path = {good:?} ca_bundle_paths = [{good:?}]")));
    assert!(found[0].ends_with("cannot be set together with ca_bundle_paths"), "{found:?}");
}

#[test]
fn sqlite_means_embedded_unless_it_holds_entries() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("datastore.sqlite3");
    let text = with(
        "",
        &format!(
            "KeyManager \"memory\" {{}} DataStore \"sql\" {{ plugin_data {{ database_type = \"sqlite3\" connection_string = {file:?} max_open_conns = 3 }} }}"
        ),
    );
    let config = accepted(&text);
    assert_eq!(config.data_store, DataStore::Sled { dir: "/data/history".into() });
    assert_eq!(config.warnings.len(), 1);
    assert!(config.warnings[0].message.starts_with("sqlite3 means \"embedded\" here"));

    let mut page = vec![0u8; 512];
    page[..16].copy_from_slice(b"SQLite format 3\0");
    page[16..18].copy_from_slice(&512u16.to_be_bytes());
    page[100] = 0x0d;
    page[300..318].copy_from_slice(b"registered_entries");
    std::fs::write(&file, page).unwrap();
    let found = refused(&text);
    assert!(found.len() == 1 && found[0].contains("holds the entries of a SPIRE server"), "{found:?}");
}

#[test]
fn what_has_no_effect_is_warned_about() {
    let text = with(
        "max_attested_node_info_staleness = \"1m\" profiling_enabled = true profiling_port = 1 ca_subject {} experimental { events_based_cache = true cache_reload_interval = \"5s\" odd = 1 }",
        "KeyManager \"memory\" {} DataStore \"memory\" {}",
    );
    let config = accepted(&text);
    let keys: Vec<_> = config.warnings.iter().map(|warning| warning.key.as_str()).collect();
    assert_eq!(
        keys,
        [
            "server.experimental.cache_reload_interval",
            "server.experimental.events_based_cache",
            "server.experimental.odd",
            "server.max_attested_node_info_staleness",
            "server.profiling_enabled",
            "server.ca_subject",
            "plugins.DataStore \"memory\"",
        ]
    );
    assert_eq!(config.data_store, DataStore::Memory);
}

#[test]
fn lifetimes_that_a_rotation_cuts_short_are_warned_about() {
    let config = accepted(&with("ca_ttl = \"1h\" agent_ttl = \"240h\"", "KeyManager \"memory\" {}"));
    let told: Vec<_> = config.warnings.iter().map(|w| (w.key.as_str(), w.remedy.as_str())).collect();
    assert_eq!(
        told,
        [
            ("server.agent_ttl", "set it to 10m0s or less; more than 168h0m0s is never guaranteed"),
            ("server.default_x509_svid_ttl", "set it to 10m0s or less, or ca_ttl to 6h0m0s or more"),
        ]
    );
}

/// The sample with its file of authorities in place, and the same with every commented key switched on.
fn samples() -> (tempfile::TempDir, [String; 2]) {
    let directory = tempfile::tempdir().unwrap();
    let authorities = directory.path().join("ca.pem");
    std::fs::write(&authorities, "-----BEGIN CERTIFICATE-----\nAAEC\n-----END CERTIFICATE-----\n").unwrap();
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/samples/server.conf");
    let text = std::fs::read_to_string(path).unwrap();
    let text = text.replace("/etc/signet/x509pop-ca.pem", authorities.to_str().unwrap());
    let switched_on: String = text
        .lines()
        .map(|line| match line.trim_start().strip_prefix('#') {
            Some(rest) if rest.starts_with(|c: char| c.is_ascii_alphabetic()) => format!("{rest}\n"),
            _ => format!("{line}\n"),
        })
        .collect();
    (directory, [text, switched_on])
}

#[test]
fn the_sample_is_a_configuration() {
    let (_directory, [plain, switched_on]) = samples();
    let config = accepted(&plain);
    assert_eq!(config.warnings, []);
    assert_eq!((config.bind_port, config.ca_ttl), (8081, Duration::from_secs(86_400)));
    // What is shown as a default is one: the two differ only where the sample says "example".
    let all = accepted(&switched_on);
    assert_eq!(all.warnings, []);
    assert_eq!(
        (all.bind_address, all.bind_port, all.socket_path),
        (config.bind_address, config.bind_port, config.socket_path)
    );
    assert_eq!(
        (all.default_x509_svid_ttl, all.default_jwt_svid_ttl),
        (config.default_x509_svid_ttl, config.default_jwt_svid_ttl)
    );
    assert_eq!(
        (all.ca_ttl, all.ca_key_type, all.jwt_key_type),
        (config.ca_ttl, config.ca_key_type, config.jwt_key_type)
    );
    assert_eq!((all.ratelimit, all.key_manager), (config.ratelimit, config.key_manager));
    assert_eq!((all.log.level, all.log.format), (config.log.level, config.log.format));
}

#[test]
fn the_sample_has_every_key() {
    let (_directory, [_, switched_on]) = samples();
    let missing: Vec<_> = [
        "admin_ids",
        "agent_ttl",
        "audit_log_enabled",
        "bind_address",
        "bind_port",
        "ca_key_type",
        "jwt_key_type",
        "country",
        "organization",
        "common_name",
        "ca_ttl",
        "data_dir",
        "default_x509_svid_ttl",
        "default_jwt_svid_ttl",
        "disable_jwt_svids",
        "jwt_issuer",
        "log_file",
        "log_level",
        "log_format",
        "log_source_location",
        "prune_attested_nodes_expired_for",
        "prune_attested_nodes_batch_size",
        "prune_tofu_nodes",
        "attestation",
        "signing",
        "socket_path",
        "trust_domain",
        "agent_spiffe_id_as_selector",
        "directory",
        "keys_path",
        "enabled",
        "mode",
        "ca_bundle_path",
        "agent_path_template",
        "max_intermediates",
        "max_rsa_key_size",
        "verify_client_ip",
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
        "live_path",
        "ready_path",
    ]
    .into_iter()
    .filter(|key| !switched_on.lines().any(|line| line.trim_start().starts_with(&format!("{key} ="))))
    .collect();
    assert_eq!(missing, Vec::<&str>::new());
}
