//! Log lines in the two shapes that collectors of this field already parse: logrus text and logrus JSON.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::subscriber::Interest;
use tracing::{Event, Metadata, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

use super::level::LogLevel;
use crate::clock::Clock;
use crate::shutdown::{Shutdown, Tasks};

/// Bytes that a line has at most, its break included.
const LINE_LIMIT: usize = 4 * 1024;

/// The shape of a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Format {
    /// `time="…" level=info msg="…" key=value`
    #[default]
    Text,
    /// `{"level":"info","msg":"…","time":"…"}`
    Json,
}

/// Why logging cannot be set up.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LogError {
    /// The log file cannot be opened.
    #[error("cannot open log file {}", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The process logs already.
    #[error("logging is set up already")]
    Already,
}

/// Where lines go. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Output {
    inner: Arc<Mutex<Target>>,
}

#[derive(Debug)]
enum Target {
    Stdout,
    File { path: PathBuf, file: File },
    Memory(Vec<u8>),
}

fn open(path: &Path) -> Result<File, LogError> {
    let opened = OpenOptions::new().append(true).create(true).mode(0o640).open(path);
    opened.map_err(|source| LogError::Open { path: path.to_owned(), source })
}

impl Output {
    /// Standard output.
    pub fn stdout() -> Self {
        Self { inner: Arc::new(Mutex::new(Target::Stdout)) }
    }

    /// A file, appended to.
    ///
    /// # Errors
    ///
    /// [`LogError::Open`].
    pub fn file(path: &Path) -> Result<Self, LogError> {
        let target = Target::File { path: path.to_owned(), file: open(path)? };
        Ok(Self { inner: Arc::new(Mutex::new(target)) })
    }

    /// Memory, for tests; see [`Output::written`].
    pub fn memory() -> Self {
        Self { inner: Arc::new(Mutex::new(Target::Memory(Vec::new()))) }
    }

    /// What was written to memory so far.
    pub fn written(&self) -> String {
        match &*self.inner.lock().unwrap_or_else(PoisonError::into_inner) {
            Target::Memory(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            _ => String::new(),
        }
    }

    /// Opens the file's path again, after a rotation has moved the file away. Other targets stay.
    ///
    /// # Errors
    ///
    /// [`LogError::Open`]; lines then keep going to the old file.
    pub fn reopen(&self) -> Result<(), LogError> {
        let mut target = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Target::File { path, file } = &mut *target {
            *file = open(path)?;
        }
        Ok(())
    }

    fn write(&self, line: &[u8]) {
        // A log that cannot be written has nowhere to say so.
        let _ = match &mut *self.inner.lock().unwrap_or_else(PoisonError::into_inner) {
            Target::Stdout => std::io::stdout().lock().write_all(line),
            Target::File { file, .. } => file.write_all(line),
            Target::Memory(bytes) => bytes.write_all(line),
        };
    }

    /// Opens the file again at each SIGUSR2, until shutdown. SIGUSR1, with which SPIRE reads data files of plugins again,
    /// finds nothing to read and says so; it never ends the process.
    pub fn answer_signals(&self, tasks: &Tasks, shutdown: Shutdown) {
        use tokio::signal::unix::{SignalKind, signal};
        let output = self.clone();
        let both =
            signal(SignalKind::user_defined1()).and_then(|reload| Ok((reload, signal(SignalKind::user_defined2())?)));
        let (mut reload, mut reopen) = match both {
            Ok(both) => both,
            Err(error) => {
                tracing::warn!(%error, "Cannot listen for SIGUSR1 and SIGUSR2; the log file will not be reopened");
                return;
            }
        };
        tasks.spawn("user signals", async move {
            loop {
                tokio::select! {
                    Some(()) = reload.recv() => tracing::info!(
                        "SIGUSR1 changes nothing: no plugin has a data file to read again. Restart to use a changed \
                         configuration; send SIGUSR2 to reopen the log file"
                    ),
                    Some(()) = reopen.recv() => match output.reopen() {
                        Ok(()) => tracing::info!("Log file reopened"),
                        Err(error) => tracing::error!(error = super::chain(&error), "Cannot reopen the log file"),
                    },
                    () = shutdown.requested() => return,
                    else => return,
                }
            }
        });
    }
}

/// Makes `output` the log of the whole process.
///
/// # Errors
///
/// [`LogError::Already`] if there is one.
pub fn install(level: LogLevel, format: Format, source_location: bool, output: Output) -> Result<(), LogError> {
    let subscriber = subscriber(level, format, source_location, output, Clock::system());
    tracing::subscriber::set_global_default(subscriber).map_err(|_| LogError::Already)
}

/// A subscriber for a part of the process, such as a test (`tracing::subscriber::with_default`).
pub fn subscriber(
    level: LogLevel,
    format: Format,
    source_location: bool,
    output: Output,
    clock: Clock,
) -> impl Subscriber + Send + Sync {
    Registry::default().with(Lines { level, format, source_location, output, clock })
}

struct Lines {
    level: LogLevel,
    format: Format,
    source_location: bool,
    output: Output,
    clock: Clock,
}

/// Fields in the order in which they were given.
#[derive(Default)]
struct Fields {
    message: String,
    values: Vec<(&'static str, Value)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: Value) {
        match (field.name(), value) {
            ("message", Value::String(text)) => self.message = text,
            ("message", other) => self.message = other.to_string(),
            (name, value) => {
                self.values.retain(|(known, _)| *known != name);
                self.values.push((name, value));
            }
        }
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        self.put(field, format!("{value:?}").into());
    }
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.into());
    }
    fn record_bool(&mut self, field: &Field, value: bool) {
        self.put(field, value.into());
    }
    fn record_i64(&mut self, field: &Field, value: i64) {
        self.put(field, value.into());
    }
    fn record_u64(&mut self, field: &Field, value: u64) {
        self.put(field, value.into());
    }
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.put(field, value.into());
    }
    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, super::chain(value).into());
    }
}

