//! `debug getinfo`.

use std::time::Duration;

use runtime::console::{Output, Screen, rfc3339};
use runtime::duration;
use spiffe_proto::debug::debug_client::DebugClient;
use spiffe_proto::debug::{GetInfoRequest, GetInfoResponse};

use super::client::{Common, Connection, SocketFlags, id_text, json};
use super::error::CliError;

/// Look into a running server.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Debug {
    /// Print uptime, counts and the server's own SVID.
    Getinfo {
        #[command(flatten)]
        common: Common,
    },
}

impl Debug {
    pub(super) fn socket(&self) -> &SocketFlags {
        let Self::Getinfo { common } = self;
        &common.socket
    }
}

pub(super) async fn run(command: &Debug, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let Debug::Getinfo { common } = command;
    let info = DebugClient::new(connection.open().await?).get_info(GetInfoRequest {}).await?.into_inner();
    match common.output {
        Output::Json => json(screen, "spire.api.server.debug.v1.GetInfoResponse", &info),
        Output::Pretty => {
            pretty(&info, screen);
            Ok(())
        }
    }
}

fn pretty(info: &GetInfoResponse, screen: &mut Screen) {
    let uptime = Duration::from_secs(u64::try_from(info.uptime).unwrap_or(0));
    screen.line("Server Debug Info:");
    screen.line(format!("  Uptime:                  {}", duration::format(uptime)));
    screen.line(format!("  Registered Agents:       {}", info.agents_count));
    screen.line(format!("  Registration Entries:    {}", info.entries_count));
    screen.line(format!("  Federated Bundles:       {}", info.federated_bundles_count));
    if info.svid_chain.is_empty() {
        return;
    }
    screen.line("  SVID Chain:");
    for (index, certificate) in info.svid_chain.iter().enumerate() {
        let id = match &certificate.id {
            Some(id) => id_text(Some(id)),
            None => "(none)".to_owned(),
        };
        screen.line(format!("    [{index}] SPIFFE ID:  {id}"));
        screen.line(format!("        Subject:    {}", certificate.subject));
        screen.line(format!("        Expires At: {}", rfc3339(certificate.expires_at)));
    }
}

#[cfg(test)]
mod tests {
    use spiffe_proto::debug::get_info_response::Cert;
    use spiffe_proto::types::Spiffeid;

    use super::*;

    #[test]
    fn golden_output() {
        let leaf = Cert {
            id: Some(Spiffeid { trust_domain: "td".into(), path: "/spire/server".into() }),
            expires_at: 1_700_000_000,
            subject: "O=SPIRE,C=US".into(),
        };
        let root = Cert { id: None, expires_at: 1_700_003_600, subject: "O=SPIFFE,C=US".into() };
        let info = GetInfoResponse {
            svid_chain: vec![leaf, root],
            uptime: 3725,
            agents_count: 1,
            federated_bundles_count: 2,
            entries_count: 3,
        };
        let mut screen = Screen::new();
        pretty(&info, &mut screen);
        let expected = "\
Server Debug Info:
  Uptime:                  1h2m5s
  Registered Agents:       1
  Registration Entries:    3
  Federated Bundles:       2
  SVID Chain:
    [0] SPIFFE ID:  spiffe://td/spire/server
        Subject:    O=SPIRE,C=US
        Expires At: 2023-11-14T22:13:20Z
    [1] SPIFFE ID:  (none)
        Subject:    O=SPIFFE,C=US
        Expires At: 2023-11-14T23:13:20Z
";
        assert_eq!(screen.out, expected);
    }
}
