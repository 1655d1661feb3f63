//! What other servers commit, and whether the store is reached at all.

use std::sync::Arc;

use futures_core::stream::BoxStream;
use futures_util::StreamExt;
use tokio::time::Instant;

use super::{Core, DETACHED_AFTER, RETRY_FIRST, load};
use crate::history::committer::SharedPart;
use crate::history::record;
use crate::history::replica::{Feed, HEAD_DEADLINE, Health};
use crate::history::{Change, OpenError, Position, StoreError};
use crate::state::State;
use crate::state::model::{Part, Scope};

impl Core {
    pub(super) fn note_failure(&mut self, error: &StoreError) {
        if !error.is_retryable() && !matches!(error, StoreError::TooLarge) {
            tracing::error!(error = %error, cause = ?error, "The store failed; restart the server");
            self.board.set_health(Health::NeedsRestart(error.clone()));
        }
    }

    pub(super) async fn is_current(&mut self) -> bool {
        self.confirm().await.is_ok_and(|head| head == *self.state.position())
    }

    /// Reads the head of a shared store, and notes whether this server is attached to it.
    pub(super) async fn confirm(&mut self) -> Result<Position, StoreError> {
        let head = match tokio::time::timeout(HEAD_DEADLINE, self.store.head()).await {
            Ok(head) => head,
            Err(elapsed) => Err(StoreError::Unreachable(Arc::new(elapsed))),
        };
        let health = self.board.health();
        match &head {
            Ok(_) => {
                self.confirmed = Instant::now();
                if matches!(health, Health::Detached) {
                    tracing::info!("The store is reached again");
                    self.board.set_health(Health::Attached);
                }
            }
            Err(error) => {
                self.note_failure(error);
                if health.is_attached() && error.is_retryable() && self.confirmed.elapsed() >= DETACHED_AFTER {
                    tracing::error!(error = %error, "The store is out of reach: nothing is written until it is back");
                    self.board.set_health(Health::Detached);
                }
            }
        }
        head
    }

    /// Applies what others committed, up to the head; as far as it gets, when the store fails on the way.
    pub(super) async fn catch_up(&mut self) {
        let before = *self.state.position();
        if let Ok(head) = self.confirm().await {
            let mut changes: BoxStream<'static, _> = self.store.watch(before);
            while self.state.position().revision < head.revision || self.state.position().history != head.history {
                let next = tokio::time::timeout(HEAD_DEADLINE, changes.next()).await;
                let Ok(change) = next else { break };
                if !self.follow(change).await {
                    break;
                }
            }
        }
        if *self.state.position() == before {
            // No way forward for now: the caller comes again, and not at once.
            tokio::time::sleep(RETRY_FIRST).await;
        }
    }

    /// Applies one change of others; `false` if the stream it came from is of no more use.
    pub(super) async fn follow(&mut self, change: Option<Result<Change, StoreError>>) -> bool {
        match change {
            Some(Ok(change)) if change.position.revision <= self.state.position().revision => true,
            Some(Ok(change)) => match self.applied(&change) {
                Ok((state, parts)) => {
                    self.publish(state, change.position, parts);
                    true
                }
                Err(error) => {
                    self.note_failure(&error);
                    false
                }
            },
            Some(Err(StoreError::Compacted | StoreError::Forked)) => {
                self.reload().await;
                false
            }
            Some(Err(error)) => {
                self.note_failure(&error);
                false
            }
            None => false,
        }
    }

    fn applied(&mut self, change: &Change) -> Result<(State, Vec<SharedPart>), StoreError> {
        let mut state = State::clone(&self.state);
        let mut parts = Vec::new();
        let mut begun = change.group.history().map(crate::state::model::Change::BeginHistory);
        for writes in change.group.parts() {
            let mut changes: Vec<_> = begun.take().into_iter().collect();
            for change in &changes {
                state.apply_change(change).map_err(record::RecordError::from)?;
            }
            for write in writes {
                if let Some(change) = self.reader.change_of(&state, write)? {
                    state.apply_change(&change).map_err(record::RecordError::from)?;
                    changes.push(change);
                }
            }
            let scope = writes.first().map_or_else(Scope::trust_domain, |write| write.key().scope.clone());
            parts.push(Arc::new(Part { scope, changes }));
        }
        Ok((state, parts))
    }

    async fn reload(&mut self) {
        match load(self.store.as_ref(), self.state.trust_domain().clone()).await {
            Ok(state) => {
                tracing::warn!(position = ?state.position(), "The history was loaded anew");
                self.state = Arc::new(state);
                self.board.publish(Arc::clone(&self.state), Feed::Everything);
            }
            Err(OpenError::Store(error)) => self.note_failure(&error),
            Err(error) => {
                let error = StoreError::Poisoned(Arc::new(error));
                self.note_failure(&error);
            }
        }
    }
}
