//! H-29: certificate requests to everything that signs.

use anyhow::{Context, Result, bail};
use aws_lc_rs::digest::{self, Digest};
use aws_lc_rs::rand::{self, SystemRandom};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair as _};
use bytes::Bytes;
use e2e::testkit::node::Node;
use e2e::testkit::wire::loopback;
use e2e::testkit::{tls, unix};
use spiffe::x509::Certificate;
use spiffe_proto::agent::agent_client::AgentClient;
use spiffe_proto::agent::{
    AgentX509svidParams, AttestAgentRequest, RenewAgentRequest, attest_agent_request, attest_agent_response,
};
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{BatchCreateEntryRequest, GetAuthorizedEntriesRequest};
use spiffe_proto::svid::svid_client::SvidClient;
use spiffe_proto::svid::{BatchNewX509svidRequest, MintX509svidRequest, NewX509svidParams};
use spiffe_proto::types;
use tonic::{Code, Status};

use super::House;
use super::forge::der;

const ECDSA_SHA256: &[u8] = b"\x30\x0a\x06\x08\x2a\x86\x48\xce\x3d\x04\x03\x02";
const ECDSA_SHA1: &[u8] = b"\x30\x09\x06\x07\x2a\x86\x48\xce\x3d\x04\x01";
const P256: &[u8] = b"\x30\x13\x06\x07\x2a\x86\x48\xce\x3d\x02\x01\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07";
const RSA: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x01\x05\x00";
const RSA_SHA256: &[u8] = b"\x30\x0d\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x01\x0b\x05\x00";
const EXTENSION_REQUEST: &[u8] = b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x09\x0e";

fn seq(parts: &[&[u8]]) -> Vec<u8> {
    der(0x30, &parts.concat())
}

fn bits(content: &[u8]) -> Vec<u8> {
    der(0x03, &[&[0], content].concat())
}

fn uri(text: &str) -> Vec<u8> {
    der(0x86, text.as_bytes())
}

fn extension(kind: u8, value: &[u8]) -> Vec<u8> {
    seq(&[&[6, 3, 0x55, 0x1d, kind], &der(4, value)])
}

/// The part of a request that is signed: common name, key, extensions.
fn info(common_name: &str, spki: &[u8], extensions: &[Vec<u8>]) -> Vec<u8> {
    let name = seq(&[&der(0x31, &seq(&[b"\x06\x03\x55\x04\x03", &der(0x0c, common_name.as_bytes())]))]);
    let extensions = seq(&[EXTENSION_REQUEST, &der(0x31, &seq(&[&extensions.concat()]))]);
    seq(&[b"\x02\x01\x00", &name, spki, &der(0xa0, &extensions)])
}

/// A key that signs whatever it is given.
struct Key {
    pair: EcdsaKeyPair,
}

impl Key {
    fn new() -> Result<Self> {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())?;
        Ok(Self { pair: EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.as_ref())? })
    }

    fn spki(&self) -> Vec<u8> {
        seq(&[P256, &bits(self.pair.public_key().as_ref())])
    }

    fn request(&self, names: &[Vec<u8>], more: &[Vec<u8>]) -> Result<Vec<u8>> {
        let names = extension(17, &seq(&[&names.concat()]));
        let info = info("x", &self.spki(), &[&[names][..], more].concat());
        let signature = self.pair.sign(&SystemRandom::new(), &info)?;
        Ok(seq(&[&info, ECDSA_SHA256, &bits(signature.as_ref())]))
    }

    fn request_by_sha1(&self) -> Result<Vec<u8>> {
        let info = info("x", &self.spki(), &[extension(17, &seq(&[&uri(super::A)]))]);
        // ECDSA reads a hash as a number, so that zeros in front change nothing.
        let hash = digest::digest(&digest::SHA1_FOR_LEGACY_USE_ONLY, &info);
        let hash = Digest::import_less_safe(&[&[0; 12], hash.as_ref()].concat(), &digest::SHA256)?;
        let signature = self.pair.sign_digest(&hash)?;
        Ok(seq(&[&info, ECDSA_SHA1, &bits(signature.as_ref())]))
    }
}

/// A request for an RSA key of so many bits that nobody holds.
fn rsa_request(size: usize) -> Result<Vec<u8>> {
    let mut modulus = vec![0; size / 8];
    rand::fill(&mut modulus)?;
    modulus[0] |= 0x80;
    *modulus.last_mut().context("no modulus")? |= 1;
    let key = seq(&[&der(0x02, &[&[0], modulus.as_slice()].concat()), b"\x02\x03\x01\x00\x01"]);
    let info = info("x", &seq(&[RSA, &bits(&key)]), &[extension(17, &seq(&[&uri(super::A)]))]);
    Ok(seq(&[&info, RSA_SHA256, &bits(&vec![1; size / 8])]))
}

