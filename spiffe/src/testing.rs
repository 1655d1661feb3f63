//! Certificates, requests and tokens for tests, written byte by byte: hostile ones are made by no
//! library.

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{self as sig, EcdsaKeyPair};
use base64::Engine as _;
use bytes::Bytes;

use crate::bundle::{Bundle, JwtAuthority, X509Authority};
use crate::der::wrap;
use crate::id::TrustDomain;
use crate::x509::{KeyType, PrivateKey};

/// The time at which tests take place, in Unix seconds (2027-01-15).
pub(crate) const NOW: i64 = 1_800_000_000;

pub(crate) const SEQUENCE: u8 = 0x30;
pub(crate) const SET: u8 = 0x31;
pub(crate) const OCTETS: u8 = 0x04;
pub(crate) const URI: u8 = 0x86;
pub(crate) const DNS: u8 = 0x82;

pub(crate) const ECDSA_SHA256: &[u8] = b"\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
/// md5WithRSAEncryption
pub(crate) const RSA_MD5: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x04\x05\x00";
pub(crate) const ECDSA_SHA1: &[u8] = b"\x06\x07\x2a\x86\x48\xce\x3d\x04\x01";

pub(crate) const SKI: &[u8] = b"\x06\x03\x55\x1d\x0e";
pub(crate) const KEY_USAGE: &[u8] = b"\x06\x03\x55\x1d\x0f";
pub(crate) const SAN: &[u8] = b"\x06\x03\x55\x1d\x11";
pub(crate) const BASIC: &[u8] = b"\x06\x03\x55\x1d\x13";
pub(crate) const NAME_CONSTRAINTS: &[u8] = b"\x06\x03\x55\x1d\x1e";
pub(crate) const EKU: &[u8] = b"\x06\x03\x55\x1d\x25";
/// An extension that nobody knows.
pub(crate) const UNKNOWN: &[u8] = b"\x06\x04\x2a\x03\x04\x05";

pub(crate) const SERVER_AUTH: &[u8] = b"\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x01";
pub(crate) const CLIENT_AUTH: &[u8] = b"\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x02";
pub(crate) const CODE_SIGNING: &[u8] = b"\x06\x08\x2b\x06\x01\x05\x05\x07\x03\x03";

/// Key usage bits in the order of RFC 5280: bit 0 is the highest of the first byte.
pub(crate) const DIGITAL_SIGNATURE: u8 = 0x80;
pub(crate) const KEY_ENCIPHERMENT: u8 = 0x20;
pub(crate) const KEY_AGREEMENT: u8 = 0x08;
pub(crate) const CERT_SIGN: u8 = 0x04;
pub(crate) const CRL_SIGN: u8 = 0x02;

pub(crate) fn at(seconds: i64) -> SystemTime {
    let distance = Duration::from_secs(seconds.unsigned_abs());
    if seconds < 0 { UNIX_EPOCH - distance } else { UNIX_EPOCH + distance }
}

pub(crate) fn now() -> SystemTime {
    at(NOW)
}

pub(crate) fn trust_domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

pub(crate) fn new_key() -> PrivateKey {
    PrivateKey::generate(KeyType::EcP256).unwrap()
}

/// Signs with ECDSA P-256 and SHA-256, DER.
pub(crate) fn sign(key: &PrivateKey, message: &[u8]) -> Vec<u8> {
    let pair = EcdsaKeyPair::from_pkcs8(&sig::ECDSA_P256_SHA256_ASN1_SIGNING, key.expose_pkcs8()).unwrap();
    pair.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
}

pub(crate) fn seq(parts: &[&[u8]]) -> Vec<u8> {
    wrap(SEQUENCE, &parts.concat())
}

pub(crate) fn bit_string(bytes: &[u8]) -> Vec<u8> {
    wrap(0x03, &[&[0], bytes].concat())
}

pub(crate) fn name(common_name: &str) -> Vec<u8> {
    if common_name.is_empty() {
        return seq(&[]);
    }
    let attribute = seq(&[b"\x06\x03\x55\x04\x03", &wrap(0x0c, common_name.as_bytes())]);
    seq(&[&wrap(SET, &attribute)])
}

