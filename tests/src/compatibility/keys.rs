//! Every key of SPIRE's two configuration files, each tried with `validate`.

use std::fs;
use std::path::Path;

use anyhow::Result;

use super::{Row, Standing};
use crate::testkit::{Binaries, process::run};

/// Name of the key for readers, and the text to put into block `server`.
const SERVER: &[(&str, &str)] = &[
    ("admin_ids", "admin_ids = [\"spiffe://example.org/admin\"]"),
    ("agent_ttl", "agent_ttl = \"2h\""),
    ("audit_log_enabled", "audit_log_enabled = true"),
    ("bind_address", "bind_address = \"127.0.0.1\""),
    ("bind_port", "bind_port = \"8081\""),
    ("ca_key_type", "ca_key_type = \"ec-p384\""),
    ("ca_subject", "ca_subject { country = [\"US\"] organization = [\"SPIFFE\"] common_name = \"x\" }"),
    ("ca_ttl", "ca_ttl = \"48h\""),
    ("default_jwt_svid_ttl", "default_jwt_svid_ttl = \"10m\""),
    ("default_x509_svid_ttl", "default_x509_svid_ttl = \"2h\""),
    ("disable_jwt_svids", "disable_jwt_svids = true"),
    ("federation", "federation { bundle_endpoint { address = \"127.0.0.1\" port = 8443 } }"),
    ("jwt_issuer", "jwt_issuer = \"https://issuer.example.org\""),
    ("jwt_key_type", "jwt_key_type = \"rsa-2048\""),
    ("log_file", "log_file = \"server.log\""),
    ("log_format", "log_format = \"json\""),
    ("log_level", "log_level = \"DEBUG\""),
    ("log_source_location", "log_source_location = true"),
    ("max_attested_node_info_staleness", "max_attested_node_info_staleness = \"5s\""),
    ("profiling_enabled", "profiling_enabled = true"),
    ("proxy_protocol_trusted_cidrs", "proxy_protocol_trusted_cidrs = [\"10.0.0.0/8\"]"),
    ("prune_attested_nodes_expired_for", "prune_attested_nodes_expired_for = \"72h\""),
    ("prune_tofu_nodes", "prune_attested_nodes_expired_for = \"72h\"\nprune_tofu_nodes = true"),
    ("ratelimit", "ratelimit { attestation = false signing = false }"),
    ("socket_path", "socket_path = \"api.sock\""),
    ("experimental.agent_spiffe_id_as_selector", "experimental { agent_spiffe_id_as_selector = true }"),
    ("experimental.auth_opa_policy_engine", "experimental { auth_opa_policy_engine { local { rego_path = \"x\" } } }"),
    ("experimental.cache_reload_interval", "experimental { cache_reload_interval = \"5s\" }"),
    ("experimental.events_based_cache", "experimental { events_based_cache = true }"),
    ("experimental.require_pq_kem", "experimental { require_pq_kem = true }"),
    ("experimental.wit_issuer", "experimental { wit_issuer = \"x\" }"),
];

