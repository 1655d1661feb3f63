//! `x509 mint` and `jwt mint`.

use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use runtime::clock::Clock;
use runtime::console::{Output, Screen, rfc3339};
use runtime::{duration, keyfile};
use spiffe::bundle::certificates_to_pem;
use spiffe::id::SpiffeId;
use spiffe::x509::{KeyType, PrivateKey};
use spiffe_proto::bundle::GetBundleRequest;
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::svid::svid_client::SvidClient;
use spiffe_proto::svid::{MintJwtsvidRequest, MintX509svidRequest};
use spiffe_proto::types::Spiffeid;
use zeroize::Zeroizing;

use super::client::{Common, Connection, SocketFlags, id, json};
use super::error::{CliError, step};

/// The way to the server and whole seconds cost up to this much of a lifetime.
const UNAVOIDABLE_LOSS: Duration = Duration::from_secs(2);

/// Mint X.509-SVIDs by hand.
#[derive(Debug, clap::Subcommand)]
pub(super) enum X509 {
    /// Mint an X.509-SVID with a new key.
    Mint {
        #[command(flatten)]
        common: Common,
        /// SPIFFE ID of the SVID.
        #[arg(long = "spiffeID", value_name = "ID", default_value = "", hide_default_value = true)]
        spiffe_id: String,
        /// Lifetime, such as 30m; the server's default without it.
        #[arg(long = "ttl", value_name = "DURATION", default_value = "0s")]
        ttl: String,
        /// DNS name of the SVID; can be given more than once.
        #[arg(long = "dns", value_name = "NAME")]
        dns_names: Vec<String>,
        /// Directory to write svid.pem, key.pem and bundle.pem to, instead of standard output.
        #[arg(long = "write", value_name = "DIRECTORY")]
        write: Option<PathBuf>,
    },
}

/// Mint JWT-SVIDs by hand.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Jwt {
    /// Mint a JWT-SVID.
    Mint {
        #[command(flatten)]
        common: Common,
        /// SPIFFE ID of the SVID.
        #[arg(long = "spiffeID", value_name = "ID", default_value = "", hide_default_value = true)]
        spiffe_id: String,
        /// Lifetime, such as 5m; the server's default without it.
        #[arg(long = "ttl", value_name = "DURATION", default_value = "0s")]
        ttl: String,
        /// Audience of the SVID; can be given more than once.
        #[arg(long = "audience", value_name = "NAME")]
        audience: Vec<String>,
        /// File to write the token to, instead of standard output.
        #[arg(long = "write", value_name = "FILE")]
        write: Option<PathBuf>,
    },
}

impl X509 {
    pub(super) fn socket(&self) -> &SocketFlags {
        let Self::Mint { common, .. } = self;
        &common.socket
    }
}

impl Jwt {
    pub(super) fn socket(&self) -> &SocketFlags {
        let Self::Mint { common, .. } = self;
        &common.socket
    }
}

/// A lifetime, and the same in whole seconds, rounded up.
fn lifetime(text: &str) -> Result<(Duration, i32), CliError> {
    let ttl = duration::parse(text).map_err(|source| CliError::Duration { source })?;
    let seconds = ttl.as_secs() + u64::from(ttl.subsec_nanos() > 0);
    let seconds = i32::try_from(seconds).map_err(|_| CliError::Flags("invalid value for TTL: out of range"))?;
    Ok((ttl, seconds))
}

/// Says so if what was issued lives shorter than asked.
fn warn_if_capped(what: &str, expires_at: i64, ttl: Duration, now: SystemTime, screen: &mut Screen) {
    let seconds = u64::try_from(expires_at).unwrap_or(0);
    let end = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    let left = end.and_then(|end| end.duration_since(now).ok()).unwrap_or_default();
    if left + UNAVOIDABLE_LOSS < ttl {
        let end = rfc3339(expires_at);
        screen.error_line(format!("{what} lifetime was capped shorter than specified ttl; expires {end:?}"));
    }
}

/// What was minted.
struct Minted {
    chain: Vec<Bytes>,
    key: PrivateKey,
    roots: Vec<Bytes>,
}

