//! What one open stream holds of the cache.

use std::sync::Arc;

use spiffe::selector::SelectorSet;
use tokio::sync::watch;

use super::Inner;
use super::snapshot::View;

/// One process's claim to its view. Dropping it ends the claim.
pub struct Subscription {
    pub(super) cache: Arc<Inner>,
    pub(super) selectors: SelectorSet,
    pub(super) receiver: watch::Receiver<Arc<View>>,
}

impl Subscription {
    /// The view now at the first call, then the newest after each change. Views in between are skipped, and none holds
    /// anything expired. `None` when there will be no further view.
    pub async fn changed(&mut self) -> Option<Arc<View>> {
        loop {
            self.receiver.changed().await.ok()?;
            let view = Arc::clone(&self.receiver.borrow_and_update());
            if view.is_valid_at(self.cache.clock.now()) {
                return Some(view);
            }
            self.cache.expire();
            self.cache.signer.nudge();
        }
    }

    /// The view now, without anything expired, whether or not it was seen before.
    pub fn current(&self) -> Arc<View> {
        let view = Arc::clone(&self.receiver.borrow());
        if view.is_valid_at(self.cache.clock.now()) {
            return view;
        }
        self.cache.expire();
        self.cache.signer.nudge();
        Arc::clone(&self.receiver.borrow())
    }

    /// The selectors it was made with.
    pub fn selectors(&self) -> &SelectorSet {
        &self.selectors
    }
}

impl Drop for Subscription {
    fn drop(&mut self) {
        let mut state = self.cache.state();
        let Some(last) = state.views.unsubscribe(&self.selectors) else { return };
        state.tick += 1;
        let tick = state.tick;
        for entry in &last.entries {
            if let Some(credential) = state.credentials.get_mut(&entry.id) {
                credential.last_used = tick;
            }
        }
        let beyond = state.credentials.len() > self.cache.limits.x509_svids;
        drop(state);
        if beyond {
            self.cache.signer.nudge();
        }
    }
}
