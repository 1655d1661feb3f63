use super::*;
use crate::testing::*;

#[test]
fn an_authority_is_described() {
    let key = new_key();
    let template = Template::authority("root", "spiffe://example.org", &key);
    let id = key.public_key().key_id();
    let with_id = template.clone().with(Extension(SKI, false, crate::der::wrap(OCTETS, b"\x01\xab")));
    let certificate = Certificate::parse(with_id.signed("root", &key)).unwrap();
    assert!(certificate.is_self_issued() && certificate.is_ca);
    assert_eq!(certificate.check_authority(), Ok(()));
    assert_eq!(certificate.authority_id(), "01ab");
    assert_eq!(certificate.spiffe_id().unwrap().as_str(), "spiffe://example.org");
    assert_eq!(certificate.public_key.as_ref(), Ok(key.public_key()));
    let without_id = Certificate::parse(template.signed("root", &key)).unwrap();
    assert_eq!(without_id.authority_id(), crate::hex(&id));
    assert_eq!(super::super::key_id_of(&without_id.spki_der), id);
}

#[test]
fn h_26_serial_numbers_are_positive_and_bounded() {
    let key = new_key();
    let with_serial = |serial: &[u8]| {
        let mut template = Template::leaf("spiffe://example.org/a", &key);
        template.serial = serial.to_vec();
        Certificate::parse(template.signed("root", &key)).map(|certificate| certificate.serial.to_string())
    };
    assert_eq!(with_serial(&[0x00, 0xff]), Ok("255".to_owned()));
    assert_eq!(with_serial(&[0x80]), Err(X509Error::Serial(SerialError::Negative)));
    assert_eq!(with_serial(&[0x7f; 21]), Err(X509Error::Serial(SerialError::TooLong)));
}

#[test]
fn validity_includes_both_ends() {
    let key = new_key();
    let certificate =
        Certificate::parse(Template::leaf("spiffe://example.org/a", &key).valid(NOW, NOW + 1).signed("root", &key))
            .unwrap();
    assert!(certificate.is_valid_at(at(NOW)) && certificate.is_valid_at(at(NOW + 1)));
    assert!(!certificate.is_valid_at(at(NOW - 1)) && !certificate.is_valid_at(at(NOW + 2)));
}

#[test]
fn unreadable_extensions_are_refused() {
    let key = new_key();
    let template = Template::leaf("spiffe://example.org/a", &key).with(Extension(BASIC, true, vec![0xff, 0xff]));
    assert_eq!(Certificate::parse(template.signed("root", &key)), Err(X509Error::Extension));
}

#[test]
fn a_begin_before_1970_counts_as_1970_and_an_end_before_1970_is_over() {
    let key = new_key();
    let mut template = Template::leaf("spiffe://example.org/a", &key);
    template.not_before = crate::der::wrap(0x17, b"600101000000Z");
    let certificate = Certificate::parse(template.signed("root", &key)).unwrap();
    assert_eq!(certificate.not_before, at(0));
    assert!(certificate.is_valid_at(now()));
    template.not_after = crate::der::wrap(0x17, b"600101000000Z");
    let certificate = Certificate::parse(template.signed("root", &key)).unwrap();
    assert_eq!((certificate.not_before, certificate.not_after), (at(0), at(-315_619_200)));
    assert!(!certificate.is_valid_at(now()));
}