const SERVER_PLUGINS: &[(&str, &str)] = &[
    ("DataStore \"sled\"", "DataStore \"sled\" { plugin_data {} }"),
    (
        "DataStore \"sql\" (sqlite3)",
        "DataStore \"sql\" { plugin_data { database_type = \"sqlite3\" connection_string = \"datastore.sqlite3\" } }",
    ),
    (
        "DataStore \"sql\" (postgres)",
        "DataStore \"sql\" { plugin_data { database_type = \"postgres\" connection_string = \"x\" } }",
    ),
    ("KeyManager \"disk\"", "KeyManager \"disk\" { plugin_data { keys_path = \"keys.json\" } }"),
    ("KeyManager \"memory\"", "KeyManager \"memory\" { plugin_data {} }"),
    ("KeyManager \"aws_kms\"", "KeyManager \"aws_kms\" { plugin_data { region = \"x\" } }"),
    ("KeyManager \"hashicorp_vault\"", "KeyManager \"hashicorp_vault\" { plugin_data { vault_addr = \"x\" } }"),
    ("NodeAttestor \"join_token\"", "NodeAttestor \"join_token\" { plugin_data {} }"),
    ("NodeAttestor \"x509pop\"", "NodeAttestor \"x509pop\" { plugin_data { ca_bundle_path = \"FOLDER/ca.pem\" } }"),
    ("NodeAttestor \"sshpop\"", "NodeAttestor \"sshpop\" { plugin_data { cert_authorities = [\"x\"] } }"),
    ("NodeAttestor \"k8s_psat\"", "NodeAttestor \"k8s_psat\" { plugin_data { clusters = { c = {} } } }"),
    ("NodeAttestor \"http_challenge\"", "NodeAttestor \"http_challenge\" { plugin_data {} }"),
    ("NodeAttestor \"tpm_devid\"", "NodeAttestor \"tpm_devid\" { plugin_data { devid_ca_path = \"x\" } }"),
    ("NodeAttestor \"aws_iid\"", "NodeAttestor \"aws_iid\" { plugin_data {} }"),
    (
        "UpstreamAuthority \"disk\"",
        "UpstreamAuthority \"disk\" { plugin_data { cert_file_path = \"x\" key_file_path = \"y\" } }",
    ),
    ("UpstreamAuthority \"spire\"", "UpstreamAuthority \"spire\" { plugin_data { server_address = \"x\" } }"),
    ("UpstreamAuthority \"vault\"", "UpstreamAuthority \"vault\" { plugin_data { vault_addr = \"x\" } }"),
    ("UpstreamAuthority \"cert-manager\"", "UpstreamAuthority \"cert-manager\" { plugin_data { namespace = \"x\" } }"),
    ("BundlePublisher \"k8s_configmap\"", "BundlePublisher \"k8s_configmap\" { plugin_data { namespace = \"x\" } }"),
    ("BundlePublisher \"aws_s3\"", "BundlePublisher \"aws_s3\" { plugin_data { bucket = \"x\" } }"),
    ("Notifier \"k8sbundle\"", "Notifier \"k8sbundle\" { plugin_data {} }"),
    ("CredentialComposer \"uniqueid\"", "CredentialComposer \"uniqueid\" { plugin_data {} }"),
    ("plugin_cmd (external plugins)", "NodeAttestor \"mine\" { plugin_cmd = \"/bin/true\" plugin_data {} }"),
];

const TOP: &[(&str, &str)] = &[
    ("telemetry.Prometheus", "telemetry { Prometheus { host = \"127.0.0.1\" port = 9988 } }"),
    ("telemetry.Statsd", "telemetry { Statsd = [ { address = \"127.0.0.1:8125\" } ] }"),
    ("telemetry.DogStatsd", "telemetry { DogStatsd = [ { address = \"127.0.0.1:8125\" } ] }"),
    ("telemetry.M3", "telemetry { M3 = [ { address = \"127.0.0.1:9000\" env = \"x\" } ] }"),
    ("health_checks", "health_checks { listener_enabled = true bind_port = \"8080\" }"),
];

