//! The gate in front of every service: who calls, may they, how long, and how it went.
//!
//! It stands before a message is read, so that a caller who may not call costs nothing but the look-up. What it found
//! out travels as an extension of the request; a handler cannot be reached without it.

use std::convert::Infallible;
use std::future::Future;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use spiffe_proto::types::permission_denied_details::Reason as Denial;
use tokio::time::Instant;
use tonic::body::Body;
use tonic::server::NamedService;
use tonic::{Code, Status};
use tower::Service;
use transport::peer::Peer;
use transport::serve::Ending;

use super::caller::{Caller, CallerKind};
use super::core::Core;
use super::permission::{self, Method, Role};
use super::status::{Class, Failure};
use crate::audit::{Acting, Actor, Fields, Outcome, Process};

/// A caller that was let in, and what is known of the call.
#[derive(Clone, Debug)]
pub struct Admission {
    /// Who calls.
    pub caller: Caller,
    /// In which role.
    pub role: Role,
    /// What is called.
    pub method: &'static Method,
    /// Until when the caller waits, if it said so.
    pub deadline: Option<Instant>,
    /// Tells the audit lines of one call together; only made when they are written.
    pub request_id: Option<Arc<str>>,
    /// The program of a local caller; only looked up when audit lines are written, and none if it cannot be seen.
    pub caller_path: Option<Arc<Path>>,
}

impl Admission {
    /// Takes the admission off a request.
    ///
    /// # Errors
    /// Internal, if the request came past the gate, which no listener of ours lets it.
    pub fn take<T>(request: &mut tonic::Request<T>) -> Result<Self, Status> {
        request.extensions_mut().remove::<Self>().ok_or_else(|| Failure::internal("request was not authorized").into())
    }
}

impl Acting for Admission {
    fn actor(&self) -> Actor<'_> {
        let process = match &self.caller.kind {
            CallerKind::Local(process) => Some(Process {
                uid: process.uid,
                gid: process.gid,
                pid: process.pid,
                path: self.caller_path.as_deref(),
            }),
            CallerKind::Anonymous | CallerKind::X509 { .. } => None,
        };
        Actor {
            method: self.method.path,
            request_id: self.request_id.as_deref(),
            address: self.caller.address,
            id: self.caller.id(),
            process,
        }
    }
}

/// A service behind the gate.
#[derive(Clone, Debug)]
pub struct Gate<S> {
    inner: S,
    core: Arc<Core>,
}

impl<S> Gate<S> {
    /// Puts `inner` behind the gate.
    pub fn new(inner: S, core: &Arc<Core>) -> Self {
        Self { inner, core: Arc::clone(core) }
    }
}

impl<S: NamedService> NamedService for Gate<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Gate<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        // The service that is ready is this one; its clone takes the next call.
        let clone = self.inner.clone();
        let inner = std::mem::replace(&mut self.inner, clone);
        let core = Arc::clone(&self.core);
        Box::pin(async move { Ok(pass(&core, inner, request).await) })
    }
}

async fn pass<S>(core: &Arc<Core>, mut inner: S, mut request: Request<Body>) -> Response<Body>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
{
    let Some(index) = permission::position(request.uri().path()) else {
        return Status::new(Code::Unimplemented, "unknown method").into_http();
    };
    let began = Instant::now();
    let ending = request.extensions().get::<Ending>().cloned().unwrap_or_default();
    let caller = request.extensions().get::<Peer>().map(|peer| Caller::of(peer, ending));
    let timeout = timeout(request.headers());
    let mut cause = None;
    let (response, admission) = match admit(core, index, caller.as_ref(), timeout, began).await {
        Ok(admission) => {
            request.extensions_mut().insert(admission.clone());
            let deadline = admission.deadline;
            let answer = inner.call(request);
            let response = match deadline {
                Some(deadline) => match tokio::time::timeout_at(deadline, answer).await {
                    Ok(Ok(response)) => response,
                    Err(_) => {
                        Status::from(Failure::new(Class::TooLate, "the deadline of the call has passed")).into_http()
                    }
                },
                None => match answer.await {
                    Ok(response) => response,
                },
            };
            (response, Some(admission))
        }
        Err(failure) => {
            cause = failure.denial();
            (Status::from(failure).into_http(), None)
        }
    };
    let status = Status::from_header_map(response.headers());
    core.meters.count(index, status.as_ref().map_or(Code::Ok, Status::code), began.elapsed());
    if let Some(status) = status.filter(|status| status.code() != Code::Ok) {
        tell(core, index, caller.as_ref(), admission.as_ref(), &status, cause);
    }
    response
}

