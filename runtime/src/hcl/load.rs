//! A configuration file from disk to a document, and the report of everything that is wrong with it.

use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Document, HclError, Located, MAX_BYTES, Mistake, Section};
use crate::duration;
use crate::flags::Environment;

/// Why a configuration cannot be used. Shown to people as it is, several lines long.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There is no such file.
    #[error("could not find config file {}: please use the -config flag", path.display())]
    Missing {
        /// The file, as absolute path.
        path: PathBuf,
    },
    /// The file cannot be read.
    #[error("unable to read configuration at {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The text is not of the dialect.
    #[error("unable to read configuration at {}", path.display())]
    Syntax {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: HclError,
    },
    /// The text can be read, but what it says cannot be run.
    #[error("{}", report(path, mistakes))]
    Mistakes {
        /// The file.
        path: PathBuf,
        /// Everything that is wrong, in the order of lines.
        mistakes: Vec<Mistake>,
    },
}

/// One line for each mistake: file, line, key, what is wrong, what to do.
pub fn report(path: &Path, mistakes: &[Mistake]) -> String {
    let lines: Vec<String> = mistakes
        .iter()
        .map(|mistake| {
            let place = match mistake.line {
                Some(line) => format!("{}:{line}", path.display()),
                None => path.display().to_string(),
            };
            format!("{place}: {}: {}; {}", mistake.key, mistake.message, mistake.remedy)
        })
        .collect();
    lines.join("\n")
}

impl Document {
    /// Reads the file at `path`, replacing environment variables first if `expand` is given.
    ///
    /// # Errors
    ///
    /// [`ConfigError`], without the mistakes that only a reader of the document can find.
    pub fn load(path: &Path, expand: Option<&Environment>) -> Result<Self, ConfigError> {
        let read = |source| ConfigError::Read { path: path.to_owned(), source };
        let syntax = |source| ConfigError::Syntax { path: path.to_owned(), source };
        match std::fs::metadata(path) {
            Ok(metadata) if metadata.len() > MAX_BYTES as u64 => return Err(syntax(HclError::TooLong)),
            Ok(_) => {}
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                return Err(ConfigError::Missing {
                    path: std::path::absolute(path).unwrap_or_else(|_| path.to_owned()),
                });
            }
            Err(error) => return Err(read(error)),
        }
        let text = std::fs::read_to_string(path).map_err(read)?;
        let text = match expand {
            Some(environment) => environment.expand(&text),
            None => text,
        };
        Self::parse(&text).map_err(syntax)
    }
}

/// One `Type "name" { … }` of a `plugins` block.
#[derive(Clone, Debug)]
pub struct Plugin<'d> {
    /// The type: `NodeAttestor`.
    pub kind: Located<String>,
    /// The name: `join_token`.
    pub name: Located<String>,
    /// `plugin_data`, empty if there is none.
    pub data: Section<'d>,
}

/// Reads the `plugins` block: enabled plugins in the order in which they stand.
///
/// What cannot be run is refused here for every type: external programs, data files, a plugin named twice.
pub fn plugins<'d>(section: &Section<'d>) -> Vec<Plugin<'d>> {
    let mut plugins: Vec<Plugin<'d>> = Vec::new();
    let mistakes = section.mistakes();
    let mut kinds: Vec<Located<String>> = Vec::new();
    for kind in section.keys() {
        if !kinds.iter().any(|known| known.value == kind.value) {
            kinds.push(kind);
        }
    }
    for kind in kinds {
        for (name, block) in section.labelled(&kind.value) {
            if plugins.iter().any(|known| known.kind.value == kind.value && known.name.value == name.value) {
                mistakes.refuse_at(&name, "declared more than once", "keep one of the blocks");
                continue;
            }
            let enabled = block.boolean("enabled").is_none_or(|enabled| enabled.value);
            if let Some(command) = block.text("plugin_cmd").filter(|command| enabled && !command.value.is_empty()) {
                let remedy = "remove plugin_cmd, or use a built-in plugin";
                mistakes.refuse_at(&command, "external plugins are not served yet", remedy);
            }
            block.texts("plugin_args");
            block.text("plugin_checksum");
            if let Some(file) = block.text("plugin_data_file").filter(|_| enabled) {
                let remedy = "move the file's text into plugin_data { }";
                mistakes.refuse_at(&file, "data files of plugins are not served yet", remedy);
            }
            let data =
                block.section("plugin_data").unwrap_or_else(|| Section::absent(&block.key("plugin_data"), mistakes));
            block.warn_unknown();
            if enabled {
                plugins.push(Plugin { kind: kind.clone(), name, data });
            }
        }
    }
    plugins
}

