//! H-01 to H-12 in all places: entry creation (E), configuration (C), `FetchJWTSVID.spiffe_id` (J), the subject of a
//! token (S), the URI name of a TLS peer (U).

use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use e2e::testkit::{Binaries, Presented, secured, tls, unix, wire::loopback};
use serde_json::json;
use spiffe_proto::entry::entry_client::EntryClient;
use spiffe_proto::entry::{BatchCreateEntryRequest, CountEntriesRequest};
use spiffe_proto::types;
use spiffe_proto::workload::{JwtsvidRequest, ValidateJwtsvidRequest};
use tonic::Code;

use super::forge::Forge;
use super::{A, House, logs_are_clean, text};

/// Everything that is no SPIFFE ID in any place, by the row that says so.
fn hostile() -> Vec<(&'static str, String)> {
    let fixed: &[(&str, &[&str])] = &[
        (
            "H-02",
            &[
                "spiffe://",
                "spiffe:///a",
                "spiffe:/example.org/a",
                "spiffe:example.org/a",
                "//example.org/a",
                "https://example.org/a",
            ],
        ),
        ("H-03", &["SPIFFE://example.org/a", "spiffe://EXAMPLE.org/a"]),
        (
            "H-05",
            &[
                "spiffe://example.org/%61",
                "spiffe://example.org/a%2Fb",
                "spiffe://example.org/%2e%2e/a",
                "spiffe://example.org/%00",
                "spiffe://ex%61mple.org/a",
                "spiffe://example.org/%",
                "%",
            ],
        ),
        (
            "H-06",
            &[
                "spiffe://example.org/.",
                "spiffe://example.org/..",
                "spiffe://example.org/a/./b",
                "spiffe://example.org/a/../b",
                "spiffe://example.org/../a",
                "spiffe://example.org/a/..",
            ],
        ),
        (
            "H-07",
            &[
                "spiffe://example.org/a/",
                "spiffe://example.org//a",
                "spiffe://example.org/a//b",
                "spiffe://example.org/",
                "spiffe://example.org/a?",
                "spiffe://example.org/a?q=1",
                "spiffe://example.org/a#",
                "spiffe://example.org/a#f",
            ],
        ),
        (
            "H-08",
            &[
                "spiffe://u:p@example.org/a",
                "spiffe://@example.org/a",
                "spiffe://example.org:443/a",
                "spiffe://example.org:/a",
                "spiffe://evil.test@example.org/a",
                "spiffe://example.org@evil.test/a",
            ],
        ),
        (
            "H-09",
            &[
                "spiffe://[::1]/a",
                "spiffe://b\u{fc}cher.test/a",
                "spiffe://ex\u{430}mple.org/a",
                "spiffe://example.org/\u{430}",
                "spiffe://example.org\\a",
                "spiffe://example.org/a\\b",
            ],
        ),
    ];
    let mut all: Vec<(&str, String)> =
        fixed.iter().flat_map(|(row, texts)| texts.iter().map(|text| (*row, (*text).to_owned()))).collect();
    for wild in ["\n", "\r\n", " ", "\t", "\u{200b}", "\u{feff}"] {
        all.push(("H-04", format!("{A}{wild}")));
        all.push(("H-04", format!("{wild}{A}")));
    }
    all.extend("~+@:;,=*!$&'()".chars().map(|wild| ("H-10", format!("spiffe://example.org/a{wild}b"))));
    all.push(("H-11", format!("spiffe://example.org/{}", "b".repeat(2028))));
    all.push(("H-11", format!("spiffe://{}/a", "a".repeat(256))));
    all
}

/// As [`hostile`], and what no argument of a program can hold.
fn hostile_on_the_wire() -> Vec<(&'static str, String)> {
    let mut all = hostile();
    all.push(("H-04", format!("{A}\0")));
    all.push(("H-04", format!("\0{A}")));
    all.push(("H-11", format!("spiffe://example.org/{}", "b".repeat(1 << 20))));
    all.push(("H-11", format!("spiffe://example.org{}", "/a".repeat(1 << 20))));
    all
}

fn shown(text: &str) -> String {
    text.chars().take(60).collect::<String>().escape_debug().to_string()
}

