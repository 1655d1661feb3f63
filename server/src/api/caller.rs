//! Who calls.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use spiffe::id::SpiffeId;
use spiffe::x509::Serial;
use transport::peer::{Peer, UnixPeer};
use transport::serve::Ending;
use transport::serve::network_name;

use crate::state::model::Scope;

/// The caller of one request, as its connection proves it. Nothing a request says about itself is in here.
#[derive(Clone, Debug)]
pub struct Caller {
    /// What the connection proves.
    pub kind: CallerKind,
    /// The tenant the caller belongs to.
    pub scope: Scope,
    /// Address of a network caller; none for a local one.
    pub address: Option<IpAddr>,
    /// The end of the connection: it comes when the connection proves nothing any more.
    pub ending: Ending,
}

/// What a connection proves about its caller.
#[derive(Clone, Debug)]
pub enum CallerKind {
    /// A network caller without a certificate.
    Anonymous,
    /// A process that could open the admin socket.
    Local(Arc<UnixPeer>),
    /// A network caller whose X.509-SVID was verified in the handshake.
    X509 {
        /// The SPIFFE ID of the certificate.
        id: SpiffeId,
        /// Its serial number.
        serial: Serial,
        /// When it runs out; it was valid in the handshake, but a connection outlives a handshake.
        not_after: SystemTime,
        /// The root that it was verified by; a connection outlives bundles, too.
        root: Bytes,
    },
}

impl Caller {
    /// The caller at the other end of `peer`, whose connection ends by `ending`.
    pub fn of(peer: &Peer, ending: Ending) -> Self {
        let (kind, address) = match peer {
            Peer::Unix(process) => (CallerKind::Local(Arc::clone(process)), None),
            Peer::Tcp { address, certificate: None } => (CallerKind::Anonymous, Some(address.ip())),
            Peer::Tcp { address, certificate: Some(chain) } => {
                let kind = CallerKind::X509 {
                    id: chain.id.clone(),
                    serial: chain.serial,
                    not_after: chain.not_after,
                    root: chain.root.clone(),
                };
                (kind, Some(address.ip()))
            }
        };
        Self { kind, scope: Scope::trust_domain(), address, ending }
    }

    /// The SPIFFE ID of the caller, if it proved one.
    pub fn id(&self) -> Option<&SpiffeId> {
        match &self.kind {
            CallerKind::X509 { id, .. } => Some(id),
            CallerKind::Anonymous | CallerKind::Local(_) => None,
        }
    }

    /// Whoever answers for the caller, as log lines are counted: its id, or the network it calls from.
    pub fn party(&self) -> String {
        match (self.id(), self.address) {
            (Some(id), _) => id.to_string(),
            (None, Some(address)) => network_name(address),
            (None, None) => "admin socket".to_owned(),
        }
    }
}
