//! `spire.api.server.entry.v1.Entry`: registration entries, for registrars and for agents.

pub mod draft;
mod list;
mod sync;

use std::sync::Arc;

use spiffe::id::SpiffeId;
use spiffe_proto::authorized::{GetAuthorizedEntriesResponse, SyncAuthorizedEntriesResponse};
use spiffe_proto::entry as proto;
use spiffe_proto::types;
use tonic::{Code, Request, Response, Status, Streaming};

use super::admission::Admission;
use super::core::Core;
use super::page;
use super::status::{self, Failure};
use super::stream::{self, Answers};
use super::wire;
use crate::audit::{Fields, Outcome};
use crate::history::{ProposeError, Receipt, Urgency};
use crate::registry::entry::{self, Refusal};
use crate::registry::list::Paging;
use crate::registry::{authorized, list as listing};
use crate::state::State;
use crate::state::model::Entry;

/// The service. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct EntryService {
    core: Arc<Core>,
    page: usize,
}

type Written = Result<Receipt<Arc<Entry>>, ProposeError<Refusal>>;

impl EntryService {
    /// A service over `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core, page: sync::PAGE }
    }

    /// What the calling agent may have.
    async fn authorized(&self, admission: &Admission) -> Result<Vec<Arc<Entry>>, Failure> {
        let agent: &SpiffeId =
            admission.caller.id().ok_or_else(|| Failure::internal("caller ID missing from request context"))?;
        let state = self.core.current("failed to fetch entries").await?;
        Ok(authorized::authorized(&state, agent, self.core.now()))
    }

    /// Proposes what could be made of each item, all at once; the verdicts are in order, failures of others included.
    async fn write_each<D>(&self, decisions: Vec<Result<D, Failure>>) -> Vec<Result<Written, Failure>>
    where
        D: Fn(&State, std::time::SystemTime) -> Result<(crate::state::model::Part, Arc<Entry>), Refusal>
            + Send
            + Sync
            + 'static,
    {
        let mut proposed = Vec::with_capacity(decisions.len());
        let mut verdicts = Vec::with_capacity(decisions.len());
        for decision in decisions {
            match decision {
                Ok(decide) => {
                    proposed.push(decide);
                    verdicts.push(None);
                }
                Err(failure) => verdicts.push(Some(failure)),
            }
        }
        let mut written = self.core.committer.propose_each(Urgency::Normal, proposed).await.into_iter();
        let verdict = |failure: Option<Failure>| match failure {
            Some(failure) => Err(failure),
            None => Ok(written.next().unwrap_or(Err(ProposeError::Unavailable(None)))),
        };
        verdicts.into_iter().map(verdict).collect()
    }

    /// Status and entry of one written item; an entry that was there already is told with the refusal.
    fn told(
        &self,
        admission: &Admission,
        verdict: Result<Written, Failure>,
        operation: &'static str,
        mask: Option<&types::EntryMask>,
    ) -> (types::Status, Option<types::Entry>) {
        let (failure, entry) = match verdict {
            Ok(Ok(receipt)) => (None, Some(receipt.value)),
            Ok(Err(ProposeError::Refused(Refusal::Similar(entry)))) => {
                (Some(draft::refused(operation, Refusal::Similar(Arc::clone(&entry)))), Some(entry))
            }
            Ok(Err(error)) => {
                let refused = |refusal| draft::refused(operation, refusal);
                (Some(Failure::of_proposal(operation, error, refused)), None)
            }
            Err(failure) => (Some(failure), None),
        };
        let status = failure.as_ref().map_or_else(status::ok, Failure::item);
        self.audit(admission, &status, || entry.as_deref().map(about).unwrap_or_default());
        (status, entry.map(|entry| wire::entry(&entry, mask)))
    }

    fn audit(&self, admission: &Admission, status: &types::Status, fields: impl FnOnce() -> Fields) {
        let outcome = match Code::from_i32(status.code) {
            Code::Ok => Outcome::Success,
            code => Outcome::Failed { code, text: &status.message },
        };
        self.core.audit.record(admission, outcome, fields);
    }

    /// Removes one entry of a batch; its status.
    fn removed(id: &str, removed: Result<Receipt<()>, ProposeError<Refusal>>) -> types::Status {
        match removed {
            Ok(_) => status::ok(),
            Err(_) if id.is_empty() => Failure::invalid("missing entry ID").item(),
            Err(error) => Failure::of_proposal("failed to delete entry", error, |refusal| {
                draft::refused("entry not found", refusal)
            })
            .item(),
        }
    }
}

