use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Stdio};

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::Duration;

use spiffe::selector::SelectorSet;
use tokio::net::UnixStream;

use super::super::Selectors;
use super::*;

const PATIENCE: Duration = Duration::from_secs(20);

fn myself() -> (Caller, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let peer = Arc::new(UnixPeer::pin(&ours).unwrap());
    let credentials = peer.credentials().unwrap();
    (Caller { peer, credentials }, theirs)
}

fn settings() -> Settings {
    Settings { discover_workload_path: true, ..Settings::default() }
}

async fn attest(unix: &Unix, caller: &Caller) -> Selectors {
    match unix.begin(caller) {
        Begun::Says(said) => said,
        Begun::Later(later) => tokio::time::timeout(PATIENCE, later).await.unwrap(),
    }
}

async fn values(unix: &Unix, caller: &Caller) -> Vec<String> {
    let set: SelectorSet = attest(unix, caller).await.unwrap().into_iter().collect();
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
    assert!(matches!(attest(&small, &caller).await, Err(AttestError::TooLarge { limit: 1, .. })));
    let none = values(&Unix::new(Settings { workload_size_limit: (-1).into(), ..settings() }), &caller).await;
    assert!(none.iter().any(|value| value.starts_with("path:")));
    assert!(none.iter().all(|value| !value.starts_with("sha256:")));
    assert_eq!(SizeLimit::from(0), SizeLimit::None);
}

async fn hashed(hashes: &Hashes, party: &str, file: File, metadata: &Metadata) -> Result<Arc<str>, AttestError> {
    let party = Party::of(&format!("0::/system.slice/{party}.service"), 0);
    match hashes.of(&party, file, State::of(metadata)).map_err(AttestError::Busy)? {
        Hash::Known(hash) => Ok(hash),
        Hash::Pending(hash) => Ok(tokio::time::timeout(PATIENCE, hash).await.unwrap()?),
        Hash::Unwanted => panic!(),
    }
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
    let first = hashed(&hashes, "a", file, &metadata).await.unwrap();
    let again = hashed(&hashes, "b", File::open(&path).unwrap(), &metadata).await.unwrap();
    assert!(Arc::ptr_eq(&first, &again));
    let (file, metadata) = of("another");
    assert_ne!(hashed(&hashes, "a", file, &metadata).await.unwrap(), first);
    // A file that is not in the state that was asked for is not hashed into that state.
    let (_, stale) = of("three");
    let (file, _) = of("three and more");
    assert!(matches!(hashed(&hashes, "a", file, &stale).await, Err(AttestError::Changing)));
    let kept = hashes.kept();
    assert_eq!((kept.known.len(), kept.pending.len()), (2, 0));
}

/// A file whose content never comes, until somebody writes to it.
fn silent(folder: &Path, name: &str) -> (File, File) {
    let path = folder.join(name);
    nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    let both = File::options().read(true).write(true).open(&path).unwrap();
    (File::open(&path).unwrap(), both)
}

#[tokio::test]
async fn look_ups_that_were_given_up_or_never_end_keep_nobody_from_hashing() {
    let folder = tempfile::tempdir().unwrap();
    let hashes = Hashes::default();
    let one = Party::of_user(1);
    let mut holding = Vec::new();
    for number in 0..3 {
        let (file, writer) = silent(folder.path(), &number.to_string());
        let state = State::of(&file.metadata().unwrap());
        let begun = hashes.of(&one, file, state).unwrap();
        assert!(matches!(begun, Hash::Pending(_)));
        // Nobody waits for it; it is asked for once more, and is the same one.
        drop(begun);
        let again = File::open(folder.path().join(number.to_string())).unwrap();
        drop(hashes.of(&one, again, state).unwrap());
        holding.push((state, writer));
    }
    assert_eq!(hashes.kept().pending.len(), 3);
    assert_eq!(hashes.pool.busy(), 1);
    let path = folder.path().join("program");
    fs::write(&path, "program").unwrap();
    let open = || File::open(&path).unwrap();
    let metadata = open().metadata().unwrap();
    let hash = hashed(&hashes, "other", open(), &metadata).await.unwrap();
    let digest: String =
        digest::digest(&digest::SHA256, b"program").as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(&*hash, digest);
    // Once the content comes, the look-ups that were given up end, and their party goes on.
    drop(holding);
    let done = async {
        while !hashes.kept().pending.is_empty() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, done).await.unwrap();
}

