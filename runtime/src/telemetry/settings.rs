//! The parts of a configuration that every program has: logs, `telemetry { }` and `health_checks { }`.

use std::path::PathBuf;

use super::level::Level;
use super::log::Format;
use crate::hcl::{Located, Mistakes, Section};

/// How and where the process logs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logs {
    /// The file; standard output if there is none.
    pub file: Option<PathBuf>,
    /// The level at the start.
    pub level: Level,
    /// The shape of a line.
    pub format: Format,
    /// Whether lines name their place in the source.
    pub source_location: bool,
}

/// Which metrics are recorded and where they are shown.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Metrics {
    /// Where Prometheus reads them: host and port.
    pub prometheus: Option<(String, u16)>,
    /// Put before every name instead of the program's.
    pub prefix: Option<String>,
    /// Whether every metric has the trust domain as label `trust_domain`.
    pub trust_domain_label: bool,
    /// Whether every metric has the host's name as label `host`.
    pub hostname_label: bool,
    /// Names that are recorded although a shorter prefix is blocked.
    pub allowed_prefixes: Vec<String>,
    /// Names that are not recorded.
    pub blocked_prefixes: Vec<String>,
    /// The only labels that are recorded, if set.
    pub allowed_labels: Option<Vec<String>>,
    /// Labels that are not recorded.
    pub blocked_labels: Vec<String>,
}

/// Where health is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HealthPages {
    /// Host to listen on.
    pub address: String,
    /// Port to listen on.
    pub port: u16,
    /// Path of the liveness page.
    pub live_path: String,
    /// Path of the readiness page.
    pub ready_path: String,
}

/// Reads a log level; a mistake is noted.
pub fn level(section: &Section<'_>, given: Option<Located<String>>) -> Level {
    let Some(given) = given else { return Level::Info };
    given.value.parse().unwrap_or_else(|error: super::level::UnknownLevel| {
        section.mistakes().refuse_at(&given, error.to_string(), "write one of debug, info, warn, error");
        Level::Info
    })
}

/// Reads a log format; a mistake is noted.
pub fn format(section: &Section<'_>, given: Option<Located<String>>) -> Format {
    let Some(given) = given else { return Format::Text };
    match given.value.to_ascii_lowercase().as_str() {
        "" | "text" => Format::Text,
        "json" => Format::Json,
        _ => {
            let message = format!("{:?} is no log format", given.value);
            section.mistakes().refuse_at(&given, message, "write text or json");
            Format::Text
        }
    }
}

/// A port out of `1..=65535`; a mistake is noted.
pub fn port(section: &Section<'_>, given: Option<Located<i64>>) -> Option<u16> {
    let given = given?;
    match u16::try_from(given.value) {
        Ok(port) if port > 0 => Some(port),
        _ => {
            section.mistakes().refuse_at(
                &given,
                format!("{} is no port", given.value),
                "write a number from 1 to 65535",
            );
            None
        }
    }
}

/// The host of an address key: a name, or an IP address; an IPv6 address may stand in brackets, which are removed. A
/// mistake is noted.
pub fn host(given: &Located<String>, mistakes: &Mistakes) -> Option<String> {
    let text = given.value.as_str();
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    // A zone (`fe80::1%eth0`) is the resolver's business.
    let address = bare.split_once('%').map_or(bare, |(address, _)| address);
    // No name contains these; a port, or one bracket alone, is a slip.
    if (bare.contains([':', '[', ']']) || bare.len() < text.len()) && address.parse::<std::net::Ipv6Addr>().is_err() {
        let message = format!("{text:?} is neither a name nor an IP address");
        let remedy = "write it without a port, such as 0.0.0.0, [::] or localhost; the port has a key of its own";
        mistakes.refuse_at(given, message, remedy);
        return None;
    }
    Some(bare.to_owned())
}

/// Reads `telemetry { }` of the top level. Sinks that are pushed to are refused by name.
pub fn metrics(root: &Section<'_>) -> Metrics {
    let mut metrics = Metrics { hostname_label: true, ..Metrics::default() };
    let Some(section) = root.section("telemetry") else { return metrics };
    for sink in ["DogStatsd", "Statsd", "M3"] {
        if let Some(line) = section.has(sink) {
            section.mistakes().refuse(
                Some(line),
                section.key(sink),
                "this sink is not served yet",
                "use telemetry { Prometheus { port = … } } and let a collector forward it",
            );
        }
    }
    if let Some(memory) = section.section("InMem") {
        memory.mistakes().warn(memory.line(), memory.path(), "is of no effect", "remove it");
        memory.refuse_unknown();
    }
    if let Some(prometheus) = section.section("Prometheus") {
        let host = address(&prometheus, "host");
        if let Some(line) = prometheus.has("tls") {
            prometheus.mistakes().refuse(
                Some(line),
                prometheus.key("tls"),
                "TLS for metrics is not served yet",
                "listen on localhost, or put a proxy in front",
            );
        }
        let port = match prometheus.integer("port") {
            Some(given) => port(&prometheus, Some(given)),
            None => {
                let message = "port is missing";
                prometheus.mistakes().refuse(prometheus.line(), prometheus.path(), message, "add port = 9988");
                None
            }
        };
        metrics.prometheus = port.map(|port| (host, port));
        prometheus.refuse_unknown();
    }
    let list = |key: &str| section.texts(key).map(|texts| texts.value.into_iter().map(|text| text.value).collect());
    metrics.prefix = section.text("MetricPrefix").map(|prefix| prefix.value);
    metrics.trust_domain_label = section.boolean("EnableTrustDomainLabel").is_some_and(|on| on.value);
    metrics.hostname_label = section.boolean("EnableHostnameLabel").is_none_or(|on| on.value);
    metrics.allowed_prefixes = list("AllowedPrefixes").unwrap_or_default();
    metrics.blocked_prefixes = list("BlockedPrefixes").unwrap_or_default();
    metrics.allowed_labels = list("AllowedLabels");
    metrics.blocked_labels = list("BlockedLabels").unwrap_or_default();
    section.warn_unknown();
    metrics
}

