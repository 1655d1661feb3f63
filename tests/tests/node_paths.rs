//! Certificates of nodes, judged by Go's verifier and by ours: every combination of a root, an intermediate and a leaf of
//! many shapes. SPIRE uses Go's, and node certificates were made to pass there.

use std::collections::BTreeMap;
use std::process::{Command, Stdio};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use e2e::testkit::client::tools;
use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DnType, ExtendedKeyUsagePurpose, GeneralSubtree, IsCa,
    Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, NameConstraints, SanType,
};
use serde_json::{Value, json};
use spiffe::bundle::X509Authority;
use spiffe::verify::node_path;
use time::macros::datetime;

/// 2027-01-15: when all certificates are judged.
const NOW: i64 = 1_800_000_000;

type Edit = fn(&mut CertificateParams);

fn begins_in_year_one(params: &mut CertificateParams) {
    params.not_before = datetime!(0001-01-01 0:00 UTC);
}

fn is_over_since_year_one(params: &mut CertificateParams) {
    params.not_before = datetime!(0001-01-01 0:00 UTC);
    params.not_after = datetime!(0001-01-01 0:00 UTC);
}

fn expired(params: &mut CertificateParams) {
    params.not_after = datetime!(2026-12-31 0:00 UTC);
}

fn not_begun(params: &mut CertificateParams) {
    params.not_before = datetime!(2027-12-31 0:00 UTC);
}

fn serial_zero(params: &mut CertificateParams) {
    params.serial_number = Some(vec![0].into());
}

fn no_authority(params: &mut CertificateParams) {
    params.is_ca = IsCa::NoCa;
}

fn no_authority_and_says_so(params: &mut CertificateParams) {
    params.is_ca = IsCa::ExplicitNoCa;
}

fn authority(params: &mut CertificateParams) {
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
}

fn path_length_zero(params: &mut CertificateParams) {
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
}

fn may_sign_revocation_lists_only(params: &mut CertificateParams) {
    params.key_usages = vec![KeyUsagePurpose::CrlSign];
}

fn no_key_usage(params: &mut CertificateParams) {
    params.key_usages.clear();
}

fn extension(oid: &[u64], critical: bool, content: &[u8]) -> CustomExtension {
    let mut extension = CustomExtension::from_oid_content(oid, content.to_vec());
    extension.set_criticality(critical);
    extension
}

fn unknown_critical(params: &mut CertificateParams) {
    params.custom_extensions.push(extension(&[1, 2, 3, 4, 5], true, &[5, 0]));
}

fn unknown(params: &mut CertificateParams) {
    params.custom_extensions.push(extension(&[1, 2, 3, 4, 5], false, &[5, 0]));
}

/// A certificate policy, anyPolicy.
fn critical_policy(params: &mut CertificateParams) {
    let any_policy = [0x30, 8, 0x30, 6, 6, 4, 0x55, 0x1d, 0x20, 0];
    params.custom_extensions.push(extension(&[2, 5, 29, 32], true, &any_policy));
}

fn foreign_subject_key_id(params: &mut CertificateParams) {
    params.key_identifier_method = KeyIdMethod::PreSpecified(vec![7; 20]);
}

fn no_authority_key_id(params: &mut CertificateParams) {
    params.use_authority_key_identifier_extension = false;
}

fn permits(domain: &str) -> NameConstraints {
    NameConstraints {
        permitted_subtrees: vec![GeneralSubtree::DnsName(domain.to_owned())],
        excluded_subtrees: Vec::new(),
    }
}

fn permits_the_name(params: &mut CertificateParams) {
    params.name_constraints = Some(permits("pki.test"));
}

fn permits_another_name(params: &mut CertificateParams) {
    params.name_constraints = Some(permits("other.test"));
}

fn for_signing_code(params: &mut CertificateParams) {
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::CodeSigning];
}

const PLAIN: (&str, Edit) = ("plain", |_| {});

