//! The command line and the environment, in the manner of Go programs: `-flag value`, `-flag=value`, `--flag`.

use std::collections::HashMap;
use std::ffi::OsString;
use std::io::Write;
use std::process::ExitCode;

use clap::error::ErrorKind;
use clap::{Command, Parser};

/// The environment as it was at the start of the process.
#[derive(Clone, Debug, Default)]
pub struct Environment {
    values: HashMap<String, String>,
}

impl Environment {
    /// Reads the environment. Names and values that are not UTF-8 are left out.
    pub fn read() -> Self {
        let values =
            std::env::vars_os().filter_map(|(name, value)| Some((name.into_string().ok()?, value.into_string().ok()?)));
        Self { values: values.collect() }
    }

    /// The value of a variable; an empty one counts as unset.
    pub fn value(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Replaces `$NAME` and `${NAME}` in `text`, as Go's `os.Expand` does: an unset variable is empty, `$$` is `$`, and
    /// a `$` that no name follows stays.
    pub fn expand(&self, text: &str) -> String {
        let mut out = String::with_capacity(text.len());
        let mut rest = text;
        while let Some(at) = rest.find('$') {
            let (before, after) = rest.split_at(at);
            out.push_str(before);
            let after = after.get(1..).unwrap_or("");
            let (name, used) = name_after_dollar(after);
            match name {
                Some("$") => out.push('$'),
                Some(name) => out.push_str(self.values.get(name).map_or("", String::as_str)),
                None if used == 0 => out.push('$'),
                // `${}` and `${` without an end are swallowed.
                None => {}
            }
            rest = after.get(used..).unwrap_or("");
        }
        out.push_str(rest);
        out
    }
}

impl<N: Into<String>, V: Into<String>> FromIterator<(N, V)> for Environment {
    fn from_iter<I: IntoIterator<Item = (N, V)>>(pairs: I) -> Self {
        Self { values: pairs.into_iter().map(|(name, value)| (name.into(), value.into())).collect() }
    }
}

/// The variable's name after a `$`, and how many bytes of `text` it takes.
fn name_after_dollar(text: &str) -> (Option<&str>, usize) {
    // Names of the shell's special parameters are one character long.
    let special = |c: char| c.is_ascii_digit() || "*#$@!?-".contains(c);
    let part = |c: char| c.is_ascii_alphanumeric() || c == '_';
    match text.chars().next() {
        Some('{') => {
            let inner = text.get(1..).unwrap_or("");
            if let Some(c) = inner.chars().next().filter(|c| special(*c))
                && inner.get(c.len_utf8()..).is_some_and(|rest| rest.starts_with('}'))
            {
                return (inner.get(..c.len_utf8()), 3);
            }
            match inner.find('}') {
                Some(0) => (None, 2),
                Some(end) => (inner.get(..end), end + 2),
                None => (None, 1),
            }
        }
        Some(c) if special(c) => (text.get(..1), 1),
        Some(c) if part(c) => {
            let end = text.find(|c| !part(c)).unwrap_or(text.len());
            (text.get(..end), end)
        }
        _ => (None, 0),
    }
}

/// Why no socket path follows from flags and environment.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// An instance was named, but not how its socket is found.
    #[error("you must define {variable} to use the instance flag")]
    NoTemplate {
        /// The variable.
        variable: String,
    },
    /// The template has no place for the instance.
    #[error("failed to find %i in {variable}")]
    NoPlace {
        /// The variable.
        variable: String,
    },
}

