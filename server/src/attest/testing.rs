//! A history in memory and challengers for tests.
#![allow(clippy::disallowed_methods, reason = "a test ends with the tasks it spawned")]

use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Trigger};
use spiffe::id::TrustDomain;

use super::{ChallengeError, Challenger};
use crate::history::memory::Memory;
use crate::history::replica::Replica;
use crate::history::{Committer, Reach, Store, Urgency};
use crate::state::model::Part;

/// An opened history of `example.org` whose writer runs; ends when dropped.
pub(crate) struct History {
    clock: Clock,
    committer: Committer,
    replica: Replica,
    _trigger: Trigger,
}

impl History {
    /// An empty one.
    pub(crate) async fn open() -> Self {
        Self::over(Arc::new(Memory::new(crate::history::HistoryId([7; 16])))).await
    }

    /// What `store` holds, as after a restart.
    pub(crate) async fn over(store: Arc<dyn Store>) -> Self {
        let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000));
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let opened = crate::history::open(store, Reach::OneProcess, trust_domain, clock.clone(), Entropy::system());
        let opened = opened.await.unwrap();
        let (trigger, shutdown) = Shutdown::new();
        tokio::spawn(opened.writer.run(shutdown));
        Self { clock, committer: opened.committer, replica: opened.replica, _trigger: trigger }
    }

    pub(crate) fn now(&self) -> SystemTime {
        self.clock.now()
    }

    pub(crate) fn clock(&self) -> Clock {
        self.clock.clone()
    }

    pub(crate) fn replica(&self) -> Replica {
        self.replica.clone()
    }

    pub(crate) fn committer(&self) -> Committer {
        self.committer.clone()
    }

    /// Commits a part that nothing decides about.
    pub(crate) async fn commit(&self, part: Part) {
        let decide = move |_: &crate::state::State, _| Ok::<_, std::convert::Infallible>((part.clone(), ()));
        let _ = self.committer.propose(Urgency::Normal, decide).await.unwrap();
    }
}

/// A node that answers no challenge.
pub(crate) struct Silent;

#[async_trait]
impl Challenger for Silent {
    async fn challenge(&mut self, _: Bytes) -> Result<Bytes, ChallengeError> {
        Err(ChallengeError::Closed)
    }

    fn address(&self) -> Option<IpAddr> {
        None
    }
}
