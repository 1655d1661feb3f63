//! Properties that hold for every id, selector set, serial number, key set and token text.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use proptest::prelude::*;
use spiffe::bundle::{Bundle, JwtAuthority};
use spiffe::id::{SpiffeId, TrustDomain};
use spiffe::renew::RenewAt;
use spiffe::selector::{Match, Selector, SelectorSet};
use spiffe::x509::{KeyType, PrivateKey, Serial};

const TRUST_DOMAIN: &str = "[a-z0-9._-]{1,60}";
const SEGMENT: &str = "[A-Za-z0-9._-]{1,20}";

fn legal_path() -> impl Strategy<Value = String> {
    let segment = SEGMENT.prop_filter("dot segments are no segments", |segment| segment != "." && segment != "..");
    proptest::collection::vec(segment, 0..6).prop_map(|segments| segments.iter().map(|s| format!("/{s}")).collect())
}

fn selector_set() -> impl Strategy<Value = (BTreeSet<String>, SelectorSet)> {
    // Few values, so that sets often overlap.
    proptest::collection::btree_set("[ab]:[1-4]", 0..6).prop_map(|texts| {
        let set = texts.iter().filter_map(|text| Selector::parse(text).ok()).collect();
        (texts, set)
    })
}

proptest! {
    #[test]
    fn legal_ids_parse_into_their_parts(name in TRUST_DOMAIN, path in legal_path()) {
        let text = format!("spiffe://{name}{path}");
        let id = SpiffeId::parse(&text).unwrap();
        prop_assert_eq!(id.as_str(), &text);
        prop_assert_eq!(id.trust_domain().as_str(), &name);
        prop_assert_eq!(id.path(), &path);
        prop_assert_eq!(&SpiffeId::from_path(id.trust_domain(), &path).unwrap(), &id);
        prop_assert_eq!(&SpiffeId::parse_sharing(&text, id.trust_domain()).unwrap(), &id);
    }

    #[test]
    fn whatever_parses_is_kept_byte_for_byte(text in "\\PC{0,80}") {
        if let Ok(id) = SpiffeId::parse(&text) {
            prop_assert_eq!(id.as_str(), &text);
            prop_assert_eq!(format!("spiffe://{}{}", id.trust_domain(), id.path()), text);
        }
    }

    #[test]
    fn mutated_ids_parse_only_if_they_are_legal(
        name in TRUST_DOMAIN, path in legal_path(), position: prop::sample::Index, byte in 0x20_u8..0x7f,
    ) {
        let mut bytes = format!("spiffe://{name}{path}").into_bytes();
        let position = position.index(bytes.len());
        bytes[position] = byte;
        let text = String::from_utf8(bytes).unwrap();
        let legal = text.strip_prefix("spiffe://").is_some_and(|rest| {
            let (name, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
            let segment = |s: &str| {
                !s.is_empty() && s != "." && s != ".." && s.chars().all(|c| c.is_ascii_alphanumeric() || ".-_".contains(c))
            };
            !name.is_empty()
                && name.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || ".-_".contains(c))
                && (path.is_empty() || path[1..].split('/').all(segment))
        });
        prop_assert_eq!(SpiffeId::parse(&text).is_ok(), legal, "{}", text);
    }

    #[test]
    fn selectors_are_read_back(kind in "[^:\\s]{1,10}", value in "\\PC{1,30}") {
        let selector = Selector::new(&kind, &value).unwrap();
        prop_assert_eq!(Selector::parse(&selector.to_string()).unwrap(), selector);
    }

    #[test]
    fn selector_sets_are_sets((a, have) in selector_set(), (b, wanted) in selector_set()) {
        prop_assert_eq!(have.len(), a.len());
        prop_assert_eq!(have.is_subset_of(&wanted), a.is_subset(&b));
        prop_assert_eq!(have.matches(&wanted, Match::Exact), a == b);
        prop_assert_eq!(have.matches(&wanted, Match::Subset), !a.is_empty() && a.is_subset(&b));
        prop_assert_eq!(have.matches(&wanted, Match::Superset), a.is_superset(&b));
        prop_assert_eq!(have.matches(&wanted, Match::Any), !a.is_disjoint(&b));
        prop_assert_eq!(have.union(&wanted).len(), a.union(&b).count());
    }

    #[test]
    fn serial_numbers_are_read_back(number: u128, bytes in proptest::collection::vec(any::<u8>(), 0..=20)) {
        let serial = Serial::from(number);
        prop_assert_eq!(serial.to_string(), number.to_string());
        prop_assert_eq!(serial.to_string().parse::<Serial>().unwrap(), serial);
        let serial = Serial::from_be_bytes(&bytes).unwrap();
        prop_assert_eq!(Serial::from_be_bytes(serial.as_be_bytes()).unwrap(), serial);
        prop_assert_eq!(Serial::parse_decimal(&serial.to_string()).unwrap(), serial);
    }

    #[test]
    fn renewal_lies_between_receipt_and_end(start in 0_u64..4_000_000_000, life in 1_u64..1_000_000, late in 0_u64..2_000_000, random: u64) {
        let at = |seconds: u64| UNIX_EPOCH + Duration::from_secs(seconds);
        let (not_before, not_after, received): (SystemTime, SystemTime, SystemTime) = (at(start), at(start + life), at(start + late));
        let renew = RenewAt::draw(not_before, not_after, received, random).at();
        prop_assert!(renew >= received);
        if received < not_after {
            let left = not_after.duration_since(received).unwrap();
            let waited = renew.duration_since(received).unwrap();
            prop_assert!(waited >= left.mul_f64(0.449) && waited <= left.mul_f64(0.551));
        }
    }

    #[test]
    fn hostile_documents_never_panic(text in "\\PC{0,200}", bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let name = TrustDomain::parse("example.org").unwrap();
        let _ = Bundle::from_spiffe_json(name.clone(), &bytes);
        let _ = Bundle::from_pem(name, &text);
        let _ = spiffe::jwt::Unverified::parse(&text);
        let _ = spiffe::x509::Certificate::parse(bytes.clone());
        let _ = spiffe::x509::Csr::parse(&bytes);
        let _ = PrivateKey::from_pkcs8(bytes.clone());
        let _ = PrivateKey::from_pem(&text);
        let _ = spiffe::x509::X509Svid::from_concatenated(&bytes.clone().into());
        let _ = spiffe::attest::x509pop::Payload::from_json(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn key_sets_are_read_back(
        key_ids in proptest::collection::btree_set("\\PC{1,40}", 0..5), sequence: u64, hint in proptest::option::of(1_u64..u64::MAX),
    ) {
        let mut bundle = Bundle::empty(TrustDomain::parse("example.org").unwrap());
        bundle.sequence = sequence;
        bundle.refresh_hint = hint.map(Duration::from_secs);
        for (index, key_id) in key_ids.iter().enumerate() {
            let kind = if index % 2 == 0 { KeyType::EcP256 } else { KeyType::EcP384 };
            let key = PrivateKey::generate(kind).unwrap();
            let public_key = key.public_key().spki_der().clone();
            bundle.jwt.push(JwtAuthority { key_id: key_id.as_str().into(), public_key, expires_at: None, tainted: false });
        }
        let (back, warnings) = Bundle::from_spiffe_json(bundle.trust_domain.clone(), bundle.to_spiffe_json().as_bytes()).unwrap();
        prop_assert_eq!(&back, &bundle);
        prop_assert!(warnings.is_empty());
        prop_assert_eq!(back.to_spiffe_json(), bundle.to_spiffe_json());
    }
}