pub(super) async fn x509(command: &X509, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let X509::Mint { common, spiffe_id, ttl, dns_names, write } = command;
    if spiffe_id.is_empty() {
        return Err(CliError::Flags("spiffeID must be specified"));
    }
    let id = SpiffeId::parse(spiffe_id).map_err(|source| CliError::Id { what: format!("{spiffe_id:?}"), source })?;
    let (ttl, seconds) = lifetime(ttl)?;
    let key = PrivateKey::generate(KeyType::EcP256).map_err(|source| CliError::Key { source })?;
    let csr = certificate_request(&key, &id, dns_names).map_err(|source| CliError::Request { source })?;
    let channel = connection.open().await?;
    let answer = SvidClient::new(channel.clone()).mint_x509svid(MintX509svidRequest { csr, ttl: seconds }).await;
    let svid = answer.map_err(step("unable to mint SVID"))?.into_inner().svid.unwrap_or_default();
    if svid.cert_chain.is_empty() {
        return Err(CliError::Missing("SVID chain"));
    }
    let bundle = BundleClient::new(channel).get_bundle(GetBundleRequest::default()).await;
    let bundle = bundle.map_err(step("unable to get bundle"))?.into_inner();
    if bundle.x509_authorities.is_empty() {
        return Err(CliError::Missing("X509 Authorities"));
    }
    warn_if_capped("X509-SVID", svid.expires_at, ttl, Clock::system().now(), screen);
    let roots = bundle.x509_authorities.into_iter().map(|authority| authority.asn1).collect();
    let minted = Minted { chain: svid.cert_chain, key, roots };
    match (write, common.output) {
        (Some(directory), _) => minted.write(directory, screen),
        (None, Output::Json) => minted.json(screen),
        (None, Output::Pretty) => {
            minted.pretty(screen);
            Ok(())
        }
    }
}

fn certificate_request(key: &PrivateKey, id: &SpiffeId, dns_names: &[String]) -> Result<Bytes, rcgen::Error> {
    let pair = KeyPair::try_from(key.expose_pkcs8())?;
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names.push(SanType::URI(id.as_str().try_into()?));
    for name in dns_names {
        params.subject_alt_names.push(SanType::DnsName(name.as_str().try_into()?));
    }
    Ok(Bytes::copy_from_slice(params.serialize_request(&pair)?.der()))
}

impl Minted {
    fn pretty(&self, screen: &mut Screen) {
        screen.line(format!("X509-SVID:\n{}", certificates_to_pem(&self.chain)));
        screen.line(format!("Private key:\n{}", self.key.expose_pem().as_str()));
        screen.line(format!("Root CAs:\n{}", certificates_to_pem(&self.roots)));
    }

    fn json(&self, screen: &mut Screen) -> Result<(), CliError> {
        #[derive(serde::Serialize)]
        struct Shown<'m> {
            x509_svid: Vec<String>,
            private_key: &'m str,
            root_cas: Vec<String>,
        }
        let encode = |certificates: &[Bytes]| certificates.iter().map(|der| STANDARD.encode(der)).collect();
        let key = Zeroizing::new(STANDARD.encode(self.key.expose_pkcs8()));
        let shown = Shown { x509_svid: encode(&self.chain), private_key: &key, root_cas: encode(&self.roots) };
        screen.line(serde_json::to_string(&shown).map_err(|source| CliError::Json { source })?);
        Ok(())
    }

    fn write(&self, directory: &Path, screen: &mut Screen) -> Result<(), CliError> {
        let public = |path: &Path, text: String, what: &'static str| {
            std::fs::write(path, text).map_err(|source| CliError::File { what, path: path.to_owned(), source })
        };
        let svid = directory.join("svid.pem");
        public(&svid, certificates_to_pem(&self.chain), "unable to write SVID to")?;
        screen.line(format!("X509-SVID written to {}", svid.display()));
        let key = directory.join("key.pem");
        keyfile::write(&key, self.key.expose_pem().as_bytes()).map_err(|source| CliError::KeyFile { source })?;
        screen.line(format!("Private key written to {}", key.display()));
        let bundle = directory.join("bundle.pem");
        public(&bundle, certificates_to_pem(&self.roots), "unable to write bundle to")?;
        screen.line(format!("Root CAs written to {}", bundle.display()));
        Ok(())
    }
}

