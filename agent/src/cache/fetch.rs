//! Getting JWT-SVIDs: from memory, or by one request to the server that all who ask for the same share.

use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt as _};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use spiffe::id::SpiffeId;
use spiffe::renew::{RenewAt, Succession, succeed};
use spiffe::selector::SelectorSet;

use super::desired::Entry;
use super::jwt::{Found, JwtSvid, Key, Outcome, Request};
use super::{Cache, CacheError, Inner, IssueError};

/// How many JWT-SVIDs one request of a workload asks the server for at the same time.
const FETCHES_AT_ONCE: usize = 8;
/// How long a renewal of a token that is still valid may hold up its caller.
const RENEWAL_PATIENCE: Duration = Duration::from_secs(5);
const NOT_RENEWED: &str = "Could not renew a JWT-SVID; the held one is valid and is handed out";

/// How often the entries of one request are looked at, if one is changed or goes away while its token is on its way.
const LOOKS: u32 = 2;

/// How a caller comes by a token.
enum Way {
    /// It is in memory.
    Fresh(Arc<JwtSvid>),
    /// By a request; until that is answered, `held` is valid.
    Asked { held: Option<Arc<JwtSvid>>, request: Request },
}

/// A request's place among those under way; it is given up when the request ends, or when nobody waits for it.
struct UnderWay {
    cache: Arc<Inner>,
    key: Key,
    number: u64,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.cache.jwt().ended(&self.key, self.number);
    }
}

impl Cache {
    /// One JWT-SVID for each matching entry, or for the one with identity `id`, in the order of the entries' ids.
    ///
    /// A token is handed out again until its renewal time, and until it expires while the server gives no new one.
    pub async fn jwt_svids(
        &self,
        selectors: &SelectorSet,
        audience: &[String],
        id: Option<&SpiffeId>,
    ) -> Result<Vec<Arc<JwtSvid>>, CacheError> {
        let audience: Arc<[String]> = audience.into();
        for _ in 0..LOOKS {
            let mut entries = self.matching(selectors);
            entries.retain(|entry| id.is_none_or(|id| entry.spiffe_id == *id));
            if entries.is_empty() {
                return Err(CacheError::NotEntitled);
            }
            let svids = stream::iter(entries.iter().map(Arc::clone))
                .map(|entry| self.jwt_svid(entry, &audience))
                .buffered(FETCHES_AT_ONCE)
                .try_collect()
                .await;
            // The wait for the server may have outlasted an entry, also one whose token was in memory.
            if self.inner.wants_all(&entries) {
                return svids;
            }
        }
        Err(CacheError::Issue(Arc::new(IssueError::Outdated)))
    }

    async fn jwt_svid(&self, entry: Arc<Entry>, audience: &Arc<[String]>) -> Result<Arc<JwtSvid>, CacheError> {
        if entry.jwt_svid_include_jti {
            let signed = self.inner.sign_jwt(&entry, audience).await;
            return signed.map_err(|error| CacheError::Issue(Arc::new(error)));
        }
        let (held, request) = match Inner::find_or_ask(&self.inner, &entry, audience) {
            Way::Fresh(svid) => return Ok(svid),
            Way::Asked { held, request } => (held, request),
        };
        let outcome = match &held {
            // There is something to fall back on, so the caller need not wait long.
            Some(_) => {
                let patient = tokio::time::timeout(RENEWAL_PATIENCE, request).await;
                patient.unwrap_or_else(|_| Err(Arc::new(IssueError::Deadline)))
            }
            None => request.await,
        };
        match (outcome, held.filter(|svid| svid.validity().holds(self.inner.clock.now()))) {
            (Err(error), Some(svid)) => {
                if self.inner.log.allow(NOT_RENEWED, entry.spiffe_id.as_str()) {
                    let error = runtime::telemetry::chain(&error);
                    tracing::warn!(spiffe_id = %entry.spiffe_id, error, "{NOT_RENEWED}");
                }
                Ok(svid)
            }
            (outcome, _) => outcome.map_err(CacheError::Issue),
        }
    }
}

impl Inner {
    /// What is in memory, and the request to wait for if that is not enough: the one under way or a new one. Both under
    /// one lock, so that nobody asks for what has just come.
    fn find_or_ask(inner: &Arc<Self>, entry: &Arc<Entry>, audience: &Arc<[String]>) -> Way {
        let key = Key::new(Arc::clone(&entry.id), audience);
        let mut jwt = inner.jwt();
        let held = match jwt.find(&key, inner.clock.now(), inner.clock.boot()) {
            Found::Fresh(svid) => return Way::Fresh(svid),
            Found::Ageing(svid) => Some(svid),
            Found::Nothing => None,
        };
        let request = jwt.join(&key, entry, |number| {
            Self::ask(Arc::clone(inner), Arc::clone(entry), Arc::clone(audience), key.clone(), number)
        });
        Way::Asked { held, request }
    }

    /// The request number `number`. It goes on for as long as anybody waits for it, whoever came first.
    fn ask(
        inner: Arc<Self>,
        entry: Arc<Entry>,
        audience: Arc<[String]>,
        key: Key,
        number: u64,
    ) -> BoxFuture<'static, Outcome> {
        let under_way = UnderWay { cache: inner, key, number };
        async move {
            let inner = &under_way.cache;
            let svid = inner.sign_jwt(&entry, &audience).await?;
            let random = inner.entropy.u64();
            let renew_at = RenewAt::draw(svid.issued_at, svid.expires_at, inner.clock.now(), random);
            // Under the lock of the state, so that a step which removes the entry comes wholly before or wholly after.
            let state = inner.state();
            if !state.wants(&entry) {
                return Ok(svid);
            }
            let mut jwt = inner.jwt();
            let (now, validity) = (inner.clock.now(), svid.validity());
            match succeed(jwt.held(&under_way.key).map(|held| held.validity()), validity, now) {
                Succession::Now if validity.holds(now) => {
                    jwt.insert(under_way.key.clone(), Arc::clone(&svid), renew_at.at());
                }
                // Whoever asked may have it, and judge by their own clock; nobody else is given it.
                Succession::Now => {}
                Succession::At(_) | Succession::Never => {
                    jwt.put_off(&under_way.key, inner.clock.boot());
                    return Err(Arc::new(IssueError::ClockDisagrees));
                }
            }
            Ok(svid)
        }
        .boxed()
    }

    /// A new token of the server.
    async fn sign_jwt(&self, entry: &Entry, audience: &[String]) -> Result<Arc<JwtSvid>, IssueError> {
        let signed = self.issuer.sign_jwt(&entry.id, audience).await?;
        if signed.id != entry.spiffe_id {
            return Err(IssueError::Foreign);
        }
        Ok(Arc::new(JwtSvid {
            entry_id: Arc::clone(&entry.id),
            id: signed.id,
            token: signed.token,
            hint: Arc::clone(&entry.hint),
            issued_at: signed.issued_at,
            expires_at: signed.expires_at,
        }))
    }

    /// Whether exactly these forms of the entries are held.
    fn wants_all(&self, entries: &[Arc<Entry>]) -> bool {
        let state = self.state();
        entries.iter().all(|entry| state.wants(entry))
    }
}
