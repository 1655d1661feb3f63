//! Programs outside of this workspace that use the Workload API, such as those in `tests/clients`: started with the socket's
//! address, and read as a sequence of JSON values.

use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::wait;

/// The folder in which `cargo xtask test` installs the stock clients.
///
/// # Errors
/// If nothing has been installed.
pub fn tools() -> Result<PathBuf> {
    let this = std::env::current_exe()?;
    let found = this.ancestors().map(|folder| folder.join("tools")).find(|folder| folder.is_dir());
    found.context("the stock clients are not built: `cargo xtask test` builds them")
}

/// A running program with what it has printed so far; killed when dropped.
pub struct Client {
    child: Child,
    input: Option<ChildStdin>,
    printed: Arc<Mutex<Vec<Value>>>,
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Client {
    /// Starts a program with `SPIFFE_ENDPOINT_SOCKET` set to `socket`.
    ///
    /// # Errors
    /// If it cannot be started.
    pub fn start(mut command: Command, socket: &Path) -> Result<Self> {
        command.env("SPIFFE_ENDPOINT_SOCKET", format!("unix://{}", socket.display()));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().with_context(|| format!("starting {:?}", command.get_program()))?;
        let output = child.stdout.take().context("no standard output")?;
        let printed = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&printed);
        std::thread::spawn(move || {
            for value in serde_json::Deserializer::from_reader(BufReader::new(output)).into_iter::<Value>() {
                // What is not JSON ends the reading; the test then waits in vain and says for what.
                let Ok(value) = value else { return };
                seen.lock().unwrap_or_else(PoisonError::into_inner).push(value);
            }
        });
        let input = child.stdin.take();
        Ok(Self { child, input, printed })
    }

    /// Everything printed so far.
    #[must_use]
    pub fn printed(&self) -> Vec<Value> {
        self.printed.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Waits for a printed value, the first `skip` of all left aside, that `wanted` accepts.
    ///
    /// # Errors
    /// If none comes in time; the text holds what was printed instead.
    pub async fn next(&mut self, what: &str, skip: usize, wanted: impl Fn(&Value) -> bool) -> Result<Value> {
        let deadline = Duration::from_secs(40);
        let found =
            wait::until(what, deadline, async || self.printed().into_iter().skip(skip).find(|value| wanted(value)));
        found.await.with_context(|| format!("printed: {:#?}", self.printed()))
    }

    /// Closes the program's standard input and waits for its end with success.
    ///
    /// # Errors
    /// If it fails or does not end within 30 s; the text holds what it printed.
    pub async fn finish(mut self) -> Result<Vec<Value>> {
        drop(self.input.take());
        let status =
            wait::until("the client's end", Duration::from_secs(30), async || self.child.try_wait().ok().flatten())
                .await?;
        // The reader has everything once the pipe is closed; a watch also reports errors that it got over.
        let end = wait::until("the client's last line", Duration::from_secs(10), async || {
            self.printed().pop().filter(|last| last["event"] == "end" || last["event"] == "error")
        });
        let end = end.await.with_context(|| format!("{status}, printed: {:#?}", self.printed()))?;
        ensure!(status.success() && end["event"] == "end", "the client ended with {status}: {:#?}", self.printed());
        Ok(self.printed())
    }

    /// Waits for the program's end, whatever its outcome.
    ///
    /// # Errors
    /// If it does not end within 30 s.
    pub async fn ended(&mut self) -> Result<std::process::ExitStatus> {
        wait::until("the client's end", Duration::from_secs(30), async || self.child.try_wait().ok().flatten()).await
    }
}
