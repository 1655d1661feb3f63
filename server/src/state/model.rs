//! The values a trust domain consists of: entries, agents, join tokens, authorities and their
//! bundles, and the changes that turn one revision into the next.
//!
//! Everything here is a plain value, cheap to clone. Nothing here knows how it is persisted or sent.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use spiffe::bundle::{JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::selector::SelectorSet;
use spiffe::x509::Serial;

pub use super::content::Content;
use crate::history::HistoryId;

/// Whose part of the trust domain something belongs to.
///
/// Until tenants exist there is one scope, the trust domain itself, written `-` in every key.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Scope(Arc<str>);

impl Scope {
    /// The scope that is the whole trust domain.
    pub fn trust_domain() -> Self {
        static WHOLE: std::sync::LazyLock<Arc<str>> = std::sync::LazyLock::new(|| Arc::from("-"));
        Self(Arc::clone(&WHOLE))
    }

    /// The scope with this name, as it stands in a record key.
    pub fn named(name: &str) -> Self {
        if name == "-" { Self::trust_domain() } else { Self(Arc::from(name)) }
    }

    /// The name, as it stands in a record key.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Identifies a registration entry; at most 255 characters of `[-.0-9A-Z_a-z]`.
pub type EntryId = Arc<str>;

/// A registration entry: which workloads of which nodes may have which SPIFFE ID.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The entry's own id, unique in the trust domain.
    pub id: EntryId,
    /// Position in the order of creation; orders lists and page tokens.
    pub ordinal: u64,
    /// One more with each update, from [`State::revision_floor`](super::State::revision_floor) on.
    pub revision: i64,
    /// The identity that a matching workload gets.
    pub spiffe_id: SpiffeId,
    /// The agent, or entry, or server (for a node alias) below which this entry stands.
    pub parent_id: SpiffeId,
    /// What a workload, or for an alias a node, must show; never empty.
    pub selectors: SelectorSet,
    /// Lifetime of X.509-SVIDs; `None` is the server's default.
    pub x509_svid_ttl: Option<Duration>,
    /// Lifetime of JWT-SVIDs; `None` is the server's default.
    pub jwt_svid_ttl: Option<Duration>,
    /// Foreign trust domains whose bundles the workload gets, in the registrar's order.
    pub federates_with: Vec<TrustDomain>,
    /// Whether callers with this identity may administrate the server.
    pub admin: bool,
    /// Whether callers with this identity may have a subordinate authority.
    pub downstream: bool,
    /// When the entry ends; `None` is never.
    pub expires_at: Option<SystemTime>,
    /// DNS names of the X.509-SVID, in the registrar's order; the first is its common name.
    pub dns_names: Vec<Arc<str>>,
    /// Whether the agent gives the SVID to a store rather than to workloads.
    pub store_svid: bool,
    /// What tells several identities of one workload apart; may be empty.
    pub hint: Arc<str>,
    /// When the entry was made, whole seconds.
    pub created_at: SystemTime,
    /// Whether agents sign an X.509-SVID only when a workload asks.
    pub disable_x509_svid_prefetch: bool,
    /// Whether each JWT-SVID gets a `jti` of its own.
    pub jwt_svid_include_jti: bool,
    /// Follows from all that is above; see [`Entry::content`].
    pub content: Content,
}

impl Entry {
    /// Whether the entry has ended at `now`; an ended entry counts as absent.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

/// A certificate that an agent was given on renewal and has not used yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingSerial {
    /// Its serial number.
    pub serial: Serial,
    /// When it ends.
    pub expires_at: SystemTime,
}

/// Whether an agent may act.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Standing {
    /// It may, with one of these certificates.
    Active {
        /// The serial number in use.
        serial: Serial,
        /// When the certificate in use ends.
        expires_at: SystemTime,
        /// Renewals not used yet, oldest first; at most [`MAX_PENDING_SERIALS`]. The first one
        /// used becomes current and clears the others.
        pending: Vec<PendingSerial>,
    },
    /// It may not, until an operator evicts it.
    Banned,
}

/// How many renewals may wait for their first use: an agent that loses the answers of several
/// renewals must still be able to use the one it keeps.
pub const MAX_PENDING_SERIALS: usize = 3;

/// An attested node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Agent {
    /// Its SPIFFE ID, below `/spire/agent/`.
    pub id: SpiffeId,
    /// Position in the order of first attestation; orders lists and page tokens.
    pub ordinal: u64,
    /// The method that attested it, such as `join_token`.
    pub attestation_type: Arc<str>,
    /// What attestation found out about the node.
    pub selectors: SelectorSet,
    /// Whether it may act, and with which certificates.
    pub standing: Standing,
    /// When the certificate in use ends; for a banned agent, when the last one ended.
    pub expires_at: SystemTime,
    /// Whether the method can attest the node again.
    pub can_reattest: bool,
    /// The software version that the agent told; may be empty.
    pub version: Arc<str>,
    /// The history in which a certificate of it was recorded last; none if an older version did.
    pub history: Option<HistoryId>,
}

impl Agent {
    /// Whether an operator banned it.
    pub fn is_banned(&self) -> bool {
        matches!(self.standing, Standing::Banned)
    }

    /// The serial number in use; none for a banned agent.
    pub fn serial(&self) -> Option<Serial> {
        match &self.standing {
            Standing::Active { serial, .. } => Some(*serial),
            Standing::Banned => None,
        }
    }
}

