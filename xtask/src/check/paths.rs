//! A reader of Rust code that knows just enough: tokens with their lines, whether they are inside a test, and the
//! paths that the code names.

/// One token of code; comments and literals are none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'a> {
    /// An identifier, `::`, or one other character.
    pub text: &'a str,
    /// From 1.
    pub line: usize,
    /// Inside an item that exists in tests only.
    pub in_test: bool,
}

/// A path that the code names, such as `crate::state::Entry`, with `super` and `self` still in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Named {
    /// Its parts.
    pub parts: Vec<String>,
    /// From 1.
    pub line: usize,
    /// Names of the inline modules around it.
    pub modules: Vec<String>,
}

/// All tokens of `source`.
pub fn tokens(source: &str) -> Vec<Token<'_>> {
    let mut tokens = split(source);
    mark_tests(&mut tokens);
    tokens
}

fn split(source: &str) -> Vec<Token<'_>> {
    let bytes = source.as_bytes();
    let at = |index: usize| bytes.get(index).copied().unwrap_or(0);
    let mut found = Vec::new();
    let (mut index, mut line) = (0, 1);
    while index < bytes.len() {
        let start = index;
        match at(index) {
            b'\n' => {
                line += 1;
                index += 1;
            }
            b'/' if at(index + 1) == b'/' => {
                while index < bytes.len() && at(index) != b'\n' {
                    index += 1;
                }
            }
            b'/' if at(index + 1) == b'*' => index = after_comment(bytes, index, &mut line),
            b'"' => index = after_string(bytes, index, &mut line),
            b'r' | b'b' | b'c' if raw_string(bytes, index).is_some() => {
                let (quote, hashes) = raw_string(bytes, index).unwrap_or((index, 0));
                index = after_raw(bytes, quote, hashes, &mut line);
            }
            b'b' | b'c' if at(index + 1) == b'"' => index = after_string(bytes, index + 1, &mut line),
            b'\'' => index = after_quote(bytes, index),
            byte if byte == b'_' || byte.is_ascii_alphabetic() || byte >= 0x80 => {
                while at(index) == b'_' || at(index).is_ascii_alphanumeric() || at(index) >= 0x80 {
                    index += 1;
                }
                push(&mut found, source, start, index, line);
            }
            b':' if at(index + 1) == b':' => {
                index += 2;
                push(&mut found, source, start, index, line);
            }
            byte if byte.is_ascii_whitespace() => index += 1,
            _ => {
                index += 1;
                push(&mut found, source, start, index, line);
            }
        }
    }
    found
}

fn push<'a>(found: &mut Vec<Token<'a>>, source: &'a str, start: usize, end: usize, line: usize) {
    if let Some(text) = source.get(start..end) {
        found.push(Token { text, line, in_test: false });
    }
}

fn after_comment(bytes: &[u8], start: usize, line: &mut usize) -> usize {
    let (mut index, mut depth) = (start + 2, 1);
    while index < bytes.len() && depth > 0 {
        match bytes.get(index..index + 2) {
            Some(b"/*") => {
                depth += 1;
                index += 2;
            }
            Some(b"*/") => {
                depth -= 1;
                index += 2;
            }
            _ => {
                *line += usize::from(bytes.get(index) == Some(&b'\n'));
                index += 1;
            }
        }
    }
    index
}

fn after_string(bytes: &[u8], quote: usize, line: &mut usize) -> usize {
    let mut index = quote + 1;
    while let Some(byte) = bytes.get(index) {
        match byte {
            b'\\' => {
                *line += usize::from(bytes.get(index + 1) == Some(&b'\n'));
                index += 2;
            }
            b'"' => return index + 1,
            byte => {
                *line += usize::from(*byte == b'\n');
                index += 1;
            }
        }
    }
    index
}

/// Where the quote of a raw string that begins at `start` is, and how many hashes it has.
fn raw_string(bytes: &[u8], start: usize) -> Option<(usize, usize)> {
    let mut index = start;
    if matches!(bytes.get(index), Some(b'b' | b'c')) {
        index += 1;
    }
    if bytes.get(index) != Some(&b'r') {
        return None;
    }
    index += 1;
    let hashes = bytes.get(index..)?.iter().take_while(|byte| **byte == b'#').count();
    (bytes.get(index + hashes) == Some(&b'"')).then_some((index + hashes, hashes))
}

fn after_raw(bytes: &[u8], quote: usize, hashes: usize, line: &mut usize) -> usize {
    let mut index = quote + 1;
    while let Some(byte) = bytes.get(index) {
        *line += usize::from(*byte == b'\n');
        index += 1;
        let closing = bytes.get(index..index + hashes).is_some_and(|after| after.iter().all(|byte| *byte == b'#'));
        if *byte == b'"' && closing {
            return index + hashes;
        }
    }
    index
}

