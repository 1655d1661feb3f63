//! Counters of calls: how many ended how, and how long they took.

use std::sync::OnceLock;
use std::time::Duration;

use metrics::{Counter, Histogram};
use tonic::Code;

use super::permission::METHODS;

/// Status codes of gRPC, 0 to 16.
const CODES: usize = 17;

/// One meter a method; made when a method is first called, and then only added to.
#[derive(Debug)]
pub struct Meters {
    methods: Vec<Meter>,
}

#[derive(Default)]
struct Meter {
    ended: [OnceLock<Counter>; CODES],
    took: OnceLock<Histogram>,
}

impl std::fmt::Debug for Meter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Meter").finish_non_exhaustive()
    }
}

impl Meters {
    /// Meters for every method, none of them used.
    pub fn new() -> Self {
        Self { methods: METHODS.iter().map(|_| Meter::default()).collect() }
    }

    /// Counts a call of the method at `index` of the table.
    pub fn count(&self, index: usize, code: Code, took: Duration) {
        let (Some(meter), Some(method)) = (self.methods.get(index), METHODS.get(index)) else { return };
        if let Some(ended) = meter.ended.get(code as usize) {
            ended.get_or_init(|| metrics::counter!(method.metric, "status" => status_label(code))).increment(1);
        }
        meter
            .took
            .get_or_init(|| metrics::histogram!(format!("{}.elapsed_time", method.metric)))
            .record(took.as_secs_f64() * 1_000.0);
    }
}

/// A status code as monitoring of SPIRE knows it.
fn status_label(code: Code) -> String {
    match code {
        Code::Ok => "OK".to_owned(),
        code => format!("{code:?}"),
    }
}

impl Default for Meters {
    fn default() -> Self {
        Self::new()
    }
}
