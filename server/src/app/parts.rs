//! What the configuration chooses among: store, keys, policy, attestors.

use std::sync::Arc;

use runtime::entropy::Entropy;

use super::StartError;
use crate::attest::NodeAttestor;
use crate::attest::join_token::JoinTokens;
use crate::attest::x509pop::{self, X509Pop};
use crate::authority::keys::SigningKeys;
use crate::authority::keys::disk::DiskKeys;
use crate::authority::keys::memory::MemoryKeys;
use crate::authority::profile::{CaSubject, Policy};
use crate::config::Config;
use crate::config::checked::{DataStore, KeyManager, NodeAttestor as AttestorConfig, X509PopRoots};
use crate::history::memory::Memory;
use crate::history::sled::{self, Sled};
use crate::history::{HistoryId, Replica, Store};
use crate::state::model::KeyOwner;

pub(super) async fn open_store(config: &Config, entropy: &Entropy) -> Result<Arc<dyn Store>, StartError> {
    let history = HistoryId(entropy.bytes());
    Ok(match &config.data_store {
        DataStore::Sled { dir } => {
            Arc::new(Sled::open(dir, history, sled::Options::default()).await.map_err(StartError::Store)?)
        }
        DataStore::Memory => Arc::new(Memory::new(history)),
    })
}

pub(super) fn open_keys(
    config: &Config,
    replica: &Replica,
    entropy: &Entropy,
) -> Result<Arc<dyn SigningKeys>, StartError> {
    Ok(match &config.key_manager {
        KeyManager::Disk { keys_path } => {
            let keys = DiskKeys::open(keys_path, entropy).map_err(StartError::Keys)?;
            let state = replica.latest();
            // A store in memory is another one at every start.
            let history = (config.data_store != DataStore::Memory).then(|| state.position().history.0);
            let journal: Vec<_> = state
                .all_slots()
                .filter_map(|slot| match slot.owner {
                    KeyOwner::Server(owner) => Some((owner, slot.public_key.clone())),
                    KeyOwner::Shared => None,
                })
                .collect();
            keys.belong_to(history, &journal).map_err(StartError::Keys)?;
            Arc::new(keys)
        }
        KeyManager::Memory => Arc::new(MemoryKeys::new(entropy)),
    })
}

pub(super) fn policy(config: &Config) -> Policy {
    Policy {
        trust_domain: config.trust_domain.clone(),
        ca_subject: CaSubject {
            country: config.ca_subject.country.clone(),
            organization: config.ca_subject.organization.clone(),
            common_name: config.ca_subject.common_name.clone(),
        },
        ca_ttl: config.ca_ttl,
        ca_key_type: config.ca_key_type,
        jwt_key_type: (!config.disable_jwt_svids).then_some(config.jwt_key_type),
        default_x509_svid_ttl: config.default_x509_svid_ttl,
        default_jwt_svid_ttl: config.default_jwt_svid_ttl,
        agent_ttl: config.agent_ttl,
        jwt_issuer: config.jwt_issuer.clone(),
    }
}

pub(super) fn attestors(
    config: &Config,
    replica: &Replica,
    entropy: &Entropy,
) -> Result<Vec<Arc<dyn NodeAttestor>>, StartError> {
    let attestor = |configured: &AttestorConfig| -> Result<Arc<dyn NodeAttestor>, StartError> {
        match configured {
            AttestorConfig::JoinToken => Ok(Arc::new(JoinTokens::new(replica.clone()))),
            AttestorConfig::X509Pop(options) => {
                let mode = match &options.roots {
                    X509PopRoots::ExternalPki(certificates) => {
                        x509pop::Mode::Authorities { certificates: certificates.clone() }
                    }
                    X509PopRoots::Spiffe { prefix } => x509pop::Mode::Spiffe { prefix: prefix.clone() },
                };
                let settings = x509pop::Settings {
                    mode,
                    agent_path_template: options.agent_path_template.clone(),
                    max_intermediates: options.max_intermediates,
                    max_rsa_key_size: options.max_rsa_key_size,
                    verify_client_ip: options.verify_client_ip,
                };
                let made = X509Pop::new(&settings, replica.clone(), entropy.clone());
                Ok(Arc::new(made.map_err(StartError::X509Pop)?))
            }
        }
    };
    config.node_attestors.iter().map(attestor).collect()
}
