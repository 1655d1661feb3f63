//! HTTP/2 by hand, for requests that no client library would send.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::time::timeout;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RESET: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
const CONTINUATION: u8 = 9;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;
const ACK: u8 = 1;
/// The largest frame that every peer accepts.
const LARGEST: usize = 16_384;
/// How long an answer may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// What came back on one stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Answer {
    /// `:status`.
    pub http: Option<String>,
    /// `grpc-status`, from the headers or the trailers.
    pub grpc: Option<i32>,
    /// `grpc-message`, percent-decoded.
    pub message: Option<String>,
    /// The body so far.
    pub data: Vec<u8>,
    /// The code of a reset.
    pub reset: Option<u32>,
    /// The code of a GOAWAY, which is about the whole connection.
    pub goaway: Option<u32>,
    /// The connection was closed.
    pub closed: bool,
}

/// One connection.
pub struct Raw {
    stream: UnixStream,
    decoder: loona_hpack::Decoder<'static>,
    next: u32,
}

impl Raw {
    /// Connects and sends the preface and empty settings.
    ///
    /// # Errors
    /// If the socket does not take the connection.
    pub async fn connect(socket: &Path) -> Result<Self> {
        let mut stream = UnixStream::connect(socket).await?;
        stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await?;
        let mut raw = Self { stream, decoder: loona_hpack::Decoder::new(), next: 1 };
        raw.frame(SETTINGS, 0, 0, &[]).await?;
        Ok(raw)
    }

    /// The headers of a gRPC request.
    #[must_use]
    pub fn request<'a>(path: &'a str, more: &[(&'a str, &'a [u8])]) -> Vec<(&'a str, &'a [u8])> {
        let mut headers: Vec<(&str, &[u8])> = vec![
            (":method", b"POST"),
            (":scheme", b"http"),
            (":path", path.as_bytes()),
            (":authority", b"localhost"),
            ("content-type", b"application/grpc"),
            ("te", b"trailers"),
        ];
        headers.extend_from_slice(more);
        headers
    }

    /// Opens a stream with these headers; with a body, sends it and ends the stream.
    ///
    /// # Errors
    /// If the connection is gone.
    pub async fn open(&mut self, headers: &[(&str, &[u8])], body: Option<&[u8]>) -> Result<u32> {
        let id = self.next;
        self.next += 2;
        let block = block(headers);
        let mut parts = block.chunks(LARGEST).peekable();
        let mut kind = HEADERS;
        while let Some(part) = parts.next() {
            let flags = if parts.peek().is_none() { END_HEADERS } else { 0 };
            self.frame(kind, flags, id, part).await?;
            kind = CONTINUATION;
        }
        if let Some(body) = body {
            let mut parts = body.chunks(LARGEST).peekable();
            if body.is_empty() {
                self.frame(DATA, END_STREAM, id, &[]).await?;
            }
            while let Some(part) = parts.next() {
                let flags = if parts.peek().is_none() { END_STREAM } else { 0 };
                self.frame(DATA, flags, id, part).await?;
            }
        }
        Ok(id)
    }

    /// Resets a stream.
    ///
    /// # Errors
    /// If the connection is gone.
    pub async fn reset(&mut self, id: u32) -> Result<()> {
        self.frame(RESET, 0, id, &8_u32.to_be_bytes()).await
    }

    /// Sends one frame as it is.
    ///
    /// # Errors
    /// If the connection is gone.
    pub async fn frame(&mut self, kind: u8, flags: u8, id: u32, payload: &[u8]) -> Result<()> {
        let length = u32::try_from(payload.len())?.to_be_bytes();
        let mut frame = vec![length[1], length[2], length[3], kind, flags];
        frame.extend_from_slice(&id.to_be_bytes());
        frame.extend_from_slice(payload);
        self.stream.write_all(&frame).await?;
        Ok(())
    }

    /// Reads until stream `id` has ended, or until `enough` says that what came so far will do.
    ///
    /// # Errors
    /// If nothing conclusive comes in time.
    pub async fn answer(&mut self, id: u32, enough: impl Fn(&Answer) -> bool) -> Result<Answer> {
        let mut answer = Answer::default();
        timeout(PATIENCE, self.read(id, &mut answer, enough))
            .await
            .with_context(|| format!("only {answer:?} came"))??;
        Ok(answer)
    }

    async fn read(&mut self, id: u32, answer: &mut Answer, enough: impl Fn(&Answer) -> bool) -> Result<()> {
        let mut header_block = Vec::new();
        loop {
            let mut head = [0_u8; 9];
            if self.stream.read_exact(&mut head).await.is_err() {
                answer.closed = true;
                return Ok(());
            }
            let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
            let (kind, flags) = (head[3], head[4]);
            let stream = u32::from_be_bytes([head[5] & 0x7F, head[6], head[7], head[8]]);
            let mut payload = vec![0_u8; usize::try_from(length)?];
            self.stream.read_exact(&mut payload).await?;
            match kind {
                // A peer that has closed may still be read from; that it takes no answer is no error.
                SETTINGS if flags & ACK == 0 => drop(self.frame(SETTINGS, ACK, 0, &[]).await),
                PING if flags & ACK == 0 => drop(self.frame(PING, ACK, 0, &payload).await),
                GOAWAY => {
                    answer.goaway =
                        payload.get(4..8).map(|code| u32::from_be_bytes([code[0], code[1], code[2], code[3]]))
                }
                RESET if stream == id => {
                    answer.reset =
                        payload.get(..4).map(|code| u32::from_be_bytes([code[0], code[1], code[2], code[3]]));
                    return Ok(());
                }
                DATA if stream == id => answer.data.extend_from_slice(&payload),
                HEADERS | CONTINUATION => {
                    header_block.extend_from_slice(&payload);
                    if flags & END_HEADERS != 0 {
                        // Other streams' headers have to be decoded as well: the table is shared.
                        let block = std::mem::take(&mut header_block);
                        let decoded = self.decoder.decode(&block);
                        let decoded = decoded.map_err(|error| anyhow::anyhow!("undecodable headers: {error:?}"))?;
                        if stream == id {
                            note(answer, &decoded);
                        }
                    }
                }
                _ => {}
            }
            let ended = stream == id && flags & END_STREAM != 0 && matches!(kind, DATA | HEADERS);
            if ended || enough(answer) {
                return Ok(());
            }
        }
    }
}