/// Where a command finds the socket of a running process: a path that was given (other than the default), else the
/// template `<variable>_TEMPLATE` with `%i` replaced by the instance, else the environment's `variable`, else `default`.
///
/// # Errors
///
/// [`SocketError`] if an instance was named and the template is missing or has no `%i`, whatever else was given.
pub fn socket_path(
    given: &str,
    instance: Option<&str>,
    variable: &str,
    default: &str,
    environment: &Environment,
) -> Result<std::path::PathBuf, SocketError> {
    let from_template = match instance.filter(|instance| !instance.is_empty()) {
        None => None,
        Some(instance) => {
            let variable = format!("{variable}_TEMPLATE");
            match environment.value(&variable) {
                None => return Err(SocketError::NoTemplate { variable }),
                Some(template) if !template.contains("%i") => return Err(SocketError::NoPlace { variable }),
                Some(template) => Some(template.replace("%i", instance)),
            }
        }
    };
    let path = if given != default {
        given.to_owned()
    } else {
        from_template.or_else(|| environment.value(variable).map(str::to_owned)).unwrap_or_else(|| default.to_owned())
    };
    Ok(path.into())
}

/// Rewrites arguments that are meant for Go's `flag` package into those that clap understands alike, and returns what Go
/// leaves over.
///
/// One dash is as good as two. What follows a flag that takes a value is its value, whatever it begins with. The first
/// argument that is neither a flag nor a value ends the flags of its command, as `--` does: Go reads nothing after it. Only
/// commands with arguments of their own go on behind it.
pub fn go_style(program: &Command, arguments: impl IntoIterator<Item = OsString>) -> (Vec<OsString>, Vec<OsString>) {
    let mut arguments = arguments.into_iter();
    let mut out: Vec<OsString> = arguments.next().into_iter().collect();
    let mut command = program;
    let mut flags_seen = false;
    while let Some(argument) = arguments.next() {
        let text = argument.to_string_lossy();
        let Some(flag) = text.strip_prefix('-').filter(|rest| !rest.is_empty() && *rest != "-") else {
            match command.find_subcommand(&*text).filter(|_| !flags_seen) {
                Some(inner) => {
                    command = inner;
                    out.push(argument);
                    continue;
                }
                // Commands that SPIRE does not have take their arguments in any order.
                None if command.get_positionals().next().is_some() => {
                    flags_seen = true;
                    out.push(argument);
                    continue;
                }
                // No command at all, of which clap knows what to say.
                None if needs_command(command) => {
                    out.push(argument);
                    out.extend(arguments);
                    return (out, Vec::new());
                }
                None => return (out, std::iter::once(argument).chain(arguments).collect()),
            }
        };
        flags_seen = true;
        let flag = flag.strip_prefix('-').unwrap_or(flag);
        let name = flag.split('=').next().unwrap_or(flag);
        let known = command.get_arguments().find(|known| known.get_long() == Some(name));
        let takes_next = known.is_some_and(|known| known.get_action().takes_values() && !known.is_require_equals_set());
        // A single letter that is no flag of ours may be a short one of clap's: `-h`.
        let dashes = if known.is_none() && name.len() == 1 { "-" } else { "--" };
        let mut rewritten = OsString::from(format!("{dashes}{flag}"));
        if takes_next
            && !flag.contains('=')
            && let Some(value) = arguments.next()
        {
            rewritten.push("=");
            rewritten.push(value);
        }
        out.push(rewritten);
    }
    (out, Vec::new())
}

/// Whether the command does nothing by itself.
fn needs_command(command: &Command) -> bool {
    command.is_subcommand_required_set() || command.is_arg_required_else_help_set()
}

/// A boolean as Go's `flag` reads it.
///
/// # Errors
///
/// A sentence for every other text.
pub fn boolean(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("neither true nor false".to_owned()),
    }
}

