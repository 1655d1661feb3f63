//! Hostile inputs over the socket, by the ids of the catalogue H-65 to H-72. Each ends with the proof that another client is
//! still served.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::testkit::process::tail;
use e2e::testkit::raw::{Answer, Raw, framed, nonsense};
use e2e::testkit::{Agent, AgentOptions, Binaries, Server, ServerOptions, secured, unix, wait};
use prost::Message;
use spiffe_proto::workload::spiffe_workload_api_client::SpiffeWorkloadApiClient;
use spiffe_proto::workload::{JwtsvidRequest, ValidateJwtsvidRequest, X509svidRequest, X509svidResponse};
use tempfile::TempDir;
use tokio::net::UnixStream;
use tonic::Code;

const NODE: &str = "spiffe://example.org/node";
const FETCH: &str = "/SpiffeWorkloadAPI/FetchX509SVID";
const HEADER: (&str, &[u8]) = ("workload.spiffe.io", b"true");

const OK: i32 = 0;
const INVALID_ARGUMENT: i32 = 3;
const DEADLINE_EXCEEDED: i32 = 4;
const OUT_OF_RANGE: i32 = 11;
const UNIMPLEMENTED: i32 = 12;
const INTERNAL: i32 = 13;
const RESOURCE_EXHAUSTED: i32 = 8;
const CANCELLED: i32 = 1;

struct House {
    agent: Agent,
    server: Server,
    _folder: TempDir,
}

impl House {
    async fn new(server_block: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let binaries = Binaries::signet()?;
        let options = ServerOptions { server_block: server_block.into(), ..ServerOptions::default() };
        let server = Server::start(&binaries, &folder.path().join("server"), &options).await?;
        let settings = AgentOptions { join_token: Some(server.token(Some(NODE))?), ..AgentOptions::default() };
        let agent = Agent::start(&binaries, &folder.path().join("agent"), &server, &settings).await?;
        let house = Self { agent, server, _folder: folder };
        house.register("/web")?;
        wait::until("the first SVID", Duration::from_secs(20), async || fetch(&house.agent.socket()).await.ok())
            .await?;
        Ok(house)
    }

    fn register(&self, path: &str) -> Result<()> {
        let selector = format!("unix:uid:{}", nix::unistd::getuid());
        let id = format!("spiffe://example.org{path}");
        self.server.ok(&["entry", "create", "-parentID", NODE, "-spiffeID", &id, "-selector", &selector]).map(drop)
    }

    /// Another client, on a connection of its own, is served.
    async fn serves(&self) -> Result<()> {
        let message = fetch(&self.agent.socket()).await?;
        ensure!(message.svids.iter().any(|svid| svid.spiffe_id == "spiffe://example.org/web"), "{message:?}");
        Ok(())
    }

    /// One request on a connection of its own.
    async fn ask(&self, headers: &[(&str, &[u8])], body: Option<&[u8]>) -> Result<Answer> {
        let mut raw = Raw::connect(&self.agent.socket()).await?;
        let id = raw.open(headers, body).await?;
        raw.answer(id, served).await
    }
}

async fn fetch(socket: &Path) -> Result<X509svidResponse> {
    let mut client = SpiffeWorkloadApiClient::new(unix(socket).await?);
    let mut stream = client.fetch_x509svid(secured(X509svidRequest {})).await?.into_inner();
    let message =
        tokio::time::timeout(Duration::from_secs(5), stream.message()).await.context("not served within 5 s")?;
    message?.context("the stream ended with OK")
}

/// Whether an answer holds a whole message.
fn served(answer: &Answer) -> bool {
    let length = answer.data.get(1..5).map(|length| u32::from_be_bytes([length[0], length[1], length[2], length[3]]));
    length.is_some_and(|length| answer.data.len() >= 5 + length as usize)
}