fn entry(id: types::Spiffeid) -> types::Entry {
    let parent = types::Spiffeid { trust_domain: "example.org".into(), path: "/node".into() };
    let selector = types::Selector { r#type: "unix".into(), value: "uid:4294967294".into() };
    types::Entry { spiffe_id: Some(id), parent_id: Some(parent), selectors: vec![selector], ..types::Entry::default() }
}

/// The two fields of the message that stand for a text.
fn split(text: &str) -> types::Spiffeid {
    let rest = text.strip_prefix("spiffe://").unwrap_or(text);
    let (trust_domain, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
    let scheme = if text.starts_with("spiffe://") { "" } else { "x:" };
    types::Spiffeid { trust_domain: format!("{scheme}{trust_domain}"), path: path.to_owned() }
}

#[tokio::test(flavor = "multi_thread")]
async fn h_01_to_h_12_entries() -> Result<()> {
    let house = House::new().await?;
    let before = house.entries()?;
    let mut client = EntryClient::new(unix(&house.server.socket()).await?);
    let mut create = async |id: types::Spiffeid| -> Result<i32> {
        let request = BatchCreateEntryRequest { entries: vec![entry(id)], output_mask: None };
        match client.batch_create_entry(request).await {
            Ok(answer) => {
                let results = answer.into_inner().results;
                Ok(results.first().and_then(|result| result.status.as_ref()).context("no status")?.code)
            }
            Err(status) => Ok(i32::from(status.code())),
        }
    };
    for (row, text) in hostile_on_the_wire() {
        assert_eq!(create(split(&text)).await?, 3, "{row}: {}", shown(&text));
    }
    assert_eq!(create(types::Spiffeid::default()).await?, 3, "H-01");
    // Trust domains as names of somebody else: legal, but not ours to register.
    for name in ["a..b", ".a", "a.", ".", "..", "-", "_", "10.0.0.1", "1", &"a".repeat(255)] {
        let id = types::Spiffeid { trust_domain: name.to_owned(), path: "/a".into() };
        assert_eq!(create(id).await?, 3, "H-12: {name}");
    }
    assert_eq!(house.entries()?, before);

    for (row, text) in hostile().into_iter().chain([("H-01", String::new())]) {
        let created = house.server.command(&[
            "entry",
            "create",
            "-parentID",
            super::NODE,
            "-spiffeID",
            &text,
            "-selector",
            "unix:uid:1",
        ])?;
        assert!(!created.status.success(), "{row}: {}: {}", shown(&text), super::text(&created));
    }
    assert_eq!(house.entries()?, before);

    // What looks odd and is legal is kept as it is.
    let longest = format!("spiffe://example.org/{}", "b".repeat(2027));
    let legal = [
        "spiffe://example.org/...",
        "spiffe://example.org/..a",
        "spiffe://example.org/a..",
        "spiffe://example.org/.a",
        &longest,
    ];
    for text in legal {
        assert_eq!(create(split(text)).await?, 0, "{}", shown(text));
    }
    let now = house.entries()?;
    for text in legal {
        assert!(now.iter().any(|id| id.contains(text.trim_start_matches("spiffe://example.org"))), "{}", shown(text));
    }
    house.still_served().await?;
    logs_are_clean(&house)
}

#[tokio::test(flavor = "multi_thread")]
async fn h_01_to_h_12_configuration() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let server = Binaries::signet()?.server;
    let file = folder.path().join("server.conf");
    let validate = |trust_domain: &str, admin: &str| -> Result<std::process::Output> {
        let admins = if admin.is_empty() { json!([]) } else { json!([admin]) };
        let text = json!({
            "server": {
                "trust_domain": trust_domain, "bind_address": "127.0.0.1", "bind_port": 8081,
                "data_dir": folder.path(), "admin_ids": admins, "socket_path": folder.path().join("api.sock"),
            },
            "plugins": {
                "DataStore": [{"sled": {"plugin_data": {}}}],
                "KeyManager": [{"memory": {"plugin_data": {}}}],
                "NodeAttestor": [{"join_token": {"plugin_data": {}}}],
            },
        });
        std::fs::write(&file, text.to_string())?;
        let path = file.to_str().context("not UTF-8")?;
        Ok(std::process::Command::new(&server).args(["validate", "-config", path]).stdin(Stdio::null()).output()?)
    };
    let good = validate("example.org", "spiffe://other.test/admin")?;
    assert!(good.status.success(), "{}", text(&good));
    let refused = |row: &str, given: &str, output: &std::process::Output| {
        assert!(!output.status.success(), "{row}: {} was accepted", shown(given));
        let told = text(output);
        let wild = told.chars().find(|char| char.is_control() && !"\n\t".contains(*char));
        assert_eq!(wild, None, "{row}: {}: {told:?}", shown(given));
        assert!(told.len() < 8 * 1024, "{row}: {}: {} bytes of text", shown(given), told.len());
    };
    for (row, given) in hostile_on_the_wire() {
        refused(row, &given, &validate("example.org", &given)?);
    }
    for (row, given) in hostile_on_the_wire() {
        let name = split(&given).trust_domain;
        // What is wrong with some is the path alone.
        if name != "example.org" {
            refused(row, &name, &validate(&name, "")?);
        }
    }
    for name in ["a..b", ".a", "a.", ".", "..", ""] {
        refused("H-12", name, &validate(name, "")?);
    }
    for name in ["-", "_", "10.0.0.1", "1"] {
        let accepted = validate(name, "")?;
        assert!(accepted.status.success(), "H-12: {name}: {}", text(&accepted));
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn h_01_to_h_12_requested_ids_and_subjects() -> Result<()> {
    let house = House::new().await?;
    let forge = Forge::of(&house.server)?;
    let mut client = house.workload_api().await?;
    let ask = |id: &str| JwtsvidRequest { audience: vec!["svc".into()], spiffe_id: id.to_owned() };
    for (row, text) in hostile_on_the_wire() {
        let status = client.fetch_jwtsvid(secured(ask(&text))).await.err().context(row)?;
        assert_eq!(status.code(), Code::InvalidArgument, "{row}: {}: {status:?}", shown(&text));
    }
    let unset = client.fetch_jwtsvid(secured(ask(""))).await?.into_inner();
    assert_eq!(unset.svids.len(), 1, "H-01");
    let longest = format!("spiffe://{}/{}", "a".repeat(255), "b".repeat(1783));
    for legal in ["spiffe://example.org/...", "spiffe://a..b/a", "spiffe://_/a", "spiffe://10.0.0.1/a", &longest] {
        let status = client.fetch_jwtsvid(secured(ask(legal))).await.err().context("somebody else's token")?;
        assert_eq!(status.code(), Code::PermissionDenied, "{}: {status:?}", shown(legal));
    }

    let validate = |svid: String| ValidateJwtsvidRequest { audience: "svc".into(), svid };
    let good = client.validate_jwtsvid(secured(validate(forge.token(A)?))).await?.into_inner();
    assert_eq!(good.spiffe_id, A);
    let kept = "spiffe://example.org/...";
    assert_eq!(client.validate_jwtsvid(secured(validate(forge.token(kept)?))).await?.into_inner().spiffe_id, kept);
    for (row, text) in hostile_on_the_wire().into_iter().chain([("H-01", String::new())]) {
        let status = client.validate_jwtsvid(secured(validate(forge.token(&text)?))).await.err().context(row)?;
        let code = status.code();
        let too_large = text.len() > 1 << 20 && matches!(code, Code::OutOfRange | Code::ResourceExhausted);
        assert!(code == Code::InvalidArgument || too_large, "{row}: {}: {status:?}", shown(&text));
    }
    house.still_served().await?;
    logs_are_clean(&house)
}

/// What an administrator's call comes to; a handshake that fails is Unavailable or worse, never an answer.
async fn call(house: &House, presented: Presented) -> Result<Code> {
    let address = SocketAddr::from(([127, 0, 0, 1], house.server.port));
    let Ok(channel) = tls(address, loopback(1)?, Some(presented)).await else { return Ok(Code::Unavailable) };
    let counted = EntryClient::new(channel).count_entries(CountEntriesRequest::default()).await;
    Ok(counted.map_or_else(|status| status.code(), |_| Code::Ok))
}

#[tokio::test(flavor = "multi_thread")]
async fn h_01_to_h_12_names_of_peers() -> Result<()> {
    let house = House::with(Binaries::signet()?, "  admin_ids = [\"spiffe://example.org/a\"]\n", "").await?;
    let forge = Forge::of(&house.server)?;
    let one = async |uri: &[u8]| call(&house, forge.certificate(&[uri])?).await;
    // So the forged certificates are good but for their names.
    assert_eq!(one(A.as_bytes()).await?, Code::Ok);
    assert_eq!(one(b"spiffe://example.org/...").await?, Code::PermissionDenied);
    let refused = |code: Code| matches!(code, Code::Unavailable | Code::Unknown | Code::Internal | Code::Cancelled);
    for (row, text) in hostile().into_iter().chain([("H-01", String::new()), ("H-04", format!("{A}\0"))]) {
        let code = one(text.as_bytes()).await?;
        assert!(refused(code), "{row}: {}: {code:?}", shown(&text));
    }
    // H-09 and H-30: bytes that are no text at all. H-13: two names, though both be ours. H-17: no path.
    for bytes in [&b"spiffe://example.org/\xff"[..], b"spiffe://example.org/\xc3", b"spiffe://example.org"] {
        let code = one(bytes).await?;
        assert!(refused(code), "{}: {code:?}", bytes.escape_ascii());
    }
    let id = A.as_bytes();
    for names in [&[id, b"spiffe://example.org/b"][..], &[id, b"https://x.test/"], &[id, id], &[]] {
        let code = call(&house, forge.certificate(names)?).await?;
        assert!(refused(code), "{} names: {code:?}", names.len());
    }
    // H-12, H-18: the name of somebody else, signed by us.
    for name in ["a..b", ".a", "a.", ".", "..", "-", "_", "10.0.0.1", "1", "other.test", "evil.test"] {
        let code = one(format!("spiffe://{name}/a").as_bytes()).await?;
        assert!(refused(code), "{name}: {code:?}");
    }
    assert_eq!(one(A.as_bytes()).await?, Code::Ok);
    house.still_served().await?;
    ensure!(!house.entries()?.is_empty());
    logs_are_clean(&house)
}
