//! What may happen to an agent: attestation, renewal, first use of a renewed certificate, ban, eviction.
//!
//! Pure: a state, a request and `now` in, the changes out.

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::id::SpiffeId;
use spiffe::selector::{Selector, SelectorSet};
use spiffe::x509::Serial;

use super::similar::similar;
use crate::state::State;
use crate::state::model::{
    Agent, Change, Entry, EntryId, JoinToken, MAX_PENDING_SERIALS, Part, PendingSerial, Standing,
};

/// Why nothing happens to the agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// There is no such agent.
    #[error("agent is not attested")]
    NotAttested,
    /// An operator banned it.
    #[error("agent is banned")]
    Banned,
    /// It attests again instead of renewing.
    #[error("agent must reattest instead of renew")]
    MustReattest,
    /// The certificate is neither the one in use nor one that waits for its first use.
    #[error("certificate of the agent is not active")]
    NotActive,
    /// The join token is unknown: never made, used up, or ended and removed.
    #[error("join token does not exist or has already been used")]
    TokenUnknown,
    /// The join token is known and has ended.
    #[error("join token expired")]
    TokenExpired,
    /// The join token is known already.
    #[error("join token exists already")]
    TokenExists,
}

/// An attestation that succeeded and whose certificate is signed, but not released.
#[derive(Clone, Debug)]
pub struct Attestation {
    /// Who the node is.
    pub id: SpiffeId,
    /// The method that found out.
    pub attestation_type: Arc<str>,
    /// What it found out about the node.
    pub selectors: SelectorSet,
    /// Whether the method can attest the node again.
    pub can_reattest: bool,
    /// Serial number of the new certificate, in decimal.
    pub serial: Serial,
    /// When the new certificate ends.
    pub expires_at: SystemTime,
    /// SHA-256 of the join token that proved the node, if it was one.
    pub token: Option<[u8; 32]>,
    /// Fresh id for the alias entry that a join token may ask for.
    pub alias_entry_id: EntryId,
}

/// Records an attested node: its token used up, its certificate current, what it was given before void.
///
/// # Errors
/// [`Refusal::Banned`], [`Refusal::TokenUnknown`] or [`Refusal::TokenExpired`]; a token then stays as it is.
pub fn attest(state: &State, attestation: &Attestation, now: SystemTime) -> Result<Part, Refusal> {
    let known = state.agent(&attestation.id);
    if known.is_some_and(|agent| agent.is_banned()) {
        return Err(Refusal::Banned);
    }
    let mut changes = Vec::with_capacity(3);
    let mut ordinal = state.next_ordinal();
    let agent_ordinal = known.map_or(ordinal, |agent| agent.ordinal);
    if known.is_none() {
        ordinal += 1;
    }
    changes.push(Change::PutAgent(Arc::new(Agent {
        id: attestation.id.clone(),
        ordinal: agent_ordinal,
        attestation_type: Arc::clone(&attestation.attestation_type),
        selectors: attestation.selectors.clone(),
        standing: Standing::Active {
            serial: attestation.serial,
            expires_at: attestation.expires_at,
            pending: Vec::new(),
        },
        expires_at: attestation.expires_at,
        can_reattest: attestation.can_reattest,
        version: known.map_or_else(|| Arc::from(""), |agent| Arc::clone(&agent.version)),
        history: Some(state.position().history),
    })));
    if let Some(hash) = attestation.token {
        let token = state.token(&hash).ok_or(Refusal::TokenUnknown)?;
        if token.is_expired(now) {
            return Err(Refusal::TokenExpired);
        }
        if let Some(alias) = token.alias.as_ref().and_then(|alias| alias_entry(state, attestation, alias, ordinal, now))
        {
            changes.push(Change::PutEntry(Arc::new(alias)));
        }
        changes.push(Change::RemoveToken(hash));
    }
    Ok(Part::new(changes))
}

/// The entry that gives a node attested by a join token its second name, unless it is there.
fn alias_entry(
    state: &State,
    attestation: &Attestation,
    alias: &SpiffeId,
    ordinal: u64,
    now: SystemTime,
) -> Option<Entry> {
    let selectors = alias_selectors(&attestation.id)?;
    if similar(state, &attestation.id, alias, &selectors, now).is_some() {
        return None;
    }
    Some(Entry {
        id: Arc::clone(&attestation.alias_entry_id),
        ordinal,
        revision: state.revision_floor(),
        spiffe_id: alias.clone(),
        parent_id: attestation.id.clone(),
        selectors,
        x509_svid_ttl: None,
        jwt_svid_ttl: None,
        federates_with: Vec::new(),
        admin: false,
        downstream: false,
        expires_at: None,
        dns_names: Vec::new(),
        store_svid: false,
        hint: Arc::from(""),
        created_at: whole_seconds(now),
        disable_x509_svid_prefetch: false,
        jwt_svid_include_jti: false,
        content: crate::state::model::Content::default(),
    })
}

/// The one selector of an alias entry below `agent`.
fn alias_selectors(agent: &SpiffeId) -> Option<SelectorSet> {
    Some(SelectorSet::from_iter([Selector::new("spiffe_id", agent.as_str()).ok()?]))
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(since.as_secs())
}

/// Records that `id` was given a new certificate. The one in use stays in use until the new one is used.
///
/// # Errors
/// [`Refusal::NotAttested`], [`Refusal::Banned`] or [`Refusal::MustReattest`].
pub fn renew(state: &State, id: &SpiffeId, serial: Serial, expires_at: SystemTime) -> Result<Part, Refusal> {
    let mut agent = renewable(state, id)?.clone();
    agent.history = Some(state.position().history);
    if let Standing::Active { pending, .. } = &mut agent.standing {
        if pending.len() >= MAX_PENDING_SERIALS {
            pending.drain(..=pending.len() - MAX_PENDING_SERIALS);
        }
        pending.push(PendingSerial { serial, expires_at });
    }
    Ok(Part::new(vec![Change::PutAgent(Arc::new(agent))]))
}