#[tokio::test]
async fn h_65_security_header() -> Result<()> {
    let house = House::new("").await?;
    let refused: &[&[(&str, &[u8])]] = &[
        &[],
        &[("workload.spiffe.io", b"True")],
        &[("workload.spiffe.io", b"TRUE")],
        &[("workload.spiffe.io", b"1")],
        &[("workload.spiffe.io", b"")],
        &[("workload.spiffe.io", b"true,true")],
        &[HEADER, HEADER],
        &[("broker.spiffe.io", b"true")],
        &[("workload.spiffe.io-bin", b"dHJ1ZQ")],
    ];
    for headers in refused {
        let answer = house.ask(&Raw::request(FETCH, headers), Some(&framed(b""))).await?;
        assert_eq!(answer.grpc, Some(INVALID_ARGUMENT), "{headers:?}: {answer:?}");
        assert_eq!(answer.message.as_deref(), Some("security header missing from request"), "{headers:?}");
        assert!(answer.data.is_empty(), "{headers:?}");
    }
    // HTTP/2 has no upper case in names. No body follows: the connection may be closed before it could be written.
    let answer = house.ask(&Raw::request(FETCH, &[("Workload.SPIFFE.io", b"true")]), None).await?;
    assert!(answer.reset == Some(1) || answer.goaway == Some(1), "{answer:?}");
    assert!(answer.data.is_empty());
    assert!(served(&house.ask(&Raw::request(FETCH, &[HEADER]), Some(&framed(b""))).await?));
    house.serves().await
}

#[tokio::test]
async fn h_66_authority() -> Result<()> {
    let house = House::new("").await?;
    let with = |authority: Option<&'static [u8]>, host: Option<&'static [u8]>| -> Vec<(&'static str, &'static [u8])> {
        let mut headers: Vec<(&str, &[u8])> =
            vec![(":method", b"POST"), (":scheme", b"http"), (":path", FETCH.as_bytes())];
        headers.extend(authority.map(|authority| (":authority", authority)));
        headers.extend([("content-type", b"application/grpc".as_slice()), ("te", b"trailers"), HEADER]);
        headers.extend(host.map(|host| ("host", host)));
        headers
    };
    let served_all = [
        (Some(b"localhost".as_slice()), None),
        (Some(b"%2Frun%2Fagent.sock"), None),
        (Some(b"/run/agent.sock"), None),
        (Some(b""), None),
        (None, Some(b"localhost".as_slice())),
        (None, None),
    ];
    let mut shared = Raw::connect(&house.agent.socket()).await?;
    for (authority, host) in served_all {
        let id = shared.open(&with(authority, host), Some(&framed(b""))).await?;
        let answer = shared.answer(id, served).await?;
        assert!(served(&answer), "{authority:?} {host:?}: {answer:?}");
    }
    // Two that may be refused, but only for their own stream.
    let blank = shared.open(&with(Some(b"a b"), None), Some(&framed(b""))).await?;
    let answer = shared.answer(blank, served).await?;
    assert!(served(&answer) || answer.reset.is_some(), "{answer:?}");
    let id = shared.open(&with(Some(b"localhost"), None), Some(&framed(b""))).await?;
    assert!(served(&shared.answer(id, served).await?));
    house.serves().await
}

#[tokio::test]
async fn h_66_an_endless_authority_is_refused() -> Result<()> {
    let house = House::new("").await?;
    let long = vec![b'a'; 64 * 1024];
    let mut headers = Raw::request(FETCH, &[HEADER]);
    headers.retain(|(name, _)| *name != ":authority");
    headers.insert(0, (":authority", &long));
    let answer = house.ask(&headers, Some(&framed(b""))).await?;
    let refused =
        answer.reset.is_some() || answer.http.as_deref() == Some("431") || answer.goaway.is_some() || answer.closed;
    assert!(refused && answer.data.is_empty(), "{answer:?}");
    house.serves().await
}

