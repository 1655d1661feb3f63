//! One call: what is checked before a service sees it, and how it ends when its connection does.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode, header};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep};
use tonic::Status;
use tower::Service as _;

use super::crowd::Seat;
use super::ending::{Ended, Ending, Reason};
use super::intake::Intake;
use super::routes::Routes;
use crate::peer::Peer;

/// Calls of one connection that its client gave up before it got a message, in [`GIVEN_UP_WINDOW`], before the connection is ended: each of
/// them cost us work, and none of them the client.
const GIVEN_UP_LIMIT: u32 = 200;
const GIVEN_UP_WINDOW: Duration = Duration::from_secs(10);

/// What all calls of one connection share.
pub(super) struct Line {
    /// None only on a connection that ends before it is served.
    pub(super) peer: Option<Peer>,
    pub(super) ending: Ending,
    pub(super) routes: Routes,
    pub(super) seat: Box<dyn Seat>,
    /// Requests that came so far.
    calls: AtomicUsize,
    first: Notify,
    open: AtomicUsize,
    idle: Notify,
    given_up: Mutex<(Instant, u32)>,
}

impl Line {
    pub(super) fn new(peer: Option<Peer>, ending: Ending, routes: Routes, seat: Box<dyn Seat>) -> Arc<Self> {
        Arc::new(Self {
            peer,
            ending,
            routes,
            seat,
            calls: AtomicUsize::new(0),
            first: Notify::new(),
            open: AtomicUsize::new(0),
            idle: Notify::new(),
            given_up: Mutex::new((Instant::now(), 0)),
        })
    }

    /// Waits for the first request.
    pub(super) async fn called(&self) {
        let first = self.first.notified();
        if self.calls.load(Ordering::Acquire) == 0 {
            first.await;
        }
    }

    /// Waits until there has been no call for `long`, or up to a sixth more.
    pub(super) async fn quiet(&self, long: Duration) {
        const LOOKS: u32 = 6;
        let (mut seen, mut quiet) = (self.calls.load(Ordering::Acquire), 0);
        while quiet < LOOKS {
            sleep(long / LOOKS).await;
            let calls = self.calls.load(Ordering::Acquire);
            let silent = calls == seen && self.open.load(Ordering::Acquire) == 0;
            (seen, quiet) = (calls, if silent { quiet + 1 } else { 0 });
        }
    }

    /// Waits until no call is open.
    pub(super) async fn idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.open.load(Ordering::Acquire) == 0 {
                return;
            }
            idle.await;
        }
    }

    fn give_up(&self) {
        let mut given_up = self.given_up.lock().unwrap_or_else(PoisonError::into_inner);
        if given_up.0.elapsed() > GIVEN_UP_WINDOW {
            *given_up = (Instant::now(), 0);
        }
        given_up.1 += 1;
        if given_up.1 > GIVEN_UP_LIMIT {
            tracing::debug!("A client keeps giving up its calls; ending the connection");
            self.ending.end(Reason::Overload);
        }
    }
}

/// What one open call takes of its listener; an extension of every request. Whoever has most gives first when the
/// listener runs short, so a service says what it learns of a call. Clones are of the same call.
#[derive(Clone)]
pub struct Share {
    inner: Arc<(Arc<Line>, Mutex<Taken>)>,
}

impl std::fmt::Debug for Share {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Share").field(&self.taken()).finish()
    }
}

#[derive(Debug, Clone, Copy)]
struct Taken {
    weight: usize,
    entitled: bool,
    ended: bool,
}

impl Share {
    /// Memory that weighs as much as a call that holds next to nothing.
    pub(super) const UNIT: usize = 2048;

    fn new(line: &Arc<Line>) -> Self {
        line.seat.take(1);
        let taken = Taken { weight: 1, entitled: false, ended: false };
        Self { inner: Arc::new((Arc::clone(line), Mutex::new(taken))) }
    }

