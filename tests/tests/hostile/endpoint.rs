//! H-65 to H-69 and H-72: the Workload Endpoint, frame by frame.

use anyhow::{Context, Result};
use e2e::testkit::frames::{Fields, Frames, Outcome, framed, with, workload_call};
use e2e::testkit::secured;
use prost::Message as _;
use spiffe_proto::workload::{JwtsvidRequest, ValidateJwtsvidRequest, X509svidResponse};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::Code;

use super::{A, House, fetch, logs_are_clean};

const FETCH: &str = "FetchX509SVID";
const INVALID: Outcome = Outcome::Status(3);

fn is_svid(outcome: &Outcome) -> bool {
    let Outcome::Message(message) = outcome else { return false };
    X509svidResponse::decode(message.as_slice())
        .is_ok_and(|message| message.svids.first().is_some_and(|svid| svid.spiffe_id == A))
}

/// A fresh connection, one call on it, and then a good call on the same connection.
async fn then_a_good_one(house: &House, fields: &Fields, body: &[u8]) -> Result<(Outcome, Outcome)> {
    let mut frames = Frames::connect(&house.agent.socket()).await?;
    let outcome = frames.call(fields, Some(body)).await?;
    let good = match outcome {
        Outcome::Closed | Outcome::GoneAway(_) => outcome.clone(),
        _ => frames.call(&workload_call(FETCH), Some(&framed(b""))).await?,
    };
    Ok((outcome, good))
}

