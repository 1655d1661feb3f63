//! The one consistent state of the cache and what changes it; nothing here waits.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use spiffe::renew::{RenewAt, Succession, Validity};
use spiffe::selector::SelectorSet;

use super::desired::{Changed, Desired, Entry, EntryId, Form, Update};
use super::issue::{self, Candidate, Demand, Held, Plan};
use super::snapshot::{HeldSvid, View, Views};
use crate::taint;

/// Entries, credentials and views at one moment.
pub(super) struct State {
    pub(super) desired: Desired,
    pub(super) credentials: HashMap<EntryId, Credential>,
    /// Signed and not valid yet, while what is held is.
    pub(super) coming: HashMap<EntryId, Credential>,
    pub(super) signing: HashSet<EntryId>,
    pub(super) refused: HashMap<EntryId, Refused>,
    pub(super) views: Views,
    pub(super) tick: u64,
    // The server was heard from since the signer last looked: an earlier failure is no reason to wait.
    pub(super) heard: bool,
    // The signer is waiting out a failure.
    pub(super) waiting: bool,
}

pub(super) struct Credential {
    pub(super) svid: Arc<HeldSvid>,
    pub(super) form: Form,
    pub(super) received_at: SystemTime,
    pub(super) renew_at: SystemTime,
    // The key that signed the end of the chain, by which a tainted authority is recognised.
    pub(super) authority_key_id: Option<Bytes>,
    pub(super) last_used: u64,
}

impl Credential {
    pub(super) fn validity(&self) -> Validity {
        Validity { not_before: self.svid.not_before, not_after: self.svid.not_after }
    }
}

/// What the server refused last.
#[derive(Clone, Copy)]
pub(super) struct Refused {
    // By the boot clock.
    pub(super) retry_at: Duration,
    pub(super) wait: Duration,
}

pub(super) fn build(
    desired: &Desired,
    credentials: &HashMap<EntryId, Credential>,
    selectors: &SelectorSet,
    now: SystemTime,
) -> View {
    let held = |id: &EntryId| credentials.get(id).map(|credential| Arc::clone(&credential.svid));
    View::build(desired, desired.matching(selectors), held, now)
}

impl State {
    /// Nothing held, nothing known.
    pub(super) fn new(trust_domain: TrustDomain) -> Self {
        Self {
            desired: Desired::new(Arc::new(Bundle::empty(trust_domain))),
            credentials: HashMap::new(),
            coming: HashMap::new(),
            signing: HashSet::new(),
            refused: HashMap::new(),
            views: Views::default(),
            tick: 0,
            heard: false,
            waiting: false,
        }
    }

    /// Takes a step; answers the entries whose tokens end, and the own bundle if any bundle changed.
    pub(super) fn apply(&mut self, update: Update, now: SystemTime) -> (Vec<EntryId>, Option<Arc<Bundle>>) {
        self.heard = true;
        let (changed, bundles_changed) = self.desired.apply(update);
        let mut ended = Vec::new();
        for change in &changed {
            let Some(id) = change.before.as_ref().or(change.after.as_ref()).map(|entry| &entry.id) else { continue };
            change.tell();
            self.refused.remove(id);
            self.coming.remove(id);
            if change.before.is_some() {
                ended.push(Arc::clone(id));
            }
            if change.ends_credentials() {
                self.credentials.remove(id);
                self.signing.remove(id);
            }
        }
        if bundles_changed {
            self.renew_tainted(now);
        }
        let Self { desired, credentials, views, .. } = self;
        // From some number on it is cheaper to build every view than to ask which are concerned.
        let many = bundles_changed || changed.len() > 64;
        let touches = |selectors: &SelectorSet, changed: &Changed| {
            let matches = |entry: &Arc<Entry>| entry.selectors.is_subset_of(selectors);
            changed.before.iter().chain(&changed.after).any(matches)
        };
        views.rebuild(
            |selectors, _| many || changed.iter().any(|changed| touches(selectors, changed)),
            |selectors| build(desired, credentials, selectors, now),
        );
        (ended, bundles_changed.then(|| Arc::clone(self.desired.own())))
    }

    /// Draws the renewal of every credential that a tainted authority signed to now.
    fn renew_tainted(&mut self, now: SystemTime) {
        let tainted = taint::authorities(self.desired.own());
        if tainted.is_empty() {
            return;
        }
        let by_tainted = |credential: &Credential| {
            credential.authority_key_id.as_ref().is_some_and(|key_id| tainted.contains(key_id))
        };
        self.coming.retain(|_, credential| !by_tainted(credential));
        for credential in self.credentials.values_mut() {
            if by_tainted(credential) {
                let (svid, received_at) = (&credential.svid, credential.received_at);
                let soonest = received_at + RenewAt::least_distance(svid.not_before, svid.not_after, received_at);
                credential.renew_at = credential.renew_at.min(soonest.max(now));
            }
        }
    }

