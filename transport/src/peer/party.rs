//! Who answers for a process on its machine: the whole that its like cannot leave, and cannot multiply.
//!
//! A process forks at will, and a user may own sixty thousand further user numbers, so neither is counted. A control
//! group that was made from outside (a pod's, a login session's user, a system service) holds whatever those inside do.
//! Below it they may have been given the right to make further groups, so the highest such group counts and nothing
//! below it. systemd's layout (`systemd.slice(5)`) and the kubelet's with both of its drivers are known; anything else
//! could have been made by anybody, so there the user counts.

use std::fmt;
use std::sync::Arc;

/// One who answers for processes; cheap to clone, equal by its text.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Party(Arc<str>);

/// Folders in which container runtimes without systemd make a group for each container or pod.
const PARENTS: &[&str] = &["docker", "lxc", "libpod_parent", "k8s.io", "ecs"];

impl Party {
    /// The party of a process of user `uid`, from what `/proc/<pid>/cgroup` holds; both versions of control groups, and
    /// paths as an agent in a control group namespace of its own sees them.
    pub fn of(cgroups: &str, uid: u32) -> Self {
        // Version 2 says most; then the tree that systemd and runtimes keep under version 1; then any other.
        let mut paths: Vec<(u8, &str)> = cgroups
            .lines()
            .filter_map(|line| {
                let (_, rest) = line.split_once(':')?;
                let (controllers, path) = rest.split_once(':')?;
                let rank = match controllers {
                    "" => 0,
                    "name=systemd" => 1,
                    _ => 2,
                };
                Some((rank, path))
            })
            .collect();
        paths.sort_by_key(|(rank, _)| *rank);
        let mut known = paths.iter().filter_map(|(_, path)| of_path(path));
        match known.next() {
            None => Self::of_user(uid),
            Some((party, Kind::Pod | Kind::User)) => party,
            // Of a cluster in a container, one tree may show the container only.
            Some((party, Kind::Other)) => known.find(|(_, kind)| *kind == Kind::Pod).map_or(party, |(pod, _)| pod),
        }
    }

    /// All processes of a user, where control groups say nothing.
    pub fn of_user(uid: u32) -> Self {
        Self::named(format!("user {uid}"))
    }

    /// All those that cannot be seen from here.
    pub fn unseen() -> Self {
        Self::named("unseen".to_owned())
    }

    fn named(text: String) -> Self {
        // A name of a group may hold anything but a slash and a line break, and goes into logs.
        let clean = |c: char| if c.is_control() { '?' } else { c };
        Self(text.chars().map(clean).take(256).collect::<String>().into())
    }

    /// The text that identifies it, such as `pod 2c48913c-b29f-…`, `/system.slice/web.service` or `user 1000`.
    pub fn name(&self) -> &Arc<str> {
        &self.0
    }
}

impl fmt::Display for Party {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// What a path leads to.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Pod,
    User,
    Other,
}

/// The party of one path, if its layout is known.
fn of_path(path: &str) -> Option<(Party, Kind)> {
    // Seen from a namespace of control groups, others begin with the way out of it.
    let (mut outside, mut seen) = (false, String::new());
    let mut parts = path.split('/').filter(|part| !part.is_empty()).peekable();
    while parts.next_if(|part| *part == "..").is_some() {
        outside = true;
    }
    // Which part of the path may be a pod of the kubelet's cgroupfs driver.
    let mut kube = outside;
    while let Some(part) = parts.next() {
        if let Some(pod) = pod_slice(part).or_else(|| if kube { pod_folder(part) } else { None }) {
            return Some((Party::named(format!("pod {pod}")), Kind::Pod));
        }
        if is_user_slice(part) {
            return Some((Party::named(part.to_owned()), Kind::User));
        }
        seen.push('/');
        seen.push_str(part);
        if part.ends_with(".slice") {
            kube = false;
            continue;
        }
        if part.ends_with(".service") || part.ends_with(".scope") || seen.contains(".slice/") {
            return Some((Party::named(seen), Kind::Other));
        }
        match part {
            "kubepods" => kube = true,
            "burstable" | "besteffort" if kube => {}
            _ if PARENTS.contains(&part) && !outside => {
                let inner = parts.next()?;
                seen.push('/');
                seen.push_str(inner);
                // A whole cluster in a container: its pods are more than one party.
                if parts.peek() != Some(&"kubepods") {
                    return Some((Party::named(seen), Kind::Other));
                }
            }
            // Of the agent's own pod.
            _ if outside && is_container(part) => return Some((Party::named(seen), Kind::Other)),
            _ => return None,
        }
    }
    // Some slice as a whole.
    seen.contains(".slice").then(|| (Party::named(seen), Kind::Other))
}

