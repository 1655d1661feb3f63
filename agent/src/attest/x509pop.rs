//! Attestation by possession of the key of an X.509 certificate that the node already has.

use std::path::PathBuf;
use std::sync::Arc;

use async_trait::async_trait;
use bytes::Bytes;
use runtime::entropy::Entropy;
use spiffe::attest::x509pop::{Challenge, NAME, Payload, respond};

use super::{NodeProver, ProveError, pem_file};

/// Proves possession of a key. The files are read for each attestation, so that they may be replaced at any time.
pub struct X509Pop {
    files: Arc<Files>,
    entropy: Entropy,
}

struct Files {
    private_key: PathBuf,
    certificate: PathBuf,
    intermediates: Option<PathBuf>,
}

impl X509Pop {
    /// The files, each in PEM form: the key, the certificate (intermediates may follow it), and more intermediates.
    pub fn new(private_key: PathBuf, certificate: PathBuf, intermediates: Option<PathBuf>, entropy: Entropy) -> Self {
        Self { files: Arc::new(Files { private_key, certificate, intermediates }), entropy }
    }
}

impl Files {
    fn payload(&self) -> Result<Bytes, ProveError> {
        let mut certificates = pem_file::certificates(&self.certificate)?;
        if let Some(path) = &self.intermediates {
            certificates.append(&mut pem_file::certificates(path)?);
        }
        let payload = Payload { certificates }.to_json().map_err(ProveError::Possession)?;
        Ok(Bytes::from(payload))
    }

    fn answer(&self, challenge: &[u8], nonce: [u8; 32]) -> Result<Bytes, ProveError> {
        let challenge = Challenge::from_json(challenge).map_err(ProveError::Possession)?;
        let key = pem_file::private_key(&self.private_key)?;
        let response = respond(&key, &challenge, nonce).map_err(ProveError::Possession)?;
        Ok(Bytes::from(response.to_json().map_err(ProveError::Possession)?))
    }
}

#[async_trait]
impl NodeProver for X509Pop {
    fn name(&self) -> &'static str {
        NAME
    }

    fn repeats(&self) -> bool {
        true
    }

    async fn payload(&self) -> Result<Bytes, ProveError> {
        let files = Arc::clone(&self.files);
        tokio::task::spawn_blocking(move || files.payload()).await.map_err(|_| ProveError::Interrupted)?
    }

    async fn answer(&self, challenge: Bytes) -> Result<Bytes, ProveError> {
        let (files, nonce) = (Arc::clone(&self.files), self.entropy.bytes());
        tokio::task::spawn_blocking(move || files.answer(&challenge, nonce))
            .await
            .map_err(|_| ProveError::Interrupted)?
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::{Duration, SystemTime};

    use rcgen::{BasicConstraints, CertificateParams, IsCa, KeyPair, KeyUsagePurpose};
    use spiffe::attest::x509pop::{Node, Policy, Response};
    use spiffe::bundle::X509Authority;

    use super::*;

    struct Pki {
        _dir: tempfile::TempDir,
        root: X509Authority,
        prover: X509Pop,
    }

    /// A root, and a leaf whose key is written under the PEM label `label`.
    fn pki(key: KeyPair, label: &str, key_der: Vec<u8>) -> Pki {
        let root_key = KeyPair::generate().unwrap();
        let mut root = CertificateParams::default();
        root.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        root.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let root_der = root.self_signed(&root_key).unwrap();
        let issuer = rcgen::Issuer::new(root, root_key);
        let mut leaf = CertificateParams::default();
        leaf.distinguished_name.push(rcgen::DnType::CommonName, "node");
        leaf.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        let leaf = leaf.signed_by(&key, &issuer).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: String| {
            let path = dir.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let certificate = write("leaf.pem", leaf.pem());
        let private_key = write("key.pem", pem::encode(&pem::Pem::new(label, key_der)));
        let root = X509Authority { der: Bytes::copy_from_slice(root_der.der()), tainted: false };
        Pki { prover: X509Pop::new(private_key, certificate, None, Entropy::seeded(1)), root, _dir: dir }
    }

    async fn attests(pki: &Pki) {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000);
        let payload = Payload::from_json(&pki.prover.payload().await.unwrap()).unwrap();
        let node = Node::verify(&payload, std::slice::from_ref(&pki.root), Policy::default(), now).unwrap();
        let challenge = node.challenge([7; 32]).unwrap();
        let answer = pki.prover.answer(challenge.to_json().unwrap().into()).await.unwrap();
        node.check(&challenge, &Response::from_json(&answer).unwrap()).unwrap();
        let other = node.challenge([8; 32]).unwrap();
        assert!(node.check(&other, &Response::from_json(&answer).unwrap()).is_err());
    }

    #[tokio::test]
    async fn both_halves_agree_for_every_form_of_key() {
        let key = KeyPair::generate().unwrap();
        let der = key.serialize_der();
        attests(&pki(key, "PRIVATE KEY", der)).await;

        let pair = aws_lc_rs::rsa::KeyPair::generate(aws_lc_rs::rsa::KeySize::Rsa2048).unwrap();
        let pkcs8: aws_lc_rs::encoding::Pkcs8V1Der<'_> = aws_lc_rs::encoding::AsDer::as_der(&pair).unwrap();
        let key = KeyPair::try_from(pkcs8.as_ref()).unwrap();
        attests(&pki(key, "PRIVATE KEY", pkcs8.as_ref().to_vec())).await;
    }

    #[tokio::test]
    async fn files_that_are_missing_or_wrong_are_named() {
        let missing = X509Pop::new("/nowhere/key".into(), "/nowhere/leaf".into(), None, Entropy::seeded(1));
        match missing.payload().await {
            Err(ProveError::File { path, .. }) => assert_eq!(path, Path::new("/nowhere/leaf")),
            other => panic!("{other:?}"),
        }
        let key = KeyPair::generate().unwrap();
        let der = key.serialize_der();
        let wrong = pki(key, "ENCRYPTED PRIVATE KEY", der);
        let challenge = br#"{"ecdsa_signature":{"nonce":"BwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwcHBwc="}}"#;
        match wrong.prover.answer(Bytes::from_static(challenge)).await {
            Err(ProveError::Content { path, .. }) => assert!(path.ends_with("key.pem")),
            other => panic!("{other:?}"),
        }
    }
}
