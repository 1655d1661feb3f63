//! Reading HPACK (RFC 7541): what a client's header blocks say, and the state that says it.
//!
//! Only reading, and only what a server needs: nothing is ever written in compressed form. Every length is checked
//! against what is there before it is used, since all of it comes from strangers.

use std::borrow::Cow;
use std::collections::VecDeque;

/// The table size that a server grants by announcing nothing.
const TABLE_LIMIT: usize = 4096;

/// The block is not HPACK. The decoder must not be used any more: its state is not the client's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Malformed;

type Decoded<T> = Result<T, Malformed>;

/// A field of the dynamic table.
type Entry = (Box<[u8]>, Box<[u8]>);

/// One direction of one connection.
pub(super) struct Decoder {
    /// Newest first.
    table: VecDeque<Entry>,
    size: usize,
    limit: usize,
}

/// A part of a header block, from its front on.
struct Reader<'a>(&'a [u8]);

/// Name and value of a field that was written out; a name may stand in the table.
type Literal<'table, 'block> = (Cow<'table, [u8]>, Cow<'block, [u8]>);

impl<'a> Reader<'a> {
    fn byte(&mut self) -> Decoded<u8> {
        let (first, rest) = self.0.split_first().ok_or(Malformed)?;
        self.0 = rest;
        Ok(*first)
    }

    /// An integer whose first bits are the low `bits` of `first` (section 5.1). Four more bytes are enough for every
    /// length that fits into a block.
    fn integer(&mut self, first: u8, bits: u32) -> Decoded<usize> {
        let mask = (1_u32 << bits) - 1;
        let mut value = u32::from(first) & mask;
        if value < mask {
            return Ok(value as usize);
        }
        for shift in [0, 7, 14, 21] {
            let byte = self.byte()?;
            value += u32::from(byte & 127) << shift;
            if byte & 128 == 0 {
                return Ok(value as usize);
            }
        }
        Err(Malformed)
    }

    /// A text, Huffman coded or not (section 5.2).
    fn text(&mut self) -> Decoded<Cow<'a, [u8]>> {
        let first = self.byte()?;
        let length = self.integer(first, 7)?;
        let (text, rest) = self.0.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        if first & 128 == 0 { Ok(Cow::Borrowed(text)) } else { huffman(text).map(Cow::Owned) }
    }
}

impl Decoder {
    pub(super) fn new() -> Self {
        Self { table: VecDeque::new(), size: 0, limit: TABLE_LIMIT }
    }

    /// Reads one whole block and hands out its fields in order.
    pub(super) fn decode(&mut self, block: &[u8], mut field: impl FnMut(&[u8], &[u8])) -> Decoded<()> {
        let mut reader = Reader(block);
        let mut may_resize = true;
        while let Ok(first) = reader.byte() {
            if first & 128 != 0 {
                let (name, value) = self.field(reader.integer(first, 7)?)?;
                field(name, value);
            } else if first & 64 != 0 {
                let (name, value) = self.literal(&mut reader, first, 6)?;
                field(&name, &value);
                let entry: Entry = (name.into(), value.into());
                self.insert(entry);
            } else if first & 32 != 0 {
                // Only at the start of a block (section 4.2).
                let limit = reader.integer(first, 5)?;
                if !may_resize || limit > TABLE_LIMIT {
                    return Err(Malformed);
                }
                self.limit = limit;
                self.evict();
                continue;
            } else {
                let (name, value) = self.literal(&mut reader, first, 4)?;
                field(&name, &value);
            }
            may_resize = false;
        }
        Ok(())
    }

    fn literal<'table, 'block: 'table>(
        &'table self,
        reader: &mut Reader<'block>,
        first: u8,
        bits: u32,
    ) -> Decoded<Literal<'table, 'block>> {
        let name = match reader.integer(first, bits)? {
            0 => reader.text()?,
            index => Cow::Borrowed(self.field(index)?.0),
        };
        Ok((name, reader.text()?))
    }

    /// A field by its number: first the static table, from 1 on, then ours.
    fn field(&self, index: usize) -> Decoded<(&[u8], &[u8])> {
        let index = index.checked_sub(1).ok_or(Malformed)?;
        match STATIC.get(index) {
            Some((name, value)) => Ok((name.as_bytes(), value.as_bytes())),
            None => self.table.get(index - STATIC.len()).map(|(name, value)| (&**name, &**value)).ok_or(Malformed),
        }
    }

    fn insert(&mut self, entry: Entry) {
        self.size += size(&entry);
        self.table.push_front(entry);
        // One that is larger than the table empties it, itself included (section 4.4).
        self.evict();
    }

    fn evict(&mut self) {
        while self.size > self.limit
            && let Some(oldest) = self.table.pop_back()
        {
            self.size -= size(&oldest);
        }
    }
}

