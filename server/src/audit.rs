//! The audit: who did what, one line an item.
//!
//! The lines are off unless configured, and go to the log with `type=audit`. The counters behind them are always on.
//! What is signed without changing a record (SVIDs of workloads) is released by the audit's [`Receipt`], as what
//! changes one is released by the receipt of its commit.

use std::fmt::Display;

use tonic::Code;

use crate::api::admission::Admission;
use crate::api::caller::CallerKind;
use crate::authority::issue::{IssuedJwt, IssuedX509, Recorded, Unreleased};

/// Proof that the audit has seen a credential.
#[derive(Debug)]
pub struct Receipt(());

impl Recorded for Receipt {}

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
#[derive(Clone, Copy, Debug)]
pub struct Audit {
    lines: bool,
}

impl Audit {
    /// An audit that writes lines, or only counts.
    pub fn new(lines: bool) -> Self {
        Self { lines }
    }

    /// Whether lines are written.
    pub fn writes_lines(&self) -> bool {
        self.lines
    }

    /// Writes one line, if lines are written; `fields` is not asked otherwise.
    pub fn record(&self, admission: &Admission, outcome: Outcome<'_>, fields: impl FnOnce() -> Fields) {
        if !self.lines {
            return;
        }
        let fields = fields();
        let (status, code, text) = match outcome {
            Outcome::Success => ("success", None, None),
            Outcome::Failed { code, text } => ("error", Some(format!("{code:?}")), Some(text)),
        };
        let (uid, gid, pid) = match &admission.caller.kind {
            CallerKind::Local(process) => (Some(process.uid), Some(process.gid), Some(process.pid)),
            CallerKind::Anonymous | CallerKind::X509 { .. } => (None, None, None),
        };
        tracing::info!(
            target: "audit",
            r#type = "audit",
            request_id = admission.request_id.as_deref(),
            method = admission.method.path,
            status,
            status_code = code,
            status_message = text,
            caller_addr = shown(admission.caller.address.as_ref()),
            caller_id = shown(admission.caller.id()),
            caller_uid = uid,
            caller_gid = gid,
            caller_pid = pid,
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
    pub fn x509(
        &self,
        admission: &Admission,
        issued: &Unreleased<IssuedX509>,
        fields: impl FnOnce() -> Fields,
    ) -> Receipt {
        self.record(admission, Outcome::Success, || Fields {
            spiffe_id: Some(issued.id().to_string()),
            expires_at: Some(crate::api::wire::seconds(issued.not_after())),
            ..fields()
        });
        Receipt(())
    }

    /// Records the JWT-SVID of a workload.
    pub fn jwt(
        &self,
        admission: &Admission,
        issued: &Unreleased<IssuedJwt>,
        fields: impl FnOnce() -> Fields,
    ) -> Receipt {
        self.record(admission, Outcome::Success, || Fields {
            spiffe_id: Some(issued.id().to_string()),
            expires_at: Some(crate::api::wire::seconds(issued.expires_at())),
            ..fields()
        });
        Receipt(())
    }
}

/// `value` as a field of a line, left out if there is none.
fn shown<T: Display>(value: Option<&T>) -> Option<tracing::field::DisplayValue<&T>> {
    value.map(tracing::field::display)
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
