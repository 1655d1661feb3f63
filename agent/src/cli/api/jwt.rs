//! `api fetch jwt` and `api validate jwt`.

use std::collections::BTreeMap;

use runtime::console::{Output, Screen};
use runtime::flags::Environment;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use spiffe_proto::workload::{
    JwtBundlesRequest, JwtBundlesResponse, JwtsvidRequest, JwtsvidResponse, ValidateJwtsvidRequest,
    ValidateJwtsvidResponse,
};
use tonic::Code;

use super::super::client::{Workload, json, request, within};
use super::super::error::{CliError, RpcError, step};

#[derive(Debug, clap::Args)]
pub(in super::super) struct FetchJwt {
    #[command(flatten)]
    common: Workload,
    /// Audience; several are separated by commas.
    #[arg(long = "audience", value_name = "NAMES", value_delimiter = ',')]
    audience: Vec<String>,
    /// Only the JWT-SVID of this SPIFFE ID.
    #[arg(long = "spiffeID", value_name = "ID", default_value = "", hide_default_value = true)]
    spiffe_id: String,
    /// The old name of -output.
    #[arg(long = "format", value_name = "FORM", value_enum, hide = true)]
    format: Option<Output>,
}

#[derive(Debug, clap::Args)]
pub(in super::super) struct ValidateJwt {
    #[command(flatten)]
    common: Workload,
    /// The audience that the token must be for.
    #[arg(long = "audience", value_name = "NAME", default_value = "", hide_default_value = true)]
    audience: String,
    /// The token.
    #[arg(long = "svid", value_name = "TOKEN", default_value = "", hide_default_value = true)]
    svid: String,
}

pub(super) async fn fetch(flags: &FetchJwt, environment: &Environment, screen: &mut Screen) -> Result<(), CliError> {
    if flags.audience.is_empty() {
        return Err(CliError::Flags("audience must be specified"));
    }
    let timeout = flags.common.timeout()?;
    let channel = within(timeout, flags.common.socket.connection(environment)?.open()).await?;
    let mut client = SpiffeWorkloadApiClient::new(channel);
    let bundles = within(timeout, async {
        let stream = client.fetch_jwt_bundles(request(JwtBundlesRequest {})).await;
        stream.map_err(step("failed to receive JWT bundles"))?.into_inner().message().await.map_err(CliError::from)
    });
    let bundles = bundles.await?.ok_or(CliError::Missing("bundles"))?;
    let asked = JwtsvidRequest { audience: flags.audience.clone(), spiffe_id: flags.spiffe_id.clone() };
    let svids = within(timeout, client.fetch_jwtsvid(request(asked))).await?.into_inner();
    match flags.format.unwrap_or(flags.common.output) {
        Output::Json => {
            let parts = vec![
                spiffe_proto::json::to_value("JWTSVIDResponse", &svids)?,
                spiffe_proto::json::to_value("JWTBundlesResponse", &bundles)?,
            ];
            screen.line(spiffe_proto::json::line(&serde_json::Value::Array(parts)));
        }
        Output::Pretty => pretty_fetch(&svids, &bundles, screen),
    }
    Ok(())
}

fn pretty_fetch(svids: &JwtsvidResponse, bundles: &JwtBundlesResponse, screen: &mut Screen) {
    for svid in &svids.svids {
        screen.line(format!("token({}):\n\t{}", svid.spiffe_id, svid.svid));
        if !svid.hint.is_empty() {
            screen.line(format!("hint({}):\n\t{}", svid.spiffe_id, svid.hint));
        }
    }
    let sorted: BTreeMap<_, _> = bundles.bundles.iter().collect();
    for (trust_domain, bundle) in sorted {
        screen.line(format!("bundle({trust_domain}):\n\t{}", String::from_utf8_lossy(bundle)));
    }
}

