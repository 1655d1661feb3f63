//! When an agent believes that its identity is refused, and what it does then.

/// Why the server denied an agent a call, as far as it says so (`spire.api.types.PermissionDeniedDetails`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Denial {
    /// The agent's SVID is past its end.
    Expired,
    /// The server has no record of the agent: it was evicted, or never attested.
    NotAttested,
    /// Another SVID of the same agent has taken this one's place.
    NotActive,
    /// The agent may not come back.
    Banned,
    /// The agent has to attest anew instead of renewing.
    MustReattest,
}

impl std::fmt::Display for Denial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Expired => "the agent's SVID has expired",
            Self::NotAttested => "the agent is not attested",
            Self::NotActive => {
                "the agent's SVID is not the active one: a newer one is in use, perhaps by an agent with a copy of its key"
            }
            Self::Banned => "the agent is banned",
            Self::MustReattest => "the agent must attest anew",
        })
    }
}

/// One denial as it was heard.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Heard {
    /// What was said.
    pub denial: Denial,
    /// On which connection; each has a number of its own.
    pub connection: u64,
    /// Which of the agent's SVIDs the connection was made with; the newest has the highest number.
    pub svid: u64,
}

/// What the agent holds while it judges.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Own {
    /// The number of its newest SVID.
    pub newest_svid: u64,
    /// Whether the server said that this agent may attest again.
    pub reattestable: bool,
    /// Whether its attestation method can be used again.
    pub prover_repeats: bool,
}

/// What to do about a denial.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reaction {
    /// It is about an SVID that has a successor: say nothing and use that one.
    Disregard,
    /// Ask once more, on a fresh connection.
    AskAgain,
    /// Attest anew.
    Reattest,
    /// Delete the SVID and shut down: nothing this process can do brings the identity back.
    Forget,
}

/// Judges a denial, given the one heard before it, if any.
///
/// A ban is believed at once: it is meant to act at once, and a wrong one costs an attestation. Everything else is
/// believed only when it was said twice, on two connections, both made with the newest SVID: a connection of before a
/// renewal, or a server that lags behind another, must not make an agent throw away an identity that is good.
pub fn judge(before: Option<&Heard>, heard: &Heard, own: &Own) -> Reaction {
    if heard.denial == Denial::Banned {
        return Reaction::Forget;
    }
    if heard.svid != own.newest_svid {
        return Reaction::Disregard;
    }
    let confirmed = before.is_some_and(|before| before.svid == heard.svid && before.connection != heard.connection);
    // Only a renewal is answered so, and no other call repeats it.
    let said_by_renewal = heard.denial == Denial::MustReattest;
    if !confirmed && !said_by_renewal {
        return Reaction::AskAgain;
    }
    if own.reattestable || (said_by_renewal && own.prover_repeats) { Reaction::Reattest } else { Reaction::Forget }
}

#[cfg(test)]
mod tests {
    use super::*;

    const OWN: Own = Own { newest_svid: 7, reattestable: false, prover_repeats: false };

    fn heard(denial: Denial, connection: u64, svid: u64) -> Heard {
        Heard { denial, connection, svid }
    }

    #[test]
    fn once_is_no_reason_twice_on_one_connection_neither() {
        for denial in [Denial::Expired, Denial::NotAttested, Denial::NotActive] {
            let first = heard(denial, 1, 7);
            assert_eq!(judge(None, &first, &OWN), Reaction::AskAgain);
            assert_eq!(judge(Some(&first), &first, &OWN), Reaction::AskAgain);
        }
    }

    #[test]
    fn twice_on_two_connections_is_believed() {
        let reattestable = Own { reattestable: true, ..OWN };
        for denial in [Denial::Expired, Denial::NotAttested, Denial::NotActive] {
            let (first, second) = (heard(denial, 1, 7), heard(denial, 2, 7));
            assert_eq!(judge(Some(&first), &second, &OWN), Reaction::Forget);
            assert_eq!(judge(Some(&first), &second, &reattestable), Reaction::Reattest);
        }
    }

    #[test]
    fn an_older_svid_says_nothing() {
        let (first, second) = (heard(Denial::NotActive, 1, 6), heard(Denial::NotActive, 2, 6));
        assert_eq!(judge(Some(&first), &second, &OWN), Reaction::Disregard);
        // Nor does what was heard about it count against its successor.
        assert_eq!(judge(Some(&first), &heard(Denial::NotActive, 2, 7), &OWN), Reaction::AskAgain);
    }

    #[test]
    fn a_ban_is_believed_at_once() {
        let reattestable = Own { reattestable: true, prover_repeats: true, ..OWN };
        assert_eq!(judge(None, &heard(Denial::Banned, 1, 7), &reattestable), Reaction::Forget);
        assert_eq!(judge(None, &heard(Denial::Banned, 1, 6), &reattestable), Reaction::Forget);
    }

    #[test]
    fn must_reattest_needs_a_prover_that_can() {
        let must = heard(Denial::MustReattest, 1, 7);
        assert_eq!(judge(None, &must, &OWN), Reaction::Forget);
        assert_eq!(judge(None, &must, &Own { prover_repeats: true, ..OWN }), Reaction::Reattest);
    }
}
