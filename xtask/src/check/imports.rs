//! Who may import whom: the rules of ARCHITECTURE.md.

use std::path::Path;

use super::Finding;
use super::paths::{named, tokens};
use super::scan::File;

/// Folders of crates with the name that `use` lines have for them.
const CRATES: &[(&str, &str)] = &[
    ("spiffe", "spiffe"),
    ("spiffe-proto", "spiffe_proto"),
    ("runtime", "runtime"),
    ("transport", "transport"),
    ("server", "signet_server"),
    ("agent", "signet_agent"),
];

/// Modules that decide, as paths below their crate; an empty path is the whole crate.
const DECISIONS: &[(&str, &[&str])] = &[
    ("spiffe", &[]),
    ("signet_server", &["authority", "journal"]),
    ("signet_server", &["authority", "schedule"]),
    ("signet_server", &["authority", "profile"]),
    ("signet_server", &["registry", "authorized"]),
    ("signet_server", &["registry", "similar"]),
    ("signet_server", &["registry", "expire"]),
    ("signet_server", &["registry", "entry"]),
    ("signet_server", &["state"]),
    ("signet_server", &["restore", "decide"]),
    ("transport", &["peer", "party"]),
    ("signet_server", &["feed", "look"]),
    ("signet_server", &["feed", "session"]),
    ("signet_agent", &["sync", "plan"]),
    ("signet_agent", &["cache", "issue"]),
    ("signet_agent", &["identity", "next"]),
];

/// What a decision may not see.
const IMPURE: &[(&[&str], &str)] = &[
    (&["tokio"], "asynchronous code"),
    (&["tokio_stream"], "asynchronous code"),
    (&["futures_util"], "asynchronous code"),
    (&["futures_core"], "asynchronous code"),
    (&["async_trait"], "asynchronous code"),
    (&["std", "fs"], "files"),
    (&["std", "path"], "files"),
    (&["std", "io"], "files and sockets"),
    (&["std", "os"], "the operating system"),
    (&["std", "process"], "the operating system"),
    (&["std", "env"], "the environment"),
    (&["std", "thread"], "threads"),
    (&["std", "net", "TcpStream"], "sockets"),
    (&["std", "net", "TcpListener"], "sockets"),
    (&["std", "net", "UdpSocket"], "sockets"),
    (&["nix"], "the operating system"),
    (&["hyper"], "sockets"),
    (&["aws_lc_rs", "rand"], "randomness"),
    (&["runtime", "clock"], "a clock"),
    (&["runtime", "entropy"], "randomness"),
    (&["std", "time", "Instant"], "a clock"),
    (&["sled"], "the store"),
    (&["crate", "history"], "the store"),
    (&["tonic"], "the wire"),
    (&["prost"], "protobuf"),
    (&["prost_types"], "protobuf"),
    (&["spiffe_proto"], "protobuf"),
];

/// Files that may see something impure all the same, and why.
const EXCEPTIONS: &[(&str, &[&str])] = &[
    // A position is a value; the state says at which one it is.
    ("server/src/state", &["crate", "history", "Position"]),
    ("server/src/state", &["crate", "history", "HistoryId"]),
    ("server/src/restore/decide.rs", &["crate", "history", "Position"]),
    ("server/src/restore/decide.rs", &["crate", "history", "HistoryId"]),
    // The signature functions of the provider take the generator as an argument.
    ("spiffe/src/attest/x509pop/prove.rs", &["aws_lc_rs", "rand"]),
];

/// Modules of server and agent in which types of the wire may appear.
const WIRE: &[(&str, &[&str])] = &[
    ("signet_server", &["api"]),
    ("signet_server", &["cli"]),
    ("signet_server", &["feed"]),
    ("signet_server", &["app"]),
    ("signet_agent", &["api"]),
    ("signet_agent", &["cli"]),
    ("signet_agent", &["sync"]),
    ("signet_agent", &["server_link"]),
    ("signet_agent", &["app"]),
];

/// Path parts below a crate.
type Module = &'static [&'static str];

/// Trait modules with what they may not see: they are below the domain.
const BELOW: &[(&str, Module, &[Module])] = &[
    (
        "signet_server",
        &["history"],
        &[&["registry"], &["authority"], &["attest"], &["feed"], &["federation"], &["publish"]],
    ),
    ("signet_server", &["authority", "keys"], &[&["registry"], &["attest"], &["feed"], &["history"], &["state"]]),
    ("signet_server", &["state"], &[&["registry"], &["authority"], &["attest"], &["feed"], &["history"]]),
    ("signet_agent", &["keys"], &[&["sync"], &["cache"], &["identity"], &["server_link"], &["workload"]]),
];

