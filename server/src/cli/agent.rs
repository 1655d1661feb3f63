//! `agent list`, `count`, `show`, `ban`, `evict`, `purge`.

use std::time::{Duration, SystemTime};

use runtime::clock::Clock;
use runtime::console::{Output, Screen, go_time, is_go_moment, plural};
use runtime::duration;
use runtime::flags::boolean;
use serde::Serialize;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::agent::{
    BanAgentRequest, CountAgentsRequest, CountAgentsResponse, DeleteAgentRequest, GetAgentRequest, ListAgentsRequest,
    ListAgentsResponse, count_agents_request, list_agents_request,
};
use spiffe_proto::types::{Agent, AgentMask, SelectorMatch};
use tonic::transport::Channel;

use super::client::{Common, Connection, MAX_ANSWER, MatchOn, SocketFlags, id, id_text, json};
use super::error::{CliError, RpcError, step};

/// A page of agents stays well below what a message may hold.
const PAGE: i32 = 1000;

/// See and manage attested agents.
#[derive(Debug, clap::Subcommand)]
pub(super) enum AgentCommand {
    /// List attested agents.
    List(Filtered),
    /// Count attested agents.
    Count(Filtered),
    /// Show one attested agent.
    Show(One),
    /// Ban an agent: it can neither use its identity nor attest again, until it is evicted.
    Ban(One),
    /// Evict an agent: its identity is void, and it may attest again.
    Evict(One),
    /// Evict agents that expired long ago and that could attest again by themselves.
    Purge(Purge),
}

/// Filters; an agent has to pass all that are given.
#[derive(Debug, clap::Args)]
pub(super) struct Filtered {
    #[command(flatten)]
    common: Common,
    /// Agents with this selector, type:value; can be given more than once.
    #[arg(long = "selector", value_name = "TYPE:VALUE")]
    selectors: Vec<String>,
    /// How the selectors have to match.
    #[arg(long = "matchSelectorsOn", value_enum, value_name = "MATCH", default_value_t = MatchOn::Superset)]
    match_selectors_on: MatchOn,
    /// Agents attested by this method, such as join_token or x509pop.
    #[arg(long = "attestationType", value_name = "NAME", default_value = "", hide_default_value = true)]
    attestation_type: String,
    /// 'true': agents that can attest again, 'false': those that cannot; anything else: all.
    #[arg(long = "canReattest", value_name = "BOOL", default_value = "", hide_default_value = true)]
    can_reattest: String,
    /// 'true': banned agents, 'false': those that are not; anything else: all.
    #[arg(long = "banned", value_name = "BOOL", default_value = "", hide_default_value = true)]
    banned: String,
    /// Agents that expire before this moment, such as "2006-01-02 15:04:05 -0700 -07".
    #[arg(long = "expiresBefore", value_name = "MOMENT", default_value = "", hide_default_value = true)]
    expires_before: String,
}

/// One agent.
#[derive(Debug, clap::Args)]
pub(super) struct One {
    #[command(flatten)]
    common: Common,
    /// SPIFFE ID of the agent.
    #[arg(long = "spiffeID", value_name = "ID", default_value = "", hide_default_value = true)]
    spiffe_id: String,
}

/// Agents that expired long ago.
#[derive(Debug, clap::Args)]
pub(super) struct Purge {
    #[command(flatten)]
    common: Common,
    /// How long ago they expired, at least.
    #[arg(long = "expiredFor", value_name = "DURATION", default_value = "720h")]
    expired_for: String,
    /// Only show which agents would be purged.
    #[arg(long = "dryRun", value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean, hide_default_value = true)]
    dry_run: bool,
}

impl AgentCommand {
    fn common(&self) -> &Common {
        match self {
            Self::List(flags) | Self::Count(flags) => &flags.common,
            Self::Show(flags) | Self::Ban(flags) | Self::Evict(flags) => &flags.common,
            Self::Purge(flags) => &flags.common,
        }
    }

    pub(super) fn socket(&self) -> &SocketFlags {
        &self.common().socket
    }
}

async fn client(connection: Connection) -> Result<AgentClient<Channel>, CliError> {
    Ok(AgentClient::new(connection.open().await?).max_decoding_message_size(MAX_ANSWER))
}

