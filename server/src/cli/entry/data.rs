//! Files of registration entries: `{"entries": [{"spiffe_id": …}]}`, as SPIRE documents them or as `entry show -output json`
//! prints them. What only the server sets is read over.

use std::io::Read;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Deserializer};
use spiffe::Object;
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe_proto::types::{Entry, Selector, Spiffeid, entry::AdditionalAttributes};

use super::super::error::CliError;

/// The largest file that is read.
const MAX_FILE: u64 = 256 << 20;

/// `null` is what is not there.
fn or_default<'d, D: Deserializer<'d>, T: Default + Deserialize<'d>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

/// An id as text, or in its two parts.
#[derive(Deserialize)]
#[serde(untagged)]
enum Id {
    Text(String),
    Parts {
        #[serde(default)]
        trust_domain: String,
        #[serde(default)]
        path: String,
    },
}

impl Default for Id {
    fn default() -> Self {
        Self::Text(String::new())
    }
}

impl Id {
    fn text(&self) -> String {
        match self {
            Self::Text(text) => text.clone(),
            Self::Parts { trust_domain, path } => format!("spiffe://{trust_domain}{path}"),
        }
    }
}

/// A number, or a number as text: protobuf prints large ones so.
fn number<'d, D: Deserializer<'d>>(deserializer: D) -> Result<i64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Number {
        Number(i64),
        Text(String),
    }
    match Option::deserialize(deserializer)? {
        None => Ok(0),
        Some(Number::Number(number)) => Ok(number),
        Some(Number::Text(text)) => text.parse().map_err(serde::de::Error::custom),
    }
}

#[derive(Deserialize)]
struct File {
    #[serde(default, deserialize_with = "or_default")]
    entries: Vec<Object<Registration>>,
}

