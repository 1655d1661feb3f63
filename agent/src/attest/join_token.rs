//! Attestation by a join token.

use async_trait::async_trait;
use bytes::Bytes;
use zeroize::Zeroizing;

use super::{NodeProver, ProveError};

/// Shows a token that the server made and takes only once.
pub struct JoinToken {
    token: Option<Zeroizing<String>>,
}

impl JoinToken {
    /// Without a token only an agent that has an identity can start.
    pub fn new(token: Option<Zeroizing<String>>) -> Self {
        Self { token: token.filter(|token| !token.is_empty()) }
    }
}

#[async_trait]
impl NodeProver for JoinToken {
    fn name(&self) -> &'static str {
        spiffe::attest::join_token::NAME
    }

    fn repeats(&self) -> bool {
        false
    }

    async fn payload(&self) -> Result<Bytes, ProveError> {
        let token = self.token.as_ref().ok_or(ProveError::NoToken)?;
        Ok(Bytes::copy_from_slice(token.as_bytes()))
    }

    async fn answer(&self, _: Bytes) -> Result<Bytes, ProveError> {
        Err(ProveError::UnexpectedChallenge)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn shows_the_token_and_answers_nothing() {
        let prover = JoinToken::new(Some(Zeroizing::new("token".into())));
        assert_eq!(prover.payload().await.unwrap(), "token");
        assert!(matches!(prover.answer(Bytes::new()).await, Err(ProveError::UnexpectedChallenge)));
        for none in [None, Some(Zeroizing::new(String::new()))] {
            assert!(matches!(JoinToken::new(none).payload().await, Err(ProveError::NoToken)));
        }
    }
}
