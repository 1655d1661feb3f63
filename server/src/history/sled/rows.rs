//! How records and groups are laid out in sled's rows.
//!
//! sled puts a node that is above a quarter of a segment (128 KiB) into a file of its own, which neither it nor
//! we sync. A leaf has up to 20 rows, so a row has at most 5 KiB; what is larger is several rows.

use std::time::SystemTime;

use bytes::{Buf, BufMut, Bytes};

use super::super::group::{seconds_of, time_of};
use super::super::record::RecordError;
use super::super::{Group, HistoryId, Position, RecordKey, Write};

/// The largest value of a row, in bytes.
pub(super) const ROW_BYTES: usize = 5 * 1024;

/// The row of the head, in the tree `state`; no record's row begins with two zero bytes.
pub(super) const HEAD_KEY: &[u8] = &[0, 0];

const FORMAT: u8 = 1;

/// A row to be written, or removed.
pub(super) type Row = (Vec<u8>, Option<Vec<u8>>);

/// The key of a record's row: length of the record's key, the key, number of the row. The length keeps the rows of
/// one record together whatever bytes the keys have.
fn record_row_key(key: &RecordKey, row: u8) -> Vec<u8> {
    let bytes = key.to_bytes();
    let mut row_key = Vec::with_capacity(bytes.len() + 3);
    // Keys are far below 64 KiB: scope, kind and id are bounded where they are made.
    row_key.put_u16(u16::try_from(bytes.len()).unwrap_or(u16::MAX));
    row_key.put_slice(&bytes);
    row_key.put_u8(row);
    row_key
}

/// The record and row number that a row's key stands for.
pub(super) fn record_of_row(row_key: &[u8]) -> Result<(RecordKey, u8), RecordError> {
    let length = usize::from(row_key.first_chunk().map(|length| u16::from_be_bytes(*length)).ok_or(RecordError::Key)?);
    let key = row_key.get(2..2 + length).ok_or(RecordError::Key)?;
    let row = match row_key.get(2 + length..) {
        Some([row]) => *row,
        _ => return Err(RecordError::Key),
    };
    Ok((RecordKey::from_bytes(&Bytes::copy_from_slice(key))?, row))
}

/// The rows of one write. The first row of a value begins with the number of rows.
pub(super) fn record_rows(write: &Write) -> Vec<Row> {
    match write {
        Write::Put(record) => {
            let rows = record.value.len().div_ceil(ROW_BYTES - 1).max(1);
            let mut laid: Vec<Row> = Vec::with_capacity(rows);
            for (number, part) in (0u8..).zip(chunks_or_one(&record.value)) {
                let mut value = Vec::with_capacity(part.len() + 1);
                value.push(if number == 0 { u8::try_from(rows).unwrap_or(u8::MAX) } else { 0 });
                value.extend_from_slice(part);
                laid.push((record_row_key(&record.key, number), Some(value)));
            }
            laid
        }
        Write::Delete(key) => vec![(record_row_key(key, 0), None)],
    }
}

fn chunks_or_one(value: &[u8]) -> Box<dyn Iterator<Item = &[u8]> + '_> {
    if value.is_empty() { Box::new(std::iter::once(value)) } else { Box::new(value.chunks(ROW_BYTES - 1)) }
}

/// The rows that a record leaves behind when its first row, now gone or replaced, was `before`, and it has `now` rows.
pub(super) fn surplus_rows(key: &RecordKey, before: &[u8], now: usize) -> Vec<Vec<u8>> {
    let rows = before.first().copied().map_or(0, usize::from);
    (now.max(1)..rows).filter_map(|row| u8::try_from(row).ok()).map(|row| record_row_key(key, row)).collect()
}

/// The key of a row of a group in the tree `log`.
pub(super) fn log_key(revision: u64, row: u16) -> Vec<u8> {
    let mut key = Vec::with_capacity(10);
    key.put_u64(revision);
    key.put_u16(row);
    key
}