fn size((name, value): &Entry) -> usize {
    name.len() + value.len() + 32
}

/// The length of each symbol's code; the last is the end of the text, which is never sent (appendix B).
const LENGTHS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26, 30,
];
const SHORTEST: usize = 5;
const LONGEST: usize = 30;

/// The code is canonical: codes of one length follow each other in the order of their symbols. So it is known by how
/// many there are of each length.
struct Code {
    /// Symbols by length of code, then by value.
    symbols: [u16; 257],
    /// For each length, the first code above all of that length.
    above: [u32; LONGEST + 1],
    /// For each length, what to add to a code of that length to find its symbol.
    offset: [i64; LONGEST + 1],
}

const CODE: Code = code();

#[allow(clippy::indexing_slicing, reason = "evaluated when compiled, where a wrong index is an error")]
const fn code() -> Code {
    let mut code = Code { symbols: [0; 257], above: [0; LONGEST + 1], offset: [0; LONGEST + 1] };
    let (mut next, mut placed, mut length) = (0_u32, 0_usize, SHORTEST);
    while length <= LONGEST {
        code.offset[length] = placed as i64 - next as i64;
        let mut symbol = 0;
        while symbol < LENGTHS.len() {
            if LENGTHS[symbol] as usize == length {
                code.symbols[placed] = symbol as u16;
                placed += 1;
                next += 1;
            }
            symbol += 1;
        }
        code.above[length] = next;
        next <<= 1;
        length += 1;
    }
    code
}

/// Decodes a Huffman coded text (section 5.2).
fn huffman(coded: &[u8]) -> Decoded<Vec<u8>> {
    static TABLE: Code = CODE;
    let mut text = Vec::with_capacity(coded.len() * 8 / SHORTEST);
    // The bits not used up yet, at the high end.
    let (mut bits, mut have) = (0_u64, 0_usize);
    let mut bytes = coded.iter();
    loop {
        while have <= 56
            && let Some(byte) = bytes.next()
        {
            bits |= u64::from(*byte) << (56 - have);
            have += 8;
        }
        let found = (SHORTEST..=LONGEST.min(have)).find_map(|length| {
            let code = u32::try_from(bits >> (64 - length)).ok()?;
            (code < *TABLE.above.get(length)?).then_some((length, code))
        });
        let Some((length, code)) = found else {
            // What is left is padding: fewer than eight bits, all ones.
            let ones = have < 8 && bits.leading_ones() as usize >= have;
            return if ones { Ok(text) } else { Err(Malformed) };
        };
        let place = i64::from(code) + TABLE.offset.get(length).copied().ok_or(Malformed)?;
        let symbol = usize::try_from(place).ok().and_then(|place| TABLE.symbols.get(place)).ok_or(Malformed)?;
        text.push(u8::try_from(*symbol).map_err(|_| Malformed)?);
        bits <<= length;
        have -= length;
    }
}

