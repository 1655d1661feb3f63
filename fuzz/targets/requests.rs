//! Requests of the Workload API: the prefix and the message behind it, in pieces of any size.
#![no_main]

use bytes::Bytes;
use http::HeaderMap;
use http_body_util::StreamBody;
use http_body_util::combinators::UnsyncBoxBody;
use libfuzzer_sys::fuzz_target;
use signet_agent::api::message::read;
use spiffe_proto::workload::ValidateJwtsvidRequest;
use tonic::Status;
use tonic::body::Body;

fn body(data: &[u8], step: usize) -> Body {
    let pieces: Vec<Result<http_body::Frame<Bytes>, Status>> =
        data.chunks(step).map(|piece| Ok(http_body::Frame::data(Bytes::copy_from_slice(piece)))).collect();
    Body::new(UnsyncBoxBody::new(StreamBody::new(futures_util::stream::iter(pieces))))
}

fuzz_target!(|data: &[u8]| {
    let Some((step, data)) = data.split_first() else { return };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().expect("a runtime");
    let headers = HeaderMap::new();
    let message = |step| runtime.block_on(read::<ValidateJwtsvidRequest>(&headers, body(data, step), 256 * 1024));
    match (message(usize::MAX), message(usize::from(*step).max(1))) {
        (Ok(whole), Ok(pieces)) => assert_eq!(whole, pieces),
        (Err(whole), Err(pieces)) => assert_eq!(whole.code(), pieces.code()),
        (whole, pieces) => panic!("in one piece {whole:?}, in several {pieces:?}"),
    }
});
