//! HTTP/2 written frame by frame, for clients that no library would be.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use loona_hpack::Decoder;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::UnixStream;

/// What begins every HTTP/2 connection.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const FRAME_LIMIT: usize = 16 * 1024;
const PATIENCE: Duration = Duration::from_secs(30);

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;
const ACK: u8 = 1;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

/// Names and values of a header block, in order.
pub type Fields = Vec<(Vec<u8>, Vec<u8>)>;

/// What became of a call.
#[derive(Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The first message of the answer, whatever follows it.
    Message(Vec<u8>),
    /// A gRPC status without any message.
    Status(u32),
    /// An HTTP status without a gRPC status.
    Http(u16),
    /// The stream was reset, with this code.
    Reset(u32),
    /// The connection was ended by GOAWAY, with this code.
    GoneAway(u32),
    /// The connection was closed without a word.
    Closed,
}

impl std::fmt::Debug for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            // It may hold a key.
            Self::Message(message) => write!(f, "Message of {} bytes", message.len()),
            Self::Status(code) => write!(f, "Status({code})"),
            Self::Http(status) => write!(f, "Http({status})"),
            Self::Reset(code) => write!(f, "Reset({code})"),
            Self::GoneAway(code) => write!(f, "GoneAway({code})"),
            Self::Closed => f.write_str("Closed"),
        }
    }
}

enum Seen {
    Headers { stream: u32, fields: Fields, end: bool },
    Data { stream: u32, bytes: Vec<u8>, end: bool },
    Reset { stream: u32, code: u32 },
    GoneAway { code: u32 },
    Closed,
    Other,
}

trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<S: AsyncRead + AsyncWrite + Send + Unpin> Duplex for S {}

/// One connection.
pub struct Frames {
    stream: Box<dyn Duplex>,
    decoder: Decoder<'static>,
    next: u32,
}

impl Frames {
    /// Connects to a Unix socket and sends the preface and empty settings.
    ///
    /// # Errors
    /// If the socket cannot be connected.
    pub async fn connect(path: &Path) -> Result<Self> {
        Self::over(UnixStream::connect(path).await.with_context(|| path.display().to_string())?).await
    }

    /// Sends the preface and empty settings over `stream`.
    ///
    /// # Errors
    /// If the connection is closed.
    pub async fn over(stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Result<Self> {
        let mut frames = Self { stream: Box::new(stream), decoder: Decoder::new(), next: 1 };
        frames.raw(PREFACE).await?;
        frames.frame(SETTINGS, 0, 0, b"").await?;
        Ok(frames)
    }

    /// Sends bytes as they are.
    ///
    /// # Errors
    /// If the connection is closed.
    pub async fn raw(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.stream.write_all(bytes).await?)
    }

