//! A file system with one program on it, whose server stops answering at a word: what a FUSE or NFS mount is whose
//! server hangs. Its requests are never read then, and end with the process that holds it.

use std::fs::File;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};

/// The name of the program below the mount.
pub const PROGRAM: &str = "program";

const ROOT: u64 = 1;
const FILE: u64 = 2;
/// The largest request, `FUSE_MIN_READ_BUFFER` and some.
const LARGEST: usize = 1 << 18;

/// Stops answering when it is told to.
#[derive(Clone, Default)]
pub struct Silence(Arc<AtomicBool>);

impl Silence {
    /// No request is read from now on.
    pub fn begin(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Mounts a file system with `program` on `folder`, in a mount namespace of this process's own, and serves it.
///
/// # Errors
/// If the caller may not mount, or the kernel has no FUSE.
pub fn serve(folder: &Path, program: Vec<u8>) -> Result<Silence> {
    unshare(CloneFlags::CLONE_NEWNS).context("a mount namespace")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)?;
    let device = File::options().read(true).write(true).open("/dev/fuse").context("/dev/fuse")?;
    let options = format!("fd={},rootmode=40000,user_id=0,group_id=0,allow_other", device.as_raw_fd());
    mount(Some("silent"), folder, Some("fuse"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(options.as_str()))
        .context("mounting a FUSE file system")?;
    let silence = Silence::default();
    let silent = silence.clone();
    std::thread::spawn(move || {
        if let Err(error) = answer(device, &program, &silent) {
            eprintln!("the file system ended: {error:#}");
        }
    });
    Ok(silence)
}

fn answer(mut device: File, program: &[u8], silent: &Silence) -> Result<()> {
    let mut request = vec![0; LARGEST];
    loop {
        let mut ready = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        let polled = poll(&mut ready, PollTimeout::from(20_u8));
        if silent.0.load(Ordering::SeqCst) {
            // The device stays open, so that whoever asks waits.
            loop {
                std::thread::park();
            }
        }
        match polled {
            Ok(0) | Err(Errno::EINTR) => continue,
            other => other?,
        };
        let length = device.read(&mut request)?;
        let request = request.get(..length).context("a request of no length")?;
        if let Some(reply) = reply(request, program)? {
            device.write_all(&reply)?;
        }
    }
}

fn number<const N: usize>(request: &[u8], at: usize) -> Result<[u8; N]> {
    request.get(at..at + N).and_then(|bytes| bytes.first_chunk().copied()).context("a short request")
}

/// The answer to one request (`linux/fuse.h`), if it wants one.
fn reply(request: &[u8], program: &[u8]) -> Result<Option<Vec<u8>>> {
    let operation = u32::from_ne_bytes(number(request, 4)?);
    let node = u64::from_ne_bytes(number(request, 16)?);
    let body = request.get(40..).unwrap_or_default();
    let answer = match operation {
        // FORGET, INTERRUPT, BATCH_FORGET
        2 | 36 | 42 => return Ok(None),
        // LOOKUP
        1 if node == ROOT && body.strip_suffix(b"\0") == Some(PROGRAM.as_bytes()) => {
            let mut entry = Vec::new();
            // Node, generation, how long the name is good for, and that attributes are good for no time at all.
            [FILE, 0, 3600, 0].iter().for_each(|value| entry.extend(value.to_ne_bytes()));
            entry.extend([0; 8]);
            entry.extend(attributes(FILE, program.len()));
            Ok(entry)
        }
        1 => Err(Errno::ENOENT),
        // GETATTR
        3 => Ok([&[0; 16][..], &attributes(node, program.len())].concat()),
        // OPEN and OPENDIR, with FOPEN_KEEP_CACHE
        14 | 27 => Ok([&[0; 8][..], &2_u32.to_ne_bytes(), &[0; 4]].concat()),
        // READ
        15 => {
            let start = usize::try_from(u64::from_ne_bytes(number(body, 8)?))?.min(program.len());
            let size = usize::try_from(u32::from_ne_bytes(number(body, 16)?))?;
            let end = (start + size).min(program.len());
            Ok(program.get(start..end).unwrap_or_default().to_vec())
        }
        // RELEASE, FLUSH, RELEASEDIR, ACCESS
        18 | 25 | 29 | 34 => Ok(Vec::new()),
        // INIT
        26 => {
            let mut init = Vec::new();
            [7_u32, 31, 1 << 17, 0].iter().for_each(|value| init.extend(value.to_ne_bytes()));
            [12_u16, 9].iter().for_each(|value| init.extend(value.to_ne_bytes()));
            [1_u32 << 17, 1].iter().for_each(|value| init.extend(value.to_ne_bytes()));
            init.resize(64, 0);
            Ok(init)
        }
        _ => Err(Errno::ENOSYS),
    };
    let (error, payload) = match answer {
        Ok(payload) => (0, payload),
        Err(errno) => (-(errno as i32), Vec::new()),
    };
    let mut reply = u32::try_from(16 + payload.len())?.to_ne_bytes().to_vec();
    reply.extend(i32::to_ne_bytes(error));
    reply.extend(number::<8>(request, 8)?);
    reply.extend(payload);
    Ok(Some(reply))
}

/// `struct fuse_attr`.
fn attributes(node: u64, size: usize) -> Vec<u8> {
    let size = if node == FILE { size as u64 } else { 0 };
    let mode: u32 = if node == FILE { 0o100_755 } else { 0o040_755 };
    let mut all = Vec::new();
    [node, size, size.div_ceil(512), 0, 0, 0].iter().for_each(|value| all.extend(value.to_ne_bytes()));
    [0, 0, 0, mode, 1, 0, 0, 0, 4096, 0_u32].iter().for_each(|value| all.extend(value.to_ne_bytes()));
    all
}