/// Reads `arguments`, the program's name first, into `P`.
///
/// # Errors
///
/// The exit code with which to end, after what is to be said was written: 0 for help and version (standard output), 127
/// for an unknown command, 1 for wrong flags (standard error).
pub fn parse<P: Parser>(arguments: impl IntoIterator<Item = OsString>) -> Result<P, ExitCode> {
    // A flag that is given again takes the place of the first.
    let mut command = P::command().args_override_self(true);
    let (arguments, ignored) = go_style(&command, arguments);
    if let Some(first) = ignored.iter().find(|argument| *argument != "--") {
        let text = "Warning: ignored, as it belongs to no flag, and everything after it:";
        let _ = writeln!(std::io::stderr(), "{text} {:?}", first.to_string_lossy());
    }
    let error = match command.try_get_matches_from_mut(&arguments).and_then(|matches| P::from_arg_matches(&matches)) {
        Ok(parsed) => return Ok(parsed),
        Err(error) => error,
    };
    let text = error.render();
    match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
            let _ = write!(std::io::stdout(), "{text}");
            Err(ExitCode::SUCCESS)
        }
        _ => {
            let _ = write!(std::io::stderr(), "{text}");
            let named = arguments.iter().skip(1).find(|argument| !argument.to_string_lossy().starts_with('-'));
            let known = named.is_some_and(|name| command.find_subcommand(name).is_some());
            let about_command = !known && command.has_subcommands();
            Err(ExitCode::from(if about_command { 127 } else { 1 }))
        }
    }
}

/// Writes a completion script for `shell` (`bash`, `zsh`, `fish`, `elvish`, `powershell`) to standard output.
pub fn write_completion<P: Parser>(shell: clap_complete::Shell, program: &str) {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut P::command(), program, &mut script);
    let _ = std::io::stdout().lock().write_all(&script);
}

