//! Durations as Go writes them: `1h30m`, `1.5s`, `300ms`.

use std::time::Duration;

/// Why a text is no duration.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DurationError {
    /// Not of the form number and unit, repeated.
    #[error("{text:?} is no duration")]
    Form {
        /// The text.
        text: String,
    },
    /// A number without a unit.
    #[error("{text:?} has a number without a unit (ns, us, ms, s, m, h)")]
    Unit {
        /// The text.
        text: String,
    },
    /// Below zero.
    #[error("{text:?} is negative")]
    Negative {
        /// The text.
        text: String,
    },
    /// More than about 292 years, which is where Go's durations end.
    #[error("{text:?} is too long")]
    TooLong {
        /// The text.
        text: String,
    },
}

/// Go's `time.Duration` is a signed 64-bit count of nanoseconds.
const MAX_NANOSECONDS: u128 = i64::MAX as u128;

/// Reads a duration of Go's syntax (`time.ParseDuration`): one or more decimal numbers, each with an optional
/// fraction and a unit out of `ns`, `us` (also `µs`), `ms`, `s`, `m`, `h`; or a bare `0`.
///
/// # Errors
///
/// [`DurationError`] for every other text; negative ones are refused, since nothing that is configured may be one.
pub fn parse(text: &str) -> Result<Duration, DurationError> {
    let form = || DurationError::Form { text: text.to_owned() };
    let too_long = || DurationError::TooLong { text: text.to_owned() };
    let (negative, mut rest) = match text.as_bytes().first() {
        Some(b'-') => (true, text.get(1..).unwrap_or("")),
        Some(b'+') => (false, text.get(1..).unwrap_or("")),
        _ => (false, text),
    };
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(form());
    }
    let mut total: u128 = 0;
    while !rest.is_empty() {
        let (whole, after) = digits(rest);
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => digits(after),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return Err(form());
        }
        let end = after.find(|c: char| c == '.' || c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit: u128 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            "" => return Err(DurationError::Unit { text: text.to_owned() }),
            _ => return Err(form()),
        };
        let whole: u128 = if whole.is_empty() { 0 } else { whole.parse().map_err(|_| too_long())? };
        let mut part = whole.checked_mul(unit).ok_or_else(too_long)?;
        // A unit has at most thirteen digits of nanoseconds; what lies behind cannot be told apart.
        let mut numerator: u128 = 0;
        let mut denominator: u128 = 1;
        for digit in fraction.bytes().take(18) {
            numerator = numerator * 10 + u128::from(digit - b'0');
            denominator *= 10;
        }
        part = part.checked_add(numerator * unit / denominator).ok_or_else(too_long)?;
        total = total.checked_add(part).filter(|total| *total <= MAX_NANOSECONDS).ok_or_else(too_long)?;
        rest = after;
    }
    if negative && total > 0 {
        return Err(DurationError::Negative { text: text.to_owned() });
    }
    Ok(Duration::from_nanos(u64::try_from(total).map_err(|_| too_long())?))
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

/// Writes a duration as Go prints it: `1h30m0s`, `1.5s`, `0s`.
pub fn format(duration: Duration) -> String {
    let nanoseconds = duration.as_nanos();
    if nanoseconds == 0 {
        return "0s".to_owned();
    }
    let small = |unit: u128, name: &str| format!("{}{name}", decimal(nanoseconds, unit));
    if nanoseconds < 1_000 {
        return format!("{nanoseconds}ns");
    } else if nanoseconds < 1_000_000 {
        return small(1_000, "µs");
    } else if nanoseconds < 1_000_000_000 {
        return small(1_000_000, "ms");
    }
    let seconds = duration.as_secs();
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let tail = format!("{}s", decimal(nanoseconds % 60_000_000_000, 1_000_000_000));
    match (hours, minutes) {
        (0, 0) => tail,
        (0, _) => format!("{minutes}m{tail}"),
        _ => format!("{hours}h{minutes}m{tail}"),
    }
}

fn decimal(value: u128, unit: u128) -> String {
    let fraction = value % unit;
    if fraction == 0 {
        return (value / unit).to_string();
    }
    let width = unit.ilog10() as usize;
    let digits = format!("{fraction:0width$}");
    format!("{}.{}", value / unit, digits.trim_end_matches('0'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn reads_what_go_reads() {
        for (text, nanoseconds) in [
            ("0", 0),
            ("+0", 0),
            ("-0", 0),
            ("0s", 0),
            ("5s", 5_000_000_000),
            ("+5s", 5_000_000_000),
            ("1.5h", 5_400_000_000_000),
            ("1h15m30.918273645s", 4_530_918_273_645),
            (".5s", 500_000_000),
            ("1.s", 1_000_000_000),
            ("1µs", 1_000),
            ("1μs", 1_000),
            ("12us", 12_000),
            ("300ms", 300_000_000),
            ("0.100000000000000000000h", 360_000_000_000),
            ("9223372036854775807ns", i64::MAX as u64),
        ] {
            assert_eq!(parse(text), Ok(Duration::from_nanos(nanoseconds)), "{text}");
        }
    }

    #[test]
    fn refuses_what_go_refuses_and_negative_ones() {
        for text in ["", "+", "s", ".", "1x", "1d", " 1h", "1h ", "1,5h", ".s", "1 h", "--1s", "1s-1s"] {
            assert_eq!(parse(text), Err(DurationError::Form { text: text.into() }), "{text}");
        }
        for text in ["3", "1.5", "1h30"] {
            assert_eq!(parse(text), Err(DurationError::Unit { text: text.into() }), "{text}");
        }
        assert_eq!(parse("-1s"), Err(DurationError::Negative { text: "-1s".into() }));
        for text in ["9223372036854775808ns", "3000000h", "99999999999999999999999999999999999999999s"] {
            assert_eq!(parse(text), Err(DurationError::TooLong { text: text.into() }), "{text}");
        }
    }

    #[test]
    fn prints_as_go_prints() {
        for (nanoseconds, text) in [
            (0, "0s"),
            (1, "1ns"),
            (1_100, "1.1µs"),
            (2_200_000, "2.2ms"),
            (3_300_000_000, "3.3s"),
            (60_000_000_000, "1m0s"),
            (245_000_000_000, "4m5s"),
            (245_001_000_000, "4m5.001s"),
            (18_367_001_000_000, "5h6m7.001s"),
            (86_400_000_000_000, "24h0m0s"),
            (480_000_000_001, "8m0.000000001s"),
        ] {
            assert_eq!(format(Duration::from_nanos(nanoseconds)), text);
        }
    }

    proptest! {
        #[test]
        fn what_is_printed_is_read(nanoseconds in 0..=i64::MAX as u64) {
            let duration = Duration::from_nanos(nanoseconds);
            prop_assert_eq!(parse(&format(duration)), Ok(duration));
        }

        #[test]
        fn never_panics(text in "\\PC*") {
            let _ = parse(&text);
        }
    }
}
