//! What one stream has been sent and what it is to be sent next. Pure.
//!
//! A session keeps what its agent holds and never a queue: each step is the difference between that and the view of
//! the moment. One step is unacknowledged at most; what changes meanwhile becomes part of the next one.

use spiffe::view::Digest;

use super::view::{Delta, Held, View};

/// What an agent says of itself when it connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Greeting {
    /// Whether it last followed the history that is served here. Numbers of another history may mean other contents.
    pub same_history: bool,
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

/// A step on its way to the agent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Step {
    /// Its number; the first of a stream is 1.
    pub number: u64,
    /// What changes.
    pub delta: Delta,
    /// Digest of everything the agent holds after it.
    pub digest: Digest,
}

/// What an agent has been sent.
#[derive(Debug)]
pub struct Session {
    held: Held,
    digest: Digest,
    last: u64,
    unacknowledged: bool,
}

impl Session {
    fn new(held: Held) -> Self {
        let digest = held.digest();
        Self { held, digest, last: 0, unacknowledged: false }
    }

    /// Begins a stream with an agent that is to hold `view`.
    pub fn open(greeting: Greeting, view: &View) -> Opening {
        let nothing = Self::new(Held::default());
        if greeting.digest == nothing.digest {
            return Opening::Fresh(nothing);
        }
        let wanted = Self::new(view.versions());
        if greeting.same_history && greeting.digest == wanted.digest {
            Opening::Resume(wanted)
        } else {
            Opening::Compare
        }
    }

    /// Goes on after the agent said what it holds. Versions of another history count for nothing but their names, so
    /// that what is held is replaced and what is not to be held is dropped.
    pub fn after_comparison(held: Held, same_history: bool) -> Self {
        let mut session = Self::new(held);
        if !same_history {
            session.held.entries.values_mut().for_each(|version| version.revision = i64::MIN);
            session.held.bundles.values_mut().for_each(|digest| *digest = [0; 32]);
        }
        session
    }

    /// The next step towards `view`, if one is needed and none is unacknowledged.
    pub fn advance(&mut self, view: &View) -> Option<Step> {
        if self.unacknowledged {
            return None;
        }
        let delta = view.beyond(&self.held);
        if delta.is_empty() {
            return None;
        }
        self.held = view.versions();
        self.digest = self.held.digest();
        self.last += 1;
        self.unacknowledged = true;
        Some(Step { number: self.last, delta, digest: self.digest })
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
        self.digest
    }
}