/// `user-1000.slice`.
fn is_user_slice(part: &str) -> bool {
    let number = part.strip_prefix("user-").and_then(|rest| rest.strip_suffix(".slice"));
    number.is_some_and(|number| !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit()))
}

/// The pod of `kubepods-burstable-pod2c48913c_b29f_….slice`, as the kubelet's systemd driver names it; what follows a
/// colon is what containerd makes of a name that it does not understand.
fn pod_slice(part: &str) -> Option<String> {
    let (slice, rest) = part.split_once(".slice")?;
    if !(rest.is_empty() || rest.starts_with(':')) {
        return None;
    }
    let (parents, uid) = slice.rsplit_once("-pod")?;
    parents.split('-').any(|parent| parent == "kubepods").then(|| pod_uid(uid)).flatten()
}

/// The pod of `pod2c48913c-b29f-…`, as the kubelet's cgroupfs driver names it.
fn pod_folder(part: &str) -> Option<String> {
    pod_uid(part.strip_prefix("pod")?)
}

/// A pod's number with hyphens, from any of its forms; a static pod's is a hash without any.
fn pod_uid(text: &str) -> Option<String> {
    let hex = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte));
    let parts: Vec<&str> = text.split(['-', '_']).collect();
    let lengths: Vec<usize> = parts.iter().map(|part| part.len()).collect();
    let known = lengths == [8, 4, 4, 4, 12] || lengths == [32];
    (known && parts.iter().all(|part| hex(part))).then(|| parts.join("-"))
}

