//! The plugins of the server: which key manager, data store and node attestors are run.

use std::path::Path;

use bytes::Bytes;
use runtime::hcl::{Located, Mistakes, Plugin, Section};

use super::checked::{DataStore, KeyManager, NodeAttestor, X509Pop, X509PopRoots, absolute};
use super::sqlite;

/// Node attestors of SPIRE that come later.
const LATER_ATTESTORS: [&str; 9] =
    ["sshpop", "k8s_psat", "http_challenge", "tpm_devid", "aws_iid", "azure_msi", "azure_imds", "gcp_iit", "k8s_sat"];

/// What the plugins say.
#[derive(Default)]
pub(super) struct Plugins {
    pub(super) key_manager: Option<KeyManager>,
    pub(super) data_store: Option<DataStore>,
    pub(super) node_attestors: Vec<NodeAttestor>,
}

impl Plugins {
    pub(super) fn check(plugins: &[Plugin<'_>], data_dir: Option<&Path>, mistakes: &Mistakes) -> Self {
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
