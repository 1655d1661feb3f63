//! CPU time, memory and percentiles, read from outside the process that is measured.

use std::time::Duration;

use anyhow::{Context, Result};

/// CPU time (user and system, all threads) that process `pid` has used so far.
pub fn cpu(pid: u32) -> Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).context("process has ended")?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("malformed stat")?.1.split_whitespace().collect();
    let ticks = |index: usize| -> Result<u64> { Ok(fields.get(index).context("short stat")?.parse()?) };
    // Clock ticks are hundredths of a second on Linux (sysconf(_SC_CLK_TCK) is 100 on every supported architecture).
    Ok(Duration::from_millis((ticks(11)? + ticks(12)?) * 10))
}

/// A field of `/proc/PID/status` in KiB: `VmRSS`, `VmHWM` (the peak) or `RssAnon`.
pub fn memory(pid: u32, field: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).context("process has ended")?;
    let line = status.lines().find(|line| line.starts_with(&format!("{field}:"))).context("no such field")?;
    Ok(line.split_whitespace().nth(1).context("short line")?.parse()?)
}

/// The value below which `share` (0 to 1) of the sorted `values` lie.
pub fn percentile(values: &mut [Duration], share: f64) -> Duration {
    values.sort_unstable();
    if values.is_empty() {
        return Duration::ZERO;
    }
    let index = ((values.len() - 1) as f64 * share).round() as usize;
    values.get(index).copied().unwrap_or_default()
}

/// The middle one of `values`.
pub fn median(values: &[f64]) -> f64 {
    let mut values: Vec<f64> = values.to_vec();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// CPU seconds of one CSR check and one P-256 signature of the crypto provider on this machine, now: the floor of an issuance.
pub fn floor() -> Result<Duration> {
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair, UnparsedPublicKey,
    };
    let random = aws_lc_rs::rand::SystemRandom::new();
    let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &random)?;
    let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, document.as_ref())?;
    let message = [7_u8; 300];
    let rounds: u32 = 4000;
    let before = own_cpu()?;
    for _ in 0..rounds {
        let signature = pair.sign(&random, &message)?;
        UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, pair.public_key().as_ref())
            .verify(&message, signature.as_ref())?;
    }
    Ok((own_cpu()? - before) / rounds)
}

/// CPU time of this thread so far.
pub fn own_cpu() -> Result<Duration> {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID)?;
    Ok(Duration::from(time))
}
