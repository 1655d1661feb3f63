//! One connection, from its first byte to its last.

use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http2::Builder;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::time::{sleep, timeout};

use super::call::{Calls, Line};
use super::ending::Reason;
use super::gather::Gather;
use crate::authority::HEADER_LIST_LIMIT;

/// What the client of a connection that is not wanted gets to send its first call, so that it learns why.
const FAREWELL: Duration = Duration::from_secs(1);
/// What calls get to finish when the process ends. Those who wait for all connections must wait longer.
pub(super) const DRAIN: Duration = Duration::from_secs(10);
/// What the last frames of ended calls get to leave.
const LAST_FRAMES: Duration = Duration::from_secs(5);
/// What open calls of an aged connection get.
const AGED: Duration = Duration::from_secs(30);

/// HTTP/2 as we speak it. Windows are small, since what is received and not yet read is memory of ours.
pub(super) fn http2(streams: u32, window: u32) -> Builder<TokioExecutor> {
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .timer(TokioTimer::new())
        .auto_date_header(false)
        .max_concurrent_streams(streams)
        .initial_stream_window_size(window)
        .initial_connection_window_size(window)
        .max_send_buf_size(64 * 1024)
        .max_header_list_size(u32::try_from(HEADER_LIST_LIMIT).unwrap_or(u32::MAX))
        // A client that opens and resets streams without reading is told to calm down, by GOAWAY.
        .max_pending_accept_reset_streams(20)
        .max_local_error_reset_streams(256);
    builder
}

/// Serves a connection to its end. It is dropped if its first request takes longer than `patience`, and ended when its
/// [`super::Ending`] says so or when `life` ends, with the reason if that concerns open calls.
pub(super) async fn serve<S>(
    stream: S,
    line: Arc<Line>,
    http2: &Builder<TokioExecutor>,
    patience: Duration,
    on_first_call: impl FnOnce(),
    life: impl Future<Output = Option<Reason>>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut connection = pin!(http2.serve_connection(TokioIo::new(Gather::new(stream)), Calls(Arc::clone(&line))));
    let mut life = pin!(async {
        tokio::select! {
            reason = line.ending.ended() => Some(reason),
            end = life => end,
        }
    });
    let early = tokio::select! {
        _ = connection.as_mut() => return,
        () = line.called() => None,
        end = life.as_mut() => Some(end),
        () = sleep(patience) => {
            tracing::debug!(peer = line.peer.as_ref().map(tracing::field::display), "No request in time; closing the connection");
            return;
        }
    };
    on_first_call();
    let end = match early {
        Some(end) => end,
        None => tokio::select! {
            _ = connection.as_mut() => return,
            end = life.as_mut() => end,
        },
    };
    if let Some(reason) = end {
        line.ending.end(reason);
        if reason == Reason::Dropped {
            return;
        }
        if reason.is_told() {
            let told = async {
                tokio::select! {
                    _ = connection.as_mut() => {}
                    () = line.called() => {}
                }
            };
            let _ = timeout(FAREWELL, told).await;
        }
    }
    connection.as_mut().graceful_shutdown();
    let grace = match end {
        None => AGED,
        Some(Reason::Shutdown) => DRAIN,
        Some(reason) if reason.is_told() => FAREWELL,
        Some(_) => LAST_FRAMES,
    };
    tokio::select! {
        _ = connection.as_mut() => {}
        () = sleep(grace) => {}
        // An aged connection may still have to end for a better reason.
        _ = line.ending.ended(), if end.is_none() => { let _ = timeout(LAST_FRAMES, connection).await; }
    }
}
