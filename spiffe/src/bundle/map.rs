//! Bundle maps: the bundles of several trust domains in one document
//! (SPIFFE_Trust_Domain_and_Bundle, section 5).

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::document::{indented, read_document};
use super::{Bundle, BundleError, BundleWarning};
use crate::id::TrustDomain;
use crate::json;

/// The bundles of a map document, applied as a whole: what a newer map leaves out is gone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct BundleMap {
    /// One bundle for each trust domain; none has a refresh hint.
    pub bundles: BTreeMap<TrustDomain, Bundle>,
}

impl BundleMap {
    /// Writes the document. Names are unique, since they are keys, and no contained bundle has a
    /// refresh hint.
    pub fn to_json(&self) -> String {
        let member = |(name, bundle): (&TrustDomain, &Bundle)| {
            let bundle = Bundle { refresh_hint: None, ..bundle.clone() };
            (name.to_string(), Value::Object(bundle.to_document()))
        };
        let domains: Map<String, Value> = self.bundles.iter().map(member).collect();
        let mut document = Map::new();
        document.insert("trust_domains".to_owned(), Value::Object(domains));
        indented(&Value::Object(document))
    }

    /// Reads a document. One malformed bundle, one name that is no trust domain or one that stands
    /// there twice spoils the whole; refresh hints of the bundles are ignored.
    pub fn from_json(bytes: &[u8]) -> Result<(Self, Vec<(TrustDomain, BundleWarning)>), BundleError> {
        let Value::Object(mut document) = json::parse(bytes).map_err(BundleError::Json)? else {
            return Err(BundleError::NotAnObject);
        };
        let Some(Value::Object(domains)) = document.remove("trust_domains") else {
            return Err(BundleError::NoTrustDomains);
        };
        let (mut map, mut all_warnings) = (Self::default(), Vec::new());
        for (name, document) in domains {
            let name = TrustDomain::parse(&name).map_err(BundleError::TrustDomainName)?;
            let Value::Object(document) = document else { return Err(BundleError::NotAnObject) };
            let (mut bundle, warnings) = read_document(name.clone(), &document)?;
            bundle.refresh_hint = None;
            all_warnings.extend(warnings.into_iter().map(|warning| (name.clone(), warning)));
            map.bundles.insert(name, bundle);
        }
        Ok((map, all_warnings))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::JsonError;
    use crate::testing::*;

    fn read(document: &str) -> Result<BundleMap, BundleError> {
        BundleMap::from_json(document.as_bytes()).map(|(map, _)| map)
    }

    #[test]
    fn bnd_19_bnd_21_a_map_is_read_back_without_refresh_hints() {
        let mut map = BundleMap::default();
        for name in ["a.test", "b.test"] {
            let mut bundle = Bundle::clone(&Authority::root(name).bundle(name));
            bundle.sequence = 7;
            map.bundles.insert(trust_domain(name), bundle);
        }
        let mut hinting = map.clone();
        for bundle in hinting.bundles.values_mut() {
            bundle.refresh_hint = Some(std::time::Duration::from_secs(1));
        }
        let document = hinting.to_json();
        assert!(!document.contains("spiffe_refresh_hint"));
        assert_eq!(read(&document).unwrap(), map);
    }

    #[test]
    fn h_64_bnd_18_trust_domains_is_needed() {
        assert!(matches!(read("{}"), Err(BundleError::NoTrustDomains)));
        assert!(matches!(read(r#"{"trust_domains":[]}"#), Err(BundleError::NoTrustDomains)));
        assert_eq!(read(r#"{"trust_domains":{}}"#).unwrap(), BundleMap::default());
    }

    #[test]
    fn h_64_bnd_20_names_are_trust_domains_and_unique() {
        let twice = r#"{"trust_domains":{"a.test":{"keys":[]},"a.test":{"keys":[]}}}"#;
        assert!(matches!(read(twice), Err(BundleError::Json(JsonError::DuplicateMember))));
        let cases = r#"{"trust_domains":{"a.test":{"keys":[]},"A.test":{"keys":[]}}}"#;
        assert!(matches!(read(cases), Err(BundleError::TrustDomainName(_))));
        let id = r#"{"trust_domains":{"spiffe://a.test":{"keys":[]}}}"#;
        assert!(matches!(read(id), Err(BundleError::TrustDomainName(_))));
    }

    #[test]
    fn h_64_bnd_22_bnd_23_a_map_is_taken_as_a_whole() {
        let hint = r#"{"trust_domains":{"a.test":{"keys":[],"spiffe_refresh_hint":1}}}"#;
        let map = read(hint).unwrap();
        assert_eq!(map.bundles[&trust_domain("a.test")].refresh_hint, None);
        let spoilt = r#"{"trust_domains":{"a.test":{"keys":[]},"b.test":{}}}"#;
        assert!(matches!(read(spoilt), Err(BundleError::NoKeys)));
    }
}
