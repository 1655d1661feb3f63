use spiffe_proto::entry::ListEntriesResponse;
use spiffe_proto::entry::batch_delete_entry_response::Result as Deleted;
use spiffe_proto::types::Selector;

use super::*;

fn spiffe_id(path: &str) -> Option<Spiffeid> {
    Some(Spiffeid { trust_domain: "td".into(), path: path.into() })
}

fn selector(value: &str) -> Selector {
    Selector { r#type: "unix".into(), value: value.into() }
}

fn small(id: &str) -> Entry {
    Entry {
        id: id.into(),
        spiffe_id: spiffe_id("/a"),
        parent_id: spiffe_id("/p"),
        selectors: vec![selector("uid:1")],
        ..Entry::default()
    }
}

fn full() -> Entry {
    Entry {
        selectors: vec![selector("uid:1"), selector("gid:2")],
        x509_svid_ttl: 60,
        jwt_svid_ttl: 30,
        federates_with: vec!["other".into()],
        admin: true,
        downstream: true,
        expires_at: 1_700_000_000,
        dns_names: vec!["x.org".into()],
        revision_number: 4,
        store_svid: true,
        hint: "internal".into(),
        additional_attributes: Some(AdditionalAttributes {
            disable_x509_svid_prefetch: true,
            jwt_svid_include_jti: true,
        }),
        ..small("e-1")
    }
}

const SMALL: &str = "\
Entry ID                : e-2
SPIFFE ID               : spiffe://td/a
Parent ID               : spiffe://td/p
Revision                : 0
X509-SVID TTL           : default
JWT-SVID TTL            : default
Selector                : unix:uid:1

";

#[test]
fn golden_entries() {
    let expected = format!(
        "\
Found 2 entries
Entry ID                : e-1
SPIFFE ID               : spiffe://td/a
Parent ID               : spiffe://td/p
Revision                : 4
Downstream              : true
X509-SVID TTL           : 60
JWT-SVID TTL            : 30
Expiration time         : 2023-11-14 22:13:20 +0000 UTC
Selector                : unix:uid:1
Selector                : unix:gid:2
FederatesWith           : other
DNS name                : x.org
Admin                   : true
StoreSvid               : true
Hint                    : internal
DisableX509SvidPrefetch : true
JwtSvidIncludeJti       : true

{SMALL}"
    );
    let mut screen = Screen::new();
    show::pretty(&[full(), small("e-2")], &mut screen);
    assert_eq!(screen.out, expected);
    let mut screen = Screen::new();
    show::pretty(&[], &mut screen);
    assert_eq!(screen.out, "Found 0 entries\n");
    assert!(block(&small("")).starts_with("Entry ID                : (none)\n"));
}

#[test]
fn golden_json() {
    let mut screen = Screen::new();
    let answer = ListEntriesResponse { entries: vec![small("e-2")], next_page_token: String::new() };
    json(&mut screen, "spire.api.server.entry.v1.ListEntriesResponse", &answer).unwrap();
    let expected = "{\"entries\":[{\"admin\":false,\"created_at\":\"0\",\"dns_names\":[],\"downstream\":false,\"expires_at\":\"0\",\"federates_with\":[],\"hint\":\"\",\"id\":\"e-2\",\"jwt_svid_ttl\":0,\"parent_id\":{\"path\":\"/p\",\"trust_domain\":\"td\"},\"revision_number\":\"0\",\"selectors\":[{\"type\":\"unix\",\"value\":\"uid:1\"}],\"spiffe_id\":{\"path\":\"/a\",\"trust_domain\":\"td\"},\"store_svid\":false,\"x509_svid_ttl\":0}],\"next_page_token\":\"\"}\n";
    assert_eq!(screen.out, expected);
}

#[test]
fn refused_entries_go_to_standard_error() {
    let refused = Status { code: 6, message: "similar entry \"x\"".into() };
    let mut screen = Screen::new();
    let results = vec![(Some(refused), Some(small("e-2"))), (Some(Status::default()), Some(small("e-2")))];
    let error = pretty_batch("create", results, &mut screen).unwrap_err();
    assert_eq!(error.to_string(), "failed to create one or more entries");
    assert_eq!(screen.out, SMALL);
    let expected = format!(
        "Failed to create the following entry (code: AlreadyExists, msg: \"similar entry \\\"x\\\"\"):\n{SMALL}"
    );
    assert_eq!(screen.err, expected);
}

#[test]
fn golden_delete() {
    let result = |id: &str, code: i32| Deleted { status: Some(Status { code, message: "gone".into() }), id: id.into() };
    let run = |results: Vec<Deleted>| {
        let mut screen = Screen::new();
        let outcome = pretty_delete(&BatchDeleteEntryResponse { results }, &mut screen);
        (screen.out, screen.err, outcome.is_ok())
    };
    let expected = "Deleted entry with ID: a\n\n\nDeleted 1 entries successfully\n";
    assert_eq!(run(vec![result("a", 0)]), (expected.into(), String::new(), true));
    let told = "Failed to delete entry with ID b (code: NotFound, msg: \"gone\")\n";
    assert_eq!(run(vec![result("b", 5)]), ("\n\nFailed to delete 1 entries\n".into(), told.into(), false));
    let expected = "Deleted entry with ID: a\n\n\n\n\nDeleted 1 entries successfully, but failed to delete 1 entries\n";
    assert_eq!(run(vec![result("a", 0), result("b", 5)]), (expected.into(), told.into(), false));
}

#[derive(Debug, clap::Parser)]
struct Program {
    #[command(subcommand)]
    command: EntryCommand,
}

fn parsed(arguments: &[&str]) -> EntryCommand {
    let arguments = std::iter::once("p").chain(arguments.iter().copied()).map(std::ffi::OsString::from);
    runtime::flags::parse::<Program>(arguments).unwrap().command
}

fn created(arguments: &[&str]) -> Result<Vec<Entry>, CliError> {
    let EntryCommand::Create(flags) = parsed(arguments) else { panic!() };
    flags.entries()
}

#[test]
fn flags_make_an_entry() {
    let entries = created(&[
        "create",
        "-entryID",
        "e-1",
        "-parentID",
        "spiffe://td/p",
        "-spiffeID=spiffe://td/a",
        "-selector",
        "unix:uid:1",
        "--selector=unix:gid:2",
        "-x509SVIDTTL",
        "60",
        "-jwtSVIDTTL=30",
        "-federatesWith",
        "other",
        "-admin",
        "-downstream=true",
        "-storeSVID",
        "-entryExpiry",
        "1700000000",
        "-dns",
        "x.org",
        "-hint",
        "internal",
        "-disableX509SVIDPrefetch",
        "-jwtSVIDIncludeJTI=true",
    ]);
    assert_eq!(entries.unwrap(), [Entry { revision_number: 0, ..full() }]);
    let entries = created(&["create", "-node", "-spiffeID", "spiffe://td/a", "-selector", "unix:uid:1"]).unwrap();
    assert_eq!(entries[0].parent_id, spiffe_id("/spire/server"));
    assert_eq!(entries[0].additional_attributes, None);
}

#[test]
fn flags_that_do_not_go_together() {
    let base = ["-parentID", "spiffe://td/p", "-spiffeID", "spiffe://td/a", "-selector", "unix:uid:1"];
    let with = |more: &[&str]| {
        let arguments: Vec<_> = std::iter::once("create").chain(base).chain(more.iter().copied()).collect();
        created(&arguments).map_err(|error| error.to_string())
    };
    let create = |arguments: &[&str]| created(arguments).unwrap_err().to_string();
    assert_eq!(create(&["create"]), "at least one selector is required");
    assert_eq!(create(&["create", "-selector", "a:b"]), "a parent ID is required if the node flag is not set");
    assert_eq!(create(&["create", "-selector", "a:b", "-node"]), "a SPIFFE ID is required");
    assert_eq!(with(&["-node", "-federatesWith", "x"]).unwrap_err(), "node entries can not federate");
    assert_eq!(with(&["-x509SVIDTTL", "-1"]).unwrap_err(), "a positive x509-SVID TTL is required");
    assert_eq!(with(&["-jwtSVIDTTL", "-1"]).unwrap_err(), "a positive JWT-SVID TTL is required");
    assert_eq!(with(&["-x509SVIDTTL", "2147483648"]).unwrap_err(), "invalid value for X509 SVID TTL: out of range");
    assert_eq!(with(&["-selector", "x"]).unwrap_err(), "selector \"x\" must be formatted as type:value");
    let EntryCommand::Update(update) = parsed(&["update", "-selector", "a:b"]) else { panic!() };
    assert_eq!(update.entries().unwrap_err().to_string(), "entry ID is required");
}

#[test]
fn entries_are_sorted() {
    let mut one = Entry { spiffe_id: spiffe_id("/b"), ..small("1") };
    let two = Entry { x509_svid_ttl: 1, ..small("2") };
    let three = small("3");
    one.selectors = vec![selector("b"), selector("a")];
    let mut entries = [one, two, three];
    show::sort(&mut entries);
    assert_eq!(entries.each_ref().map(|entry| entry.id.as_str()), ["3", "2", "1"]);
    assert_eq!(entries[2].selectors, [selector("a"), selector("b")]);
}
