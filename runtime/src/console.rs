//! What a command prints: collected while it runs, written at its end, so that tests see it as it will be seen.

use std::fmt::Display;
use std::io::Write;

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use time::macros::format_description;

/// The form of a command's output.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum Output {
    /// For people.
    #[default]
    Pretty,
    /// One line of JSON, for programs.
    Json,
}

/// Text for standard output and standard error.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Screen {
    /// Standard output.
    pub out: String,
    /// Standard error.
    pub err: String,
}

impl Screen {
    /// Nothing yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// A line on standard output.
    pub fn line(&mut self, text: impl Display) {
        self.out.push_str(&text.to_string());
        self.out.push('\n');
    }

    /// A line on standard error.
    pub fn error_line(&mut self, text: impl Display) {
        self.err.push_str(&text.to_string());
        self.err.push('\n');
    }

    /// Writes everything and forgets it. Nobody can be told that nobody listens.
    pub fn flush(&mut self) {
        let _ = std::io::stdout().lock().write_all(self.out.as_bytes());
        let _ = std::io::stdout().lock().flush();
        let _ = std::io::stderr().lock().write_all(self.err.as_bytes());
        *self = Self::default();
    }
}

/// `singular` if there is one, else `plural`.
pub fn plural<'t>(count: usize, singular: &'t str, plural: &'t str) -> &'t str {
    if count == 1 { singular } else { plural }
}

/// A moment as Go prints it: `2023-11-14 22:13:20 +0000 UTC`. `seconds` are counted from 1970.
pub fn go_time(seconds: i64) -> String {
    let format = format_description!("[year]-[month]-[day] [hour]:[minute]:[second] +0000 UTC");
    moment(seconds).and_then(|moment| moment.format(format).ok()).unwrap_or_else(|| format!("{seconds} s since 1970"))
}

/// A moment as RFC 3339: `2023-11-14T22:13:20Z`. `seconds` are counted from 1970.
pub fn rfc3339(seconds: i64) -> String {
    moment(seconds).and_then(|moment| moment.format(&Rfc3339).ok()).unwrap_or_else(|| format!("{seconds} s since 1970"))
}

fn moment(seconds: i64) -> Option<OffsetDateTime> {
    OffsetDateTime::from_unix_timestamp(seconds).ok()
}

/// Whether `text` is a moment in the form in which Go prints one with the zone as hours:
/// `2006-01-02 15:04:05 -0700 -07`.
pub fn is_go_moment(text: &str) -> bool {
    let format = format_description!(
        "[year]-[month]-[day] [hour]:[minute]:[second] [offset_hour sign:mandatory][offset_minute]"
    );
    let Some((moment, zone)) = text.rsplit_once(' ') else { return false };
    let mut digits = zone.strip_prefix(['+', '-']).unwrap_or("").bytes();
    let zone_is_two_digits = digits.len() == 2 && digits.all(|digit| digit.is_ascii_digit());
    zone_is_two_digits && OffsetDateTime::parse(moment, format).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments() {
        assert_eq!(go_time(1_700_000_000), "2023-11-14 22:13:20 +0000 UTC");
        assert_eq!(rfc3339(1_700_000_000), "2023-11-14T22:13:20Z");
        assert_eq!(go_time(0), "1970-01-01 00:00:00 +0000 UTC");
        assert_eq!(go_time(i64::MAX), format!("{} s since 1970", i64::MAX));
        for (text, legal) in [
            ("2006-01-02 15:04:05 -0700 -07", true),
            ("2006-01-02 15:04:05 +0000 +00", true),
            ("2006-01-02 15:04:05 +0000 UTC", false),
            ("2006-01-02 15:04:05", false),
            ("yesterday", false),
            ("", false),
        ] {
            assert_eq!(is_go_moment(text), legal, "{text}");
        }
    }

    #[test]
    fn a_screen_collects_lines() {
        let mut screen = Screen::new();
        screen.line("one");
        screen.line(2);
        screen.error_line("three");
        assert_eq!(screen, Screen { out: "one\n2\n".into(), err: "three\n".into() });
        assert_eq!((plural(1, "agent", "agents"), plural(0, "agent", "agents")), ("agent", "agents"));
    }
}
