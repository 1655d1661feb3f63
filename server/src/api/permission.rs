//! Who may call what: one table, and one decision over it.

use std::collections::HashSet;
use std::time::SystemTime;

use spiffe::id::SpiffeId;
use spiffe::x509::Serial;
use spiffe_proto::types::permission_denied_details::Reason;
use transport::serve::Expected;

use super::caller::{Caller, CallerKind};
use super::core::reason_of;
use crate::limits::Limit;
use crate::registry::agent;
use crate::state::State;

/// Classes of callers that a method lets in. They are tried in the order of the fields.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Admits {
    /// Everybody, with or without a certificate.
    pub anyone: bool,
    /// Processes on the admin socket.
    pub local: bool,
    /// The ids of `admin_ids`, and those of entries with the admin flag.
    pub admin: bool,
    /// The ids of entries with the downstream flag.
    pub downstream: bool,
    /// Attested agents that are neither banned nor replaced.
    pub agent: bool,
}

const NOBODY: Admits = Admits { anyone: false, local: false, admin: false, downstream: false, agent: false };
const ANYONE: Admits = Admits { anyone: true, ..NOBODY };
const LOCAL: Admits = Admits { local: true, ..NOBODY };
const AGENT: Admits = Admits { agent: true, ..NOBODY };
const DOWNSTREAM: Admits = Admits { downstream: true, ..NOBODY };
const ADMIN_OR_LOCAL: Admits = Admits { local: true, admin: true, ..NOBODY };
const ADMIN_LOCAL_OR_AGENT: Admits = Admits { local: true, admin: true, agent: true, ..NOBODY };

/// What the server knows about one method before it looks at a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// Path of the method on the wire, `/package.Service/Method`.
    pub path: &'static str,
    /// Name of its metric, behind the prefix of the process.
    pub metric: &'static str,
    /// Who may call it.
    pub admits: Admits,
    /// The bucket its calls draw from.
    pub limit: Limit,
}

const fn method(path: &'static str, metric: &'static str, admits: Admits, limit: Limit) -> Method {
    Method { path, metric, admits, limit }
}

/// What requests bring of methods that strangers may call. Everybody else is refused before a byte of a request is read.
pub static EXPECTED: &[Expected] = &[
    Expected::one("/spire.api.server.bundle.v1.Bundle/GetBundle", 1024),
    Expected::many("/spire.api.server.agent.v1.Agent/AttestAgent", 128 * 1024),
];

