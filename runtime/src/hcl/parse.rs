//! The HCL 1 grammar, by recursive descent over characters.

use super::{HclError, Item, Kind, MAX_DEPTH, MAX_ITEMS, Object, Value};

pub(super) struct Parser<'t> {
    rest: &'t str,
    line: u32,
    depth: usize,
    items: usize,
}

impl<'t> Parser<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { rest: text, line: 1, depth: 0, items: 0 }
    }

    pub(super) fn document(mut self) -> Result<Object, HclError> {
        let object = self.items(true, 1)?;
        self.blank()?;
        match self.peek() {
            None => Ok(object),
            Some(_) => Err(self.unexpected("a key")),
        }
    }

    fn peek(&self) -> Option<char> {
        self.rest.chars().next()
    }

    fn bump(&mut self) -> Option<char> {
        let mut chars = self.rest.chars();
        let next = chars.next()?;
        self.rest = chars.as_str();
        if next == '\n' {
            self.line = self.line.saturating_add(1);
        }
        Some(next)
    }

    fn eat(&mut self, text: &str) -> bool {
        match self.rest.strip_prefix(text) {
            Some(rest) => {
                self.line = self.line.saturating_add(newlines(text));
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn unexpected(&self, expected: &'static str) -> HclError {
        let found = match self.peek() {
            None => "the end of the text".to_owned(),
            Some('\n') => "the end of the line".to_owned(),
            Some(_) => {
                let word: String = self.rest.chars().take_while(|c| !c.is_whitespace()).take(20).collect();
                format!("{word:?}")
            }
        };
        HclError::Unexpected { line: self.line, expected, found }
    }

    /// Skips white space and comments.
    fn blank(&mut self) -> Result<(), HclError> {
        loop {
            if self.rest.starts_with('#') || self.rest.starts_with("//") {
                let end = self.rest.find('\n').unwrap_or(self.rest.len());
                self.rest = self.rest.get(end..).unwrap_or("");
            } else if self.rest.starts_with("/*") {
                let Some(end) = self.rest.find("*/") else {
                    return Err(HclError::Unterminated { line: self.line, what: "a comment" });
                };
                let (comment, rest) = self.rest.split_at(end + 2);
                self.line = self.line.saturating_add(newlines(comment));
                self.rest = rest;
            } else if self.peek().is_some_and(char::is_whitespace) {
                self.bump();
            } else {
                return Ok(());
            }
        }
    }

    fn enter(&mut self) -> Result<(), HclError> {
        self.depth += 1;
        if self.depth > MAX_DEPTH { Err(HclError::TooDeep { line: self.line }) } else { Ok(()) }
    }

    fn count(&mut self) -> Result<(), HclError> {
        self.items += 1;
        if self.items > MAX_ITEMS { Err(HclError::TooMany { line: self.line }) } else { Ok(()) }
    }

    /// The items of the top level, or of an object whose `{` on line `opened` has been read, with its `}`.
    fn items(&mut self, top: bool, opened: u32) -> Result<Object, HclError> {
        self.enter()?;
        let mut items = Vec::new();
        loop {
            self.blank()?;
            match self.peek() {
                None if top => break,
                None => return Err(HclError::Unterminated { line: opened, what: "a block" }),
                Some('}') if !top => {
                    self.bump();
                    break;
                }
                Some(_) => {}
            }
            items.push(self.item()?);
            self.blank()?;
            self.eat(",");
        }
        self.depth -= 1;
        Ok(Object { items })
    }

    fn item(&mut self) -> Result<Item, HclError> {
        self.count()?;
        let line = self.line;
        let mut keys = vec![(self.key()?, line)];
        loop {
            self.blank()?;
            match self.peek() {
                Some('=') => {
                    self.bump();
                    // `a "b" = …` is refused by the dialect: labels belong to blocks.
                    if keys.len() > 1 {
                        return Err(HclError::Unexpected {
                            line: self.line,
                            expected: "{ after a label",
                            found: "\"=\"".to_owned(),
                        });
                    }
                    self.blank()?;
                    let value = self.value()?;
                    return Ok(nest(keys, value));
                }
                Some('{') => {
                    let opened = self.line;
                    self.bump();
                    let object = self.items(false, opened)?;
                    return Ok(nest(keys, Value { kind: Kind::Object(object), line: opened }));
                }
                Some(c) if c == '"' || is_key_start(c) => {
                    if keys.len() >= MAX_DEPTH {
                        return Err(HclError::TooDeep { line: self.line });
                    }
                    let line = self.line;
                    keys.push((self.key()?, line));
                }
                _ => return Err(self.unexpected("= or {")),
            }
        }
    }

    fn key(&mut self) -> Result<String, HclError> {
        match self.peek() {
            Some('"') => self.string(),
            Some(c) if is_key_start(c) => Ok(self.word(is_key_part).to_owned()),
            _ => Err(self.unexpected("a key")),
        }
    }

    fn word(&mut self, part: impl Fn(char) -> bool) -> &'t str {
        let end = self.rest.find(|c| !part(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn value(&mut self) -> Result<Value, HclError> {
        let line = self.line;
        let kind = match self.peek() {
            Some('"') => Kind::Text(self.string()?),
            Some('[') => self.list()?,
            Some('{') => {
                self.bump();
                Kind::Object(self.items(false, line)?)
            }
            Some('<') if self.rest.starts_with("<<") => Kind::Text(self.heredoc()?),
            Some(c) if c.is_ascii_digit() || c == '-' || c == '.' => {
                let text = self.word(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '+'));
                if integer(text).is_none() && text.parse::<f64>().is_err() {
                    return Err(HclError::Number { line, text: text.to_owned() });
                }
                Kind::Number(text.to_owned())
            }
            Some(c) if is_key_start(c) => {
                let before = self.rest;
                match self.word(is_key_part) {
                    "true" => Kind::Boolean(true),
                    "false" => Kind::Boolean(false),
                    _ => {
                        self.rest = before;
                        return Err(self.unexpected("a value; strings stand in double quotes"));
                    }
                }
            }
            _ => return Err(self.unexpected("a value")),
        };
        Ok(Value { kind, line })
    }

    fn list(&mut self) -> Result<Kind, HclError> {
        let opened = self.line;
        self.bump();
        self.enter()?;
        let mut values = Vec::new();
        loop {
            self.blank()?;
            match self.peek() {
                None => return Err(HclError::Unterminated { line: opened, what: "a list" }),
                Some(']') => {
                    self.bump();
                    break;
                }
                Some(_) => {}
            }
            self.count()?;
            values.push(self.value()?);
            self.blank()?;
            if !self.eat(",") && self.peek().is_some_and(|c| c != ']') {
                return Err(self.unexpected(", or ]"));
            }
        }
        self.depth -= 1;
        Ok(Kind::List(values))
    }

    /// A string in double quotes. Inside `${ … }` quotes and line ends are plain text, as in HCL 1, which leaves
    /// interpolation to others.
    fn string(&mut self) -> Result<String, HclError> {
        let line = self.line;
        let unterminated = HclError::Unterminated { line, what: "a string" };
        self.bump();
        let mut text = String::new();
        let mut braces = 0usize;
        loop {
            let Some(c) = self.bump() else { return Err(unterminated) };
            match c {
                '"' if braces == 0 => return Ok(text),
                '\n' if braces == 0 => return Err(unterminated),
                '$' if self.rest.starts_with('{') => {
                    self.bump();
                    braces += 1;
                    text.push_str("${");
                }
                '{' if braces > 0 => {
                    braces += 1;
                    text.push(c);
                }
                '}' if braces > 0 => {
                    braces -= 1;
                    text.push(c);
                }
                '\\' if braces == 0 => text.push(self.escape(line)?),
                _ => text.push(c),
            }
        }
    }

    fn escape(&mut self, line: u32) -> Result<char, HclError> {
        let Some(c) = self.bump() else { return Err(HclError::Unterminated { line, what: "a string" }) };
        let bad = HclError::Escape { line: self.line, escape: c };
        let code = match c {
            'a' => 7,
            'b' => 8,
            'f' => 12,
            'n' => 10,
            'r' => 13,
            't' => 9,
            'v' => 11,
            '\\' | '"' => u32::from(c),
            '0'..='7' => {
                let more = self.digits(2, 8).ok_or(bad.clone())?;
                c.to_digit(8).unwrap_or(0) * 64 + more
            }
            'x' => self.digits(2, 16).ok_or(bad.clone())?,
            'u' => self.digits(4, 16).ok_or(bad.clone())?,
            'U' => self.digits(8, 16).ok_or(bad.clone())?,
            _ => return Err(bad),
        };
        char::from_u32(code).ok_or(bad)
    }

    fn digits(&mut self, count: usize, radix: u32) -> Option<u32> {
        let mut value = 0u32;
        for _ in 0..count {
            let digit = self.peek()?.to_digit(radix)?;
            value = value.checked_mul(radix)?.checked_add(digit)?;
            self.bump();
        }
        Some(value)
    }

    /// `<<EOF` … `EOF`, and `<<-EOF`, which takes away the indentation of the closing line where all lines have it.
    fn heredoc(&mut self) -> Result<String, HclError> {
        let line = self.line;
        self.eat("<<");
        let indented = self.eat("-");
        let anchor = self.word(|c| c.is_alphanumeric() || c == '_').to_owned();
        self.eat("\r");
        if anchor.is_empty() || !self.eat("\n") {
            return Err(self.unexpected("a heredoc's name and the end of the line"));
        }
        let mut lines = Vec::new();
        loop {
            if self.rest.is_empty() {
                return Err(HclError::Unterminated { line, what: "a heredoc" });
            }
            let end = self.rest.find('\n').map_or(self.rest.len(), |at| at + 1);
            let (text, rest) = self.rest.split_at(end);
            if text.trim() == anchor {
                // The end of this line belongs to what follows.
                let kept = text.trim_end_matches(['\n', '\r']).len();
                self.rest = self.rest.get(kept..).unwrap_or("");
                let indent: String = text.chars().take_while(|c| matches!(c, ' ' | '\t')).collect();
                return Ok(join(&lines, if indented { &indent } else { "" }));
            }
            // A file with Windows line ends says the same as one without.
            lines.push(text.strip_suffix('\n').map_or(text, |line| line.strip_suffix('\r').unwrap_or(line)));
            self.line = self.line.saturating_add(1);
            self.rest = rest;
        }
    }
}

fn join(lines: &[&str], indent: &str) -> String {
    let indented = lines.iter().all(|line| line.starts_with(indent));
    lines
        .iter()
        .map(|line| format!("{}\n", if indented { line.strip_prefix(indent).unwrap_or(line) } else { line }))
        .collect()
}

/// Turns `a "b" {…}` into `a { b {…} }`.
fn nest(mut keys: Vec<(String, u32)>, value: Value) -> Item {
    let (key, line) = keys.pop().unwrap_or_default();
    let mut item = Item { key, value, line };
    while let Some((key, line)) = keys.pop() {
        item = Item { key, line, value: Value { line: item.line, kind: Kind::Object(Object { items: vec![item] }) } };
    }
    item
}

fn is_key_start(c: char) -> bool {
    c.is_alphabetic() || c == '_'
}

fn is_key_part(c: char) -> bool {
    c.is_alphanumeric() || matches!(c, '_' | '-' | '.')
}

fn newlines(text: &str) -> u32 {
    u32::try_from(text.bytes().filter(|byte| *byte == b'\n').count()).unwrap_or(u32::MAX)
}

/// A whole number as HCL 1 writes it: decimal, `0x` hexadecimal or, with a leading zero, octal.
pub(super) fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix('-') {
        Some(digits) => (true, digits),
        None => (false, text),
    };
    let plain = |digits: &str, radix| {
        if digits.starts_with(['+', '-']) { None } else { i64::from_str_radix(digits, radix).ok() }
    };
    let value = if let Some(hex) = digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        plain(hex, 16)
    } else if digits.len() > 1 && digits.starts_with('0') {
        plain(digits, 8)
    } else {
        plain(digits, 10)
    }?;
    Some(if negative { -value } else { value })
}
