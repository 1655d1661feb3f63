//! `bundle show`, `count`, `list`, `set`, `delete`.

use std::io::Read;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use runtime::console::{Output, Screen, plural};
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority, certificates_from_pem, certificates_to_pem};
use spiffe::id::TrustDomain;
use spiffe_proto::bundle::batch_delete_federated_bundle_request::Mode;
use spiffe_proto::bundle::bundle_client::BundleClient;
use spiffe_proto::bundle::{
    BatchDeleteFederatedBundleRequest, BatchSetFederatedBundleRequest, CountBundlesRequest, GetBundleRequest,
    GetFederatedBundleRequest, ListFederatedBundlesRequest,
};
use spiffe_proto::types::{self, Status};
use tonic::transport::Channel;

use super::client::{Common, Connection, MAX_ANSWER, SocketFlags, json};
use super::error::{CliError, step};

/// The largest bundle that is read from a file or standard input.
const MAX_BUNDLE: u64 = 16 << 20;

/// See and manage trust bundles.
#[derive(Debug, clap::Subcommand)]
pub(super) enum BundleCommand {
    /// Print the server's own bundle.
    Show {
        #[command(flatten)]
        common: Common,
        /// Form of the bundle with pretty output: pem or spiffe.
        #[arg(long = "format", value_name = "FORMAT", default_value = "pem")]
        format: String,
    },
    /// Count bundles, the own one included.
    Count {
        #[command(flatten)]
        common: Common,
    },
    /// Print bundles of other trust domains.
    List {
        #[command(flatten)]
        common: Common,
        /// Only the bundle of this trust domain.
        #[arg(long = "id", value_name = "TRUST_DOMAIN", default_value = "", hide_default_value = true)]
        id: String,
        /// Form of the bundles with pretty output: pem or spiffe.
        #[arg(long = "format", value_name = "FORMAT", default_value = "pem")]
        format: String,
    },
    /// Set the bundle of another trust domain.
    Set {
        #[command(flatten)]
        common: Common,
        /// The trust domain.
        #[arg(long = "id", value_name = "TRUST_DOMAIN", default_value = "", hide_default_value = true)]
        id: String,
        /// File of the bundle; standard input without it.
        #[arg(long = "path", value_name = "PATH")]
        path: Option<PathBuf>,
        /// Form of the bundle: pem or spiffe.
        #[arg(long = "format", value_name = "FORMAT", default_value = "pem")]
        format: String,
    },
    /// Delete the bundle of another trust domain.
    Delete {
        #[command(flatten)]
        common: Common,
        /// The trust domain.
        #[arg(long = "id", value_name = "TRUST_DOMAIN", default_value = "", hide_default_value = true)]
        id: String,
        /// What becomes of entries that federate with it: restrict (refuse if there are any), dissociate, or delete.
        #[arg(long = "mode", value_name = "MODE", default_value = "restrict")]
        mode: String,
    },
}

impl BundleCommand {
    fn common(&self) -> &Common {
        match self {
            Self::Show { common, .. }
            | Self::Count { common }
            | Self::List { common, .. }
            | Self::Set { common, .. }
            | Self::Delete { common, .. } => common,
        }
    }

    pub(super) fn socket(&self) -> &SocketFlags {
        &self.common().socket
    }
}

/// The forms in which bundles are read and shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    Pem,
    Spiffe,
}

fn form(text: &str) -> Result<Form, CliError> {
    match text.to_ascii_lowercase().as_str() {
        "" | "pem" => Ok(Form::Pem),
        "spiffe" => Ok(Form::Spiffe),
        _ => Err(CliError::Value { what: "invalid format:", value: text.to_owned() }),
    }
}

async fn client(connection: Connection) -> Result<BundleClient<Channel>, CliError> {
    Ok(BundleClient::new(connection.open().await?).max_decoding_message_size(MAX_ANSWER))
}

