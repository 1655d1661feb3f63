//! SPIFFE values and rules: identifiers, selectors, SVIDs, bundles, verification, renewal.
//!
//! Everything here is a function of values. `now` and randomness are passed in; nothing opens a
//! file or a socket, reads a clock, or waits. What the standards demand is cited as document and
//! section beside the code that keeps it.

pub mod attest;
pub mod bundle;
mod der;
pub mod id;
mod json;
pub mod jwt;
pub mod renew;
pub mod selector;
pub mod verify;
pub mod view;
pub mod x509;

pub use json::{JsonError, Object, from_object};

/// Lower-case hexadecimal.
pub(crate) fn hex(bytes: &[u8]) -> String {
    const DIGITS: [char; 16] = ['0', '1', '2', '3', '4', '5', '6', '7', '8', '9', 'a', 'b', 'c', 'd', 'e', 'f'];
    bytes.iter().flat_map(|byte| [DIGITS[usize::from(byte >> 4)], DIGITS[usize::from(byte & 15)]]).collect()
}

#[cfg(test)]
mod testing;
