//! What hostile inputs cost whoever checks them, by the ids of the requirements that bound it.

use std::hint::black_box;
use std::iter::{once, repeat_n};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use anyhow::{Context, Result, ensure};
use aws_lc_rs::rand::SystemRandom;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Bytes;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    PublicKeyData as _, SanType, SigningKey,
};
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::verify::{PeerRole, jwt_svid, x509_chain};

use crate::stats;

const ID: &str = "spiffe://example.org/workload";

/// CPU time of the dearest of several inputs, and by how much memory grew.
pub struct Cost {
    /// CPU time of one check; the least of five, since the first one fills caches.
    pub cpu: Duration,
    /// Growth of the peak resident size, KiB.
    pub growth: u64,
}

/// H-11: SPIFFE IDs of a mebibyte, in one segment and in half a million.
///
/// # Errors
/// If one is accepted.
pub fn ids() -> Result<Cost> {
    let long = [format!("spiffe://example.org/{}", "a".repeat(1 << 20)), format!("{ID}{}", "/a".repeat(1 << 20))];
    dearest(long.iter().map(|text| move || ensure_refused(SpiffeId::parse(black_box(text)).is_err())))
}

/// H-27: chains that are long, that repeat themselves, whose certificates sign each other, or are one of 16 MiB.
///
/// # Errors
/// If one is accepted.
pub fn chains() -> Result<Cost> {
    let name = TrustDomain::parse("example.org")?;
    let now = SystemTime::now();
    let root = authority("root")?;
    let mut bundle = Bundle::empty(name);
    let der = Bytes::copy_from_slice(root.0.self_signed(&root.1)?.der());
    bundle.x509.push(X509Authority { der, tainted: false });

    let middle = authority("middle")?;
    let by = |(params, key): (CertificateParams, KeyPair)| Issuer::new(params, key);
    let root = by(root);
    let middle_der = Bytes::copy_from_slice(middle.0.signed_by(&middle.1, &root)?.der());
    let leaf = leaf(&by(middle))?;
    let mut huge = vec![0x30, 0x84, 1, 0, 0, 0];
    huge.resize(16 << 20, 0);
    let chains = [
        once(leaf.clone()).chain(repeat_n(middle_der.clone(), 99)).collect(),
        once(leaf.clone()).chain(repeat_n(middle_der, 500)).collect(),
        twins(6)?,
        twins(15)?,
        twins(1000)?,
        vec![leaf, Bytes::from(huge)],
    ];
    let bundle = &bundle;
    dearest(chains.iter().map(|chain: &Vec<Bytes>| {
        move || ensure_refused(x509_chain(black_box(chain), bundle, PeerRole::Client, now).is_err())
    }))
}

/// H-38: a token for 10,000 audiences, the right one last.
///
/// # Errors
/// If it is refused.
pub fn audiences() -> Result<Cost> {
    let key = KeyPair::generate()?;
    let mut bundle = Bundle::empty(TrustDomain::parse("example.org")?);
    bundle.jwt.push(JwtAuthority {
        key_id: Arc::from("key"),
        public_key: Bytes::from(key.subject_public_key_info()),
        expires_at: None,
        tainted: false,
    });
    let now = SystemTime::now();
    let expires = now.duration_since(SystemTime::UNIX_EPOCH)?.as_secs() + 300;
    let claims = format!(r#"{{"sub":"{ID}","aud":[{}"svc"],"exp":{expires}}}"#, r#""b","#.repeat(9_999));
    let mut token = URL_SAFE_NO_PAD.encode(r#"{"alg":"ES256","kid":"key","typ":"JWT"}"#);
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(claims, &mut token);
    let signer = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &key.serialize_der())?;
    let signature = signer.sign(&SystemRandom::new(), token.as_bytes())?;
    token.push('.');
    URL_SAFE_NO_PAD.encode_string(signature, &mut token);
    dearest(once(|| {
        let verified = jwt_svid(black_box(&token), "svc", &bundle, now)?;
        ensure!(verified.audience.len() == 10_000, "{} audiences", verified.audience.len());
        Ok(())
    }))
}

fn ensure_refused(refused: bool) -> Result<()> {
    ensure!(refused, "a hostile input was accepted");
    Ok(())
}

fn dearest<F: FnMut() -> Result<()>>(checks: impl Iterator<Item = F>) -> Result<Cost> {
    let pid = std::process::id();
    // The peak begins anew: what this process did before has raised it.
    std::fs::write("/proc/self/clear_refs", "5").context("the peak of memory cannot be reset")?;
    let before = stats::memory(pid, "VmHWM")?;
    let mut cpu = Duration::ZERO;
    for mut check in checks {
        let mut least = Duration::MAX;
        for _ in 0..5 {
            let began = stats::own_cpu()?;
            check()?;
            least = least.min(stats::own_cpu()? - began);
        }
        cpu = cpu.max(least);
    }
    Ok(Cost { cpu, growth: stats::memory(pid, "VmHWM")?.saturating_sub(before) })
}

fn authority(name: &str) -> Result<(CertificateParams, KeyPair)> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    params.distinguished_name.push(DnType::CommonName, name);
    Ok((params, KeyPair::generate()?))
}

fn leaf(by: &Issuer<'_, impl SigningKey>) -> Result<Bytes> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::ExplicitNoCa;
    params.subject_alt_names = vec![SanType::URI(ID.try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let key = KeyPair::generate()?;
    Ok(Bytes::copy_from_slice(params.signed_by(&key, by)?.der()))
}

/// A leaf and so many intermediates of one name, each signed by the next and the last by the first: none leads to a root.
fn twins(count: usize) -> Result<Vec<Bytes>> {
    let twins = (0..count).map(|_| authority("twin")).collect::<Result<Vec<_>>>()?;
    let issuers: Vec<Issuer<'_, &KeyPair>> =
        twins.iter().map(|(params, key)| Issuer::new(params.clone(), key)).collect();
    let mut chain = vec![leaf(issuers.first().context("no issuer")?)?];
    for (index, (params, key)) in twins.iter().enumerate() {
        let next = issuers.get((index + 1) % count).context("no issuer")?;
        chain.push(Bytes::copy_from_slice(params.signed_by(key, next)?.der()));
    }
    Ok(chain)
}
