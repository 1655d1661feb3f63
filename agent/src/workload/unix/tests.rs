use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use spiffe::selector::SelectorSet;
use tokio::net::UnixStream;

use super::*;

fn myself() -> (Caller, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Arc::new(UnixPeer::pin(&ours).unwrap());
    let credentials = peer.credentials().unwrap();
    (Caller { peer, credentials }, theirs)
}

fn settings() -> Settings {
    Settings { discover_workload_path: true, ..Settings::default() }
}

async fn values(unix: &Unix, caller: &Caller) -> Vec<String> {
    let set: SelectorSet = unix.attest(caller).await.unwrap().into_iter().collect();
    set.iter().map(|selector| selector.value().to_owned()).collect()
}

#[tokio::test]
async fn user_groups_and_program() {
    let (mut caller, _theirs) = myself();
    caller.credentials.groups = vec![0, 4_294_900_000];
    let found = values(&Unix::new(settings()), &caller).await;
    let program = std::env::current_exe().unwrap();
    let bytes = fs::read(&program).unwrap();
    let hash: String = digest::digest(&digest::SHA256, &bytes).as_ref().iter().map(|b| format!("{b:02x}")).collect();
    for expected in [
        format!("uid:{}", caller.peer.uid),
        format!("gid:{}", caller.peer.gid),
        "supplementary_gid:0".into(),
        "supplementary_group:root".into(),
        "supplementary_gid:4294900000".into(),
        format!("path:{}", program.display()),
        format!("sha256:{hash}"),
    ] {
        assert!(found.contains(&expected), "{expected} in {found:?}");
    }
    // A group without a name has no selector for one.
    assert_eq!(found.iter().filter(|value| value.starts_with("supplementary_group:")).count(), 1);
    let without = values(&Unix::new(Settings::default()), &caller).await;
    assert!(without.iter().all(|value| !value.starts_with("path:") && !value.starts_with("sha256:")));
}

#[tokio::test]
async fn size_limits() {
    let (caller, _theirs) = myself();
    let small = Unix::new(Settings { workload_size_limit: 1.into(), ..settings() });
    assert!(matches!(small.attest(&caller).await, Err(AttestError::TooLarge { limit: 1, .. })));
    let none = values(&Unix::new(Settings { workload_size_limit: (-1).into(), ..settings() }), &caller).await;
    assert!(none.iter().any(|value| value.starts_with("path:")));
    assert!(none.iter().all(|value| !value.starts_with("sha256:")));
    assert_eq!(SizeLimit::from(0), SizeLimit::None);
}

#[tokio::test]
async fn a_hash_is_computed_once_for_each_state_of_a_file() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("program");
    let hashes = Hashes::default();
    let of = |content: &str| {
        fs::write(&path, content).unwrap();
        let file = File::open(&path).unwrap();
        let metadata = file.metadata().unwrap();
        (file, metadata)
    };
    let (file, metadata) = of("one");
    let first = hashes.of(file, &metadata).await.unwrap();
    let again = hashes.of(File::open(&path).unwrap(), &metadata).await.unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    let (file, metadata) = of("another");
    assert_ne!(hashes.of(file, &metadata).await.unwrap(), first);
    // A file that is not in the state that was asked for is not hashed into that state.
    let (_, stale) = of("three");
    let (file, _) = of("three and more");
    assert!(matches!(hashes.of(file, &stale).await, Err(AttestError::Changing)));
    assert_eq!(hashes.known.lock().unwrap().0.len(), 2);
}

/// Runs a program of the same path as another one of ours, in a mount namespace of its own.
#[tokio::test]
async fn a_path_that_is_another_file_in_our_mount_namespace_is_not_told() {
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let precious = folder.path().join("precious");
    fs::write(&precious, "#!/bin/false\n").unwrap();
    let script = format!(
        "mount --bind $(readlink -f $(command -v python3)) {p} && exec {p} -c \
         'import socket,sys,time; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); time.sleep(60)' {s}",
        p = precious.display(),
        s = folder.path().join("s").display()
    );
    let listener = tokio::net::UnixListener::bind(folder.path().join("s")).unwrap();
    let child = Command::new("unshare")
        .args(["--mount", "--user", "--map-root-user", "sh", "-c", &script])
        .stderr(Stdio::piped())
        .spawn();
    let Ok(mut child) = child else { return };
    let accepted = tokio::time::timeout(std::time::Duration::from_secs(10), async {
        loop {
            tokio::select! {
                accepted = listener.accept() => return Some(accepted.unwrap().0),
                () = tokio::time::sleep(std::time::Duration::from_millis(20)) => {
                    if child.try_wait().unwrap().is_some() {
                        return None; // Namespaces are not allowed here.
                    }
                }
            }
        }
    });
    let Ok(Some(stream)) = accepted.await else { return };
    let peer = Arc::new(UnixPeer::pin(&stream).unwrap());
    let credentials = peer.credentials().unwrap();
    let caller = Caller { peer, credentials };
    let strict = values(&Unix::new(settings()), &caller).await;
    assert!(strict.iter().all(|value| !value.starts_with("path:")), "{strict:?}");
    assert!(strict.iter().any(|value| value.starts_with("sha256:")));
    let trusting = Unix::new(Settings { path_of_other_mount_namespaces: true, ..settings() });
    let told = values(&trusting, &caller).await;
    assert!(told.contains(&format!("path:{}", precious.display())), "{told:?}");
    child.kill().unwrap();
    child.wait().unwrap();
}
