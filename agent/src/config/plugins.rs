//! The plugins of the agent: which key manager, node attestor and workload attestors are run.

use std::path::Path;

use runtime::hcl::{Mistakes, Plugin};

use super::checked::{KeyManager, NodeAttestor, absolute};
use crate::workload::unix;

/// Node attestors of SPIRE that come later.
const LATER_ATTESTORS: [&str; 9] =
    ["sshpop", "k8s_psat", "http_challenge", "tpm_devid", "aws_iid", "azure_msi", "azure_imds", "gcp_iit", "k8s_sat"];

/// What the plugins say.
#[derive(Default)]
pub(super) struct Plugins {
    pub(super) key_manager: Option<KeyManager>,
    pub(super) node_attestor: Option<NodeAttestor>,
    pub(super) unix_attestor: Option<unix::Settings>,
}

impl Plugins {
    pub(super) fn check(plugins: &[Plugin<'_>], mistakes: &Mistakes) -> Self {
        let mut found = Self::default();
        let of = |kind: &str| plugins.iter().filter(|plugin| plugin.kind.value == kind).collect::<Vec<_>>();
        for (kind, remedy) in [
            ("KeyManager", "add KeyManager \"disk\" { plugin_data { directory = \"…\" } }"),
            ("NodeAttestor", "add NodeAttestor \"join_token\" { plugin_data {} }"),
            ("WorkloadAttestor", "add WorkloadAttestor \"unix\" { plugin_data {} }"),
        ] {
            let all = of(kind);
            if all.is_empty() {
                mistakes.refuse(None, format!("plugins.{kind}"), "must be configured", remedy);
            }
            if kind != "WorkloadAttestor" {
                for extra in all.into_iter().skip(1) {
                    mistakes.refuse_at(&extra.name, format!("a second {kind}"), "keep one");
                }
            }
        }
        found.key_manager = of("KeyManager").first().and_then(|plugin| key_manager(plugin, mistakes));
        found.node_attestor = of("NodeAttestor").first().and_then(|plugin| node_attestor(plugin, mistakes));
        for plugin in plugins {
            match plugin.kind.value.as_str() {
                "KeyManager" | "NodeAttestor" => {}
                "WorkloadAttestor" => {
                    if let Some(settings) = workload_attestor(plugin, mistakes) {
                        found.unix_attestor = Some(settings);
                    }
                }
                "SVIDStore" => {
                    mistakes.refuse_at(
                        &plugin.name,
                        "plugins of type SVIDStore are not served yet",
                        "remove the block",
                    );
                }
                other => {
                    let remedy = "the types are KeyManager, NodeAttestor and WorkloadAttestor";
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
        "disk" => match data.text("directory").filter(|directory| !directory.value.is_empty()) {
            Some(directory) => Some(KeyManager::Disk { directory: absolute(Path::new(&directory.value)) }),
            None => {
                let remedy = "add plugin_data { directory = \"…\" }";
                mistakes.refuse_at(&plugin.name, "directory must be configured", remedy);
                None
            }
        },
        other => {
            mistakes.refuse_at(&plugin.name, format!("there is no key manager {other:?}"), "use disk or memory");
            return None;
        }
    };
    data.refuse_unknown();
    checked
}

fn node_attestor(plugin: &Plugin<'_>, mistakes: &Mistakes) -> Option<NodeAttestor> {
    let data = &plugin.data;
    match plugin.name.value.as_str() {
        "join_token" => {
            data.warn_unknown();
            Some(NodeAttestor::JoinToken)
        }
        "x509pop" => {
            let path = |key: &str| {
                data.text(key).filter(|path| !path.value.is_empty()).map(|path| absolute(Path::new(&path.value)))
            };
            if let Some(socket) = data.text("spiffe_endpoint_socket").filter(|socket| !socket.value.is_empty()) {
                let message = "taking the certificate from a Workload API is not served yet";
                mistakes.refuse_at(&socket, message, "use private_key_path and certificate_path");
                return None;
            }
            let (key, certificate, intermediates) =
                (path("private_key_path"), path("certificate_path"), path("intermediates_path"));
            for (name, given) in [("private_key_path", &key), ("certificate_path", &certificate)] {
                if given.is_none() {
                    let message = format!("{name} must be configured");
                    mistakes.refuse_at(&plugin.name, message, format!("add {name} = \"…\""));
                }
            }
            data.refuse_unknown();
            Some(NodeAttestor::X509Pop {
                private_key_path: key?,
                certificate_path: certificate?,
                intermediates_path: intermediates,
            })
        }
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

fn workload_attestor(plugin: &Plugin<'_>, mistakes: &Mistakes) -> Option<unix::Settings> {
    let data = &plugin.data;
    match plugin.name.value.as_str() {
        "unix" => {
            let settings = unix::Settings {
                discover_workload_path: data.boolean("discover_workload_path").is_some_and(|on| on.value),
                workload_size_limit: data
                    .integer("workload_size_limit")
                    .map_or(unix::SizeLimit::None, |limit| limit.value.into()),
                path_of_other_mount_namespaces: data
                    .boolean("path_of_other_mount_namespaces")
                    .is_some_and(|on| on.value),
            };
            data.refuse_unknown();
            Some(settings)
        }
        "docker" | "k8s" | "systemd" | "slurm" | "windows" => {
            mistakes.refuse_at(&plugin.name, "this workload attestor is not served yet", "use unix");
            None
        }
        other => {
            mistakes.refuse_at(&plugin.name, format!("there is no workload attestor {other:?}"), "use unix");
            None
        }
    }
}
