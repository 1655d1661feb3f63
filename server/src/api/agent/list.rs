//! Which agents a list or a count means.

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::selector::{Match, SelectorSet};
use spiffe_proto::agent as proto;
use spiffe_proto::types;
use time::OffsetDateTime;
use time::format_description::BorrowedFormatItem;
use time::macros::format_description;

use crate::api::status::Failure;
use crate::api::wire::{self, WireError};
use crate::state::model::Agent;

/// What an agent has to be to be listed; every part of it that is there.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Filter {
    attestation_type: Option<String>,
    selectors: Option<(SelectorSet, Match)>,
    banned: Option<bool>,
    can_reattest: Option<bool>,
    expires_before: Option<SystemTime>,
}

impl Filter {
    pub(super) fn of_list(message: Option<proto::list_agents_request::Filter>) -> Result<Self, Failure> {
        let Some(message) = message else { return Ok(Self::default()) };
        Self::new(
            message.by_attestation_type,
            message.by_selector_match.as_ref(),
            (message.by_banned, message.by_can_reattest),
            &message.by_expires_before,
            "failed to list agents",
        )
    }

    pub(super) fn of_count(message: Option<proto::count_agents_request::Filter>) -> Result<Self, Failure> {
        let Some(message) = message else { return Ok(Self::default()) };
        Self::new(
            message.by_attestation_type,
            message.by_selector_match.as_ref(),
            (message.by_banned, message.by_can_reattest),
            &message.by_expires_before,
            "failed to count agents",
        )
    }

    fn new(
        attestation_type: String,
        selectors: Option<&types::SelectorMatch>,
        (banned, can_reattest): (Option<bool>, Option<bool>),
        expires_before: &str,
        operation: &'static str,
    ) -> Result<Self, Failure> {
        let selectors = selectors.map(wire::selector_match).transpose().map_err(|error| match error {
            WireError::NoSelectors => Failure::internal(operation).because(EmptyFilter),
            WireError::Match { .. } => Failure::internal(operation).because(error),
            error => Failure::invalid("failed to parse selectors").because(error),
        })?;
        Ok(Self {
            attestation_type: Some(attestation_type).filter(|kind| !kind.is_empty()),
            selectors,
            banned,
            can_reattest,
            expires_before: moment(expires_before),
        })
    }

    /// Whether every agent passes.
    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    /// The agents that pass, in the order given.
    pub(super) fn apply<'a>(
        &self,
        agents: impl Iterator<Item = &'a Arc<Agent>>,
    ) -> impl Iterator<Item = &'a Arc<Agent>> {
        agents.filter(|agent| self.passes(agent))
    }

    fn passes(&self, agent: &Agent) -> bool {
        self.attestation_type.as_ref().is_none_or(|kind| **kind == *agent.attestation_type)
            && self.banned.is_none_or(|banned| banned == agent.is_banned())
            && self.can_reattest.is_none_or(|can| can == agent.can_reattest)
            && self.expires_before.is_none_or(|limit| agent.expires_at < limit)
            && self.selectors.as_ref().is_none_or(|(wanted, how)| agent.selectors.matches(wanted, *how))
    }
}

/// A filter by no selectors at all.
#[derive(Debug, thiserror::Error)]
#[error("cannot list by empty selectors set")]
struct EmptyFilter;

/// `2006-01-02 15:04:05 -0700 -07`: a date, a time, an offset, and the offset's hours once more. A text that is not of
/// this form is no filter; tools send what the operator typed.
fn moment(text: &str) -> Option<SystemTime> {
    const FORM: &[BorrowedFormatItem<'static>] = format_description!(
        "[year]-[month]-[day] [hour]:[minute]:[second] [offset_hour sign:mandatory][offset_minute]"
    );
    let (moment, zone) = text.rsplit_once(' ')?;
    let hours = zone.strip_prefix(['+', '-'])?;
    if hours.len() != 2 || !hours.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    OffsetDateTime::parse(moment, FORM).ok().map(SystemTime::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_are_read_in_one_form_and_everything_else_is_no_filter() {
        assert_eq!(moment("2026-11-23 12:00:00 +0000 +00"), Some(wire::time(1_795_435_200)));
        assert_eq!(moment("2026-11-23 12:00:00 -0700 -07"), Some(wire::time(1_795_435_200 + 7 * 3_600)));
        for text in ["", "2026-11-23", "2026-11-23 12:00:00", "2026-11-23 12:00:00 +0000 UTC", "yesterday +00"] {
            assert_eq!(moment(text), None, "{text:?}");
        }
    }

    #[test]
    fn a_filter_by_no_selectors_is_an_error_of_its_own_kind() {
        let none = types::SelectorMatch::default();
        let message = proto::list_agents_request::Filter { by_selector_match: Some(none), ..Default::default() };
        let failure = Filter::of_list(Some(message)).unwrap_err();
        assert_eq!(failure.item().code, tonic::Code::Internal as i32);
        assert_eq!(failure.text(), "failed to list agents: cannot list by empty selectors set");
    }
}