const AUTHORITIES: &[(&str, Edit)] = &[
    PLAIN,
    ("begins in year one", begins_in_year_one),
    ("over since year one", is_over_since_year_one),
    ("expired", expired),
    ("not begun", not_begun),
    ("serial zero", serial_zero),
    ("no authority", no_authority),
    ("no authority and says so", no_authority_and_says_so),
    ("path length zero", path_length_zero),
    ("revocation lists only", may_sign_revocation_lists_only),
    ("no key usage", no_key_usage),
    ("unknown critical extension", unknown_critical),
    ("unknown extension", unknown),
    ("critical policy", critical_policy),
    ("foreign subject key id", foreign_subject_key_id),
    ("permits the name", permits_the_name),
    ("permits another name", permits_another_name),
    ("for signing code", for_signing_code),
];

const LEAVES: &[(&str, Edit)] = &[
    PLAIN,
    ("begins in year one", begins_in_year_one),
    ("over since year one", is_over_since_year_one),
    ("expired", expired),
    ("not begun", not_begun),
    ("serial zero", serial_zero),
    ("authority", authority),
    ("path length zero", path_length_zero),
    ("unknown critical extension", unknown_critical),
    ("critical policy", critical_policy),
    ("no authority key id", no_authority_key_id),
    ("for signing code", for_signing_code),
];

struct Signer {
    params: CertificateParams,
    key: KeyPair,
    der: Bytes,
}

fn template(name: &str, is_ca: bool) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    (params.not_before, params.not_after) = (datetime!(2026-01-01 0:00 UTC), datetime!(2028-01-01 0:00 UTC));
    params.use_authority_key_identifier_extension = true;
    if is_ca {
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    } else {
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    }
    params
}

impl Signer {
    fn root(name: &str, edit: Edit) -> Result<Self> {
        let (mut params, key) = (template(name, true), KeyPair::generate()?);
        edit(&mut params);
        let der = Bytes::copy_from_slice(params.self_signed(&key)?.der());
        Ok(Self { params, key, der })
    }

    fn signs(&self, params: &CertificateParams, key: &KeyPair) -> Result<Bytes> {
        let issuer = Issuer::from_params(&self.params, &self.key);
        Ok(Bytes::copy_from_slice(params.signed_by(key, &issuer)?.der()))
    }

    fn intermediate(&self, edit: Edit) -> Result<Self> {
        let (mut params, key) = (template("intermediate", true), KeyPair::generate()?);
        edit(&mut params);
        let der = self.signs(&params, &key)?;
        Ok(Self { params, key, der })
    }

    fn leaf(&self, edit: Edit) -> Result<Bytes> {
        let mut params = template("node", false);
        params.subject_alt_names = vec![SanType::DnsName("node.pki.test".try_into()?)];
        edit(&mut params);
        self.signs(&params, &KeyPair::generate()?)
    }
}

struct Case {
    name: String,
    chain: Vec<Bytes>,
    roots: Vec<Bytes>,
}

/// One shape for each part of a path, and for two parts at a time.
fn corpus() -> Result<Vec<Case>> {
    let mut cases = Vec::new();
    let mut add = |name: String, chain: &[&Bytes], roots: &[&Bytes]| {
        let owned = |certificates: &[&Bytes]| certificates.iter().copied().cloned().collect();
        cases.push(Case { name, chain: owned(chain), roots: owned(roots) });
    };
    for (root_name, root_edit) in AUTHORITIES {
        let root = Signer::root("root", *root_edit)?;
        let stranger = Signer::root("root", PLAIN.1)?;
        for (name, edit) in LEAVES {
            let leaf = root.leaf(*edit)?;
            add(format!("root {root_name}, leaf {name}"), &[&leaf], &[&root.der]);
            add(format!("root {root_name}, leaf {name}, trusted itself"), &[&leaf], &[&leaf]);
            add(format!("root {root_name}, leaf {name}, of a stranger"), &[&leaf], &[&stranger.der]);
            add(format!("root {root_name}, leaf {name}, and a stranger"), &[&leaf], &[&stranger.der, &root.der]);
        }
        for (name, edit) in AUTHORITIES {
            let between = root.intermediate(*edit)?;
            let leaf = between.leaf(PLAIN.1)?;
            let below = between.intermediate(PLAIN.1)?;
            let deep = below.leaf(PLAIN.1)?;
            let what = format!("root {root_name}, intermediate {name}");
            add(what.clone(), &[&leaf, &between.der], &[&root.der]);
            add(format!("{what}, absent"), &[&leaf], &[&root.der]);
            add(format!("{what}, trusted itself"), &[&leaf], &[&between.der]);
            add(format!("{what}, with its root"), &[&leaf, &between.der, &root.der], &[&root.der]);
            add(format!("{what}, and one below"), &[&deep, &below.der, &between.der], &[&root.der]);
        }
    }
    Ok(cases)
}