/// Everything that can be asked to sign, and the entry that it is asked about.
struct Desks<'a> {
    house: &'a House,
    node: Node,
    entry: String,
}

impl<'a> Desks<'a> {
    async fn of(house: &'a House) -> Result<Self> {
        let node = Node::by_token(&house.server, 1, &house.server.token(None)?).await?;
        let selector = types::Selector { r#type: "unix".into(), value: "uid:1".into() };
        let entry = types::Entry {
            spiffe_id: Some(types::Spiffeid { trust_domain: "example.org".into(), path: "/issued".into() }),
            parent_id: Some(node.id.clone()),
            selectors: vec![selector],
            dns_names: vec!["issued.example.org".into()],
            ..types::Entry::default()
        };
        let request = BatchCreateEntryRequest { entries: vec![entry], output_mask: None };
        let created = EntryClient::new(unix(&house.server.socket()).await?).batch_create_entry(request).await?;
        let created = created.into_inner().results.into_iter().next().context("no result")?;
        Ok(Self { house, node, entry: created.entry.context("not created")?.id })
    }

    async fn workload(&self, csr: &[u8]) -> Result<Certificate, Status> {
        let mut client = SvidClient::new(self.node.connect().await.map_err(unexpected)?);
        let params = NewX509svidParams { entry_id: self.entry.clone(), csr: Bytes::copy_from_slice(csr) };
        let answer = client.batch_new_x509svid(BatchNewX509svidRequest { params: vec![params] }).await?.into_inner();
        let result = answer.results.into_iter().next().ok_or_else(|| Status::internal("no result"))?;
        let status = result.status.ok_or_else(|| Status::internal("no status"))?;
        if status.code != 0 {
            return Err(Status::new(Code::from_i32(status.code), status.message));
        }
        leaf(result.svid)
    }

    async fn mint(&self, csr: &[u8]) -> Result<Certificate, Status> {
        let mut client = SvidClient::new(unix(&self.house.server.socket()).await.map_err(unexpected)?);
        let request = MintX509svidRequest { csr: Bytes::copy_from_slice(csr), ttl: 60 };
        leaf(client.mint_x509svid(request).await?.into_inner().svid)
    }

    async fn renewal(&self, csr: &[u8]) -> Result<Certificate, Status> {
        let mut client = AgentClient::new(self.node.connect().await.map_err(unexpected)?);
        let params = Some(AgentX509svidParams { csr: Bytes::copy_from_slice(csr) });
        leaf(client.renew_agent(RenewAgentRequest { params }).await?.into_inner().svid)
    }

    async fn attestation(&self, csr: &[u8], number: usize) -> Result<Certificate, Status> {
        let token = self.house.server.token(None).map_err(unexpected)?;
        let data = types::AttestationData { r#type: "join_token".into(), payload: token.into_bytes().into() };
        let params = AgentX509svidParams { csr: Bytes::copy_from_slice(csr) };
        let step = attest_agent_request::Params { data: Some(data), params: Some(params) };
        let request = AttestAgentRequest { step: Some(attest_agent_request::Step::Params(step)) };
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], self.house.server.port));
        let channel = tls(address, loopback(number).map_err(unexpected)?, None).await.map_err(unexpected)?;
        let mut answers = AgentClient::new(channel).attest_agent(tokio_stream::once(request)).await?.into_inner();
        match answers.message().await?.and_then(|answer| answer.step) {
            Some(attest_agent_response::Step::Result(result)) => leaf(result.svid),
            _ => Err(Status::internal("no result")),
        }
    }
}

fn unexpected(error: anyhow::Error) -> Status {
    Status::unknown(format!("{error:#}"))
}

fn leaf(svid: Option<types::X509svid>) -> Result<Certificate, Status> {
    let chain = svid.ok_or_else(|| Status::internal("no SVID"))?.cert_chain;
    let first = chain.into_iter().next().ok_or_else(|| Status::internal("an empty chain"))?;
    Certificate::parse(first).map_err(|error| Status::internal(error.to_string()))
}