/// After a character literal, or after the quote of a lifetime.
fn after_quote(bytes: &[u8], quote: usize) -> usize {
    if bytes.get(quote + 1) == Some(&b'\\') {
        let rest = bytes.get(quote + 3..).unwrap_or_default();
        return quote + 4 + rest.iter().position(|byte| *byte == b'\'').unwrap_or(0);
    }
    let width = match bytes.get(quote + 1) {
        Some(0xF0..) => 4,
        Some(0xE0..) => 3,
        Some(0xC0..) => 2,
        _ => 1,
    };
    if bytes.get(quote + 1 + width) == Some(&b'\'') { quote + width + 2 } else { quote + 1 }
}

/// Marks what follows `#[cfg(test)]` or `#[test]` up to the end of that item.
fn mark_tests(tokens: &mut [Token<'_>]) {
    let mut index = 0;
    while index < tokens.len() {
        if !is_test_attribute(tokens, index) {
            index += 1;
            continue;
        }
        let (mut depth, mut end) = (0_i32, index);
        // The attribute itself and further ones are in brackets; the item ends with `;` or with its braces.
        while let Some(token) = tokens.get(end) {
            match token.text {
                "{" | "(" | "[" => depth += 1,
                "}" | ")" | "]" => depth -= 1,
                _ => {}
            }
            end += 1;
            if depth == 0 && matches!(token.text, "}" | ";") {
                break;
            }
        }
        for token in tokens.iter_mut().take(end).skip(index) {
            token.in_test = true;
        }
        index = end;
    }
}

fn is_test_attribute(tokens: &[Token<'_>], index: usize) -> bool {
    let word = |offset: usize| tokens.get(index + offset).map_or("", |token| token.text);
    word(0) == "#"
        && word(1) == "["
        && (word(2) == "test" && word(3) == "]"
            || word(2) == "cfg" && word(3) == "(" && word(4) == "test" && word(5) == ")")
}

/// Every path that the code outside of tests names, `use` trees spelled out.
pub fn named(tokens: &[Token<'_>]) -> Vec<Named> {
    let mut found = Vec::new();
    let mut modules: Vec<(String, usize)> = Vec::new();
    let (mut index, mut depth) = (0, 0);
    while let Some(token) = tokens.get(index) {
        let word = |offset: usize| tokens.get(index + offset).map_or("", |token: &Token| token.text);
        if token.in_test {
            index += 1;
            continue;
        }
        match token.text {
            "{" => depth += 1,
            "}" => {
                depth -= 1;
                modules.retain(|(_, opened)| *opened <= depth);
            }
            "mod" if word(2) == "{" => {
                modules.push((word(1).to_owned(), depth + 1));
                index += 2;
                continue;
            }
            // `use<…>` in a type captures lifetimes and imports nothing.
            "use" if word(1) != "<" => {
                let around = modules.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>();
                index = tree(tokens, index + 1, &mut Vec::new(), &around, &mut found);
                continue;
            }
            text if is_word(text) && (index == 0 || tokens.get(index - 1).is_none_or(|before| before.text != "::")) => {
                let start = index;
                let mut parts = vec![text.to_owned()];
                while tokens.get(index + 1).is_some_and(|token| token.text == "::") {
                    match tokens.get(index + 2) {
                        Some(part) if is_word(part.text) => parts.push(part.text.to_owned()),
                        _ => break,
                    }
                    index += 2;
                }
                if parts.len() > 1 {
                    let line = tokens.get(start).map_or(0, |token| token.line);
                    found.push(Named { parts, line, modules: modules.iter().map(|(name, _)| name.clone()).collect() });
                }
            }
            _ => {}
        }
        index += 1;
    }
    found
}

/// Reads one `use` tree from `index` on; the answer is the index after it.
fn tree(
    tokens: &[Token<'_>],
    mut index: usize,
    before: &mut Vec<String>,
    modules: &[String],
    found: &mut Vec<Named>,
) -> usize {
    let kept = before.len();
    while let Some(token) = tokens.get(index) {
        match token.text {
            ";" | "," | "}" => break,
            "::" => index += 1,
            "as" => index += 2,
            "{" => {
                index += 1;
                while tokens.get(index).is_some_and(|token| token.text != "}") {
                    index = tree(tokens, index, before, modules, found);
                    // What is no comma here is no `use` tree either, and is passed over.
                    index += usize::from(tokens.get(index).is_some_and(|token| token.text != "}"));
                }
                index += 1;
                before.truncate(kept);
                return index;
            }
            text => {
                before.push(text.to_owned());
                index += 1;
            }
        }
    }
    if before.len() > kept || kept > 0 {
        let line = tokens.get(index.saturating_sub(1)).map_or(0, |token| token.line);
        found.push(Named { parts: before.clone(), line, modules: modules.to_vec() });
    }
    before.truncate(kept);
    index
}

fn is_word(text: &str) -> bool {
    text.chars().next().is_some_and(|first| first == '_' || first.is_alphabetic())
}