#[tokio::test(flavor = "multi_thread")]
async fn h_65_the_security_header_is_exactly_true() -> Result<()> {
    let house = House::new().await?;
    let plain = workload_call(FETCH);
    let without = with(plain.clone(), "workload.spiffe.io", None);
    let valued = |value: &str| with(plain.clone(), "workload.spiffe.io", Some(value.as_bytes()));
    let also = |name: &str, value: &str| {
        let mut fields = without.clone();
        fields.push((name.as_bytes().to_vec(), value.as_bytes().to_vec()));
        fields
    };
    let mut twice = plain.clone();
    twice.push((b"workload.spiffe.io".to_vec(), b"true".to_vec()));
    let wrong = [
        ("absent", without.clone()),
        ("True", valued("True")),
        ("TRUE", valued("TRUE")),
        ("1", valued("1")),
        ("empty", valued("")),
        ("true,true", valued("true,true")),
        ("twice", twice),
        ("of the broker", also("broker.spiffe.io", "true")),
        ("binary", also("workload.spiffe.io-bin", "dHJ1ZQ")),
    ];
    for method in [FETCH, "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles", "ValidateJWTSVID"] {
        for (what, fields) in &wrong {
            let path = format!("/SpiffeWorkloadAPI/{method}");
            let fields = with(fields.clone(), ":path", Some(path.as_bytes()));
            let (outcome, good) = then_a_good_one(&house, &fields, &framed(b"")).await?;
            assert_eq!(outcome, INVALID, "{method}, {what}");
            assert!(is_svid(&good), "{method}, {what}: {good:?}");
        }
    }
    let (spaced, _) = then_a_good_one(&house, &valued(" true"), &framed(b"")).await?;
    assert!(spaced == INVALID || is_svid(&spaced) || spaced == Outcome::Reset(1), "{spaced:?}");
    let (upper, _) = then_a_good_one(&house, &also("Workload.SPIFFE.io", "true"), &framed(b"")).await?;
    assert!(matches!(upper, Outcome::Reset(1) | Outcome::GoneAway(1)), "{upper:?}");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_66_any_authority_is_served() -> Result<()> {
    let house = House::new().await?;
    let plain = workload_call(FETCH);
    let authority = |value: &[u8]| with(plain.clone(), ":authority", Some(value));
    let without = with(plain.clone(), ":authority", None);
    let mut hosted = without.clone();
    hosted.push((b"host".to_vec(), b"localhost".to_vec()));
    let served = [
        ("localhost", authority(b"localhost")),
        ("escaped path", authority(b"%2Frun%2Fagent.sock")),
        ("path", authority(b"/run/agent.sock")),
        ("empty", authority(b"")),
        ("host instead", hosted),
        ("neither", without),
    ];
    for (what, fields) in served {
        let (outcome, good) = then_a_good_one(&house, &fields, &framed(b"")).await?;
        assert!(is_svid(&outcome), "{what}: {outcome:?}");
        assert!(is_svid(&good), "{what}: {good:?}");
    }
    let (blank, good) = then_a_good_one(&house, &authority(b"a b"), &framed(b"")).await?;
    assert!(is_svid(&blank) || matches!(blank, Outcome::Reset(_)), "{blank:?}");
    assert!(is_svid(&good), "{good:?}");

    // A stream that is open meanwhile does not suffer.
    let mut frames = Frames::connect(&house.agent.socket()).await?;
    let open = frames.open(&plain, Some(&framed(b""))).await?;
    let huge = frames.call(&authority(&vec![b'a'; 64 * 1024]), Some(&framed(b""))).await?;
    assert!(matches!(huge, Outcome::Reset(_) | Outcome::Http(431)), "{huge:?}");
    let again = frames.call(&plain, Some(&framed(b""))).await?;
    assert!(is_svid(&again), "stream {open} and {again:?}");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_67_what_is_no_call_of_ours_is_told_so() -> Result<()> {
    let house = House::new().await?;
    let plain = workload_call(FETCH);
    for path in [
        "/SpiffeWorkloadAPI/Nope",
        "/spiffe.workload.SpiffeWorkloadAPI/FetchX509SVID",
        "/spiffeworkloadapi/FetchX509SVID",
        "/",
        "/SpiffeWorkloadAPI",
        "/SpiffeWorkloadAPI/",
        "/SpiffeWorkloadAPI/FetchX509SVID/",
        "/SpiffeWorkloadAPI/FetchX509SVID%00",
    ] {
        let fields = with(plain.clone(), ":path", Some(path.as_bytes()));
        let (outcome, good) = then_a_good_one(&house, &fields, &framed(b"")).await?;
        assert_eq!(outcome, Outcome::Status(12), "{path}");
        assert!(is_svid(&good), "{path}: {good:?}");
    }
    let odd = [
        ("GET", with(plain.clone(), ":method", Some(b"GET")), 405),
        ("JSON", with(plain.clone(), "content-type", Some(b"application/json")), 415),
        ("no type", with(plain.clone(), "content-type", None), 415),
    ];
    for (what, fields, http) in odd {
        let (outcome, good) = then_a_good_one(&house, &fields, &framed(b"")).await?;
        let told = [Outcome::Http(http), Outcome::Status(12), Outcome::Status(13)];
        assert!(told.contains(&outcome), "{what}: {outcome:?}");
        assert!(is_svid(&good), "{what}: {good:?}");
    }
    let foreign: [&[u8]; 3] = [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x00\x05\x01\x00\x00\x01\x00",
        b"PRI * HTTP/3.0\r\n\r\nSM\r\n\r\n\0\0\0\0\0\0\0\0\0",
    ];
    for bytes in foreign {
        let mut stream = UnixStream::connect(house.agent.socket()).await?;
        stream.write_all(bytes).await?;
        let mut rest = Vec::new();
        // Closed, with or without a frame that says why; a reset says the same.
        let closed = tokio::time::timeout(super::PATIENCE, stream.read_to_end(&mut rest)).await;
        let _ = closed.context("the connection stayed open")?;
    }
    house.still_served().await?;
    logs_are_clean(&house)
}

#[tokio::test(flavor = "multi_thread")]
async fn h_68_malformed_messages_are_internal_errors() -> Result<()> {
    let house = House::new().await?;
    let validate = workload_call("ValidateJWTSVID");
    let mut longer = framed(b"\x0a\x03svc");
    longer[4] = 200;
    let unfinished_varint = [&[0xff; 10][..], &[1]].concat();
    let malformed: Vec<(&str, Vec<u8>)> = vec![
        ("truncated", framed(b"\x0a\x03sv")),
        ("longer than its data", longer),
        ("half a prefix", vec![0, 0, 0]),
        ("nothing", vec![]),
        ("wrong wire type", framed(b"\x08\x01")),
        ("groups", framed(&[0xa3, 0x06].repeat(200))),
        ("long varint", framed(&unfinished_varint)),
        ("not UTF-8", framed(b"\x0a\x01\xff")),
        ("marked as compressed", [&[1, 0, 0, 0, 5][..], b"\x0a\x03svc"].concat()),
        ("unknown flag", [&[7, 0, 0, 0, 5][..], b"\x0a\x03svc"].concat()),
    ];
    for (what, body) in malformed {
        let (outcome, good) = then_a_good_one(&house, &validate, &body).await?;
        assert!(matches!(outcome, Outcome::Status(12 | 13)), "{what}: {outcome:?}");
        assert!(is_svid(&good), "{what}: {good:?}");
    }
    let bomb = with(validate.clone(), "grpc-encoding", Some(b"gzip"));
    let (outcome, good) = then_a_good_one(&house, &bomb, &[&[1, 0, 0, 0, 3][..], b"\x1f\x8b\x08"].concat()).await?;
    assert!(matches!(outcome, Outcome::Status(8 | 11 | 12)), "{outcome:?}");
    assert!(is_svid(&good), "{good:?}");

    let mut unknown = Vec::new();
    for field in 1..=500 {
        prost::encoding::encode_key(field, prost::encoding::WireType::Varint, &mut unknown);
        unknown.push(1);
    }
    let (outcome, _) = then_a_good_one(&house, &workload_call(FETCH), &framed(&unknown)).await?;
    assert!(is_svid(&outcome), "unknown fields: {outcome:?}");
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_69_sizes_and_timeouts_have_limits() -> Result<()> {
    let house = House::new().await?;
    let validate = workload_call("ValidateJWTSVID");
    for size in [4 * 1024 * 1024 + 1, 5 * 1024 * 1024_u32] {
        // The announcement is enough; what follows need not be waited for.
        let body = [&[0][..], &size.to_be_bytes(), &[b'x'; 1024]].concat();
        let (outcome, good) = then_a_good_one(&house, &validate, &body).await?;
        assert!(matches!(outcome, Outcome::Status(8 | 11)), "{size}: {outcome:?}");
        assert!(is_svid(&good), "{size}: {good:?}");
    }
    let fetching = workload_call(FETCH);
    let large = with(fetching.clone(), "x-large", Some(&vec![b'a'; 64 * 1024]));
    let mut many = fetching.clone();
    many.extend((0..10_000).map(|number| (format!("x-{number}").into_bytes(), b"1".to_vec())));
    for (what, fields) in [("64 KiB of metadata", large), ("10,000 keys", many)] {
        let (outcome, good) = then_a_good_one(&house, &fields, &framed(b"")).await?;
        assert!(matches!(outcome, Outcome::Reset(_) | Outcome::Http(431) | Outcome::Status(8)), "{what}: {outcome:?}");
        assert!(is_svid(&good), "{what}: {good:?}");
    }
    let timeout = |value: &str| with(fetching.clone(), "grpc-timeout", Some(value.as_bytes()));
    let (over, good) = then_a_good_one(&house, &timeout("0n"), &framed(b"")).await?;
    assert!(matches!(over, Outcome::Status(1 | 4)), "{over:?}");
    assert!(is_svid(&good), "{good:?}");
    let (long, _) = then_a_good_one(&house, &timeout("99999999H"), &framed(b"")).await?;
    assert!(is_svid(&long), "{long:?}");
    for wrong in ["", "S", "-1S", "1", "1.5S", "100000000S", "1 S", "x"] {
        let (outcome, good) = then_a_good_one(&house, &timeout(wrong), &framed(b"")).await?;
        assert!(matches!(outcome, Outcome::Status(3 | 13)) || is_svid(&outcome), "{wrong:?}: {outcome:?}");
        assert!(is_svid(&good), "{wrong:?}: {good:?}");
    }
    house.still_served().await
}

#[tokio::test(flavor = "multi_thread")]
async fn h_72_requests_for_tokens_are_checked() -> Result<()> {
    let house = House::new().await?;
    house.register("/b", &format!("unix:uid:{}", nix::unistd::getuid()))?;
    e2e::testkit::wait::until("both identities", super::PATIENCE, async || {
        fetch(&house.agent.socket()).await.ok().filter(|ids| ids.len() == 2)
    })
    .await?;
    let mut client = house.workload_api().await?;
    let texts = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>();
    let many: Vec<String> = (0..33).map(|number| number.to_string()).collect();
    let refused = [
        ("no audience", vec![], "", Code::InvalidArgument),
        ("an empty audience", texts(&[""]), "", Code::InvalidArgument),
        ("an empty audience beside another", texts(&["svc", ""]), "", Code::InvalidArgument),
        ("33 audiences", many, "", Code::InvalidArgument),
        ("an audience of 1 MiB", vec!["a".repeat(1 << 20)], "", Code::InvalidArgument),
        ("somebody else", texts(&["svc"]), "spiffe://example.org/c", Code::PermissionDenied),
        ("somebody elsewhere", texts(&["svc"]), "spiffe://other.test/a", Code::PermissionDenied),
        ("nobody", texts(&["svc"]), "example.org/a", Code::InvalidArgument),
    ];
    for (what, audience, id, code) in refused {
        let request = JwtsvidRequest { audience, spiffe_id: id.to_owned() };
        let status = client.fetch_jwtsvid(secured(request)).await.err().context(what)?;
        assert_eq!(status.code(), code, "{what}: {status:?}");
    }
    let request = JwtsvidRequest { audience: texts(&["svc"]), spiffe_id: String::new() };
    let answer = client.fetch_jwtsvid(secured(request)).await?.into_inner();
    let mut ids: Vec<&str> = answer.svids.iter().map(|svid| svid.spiffe_id.as_str()).collect();
    ids.sort_unstable();
    assert_eq!(ids, [A, "spiffe://example.org/b"]);

    // H-43: whatever its size, a token that cannot be one is refused at once.
    for size in [1 << 17, 1 << 20, 4_000_000] {
        let request = ValidateJwtsvidRequest { audience: "svc".into(), svid: "a".repeat(size) };
        let status = client.validate_jwtsvid(secured(request)).await.err().context("a token of one letter")?;
        assert_eq!(status.code(), Code::InvalidArgument, "{size}: {status:?}");
    }
    house.still_served().await
}
