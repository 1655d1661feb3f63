//! Entries written as protobuf straight from the state: what [`super::entry`] makes a message of, without the message.
//!
//! An agent that polls is given all its entries each time. As messages they were a dozen small texts each, allocated,
//! copied and thrown away.

use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use prost::encoding::{encode_varint, encoded_len_varint};
use spiffe::id::SpiffeId;
use spiffe_proto::types;

use super::{seconds, short};
use crate::state::model::Entry;

/// What an entry mostly needs, in bytes.
const USUAL: usize = 256;

/// Each entry as an encoded `spire.api.types.Entry`, with the fields of `mask`, or all; the id is always there.
pub fn entries(entries: &[Arc<Entry>], mask: Option<&types::EntryMask>) -> Vec<Bytes> {
    let mut writer = Writer(BytesMut::with_capacity(entries.len() * USUAL));
    let mut ends = Vec::with_capacity(entries.len());
    for entry in entries {
        writer.entry(entry, mask);
        ends.push(writer.0.len());
    }
    cut(writer.0.freeze(), &ends)
}

/// Each entry as an encoded `EntryRevision`.
pub fn revisions(entries: &[Arc<Entry>]) -> Vec<Bytes> {
    let mut writer = Writer(BytesMut::with_capacity(entries.len() * USUAL / 4));
    let mut ends = Vec::with_capacity(entries.len());
    for entry in entries {
        writer.text(1, &entry.id);
        writer.number(2, entry.revision);
        writer.number(3, seconds(entry.created_at));
        ends.push(writer.0.len());
    }
    cut(writer.0.freeze(), &ends)
}

/// The pieces of one buffer, which they share.
fn cut(all: Bytes, ends: &[usize]) -> Vec<Bytes> {
    let mut begin = 0;
    let piece = |end: &usize| {
        let piece = all.slice(begin..*end);
        begin = *end;
        piece
    };
    ends.iter().map(piece).collect()
}

const LENGTH_DELIMITED: u32 = 2;

/// Writes fields as proto3 does: a field that has its default is left out.
struct Writer(BytesMut);

impl Writer {
    fn entry(&mut self, entry: &Entry, mask: Option<&types::EntryMask>) {
        let wants = |field: fn(&types::EntryMask) -> bool| mask.is_none_or(field);
        self.text(1, &entry.id);
        if wants(|mask| mask.spiffe_id) {
            self.id(2, &entry.spiffe_id);
        }
        if wants(|mask| mask.parent_id) {
            self.id(3, &entry.parent_id);
        }
        if wants(|mask| mask.selectors) {
            for selector in &entry.selectors {
                self.pair(4, selector.kind(), selector.value());
            }
        }
        if wants(|mask| mask.x509_svid_ttl) {
            self.number(5, short(entry.x509_svid_ttl).into());
        }
        if wants(|mask| mask.federates_with) {
            entry.federates_with.iter().for_each(|domain| self.element(6, domain.as_str()));
        }
        if wants(|mask| mask.admin) {
            self.flag(7, entry.admin);
        }
        if wants(|mask| mask.downstream) {
            self.flag(8, entry.downstream);
        }
        if wants(|mask| mask.expires_at) {
            self.number(9, entry.expires_at.map_or(0, seconds));
        }
        if wants(|mask| mask.dns_names) {
            entry.dns_names.iter().for_each(|name| self.element(10, name));
        }
        if wants(|mask| mask.revision_number) {
            self.number(11, entry.revision);
        }
        if wants(|mask| mask.store_svid) {
            self.flag(12, entry.store_svid);
        }
        if wants(|mask| mask.jwt_svid_ttl) {
            self.number(13, short(entry.jwt_svid_ttl).into());
        }
        if wants(|mask| mask.hint) {
            self.text(14, &entry.hint);
        }
        if wants(|mask| mask.created_at) {
            self.number(15, seconds(entry.created_at));
        }
        let attributes = [entry.disable_x509_svid_prefetch, entry.jwt_svid_include_jti];
        let set = attributes.iter().filter(|attribute| **attribute).count();
        if set > 0 && wants(|mask| mask.additional_attributes) {
            self.key(16, LENGTH_DELIMITED);
            self.varint(2 * set as u64);
            self.flag(1, entry.disable_x509_svid_prefetch);
            self.flag(2, entry.jwt_svid_include_jti);
        }
    }

    fn id(&mut self, field: u32, id: &SpiffeId) {
        self.pair(field, id.trust_domain().as_str(), id.path());
    }

    /// A message whose fields 1 and 2 are texts.
    fn pair(&mut self, field: u32, first: &str, second: &str) {
        self.key(field, LENGTH_DELIMITED);
        self.varint(text_len(first) + text_len(second));
        self.text(1, first);
        self.text(2, second);
    }

