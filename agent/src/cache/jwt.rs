//! JWT-SVIDs that were fetched and may be handed out again.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use futures_util::future::{BoxFuture, FutureExt as _, Shared, WeakShared};
use spiffe::bundle::Bundle;
use spiffe::id::SpiffeId;
use spiffe::renew::Validity;
use spiffe::verify::LEEWAY;
use zeroize::Zeroizing;

use super::IssueError;
use super::desired::{Entry, EntryId};

/// How long no successor of a token is asked for after one that is not valid by this clock; doubles up to the second.
const PUT_OFF: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// A JWT-SVID in memory. Its text is a bearer secret: wiped when dropped, shown by no `Debug`.
pub struct JwtSvid {
    /// The entry it was signed for.
    pub entry_id: EntryId,
    /// Its subject.
    pub id: SpiffeId,
    /// The token in its compact form.
    pub token: Zeroizing<String>,
    /// What the entry's author calls this identity; may be empty.
    pub hint: Arc<str>,
    /// When it was signed.
    pub issued_at: SystemTime,
    /// From when on it is worthless.
    pub expires_at: SystemTime,
}

impl std::fmt::Debug for JwtSvid {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("JwtSvid").field("id", &self.id).field("expires_at", &self.expires_at).finish_non_exhaustive()
    }
}

impl JwtSvid {
    /// When it is valid. Only its end is looked at by everybody; a time of issue that is too far ahead is that of a wrong
    /// clock, by which the end is wrong as well.
    pub(super) fn validity(&self) -> Validity {
        Validity {
            not_before: self.issued_at.checked_sub(LEEWAY).unwrap_or(self.issued_at),
            not_after: self.expires_at,
        }
    }
}

/// What a token was asked for: an entry and a set of audiences.
#[derive(Clone, PartialEq, Eq, Hash)]
pub(super) struct Key {
    entry: EntryId,
    audience: Arc<[String]>,
}

impl Key {
    /// The order and repetition of audiences makes no difference.
    pub(super) fn new(entry: EntryId, audience: &[String]) -> Self {
        let mut audience = audience.to_vec();
        audience.sort_unstable();
        audience.dedup();
        Self { entry, audience: audience.into() }
    }
}

/// What a request for a token gave, for everybody who waited.
pub(super) type Outcome = Result<Arc<JwtSvid>, Arc<IssueError>>;

/// A request for a token, to be waited for by any number. It ends when nobody does.
pub(super) type Request = Shared<BoxFuture<'static, Outcome>>;

/// At most `limit` tokens, the least recently used of which goes first; and the requests under way.
pub(super) struct JwtCache {
    limit: usize,
    tick: u64,
    tokens: HashMap<Key, Cached>,
    by_use: BTreeMap<u64, Key>,
    requests: HashMap<Key, UnderWay>,
    last_request: u64,
}

struct UnderWay {
    number: u64,
    // The form of the entry that it was made for.
    entry: Arc<Entry>,
    request: WeakShared<BoxFuture<'static, Outcome>>,
}

struct Cached {
    svid: Arc<JwtSvid>,
    renew_at: SystemTime,
    // Before when, by the boot clock, no other is asked for, and how long that wait was.
    put_off: Option<(Duration, Duration)>,
    key_id: Option<String>,
    used: u64,
}

/// What the cache has for a request.
pub(super) enum Found {
    /// Hand it out.
    Fresh(Arc<JwtSvid>),
    /// Ask for a new one; if that cannot be had, hand this out.
    Ageing(Arc<JwtSvid>),
    /// Nothing of use.
    Nothing,
}