    /// Whether exactly this form of the entry is held.
    pub(super) fn wants(&self, entry: &Entry) -> bool {
        self.desired
            .entry(&entry.id)
            .is_some_and(|held| held.form().is(&entry.form()) && held.spiffe_id == entry.spiffe_id)
    }

    /// What to sign and what to forget. An agent may be told of many more entries than it has room for, and decides anew
    /// after each change: so only those are looked at that can matter.
    pub(super) fn plan(&self, limit: usize, now: SystemTime, boot: Duration) -> Plan {
        let followed: HashSet<EntryId> = self.views.followed().collect();
        let held = self.credentials.keys().filter_map(|id| self.desired.entry(id));
        let awaited = followed.iter().filter(|id| !self.credentials.contains_key(*id));
        let awaited = awaited.filter_map(|id| self.desired.entry(id));
        let mut candidates: Vec<Candidate> = held
            .chain(awaited)
            .filter(|entry| !entry.store_svid)
            .map(|entry| self.candidate(entry, followed.contains(&entry.id), now, boot))
            .collect();
        // Each takes room, but those whose credential is over.
        let live = |candidate: &&Candidate| {
            candidate.demand == Demand::Subscribed || candidate.held.is_some_and(|held| held.validity.not_after > now)
        };
        let room = limit.saturating_sub(candidates.iter().filter(live).count());
        if room > 0 && self.credentials.len() < self.desired.entries().len() {
            let missing = |entry: &&Arc<Entry>| {
                !entry.store_svid
                    && !entry.disable_x509_svid_prefetch
                    && !self.credentials.contains_key(&entry.id)
                    && !followed.contains(&entry.id)
            };
            let missing = self.desired.entries().filter(missing).take(room);
            candidates.extend(missing.map(|entry| self.candidate(entry, false, now, boot)));
        }
        issue::plan(&candidates, limit, now)
    }

    fn candidate(&self, entry: &Entry, followed: bool, now: SystemTime, boot: Duration) -> Candidate {
        let credential = self.credentials.get(&entry.id);
        let refused = self.refused.get(&entry.id).map(|refused| now + refused.retry_at.saturating_sub(boot));
        let begins = self.coming.get(&entry.id).map(|coming| coming.svid.not_before);
        Candidate {
            held: credential.map(|credential| Held {
                renew_at: credential.renew_at,
                validity: credential.validity(),
                outdated: !credential.form.is(&entry.form()),
            }),
            demand: if followed {
                Demand::Subscribed
            } else if entry.disable_x509_svid_prefetch {
                Demand::OnDemand
            } else {
                Demand::Prefetch
            },
            last_used: credential.map_or(0, |credential| credential.last_used),
            signing: self.signing.contains(&entry.id),
            retry_at: refused.max(begins),
            entry: Arc::clone(&entry.id),
        }
    }

    /// When the first of the credentials of these entries runs out, of those that have not yet.
    pub(super) fn first_end(&self, ids: &HashSet<EntryId>, now: SystemTime) -> Option<SystemTime> {
        let ends = ids.iter().filter_map(|id| self.credentials.get(id)).map(|credential| credential.svid.not_after);
        ends.filter(|end| *end > now).min()
    }

    /// Uses what was signed and waited for its beginning.
    pub(super) fn begin(&mut self, now: SystemTime) {
        if self.coming.is_empty() {
            return;
        }
        let (mut begun, mut waiting) = (HashSet::new(), HashMap::new());
        for (id, credential) in std::mem::take(&mut self.coming) {
            match issue::take(self.credentials.get(&id).map(Credential::validity), credential.validity(), now) {
                Succession::Now => {
                    begun.insert(Arc::clone(&id));
                    self.credentials.insert(id, credential);
                }
                Succession::At(_) => {
                    waiting.insert(id, credential);
                }
                // The clock was set meanwhile.
                Succession::Never => {}
            }
        }
        self.coming = waiting;
        self.rebuild_around(&begun, now);
    }

    /// The clock was set: what seemed to be over may not be, and the other way round, and no failure of before says anything.
    pub(super) fn clock_was_set(&mut self, now: SystemTime) {
        self.refused.clear();
        let Self { desired, credentials, views, .. } = self;
        views.rebuild(|_, _| true, |selectors| build(desired, credentials, selectors, now));
    }

    pub(super) fn forget(&mut self, ids: &HashSet<EntryId>, now: SystemTime) {
        self.credentials.retain(|id, _| !ids.contains(id));
        self.rebuild_around(ids, now);
    }

    /// Hands new views to those who follow one of these entries.
    pub(super) fn rebuild_around(&mut self, ids: &HashSet<EntryId>, now: SystemTime) {
        if ids.is_empty() {
            return;
        }
        let Self { desired, credentials, views, .. } = self;
        views.rebuild(
            |_, view| view.entries.iter().any(|entry| ids.contains(&entry.id)),
            |selectors| build(desired, credentials, selectors, now),
        );
    }
}
