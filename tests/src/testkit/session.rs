//! Golden sessions: commands with everything they print, in one text file that a person can read and a test replays.
//!
//! ```text
//! $ server entry count
//! 0 registration entries
//!
//! $ server entry delete -entryID missing
//! Error: …
//! [exit 1]
//! ```
//!
//! What differs from run to run stands as a word in angle brackets, numbered where one value can be told from another.
//! `SIGNET_BLESS=1` writes the files anew.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::Output;

use anyhow::{Context, Result, ensure};

/// Replaces what differs from run to run by names.
#[derive(Debug, Default)]
pub struct Names {
    known: BTreeMap<String, String>,
    next: BTreeMap<&'static str, usize>,
    fixed: Vec<(String, String)>,
}

impl Names {
    /// Shows `value` as `<name>` wherever it occurs.
    pub fn fix(&mut self, value: impl Into<String>, name: &str) {
        self.fixed.push((value.into(), format!("<{name}>")));
        // Longer values may contain shorter ones.
        self.fixed.sort_by_key(|(value, _)| std::cmp::Reverse(value.len()));
    }

    /// The text with names in place of values.
    pub fn stable(&mut self, text: &str) -> String {
        let mut text = text.to_owned();
        for (value, name) in &self.fixed {
            text = text.replace(value, name);
        }
        let mut stable = String::new();
        let mut pem = false;
        for line in text.lines() {
            if line.starts_with("-----END ") {
                pem = false;
            }
            if pem {
                continue;
            }
            let _ = writeln!(stable, "{}", self.line(line));
            if line.starts_with("-----BEGIN ") {
                stable.push_str("<pem>\n");
                pem = true;
            }
        }
        stable
    }

    fn line(&mut self, line: &str) -> String {
        let mut stable = String::new();
        let mut word = String::new();
        for character in line.chars().chain(std::iter::once('\n')) {
            if character.is_ascii_alphanumeric() || "-_+=.".contains(character) {
                word.push(character);
                continue;
            }
            stable.push_str(&self.word(&std::mem::take(&mut word)));
            stable.push(character);
        }
        stable.pop();
        times(&stable)
    }

    fn word(&mut self, word: &str) -> String {
        let hex = |text: &str| text.chars().all(|character| character.is_ascii_hexdigit());
        let groups: Vec<&str> = word.split('-').collect();
        let uuid = groups.iter().map(|group| group.len()).eq([8, 4, 4, 4, 12]) && groups.iter().all(|group| hex(group));
        let decimal = word.chars().all(|character| character.is_ascii_digit());
        let parts: Vec<&str> = word.split('.').collect();
        let kind = match () {
            () if uuid => "uuid",
            () if decimal && word.len() >= 20 => "serial",
            // Seconds since the epoch, in this century.
            () if decimal && word.len() == 10 => return "<seconds>".into(),
            () if hex(word) && word.len() == 40 => "key-id",
            () if parts.len() == 3 && word.starts_with("eyJ") => "jwt",
            () if word.len() >= 60 => return "<base64>".into(),
            // Key ids and coordinates of keys: random letters and digits.
            () if word.len() >= 32 && mixed(word) => "random",
            () => return word.to_owned(),
        };
        if let Some(name) = self.known.get(word) {
            return name.clone();
        }
        let number = self.next.entry(kind).and_modify(|number| *number += 1).or_insert(1);
        let name = format!("<{kind}-{number}>");
        self.known.insert(word.to_owned(), name.clone());
        name
    }
}

fn mixed(word: &str) -> bool {
    word.chars().any(|character| character.is_ascii_digit())
        && word.chars().any(|character| character.is_ascii_uppercase())
}

/// `2026-11-23 23:00:00 +0000 UTC` and its relatives become `<time>`, durations `<duration>`.
fn times(line: &str) -> String {
    let mut words: Vec<String> = Vec::new();
    let is_date = |word: &str| word.len() == 10 && word.split('-').map(str::len).eq([4, 2, 2]);
    let is_time =
        |word: &str| word.split(':').count() == 3 && word.starts_with(|character: char| character.is_ascii_digit());
    let is_zone = |word: &str| matches!(word, "UTC" | "+0000" | "+00:00");
    let is_duration = |word: &str| {
        word.starts_with(|character: char| character.is_ascii_digit())
            && ["ns", "µs", "ms", "s"].iter().any(|unit| word.ends_with(unit))
            && word.chars().all(|character| character.is_ascii_digit() || ".hmsnµ".contains(character))
    };
    for word in line.split(' ') {
        let last = words.last().map(String::as_str);
        if last.is_some_and(|last| last.ends_with("<time>")) && (is_time(word) || is_zone(word)) {
            continue;
        }
        let (label, value) = word.rsplit_once('\t').unwrap_or(("", word));
        words.push(if is_date(value) {
            format!("{label}{}<time>", if label.is_empty() { "" } else { "\t" })
        } else if last == Some("after") && is_duration(word) {
            "<duration>".into()
        } else {
            word.to_owned()
        });
    }
    words.join(" ")
}

/// Replays the session in `file`: `run` is given the words after `$ ` of each command.
///
/// # Errors
/// If what is printed differs from the file; the text shows the first difference with its line.
pub fn replay(
    file: &Path,
    names: &mut Names,
    mut run: impl FnMut(&[String], &mut Names) -> Result<Output>,
) -> Result<()> {
    let golden = fs::read_to_string(file).with_context(|| file.display().to_string())?;
    let mut seen = String::new();
    for line in golden.lines() {
        if line.starts_with('#') {
            let _ = writeln!(seen, "{line}");
        }
        let Some(command) = line.strip_prefix("$ ") else { continue };
        let words: Vec<String> = command.split(' ').map(ToOwned::to_owned).collect();
        let output = run(&words, names)?;
        let printed = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        let _ = write!(seen, "{line}\n{}", names.stable(&printed));
        match output.status.code() {
            Some(0) => {}
            Some(code) => {
                let _ = writeln!(seen, "[exit {code}]");
            }
            None => seen.push_str("[killed]\n"),
        }
        seen.push('\n');
    }
    if std::env::var_os("SIGNET_BLESS").is_some() {
        fs::write(file, seen)?;
        return Ok(());
    }
    for (index, (expected, found)) in golden.lines().zip(seen.lines()).enumerate() {
        ensure!(
            expected == found,
            "{}:{}:\n  expected: {expected}\n  found:    {found}\n\nThe whole session:\n{seen}",
            file.display(),
            index + 1
        );
    }
    ensure!(golden.lines().count() == seen.lines().count(), "{} has another length:\n{seen}", file.display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Names;

    #[test]
    fn what_differs_from_run_to_run_gets_a_name() {
        let mut names = Names::default();
        names.fix("/tmp/x", "folder");
        let text = "Entry ID         : 0c5e3b1e-8d4b-4b0e-9c39-0d8e6f0b3a11\nExpiration time  : 2026-11-23 23:00:00 +0000 UTC\n\
                    again 0c5e3b1e-8d4b-4b0e-9c39-0d8e6f0b3a11 in /tmp/x/y, serial 123456789012345678901234\n\
                    Received 1 svid after 1.52ms\n-----BEGIN CERTIFICATE-----\nAAAA\nBBBB\n-----END CERTIFICATE-----\n";
        let stable = "Entry ID         : <uuid-1>\nExpiration time  : <time>\nagain <uuid-1> in <folder>/y, serial <serial-1>\n\
                      Received 1 svid after <duration>\n-----BEGIN CERTIFICATE-----\n<pem>\n-----END CERTIFICATE-----\n";
        assert_eq!(names.stable(text), stable);
    }
}
