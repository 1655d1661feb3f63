//! The loop that gets X.509-SVIDs signed: makes keys, asks the server, keeps what is still wanted.
//!
//! It waits for nudges and for the plan's own times only. When an entry arrives it is signed at once; the one wait
//! that can stand in between is that for a server which just failed to answer.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use runtime::backoff::Backoff;
use runtime::shutdown::Shutdown;
use spiffe::renew::{RenewAt, Succession, Validity, retry_within};
use spiffe::x509::{KeyType, PrivateKey, X509Svid};

use super::desired::{Entry, EntryId};
use super::snapshot::HeldSvid;
use super::state::{Credential, Refused};
use super::{Cache, IssueError, SigningRequest, issue};
use crate::keys::{KeyError, new_workload_key};
use crate::taint;

/// The most SVIDs that one call asks for; what SPIRE's servers allow at once.
const LARGEST_BATCH: usize = 500;
/// Up to this many EC keys are made right here; more would keep the thread from its other tasks.
const KEYS_INLINE: usize = 16;
/// How long a failed call is waited out.
const CALL_RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));
/// How long an item that the server refused is left alone; doubles up to the second.
const ITEM_RETRY: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));
/// How soon after a failure the next attempt comes when an SVID is about to run out.
const LEAST_RETRY: Duration = Duration::from_secs(1);

/// An entry with its new key and request.
struct Order {
    entry: Arc<Entry>,
    key: PrivateKey,
    csr: Bytes,
}

struct Signed {
    svid: HeldSvid,
    authority_key_id: Option<Bytes>,
}

impl Signed {
    fn validity(&self) -> Validity {
        Validity { not_before: self.svid.not_before, not_after: self.svid.not_after }
    }
}

impl Cache {
    /// Signs what is wanted until `shutdown`, with keys of type `key_type`.
    pub async fn sign_until(&self, shutdown: Shutdown, key_type: KeyType) {
        let mut batch = LARGEST_BATCH;
        let mut backoff = Backoff::new(CALL_RETRY.0, CALL_RETRY.1);
        // By the boot clock.
        let mut failed_until: Option<Duration> = None;
        let clock = &self.inner.clock;
        let mut ahead = clock.ahead();
        while !shutdown.is_requested() {
            if clock.was_set_since(ahead) {
                ahead = clock.ahead();
                failed_until = None;
                self.inner.state().clock_was_set(clock.now());
            }
            let (now, boot) = (clock.now(), clock.boot());
            let mut unsteady = None;
            let (entries, wake) = {
                let mut state = self.inner.state();
                if std::mem::take(&mut state.heard) || failed_until.is_some_and(|until| until <= boot) {
                    failed_until = None;
                }
                state.waiting = failed_until.is_some();
                state.begin(now);
                let plan = state.plan(self.inner.limits.x509_svids, now, boot);
                let mut forget: HashSet<EntryId> = plan.forget.into_iter().collect();
                if !plan.over.is_empty() {
                    let over = plan.over.into_iter();
                    // What only seems to be over is good again as soon as the clock is right.
                    match self.inner.steady.left() {
                        Duration::ZERO => forget.extend(over),
                        left => {
                            unsteady = Some(left);
                            state.rebuild_around(&over.collect(), now);
                        }
                    }
                }
                state.forget(&forget, now);
                let mut entries: Vec<Arc<Entry>> = Vec::new();
                if failed_until.is_none() {
                    entries
                        .extend(plan.sign.iter().take(batch).filter_map(|id| state.desired.entry(id)).map(Arc::clone));
                    state.signing.extend(entries.iter().map(|entry| Arc::clone(&entry.id)));
                }
                (entries, plan.wake)
            };
            if entries.is_empty() {
                let failed = failed_until.map(|until| until.saturating_sub(boot));
                let lasting = failed.into_iter().chain(unsteady).min();
                tokio::select! {
                    () = self.inner.signer.nudged_or_at(clock, wake) => {}
                    () = clock.sleep(lasting.unwrap_or_default()), if lasting.is_some() => {}
                    () = clock.stepped(ahead) => {}
                    () = shutdown.requested() => return,
                }
                continue;
            }
            let ids: HashSet<EntryId> = entries.iter().map(|entry| Arc::clone(&entry.id)).collect();
            let result = tokio::select! {
                result = self.sign(entries, key_type) => result,
                () = shutdown.requested() => return,
            };
            match result {
                Ok(results) => {
                    backoff.reset();
                    batch = (batch * 2).min(LARGEST_BATCH);
                    self.keep(&ids, results);
                }
                Err(error) => {
                    let now = clock.now();
                    let wait = backoff.next(&self.inner.entropy);
                    let end = self.inner.state().first_end(&ids, now);
                    let wait = end.map_or(wait, |end| retry_within(wait, end, now, LEAST_RETRY));
                    tracing::warn!(
                        svids = ids.len(),
                        error = runtime::telemetry::chain(&error),
                        retry_in = ?wait,
                        "Could not get X.509-SVIDs signed"
                    );
                    metrics::counter!("cache_manager.sign.failures").increment(1);
                    batch = (ids.len() / 2).max(1);
                    failed_until = Some(clock.boot() + wait);
                    self.keep(&ids, Vec::new());
                }
            }
        }
    }

