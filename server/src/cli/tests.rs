use std::ffi::OsString;
use std::process::ExitCode;

use super::*;

fn code(arguments: &[&str]) -> String {
    let arguments = std::iter::once("signet-server").chain(arguments.iter().copied()).map(OsString::from);
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
    let mut found = Vec::new();
    for command in definition().get_subcommands() {
        let inner: Vec<_> =
            command.get_subcommands().map(|inner| format!("{} {}", command.get_name(), inner.get_name())).collect();
        found.extend(if inner.is_empty() { vec![command.get_name().to_owned()] } else { inner });
    }
    let expected = [
        "run",
        "validate",
        "healthcheck",
        "token generate",
        "entry create",
        "entry update",
        "entry delete",
        "entry show",
        "entry count",
        "agent list",
        "agent count",
        "agent show",
        "agent ban",
        "agent evict",
        "agent purge",
        "backup create",
        "backup verify",
        "backup restore",
        "bundle show",
        "bundle count",
        "bundle list",
        "bundle set",
        "bundle delete",
        "x509 mint",
        "jwt mint",
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
    assert_eq!(code(&["entry", "create", "--help"]), exit(0));
    assert_eq!(code(&["-version"]), exit(0));
    assert_eq!(code(&["completion", "bash"]), exit(0));
    assert_eq!(code(&["nonsense"]), exit(127));
    assert_eq!(code(&[]), exit(127));
    assert_eq!(code(&["entry"]), exit(1));
    assert_eq!(code(&["entry", "show", "-nonsense"]), exit(1));
    assert_eq!(code(&["agent", "show"]), exit(1));
    let directory = tempfile::tempdir().unwrap();
    let nowhere = directory.path().join("none.sock");
    assert_eq!(code(&["bundle", "show", "-socketPath", nowhere.to_str().unwrap()]), exit(1));
    assert_eq!(code(&["healthcheck", "-instance", "x", "-socketPath", nowhere.to_str().unwrap()]), exit(1));
}

#[test]
fn validate_tells_all_and_ends_with_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("server.conf");
    let check = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let arguments = ["signet-server", "validate", "-config", path.to_str().unwrap(), "-expandEnv"];
        let program: Program = flags::parse(arguments.map(OsString::from)).unwrap();
        let Command::Validate(run) = program.command else { panic!() };
        let mut screen = Screen::new();
        let environment: Environment = [("NAME", "example.org")].into_iter().collect();
        let code = run::check(&run, &environment, &mut screen);
        (format!("{code:?}"), screen)
    };
    let (code, screen) =
        check("server { trust_domain = \"$NAME\" data_dir = \"/d\" }\nplugins { KeyManager \"memory\" {} }");
    assert_eq!(
        (code, screen.out.as_str(), screen.err.as_str()),
        (exit(0), "SPIRE server configuration file is valid.\n", "")
    );
    let (code, screen) =
        check("server {\n trust_domain = \"$NAME\"\n bind_port = 0x10000\n}\nplugins { KeyManager \"memory\" {} }");
    assert_eq!((code, screen.out.as_str()), (exit(1), ""));
    let path = path.display();
    let expected = format!(
        "SPIRE server configuration file is invalid:\n{path}:1: server.data_dir: must be configured; add data_dir = \"/var/lib/spire/server\"\n{path}:3: server.bind_port: 65536 is no port; write a number from 1 to 65535\n"
    );
    assert_eq!(screen.err, expected);
}
