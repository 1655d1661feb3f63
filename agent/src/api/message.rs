//! Messages of the Workload API on the wire: five bytes of prefix, then protobuf.
//!
//! Read and written here and not by a codec, for two reasons. An answer is encoded once, prefix included, and the same
//! bytes go to everybody who sees the same view. And a request of every process of the node is untrusted: what is
//! buffered of it is bounded by what any honest request needs, far below what a message may have.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::{BufMut, Bytes, BytesMut};
use futures_util::Stream;
use futures_util::stream::BoxStream;
use http::{HeaderMap, HeaderValue, header};
use http_body::{Body as _, Frame};
use prost::Message;
use tonic::Status;
use tonic::body::Body;
use zeroize::Zeroizing;

/// The largest message that client libraries take unless told otherwise.
pub(super) const MESSAGE_LIMIT: usize = 4 * 1024 * 1024;
/// What is buffered of a request before it is known who makes it; also the largest request of most calls.
pub(super) const UNATTESTED: usize = 4 * 1024;
/// The largest request for JWT-SVIDs that can be valid: 32 audiences of 4 KiB and an id.
pub(super) const FETCH_LIMIT: usize = 160 * 1024;
/// The largest token to be validated: three parts of 64 KiB, and its audience.
pub(super) const VALIDATE_LIMIT: usize = 256 * 1024;
/// How long a request may take from its first byte to its last.
const PATIENCE: Duration = Duration::from_secs(10);
const PREFIX: usize = 5;

/// The one message of a request, of at most so many bytes.
///
/// # Errors
/// If it is compressed, malformed, too large, late, or does not come at all.
pub async fn read<M: Message + Default>(headers: &HeaderMap, body: Body, limit: usize) -> Result<M, Status> {
    Incoming::new(headers, body, limit)?.message().await
}

/// A request that is on its way.
pub(super) struct Incoming {
    body: Body,
    limit: usize,
    /// What has come; a request that comes in one piece, as nearly all do, is not copied.
    seen: Bytes,
    more: BytesMut,
    /// Bytes with the prefix, once that is there.
    total: Option<usize>,
}

impl Incoming {
    /// # Errors
    /// If it is compressed.
    pub(super) fn new(headers: &HeaderMap, body: Body, limit: usize) -> Result<Self, Status> {
        if headers.get("grpc-encoding").is_some_and(|encoding| encoding != "identity") {
            let mut status = Status::unimplemented("compressed requests are not supported");
            let none = tonic::metadata::MetadataValue::from_static("identity");
            status.metadata_mut().insert("grpc-accept-encoding", none);
            return Err(status);
        }
        Ok(Self { body, limit, seen: Bytes::new(), more: BytesMut::new(), total: None })
    }

    /// Reads as much as anybody may send. Nothing if that is all, else how many bytes it will be in all.
    ///
    /// # Errors
    /// As [`read`].
    pub(super) async fn unattested(&mut self) -> Result<Option<usize>, Status> {
        self.read(UNATTESTED).await?;
        Ok(self.total.filter(|total| self.length() < *total))
    }

    /// Reads the rest.
    ///
    /// # Errors
    /// As [`read`].
    pub(super) async fn message<M: Message + Default>(mut self) -> Result<M, Status> {
        self.read(usize::MAX).await?;
        let total = self.total.unwrap_or_default();
        let encoded = if self.more.is_empty() { self.seen } else { self.more.freeze() };
        let decoded = encoded.get(PREFIX..total).map(|_| M::decode(encoded.slice(PREFIX..total)));
        decoded.and_then(Result::ok).ok_or_else(|| Status::internal("the request is not a valid message"))
    }

    fn length(&self) -> usize {
        self.seen.len().max(self.more.len())
    }

    /// Reads until the request is whole, or `enough` of it has come.
    async fn read(&mut self, enough: usize) -> Result<(), Status> {
        tokio::time::timeout(PATIENCE, self.collect(enough))
            .await
            .map_err(|_| Status::deadline_exceeded("the request did not arrive in time"))?
    }