    async fn sign(
        &self,
        entries: Vec<Arc<Entry>>,
        key_type: KeyType,
    ) -> Result<Vec<(Arc<Entry>, Result<Signed, IssueError>)>, IssueError> {
        let orders = make_orders(entries, key_type).await.map_err(IssueError::Key)?;
        let requests: Vec<SigningRequest> = orders
            .iter()
            .map(|order| SigningRequest { entry_id: Arc::clone(&order.entry.id), csr: order.csr.clone() })
            .collect();
        let answers = self.inner.issuer.sign_x509(&requests).await?;
        if answers.len() != orders.len() {
            return Err(IssueError::Malformed("not one result for each request"));
        }
        Ok(orders
            .into_iter()
            .zip(answers)
            .map(|(order, answer)| {
                let entry = Arc::clone(&order.entry);
                (entry, answer.and_then(|chain| check(order, chain)))
            })
            .collect())
    }

    /// Takes in what was signed for the entries `asked`, as far as it is still wanted in exactly that form.
    fn keep(&self, asked: &HashSet<EntryId>, results: Vec<(Arc<Entry>, Result<Signed, IssueError>)>) {
        let now = self.inner.clock.now();
        let mut kept = HashSet::new();
        let mut state = self.inner.state();
        state.signing.retain(|id| !asked.contains(id));
        for (entry, result) in results {
            if !state.wants(&entry) {
                tracing::debug!(entry_id = %entry.id, "An entry changed while its SVID was being signed");
                continue;
            }
            let held = state.credentials.get(&entry.id).map(Credential::validity);
            let judged = result.and_then(|signed| match issue::take(held, signed.validity(), now) {
                Succession::Never => Err(IssueError::ClockDisagrees),
                succession => Ok((signed, succession)),
            });
            match judged {
                Ok((signed, succession)) => {
                    let credential = self.credential(&entry, signed, now, state.tick);
                    state.refused.remove(&entry.id);
                    if let Succession::At(_) = succession {
                        state.coming.insert(Arc::clone(&entry.id), credential);
                        continue;
                    }
                    state.coming.remove(&entry.id);
                    kept.insert(Arc::clone(&entry.id));
                    state.credentials.insert(Arc::clone(&entry.id), credential);
                }
                Err(error) => {
                    let wait =
                        state.refused.get(&entry.id).map_or(ITEM_RETRY.0, |last| last.wait * 2).min(ITEM_RETRY.1);
                    let spread = wait.mul_f64(0.9 + 0.1 * self.inner.entropy.unit());
                    let spread = held.map_or(spread, |held| retry_within(spread, held.not_after, now, LEAST_RETRY));
                    let retry_at = self.inner.clock.boot() + spread;
                    state.refused.insert(Arc::clone(&entry.id), Refused { retry_at, wait });
                    tracing::warn!(
                        entry_id = %entry.id,
                        spiffe_id = %entry.spiffe_id,
                        error = runtime::telemetry::chain(&error),
                        retry_in = ?spread,
                        "No X.509-SVID for an entry"
                    );
                }
            }
        }
        state.rebuild_around(&kept, now);
        let held = state.credentials.len();
        drop(state);
        metrics::gauge!("cache_manager.x509_svids").set(held as f64);
        metrics::counter!("cache_manager.x509_svids.signed").increment(kept.len() as u64);
    }

    fn credential(&self, entry: &Entry, signed: Signed, received_at: SystemTime, tick: u64) -> Credential {
        let svid = signed.svid;
        let random = self.inner.entropy.u64();
        let drawn = RenewAt::draw(svid.not_before, svid.not_after, received_at, random);
        let target = self.inner.limits.availability_target;
        let renew_at = issue::renewal(drawn, svid.not_before, svid.not_after, received_at, target, random >> 16);
        tracing::debug!(spiffe_id = %svid.id, entry_id = %entry.id, "Holding a new X.509-SVID");
        Credential {
            svid: Arc::new(svid),
            form: entry.form(),
            received_at,
            renew_at,
            authority_key_id: signed.authority_key_id,
            last_used: tick,
        }
    }
}

async fn make_orders(entries: Vec<Arc<Entry>>, kind: KeyType) -> Result<Vec<Order>, KeyError> {
    // RSA keys take up to seconds each.
    let inline = entries.len() <= KEYS_INLINE && matches!(kind, KeyType::EcP256 | KeyType::EcP384);
    let make = move || {
        entries
            .into_iter()
            .map(|entry| {
                let (key, csr) = new_workload_key(kind, &entry.spiffe_id)?;
                Ok(Order { entry, key, csr })
            })
            .collect()
    };
    if inline { make() } else { tokio::task::spawn_blocking(make).await.map_err(|_| KeyError::Interrupted)? }
}

/// Whether the chain is what was asked for: the entry's identity and our key.
fn check(order: Order, chain: Vec<Bytes>) -> Result<Signed, IssueError> {
    let svid = X509Svid::from_chain(chain).map_err(|_| IssueError::Malformed("not an X.509-SVID"))?;
    if svid.id != order.entry.spiffe_id || svid.check_key(&order.key).is_err() {
        return Err(IssueError::Foreign);
    }
    let authority_key_id = taint::authority_of(&svid.chain);
    let held = HeldSvid {
        entry_id: Arc::clone(&order.entry.id),
        id: order.entry.spiffe_id.clone(),
        hint: Arc::clone(&order.entry.hint),
        chain: svid.chain,
        key: Arc::new(order.key),
        not_before: svid.not_before,
        not_after: svid.not_after,
    };
    Ok(Signed { svid: held, authority_key_id })
}