/// A join token that has not been used. Only its hash is kept: a stolen store holds no usable token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct JoinToken {
    /// SHA-256 of the token's text.
    pub hash: [u8; 32],
    /// From when on it is refused.
    pub expires_at: SystemTime,
    /// The identity that the node's alias entry will have. The entry is made when the token is
    /// used, because its parent id contains the token.
    pub alias: Option<SpiffeId>,
}

impl JoinToken {
    /// Whether the token has ended at `now`.
    pub fn is_expired(&self, now: SystemTime) -> bool {
        self.expires_at <= now
    }
}

/// Whose keys an authority's key belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum KeyOwner {
    /// A key set that all servers use.
    Shared,
    /// The key set with this random id, which is stored beside the keys.
    Server([u8; 16]),
}

/// What an authority signs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum AuthorityKind {
    /// X.509-SVIDs.
    X509,
    /// JWT-SVIDs.
    Jwt,
}

/// Where an authority is in its life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SlotStatus {
    /// Published, and not signing yet.
    Prepared,
    /// Signing.
    Active,
    /// Signing no more; what it signed is still valid.
    Old,
    /// Its key is gone; its root stays published until it expires.
    Lost,
}

/// One authority of a key set: a line of the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuthoritySlot {
    /// Whose keys.
    pub owner: KeyOwner,
    /// What it signs.
    pub kind: AuthorityKind,
    /// X.509: the subject key id in lower-case hex. JWT: the `kid`.
    pub authority_id: Arc<str>,
    /// The key's name among the signing keys; never used for another key.
    pub key_id: Arc<str>,
    /// Where it is in its life.
    pub status: SlotStatus,
    /// When it was made.
    pub issued_at: SystemTime,
    /// When it ends.
    pub not_after: SystemTime,
    /// X.509: the authority's certificate, DER.
    pub certificate: Option<Bytes>,
    /// X.509 below an upstream authority: the intermediates that go with each SVID, DER, nearest first.
    pub upstream_chain: Vec<Bytes>,
    /// The public key, PKIX DER.
    pub public_key: Bytes,
}

/// One step from a revision to the next; a proposal is a few of these.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// Adds an entry, or replaces the one with its ordinal.
    PutEntry(Arc<Entry>),
    /// Removes an entry.
    RemoveEntry(EntryId),
    /// Adds an agent, or replaces the one with its id.
    PutAgent(Arc<Agent>),
    /// Removes an agent.
    RemoveAgent(SpiffeId),
    /// Adds a join token.
    PutToken(JoinToken),
    /// Removes the join token with this SHA-256.
    RemoveToken([u8; 32]),
    /// Makes a bundle, or sets what it has beside its authorities.
    PutBundleInfo {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// Its new sequence number.
        sequence: u64,
        /// How often the publisher wants it to be read.
        refresh_hint: Option<Duration>,
    },
    /// Removes a bundle and all its authorities.
    RemoveBundle(TrustDomain),
    /// Adds an X.509 authority at the end of a bundle, or replaces the one with the same certificate where it stands.
    PutX509Authority {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// The authority.
        authority: X509Authority,
    },
    /// Removes an X.509 authority from a bundle.
    RemoveX509Authority {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// [`certificate_hash`] of the authority's certificate.
        sha256: [u8; 32],
    },
    /// Adds a JWT authority at the end of a bundle, or replaces the one with the same key id where it stands.
    PutJwtAuthority {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// The authority.
        authority: JwtAuthority,
    },
    /// Removes a JWT authority from a bundle.
    RemoveJwtAuthority {
        /// Whose bundle.
        trust_domain: TrustDomain,
        /// The authority's key id.
        key_id: Arc<str>,
    },
    /// Adds a journal line, or replaces the one with its owner, kind and authority id.
    PutSlot(Arc<AuthoritySlot>),
    /// Removes a journal line.
    RemoveSlot {
        /// Whose keys.
        owner: KeyOwner,
        /// What the authority signed.
        kind: AuthorityKind,
        /// The authority's id.
        authority_id: Arc<str>,
    },
    /// Says that the history goes on under another id: what is here came back from a backup, and whoever knows a later
    /// position of the old history knows a branch that is lost.
    BeginHistory(HistoryId),
}

/// What one proposal changes, all of it or nothing.
///
/// At most 100 changes, each at most 60 KiB when written; what is larger is a sequence of parts of
/// which every prefix is valid.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// Whose records these are.
    pub scope: Scope,
    /// The changes, in order.
    pub changes: Vec<Change>,
}

impl Part {
    /// A part of the whole trust domain.
    pub fn new(changes: Vec<Change>) -> Self {
        Self { scope: Scope::trust_domain(), changes }
    }

    /// A part that changes nothing; proposing it commits nothing.
    pub fn unchanged() -> Self {
        Self::new(Vec::new())
    }
}

impl From<Vec<Change>> for Part {
    fn from(changes: Vec<Change>) -> Self {
        Self::new(changes)
    }
}

/// SHA-256 of a certificate in DER: what names an X.509 authority in a bundle.
pub fn certificate_hash(der: &[u8]) -> [u8; 32] {
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
    let mut hash = [0; 32];
    hash.copy_from_slice(digest.as_ref());
    hash
}
