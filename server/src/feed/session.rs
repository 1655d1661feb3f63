//! What one stream has been sent and what it is to be sent next. Pure.
//!
//! A session keeps what its agent holds and never a queue: each step is the difference between that and what the agent
//! may have at the moment. What is looked at for it is as little as provably suffices ([`Look`]). One step is
//! unacknowledged at most; what changes meanwhile becomes part of the next one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use spiffe::bundle::Bundle;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::view::{Digest, ViewDigest};

use super::look::Look;
use crate::registry::authorized::{authorized, named};
use crate::state::State;
use crate::state::model::{Entry, EntryId};

/// What an agent says that it holds, by content: entries by id, bundles by trust domain.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Content of each entry, as [`Entry::content`] gave it.
    pub entries: BTreeMap<EntryId, Digest>,
    /// Content of each bundle, as [`spiffe::view::bundle_digest`] makes it.
    pub bundles: BTreeMap<Arc<str>, Digest>,
}

/// What an agent says of itself when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Whether it claims the newest position. Whoever does, and has the right digest, holds the right things; any other
    /// claim is compared.
    pub at_head: bool,
    /// Digest of what it holds.
    pub digest: Digest,
}

/// How a stream begins.
#[derive(Debug)]
pub enum Opening {
    /// The agent holds exactly what it should.
    Resume(Session),
    /// The agent holds nothing: everything is new.
    Fresh(Session),
    /// The agent is to say what it holds; [`Session::after_comparison`] goes on from there.
    Compare,
}

/// An acknowledgement of a step that was not sent, or acknowledged already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("step {step} is not the one that waits for its acknowledgement")]
pub struct OutOfTurn {
    /// The step that was acknowledged.
    pub step: u64,
}

/// What leads from one view to another.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delta {
    /// Entries that are new or have changed, by id.
    pub entries: Vec<Arc<Entry>>,
    /// Entries that go.
    pub removed_entries: Vec<EntryId>,
    /// Bundles that are new or have changed, by trust domain.
    pub bundles: Vec<Arc<Bundle>>,
    /// Trust domains whose bundles go.
    pub removed_bundles: Vec<Arc<str>>,
}

impl Delta {
    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
            && self.removed_entries.is_empty()
            && self.bundles.is_empty()
            && self.removed_bundles.is_empty()
    }
}

/// A step on its way to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number; the first of a stream is 1.
    pub number: u64,
    /// What the agent held before counts for nothing.
    pub anew: bool,
    /// What changes.
    pub delta: Delta,
    /// Digest of everything the agent holds after it.
    pub digest: Digest,
}

/// An entry that the agent holds.
#[derive(Clone, Debug)]
enum Sent {
    /// It was sent on this stream.
    Entry(Arc<Entry>),
    /// The agent says that it holds one of this content.
    Claimed(Box<Digest>),
}

impl Sent {
    fn content(&self) -> &Digest {
        match self {
            Self::Entry(entry) => entry.content(),
            Self::Claimed(content) => content,
        }
    }

    fn is(&self, entry: &Arc<Entry>) -> bool {
        match self {
            Self::Entry(sent) if Arc::ptr_eq(sent, entry) => true,
            sent => sent.content() == entry.content(),
        }
    }
}

/// What an agent has been sent.
#[derive(Debug, Default)]
pub struct Session {
    entries: BTreeMap<EntryId, Sent>,
    bundles: BTreeMap<Arc<str>, Digest>,
    /// How many of the entries federate with each trust domain.
    federating: BTreeMap<TrustDomain, usize>,
    digest: ViewDigest,
    anew: bool,
    last: u64,
    unacknowledged: bool,
}

impl Session {
    /// Begins a stream of `agent`. `digest_of` gives the digest of a bundle as it is sent.
    pub fn open(
        greeting: Greeting,
        state: &State,
        agent: &SpiffeId,
        now: SystemTime,
        digest_of: impl FnMut(&Arc<Bundle>) -> Digest,
    ) -> Opening {
        if greeting.digest == ViewDigest::default().finish() {
            return Opening::Fresh(Self::default());
        }
        if greeting.at_head {
            let mut wanted = Self::default();
            wanted.advance(&Look::Everything, state, agent, now, digest_of);
            if greeting.digest == wanted.digest() {
                (wanted.last, wanted.unacknowledged) = (0, false);
                return Opening::Resume(wanted);
            }
        }
        Opening::Compare
    }

    /// Goes on after the agent said what it holds. Its first look has to be at everything.
    pub fn after_comparison(held: Held) -> Self {
        let mut session = Self::default();
        for (id, content) in held.entries {
            session.digest.add_entry(&id, &content);
            session.entries.insert(id, Sent::Claimed(Box::new(content)));
        }
        for (name, content) in held.bundles {
            session.digest.add_bundle(&name, &content);
            session.bundles.insert(name, content);
        }
        session
    }

    /// Goes on when the agent holds more than it can say: its first step is the whole view.
    pub fn anew() -> Self {
        Self { anew: true, ..Self::default() }
    }