#[tokio::test]
async fn h_67_wrong_paths_methods_and_protocols() -> Result<()> {
    let house = House::new("").await?;
    let paths = [
        "/SpiffeWorkloadAPI/Nope",
        "/spiffe.workload.SpiffeWorkloadAPI/FetchX509SVID",
        "/spiffeworkloadapi/FetchX509SVID",
    ];
    for path in paths {
        let answer = house.ask(&Raw::request(path, &[HEADER]), Some(&framed(b""))).await?;
        assert_eq!(answer.grpc, Some(UNIMPLEMENTED), "{path}: {answer:?}");
    }
    let mut get = Raw::request(FETCH, &[HEADER]);
    get[0] = (":method", b"GET");
    let answer = house.ask(&get, Some(b"")).await?;
    let refused = answer.http.as_deref() == Some("405") || matches!(answer.grpc, Some(UNIMPLEMENTED | INTERNAL));
    assert!(refused && answer.data.is_empty(), "{answer:?}");
    let mut json = Raw::request(FETCH, &[HEADER]);
    json[4] = ("content-type", b"application/json");
    let answer = house.ask(&json, Some(b"{}")).await?;
    let refused = answer.http.as_deref() == Some("415") || matches!(answer.grpc, Some(UNIMPLEMENTED | INTERNAL));
    assert!(refused && answer.data.is_empty(), "{answer:?}");
    for bytes in [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".as_slice(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03AAAAAAAAAAAAAAAAAAAA",
    ] {
        nonsense(&house.agent.socket(), bytes).await?;
    }
    house.serves().await
}

#[tokio::test]
async fn h_68_malformed_messages() -> Result<()> {
    let house = House::new("").await?;
    let path = "/SpiffeWorkloadAPI/FetchJWTSVID";
    let mut nested = Vec::new();
    for _ in 0..200 {
        nested.push(0x0B | 0x78);
    }
    let malformed: [(&str, Vec<u8>); 5] = [
        ("truncated", framed(&[0x0A, 0x05, b'd'])),
        ("wrong wire type", framed(&[0x08, 0x01])),
        ("nested groups", framed(&nested)),
        ("varint of eleven bytes", framed(&[0x0A, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01])),
        ("length beyond the data", {
            let mut body = framed(b"");
            body[4] = 9;
            body
        }),
    ];
    for (what, body) in malformed {
        let answer = house.ask(&Raw::request(path, &[HEADER]), Some(&body)).await?;
        assert!(
            matches!(answer.grpc, Some(INTERNAL | INVALID_ARGUMENT)) || answer.reset.is_some(),
            "{what}: {answer:?}"
        );
        assert!(answer.data.is_empty(), "{what}");
    }
    let mut compressed = framed(b"\x0a\x02db");
    compressed[0] = 1;
    let answer = house.ask(&Raw::request(path, &[HEADER]), Some(&compressed)).await?;
    assert!(matches!(answer.grpc, Some(UNIMPLEMENTED | INTERNAL)), "{answer:?}");

    // Unknown fields are for newer versions, and are passed over.
    let mut unknown = JwtsvidRequest { audience: vec!["db".into()], ..Default::default() }.encode_to_vec();
    for number in 3..=500_u64 {
        prost::encoding::encode_key(number as u32, prost::encoding::WireType::Varint, &mut unknown);
        prost::encoding::encode_varint(number, &mut unknown);
    }
    let answer = house.ask(&Raw::request(path, &[HEADER]), Some(&framed(&unknown))).await?;
    assert!(served(&answer), "{answer:?}");
    house.serves().await
}

#[tokio::test]
async fn h_68_a_compression_bomb_is_not_unpacked() -> Result<()> {
    let house = House::new("").await?;
    let mut body = framed(&[0x1F, 0x8B, 8, 0, 0, 0, 0, 0, 0, 3]);
    body[0] = 1;
    let headers = Raw::request("/SpiffeWorkloadAPI/FetchJWTSVID", &[HEADER, ("grpc-encoding", b"gzip")]);
    let answer = house.ask(&headers, Some(&body)).await?;
    assert!(matches!(answer.grpc, Some(UNIMPLEMENTED | OUT_OF_RANGE | RESOURCE_EXHAUSTED)), "{answer:?}");
    house.serves().await
}