    fn text(&mut self, field: u32, text: &str) {
        if !text.is_empty() {
            self.element(field, text);
        }
    }

    /// One of several texts, which may be empty.
    fn element(&mut self, field: u32, text: &str) {
        self.key(field, LENGTH_DELIMITED);
        self.varint(text.len() as u64);
        self.0.put_slice(text.as_bytes());
    }

    fn number(&mut self, field: u32, number: i64) {
        if number != 0 {
            self.key(field, 0);
            // Negative numbers are ten bytes long, as the format wants it.
            self.varint(number.cast_unsigned());
        }
    }

    fn flag(&mut self, field: u32, flag: bool) {
        self.number(field, flag.into());
    }

    fn key(&mut self, field: u32, kind: u32) {
        self.varint(u64::from(field << 3 | kind));
    }

    fn varint(&mut self, value: u64) {
        encode_varint(value, &mut self.0);
    }
}

/// What a text of a field below 16 takes; nothing if it is empty.
fn text_len(text: &str) -> u64 {
    if text.is_empty() { 0 } else { (1 + encoded_len_varint(text.len() as u64) + text.len()) as u64 }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;
    use prost::Message as _;
    use spiffe::id::TrustDomain;
    use spiffe::selector::{Selector, SelectorSet};
    use spiffe_proto::entry::EntryRevision;

    use super::*;

    fn id(path: &str) -> SpiffeId {
        SpiffeId::from_path(&TrustDomain::parse("example.org").unwrap(), path).unwrap()
    }

    fn texts() -> impl Strategy<Value = Vec<String>> {
        proptest::collection::vec("[a-z]{1,200}", 0..3)
    }

    fn moment() -> impl Strategy<Value = SystemTime> {
        (-5_000_000_000_i64..5_000_000_000).prop_map(crate::api::wire::time)
    }

    prop_compose! {
        fn entry()(
            number in any::<u64>(), path in "(/[a-z]{1,150}){0,3}", parent in "(/[a-z]{1,20}){1,2}",
            selectors in texts(), domains in texts(), dns_names in texts(), hint in "[a-z]{0,300}",
            ttl in proptest::option::of(any::<u64>()), revision in any::<i64>(), flags in any::<[bool; 6]>(),
            expires_at in proptest::option::of(moment()), created_at in moment(),
        ) -> Arc<Entry> {
            let ttl = ttl.map(Duration::from_secs);
            Arc::new(Entry {
                id: format!("entry-{number}").into(),
                ordinal: 1,
                revision,
                spiffe_id: id(&path),
                parent_id: id(&parent),
                selectors: selectors.iter().map(|value| Selector::new("unix", value).unwrap()).collect::<SelectorSet>(),
                x509_svid_ttl: ttl,
                jwt_svid_ttl: ttl.map(|ttl| ttl / 7),
                federates_with: domains.iter().map(|name| TrustDomain::parse(name).unwrap()).collect(),
                admin: flags[0],
                downstream: flags[1],
                expires_at,
                dns_names: dns_names.iter().map(|name| name.as_str().into()).collect(),
                store_svid: flags[2],
                hint: hint.as_str().into(),
                created_at,
                disable_x509_svid_prefetch: flags[3],
                jwt_svid_include_jti: flags[4],
                content: crate::state::model::Content::default(),
            })
        }
    }

    fn mask(bits: u32) -> types::EntryMask {
        let bit = |place: u32| bits & (1 << place) != 0;
        types::EntryMask {
            spiffe_id: bit(0),
            parent_id: bit(1),
            selectors: bit(2),
            x509_svid_ttl: bit(3),
            federates_with: bit(4),
            admin: bit(5),
            downstream: bit(6),
            expires_at: bit(7),
            dns_names: bit(8),
            revision_number: bit(9),
            store_svid: bit(10),
            jwt_svid_ttl: bit(11),
            hint: bit(12),
            created_at: bit(13),
            additional_attributes: bit(14),
        }
    }

    proptest! {
        /// Byte for byte what the message would be.
        #[test]
        fn entries_are_written_as_their_messages_are(
            held in proptest::collection::vec(entry(), 0..4), bits in proptest::option::of(0_u32..1 << 15),
        ) {
            let mask = bits.map(mask);
            let wanted: Vec<Vec<u8>> =
                held.iter().map(|entry| crate::api::wire::entry(entry, mask.as_ref()).encode_to_vec()).collect();
            prop_assert_eq!(entries(&held, mask.as_ref()), wanted);
            let revision = |entry: &Arc<Entry>| EntryRevision {
                id: entry.id.to_string(),
                revision_number: entry.revision,
                created_at: seconds(entry.created_at),
            };
            let wanted: Vec<Vec<u8>> = held.iter().map(|entry| revision(entry).encode_to_vec()).collect();
            prop_assert_eq!(revisions(&held), wanted);
        }
    }
}
