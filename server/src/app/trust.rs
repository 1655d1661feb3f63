//! Whom the network listener believes: by the newest bundles, and whom it lets in at all.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::SystemTime;

use runtime::clock::Clock;
use spiffe::bundle::{Bundle, Bundles};
use spiffe::id::{SpiffeId, TrustDomain};
use transport::verify::Trust;

use crate::config::Config;
use crate::history::Replica;
use crate::state::State;

/// Peers of a server: everybody of its own trust domain, and administrators of others by name.
pub(super) struct ServerTrust {
    replica: Replica,
    clock: Clock,
    trust_domain: TrustDomain,
    foreign_admins: HashSet<SpiffeId>,
}

impl ServerTrust {
    pub(super) fn new(replica: Replica, clock: Clock, config: &Config) -> Self {
        let foreign = config.admin_ids.iter().filter(|id| !id.is_member_of(&config.trust_domain));
        Self { replica, clock, trust_domain: config.trust_domain.clone(), foreign_admins: foreign.cloned().collect() }
    }
}

/// The bundles of one revision.
struct Held(Arc<State>);

impl Bundles for Held {
    fn bundle(&self, trust_domain: &TrustDomain) -> Option<Arc<Bundle>> {
        self.0.bundle(trust_domain).cloned()
    }
}

impl Trust for ServerTrust {
    fn bundles(&self) -> Arc<dyn Bundles + Send + Sync> {
        Arc::new(Held(self.replica.latest()))
    }

    fn now(&self) -> SystemTime {
        self.clock.now()
    }

    fn admits(&self, id: &SpiffeId) -> bool {
        id.is_member_of(&self.trust_domain) || self.foreign_admins.contains(id)
    }
}
