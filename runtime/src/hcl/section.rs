//! Reading values out of a document by name, so that what was never asked for can be told, and every mistake is
//! collected with its line instead of ending the reading at the first.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;

use super::parse::integer;
use super::{Document, Kind, Object, Value};

/// A value with its place: the line and the dotted path of its key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Located<T> {
    /// The value.
    pub value: T,
    /// The line, or `None` if it came from elsewhere (a flag, a default).
    pub line: Option<u32>,
    /// The key, with the blocks it stands in: `server.ca_ttl`.
    pub key: String,
}

impl<T> Located<T> {
    /// A value that stands in no file.
    pub fn outside(key: impl Into<String>, value: T) -> Self {
        Self { value, line: None, key: key.into() }
    }

    /// The same place with another value.
    pub fn map<U>(self, change: impl FnOnce(T) -> U) -> Located<U> {
        Located { value: change(self.value), line: self.line, key: self.key }
    }
}

/// One thing that is wrong with a configuration, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Mistake {
    /// The line, if the mistake is about something that is there.
    pub line: Option<u32>,
    /// The key: `server.ca_ttl`.
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// What to do.
    pub remedy: String,
}

/// A key as a terminal may see it: whoever wrote the file chose it.
fn shown(key: &str) -> String {
    let escaped = key.chars().map(|c| if c.is_control() { c.escape_default().collect() } else { c.to_string() });
    shortened(escaped.collect())
}

/// A message without the middle of the value that it quotes, if that is long: what is wrong stands at its end.
fn shortened(message: String) -> String {
    const KEPT: usize = 200;
    if message.len() <= 2 * KEPT + 16 {
        return message;
    }
    let (start, end) = (message.floor_char_boundary(KEPT), message.ceil_char_boundary(message.len() - KEPT));
    format!("{}…{}", message.get(..start).unwrap_or_default(), message.get(end..).unwrap_or_default())
}

/// Mistakes (which refuse the configuration) and warnings (which do not), shared by all sections of a document.
#[derive(Clone, Debug, Default)]
pub struct Mistakes {
    inner: Rc<RefCell<(Vec<Mistake>, Vec<Mistake>)>>,
}

impl Mistakes {
    /// None yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Notes a mistake.
    pub fn refuse(
        &self,
        line: Option<u32>,
        key: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let mistake =
            Mistake { line, key: shown(&key.into()), message: shortened(message.into()), remedy: remedy.into() };
        self.inner.borrow_mut().0.push(mistake);
    }

    /// Notes a mistake at a value.
    pub fn refuse_at<T>(&self, at: &Located<T>, message: impl Into<String>, remedy: impl Into<String>) {
        self.refuse(at.line, at.key.clone(), message, remedy);
    }

    /// Notes a warning.
    pub fn warn(
        &self,
        line: Option<u32>,
        key: impl Into<String>,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let mistake =
            Mistake { line, key: shown(&key.into()), message: shortened(message.into()), remedy: remedy.into() };
        self.inner.borrow_mut().1.push(mistake);
    }

    /// The mistakes and the warnings noted so far, each in the order of their lines; what has no line comes last.
    pub fn take(&self) -> (Vec<Mistake>, Vec<Mistake>) {
        let (mut mistakes, mut warnings) = std::mem::take(&mut *self.inner.borrow_mut());
        for list in [&mut mistakes, &mut warnings] {
            list.sort_by_key(|mistake| (mistake.line.is_none(), mistake.line));
        }
        (mistakes, warnings)
    }
}

/// All blocks of one name in one place, read as one.
#[derive(Clone, Debug)]
pub struct Section<'d> {
    path: String,
    line: Option<u32>,
    objects: Vec<&'d Object>,
    asked: Rc<RefCell<BTreeSet<String>>>,
    mistakes: Mistakes,
}

impl<'d> Section<'d> {
    /// The top level of `document`.
    pub fn root(document: &'d Document, mistakes: &Mistakes) -> Self {
        Self {
            path: String::new(),
            line: None,
            objects: vec![&document.root],
            asked: Rc::default(),
            mistakes: mistakes.clone(),
        }
    }

    /// A section in which nothing stands.
    pub fn absent(path: &str, mistakes: &Mistakes) -> Self {
        Self {
            path: path.to_owned(),
            line: None,
            objects: Vec::new(),
            asked: Rc::default(),
            mistakes: mistakes.clone(),
        }
    }

