//! Whether a fetched bundle replaces the stored one.

use super::Bundle;

/// What becomes of a fetched bundle.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Supersede {
    /// Store it: it is newer, or one of the two has no sequence and the latest fetched counts.
    Replace(Bundle),
    /// Store it, but tell the operator: the same sequence came with other content, which a
    /// publisher must not do (SPIFFE_Trust_Domain_and_Bundle, section 4.1.1).
    ReplaceSameSequence(Bundle),
    /// It says what is stored already.
    Unchanged,
    /// Keep what is stored and raise an alarm: the publisher went back in time, as a restored
    /// data store does.
    Older {
        /// The sequence that is stored.
        current: u64,
        /// The sequence that came.
        fetched: u64,
    },
    /// Keep what is stored: it is the bundle of another trust domain.
    OtherTrustDomain,
}

impl Bundle {
    /// Decides between the stored and a fetched bundle of one trust domain.
    pub fn supersede(current: &Bundle, fetched: Bundle) -> Supersede {
        if current.trust_domain != fetched.trust_domain {
            return Supersede::OtherTrustDomain;
        }
        let same = current.x509 == fetched.x509
            && current.refresh_hint == fetched.refresh_hint
            && current.jwt.len() == fetched.jwt.len()
            && current.jwt.iter().zip(&fetched.jwt).all(|(a, b)| a.key_id == b.key_id && a.public_key == b.public_key);
        match (current.sequence, fetched.sequence) {
            (a, b) if a == b && same => Supersede::Unchanged,
            (0, _) | (_, 0) if same => Supersede::Unchanged,
            (0, _) | (_, 0) => Supersede::Replace(fetched),
            (a, b) if b < a => Supersede::Older { current: a, fetched: b },
            (a, b) if a == b => Supersede::ReplaceSameSequence(fetched),
            _ => Supersede::Replace(fetched),
        }
    }
}
