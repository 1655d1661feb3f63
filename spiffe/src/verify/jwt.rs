//! JWT-SVID validation (JWT-SVID, section 5).

use std::time::SystemTime;

use super::{LEEWAY, VerifyError};
use crate::bundle::{Bundles, JwtAuthority};
use crate::jwt::claims::exact;
use crate::jwt::{JwtKey, Unverified, VerifiedToken};

/// How many keys are tried for a token that does not name its key.
const MAX_KEYS: usize = 16;

/// Verifies a token in compact form: algorithm, header, subject, audience (which has to contain
/// `audience`), time with [`LEEWAY`], and the signature by a JWT key of the subject's own domain.
///
/// A future `iat` is no reason to refuse; RFC 7519 gives it no such role.
pub fn jwt_svid(
    token: &str,
    audience: &str,
    bundles: &dyn Bundles,
    now: SystemTime,
) -> Result<VerifiedToken, VerifyError> {
    let token = Unverified::parse(token).map_err(VerifyError::Token)?;
    let claims = &token.claims;
    if audience.is_empty() || claims.aud.iter().all(|aud| aud != audience) {
        return Err(VerifyError::Audience);
    }
    // Leeway is taken from `now`, never added to what a token says.
    let early = now.checked_sub(LEEWAY).unwrap_or(SystemTime::UNIX_EPOCH);
    if early > claims.exp {
        return Err(VerifyError::Expired);
    }
    if claims.nbf.is_some_and(|nbf| now + LEEWAY < nbf) {
        return Err(VerifyError::NotYetValid);
    }
    let bundle = bundles.bundle(claims.sub.trust_domain()).ok_or(VerifyError::UnknownTrustDomain)?;
    let candidates = bundle
        .jwt
        .iter()
        .filter(|authority| token.key_id.as_deref().is_none_or(|id| *authority.key_id == *id))
        .filter(|authority| authority.expires_at.is_none_or(|end| early <= end));
    let mut outcome = VerifyError::UnknownKey;
    let mut tried = 0;
    for authority in candidates {
        match check(&token, authority) {
            Check::Verified => {
                let key_id = authority.key_id.clone();
                let claims = token.claims;
                return Ok(VerifiedToken {
                    id: claims.sub,
                    audience: claims.aud,
                    claims: claims.all.into_iter().map(|(name, value)| (name, exact(value))).collect(),
                    expires_at: claims.exp,
                    key_id,
                });
            }
            Check::Mismatch => {
                outcome = VerifyError::Signature;
                tried += 1;
                if tried == MAX_KEYS {
                    break;
                }
            }
            Check::OtherKind => {}
        }
    }
    Err(outcome)
}

enum Check {
    Verified,
    Mismatch,
    OtherKind,
}

fn check(token: &Unverified<'_>, authority: &JwtAuthority) -> Check {
    let Ok(key) = JwtKey::from_pkix(&authority.public_key) else { return Check::OtherKind };
    if !token.algorithm.fits(key.public_key().kind()) {
        return Check::OtherKind;
    }
    match key.verify(token.algorithm, token.signed.as_bytes(), &token.signature) {
        Ok(()) => Check::Verified,
        Err(_) => Check::Mismatch,
    }
}

#[cfg(test)]
#[path = "jwt_tests.rs"]
mod tests;