pub(super) async fn validate(
    flags: &ValidateJwt,
    environment: &Environment,
    screen: &mut Screen,
) -> Result<(), CliError> {
    if flags.audience.is_empty() {
        return Err(CliError::Flags("audience must be specified"));
    }
    if flags.svid.is_empty() {
        return Err(CliError::Flags("svid must be specified"));
    }
    let timeout = flags.common.timeout()?;
    let channel = within(timeout, flags.common.socket.connection(environment)?.open()).await?;
    let mut client = SpiffeWorkloadApiClient::new(channel);
    let asked = ValidateJwtsvidRequest { audience: flags.audience.clone(), svid: flags.svid.clone() };
    let answer = within(timeout, async {
        client.validate_jwtsvid(request(asked)).await.map_err(|status| match status.code() {
            Code::InvalidArgument => CliError::Invalid { reason: status.message().to_owned() },
            _ => CliError::Step { doing: "unable to validate JWT SVID", source: RpcError(Box::new(status)) },
        })
    });
    let answer = answer.await?.into_inner();
    match flags.common.output {
        Output::Json => json(screen, "ValidateJWTSVIDResponse", &answer),
        Output::Pretty => pretty_validate(&answer, screen),
    }
}

fn pretty_validate(answer: &ValidateJwtsvidResponse, screen: &mut Screen) -> Result<(), CliError> {
    let claims = answer.claims.clone().unwrap_or_default();
    let claims = spiffe_proto::json::to_line("google.protobuf.Struct", &claims)?;
    screen.line("SVID is valid.");
    screen.line(format!("SPIFFE ID : {}", answer.spiffe_id));
    screen.line(format!("Claims    : {claims}"));
    Ok(())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use prost_types::value::Kind;
    use prost_types::{Struct, Value};
    use spiffe_proto::workload::Jwtsvid;

    use super::*;

    #[test]
    fn golden_fetch() {
        let svid = |hint: &str| Jwtsvid { spiffe_id: "spiffe://td/a".into(), svid: "t.o.k".into(), hint: hint.into() };
        let svids = JwtsvidResponse { svids: vec![svid(""), svid("internal")] };
        let bundle = |td: &str| (format!("spiffe://{td}"), Bytes::from_static(b"{\"keys\":[]}"));
        let bundles = JwtBundlesResponse { bundles: [bundle("td"), bundle("other")].into_iter().collect() };
        let mut screen = Screen::new();
        pretty_fetch(&svids, &bundles, &mut screen);
        let expected = "token(spiffe://td/a):\n\tt.o.k\ntoken(spiffe://td/a):\n\tt.o.k\nhint(spiffe://td/a):\n\tinternal\nbundle(spiffe://other):\n\t{\"keys\":[]}\nbundle(spiffe://td):\n\t{\"keys\":[]}\n";
        assert_eq!(screen.out, expected);
        let line = spiffe_proto::json::to_line("JWTSVIDResponse", &svids).unwrap();
        let expected = "{\"svids\":[{\"hint\":\"\",\"spiffe_id\":\"spiffe://td/a\",\"svid\":\"t.o.k\"},{\"hint\":\"internal\",\"spiffe_id\":\"spiffe://td/a\",\"svid\":\"t.o.k\"}]}";
        assert_eq!(line, expected);
    }

    #[test]
    fn golden_validate() {
        let value = Value { kind: Some(Kind::StringValue("spiffe://td/a".into())) };
        let claims = Struct { fields: [("sub".to_owned(), value)].into_iter().collect() };
        let answer = ValidateJwtsvidResponse { spiffe_id: "spiffe://td/a".into(), claims: Some(claims) };
        let mut screen = Screen::new();
        pretty_validate(&answer, &mut screen).unwrap();
        let expected = "SVID is valid.\nSPIFFE ID : spiffe://td/a\nClaims    : {\"sub\":\"spiffe://td/a\"}\n";
        assert_eq!(screen.out, expected);
    }
}
