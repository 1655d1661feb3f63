//! Lets every gRPC library speak to us over a Unix socket.
//!
//! gRPC has no agreed `:authority` for Unix sockets: C-core sends the escaped path, Netty the bare path, others send
//! nothing useful either. Our HTTP/2 stack resets a stream whose `:authority` is not a URI authority before anybody
//! can have an opinion. [`AuthorityFix`] sits between socket and HTTP/2 and gives such streams the authority
//! `localhost`.
//!
//! Header blocks are compressed with a state that both ends keep, so one field cannot be replaced in passing. The shim
//! therefore keeps the client's compression state itself and writes every block anew with fields that use no state:
//! the state of the HTTP/2 stack behind it stays empty and cannot diverge, whatever a client does. All other frames
//! pass as they are, and so does everything that is wrong: the answer to an error is the HTTP/2 stack's business.
//! (RFC 7541; RFC 9113, sections 4 and 6.2.)

mod hpack;

use std::io;
use std::mem::MaybeUninit;
use std::pin::Pin;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use hpack::Decoder;

/// How large a decoded header list may be; the HTTP/2 stack behind must be set to the same. Counted as RFC 9113 does:
/// 32 bytes for each field beside name and value.
pub const HEADER_LIST_LIMIT: usize = 16 * 1024;

const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The frame size that every endpoint grants if it announces nothing (and we announce nothing).
const FRAME_LIMIT: usize = 16 * 1024;
/// A header block above this, frame heads included, is the end of the connection; one between this and the limit above
/// only of its stream.
const BLOCK_LIMIT: usize = 256 * 1024;
/// How many connections of the process may hold a block above one frame at a time: an unfinished block is memory that
/// the client pays nothing for.
const LARGE_BLOCKS: usize = 64;

const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

static LARGE: AtomicUsize = AtomicUsize::new(0);

/// One of the [`LARGE_BLOCKS`].
#[derive(Debug)]
struct LargeBlock;

impl LargeBlock {
    fn take() -> Option<Self> {
        let taken = LARGE.fetch_add(1, Ordering::AcqRel) + 1;
        let place = Self;
        (taken <= LARGE_BLOCKS).then_some(place)
    }
}

impl Drop for LargeBlock {
    fn drop(&mut self) {
        LARGE.fetch_sub(1, Ordering::AcqRel);
    }
}

/// A connection on which every `:authority` can be parsed. Reads are filtered, writes are the inner stream's.
pub struct AuthorityFix<S> {
    inner: S,
    filter: Filter,
    /// Filtered and not yet read, from `given` on.
    filtered: Vec<u8>,
    given: usize,
}