pub fn findings(file: &File) -> Vec<Finding> {
    let Some((krate, module)) = place(&file.path) else { return Vec::new() };
    let module: Vec<&str> = module.iter().map(String::as_str).collect();
    let mut found = Vec::new();
    let tokens = tokens(&file.text);
    for named in named(&tokens) {
        let inner: Vec<&str> = module.iter().copied().chain(named.modules.iter().map(String::as_str)).collect();
        let parts = absolute(&named.parts, &inner);
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        let excepted = |(place, seen): &(&str, &[&str])| file.path.starts_with(place) && parts.starts_with(seen);
        if EXCEPTIONS.iter().any(excepted) {
            continue;
        }
        for text in broken(krate, &module, &parts) {
            found.push(Finding::new(&file.path, named.line, text));
        }
    }
    if DECISIONS.iter().any(|(of, below)| *of == krate && module.starts_with(below)) {
        for token in tokens.iter().filter(|token| !token.in_test && matches!(token.text, "async" | "await")) {
            found.push(Finding::new(
                &file.path,
                token.line,
                format!("a decision may not be asynchronous (`{}`)", token.text),
            ));
        }
    }
    found.dedup();
    found
}

/// The crate and module that a file is, if it is code of ours outside of tests.
fn place(path: &Path) -> Option<(&'static str, Vec<String>)> {
    let mut parts = path.iter().map(|part| part.to_string_lossy().into_owned());
    let folder = parts.next()?;
    let (_, krate) = CRATES.iter().find(|(of, _)| *of == folder)?;
    if parts.next()? != "src" {
        return None;
    }
    let mut module: Vec<String> = parts.collect();
    let last = module.pop()?;
    match last.strip_suffix(".rs")? {
        "lib" | "main" | "mod" => {}
        name => module.push(name.to_owned()),
    }
    let of_tests =
        |part: &String| part.ends_with("tests") || matches!(part.as_str(), "testing" | "contract" | "faulty");
    if module.iter().any(of_tests) {
        return None;
    }
    Some((krate, module))
}

/// A path with `self` and `super` replaced by `crate::…`.
fn absolute(parts: &[String], module: &[&str]) -> Vec<String> {
    let mut base: Option<Vec<&str>> = None;
    let mut rest = parts.iter().map(String::as_str).peekable();
    while let Some(part) = rest.peek() {
        match *part {
            "self" => base = Some(base.unwrap_or_else(|| module.to_vec())),
            "super" => {
                let mut outer = base.unwrap_or_else(|| module.to_vec());
                outer.pop();
                base = Some(outer);
            }
            _ => break,
        }
        rest.next();
    }
    let prefix = base.map(|base| std::iter::once("crate").chain(base).map(ToOwned::to_owned).collect::<Vec<_>>());
    prefix.unwrap_or_default().into_iter().chain(rest.map(ToOwned::to_owned)).collect()
}

fn broken(krate: &str, module: &[&str], parts: &[&str]) -> Vec<String> {
    let mut found = Vec::new();
    let first = parts.first().copied().unwrap_or_default();
    let path = parts.join("::");

    // 1. Crates.
    let forbidden: &[&str] = match krate {
        "spiffe" => &["runtime", "spiffe_proto", "transport", "signet_server", "signet_agent"],
        "runtime" => &["spiffe", "spiffe_proto", "transport", "signet_server", "signet_agent"],
        "spiffe_proto" => &["spiffe", "runtime", "transport", "signet_server", "signet_agent"],
        "transport" => &["spiffe_proto", "signet_server", "signet_agent"],
        "signet_server" => &["signet_agent"],
        _ => &["signet_server"],
    };
    // A module may be called like one of our crates; inside its own crate it is reached through `crate`.
    if forbidden.contains(&first) && !(first == "spiffe" && krate == "spiffe_proto") {
        found.push(format!("{krate} may not import {path}"));
    }

    // 2. Inside server and agent.
    let shell = ["app", "api", "cli"];
    let here = module.first().copied().unwrap_or_default();
    let there = if first == "crate" { parts.get(1).copied().unwrap_or_default() } else { "" };
    if matches!(krate, "signet_server" | "signet_agent") && shell.contains(&there) && here != there && !here.is_empty()
    {
        // `app` sees everything, and the command `run` starts it.
        if here != "app" && !(here == "cli" && there == "app") {
            found.push(format!("{here} may not see {path}: nothing sees `app`, `api` or `cli`"));
        }
    }
    for (of, below, above) in BELOW {
        let seen = first == "crate" && above.iter().any(|above| parts.get(1..).unwrap_or_default().starts_with(above));
        if *of == krate && module.starts_with(below) && seen {
            found.push(format!("{} is below {path} and may not see it", below.join("::")));
        }
    }

    // 3. The wire.
    let wire = WIRE.iter().any(|(of, below)| *of == krate && module.starts_with(below));
    if first == "spiffe_proto" && matches!(krate, "signet_server" | "signet_agent") && !wire && !module.is_empty() {
        found.push(format!("types of the wire stop at the edge: {} may not see {path}", module.join("::")));
    }

    // 4. Decisions.
    if DECISIONS.iter().any(|(of, below)| *of == krate && module.starts_with(below)) {
        for (prefix, what) in IMPURE {
            if parts.starts_with(prefix) {
                found.push(format!("a decision may not see {what}: {path}"));
            }
        }
    }
    found
}
