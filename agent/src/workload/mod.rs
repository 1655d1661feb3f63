//! Who a process is, as the kernel and others on this node say it: from a caller to its selectors.

mod names;
pub mod unix;

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use futures_util::future::join_all;
use spiffe::selector::{Selector, SelectorSet};
use transport::peer::{Credentials, PeerError, UnixPeer};

/// How long all attestors together may take for one call.
const DEADLINE: Duration = Duration::from_secs(10);

/// A process that calls, with what `/proc` said of its user and groups before any attestor was asked.
#[derive(Debug)]
pub struct Caller {
    /// The process, held fast.
    pub peer: Arc<UnixPeer>,
    /// Its user and groups; user and group are those with which it connected.
    pub credentials: Credentials,
}

/// Why an attestor could not say anything about a process.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AttestError {
    /// Something that belongs to the process could not be read.
    #[error("could not read the caller's {what}")]
    Read {
        /// What was read.
        what: &'static str,
        /// What the operating system said.
        #[source]
        source: std::io::Error,
    },
    /// The program of the process is larger than what may be hashed.
    #[error("the caller's program has {size} bytes; the limit is {limit}")]
    TooLarge {
        /// Bytes of the program.
        size: u64,
        /// The configured limit.
        limit: u64,
    },
    /// The program changed while it was hashed.
    #[error("the caller's program changed while it was read")]
    Changing,
}

/// One method of attesting processes.
#[async_trait]
pub trait WorkloadAttestor: Send + Sync {
    /// The type of its selectors.
    fn name(&self) -> &'static str;

    /// The selectors of a process; none if this method has nothing to say of it.
    ///
    /// # Errors
    /// If what the method relies on cannot be read.
    async fn attest(&self, caller: &Caller) -> Result<Vec<Selector>, AttestError>;
}

/// Why a call gets no selectors.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// The process is not the one that connected any more.
    #[error("the caller is not the process that connected")]
    NotTheSame(#[source] PeerError),
    /// No attestor answered.
    #[error("no workload attestor could attest the caller")]
    NoAnswer(#[source] Option<Box<dyn Error + Send + Sync>>),
}

/// All methods that are configured, asked side by side.
pub struct Attestors {
    attestors: Vec<Box<dyn WorkloadAttestor>>,
}

impl Attestors {
    /// These methods.
    pub fn new(attestors: Vec<Box<dyn WorkloadAttestor>>) -> Self {
        Self { attestors }
    }

    /// What all methods say of a process, as of one moment: it is asked before and afterwards whether it is still the
    /// process that connected. A method that fails or is late counts as silent as long as another one answers.
    ///
    /// # Errors
    /// If the process is another one by now, or if every method failed.
    pub async fn attest(&self, peer: &Arc<UnixPeer>) -> Result<SelectorSet, Refusal> {
        let credentials = peer.credentials().map_err(Refusal::NotTheSame)?;
        let caller = Caller { peer: Arc::clone(peer), credentials };
        let selectors = match self.attestors.as_slice() {
            // The most common case needs no bookkeeping.
            [only] => ask(only.as_ref(), &caller).await?,
            all => {
                let answers = join_all(all.iter().map(|attestor| ask(attestor.as_ref(), &caller))).await;
                together(answers)?
            }
        };
        peer.still_same().map_err(Refusal::NotTheSame)?;
        Ok(selectors.into_iter().collect())
    }
}

async fn ask(attestor: &dyn WorkloadAttestor, caller: &Caller) -> Result<Vec<Selector>, Refusal> {
    let answer = tokio::time::timeout(DEADLINE, attestor.attest(caller)).await;
    let error: Box<dyn Error + Send + Sync> = match answer {
        Ok(Ok(selectors)) => return Ok(selectors),
        Ok(Err(error)) => error.into(),
        Err(late) => late.into(),
    };
    tracing::warn!(
        attestor = attestor.name(),
        pid = caller.peer.pid,
        error = runtime::telemetry::chain(&*error),
        "A workload attestor failed"
    );
    Err(Refusal::NoAnswer(Some(error)))
}

fn together(answers: Vec<Result<Vec<Selector>, Refusal>>) -> Result<Vec<Selector>, Refusal> {
    let mut all = Vec::new();
    let mut answered = false;
    let mut failure = Refusal::NoAnswer(None);
    for answer in answers {
        match answer {
            Ok(selectors) => {
                answered = true;
                all.extend(selectors);
            }
            Err(error) => failure = error,
        }
    }
    if answered { Ok(all) } else { Err(failure) }
}

#[cfg(test)]
mod tests;