/// Finds out who calls, and whether they may.
async fn admit(
    core: &Core,
    index: usize,
    caller: Option<&Caller>,
    timeout: Option<Duration>,
    began: Instant,
) -> Result<Admission, Failure> {
    let method = permission::METHODS.get(index).ok_or_else(|| Failure::internal("method is not known"))?;
    let caller = caller.ok_or_else(|| Failure::internal("caller is not known"))?;
    let deadline = timeout.and_then(|timeout| began.checked_add(timeout));
    if deadline.is_some_and(|deadline| deadline <= began) {
        return Err(Failure::new(Class::TooLate, "the deadline of the call has passed"));
    }
    let role = core.authorize(method, caller).await?;
    let (mut request_id, mut caller_path) = (None, None);
    if core.audit.writes_lines() {
        request_id = Some(Arc::from(core.entropy.uuid_v4()));
        if let CallerKind::Local(process) = &caller.kind {
            caller_path = process.executable_path().await.map(Arc::from);
        }
    }
    Ok(Admission { caller: caller.clone(), role, method, deadline, request_id, caller_path })
}

/// Writes of a call that failed: to the log, and to the audit.
///
/// `cause` is what an agent was told of itself. Lines of a caller that keeps coming are limited, audit lines of refused calls
/// with them.
fn tell(
    core: &Core,
    index: usize,
    caller: Option<&Caller>,
    admission: Option<&Admission>,
    status: &Status,
    cause: Option<Denial>,
) {
    let path = permission::METHODS.get(index).map_or("", |method| method.path);
    let (code, reason) = (status.code(), status.message());
    let address = caller.and_then(|caller| caller.address).map(tracing::field::display);
    let id = caller.and_then(Caller::id).map(tracing::field::display);
    let allowed = |kind| core.log.allow(kind, &caller.map_or_else(String::new, Caller::party));
    match code {
        Code::PermissionDenied if allowed("Call refused") => {
            let cause = cause.map(cause_of);
            tracing::warn!(method = path, caller_addr = address, caller_id = id, reason, cause, "Call refused");
            if let (None, Some(caller)) = (admission, caller) {
                let text = cause.map_or_else(|| reason.to_owned(), |cause| format!("{reason}: {cause}"));
                core.audit.record(&Refused { caller, path }, Outcome::Failed { code, text: &text }, Fields::default);
            }
        }
        Code::Internal | Code::Unavailable | Code::ResourceExhausted if allowed("Call failed") => {
            tracing::error!(method = path, code = ?code, caller_addr = address, caller_id = id, reason, "Call failed");
        }
        _ => tracing::debug!(method = path, code = ?code, caller_addr = address, caller_id = id, reason, "Call failed"),
    }
    if let Some(admission) = admission {
        core.audit.record(admission, Outcome::Failed { code, text: reason }, Fields::default);
    }
}

/// A caller that was not let in.
struct Refused<'a> {
    caller: &'a Caller,
    path: &'static str,
}

impl Acting for Refused<'_> {
    fn actor(&self) -> Actor<'_> {
        let process = match &self.caller.kind {
            CallerKind::Local(process) => {
                Some(Process { uid: process.uid, gid: process.gid, pid: process.pid, path: None })
            }
            CallerKind::Anonymous | CallerKind::X509 { .. } => None,
        };
        let (address, id) = (self.caller.address, self.caller.id());
        Actor { method: self.path, request_id: None, address, id, process }
    }
}

/// Why an agent may not act, for people.
fn cause_of(denial: Denial) -> &'static str {
    match denial {
        Denial::AgentExpired => "the agent's SVID has expired",
        Denial::AgentNotAttested => "agent is not attested",
        Denial::AgentNotActive => "serial is not the active one",
        Denial::AgentBanned => "agent is banned",
        Denial::AgentMustReattest => "agent must attest anew",
        Denial::Unknown => "unknown",
    }
}

/// The `grpc-timeout` of a call (gRPC over HTTP/2, "Requests"): up to eight digits and a unit. One that cannot be
/// read is treated as absent.
fn timeout(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("grpc-timeout")?.to_str().ok()?;
    let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
    if digits.is_empty() || digits.len() > 8 || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let value: u64 = digits.parse().ok()?;
    Some(match unit {
        "H" => Duration::from_secs(value * 3_600),
        "M" => Duration::from_secs(value * 60),
        "S" => Duration::from_secs(value),
        "m" => Duration::from_millis(value),
        "u" => Duration::from_micros(value),
        "n" => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn h_69_timeouts_are_read_as_grpc_writes_them() {
        let read = |text: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert("grpc-timeout", text.parse().unwrap());
            timeout(&headers)
        };
        assert_eq!(read("0n"), Some(Duration::ZERO));
        assert_eq!(read("30S"), Some(Duration::from_secs(30)));
        assert_eq!(read("250m"), Some(Duration::from_millis(250)));
        assert_eq!(read("7u"), Some(Duration::from_micros(7)));
        assert_eq!(read("2M"), Some(Duration::from_secs(120)));
        assert_eq!(read("99999999H"), Some(Duration::from_secs(99_999_999 * 3_600)));
        for malformed in ["", "S", "1", "-1S", "123456789S", "1s ", "1x", "1.5S"] {
            assert_eq!(read(malformed), None, "{malformed:?}");
        }
    }
}