#[tokio::test(flavor = "multi_thread")]
async fn h_29_requests_that_prove_nothing_are_refused_everywhere() -> Result<()> {
    let house = House::new().await?;
    let desks = Desks::of(&house).await?;
    let key = Key::new()?;
    let good = key.request(&[uri(super::A)], &[])?;
    let mut forged = good.clone();
    *forged.last_mut().context("empty")? ^= 1;
    let extensions: Vec<Vec<u8>> = (0..10_000).map(|_| extension(99, b"\x05\x00")).collect();
    let hostile: Vec<(&str, Vec<u8>)> = vec![
        ("bad self-signature", forged),
        ("10,000 extensions", key.request(&[uri(super::A)], &extensions)?),
        ("RSA-16384", rsa_request(16384)?),
        ("RSA-1024", rsa_request(1024)?),
        ("SHA-1", key.request_by_sha1()?),
        ("empty", vec![]),
        ("cut off", good[..good.len() - 1].to_vec()),
        ("trailing byte", [&good[..], &[0]].concat()),
        ("PEM", b"-----BEGIN CERTIFICATE REQUEST-----\nMAA=\n-----END CERTIFICATE REQUEST-----\n".to_vec()),
    ];
    let agents = house.server.ok(&["agent", "count"])?;
    for (number, (what, csr)) in hostile.iter().enumerate() {
        for (desk, outcome) in [
            ("BatchNewX509SVID", desks.workload(csr).await),
            ("MintX509SVID", desks.mint(csr).await),
            ("RenewAgent", desks.renewal(csr).await),
            ("AttestAgent", desks.attestation(csr, 10 + number).await),
        ] {
            let status = outcome.err().with_context(|| format!("{desk}, {what}: signed"))?;
            assert_eq!(status.code(), Code::InvalidArgument, "{desk}, {what}: {status:?}");
        }
    }
    assert_eq!(house.server.ok(&["agent", "count"])?, agents);

    let large = vec![0; 5 * 1024 * 1024];
    for outcome in [desks.workload(&large).await, desks.mint(&large).await, desks.renewal(&large).await] {
        let status = outcome.err().context("5 MiB: signed")?;
        assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
    }
    // The node and its entry are as they were.
    let mut client = EntryClient::new(desks.node.connect().await?);
    let entries =
        client.get_authorized_entries(GetAuthorizedEntriesRequest::default()).await?.into_inner().decoded()?;
    assert_eq!(entries.len(), 1);
    desks.workload(&good).await?;
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_29_what_a_request_asks_for_beyond_its_right_is_not_given() -> Result<()> {
    let house = House::new().await?;
    let desks = Desks::of(&house).await?;
    let key = Key::new()?;
    let authority = [extension(19, &seq(&[&[1, 1, 0xff]])), extension(15, &[3, 2, 2, 4])];
    let other = uri("spiffe://example.org/b");
    let requests = [
        ("another workload", key.request(std::slice::from_ref(&other), &[])?, true),
        ("the server", key.request(&[uri("spiffe://example.org/spire/server")], &[])?, false),
        ("another trust domain", key.request(&[uri("spiffe://other.test/a")], &[])?, false),
        ("two URIs", key.request(&[uri(super::A), other.clone()], &[])?, false),
        ("a DNS name", key.request(&[other.clone(), der(0x82, b"bank.test")], &[])?, true),
        ("an authority", key.request(&[other], &authority)?, true),
    ];
    for (number, (what, csr, minted)) in requests.iter().enumerate() {
        let workload = desks.workload(csr).await.with_context(|| format!("BatchNewX509SVID, {what}"))?;
        assert_eq!(workload.uris, ["spiffe://example.org/issued"], "{what}");
        assert_eq!(workload.dns_names, ["issued.example.org"], "{what}");
        let attested = desks.attestation(csr, 30 + number).await.with_context(|| format!("AttestAgent, {what}"))?;
        let [id] = attested.uris.as_slice() else { bail!("{what}: {:?}", attested.uris) };
        assert!(id.starts_with("spiffe://example.org/spire/agent/join_token/"), "{what}: {id}");
        let mut signed = vec![workload, attested];
        match desks.mint(csr).await {
            // An administrator may have any workload's name, but not make an authority.
            Ok(minted_for) if *minted => signed.push(minted_for),
            Err(status) if !minted => assert_eq!(status.code(), Code::InvalidArgument, "{what}: {status:?}"),
            other => bail!("MintX509SVID, {what}: {other:?}"),
        }
        for certificate in signed {
            assert!(!certificate.is_ca, "{what}");
            let usage = certificate.key_usage.context("no key usage")?;
            assert!(usage.digital_signature() && !usage.key_cert_sign() && !usage.crl_sign(), "{what}");
        }
    }
    let renewed = desks.renewal(&requests[0].1).await?;
    assert_eq!(renewed.uris, [desks.node.name()]);
    house.still_served().await
}
