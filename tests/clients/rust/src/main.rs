//! A workload written with the `spiffe` crate; `../README.md` says what it prints.

use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use spiffe::{JwtBundleSet, JwtSource, JwtSvid, WorkloadApiClient, X509BundleSet, X509Context, X509Source};
use tokio::io::AsyncReadExt;
use x509_parser::prelude::{FromDer, X509Certificate};

type Outcome = Result<(), Box<dyn Error>>;

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let outcome = match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["once", audience] => match tokio::time::timeout(Duration::from_secs(20), once(audience)).await {
            Ok(outcome) => outcome,
            Err(late) => Err(late.into()),
        },
        ["watch"] => watch().await,
        _ => Err("usage: once AUDIENCE | watch".into()),
    };
    match outcome {
        Ok(()) => {
            report(&json!({"event": "end"}));
            ExitCode::SUCCESS
        }
        Err(error) => {
            report(&json!({"event": "error", "text": error.to_string()}));
            ExitCode::FAILURE
        }
    }
}

fn report(event: &Value) {
    let mut output = std::io::stdout().lock();
    // Whoever reads has gone when this fails.
    let _ = writeln!(output, "{event}").and_then(|()| output.flush());
}

async fn once(audience: &str) -> Outcome {
    let client = WorkloadApiClient::connect_env().await?;
    let context = client.fetch_x509_context().await?;
    report_x509_svids(&context)?;
    report_x509_bundles(&client.fetch_x509_bundles().await?);
    let jwt = client.fetch_jwt_svid([audience], None).await?;
    report(&json!({
        "event": "jwt_svid", "id": jwt.spiffe_id().to_string(), "audience": jwt.audience(),
        "expires_at": jwt.expiry().unix_timestamp(),
    }));
    let bundles = client.fetch_jwt_bundles().await?;
    report_jwt_bundles(&bundles);
    let valid = client.validate_jwt_token(audience, jwt.token()).await?;
    report(&json!({"event": "jwt_valid", "id": valid.spiffe_id().to_string(), "by": "agent"}));
    let verified = JwtSvid::parse_and_validate(jwt.token(), &bundles, &[audience])?;
    report(&json!({"event": "jwt_valid", "id": verified.spiffe_id().to_string(), "by": "library"}));
    Ok(())
}

async fn watch() -> Outcome {
    let x509 = X509Source::new().await?;
    let jwt = JwtSource::new().await?;
    let (mut x509_updates, mut jwt_updates) = (x509.updated(), jwt.updated());
    report_x509_context(&x509)?;
    report_jwt_bundles(&*jwt.bundle_set()?);
    let mut input = tokio::io::stdin();
    let mut ignored = [0; 64];
    loop {
        tokio::select! {
            read = input.read(&mut ignored) => if read? == 0 { return Ok(()) },
            updated = x509_updates.changed() => { updated?; report_x509_context(&x509)?; }
            updated = jwt_updates.changed() => { updated?; report_jwt_bundles(&*jwt.bundle_set()?); }
        }
    }
}

fn report_x509_context(source: &X509Source) -> Outcome {
    let context = source.x509_context()?;
    report_x509_bundles(context.bundle_set());
    report_x509_svids(&context)
}

fn report_x509_svids(context: &X509Context) -> Outcome {
    for svid in context.svids() {
        let (_, leaf) = X509Certificate::from_der(svid.leaf().as_bytes())?;
        report(&json!({
            "event": "x509_svid", "id": svid.spiffe_id().to_string(), "serial": leaf.tbs_certificate.serial.to_string(),
            "not_after": leaf.validity().not_after.timestamp(),
        }));
    }
    Ok(())
}

fn report_x509_bundles(bundles: &X509BundleSet) {
    for (trust_domain, bundle) in bundles.iter() {
        report(&json!({
            "event": "x509_bundle", "trust_domain": trust_domain.to_string(), "authorities": bundle.authorities().len(),
        }));
    }
}

fn report_jwt_bundles(bundles: &JwtBundleSet) {
    for (trust_domain, bundle) in bundles.iter() {
        let mut keys: Vec<&str> = bundle.jwt_authorities().map(|authority| authority.key_id()).collect();
        keys.sort_unstable();
        report(&json!({"event": "jwt_bundle", "trust_domain": trust_domain.to_string(), "keys": keys}));
    }
}
