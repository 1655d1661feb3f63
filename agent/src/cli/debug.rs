//! `debug getinfo`.

use std::time::Duration;

use runtime::console::{Output, Screen, rfc3339};
use runtime::duration;
use spiffe_proto::agent_debug::debug_client::DebugClient;
use spiffe_proto::agent_debug::{GetInfoRequest, GetInfoResponse};

use super::client::{Admin, id_text, json};
use super::error::CliError;

/// Look into a running agent.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Debug {
    /// Print uptime, the last sync, cache sizes and the agent's own SVID.
    Getinfo {
        #[command(flatten)]
        common: Admin,
    },
}

pub(super) async fn run(command: &Debug, screen: &mut Screen) -> Result<(), CliError> {
    let Debug::Getinfo { common } = command;
    let mut client = DebugClient::new(common.connection().open().await?);
    let info = client.get_info(GetInfoRequest {}).await?.into_inner();
    match common.output {
        Output::Json => json(screen, "spire.agent.debug.v1.GetInfoResponse", &info),
        Output::Pretty => {
            pretty(&info, screen);
            Ok(())
        }
    }
}

fn pretty(info: &GetInfoResponse, screen: &mut Screen) {
    let uptime = Duration::from_secs(u64::try_from(info.uptime).unwrap_or(0));
    let last_sync = if info.last_sync_success == 0 { "(never)".to_owned() } else { rfc3339(info.last_sync_success) };
    screen.line("Agent Debug Info:");
    screen.line(format!("  Uptime:                          {}", duration::format(uptime)));
    screen.line(format!("  Last Sync Success:               {last_sync}"));
    screen.line(format!("  Cached X.509 SVIDs:              {}", info.cached_x509_svids_count));
    screen.line(format!("  Cached JWT SVIDs:                {}", info.cached_jwt_svids_count));
    screen.line(format!("  Cached SVID Store X.509 SVIDs:   {}", info.cached_svidstore_x509_svids_count));
    if info.svid_chain.is_empty() {
        return;
    }
    screen.line("  SVID Chain:");
    for (index, certificate) in info.svid_chain.iter().enumerate() {
        screen.line(format!("    [{index}] SPIFFE ID:  {}", id_text(certificate.id.as_ref())));
        screen.line(format!("        Subject:    {}", certificate.subject));
        screen.line(format!("        Expires At: {}", rfc3339(certificate.expires_at)));
    }
}

#[cfg(test)]
mod tests {
    use spiffe_proto::agent_debug::get_info_response::Cert;

    use super::*;

    #[test]
    fn golden_output() {
        let root = Cert { id: None, expires_at: 1_700_003_600, subject: "O=SPIFFE,C=US".into() };
        let info = GetInfoResponse {
            svid_chain: vec![root],
            uptime: 61,
            last_sync_success: 1_700_000_000,
            cached_x509_svids_count: 3,
            cached_jwt_svids_count: 2,
            ..GetInfoResponse::default()
        };
        let mut screen = Screen::new();
        pretty(&info, &mut screen);
        let expected = "\
Agent Debug Info:
  Uptime:                          1m1s
  Last Sync Success:               2023-11-14T22:13:20Z
  Cached X.509 SVIDs:              3
  Cached JWT SVIDs:                2
  Cached SVID Store X.509 SVIDs:   0
  SVID Chain:
    [0] SPIFFE ID:  (none)
        Subject:    O=SPIFFE,C=US
        Expires At: 2023-11-14T23:13:20Z
";
        assert_eq!(screen.out, expected);
        let mut screen = Screen::new();
        pretty(&GetInfoResponse::default(), &mut screen);
        assert!(screen.out.contains("Last Sync Success:               (never)\n"));
    }
}