const AGENT: &[(&str, &str)] = &[
    ("admin_socket_path", "admin_socket_path = \"FOLDER/admin/admin.sock\""),
    ("allow_unauthenticated_verifiers", "allow_unauthenticated_verifiers = true"),
    ("allowed_foreign_jwt_claims", "allowed_foreign_jwt_claims = [\"x\"]"),
    ("authorized_delegates", "authorized_delegates = [\"spiffe://example.org/delegate\"]"),
    ("availability_target", "availability_target = \"24h\""),
    ("disable_sds_api", "disable_sds_api = true"),
    ("disable_workload_api", "disable_workload_api = true"),
    ("join_token", "join_token = \"abc\""),
    ("join_token_file", "join_token_file = \"FOLDER/token\""),
    ("jwt_svid_cache_max_size", "jwt_svid_cache_max_size = 10"),
    ("x509_svid_cache_max_size", "x509_svid_cache_max_size = 10"),
    ("log_level", "log_level = \"DEBUG\""),
    ("log_selectors", "log_selectors = [\"unix\"]"),
    ("rebootstrap_mode", "rebootstrap_mode = \"auto\""),
    ("sds", "sds { default_svid_name = \"x\" }"),
    ("trust_bundle_format", "trust_bundle_format = \"pem\""),
    ("workload_x509_svid_key_type", "workload_x509_svid_key_type = \"rsa-2048\""),
    ("profiling_enabled", "profiling_enabled = true"),
    ("experimental.sync_interval", "experimental { sync_interval = \"2s\" }"),
    ("experimental.use_sync_authorized_entries", "experimental { use_sync_authorized_entries = true }"),
    ("experimental.require_pq_kem", "experimental { require_pq_kem = true }"),
    ("experimental.ratelimit", "experimental { ratelimit { FetchX509SVID = 1 } }"),
    ("experimental.broker", "experimental { broker { socket_path = \"x\" } }"),
];

/// Ways to the first trust bundle; exactly one stands in a file.
const BOOTSTRAP: &[(&str, &str)] = &[
    ("trust_bundle_path", "trust_bundle_path = \"FOLDER/ca.pem\""),
    ("trust_bundle_url", "trust_bundle_url = \"https://example.org/bundle\""),
    ("trust_bundle_spiffe_workload_api", "trust_bundle_spiffe_workload_api = \"unix:///x\""),
    ("insecure_bootstrap", "insecure_bootstrap = true"),
];

const AGENT_PLUGINS: &[(&str, &str)] = &[
    ("KeyManager \"disk\"", "KeyManager \"disk\" { plugin_data { directory = \"FOLDER\" } }"),
    ("KeyManager \"memory\"", "KeyManager \"memory\" { plugin_data {} }"),
    ("NodeAttestor \"join_token\"", "NodeAttestor \"join_token\" { plugin_data {} }"),
    (
        "NodeAttestor \"x509pop\"",
        "NodeAttestor \"x509pop\" { plugin_data { private_key_path = \"FOLDER/x\" certificate_path = \"FOLDER/ca.pem\" } }",
    ),
    ("NodeAttestor \"sshpop\"", "NodeAttestor \"sshpop\" { plugin_data {} }"),
    ("NodeAttestor \"k8s_psat\"", "NodeAttestor \"k8s_psat\" { plugin_data { cluster = \"x\" } }"),
    ("NodeAttestor \"tpm_devid\"", "NodeAttestor \"tpm_devid\" { plugin_data {} }"),
    (
        "WorkloadAttestor \"unix\"",
        "WorkloadAttestor \"unix\" { plugin_data { discover_workload_path = true workload_size_limit = 1000 } }",
    ),
    ("WorkloadAttestor \"k8s\"", "WorkloadAttestor \"k8s\" { plugin_data {} }"),
    ("WorkloadAttestor \"docker\"", "WorkloadAttestor \"docker\" { plugin_data {} }"),
    ("WorkloadAttestor \"systemd\"", "WorkloadAttestor \"systemd\" { plugin_data {} }"),
    ("SVIDStore \"aws_secretsmanager\"", "SVIDStore \"aws_secretsmanager\" { plugin_data {} }"),
];

/// One file to validate: the lines of each block, keyed by what is tried.
struct File {
    block: &'static str,
    base: Vec<&'static str>,
    plugins: Vec<&'static str>,
}

