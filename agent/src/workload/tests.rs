use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::process::{Child, Command, Stdio};

use tokio::net::UnixListener;

use super::*;

struct Says(&'static str, Result<&'static [&'static str], ()>);

impl WorkloadAttestor for Says {
    fn name(&self) -> &'static str {
        self.0
    }

    fn begin(&self, _: &Caller) -> Begun {
        Begun::Says(match self.1 {
            Ok(values) => Ok(values.iter().map(|value| Selector::new(self.0, value).unwrap()).collect()),
            Err(()) => Err(AttestError::Changing),
        })
    }
}

/// Answers as another one does, but later.
struct Late(Says);

impl WorkloadAttestor for Late {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn begin(&self, caller: &Caller) -> Begun {
        let Begun::Says(said) = self.0.begin(caller) else { panic!() };
        Begun::Later(Box::pin(async move {
            tokio::time::sleep(Duration::from_secs(9)).await;
            said
        }))
    }
}

/// Never answers.
struct Silent;

impl WorkloadAttestor for Silent {
    fn name(&self) -> &'static str {
        "silent"
    }

    fn begin(&self, _: &Caller) -> Begun {
        Begun::Later(Box::pin(std::future::pending()))
    }
}

fn myself() -> (Arc<UnixPeer>, tokio::net::UnixStream) {
    let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
    (Arc::new(UnixPeer::pin(&ours).unwrap()), theirs)
}

fn attestors(all: Vec<Box<dyn WorkloadAttestor>>) -> Attestors {
    Attestors::new(all, Limiter::new(runtime::clock::Clock::system()))
}

#[tokio::test(start_paused = true)]
async fn one_answer_is_enough_and_none_is_an_error() {
    let (peer, _theirs) = myself();
    let both = attestors(vec![Box::new(Says("a", Ok(&["x", "y"]))), Box::new(Says("b", Ok(&["z"])))]);
    let text = |set: SelectorSet| set.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(text(both.attest(&peer).await.unwrap()), ["a:x", "a:y", "b:z"]);
    let one = attestors(vec![Box::new(Says("a", Err(()))), Box::new(Says("b", Ok(&["z"]))), Box::new(Silent)]);
    assert_eq!(text(one.attest(&peer).await.unwrap()), ["b:z"]);
    let late = attestors(vec![Box::new(Late(Says("a", Ok(&["x"])))), Box::new(Says("b", Ok(&["z"])))]);
    assert_eq!(text(late.attest(&peer).await.unwrap()), ["a:x", "b:z"]);
    for none in [
        vec![],
        vec![Box::new(Says("a", Err(()))) as Box<dyn WorkloadAttestor>],
        vec![Box::new(Silent), Box::new(Says("a", Err(())))],
    ] {
        assert!(matches!(attestors(none).attest(&peer).await, Err(Refusal::NoAnswer(_))));
    }
    assert!(attestors(vec![Box::new(Says("a", Ok(&[])))]).attest(&peer).await.unwrap().is_empty());
}

/// A process that connects to us, as `uid` if it may, and then does `then` when it is told to go on.
async fn caller(then: &str, uid: Option<u32>) -> (Child, Arc<UnixPeer>, tempfile::TempDir, tokio::net::UnixStream) {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let path = folder.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o777)).unwrap();
    let become_uid =
        uid.map_or_else(String::new, |uid| format!("os.setgroups([]); os.setgid({uid}); os.setuid({uid})"));
    let script = format!(
        "import os, socket, sys, time\n{become_uid}\ns = socket.socket(socket.AF_UNIX)\ns.connect({path:?})\n\
         print('ready', flush=True)\nsys.stdin.readline()\n{then}\n"
    );
    let mut child =
        Command::new("python3").args(["-c", &script]).stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let (stream, _) = listener.accept().await.unwrap();
    let peer = Arc::new(UnixPeer::pin(&stream).unwrap());
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    (child, peer, folder, stream)
}

async fn until_refused(attestors: &Attestors, peer: &Arc<UnixPeer>) -> Refusal {
    let refused = async {
        loop {
            match attestors.attest(peer).await {
                Ok(_) => tokio::task::yield_now().await,
                Err(refusal) => return refusal,
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), refused).await.unwrap()
}

#[tokio::test]
async fn h_70_a_child_that_keeps_the_socket_while_its_parent_becomes_a_setuid_program_gets_nothing() {
    let root = nix::unistd::geteuid().is_root();
    let program = tempfile::tempdir().unwrap();
    std::fs::set_permissions(program.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let sleep = program.path().join("sleep");
    std::fs::copy("/bin/sleep", &sleep).unwrap();
    std::fs::set_permissions(&sleep, std::fs::Permissions::from_mode(0o4755)).unwrap();
    let then = format!("if os.fork() == 0:\n    time.sleep(10)\n    os._exit(0)\nos.execv({sleep:?}, ['sleep', '60'])");
    let (mut child, peer, _folder, _stream) = caller(&then, root.then_some(65534)).await;
    let attestors = attestors(vec![Box::new(unix::Unix::new(unix::Settings::default()))]);
    let before = attestors.attest(&peer).await.unwrap();
    assert!(before.contains(&Selector::new("unix", &format!("uid:{}", peer.uid)).unwrap()));
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let refusal = until_refused(&attestors, &peer).await;
    assert!(matches!(refusal, Refusal::NotTheSame(PeerError::OtherOwner | PeerError::OtherProgram)), "{refusal:?}");
    assert!(matches!(attestors.attest(&peer).await, Err(Refusal::NotTheSame(_))));
    child.kill().unwrap();
    child.wait().unwrap();
}

#[tokio::test]
async fn h_70_a_process_that_ended_gets_nothing() {
    let (mut child, peer, _folder, _stream) = caller("pass", None).await;
    let attestors = attestors(vec![Box::new(unix::Unix::new(unix::Settings::default()))]);
    attestors.attest(&peer).await.unwrap();
    child.stdin.take().unwrap().write_all(b"go\n").unwrap();
    let refusal = until_refused(&attestors, &peer).await;
    assert!(matches!(refusal, Refusal::NotTheSame(_)), "{refusal:?}");
    child.wait().unwrap();
}