    fn taken(&self) -> std::sync::MutexGuard<'_, Taken> {
        self.inner.1.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The call holds so many bytes more, until it ends.
    pub fn holds(&self, bytes: usize) {
        let weight = bytes / Self::UNIT;
        let mut taken = self.taken();
        if weight > 0 && !taken.ended {
            taken.weight += weight;
            self.inner.0.seat.take(weight);
        }
    }

    /// The caller is entitled to what it asks for.
    pub fn entitled(&self) {
        let mut taken = self.taken();
        if !taken.entitled && !taken.ended {
            taken.entitled = true;
            self.inner.0.seat.entitle();
        }
    }

    fn end(&self) {
        let mut taken = self.taken();
        taken.ended = true;
        self.inner.0.seat.give_back(taken.weight, taken.entitled);
    }
}

/// An open call; counts as given up if it is dropped before its end and before it delivered a message. Clients that fetch
/// once and cancel the stream are the normal case of several libraries.
struct Open {
    line: Arc<Line>,
    share: Share,
    finished: bool,
}

impl Open {
    fn new(line: &Arc<Line>) -> Self {
        line.open.fetch_add(1, Ordering::AcqRel);
        if line.calls.fetch_add(1, Ordering::AcqRel) == 0 {
            line.first.notify_waiters();
        }
        Self { line: Arc::clone(line), share: Share::new(line), finished: false }
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.share.end();
        if self.line.open.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.line.idle.notify_waiters();
        }
        if !self.finished {
            self.line.give_up();
        }
    }
}

/// Hands the calls of one connection to the services.
pub(super) struct Calls(pub(super) Arc<Line>);

impl hyper::service::Service<Request<Incoming>> for Calls {
    type Response = Response<Reply>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Reply>, Infallible>> + Send>>;

    fn call(&self, request: Request<Incoming>) -> Self::Future {
        let open = Open::new(&self.0);
        Box::pin(async move { Ok(answer(open, request).await) })
    }
}

async fn answer(mut open: Open, mut request: Request<Incoming>) -> Response<Reply> {
    let line = Arc::clone(&open.line);
    if let Some(refusal) = not_grpc(&request) {
        open.finished = true;
        return empty(refusal);
    }
    if let Some(reason) = line.ending.reason().filter(|reason| reason.ends_calls()) {
        open.finished = true;
        return refused(reason.status());
    }
    let timeout = match timeout(request.headers()) {
        // Not left to the timer: an answer that is there at once would be faster.
        Ok(Some(Duration::ZERO)) => {
            open.finished = true;
            return refused(too_late());
        }
        Ok(timeout) => timeout,
        Err(status) => {
            open.finished = true;
            return refused(status);
        }
    };
    if let Some(peer) = &line.peer {
        request.extensions_mut().insert(peer.clone());
    }
    request.extensions_mut().insert(line.ending.clone());
    request.extensions_mut().insert(open.share.clone());
    let mut routes = line.routes.clone();
    let expected = routes.expected(request.uri().path());
    let request = request.map(|body| tonic::body::Body::new(Intake::new(body, open.share.clone(), expected)));
    let answered = tokio::select! {
        biased;
        answered = routes.call(request) => answered,
        status = given_time(timeout) => {
            open.finished = true;
            return refused(status);
        }
        status = must_end(&line.ending) => {
            open.finished = true;
            return refused(status);
        }
    };
    match answered {
        Ok(response) => response.map(|inner| Reply::new(inner, open)),
        Err(never) => match never {},
    }
}

fn too_late() -> Status {
    Status::deadline_exceeded("the caller's time for this call is over")
}

async fn given_time(timeout: Option<Duration>) -> Status {
    match timeout {
        Some(timeout) => {
            sleep(timeout).await;
            too_late()
        }
        None => std::future::pending().await,
    }
}

async fn must_end(ending: &Ending) -> Status {
    let reason = ending.ended().await;
    if reason.ends_calls() { reason.status() } else { std::future::pending().await }
}

