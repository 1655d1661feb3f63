//! The agent's core against a server in memory, in virtual time.

#![allow(clippy::disallowed_methods, reason = "tests end their tasks with their runtime")]

mod authority;
mod clocks;
mod dial;
mod journeys;
mod lasting;
mod server;
mod surroundings;
mod tokens;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use bytes::Bytes;
use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::shutdown::{Shutdown, Trigger};
use runtime::telemetry::Limiter;
use spiffe::id::TrustDomain;
use spiffe::selector::{Selector, SelectorSet};
use spiffe::x509::KeyType;
use tokio::task::JoinHandle;

pub(crate) use self::authority::Authority;
use self::dial::FakeDial;
use self::server::Fake;
use crate::attest::{NodeProver, ProveError};
use crate::cache::{Cache, Limits, Subscription, View};
use crate::identity::{DataFile, Identity, IdentityError, Parts, UnknownAuthority};
use crate::keys::DiskKeys;
use crate::server_link::ServerLink;
use crate::sync::Sync;

/// A process with these selectors.
fn selectors(all: &[&str]) -> SelectorSet {
    all.iter().map(|text| Selector::parse(text).unwrap()).collect()
}

struct Prover {
    repeats: bool,
}

#[async_trait]
impl NodeProver for Prover {
    fn name(&self) -> &'static str {
        "test"
    }

    fn repeats(&self) -> bool {
        self.repeats
    }

    async fn payload(&self) -> Result<Bytes, ProveError> {
        Ok(Bytes::from_static(b"hello"))
    }

    async fn answer(&self, challenge: Bytes) -> Result<Bytes, ProveError> {
        assert_eq!(challenge, "who?");
        Ok(Bytes::from_static(b"me"))
    }
}

/// A server and the directory of one agent.
struct World {
    /// The agent's clock. The server has its own, which stays right when this one is stepped.
    clock: Clock,
    fake: Arc<Fake>,
    dir: tempfile::TempDir,
    limits: Limits,
    unknown_authority: UnknownAuthority,
}

impl World {
    fn new() -> Self {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let clock = Clock::paused(start);
        let fake = Fake::new(&trust_domain, Clock::paused(start));
        Self {
            clock,
            fake,
            dir: tempfile::tempdir().unwrap(),
            limits: Limits::default(),
            unknown_authority: UnknownAuthority::Stop,
        }
    }

    /// Starts an agent on what the directory holds.
    async fn start(&self) -> Running {
        self.try_start().await.unwrap()
    }

    async fn try_start(&self) -> Result<Running, IdentityError> {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let path: &Path = self.dir.path();
        let bundle = self.fake.state().authority.bundle(1, false);
        let identity = Identity::open(Parts {
            trust_domain: trust_domain.clone(),
            file: DataFile::open(path).unwrap(),
            keys: Arc::new(DiskKeys::open_unlocked(path).unwrap()),
            prover: Arc::new(Prover { repeats: self.fake.state().reattestable }),
            bootstrap: Box::new(move || Ok(Some(bundle))),
            unknown_authority: self.unknown_authority,
            clock: self.clock.clone(),
            entropy: Entropy::seeded(7),
        })?;
        let dial = FakeDial { fake: Arc::clone(&self.fake), identity: identity.clone() };
        let link = ServerLink::new(Arc::new(dial), identity.witness());
        let issuer = Arc::new(link.clone());
        let log = Limiter::new(self.clock.clone());
        let cache = Cache::new(trust_domain.clone(), self.limits, issuer, self.clock.clone(), Entropy::seeded(8), log);
        let (trigger, shutdown) = Shutdown::new();
        identity.establish(&link, &shutdown).await?;
        let sync = Sync {
            link: link.clone(),
            identity: identity.clone(),
            cache: cache.clone(),
            trust_domain,
            interval: Duration::from_secs(5),
            version: "test",
            clock: self.clock.clone(),
            entropy: Entropy::seeded(9),
        };
        let until = shutdown.clone();
        let sync = tokio::spawn(async move { sync.run(until).await });
        let (signing, until) = (cache.clone(), shutdown.clone());
        let signer = tokio::spawn(async move { signing.sign_until(until, KeyType::EcP256).await });
        let (kept, over) = (identity.clone(), link.clone());
        let keeper = tokio::spawn(async move { kept.keep(&over, &shutdown).await });
        Ok(Running { clock: self.clock.clone(), identity, link, cache, trigger, sync, signer, keeper })
    }
}

/// A running agent.
struct Running {
    clock: Clock,
    identity: Identity,
    link: ServerLink,
    cache: Cache,
    trigger: Trigger,
    sync: JoinHandle<()>,
    signer: JoinHandle<()>,
    keeper: JoinHandle<Result<(), IdentityError>>,
}

impl Running {
    /// What `kill -9` does: nothing more happens.
    fn kill(self) {
        self.sync.abort();
        self.signer.abort();
        self.keeper.abort();
    }

    async fn stop(self) {
        self.trigger.request();
        self.sync.await.unwrap();
        self.signer.await.unwrap();
        self.keeper.await.unwrap().unwrap();
    }

    fn subscribe(&self, all: &[&str]) -> Subscription {
        self.cache.subscribe(selectors(all))
    }

    /// The next view in which everybody has what they should.
    async fn complete(&self, subscription: &mut Subscription) -> Arc<View> {
        loop {
            let view = subscription.changed().await.unwrap();
            if view.complete {
                return view;
            }
        }
    }

    /// What a process that comes now gets at once: no time may pass.
    fn at_once(&self, all: &[&str]) -> Arc<View> {
        self.subscribe(all).current()
    }

    fn agent_serial(&self) -> String {
        self.identity.svid().unwrap().svid.serial.to_string()
    }

    /// Waits for something, looking often; two minutes are more than anything here may take.
    async fn until(&self, what: impl Fn(&Self) -> bool) {
        let look = async {
            while !what(self) {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(120), look).await.expect("it never came");
    }
}

fn ids(view: &View) -> Vec<String> {
    view.svids.iter().map(|svid| svid.entry_id.to_string()).collect()
}