/// Every method of every service that is registered on a listener, ordered by path. A method that is not here is
/// answered as unknown, whoever calls.
pub static METHODS: &[Method] = {
    use Limit::{Attestation, CertificateSigning, JwtSigning, Status, Unlimited};
    &[
        method("/grpc.health.v1.Health/Check", "rpc.health.v1.health.check", LOCAL, Unlimited),
        method("/grpc.health.v1.Health/List", "rpc.health.v1.health.list", LOCAL, Unlimited),
        method("/grpc.health.v1.Health/Watch", "rpc.health.v1.health.watch", LOCAL, Unlimited),
        method("/signet.backup.v1.Backup/Create", "rpc.backup.v1.backup.create", LOCAL, Unlimited),
        method("/signet.sync.v2.Sync/Subscribe", "rpc.sync.v2.sync.subscribe", AGENT, Unlimited),
        method("/spire.api.server.agent.v1.Agent/AttestAgent", "rpc.agent.v1.agent.attest_agent", ANYONE, Attestation),
        method("/spire.api.server.agent.v1.Agent/BanAgent", "rpc.agent.v1.agent.ban_agent", ADMIN_OR_LOCAL, Unlimited),
        method(
            "/spire.api.server.agent.v1.Agent/CountAgents",
            "rpc.agent.v1.agent.count_agents",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.agent.v1.Agent/CreateJoinToken",
            "rpc.agent.v1.agent.create_join_token",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.agent.v1.Agent/DeleteAgent",
            "rpc.agent.v1.agent.delete_agent",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method("/spire.api.server.agent.v1.Agent/GetAgent", "rpc.agent.v1.agent.get_agent", ADMIN_OR_LOCAL, Unlimited),
        method(
            "/spire.api.server.agent.v1.Agent/ListAgents",
            "rpc.agent.v1.agent.list_agents",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method("/spire.api.server.agent.v1.Agent/PostStatus", "rpc.agent.v1.agent.post_status", AGENT, Status),
        method(
            "/spire.api.server.agent.v1.Agent/RenewAgent",
            "rpc.agent.v1.agent.renew_agent",
            AGENT,
            CertificateSigning,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/AppendBundle",
            "rpc.bundle.v1.bundle.append_bundle",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/BatchCreateFederatedBundle",
            "rpc.bundle.v1.bundle.batch_create_federated_bundle",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/BatchDeleteFederatedBundle",
            "rpc.bundle.v1.bundle.batch_delete_federated_bundle",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/BatchSetFederatedBundle",
            "rpc.bundle.v1.bundle.batch_set_federated_bundle",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/BatchUpdateFederatedBundle",
            "rpc.bundle.v1.bundle.batch_update_federated_bundle",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/CountBundles",
            "rpc.bundle.v1.bundle.count_bundles",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method("/spire.api.server.bundle.v1.Bundle/GetBundle", "rpc.bundle.v1.bundle.get_bundle", ANYONE, Unlimited),
        method(
            "/spire.api.server.bundle.v1.Bundle/GetFederatedBundle",
            "rpc.bundle.v1.bundle.get_federated_bundle",
            ADMIN_LOCAL_OR_AGENT,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/ListFederatedBundles",
            "rpc.bundle.v1.bundle.list_federated_bundles",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/PublishJWTAuthority",
            "rpc.bundle.v1.bundle.publish_jwt_authority",
            DOWNSTREAM,
            Unlimited,
        ),
        method(
            "/spire.api.server.bundle.v1.Bundle/PublishWITAuthority",
            "rpc.bundle.v1.bundle.publish_wit_authority",
            DOWNSTREAM,
            Unlimited,
        ),
        method("/spire.api.server.debug.v1.Debug/GetInfo", "rpc.debug.v1.debug.get_info", LOCAL, Unlimited),
        method(
            "/spire.api.server.entry.v1.Entry/BatchCreateEntry",
            "rpc.entry.v1.entry.batch_create_entry",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.entry.v1.Entry/BatchDeleteEntry",
            "rpc.entry.v1.entry.batch_delete_entry",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.entry.v1.Entry/BatchUpdateEntry",
            "rpc.entry.v1.entry.batch_update_entry",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.entry.v1.Entry/CountEntries",
            "rpc.entry.v1.entry.count_entries",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.entry.v1.Entry/GetAuthorizedEntries",
            "rpc.entry.v1.entry.get_authorized_entries",
            AGENT,
            Unlimited,
        ),
        method("/spire.api.server.entry.v1.Entry/GetEntry", "rpc.entry.v1.entry.get_entry", ADMIN_OR_LOCAL, Unlimited),
        method(
            "/spire.api.server.entry.v1.Entry/ListEntries",
            "rpc.entry.v1.entry.list_entries",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.entry.v1.Entry/SyncAuthorizedEntries",
            "rpc.entry.v1.entry.sync_authorized_entries",
            AGENT,
            Unlimited,
        ),
        method("/spire.api.server.logger.v1.Logger/GetLogger", "rpc.logger.v1.logger.get_logger", LOCAL, Unlimited),
        method(
            "/spire.api.server.logger.v1.Logger/ResetLogLevel",
            "rpc.logger.v1.logger.reset_log_level",
            LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.logger.v1.Logger/SetLogLevel",
            "rpc.logger.v1.logger.set_log_level",
            LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.svid.v1.SVID/BatchNewWITSVID",
            "rpc.svid.v1.svid.batch_new_wit_svid",
            AGENT,
            Unlimited,
        ),
        method(
            "/spire.api.server.svid.v1.SVID/BatchNewX509SVID",
            "rpc.svid.v1.svid.batch_new_x509_svid",
            AGENT,
            CertificateSigning,
        ),
        method(
            "/spire.api.server.svid.v1.SVID/MintJWTSVID",
            "rpc.svid.v1.svid.mint_jwt_svid",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.svid.v1.SVID/MintWITSVID",
            "rpc.svid.v1.svid.mint_wit_svid",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.svid.v1.SVID/MintX509SVID",
            "rpc.svid.v1.svid.mint_x509_svid",
            ADMIN_OR_LOCAL,
            Unlimited,
        ),
        method(
            "/spire.api.server.svid.v1.SVID/NewDownstreamX509CA",
            "rpc.svid.v1.svid.new_downstream_x509_ca",
            DOWNSTREAM,
            CertificateSigning,
        ),
        method("/spire.api.server.svid.v1.SVID/NewJWTSVID", "rpc.svid.v1.svid.new_jwt_svid", AGENT, JwtSigning),
    ]
};

/// The place of `path` in [`METHODS`].
pub fn position(path: &str) -> Option<usize> {
    METHODS.binary_search_by(|method| method.path.cmp(path)).ok()
}

/// In which role a caller was let in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The method is open to everybody.
    Anyone,
    /// A process on the admin socket.
    Local,
    /// An administrator.
    Admin,
    /// A downstream server.
    Downstream,
    /// An attested agent.
    Agent,
}

/// The decision about one caller and one method.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Let in.
    Allowed(Role),
    /// An agent's first call with the newest of its certificates: to be let in once that is recorded.
    Promote,
    /// Refused; agents are told why.
    Refused(Option<Reason>),
    /// Refused: the root that the caller's certificate was verified by is in no bundle of its trust domain any more, so
    /// the connection proves nothing.
    Distrusted,
}

/// May `caller` call a method that lets in `admits`? `admin_ids` is the configured list; `now` is compared with the
/// caller's certificate and with entries that run out. A certificate counts while the bundle of its trust domain has the
/// root that it was verified by.
pub fn judge(
    admits: Admits,
    caller: &Caller,
    admin_ids: &HashSet<SpiffeId>,
    state: &State,
    now: SystemTime,
) -> Verdict {
    if admits.anyone {
        return Verdict::Allowed(Role::Anyone);
    }
    let (id, serial, not_after, root) = match &caller.kind {
        CallerKind::Local(_) if admits.local => return Verdict::Allowed(Role::Local),
        CallerKind::Local(_) | CallerKind::Anonymous => return Verdict::Refused(None),
        CallerKind::X509 { id, serial, not_after, root } => (id, serial, *not_after, root),
    };
    let bundle = state.bundle(id.trust_domain());
    if !bundle.is_some_and(|bundle| bundle.x509.iter().any(|authority| authority.der == *root)) {
        return Verdict::Distrusted;
    }
    // A foreign id is an administrator by configuration or not at all: entries are of our own trust domain.
    if admits.admin && not_after >= now && (admin_ids.contains(id) || has_entry(state, id, now, |entry| entry.admin)) {
        return Verdict::Allowed(Role::Admin);
    }
    if admits.downstream && not_after >= now && has_entry(state, id, now, |entry| entry.downstream) {
        return Verdict::Allowed(Role::Downstream);
    }
    if admits.agent { judge_agent(state, id, serial, not_after, now) } else { Verdict::Refused(None) }
}

fn has_entry(
    state: &State,
    id: &SpiffeId,
    now: SystemTime,
    flag: impl Fn(&crate::state::model::Entry) -> bool,
) -> bool {
    state.entries_by_spiffe_id(id).any(|entry| flag(entry) && entry.expires_at.is_none_or(|at| at > now))
}

/// Is the agent `id`, with the certificate `serial`, one that may act?
pub fn judge_agent(state: &State, id: &SpiffeId, serial: &Serial, not_after: SystemTime, now: SystemTime) -> Verdict {
    if not_after < now {
        return Verdict::Refused(Some(Reason::AgentExpired));
    }
    match agent::use_of(state, id, *serial, not_after) {
        Ok(agent::Use::Current) => Verdict::Allowed(Role::Agent),
        Ok(agent::Use::First) => Verdict::Promote,
        Err(refusal) => Verdict::Refused(Some(reason_of(refusal))),
    }
}

#[cfg(test)]
mod tests;
