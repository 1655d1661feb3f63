//! Rules about plain text: lengths, words that have no place here, lints switched off, names.

use std::path::Path;

use super::Finding;
use super::paths::{Token, tokens};
use super::scan::File;

/// No file of code may be longer.
const LONGEST: usize = 800;

/// Words without a place in any file, and why. They are spelled in two halves, so that this file has none.
const WORDS: &[(&str, &str, &str)] = &[
    ("TO", "DO", "finish it, or write down what is missing in docs"),
    ("FIX", "ME", "fix it, or write down what is wrong in docs"),
    ("X", "XX", "say what is meant"),
    ("/ho", "me/", "a path of one machine"),
    ("/ro", "ot/", "a path of one machine"),
    ("/wo", "rk/", "a path of one machine"),
    ("/Us", "ers/", "a path of one machine"),
];

/// Lints that may be switched off in tests only.
const PANICS: &[&str] = &["unwrap_used", "expect_used", "panic", "todo", "unimplemented"];

pub fn findings(file: &File) -> Vec<Finding> {
    let mut found = Vec::new();
    words(file, &mut found);
    if file.path.extension().is_some_and(|ending| ending == "rs") {
        let lines = file.text.lines().count();
        if lines > LONGEST {
            found.push(Finding::new(
                &file.path,
                LONGEST + 1,
                format!("{lines} lines; none may have more than {LONGEST}"),
            ));
        }
        code(file, &mut found);
    }
    found
}

fn words(file: &File, found: &mut Vec<Finding>) {
    for (index, line) in file.text.lines().enumerate() {
        for (first, second, reason) in WORDS {
            let word = format!("{first}{second}");
            if has_word(line, &word) {
                found.push(Finding::new(&file.path, index + 1, format!("{word:?}: {reason}")));
            }
        }
    }
}

/// Whether `line` has `word` with no letter, digit or path character before it and no letter after it.
fn has_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let before = line.get(..at).and_then(|text| text.chars().next_back());
        let after = line.get(at + word.len()..).and_then(|text| text.chars().next());
        let joins = |character: char| character.is_alphanumeric() || "_-.}".contains(character);
        let ends =
            word.ends_with('/') || !after.is_some_and(|character| character.is_alphanumeric() || character == '_');
        !before.is_some_and(joins) && ends
    })
}

fn code(file: &File, found: &mut Vec<Finding>) {
    let tokens = tokens(&file.text);
    let tooling = is_tooling(&file.path);
    for (index, token) in tokens.iter().enumerate() {
        let next = |offset: usize| tokens.get(index + offset).map_or("", |token: &Token| token.text);
        if tooling || token.in_test {
            continue;
        }
        if token.text == "clippy" && next(1) == "::" && PANICS.contains(&next(2)) && switched_off(&tokens, index) {
            // The generated code is not ours to change.
            if !file.path.starts_with("spiffe-proto") {
                let text = format!("clippy::{} is switched off; return an error instead", next(2));
                found.push(Finding::new(&file.path, token.line, text));
            }
        }
        if token.text == "clippy"
            && next(1) == "::"
            && next(2) == "disallowed_methods"
            && !file.path.starts_with("runtime")
        {
            let text = "clippy::disallowed_methods is switched off; only `runtime` holds the exceptions";
            found.push(Finding::new(&file.path, token.line, text));
        }
        if token.text == "unsafe_code" && !file.path.starts_with("runtime") {
            found.push(Finding::new(
                &file.path,
                token.line,
                "unsafe code belongs into one module of `runtime`, if anywhere",
            ));
        }
        if matches!(token.text, "struct" | "enum" | "trait" | "type") {
            let name = next(1);
            // `KeyManager` is a word of the configuration files.
            let vague = name.ends_with("Manager") && name != "KeyManager"
                || name.ends_with("Helper")
                || name.ends_with("Utils");
            if vague {
                found.push(Finding::new(&file.path, token.line, format!("{name} says nothing; name what it is")));
            }
        }
        if token.text == "fn" && next(1).starts_with("get_") && !may_say_get(&file.path) {
            let text = format!("{}: a getter is named like what it gives, without `get_`", next(1));
            found.push(Finding::new(&file.path, token.line, text));
        }
        if token.text == "mod" && matches!(next(1), "util" | "utils" | "helper" | "helpers" | "misc" | "common") {
            found.push(Finding::new(
                &file.path,
                token.line,
                format!("module {} says nothing; name what it is about", next(1)),
            ));
        }
    }
}

/// Whether the lint named at `index` stands in `allow(…)` or `expect(…)`.
fn switched_off(tokens: &[Token<'_>], index: usize) -> bool {
    let before = tokens.iter().take(index).rev().take_while(|token| token.text != "#");
    before.into_iter().any(|token| matches!(token.text, "allow" | "expect"))
}

/// Tools and tests may read the clock, panic and leak.
fn is_tooling(path: &Path) -> bool {
    ["xtask", "tests", "fuzz"].iter().any(|folder| path.starts_with(folder))
        || path.ends_with("build.rs")
        || path.components().any(|component| {
            let name = component.as_os_str().to_string_lossy();
            let name = name.strip_suffix(".rs").unwrap_or(&name);
            name.ends_with("tests") || matches!(name, "testing" | "contract")
        })
}

/// Services have the method names of the protocol files.
fn may_say_get(path: &Path) -> bool {
    path.components().any(|component| component.as_os_str() == "api")
}
