//! The content of a registration entry as 32 bytes: equal for equal entries, different for any others.

use std::fmt;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime};

use aws_lc_rs::digest::{Context, SHA256};
use spiffe::view::Digest;

use super::apply::FLOOR_STEP;
use super::model::Entry;

/// Keeps an entry's content once it has been asked for. A clone begins without one, because whoever clones an entry may
/// be about to change it.
#[derive(Default)]
pub struct Content(OnceLock<Digest>);

impl Clone for Content {
    fn clone(&self) -> Self {
        Self::default()
    }
}

/// It follows from the other fields.
impl PartialEq for Content {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}

impl Eq for Content {}

impl fmt::Debug for Content {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Content")
    }
}

impl Entry {
    /// SHA-256 over everything that is stored of the entry but its ordinal, which tells nothing about it and may be
    /// another one after a restore. Computed once.
    pub fn content(&self) -> &Digest {
        self.content.0.get_or_init(|| content_of(self))
    }
}

struct Encoder(Context);

impl Encoder {
    fn number(&mut self, number: u64) {
        self.0.update(&number.to_be_bytes());
    }

    /// With its length before it, so that no two sequences of texts share an encoding.
    fn text(&mut self, text: &str) {
        self.number(text.len() as u64);
        self.0.update(text.as_bytes());
    }

    fn texts<'t>(&mut self, texts: impl ExactSizeIterator<Item = &'t str>) {
        self.number(texts.len() as u64);
        texts.for_each(|text| self.text(text));
    }

    fn flag(&mut self, flag: bool) {
        self.0.update(&[u8::from(flag)]);
    }

    fn duration(&mut self, duration: Option<Duration>) {
        self.flag(duration.is_some());
        let duration = duration.unwrap_or_default();
        self.number(duration.as_secs());
        self.number(u64::from(duration.subsec_nanos()));
    }

    fn time(&mut self, time: Option<SystemTime>) {
        self.flag(time.is_some());
        let time = time.unwrap_or(SystemTime::UNIX_EPOCH);
        let (before, distance) = match time.duration_since(SystemTime::UNIX_EPOCH) {
            Ok(since) => (false, since),
            Err(error) => (true, error.duration()),
        };
        self.flag(before);
        self.duration(Some(distance));
    }
}