pub(super) async fn run(command: &BundleCommand, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let output = command.common().output;
    match command {
        BundleCommand::Show { format, .. } => {
            let form = form(format)?;
            let bundle = client(connection).await?.get_bundle(GetBundleRequest::default()).await?.into_inner();
            match output {
                Output::Json => json(screen, "spire.api.types.Bundle", &bundle),
                Output::Pretty => pretty(&bundle, form, screen),
            }
        }
        BundleCommand::Count { .. } => {
            let answer = client(connection).await?.count_bundles(CountBundlesRequest {}).await?.into_inner();
            match output {
                Output::Json => json(screen, "spire.api.server.bundle.v1.CountBundlesResponse", &answer),
                Output::Pretty => {
                    let count = usize::try_from(answer.count).unwrap_or(0);
                    screen.line(format!("{count} {}", plural(count, "bundle", "bundles")));
                    Ok(())
                }
            }
        }
        BundleCommand::List { id, format, .. } => list(id, form(format)?, output, connection, screen).await,
        BundleCommand::Set { id, path, format, .. } => {
            if id.is_empty() {
                return Err(CliError::Flags("id flag is required"));
            }
            let form = form(format)?;
            let text = read(path.as_ref())?;
            let bundle = vec![parse(id, form, &text)?];
            let request = BatchSetFederatedBundleRequest { bundle, output_mask: None };
            let answer = client(connection).await?.batch_set_federated_bundle(request).await;
            let answer = answer.map_err(step("failed to set federated bundle"))?.into_inner();
            if output == Output::Json {
                return json(screen, "spire.api.server.bundle.v1.BatchSetFederatedBundleResponse", &answer);
            }
            let status = answer.results.into_iter().next().and_then(|result| result.status);
            verdict(status, || "failed to set federated bundle".to_owned())?;
            screen.line("bundle set.");
            Ok(())
        }
        BundleCommand::Delete { id, mode, .. } => {
            if id.is_empty() {
                return Err(CliError::Flags("id is required"));
            }
            let mode = match mode.as_str() {
                "" | "restrict" => Mode::Restrict,
                "dissociate" => Mode::Dissociate,
                "delete" => Mode::Delete,
                _ => return Err(CliError::Value { what: "unsupported mode", value: mode.clone() }),
            };
            let request = BatchDeleteFederatedBundleRequest { trust_domains: vec![id.clone()], mode: mode.into() };
            let answer = client(connection).await?.batch_delete_federated_bundle(request).await;
            let answer = answer.map_err(step("failed to delete federated bundle"))?.into_inner();
            if output == Output::Json {
                return json(screen, "spire.api.server.bundle.v1.BatchDeleteFederatedBundleResponse", &answer);
            }
            let status = answer.results.into_iter().next().and_then(|result| result.status);
            verdict(status, || format!("failed to delete federated bundle {id:?}"))?;
            screen.line("bundle deleted.");
            Ok(())
        }
    }
}

fn verdict(status: Option<Status>, what: impl FnOnce() -> String) -> Result<(), CliError> {
    match status {
        Some(status) if status.code == 0 => Ok(()),
        Some(status) => Err(CliError::Refused { what: what(), message: status.message }),
        None => Err(CliError::Missing("a result")),
    }
}

async fn list(
    id: &str,
    form: Form,
    output: Output,
    connection: Connection,
    screen: &mut Screen,
) -> Result<(), CliError> {
    let mut client = client(connection).await?;
    if !id.is_empty() {
        let request = GetFederatedBundleRequest { trust_domain: id.to_owned(), output_mask: None };
        let bundle = client.get_federated_bundle(request).await?.into_inner();
        return match output {
            Output::Json => json(screen, "spire.api.types.Bundle", &bundle),
            Output::Pretty => pretty(&bundle, form, screen),
        };
    }
    let answer = client.list_federated_bundles(ListFederatedBundlesRequest::default()).await?.into_inner();
    match output {
        Output::Json => json(screen, "spire.api.server.bundle.v1.ListFederatedBundlesResponse", &answer),
        Output::Pretty => pretty_list(&answer.bundles, form, screen),
    }
}

fn pretty_list(bundles: &[types::Bundle], form: Form, screen: &mut Screen) -> Result<(), CliError> {
    let stars = "*".repeat(40);
    for (index, bundle) in bundles.iter().enumerate() {
        if index > 0 {
            screen.line("");
        }
        screen.line(format!("{stars}\n* {}\n{stars}", bundle.trust_domain));
        pretty(bundle, form, screen)?;
    }
    Ok(())
}

fn pretty(bundle: &types::Bundle, form: Form, screen: &mut Screen) -> Result<(), CliError> {
    match form {
        Form::Pem => {
            screen.out.push_str(&certificates_to_pem(bundle.x509_authorities.iter().map(|authority| &authority.asn1)));
        }
        Form::Spiffe => screen.line(from_wire(bundle)?.to_spiffe_json()),
    }
    Ok(())
}

fn trust_domain(text: &str) -> Result<TrustDomain, CliError> {
    TrustDomain::parse_lenient(text).map_err(|source| CliError::Id { what: format!("{text:?}"), source })
}

fn from_wire(bundle: &types::Bundle) -> Result<Bundle, CliError> {
    let moment = |seconds: i64| {
        let seconds = u64::try_from(seconds).ok().filter(|seconds| *seconds > 0)?;
        SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds))
    };
    let mut read = Bundle::empty(trust_domain(&bundle.trust_domain)?);
    read.x509 = bundle
        .x509_authorities
        .iter()
        .map(|authority| X509Authority { der: authority.asn1.clone(), tainted: authority.tainted })
        .collect();
    read.jwt = bundle
        .jwt_authorities
        .iter()
        .map(|key| JwtAuthority {
            key_id: key.key_id.as_str().into(),
            public_key: key.public_key.clone(),
            expires_at: moment(key.expires_at),
            tainted: key.tainted,
        })
        .collect();
    read.refresh_hint = u64::try_from(bundle.refresh_hint).ok().filter(|hint| *hint > 0).map(Duration::from_secs);
    read.sequence = bundle.sequence_number;
    Ok(read)
}

