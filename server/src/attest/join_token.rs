//! Attestation by a join token: a secret that an operator made and gave to one node.
//!
//! The store knows a token by its SHA-256 only. It is looked up here and used up in the part that records the node, so
//! an attestation that fails for another reason leaves it usable, and two nodes with one token cannot both succeed.

use std::time::SystemTime;

use async_trait::async_trait;
use spiffe::attest::join_token::{NAME, agent_id, hash};
use spiffe::selector::SelectorSet;

use super::{AttestError, Attested, Challenger, NodeAttestor};
use crate::history::replica::Replica;

/// Proves nodes by join tokens. Always there: it needs no configuration, and no token, no node.
#[derive(Clone)]
pub struct JoinTokens {
    replica: Replica,
}

impl JoinTokens {
    /// Looks tokens up in `replica`.
    pub fn new(replica: Replica) -> Self {
        Self { replica }
    }
}

#[async_trait]
impl NodeAttestor for JoinTokens {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(
        &self,
        payload: &[u8],
        _challenger: &mut dyn Challenger,
        now: SystemTime,
    ) -> Result<Attested, AttestError> {
        // A token is text: it was made from one.
        let text = std::str::from_utf8(payload).map_err(|_| AttestError::TokenUnknown)?;
        let hash = hash(text);
        let mut state = self.replica.latest();
        if state.token(&hash).is_none() {
            // A token made on another server a moment ago may not be here yet.
            state = self.replica.current().await.map_err(AttestError::State)?;
        }
        let token = state.token(&hash).ok_or(AttestError::TokenUnknown)?;
        if token.is_expired(now) {
            return Err(AttestError::TokenExpired);
        }
        Ok(Attested {
            agent_id: agent_id(state.trust_domain(), text).map_err(AttestError::AgentId)?,
            selectors: SelectorSet::default(),
            can_reattest: false,
            token: Some(hash),
        })
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::attest::testing::{History, Silent};
    use crate::state::model::{Change, JoinToken, Part};

    #[tokio::test]
    async fn a_known_token_proves_a_node_and_is_not_used_up_by_that() {
        let history = History::open().await;
        let token =
            JoinToken { hash: hash("secret"), expires_at: history.now() + Duration::from_secs(60), alias: None };
        history.commit(Part::new(vec![Change::PutToken(token)])).await;
        let attestor = JoinTokens::new(history.replica());
        for _ in 0..2 {
            let attested = attestor.attest(b"secret", &mut Silent, history.now()).await.unwrap();
            assert_eq!(attested.agent_id.as_str(), "spiffe://example.org/spire/agent/join_token/secret");
            assert_eq!(attested.token, Some(hash("secret")));
            assert!(attested.selectors.is_empty());
            assert!(!attested.can_reattest);
        }
    }

    #[tokio::test]
    async fn unknown_and_ended_tokens_are_told_apart() {
        let history = History::open().await;
        let token =
            JoinToken { hash: hash("secret"), expires_at: history.now() + Duration::from_secs(60), alias: None };
        history.commit(Part::new(vec![Change::PutToken(token)])).await;
        let attestor = JoinTokens::new(history.replica());
        let unknown = attestor.attest(b"other", &mut Silent, history.now()).await;
        assert!(matches!(unknown, Err(AttestError::TokenUnknown)));
        let no_text = attestor.attest(&[0xff, 0xfe], &mut Silent, history.now()).await;
        assert!(matches!(no_text, Err(AttestError::TokenUnknown)));
        let late = attestor.attest(b"secret", &mut Silent, history.now() + Duration::from_secs(60)).await;
        assert!(matches!(late, Err(AttestError::TokenExpired)));
    }

    #[tokio::test]
    async fn a_token_that_is_no_path_segment_proves_nobody() {
        let history = History::open().await;
        let token = JoinToken { hash: hash("a b"), expires_at: history.now() + Duration::from_secs(60), alias: None };
        history.commit(Part::new(vec![Change::PutToken(token)])).await;
        let attested = JoinTokens::new(history.replica()).attest(b"a b", &mut Silent, history.now()).await;
        assert!(matches!(attested, Err(AttestError::AgentId(_))));
    }
}