fn content_of(entry: &Entry) -> Digest {
    // Taken apart, so that a new field cannot be forgotten here.
    let Entry {
        id,
        ordinal: _,
        revision,
        spiffe_id,
        parent_id,
        selectors,
        x509_svid_ttl,
        jwt_svid_ttl,
        federates_with,
        admin,
        downstream,
        expires_at,
        dns_names,
        store_svid,
        hint,
        created_at,
        disable_x509_svid_prefetch,
        jwt_svid_include_jti,
        content: _,
    } = entry;
    let mut encoder = Encoder(Context::new(&SHA256));
    encoder.text("signet entry content 1");
    encoder.text(id);
    // As far as it counts updates: what a restore adds to it changes nothing of the entry.
    encoder.0.update(&(revision & (FLOOR_STEP - 1)).to_be_bytes());
    encoder.text(spiffe_id.as_str());
    encoder.text(parent_id.as_str());
    encoder.texts(selectors.iter().map(|selector| selector.as_str()));
    encoder.duration(*x509_svid_ttl);
    encoder.duration(*jwt_svid_ttl);
    encoder.texts(federates_with.iter().map(|trust_domain| trust_domain.as_str()));
    encoder.flag(*admin);
    encoder.flag(*downstream);
    encoder.time(*expires_at);
    encoder.texts(dns_names.iter().map(|name| &**name));
    encoder.flag(*store_svid);
    encoder.text(hint);
    encoder.time(Some(*created_at));
    encoder.flag(*disable_x509_svid_prefetch);
    encoder.flag(*jwt_svid_include_jti);
    let mut digest = [0; 32];
    for (to, from) in digest.iter_mut().zip(encoder.0.finish().as_ref()) {
        *to = *from;
    }
    digest
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use spiffe::id::{SpiffeId, TrustDomain};
    use spiffe::selector::{Selector, SelectorSet};

    use super::*;

    fn domain(name: &str) -> TrustDomain {
        TrustDomain::parse(name).unwrap()
    }

    fn set(values: &[&str]) -> SelectorSet {
        values.iter().map(|value| Selector::new("unix", value).unwrap()).collect()
    }

    fn entry() -> Entry {
        Entry {
            id: "one".into(),
            ordinal: 1,
            revision: 0,
            spiffe_id: SpiffeId::from_path(&domain("example.org"), "/a").unwrap(),
            parent_id: SpiffeId::from_path(&domain("example.org"), "/b").unwrap(),
            selectors: set(&["uid:1"]),
            x509_svid_ttl: None,
            jwt_svid_ttl: None,
            federates_with: Vec::new(),
            admin: false,
            downstream: false,
            expires_at: None,
            dns_names: Vec::new(),
            store_svid: false,
            hint: "".into(),
            created_at: SystemTime::UNIX_EPOCH + Duration::from_secs(1_700_000_000),
            disable_x509_svid_prefetch: false,
            jwt_svid_include_jti: false,
            content: Content::default(),
        }
    }

    #[test]
    fn every_field_counts_but_the_ordinal() {
        let changes: &[fn(&mut Entry)] = &[
            |entry| entry.id = "two".into(),
            |entry| entry.revision = 1,
            |entry| entry.spiffe_id = SpiffeId::from_path(&domain("example.org"), "/c").unwrap(),
            |entry| entry.parent_id = SpiffeId::from_path(&domain("example.org"), "/c").unwrap(),
            |entry| entry.selectors = set(&["uid:2"]),
            |entry| entry.selectors = set(&["uid:1", "uid:2"]),
            |entry| entry.x509_svid_ttl = Some(Duration::ZERO),
            |entry| entry.x509_svid_ttl = Some(Duration::from_secs(5)),
            |entry| entry.jwt_svid_ttl = Some(Duration::from_secs(5)),
            |entry| entry.federates_with = vec![domain("other.org")],
            |entry| entry.federates_with = vec![domain("other.org"), domain("third.org")],
            |entry| entry.federates_with = vec![domain("third.org"), domain("other.org")],
            |entry| entry.admin = true,
            |entry| entry.downstream = true,
            |entry| entry.expires_at = Some(SystemTime::UNIX_EPOCH),
            |entry| entry.expires_at = Some(SystemTime::UNIX_EPOCH + Duration::from_secs(9)),
            |entry| entry.expires_at = Some(SystemTime::UNIX_EPOCH - Duration::from_secs(9)),
            |entry| entry.dns_names = vec!["a".into(), "bc".into()],
            |entry| entry.dns_names = vec!["ab".into(), "c".into()],
            |entry| entry.store_svid = true,
            |entry| entry.hint = "hint".into(),
            |entry| entry.created_at += Duration::from_secs(1),
            |entry| entry.disable_x509_svid_prefetch = true,
            |entry| entry.jwt_svid_include_jti = true,
        ];
        let mut seen = HashSet::from([*entry().content()]);
        for (number, change) in changes.iter().enumerate() {
            let mut changed = entry();
            change(&mut changed);
            assert!(seen.insert(*changed.content()), "change {number}");
        }
        assert_eq!(Entry { ordinal: 2, ..entry() }.content(), entry().content());
    }

    #[test]
    fn a_clone_that_is_changed_has_another_content() {
        let one = entry();
        let before = *one.content();
        let mut two = one.clone();
        two.hint = "other".into();
        assert_ne!(*two.content(), before);
        assert_eq!(*one.clone().content(), before);
        assert_eq!(one, Entry { content: Content::default(), ..one.clone() });
    }
}