fn read(path: Option<&PathBuf>) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    let (result, path) = match path {
        Some(path) => {
            let opened = std::fs::File::open(path);
            (opened.and_then(|file| file.take(MAX_BUNDLE).read_to_end(&mut bytes)), path.clone())
        }
        None => (std::io::stdin().lock().take(MAX_BUNDLE).read_to_end(&mut bytes), PathBuf::from("standard input")),
    };
    result.map_err(|source| CliError::File { what: "unable to load bundle data from", path, source })?;
    Ok(bytes)
}

fn parse(id: &str, form: Form, bytes: &[u8]) -> Result<types::Bundle, CliError> {
    let bad = |source| CliError::Bundle { source };
    let own = trust_domain(id)?;
    match form {
        Form::Pem => {
            let certificates = certificates_from_pem(&String::from_utf8_lossy(bytes)).map_err(bad)?;
            let x509_authorities =
                certificates.into_iter().map(|asn1| types::X509Certificate { asn1, tainted: false }).collect();
            Ok(types::Bundle { trust_domain: id.to_owned(), x509_authorities, ..types::Bundle::default() })
        }
        Form::Spiffe => {
            let (bundle, _) = Bundle::from_spiffe_json(own, bytes).map_err(bad)?;
            Ok(to_wire(&bundle))
        }
    }
}

fn to_wire(bundle: &Bundle) -> types::Bundle {
    let seconds = |at: SystemTime| at.duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let signed = |seconds: u64| i64::try_from(seconds).unwrap_or(i64::MAX);
    types::Bundle {
        trust_domain: bundle.trust_domain.as_str().to_owned(),
        x509_authorities: bundle
            .x509
            .iter()
            .map(|authority| types::X509Certificate { asn1: authority.der.clone(), tainted: authority.tainted })
            .collect(),
        jwt_authorities: bundle
            .jwt
            .iter()
            .map(|key| types::JwtKey {
                public_key: key.public_key.clone(),
                key_id: key.key_id.to_string(),
                expires_at: key.expires_at.map_or(0, |at| signed(seconds(at))),
                tainted: key.tainted,
            })
            .collect(),
        refresh_hint: bundle.refresh_hint.map_or(0, |hint| signed(hint.as_secs())),
        sequence_number: bundle.sequence,
        wit_authorities: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn bundle(trust_domain: &str) -> types::Bundle {
        let x509_authorities = vec![types::X509Certificate { asn1: Bytes::from_static(&[1, 2, 3]), tainted: false }];
        types::Bundle {
            trust_domain: trust_domain.into(),
            x509_authorities,
            refresh_hint: 300,
            sequence_number: 7,
            ..types::Bundle::default()
        }
    }

    const PEM: &str = "-----BEGIN CERTIFICATE-----\nAQID\n-----END CERTIFICATE-----\n";

    #[test]
    fn golden_pem_and_lists() {
        let mut screen = Screen::new();
        pretty(&bundle("td"), Form::Pem, &mut screen).unwrap();
        assert_eq!(screen.out, PEM);
        let mut screen = Screen::new();
        pretty_list(&[bundle("a"), bundle("b")], Form::Pem, &mut screen).unwrap();
        let stars = "****************************************";
        assert_eq!(screen.out, format!("{stars}\n* a\n{stars}\n{PEM}\n{stars}\n* b\n{stars}\n{PEM}"));
    }

    #[test]
    fn golden_spiffe() {
        let mut screen = Screen::new();
        pretty(&bundle("td"), Form::Spiffe, &mut screen).unwrap();
        let shown: serde_json::Value = serde_json::from_str(&screen.out).unwrap();
        assert_eq!((&shown["spiffe_sequence"], &shown["spiffe_refresh_hint"]), (&7.into(), &300.into()));
        assert!(screen.out.contains("\n    \"keys\"") && screen.out.ends_with("}\n"), "{}", screen.out);
    }

    #[test]
    fn bundles_are_read_in_both_forms() {
        let read = parse("other.org", Form::Pem, PEM.as_bytes()).unwrap();
        assert_eq!(read.x509_authorities, bundle("td").x509_authorities);
        assert_eq!(read.trust_domain, "other.org");
        assert!(matches!(parse("other.org", Form::Pem, b"x"), Err(CliError::Bundle { .. })));
        assert!(matches!(parse("Other", Form::Pem, PEM.as_bytes()), Err(CliError::Id { .. })));
        assert!(matches!(form("der"), Err(CliError::Value { .. })));
        assert_eq!((form("PEM").unwrap(), form("spiffe").unwrap()), (Form::Pem, Form::Spiffe));
    }

    #[test]
    fn refusals_carry_the_servers_words() {
        let status = Status { code: 9, message: "in use".into() };
        let error = verdict(Some(status), || "failed to delete federated bundle \"x\"".into()).unwrap_err();
        assert_eq!(error.to_string(), "failed to delete federated bundle \"x\": in use");
        verdict(Some(Status::default()), String::new).unwrap();
        assert!(matches!(verdict(None, String::new), Err(CliError::Missing("a result"))));
    }
}
