//! A process that does with its connection to the Workload API what no honest workload does. For the tests of hostile
//! inputs; the last line it prints is `code=NUMBER` of the answer or `id=SPIFFE_ID`.

mod silent;

use std::io::{BufRead as _, IoSlice, IoSliceMut, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use e2e::testkit::{secured, wait, wire};
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::Signal;
use nix::unistd::{Gid, Uid, setgid, setgroups, setuid};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use spiffe_proto::workload::X509svidRequest;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;

const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Parser)]
enum Deed {
    /// Asks for an SVID as an honest process would.
    Ask { socket: PathBuf },
    /// Connects, leaves the connection to a child, and becomes another program.
    Become { socket: PathBuf, program: PathBuf },
    /// Connects, leaves the connection to a child, and exits.
    Leave { socket: PathBuf },
    /// Connects, hands the connection to whoever listens on `receiver`, and exits if told so.
    Pass {
        socket: PathBuf,
        receiver: PathBuf,
        #[arg(long)]
        exit: bool,
    },
    /// Takes a connection from whoever passes one to `receiver`, and asks over it.
    Take {
        receiver: PathBuf,
        /// Only once the process that connected is gone.
        #[arg(long)]
        later: bool,
    },
    /// Asks over standard input once its parent runs `program`, or is gone.
    Inherit {
        #[arg(long)]
        parent: i32,
        #[arg(long)]
        program: Option<PathBuf>,
    },
    /// Asks as `user` with so many supplementary groups, numbered from 10,000.
    Grouped { socket: PathBuf, groups: u32, user: u32 },
    /// Holds so many connections without a call; prints `held`.
    Hold { socket: PathBuf, connections: u32 },
    /// Connects and exits, so many times, each time as a new process.
    Vanish { socket: PathBuf, times: u32 },
    /// Has `user` ask by a program on a file system that it mounts on `folder` and that then stops answering; prints
    /// `silent` before the program asks.
    Silent { socket: PathBuf, folder: PathBuf, user: u32 },
    /// Asks once a line came on standard input, with all of its program in memory.
    Loaded { socket: PathBuf },
    /// Does nothing until it is killed.
    Wait,
}

fn main() -> Result<()> {
    match Deed::parse() {
        Deed::Ask { socket } => ask(UnixStream::connect(socket)?, async || Ok(())),
        Deed::Become { socket, program } => {
            leave_to_child(&socket, Some(&program))?;
            Err(Command::new(program).arg("wait").exec().into())
        }
        Deed::Leave { socket } => leave_to_child(&socket, None),
        Deed::Pass { socket, receiver, exit } => {
            pass(&UnixStream::connect(socket)?, &UnixStream::connect(receiver)?)?;
            if exit { Ok(()) } else { rest() }
        }
        Deed::Take { receiver, later } => {
            let (carrier, _) = UnixListener::bind(receiver)?.accept()?;
            let connection = take(&carrier)?;
            ask(connection, async || {
                if later {
                    ended(&carrier).await?;
                }
                Ok(())
            })
        }
        Deed::Inherit { parent, program } => {
            let connection = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
            ask(connection, async || {
                wait::until("the parent's change", PATIENCE, async || {
                    let runs = std::fs::read_link(format!("/proc/{parent}/exe"));
                    let changed = match (&program, runs) {
                        (Some(program), Ok(runs)) => runs == *program,
                        // A program of another user hides its name.
                        (Some(_), Err(_)) => Path::new(&format!("/proc/{parent}")).exists(),
                        (None, _) => nix::unistd::getppid().as_raw() != parent,
                    };
                    changed.then_some(())
                })
                .await
            })
        }
        Deed::Grouped { socket, groups, user } => {
            let groups: Vec<Gid> = (10_000..10_000 + groups).map(Gid::from_raw).collect();
            setgroups(&groups)?;
            setgid(Gid::from_raw(user))?;
            setuid(Uid::from_raw(user))?;
            ask(UnixStream::connect(socket)?, async || Ok(()))
        }
        Deed::Hold { socket, connections } => {
            let connected: std::io::Result<Vec<_>> = (0..connections).map(|_| UnixStream::connect(&socket)).collect();
            let _held = connected?;
            println!("held");
            rest()
        }
        Deed::Vanish { socket, times } => {
            for left in (0..times).rev() {
                drop(UnixStream::connect(&socket)?);
                // The process that connected becomes a zombie, and its number is free once it is waited for.
                if left > 0 {
                    let one = Command::new(std::env::current_exe()?).arg("vanish").arg(&socket).arg("1").status()?;
                    anyhow::ensure!(one.success(), "a process could not connect");
                }
            }
            Ok(())
        }
        Deed::Silent { socket, folder, user } => {
            let silence = silent::serve(&folder, std::fs::read(std::env::current_exe()?)?)?;
            let mut child = Command::new(folder.join(silent::PROGRAM));
            child.arg("loaded").arg(socket).uid(user).gid(user).current_dir("/");
            let mut child = child.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
            let mut said = std::io::BufReader::new(child.stdout.take().context("no output")?).lines();
            said.next().context("the program said nothing")??;
            silence.begin();
            println!("silent");
            child.stdin.take().context("no input")?.write_all(b"go\n")?;
            println!("{}", said.next().context("the program did not answer")??);
            rest()
        }
        Deed::Loaded { socket } => {
            // Nothing of this program outlives the one that holds the file system.
            set_pdeathsig(Signal::SIGKILL)?;
            // What is in memory needs no file system.
            drop(std::fs::read("/proc/self/exe")?);
            println!("loaded");
            std::io::stdin().lines().next().context("nobody said go")??;
            ask(UnixStream::connect(socket)?, async || Ok(()))
        }
        Deed::Wait => rest(),
    }
}