pub use clap_complete::Shell;

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn expands_as_go_does() {
        let environment: Environment = [("A", "1"), ("LONG_NAME", "two"), ("EMPTY", "")].into_iter().collect();
        for (text, expanded) in [
            ("", ""),
            ("plain", "plain"),
            ("$A", "1"),
            ("${A}b$A.", "1b1."),
            ("$LONG_NAME/x", "two/x"),
            ("$UNSET-${UNSET}|", "-|"),
            ("$$A", "$A"),
            ("${$}", "$"),
            ("100% $ ", "100% $ "),
            ("end$", "end$"),
            ("${}x", "x"),
            ("${open", "open"),
            ("$é", "$é"),
            ("$1x", "x"),
        ] {
            assert_eq!(environment.expand(text), expanded, "{text}");
        }
        assert_eq!(environment.value("EMPTY"), None);
        assert_eq!(environment.value("A"), Some("1"));
    }

    #[test]
    fn sockets_are_found_in_order() {
        let find = |given, instance, pairs: &[(&str, &str)]| {
            let environment: Environment = pairs.iter().copied().collect();
            socket_path(given, instance, "SOCK", "/default", &environment)
        };
        let (both, template) = ([("SOCK", "/env"), ("SOCK_TEMPLATE", "/t/%i")], [("SOCK_TEMPLATE", "/t")]);
        assert_eq!(find("/default", None, &[]).unwrap().to_str(), Some("/default"));
        assert_eq!(find("/default", None, &both).unwrap().to_str(), Some("/env"));
        assert_eq!(find("/default", Some("a"), &both).unwrap().to_str(), Some("/t/a"));
        assert_eq!(find("/given", Some("a"), &both).unwrap().to_str(), Some("/given"));
        let variable = "SOCK_TEMPLATE".to_owned();
        assert_eq!(find("/given", Some("a"), &[]), Err(SocketError::NoTemplate { variable: variable.clone() }));
        assert_eq!(find("/default", Some("a"), &template), Err(SocketError::NoPlace { variable }));
    }

    #[derive(Debug, Parser)]
    #[command(name = "p", version = "1")]
    struct Program {
        #[command(subcommand)]
        command: Commands,
    }

    #[derive(Debug, clap::Subcommand)]
    enum Commands {
        Show {
            #[arg(long = "entryID", default_value = "")]
            entry_id: String,
            #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", default_value = "false", value_parser = boolean)]
            node: bool,
            #[arg(long = "selector")]
            selectors: Vec<String>,
            #[arg(long, default_value_t = 7, allow_negative_numbers = true)]
            ttl: i64,
        },
    }

    #[test]
    fn single_dashes_become_double() {
        let rewritten = |given: &[&str]| {
            let (out, left) = go_style(&Program::command(), given.iter().map(OsString::from));
            let text = |list: Vec<OsString>| list.into_iter().map(|a| a.into_string().unwrap()).collect::<Vec<_>>();
            (text(out), text(left))
        };
        let (out, left) =
            rewritten(&["p", "show", "-entryID", "x", "-node=true", "--ttl", "-5", "-h", "-x=1", "-", "-node"]);
        assert_eq!(out, ["p", "show", "--entryID=x", "--node=true", "--ttl=-5", "-h", "-x=1"]);
        assert_eq!(left, ["-", "-node"]);
        assert_eq!(rewritten(&["p", "-version", "nope", "-a"]).0, ["p", "--version", "nope", "-a"]);
        assert_eq!(rewritten(&["p", "show", "-ttl"]).0, ["p", "show", "--ttl"]);
        assert_eq!(
            rewritten(&["p", "show", "--", "-node"]),
            (vec!["p".into(), "show".into()], vec!["--".into(), "-node".into()])
        );
    }

    #[test]
    fn of_repeated_flags_the_last_wins_and_lists_grow() {
        let given = [
            "p",
            "show",
            "-ttl",
            "1",
            "-entryID",
            "a",
            "-selector",
            "a:b",
            "-node",
            "-ttl=2",
            "-selector=c:d",
            "-entryID",
            "b",
            "-node=false",
        ];
        let Commands::Show { entry_id, node, selectors, ttl } = run(&given).unwrap().command;
        assert_eq!((entry_id.as_str(), node, ttl), ("b", false, 2));
        assert_eq!(selectors, ["a:b", "c:d"]);
    }

    #[test]
    fn values_may_begin_with_a_dash() {
        let given = ["p", "show", "-entryID", "-x", "-selector", "--", "-selector", "-node", "-ttl", "-3"];
        let Commands::Show { entry_id, node, selectors, ttl } = run(&given).unwrap().command;
        assert_eq!((entry_id.as_str(), node, ttl), ("-x", false, -3));
        assert_eq!(selectors, ["--", "-node"]);
        let Commands::Show { entry_id, .. } = run(&["p", "show", "-entryID", ""]).unwrap().command;
        assert_eq!(entry_id, "");
    }

    #[test]
    fn positional_leftovers_end_the_flags_and_are_ignored() {
        let given = ["p", "show", "-entryID", "a", "left", "-entryID", "b", "-nope"];
        let Commands::Show { entry_id, .. } = run(&given).unwrap().command;
        assert_eq!(entry_id, "a");
        // A boolean takes its value after an equals sign only: the word is left over.
        let Commands::Show { node, ttl, .. } = run(&["p", "show", "-node", "false", "-ttl", "1"]).unwrap().command;
        assert_eq!((node, ttl), (true, 7));
    }

    fn run(arguments: &[&str]) -> Result<Program, ExitCode> {
        parse(arguments.iter().map(OsString::from))
    }

    #[test]
    fn flags_are_read_and_exits_mapped() {
        let Commands::Show { entry_id, node, .. } = run(&["p", "show", "-entryID=a", "-node"]).unwrap().command;
        assert_eq!((entry_id.as_str(), node), ("a", true));
        let Commands::Show { node, .. } = run(&["p", "show", "-node=F"]).unwrap().command;
        assert!(!node);
        let code = |arguments: &[&str]| format!("{:?}", run(arguments).unwrap_err());
        assert_eq!(code(&["p", "-h"]), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code(&["p", "--version"]), format!("{:?}", ExitCode::SUCCESS));
        assert_eq!(code(&["p", "nope"]), format!("{:?}", ExitCode::from(127)));
        assert_eq!(code(&["p"]), format!("{:?}", ExitCode::from(127)));
        assert_eq!(code(&["p", "show", "-nope"]), format!("{:?}", ExitCode::from(1)));
    }
}
