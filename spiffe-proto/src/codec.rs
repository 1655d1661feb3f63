//! Protobuf messages on gRPC streams, with buffers of the size that messages have.

use std::fmt;
use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstDecoder, ProstEncoder};

/// What a message gets before it asks for more, in bytes. Most are smaller; and every open stream has a buffer of this
/// size in each direction, also while it is silent.
const BUFFER: usize = 1024;
/// How much a stream encodes before it lets others go on, in bytes; as everywhere in gRPC for Rust.
const YIELD: usize = 32 * 1024;

/// The codec of all generated clients and servers.
pub struct Protobuf<T, U> {
    messages: PhantomData<(T, U)>,
}

impl<T, U> Default for Protobuf<T, U> {
    fn default() -> Self {
        Self { messages: PhantomData }
    }
}

impl<T, U> fmt::Debug for Protobuf<T, U> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Protobuf")
    }
}

impl<T, U> Codec for Protobuf<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstEncoder::new(BufferSettings::new(BUFFER, YIELD))
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstDecoder::new(BufferSettings::new(BUFFER, YIELD))
    }
}
