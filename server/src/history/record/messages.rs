//! The messages inside the envelopes. Fields are only ever added, and each addition raises the version.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use spiffe::bundle::{JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::SelectorSet;
use spiffe::x509::Serial;

use super::RecordError;
use crate::history::HistoryId;
use crate::history::group::{seconds_of, time_of};
use crate::state::State;
use crate::state::model::{
    Agent, AuthorityKind, AuthoritySlot, Entry, JoinToken, KeyOwner, PendingSerial, SlotStatus, Standing,
};

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Moment {
    #[prost(sint64, tag = "1")]
    seconds: i64,
    #[prost(uint32, tag = "2")]
    nanoseconds: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct Span {
    #[prost(uint64, tag = "1")]
    seconds: u64,
    #[prost(uint32, tag = "2")]
    nanoseconds: u32,
}

fn history_bytes(history: HistoryId) -> Bytes {
    Bytes::copy_from_slice(&history.0)
}

pub(super) fn history_id(bytes: Option<&Bytes>) -> Result<Option<HistoryId>, RecordError> {
    bytes.map(|bytes| bytes.as_ref().try_into().map(HistoryId).map_err(|_| RecordError::Number)).transpose()
}

fn moment(at: SystemTime) -> Option<Moment> {
    let (seconds, nanoseconds) = seconds_of(at);
    Some(Moment { seconds, nanoseconds })
}

fn span(of: Duration) -> Span {
    Span { seconds: of.as_secs(), nanoseconds: of.subsec_nanos() }
}

pub(super) fn optional_time(moment: Option<&Moment>) -> Result<Option<SystemTime>, RecordError> {
    moment.map(|moment| time_of(moment.seconds, moment.nanoseconds).ok_or(RecordError::Time)).transpose()
}

pub(super) fn time(moment: Option<&Moment>) -> Result<SystemTime, RecordError> {
    optional_time(moment)?.ok_or(RecordError::Time)
}

pub(super) fn duration(span: Option<&Span>) -> Result<Option<Duration>, RecordError> {
    span.map(|span| {
        Duration::from_secs(span.seconds)
            .checked_add(Duration::from_nanos(u64::from(span.nanoseconds)))
            .ok_or(RecordError::Time)
    })
    .transpose()
}

/// An id of our own trust domain is stored as its path.
fn id_text(id: &SpiffeId, own: &TrustDomain) -> String {
    if id.is_member_of(own) { id.path().to_owned() } else { id.as_str().to_owned() }
}

fn selector_texts(selectors: &SelectorSet) -> Vec<String> {
    selectors.iter().map(|selector| selector.as_str().to_owned()).collect()
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct MetaRecord {
    #[prost(string, tag = "1")]
    pub(super) trust_domain: String,
    #[prost(message, optional, tag = "2")]
    pub(super) at: Option<Moment>,
    #[prost(uint64, tag = "3")]
    pub(super) next_ordinal: u64,
    #[prost(int64, tag = "4")]
    pub(super) revision_floor: i64,
    #[prost(bytes = "bytes", optional, tag = "5")]
    pub(super) restored_from: Option<Bytes>,
}

impl MetaRecord {
    pub(super) fn of(state: &State, at: SystemTime) -> Self {
        Self {
            trust_domain: state.trust_domain().as_str().to_owned(),
            at: moment(at),
            next_ordinal: state.next_ordinal(),
            revision_floor: state.revision_floor(),
            restored_from: state.restored_from().map(history_bytes),
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct EntryRecord {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(int64, tag = "2")]
    pub(super) revision: i64,
    #[prost(string, tag = "3")]
    pub(super) spiffe_id: String,
    #[prost(string, tag = "4")]
    pub(super) parent_id: String,
    #[prost(string, repeated, tag = "5")]
    pub(super) selectors: Vec<String>,
    #[prost(message, optional, tag = "6")]
    pub(super) x509_svid_ttl: Option<Span>,
    #[prost(message, optional, tag = "7")]
    pub(super) jwt_svid_ttl: Option<Span>,
    #[prost(string, repeated, tag = "8")]
    pub(super) federates_with: Vec<String>,
    #[prost(bool, tag = "9")]
    pub(super) admin: bool,
    #[prost(bool, tag = "10")]
    pub(super) downstream: bool,
    #[prost(message, optional, tag = "11")]
    pub(super) expires_at: Option<Moment>,
    #[prost(string, repeated, tag = "12")]
    pub(super) dns_names: Vec<String>,
    #[prost(bool, tag = "13")]
    pub(super) store_svid: bool,
    #[prost(string, tag = "14")]
    pub(super) hint: String,
    #[prost(message, optional, tag = "15")]
    pub(super) created_at: Option<Moment>,
    #[prost(bool, tag = "16")]
    pub(super) disable_x509_svid_prefetch: bool,
    #[prost(bool, tag = "17")]
    pub(super) jwt_svid_include_jti: bool,
}

impl EntryRecord {
    pub(super) fn of(entry: &Entry, own: &TrustDomain) -> Self {
        Self {
            id: entry.id.to_string(),
            revision: entry.revision,
            spiffe_id: id_text(&entry.spiffe_id, own),
            parent_id: id_text(&entry.parent_id, own),
            selectors: selector_texts(&entry.selectors),
            x509_svid_ttl: entry.x509_svid_ttl.map(span),
            jwt_svid_ttl: entry.jwt_svid_ttl.map(span),
            federates_with: entry.federates_with.iter().map(|domain| domain.as_str().to_owned()).collect(),
            admin: entry.admin,
            downstream: entry.downstream,
            expires_at: entry.expires_at.and_then(moment),
            dns_names: entry.dns_names.iter().map(ToString::to_string).collect(),
            store_svid: entry.store_svid,
            hint: entry.hint.to_string(),
            created_at: moment(entry.created_at),
            disable_x509_svid_prefetch: entry.disable_x509_svid_prefetch,
            jwt_svid_include_jti: entry.jwt_svid_include_jti,
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AgentRecord {
    #[prost(string, tag = "1")]
    pub(super) id: String,
    #[prost(string, tag = "2")]
    pub(super) attestation_type: String,
    #[prost(string, repeated, tag = "3")]
    pub(super) selectors: Vec<String>,
    /// Absent for a banned agent.
    #[prost(message, optional, tag = "4")]
    active: Option<ActiveRecord>,
    #[prost(message, optional, tag = "5")]
    pub(super) expires_at: Option<Moment>,
    #[prost(bool, tag = "6")]
    pub(super) can_reattest: bool,
    #[prost(string, tag = "7")]
    pub(super) version: String,
    #[prost(bytes = "bytes", optional, tag = "8")]
    pub(super) history: Option<Bytes>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct ActiveRecord {
    #[prost(message, optional, tag = "1")]
    current: Option<SerialRecord>,
    #[prost(message, repeated, tag = "2")]
    pending: Vec<SerialRecord>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct SerialRecord {
    #[prost(string, tag = "1")]
    serial: String,
    #[prost(message, optional, tag = "2")]
    expires_at: Option<Moment>,
}

impl SerialRecord {
    fn number(&self) -> Result<Serial, RecordError> {
        Serial::parse_decimal(&self.serial).map_err(|_| RecordError::Number)
    }
}

impl AgentRecord {
    pub(super) fn of(agent: &Agent, own: &TrustDomain) -> Self {
        let active = match &agent.standing {
            Standing::Active { serial, expires_at, pending } => Some(ActiveRecord {
                current: Some(SerialRecord { serial: serial.to_string(), expires_at: moment(*expires_at) }),
                pending: pending
                    .iter()
                    .map(|one| SerialRecord { serial: one.serial.to_string(), expires_at: moment(one.expires_at) })
                    .collect(),
            }),
            Standing::Banned => None,
        };
        Self {
            id: id_text(&agent.id, own),
            attestation_type: agent.attestation_type.to_string(),
            selectors: selector_texts(&agent.selectors),
            active,
            expires_at: moment(agent.expires_at),
            can_reattest: agent.can_reattest,
            version: agent.version.to_string(),
            history: agent.history.map(history_bytes),
        }
    }

    pub(super) fn standing(&self) -> Result<Standing, RecordError> {
        let Some(active) = &self.active else { return Ok(Standing::Banned) };
        let current = active.current.as_ref().ok_or(RecordError::Number)?;
        let pending = active.pending.iter().map(|one| {
            let expires_at = time(one.expires_at.as_ref())?;
            Ok(PendingSerial { serial: one.number()?, expires_at })
        });
        Ok(Standing::Active {
            serial: current.number()?,
            expires_at: time(current.expires_at.as_ref())?,
            pending: pending.collect::<Result<_, RecordError>>()?,
        })
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct TokenRecord {
    #[prost(message, optional, tag = "1")]
    pub(super) expires_at: Option<Moment>,
    #[prost(string, optional, tag = "2")]
    pub(super) alias: Option<String>,
}

impl TokenRecord {
    pub(super) fn of(token: &JoinToken, own: &TrustDomain) -> Self {
        Self { expires_at: moment(token.expires_at), alias: token.alias.as_ref().map(|id| id_text(id, own)) }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct BundleRecord {
    #[prost(uint64, tag = "1")]
    pub(super) ordinal: u64,
    #[prost(uint64, tag = "2")]
    pub(super) sequence: u64,
    #[prost(message, optional, tag = "3")]
    refresh_hint: Option<Span>,
}

impl BundleRecord {
    pub(super) fn of(ordinal: u64, sequence: u64, refresh_hint: Option<Duration>) -> Self {
        Self { ordinal, sequence, refresh_hint: refresh_hint.map(span) }
    }

    pub(super) fn refresh_hint(&self) -> Result<Option<Duration>, RecordError> {
        duration(self.refresh_hint.as_ref())
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct X509AuthorityRecord {
    #[prost(uint64, tag = "1")]
    pub(super) ordinal: u64,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) certificate: Bytes,
    #[prost(bool, tag = "3")]
    pub(super) tainted: bool,
}

impl X509AuthorityRecord {
    pub(super) fn of(ordinal: u64, authority: &X509Authority) -> Self {
        Self { ordinal, certificate: authority.der.clone(), tainted: authority.tainted }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct JwtAuthorityRecord {
    #[prost(uint64, tag = "1")]
    pub(super) ordinal: u64,
    #[prost(bytes = "bytes", tag = "2")]
    pub(super) public_key: Bytes,
    #[prost(message, optional, tag = "3")]
    pub(super) expires_at: Option<Moment>,
    #[prost(bool, tag = "4")]
    pub(super) tainted: bool,
}

impl JwtAuthorityRecord {
    pub(super) fn of(ordinal: u64, authority: &JwtAuthority) -> Self {
        Self {
            ordinal,
            public_key: authority.public_key.clone(),
            expires_at: authority.expires_at.and_then(moment),
            tainted: authority.tainted,
        }
    }
}

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SlotRecord {
    #[prost(string, tag = "1")]
    key_id: String,
    #[prost(uint32, tag = "2")]
    status: u32,
    #[prost(message, optional, tag = "3")]
    issued_at: Option<Moment>,
    #[prost(message, optional, tag = "4")]
    not_after: Option<Moment>,
    #[prost(bytes = "bytes", optional, tag = "5")]
    certificate: Option<Bytes>,
    #[prost(bytes = "bytes", repeated, tag = "6")]
    upstream_chain: Vec<Bytes>,
    #[prost(bytes = "bytes", tag = "7")]
    public_key: Bytes,
}

impl SlotRecord {
    pub(super) fn of(slot: &AuthoritySlot) -> Self {
        Self {
            key_id: slot.key_id.to_string(),
            status: status_number(slot.status),
            issued_at: moment(slot.issued_at),
            not_after: moment(slot.not_after),
            certificate: slot.certificate.clone(),
            upstream_chain: slot.upstream_chain.clone(),
            public_key: slot.public_key.clone(),
        }
    }

    pub(super) fn slot(
        self,
        owner: KeyOwner,
        kind: AuthorityKind,
        authority_id: Arc<str>,
    ) -> Result<AuthoritySlot, RecordError> {
        Ok(AuthoritySlot {
            owner,
            kind,
            authority_id,
            key_id: Arc::from(self.key_id.as_str()),
            status: status(self.status)?,
            issued_at: time(self.issued_at.as_ref())?,
            not_after: time(self.not_after.as_ref())?,
            certificate: self.certificate,
            upstream_chain: self.upstream_chain,
            public_key: self.public_key,
        })
    }
}

fn status_number(status: SlotStatus) -> u32 {
    match status {
        SlotStatus::Prepared => 1,
        SlotStatus::Active => 2,
        SlotStatus::Old => 3,
        SlotStatus::Lost => 4,
    }
}

fn status(number: u32) -> Result<SlotStatus, RecordError> {
    Ok(match number {
        1 => SlotStatus::Prepared,
        2 => SlotStatus::Active,
        3 => SlotStatus::Old,
        4 => SlotStatus::Lost,
        _ => return Err(RecordError::Number),
    })
}

pub(super) fn authority_kind_number(kind: AuthorityKind) -> u8 {
    match kind {
        AuthorityKind::X509 => 1,
        AuthorityKind::Jwt => 2,
    }
}

pub(super) fn authority_kind(number: u8) -> Result<AuthorityKind, RecordError> {
    Ok(match number {
        1 => AuthorityKind::X509,
        2 => AuthorityKind::Jwt,
        _ => return Err(RecordError::Number),
    })
}
