//! Randomness, as a value that is passed in: the system's generator, or a seeded one for tests.

use std::sync::{Arc, Mutex, PoisonError};

/// A source of random bytes. Cheap to clone; clones of a seeded source continue one sequence.
#[derive(Clone)]
pub struct Entropy {
    source: Source,
}

#[derive(Clone)]
enum Source {
    System,
    Seeded(Arc<Mutex<u64>>),
}

impl std::fmt::Debug for Entropy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.source {
            Source::System => "Entropy(system)",
            Source::Seeded(_) => "Entropy(seeded)",
        })
    }
}

const ALPHANUMERIC: &[u8; 62] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789";

impl Entropy {
    /// The cryptographic generator of the system.
    pub fn system() -> Self {
        Self { source: Source::System }
    }

    /// A repeatable sequence for tests and simulations. It is predictable: never a source of keys.
    pub fn seeded(seed: u64) -> Self {
        Self { source: Source::Seeded(Arc::new(Mutex::new(seed))) }
    }

    /// Fills `bytes`. If the system has no randomness to give, the process is ended: whatever was made without it
    /// could be guessed.
    pub fn fill(&self, bytes: &mut [u8]) {
        match &self.source {
            Source::System => {
                if aws_lc_rs::rand::fill(bytes).is_err() {
                    tracing::error!("the system's random generator failed; ending the process");
                    std::process::abort();
                }
            }
            Source::Seeded(state) => {
                let mut state = state.lock().unwrap_or_else(PoisonError::into_inner);
                for chunk in bytes.chunks_mut(8) {
                    let block = split_mix(&mut state).to_le_bytes();
                    for (to, from) in chunk.iter_mut().zip(block) {
                        *to = from;
                    }
                }
            }
        }
    }

    /// `N` random bytes.
    pub fn bytes<const N: usize>(&self) -> [u8; N] {
        let mut bytes = [0; N];
        self.fill(&mut bytes);
        bytes
    }

    /// A uniformly distributed number.
    pub fn u64(&self) -> u64 {
        u64::from_le_bytes(self.bytes())
    }

    /// A uniformly distributed number in `0.0..1.0`.
    pub fn unit(&self) -> f64 {
        // 53 bits are what a double can hold without rounding up to 1.
        (self.u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// A random UUID (RFC 9562 §5.4), in its 36-character lower-case form.
    pub fn uuid_v4(&self) -> String {
        let mut b: [u8; 16] = self.bytes();
        b[6] = (b[6] & 0x0f) | 0x40;
        b[8] = (b[8] & 0x3f) | 0x80;
        // One of these is made for each entry of a batch, so it is written digit by digit and not through `format!`.
        let mut text = String::with_capacity(36);
        for (place, byte) in b.into_iter().enumerate() {
            if matches!(place, 4 | 6 | 8 | 10) {
                text.push('-');
            }
            for digit in [byte >> 4, byte & 15] {
                text.push(char::from_digit(u32::from(digit), 16).unwrap_or('0'));
            }
        }
        text
    }

    /// `length` characters out of `A-Za-z0-9`, each equally likely.
    pub fn alphanumeric(&self, length: usize) -> String {
        let mut text = String::with_capacity(length);
        while text.len() < length {
            for byte in self.bytes::<32>() {
                // 248 is the largest multiple of 62 below 256: what is above would favour the first letters.
                if byte < 248 && text.len() < length {
                    text.push(char::from(ALPHANUMERIC[usize::from(byte) % ALPHANUMERIC.len()]));
                }
            }
        }
        text
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014).
fn split_mix(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeded_repeats_and_clones_continue() {
        let one = Entropy::seeded(7);
        let two = Entropy::seeded(7);
        assert_eq!(one.u64(), two.u64());
        let clone = one.clone();
        let (first, second) = (two.u64(), two.u64());
        assert_eq!((clone.u64(), one.u64()), (first, second));
        // The reference sequence of SplitMix64 for seed 0.
        assert_eq!(Entropy::seeded(0).u64(), 0xe220_a839_7b1d_cdaf);
    }

    #[test]
    fn system_differs() {
        let entropy = Entropy::system();
        assert_ne!(entropy.bytes::<32>(), entropy.bytes::<32>());
    }

    #[test]
    fn uuid_has_version_and_variant() {
        for _ in 0..100 {
            let uuid = Entropy::system().uuid_v4();
            assert_eq!(uuid.len(), 36);
            assert_eq!(uuid.as_bytes()[14], b'4');
            assert!(b"89ab".contains(&uuid.as_bytes()[19]));
            assert_eq!(uuid.matches('-').count(), 4);
            assert!([8, 13, 18, 23].into_iter().all(|place| uuid.as_bytes()[place] == b'-'));
        }
    }

    #[test]
    fn alphanumeric_has_the_length_and_letters() {
        let text = Entropy::seeded(1).alphanumeric(1000);
        assert_eq!(text.len(), 1000);
        assert!(text.bytes().all(|byte| byte.is_ascii_alphanumeric()));
        assert_eq!(Entropy::seeded(1).alphanumeric(0), "");
    }

    #[test]
    fn unit_stays_below_one() {
        let entropy = Entropy::seeded(3);
        assert!((0..1000).map(|_| entropy.unit()).all(|value| (0.0..1.0).contains(&value)));
    }
}
