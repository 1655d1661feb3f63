//! What an agent may hold, named: (entry, revision) pairs and bundle digests, and one digest over all.
//!
//! Server and agent compare views when a push stream opens and at each heartbeat. The digest must
//! come out the same on both sides, so its encoding lives here and nowhere else.

use aws_lc_rs::digest::{Context, SHA256};

/// A SHA-256 over something one side holds.
pub type Digest = [u8; 32];

/// Folds a view into one digest: every entry first, then every bundle, each in ascending order of
/// its name's bytes.
///
/// The caller keeps the order; a view handed over in another order has another digest.
pub struct ViewDigest {
    context: Context,
}

impl ViewDigest {
    /// An empty view.
    pub fn new() -> Self {
        Self { context: Context::new(&SHA256) }
    }

    /// Adds an entry: its id, revision number and creation time (Unix seconds).
    pub fn entry(&mut self, id: &str, revision: i64, created_at: i64) {
        self.name(b'e', id);
        self.context.update(&revision.to_be_bytes());
        self.context.update(&created_at.to_be_bytes());
    }

    /// Adds a bundle: its trust domain's name and the SHA-256 of its encoded message.
    pub fn bundle(&mut self, trust_domain: &str, digest: &Digest) {
        self.name(b'b', trust_domain);
        self.context.update(digest);
    }

    /// The digest of all that was added.
    pub fn finish(self) -> Digest {
        to_array(self.context.finish().as_ref())
    }

    // A kind and a length before each name: no two views share an encoding.
    fn name(&mut self, kind: u8, name: &str) {
        self.context.update(&[kind]);
        self.context.update(&(name.len() as u64).to_be_bytes());
        self.context.update(name.as_bytes());
    }
}

impl Default for ViewDigest {
    fn default() -> Self {
        Self::new()
    }
}

/// SHA-256 of one bundle's encoded message, as [`ViewDigest::bundle`] takes it.
pub fn bundle_digest(encoded: &[u8]) -> Digest {
    to_array(aws_lc_rs::digest::digest(&SHA256, encoded).as_ref())
}

fn to_array(bytes: &[u8]) -> Digest {
    let mut digest = [0; 32];
    for (to, from) in digest.iter_mut().zip(bytes) {
        *to = *from;
    }
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(entries: &[(&str, i64, i64)], bundles: &[(&str, Digest)]) -> Digest {
        let mut view = ViewDigest::new();
        for (id, revision, created_at) in entries {
            view.entry(id, *revision, *created_at);
        }
        for (trust_domain, digest) in bundles {
            view.bundle(trust_domain, digest);
        }
        view.finish()
    }

    #[test]
    fn every_part_of_a_view_counts() {
        let bundle = bundle_digest(b"bundle");
        let base = of(&[("a", 1, 7)], &[("td", bundle)]);
        assert_eq!(base, of(&[("a", 1, 7)], &[("td", bundle)]));
        for other in [
            of(&[("b", 1, 7)], &[("td", bundle)]),
            of(&[("a", 2, 7)], &[("td", bundle)]),
            of(&[("a", 1, 8)], &[("td", bundle)]),
            of(&[("a", 1, 7)], &[("te", bundle)]),
            of(&[("a", 1, 7)], &[("td", bundle_digest(b"other"))]),
            of(&[("a", 1, 7)], &[]),
            of(&[], &[("td", bundle)]),
        ] {
            assert_ne!(base, other);
        }
    }

    #[test]
    fn names_do_not_run_into_each_other() {
        assert_ne!(of(&[("ab", 1, 0), ("c", 1, 0)], &[]), of(&[("a", 1, 0), ("bc", 1, 0)], &[]));
    }
}