impl<S> AuthorityFix<S> {
    /// Filters what is read from `inner`, from its first byte on.
    pub fn new(inner: S) -> Self {
        Self { inner, filter: Filter::new(), filtered: Vec::new(), given: 0 }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for AuthorityFix<S> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if let Some(rest) = this.filtered.get(this.given..).filter(|rest| !rest.is_empty()) {
                let (now, later) = rest.split_at(rest.len().min(out.remaining()));
                out.put_slice(now);
                this.given += now.len();
                if later.is_empty() {
                    // Most connections read a few hundred bytes in their life: hold no buffer in between.
                    (this.filtered, this.given) = (Vec::new(), 0);
                }
                return Poll::Ready(Ok(()));
            }
            if matches!(this.filter.at, At::Blind) {
                return Pin::new(&mut this.inner).poll_read(context, out);
            }
            let mut scratch = [const { MaybeUninit::uninit() }; 8 * 1024];
            let mut read = ReadBuf::uninit(&mut scratch);
            ready!(Pin::new(&mut this.inner).poll_read(context, &mut read))?;
            if read.filled().is_empty() {
                return Poll::Ready(Ok(()));
            }
            this.filter.feed(read.filled(), &mut this.filtered)?;
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for AuthorityFix<S> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(context, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(context)
    }
}

/// Where in the byte stream we are.
enum At {
    /// In the connection preface, with so many bytes of it seen.
    Preface(usize),
    /// In the nine bytes before a frame.
    Head { bytes: [u8; 9], seen: usize },
    /// In a frame that passes as it is, with so many bytes left.
    Payload(usize),
    /// In a frame of a header block, with so many bytes left.
    Block(usize),
    /// Nothing is filtered any more: this is no HTTP/2, or it is wrong beyond repair.
    Blind,
}

/// A header block under way.
struct Block {
    stream: [u8; 4],
    end_stream: bool,
    /// The frame being collected ends the block.
    last: bool,
    /// Flags of the first frame, for padding and priority.
    flags: u8,
    /// Payload of all frames so far, without padding and priority except in the first frame until it is complete.
    bytes: Vec<u8>,
    /// What all frames so far took on the wire: one that brings nothing costs work, too.
    read: usize,
    first_frame: bool,
    large: Option<LargeBlock>,
}

struct Filter {
    at: At,
    block: Option<Box<Block>>,
    decoder: Decoder,
}

const NO_HEAD: At = At::Head { bytes: [0; 9], seen: 0 };

fn ended(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

impl Filter {
    fn new() -> Self {
        Self { at: At::Preface(0), block: None, decoder: Decoder::new() }
    }

    /// Takes what came from the client and appends what the HTTP/2 stack is to see.
    fn feed(&mut self, mut bytes: &[u8], out: &mut Vec<u8>) -> io::Result<()> {
        while !bytes.is_empty() {
            match &mut self.at {
                At::Blind => {
                    out.extend_from_slice(bytes);
                    return Ok(());
                }
                At::Preface(seen) => {
                    let expected = PREFACE.get(*seen..).unwrap_or_default();
                    let (now, rest) = bytes.split_at(expected.len().min(bytes.len()));
                    out.extend_from_slice(now);
                    *seen += now.len();
                    if !expected.starts_with(now) {
                        self.at = At::Blind;
                    } else if *seen == PREFACE.len() {
                        self.at = NO_HEAD;
                    }
                    bytes = rest;
                }
                At::Head { bytes: head, seen } => {
                    let missing = head.get_mut(*seen..).unwrap_or_default();
                    let (now, rest) = bytes.split_at(missing.len().min(bytes.len()));
                    for (to, from) in missing.iter_mut().zip(now) {
                        *to = *from;
                    }
                    *seen += now.len();
                    bytes = rest;
                    if *seen == head.len() {
                        let head = *head;
                        self.begin_frame(head, out)?;
                    }
                }
                At::Payload(left) => {
                    let (now, rest) = bytes.split_at((*left).min(bytes.len()));
                    out.extend_from_slice(now);
                    *left -= now.len();
                    bytes = rest;
                    if *left == 0 {
                        self.at = NO_HEAD;
                    }
                }
                At::Block(left) => {
                    let (now, rest) = bytes.split_at((*left).min(bytes.len()));
                    if let Some(block) = &mut self.block {
                        block.bytes.extend_from_slice(now);
                    }
                    *left -= now.len();
                    bytes = rest;
                    if *left == 0 {
                        self.end_block_frame(out);
                    }
                }
            }
        }
        Ok(())
    }

    fn begin_frame(&mut self, head: [u8; 9], out: &mut Vec<u8>) -> io::Result<()> {
        let [length0, length1, length2, kind, flags, stream @ ..] = head;
        let length = usize::from(length0) << 16 | usize::from(length1) << 8 | usize::from(length2);
        if let Some(block) = &mut self.block {
            if kind != CONTINUATION || stream != block.stream {
                return Err(ended("a frame inside a header block"));
            }
            block.read += head.len() + length;
            if length > FRAME_LIMIT || block.read > BLOCK_LIMIT {
                return Err(ended("a header block beyond all limits"));
            }
            if block.large.is_none() && block.bytes.len() + length > FRAME_LIMIT {
                let place = LargeBlock::take().ok_or_else(|| ended("too many large header blocks"))?;
                block.large = Some(place);
            }
            block.last = flags & END_HEADERS != 0;
        } else if kind == HEADERS && length <= FRAME_LIMIT {
            self.block = Some(Box::new(Block {
                stream,
                end_stream: flags & END_STREAM != 0,
                last: flags & END_HEADERS != 0,
                flags,
                bytes: Vec::new(),
                read: head.len() + length,
                first_frame: true,
                large: None,
            }));
        } else {
            out.extend_from_slice(&head);
            // A header frame that is too long is a connection error, which the stack finds by its head alone.
            self.at = match (kind, length) {
                (HEADERS, _) => At::Blind,
                (_, 0) => NO_HEAD,
                _ => At::Payload(length),
            };
            return Ok(());
        }
        self.at = At::Block(length);
        if length == 0 {
            self.end_block_frame(out);
        }
        Ok(())
    }

    fn end_block_frame(&mut self, out: &mut Vec<u8>) {
        self.at = NO_HEAD;
        let Some(mut block) = self.block.take() else { return };
        if block.first_frame {
            block.first_frame = false;
            let Some(fragment) = without_padding(&block.bytes, block.flags) else {
                // Padding longer than its frame: a connection error, shown to the stack as it came.
                write_head(out, block.bytes.len(), HEADERS, block.flags, block.stream);
                out.extend_from_slice(&block.bytes);
                self.at = At::Blind;
                return;
            };
            block.bytes = fragment;
        }
        if block.last {
            let fields = self.recode(&block.bytes);
            write_block(out, &fields, &block);
        } else {
            self.block = Some(block);
        }
    }

    /// The same fields, none of which uses compression state.
    fn recode(&mut self, block: &[u8]) -> Vec<u8> {
        let mut fields = Vec::with_capacity(block.len() * 2);
        let mut size = 0_usize;
        let decoded = self.decoder.decode(block, |name, value| {
            let before = size;
            size = size.saturating_add(name.len() + value.len() + 32);
            if size <= HEADER_LIST_LIMIT {
                let value = if name == b":authority" && http::uri::Authority::try_from(value).is_err() {
                    b"localhost"
                } else {
                    value
                };
                write_field(&mut fields, name, value);
            } else if before <= HEADER_LIST_LIMIT {
                // One field that makes the list too large stands for all that is not shown to the stack: it then
                // refuses this stream, and only this one. Short of 32 bytes counted for each field, so that the block
                // fits into one frame: of one that does not, the stack would think worse.
                let filler = vec![b'-'; HEADER_LIST_LIMIT.saturating_sub(before + 20)];
                write_field(&mut fields, b"over-the-limit", &filler);
            }
        });
        match decoded {
            Ok(()) => fields,
            // A reference to entry 0 does not decode either: the stack itself finds the error and answers it.
            Err(_) => vec![0x80],
        }
    }
}

/// The block's fragment in the payload of a HEADERS frame; nothing if there is more padding than payload.
fn without_padding(payload: &[u8], flags: u8) -> Option<Vec<u8>> {
    let (padding, payload) = if flags & PADDED != 0 {
        let (length, rest) = payload.split_first()?;
        (usize::from(*length), rest)
    } else {
        (0, payload)
    };
    let payload = if flags & PRIORITY != 0 { payload.get(5..)? } else { payload };
    let end = payload.len().checked_sub(padding)?;
    payload.get(..end).map(<[u8]>::to_vec)
}

fn write_block(out: &mut Vec<u8>, fields: &[u8], block: &Block) {
    let end_stream = if block.end_stream { END_STREAM } else { 0 };
    let mut parts = fields.chunks(FRAME_LIMIT).peekable();
    let first = parts.next().unwrap_or_default();
    let end = if parts.peek().is_none() { END_HEADERS } else { 0 };
    write_head(out, first.len(), HEADERS, end_stream | end, block.stream);
    out.extend_from_slice(first);
    while let Some(part) = parts.next() {
        let end = if parts.peek().is_none() { END_HEADERS } else { 0 };
        write_head(out, part.len(), CONTINUATION, end, block.stream);
        out.extend_from_slice(part);
    }
}

fn write_head(out: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: [u8; 4]) {
    let [.., length0, length1, length2] = length.to_be_bytes();
    out.extend_from_slice(&[length0, length1, length2, kind, flags]);
    out.extend_from_slice(&stream);
}

/// A literal field without indexing, with a new name (RFC 7541, section 6.2.2).
fn write_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0);
    write_length(out, name.len());
    out.extend_from_slice(name);
    write_length(out, value.len());
    out.extend_from_slice(value);
}

/// A length as an integer with a prefix of seven bits, the eighth saying "not Huffman coded" (RFC 7541, section 5.1).
fn write_length(out: &mut Vec<u8>, length: usize) {
    let Some(mut rest) = length.checked_sub(127) else {
        out.push(u8::try_from(length).unwrap_or(127));
        return;
    };
    out.push(127);
    while rest >= 128 {
        out.push(u8::try_from(rest & 127).unwrap_or(0) | 128);
        rest >>= 7;
    }
    out.push(u8::try_from(rest).unwrap_or(0));
}

/// Feeds arbitrary bytes through the filter in pieces of `step`, for fuzzing: returns what the HTTP/2 stack would see,
/// or why the connection would end.
///
/// # Errors
/// As reading from an [`AuthorityFix`].
pub fn filtered(bytes: &[u8], step: usize) -> io::Result<Vec<u8>> {
    let mut filter = Filter::new();
    let mut out = Vec::new();
    for part in bytes.chunks(step.max(1)) {
        filter.feed(part, &mut out)?;
    }
    Ok(out)
}

#[cfg(test)]
mod tests;
