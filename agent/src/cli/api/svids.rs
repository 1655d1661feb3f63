//! What the Workload API answered, read and verified before it is shown or written.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use runtime::console::{Screen, go_time, plural};
use runtime::duration;
use spiffe::bundle::{Bundle, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::verify::{PeerRole, x509_chain};
use spiffe::x509::{Certificate, PrivateKey, X509Error, split_certificates};
use spiffe_proto::workload::X509svidResponse;

use super::super::error::CliError;

/// One X.509-SVID with everything that came with it.
pub(super) struct Svid {
    pub(super) id: String,
    pub(super) hint: String,
    pub(super) chain: Vec<Certificate>,
    pub(super) key: PrivateKey,
    pub(super) bundle: Vec<Certificate>,
}

/// An answer of `FetchX509SVID`.
pub(super) struct Answer {
    pub(super) svids: Vec<Svid>,
    /// Bundles of other trust domains, by their id.
    pub(super) federated: BTreeMap<String, Vec<Certificate>>,
}

impl Answer {
    /// Reads an answer and verifies each SVID against its bundle at `now`.
    pub(super) fn read(response: &X509svidResponse, now: SystemTime) -> Result<Self, CliError> {
        if response.svids.is_empty() {
            return Err(CliError::Missing("svids"));
        }
        let mut federated = BTreeMap::new();
        for (id, der) in &response.federated_bundles {
            federated.insert(id.clone(), certificates(der, "bundle of federated domain", id)?);
        }
        let mut svids = Vec::new();
        for svid in &response.svids {
            let id = svid.spiffe_id.clone();
            let chain = certificates(&svid.x509_svid, "svid", &id)?;
            let bundle = certificates(&svid.bundle, "trust bundle", &id)?;
            verify(&id, &chain, &bundle, now)?;
            let key = PrivateKey::from_pkcs8(svid.x509_svid_key.to_vec())
                .map_err(|source| CliError::Key { id: id.clone(), source })?;
            svids.push(Svid { id, hint: svid.hint.clone(), chain, key, bundle });
        }
        Ok(Self { svids, federated })
    }

    /// What was received, and how long it took.
    pub(super) fn pretty(&self, took: Duration, with_hints: bool, screen: &mut Screen) {
        let count = self.svids.len();
        screen.line(format!("Received {count} {} after {}", plural(count, "svid", "svids"), duration::format(took)));
        for svid in &self.svids {
            screen.line(format!("\nSPIFFE ID:\t\t{}", svid.id));
            if with_hints && !svid.hint.is_empty() {
                screen.line(format!("Hint:\t\t\t{}", svid.hint));
            }
            if let Some(leaf) = svid.chain.first() {
                validity("SVID", leaf, screen);
            }
            for (index, intermediate) in svid.chain.iter().enumerate().skip(1) {
                validity(&format!("Intermediate #{index}"), intermediate, screen);
            }
            for (index, authority) in svid.bundle.iter().enumerate() {
                validity(&format!("CA #{}", index + 1), authority, screen);
            }
            for (id, bundle) in &self.federated {
                let id = id.strip_prefix("spiffe://").unwrap_or(id);
                for (index, authority) in bundle.iter().enumerate() {
                    validity(&format!("[{id}] CA #{}", index + 1), authority, screen);
                }
            }
        }
        screen.line("");
    }
}

fn validity(what: &str, certificate: &Certificate, screen: &mut Screen) {
    let seconds = |at: SystemTime| {
        let since = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs();
        i64::try_from(since).unwrap_or(i64::MAX)
    };
    screen.line(format!("{what} Valid After:\t{}", go_time(seconds(certificate.not_before))));
    screen.line(format!("{what} Valid Until:\t{}", go_time(seconds(certificate.not_after))));
}

fn certificates(der: &Bytes, what: &'static str, id: &str) -> Result<Vec<Certificate>, CliError> {
    let failed = |source: X509Error| CliError::Certificate { what, id: id.to_owned(), source };
    let read: Vec<_> = split_certificates(der)
        .map_err(failed)?
        .into_iter()
        .map(Certificate::parse)
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    if read.is_empty() { Err(failed(X509Error::EmptyChain)) } else { Ok(read) }
}

fn verify(id: &str, chain: &[Certificate], bundle: &[Certificate], now: SystemTime) -> Result<(), CliError> {
    let parsed = SpiffeId::parse(id).map_err(|source| CliError::Id { id: id.to_owned(), source })?;
    let trust_domain: TrustDomain = parsed.trust_domain().clone();
    let mut trusted = Bundle::empty(trust_domain.clone());
    trusted.x509 = bundle.iter().map(|root| X509Authority { der: root.der.clone(), tainted: false }).collect();
    let bundles: BTreeMap<TrustDomain, Arc<Bundle>> = [(trust_domain, Arc::new(trusted))].into();
    let chain: Vec<Bytes> = chain.iter().map(|certificate| certificate.der.clone()).collect();
    match x509_chain(&chain, &bundles, PeerRole::Client, now) {
        Ok(_) => Ok(()),
        Err(source) => Err(CliError::Unverified { id: id.to_owned(), source }),
    }
}
