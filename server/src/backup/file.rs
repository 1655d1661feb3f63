//! The file, frame by frame.

use std::io::{Read, Write};

use aws_lc_rs::digest::{Context, SHA256};
use prost::Message as _;
use spiffe::id::TrustDomain;
use zeroize::Zeroizing;

use super::{BackupError, Head, Kind, MOST_FRAME, Page};
use crate::history::record::RecordError;
use crate::history::{HistoryId, Loader, OpenError, Position, Record, RecordKey, StoreError};
use crate::state::State;

const MAGIC: &[u8] = b"signet backup 1\n";

/// Writes a backup.
pub struct Writer<W> {
    to: W,
    sum: Context,
}

impl<W: Write> Writer<W> {
    /// Begins a backup in `to`.
    ///
    /// # Errors
    /// [`BackupError::File`].
    pub fn new(to: W) -> Result<Self, BackupError> {
        let mut writer = Self { to, sum: Context::new(&SHA256) };
        writer.put(MAGIC)?;
        Ok(writer)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), BackupError> {
        self.sum.update(bytes);
        self.to.write_all(bytes).map_err(BackupError::File)
    }

    /// Adds a frame.
    ///
    /// # Errors
    /// [`BackupError::File`].
    pub fn frame(&mut self, kind: u8, payload: &[u8]) -> Result<(), BackupError> {
        let length = u32::try_from(payload.len()).map_err(|_| BackupError::Frame { at: 0 })?;
        self.put(&[kind])?;
        self.put(&length.to_be_bytes())?;
        self.put(payload)
    }

    /// Ends the backup and gives back where it went.
    ///
    /// # Errors
    /// [`BackupError::File`].
    pub fn finish(mut self) -> Result<W, BackupError> {
        let sum = self.sum.clone().finish();
        self.frame(Kind::End as u8, sum.as_ref())?;
        self.to.flush().map_err(BackupError::File)?;
        Ok(self.to)
    }
}

/// What a backup holds.
pub struct Contents {
    /// What it is of.
    pub head: Head,
    /// The state, at the position of the backup.
    pub state: State,
    /// The key file, if it is in it.
    pub keys: Option<Zeroizing<Vec<u8>>>,
}

struct Frames<R> {
    from: R,
    sum: Context,
    at: u64,
}

impl<R: Read> Frames<R> {
    fn take(&mut self, length: usize) -> Result<Zeroizing<Vec<u8>>, BackupError> {
        let mut bytes = Zeroizing::new(vec![0; length]);
        self.from.read_exact(&mut bytes).map_err(|error| match error.kind() {
            std::io::ErrorKind::UnexpectedEof => BackupError::Cut,
            _ => BackupError::File(error),
        })?;
        self.at += u64::try_from(length).unwrap_or_default();
        Ok(bytes)
    }

    fn next(&mut self) -> Result<(u8, Zeroizing<Vec<u8>>), BackupError> {
        let at = self.at;
        let head = self.take(5)?;
        let [kind, length @ ..] = *head.first_chunk::<5>().ok_or(BackupError::Frame { at })?;
        let length = usize::try_from(u32::from_be_bytes(length)).unwrap_or(usize::MAX);
        if length > MOST_FRAME {
            return Err(BackupError::Frame { at });
        }
        let payload = self.take(length)?;
        if kind != Kind::End as u8 {
            self.sum.update(&head);
            self.sum.update(&payload);
        }
        Ok((kind, payload))
    }
}

/// Reads a backup whole: its checksum, and each record as the store reads it.
///
/// # Errors
/// If anything of it is not as it was written.
pub fn read(from: impl Read) -> Result<Contents, BackupError> {
    let mut frames = Frames { from, sum: Context::new(&SHA256), at: 0 };
    let magic = frames.take(MAGIC.len()).map_err(|_| BackupError::Form)?;
    if **magic != *MAGIC {
        return Err(BackupError::Form);
    }
    frames.sum.update(MAGIC);
    let at = frames.at;
    let head = match frames.next()? {
        (kind, payload) if kind == Kind::Head as u8 => {
            Head::decode(&payload[..]).map_err(|_| BackupError::Frame { at })?
        }
        _ => return Err(BackupError::Frame { at }),
    };
    let mut loader = Loader::new(trust_domain(&head)?, position(&head).ok_or(BackupError::Frame { at })?);
    let mut keys = None;
    loop {
        let at = frames.at;
        let (kind, payload) = frames.next()?;
        if kind == Kind::Records as u8 && keys.is_none() {
            let page = Page::decode(&payload[..]).map_err(|_| BackupError::Frame { at })?;
            for stored in page.records {
                let record = Record { key: RecordKey::from_bytes(&stored.key)?, value: stored.value };
                loader.take(&record).map_err(BackupError::State)?;
            }
        } else if kind == Kind::Keys as u8 && keys.is_none() {
            keys = Some(payload);
        } else if kind == Kind::End as u8 {
            let sum = frames.sum.clone().finish();
            if payload[..] != *sum.as_ref() {
                return Err(BackupError::Checksum);
            }
            break;
        } else {
            return Err(BackupError::Frame { at });
        }
    }
    if frames.from.read(&mut [0]).map_err(BackupError::File)? != 0 {
        return Err(BackupError::Cut);
    }
    let state = loader.finish().map_err(BackupError::State)?;
    Ok(Contents { head, state, keys })
}

