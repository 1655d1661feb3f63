//! Signet's way to learn the view: one stream on which the server sends each change (`signet.sync.v2`).

use std::time::Duration;

use bytes::Bytes;
use runtime::shutdown::Shutdown;
use spiffe::view::Digest;
use spiffe_proto::sync::sync_client::SyncClient;
use spiffe_proto::sync::{self as proto, subscribe_request, subscribe_response};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status};

use super::plan::{Position, Step, View};
use super::{Sync, offer};
use crate::server_link::{CALL_DEADLINE, LARGEST_MESSAGE, Lease, LinkError};

/// The server speaks every ten seconds; after this long without a word the stream is taken for dead.
const SILENCE: Duration = Duration::from_secs(30);
/// How many things one message says are held: well below the mebibyte that a message may have.
const HELD_AT_ONCE: usize = 3000;

/// How a stream ended.
#[derive(Debug)]
pub(super) enum Ended {
    /// The server has no such service; on the connection with this number it is polled.
    NotServed(u64),
    /// The connection is being replaced, or the process stops.
    Retired,
    /// The stream failed.
    Failed(LinkError),
    /// The server said nothing for too long.
    Silent,
    /// The two sides hold different views; the next stream compares them.
    Differs,
    /// The server sent what makes no sense.
    Malformed,
}

/// Follows one stream until it ends. `served` is set as soon as the view was confirmed or changed.
pub(super) async fn follow(sync: &Sync, view: &mut View, served: &mut bool, shutdown: &Shutdown) -> Ended {
    let lease = match sync.link.lease().await {
        Ok(lease) => lease,
        Err(error) => return Ended::Failed(error),
    };
    let ended = tokio::select! {
        ended = on(sync, &lease, view, served) => ended,
        () = lease.retired() => Ok(Ended::Retired),
        () = shutdown.requested() => Ok(Ended::Retired),
    };
    match ended {
        Ok(ended @ (Ended::Silent | Ended::Malformed)) => {
            sync.link.release(lease.connection());
            ended
        }
        Ok(ended) => ended,
        // Not a word about the identity: this is answered before anybody looks at the caller.
        Err(status) if status.code() == Code::Unimplemented => Ended::NotServed(lease.connection()),
        Err(status) => Ended::Failed(sync.link.failed(&lease, status)),
    }
}

async fn on(sync: &Sync, lease: &Lease, view: &mut View, served: &mut bool) -> Result<Ended, Status> {
    let (says, requests) = mpsc::channel(1);
    let mut digest = view.digest();
    let hello = subscribe_request::Message::Hello(proto::Hello {
        position: view.position.as_ref().map(to_wire),
        digest: Bytes::copy_from_slice(&digest),
        agent_version: sync.version.to_owned(),
    });
    say(&says, hello).await?;
    let mut client = SyncClient::new(lease.channel()).max_decoding_message_size(LARGEST_MESSAGE);
    let opened = tokio::time::timeout(CALL_DEADLINE, client.subscribe(ReceiverStream::new(requests))).await;
    let Ok(opened) = opened else { return Ok(Ended::Silent) };
    let mut stream = opened?.into_inner();
    let mut parts = Parts::default();
    loop {
        let Ok(message) = tokio::time::timeout(SILENCE, stream.message()).await else { return Ok(Ended::Silent) };
        let Some(message) = message? else { return Err(Status::unavailable("the server ended the stream")) };
        sync.link.accepted(lease);
        match message.message {
            Some(subscribe_response::Message::Resume(resume)) => {
                view.position = resume.position.map(from_wire);
                sync.cache.confirm();
                *served = true;
            }
            Some(subscribe_response::Message::Compare(proto::Compare {})) => {
                for held in held(view) {
                    say(&says, subscribe_request::Message::Held(held)).await?;
                }
            }
            Some(subscribe_response::Message::Heartbeat(heartbeat)) => {
                if heartbeat.digest != digest.as_slice() {
                    return Ok(Ended::Differs);
                }
                view.position = heartbeat.position.map(from_wire);
                sync.cache.confirm();
                *served = true;
            }
            Some(subscribe_response::Message::Part(part)) => {
                let (number, position, theirs) = (part.step, part.position.clone(), part.digest.clone());
                let Some(step) = parts.add(part) else { continue };
                sync.take(view, step).await;
                *served = true;
                digest = view.digest();
                if theirs != digest.as_slice() {
                    view.position = None;
                    return Ok(Ended::Differs);
                }
                view.position = position.map(from_wire);
                say(&says, subscribe_request::Message::Ack(proto::Ack { step: number })).await?;
            }
            None => return Ok(Ended::Malformed),
        }
    }
}

async fn say(says: &mpsc::Sender<proto::SubscribeRequest>, message: subscribe_request::Message) -> Result<(), Status> {
    let request = proto::SubscribeRequest { message: Some(message) };
    match tokio::time::timeout(CALL_DEADLINE, says.send(request)).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) | Err(_) => Err(Status::unavailable("the server does not read the stream")),
    }
}

/// The parts of a step that have come so far.
#[derive(Default)]
pub struct Parts {
    number: u64,
    step: Step,
}

impl Parts {
    /// Adds a part; answers the step when it was the last. A part of another step begins that one.
    pub fn add(&mut self, part: proto::Part) -> Option<Step> {
        if part.step != self.number {
            *self = Self { number: part.step, step: Step::default() };
        }
        let step = &mut self.step;
        step.anew |= part.anew;
        step.entries.extend(part.entries.into_iter().filter_map(|sent| {
            let content = sent.content.as_ref().try_into().ok();
            sent.entry.map(|entry| offer::entry(entry, content))
        }));
        step.removed_entries.extend(part.removed_entries.into_iter().map(Into::into));
        step.bundles.extend(part.bundles.into_iter().filter_map(offer::bundle));
        let removed = part.removed_bundles.iter();
        step.removed_bundles.extend(removed.filter_map(|name| crate::server_link::wire::trust_domain(name).ok()));
        part.last.then(|| std::mem::take(step))
    }
}

/// What is held, in messages of a bounded size.
fn held(view: &View) -> Vec<proto::Held> {
    let content = |digest: &Digest| Bytes::copy_from_slice(digest);
    let entries: Vec<proto::HeldEntry> = view
        .entries()
        .map(|(id, version)| proto::HeldEntry {
            id: id.to_string(),
            content: content(&version.content.unwrap_or_default()),
        })
        .collect();
    let bundles: Vec<proto::HeldBundle> = view
        .bundles()
        .map(|(trust_domain, digest)| proto::HeldBundle {
            trust_domain: trust_domain.as_str().to_owned(),
            content: content(digest),
        })
        .collect();
    let entries = entries.chunks(HELD_AT_ONCE).map(|chunk| (chunk.to_vec(), Vec::new()));
    let bundles = bundles.chunks(HELD_AT_ONCE).map(|chunk| (Vec::new(), chunk.to_vec()));
    let mut messages: Vec<proto::Held> =
        entries.chain(bundles).map(|(entries, bundles)| proto::Held { entries, bundles, more: true }).collect();
    match messages.last_mut() {
        Some(last) => last.more = false,
        None => messages.push(proto::Held::default()),
    }
    messages
}

fn to_wire(position: &Position) -> proto::Position {
    proto::Position {
        history: Bytes::copy_from_slice(&position.history),
        revision: position.revision,
        digest: Bytes::copy_from_slice(&position.digest),
    }
}

fn from_wire(position: proto::Position) -> Position {
    Position { history: position.history.to_vec(), revision: position.revision, digest: position.digest.to_vec() }
}