impl<S: Subscriber + for<'s> LookupSpan<'s>> Layer<S> for Lines {
    fn register_callsite(&self, metadata: &'static Metadata<'static>) -> Interest {
        // The cache is rebuilt when the level changes, so the answer may be final.
        if self.level.allows(metadata) { Interest::always() } else { Interest::never() }
    }

    fn enabled(&self, metadata: &Metadata<'_>, _: Context<'_, S>) -> bool {
        self.level.allows(metadata)
    }

    fn max_level_hint(&self) -> Option<tracing::level_filters::LevelFilter> {
        Some(self.level.filter())
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        if let Some(span) = context.span(id) {
            let mut fields = Fields::default();
            attributes.record(&mut fields);
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, record: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            record.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut own = Fields::default();
        event.record(&mut own);
        let mut fields: BTreeMap<String, Value> = BTreeMap::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.extend(outer.values.iter().map(|(name, value)| (free_name(name), value.clone())));
            }
        }
        let metadata = event.metadata();
        fields.entry("subsystem_name".to_owned()).or_insert_with(|| subsystem(metadata.target()).into());
        if self.source_location
            && let (Some(file), Some(line)) = (metadata.file(), metadata.line())
        {
            fields.insert("file".to_owned(), format!("{file}:{line}").into());
        }
        fields.extend(own.values.into_iter().map(|(name, value)| (free_name(name), value)));
        let time = OffsetDateTime::from(self.clock.now());
        let time = time.replace_nanosecond(time.microsecond() * 1000).unwrap_or(time);
        let time = time.format(&Rfc3339).unwrap_or_default();
        let level = match *metadata.level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warning",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        let mut line = self.format.line(&time, level, &own.message, &fields);
        // A caller can make a value long: every value gives, the longest first, until the line is short enough.
        let mut most = LINE_LIMIT / 4;
        while line.len() >= LINE_LIMIT && most > 0 {
            shorten(&mut own.message, most);
            fields.values_mut().for_each(|value| shorten_value(value, most));
            line = self.format.line(&time, level, &own.message, &fields);
            most /= 2;
        }
        if line.len() >= LINE_LIMIT {
            // So many fields that their names alone are too long.
            line = self.format.line(&time, level, &own.message, &BTreeMap::new());
        }
        line.push('\n');
        self.output.write(line.as_bytes());
    }
}

impl Format {
    /// One line, without its break.
    fn line(self, time: &str, level: &str, message: &str, fields: &BTreeMap<String, Value>) -> String {
        match self {
            Self::Text => text_line(time, level, message, fields),
            Self::Json => {
                let own = [("time", time), ("level", level), ("msg", message)];
                let mut all: BTreeMap<&str, Cow<'_, Value>> =
                    fields.iter().map(|(name, value)| (name.as_str(), Cow::Borrowed(value))).collect();
                all.extend(own.map(|(name, text)| (name, Cow::Owned(text.into()))));
                serde_json::to_string(&all).unwrap_or_default()
            }
        }
    }
}

/// Cuts a text to `most` bytes and a mark that it was cut.
fn shorten(text: &mut String, most: usize) {
    const MARK: char = '…';
    if text.len() > most + MARK.len_utf8() {
        text.truncate(text.floor_char_boundary(most));
        text.push(MARK);
    }
}

fn shorten_value(value: &mut Value, most: usize) {
    if let Value::String(text) = value {
        shorten(text, most);
    }
}

/// Field names that would hide a line's own are moved aside, as logrus does.
fn free_name(name: &str) -> String {
    match name {
        "time" | "level" | "msg" => format!("fields.{name}"),
        _ => name.to_owned(),
    }
}

/// `signet_server::authority::rotate` is the subsystem `authority`.
fn subsystem(target: &str) -> &str {
    let mut parts = target.split("::");
    let first = parts.next().unwrap_or(target);
    parts.next().unwrap_or(first)
}

fn text_line(time: &str, level: &str, message: &str, fields: &BTreeMap<String, Value>) -> String {
    let mut line = format!("time=\"{time}\" level={level} msg={}", Quoted(message));
    for (name, value) in fields {
        let written = match value {
            Value::String(text) => write!(line, " {name}={}", Quoted(text)),
            other => write!(line, " {name}={other}"),
        };
        if written.is_err() {
            break;
        }
    }
    line
}

