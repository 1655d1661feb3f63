use std::os::unix::net::UnixStream as Blocking;
use std::process::{Command, Stdio};

use super::*;

fn pinned(ours: Blocking) -> Result<UnixPeer, PeerError> {
    ours.set_nonblocking(true).unwrap();
    UnixPeer::pin(&UnixStream::from_std(ours).unwrap())
}

#[tokio::test]
async fn a_peer_is_what_proc_says() {
    let (ours, _theirs) = Blocking::pair().unwrap();
    let peer = Arc::new(pinned(ours).unwrap());
    assert_eq!(peer.pid, i32::try_from(std::process::id()).unwrap());
    let credentials = peer.credentials().unwrap();
    assert_eq!((credentials.uid, credentials.gid), (peer.uid, peer.gid));
    let program = fs::metadata("/proc/self/exe").unwrap();
    assert_eq!(peer.executable, Some(FileId { device: program.dev(), inode: program.ino() }));
    assert_eq!(peer.executable_path().await, std::env::current_exe().ok());
    peer.still_same().unwrap();
    assert!(peer.is_alive());
}

/// A process that listens on `path`, so that the kernel names it as the peer of who connects, and then becomes what
/// the shell makes of it.
#[tokio::test]
async fn h_70_a_peer_that_ends_or_becomes_another_program_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let script = format!(
        "import os, socket, sys\ns = socket.socket(socket.AF_UNIX)\ns.bind({path:?})\ns.listen()\nprint('ready', flush=True)\n\
         sys.stdin.readline()\nos.set_inheritable(s.fileno(), True)\nos.execv('/bin/sleep', ['sleep', '60'])\n"
    );
    let mut child =
        Command::new("python3").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
    let peer = Arc::new(pinned(Blocking::connect(&path).unwrap()).unwrap());
    assert_eq!(peer.pid, i32::try_from(child.id()).unwrap());
    peer.still_same().unwrap();
    drop(child.stdin.take());
    let changed = async {
        while peer.still_same().is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(std::time::Duration::from_secs(20), changed).await.unwrap();
    assert!(matches!(peer.still_same(), Err(PeerError::OtherProgram)), "{:?}", peer.still_same());
    // What it runs now is not what asked.
    assert_eq!(peer.executable_path().await, None);
    child.kill().unwrap();
    // Not waited for yet: a zombie has ended, too.
    tokio::time::timeout(std::time::Duration::from_secs(20), peer.gone()).await.unwrap();
    assert!(!peer.is_alive());
    assert!(matches!(peer.still_same(), Err(PeerError::Gone)), "{:?}", peer.still_same());
    child.wait().unwrap();
    assert!(matches!(peer.still_same(), Err(PeerError::Gone)));
    assert!(matches!(peer.credentials(), Err(PeerError::Gone)));
}

#[tokio::test]
async fn h_70_a_peer_that_is_gone_before_it_is_accepted_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("s");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let script = format!("import socket\ns = socket.socket(socket.AF_UNIX)\ns.connect({path:?})\n");
    assert!(Command::new("python3").args(["-c", &script]).status().unwrap().success());
    let (ours, _) = listener.accept().unwrap();
    assert!(matches!(pinned(ours), Err(PeerError::Gone)));
}

#[test]
fn start_time_is_counted_from_the_last_parenthesis() {
    let stat = b"7 (a) 1 2 (b)) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 2560000 200";
    assert_eq!(parse_start_time(stat), Some(4242));
    assert_eq!(parse_start_time(b"7 (a) S 1"), None);
    assert_eq!(parse_start_time(b""), None);
}

#[test]
fn status_lines() {
    let status =
        b"Name:\tUid:\\n0\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t64\nGroups:\t9 10 \nUid:\t0\t0\t0\t0\n";
    let expected = Credentials { uid: 2, gid: 6, groups: vec![9, 10] };
    assert_eq!(parse_status(status), Some(expected));
    assert_eq!(parse_status(b"Name:\tx\nUid:\t1\t2\t3\t4\nGid:\t1\t1\t1\t1\n"), None);
    assert_eq!(parse_status(b"Uid:\t1\nGid:\t1\nGroups:\t\n"), None);
}
