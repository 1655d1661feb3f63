//! Just enough DER to write public keys and signatures.

use crate::x509::Curve;

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const BIT_STRING: u8 = 0x03;
/// id-ecPublicKey, then the curve (RFC 5480, section 2.1.1).
const EC_P256: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const EC_P384: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x22";
const EC_P521: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x05\x2b\x81\x04\x00\x23";
/// rsaEncryption with NULL parameters (RFC 3279, section 2.3.1).
const RSA: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";

/// id-Ed25519 (RFC 8410, section 3).
const ED25519: &[u8] = b"\x06\x03\x2b\x65\x70";

pub(crate) fn ec_spki(curve: Curve, x: &[u8], y: &[u8]) -> Vec<u8> {
    point_spki(curve, &[&[4], x, y].concat())
}

pub(crate) fn point_spki(curve: Curve, point: &[u8]) -> Vec<u8> {
    let algorithm = match curve {
        Curve::P256 => EC_P256,
        Curve::P384 => EC_P384,
        Curve::P521 => EC_P521,
    };
    spki(algorithm, point)
}

pub(crate) fn ed25519_spki(key: &[u8]) -> Vec<u8> {
    spki(ED25519, key)
}

pub(crate) fn rsa_spki(n: &[u8], e: &[u8]) -> Vec<u8> {
    let numbers = [integer(n), integer(e)].concat();
    spki(RSA, &wrap(SEQUENCE, &numbers))
}

fn spki(algorithm: &[u8], key: &[u8]) -> Vec<u8> {
    let bits = [&[0], key].concat();
    wrap(SEQUENCE, &[wrap(SEQUENCE, algorithm), wrap(BIT_STRING, &bits)].concat())
}

pub(crate) fn integer(bytes: &[u8]) -> Vec<u8> {
    let digits = crate::x509::without_leading_zeros(bytes);
    match digits.first() {
        // A leading zero keeps the number positive, and stands for the number zero.
        None | Some(0x80..) => wrap(INTEGER, &[&[0], digits].concat()),
        Some(_) => wrap(INTEGER, digits),
    }
}

pub(crate) fn wrap(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut out = vec![tag];
    let length = content.len().to_be_bytes();
    let length = crate::x509::without_leading_zeros(&length);
    match length {
        [] => out.push(0),
        [short] if *short < 0x80 => out.push(*short),
        long => {
            out.push(0x80 | long.len().to_le_bytes()[0]);
            out.extend_from_slice(long);
        }
    }
    out.extend_from_slice(content);
    out
}

/// An ECDSA-Sig-Value (RFC 3279, section 2.2.3) of two big-endian numbers.
pub(crate) fn ecdsa_signature(r: &[u8], s: &[u8]) -> Vec<u8> {
    wrap(SEQUENCE, &[integer(r), integer(s)].concat())
}
