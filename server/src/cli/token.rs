//! `token generate`.

use runtime::console::{Output, Screen};
use spiffe_proto::agent::CreateJoinTokenRequest;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::types::JoinToken;

use super::client::{Common, Connection, SocketFlags, id, json};
use super::error::CliError;

/// Make join tokens for nodes.
#[derive(Debug, clap::Subcommand)]
pub(super) enum Token {
    /// Make a join token, good for the attestation of one node.
    Generate {
        #[command(flatten)]
        common: Common,
        /// Lifetime of the token in seconds.
        #[arg(long = "ttl", value_name = "SECONDS", default_value_t = 600, allow_negative_numbers = true)]
        ttl: i64,
        /// SPIFFE ID that the node gets as an alias, for use as parent ID of entries.
        #[arg(long = "spiffeID", value_name = "ID", default_value = "", hide_default_value = true)]
        spiffe_id: String,
    },
}

impl Token {
    pub(super) fn socket(&self) -> &SocketFlags {
        let Self::Generate { common, .. } = self;
        &common.socket
    }
}

pub(super) async fn run(command: &Token, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let Token::Generate { common, ttl, spiffe_id } = command;
    let agent_id = if spiffe_id.is_empty() { None } else { Some(id(spiffe_id)?) };
    let ttl = i32::try_from(*ttl).map_err(|_| CliError::Flags("invalid value for TTL: out of range"))?;
    let request = CreateJoinTokenRequest { ttl, token: String::new(), agent_id };
    let token = AgentClient::new(connection.open().await?).create_join_token(request).await?.into_inner();
    match common.output {
        Output::Json => json(screen, "spire.api.types.JoinToken", &token),
        Output::Pretty => {
            pretty(&token, !spiffe_id.is_empty(), screen);
            Ok(())
        }
    }
}

fn pretty(token: &JoinToken, has_alias: bool, screen: &mut Screen) {
    screen.line(format!("Token: {}", token.value));
    if !has_alias {
        screen.line("Warning: Missing SPIFFE ID.");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_without_alias_is_warned_about() {
        let token = JoinToken { value: "abc".into(), expires_at: 1 };
        let mut screen = Screen::new();
        pretty(&token, true, &mut screen);
        pretty(&token, false, &mut screen);
        assert_eq!(screen.out, "Token: abc\nToken: abc\nWarning: Missing SPIFFE ID.\n");
        let mut screen = Screen::new();
        json(&mut screen, "spire.api.types.JoinToken", &token).unwrap();
        assert_eq!(screen.out, "{\"expires_at\":\"1\",\"value\":\"abc\"}\n");
    }
}
