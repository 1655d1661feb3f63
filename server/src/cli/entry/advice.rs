//! Advice about selectors that no attestor emits: an entry with one gives nobody an identity, and nothing else says so.

use runtime::hcl::distance;
use spiffe_proto::types::Selector;

/// What the values of a type begin with, for the attestors of this project and of SPIRE.
const KNOWN: &[(&str, &[&str])] = &[
    ("unix", &["uid", "user", "gid", "group", "supplementary_gid", "supplementary_group", "path", "sha256"]),
    (
        "k8s",
        &[
            "ns",
            "ns-label",
            "sa",
            "node-name",
            "pod-uid",
            "pod-name",
            "pod-image",
            "pod-image-count",
            "pod-init-image",
            "pod-init-image-count",
            "pod-label",
            "pod-owner",
            "pod-owner-uid",
            "container-name",
            "container-image",
            "uid",
            "resource",
            "plural",
            "group",
            "version",
            "kind",
            "name",
            "namespace",
            "key",
            "label",
            "owner-key",
            "owner-uid",
            "controller-key",
            "controller-uid",
        ],
    ),
    ("docker", &["label", "env", "image_id", "image_config_digest"]),
    ("systemd", &["id", "fragment_path"]),
    ("x509pop", &["subject", "ca", "serialnumber", "san"]),
    (
        "k8s_psat",
        &[
            "cluster",
            "agent_ns",
            "agent_sa",
            "agent_pod_name",
            "agent_pod_uid",
            "agent_pod_label",
            "agent_node_ip",
            "agent_node_name",
            "agent_node_uid",
            "agent_node_label",
        ],
    ),
];

/// A sentence about a selector that looks like a slip, with the right spelling.
pub(super) fn about(selector: &Selector) -> Option<String> {
    let (kind, value) = (selector.r#type.as_str(), selector.value.as_str());
    let given = format!("{kind}:{value}");
    let Some((_, known)) = KNOWN.iter().find(|(name, _)| *name == kind) else {
        let near = KNOWN.iter().find(|(name, _)| name.eq_ignore_ascii_case(kind))?.0;
        return Some(format!("no attestor emits the selector {given}; did you mean {near}:{value}?"));
    };
    let (first, rest) = value.split_once(':').map_or((value, ""), |(first, rest)| (first, rest));
    if known.contains(&first) {
        return None;
    }
    let plain = |text: &str| text.to_ascii_lowercase().replace('_', "-");
    let near = known.iter().map(|known| (distance(&plain(first), &plain(known)), *known)).min();
    match near {
        Some((off, near)) if off <= 2 && off * 2 < first.len() => {
            Some(format!("no attestor emits the selector {given}; did you mean {kind}:{near}:{rest}?"))
        }
        // Of the other types, releases to come may emit more.
        _ if kind == "unix" => {
            Some(format!("no attestor emits the selector {given}; unix selectors begin with {}", known.join(", ")))
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn advice(kind: &str, value: &str) -> Option<String> {
        about(&Selector { r#type: kind.into(), value: value.into() })
    }

    #[test]
    fn selectors_that_no_attestor_emits_are_told_with_the_right_spelling() {
        for (kind, value, right) in [
            ("k8s", "pod_name:web-1", "k8s:pod-name:web-1"),
            ("k8s", "Pod-Label:app:web", "k8s:pod-label:app:web"),
            ("k8s", "container_image:a:b", "k8s:container-image:a:b"),
            ("unix", "supplementary-gid:5", "unix:supplementary_gid:5"),
            ("unix", "UID:1000", "unix:uid:1000"),
            ("unix", "sha265:aa", "unix:sha256:aa"),
            ("docker", "image-id:x", "docker:image_id:x"),
            ("K8S", "pod-name:x", "k8s:pod-name:x"),
        ] {
            let expected = format!("no attestor emits the selector {kind}:{value}; did you mean {right}?");
            assert_eq!(advice(kind, value), Some(expected));
        }
        let told = advice("unix", "nonsense:1").unwrap();
        assert!(told.starts_with("no attestor emits the selector unix:nonsense:1; unix selectors begin with uid, "));
    }

    #[test]
    fn selectors_that_may_be_right_are_left_alone() {
        for (kind, value) in [
            ("unix", "uid:0"),
            ("k8s", "pod-name:a:b"),
            ("k8s", "something-new:1"),
            ("custom", "pod_name:1"),
            ("x509pop", "san:a:b"),
        ] {
            assert_eq!(advice(kind, value), None, "{kind}:{value}");
        }
    }
}