/// The HTTP status for a request that is no gRPC call.
fn not_grpc(request: &Request<Incoming>) -> Option<StatusCode> {
    if request.method() != Method::POST {
        return Some(StatusCode::METHOD_NOT_ALLOWED);
    }
    let kind = request.headers().get(header::CONTENT_TYPE).map(HeaderValue::as_bytes).unwrap_or_default();
    let rest = kind.strip_prefix(b"application/grpc");
    match rest.map(|rest| rest.first()) {
        Some(None | Some(b'+' | b';')) => None,
        _ => Some(StatusCode::UNSUPPORTED_MEDIA_TYPE),
    }
}

fn empty(status: StatusCode) -> Response<Reply> {
    let mut response = Response::new(Reply::default());
    *response.status_mut() = status;
    response
}

fn refused(status: Status) -> Response<Reply> {
    status.into_http()
}

/// How long the caller gives us, from `grpc-timeout`: at most eight digits and a unit.
fn timeout(headers: &HeaderMap) -> Result<Option<Duration>, Status> {
    let Some(value) = headers.get("grpc-timeout") else { return Ok(None) };
    parse_timeout(value.as_bytes()).map(Some).ok_or_else(|| Status::invalid_argument("malformed grpc-timeout"))
}

fn parse_timeout(text: &[u8]) -> Option<Duration> {
    let (unit, digits) = text.split_last()?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let amount = digits
        .iter()
        .try_fold(0_u64, |sum, digit| digit.is_ascii_digit().then(|| sum * 10 + u64::from(digit - b'0')))?;
    Some(match unit {
        b'H' => Duration::from_secs(amount * 3600),
        b'M' => Duration::from_secs(amount * 60),
        b'S' => Duration::from_secs(amount),
        b'm' => Duration::from_millis(amount),
        b'u' => Duration::from_micros(amount),
        b'n' => Duration::from_nanos(amount),
        _ => return None,
    })
}

/// A response body that ends with Unavailable when its connection is to end while there is nothing to send.
#[derive(Default)]
pub(super) struct Reply {
    inner: Option<tonic::body::Body>,
    ended: Option<Ended>,
    open: Option<Open>,
}

impl Reply {
    fn new(inner: tonic::body::Body, mut open: Open) -> Self {
        // A body that is over from the start is never asked for anything.
        open.finished = inner.is_end_stream();
        Self { inner: Some(inner), ended: None, open: Some(open) }
    }

    fn finish(&mut self) {
        if let Some(open) = &mut self.open {
            open.finished = true;
        }
        (self.inner, self.ended, self.open) = (None, None, None);
    }
}

impl Body for Reply {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let Some(inner) = &mut this.inner else { return Poll::Ready(None) };
        match Pin::new(inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) if frame.is_data() => {
                if let Some(open) = &mut this.open {
                    open.finished = true;
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(last) => {
                this.finish();
                Poll::Ready(last)
            }
            Poll::Pending => {
                let Some(open) = &this.open else { return Poll::Ready(None) };
                // Made late: a response that is there at once, as most are, needs none.
                let ended = this.ended.get_or_insert_with(|| Ended::new(&open.line.ending));
                let Poll::Ready(reason) = Pin::new(ended).poll(context) else { return Poll::Pending };
                this.finish();
                let mut trailers = HeaderMap::new();
                reason.status().add_header(&mut trailers)?;
                Poll::Ready(Some(Ok(Frame::trailers(trailers))))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.as_ref().is_none_or(Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.as_ref().map_or_else(|| SizeHint::with_exact(0), Body::size_hint)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timeouts_are_digits_and_a_unit() {
        assert_eq!(parse_timeout(b"0n"), Some(Duration::ZERO));
        assert_eq!(parse_timeout(b"15S"), Some(Duration::from_secs(15)));
        assert_eq!(parse_timeout(b"250m"), Some(Duration::from_millis(250)));
        assert_eq!(parse_timeout(b"99999999H"), Some(Duration::from_secs(99_999_999 * 3600)));
        for wrong in [&b""[..], b"S", b"1", b"1s", b"-1S", b"+1S", b"1.5S", b"100000000S", b"\xff\xff"] {
            assert_eq!(parse_timeout(wrong), None, "{wrong:?}");
        }
    }
}