/// GeneralizedTime from 2050 on, UTCTime before, as RFC 5280 wants it.
pub(crate) fn time(seconds: i64) -> Vec<u8> {
    let date = time::OffsetDateTime::from_unix_timestamp(seconds).unwrap();
    let rest = format!(
        "{:02}{:02}{:02}{:02}{:02}Z",
        u8::from(date.month()),
        date.day(),
        date.hour(),
        date.minute(),
        date.second()
    );
    if date.year() < 2050 {
        wrap(0x17, format!("{:02}{rest}", date.year() % 100).as_bytes())
    } else {
        wrap(0x18, format!("{:04}{rest}", date.year()).as_bytes())
    }
}

/// One extension: object identifier, critical, content.
#[derive(Clone)]
pub(crate) struct Extension(pub(crate) &'static [u8], pub(crate) bool, pub(crate) Vec<u8>);

impl Extension {
    fn der(&self) -> Vec<u8> {
        let critical: &[u8] = if self.1 { &[1, 1, 0xff] } else { &[] };
        seq(&[self.0, critical, &wrap(OCTETS, &self.2)])
    }
}

pub(crate) fn basic(ca: bool, path_length: Option<u8>) -> Extension {
    let flag: &[u8] = if ca { &[1, 1, 0xff] } else { &[] };
    let limit = path_length.map(|limit| wrap(0x02, &[limit])).unwrap_or_default();
    Extension(BASIC, true, seq(&[flag, &limit]))
}

pub(crate) fn key_usage(bits: u8) -> Extension {
    Extension(KEY_USAGE, true, wrap(0x03, &[0, bits]))
}

pub(crate) fn usages(purposes: &[&[u8]]) -> Extension {
    Extension(EKU, false, seq(purposes))
}

pub(crate) fn names(entries: &[(u8, &[u8])]) -> Extension {
    let entries: Vec<Vec<u8>> = entries.iter().map(|(tag, bytes)| wrap(*tag, bytes)).collect();
    Extension(SAN, false, wrap(SEQUENCE, &entries.concat()))
}

pub(crate) fn uri(uri: &str) -> Extension {
    names(&[(URI, uri.as_bytes())])
}

/// What a certificate is to say.
#[derive(Clone)]
pub(crate) struct Template {
    pub(crate) version: Option<u8>,
    pub(crate) serial: Vec<u8>,
    pub(crate) subject: String,
    pub(crate) not_before: Vec<u8>,
    pub(crate) not_after: Vec<u8>,
    pub(crate) extensions: Vec<Extension>,
    pub(crate) algorithm: &'static [u8],
    pub(crate) spki: Vec<u8>,
}

impl Template {
    pub(crate) fn new(subject: &str, spki: &[u8]) -> Self {
        Self {
            version: Some(2),
            serial: vec![0x12, 0x34],
            subject: subject.to_owned(),
            not_before: time(NOW - 3600),
            not_after: time(NOW + 3600),
            extensions: Vec::new(),
            algorithm: ECDSA_SHA256,
            spki: spki.to_vec(),
        }
    }

    /// As a workload's certificate is issued.
    pub(crate) fn leaf(id: &str, key: &PrivateKey) -> Self {
        let mut template = Self::new("workload", key.public_key().spki_der());
        template.extensions = vec![
            key_usage(DIGITAL_SIGNATURE | KEY_ENCIPHERMENT | KEY_AGREEMENT),
            usages(&[SERVER_AUTH, CLIENT_AUTH]),
            basic(false, None),
            uri(id),
        ];
        template
    }

    pub(crate) fn authority(subject: &str, id: &str, key: &PrivateKey) -> Self {
        let mut template = Self::new(subject, key.public_key().spki_der());
        template.extensions = vec![key_usage(CERT_SIGN | CRL_SIGN), basic(true, None), uri(id)];
        template
    }

    /// Replaces the extension of the same kind, or adds it.
    pub(crate) fn with(mut self, extension: Extension) -> Self {
        self.extensions.retain(|known| known.0 != extension.0);
        self.extensions.push(extension);
        self
    }

    pub(crate) fn without(mut self, kind: &[u8]) -> Self {
        self.extensions.retain(|known| known.0 != kind);
        self
    }

    pub(crate) fn valid(mut self, from: i64, to: i64) -> Self {
        (self.not_before, self.not_after) = (time(from), time(to));
        self
    }

    pub(crate) fn signed(&self, issuer: &str, key: &PrivateKey) -> Bytes {
        let version = self.version.map(|version| wrap(0xa0, &wrap(0x02, &[version]))).unwrap_or_default();
        let extensions: Vec<u8> = self.extensions.iter().flat_map(Extension::der).collect();
        let extensions = if self.version.is_some() { wrap(0xa3, &wrap(SEQUENCE, &extensions)) } else { Vec::new() };
        let algorithm = seq(&[self.algorithm]);
        let body = seq(&[
            &version,
            &wrap(0x02, &self.serial),
            &algorithm,
            &name(issuer),
            &seq(&[&self.not_before, &self.not_after]),
            &name(&self.subject),
            &self.spki,
            &extensions,
        ]);
        Bytes::from(seq(&[&body, &algorithm, &bit_string(&sign(key, &body))]))
    }
}

/// An authority that signs for tests.
pub(crate) struct Authority {
    pub(crate) name: String,
    pub(crate) key: PrivateKey,
    pub(crate) certificate: Bytes,
}

impl Authority {
    pub(crate) fn root(trust_domain: &str) -> Self {
        Self::root_with(trust_domain, |template| template)
    }

    pub(crate) fn root_with(trust_domain: &str, change: impl FnOnce(Template) -> Template) -> Self {
        let key = new_key();
        let name = format!("root of {trust_domain}");
        let template = Template::authority(&name, &format!("spiffe://{trust_domain}"), &key);
        let certificate = change(template).signed(&name, &key);
        Self { name, key, certificate }
    }

    pub(crate) fn intermediate(&self, name: &str, change: impl FnOnce(Template) -> Template) -> Self {
        let key = new_key();
        let template = Template::authority(name, "spiffe://example.org", &key);
        let certificate = change(template).signed(&self.name, &self.key);
        Self { name: name.to_owned(), key, certificate }
    }

    pub(crate) fn sign(&self, template: &Template) -> Bytes {
        template.signed(&self.name, &self.key)
    }

    /// A good leaf of this authority.
    pub(crate) fn leaf(&self, id: &str) -> Bytes {
        self.sign(&Template::leaf(id, &new_key()))
    }

    pub(crate) fn bundle(&self, trust_domain: &str) -> Arc<Bundle> {
        let mut bundle = Bundle::empty(self::trust_domain(trust_domain));
        bundle.x509.push(X509Authority { der: self.certificate.clone(), tainted: false });
        Arc::new(bundle)
    }
}

/// A signing request with these extensions.
pub(crate) fn request(key: &PrivateKey, spki: &[u8], extensions: &[Extension], algorithm: &[u8]) -> Vec<u8> {
    let extensions: Vec<u8> = extensions.iter().flat_map(Extension::der).collect();
    let attribute = seq(&[b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x0e", &wrap(SET, &wrap(SEQUENCE, &extensions))]);
    let body = seq(&[&[2, 1, 0], &name("requester"), spki, &wrap(0xa0, &attribute)]);
    seq(&[&body, &seq(&[algorithm]), &bit_string(&sign(key, &body))])
}

/// A key that signs tokens, and its bundle.
pub(crate) struct Issuer {
    pub(crate) key: PrivateKey,
    pub(crate) key_id: String,
}

impl Issuer {
    pub(crate) fn new(key_id: &str) -> Self {
        Self { key: new_key(), key_id: key_id.to_owned() }
    }

    pub(crate) fn authority(&self) -> JwtAuthority {
        JwtAuthority {
            key_id: self.key_id.as_str().into(),
            public_key: self.key.public_key().spki_der().clone(),
            expires_at: None,
            tainted: false,
        }
    }

    pub(crate) fn bundle(&self, trust_domain: &str) -> Arc<Bundle> {
        let mut bundle = Bundle::empty(self::trust_domain(trust_domain));
        bundle.jwt.push(self.authority());
        Arc::new(bundle)
    }

    pub(crate) fn header(&self) -> String {
        format!(r#"{{"alg":"ES256","kid":"{}","typ":"JWT"}}"#, self.key_id)
    }

    /// A token of exactly these texts, signed by ES256 whatever they say.
    pub(crate) fn token(&self, header: &str, payload: &str) -> String {
        let signed = format!("{}.{}", base64url(header.as_bytes()), base64url(payload.as_bytes()));
        let signature = self.sign(signed.as_bytes());
        format!("{signed}.{}", base64url(&signature))
    }

    /// r and s side by side.
    pub(crate) fn sign(&self, message: &[u8]) -> Vec<u8> {
        let pair = EcdsaKeyPair::from_pkcs8(&sig::ECDSA_P256_SHA256_FIXED_SIGNING, self.key.expose_pkcs8()).unwrap();
        pair.sign(&SystemRandom::new(), message).unwrap().as_ref().to_vec()
    }
}

pub(crate) fn base64url(bytes: &[u8]) -> String {
    base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(bytes)
}