#[tokio::test]
async fn h_69_sizes() -> Result<()> {
    let house = House::new("").await?;
    let mut client =
        SpiffeWorkloadApiClient::new(unix(&house.agent.socket()).await?).max_encoding_message_size(usize::MAX);
    for size in [4 * 1024 * 1024 + 1, 5 * 1024 * 1024] {
        let request = ValidateJwtsvidRequest { audience: "db".into(), svid: "a".repeat(size) };
        let status = client.validate_jwtsvid(secured(request)).await.err().context("an endless request was read")?;
        assert!(matches!(status.code(), Code::OutOfRange | Code::ResourceExhausted), "{status:?}");
    }
    let long = vec![b'a'; 64 * 1024];
    let answer = house.ask(&Raw::request(FETCH, &[HEADER, ("x", &long)]), Some(&framed(b""))).await?;
    assert!(answer.data.is_empty() && !matches!(answer.grpc, Some(OK)), "{answer:?}");
    let names: Vec<String> = (0..10_000).map(|number| format!("x-{number}")).collect();
    let mut headers = Raw::request(FETCH, &[HEADER]);
    headers.extend(names.iter().map(|name| (name.as_str(), b"1".as_slice())));
    let answer = match house.ask(&headers, Some(&framed(b""))).await {
        Ok(answer) => answer,
        // The agent may close while we are still sending.
        Err(error) if error.downcast_ref::<std::io::Error>().is_some() => Answer { closed: true, ..Answer::default() },
        Err(error) => return Err(error),
    };
    assert!(answer.data.is_empty() && !matches!(answer.grpc, Some(OK)), "{answer:?}");
    house.serves().await
}

#[tokio::test]
async fn h_69_timeouts() -> Result<()> {
    let house = House::new("").await?;
    let with = |value: &'static [u8]| Raw::request(FETCH, &[HEADER, ("grpc-timeout", value)]);
    let answer = house.ask(&with(b"0n"), Some(&framed(b""))).await?;
    assert!(matches!(answer.grpc, Some(DEADLINE_EXCEEDED | CANCELLED)), "{answer:?}");
    let answer = house.ask(&with(b"99999999H"), Some(&framed(b""))).await?;
    assert!(served(&answer), "{answer:?}");
    let answer = house.ask(&with(b"soon"), Some(&framed(b""))).await?;
    assert!(served(&answer) || matches!(answer.grpc, Some(INVALID_ARGUMENT | INTERNAL)), "{answer:?}");
    house.serves().await
}