fn trust_domain(head: &Head) -> Result<TrustDomain, BackupError> {
    TrustDomain::parse(&head.trust_domain).map_err(|error| BackupError::Record(RecordError::Id(error)))
}

fn position(head: &Head) -> Option<Position> {
    Some(Position {
        history: HistoryId(head.history.as_ref().try_into().ok()?),
        revision: head.revision,
        digest: head.digest.as_ref().try_into().ok()?,
    })
}

impl From<StoreError> for BackupError {
    fn from(error: StoreError) -> Self {
        Self::State(OpenError::Store(error))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::{Duration, SystemTime};

    use proptest::prelude::*;
    use spiffe::bundle::X509Authority;
    use spiffe::selector::SelectorSet;
    use spiffe::x509::Serial;

    use super::super::{changes_of, head_of, pages};
    use super::*;
    use crate::state::model::{Agent, Change, JoinToken, Part, Standing};

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn state(agents: u64) -> State {
        let trust_domain = TrustDomain::parse("example.org").unwrap();
        let start = Position { history: HistoryId([1; 16]), revision: 7, digest: [3; 32] };
        let mut state = State::empty(trust_domain.clone(), start);
        let authority = X509Authority { der: bytes::Bytes::from_static(b"root"), tainted: false };
        let token = JoinToken { hash: [1; 32], expires_at: at(9), alias: None };
        let mut changes = vec![
            Change::PutBundleInfo { trust_domain: trust_domain.clone(), sequence: 4, refresh_hint: None },
            Change::PutX509Authority { trust_domain, authority },
            Change::PutToken(token),
        ];
        for number in 0..agents {
            changes.push(Change::PutAgent(Arc::new(Agent {
                id: format!("spiffe://example.org/spire/agent/join_token/{number}").parse().unwrap(),
                ordinal: 100 + number,
                attestation_type: "join_token".into(),
                selectors: SelectorSet::empty(),
                standing: Standing::Active { serial: Serial::from(5), expires_at: at(50), pending: Vec::new() },
                expires_at: at(50),
                can_reattest: false,
                version: "".into(),
                history: Some(HistoryId([1; 16])),
            })));
        }
        state.apply(&Part::new(changes)).unwrap();
        state
    }

    fn written(state: &State, keys: Option<&[u8]>) -> Vec<u8> {
        let mut writer = Writer::new(Vec::new()).unwrap();
        writer.frame(Kind::Head as u8, &head_of(state, at(1000)).encode_to_vec()).unwrap();
        for page in pages(state, at(1000)) {
            writer.frame(Kind::Records as u8, &page.encode_to_vec()).unwrap();
        }
        if let Some(keys) = keys {
            writer.frame(Kind::Keys as u8, keys).unwrap();
        }
        writer.finish().unwrap()
    }

    #[test]
    fn what_was_written_is_read_without_tokens() {
        let state = state(5000);
        let file = written(&state, Some(b"{}"));
        let contents = read(&file[..]).unwrap();
        assert_eq!(contents.head.taken_at, 1000);
        assert_eq!(contents.state.position(), state.position());
        assert_eq!(contents.state.next_ordinal(), state.next_ordinal());
        assert!(changes_of(&contents.state).eq(changes_of(&state)));
        assert_eq!(contents.state.tokens().count(), 0);
        assert_eq!(contents.keys.as_deref().map(|keys| keys.to_vec()), Some(b"{}".to_vec()));
        assert!(read(&written(&state, None)[..]).unwrap().keys.is_none());
    }

    #[test]
    fn another_file_is_told_apart() {
        assert!(matches!(read(&b""[..]), Err(BackupError::Form)));
        assert!(matches!(read(&b"signet backup 2\n"[..]), Err(BackupError::Form)));
        let mut file = written(&state(1), None);
        file.push(0);
        assert!(matches!(read(&file[..]), Err(BackupError::Cut)));
    }

    proptest! {
        #[test]
        fn no_damage_goes_unnoticed(place: prop::sample::Index, bit in 0_u8..8, cut: prop::sample::Index) {
            let file = written(&state(3), Some(b"{\"keys\": {}}"));
            let mut damaged = file.clone();
            damaged[place.index(file.len())] ^= 1 << bit;
            prop_assert!(read(&damaged[..]).is_err());
            prop_assert!(read(&file[..cut.index(file.len())]).is_err());
        }

        #[test]
        fn whatever_comes_is_answered(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
            let _ = read(&[MAGIC, &bytes[..]].concat()[..]);
        }
    }
}
