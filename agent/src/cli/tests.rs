use std::ffi::OsString;
use std::process::ExitCode;

use super::*;

fn code(arguments: &[&str]) -> String {
    let arguments = std::iter::once("signet-agent").chain(arguments.iter().copied()).map(OsString::from);
    format!("{:?}", main(arguments))
}

fn exit(code: u8) -> String {
    format!("{:?}", ExitCode::from(code))
}

#[test]
fn the_definition_is_sound() {
    definition().debug_assert();
}

#[test]
fn every_command_of_the_list_is_there() {
    fn leaves(command: &clap::Command, prefix: &str, found: &mut Vec<String>) {
        for inner in command.get_subcommands() {
            let name = format!("{prefix}{}", inner.get_name());
            if inner.get_subcommands().next().is_none() {
                found.push(name.clone());
            }
            leaves(inner, &format!("{name} "), found);
        }
    }
    let mut found = Vec::new();
    leaves(&definition(), "", &mut found);
    let expected = [
        "run",
        "validate",
        "healthcheck",
        "api fetch x509",
        "api fetch jwt",
        "api validate jwt",
        "api watch",
        "logger get",
        "logger set",
        "logger reset",
        "debug getinfo",
        "completion",
    ];
    assert_eq!(found, expected);
}

#[test]
fn exit_codes() {
    assert_eq!(code(&["-h"]), exit(0));
    assert_eq!(code(&["api", "fetch", "-h"]), exit(0));
    assert_eq!(code(&["--version"]), exit(0));
    assert_eq!(code(&["nonsense"]), exit(127));
    assert_eq!(code(&[]), exit(127));
    assert_eq!(code(&["api"]), exit(1));
    let directory = tempfile::tempdir().unwrap();
    let nowhere = directory.path().join("none.sock");
    let nowhere = nowhere.to_str().unwrap();
    assert_eq!(code(&["healthcheck", "-socketPath", nowhere]), exit(1));
    assert_eq!(code(&["api", "fetch", "-socketPath", nowhere, "-timeout", "1s"]), exit(1));
    assert_eq!(code(&["api", "fetch", "x509", "-socketPath", nowhere, "-silent"]), exit(1));
    assert_eq!(code(&["api", "fetch", "jwt", "-socketPath", nowhere, "-audience", "a,b"]), exit(1));
    assert_eq!(code(&["api", "fetch", "jwt"]), exit(1));
    assert_eq!(code(&["api", "validate", "jwt", "-audience", "a"]), exit(1));
    assert_eq!(code(&["logger", "get", "-socketPath", nowhere]), exit(1));
    assert_eq!(code(&["debug", "getinfo", "-socketPath", nowhere]), exit(1));
}

#[test]
fn validate_tells_all_and_ends_with_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("agent.conf");
    let check = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let arguments = ["signet-agent", "validate", "-config", path.to_str().unwrap(), "-insecureBootstrap=false"];
        let program: Program = flags::parse(arguments.map(OsString::from)).unwrap();
        let Command::Validate(run) = program.command else { panic!() };
        let mut screen = Screen::new();
        let code = run::check(&run, &Environment::default(), &mut screen);
        (format!("{code:?}"), screen)
    };
    let plugins = "plugins { KeyManager \"memory\" {} NodeAttestor \"join_token\" {} WorkloadAttestor \"unix\" {} }";
    let (code, screen) = check(&format!(
        "agent {{ trust_domain = \"td\" server_address = \"s\" server_port = 1 trust_bundle_path = \"/b\" }}\n{plugins}"
    ));
    let said = (code, screen.out.as_str(), screen.err.as_str());
    assert_eq!(said, (exit(0), "SPIRE agent configuration file is valid.\n", ""));
    let (code, screen) =
        check(&format!("agent {{ trust_domain = \"td\" server_address = \"s\" server_port = 1 }}\n{plugins}"));
    assert_eq!((code, screen.out.as_str()), (exit(1), ""));
    let expected = format!(
        "SPIRE agent configuration file is invalid:\n{}:1: agent.trust_bundle_path: must be configured unless insecure_bootstrap is set; add trust_bundle_path = \"…\"; `bundle show` on the server prints the bundle\n",
        path.display()
    );
    assert_eq!(screen.err, expected);
}
