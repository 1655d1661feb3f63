use std::path::PathBuf;

use super::imports;
use super::manifests;
use super::paths::{named, tokens};
use super::scan::File;
use super::{rules, texts};
use crate::command::root;

fn file(path: &str, text: &str) -> File {
    File { path: PathBuf::from(path), text: text.to_owned() }
}

fn paths(source: &str) -> Vec<String> {
    named(&tokens(source)).into_iter().map(|named| format!("{}:{}", named.line, named.parts.join("::"))).collect()
}

#[test]
fn the_tree_keeps_its_rules() {
    let findings = rules(root()).unwrap();
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert!(lines.is_empty(), "\n{}", lines.join("\n"));
}

#[test]
fn use_trees_are_spelled_out_with_their_lines() {
    let source = "use std::{fs,\n io::{self, Read as R}};\nuse a::b;\nfn f() { c::d::e(); }\n";
    assert_eq!(paths(source), ["1:std::fs", "2:std::io::self", "2:std::io::Read", "3:a::b", "4:c::d::e"]);
}

#[test]
fn comments_literals_and_tests_name_nothing() {
    let source = "// a::b\n/* c::d /* e::f */ g::h */\nconst A: &str = \"i::j\\\" k::l\";\nconst B: &str = r#\"m::n\"#;\n\
                  const C: char = '\\'';\nfn f<'a>(x: &'a u8) -> o::P { x }\n#[cfg(test)]\nmod tests { use q::r; }\n#[test]\nfn t() { s::t() }\nuse u::v;\n";
    assert_eq!(paths(source), ["6:o::P", "11:u::v"]);
}

#[test]
fn a_crate_may_not_import_the_other_half() {
    let findings =
        imports::findings(&file("server/src/state/mod.rs", "use std::sync::Arc;\nuse signet_agent::cache;\n"));
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].to_string(), "server/src/state/mod.rs:2: signet_server may not import signet_agent::cache");
}

#[test]
fn a_decision_may_not_wait_or_read_a_clock() {
    let source = "use tokio::sync::watch;\nuse super::super::history::Store;\nasync fn f() {}\n";
    let findings = imports::findings(&file("server/src/registry/authorized.rs", source));
    let lines: Vec<String> = findings.iter().map(ToString::to_string).collect();
    assert_eq!(
        lines,
        [
            "server/src/registry/authorized.rs:1: a decision may not see asynchronous code: tokio::sync::watch",
            "server/src/registry/authorized.rs:2: a decision may not see the store: crate::history::Store",
            "server/src/registry/authorized.rs:3: a decision may not be asynchronous (`async`)",
        ]
    );
}

#[test]
fn nothing_sees_the_shell_and_the_wire_stops_at_the_edge() {
    let seen =
        imports::findings(&file("agent/src/cache/mod.rs", "use crate::api::workload;\nuse spiffe_proto::types;\n"));
    let lines: Vec<String> = seen.iter().map(|finding| finding.text.clone()).collect();
    assert_eq!(
        lines,
        [
            "cache may not see crate::api::workload: nothing sees `app`, `api` or `cli`",
            "types of the wire stop at the edge: cache may not see spiffe_proto::types",
        ]
    );
    assert!(imports::findings(&file("agent/src/app.rs", "use crate::api::workload;\n")).is_empty());
    assert!(imports::findings(&file("agent/src/cli/run.rs", "use crate::app;\nuse spiffe_proto::types;\n")).is_empty());
}

#[test]
fn a_manifest_may_not_add_a_dependency_upwards() {
    let text = "[dependencies]\nbytes.workspace = true\ntransport.workspace = true\n[lints]\nworkspace = true\n";
    let findings = manifests::findings(&file("spiffe/Cargo.toml", text));
    assert_eq!(findings.len(), 1);
    assert_eq!(findings[0].to_string(), "spiffe/Cargo.toml:3: spiffe may not depend on transport");
}

#[test]
fn long_files_vague_names_and_silenced_panics_are_found() {
    let found = |path: &str, text: &str| -> Vec<String> {
        texts::findings(&file(path, text)).into_iter().map(|finding| finding.to_string()).collect()
    };
    let long = "\n".repeat(801);
    assert_eq!(found("spiffe/src/a.rs", &long), ["spiffe/src/a.rs:801: 801 lines; none may have more than 800"]);
    assert_eq!(found("spiffe/src/a.rs", "struct KeyHelper;\n").len(), 1);
    assert_eq!(found("spiffe/src/a.rs", "fn get_id() {}\n").len(), 1);
    assert_eq!(found("server/src/api/agent.rs", "fn get_agent() {}\n").len(), 0);
    let silenced = "#[allow(clippy::unwrap_used)]\nfn f() {}\n";
    assert_eq!(
        found("spiffe/src/a.rs", silenced),
        ["spiffe/src/a.rs:1: clippy::unwrap_used is switched off; return an error instead"]
    );
    assert_eq!(found("spiffe/src/a.rs", &format!("#[cfg(test)]\nmod tests {{\n{silenced}}}\n")).len(), 0);
}

#[test]
fn words_without_a_place_are_found_in_every_kind_of_file() {
    let word = ["TO", "DO"].concat();
    let findings = texts::findings(&file("docs/a.md", &format!("fine\n{word}: later\n")));
    assert_eq!(findings.len(), 1);
    assert_eq!((findings[0].line, findings[0].file.as_path()), (2, std::path::Path::new("docs/a.md")));
    assert!(texts::findings(&file("docs/a.md", "TODOS\nunix:/tmp/home/x\n")).is_empty());
}
