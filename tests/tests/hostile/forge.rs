//! Credentials that the trust domain's own keys have signed and no server would: as if somebody had them all.

use anyhow::{Context, Result};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use e2e::testkit::{Presented, Server};
use rcgen::{CertificateParams, CustomExtension, ExtendedKeyUsagePurpose, Issuer, KeyPair, KeyUsagePurpose};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde_json::{Value, json};
use spiffe::bundle::Bundle;
use spiffe::id::TrustDomain;
use spiffe::x509::{Certificate, PrivateKey};

/// The active keys of a server's authority, read from its key file.
pub struct Forge {
    root: Vec<u8>,
    x509_key: Vec<u8>,
    jwt_key: Vec<u8>,
    key_id: String,
}

impl Forge {
    pub fn of(server: &Server) -> Result<Self> {
        let document = server.ok(&["bundle", "show", "-format", "spiffe"])?;
        let trust_domain = TrustDomain::parse(&server.trust_domain)?;
        let (bundle, _) = Bundle::from_spiffe_json(trust_domain, document.as_bytes())?;
        let root = bundle.x509.last().context("no X.509 authority")?.der.clone();
        let jwt = bundle.jwt.last().context("no JWT authority")?;
        let file: Value = serde_json::from_slice(&std::fs::read(server.folder().join("data/keys.json"))?)?;
        let keys = file["keys"].as_object().context("no keys")?.values();
        let keys: Vec<Vec<u8>> = keys.filter_map(|key| STANDARD.decode(key.as_str()?).ok()).collect();
        let key_of = |spki: &[u8]| {
            let found = keys.iter().find(|key| {
                PrivateKey::from_pkcs8((*key).clone()).is_ok_and(|key| key.public_key().spki_der() == spki)
            });
            found.cloned().context("the key file does not hold the key")
        };
        let spki = Certificate::parse(root.clone())?.spki_der;
        Ok(Self {
            x509_key: key_of(&spki)?,
            jwt_key: key_of(&jwt.public_key)?,
            key_id: jwt.key_id.to_string(),
            root: root.to_vec(),
        })
    }

    /// A certificate that is good but for its URI names, which are these bytes.
    pub fn certificate(&self, uris: &[&[u8]]) -> Result<Presented> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        params.distinguished_name.push(rcgen::DnType::CommonName, "forged");
        params.is_ca = rcgen::IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let now = time::OffsetDateTime::now_utc();
        (params.not_before, params.not_after) = (now - time::Duration::MINUTE, now + time::Duration::HOUR);
        let names: Vec<u8> = uris.iter().flat_map(|uri| der(0x86, uri)).collect();
        let names = CustomExtension::from_oid_content(&[2, 5, 29, 17], der(0x30, &names));
        params.custom_extensions = vec![names];
        let signing = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(self.x509_key.as_slice()));
        let signing = KeyPair::from_der_and_sign_algo(&signing, &rcgen::PKCS_ECDSA_P256_SHA256)?;
        let issuer = Issuer::from_ca_cert_der(&CertificateDer::from(self.root.as_slice()), signing)?;
        let leaf = params.signed_by(&key, &issuer)?;
        Ok(Presented { chain: vec![leaf.der().to_vec()], key: key.serialize_der() })
    }

    /// A token that is good but for its subject.
    pub fn token(&self, subject: &str) -> Result<String> {
        let exp = time::OffsetDateTime::now_utc().unix_timestamp() + 600;
        let header = json!({"alg": "ES256", "kid": self.key_id, "typ": "JWT"});
        let claims = json!({"sub": subject, "aud": ["svc"], "exp": exp, "iat": exp - 600});
        let encode = |value: &Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let signed = format!("{}.{}", encode(&header), encode(&claims));
        let key = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &self.jwt_key)?;
        let signature = key.sign(&SystemRandom::new(), signed.as_bytes())?;
        Ok(format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature)))
    }
}

/// One DER element.
pub fn der(tag: u8, content: &[u8]) -> Vec<u8> {
    let mut element = vec![tag];
    let length = content.len().to_be_bytes();
    match content.len() {
        0..=127 => element.push(length[7]),
        128..=255 => element.extend([0x81, length[7]]),
        256..=0xffff => element.extend([0x82, length[6], length[7]]),
        _ => element.extend([0x83, length[5], length[6], length[7]]),
    }
    element.extend_from_slice(content);
    element
}
