//! Who a process is, as the kernel and others on this node say it: from a caller to its selectors.

mod names;
pub mod unix;

use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, join_all};
use runtime::pool::PoolError;
use runtime::telemetry::Limiter;
use spiffe::selector::{Selector, SelectorSet};
use transport::peer::{Credentials, PeerError, UnixPeer};

/// How long one call waits for a look at its process, and for all attestors together.
const DEADLINE: Duration = Duration::from_secs(10);

const FAILED: &str = "A workload attestor failed";

/// A process that calls, with what `/proc` said of its user and groups before any attestor was asked.
#[derive(Debug, Clone)]
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
    /// The name service failed, which is no proof that there is no name.
    #[error("the name service failed to name the caller's user or groups")]
    Names(#[source] std::io::Error),
    /// There was no thread for it.
    #[error("could not look at the caller")]
    Busy(#[source] PoolError),
}

/// What a method says of a process.
pub type Selectors = Result<Vec<Selector>, AttestError>;

/// How far a method has come.
pub enum Begun {
    /// This is all.
    Says(Selectors),
    /// The rest has to be waited for.
    Later(BoxFuture<'static, Selectors>),
}

/// One method of attesting processes.
pub trait WorkloadAttestor: Send + Sync {
    /// The type of its selectors.
    fn name(&self) -> &'static str;

    /// The selectors of a process, none if this method has nothing to say of it; an error if what the method relies on
    /// cannot be read. It is asked on a thread of the caller's party, so it may read what belongs to the caller, and
    /// waits there for nobody else: that is left for [`Begun::Later`], which touches nothing of the caller's.
    fn begin(&self, caller: &Caller) -> Begun;
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
    /// The process could not be looked at, which says nothing of it.
    #[error("the caller could not be looked at in time")]
    Unseen(#[source] Option<PoolError>),
}

/// Something that is done on a thread of the caller's party.
///
/// # Errors
/// What the job finds, or if there is no thread for it in time.
pub async fn visit<T: Send + 'static>(
    peer: &Arc<UnixPeer>,
    job: impl FnOnce(&Arc<UnixPeer>) -> Result<T, PeerError> + Send + 'static,
) -> Result<T, Refusal> {
    match tokio::time::timeout(DEADLINE, peer.work(job)).await {
        Ok(Ok(done)) => done.map_err(Refusal::NotTheSame),
        Ok(Err(error)) => Err(Refusal::Unseen(Some(error))),
        Err(_) => Err(Refusal::Unseen(None)),
    }
}

/// Whether a process is the one that connected, still.
///
/// # Errors
/// If it is another one by now, or cannot be looked at.
pub async fn look_again(peer: &Arc<UnixPeer>) -> Result<(), Refusal> {
    visit(peer, |peer| peer.still_same()).await
}

/// All methods that are configured, asked side by side.
pub struct Attestors {
    attestors: Arc<[Box<dyn WorkloadAttestor>]>,
    log: Limiter,
}

/// What came of a first visit.
enum First {
    Done(SelectorSet),
    Open(Vec<Begun>),
}

impl Attestors {
    /// These methods; `log` limits what callers whom they fail cause in the log.
    pub fn new(attestors: Vec<Box<dyn WorkloadAttestor>>, log: Limiter) -> Self {
        Self { attestors: attestors.into(), log }
    }

    /// What all methods say of a process, as of one moment: it is asked before and afterwards whether it is still the
    /// process that connected. A method that fails or is late counts as silent as long as another one answers.
    ///
    /// # Errors
    /// If the process is another one by now or cannot be looked at, or if every method failed.
    pub async fn attest(&self, peer: &Arc<UnixPeer>) -> Result<SelectorSet, Refusal> {
        let attestors = Arc::clone(&self.attestors);
        let first = visit(peer, move |peer| {
            let caller = Caller { peer: Arc::clone(peer), credentials: peer.credentials()? };
            let mut begun: Vec<Begun> = attestors.iter().map(|attestor| attestor.begin(&caller)).collect();
            // Mostly everything is at hand, and one visit is enough.
            if begun.iter().all(|begun| matches!(begun, Begun::Says(Ok(_)))) && !begun.is_empty() {
                peer.still_same()?;
                let said =
                    begun.drain(..).filter_map(|begun| if let Begun::Says(said) = begun { said.ok() } else { None });
                return Ok(First::Done(said.flatten().collect()));
            }
            Ok(First::Open(begun))
        });
        let begun = match first.await? {
            First::Done(selectors) => return Ok(selectors),
            First::Open(begun) => begun,
        };
        let asked = self.attestors.iter().zip(begun).map(|(attestor, begun)| self.finish(attestor.name(), peer, begun));
        let selectors = together(join_all(asked).await)?;
        visit(peer, move |peer| {
            peer.still_same()?;
            Ok(selectors.into_iter().collect())
        })
        .await
    }

    async fn finish(&self, attestor: &'static str, peer: &UnixPeer, begun: Begun) -> Result<Vec<Selector>, Refusal> {
        let answer = match begun {
            Begun::Says(selectors) => Ok(selectors),
            Begun::Later(selectors) => tokio::time::timeout(DEADLINE, selectors).await,
        };
        let error: Box<dyn Error + Send + Sync> = match answer {
            Ok(Ok(selectors)) => return Ok(selectors),
            Ok(Err(error)) => error.into(),
            Err(late) => late.into(),
        };
        if self.log.allow(FAILED, peer.party.name()) {
            let told = runtime::telemetry::chain(&*error);
            tracing::warn!(attestor, pid = peer.pid, party = %peer.party, error = told, "{FAILED}");
        }
        Err(Refusal::NoAnswer(Some(error)))
    }
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
