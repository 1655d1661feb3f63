//! `signet.backup.v1`: the whole state of a running server, for who is on its machine.

use std::sync::Arc;

use prost::Message as _;
use spiffe_proto::backup as proto;
use tonic::{Request, Response, Status};

use super::admission::Admission;
use super::core::Core;
use super::stream::{self, Answers};
use crate::audit::{Fields, Outcome};
use crate::backup::{Kind, head_of, pages};

/// The service. Clones are handles of the same one.
#[derive(Clone, Debug)]
pub struct BackupService {
    core: Arc<Core>,
}

impl BackupService {
    /// A service that tells of `core`.
    pub fn new(core: Arc<Core>) -> Self {
        Self { core }
    }
}

fn frame(kind: Kind, payload: Vec<u8>) -> proto::CreateResponse {
    proto::CreateResponse { kind: kind as u32, payload: payload.into() }
}

#[tonic::async_trait]
impl proto::backup_server::Backup for BackupService {
    type CreateStream = Answers<proto::CreateResponse>;

    async fn create(&self, mut request: Request<proto::CreateRequest>) -> Result<Response<Self::CreateStream>, Status> {
        let admission = Admission::take(&mut request)?;
        // One state: whatever is written meanwhile is not in it.
        let state = self.core.current("state cannot be read").await?;
        let core = Arc::clone(&self.core);
        let answers = stream::start(move |outlet| async move {
            let now = core.now();
            outlet.send(frame(Kind::Head, head_of(&state, now).encode_to_vec())).await;
            for page in pages(&state, now) {
                outlet.send(frame(Kind::Records, page.encode_to_vec())).await;
            }
            outlet.send(frame(Kind::End, Vec::new())).await;
            core.audit.record(&admission, Outcome::Success, Fields::default);
            Ok(())
        });
        Ok(Response::new(answers.await?))
    }
}