/// A name service that counts, and hangs or fails when told to.
#[derive(Clone)]
struct Service {
    asked: Arc<AtomicUsize>,
    hangs: Arc<AtomicBool>,
    fails: Arc<AtomicBool>,
    held: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl Service {
    fn new() -> (Self, mpsc::Sender<()>) {
        let (hold, held) = mpsc::channel();
        let held = Arc::new(Mutex::new(held));
        (Self { asked: Arc::default(), hangs: Arc::default(), fails: Arc::default(), held }, hold)
    }
}

impl NameService for Service {
    fn name(&self, of: Of) -> io::Result<Option<String>> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        if self.hangs.load(Ordering::SeqCst) {
            let _ = self.held.lock().unwrap().recv();
        }
        if self.fails.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::TimedOut.into());
        }
        let (Of::User(number) | Of::Group(number)) = of;
        Ok((number != 0).then(|| format!("n{number}")))
    }
}

fn as_if(caller: &Caller, uid: u32, groups: Vec<u32>) -> Caller {
    let credentials = transport::peer::Credentials { uid, gid: 7, groups };
    Caller { peer: Arc::clone(&caller.peer), credentials }
}

#[tokio::test]
async fn at_most_a_thousand_groups_are_asked_for_by_name_and_all_are_told_by_number() {
    let (caller, _theirs) = myself();
    let (service, _hold) = Service::new();
    let unix = Unix::with(Settings::default(), Box::new(service.clone()));
    let caller = as_if(&caller, 5, (10_000..75_536).collect());
    let found = values(&unix, &caller).await;
    let count = |kind: &str| found.iter().filter(|value| value.starts_with(kind)).count();
    assert_eq!((count("supplementary_gid:"), count("supplementary_group:")), (65_536, NAMED_GROUPS));
    assert_eq!((count("user:n5"), count("group:n7")), (1, 1));
    assert_eq!(service.asked.load(Ordering::SeqCst), NAMED_GROUPS + 2);
    // For a while the names are believed.
    assert!(matches!(unix.begin(&caller), Begun::Says(Ok(_))));
    assert_eq!(service.asked.load(Ordering::SeqCst), NAMED_GROUPS + 2);
}

#[tokio::test]
async fn a_name_service_that_hangs_costs_those_who_need_it_and_is_never_taken_for_a_lack_of_names() {
    let (caller, _theirs) = myself();
    let (service, hold) = Service::new();
    let unix = Unix::with(Settings::default(), Box::new(service.clone()));
    let known = as_if(&caller, 5, vec![]);
    assert!(values(&unix, &known).await.contains(&"user:n5".to_owned()));
    service.hangs.store(true, Ordering::SeqCst);
    let mut waiting = Vec::new();
    for uid in 100..110 {
        let Begun::Later(mut later) = unix.begin(&as_if(&caller, uid, vec![])) else { panic!() };
        assert!(futures_util::poll!(&mut later).is_pending());
        waiting.push(later);
    }
    let asked = async {
        while service.asked.load(Ordering::SeqCst) < 4 {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, asked).await.unwrap();
    // Who needs no new names is answered at once, of the same party too; and the hung ones are two.
    for _ in 0..100 {
        assert!(values(&unix, &known).await.contains(&"user:n5".to_owned()));
    }
    assert_eq!(service.asked.load(Ordering::SeqCst), 4);
    // All but one give up; what they would have asked is not asked any more.
    let last = waiting.pop().unwrap();
    drop(waiting);
    service.hangs.store(false, Ordering::SeqCst);
    drop(hold);
    let found: SelectorSet = tokio::time::timeout(PATIENCE, last).await.unwrap().unwrap().into_iter().collect();
    assert!(found.contains(&Selector::new("unix", "user:n109").unwrap()));
    assert_eq!(service.asked.load(Ordering::SeqCst), 5);
    service.fails.store(true, Ordering::SeqCst);
    assert!(matches!(attest(&unix, &as_if(&caller, 200, vec![])).await, Err(AttestError::Names(_))));
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
