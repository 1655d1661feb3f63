use loona_hpack::Encoder;
use proptest::prelude::*;

use super::*;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    write_head(&mut bytes, payload.len(), kind, flags, stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

fn request(authority: Option<&[u8]>) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut fields = vec![(b":method".to_vec(), b"POST".to_vec()), (b":scheme".to_vec(), b"http".to_vec())];
    fields.push((b":path".to_vec(), b"/a/b".to_vec()));
    fields.extend(authority.map(|value| (b":authority".to_vec(), value.to_vec())));
    fields.push((b"workload.spiffe.io".to_vec(), b"true".to_vec()));
    fields
}

fn encode(encoder: &mut Encoder<'_>, fields: &[(Vec<u8>, Vec<u8>)]) -> Vec<u8> {
    encoder.encode(fields.iter().map(|(name, value)| (&name[..], &value[..])))
}

/// The frames behind the preface: kind, flags, stream, payload.
fn frames(mut bytes: &[u8]) -> Vec<(u8, u8, u32, Vec<u8>)> {
    bytes = bytes.strip_prefix(PREFACE).unwrap();
    let mut frames = Vec::new();
    while !bytes.is_empty() {
        let length = u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize;
        let stream = u32::from_be_bytes(bytes[5..9].try_into().unwrap());
        frames.push((bytes[3], bytes[4], stream, bytes[9..9 + length].to_vec()));
        bytes = &bytes[9 + length..];
    }
    frames
}

/// The header lists in order, decoded by a decoder that is new for each: no state may be needed.
fn lists(bytes: &[u8]) -> Vec<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut lists = Vec::new();
    let mut block = Vec::new();
    for (kind, flags, _, payload) in frames(bytes) {
        if kind == HEADERS || kind == CONTINUATION {
            assert_eq!(flags & (PADDED | PRIORITY), 0);
            block.extend(payload);
            if flags & END_HEADERS != 0 {
                lists.push(loona_hpack::Decoder::new().decode(&block).unwrap());
                block.clear();
            }
        }
    }
    lists
}

fn authority_of(list: &[(Vec<u8>, Vec<u8>)]) -> Option<&[u8]> {
    list.iter().find(|(name, _)| name == b":authority").map(|(_, value)| &value[..])
}

#[test]
fn h_66_every_authority_becomes_one_that_parses() {
    for (sent, seen) in [
        (Some(&b"localhost"[..]), Some(&b"localhost"[..])),
        (Some(b"%2Frun%2Fagent.sock"), Some(b"localhost")),
        (Some(b"/run/agent.sock"), Some(b"localhost")),
        (Some(b""), Some(b"localhost")),
        (Some(b"a b"), Some(b"localhost")),
        (Some(b"example.org:443"), Some(b"example.org:443")),
        (None, None),
    ] {
        let mut encoder = Encoder::new();
        let mut bytes = PREFACE.to_vec();
        for stream in [1, 3] {
            let block = encode(&mut encoder, &request(sent));
            bytes.extend(frame(HEADERS, END_HEADERS, stream, &block));
            bytes.extend(frame(0, END_STREAM, stream, b"\0\0\0\0\0"));
        }
        for step in [1, 7, 10_000] {
            let out = filtered(&bytes, step).unwrap();
            let lists = lists(&out);
            assert_eq!(lists.len(), 2);
            for list in lists {
                assert_eq!(authority_of(&list), seen);
                assert_eq!(list.last().unwrap(), &(b"workload.spiffe.io".to_vec(), b"true".to_vec()));
            }
            let data = frames(&out).into_iter().filter(|(kind, ..)| *kind == 0).count();
            assert_eq!(data, 2);
        }
    }
}

#[test]
fn padding_priority_and_continuations_are_put_straight() {
    let block = encode(&mut Encoder::new(), &request(Some(b"/x")));
    let (first, rest) = block.split_at(5);
    let mut payload = vec![3, 0, 0, 0, 0, 16];
    payload.extend_from_slice(first);
    payload.extend_from_slice(&[0; 3]);
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(HEADERS, PADDED | PRIORITY | END_STREAM, 1, &payload));
    for part in rest.chunks(5) {
        bytes.extend(frame(CONTINUATION, 0, 1, part));
    }
    bytes.extend(frame(CONTINUATION, END_HEADERS, 1, b""));
    let out = filtered(&bytes, 3).unwrap();
    let [(HEADERS, flags, 1, _)] = &frames(&out)[..] else { panic!("{:?}", frames(&out)) };
    assert_eq!(*flags, END_STREAM | END_HEADERS);
    assert_eq!(authority_of(&lists(&out)[0]), Some(&b"localhost"[..]));
}

