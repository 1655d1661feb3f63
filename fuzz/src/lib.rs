//! What the targets share: a trust domain with fixed keys, and just enough DER to sign what a target was given.
//!
//! A fuzzer cannot forge signatures, so a target that lies behind one takes what was signed and signs it itself.

use std::sync::{Arc, LazyLock};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::agreement::{ECDH_P256, PrivateKey};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, EcdsaSigningAlgorithm,
};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::TrustDomain;

/// The audience of every token.
pub const AUDIENCE: &str = "svc";
/// The key id of the trust domain's token key.
pub const KEY_ID: &str = "key";

const SEQUENCE: u8 = 0x30;
const ECDSA_SHA256: &[u8] = b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
const P256_KEY: &[u8] = b"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
/// Version 3, serial number 1.
const BEGINNING: &[u8] = b"\xa0\x03\x02\x01\x02\x02\x01\x01";
/// `CN=root`, as issuer and subject.
const NAME: &[u8] = b"\x30\x0f\x31\x0d\x30\x0b\x06\x03\x55\x04\x03\x0c\x04root";
/// 2020 to 2049.
const VALIDITY: &[u8] = b"\x30\x1e\x17\x0d200101000000Z\x17\x0d490101000000Z";
/// One extension; the last byte of its object identifier tells it from others of its arc.
fn extension(kind: u8, critical: bool, value: &[u8]) -> Vec<u8> {
    let critical: &[u8] = if critical { &[1, 1, 0xff] } else { &[] };
    wrap(SEQUENCE, &[&[6, 3, 0x55, 0x1d, kind], critical, &wrap(4, value)].concat())
}

/// The moment at which everything happens: 2027-01-15.
pub fn now() -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

/// The trust domain that everything belongs to.
pub fn trust_domain() -> TrustDomain {
    TrustDomain::parse("example.org").expect("a legal name")
}

/// A P-256 key that is the same in every run, so that what was found is found again.
pub struct FixedKey {
    secret: [u8; 32],
    point: Vec<u8>,
}

impl FixedKey {
    /// The key whose private number is `fill` 32 times.
    pub fn new(fill: u8) -> Self {
        let secret = [fill; 32];
        let key = PrivateKey::from_private_key(&ECDH_P256, &secret).expect("a number below the order");
        let point = key.compute_public_key().expect("a public key").as_ref().to_vec();
        Self { secret, point }
    }

    /// SubjectPublicKeyInfo, DER.
    pub fn spki(&self) -> Vec<u8> {
        let bits = wrap(0x03, &[&[0], self.point.as_slice()].concat());
        wrap(SEQUENCE, &[P256_KEY, &bits].concat())
    }

    fn sign(&self, algorithm: &'static EcdsaSigningAlgorithm, message: &[u8]) -> Vec<u8> {
        let pair = EcdsaKeyPair::from_private_key_and_public_key(algorithm, &self.secret, &self.point);
        let signature = pair.expect("a pair").sign(&SystemRandom::new(), message).expect("a signature");
        signature.as_ref().to_vec()
    }

    /// A certificate or request whose signed part is `signed`, whatever it is.
    pub fn certify(&self, signed: &[u8]) -> Bytes {
        let signature = self.sign(&ECDSA_P256_SHA256_ASN1_SIGNING, signed);
        let bits = wrap(0x03, &[&[0], signature.as_slice()].concat());
        wrap(SEQUENCE, &[signed, ECDSA_SHA256, &bits].concat()).into()
    }

    /// A token of this header and these claims, whatever they are.
    pub fn token(&self, header: &[u8], claims: &[u8]) -> String {
        let signed = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(claims));
        let signature = self.sign(&ECDSA_P256_SHA256_FIXED_SIGNING, signed.as_bytes());
        format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature))
    }
}

/// The key that signs certificates and tokens.
pub static ROOT: LazyLock<FixedKey> = LazyLock::new(|| FixedKey::new(0x11));
/// The key of an authority between root and leaf, and of a leaf.
pub static OTHER: LazyLock<FixedKey> = LazyLock::new(|| FixedKey::new(0x22));

/// The bundle that all verification is against.
pub static BUNDLE: LazyLock<Arc<Bundle>> = LazyLock::new(|| {
    let authority = extension(0x13, true, &wrap(SEQUENCE, &[1, 1, 0xff]));
    let signs_certificates = extension(0x0f, true, &[3, 2, 2, 4]);
    let name = extension(0x11, false, &wrap(SEQUENCE, &wrap(0x86, trust_domain().id_string().as_bytes())));
    let extensions = wrap(0xa3, &wrap(SEQUENCE, &[authority, signs_certificates, name].concat()));
    let signed = [BEGINNING, ECDSA_SHA256, NAME, VALIDITY, NAME, &ROOT.spki(), &extensions].concat();
    let root = ROOT.certify(&wrap(SEQUENCE, &signed));
    let key = JwtAuthority { key_id: KEY_ID.into(), public_key: ROOT.spki().into(), expires_at: None, tainted: false };
    Arc::new(Bundle {
        x509: vec![X509Authority { der: root, tainted: false }],
        jwt: vec![key],
        ..Bundle::empty(trust_domain())
    })
});

/// One DER element.
pub fn wrap(tag: u8, content: &[u8]) -> Vec<u8> {
    let length = content.len().to_be_bytes();
    let length = &length[length.iter().take_while(|byte| **byte == 0).count()..];
    let mut element = vec![tag];
    match content.len() {
        0..=127 => element.push(content.len() as u8),
        _ => {
            element.push(0x80 | length.len() as u8);
            element.extend_from_slice(length);
        }
    }
    element.extend_from_slice(content);
    element
}

/// Cuts input in two at the length that its first two bytes tell, as far as it goes.
pub fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    match data {
        [high, low, rest @ ..] => rest.split_at(usize::from(u16::from_be_bytes([*high, *low])).min(rest.len())),
        short => (short, &[]),
    }
}