    /// The next step towards what `agent` may have in `state` at `now`, if one is needed. To be called only while no step
    /// waits for its acknowledgement. `look` covers all that may have changed since the last call.
    pub fn advance(
        &mut self,
        look: &Look,
        state: &State,
        agent: &SpiffeId,
        now: SystemTime,
        digest_of: impl FnMut(&Arc<Bundle>) -> Digest,
    ) -> Option<Step> {
        let mut delta = Delta::default();
        let look_at_bundles = match look {
            Look::Everything => {
                self.look_at_everything(state, agent, now, &mut delta);
                true
            }
            Look::Touched { entries, bundles } => {
                let wanted = named(state, agent, entries.iter().map(|id| &**id), now);
                let mut others = false;
                for (id, wanted) in entries.iter().zip(wanted) {
                    others |= self.replace(id, wanted, &mut delta);
                }
                *bundles || others
            }
        };
        if look_at_bundles {
            self.look_at_bundles(state, &mut delta, digest_of);
        }
        if delta.is_empty() && !self.anew {
            return None;
        }
        self.last += 1;
        self.unacknowledged = true;
        let anew = std::mem::take(&mut self.anew);
        Some(Step { number: self.last, anew, delta, digest: self.digest() })
    }

    fn look_at_everything(&mut self, state: &State, agent: &SpiffeId, now: SystemTime, delta: &mut Delta) {
        let wanted: BTreeMap<EntryId, Arc<Entry>> =
            authorized(state, agent, now).into_iter().map(|entry| (Arc::clone(&entry.id), entry)).collect();
        let gone: Vec<EntryId> = self.entries.keys().filter(|id| !wanted.contains_key(*id)).cloned().collect();
        for id in gone {
            self.replace(&id, None, delta);
        }
        for (id, entry) in wanted {
            self.replace(&id, Some(entry), delta);
        }
    }

    /// Makes one entry what it is to be; whether other trust domains may now be federated with.
    fn replace(&mut self, id: &EntryId, wanted: Option<Arc<Entry>>, delta: &mut Delta) -> bool {
        let held = self.entries.get(id);
        let federates = match (held, &wanted) {
            (None, None) => return false,
            (Some(held), Some(entry)) if held.is(entry) => {
                if let Sent::Entry(_) = held {
                    return false;
                }
                // The agent holds it already; from here on it is known by more than its content.
                !entry.federates_with.is_empty()
            }
            (held, _) => {
                let before = matches!(held, Some(Sent::Entry(entry)) if !entry.federates_with.is_empty());
                match &wanted {
                    Some(entry) => delta.entries.push(Arc::clone(entry)),
                    None => delta.removed_entries.push(Arc::clone(id)),
                }
                before || wanted.as_ref().is_some_and(|entry| !entry.federates_with.is_empty())
            }
        };
        if let Some(held) = self.entries.remove(id) {
            self.digest.remove_entry(id, held.content());
            if let Sent::Entry(entry) = held {
                for trust_domain in &entry.federates_with {
                    let Some(count) = self.federating.get_mut(trust_domain) else { continue };
                    *count = count.saturating_sub(1);
                    if *count == 0 {
                        self.federating.remove(trust_domain);
                    }
                }
            }
        }
        if let Some(entry) = wanted {
            self.digest.add_entry(id, entry.content());
            for trust_domain in &entry.federates_with {
                *self.federating.entry(trust_domain.clone()).or_default() += 1;
            }
            self.entries.insert(Arc::clone(id), Sent::Entry(entry));
        }
        federates
    }

    /// Makes the bundles our own and those that the entries federate with.
    fn look_at_bundles(&mut self, state: &State, delta: &mut Delta, mut digest_of: impl FnMut(&Arc<Bundle>) -> Digest) {
        let own = state.trust_domain();
        let others = self.federating.keys().filter(|trust_domain| *trust_domain != own);
        let wanted: BTreeMap<&str, &Arc<Bundle>> = std::iter::once(own)
            .chain(others)
            .filter_map(|trust_domain| Some((trust_domain.as_str(), state.bundle(trust_domain)?)))
            .collect();
        let gone: Vec<Arc<str>> = self.bundles.keys().filter(|name| !wanted.contains_key(&***name)).cloned().collect();
        for name in gone {
            if let Some(content) = self.bundles.remove(&name) {
                self.digest.remove_bundle(&name, &content);
            }
            delta.removed_bundles.push(name);
        }
        for (name, bundle) in wanted {
            let content = digest_of(bundle);
            if self.bundles.get(name) == Some(&content) {
                continue;
            }
            if let Some(before) = self.bundles.insert(Arc::from(name), content) {
                self.digest.remove_bundle(name, &before);
            }
            self.digest.add_bundle(name, &content);
            delta.bundles.push(Arc::clone(bundle));
        }
    }

    /// Whether a step waits for its acknowledgement.
    pub fn is_waiting(&self) -> bool {
        self.unacknowledged
    }

    /// Takes an acknowledgement.
    ///
    /// # Errors
    /// [`OutOfTurn`] if it is not of the step that waits for one.
    pub fn acknowledge(&mut self, step: u64) -> Result<(), OutOfTurn> {
        if !self.unacknowledged || step != self.last {
            return Err(OutOfTurn { step });
        }
        self.unacknowledged = false;
        Ok(())
    }

    /// Digest of everything the agent holds when it has applied what it was sent.
    pub fn digest(&self) -> Digest {
        self.digest.finish()
    }

    /// Everything the agent holds when it has applied what it was sent.
    pub fn holds(&self) -> Held {
        Held {
            entries: self.entries.iter().map(|(id, sent)| (Arc::clone(id), *sent.content())).collect(),
            bundles: self.bundles.clone(),
        }
    }
}
