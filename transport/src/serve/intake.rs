//! What a request may bring, and how slowly.
//!
//! An unfinished request is memory of ours that its caller pays nothing for. So a message that will be larger than its
//! method allows is refused by its prefix, what has come counts against the caller, and a message that stays where it
//! is for ten seconds ends the call. A stream between two messages waits as long as it likes, and time counts only
//! while somebody waits for the message: a call that waits for its turn does not lose its request.

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use tokio::time::{Sleep, sleep};
use tonic::Status;

use super::call::Share;

/// How long a request may make no progress.
const PATIENCE: Duration = Duration::from_secs(10);
/// The head of a gRPC message: a flag and four bytes of length (gRPC over HTTP/2, "Requests").
const HEAD: u8 = 5;

/// What the requests of one method bring. A method without one brings what it likes, in any number of messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expected {
    /// Path of the method on the wire, `/package.Service/Method`.
    pub path: &'static str,
    /// Bytes of all messages of one call together.
    pub bytes: usize,
    /// Whether a call may bring several messages; otherwise the request has to end after the first.
    pub many: bool,
}

impl Expected {
    /// A method that takes one message.
    pub const fn one(path: &'static str, bytes: usize) -> Self {
        Self { path, bytes, many: false }
    }

    /// A method that takes a stream of messages.
    pub const fn many(path: &'static str, bytes: usize) -> Self {
        Self { path, bytes, many: true }
    }
}

/// The body of a request, watched. Ends with ResourceExhausted beyond its limit, and with DeadlineExceeded if it makes no
/// progress.
pub(super) struct Intake<B> {
    inner: B,
    share: Share,
    most: usize,
    many: bool,
    framing: Framing,
    /// Bytes that came and do not count against the caller yet.
    uncounted: usize,
    stalled: Option<Pin<Box<Sleep>>>,
}

impl<B> Intake<B> {
    pub(super) fn new(inner: B, share: Share, expected: Option<&Expected>) -> Self {
        let (most, many) = expected.map_or((usize::MAX, true), |expected| (expected.bytes, expected.many));
        Self { inner, share, most, many, framing: Framing::default(), uncounted: 0, stalled: None }
    }

    fn take(&mut self, data: &[u8]) -> Result<(), Status> {
        self.stalled = None;
        self.uncounted += data.len();
        if self.uncounted >= Share::UNIT {
            self.share.holds(self.uncounted);
            self.uncounted %= Share::UNIT;
        }
        self.framing.advance(data);
        if self.framing.announced > self.most {
            let (announced, most) = (self.framing.announced, self.most);
            let text = format!("the request is larger than this call takes ({announced} bytes; the limit is {most})");
            return Err(Status::resource_exhausted(text));
        }
        Ok(())
    }

    fn is_unfinished(&self) -> bool {
        !self.many || !self.framing.is_between_messages()
    }
}

impl<B> Body for Intake<B>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::error::Error + Send + Sync + 'static,
{
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        match Pin::new(&mut this.inner).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                let taken = frame.data_ref().map_or(Ok(()), |data| this.take(data));
                Poll::Ready(Some(taken.map(|()| frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(Status::from_error(Box::new(error))))),
            Poll::Ready(None) => Poll::Ready(None),
            Poll::Pending if this.is_unfinished() => {
                let stalled = this.stalled.get_or_insert_with(|| Box::pin(sleep(PATIENCE)));
                stalled
                    .as_mut()
                    .poll(context)
                    .map(|()| Some(Err(Status::deadline_exceeded("the request made no progress for ten seconds"))))
            }
            Poll::Pending => Poll::Pending,
        }
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

/// Where among the messages of a request we are.
#[derive(Debug, Default, PartialEq, Eq)]
struct Framing {
    /// Bytes of the current head that have come.
    seen: u8,
    /// The length as far as it is known.
    length: u32,
    /// Bytes of the current message that are to come.
    left: usize,
    /// Bytes that all messages so far have, or will have.
    announced: usize,
    /// The first message is whole.
    begun: bool,
}

impl Framing {
    fn is_between_messages(&self) -> bool {
        self.begun && self.seen == 0 && self.left == 0
    }

    fn advance(&mut self, mut data: &[u8]) {
        while let Some((first, rest)) = data.split_first() {
            if self.left > 0 {
                let now = self.left.min(data.len());
                self.left -= now;
                data = data.get(now..).unwrap_or_default();
            } else {
                // The flag is shifted out by the four bytes behind it.
                self.length = self.length << 8 | u32::from(*first);
                self.seen += 1;
                data = rest;
                if self.seen < HEAD {
                    continue;
                }
                self.seen = 0;
                self.left = usize::try_from(self.length).unwrap_or(usize::MAX);
                self.announced = self.announced.saturating_add(self.left);
            }
            self.begun |= self.left == 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn framed(length: usize) -> Vec<u8> {
        let head = u32::try_from(length).unwrap().to_be_bytes();
        [&[0][..], &head, &vec![7; length]].concat()
    }

    #[test]
    fn a_message_counts_when_its_head_has_come() {
        let mut framing = Framing::default();
        framing.advance(&[0, 0, 1, 0]);
        assert_eq!((framing.announced, framing.is_between_messages()), (0, false));
        framing.advance(&[1]);
        assert_eq!((framing.announced, framing.left), (65_537, 65_537));
        framing.advance(&vec![0; 65_536]);
        assert!(!framing.is_between_messages());
        framing.advance(&[0]);
        assert!(framing.is_between_messages());
        framing.advance(&[0]);
        assert!(!framing.is_between_messages());
        framing.advance(&[0xff, 0xff, 0xff, 0xff]);
        assert_eq!(framing.announced, 65_537 + 0xffff_ffff);
    }

    proptest! {
        /// However messages are cut into pieces, they end where they end.
        #[test]
        fn pieces_do_not_matter(lengths in proptest::collection::vec(0_usize..40, 1..8), step in 1_usize..50) {
            let all: Vec<u8> = lengths.iter().flat_map(|length| framed(*length)).collect();
            let mut framing = Framing::default();
            for piece in all.chunks(step) {
                framing.advance(piece);
            }
            prop_assert!(framing.is_between_messages());
            prop_assert_eq!(framing.announced, lengths.iter().sum::<usize>());
            let mut cut = Framing::default();
            cut.advance(all.get(..all.len() - 1).unwrap());
            prop_assert!(!cut.is_between_messages());
        }
    }
}
