//! What an agent may hold, named: the content of each entry and bundle, and one digest over all.
//!
//! Server and agent compare views when a push stream opens and at each heartbeat. The digest must come out the same on
//! both sides, so its encoding lives here and nowhere else.

use aws_lc_rs::digest::{Context, SHA256};

/// A SHA-256 over something one side holds.
pub type Digest = [u8; 32];

/// The digest of a view, kept while members come and go.
///
/// It is the sum of the members' hashes modulo 2^256, so a change costs what changes and the order does not count. It
/// shows that two sides have drifted apart. It is no signature: whoever chooses thousands of members can make two views
/// of one digest. So equal digests never prove anything that matters, and doubt is settled member by member.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ViewDigest {
    /// Least significant first.
    limbs: [u64; 4],
}

impl ViewDigest {
    /// Counts an entry with this id and content in.
    pub fn add_entry(&mut self, id: &str, content: &Digest) {
        self.add(&member(b'e', id, content));
    }

    /// Counts an entry out that was counted in.
    pub fn remove_entry(&mut self, id: &str, content: &Digest) {
        self.subtract(&member(b'e', id, content));
    }

    /// Counts a bundle in: its trust domain's name and [`bundle_digest`].
    pub fn add_bundle(&mut self, trust_domain: &str, content: &Digest) {
        self.add(&member(b'b', trust_domain, content));
    }

    /// Counts a bundle out that was counted in.
    pub fn remove_bundle(&mut self, trust_domain: &str, content: &Digest) {
        self.subtract(&member(b'b', trust_domain, content));
    }

    /// The digest of all that is counted in; 32 zero bytes for nothing.
    pub fn finish(&self) -> Digest {
        let mut digest = [0; 32];
        for (to, limb) in digest.chunks_exact_mut(8).zip(self.limbs.iter().rev()) {
            to.copy_from_slice(&limb.to_be_bytes());
        }
        digest
    }

    fn add(&mut self, hash: &[u64; 4]) {
        let mut carry = false;
        for (limb, other) in self.limbs.iter_mut().zip(hash) {
            let (sum, first) = limb.overflowing_add(*other);
            let (sum, second) = sum.overflowing_add(u64::from(carry));
            (*limb, carry) = (sum, first || second);
        }
    }

    fn subtract(&mut self, hash: &[u64; 4]) {
        let mut borrow = false;
        for (limb, other) in self.limbs.iter_mut().zip(hash) {
            let (rest, first) = limb.overflowing_sub(*other);
            let (rest, second) = rest.overflowing_sub(u64::from(borrow));
            (*limb, borrow) = (rest, first || second);
        }
    }
}

/// The hash of one member as a number. A kind and a length stand before the name: no two members share an encoding.
fn member(kind: u8, name: &str, content: &Digest) -> [u64; 4] {
    let mut context = Context::new(&SHA256);
    context.update(&[kind]);
    context.update(&(name.len() as u64).to_be_bytes());
    context.update(name.as_bytes());
    context.update(content);
    let hash = context.finish();
    let mut limbs = [0; 4];
    for (limb, bytes) in limbs.iter_mut().rev().zip(hash.as_ref().chunks_exact(8)) {
        *limb = bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte));
    }
    limbs
}

/// SHA-256 of one bundle's encoded message, as [`ViewDigest::add_bundle`] takes it.
pub fn bundle_digest(encoded: &[u8]) -> Digest {
    let mut digest = [0; 32];
    let hash = aws_lc_rs::digest::digest(&SHA256, encoded);
    for (to, from) in digest.iter_mut().zip(hash.as_ref()) {
        *to = *from;
    }
    digest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(entries: &[(&str, u8)], bundles: &[(&str, u8)]) -> ViewDigest {
        let mut view = ViewDigest::default();
        entries.iter().for_each(|(id, content)| view.add_entry(id, &[*content; 32]));
        bundles.iter().for_each(|(name, content)| view.add_bundle(name, &[*content; 32]));
        view
    }

    #[test]
    fn every_part_of_a_view_counts() {
        let base = of(&[("a", 1)], &[("td", 2)]).finish();
        assert_eq!(base, of(&[("a", 1)], &[("td", 2)]).finish());
        for other in [
            of(&[("b", 1)], &[("td", 2)]),
            of(&[("a", 9)], &[("td", 2)]),
            of(&[("a", 1)], &[("te", 2)]),
            of(&[("a", 1)], &[("td", 9)]),
            of(&[("a", 1)], &[]),
            of(&[], &[("td", 2)]),
            of(&[("a", 1), ("a", 1)], &[("td", 2)]),
            // The same name as another kind of member.
            of(&[("td", 2)], &[("a", 1)]),
        ] {
            assert_ne!(base, other.finish());
        }
    }

    #[test]
    fn names_do_not_run_into_each_other() {
        assert_ne!(of(&[("ab", 1), ("c", 1)], &[]).finish(), of(&[("a", 1), ("bc", 1)], &[]).finish());
    }

    #[test]
    fn what_is_counted_out_leaves_nothing_behind_in_any_order() {
        let all: Vec<(String, [u8; 32])> =
            (0..200_u8).map(|number| (format!("entry-{number}"), [number; 32])).collect();
        let mut view = of(&[("stays", 7)], &[]);
        let stays = view.finish();
        all.iter().for_each(|(id, content)| view.add_entry(id, content));
        view.add_bundle("td", &[3; 32]);
        assert_ne!(view.finish(), stays);
        all.iter().rev().for_each(|(id, content)| view.remove_entry(id, content));
        view.remove_bundle("td", &[3; 32]);
        assert_eq!(view.finish(), stays);
        view.remove_entry("stays", &[7; 32]);
        assert_eq!(view.finish(), [0; 32]);
    }
}
