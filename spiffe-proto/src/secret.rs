//! `Debug` for the messages that carry secrets: everything but the secret.

use std::fmt::{Debug, Formatter, Result};

use crate::{agent, broker, delegatedidentity, envoy_tls, types, workload};

/// Stands where a secret would be; says only whether there is one.
struct Hidden(bool);

impl Debug for Hidden {
    fn fmt(&self, f: &mut Formatter<'_>) -> Result {
        f.write_str(if self.0 { "(hidden)" } else { "(empty)" })
    }
}

macro_rules! debug {
    ($type:ty, $name:literal, shown: [$($shown:ident),*], hidden: [$($hidden:ident: $empty:expr),+]) => {
        impl Debug for $type {
            fn fmt(&self, f: &mut Formatter<'_>) -> Result {
                f.debug_struct($name)
                    $(.field(stringify!($shown), &self.$shown))*
                    $(.field(stringify!($hidden), &Hidden(!$empty(&self.$hidden))))+
                    .finish()
            }
        }
    };
}

fn text(value: &str) -> bool {
    value.is_empty()
}

fn octets(value: &[u8]) -> bool {
    value.is_empty()
}

debug!(workload::X509svid, "X509SVID", shown: [spiffe_id, x509_svid, bundle, hint], hidden: [x509_svid_key: octets]);
debug!(workload::Jwtsvid, "JWTSVID", shown: [spiffe_id, hint], hidden: [svid: text]);
debug!(workload::Witsvid, "WITSVID", shown: [spiffe_id, hint], hidden: [wit_svid: text, wit_svid_key: text]);
debug!(workload::ValidateJwtsvidRequest, "ValidateJWTSVIDRequest", shown: [audience], hidden: [svid: text]);
debug!(broker::X509svid, "X509SVID", shown: [spiffe_id, x509_svid, bundle, hint], hidden: [x509_svid_key: octets]);
debug!(broker::Jwtsvid, "JWTSVID", shown: [spiffe_id, hint], hidden: [svid: text]);
debug!(types::Jwtsvid, "JWTSVID", shown: [id, expires_at, issued_at, hint], hidden: [token: text]);
debug!(types::Witsvid, "WITSVID", shown: [id, expires_at, issued_at, hint], hidden: [token: text]);
debug!(types::JoinToken, "JoinToken", shown: [expires_at], hidden: [value: text]);
debug!(types::AttestationData, "AttestationData", shown: [r#type], hidden: [payload: octets]);
debug!(agent::CreateJoinTokenRequest, "CreateJoinTokenRequest", shown: [ttl, agent_id], hidden: [token: text]);
debug!(delegatedidentity::X509svidWithKey, "X509SVIDWithKey", shown: [x509_svid], hidden: [x509_svid_key: octets]);
debug!(envoy_tls::TlsCertificate, "TlsCertificate", shown: [certificate_chain], hidden: [private_key: Option::is_none]);