impl Section<'_> {
    /// A duration of Go's syntax; a mistake is noted.
    pub fn duration(&self, key: &str) -> Option<Located<Duration>> {
        let given = self.text(key).filter(|given| !given.value.is_empty())?;
        match duration::parse(&given.value) {
            Ok(value) => Some(given.map(|_| value)),
            Err(error) => {
                self.mistakes().refuse_at(&given, error.to_string(), "write it like 90s, 30m or 24h");
                None
            }
        }
    }

    /// A whole number of at least `least`; a mistake is noted.
    pub fn count(&self, key: &str, least: u32) -> Option<Located<u32>> {
        let given = self.integer(key)?;
        match u32::try_from(given.value) {
            Ok(value) if value >= least => Some(given.map(|_| value)),
            _ => {
                let remedy = format!("write a number of at least {least}");
                self.mistakes().refuse_at(&given, format!("{} is out of range", given.value), remedy);
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::Mistakes;
    use super::*;

    #[test]
    fn plugins_keep_their_order_and_refuse_what_cannot_run() {
        let text = "plugins {\n A \"x\" { plugin_data { k = 1 } }\n B \"y\" { plugin_cmd = \"/p\" }\n A \"z\" { enabled = false plugin_cmd = \"/q\" }\n A \"x\" {}\n C \"w\" plugin_data { k = 2 }\n B \"v\" { plugin_data_file = \"/f\" odd = 1 }\n}";
        let document = Document::parse(text).unwrap();
        let mistakes = Mistakes::new();
        let section = Section::root(&document, &mistakes).section("plugins").unwrap();
        let found = plugins(&section);
        let names: Vec<_> = found.iter().map(|p| format!("{} {}", p.kind.value, p.name.value)).collect();
        assert_eq!(names, ["A x", "B y", "B v", "C w"]);
        assert_eq!(found[0].data.integer("k").unwrap().value, 1);
        assert_eq!(found[3].data.integer("k").unwrap().key, "plugins.C \"w\".plugin_data.k");
        let (refused, warned) = mistakes.take();
        let lines: Vec<_> = refused.iter().map(|m| (m.line.unwrap(), m.message.as_str())).collect();
        assert_eq!(
            lines,
            [
                (3, "external plugins are not served yet"),
                (5, "declared more than once"),
                (7, "data files of plugins are not served yet")
            ]
        );
        assert_eq!(warned.len(), 1);
    }

    #[test]
    fn files_are_loaded_and_expanded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.conf");
        assert!(matches!(Document::load(&path, None), Err(ConfigError::Missing { .. })));
        std::fs::write(&path, "a = \"$X\"").unwrap();
        let environment: Environment = [("X", "1")].into_iter().collect();
        let value = |document: Document| Section::root(&document, &Mistakes::new()).text("a").unwrap().value;
        assert_eq!(value(Document::load(&path, None).unwrap()), "$X");
        assert_eq!(value(Document::load(&path, Some(&environment)).unwrap()), "1");
        std::fs::write(&path, "a = ").unwrap();
        let Err(ConfigError::Syntax { source, .. }) = Document::load(&path, None) else { panic!() };
        assert_eq!(source.line(), Some(1));
    }

    #[test]
    fn reports_have_a_line_for_each_mistake() {
        let mistake = |line| Mistake { line, key: "k".into(), message: "m".into(), remedy: "r".into() };
        let text = report(Path::new("/etc/c.conf"), &[mistake(Some(3)), mistake(None)]);
        assert_eq!(text, "/etc/c.conf:3: k: m; r\n/etc/c.conf: k: m; r");
    }
}