/// The host that a page is served on; `localhost` if nothing else is said.
fn address(section: &Section<'_>, key: &str) -> String {
    let given = section.text(key).filter(|given| !given.value.is_empty());
    given.and_then(|given| host(&given, section.mistakes())).unwrap_or_else(|| "localhost".to_owned())
}

/// Reads `health_checks { }` of the top level; `None` if its listener is off.
pub fn health(root: &Section<'_>) -> Option<HealthPages> {
    let section = root.section("health_checks")?;
    let enabled = section.boolean("listener_enabled").is_some_and(|on| on.value);
    let text = |key: &str, default: &str| section.text(key).map_or_else(|| default.to_owned(), |text| text.value);
    let pages = HealthPages {
        address: address(&section, "bind_address"),
        port: port(&section, section.integer("bind_port")).unwrap_or(80),
        live_path: text("live_path", "/live"),
        ready_path: text("ready_path", "/ready"),
    };
    for (key, path) in [("live_path", &pages.live_path), ("ready_path", &pages.ready_path)] {
        if !path.starts_with('/') {
            let message = format!("{path:?} is no path");
            section.mistakes().refuse(section.has(key), section.key(key), message, "begin it with /");
        }
    }
    section.refuse_unknown();
    enabled.then_some(pages)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hcl::Document;

    fn read<T>(text: &str, read: impl FnOnce(&Section<'_>) -> T) -> (T, Vec<(u32, String)>, usize) {
        let document = Document::parse(text).unwrap();
        let mistakes = Mistakes::new();
        let value = read(&Section::root(&document, &mistakes));
        let (refused, warned) = mistakes.take();
        let refused = refused.into_iter().map(|m| (m.line.unwrap_or(0), format!("{}: {}", m.key, m.message))).collect();
        (value, refused, warned.len())
    }

    #[test]
    fn telemetry_is_read() {
        let text = "telemetry {\n Prometheus { host = \"0.0.0.0\" port = 9988 }\n EnableTrustDomainLabel = true\n AllowedLabels = [\"a\"]\n odd = 1\n}";
        let (metrics_read, refused, warned) = read(text, metrics);
        assert_eq!(refused, []);
        assert_eq!(warned, 1);
        assert_eq!(
            metrics_read,
            Metrics {
                prometheus: Some(("0.0.0.0".into(), 9988)),
                trust_domain_label: true,
                hostname_label: true,
                allowed_labels: Some(vec!["a".into()]),
                ..Metrics::default()
            }
        );
        assert!(read("", metrics).0.prometheus.is_none());
    }

    #[test]
    fn ipv6_addresses_may_stand_in_brackets() {
        for (given, read_as) in [
            ("[::]", "::"),
            ("[::1]", "::1"),
            ("::1", "::1"),
            ("[fe80::1%eth0]", "fe80::1%eth0"),
            ("127.0.0.1", "127.0.0.1"),
            ("name.example.org", "name.example.org"),
        ] {
            let text = format!("health_checks {{ listener_enabled = true bind_address = \"{given}\" }}");
            assert_eq!(read(&text, health).0.unwrap().address, read_as);
            let text = format!("telemetry {{ Prometheus {{ port = 1 host = \"{given}\" }} }}");
            assert_eq!(read(&text, metrics).0.prometheus, Some((read_as.to_owned(), 1)));
        }
        for given in ["[::", "::1]", "[::1]:80", "localhost:80", "[localhost]", "[]", "[[::1]]", "[127.0.0.1]"] {
            let wrong = |key: &str| [(1, format!("{key}: {given:?} is neither a name nor an IP address"))];
            let text = format!("health_checks {{ listener_enabled = true bind_address = \"{given}\" }}");
            assert_eq!(read(&text, health).1, wrong("health_checks.bind_address"));
            let text = format!("telemetry {{ Prometheus {{ port = 1 host = \"{given}\" }} }}");
            assert_eq!(read(&text, metrics).1, wrong("telemetry.Prometheus.host"));
        }
    }

    #[test]
    fn what_is_not_served_is_refused_by_name() {
        let text = "telemetry {\n Statsd = [{ address = \"x\" }]\n Prometheus { tls { } odd = 1 }\n InMem { enabled = true }\n}";
        let (_, refused, _) = read(text, metrics);
        let expected = [
            (2, "telemetry.Statsd: this sink is not served yet"),
            (3, "telemetry.Prometheus.tls: TLS for metrics is not served yet"),
            (3, "telemetry.Prometheus: port is missing"),
            (3, "telemetry.Prometheus.odd: unknown key"),
            (4, "telemetry.InMem.enabled: unknown key"),
        ];
        assert_eq!(refused, expected.map(|(line, text)| (line, text.to_owned())));
    }

    #[test]
    fn health_is_off_unless_enabled() {
        assert_eq!(read("health_checks { bind_port = 81 }", health).0, None);
        let (pages, refused, _) =
            read("health_checks { listener_enabled = true bind_port = \"8080\" ready_path = \"x\" }", health);
        let pages = pages.unwrap();
        assert_eq!((pages.address.as_str(), pages.port, pages.live_path.as_str()), ("localhost", 8080, "/live"));
        assert_eq!(refused, [(1, "health_checks.ready_path: \"x\" is no path".to_owned())]);
        let (_, refused, _) = read("health_checks { bind_port = 70000 }", health);
        assert_eq!(refused, [(1, "health_checks.bind_port: 70000 is no port".to_owned())]);
    }
}