/// The static table (appendix A).
const STATIC: [(&str, &str); 61] = [
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    (":status", "200"),
    (":status", "204"),
    (":status", "206"),
    (":status", "304"),
    (":status", "400"),
    (":status", "404"),
    (":status", "500"),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    ("accept-language", ""),
    ("accept-ranges", ""),
    ("accept", ""),
    ("access-control-allow-origin", ""),
    ("age", ""),
    ("allow", ""),
    ("authorization", ""),
    ("cache-control", ""),
    ("content-disposition", ""),
    ("content-encoding", ""),
    ("content-language", ""),
    ("content-length", ""),
    ("content-location", ""),
    ("content-range", ""),
    ("content-type", ""),
    ("cookie", ""),
    ("date", ""),
    ("etag", ""),
    ("expect", ""),
    ("expires", ""),
    ("from", ""),
    ("host", ""),
    ("if-match", ""),
    ("if-modified-since", ""),
    ("if-none-match", ""),
    ("if-range", ""),
    ("if-unmodified-since", ""),
    ("last-modified", ""),
    ("link", ""),
    ("location", ""),
    ("max-forwards", ""),
    ("proxy-authenticate", ""),
    ("proxy-authorization", ""),
    ("range", ""),
    ("referer", ""),
    ("refresh", ""),
    ("retry-after", ""),
    ("server", ""),
    ("set-cookie", ""),
    ("strict-transport-security", ""),
    ("transfer-encoding", ""),
    ("user-agent", ""),
    ("vary", ""),
    ("via", ""),
    ("www-authenticate", ""),
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fields(decoder: &mut Decoder, block: &[u8]) -> Decoded<Vec<(Vec<u8>, Vec<u8>)>> {
        let mut fields = Vec::new();
        decoder.decode(block, |name, value| fields.push((name.to_vec(), value.to_vec())))?;
        Ok(fields)
    }

    fn bytes(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(u8::is_ascii_hexdigit).collect();
        digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap()).collect()
    }

    fn text(fields: &[(Vec<u8>, Vec<u8>)]) -> Vec<String> {
        fields
            .iter()
            .map(|(name, value)| format!("{}: {}", String::from_utf8_lossy(name), String::from_utf8_lossy(value)))
            .collect()
    }

    /// RFC 7541, appendix C.4: requests with Huffman coding, on one connection.
    #[test]
    fn the_examples_of_the_standard() {
        let mut decoder = Decoder::new();
        let first = fields(&mut decoder, &bytes("828684418cf1e3c2e5f23a6ba0ab90f4ff")).unwrap();
        let common = [":method: GET", ":scheme: http", ":path: /", ":authority: www.example.com"];
        assert_eq!(text(&first), common);
        let second = fields(&mut decoder, &bytes("828684be5886a8eb10649cbf")).unwrap();
        assert_eq!(text(&second)[..4], common);
        assert_eq!(text(&second)[4], "cache-control: no-cache");
        let third = fields(&mut decoder, &bytes("828785bf408825a849e95ba97d7f8925a849e95bb8e8b4bf")).unwrap();
        let expected = [
            ":method: GET",
            ":scheme: https",
            ":path: /index.html",
            ":authority: www.example.com",
            "custom-key: custom-value",
        ];
        assert_eq!(text(&third), expected);
        assert_eq!((decoder.table.len(), decoder.size), (3, 164));
    }

    #[test]
    fn what_is_malformed() {
        for (what, block) in [
            ("entry 0", "80"),
            ("entry beyond the table", "be"),
            ("text beyond the block", "0001"),
            ("integer without end", "ffffffffffff"),
            ("integer of six bytes", "0f808080808000"),
            ("end of text inside a text", "00 84ffffffff 00"),
            ("padding of eight bits", "00 82 1fff 00"),
            ("padding of zeros", "00 81 18 00"),
            ("size above the limit", "3fe21f"),
            ("size after a field", "8220"),
        ] {
            assert_eq!(fields(&mut Decoder::new(), &bytes(block)), Err(Malformed), "{what}");
        }
        assert_eq!(fields(&mut Decoder::new(), &bytes("203fe11f82")).map(|fields| fields.len()), Ok(1));
    }

    #[test]
    fn an_entry_larger_than_the_table_empties_it() {
        let mut decoder = Decoder::new();
        fields(&mut decoder, &bytes("400161 0162")).unwrap();
        assert_eq!(decoder.table.len(), 1);
        let large = [&bytes("400161")[..], &[0x7f, 0x81, 0x1f], &[b'x'; 4096]].concat();
        assert_eq!(fields(&mut decoder, &large).unwrap()[0].1.len(), 4096);
        assert_eq!((decoder.table.len(), decoder.size), (0, 0));
        assert_eq!(fields(&mut decoder, &bytes("be")), Err(Malformed));
    }

    proptest! {
        /// Whatever another implementation encodes, over many blocks with one state.
        #[test]
        fn it_reads_what_others_write(
            lists in proptest::collection::vec(
                proptest::collection::vec(
                    (proptest::collection::vec(any::<u8>(), 0..30), proptest::collection::vec(any::<u8>(), 0..200)),
                    0..20,
                ),
                0..20,
            ),
        ) {
            let mut encoder = loona_hpack::Encoder::new();
            let mut decoder = Decoder::new();
            for list in lists {
                let block = encoder.encode(list.iter().map(|(name, value)| (&name[..], &value[..])));
                prop_assert_eq!(fields(&mut decoder, &block), Ok(list));
            }
        }

        /// Any bytes: no panic, and the same verdict and text as another decoder on a Huffman coded text.
        #[test]
        fn any_bytes(block in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = fields(&mut Decoder::new(), &block);
            let theirs = loona_hpack::huffman::HuffmanDecoder::new().decode(&block);
            prop_assert_eq!(huffman(&block).ok(), theirs.ok());
        }
    }
}
