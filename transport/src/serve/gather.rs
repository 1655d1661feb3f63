//! Frames that were made together leave together.
//!
//! The HTTP/2 stack writes the head of a frame, a large payload and what follows them in pieces. Under TLS each piece
//! is a record and a system call, which together cost more than the whole rest of a small answer.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// What is held back at most: the largest frame with its head and what goes before it.
const ROOM: usize = 20 * 1024;

/// A stream that holds written bytes back until it is flushed, or until there is no room for more.
pub(super) struct Gather<S> {
    inner: S,
    held: Vec<u8>,
    /// So many bytes of `held` are written.
    written: usize,
}

impl<S> Gather<S> {
    pub(super) fn new(inner: S) -> Self {
        Self { inner, held: Vec::new(), written: 0 }
    }
}

impl<S: AsyncWrite + Unpin> Gather<S> {
    fn poll_drain(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while let Some(rest) = self.held.get(self.written..).filter(|rest| !rest.is_empty()) {
            let written = ready!(Pin::new(&mut self.inner).poll_write(context, rest))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.written += written;
        }
        // Most connections are silent most of the time: none keeps a buffer while it has nothing to say.
        (self.held, self.written) = (Vec::new(), 0);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Gather<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_read(context, out)
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Gather<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        if self.held.len() + bytes.len() > ROOM {
            ready!(self.poll_drain(context))?;
            if bytes.len() > ROOM {
                return Pin::new(&mut self.inner).poll_write(context, bytes);
            }
        }
        self.held.extend_from_slice(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(context))?;
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    #[tokio::test]
    async fn what_was_written_before_a_flush_arrives_in_one_piece() {
        let (ours, mut theirs) = duplex(1024);
        let mut gather = Gather::new(ours);
        gather.write_all(b"head").await.unwrap();
        gather.write_all(b"payload").await.unwrap();
        gather.flush().await.unwrap();
        let mut read = [0; 64];
        let count = theirs.read(&mut read).await.unwrap();
        assert_eq!(&read[..count], b"headpayload");
        assert_eq!(gather.held.capacity(), 0);
    }

    #[tokio::test]
    async fn nothing_is_lost_or_reordered_however_small_the_pipe() {
        let (ours, mut theirs) = duplex(7);
        let sent: Vec<u8> = (0..3 * ROOM).map(|n| n.to_le_bytes()[0]).collect();
        let expected = sent.clone();
        #[allow(clippy::disallowed_methods, reason = "joined below")]
        let writer = tokio::spawn(async move {
            let mut gather = Gather::new(ours);
            let (first, rest) = sent.split_at(ROOM - 1);
            for part in [&first[..10], &first[10..], &rest[..2], &rest[2..]] {
                gather.write_all(part).await.unwrap();
            }
            gather.shutdown().await.unwrap();
        });
        let mut received = Vec::new();
        theirs.read_to_end(&mut received).await.unwrap();
        writer.await.unwrap();
        assert!(received == expected);
    }
}