    async fn collect(&mut self, enough: usize) -> Result<(), Status> {
        while self.total.is_none_or(|total| self.length() < total) && self.length() < enough {
            let frame = std::future::poll_fn(|context| Pin::new(&mut self.body).poll_frame(context)).await;
            let Some(Ok(data)) = frame.transpose()?.map(Frame::into_data) else {
                return Err(Status::internal("the request ended within its message"));
            };
            if self.length() == 0 {
                self.seen = data;
            } else {
                if self.more.is_empty() {
                    self.more.reserve(self.total.unwrap_or_default());
                    self.more.extend_from_slice(&std::mem::take(&mut self.seen));
                }
                self.more.extend_from_slice(&data);
            }
            if self.total.is_none() {
                let seen = if self.more.is_empty() { &self.seen[..] } else { &self.more[..] };
                self.total = announced(seen, self.limit)?.map(|length| PREFIX + length);
            }
        }
        Ok(())
    }
}

/// The length that a prefix announces; nothing while the prefix is incomplete.
fn announced(bytes: &[u8], limit: usize) -> Result<Option<usize>, Status> {
    let Some([flag, length @ ..]) = bytes.first_chunk::<PREFIX>() else { return Ok(None) };
    match flag {
        0 => {}
        1 => return Err(Status::internal("the request is marked as compressed, without an encoding")),
        _ => return Err(Status::internal("the request has an unknown prefix")),
    }
    let length = u32::from_be_bytes(*length) as usize;
    if length > MESSAGE_LIMIT {
        return Err(Status::out_of_range(format!("a message of {length} bytes; the limit is {MESSAGE_LIMIT}")));
    }
    if length > limit {
        return Err(Status::invalid_argument("the request is larger than any valid one"));
    }
    Ok(Some(length))
}

/// A message with its prefix, ready to be sent to any number of callers.
pub(super) fn encode(message: &impl Message) -> Bytes {
    encoded(message).into()
}

/// As [`encode`], for a message with a key or a token in it: wiped when the last caller has it.
pub(super) fn encode_secret(message: &impl Message) -> Bytes {
    Bytes::from_owner(Zeroizing::new(encoded(message)))
}

fn encoded(message: &impl Message) -> Vec<u8> {
    let length = message.encoded_len();
    let mut encoded = Vec::with_capacity(PREFIX + length);
    encoded.put_u8(0);
    // Whoever sends it checks that it is within the limit of messages.
    encoded.put_u32(u32::try_from(length).unwrap_or(u32::MAX));
    message.encode_raw(&mut encoded);
    encoded
}

/// How many bytes of message an encoded answer has.
pub(super) fn message_length(encoded: &Bytes) -> usize {
    encoded.len().saturating_sub(PREFIX)
}

