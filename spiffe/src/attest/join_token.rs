//! Attestation by a join token: whoever shows an unused token is the node that it was made for.

use aws_lc_rs::digest;

use crate::id::{IdError, SpiffeId, TrustDomain};

/// The name of the method, and the type of its selectors.
pub const NAME: &str = "join_token";

/// What is stored of an unused token: its SHA-256. The token itself is known to its holder only.
pub fn hash(token: &str) -> [u8; 32] {
    let hash = digest::digest(&digest::SHA256, token.as_bytes());
    let mut out = [0; 32];
    for (to, from) in out.iter_mut().zip(hash.as_ref()) {
        *to = *from;
    }
    out
}

/// The id of the agent that attests with `token`: `spiffe://td/spire/agent/join_token/<token>`.
/// The token has to be one path segment.
pub fn agent_id(trust_domain: &TrustDomain, token: &str) -> Result<SpiffeId, IdError> {
    if token.contains('/') {
        return Err(IdError::PathCharacter);
    }
    SpiffeId::from_path(trust_domain, &format!("/spire/agent/{NAME}/{token}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_token_is_the_last_segment_of_the_agent_id() {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let id = agent_id(&trust_domain, "4d2a9f1e-0f4c-4a79-9e27-0b6ad41a5b3f").unwrap();
        assert_eq!(id.as_str(), "spiffe://example.org/spire/agent/join_token/4d2a9f1e-0f4c-4a79-9e27-0b6ad41a5b3f");
        assert!(id.is_agent());
    }

    #[test]
    fn tokens_that_are_no_segment_are_refused() {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        assert_eq!(agent_id(&trust_domain, "a/b"), Err(IdError::PathCharacter));
        assert_eq!(agent_id(&trust_domain, "a b"), Err(IdError::PathCharacter));
        assert_eq!(agent_id(&trust_domain, ""), Err(IdError::TrailingSlash));
        assert_eq!(agent_id(&trust_domain, ".."), Err(IdError::DotSegment));
    }

    #[test]
    fn the_hash_is_sha_256() {
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(crate::hex(&hash("abc")), expected);
    }
}