/// Sixty-four hexadecimal digits, as container runtimes name their containers.
fn is_container(part: &str) -> bool {
    part.len() == 64 && part.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const POD: &str = "2c48913c-b29f-4a2e-9a1d-0123456789ab";
    const SLICE: &str = "2c48913c_b29f_4a2e_9a1d_0123456789ab";
    const STATIC: &str = "2c48913cb29f4a2e9a1d0123456789ab";
    const ID: &str = "abababababababababababababababababababababababababababababababab";
    const OTHER: &str = "cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd";

    fn of(path: &str) -> String {
        Party::of(&format!("0::{path}\n"), 1000).to_string()
    }

    fn filled(text: &str) -> String {
        text.replace("UID_", SLICE).replace("UID", POD).replace("HASH", STATIC).replace("CID", ID).replace("CD2", OTHER)
    }

    #[test]
    fn parties_of_every_layout() {
        for (path, party) in [
            // The kubelet, cgroupfs driver.
            ("/kubepods/podUID/CID", "pod UID"),
            ("/kubepods/burstable/podUID/CID", "pod UID"),
            ("/kubepods/besteffort/podUID/CID/made/inside", "pod UID"),
            ("/kubepods/burstable/podHASH/CID", "pod HASH"),
            // The kubelet, systemd driver: containerd, docker, cri-o, and a root of its own.
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podUID_.slice/cri-containerd-CID.scope",
                "pod UID",
            ),
            ("/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-podUID.slice/docker-CID.scope", "pod UID"),
            ("/kubepods.slice/kubepods-podUID_.slice/crio-CID.scope/container", "pod UID"),
            (
                "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-podUID_.slice/cri-containerd-CID.scope",
                "pod UID",
            ),
            ("/kubepods-besteffort-podUID_.slice:cri-containerd:CID", "pod UID"),
            // The agent in a namespace of control groups of its own.
            ("/../../../kubepods-burstable.slice/kubepods-burstable-podUID_.slice/cri-containerd-CID.scope", "pod UID"),
            ("/../../podUID/CID", "pod UID"),
            ("/../../../burstable/podUID/CID", "pod UID"),
            ("/../cri-containerd-CID.scope", "/cri-containerd-CID.scope"),
            ("/../crio-CID.scope", "/crio-CID.scope"),
            ("/../CID", "/CID"),
            ("/../CID/kubepods/podUID", "/CID"),
            ("/../../system.slice/web.service", "/system.slice/web.service"),
            // A cluster in a container, control groups of version 1.
            ("/docker/CD2/kubepods/besteffort/podUID/CID", "pod UID"),
            // A process that may make groups makes no party: only the first pod counts, and none in a session.
            (
                "/kubepods.slice/kubepods-podUID_.slice/cri-containerd-CID.scope/kubepods-podHASH.slice/x.scope",
                "pod UID",
            ),
            (
                "/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-podUID_.slice/x.scope",
                "user-1000.slice",
            ),
            ("/user.slice/user-1000.slice/user@1000.service/app.slice/one.scope", "user-1000.slice"),
            ("/user.slice/user-1000.slice/session-3.scope", "user-1000.slice"),
            // Units and slices of the system.
            ("/system.slice/web.service", "/system.slice/web.service"),
            ("/system.slice/web.service/delegated/one", "/system.slice/web.service"),
            ("/system.slice/docker-CID.scope", "/system.slice/docker-CID.scope"),
            ("/system.slice/crio-conmon-CID.scope", "/system.slice/crio-conmon-CID.scope"),
            ("/system.slice/system-web.slice/web@3.service", "/system.slice/system-web.slice/web@3.service"),
            ("/machine.slice/machine-guest.scope/system.slice/web.service", "/machine.slice/machine-guest.scope"),
            ("/machine.slice/libpod-CID.scope/container", "/machine.slice/libpod-CID.scope"),
            ("/custom.slice", "/custom.slice"),
            ("/init.scope", "/init.scope"),
            // Runtimes without systemd.
            ("/docker/CID", "/docker/CID"),
            ("/docker/CID/made/inside", "/docker/CID"),
            ("/libpod_parent/libpod-CID", "/libpod_parent/libpod-CID"),
            ("/k8s.io/name", "/k8s.io/name"),
            // Nothing is known: the user.
            ("/", "user 1000"),
            ("", "user 1000"),
            ("/../..", "user 1000"),
            ("/docker", "user 1000"),
            ("/anything/CID", "user 1000"),
            ("/payload/system.slice/web.service", "user 1000"),
            ("/podUID/CID", "user 1000"),
            ("/kubepods/podUID-1/CID", "user 1000"),
        ] {
            assert_eq!(of(&filled(path)), filled(party), "{path}");
        }
    }

    #[test]
    fn the_lines_that_say_most_count_first() {
        let of = |text: &str| Party::of(&filled(text), 7).to_string();
        // Both versions side by side, as the kubelet's cgroupfs driver leaves them.
        let hybrid = "9:name=systemd:/kubepods/burstable/podUID/CID\n4:memory:/kubepods/burstable/podUID/CID\n0::/\n";
        assert_eq!(of(hybrid), filled("pod UID"));
        assert_eq!(
            of("4:memory:/process_api/HASH\n1:name=systemd:/user.slice/user-7.slice/session-1.scope\n"),
            "user-7.slice"
        );
        assert_eq!(of("3:pids:/docker/CID\n1:name=openrc:/docker/CID\n"), filled("/docker/CID"));
        // A cluster in a container: the second line shows the container only.
        let kind =
            "11:pids:/docker/CD2/kubepods/besteffort/podUID/CID\n0::/docker/CD2/system.slice/containerd.service\n";
        assert_eq!(of(kind), filled("pod UID"));
        // A plain process, with a group of a sandbox that has a name of digits.
        assert_eq!(of("9:name=systemd:/\n4:memory:/process_api/HASH\n0::/\n"), "user 7");
        for nothing in ["", "x", "0:", "::", "0::"] {
            assert_eq!(of(nothing), "user 7", "{nothing:?}");
        }
    }

    proptest! {
        /// Whatever a member of a party appends to its own group, it stays in the party.
        #[test]
        fn nobody_leaves_by_making_groups(
            base in prop::sample::select(vec![
                "/user.slice/user-1000.slice", "/system.slice/web.service", "/docker/CID", "/kubepods/podUID",
                "/kubepods.slice/kubepods-podUID_.slice", "/../cri-containerd-CID.scope", "/machine.slice/a.scope",
            ]),
            below in prop::collection::vec(
                prop::sample::select(vec![
                    "user-7.slice", "a.slice", "b.scope", "kubepods-podHASH.slice", "podHASH", "docker", "CD2", "x",
                ]),
                0..5,
            ),
        ) {
            let base = filled(base);
            let whole = format!("{base}/{}", filled(&below.join("/")));
            prop_assert_eq!(of(&whole), of(&base));
        }

        #[test]
        fn any_text_has_a_party_without_control_characters(text in "\\PC{0,40}|[\\x00-\\x7f]{0,80}", uid: u32) {
            let party = Party::of(&text, uid);
            prop_assert!(!party.name().is_empty());
            prop_assert!(!party.name().chars().any(char::is_control));
        }
    }
}