    /// The line where the first block starts.
    pub fn line(&self) -> Option<u32> {
        self.line
    }

    /// The dotted path of this section.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Where mistakes go.
    pub fn mistakes(&self) -> &Mistakes {
        &self.mistakes
    }

    /// The dotted path of a key in this section.
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn values(&self, key: &str) -> Vec<(u32, &'d Value)> {
        self.asked.borrow_mut().insert(key.to_ascii_lowercase());
        self.objects
            .iter()
            .flat_map(|object| &object.items)
            .filter(|item| item.key.eq_ignore_ascii_case(key) && item.value.kind != Kind::Null)
            .map(|item| (item.line, &item.value))
            .collect()
    }

    /// The last value of a key wins, as in HCL 1.
    fn last(&self, key: &str) -> Option<(u32, &'d Value)> {
        self.values(key).pop()
    }

    fn located<T>(&self, key: &str, line: u32, value: T) -> Located<T> {
        Located { value, line: Some(line), key: self.key(key) }
    }

    fn wrong(&self, key: &str, line: u32, found: &Kind, wanted: &str) {
        let message = format!("is {}, not {wanted}", found.name());
        self.mistakes.refuse(Some(line), self.key(key), message, format!("write {wanted}"));
    }

    /// Whether the key stands here at all; it then counts as known.
    pub fn has(&self, key: &str) -> Option<u32> {
        self.last(key).map(|(line, _)| line)
    }

    /// Whether the key stands here as a block (or a list of blocks).
    pub fn is_block(&self, key: &str) -> bool {
        self.last(key).is_some_and(|(_, value)| matches!(value.kind, Kind::Object(_) | Kind::List(_)))
    }

    /// A string; a number is taken as its text, as HCL 1 does.
    pub fn text(&self, key: &str) -> Option<Located<String>> {
        let (line, value) = self.last(key)?;
        match &value.kind {
            Kind::Text(text) | Kind::Number(text) => Some(self.located(key, line, text.clone())),
            other => {
                self.wrong(key, line, other, "a string in double quotes");
                None
            }
        }
    }

    /// A whole number; quotes around it are allowed, as in HCL 1.
    pub fn integer(&self, key: &str) -> Option<Located<i64>> {
        let (line, value) = self.last(key)?;
        match &value.kind {
            Kind::Number(text) | Kind::Text(text) => match integer(text) {
                Some(number) => Some(self.located(key, line, number)),
                None => {
                    let message = format!("{text:?} is no whole number");
                    self.mistakes.refuse(Some(line), self.key(key), message, "write a whole number");
                    None
                }
            },
            other => {
                self.wrong(key, line, other, "a whole number");
                None
            }
        }
    }

    /// `true` or `false`, without quotes.
    pub fn boolean(&self, key: &str) -> Option<Located<bool>> {
        let (line, value) = self.last(key)?;
        match &value.kind {
            Kind::Boolean(value) => Some(self.located(key, line, *value)),
            other => {
                self.wrong(key, line, other, "true or false, without quotes");
                None
            }
        }
    }

    /// A list of strings.
    pub fn texts(&self, key: &str) -> Option<Located<Vec<Located<String>>>> {
        let (line, value) = self.last(key)?;
        let Kind::List(values) = &value.kind else {
            self.wrong(key, line, &value.kind, "a list of strings: [\"…\"]");
            return None;
        };
        let mut texts = Vec::new();
        for (index, value) in values.iter().enumerate() {
            let name = format!("{key}[{index}]");
            match &value.kind {
                Kind::Text(text) | Kind::Number(text) => texts.push(self.located(&name, value.line, text.clone())),
                other => self.wrong(&name, value.line, other, "a string in double quotes"),
            }
        }
        Some(self.located(key, line, texts))
    }

