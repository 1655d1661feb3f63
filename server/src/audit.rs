//! The audit: who did what, one line an item.
//!
//! The lines are off unless configured, and go to the log with `type=audit`. The counters behind them are always on.
//! No line about a local process, an agent or an administrator is ever left out, and neither is an attestation. Calls
//! of strangers, who change nothing, ask the log's limiter: it counts those that it leaves out, by their network.
//! What is signed without changing a record (SVIDs of workloads) is released by the audit's [`Receipt`], as what
//! changes one is released by the receipt of its commit.

use std::net::IpAddr;
use std::path::Path;
use std::time::SystemTime;

use runtime::telemetry::Limiter;
use spiffe::id::SpiffeId;
use tonic::Code;
use transport::serve::network_name;

use crate::authority::issue::{IssuedJwt, IssuedX509, Recorded, Unreleased};
use crate::authority::profile::unix_seconds;

/// Proof that the audit has seen a credential.
#[derive(Debug)]
pub struct Receipt(());

impl Recorded for Receipt {}

/// Who did it, and by which call.
#[derive(Clone, Copy, Debug)]
pub struct Actor<'a> {
    /// Path of the method.
    pub method: &'static str,
    /// Tells the lines of one call together.
    pub request_id: Option<&'a str>,
    /// Where a network caller calls from.
    pub address: Option<IpAddr>,
    /// The SPIFFE ID that the caller proved.
    pub id: Option<&'a SpiffeId>,
    /// A local caller.
    pub process: Option<Process<'a>>,
}

/// A process of this machine.
#[derive(Clone, Copy, Debug)]
pub struct Process<'a> {
    /// Its effective user when it connected.
    pub uid: u32,
    /// Its effective group when it connected.
    pub gid: u32,
    /// Its number.
    pub pid: i32,
    /// The program it ran when it called; none if that cannot be seen.
    pub path: Option<&'a Path>,
}

/// What tells who acts.
pub trait Acting {
    /// Who acts.
    fn actor(&self) -> Actor<'_>;
}

/// How an item ended.
#[derive(Clone, Copy, Debug)]
pub enum Outcome<'a> {
    /// As asked for.
    Success,
    /// Not at all.
    Failed {
        /// The gRPC status code.
        code: Code,
        /// What the client was told.
        text: &'a str,
    },
}

/// What an audit line tells beside caller and outcome. Never a key, a token, or a join token.
#[derive(Clone, Debug, Default)]
pub struct Fields {
    /// Registration entry.
    pub entry_id: Option<String>,
    /// SPIFFE ID that the item is about.
    pub spiffe_id: Option<String>,
    /// Parent of the entry.
    pub parent_id: Option<String>,
    /// Selectors, joined by commas.
    pub selectors: Option<String>,
    /// DNS names, joined by commas.
    pub dns_names: Option<String>,
    /// Trust domain of the bundle.
    pub trust_domain_id: Option<String>,
    /// Agent that the item is about.
    pub agent_id: Option<String>,
    /// Node attestation method.
    pub node_attestor_type: Option<String>,
    /// SHA-256 of the certificate request, in hex.
    pub csr_sha256: Option<String>,
    /// Audiences of a token, joined by commas.
    pub audience: Option<String>,
    /// End of what was made, seconds since 1970.
    pub expires_at: Option<i64>,
    /// Lifetime asked for, in seconds.
    pub ttl: Option<i64>,
    /// Whether the entry is one of an administrator.
    pub admin: Option<bool>,
    /// Whether the entry is one of a downstream server.
    pub downstream: Option<bool>,
    /// Anything else worth a word, such as a log level or a mode.
    pub detail: Option<String>,
}

/// The sink of audit lines.
#[derive(Clone, Debug)]
pub struct Audit {
    lines: bool,
    log: Limiter,
}

impl Audit {
    /// An audit that writes lines, or only counts.
    pub fn new(lines: bool, log: Limiter) -> Self {
        Self { lines, log }
    }

    /// Whether lines are written.
    pub fn writes_lines(&self) -> bool {
        self.lines
    }

    /// Writes one line, if lines are written; `fields` is not asked otherwise.
    pub fn record(&self, by: &impl Acting, outcome: Outcome<'_>, fields: impl FnOnce() -> Fields) {
        if !self.lines {
            return;
        }
        let fields = fields();
        let (status, code, text) = match outcome {
            Outcome::Success => ("success", None, None),
            Outcome::Failed { code, text } => ("error", Some(format!("{code:?}")), Some(text)),
        };
        let Actor { method, request_id, address, id, process } = by.actor();
        let attested = fields.agent_id.is_some() && matches!(outcome, Outcome::Success);
        let is_stranger = id.is_none() && process.is_none() && !attested;
        if is_stranger && !self.log.allow("API accessed", &address.map_or_else(String::new, network_name)) {
            return;
        }
        tracing::info!(
            target: "audit",
            r#type = "audit",
            request_id,
            method,
            status,
            status_code = code,
            status_message = text,
            caller_addr = address.map(tracing::field::display),
            caller_id = id.map(tracing::field::display),
            caller_uid = process.map(|process| process.uid),
            caller_gid = process.map(|process| process.gid),
            caller_pid = process.map(|process| process.pid),
            caller_path = process.and_then(|process| process.path).map(|path| tracing::field::display(path.display())),
            entry_id = fields.entry_id,
            spiffe_id = fields.spiffe_id,
            parent_id = fields.parent_id,
            selectors = fields.selectors,
            dns_name = fields.dns_names,
            trust_domain_id = fields.trust_domain_id,
            agent_id = fields.agent_id,
            node_attestor_type = fields.node_attestor_type,
            csr = fields.csr_sha256,
            audience = fields.audience,
            expires_at = fields.expires_at,
            ttl = fields.ttl,
            admin = fields.admin,
            downstream = fields.downstream,
            detail = fields.detail,
            "API accessed"
        );
    }

    /// Records the X509-SVID of a workload.
    pub fn x509(&self, by: &impl Acting, issued: &Unreleased<IssuedX509>, fields: impl FnOnce() -> Fields) -> Receipt {
        self.record(by, Outcome::Success, || Fields {
            spiffe_id: Some(issued.id().to_string()),
            expires_at: seconds(issued.not_after()),
            ..fields()
        });
        Receipt(())
    }

    /// Records the JWT-SVID of a workload.
    pub fn jwt(&self, by: &impl Acting, issued: &Unreleased<IssuedJwt>, fields: impl FnOnce() -> Fields) -> Receipt {
        self.record(by, Outcome::Success, || Fields {
            spiffe_id: Some(issued.id().to_string()),
            expires_at: seconds(issued.expires_at()),
            ..fields()
        });
        Receipt(())
    }
}

/// Whole seconds since 1970, as lines tell them.
fn seconds(time: SystemTime) -> Option<i64> {
    i64::try_from(unix_seconds(time)).ok()
}

/// SHA-256 of `bytes` in lower-case hex.
pub fn sha256_hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes);
    digest.as_ref().iter().fold(String::with_capacity(64), |mut text, byte| {
        // Writing to a String does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
