//! A certificate authority of tests, with the profile that servers use.

use std::time::{Duration, SystemTime};

use bytes::Bytes;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber, SubjectPublicKeyInfo,
};
use spiffe::bundle::{Bundle, JwtAuthority, X509Authority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::x509::Csr;

/// How far certificates are backdated, as by SPIRE's servers.
const BACKDATE: Duration = Duration::from_secs(10);

pub(crate) struct Authority {
    trust_domain: TrustDomain,
    root: Bytes,
    issuer: Issuer<'static, KeyPair>,
    next_serial: u64,
    /// How far certificates begin before they are signed.
    pub backdate: Duration,
}

impl Authority {
    pub(crate) fn new(trust_domain: &TrustDomain, now: SystemTime) -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(trust_domain.id_string().try_into().unwrap())];
        params.not_before = now.into();
        params.not_after = (now + Duration::from_secs(10 * 365 * 86400)).into();
        let root = Bytes::copy_from_slice(params.self_signed(&key).unwrap().der());
        Self {
            trust_domain: trust_domain.clone(),
            root,
            issuer: Issuer::new(params, key),
            next_serial: 1,
            backdate: BACKDATE,
        }
    }

    pub(crate) fn bundle(&self, sequence: u64, tainted: bool) -> Bundle {
        Bundle {
            x509: vec![X509Authority { der: self.root.clone(), tainted }],
            jwt: vec![JwtAuthority {
                key_id: "jwt-key".into(),
                public_key: Bytes::from_static(b"not looked at"),
                expires_at: None,
                tainted: false,
            }],
            sequence,
            ..Bundle::empty(self.trust_domain.clone())
        }
    }

    /// Signs a leaf for the key of `csr`; answers it with its serial number.
    pub(crate) fn sign(&mut self, csr: &[u8], id: &SpiffeId, ttl: Duration, now: SystemTime) -> (Bytes, u64) {
        let csr = Csr::parse(csr).unwrap();
        csr.verify_signature().unwrap();
        let key = SubjectPublicKeyInfo::from_der(&csr.spki_der).unwrap();
        let serial = self.next_serial;
        self.next_serial += 1;
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::ExplicitNoCa;
        params.serial_number = Some(SerialNumber::from(serial));
        params.use_authority_key_identifier_extension = true;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().unwrap())];
        params.not_before = (now - self.backdate).into();
        params.not_after = (now + ttl).into();
        let leaf = params.signed_by(&key, &self.issuer).unwrap();
        (Bytes::copy_from_slice(leaf.der()), serial)
    }
}