fn about(entry: &Entry) -> Fields {
    let joined = |texts: &mut dyn Iterator<Item = String>| {
        Some(texts.collect::<Vec<_>>().join(",")).filter(|text| !text.is_empty())
    };
    Fields {
        entry_id: Some(entry.id.to_string()),
        spiffe_id: Some(entry.spiffe_id.to_string()),
        parent_id: Some(entry.parent_id.to_string()),
        selectors: joined(&mut entry.selectors.iter().map(ToString::to_string)),
        dns_names: joined(&mut entry.dns_names.iter().map(ToString::to_string)),
        expires_at: entry.expires_at.map(wire::seconds),
        admin: Some(entry.admin),
        downstream: Some(entry.downstream),
        ..Fields::default()
    }
}

#[tonic::async_trait]
impl proto::entry_server::Entry for EntryService {
    type SyncAuthorizedEntriesStream = Answers<SyncAuthorizedEntriesResponse>;

    async fn count_entries(
        &self,
        mut request: Request<proto::CountEntriesRequest>,
    ) -> Result<Response<proto::CountEntriesResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let filter = list::of_count(request.into_inner().filter, &self.core.trust_domain)?;
        let state = self.core.current("failed to count entries").await?;
        let count = if filter == listing::Filter::default() {
            listing::present(&state, self.core.now())
        } else {
            listing::count(&state, &filter, self.core.now())
        };
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        Ok(Response::new(proto::CountEntriesResponse { count: i32::try_from(count).unwrap_or(i32::MAX) }))
    }

    async fn list_entries(
        &self,
        mut request: Request<proto::ListEntriesRequest>,
    ) -> Result<Response<proto::ListEntriesResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        let operation = "failed to list entries";
        let filter = list::of_list(request.filter, &self.core.trust_domain)?;
        let paging = match page::page(request.page_size, &request.page_token)
            .map_err(|error| Failure::internal(operation).because(error))?
        {
            Some(page) => Paging::Page { size: page.size, after: page.after },
            None => Paging::Everything,
        };
        let state = self.core.current(operation).await?;
        let page = listing::entries(&state, &filter, paging, self.core.now());
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        Ok(Response::new(proto::ListEntriesResponse {
            entries: page.entries.iter().map(|entry| wire::entry(entry, request.output_mask.as_ref())).collect(),
            next_page_token: page.next.map_or_else(String::new, |ordinal| ordinal.to_string()),
        }))
    }

    async fn get_entry(&self, mut request: Request<proto::GetEntryRequest>) -> Result<Response<types::Entry>, Status> {
        let admission = Admission::take(&mut request)?;
        let request = request.into_inner();
        if request.id.is_empty() {
            return Err(Failure::invalid("missing ID").into());
        }
        let state = self.core.current("failed to fetch entry").await?;
        let entry =
            entry::present(&state, &request.id, self.core.now()).map_err(|_| Failure::absent("entry not found"))?;
        self.core.audit.record(&admission, Outcome::Success, || about(entry));
        Ok(Response::new(wire::entry(entry, request.output_mask.as_ref())))
    }

    async fn batch_create_entry(
        &self,
        mut request: Request<proto::BatchCreateEntryRequest>,
    ) -> Result<Response<proto::BatchCreateEntryResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let proto::BatchCreateEntryRequest { entries, output_mask } = request.into_inner();
        let decisions = entries.into_iter().map(|message| {
            let new = draft::new_entry(message, &self.core.trust_domain, || self.core.entropy.uuid_v4())?;
            Ok(move |state: &State, now| entry::create(state, &new, now))
        });
        let verdicts = self.write_each(decisions.collect()).await;
        let results = verdicts.into_iter().map(|verdict| {
            let (status, entry) = self.told(&admission, verdict, "failed to create entry", output_mask.as_ref());
            proto::batch_create_entry_response::Result { status: Some(status), entry }
        });
        Ok(Response::new(proto::BatchCreateEntryResponse { results: results.collect() }))
    }

    async fn batch_update_entry(
        &self,
        mut request: Request<proto::BatchUpdateEntryRequest>,
    ) -> Result<Response<proto::BatchUpdateEntryResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let proto::BatchUpdateEntryRequest { entries, input_mask, output_mask } = request.into_inner();
        let decisions = entries.into_iter().map(|mut message| {
            let id = std::mem::take(&mut message.id);
            let changes = draft::changes(message, input_mask.as_ref(), &self.core.trust_domain)?;
            Ok(move |state: &State, now| entry::update(state, &id, &changes, now))
        });
        let verdicts = self.write_each(decisions.collect()).await;
        let results = verdicts.into_iter().map(|verdict| {
            let (status, entry) = self.told(&admission, verdict, "failed to update entry", output_mask.as_ref());
            proto::batch_update_entry_response::Result { status: Some(status), entry }
        });
        Ok(Response::new(proto::BatchUpdateEntryResponse { results: results.collect() }))
    }

    async fn batch_delete_entry(
        &self,
        mut request: Request<proto::BatchDeleteEntryRequest>,
    ) -> Result<Response<proto::BatchDeleteEntryResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let ids = request.into_inner().ids;
        let decisions = ids.iter().map(|id| {
            let id = id.clone();
            move |state: &State, now| entry::remove(state, &id, now).map(|part| (part, ()))
        });
        let removed = self.core.committer.propose_each(Urgency::Shrinking, decisions.collect()).await;
        let results = ids.into_iter().zip(removed).map(|(id, removed)| {
            let status = Self::removed(&id, removed);
            self.audit(&admission, &status, || Fields { entry_id: Some(id.clone()), ..Fields::default() });
            proto::batch_delete_entry_response::Result { status: Some(status), id }
        });
        Ok(Response::new(proto::BatchDeleteEntryResponse { results: results.collect() }))
    }

    async fn get_authorized_entries(
        &self,
        mut request: Request<proto::GetAuthorizedEntriesRequest>,
    ) -> Result<Response<GetAuthorizedEntriesResponse>, Status> {
        let admission = Admission::take(&mut request)?;
        let mask = request.into_inner().output_mask;
        let entries = self.authorized(&admission).await?;
        self.core.audit.record(&admission, Outcome::Success, Fields::default);
        let entries = wire::encode::entries(&entries, mask.as_ref());
        Ok(Response::new(GetAuthorizedEntriesResponse { entries }))
    }

    async fn sync_authorized_entries(
        &self,
        mut request: Request<Streaming<proto::SyncAuthorizedEntriesRequest>>,
    ) -> Result<Response<Self::SyncAuthorizedEntriesStream>, Status> {
        let admission = Admission::take(&mut request)?;
        let (service, requests) = (self.clone(), request.into_inner());
        let answers = stream::start(move |outlet| async move {
            let entries = service.authorized(&admission).await?;
            tokio::select! {
                // A ban ends the conversation, not only the next one.
                failure = service.core.dismissed(&admission) => Err(failure.into()),
                answered = sync::answer(requests, &outlet, &entries, service.page) => {
                    answered?;
                    service.core.audit.record(&admission, Outcome::Success, Fields::default);
                    Ok(())
                }
            }
        });
        answers.await.map(Response::new)
    }
}