impl JwtCache {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            tick: 0,
            tokens: HashMap::new(),
            by_use: BTreeMap::new(),
            requests: HashMap::new(),
            last_request: 0,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.tokens.len()
    }

    /// What is held for `key` and valid at `now`. What is not stays, until it is the least recently used or has a
    /// successor: the clock may be wrong.
    pub(super) fn find(&mut self, key: &Key, now: SystemTime, boot: Duration) -> Found {
        let Some(cached) = self.tokens.get_mut(key).filter(|cached| cached.svid.validity().holds(now)) else {
            return Found::Nothing;
        };
        self.tick += 1;
        self.by_use.remove(&cached.used);
        cached.used = self.tick;
        self.by_use.insert(self.tick, key.clone());
        let svid = Arc::clone(&cached.svid);
        let put_off = cached.put_off.is_some_and(|(until, _)| boot < until);
        if now < cached.renew_at || put_off { Found::Fresh(svid) } else { Found::Ageing(svid) }
    }

    /// What is held for `key`, valid or not.
    pub(super) fn held(&self, key: &Key) -> Option<&Arc<JwtSvid>> {
        self.tokens.get(key).map(|cached| &cached.svid)
    }

    /// Asks for no successor of what is held for a while, each time for twice as long.
    pub(super) fn put_off(&mut self, key: &Key, boot: Duration) {
        if let Some(cached) = self.tokens.get_mut(key) {
            let wait = cached.put_off.map_or(PUT_OFF.0, |(_, last)| (last * 2).min(PUT_OFF.1));
            cached.put_off = Some((boot + wait, wait));
        }
    }

    pub(super) fn insert(&mut self, key: Key, svid: Arc<JwtSvid>, renew_at: SystemTime) {
        if self.limit == 0 {
            return;
        }
        self.remove(&key);
        while self.tokens.len() >= self.limit {
            let Some((_, oldest)) = self.by_use.pop_first() else { break };
            self.tokens.remove(&oldest);
        }
        self.tick += 1;
        self.by_use.insert(self.tick, key.clone());
        let key_id = key_id(&svid.token);
        self.tokens.insert(key, Cached { svid, renew_at, put_off: None, key_id, used: self.tick });
    }

    /// The request under way for `key` on behalf of exactly this form of the entry, or else the one that `begin` makes
    /// with its number. Whoever made it calls [`JwtCache::ended`] in the end.
    pub(super) fn join(
        &mut self,
        key: &Key,
        entry: &Arc<Entry>,
        begin: impl FnOnce(u64) -> BoxFuture<'static, Outcome>,
    ) -> Request {
        let under_way = self.requests.get(key).filter(|under_way| under_way.entry == *entry);
        if let Some(request) = under_way.and_then(|under_way| under_way.request.upgrade()) {
            return request;
        }
        self.last_request += 1;
        let number = self.last_request;
        let request = begin(number).shared();
        if let Some(weak) = request.downgrade() {
            self.requests.insert(key.clone(), UnderWay { number, entry: Arc::clone(entry), request: weak });
        }
        request
    }

    /// Takes request `number` off the list, unless another has taken its place.
    pub(super) fn ended(&mut self, key: &Key, number: u64) {
        if self.requests.get(key).is_some_and(|under_way| under_way.number == number) {
            self.requests.remove(key);
        }
    }

    /// How many requests are under way.
    #[cfg(test)]
    pub(super) fn requests(&self) -> usize {
        self.requests.len()
    }

    fn remove(&mut self, key: &Key) {
        if let Some(cached) = self.tokens.remove(key) {
            self.by_use.remove(&cached.used);
        }
    }

    /// Drops the tokens of an entry that changed or went away.
    pub(super) fn forget_entry(&mut self, entry: &EntryId) {
        self.retain(|key, _| key.entry != *entry);
    }

    /// Drops the tokens whose signing key the bundle no longer stands for.
    pub(super) fn judge(&mut self, own: &Bundle) {
        self.retain(|_, cached| {
            cached.key_id.as_ref().is_some_and(|key_id| {
                own.jwt.iter().any(|authority| *authority.key_id == **key_id && !authority.tainted)
            })
        });
    }

    fn retain(&mut self, keep: impl Fn(&Key, &Cached) -> bool) {
        let by_use = &mut self.by_use;
        self.tokens.retain(|key, cached| {
            let keeps = keep(key, cached);
            if !keeps {
                by_use.remove(&cached.used);
            }
            keeps
        });
    }
}

/// The `kid` of a token's header, without any check of the token.
fn key_id(token: &str) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Header {
        kid: Option<String>,
    }
    let (header, _) = token.split_once('.')?;
    let header = URL_SAFE_NO_PAD.decode(header).ok()?;
    spiffe::from_object::<Header>(&header, "a token's header").ok()?.kid
}

#[cfg(test)]
mod tests {
    use spiffe::bundle::JwtAuthority;
    use spiffe::id::TrustDomain;

    use super::*;