/// Raises this process's own limit, so that it is not the one to run out first.
fn many_descriptors() -> Result<usize> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(usize::try_from(hard.min(10_500))?)
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_ten_thousand_idle_connections() -> Result<()> {
    let house = House::new("").await?;
    let count = many_descriptors()? - 500;
    let mut held = Vec::with_capacity(count);
    for _ in 0..count {
        match UnixStream::connect(house.agent.socket()).await {
            Ok(stream) => held.push(stream),
            // A full backlog is an answer as well; the agent's other clients are what counts.
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => tokio::task::yield_now().await,
            Err(error) => return Err(error).context(format!("after {} connections", held.len())),
        }
    }
    // Another process, since the limits count by process.
    let fetched = house.agent.command(&["api", "fetch", "x509", "-timeout", "5s"])?;
    ensure!(fetched.status.success(), "{}", String::from_utf8_lossy(&fetched.stderr));
    drop(held);
    house.serves().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_a_thousand_streams_on_one_connection() -> Result<()> {
    let house = House::new("").await?;
    let mut raw = Raw::connect(&house.agent.socket()).await?;
    let mut last = Ok(0);
    for _ in 0..1000 {
        last = raw.open(&Raw::request(FETCH, &[HEADER]), Some(&framed(b""))).await;
    }
    // Served, refused in one of the ways that a client understands, or closed upon while still sending.
    let answer = match last {
        Ok(last) => raw.answer(last, served).await?,
        Err(_) => raw.answer(1, |answer| answer.goaway.is_some()).await?,
    };
    let refused =
        matches!(answer.grpc, Some(14 | RESOURCE_EXHAUSTED)) || answer.reset == Some(7) || answer.goaway.is_some();
    assert!(served(&answer) || refused, "{answer:?}");
    house.serves().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_rapid_reset_closes_the_connection() -> Result<()> {
    let house = House::new("").await?;
    let mut raw = Raw::connect(&house.agent.socket()).await?;
    let flood = async {
        for _ in 0..20_000 {
            let id = raw.open(&Raw::request(FETCH, &[HEADER]), None).await?;
            raw.reset(id).await?;
        }
        anyhow::Ok(())
    };
    // The agent closes while we are still sending, or says GOAWAY with ENHANCE_YOUR_CALM.
    let flooded = tokio::time::timeout(Duration::from_secs(20), flood).await;
    if let Ok(Ok(())) = flooded {
        let answer = raw.answer(u32::MAX, |answer| answer.goaway.is_some()).await?;
        assert!(answer.goaway == Some(11) || answer.closed, "{answer:?}");
    }
    house.serves().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_71_readers_that_never_read_cost_bounded_memory() -> Result<()> {
    let house = House::new("  default_x509_svid_ttl = \"2s\"\n  agent_ttl = \"1h\"\n").await?;
    let mut held = Vec::new();
    for _ in 0..50 {
        let mut raw = Raw::connect(&house.agent.socket()).await?;
        raw.open(&Raw::request(FETCH, &[HEADER]), Some(&framed(b""))).await?;
        held.push(raw);
    }
    let memory = || -> Result<u64> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", house.agent.pid()?))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
        Ok(line.split_whitespace().nth(1).context("no number")?.parse()?)
    };
    let first = fetch(&house.agent.socket()).await?.svids[0].x509_svid.clone();
    let before = memory()?;
    // Ten rotations, seen by somebody who does read.
    let mut seen = vec![first];
    wait::until("ten rotations", Duration::from_secs(60), async || {
        let svid = match fetch(&house.agent.socket()).await {
            Ok(message) => message.svids[0].x509_svid.clone(),
            Err(error) => return Some(Err(error.context(tail(&house.agent.log())))),
        };
        if !seen.contains(&svid) {
            seen.push(svid);
        }
        (seen.len() > 10).then_some(Ok(()))
    })
    .await??;
    let grown = memory()?.saturating_sub(before);
    assert!(grown < 16 * 1024, "{grown} KiB more after ten rotations");
    drop(held);
    house.serves().await
}

#[tokio::test]
async fn h_71_half_a_preface() -> Result<()> {
    let house = House::new("").await?;
    let mut held = Vec::new();
    for _ in 0..100 {
        let stream = UnixStream::connect(house.agent.socket()).await?;
        stream.writable().await?;
        stream.try_write(b"PRI * HT")?;
        held.push(stream);
    }
    house.serves().await
}

#[tokio::test]
async fn h_72_audiences_and_ids() -> Result<()> {
    let house = House::new("").await?;
    house.register("/second")?;
    let mut client = SpiffeWorkloadApiClient::new(unix(&house.agent.socket()).await?);
    let mut ask = async |audience: Vec<String>, id: &str| {
        let request = JwtsvidRequest { audience, spiffe_id: id.into() };
        client
            .fetch_jwtsvid(secured(request))
            .await
            .map(|answer| answer.into_inner().svids.len())
            .map_err(|status| status.code())
    };
    let db = || vec!["db".to_owned()];
    assert_eq!(ask(vec![], "").await, Err(Code::InvalidArgument));
    assert_eq!(ask(vec![String::new()], "").await, Err(Code::InvalidArgument));
    assert_eq!(ask((0..33).map(|number| number.to_string()).collect(), "").await, Err(Code::InvalidArgument));
    assert_eq!(ask(vec!["a".repeat(1024 * 1024)], "").await, Err(Code::InvalidArgument));
    assert_eq!(ask(db(), "spiffe://example.org/other").await, Err(Code::PermissionDenied));
    assert_eq!(ask(db(), "no id").await, Err(Code::InvalidArgument));
    let both =
        wait::until("two tokens", Duration::from_secs(20), async || (ask(db(), "").await == Ok(2)).then_some(()));
    both.await?;
    assert_eq!(ask(db(), "spiffe://example.org/second").await, Ok(1));
    house.serves().await
}