    async fn frame(&mut self, kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Result<()> {
        let [_, a, b, c] = u32::try_from(payload.len())?.to_be_bytes();
        let mut bytes = vec![a, b, c, kind, flags];
        bytes.extend_from_slice(&stream.to_be_bytes());
        bytes.extend_from_slice(payload);
        self.raw(&bytes).await
    }

    /// Opens a stream with these fields and sends `body`, if there is one; the answer is its number.
    ///
    /// # Errors
    /// If the connection is closed.
    pub async fn open(&mut self, fields: &Fields, body: Option<&[u8]>) -> Result<u32> {
        let number = self.next;
        self.next += 2;
        let block = encoded(fields);
        let mut parts = block.chunks(FRAME_LIMIT).peekable();
        let mut kind = HEADERS;
        while let Some(part) = parts.next() {
            let mut flags = if parts.peek().is_none() { END_HEADERS } else { 0 };
            if kind == HEADERS && body.is_none_or(<[u8]>::is_empty) {
                flags |= END_STREAM;
            }
            self.frame(kind, flags, number, part).await?;
            kind = CONTINUATION;
        }
        if let Some(body) = body {
            let mut parts = body.chunks(FRAME_LIMIT).peekable();
            while let Some(part) = parts.next() {
                let flags = if parts.peek().is_none() { END_STREAM } else { 0 };
                self.frame(DATA, flags, number, part).await?;
            }
        }
        Ok(number)
    }

    /// Opens a stream, sends `body` and leaves it open for more.
    ///
    /// # Errors
    /// If the connection is closed.
    pub async fn begin(&mut self, fields: &Fields, body: &[u8]) -> Result<u32> {
        let number = self.next;
        self.next += 2;
        self.frame(HEADERS, END_HEADERS, number, &encoded(fields)).await?;
        for part in body.chunks(FRAME_LIMIT) {
            self.frame(DATA, 0, number, part).await?;
        }
        Ok(number)
    }

    /// Resets a stream of ours.
    ///
    /// # Errors
    /// If the connection is closed.
    pub async fn reset(&mut self, stream: u32) -> Result<()> {
        // CANCEL
        self.frame(RST_STREAM, 0, stream, &8_u32.to_be_bytes()).await
    }

    /// Opens a stream and waits for what becomes of it.
    ///
    /// # Errors
    /// If nothing becomes of it in time.
    pub async fn call(&mut self, fields: &Fields, body: Option<&[u8]>) -> Result<Outcome> {
        match self.open(fields, body).await {
            Ok(stream) => self.outcome(stream).await,
            // The other side may have hung up over what was sent so far, and said why before.
            Err(_) => self.outcome(0).await,
        }
    }

    /// Waits for what becomes of a stream.
    ///
    /// # Errors
    /// If nothing becomes of it in time, or the other side does not speak HTTP/2.
    pub async fn outcome(&mut self, number: u32) -> Result<Outcome> {
        let deadline = tokio::time::timeout(PATIENCE, self.wait(number)).await;
        deadline.with_context(|| format!("nothing became of stream {number} within {PATIENCE:?}"))?
    }

    async fn wait(&mut self, number: u32) -> Result<Outcome> {
        let mut http = 0;
        let mut message = Vec::new();
        loop {
            match self.next().await? {
                Seen::Headers { stream, fields, end } if stream == number => {
                    if let Some(status) = number_in(&fields, b":status") {
                        http = u16::try_from(status)?;
                    }
                    if let Some(status) = number_in(&fields, b"grpc-status") {
                        return Ok(Outcome::Status(status));
                    }
                    if end || http != 200 {
                        return Ok(Outcome::Http(http));
                    }
                }
                Seen::Data { stream, bytes, end } if stream == number => {
                    message.extend(bytes);
                    if let Some((prefix, rest)) = message.split_first_chunk::<5>() {
                        let [_, length @ ..] = *prefix;
                        if let Some(whole) = rest.get(..usize::try_from(u32::from_be_bytes(length))?) {
                            return Ok(Outcome::Message(whole.to_vec()));
                        }
                    }
                    ensure!(!end, "the stream ended without trailers");
                }
                Seen::Reset { stream, code } if stream == number => return Ok(Outcome::Reset(code)),
                Seen::GoneAway { code } => return Ok(Outcome::GoneAway(code)),
                Seen::Closed => return Ok(Outcome::Closed),
                _ => {}
            }
        }
    }

    async fn next(&mut self) -> Result<Seen> {
        let mut head = [0; 9];
        // However it ends, it has ended: a reset is what a full receive buffer makes of a close.
        if self.stream.read_exact(&mut head).await.is_err() {
            return Ok(Seen::Closed);
        }
        let [a, b, c, kind, flags, stream @ ..] = head;
        let mut payload = vec![0; usize::try_from(u32::from_be_bytes([0, a, b, c]))?];
        if self.stream.read_exact(&mut payload).await.is_err() {
            return Ok(Seen::Closed);
        }
        let stream = u32::from_be_bytes(stream);
        let end = flags & END_STREAM != 0;
        let code = |at: usize| {
            let bytes = payload.get(at..at + 4).and_then(|bytes| bytes.first_chunk()).context("a short frame")?;
            anyhow::Ok(u32::from_be_bytes(*bytes))
        };
        Ok(match kind {
            DATA => {
                // Of the connection only: a stream that we read no further may stay full.
                if let Some(read) = u32::try_from(payload.len()).ok().filter(|read| *read > 0) {
                    let _ = self.frame(WINDOW_UPDATE, 0, 0, &read.to_be_bytes()).await;
                }
                Seen::Data { stream, bytes: payload, end }
            }
            HEADERS => {
                ensure!(flags & END_HEADERS != 0, "a header block in several frames");
                let fields = self.decoder.decode(&payload);
                Seen::Headers { stream, fields: fields.map_err(|error| anyhow::anyhow!("{error:?}"))?, end }
            }
            RST_STREAM => Seen::Reset { stream, code: code(0)? },
            GOAWAY => match code(4)? {
                // A polite one: what is open goes on.
                0 => Seen::Other,
                code => Seen::GoneAway { code },
            },
            SETTINGS if flags & ACK == 0 => {
                // It may have been sent just before a close.
                let _ = self.frame(SETTINGS, ACK, 0, b"").await;
                Seen::Other
            }
            PING if flags & ACK == 0 => {
                let _ = self.frame(PING, ACK, 0, &payload).await;
                Seen::Other
            }
            _ => Seen::Other,
        })
    }

    /// Waits until the connection is closed or ended by GOAWAY with an error.
    ///
    /// # Errors
    /// If that does not happen in time.
    pub async fn ended(&mut self) -> Result<Outcome> {
        match self.outcome(u32::MAX).await? {
            ended @ (Outcome::GoneAway(_) | Outcome::Closed) => Ok(ended),
            other => bail!("unexpected {other:?}"),
        }
    }
}

fn number_in(fields: &Fields, name: &[u8]) -> Option<u32> {
    let (_, value) = fields.iter().find(|(known, _)| known == name)?;
    std::str::from_utf8(value).ok()?.parse().ok()
}

/// Literal fields without indexing (RFC 7541, section 6.2.2).
fn encoded(fields: &Fields) -> Vec<u8> {
    let mut block = Vec::new();
    let text = |block: &mut Vec<u8>, bytes: &[u8]| {
        match bytes.len().checked_sub(127) {
            None => block.push(bytes.len().to_be_bytes()[7]),
            Some(mut rest) => {
                block.push(127);
                while rest >= 128 {
                    block.push(rest.to_be_bytes()[7] & 127 | 128);
                    rest >>= 7;
                }
                block.push(rest.to_be_bytes()[7]);
            }
        }
        block.extend_from_slice(bytes);
    };
    for (name, value) in fields {
        block.push(0);
        text(&mut block, name);
        text(&mut block, value);
    }
    block
}

/// The fields of a gRPC call.
#[must_use]
pub fn call(path: &str) -> Fields {
    let pairs = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", path),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    ];
    pairs.iter().map(|(name, value)| (name.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
}

/// The fields of a Workload API call, security header included.
#[must_use]
pub fn workload_call(method: &str) -> Fields {
    with(call(&format!("/SpiffeWorkloadAPI/{method}")), "workload.spiffe.io", Some(b"true"))
}

/// `fields` with `name` set to `value`, or without it.
#[must_use]
pub fn with(mut fields: Fields, name: &str, value: Option<&[u8]>) -> Fields {
    let at = fields.iter().position(|(known, _)| known == name.as_bytes());
    match (at, value) {
        (Some(at), Some(value)) => fields[at].1 = value.to_vec(),
        (Some(at), None) => drop(fields.remove(at)),
        (None, Some(value)) => fields.push((name.as_bytes().to_vec(), value.to_vec())),
        (None, None) => {}
    }
    fields
}

/// A gRPC message with its prefix.
#[must_use]
pub fn framed(message: &[u8]) -> Vec<u8> {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX);
    [&[0][..], &length.to_be_bytes(), message].concat()
}