/// A successful response with this body.
pub(super) fn respond(body: Answer) -> http::Response<Body> {
    let mut response = http::Response::new(Body::new(body));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// The body of an answer.
pub(super) enum Answer {
    /// One message, then OK.
    One(Option<Bytes>),
    /// OK.
    Finished,
    /// Messages until a status, which is never OK: some client libraries would not come back after it.
    Many(BoxStream<'static, Result<Bytes, Status>>),
    /// Nothing more.
    Over,
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let trailers = |status: &Status| {
            let mut trailers = HeaderMap::new();
            status.add_header(&mut trailers)?;
            Ok(Frame::trailers(trailers))
        };
        match &mut *self {
            Self::One(message) => {
                let message = message.take().unwrap_or_default();
                *self = Self::Finished;
                Poll::Ready(Some(Ok(Frame::data(message))))
            }
            Self::Finished => {
                *self = Self::Over;
                Poll::Ready(Some(trailers(&Status::ok(""))))
            }
            Self::Many(messages) => {
                let status = match Pin::new(messages).poll_next(context) {
                    Poll::Pending => return Poll::Pending,
                    Poll::Ready(Some(Ok(message))) => return Poll::Ready(Some(Ok(Frame::data(message)))),
                    Poll::Ready(Some(Err(status))) => status,
                    Poll::Ready(None) => Status::unavailable("the agent has nothing more to say"),
                };
                *self = Self::Over;
                Poll::Ready(Some(trailers(&status)))
            }
            Self::Over => Poll::Ready(None),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Over)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;

    use super::*;

    async fn read_bytes(bytes: &[u8]) -> Result<spiffe_proto::workload::ValidateJwtsvidRequest, Status> {
        read(&HeaderMap::new(), Body::new(Full::new(Bytes::copy_from_slice(bytes))), VALIDATE_LIMIT).await
    }

    #[tokio::test]
    async fn h_68_malformed_messages_are_internal() {
        for wrong in [
            &b""[..],
            b"\0\0\0",
            b"\0\0\0\0\x02\x0a",
            b"\0\0\0\0\x02\x0a\x05",
            b"\x01\0\0\0\0",
            b"\x07\0\0\0\0",
            b"\0\0\0\0\x02\x08\x01",
            b"\0\0\0\0\x0b\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        ] {
            assert_eq!(read_bytes(wrong).await.unwrap_err().code(), tonic::Code::Internal, "{wrong:?}");
        }
        let unknown_field = b"\0\0\0\0\x05\xa2\x06\x02hi";
        assert_eq!(read_bytes(unknown_field).await.unwrap(), Default::default());
    }

    #[tokio::test]
    async fn a_request_may_come_in_pieces() {
        let request = spiffe_proto::workload::ValidateJwtsvidRequest { audience: "a".repeat(70_000), svid: "s".into() };
        let pieces = encode(&request)
            .chunks(7)
            .map(|part| Ok::<_, Status>(Frame::data(Bytes::copy_from_slice(part))))
            .collect::<Vec<_>>();
        let body = Body::new(http_body_util::StreamBody::new(futures_util::stream::iter(pieces)));
        let read: spiffe_proto::workload::ValidateJwtsvidRequest =
            read(&HeaderMap::new(), body, VALIDATE_LIMIT).await.unwrap();
        assert_eq!(read, request);
    }

    #[tokio::test]
    async fn before_the_caller_is_attested_no_more_is_read_than_four_kibibytes() {
        let taken = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let opened = |length: usize, step: usize| {
            let encoded = encode(&spiffe_proto::workload::ValidateJwtsvidRequest {
                audience: "a".into(),
                svid: "s".repeat(length),
            });
            let (total, counted) = (encoded.len(), std::sync::Arc::clone(&taken));
            counted.store(0, std::sync::atomic::Ordering::SeqCst);
            let pieces: Vec<Bytes> = encoded.chunks(step).map(Bytes::copy_from_slice).collect();
            let pieces = pieces.into_iter().map(move |piece| {
                counted.fetch_add(piece.len(), std::sync::atomic::Ordering::SeqCst);
                Ok::<_, Status>(Frame::data(piece))
            });
            let body = Body::new(http_body_util::StreamBody::new(futures_util::stream::iter(pieces)));
            (total, Incoming::new(&HeaderMap::new(), body, VALIDATE_LIMIT).unwrap())
        };
        let taken = || taken.load(std::sync::atomic::Ordering::SeqCst);
        let (total, mut whole) = opened(4000, 1000);
        assert_eq!(whole.unattested().await.unwrap(), None);
        assert_eq!(taken(), total);
        let (total, mut part) = opened(100_000, 1024);
        assert_eq!(part.unattested().await.unwrap(), Some(total));
        assert_eq!(taken(), 4096);
        let message: spiffe_proto::workload::ValidateJwtsvidRequest = part.message().await.unwrap();
        assert_eq!((message.svid.len(), taken()), (100_000, total));
    }

    #[tokio::test]
    async fn h_69_size_limits_are_told_before_the_message_is_read() {
        let announced = |length: u32| [&[0][..], &length.to_be_bytes()].concat();
        assert_eq!(read_bytes(&announced(5 << 20)).await.unwrap_err().code(), tonic::Code::OutOfRange);
        assert_eq!(read_bytes(&announced((4 << 20) + 1)).await.unwrap_err().code(), tonic::Code::OutOfRange);
        assert_eq!(read_bytes(&announced(4 << 20)).await.unwrap_err().code(), tonic::Code::InvalidArgument);
    }
}
