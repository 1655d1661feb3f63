//! The streams of the Workload API: each message is everything, and there is one for each change.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use runtime::telemetry::Limiter;
use spiffe::bundle::Bundle;
use spiffe_proto::workload as wire;
use tokio::time::Instant;
use tonic::Status;
use transport::peer::UnixPeer;
use zeroize::Zeroizing;

use super::message::{MESSAGE_LIMIT, encode, encode_secret, message_length};
use super::status;
use crate::cache::{HeldSvid, Subscription, View};
use crate::workload::look_again;

/// How long a first message waits for SVIDs that are still to be signed. Then the caller is told to come back, which
/// it can see, unlike silence.
const FIRST_MESSAGE: Duration = Duration::from_secs(30);
/// How long a look at the caller holds: about what an answer takes from here to the socket.
pub(super) const LOOK: Duration = Duration::from_millis(1);
/// An answer of this size is worth a warning: not much more and clients refuse it.
const LARGE: usize = 3 * 1024 * 1024;

const TOO_LARGE: &str = "An answer is too large for any client; it is not sent";
const NEARLY_TOO_LARGE: &str = "An answer comes near the limit of clients";

type Messages = BoxStream<'static, Result<Bytes, Status>>;

/// One caller's stream.
struct Follower<K> {
    subscription: Subscription,
    peer: Arc<UnixPeer>,
    log: Limiter,
    /// When the peer was last known to be who was attested.
    looked_at: Instant,
    /// What was sent last.
    sent: Option<Bytes>,
    kind: K,
}

/// What a kind of stream makes of a view.
trait Kind: Send + 'static {
    /// The message for a view; nothing if there is none to be sent now.
    fn message(&self, view: &View, first: bool) -> Result<Option<Bytes>, Status>;

    /// Says at debug what a process gets.
    fn tell(&self, _view: &View, _peer: &UnixPeer) {}
}

/// Messages for a caller that was attested just now, until the first error.
fn follow<K: Kind>(subscription: Subscription, peer: Arc<UnixPeer>, log: Limiter, kind: K) -> Messages {
    let follower = Follower { subscription, peer, log, looked_at: Instant::now(), sent: None, kind };
    stream::unfold(Some(follower), |follower| async {
        let mut follower = follower?;
        match follower.next().await {
            Ok(message) => Some((Ok(message), Some(follower))),
            Err(status) => Some((Err(status), None)),
        }
    })
    .boxed()
}

impl<K: Kind> Follower<K> {
    /// The next message, when there is one that differs from the last.
    async fn next(&mut self) -> Result<Bytes, Status> {
        let patience = Instant::now() + FIRST_MESSAGE;
        loop {
            let first = self.sent.is_none();
            let changed = self.subscription.changed();
            let view = if first {
                tokio::time::timeout_at(patience, changed).await.map_err(|_| status::not_issued())?
            } else {
                changed.await
            };
            let view = view.ok_or_else(status::not_issued)?;
            let Some(message) = self.kind.message(&view, first)? else { continue };
            if self.sent.as_ref() == Some(&message) {
                continue;
            }
            self.check_size(&message, &view)?;
            // What is sent goes to the process that was attested, however long ago that was.
            if self.looked_at.elapsed() > LOOK {
                look_again(&self.peer).await.map_err(|refusal| status::refused(&refusal))?;
                self.looked_at = Instant::now();
            }
            self.kind.tell(&view, &self.peer);
            self.sent = Some(message.clone());
            return Ok(message);
        }
    }

    fn check_size(&self, message: &Bytes, view: &View) -> Result<(), Status> {
        let (length, entries, party) = (message_length(message), view.entries.len(), &self.peer.party);
        if length > MESSAGE_LIMIT {
            if self.log.allow(TOO_LARGE, party.name()) {
                tracing::error!(%party, length, entries, "{TOO_LARGE}");
            }
            return Err(status::too_large(length, entries));
        }
        if length > LARGE && self.log.allow(NEARLY_TOO_LARGE, party.name()) {
            tracing::warn!(%party, length, entries, limit = MESSAGE_LIMIT, "{NEARLY_TOO_LARGE}");
        }
        Ok(())
    }
}

