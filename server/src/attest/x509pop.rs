//! Attestation by proof of possession of a certificate's key. The checks are [`spiffe::attest::x509pop`]; here are the
//! trust anchors, the order of messages and the configuration.

use std::net::IpAddr;
use std::time::SystemTime;

use async_trait::async_trait;
use bytes::Bytes;
use runtime::entropy::Entropy;
use spiffe::attest::path_template::{PathTemplate, TemplateError};
use spiffe::attest::x509pop::{
    DEFAULT_SPIFFE_TEMPLATE, DEFAULT_TEMPLATE, FIELDS, NAME, Node, Payload, Policy, Response,
};
use spiffe::bundle::X509Authority;
use x509_parser::extensions::GeneralName;

use super::{AttestError, Attested, Challenger, NodeAttestor};
use crate::history::replica::Replica;

/// The prefix below which SVID paths may attest in mode `spiffe`, unless configured.
pub const DEFAULT_SPIFFE_PREFIX: &str = "/spire-exchange/";

/// Who vouches for the certificates of nodes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Authorities of their own.
    Authorities {
        /// Certificates, DER.
        certificates: Vec<Bytes>,
    },
    /// The trust domain's own authorities: certificates are SVIDs below a prefix.
    Spiffe {
        /// The prefix of their paths.
        prefix: String,
    },
}

/// How the method is configured.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Who vouches for nodes.
    pub mode: Mode,
    /// Template of the agent path; the mode's default if nothing.
    pub agent_path_template: Option<String>,
    /// How many certificates beside the leaf a node may send.
    pub max_intermediates: usize,
    /// Bits of the largest RSA key that is looked at.
    pub max_rsa_key_size: usize,
    /// Whether the leaf must name the address that the node calls from.
    pub verify_client_ip: bool,
}

impl Settings {
    /// The defaults of a mode.
    pub fn new(mode: Mode) -> Self {
        let Policy { max_intermediates, max_rsa_key_size } = Policy::default();
        Self { mode, agent_path_template: None, max_intermediates, max_rsa_key_size, verify_client_ip: false }
    }
}

/// Why the method cannot be used as configured.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SettingsError {
    /// No authorities at all.
    #[error("no trust bundle is configured")]
    NoBundle,
    /// The agent path template cannot be used.
    #[error("agent_path_template cannot be used")]
    Template(#[source] TemplateError),
}

/// Where the authorities come from when a node calls.
#[derive(Clone)]
enum Roots {
    Fixed(Vec<X509Authority>),
    Own { prefix: String },
}

/// Proves nodes by their certificates.
#[derive(Clone)]
pub struct X509Pop {
    roots: Roots,
    template: PathTemplate,
    policy: Policy,
    verify_client_ip: bool,
    replica: Replica,
    entropy: Entropy,
}

impl X509Pop {
    /// An attestor with these settings.
    ///
    /// # Errors
    /// If there are no authorities, or the template cannot be used.
    pub fn new(settings: &Settings, replica: Replica, entropy: Entropy) -> Result<Self, SettingsError> {
        let (roots, default) = match &settings.mode {
            Mode::Authorities { certificates } if certificates.is_empty() => return Err(SettingsError::NoBundle),
            Mode::Authorities { certificates } => {
                let authority = |der: &Bytes| X509Authority { der: der.clone(), tainted: false };
                (Roots::Fixed(certificates.iter().map(authority).collect()), DEFAULT_TEMPLATE)
            }
            Mode::Spiffe { prefix } => {
                let slash = if prefix.ends_with('/') { "" } else { "/" };
                (Roots::Own { prefix: format!("{prefix}{slash}") }, DEFAULT_SPIFFE_TEMPLATE)
            }
        };
        let template = settings.agent_path_template.as_deref().unwrap_or(default);
        Ok(Self {
            roots,
            template: PathTemplate::parse(template, FIELDS).map_err(SettingsError::Template)?,
            policy: Policy {
                max_intermediates: settings.max_intermediates,
                max_rsa_key_size: settings.max_rsa_key_size,
            },
            verify_client_ip: settings.verify_client_ip,
            replica,
            entropy,
        })
    }
}

/// The IP addresses that a certificate names.
fn addresses(der: &[u8]) -> Vec<IpAddr> {
    let Ok((_, certificate)) = x509_parser::parse_x509_certificate(der) else {
        return Vec::new();
    };
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let address = |name: &GeneralName<'_>| match name {
        GeneralName::IPAddress(bytes) => match bytes.len() {
            4 => <[u8; 4]>::try_from(*bytes).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(*bytes).ok().map(IpAddr::from),
            _ => None,
        },
        _ => None,
    };
    names.value.general_names.iter().filter_map(address).collect()
}

#[async_trait]
impl NodeAttestor for X509Pop {
    fn name(&self) -> &'static str {
        NAME
    }

    async fn attest(
        &self,
        payload: &[u8],
        challenger: &mut dyn Challenger,
        now: SystemTime,
    ) -> Result<Attested, AttestError> {
        let payload = Payload::from_json(payload).map_err(AttestError::Possession)?;
        let state = self.replica.latest();
        let trust_domain = state.trust_domain();
        let own;
        let roots: &[X509Authority] = match &self.roots {
            Roots::Fixed(authorities) => authorities,
            Roots::Own { .. } => {
                own = state.bundle(trust_domain).cloned();
                own.as_deref().map_or(&[], |bundle| bundle.x509.as_slice())
            }
        };
        let node = Node::verify(&payload, roots, self.policy, now).map_err(AttestError::Possession)?;
        if self.verify_client_ip {
            let address = challenger.address().ok_or(AttestError::NoAddress)?.to_canonical();
            if !addresses(&node.leaf().der).iter().any(|named| named.to_canonical() == address) {
                return Err(AttestError::WrongAddress);
            }
        }
        let challenge = node.challenge(self.entropy.bytes()).map_err(AttestError::Possession)?;
        let question = challenge.to_json().map_err(AttestError::Possession)?;
        let answer = challenger.challenge(Bytes::from(question)).await.map_err(AttestError::Challenge)?;
        let response = Response::from_json(&answer).map_err(AttestError::Possession)?;
        node.check(&challenge, &response).map_err(AttestError::Possession)?;
        let agent_id = match &self.roots {
            Roots::Fixed(_) => node.agent_id(trust_domain, &self.template),
            Roots::Own { prefix } => node.agent_id_of_svid(trust_domain, &self.template, prefix),
        };
        Ok(Attested {
            agent_id: agent_id.map_err(AttestError::Possession)?,
            selectors: node.selectors(trust_domain),
            can_reattest: true,
            token: None,
        })
    }
}

#[cfg(test)]
mod tests;
