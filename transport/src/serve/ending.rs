//! How a connection learns, and tells its calls, that it is to end.

use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};

use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;
use tonic::Status;

/// Why a connection ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Reason {
    /// The process is shutting down: calls may finish, streams may not go on.
    Shutdown,
    /// The certificate that the peer proved itself with has expired.
    CertificateExpired,
    /// The root that the peer's certificate was verified by is not believed any more.
    Distrusted,
    /// The peer holds more than its share while there is not enough for all.
    Overload,
    /// As [`Reason::Overload`], and there is no time for a farewell.
    Dropped,
    /// The process that connected has ended.
    ProcessGone,
    /// The kernel does not show us the process that connected.
    ProcessUnseen,
}

impl Reason {
    /// The status with which open calls end: clients of every library come back after it.
    pub fn status(self) -> Status {
        Status::unavailable(match self {
            Self::Shutdown => "shutting down",
            Self::CertificateExpired => "the certificate of this connection has expired",
            Self::Distrusted => "the certificate of this connection is no longer trusted; connect again",
            Self::Overload | Self::Dropped => "too many connections or calls of this caller",
            Self::ProcessGone => "the process that connected has ended",
            Self::ProcessUnseen => "the process that connected cannot be seen",
        })
    }

    /// Whether the client gets the time for one call, so that it learns why.
    pub(super) fn is_told(self) -> bool {
        matches!(self, Self::Overload | Self::ProcessUnseen)
    }

    /// Whether calls that have not been answered yet are to be ended, too.
    pub(super) fn ends_calls(self) -> bool {
        !matches!(self, Self::Shutdown)
    }
}

#[derive(Debug, Default)]
struct Shared {
    reason: OnceLock<Reason>,
    woken: Arc<Notify>,
}

/// The end of one connection; an extension of every request. [`crate::serve`] itself ends every open response with
/// Unavailable, so a service needs this only to stop work that has no response yet. Cheap to clone.
#[derive(Debug, Clone, Default)]
pub struct Ending {
    shared: Arc<Shared>,
}

impl Ending {
    /// A connection that is not to end yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Ends the connection; only the first reason counts.
    pub fn end(&self, reason: Reason) {
        if self.shared.reason.set(reason).is_ok() {
            self.shared.woken.notify_waiters();
        }
    }

    /// Why the connection ends, if it does.
    pub fn reason(&self) -> Option<Reason> {
        self.shared.reason.get().copied()
    }

    /// Waits until the connection is to end.
    pub async fn ended(&self) -> Reason {
        Ended::new(self).await
    }
}

/// [`Ending::ended`] as a value that can be kept.
pub(super) struct Ended {
    ending: Ending,
    woken: Pin<Box<OwnedNotified>>,
}

impl Ended {
    pub(super) fn new(ending: &Ending) -> Self {
        // A notification for all waiters reaches every value made before it, polled or not.
        Self { woken: Box::pin(Arc::clone(&ending.shared.woken).notified_owned()), ending: ending.clone() }
    }
}

impl Future for Ended {
    type Output = Reason;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Reason> {
        if let Some(reason) = self.ending.reason() {
            return Poll::Ready(reason);
        }
        match self.woken.as_mut().poll(context) {
            Poll::Ready(()) => Poll::Ready(self.ending.reason().unwrap_or(Reason::Shutdown)),
            Poll::Pending => Poll::Pending,
        }
    }
}