pub(super) async fn run(command: &AgentCommand, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let output = command.common().output;
    let needed = |flags: &One| {
        if flags.spiffe_id.is_empty() { Err(CliError::Flags("a SPIFFE ID is required")) } else { id(&flags.spiffe_id) }
    };
    match command {
        AgentCommand::List(flags) => {
            let agents = list(flags.filter()?, connection).await?;
            match output {
                Output::Json => json(screen, "spire.api.server.agent.v1.ListAgentsResponse", &agents)?,
                Output::Pretty => pretty_list(&agents.agents, screen),
            }
        }
        AgentCommand::Count(flags) => {
            let filter = flags.filter()?;
            let filter = count_agents_request::Filter {
                by_attestation_type: filter.by_attestation_type,
                by_selector_match: filter.by_selector_match,
                by_banned: filter.by_banned,
                by_can_reattest: filter.by_can_reattest,
                by_expires_before: filter.by_expires_before,
            };
            let mut client = client(connection).await?;
            let answer = client.count_agents(CountAgentsRequest { filter: Some(filter) }).await?.into_inner();
            match output {
                Output::Json => json(screen, "spire.api.server.agent.v1.CountAgentsResponse", &answer)?,
                Output::Pretty => pretty_count(answer, screen),
            }
        }
        AgentCommand::Show(flags) => {
            let request = GetAgentRequest { id: Some(needed(flags)?), output_mask: None };
            let agent = client(connection).await?.get_agent(request).await?.into_inner();
            match output {
                Output::Json => json(screen, "spire.api.types.Agent", &agent)?,
                Output::Pretty => pretty_show(&agent, screen),
            }
        }
        AgentCommand::Ban(flags) => {
            let request = BanAgentRequest { id: Some(needed(flags)?) };
            client(connection).await?.ban_agent(request).await?;
            screen.line(if output == Output::Json { "{}" } else { "Agent banned successfully" });
        }
        AgentCommand::Evict(flags) => {
            let request = DeleteAgentRequest { id: Some(needed(flags)?) };
            client(connection).await?.delete_agent(request).await?;
            screen.line(if output == Output::Json { "{}" } else { "Agent evicted successfully" });
        }
        AgentCommand::Purge(flags) => purge(flags, connection, screen).await?,
    }
    Ok(())
}

impl Filtered {
    fn filter(&self) -> Result<list_agents_request::Filter, CliError> {
        if !self.expires_before.is_empty() && !is_go_moment(&self.expires_before) {
            return Err(CliError::Value { what: "date is not valid:", value: self.expires_before.clone() });
        }
        let by_selector_match: Option<SelectorMatch> = self.match_selectors_on.selectors(&self.selectors)?;
        let three_way = |text: &str| match text {
            "true" => Some(true),
            "false" => Some(false),
            _ => None,
        };
        Ok(list_agents_request::Filter {
            by_attestation_type: self.attestation_type.clone(),
            by_selector_match,
            by_banned: three_way(&self.banned),
            by_can_reattest: three_way(&self.can_reattest),
            by_expires_before: self.expires_before.clone(),
        })
    }
}

async fn list(filter: list_agents_request::Filter, connection: Connection) -> Result<ListAgentsResponse, CliError> {
    let mut client = client(connection).await?;
    let mut all = ListAgentsResponse::default();
    let mut page_token = String::new();
    loop {
        let request =
            ListAgentsRequest { filter: Some(filter.clone()), output_mask: None, page_size: PAGE, page_token };
        let page = client.list_agents(request).await?.into_inner();
        all.agents.extend(page.agents);
        if page.next_page_token.is_empty() {
            return Ok(all);
        }
        page_token = page.next_page_token;
    }
}

fn pretty_list(agents: &[Agent], screen: &mut Screen) {
    if agents.is_empty() {
        screen.line("No attested agents found");
        return;
    }
    screen.line(format!("Found {} attested {}:\n", agents.len(), plural(agents.len(), "agent", "agents")));
    for agent in agents {
        block(agent, screen);
    }
}

fn pretty_count(answer: CountAgentsResponse, screen: &mut Screen) {
    let count = usize::try_from(answer.count).unwrap_or(0);
    screen.line(format!("{count} attested {}", plural(count, "agent", "agents")));
}