    /// The block or blocks of a name, read as one; `None` if there is none.
    pub fn section(&self, key: &str) -> Option<Section<'d>> {
        let mut objects = Vec::new();
        let mut first = None;
        for (line, value) in self.values(key) {
            first.get_or_insert(line);
            objects.extend(self.objects_of(key, line, value));
        }
        Some(self.child(self.key(key), first?, objects))
    }

    /// The blocks of a name, each by itself, in order.
    pub fn sections(&self, key: &str) -> Vec<Section<'d>> {
        let mut found = Vec::new();
        for (line, value) in self.values(key) {
            for object in self.objects_of(key, line, value) {
                found.push(self.child(self.key(key), line, vec![object]));
            }
        }
        found
    }

    /// The blocks `key "label" { … }`, in order; the same label twice comes twice.
    pub fn labelled(&self, key: &str) -> Vec<(Located<String>, Section<'d>)> {
        let mut found = Vec::new();
        for (line, value) in self.values(key) {
            for object in self.objects_of(key, line, value) {
                for item in &object.items {
                    let path = format!("{} {:?}", self.key(key), item.key);
                    for inner in self.objects_of(&format!("{key} {:?}", item.key), item.line, &item.value) {
                        let label = Located { value: item.key.clone(), line: Some(item.line), key: path.clone() };
                        found.push((label, self.child(path.clone(), item.line, vec![inner])));
                    }
                }
            }
        }
        found
    }

    fn child(&self, path: String, line: u32, objects: Vec<&'d Object>) -> Section<'d> {
        Section { path, line: Some(line), objects, asked: Rc::default(), mistakes: self.mistakes.clone() }
    }

    fn objects_of(&self, key: &str, line: u32, value: &'d Value) -> Vec<&'d Object> {
        match &value.kind {
            Kind::Object(object) => vec![object],
            Kind::List(values) => values
                .iter()
                .filter_map(|value| match &value.kind {
                    Kind::Object(object) => Some(object),
                    other => {
                        self.wrong(key, value.line, other, "a block");
                        None
                    }
                })
                .collect(),
            other => {
                self.wrong(key, line, other, "a block");
                Vec::new()
            }
        }
    }

    /// Every key that stands here, in order, with its line.
    pub fn keys(&self) -> Vec<Located<String>> {
        self.objects
            .iter()
            .flat_map(|object| &object.items)
            .map(|item| Located { value: item.key.clone(), line: Some(item.line), key: self.key(&item.key) })
            .collect()
    }

    /// The keys that stand here and that nobody asked for.
    pub fn unknown(&self) -> Vec<Located<String>> {
        let asked = self.asked.borrow();
        self.keys().into_iter().filter(|key| !asked.contains(&key.value.to_ascii_lowercase())).collect()
    }

    /// Notes a mistake for each key that an older release knew, as `(old name, how it is written now)`.
    pub fn refuse_renamed(&self, renamed: &[(&str, &str)]) {
        for (old, now) in renamed {
            match self.has(old) {
                Some(line) => self.mistakes.refuse(Some(line), self.key(old), "is the name of an older release", *now),
                // No key shall be taken for a misspelling of one that is refused.
                None => drop(self.asked.borrow_mut().remove(*old)),
            }
        }
    }

    /// Notes a mistake for each key that nobody asked for, with the nearest known key as remedy.
    pub fn refuse_unknown(&self) {
        for key in self.unknown() {
            let remedy = self.remedy_for(&key.value);
            self.mistakes.refuse(key.line, key.key, "unknown key", remedy);
        }
    }

    /// Notes a warning for each key that nobody asked for.
    pub fn warn_unknown(&self) {
        for key in self.unknown() {
            let remedy = self.remedy_for(&key.value);
            self.mistakes.warn(key.line, key.key, "unknown key, ignored", remedy);
        }
    }

    fn remedy_for(&self, key: &str) -> String {
        let key = key.to_ascii_lowercase();
        let asked = self.asked.borrow();
        let nearest = asked.iter().map(|known| (distance(&key, known), known)).min();
        match nearest {
            Some((distance, known)) if distance <= 3 && distance * 2 < key.len() => format!("did you mean {known}?"),
            _ => "remove it".to_owned(),
        }
    }
}

/// Levenshtein distance, over bytes: how many are to be changed, added or removed.
pub fn distance(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        if let Some(first) = row.first_mut() {
            *first = left;
        }
        for (cell, y) in row.iter_mut().skip(1).zip(b.bytes()) {
            let up = *cell;
            *cell = (diagonal + usize::from(x != y)).min(up + 1).min(left + 1);
            diagonal = up;
            left = *cell;
        }
    }
    row.last().copied().unwrap_or(0)
}