#[test]
fn what_is_no_http_2_passes() {
    for bytes in [&b"GET / HTTP/1.1\r\n\r\n"[..], b"\x16\x03\x01\x02\0\x01", b"PRI * HTTP/2.0\r\n\r\nSX\r\n\r\n____"] {
        assert_eq!(filtered(bytes, 4).unwrap(), bytes);
    }
}

#[test]
fn undecodable_blocks_are_left_to_the_stack() {
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(HEADERS, END_HEADERS, 1, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff]));
    assert_eq!(frames(&filtered(&bytes, 9).unwrap()), [(HEADERS, END_HEADERS, 1, vec![0x80])]);
}

#[test]
fn a_list_over_the_limit_is_cut_so_that_only_its_stream_is_refused() {
    let mut fields = request(None);
    fields.extend((0..10_000).map(|n| (format!("k{n}").into_bytes(), b"v".to_vec())));
    let block = encode(&mut Encoder::new(), &fields);
    let mut bytes = PREFACE.to_vec();
    let (first, rest) = block.split_at(FRAME_LIMIT);
    bytes.extend(frame(HEADERS, END_STREAM, 1, first));
    for part in rest.chunks(FRAME_LIMIT) {
        bytes.extend(frame(CONTINUATION, 0, 1, part));
    }
    bytes.extend(frame(CONTINUATION, END_HEADERS, 1, b""));
    let out = filtered(&bytes, 8192).unwrap();
    assert_eq!(frames(&out).len(), 1);
    let list = lists(&out).remove(0);
    let size: usize = list.iter().map(|(name, value)| name.len() + value.len() + 32).sum();
    assert!(size > HEADER_LIST_LIMIT && size < 3 * HEADER_LIST_LIMIT, "{size}");
}

#[test]
fn what_makes_no_sense_inside_a_block_ends_the_connection() {
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(HEADERS, 0, 1, b"\x82"));
    bytes.extend(frame(0, 0, 1, b"x"));
    assert_eq!(filtered(&bytes, 100).unwrap_err().kind(), io::ErrorKind::InvalidData);
    let mut endless = PREFACE.to_vec();
    endless.extend(frame(HEADERS, 0, 1, b"\x82"));
    for _ in 0..=BLOCK_LIMIT / FRAME_LIMIT {
        endless.extend(frame(CONTINUATION, 0, 1, &[0x82; FRAME_LIMIT]));
    }
    assert_eq!(filtered(&endless, 100_000).unwrap_err().kind(), io::ErrorKind::InvalidData);
}

#[test]
fn frames_that_bring_nothing_to_a_block_are_counted() {
    let with = |empty: usize| {
        let mut bytes = PREFACE.to_vec();
        bytes.extend(frame(HEADERS, 0, 1, b"\x82"));
        (0..empty).for_each(|_| bytes.extend(frame(CONTINUATION, 0, 1, b"")));
        bytes.extend(frame(CONTINUATION, END_HEADERS, 1, b""));
        filtered(&bytes, 8192).map(|out| lists(&out).len()).map_err(|error| error.kind())
    };
    assert_eq!(with(100), Ok(1));
    assert_eq!(with(BLOCK_LIMIT / 9), Err(io::ErrorKind::InvalidData));
}

#[test]
fn a_bomb_of_references_stays_small() {
    let mut block = vec![0x40, 1, b'b', 0x7f, 0xa1, 0x1e];
    block.extend(vec![b'x'; 4000]);
    block.extend(vec![0xbe; FRAME_LIMIT - block.len()]);
    let mut bytes = PREFACE.to_vec();
    bytes.extend(frame(HEADERS, END_HEADERS, 1, &block));
    assert!(filtered(&bytes, 1 << 20).unwrap().len() < 3 * HEADER_LIST_LIMIT);
}

#[test]
fn lengths_are_written_as_the_standard_says() {
    for (length, expected) in
        [(0, &[0][..]), (126, &[126]), (127, &[127, 0]), (255, &[127, 128, 1]), (16384, &[127, 129, 127])]
    {
        let mut out = Vec::new();
        write_length(&mut out, length);
        assert_eq!(out, expected, "{length}");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(tail in proptest::collection::vec(any::<u8>(), 0..400), step in 1..40_usize) {
        let bytes = [&PREFACE[..], &tail].concat();
        let _ = filtered(&bytes, step);
    }

    #[test]
    fn pieces_make_no_difference(
        blocks in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 0..6),
        step in 1..40_usize,
    ) {
        let mut bytes = PREFACE.to_vec();
        for (number, block) in (0_u32..).zip(&blocks) {
            bytes.extend(frame(HEADERS, END_HEADERS, 2 * number + 1, block));
        }
        prop_assert_eq!(filtered(&bytes, step).ok(), filtered(&bytes, usize::MAX).ok());
    }
}
