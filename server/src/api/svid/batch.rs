//! Batches of X509-SVIDs: checked and signed item by item, on several threads when a batch is large.

use std::sync::Arc;
use std::time::SystemTime;

use spiffe::x509::Csr;
use spiffe_proto::svid as proto;
use spiffe_proto::types;
use tokio::task::JoinSet;

use super::{NOT_AUTHORIZED, SvidService};
use crate::api::admission::Admission;
use crate::api::core::Core;
use crate::api::status::{self, Failure};
use crate::api::wire;
use crate::audit::{Fields, Outcome, sha256_hex};
use crate::authority::issue::Issuer;
use crate::authority::profile::WorkloadProfile;
use crate::state::model::Entry;

type ItemResult = proto::batch_new_x509svid_response::Result;

/// Fewest items for which another thread is worth its start.
const SMALLEST_SHARE: usize = 16;

/// Items after which other calls get their turn; together about half a millisecond.
const STRETCH: usize = 8;

/// One item: what is asked for, and the entry if the agent may have it.
struct Item {
    params: proto::NewX509svidParams,
    entry: Option<Arc<Entry>>,
}

/// What all items of a batch have in common. Cheap to clone.
#[derive(Clone)]
struct Desk {
    core: Arc<Core>,
    admission: Arc<Admission>,
    issuer: Arc<Issuer>,
    now: SystemTime,
}

impl SvidService {
    /// Signs a batch; one result an item, in order.
    pub(super) async fn new_x509_batch(
        &self,
        admission: Admission,
        params: Vec<proto::NewX509svidParams>,
    ) -> Result<Vec<ItemResult>, Failure> {
        if params.is_empty() {
            return Err(Failure::invalid("missing parameters"));
        }
        let count = u32::try_from(params.len()).unwrap_or(u32::MAX);
        self.core.limit(&admission, count, "rejecting request due to certificate signing rate limiting").await?;
        let ids = params.iter().map(|params| params.entry_id.as_str());
        let (entries, now) = self.entries(Self::caller(&admission)?, ids).await?;
        let issuer = self.issuer("failed to sign X509-SVID")?;
        let items: Vec<Item> = params.into_iter().zip(entries).map(|(params, entry)| Item { params, entry }).collect();
        let desk = Desk { core: Arc::clone(&self.core), admission: Arc::new(admission), issuer, now };
        Ok(desk.sign_spread(items, self.width).await)
    }
}

impl Desk {
    /// Signs `items` in up to `width` shares at once.
    async fn sign_spread(&self, mut items: Vec<Item>, width: usize) -> Vec<ItemResult> {
        let share = items.len().div_ceil(width).max(SMALLEST_SHARE);
        if items.len() <= share {
            return self.sign(items).await;
        }
        let count = items.len();
        // Tasks of this call alone: they end with it, even if it is dropped.
        let mut others = JoinSet::new();
        let mut shares = Vec::new();
        while items.len() > share {
            let rest = items.split_off(items.len() - share);
            let (desk, place) = (self.clone(), items.len());
            others.spawn(async move { (place, desk.sign(rest).await) });
        }
        shares.push((0, self.sign(items).await));
        while let Some(joined) = others.join_next().await {
            if let Ok(signed) = joined {
                shares.push(signed);
            }
        }
        assemble(shares, count)
    }

    /// Signs `items` one after another, making way for other calls now and then.
    async fn sign(&self, items: Vec<Item>) -> Vec<ItemResult> {
        let mut results = Vec::with_capacity(items.len());
        for (number, item) in items.into_iter().enumerate() {
            if number % STRETCH == STRETCH - 1 {
                tokio::task::yield_now().await;
            }
            results.push(self.item(&item));
        }
        results
    }

    fn item(&self, item: &Item) -> ItemResult {
        match self.svid(item) {
            Ok(svid) => ItemResult { status: Some(status::ok()), svid: Some(svid) },
            Err(failure) => {
                let status = failure.item();
                self.core.audit.record(
                    &*self.admission,
                    Outcome::Failed { code: tonic::Code::from_i32(status.code), text: &status.message },
                    || about(item),
                );
                ItemResult { status: Some(status), svid: None }
            }
        }
    }

    /// Identity, names and lifetime are the entry's; of the request only the key counts.
    fn svid(&self, item: &Item) -> Result<types::X509svid, Failure> {
        if item.params.entry_id.is_empty() {
            return Err(Failure::invalid("missing entry ID"));
        }
        if item.params.csr.is_empty() {
            return Err(Failure::invalid("missing CSR"));
        }
        let entry = item.entry.as_ref().ok_or_else(|| Failure::absent(NOT_AUTHORIZED))?;
        let csr = Csr::parse(&item.params.csr).map_err(|error| Failure::invalid("malformed CSR").because(error))?;
        csr.verify_signature().map_err(|error| Failure::invalid("invalid CSR signature").because(error))?;
        let profile = WorkloadProfile {
            id: entry.spiffe_id.clone(),
            dns_names: entry.dns_names.clone(),
            ttl: entry.x509_svid_ttl,
            subject: None,
        };
        let issued = self
            .issuer
            .workload_x509(&profile, csr.public_key(), self.now)
            .map_err(|error| Failure::of_issue("failed to sign X509-SVID", error))?;
        let receipt = self.core.audit.x509(&*self.admission, &issued, || about(item));
        Ok(wire::x509_svid(issued.release(&receipt)))
    }
}

fn about(item: &Item) -> Fields {
    Fields {
        entry_id: Some(item.params.entry_id.clone()),
        csr_sha256: Some(sha256_hex(&item.params.csr)),
        ..Fields::default()
    }
}

/// Puts shares together in the order of their places; what a share lost to a panic is our fault.
fn assemble(mut shares: Vec<(usize, Vec<ItemResult>)>, count: usize) -> Vec<ItemResult> {
    let lost = || ItemResult { status: Some(Failure::internal("failed to sign X509-SVID").item()), svid: None };
    shares.sort_unstable_by_key(|(place, _)| *place);
    let mut results = Vec::with_capacity(count);
    for (place, share) in shares {
        results.resize_with(place, lost);
        results.extend(share);
    }
    results.resize_with(count, lost);
    results
}

#[cfg(test)]
mod tests {
    use super::*;

    fn marked(texts: &[&str]) -> Vec<ItemResult> {
        let status = |text: &&str| types::Status { code: 0, message: (*text).to_owned() };
        texts.iter().map(|text| ItemResult { status: Some(status(text)), svid: None }).collect()
    }

    #[test]
    fn shares_come_together_in_order_and_a_lost_one_leaves_a_gap_of_its_size() {
        let messages = |results: Vec<ItemResult>| -> Vec<String> {
            results.into_iter().map(|result| result.status.unwrap().message).collect()
        };
        let shares = vec![(4, marked(&["e"])), (0, marked(&["a", "b"])), (2, marked(&["c", "d"]))];
        assert_eq!(messages(assemble(shares, 5)), ["a", "b", "c", "d", "e"]);
        let lost = "failed to sign X509-SVID";
        let shares = vec![(0, marked(&["a"])), (3, marked(&["d"]))];
        assert_eq!(messages(assemble(shares, 5)), ["a", lost, lost, "d", lost]);
    }
}
