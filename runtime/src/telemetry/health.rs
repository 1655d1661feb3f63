//! Whether the process lives and is ready, as its parts say it.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use http::StatusCode;

use super::http::{Answer, Page};

/// How one part of the process does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Standing {
    /// Whether a restart is not needed.
    pub live: bool,
    /// Whether it can serve.
    pub ready: bool,
    /// Why not, for people.
    pub detail: String,
}

/// The standings of all parts. Cheap to clone; clones are one. Without parts the process lives and is not ready.
#[derive(Clone, Debug, Default)]
pub struct Health {
    parts: Arc<RwLock<BTreeMap<&'static str, Standing>>>,
}

impl Health {
    /// Nothing is known yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how a part does, in place of what was said before.
    pub fn set(&self, part: &'static str, standing: Standing) {
        self.parts.write().unwrap_or_else(PoisonError::into_inner).insert(part, standing);
    }

    /// A part that serves.
    pub fn ready(&self, part: &'static str) {
        self.set(part, Standing { live: true, ready: true, detail: String::new() });
    }

    /// A part that lives but cannot serve (yet).
    pub fn waiting(&self, part: &'static str, detail: impl Into<String>) {
        self.set(part, Standing { live: true, ready: false, detail: detail.into() });
    }

    /// A part that only a restart can help.
    pub fn failed(&self, part: &'static str, detail: impl Into<String>) {
        self.set(part, Standing { live: false, ready: false, detail: detail.into() });
    }

    /// Whether no part has failed.
    pub fn is_live(&self) -> bool {
        self.parts.read().unwrap_or_else(PoisonError::into_inner).values().all(|standing| standing.live)
    }

    /// Whether every part serves, and there is one.
    pub fn is_ready(&self) -> bool {
        let parts = self.parts.read().unwrap_or_else(PoisonError::into_inner);
        !parts.is_empty() && parts.values().all(|standing| standing.ready)
    }

    fn page(&self, good: bool) -> Page {
        let parts = self.parts.read().unwrap_or_else(PoisonError::into_inner);
        let body: serde_json::Map<_, _> = parts
            .iter()
            .map(|(part, standing)| {
                let standing = serde_json::json!({
                    "live": standing.live, "ready": standing.ready, "detail": standing.detail,
                });
                ((*part).to_owned(), standing)
            })
            .collect();
        let status = if good { StatusCode::OK } else { StatusCode::INTERNAL_SERVER_ERROR };
        Page { status, content_type: "application/json", body: format!("{}\n", serde_json::Value::Object(body)) }
    }

    /// The pages of this health, for [`super::http::serve`]: 200 or 500, with the parts as JSON.
    pub fn answer(&self, live_path: String, ready_path: String) -> Answer {
        let health = self.clone();
        Arc::new(move |path| {
            if path == live_path {
                Some(health.page(health.is_live()))
            } else if path == ready_path {
                Some(health.page(health.is_ready()))
            } else {
                None
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_the_parts() {
        let health = Health::new();
        let answer = health.answer("/live".into(), "/ready".into());
        let status = |path: &str| answer(path).map(|page| page.status.as_u16());
        assert_eq!((status("/live"), status("/ready"), status("/")), (Some(200), Some(500), None));
        health.ready("server");
        health.waiting("store", "opening");
        assert_eq!((status("/live"), status("/ready")), (Some(200), Some(500)));
        health.ready("store");
        assert_eq!(status("/ready"), Some(200));
        health.failed("store", "disk");
        assert_eq!((status("/live"), status("/ready")), (Some(500), Some(500)));
        let expected = "{\"server\":{\"live\":true,\"ready\":true,\"detail\":\"\"},\"store\":{\"live\":false,\"ready\":false,\"detail\":\"disk\"}}\n";
        assert_eq!(answer("/ready").unwrap().body, expected);
    }
}