fn note(answer: &mut Answer, headers: &[(Vec<u8>, Vec<u8>)]) {
    for (name, value) in headers {
        let text = String::from_utf8_lossy(value).into_owned();
        match name.as_slice() {
            b":status" => answer.http = Some(text),
            b"grpc-status" => answer.grpc = text.parse().ok(),
            b"grpc-message" => answer.message = Some(decoded(&text)),
            _ => {}
        }
    }
}

fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        let hex: Option<u8> = match byte {
            b'%' => std::str::from_utf8(&[rest.next().unwrap_or(0), rest.next().unwrap_or(0)])
                .ok()
                .and_then(|digits| u8::from_str_radix(digits, 16).ok()),
            _ => None,
        };
        bytes.push(hex.unwrap_or(byte));
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Headers as literals without indexing and without Huffman coding (RFC 7541, 6.2.2).
fn block(headers: &[(&str, &[u8])]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in headers {
        block.push(0);
        for text in [name.as_bytes(), value] {
            integer(&mut block, text.len());
            block.extend_from_slice(text);
        }
    }
    block
}

/// An integer with a prefix of seven bits (RFC 7541, 5.1).
fn integer(block: &mut Vec<u8>, value: usize) {
    let Some(mut rest) = value.checked_sub(127) else {
        block.push(u8::try_from(value).unwrap_or(0));
        return;
    };
    block.push(127);
    while rest >= 128 {
        block.push(u8::try_from(rest % 128).unwrap_or(0) | 128);
        rest /= 128;
    }
    block.push(u8::try_from(rest).unwrap_or(0));
}

/// A gRPC message: not compressed, with its length in front.
#[must_use]
pub fn framed(message: &[u8]) -> Vec<u8> {
    let mut framed = vec![0];
    framed.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    framed.extend_from_slice(message);
    framed
}

/// Sends bytes that are no HTTP/2 and reads until the peer closes; the answer is what it sent.
///
/// # Errors
/// If the connection stays open.
pub async fn nonsense(socket: &Path, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket).await?;
    stream.write_all(bytes).await?;
    let mut answer = Vec::new();
    let read = timeout(PATIENCE, stream.read_to_end(&mut answer)).await;
    ensure!(read.is_ok(), "the connection stayed open");
    Ok(answer)
}