/// The agent `id`, if it may renew its certificate.
///
/// # Errors
/// As [`renew`].
pub fn renewable<'a>(state: &'a State, id: &SpiffeId) -> Result<&'a Agent, Refusal> {
    let agent = state.agent(id).ok_or(Refusal::NotAttested)?;
    if agent.is_banned() {
        return Err(Refusal::Banned);
    }
    if agent.can_reattest { Err(Refusal::MustReattest) } else { Ok(agent) }
}

/// What a certificate of an agent is to us.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// The one in use.
    Current,
    /// Its first use, which [`promote`] records.
    First,
}

/// What the certificate `serial` of the agent `id` is, which ends at `not_after`.
///
/// After a restore from a backup, agents hold certificates that the lost branch gave them. The first one that an agent
/// uses counts as a renewal if it ends later than all that are known of it, and nothing was recorded of the agent since
/// the restore: whoever attested or renewed here has what it needs.
///
/// # Errors
/// [`Refusal::NotAttested`], [`Refusal::Banned`] or [`Refusal::NotActive`].
pub fn use_of(state: &State, id: &SpiffeId, serial: Serial, not_after: SystemTime) -> Result<Use, Refusal> {
    let agent = state.agent(id).ok_or(Refusal::NotAttested)?;
    let Standing::Active { serial: current, expires_at, pending } = &agent.standing else {
        return Err(Refusal::Banned);
    };
    if *current == serial {
        return Ok(Use::Current);
    }
    if pending.iter().any(|held| held.serial == serial) {
        return Ok(Use::First);
    }
    let untouched = state.restored_from().is_some() && agent.history != Some(state.position().history);
    let known_until = pending.iter().map(|held| held.expires_at).fold(*expires_at, SystemTime::max);
    if untouched && not_after > known_until { Ok(Use::First) } else { Err(Refusal::NotActive) }
}

/// Records the first use of the certificate `serial`: it becomes current, and all others are void. Nothing changes if it
/// is current already.
///
/// # Errors
/// As [`use_of`].
pub fn promote(state: &State, id: &SpiffeId, serial: Serial, not_after: SystemTime) -> Result<Part, Refusal> {
    if use_of(state, id, serial, not_after)? == Use::Current {
        return Ok(Part::unchanged());
    }
    let agent = state.agent(id).ok_or(Refusal::NotAttested)?;
    let expires_at = match &agent.standing {
        Standing::Active { pending, .. } => {
            pending.iter().find(|held| held.serial == serial).map_or(not_after, |held| held.expires_at)
        }
        Standing::Banned => return Err(Refusal::Banned),
    };
    let agent = Agent {
        standing: Standing::Active { serial, expires_at, pending: Vec::new() },
        expires_at,
        history: Some(state.position().history),
        ..Agent::clone(agent)
    };
    Ok(Part::new(vec![Change::PutAgent(Arc::new(agent))]))
}

/// Bans an agent; banning a banned one changes nothing.
///
/// # Errors
/// [`Refusal::NotAttested`].
pub fn ban(state: &State, id: &SpiffeId) -> Result<Part, Refusal> {
    let agent = state.agent(id).ok_or(Refusal::NotAttested)?;
    if agent.is_banned() {
        return Ok(Part::unchanged());
    }
    let agent = Agent { standing: Standing::Banned, ..Agent::clone(agent) };
    Ok(Part::new(vec![Change::PutAgent(Arc::new(agent))]))
}

/// Forgets an agent, and the alias entries that its join token made.
///
/// # Errors
/// [`Refusal::NotAttested`].
pub fn evict(state: &State, id: &SpiffeId) -> Result<Part, Refusal> {
    let agent = state.agent(id).ok_or(Refusal::NotAttested)?;
    let mut changes = vec![Change::RemoveAgent(agent.id.clone())];
    if &*agent.attestation_type == "join_token"
        && let Some(selectors) = alias_selectors(id)
    {
        let aliases = state.entries_by_parent(id).filter(|entry| entry.selectors == selectors);
        changes.extend(aliases.take(MOST_ALIASES).map(|entry| Change::RemoveEntry(Arc::clone(&entry.id))));
    }
    Ok(Part::new(changes))
}

/// Alias entries removed with their agent. A token makes one; more are there only if somebody made them by hand, and
/// one proposal has room for so many.
const MOST_ALIASES: usize = 90;

/// Records what software an agent says it runs.
///
/// # Errors
/// [`Refusal::NotAttested`].
pub fn report_version(state: &State, id: &SpiffeId, version: &str) -> Result<Part, Refusal> {
    let agent = state.agent(id).ok_or(Refusal::NotAttested)?;
    if *agent.version == *version {
        return Ok(Part::unchanged());
    }
    let agent = Agent { version: Arc::from(version), ..Agent::clone(agent) };
    Ok(Part::new(vec![Change::PutAgent(Arc::new(agent))]))
}

/// Records a new join token.
///
/// # Errors
/// [`Refusal::TokenExists`] if one with its hash is there and has not ended.
pub fn create_token(state: &State, token: &JoinToken, now: SystemTime) -> Result<Part, Refusal> {
    if state.token(&token.hash).is_some_and(|known| !known.is_expired(now)) {
        return Err(Refusal::TokenExists);
    }
    Ok(Part::new(vec![Change::PutToken(token.clone())]))
}

#[cfg(test)]
#[path = "agent/tests.rs"]
mod tests;
