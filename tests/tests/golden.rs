//! What our commands print, to the letter: scripts of operators read it. The sessions are in `tests/golden`;
//! `SIGNET_BLESS=1 cargo test -p e2e --test golden` writes them anew.

use std::path::Path;

use anyhow::{Context, Result};
use e2e::testkit::process::run;
use e2e::testkit::session::{Names, replay};
use e2e::testkit::workload::Workload;
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions};
use std::time::Duration;

fn golden(name: &str) -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(name)
}

fn words(words: &[String]) -> Vec<&str> {
    words.iter().map(String::as_str).collect()
}

/// Every command of the server against a running one.
#[tokio::test]
async fn server_commands() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let options = ServerOptions { server_block: "  ca_ttl = \"24h\"\n".into(), ..ServerOptions::default() };
    let server = Server::start(&Binaries::signet()?, folder.path(), &options).await?;
    let mut names = Names::default();
    names.fix(folder.path().display().to_string(), "folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let mut last_entry = String::new();
    replay(&golden("server.session"), &mut names, |command, names| {
        // `<…>` in a command is something that only this run knows.
        let command: Vec<String> = command
            .iter()
            .map(|word| match word.as_str() {
                "<entry>" => last_entry.clone(),
                word => word.replace("<folder>", &path("")),
            })
            .collect();
        let output = server.command(&words(&command))?;
        let printed = String::from_utf8_lossy(&output.stdout);
        if let Some(id) = printed.lines().find_map(|line| line.strip_prefix("Entry ID")) {
            last_entry = id.trim_start_matches([' ', ':']).to_owned();
        }
        if let Some(token) = printed.lines().find_map(|line| line.strip_prefix("Token: ")) {
            names.fix(token, "token");
        }
        Ok(output)
    })
}

/// Every command of the agent against a running one with one workload.
#[tokio::test]
async fn agent_commands() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let binaries = Binaries::signet()?;
    let server = Server::start(&binaries, &folder.path().join("server"), &ServerOptions::default()).await?;
    let node = "spiffe://example.org/node";
    let settings = AgentOptions {
        join_token: Some(server.token(Some(node))?),
        agent_block: format!("  admin_socket_path = \"{}\"\n", folder.path().join("admin/admin.sock").display()),
        ..AgentOptions::default()
    };
    let agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
    let selector = format!("unix:uid:{}", nix::unistd::getuid());
    server.ok(&[
        "entry",
        "create",
        "-parentID",
        node,
        "-spiffeID",
        "spiffe://example.org/web",
        "-selector",
        &selector,
    ])?;
    Workload::follow(&agent.socket(), None).first(Duration::from_secs(20)).await?;

    let mut names = Names::default();
    names.fix(folder.path().display().to_string(), "folder");
    let admin = folder.path().join("admin/admin.sock").display().to_string();
    let socket = agent.socket().display().to_string();
    replay(&golden("agent.session"), &mut names, |command, _| {
        let mut words = words(command);
        let is_admin = matches!(words.first(), Some(&"logger" | &"debug"));
        words.extend(["-socketPath", if is_admin { &admin } else { &socket }]);
        run(&binaries.agent, &words)
    })
}

/// What a person sees who asks how it works, and what a script sees that asks wrongly.
#[test]
fn help() -> Result<()> {
    let binaries = Binaries::signet()?;
    let mut names = Names::default();
    replay(&golden("help.session"), &mut names, |command, _| {
        let (program, rest) = command.split_first().context("an empty command")?;
        let program = if program == "signet-server" { &binaries.server } else { &binaries.agent };
        run(program, &words(rest))
    })
}
