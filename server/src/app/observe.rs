//! What a server shows of itself beside its API: metrics and health.

use std::time::Duration;

use runtime::shutdown::Shutdown;
use runtime::telemetry::health::Health;
use runtime::telemetry::settings::HealthPages;
use runtime::telemetry::{self, http, metrics};
use tokio::net::TcpListener;
use tokio::time::Instant;

use super::StartError;
use crate::config::Config;
use crate::feed::Feed;
use crate::history::{self, Replica};

/// Starts to record metrics if they are to be shown; without a reader nothing is recorded.
pub(super) fn record_metrics(config: &Config) -> Result<Option<metrics::Recorded>, StartError> {
    if config.telemetry.prometheus.is_none() {
        return Ok(None);
    }
    let mut labels = Vec::new();
    if config.telemetry.trust_domain_label {
        labels.push(("trust_domain", config.trust_domain.to_string()));
    }
    if config.telemetry.hostname_label
        && let Ok(host) = std::fs::read_to_string("/proc/sys/kernel/hostname")
    {
        labels.push(("host", host.trim().to_owned()));
    }
    metrics::install("spire_server", &config.telemetry, &labels).map(Some).map_err(StartError::Metrics)
}

/// The pages that are served over HTTP, and where.
pub(super) fn pages(
    config: &Config,
    health: &Health,
    health_listener: Option<TcpListener>,
    recorded: Option<&metrics::Recorded>,
    metrics_listener: Option<TcpListener>,
) -> Vec<(&'static str, TcpListener, http::Answer)> {
    let mut pages = Vec::new();
    if let (Some(HealthPages { live_path, ready_path, .. }), Some(listener)) = (&config.health, health_listener) {
        pages.push(("health checks", listener, health.answer(live_path.clone(), ready_path.clone())));
    }
    if let (Some(recorded), Some(listener)) = (recorded, metrics_listener) {
        pages.push(("metrics", listener, recorded.answer()));
    }
    pages
}

/// Counts what there is, now and then.
pub(super) async fn gauges(replica: Replica, feed: Feed, stop: Shutdown) {
    const EVERY: Duration = Duration::from_secs(10);
    let started = Instant::now();
    #[allow(clippy::cast_precision_loss, reason = "counts of this size are exact")]
    let show = |name: &'static str, count: usize| ::metrics::gauge!(name).set(count as f64);
    loop {
        let state = replica.latest();
        show("uptime_in_ms", usize::try_from(started.elapsed().as_millis()).unwrap_or(usize::MAX));
        show("node.agents_by_id_cache.count", state.agent_count());
        show("entry.entries_by_entryid_cache.count", state.entry_count());
        show("sync.streams", feed.streams());
        drop(state);
        tokio::select! {
            () = tokio::time::sleep(EVERY) => {}
            () = stop.requested() => return,
        }
    }
}

/// Says how the store does, whenever that changes.
pub(super) async fn watch_health(replica: Replica, health: Health, stop: Shutdown) {
    const PART: &str = "catalog.datastore";
    let mut standing = replica.health();
    loop {
        match &*standing.borrow_and_update() {
            history::Health::Attached => health.ready(PART),
            history::Health::Detached => {
                tracing::error!("The data store is out of reach: nothing is written until it is back");
                health.waiting(PART, "out of reach");
            }
            history::Health::NeedsRestart(error) => {
                tracing::error!(error = telemetry::chain(error), "The data store failed: restart the server");
                health.failed(PART, telemetry::chain(error));
            }
            history::Health::Ended => health.waiting(PART, "closed"),
        }
        tokio::select! {
            changed = standing.changed() => if changed.is_err() { return },
            () = stop.requested() => return,
        }
    }
}
