//! Metrics: the recorder behind the `metrics` macros, rendered for Prometheus.

use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Metadata, Recorder, SharedString, Unit};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

use super::http::{Answer, Page};
use super::settings::Metrics;
use crate::shutdown::{Shutdown, Tasks};

/// Metrics are recorded already, by somebody else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a metrics recorder is installed already")]
pub struct AlreadyInstalled;

/// What was recorded, ready to be shown.
#[derive(Clone)]
pub struct Recorded {
    handle: PrometheusHandle,
}

/// Records the metrics of the whole process. Every name gets `service` (or what the configuration says in its place)
/// and an underscore in front; `labels` are put on every metric.
///
/// # Errors
///
/// [`AlreadyInstalled`].
pub fn install(service: &str, settings: &Metrics, labels: &[(&str, String)]) -> Result<Recorded, AlreadyInstalled> {
    let (recorder, recorded) = recorder(service, settings, labels);
    metrics::set_global_recorder(recorder).map_err(|_| AlreadyInstalled)?;
    Ok(recorded)
}

fn recorder(service: &str, settings: &Metrics, labels: &[(&str, String)]) -> (Filtered, Recorded) {
    let builder = labels.iter().fold(PrometheusBuilder::new(), |builder, (name, value)| {
        builder.add_global_label((*name).to_owned(), value.clone())
    });
    let inner = builder.build_recorder();
    let recorded = Recorded { handle: inner.handle() };
    let prefix = settings.prefix.clone().unwrap_or_else(|| service.to_owned());
    let prefix = if prefix.is_empty() { prefix } else { format!("{prefix}_") };
    (Filtered { inner, prefix, settings: settings.clone() }, recorded)
}

impl Recorded {
    /// The text of Prometheus' exposition format.
    pub fn render(&self) -> String {
        self.handle.render()
    }

    /// The page for [`super::http::serve`]: `/metrics`, and `/` for scrapers configured without a path.
    pub fn answer(&self) -> Answer {
        let recorded = self.clone();
        Arc::new(move |path| {
            (path == "/metrics" || path == "/").then(|| Page {
                status: StatusCode::OK,
                content_type: "text/plain; version=0.0.4; charset=utf-8",
                body: recorded.render(),
            })
        })
    }

    /// Keeps the memory of unread histograms bounded, until shutdown.
    pub fn keep_small(&self, tasks: &Tasks, shutdown: Shutdown) {
        let handle = self.handle.clone();
        tasks.spawn("metrics upkeep", async move {
            loop {
                tokio::select! {
                    () = tokio::time::sleep(Duration::from_secs(5)) => handle.run_upkeep(),
                    () = shutdown.requested() => return,
                }
            }
        });
    }
}

/// Puts the prefix before each name and leaves out what the configuration blocks.
struct Filtered {
    inner: PrometheusRecorder,
    prefix: String,
    settings: Metrics,
}

impl Filtered {
    /// As go-metrics does: the longest prefix that matches decides, and what none matches is recorded.
    fn allows(&self, name: &str) -> bool {
        let longest = |prefixes: &[String]| {
            prefixes.iter().filter(|prefix| name.starts_with(prefix.replace('.', "_").as_str())).map(String::len).max()
        };
        match (longest(&self.settings.allowed_prefixes), longest(&self.settings.blocked_prefixes)) {
            (_, None) => true,
            (None, Some(_)) => false,
            (Some(allowed), Some(blocked)) => allowed >= blocked,
        }
    }

    fn allows_label(&self, label: &Label) -> bool {
        let named = |names: &[String]| names.iter().any(|name| name == label.key());
        let allowed = self.settings.allowed_labels.as_deref().is_none_or(named);
        allowed && !named(&self.settings.blocked_labels)
    }

    fn key(&self, key: &Key) -> Option<Key> {
        let name = format!("{}{}", self.prefix, key.name().replace('.', "_"));
        if !self.allows(&name) {
            return None;
        }
        let labels: Vec<Label> = key.labels().filter(|label| self.allows_label(label)).cloned().collect();
        Some(Key::from_parts(name, labels))
    }

    fn name(&self, name: &KeyName) -> KeyName {
        KeyName::from(format!("{}{}", self.prefix, name.as_str().replace('.', "_")))
    }
}

impl Recorder for Filtered {
    fn describe_counter(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.inner.describe_counter(self.name(&name), unit, text);
    }
    fn describe_gauge(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.inner.describe_gauge(self.name(&name), unit, text);
    }
    fn describe_histogram(&self, name: KeyName, unit: Option<Unit>, text: SharedString) {
        self.inner.describe_histogram(self.name(&name), unit, text);
    }
    fn register_counter(&self, key: &Key, metadata: &Metadata<'_>) -> Counter {
        self.key(key).map_or_else(Counter::noop, |key| self.inner.register_counter(&key, metadata))
    }
    fn register_gauge(&self, key: &Key, metadata: &Metadata<'_>) -> Gauge {
        self.key(key).map_or_else(Gauge::noop, |key| self.inner.register_gauge(&key, metadata))
    }
    fn register_histogram(&self, key: &Key, metadata: &Metadata<'_>) -> Histogram {
        self.key(key).map_or_else(Histogram::noop, |key| self.inner.register_histogram(&key, metadata))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rendered(settings: &Metrics) -> String {
        let (recorder, recorded) = recorder("spire_server", settings, &[("host", "h".to_owned())]);
        metrics::with_local_recorder(&recorder, || {
            metrics::counter!("rpc.entry", "status" => "OK", "secret" => "x").increment(2);
            metrics::gauge!("agents").set(3.0);
        });
        let text = recorded.render();
        let mut lines: Vec<_> = text.lines().filter(|line| !line.starts_with('#') && !line.is_empty()).collect();
        lines.sort_unstable();
        lines.join("\n")
    }

    #[test]
    fn names_get_the_prefix() {
        let expected =
            "spire_server_agents{host=\"h\"} 3\nspire_server_rpc_entry{host=\"h\",status=\"OK\",secret=\"x\"} 2";
        assert_eq!(rendered(&Metrics::default()), expected);
    }

    #[test]
    fn filters_hold() {
        let settings = Metrics {
            prefix: Some("mine".into()),
            blocked_prefixes: vec!["mine".into()],
            allowed_prefixes: vec!["mine.rpc".into()],
            blocked_labels: vec!["secret".into()],
            ..Metrics::default()
        };
        assert_eq!(rendered(&settings), "mine_rpc_entry{host=\"h\",status=\"OK\"} 2");
    }
}
