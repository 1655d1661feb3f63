//! DNS names that a certificate may have.

/// Why a text is not a DNS name that may be registered. The texts are those of SPIRE, which clients show.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DnsNameError {
    /// A character beyond ASCII; international names are written in their `xn--` form.
    #[error("name must be ascii")]
    NotAscii,
    /// More than one `*`.
    #[error("too many wildcards")]
    Wildcards,
    /// A `*` that is not the whole first label.
    #[error("wildcard must be first label")]
    WildcardPlace,
    /// Nothing is left.
    #[error("empty or only whitespace")]
    Empty,
    /// The name ends with a dot.
    #[error("domain ends with dot")]
    FinalDot,
    /// A label is empty or longer than 63 bytes, or the name is longer than 253 (RFC 1035 §2.3.4).
    #[error("idna error\nidna: invalid label length")]
    Length,
    /// A label begins or ends with a hyphen, or has two in its third and fourth place (RFC 5891 §4.2.3.1).
    #[error("idna error\nidna: misplaced hyphen")]
    Hyphen,
    /// A label is no Punycode (RFC 3492).
    #[error("idna error\nidna: invalid punycode")]
    Punycode,
}

/// Checks a name as SPIRE does: an optional `*.` and then labels whose lengths, hyphens and Punycode are right.
/// Blanks and underscores inside are let through, because SPIRE lets them.
///
/// # Errors
/// What is wrong with it.
pub fn check_dns_name(name: &str) -> Result<(), DnsNameError> {
    if !name.is_ascii() {
        return Err(DnsNameError::NotAscii);
    }
    let plain = match name.matches('*').count() {
        0 => name,
        1 => name.strip_prefix("*.").ok_or(DnsNameError::WildcardPlace)?,
        _ => return Err(DnsNameError::Wildcards),
    };
    let plain = plain.trim();
    if plain.is_empty() {
        return Err(DnsNameError::Empty);
    }
    if plain.ends_with('.') {
        return Err(DnsNameError::FinalDot);
    }
    if plain.len() > 253 {
        return Err(DnsNameError::Length);
    }
    plain.split('.').try_for_each(check_label)
}

fn check_label(label: &str) -> Result<(), DnsNameError> {
    if label.is_empty() || label.len() > 63 {
        return Err(DnsNameError::Length);
    }
    if let Some(encoded) = label.strip_prefix("xn--") {
        return check_punycode(encoded.as_bytes());
    }
    let hyphens_inside = label.len() > 4 && label.get(2..4) == Some("--");
    if label.starts_with('-') || label.ends_with('-') || hyphens_inside {
        return Err(DnsNameError::Hyphen);
    }
    Ok(())
}

/// Decodes far enough to know that the text stands for code points, at least one of them beyond ASCII (RFC 3492 §6.2).
fn check_punycode(encoded: &[u8]) -> Result<(), DnsNameError> {
    const BASE: u32 = 36;
    const THRESHOLDS: (u32, u32) = (1, 26);
    let (basic, deltas) = match encoded.iter().rposition(|byte| *byte == b'-') {
        Some(last) => (last, encoded.get(last + 1..).unwrap_or_default()),
        None => (0, encoded),
    };
    if deltas.is_empty() {
        return Err(DnsNameError::Punycode);
    }
    let mut length = u32::try_from(basic).map_err(|_| DnsNameError::Punycode)?;
    let (mut code, mut index, mut bias, mut first) = (128u32, 0u32, 72u32, true);
    let mut digits = deltas.iter();
    while digits.len() > 0 {
        let (before, mut weight, mut step) = (index, 1u32, BASE);
        loop {
            let digit = match digits.next() {
                Some(letter @ b'a'..=b'z') => u32::from(letter - b'a'),
                Some(letter @ b'A'..=b'Z') => u32::from(letter - b'A'),
                Some(number @ b'0'..=b'9') => u32::from(number - b'0') + 26,
                _ => return Err(DnsNameError::Punycode),
            };
            index = digit.checked_mul(weight).and_then(|add| index.checked_add(add)).ok_or(DnsNameError::Punycode)?;
            let threshold = step.saturating_sub(bias).clamp(THRESHOLDS.0, THRESHOLDS.1);
            if digit < threshold {
                break;
            }
            weight = weight.checked_mul(BASE - threshold).ok_or(DnsNameError::Punycode)?;
            step += BASE;
        }
        length += 1;
        bias = adapt(index - before, length, first);
        first = false;
        code = code.checked_add(index / length).ok_or(DnsNameError::Punycode)?;
        index = index % length + 1;
        if code < 128 || char::from_u32(code).is_none() {
            return Err(DnsNameError::Punycode);
        }
    }
    Ok(())
}

/// RFC 3492 §6.1.
fn adapt(delta: u32, length: u32, first: bool) -> u32 {
    let mut delta = delta / if first { 700 } else { 2 };
    delta += delta / length;
    let mut steps = 0;
    while delta > (35 * 26) / 2 {
        delta /= 35;
        steps += 36;
    }
    steps + 36 * delta / (delta + 38)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_spire_accepts() {
        for name in
            ["com", "example.com", "*.example.com", "a b", "a_b.com", "A.COM", "127.0.0.1", "*.b.c", "a-hello.com"]
        {
            assert_eq!(check_dns_name(name), Ok(()), "{name}");
        }
        for name in ["xn--ls8h.org", "xn--bcher-kva.example", "xn--mnchen-3ya.de", "xn--p1ai"] {
            assert_eq!(check_dns_name(name), Ok(()), "{name}");
        }
        assert_eq!(check_dns_name(&format!("{}.com", "a".repeat(63))), Ok(()));
    }

    #[test]
    fn names_that_spire_refuses() {
        use DnsNameError::{Empty, FinalDot, Hyphen, Length, NotAscii, Punycode, WildcardPlace, Wildcards};
        for (name, error) in [
            ("", Empty),
            (" ", Empty),
            ("*. ", Empty),
            (".", FinalDot),
            ("example.com.", FinalDot),
            ("*", WildcardPlace),
            ("a*.com", WildcardPlace),
            ("foo.*.bar", WildcardPlace),
            ("*.foo.*.bar", Wildcards),
            ("b\u{fc}cher.example", NotAscii),
            ("-a", Hyphen),
            ("a-.com", Hyphen),
            ("ab--c.com", Hyphen),
            ("a..b", Length),
            (".a", Length),
            ("xn--", Punycode),
            ("xn--a-", Punycode),
            ("xn--99999999", Punycode),
            ("xn--ab_", Punycode),
        ] {
            assert_eq!(check_dns_name(name), Err(error), "{name}");
        }
        assert_eq!(check_dns_name(&"a".repeat(64)), Err(Length));
        assert_eq!(check_dns_name(&vec!["a".repeat(60); 5].join(".")), Err(Length));
    }
}