/// An entry in the form of SPIRE's files, in which ids are text.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Registration {
    #[serde(alias = "id", deserialize_with = "or_default")]
    entry_id: String,
    #[serde(deserialize_with = "or_default")]
    spiffe_id: Id,
    #[serde(deserialize_with = "or_default")]
    parent_id: Id,
    #[serde(deserialize_with = "or_default")]
    selectors: Vec<Object<Pair>>,
    #[serde(deserialize_with = "or_default")]
    x509_svid_ttl: i32,
    #[serde(deserialize_with = "or_default")]
    jwt_svid_ttl: i32,
    #[serde(deserialize_with = "or_default")]
    federates_with: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    admin: bool,
    #[serde(deserialize_with = "or_default")]
    downstream: bool,
    #[serde(rename = "entryExpiry", alias = "entry_expiry", alias = "expires_at", deserialize_with = "number")]
    entry_expiry: i64,
    #[serde(deserialize_with = "or_default")]
    dns_names: Vec<String>,
    #[serde(deserialize_with = "or_default")]
    store_svid: bool,
    #[serde(deserialize_with = "or_default")]
    hint: String,
    additional_attributes: Option<Object<Attributes>>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Pair {
    #[serde(rename = "type", deserialize_with = "or_default")]
    kind: String,
    #[serde(deserialize_with = "or_default")]
    value: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Attributes {
    #[serde(deserialize_with = "or_default")]
    disable_x509_svid_prefetch: bool,
    #[serde(deserialize_with = "or_default")]
    jwt_svid_include_jti: bool,
}

/// Ids in a file for deletion: `{"ids": […]}`.
#[derive(Deserialize)]
struct Ids {
    #[serde(default, deserialize_with = "or_default")]
    ids: Vec<String>,
}

/// Reads the entries of a file; `-` is standard input.
pub(super) fn entries(path: &str) -> Result<Vec<Entry>, CliError> {
    parse_entries(&read(path)?)
}

/// Reads the ids of a file; `-` is standard input.
pub(super) fn ids(path: &str) -> Result<Vec<String>, CliError> {
    parse_ids(&read(path)?)
}

fn read(path: &str) -> Result<Vec<u8>, CliError> {
    let mut bytes = Vec::new();
    let result = if path == "-" {
        std::io::stdin().lock().take(MAX_FILE).read_to_end(&mut bytes)
    } else {
        std::fs::File::open(Path::new(path)).and_then(|file| file.take(MAX_FILE).read_to_end(&mut bytes))
    };
    result.map_err(|source| CliError::File { what: "cannot read", path: PathBuf::from(path), source })?;
    Ok(bytes)
}

fn parse_ids(bytes: &[u8]) -> Result<Vec<String>, CliError> {
    let file: Ids = spiffe::from_object(bytes, "{\"ids\": […]}").map_err(|source| CliError::Json { source })?;
    Ok(file.ids)
}

fn parse_entries(bytes: &[u8]) -> Result<Vec<Entry>, CliError> {
    let file: File = spiffe::from_object(bytes, "{\"entries\": […]}").map_err(|source| CliError::Json { source })?;
    file.entries.into_iter().map(|entry| to_wire(entry.0)).collect()
}

fn to_wire(entry: Registration) -> Result<Entry, CliError> {
    let id = |what: &str, text: &str| {
        let id = SpiffeId::parse(text).map_err(|source| CliError::Id { what: what.to_owned(), source })?;
        Ok::<_, CliError>(Spiffeid { trust_domain: id.trust_domain().to_string(), path: id.path().to_owned() })
    };
    let federates_with = entry
        .federates_with
        .iter()
        .map(|text| match TrustDomain::parse_lenient(text) {
            Ok(trust_domain) => Ok(trust_domain.to_string()),
            Err(source) => Err(CliError::Id { what: "invalid federated trust domain".to_owned(), source }),
        })
        .collect::<Result<_, _>>()?;
    Ok(Entry {
        id: entry.entry_id,
        spiffe_id: Some(id("invalid SPIFFE ID", &entry.spiffe_id.text())?),
        parent_id: Some(id("invalid parent ID", &entry.parent_id.text())?),
        selectors: entry
            .selectors
            .into_iter()
            .map(|Object(pair)| Selector { r#type: pair.kind, value: pair.value })
            .collect(),
        x509_svid_ttl: entry.x509_svid_ttl,
        federates_with,
        admin: entry.admin,
        downstream: entry.downstream,
        expires_at: entry.entry_expiry,
        dns_names: entry.dns_names,
        revision_number: 0,
        store_svid: entry.store_svid,
        jwt_svid_ttl: entry.jwt_svid_ttl,
        hint: entry.hint,
        created_at: 0,
        additional_attributes: entry.additional_attributes.map(|Object(attributes)| AdditionalAttributes {
            disable_x509_svid_prefetch: attributes.disable_x509_svid_prefetch,
            jwt_svid_include_jti: attributes.jwt_svid_include_jti,
        }),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_field_is_read() {
        let text = r#"{"entries": [{
            "entry_id": "e", "spiffe_id": "spiffe://td/a", "parent_id": "spiffe://td/p",
            "selectors": [{"type": "unix", "value": "uid:1"}], "x509_svid_ttl": 1, "jwt_svid_ttl": 2,
            "federates_with": ["spiffe://other", "third"], "admin": true, "downstream": true, "entryExpiry": 3,
            "dns_names": ["x"], "store_svid": true, "hint": "h", "unknown": 1, "revision_number": null,
            "additional_attributes": {"disable_x509_svid_prefetch": true}
        }]}"#;
        let id = |path: &str| Some(Spiffeid { trust_domain: "td".into(), path: path.into() });
        let expected = Entry {
            id: "e".into(),
            spiffe_id: id("/a"),
            parent_id: id("/p"),
            selectors: vec![Selector { r#type: "unix".into(), value: "uid:1".into() }],
            x509_svid_ttl: 1,
            federates_with: vec!["other".into(), "third".into()],
            admin: true,
            downstream: true,
            expires_at: 3,
            dns_names: vec!["x".into()],
            revision_number: 0,
            store_svid: true,
            jwt_svid_ttl: 2,
            hint: "h".into(),
            created_at: 0,
            additional_attributes: Some(AdditionalAttributes {
                disable_x509_svid_prefetch: true,
                jwt_svid_include_jti: false,
            }),
        };
        assert_eq!(parse_entries(text.as_bytes()).unwrap(), [expected]);
        assert_eq!(parse_entries(b"{}").unwrap(), []);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let wrong = |text: &str| parse_entries(text.as_bytes()).unwrap_err().to_string();
        assert_eq!(wrong("{}x"), "cannot read entries");
        assert_eq!(wrong(r#"{"entries": [{}]}"#), "invalid SPIFFE ID");
        assert_eq!(wrong(r#"{"entries": [{"spiffe_id": "spiffe://td/a"}]}"#), "invalid parent ID");
        let text =
            r#"{"entries": [{"spiffe_id": "spiffe://td/a", "parent_id": "spiffe://td/b", "federates_with": ["X"]}]}"#;
        assert_eq!(wrong(text), "invalid federated trust domain");
    }

    #[test]
    fn ids_are_an_object() {
        assert_eq!(parse_ids(br#"{"ids": ["a", "b"]}"#).unwrap(), ["a", "b"]);
        let refused = runtime::telemetry::chain(&parse_ids(br#"["a"]"#).unwrap_err());
        let expected = r#"cannot read entries: invalid type: sequence, expected {"ids": […]} at line 1 column 0"#;
        assert_eq!(refused, expected);
    }

    #[test]
    fn an_array_where_an_object_belongs_is_refused_by_naming_the_form() {
        let wrong = |text: &str| runtime::telemetry::chain(&parse_entries(text.as_bytes()).unwrap_err());
        let list = r#"[{"spiffe_id": "spiffe://td/a", "parent_id": "spiffe://td/b"}]"#;
        assert_eq!(
            wrong(list),
            r#"cannot read entries: invalid type: sequence, expected {"entries": […]} at line 1 column 0"#
        );
        let object = r#"invalid type: sequence, expected an object, {"name": value, …} at line 1 column"#;
        assert_eq!(wrong(r#"{"entries": [["e"]]}"#), format!("cannot read entries: {object} 13"));
        let selector = r#"{"entries": [{"selectors": [["unix", "uid:1"]]}]}"#;
        assert_eq!(wrong(selector), format!("cannot read entries: {object} 28"));
    }
}
