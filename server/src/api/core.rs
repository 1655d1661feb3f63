//! What every service needs: the newest state, the way to change it, and the decision who may call.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use runtime::clock::Clock;
use runtime::entropy::Entropy;
use runtime::steady::Steady;
use runtime::telemetry::Limiter;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe_proto::types::permission_denied_details::Reason as Denial;
use transport::serve::Reason;

use super::admission::Admission;
use super::caller::{Caller, CallerKind};
use super::meters::Meters;
use super::permission::{self, Method, Role, Verdict};
use super::status::Failure;
use super::twice::Twice;
use crate::audit::Audit;
use crate::history::{Committer, Replica, Urgency};
use crate::limits::{Limits, Party};
use crate::registry::agent;
use crate::state::State;

/// Shared by all services of a server.
#[derive(Debug)]
pub struct Core {
    /// The trust domain that is served.
    pub trust_domain: TrustDomain,
    /// Reads.
    pub replica: Replica,
    /// Writes.
    pub committer: Committer,
    /// Time.
    pub clock: Clock,
    /// Whether that can be trusted to delete by.
    pub steady: Steady,
    /// Randomness.
    pub entropy: Entropy,
    /// Administrators by configuration, of our own trust domain or of others.
    pub admin_ids: HashSet<SpiffeId>,
    /// Rate limits.
    pub limits: Limits,
    /// Log lines that strangers can cause.
    pub log: Limiter,
    /// Who did what.
    pub audit: Audit,
    /// Replaced SVIDs that came back.
    pub twice: Mutex<Twice>,
    /// Counters of calls.
    pub meters: Meters,
}

impl Core {
    /// The time to decide by.
    pub fn now(&self) -> SystemTime {
        self.clock.now()
    }

    /// The newest state of all servers, for an answer that tells of an absence.
    ///
    /// # Errors
    /// Unavailable for `operation` if the head cannot be read; nothing is known to be absent then.
    pub async fn current(&self, operation: &'static str) -> Result<Arc<State>, Failure> {
        self.replica.current().await.map_err(|error| Failure::of_replica(operation, error))
    }

    /// Waits for the rate limit of the called method; `operation` is what the refusal says.
    ///
    /// # Errors
    /// ResourceExhausted.
    pub async fn limit(&self, admission: &Admission, count: u32, operation: &'static str) -> Result<(), Failure> {
        let Admission { caller, method, deadline, .. } = admission;
        let party = caller.address.map(|address| caller.id().map_or(Party::Stranger(address), Party::Known));
        self.limits
            .admit(method.limit, party, count, *deadline)
            .await
            .map_err(|error| Failure::of_limit(operation, error))
    }

    /// Decides whether `caller` may call `method`.
    ///
    /// # Errors
    /// PermissionDenied, for agents with the reason; Unavailable if only the newest state can tell and it cannot be had.
    pub async fn authorize(&self, method: &'static Method, caller: &Caller) -> Result<Role, Failure> {
        let mut state = self.replica.latest();
        let mut verdict = self.judge(method, caller, &state);
        if matches!(verdict, Verdict::Refused(_) | Verdict::Distrusted)
            && matches!(caller.kind, CallerKind::X509 { .. })
        {
            // What this replica does not know may have been recorded elsewhere a moment ago.
            state = self.current("caller cannot be looked up").await?;
            verdict = self.judge(method, caller, &state);
        }
        match verdict {
            Verdict::Allowed(role) => Ok(role),
            Verdict::Refused(reason) => {
                if reason == Some(Denial::AgentNotActive) {
                    self.came_back(caller, &state);
                }
                Err(Failure::denied(method.path, reason))
            }
            Verdict::Distrusted => Err(distrusted(caller)),
            Verdict::Promote => self.promote(method, caller).await,
        }
    }

    /// Notes that an agent came with an SVID that was replaced.
    fn came_back(&self, caller: &Caller, state: &State) {
        let Some(agent) = caller.id().and_then(|id| state.agent(id)) else { return };
        let left = agent.expires_at.duration_since(self.now()).unwrap_or_default();
        let mut twice = self.twice.lock().unwrap_or_else(PoisonError::into_inner);
        if !twice.came_back(&agent.id, left, self.clock.boot()) {
            return;
        }
        drop(twice);
        metrics::counter!("agent.node_key_used_twice").increment(1);
        tracing::error!(
            agent_id = %agent.id,
            caller_addr = caller.address.map(tracing::field::display),
            "The same node key is used twice: SVIDs of this agent that were replaced keep coming back. Two agents share one data \
             directory, a copy of it, or one node certificate; give each its own, and attest both anew"
        );
    }

    fn judge(&self, method: &Method, caller: &Caller, state: &State) -> Verdict {
        permission::judge(method.admits, caller, &self.admin_ids, state, self.now())
    }

    /// Records that an agent uses its newest certificate, then lets it in.
    async fn promote(&self, method: &'static Method, caller: &Caller) -> Result<Role, Failure> {
        let CallerKind::X509 { id, serial, not_after, .. } = &caller.kind else {
            return Err(Failure::denied(method.path, None));
        };
        let (id, serial, not_after) = (id.clone(), *serial, *not_after);
        let proposed = self.committer.propose(Urgency::Vital, move |state, _| {
            agent::promote(state, &id, serial, not_after).map(|part| (part, ()))
        });
        match proposed.await {
            Ok(_) => Ok(Role::Agent),
            Err(error) => Err(Failure::of_proposal("unable to activate the new agent SVID", error, |refusal| {
                Failure::denied(method.path, Some(reason_of(refusal)))
            })),
        }
    }

    /// Waits until the caller may no longer call what it was let in for; the failure says why.
    /// For streams, which outlive the decision that let them in.
    pub async fn dismissed(&self, admission: &Admission) -> Failure {
        let mut watch = self.replica.watch();
        loop {
            let state = Arc::clone(&watch.borrow_and_update());
            match self.judge(admission.method, &admission.caller, &state) {
                Verdict::Refused(reason) => return Failure::denied(admission.method.path, reason),
                Verdict::Distrusted => return distrusted(&admission.caller),
                Verdict::Allowed(_) | Verdict::Promote => {}
            }
            if watch.changed().await.is_err() {
                return Failure::unavailable("server is stopping");
            }
        }
    }
}

/// Ends the connection of a caller whose root is in no bundle any more: a new one shows whether another root, or another
/// certificate, still proves who it is.
fn distrusted(caller: &Caller) -> Failure {
    caller.ending.end(Reason::Distrusted);
    Failure::unavailable("the certificate of this connection is no longer trusted; connect again")
}

/// What an agent is told when it may not act for this reason.
pub fn reason_of(refusal: agent::Refusal) -> Denial {
    match refusal {
        agent::Refusal::NotAttested => Denial::AgentNotAttested,
        agent::Refusal::Banned => Denial::AgentBanned,
        agent::Refusal::MustReattest => Denial::AgentMustReattest,
        agent::Refusal::NotActive => Denial::AgentNotActive,
        agent::Refusal::TokenUnknown | agent::Refusal::TokenExpired | agent::Refusal::TokenExists => Denial::Unknown,
    }
}
