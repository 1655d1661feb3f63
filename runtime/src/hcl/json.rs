//! The JSON form of the dialect (RFC 8259), read by a parser of our own because lines have to be kept.

use super::{HclError, Item, Kind, MAX_DEPTH, MAX_ITEMS, Object, Value};

pub(super) fn document(text: &str) -> Result<Object, HclError> {
    let mut parser = Json { rest: text, line: 1, depth: 0, items: 0 };
    parser.blank();
    let value = parser.value()?;
    parser.blank();
    if !parser.rest.is_empty() {
        return Err(parser.unexpected("the end of the text"));
    }
    match value.kind {
        Kind::Object(object) => Ok(object),
        _ => Err(HclError::Unexpected { line: 1, expected: "{", found: value.kind.name().to_owned() }),
    }
}

struct Json<'t> {
    rest: &'t str,
    line: u32,
    depth: usize,
    items: usize,
}

impl Json<'_> {
    fn unexpected(&self, expected: &'static str) -> HclError {
        let found = match self.rest.chars().next() {
            None => "the end of the text".to_owned(),
            Some(c) => format!("{c:?}"),
        };
        HclError::Unexpected { line: self.line, expected, found }
    }

    fn blank(&mut self) {
        let kept = self.rest.trim_start_matches([' ', '\t', '\r', '\n']);
        let skipped = self.rest.len() - kept.len();
        let lines = self.rest.bytes().take(skipped).filter(|byte| *byte == b'\n').count();
        self.line = self.line.saturating_add(u32::try_from(lines).unwrap_or(u32::MAX));
        self.rest = kept;
    }

    fn eat(&mut self, text: &str) -> bool {
        match self.rest.strip_prefix(text) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
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

    fn value(&mut self) -> Result<Value, HclError> {
        self.count()?;
        let line = self.line;
        let kind = if self.eat("{") {
            Kind::Object(self.object(line)?)
        } else if self.eat("[") {
            Kind::List(self.list(line)?)
        } else if self.rest.starts_with('"') {
            Kind::Text(self.string()?)
        } else if self.eat("true") {
            Kind::Boolean(true)
        } else if self.eat("false") {
            Kind::Boolean(false)
        } else if self.eat("null") {
            Kind::Null
        } else {
            let end = self.rest.find(|c: char| !(c.is_ascii_alphanumeric() || "+-.".contains(c)));
            let (text, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
            if text.is_empty() {
                return Err(self.unexpected("a value"));
            }
            if serde_json::from_str::<serde_json::Number>(text).is_err() {
                return Err(HclError::Number { line, text: text.to_owned() });
            }
            self.rest = rest;
            Kind::Number(text.to_owned())
        };
        Ok(Value { kind, line })
    }

    fn object(&mut self, opened: u32) -> Result<Object, HclError> {
        self.enter()?;
        let mut items = Vec::new();
        self.blank();
        while !self.eat("}") {
            if self.rest.is_empty() {
                return Err(HclError::Unterminated { line: opened, what: "an object" });
            }
            if !self.rest.starts_with('"') {
                return Err(self.unexpected("a key in double quotes"));
            }
            let line = self.line;
            let key = self.string()?;
            self.blank();
            if !self.eat(":") {
                return Err(self.unexpected(":"));
            }
            self.blank();
            items.push(Item { key, value: self.value()?, line });
            self.separator('}')?;
        }
        self.depth -= 1;
        Ok(Object { items })
    }

    fn list(&mut self, opened: u32) -> Result<Vec<Value>, HclError> {
        self.enter()?;
        let mut values = Vec::new();
        self.blank();
        while !self.eat("]") {
            if self.rest.is_empty() {
                return Err(HclError::Unterminated { line: opened, what: "a list" });
            }
            values.push(self.value()?);
            self.separator(']')?;
        }
        self.depth -= 1;
        Ok(values)
    }

    fn separator(&mut self, end: char) -> Result<(), HclError> {
        self.blank();
        if self.eat(",") {
            self.blank();
            if self.rest.starts_with(end) { Err(self.unexpected("another element after the comma")) } else { Ok(()) }
        } else if self.rest.starts_with(end) || self.rest.is_empty() {
            Ok(())
        } else {
            Err(self.unexpected(", or the end of the object or list"))
        }
    }

    fn string(&mut self) -> Result<String, HclError> {
        let line = self.line;
        // The closing quote is the first one that no backslash escapes.
        let mut escaped = false;
        let end = self.rest.char_indices().skip(1).find_map(|(at, c)| match c {
            _ if escaped => {
                escaped = false;
                None
            }
            '\\' => {
                escaped = true;
                None
            }
            '"' => Some(at + 1),
            _ => None,
        });
        let Some(end) = end else { return Err(HclError::Unterminated { line, what: "a string" }) };
        let (quoted, rest) = self.rest.split_at(end);
        let text = serde_json::from_str(quoted).map_err(|_| HclError::Unexpected {
            line,
            expected: "a JSON string",
            found: quoted.chars().take(20).collect(),
        })?;
        self.rest = rest;
        Ok(text)
    }
}