/// The X.509-SVIDs of a caller.
pub(super) fn follow_svids(subscription: Subscription, peer: Arc<UnixPeer>, log: Limiter) -> Messages {
    follow(subscription, peer, log, Svids)
}

struct Svids;

impl Kind for Svids {
    fn message(&self, view: &View, first: bool) -> Result<Option<Bytes>, Status> {
        if !view.entitled {
            return Err(status::no_identity());
        }
        // The first message fixes the default identity, so it waits until that is known. Later ones must not wait: one
        // entry that cannot be signed would let the others' SVIDs run out.
        if first && !view.complete {
            return Ok(None);
        }
        if view.svids.is_empty() {
            return Err(status::not_issued());
        }
        Ok(Some(view.encoded.get_or_init(|| svids(view)).clone()))
    }

    fn tell(&self, view: &View, peer: &UnixPeer) {
        for svid in &view.svids {
            tracing::debug!(
                method = "FetchX509SVID",
                pid = peer.pid,
                spiffe_id = %svid.id,
                entry = %svid.entry_id,
                "Fetched X.509 SVID"
            );
        }
    }
}

fn svids(view: &View) -> Bytes {
    let bundle = view.bundle.x509_der_concatenated();
    let svid = |held: &Arc<HeldSvid>| wire::X509svid {
        spiffe_id: held.id.to_string(),
        x509_svid: held.chain.concat().into(),
        x509_svid_key: Bytes::from_owner(Zeroizing::new(held.key.expose_pkcs8().to_vec())),
        bundle: bundle.clone(),
        hint: held.hint.to_string(),
    };
    encode_secret(&wire::X509svidResponse {
        svids: view.svids.iter().map(svid).collect(),
        crl: Vec::new(),
        federated_bundles: x509(&view.federated),
    })
}

/// Bundles by the ids of their trust domains. One without any authority is left out: it would make some clients drop
/// the whole message, and says the same as its absence.
fn x509(bundles: &[Arc<Bundle>]) -> HashMap<String, Bytes> {
    let known = bundles.iter().filter(|bundle| !bundle.x509.is_empty());
    known.map(|bundle| (bundle.trust_domain.id_string(), bundle.x509_der_concatenated())).collect()
}

/// Which bundles a stream shows.
#[derive(Clone, Copy)]
pub(super) enum Bundles {
    X509,
    Jwt,
}

/// The bundles of a caller; the own one also of `anybody`.
pub(super) fn follow_bundles(
    subscription: Subscription,
    peer: Arc<UnixPeer>,
    log: Limiter,
    bundles: Bundles,
    anybody: bool,
) -> Messages {
    follow(subscription, peer, log, Shown { bundles, anybody })
}

struct Shown {
    bundles: Bundles,
    anybody: bool,
}

impl Kind for Shown {
    fn message(&self, view: &View, _: bool) -> Result<Option<Bytes>, Status> {
        if !view.entitled && !self.anybody {
            return Err(status::no_identity());
        }
        // A caller without identity has no entries, so its view has no foreign bundles.
        let (encoded, encode): (_, fn(&View) -> Bytes) = match self.bundles {
            Bundles::X509 => (&view.encoded_x509_bundles, x509_bundles),
            Bundles::Jwt => (&view.encoded_jwt_bundles, jwt_bundles),
        };
        Ok(Some(encoded.get_or_init(|| encode(view)).clone()))
    }
}

fn x509_bundles(view: &View) -> Bytes {
    let mut bundles = x509(&view.federated);
    bundles.insert(view.bundle.trust_domain.id_string(), view.bundle.x509_der_concatenated());
    encode(&wire::X509BundlesResponse { crl: Vec::new(), bundles })
}

fn jwt_bundles(view: &View) -> Bytes {
    let all = std::iter::once(&view.bundle).chain(&view.federated);
    let bundles = all.map(|bundle| (bundle.trust_domain.id_string(), bundle.to_workload_jwks().into())).collect();
    encode(&wire::JwtBundlesResponse { bundles })
}