pub(super) async fn jwt(command: &Jwt, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let Jwt::Mint { common, spiffe_id, ttl, audience, write } = command;
    if spiffe_id.is_empty() {
        return Err(CliError::Flags("spiffeID must be specified"));
    }
    if audience.is_empty() {
        return Err(CliError::Flags("at least one audience must be specified"));
    }
    let id: Spiffeid = id(spiffe_id)?;
    let (ttl, seconds) = lifetime(ttl)?;
    let request = MintJwtsvidRequest { id: Some(id), audience: audience.clone(), ttl: seconds };
    let answer = SvidClient::new(connection.open().await?).mint_jwtsvid(request).await;
    let answer = answer.map_err(step("unable to mint SVID"))?.into_inner();
    let Some(svid) = answer.svid.as_ref().filter(|svid| !svid.token.is_empty()) else {
        return Err(CliError::Missing("token"));
    };
    warn_if_capped("JWT-SVID", svid.expires_at, ttl, Clock::system().now(), screen);
    match (write, common.output) {
        (Some(path), _) => {
            keyfile::write(path, svid.token.as_bytes()).map_err(|source| CliError::KeyFile { source })?;
            screen.line(format!("JWT-SVID written to {}", path.display()));
        }
        (None, Output::Json) => json(screen, "spire.api.server.svid.v1.MintJWTSVIDResponse", &answer)?,
        (None, Output::Pretty) => screen.line(&svid.token),
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use spiffe::x509::Csr;

    use super::*;

    fn minted() -> Minted {
        Minted {
            chain: vec![Bytes::from_static(&[1]), Bytes::from_static(&[2])],
            key: PrivateKey::generate(KeyType::EcP256).unwrap(),
            roots: vec![Bytes::from_static(&[3])],
        }
    }

    fn pem(body: &str) -> String {
        format!("-----BEGIN CERTIFICATE-----\n{body}\n-----END CERTIFICATE-----\n")
    }

    #[test]
    fn golden_output() {
        let minted = minted();
        let mut screen = Screen::new();
        minted.pretty(&mut screen);
        let key = minted.key.expose_pem();
        let expected = format!(
            "X509-SVID:\n{}{}\nPrivate key:\n{}\nRoot CAs:\n{}\n",
            pem("AQ=="),
            pem("Ag=="),
            key.as_str(),
            pem("Aw==")
        );
        assert_eq!(screen.out, expected);
        assert!(key.starts_with("-----BEGIN PRIVATE KEY-----\n") && key.ends_with("-----END PRIVATE KEY-----\n"));
        let mut screen = Screen::new();
        minted.json(&mut screen).unwrap();
        let key = STANDARD.encode(minted.key.expose_pkcs8());
        let expected =
            format!("{{\"x509_svid\":[\"AQ==\",\"Ag==\"],\"private_key\":\"{key}\",\"root_cas\":[\"Aw==\"]}}\n");
        assert_eq!(screen.out, expected);
    }

    #[test]
    fn files_are_written() {
        let directory = tempfile::tempdir().unwrap();
        let minted = minted();
        let mut screen = Screen::new();
        minted.write(directory.path(), &mut screen).unwrap();
        let at = |name: &str| directory.path().join(name);
        let read = |name: &str| std::fs::read_to_string(at(name)).unwrap();
        assert_eq!(read("svid.pem"), pem("AQ==") + &pem("Ag=="));
        assert_eq!(read("bundle.pem"), pem("Aw=="));
        assert_eq!(keyfile::read(&at("key.pem")).unwrap().unwrap().as_slice(), minted.key.expose_pem().as_bytes());
        let expected = format!(
            "X509-SVID written to {}\nPrivate key written to {}\nRoot CAs written to {}\n",
            at("svid.pem").display(),
            at("key.pem").display(),
            at("bundle.pem").display()
        );
        assert_eq!(screen.out, expected);
        assert!(matches!(minted.write(&at("none"), &mut Screen::new()), Err(CliError::File { .. })));
    }

    #[test]
    fn the_request_has_id_and_names() {
        let key = PrivateKey::generate(KeyType::EcP256).unwrap();
        let id = SpiffeId::parse("spiffe://td/a").unwrap();
        let csr = Csr::parse(&certificate_request(&key, &id, &["b.org".to_owned()]).unwrap()).unwrap();
        csr.verify_signature().unwrap();
        assert_eq!((csr.uris, csr.dns_names), (vec!["spiffe://td/a".to_owned()], vec!["b.org".to_owned()]));
    }

    #[test]
    fn a_shorter_life_is_told() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000);
        let told = |expires_at, ttl| {
            let mut screen = Screen::new();
            warn_if_capped("X509-SVID", expires_at, Duration::from_secs(ttl), now, &mut screen);
            screen.err
        };
        assert_eq!(told(1_700_000_060, 60), "");
        assert_eq!(told(1_700_000_059, 60), "");
        assert_eq!(told(1_700_000_060, 0), "");
        let expected = "X509-SVID lifetime was capped shorter than specified ttl; expires \"2023-11-14T22:14:20Z\"\n";
        assert_eq!(told(1_700_000_060, 3600), expected);
    }

    #[test]
    fn lifetimes_are_rounded_up() {
        assert_eq!(lifetime("1m0.5s").unwrap(), (Duration::from_millis(60_500), 61));
        assert_eq!(lifetime("0s").unwrap().1, 0);
        assert!(matches!(lifetime("1"), Err(CliError::Duration { .. })));
        assert!(matches!(lifetime("1000000h"), Err(CliError::Flags(_))));
    }
}
