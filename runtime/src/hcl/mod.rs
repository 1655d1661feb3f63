//! Configuration text: HCL 1 (the dialect of hashicorp/hcl v1) and JSON, read into one tree that knows its lines.
//!
//! A block with labels, `a "b" { … }`, and nested objects, `a = { b = { … } }`, are the same tree, as are repeated
//! blocks and a list of objects: the two spellings of the dialect, and its JSON form, read alike. Keys are matched
//! without regard to ASCII case, as HCL 1 does.

mod json;
mod load;
mod parse;
mod section;

pub use load::{ConfigError, Plugin, plugins, report};
pub use section::{Located, Mistake, Mistakes, Section, distance};

/// The longest text that is read, in bytes.
pub const MAX_BYTES: usize = 4 << 20;
/// How deep objects and lists may nest.
pub const MAX_DEPTH: usize = 32;
/// How many items (attributes, blocks, list elements) a text may have.
pub const MAX_ITEMS: usize = 100_000;

/// Why a configuration text cannot be read. Lines are counted from 1.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HclError {
    /// The text is longer than [`MAX_BYTES`].
    #[error("the text is longer than {MAX_BYTES} bytes")]
    TooLong,
    /// Objects or lists nest deeper than [`MAX_DEPTH`].
    #[error("line {line}: nested deeper than {MAX_DEPTH} levels")]
    TooDeep {
        /// Where.
        line: u32,
    },
    /// The text has more than [`MAX_ITEMS`] items.
    #[error("line {line}: more than {MAX_ITEMS} items")]
    TooMany {
        /// Where.
        line: u32,
    },
    /// Something else was expected.
    #[error("line {line}: expected {expected}, found {found}")]
    Unexpected {
        /// Where.
        line: u32,
        /// What would be legal here.
        expected: &'static str,
        /// What is there.
        found: String,
    },
    /// A string, comment, heredoc, list or object has no end.
    #[error("line {line}: {what} has no end")]
    Unterminated {
        /// Where it starts.
        line: u32,
        /// What it is.
        what: &'static str,
    },
    /// A backslash sequence that is no escape of the dialect.
    #[error("line {line}: unknown escape \\{escape} in a string")]
    Escape {
        /// Where.
        line: u32,
        /// What follows the backslash.
        escape: char,
    },
    /// A number that cannot be read.
    #[error("line {line}: {text:?} is no number")]
    Number {
        /// Where.
        line: u32,
        /// The text.
        text: String,
    },
}

impl HclError {
    /// The line of the mistake, if it has one.
    pub fn line(&self) -> Option<u32> {
        match self {
            Self::TooLong => None,
            Self::TooDeep { line }
            | Self::TooMany { line }
            | Self::Unexpected { line, .. }
            | Self::Unterminated { line, .. }
            | Self::Escape { line, .. }
            | Self::Number { line, .. } => Some(*line),
        }
    }
}

/// A value and where it stands.
#[derive(Clone, Debug, PartialEq)]
pub struct Value {
    /// What it is.
    pub kind: Kind,
    /// The line where it starts.
    pub line: u32,
}

/// What a value is.
#[derive(Clone, Debug, PartialEq)]
pub enum Kind {
    /// A string or heredoc, unescaped.
    Text(String),
    /// A number, as written.
    Number(String),
    /// `true` or `false`.
    Boolean(bool),
    /// JSON's `null`, which counts as absent.
    Null,
    /// `[ … ]`.
    List(Vec<Value>),
    /// `{ … }`.
    Object(Object),
}

impl Kind {
    /// What a person calls it, with article.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Text(_) => "a string",
            Self::Number(_) => "a number",
            Self::Boolean(_) => "a boolean",
            Self::Null => "null",
            Self::List(_) => "a list",
            Self::Object(_) => "a block",
        }
    }
}

/// Attributes and blocks in the order in which they stand.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Object {
    /// The items; a key may come more than once.
    pub items: Vec<Item>,
}

/// One attribute or block. A block with labels is an item whose object holds the item of the next label.
#[derive(Clone, Debug, PartialEq)]
pub struct Item {
    /// The key as written.
    pub key: String,
    /// The value.
    pub value: Value,
    /// The line of the key.
    pub line: u32,
}

/// A configuration text that was read.
#[derive(Clone, Debug, PartialEq)]
pub struct Document {
    /// The items of the top level.
    pub root: Object,
}

impl Document {
    /// Reads `text`: JSON if its first visible character is `{`, else HCL 1.
    ///
    /// # Errors
    ///
    /// [`HclError`], with the line, at the first thing that cannot be read.
    pub fn parse(text: &str) -> Result<Self, HclError> {
        if text.len() > MAX_BYTES {
            return Err(HclError::TooLong);
        }
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let root = if text.trim_start().starts_with('{') {
            json::document(text)?
        } else {
            parse::Parser::new(text).document()?
        };
        Ok(Self { root })
    }
}

#[cfg(test)]
mod tests;