/// The revision and row number of a key in the tree `log`.
pub(super) fn of_log_key(key: &[u8]) -> Result<(u64, u16), RecordError> {
    match (key.first_chunk::<8>(), key.get(8..)) {
        (Some(revision), Some([high, low])) => Ok((u64::from_be_bytes(*revision), u16::from_be_bytes([*high, *low]))),
        _ => Err(RecordError::Key),
    }
}

/// What the first row of a group says before the group itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct LogHead {
    pub(super) digest: [u8; 32],
    pub(super) at: SystemTime,
    pub(super) length: usize,
    checksum: u32,
}

const LOG_HEAD_BYTES: usize = 1 + 32 + 8 + 4 + 4 + 4;

impl LogHead {
    pub(super) fn rows(&self) -> usize {
        (LOG_HEAD_BYTES + self.length).div_ceil(ROW_BYTES)
    }

    /// Reads a first row; the rest of it is the beginning of the group.
    pub(super) fn read(mut row: &[u8]) -> Result<(Self, &[u8]), RecordError> {
        if row.len() < LOG_HEAD_BYTES {
            return Err(RecordError::Checksum);
        }
        check_format(row.get_u8())?;
        let mut digest = [0; 32];
        row.copy_to_slice(&mut digest);
        let (seconds, nanoseconds) = (row.get_i64(), row.get_u32());
        let at = time_of(seconds, nanoseconds).ok_or(RecordError::Time)?;
        let length = usize::try_from(row.get_u32()).map_err(|_| RecordError::Checksum)?;
        let checksum = row.get_u32();
        Ok((Self { digest, at, length, checksum }, row))
    }

    /// The group whose bytes these are.
    pub(super) fn group(&self, encoded: Vec<u8>) -> Result<Group, RecordError> {
        if encoded.len() != self.length || crc32c::crc32c(&encoded) != self.checksum {
            return Err(RecordError::Checksum);
        }
        Group::decode(Bytes::from(encoded))
    }
}

/// The rows of a group in the tree `log`.
pub(super) fn log_rows(position: &Position, group: &Group) -> Vec<(Vec<u8>, Vec<u8>)> {
    let encoded = group.encoded();
    let mut bytes = Vec::with_capacity(LOG_HEAD_BYTES + encoded.len());
    let (seconds, nanoseconds) = seconds_of(group.at());
    bytes.put_u8(FORMAT);
    bytes.put_slice(&position.digest);
    bytes.put_i64(seconds);
    bytes.put_u32(nanoseconds);
    // At most 512 KiB, which the store has checked.
    bytes.put_u32(u32::try_from(encoded.len()).unwrap_or(u32::MAX));
    bytes.put_u32(crc32c::crc32c(encoded));
    bytes.put_slice(encoded);
    (0u16..).zip(bytes.chunks(ROW_BYTES)).map(|(row, part)| (log_key(position.revision, row), part.to_vec())).collect()
}

/// The value of the head's row.
pub(super) fn head_value(position: &Position) -> Vec<u8> {
    let mut value = Vec::with_capacity(61);
    value.put_u8(FORMAT);
    value.put_slice(&position.history.0);
    value.put_u64(position.revision);
    value.put_slice(&position.digest);
    value.put_u32(crc32c::crc32c(&value));
    value
}

/// The position that the head's row says.
pub(super) fn head_of(value: &[u8]) -> Result<Position, RecordError> {
    let (body, sum) = value.split_last_chunk::<4>().ok_or(RecordError::Checksum)?;
    if u32::from_be_bytes(*sum) != crc32c::crc32c(body) {
        return Err(RecordError::Checksum);
    }
    let mut body = body;
    if body.len() != 57 {
        return Err(RecordError::Checksum);
    }
    check_format(body.get_u8())?;
    let (mut history, mut digest) = ([0; 16], [0; 32]);
    body.copy_to_slice(&mut history);
    let revision = body.get_u64();
    body.copy_to_slice(&mut digest);
    Ok(Position { history: HistoryId(history), revision, digest })
}

fn check_format(found: u8) -> Result<(), RecordError> {
    if found > FORMAT { Err(RecordError::NewerLayout { found, known: FORMAT }) } else { Ok(()) }
}