/// What Go says to each case: the authorities on valid paths, or nothing.
fn ask_go(cases: &[Case]) -> Result<BTreeMap<String, Option<Vec<String>>>> {
    let encoded =
        |certificates: &[Bytes]| -> Vec<String> { certificates.iter().map(|der| STANDARD.encode(der)).collect() };
    let questions: Vec<Value> = cases
        .iter()
        .map(|case| json!({"name": case.name, "chain": encoded(&case.chain), "roots": encoded(&case.roots), "at": NOW}))
        .collect();
    let folder = tempfile::tempdir()?;
    let input = folder.path().join("cases.json");
    std::fs::write(&input, serde_json::to_vec(&questions)?)?;
    let mut command = Command::new(tools()?.join("bin/client-go"));
    command.arg("paths").stdin(std::fs::File::open(&input)?).stderr(Stdio::inherit());
    // The client makes no connection here.
    let output = command.output().context("starting client-go")?;
    ensure!(output.status.success(), "client-go failed: {}", String::from_utf8_lossy(&output.stdout));
    let mut answers = BTreeMap::new();
    for event in serde_json::Deserializer::from_slice(&output.stdout).into_iter::<Value>() {
        let event = event?;
        if event["event"] == "path" {
            let name = event["name"].as_str().context("no name")?.to_owned();
            answers.insert(name, serde_json::from_value(event["authorities"].clone())?);
        }
    }
    Ok(answers)
}

fn ours(case: &Case) -> Result<Option<Vec<String>>> {
    let roots: Vec<X509Authority> =
        case.roots.iter().map(|der| X509Authority { der: der.clone(), tainted: false }).collect();
    let now = UNIX_EPOCH + Duration::from_secs(u64::try_from(NOW)?);
    Ok(node_path(&case.chain, &roots, now).ok().map(|path| {
        let digest = |der: &Bytes| aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, der);
        let hex = |der: &Bytes| digest(der).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        let mut found: Vec<String> = path.authorities.iter().map(hex).collect();
        found.sort();
        found
    }))
}

#[test]
fn go_spiffe_judges_node_certificates_as_we_do() -> Result<()> {
    let cases = corpus()?;
    let answers = ask_go(&cases)?;
    assert_eq!(answers.len(), cases.len());
    let mut different = Vec::new();
    let mut accepted = 0;
    for case in &cases {
        let (go, ours) = (&answers[&case.name], ours(case)?);
        accepted += usize::from(go.is_some());
        // Paths with name constraints are judged by webpki, which refuses these shapes (docs/divergences.md).
        let odd = ["year one", "authority", "path length zero", "critical policy"];
        let denied = case.name.contains("permits the name") && odd.iter().any(|shape| case.name.contains(shape));
        if *go != ours && !(denied && ours.is_none()) {
            different.push(format!("{}: Go {go:?}, ours {ours:?}", case.name));
        }
    }
    assert_eq!(different, Vec::<String>::new());
    // Neither verdict is the only one.
    ensure!(accepted > cases.len() / 5 && accepted < cases.len() * 4 / 5, "{accepted} of {}", cases.len());
    Ok(())
}