fn rest() -> ! {
    loop {
        std::thread::park();
    }
}

/// Starts a child that holds the connection as its standard input.
fn leave_to_child(socket: &Path, program: Option<&Path>) -> Result<()> {
    let connection = OwnedFd::from(UnixStream::connect(socket)?);
    let mut child = Command::new(std::env::current_exe()?);
    child.arg("inherit").arg("--parent").arg(std::process::id().to_string());
    if let Some(program) = program {
        child.arg("--program").arg(program);
    }
    child.stdin(connection).spawn()?;
    Ok(())
}

fn pass(connection: &UnixStream, carrier: &UnixStream) -> Result<()> {
    let descriptors = [connection.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = SendAncillaryBuffer::new(&mut space);
    anyhow::ensure!(message.push(SendAncillaryMessage::ScmRights(&descriptors)), "no room for a descriptor");
    sendmsg(carrier, &[IoSlice::new(b"x")], &mut message, SendFlags::empty())?;
    Ok(())
}

fn take(carrier: &UnixStream) -> Result<UnixStream> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut message = RecvAncillaryBuffer::new(&mut space);
    recvmsg(carrier, &mut [IoSliceMut::new(&mut [0])], &mut message, RecvFlags::empty())?;
    let descriptor = message.drain().find_map(|part| match part {
        RecvAncillaryMessage::ScmRights(mut descriptors) => descriptors.next(),
        _ => None,
    });
    Ok(descriptor.context("no descriptor came")?.into())
}

/// Waits until the other end of `carrier` is closed, as its process's end does.
async fn ended(carrier: &UnixStream) -> Result<()> {
    let carrier = carrier.try_clone()?;
    carrier.set_nonblocking(true)?;
    let mut carrier = tokio::net::UnixStream::from_std(carrier)?;
    tokio::io::AsyncReadExt::read(&mut carrier, &mut [0]).await?;
    Ok(())
}

fn ask(connection: UnixStream, first: impl AsyncFnOnce() -> Result<()>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        first().await?;
        println!("{}", answer(connection).await);
        Ok(())
    })
}

async fn answer(connection: UnixStream) -> String {
    let asked = async {
        connection.set_nonblocking(true).map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let connection = tokio::net::UnixStream::from_std(connection)?;
        let over = wire::over(connection).await.map_err(|error| tonic::Status::unavailable(format!("{error:#}")))?;
        let answers = SpiffeWorkloadApiClient::new(over).fetch_x509svid(secured(X509svidRequest {})).await?;
        let message = answers.into_inner().message().await?.ok_or_else(|| tonic::Status::ok("ended"))?;
        let ids: Vec<String> = message.svids.into_iter().map(|svid| svid.spiffe_id).collect();
        Ok::<_, tonic::Status>(ids.join(","))
    };
    match tokio::time::timeout(PATIENCE, asked).await {
        Ok(Ok(ids)) => format!("id={ids}"),
        Ok(Err(status)) => format!("code={} {}", i32::from(status.code()), status.message()),
        Err(_) => "code=4 no answer in time".to_owned(),
    }
}