fn pretty_show(agent: &Agent, screen: &mut Screen) {
    screen.line("Found an attested agent given its SPIFFE ID\n");
    block(agent, screen);
    for selector in &agent.selectors {
        screen.line(format!("Selectors         : {}:{}", selector.r#type, selector.value));
    }
}

fn block(agent: &Agent, screen: &mut Screen) {
    screen.line(format!("SPIFFE ID         : {}", id_text(agent.id.as_ref())));
    screen.line(format!("Attestation type  : {}", agent.attestation_type));
    screen.line(format!("Expiration time   : {}", go_time(agent.x509svid_expires_at)));
    if agent.banned {
        screen.line("Banned            : true");
    } else {
        screen.line(format!("Serial number     : {}", agent.x509svid_serial_number));
    }
    screen.line(format!("Can re-attest     : {}", agent.can_reattest));
    if !agent.agent_version.is_empty() {
        screen.line(format!("Agent version     : {}", agent.agent_version));
    }
    screen.line("");
}

/// What became of the agents that expired long ago.
#[derive(Debug, Default, Serialize)]
struct Purged {
    expired_agents: Vec<Expired>,
}

#[derive(Debug, Serialize)]
struct Expired {
    agent_id: String,
    deleted: bool,
    #[serde(skip_serializing_if = "String::is_empty")]
    error: String,
}

async fn purge(flags: &Purge, connection: Connection, screen: &mut Screen) -> Result<(), CliError> {
    let expired_for = duration::parse(&flags.expired_for).map_err(|source| CliError::Duration { source })?;
    let mut client = client(connection).await?;
    let mut found = Vec::new();
    let mut page_token = String::new();
    loop {
        let filter = list_agents_request::Filter { by_can_reattest: Some(true), ..Default::default() };
        let output_mask = Some(AgentMask { x509svid_expires_at: true, ..AgentMask::default() });
        let request = ListAgentsRequest { filter: Some(filter), output_mask, page_size: PAGE, page_token };
        let page = client.list_agents(request).await.map_err(step("failed to list agents"))?.into_inner();
        found.extend(page.agents);
        if page.next_page_token.is_empty() {
            break;
        }
        page_token = page.next_page_token;
    }
    let now = Clock::system().now();
    let mut purged = Purged::default();
    for agent in found.into_iter().filter(|agent| expired_before(agent, now, expired_for)) {
        let mut expired = Expired { agent_id: id_text(agent.id.as_ref()), deleted: false, error: String::new() };
        if !flags.dry_run {
            match client.delete_agent(DeleteAgentRequest { id: agent.id }).await {
                Ok(_) => expired.deleted = true,
                Err(status) => expired.error = RpcError(Box::new(status)).to_string(),
            }
        }
        purged.expired_agents.push(expired);
    }
    match flags.common.output {
        Output::Json => screen.line(serde_json::to_string(&purged).map_err(|source| CliError::Json { source })?),
        Output::Pretty => pretty_purge(&purged, flags.dry_run, screen),
    }
    Ok(())
}

fn expired_before(agent: &Agent, now: SystemTime, expired_for: Duration) -> bool {
    let seconds = u64::try_from(agent.x509svid_expires_at).unwrap_or(0);
    let expired_at = SystemTime::UNIX_EPOCH.checked_add(Duration::from_secs(seconds));
    expired_at.and_then(|at| now.duration_since(at).ok()).is_some_and(|since| since > expired_for)
}

fn pretty_purge(purged: &Purged, dry_run: bool, screen: &mut Screen) {
    let all = &purged.expired_agents;
    if all.is_empty() {
        screen.line("No agents to purge.");
        return;
    }
    screen.line(format!("Found {} expired {}\n", all.len(), plural(all.len(), "agent", "agents")));
    if dry_run {
        screen.line("\nAgents that can be purged:");
        for expired in all {
            screen.line(format!("SPIFFE ID         : {}", expired.agent_id));
        }
        return;
    }
    let (done, left): (Vec<_>, Vec<_>) = all.iter().partition(|expired| expired.deleted);
    if !done.is_empty() {
        screen.line("Agents purged:");
    }
    for expired in done {
        screen.line(format!("SPIFFE ID         : {}", expired.agent_id));
    }
    if !left.is_empty() {
        screen.line("Agents not purged:");
    }
    for expired in left {
        screen.line(format!("SPIFFE ID         : {}", expired.agent_id));
        screen.line(format!("Error             : {}", expired.error));
    }
}

#[cfg(test)]
mod tests {
    use spiffe_proto::types::{Selector, Spiffeid};

    use super::*;

    fn agent(path: &str) -> Agent {
        Agent {
            id: Some(Spiffeid { trust_domain: "td".into(), path: path.into() }),
            attestation_type: "x509pop".into(),
            x509svid_serial_number: "12345".into(),
            x509svid_expires_at: 1_700_000_000,
            selectors: vec![Selector { r#type: "x509pop".into(), value: "subject:cn:a".into() }],
            banned: false,
            can_reattest: true,
            agent_version: String::new(),
        }
    }

    fn shown(show: impl FnOnce(&mut Screen)) -> String {
        let mut screen = Screen::new();
        show(&mut screen);
        screen.out
    }

    #[test]
    fn golden_lists() {
        assert_eq!(shown(|s| pretty_list(&[], s)), "No attested agents found\n");
        let banned =
            Agent { banned: true, agent_version: "1.2.3".into(), can_reattest: false, ..agent("/spire/agent/b") };
        let expected = "\
Found 2 attested agents:

SPIFFE ID         : spiffe://td/spire/agent/a
Attestation type  : x509pop
Expiration time   : 2023-11-14 22:13:20 +0000 UTC
Serial number     : 12345
Can re-attest     : true

SPIFFE ID         : spiffe://td/spire/agent/b
Attestation type  : x509pop
Expiration time   : 2023-11-14 22:13:20 +0000 UTC
Banned            : true
Can re-attest     : false
Agent version     : 1.2.3

";
        assert_eq!(shown(|s| pretty_list(&[agent("/spire/agent/a"), banned], s)), expected);
        assert!(shown(|s| pretty_list(&[agent("/x")], s)).starts_with("Found 1 attested agent:\n\nSPIFFE ID"));
        let expected = "\
Found an attested agent given its SPIFFE ID

SPIFFE ID         : spiffe://td/spire/agent/a
Attestation type  : x509pop
Expiration time   : 2023-11-14 22:13:20 +0000 UTC
Serial number     : 12345
Can re-attest     : true

Selectors         : x509pop:subject:cn:a
";
        assert_eq!(shown(|s| pretty_show(&agent("/spire/agent/a"), s)), expected);
        assert_eq!(shown(|s| pretty_count(CountAgentsResponse { count: 1 }, s)), "1 attested agent\n");
        assert_eq!(shown(|s| pretty_count(CountAgentsResponse { count: 0 }, s)), "0 attested agents\n");
    }

    #[test]
    fn golden_json() {
        let mut screen = Screen::new();
        let answer = ListAgentsResponse { agents: vec![agent("/spire/agent/a")], next_page_token: String::new() };
        json(&mut screen, "spire.api.server.agent.v1.ListAgentsResponse", &answer).unwrap();
        let expected = "{\"agents\":[{\"agent_version\":\"\",\"attestation_type\":\"x509pop\",\"banned\":false,\"can_reattest\":true,\"id\":{\"path\":\"/spire/agent/a\",\"trust_domain\":\"td\"},\"selectors\":[{\"type\":\"x509pop\",\"value\":\"subject:cn:a\"}],\"x509svid_expires_at\":\"1700000000\",\"x509svid_serial_number\":\"12345\"}],\"next_page_token\":\"\"}\n";
        assert_eq!(screen.out, expected);
    }

    #[test]
    fn golden_purge() {
        let expired =
            |id: &str, deleted: bool, error: &str| Expired { agent_id: id.into(), deleted, error: error.into() };
        assert_eq!(shown(|s| pretty_purge(&Purged::default(), false, s)), "No agents to purge.\n");
        let purged =
            Purged { expired_agents: vec![expired("spiffe://td/a", true, ""), expired("spiffe://td/b", false, "no")] };
        let expected = "Found 2 expired agents\n\nAgents purged:\nSPIFFE ID         : spiffe://td/a\nAgents not purged:\nSPIFFE ID         : spiffe://td/b\nError             : no\n";
        assert_eq!(shown(|s| pretty_purge(&purged, false, s)), expected);
        let expected = "Found 2 expired agents\n\n\nAgents that can be purged:\nSPIFFE ID         : spiffe://td/a\nSPIFFE ID         : spiffe://td/b\n";
        assert_eq!(shown(|s| pretty_purge(&purged, true, s)), expected);
        assert_eq!(
            serde_json::to_string(&purged).unwrap(),
            "{\"expired_agents\":[{\"agent_id\":\"spiffe://td/a\",\"deleted\":true},{\"agent_id\":\"spiffe://td/b\",\"deleted\":false,\"error\":\"no\"}]}"
        );
    }

    #[test]
    fn only_those_that_expired_long_ago() {
        let at = |seconds| SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let hour = Duration::from_secs(3600);
        assert!(!expired_before(&agent("/a"), at(1_700_000_000), hour));
        assert!(!expired_before(&agent("/a"), at(1_700_003_600), hour));
        assert!(expired_before(&agent("/a"), at(1_700_003_601), hour));
    }
}
