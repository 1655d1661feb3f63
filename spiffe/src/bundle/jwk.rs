//! One key of a JWK set (RFC 7517, RFC 7518 section 6, RFC 8037).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64URL;
use bytes::Bytes;
use serde_json::{Map, Value};

use crate::der;
use crate::x509::{Curve, KeyKind, PublicKey};

/// What became of the key members of an element.
pub(super) enum JwkKey {
    /// A key that is served.
    Key(PublicKey),
    /// Well formed as far as it is understood, but of a kind or size that is not served.
    Unserved,
    /// Malformed.
    Malformed,
}

/// Adds `kty` and the public members of `key`, `kid` between them: the order in which SPIRE
/// writes them.
pub(super) fn write_key(members: &mut Map<String, Value>, key: &PublicKey, key_id: Option<&str>) {
    let mut set = |name: &str, value: String| {
        members.insert(name.to_owned(), Value::String(value));
    };
    let raw = key.raw();
    match key.kind() {
        KeyKind::Ec(curve) => {
            set("kty", "EC".to_owned());
            key_id.into_iter().for_each(|id| set("kid", id.to_owned()));
            set("crv", curve_name(curve).to_owned());
            // The first byte says "uncompressed"; both coordinates are of equal length.
            let point = raw.get(1..).unwrap_or_default();
            let (x, y) = point.split_at(point.len() / 2);
            set("x", BASE64URL.encode(x));
            set("y", BASE64URL.encode(y));
        }
        KeyKind::Ed25519 => {
            set("kty", "OKP".to_owned());
            key_id.into_iter().for_each(|id| set("kid", id.to_owned()));
            set("crv", "Ed25519".to_owned());
            set("x", BASE64URL.encode(raw));
        }
        KeyKind::Rsa { .. } => {
            let (n, e) = key.rsa_numbers().unwrap_or_default();
            set("kty", "RSA".to_owned());
            key_id.into_iter().for_each(|id| set("kid", id.to_owned()));
            set("n", BASE64URL.encode(n));
            set("e", BASE64URL.encode(e));
        }
    }
}

fn curve_name(curve: Curve) -> &'static str {
    match curve {
        Curve::P256 => "P-256",
        Curve::P384 => "P-384",
        Curve::P521 => "P-521",
    }
}

/// Reads the public key of an element whose `kty` is EC or RSA.
pub(super) fn read_key(kind: &str, members: &Map<String, Value>) -> JwkKey {
    let bytes = |name: &str| members.get(name).and_then(Value::as_str).and_then(|text| BASE64URL.decode(text).ok());
    let spki = match kind {
        "EC" => {
            let Some(curve) = members.get("crv").and_then(Value::as_str) else { return JwkKey::Malformed };
            let (curve, size) = match curve {
                "P-256" => (Curve::P256, 32),
                "P-384" => (Curve::P384, 48),
                "P-521" => (Curve::P521, 66),
                _ => return JwkKey::Unserved,
            };
            let (Some(x), Some(y)) = (bytes("x"), bytes("y")) else { return JwkKey::Malformed };
            // RFC 7518, section 6.2.1.2: always the full size of a coordinate.
            if x.len() != size || y.len() != size {
                return JwkKey::Malformed;
            }
            der::ec_spki(curve, &x, &y)
        }
        _ => {
            let (Some(n), Some(e)) = (bytes("n"), bytes("e")) else { return JwkKey::Malformed };
            der::rsa_spki(&n, &e)
        }
    };
    let Ok(key) = PublicKey::from_spki(&Bytes::from(spki)) else { return JwkKey::Malformed };
    if key.check_strength().is_err() {
        return JwkKey::Unserved;
    }
    if key.check_point().is_err() { JwkKey::Malformed } else { JwkKey::Key(key) }
}
