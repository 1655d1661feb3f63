//! Collects figures over rounds, compares medians, prints a table and writes JSON.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use anyhow::Result;
use serde_json::json;

use crate::stats::median;

/// A limit on a figure. Limits on CPU were set where one CSR check and one signature cost 53 µs, and scale with what they cost here.
#[derive(Clone, Copy)]
pub enum Limit {
    /// The figure must not exceed the value.
    AtMost(f64),
    /// The figure must reach the value.
    AtLeast(f64),
    /// CPU time: must not exceed the value, scaled to this machine.
    CpuAtMost(f64),
    /// Items for a second of CPU: must reach `value` scaled to this machine, or `times` the peer if there is one.
    PerCore {
        /// Items a core-second where the floor is 53 µs.
        value: f64,
        /// Against the peer in the same run.
        times: f64,
    },
    /// CPU time: must not exceed so many times that of the peer in the same run; without a peer not judged.
    OfPeer(f64),
    /// Reported, not judged.
    None,
}

/// One row of the table.
struct Row {
    unit: &'static str,
    must: Limit,
    aim: Limit,
    ours: Vec<f64>,
    peer: Vec<f64>,
}

/// All figures of one run, in the order in which they were first reported.
#[derive(Default)]
pub struct Report {
    order: Vec<String>,
    rows: BTreeMap<String, Row>,
}

/// Whose figure it is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Side {
    /// Ours.
    Ours,
    /// The peer's.
    Peer,
}

impl Report {
    /// Adds one measurement of the figure `name`.
    pub fn add(&mut self, side: Side, name: &str, unit: &'static str, must: Limit, aim: Limit, value: f64) {
        let row = self.rows.entry(name.to_owned()).or_insert_with(|| {
            self.order.push(name.to_owned());
            Row { unit, must, aim, ours: Vec::new(), peer: Vec::new() }
        });
        match side {
            Side::Ours => row.ours.push(value),
            Side::Peer => row.peer.push(value),
        }
        let whose = if side == Side::Ours { "signet" } else { "peer" };
        eprintln!("  {whose:>6}  {name}: {value:.3} {unit}");
    }

    /// The table, medians of all rounds.
    pub fn table(&self, floor_us: f64) -> String {
        let slow = floor_us / 53.0;
        let mut text = format!(
            "{:<58} {:>12} {:>12} {:>8} {:>10} {:>10}  \n",
            "figure (median of rounds)", "signet", "peer", "ratio", "must", "aim"
        );
        for name in &self.order {
            let Some(row) = self.rows.get(name) else { continue };
            let (ours, peer) = (median(&row.ours), median(&row.peer));
            let ratio =
                if row.peer.is_empty() || row.ours.is_empty() { "-".into() } else { format!("{:.2}", ours / peer) };
            let _ = writeln!(
                text,
                "{:<58} {:>12} {:>12} {:>8} {:>10} {:>10}  {}",
                format!("{name} [{}]", row.unit),
                number(ours),
                number(peer),
                ratio,
                limit(here(row.must, slow, peer)),
                limit(here(row.aim, slow, peer)),
                verdict(here(row.must, slow, peer), here(row.aim, slow, peer), ours)
            );
        }
        text
    }

    /// Writes all rounds as JSON.
    pub fn write(&self, path: &Path, floor_us: f64, conditions: &serde_json::Value) -> Result<()> {
        let slow = floor_us / 53.0;
        let figures: Vec<_> = self
            .order
            .iter()
            .filter_map(|name| self.rows.get(name).map(|row| (name, row)))
            .map(|(name, row)| {
                json!({"name": name, "unit": row.unit, "signet": row.ours, "peer": row.peer,
                       "median_signet": finite(median(&row.ours)), "median_peer": finite(median(&row.peer)),
                       "must": limit(here(row.must, slow, median(&row.peer))), "aim": limit(here(row.aim, slow, median(&row.peer)))})
            })
            .collect();
        if let Some(folder) = path.parent() {
            std::fs::create_dir_all(folder)?;
        }
        std::fs::write(path, serde_json::to_string_pretty(&json!({"conditions": conditions, "figures": figures}))?)?;
        Ok(())
    }
}

fn finite(value: f64) -> Option<f64> {
    value.is_finite().then_some(value)
}

fn number(value: f64) -> String {
    match value {
        value if value.is_nan() => "-".into(),
        0.0 => "0".into(),
        value if value.abs() >= 100.0 => format!("{value:.0}"),
        value if value.abs() >= 1.0 => format!("{value:.2}"),
        value => format!("{value:.4}"),
    }
}

/// What a limit means on this machine, `slow` times as slow as the one it was set on, beside a peer's figure if there is one.
fn here(limit: Limit, slow: f64, peer: f64) -> Limit {
    match limit {
        Limit::CpuAtMost(value) => Limit::AtMost(value * slow),
        Limit::OfPeer(times) if peer.is_finite() => Limit::AtMost(times * peer),
        Limit::OfPeer(_) => Limit::None,
        Limit::PerCore { times, .. } if peer.is_finite() => Limit::AtLeast(times * peer),
        Limit::PerCore { value, .. } => Limit::AtLeast(value / slow),
        other => other,
    }
}

fn limit(limit: Limit) -> String {
    match limit {
        Limit::AtMost(value) | Limit::CpuAtMost(value) => format!("<= {}", number(value)),
        Limit::AtLeast(value) | Limit::PerCore { value, .. } => format!(">= {}", number(value)),
        Limit::OfPeer(_) | Limit::None => String::new(),
    }
}

fn holds(limit: Limit, value: f64) -> bool {
    match limit {
        Limit::AtMost(bound) | Limit::CpuAtMost(bound) => value <= bound,
        Limit::AtLeast(bound) | Limit::PerCore { value: bound, .. } => value >= bound,
        Limit::OfPeer(_) | Limit::None => true,
    }
}

fn verdict(must: Limit, aim: Limit, ours: f64) -> &'static str {
    match (must, ours.is_nan()) {
        (_, true) => "",
        (Limit::None, _) if matches!(aim, Limit::None) => "",
        (Limit::None, _) if !holds(aim, ours) => "aim missed",
        (must, _) if !holds(must, ours) => "MISSED",
        _ if matches!(aim, Limit::None) => "holds",
        _ if holds(aim, ours) => "aim reached",
        _ => "holds",
    }
}