/// Quoted only where logrus would: a line stays one line, whatever a caller puts in.
struct Quoted<'t>(&'t str);

impl std::fmt::Display for Quoted<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-._/@^+".contains(&byte)) {
            f.write_str(self.0)
        } else {
            write!(f, "{:?}", self.0)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use super::super::level::Level;
    use super::*;

    fn logged(level: Level, format: Format, body: impl FnOnce(&LogLevel)) -> String {
        let output = Output::memory();
        let clock = Clock::paused(SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_250));
        let level = LogLevel::new(level);
        // Real time passes between two lines of a test; steps back keep the stamp where it was.
        let subscriber = subscriber(level.clone(), format, false, output.clone(), clock);
        tracing::subscriber::with_default(subscriber, || body(&level));
        output.written()
    }

    fn without_time(text: &str) -> String {
        text.lines().map(|line| format!("{}\n", line.split_once(" level").map_or(line, |(_, rest)| rest))).collect()
    }

    #[test]
    fn text_is_logrus_text() {
        let text = logged(Level::Info, Format::Text, |_| {
            let span = tracing::info_span!(target: "signet_server::api::entry", "call", method = "ListEntries", caller = tracing::field::Empty);
            span.record("caller", "spiffe://td/a b");
            let _in = span.enter();
            tracing::warn!(target: "signet_server::api::entry", count = 3, spiffe_id = "spiffe://td/x", "Two\nlines");
            tracing::debug!(target: "signet_server::api::entry", "not seen");
        });
        assert!(text.starts_with("time=\"2023-11-14T22:13:20."), "{text}");
        assert_eq!(
            without_time(&text),
            "=warning msg=\"Two\\nlines\" caller=\"spiffe://td/a b\" count=3 method=ListEntries spiffe_id=\"spiffe://td/x\" subsystem_name=api\n"
        );
    }

    #[test]
    fn json_is_logrus_json() {
        let text = logged(Level::Info, Format::Json, |_| {
            tracing::info!(target: "signet_agent::cache", level = "x", ok = true, subsystem_name = "mine", "Done");
        });
        let line: serde_json::Map<String, Value> = serde_json::from_str(&text).unwrap();
        assert_eq!(line["level"], "info");
        assert_eq!(line["msg"], "Done");
        assert_eq!(line["fields.level"], "x");
        assert_eq!(line["ok"], true);
        assert_eq!(line["subsystem_name"], "mine");
        assert!(line["time"].as_str().unwrap().ends_with('Z'));
    }

    #[test]
    fn the_level_changes_while_running_and_others_only_warn() {
        let text = logged(Level::Error, Format::Text, |level| {
            let say = |n: u32| tracing::debug!(target: "signet_server::x", n, "said");
            let other = || {
                tracing::info!(target: "h2::codec", "frame");
                tracing::warn!(target: "h2::codec", "odd");
            };
            say(1);
            other();
            level.set(Level::Debug);
            say(2);
            other();
            level.reset();
            say(3);
        });
        assert_eq!(
            without_time(&text),
            "=debug msg=said n=2 subsystem_name=x\n=warning msg=odd subsystem_name=codec\n"
        );
    }

    #[test]
    fn a_moved_file_is_made_anew() {
        let directory = tempfile::tempdir().unwrap();
        let (path, moved) = (directory.path().join("log"), directory.path().join("log.1"));
        let output = Output::file(&path).unwrap();
        output.write(b"one\n");
        std::fs::rename(&path, &moved).unwrap();
        output.write(b"two\n");
        output.reopen().unwrap();
        output.write(b"three\n");
        assert_eq!(std::fs::read_to_string(&moved).unwrap(), "one\ntwo\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "three\n");
        assert!(matches!(Output::file(directory.path()), Err(LogError::Open { .. })));
    }

    #[test]
    fn a_line_has_at_most_four_kibibytes_whatever_a_caller_puts_in() {
        for format in [Format::Text, Format::Json] {
            let text = logged(Level::Info, format, |_| {
                // Every byte takes several when quoted.
                let (wild, long) = ("\u{1}".repeat(100_000), "é".repeat(100_000));
                tracing::warn!(target: "signet_server::x", wild, long, count = 3, "{}", "m".repeat(100_000));
                tracing::warn!(target: "signet_server::x", long = "a".repeat(3_000), short = "b", "Fits");
            });
            let lines: Vec<&str> = text.split_inclusive('\n').collect();
            assert_eq!(lines.len(), 2);
            assert!(lines.iter().all(|line| line.len() <= 4 * 1024), "{:?}", lines.iter().map(|line| line.len()));
            assert!(lines[0].contains("m…") && lines[0].contains("é…") && lines[0].contains("count"), "{}", lines[0]);
            assert!(lines[1].contains(&"a".repeat(3_000)) && !lines[1].contains('…'), "{}", lines[1]);
            if matches!(format, Format::Json) {
                let line: serde_json::Map<String, Value> = serde_json::from_str(lines[0]).unwrap();
                assert_eq!((&line["level"], &line["count"]), (&Value::from("warning"), &Value::from(3)));
            }
        }
    }
}