/// Tries every key of `server.conf`.
pub(super) fn server(binaries: &Binaries, folder: &Path) -> Result<Vec<Row>> {
    let file = File {
        block: "server",
        base: vec!["trust_domain = \"example.org\"", "data_dir = \"FOLDER\""],
        plugins: vec!["DataStore \"sled\" {}", "KeyManager \"memory\" {}"],
    };
    let mut rows = Vec::new();
    for (name, text) in SERVER {
        rows.push(file.with_key(&binaries.server, folder, name, text)?);
    }
    for (name, text) in SERVER_PLUGINS {
        rows.push(file.with_plugin(&binaries.server, folder, name, text)?);
    }
    for (name, text) in TOP {
        rows.push(file.with_top(&binaries.server, folder, name, text)?);
    }
    Ok(rows)
}

/// Tries every key of `agent.conf`.
pub(super) fn agent(binaries: &Binaries, folder: &Path) -> Result<Vec<Row>> {
    let server = [
        "trust_domain = \"example.org\"",
        "data_dir = \"FOLDER\"",
        "server_address = \"localhost\"",
        "server_port = 8081",
    ];
    let plugins = vec!["KeyManager \"memory\" {}", "NodeAttestor \"join_token\" {}", "WorkloadAttestor \"unix\" {}"];
    let bare = File { block: "agent", base: server.to_vec(), plugins: plugins.clone() };
    let file =
        File { block: "agent", base: [&server[..], &["trust_bundle_path = \"FOLDER/ca.pem\""]].concat(), plugins };
    let mut rows = Vec::new();
    for (name, text) in BOOTSTRAP {
        rows.push(bare.with_key(&binaries.agent, folder, name, text)?);
    }
    for (name, text) in AGENT {
        rows.push(file.with_key(&binaries.agent, folder, name, text)?);
    }
    for (name, text) in AGENT_PLUGINS {
        rows.push(file.with_plugin(&binaries.agent, folder, name, text)?);
    }
    for (name, text) in TOP {
        rows.push(file.with_top(&binaries.agent, folder, name, text)?);
    }
    Ok(rows)
}

impl File {
    fn with_key(&self, program: &Path, folder: &Path, name: &str, text: &str) -> Result<Row> {
        let own = text.split_whitespace().next().unwrap_or_default();
        let mut base: Vec<&str> =
            self.base.iter().copied().filter(|line| line.split_whitespace().next() != Some(own)).collect();
        base.push(text);
        self.validate(program, folder, name, &base, &self.plugins, "")
    }

    fn with_plugin(&self, program: &Path, folder: &Path, name: &str, text: &str) -> Result<Row> {
        let kind = text.split_whitespace().next().unwrap_or_default();
        let mut plugins: Vec<&str> =
            self.plugins.iter().copied().filter(|line| line.split_whitespace().next() != Some(kind)).collect();
        plugins.push(text);
        self.validate(program, folder, name, &self.base, &plugins, "")
    }

    fn with_top(&self, program: &Path, folder: &Path, name: &str, text: &str) -> Result<Row> {
        self.validate(program, folder, name, &self.base, &self.plugins, text)
    }

    fn validate(
        &self,
        program: &Path,
        folder: &Path,
        name: &str,
        base: &[&str],
        plugins: &[&str],
        top: &str,
    ) -> Result<Row> {
        fs::create_dir_all(folder)?;
        let key = rcgen::KeyPair::generate()?;
        fs::write(folder.join("ca.pem"), rcgen::CertificateParams::default().self_signed(&key)?.pem())?;
        fs::write(folder.join("token"), "abc")?;
        let text =
            format!("{} {{\n{}\n}}\nplugins {{\n{}\n}}\n{top}\n", self.block, base.join("\n"), plugins.join("\n"));
        let path = folder.join("tried.conf");
        fs::write(&path, text.replace("FOLDER", &folder.display().to_string()))?;
        let config = path.display().to_string();
        let output = run(program, &["validate", "-config", &config])?;
        let printed = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
        let standing = match output.status.success() {
            false => Standing::Planned,
            true if printed.contains("no effect") => Standing::NoEffect,
            true => Standing::Works,
        };
        Ok(Row { name: name.into(), standing })
    }
}