    fn at(seconds: u64) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn svid(kid: &str, expires_at: u64) -> Arc<JwtSvid> {
        let header = URL_SAFE_NO_PAD.encode(format!(r#"{{"alg":"ES256","kid":"{kid}"}}"#));
        Arc::new(JwtSvid {
            entry_id: "e".into(),
            id: SpiffeId::parse("spiffe://example.org/w").unwrap(),
            token: Zeroizing::new(format!("{header}.e30.c2ln")),
            hint: "".into(),
            issued_at: at(0),
            expires_at: at(expires_at),
        })
    }

    fn key(entry: &str, audience: &[&str]) -> Key {
        Key::new(entry.into(), &audience.iter().map(ToString::to_string).collect::<Vec<_>>())
    }

    #[test]
    fn fresh_until_its_renewal_then_ageing_until_it_expires() {
        let mut cache = JwtCache::new(2);
        cache.insert(key("a", &["x", "y"]), svid("k", 100), at(50));
        assert!(matches!(cache.find(&key("a", &["y", "x", "y"]), at(49), Duration::ZERO), Found::Fresh(_)));
        assert!(matches!(cache.find(&key("a", &["x", "y"]), at(50), Duration::ZERO), Found::Ageing(_)));
        assert!(matches!(cache.find(&key("a", &["x"]), at(49), Duration::ZERO), Found::Nothing));
        assert!(matches!(cache.find(&key("a", &["x", "y"]), at(100), Duration::ZERO), Found::Nothing));
        // The clock was wrong, and is set back.
        assert!(matches!(cache.find(&key("a", &["x", "y"]), at(99), Duration::ZERO), Found::Ageing(_)));
    }

    #[test]
    fn a_successor_that_was_not_valid_is_not_asked_for_again_at_once() {
        let mut cache = JwtCache::new(2);
        cache.insert(key("a", &["x"]), svid("k", 1000), at(50));
        let mut boot = Duration::from_secs(7);
        for wait in [1, 2, 4, 8, 16, 30, 30] {
            assert!(matches!(cache.find(&key("a", &["x"]), at(60), boot), Found::Ageing(_)));
            cache.put_off(&key("a", &["x"]), boot);
            boot += Duration::from_secs(wait) - Duration::from_millis(1);
            assert!(matches!(cache.find(&key("a", &["x"]), at(60), boot), Found::Fresh(_)));
            boot += Duration::from_millis(1);
        }
    }

    #[test]
    fn the_least_recently_used_goes_first() {
        let mut cache = JwtCache::new(2);
        cache.insert(key("a", &["x"]), svid("k", 100), at(50));
        cache.insert(key("b", &["x"]), svid("k", 100), at(50));
        assert!(matches!(cache.find(&key("a", &["x"]), at(1), Duration::ZERO), Found::Fresh(_)));
        cache.insert(key("c", &["x"]), svid("k", 100), at(50));
        assert!(matches!(cache.find(&key("b", &["x"]), at(1), Duration::ZERO), Found::Nothing));
        assert!(matches!(cache.find(&key("a", &["x"]), at(1), Duration::ZERO), Found::Fresh(_)));
        assert_eq!((cache.len(), cache.by_use.len()), (2, 2));
    }

    #[test]
    fn tokens_of_a_tainted_or_vanished_key_are_dropped() {
        let mut cache = JwtCache::new(9);
        for kid in ["good", "tainted", "gone"] {
            cache.insert(key(kid, &["x"]), svid(kid, 100), at(50));
        }
        let authority = |key_id: &str, tainted| JwtAuthority {
            key_id: key_id.into(),
            public_key: bytes::Bytes::new(),
            expires_at: None,
            tainted,
        };
        let mut bundle = Bundle::empty(TrustDomain::parse("example.org").unwrap());
        bundle.jwt = vec![authority("good", false), authority("tainted", true)];
        cache.judge(&bundle);
        assert_eq!((cache.len(), cache.by_use.len()), (1, 1));
        assert!(matches!(cache.find(&key("good", &["x"]), at(1), Duration::ZERO), Found::Fresh(_)));
    }

    #[test]
    fn an_entry_takes_its_tokens_with_it() {
        let mut cache = JwtCache::new(9);
        cache.insert(key("a", &["x"]), svid("k", 100), at(50));
        cache.insert(key("a", &["y"]), svid("k", 100), at(50));
        cache.insert(key("b", &["x"]), svid("k", 100), at(50));
        cache.forget_entry(&"a".into());
        assert_eq!((cache.len(), cache.by_use.len()), (1, 1));
    }
}
