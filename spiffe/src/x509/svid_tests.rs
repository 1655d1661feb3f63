use super::*;
use crate::testing::*;
use crate::x509::KeyError;

const ID: &str = "spiffe://example.org/a";

#[test]
fn a_chain_is_described() {
    let root = Authority::root("example.org");
    let key = new_key();
    let leaf = root.sign(&Template::leaf(ID, &key));
    let svid = X509Svid::from_chain(vec![leaf.clone()]).unwrap();
    assert_eq!((svid.id.as_str(), svid.chain.as_slice()), (ID, [leaf].as_slice()));
    assert_eq!((svid.not_before, svid.not_after), (at(NOW - 3600), at(NOW + 3600)));
    assert_eq!(svid.check_key(&key), Ok(()));
}

#[test]
fn h_28_what_is_not_one_chain_of_certificates() {
    let root = Authority::root("example.org");
    let leaf = root.leaf(ID);
    let pem = pem::encode(&pem::Pem::new("CERTIFICATE", leaf.to_vec()));
    assert_eq!(X509Svid::from_chain(vec![pem.into()]), Err(X509Error::Malformed));
    let trailing = [&leaf[..], &[0]].concat();
    assert_eq!(X509Svid::from_chain(vec![trailing.into()]), Err(X509Error::TrailingData));
    assert_eq!(X509Svid::from_chain(Vec::new()), Err(X509Error::EmptyChain));
    assert_eq!(X509Svid::from_chain(vec![Bytes::new()]), Err(X509Error::Malformed));
    assert_eq!(X509Svid::from_concatenated(&Bytes::new()), Err(X509Error::EmptyChain));
    // The outer sequence with an indefinite length, which only BER allows.
    let body = leaf.get(4..).unwrap();
    let indefinite = [&[0x30, 0x80], body, &[0, 0]].concat();
    assert_eq!(X509Svid::from_chain(vec![indefinite.into()]), Err(X509Error::Malformed));
}

#[test]
fn h_28_a_root_is_taken_off_the_end() {
    let root = Authority::root("example.org");
    let middle = root.intermediate("middle", |template| template);
    let (leaf, issuer) = (middle.leaf(ID), middle.certificate.clone());
    let svid = X509Svid::from_chain(vec![leaf.clone(), issuer.clone(), root.certificate.clone()]).unwrap();
    assert_eq!(svid.chain, [leaf.clone(), issuer.clone()]);
    let concatenated = Bytes::from([&leaf[..], &issuer, &root.certificate].concat());
    assert_eq!(X509Svid::from_concatenated(&concatenated), Ok(svid));
}

#[test]
fn h_28_above_the_leaf_are_only_authorities() {
    let root = Authority::root("example.org");
    let leaves = vec![root.leaf(ID), root.leaf("spiffe://example.org/b")];
    assert_eq!(X509Svid::from_chain(leaves), Err(X509Error::NotAuthority));
}

#[test]
fn h_28_private_keys() {
    let root = Authority::root("example.org");
    let key = new_key();
    let svid = X509Svid::from_chain(vec![root.sign(&Template::leaf(ID, &key))]).unwrap();
    assert_eq!(svid.check_key(&new_key()), Err(X509Error::ForeignKey));

    let refused = |der: Vec<u8>| PrivateKey::from_pkcs8(der).map(|_| ()).unwrap_err();
    let pkcs8 = key.expose_pkcs8();
    assert_eq!(refused(Vec::new()), KeyError::Malformed);
    assert_eq!(refused([pkcs8, &[0]].concat()), KeyError::Malformed);
    assert_eq!(refused(key.expose_pem().as_bytes().to_vec()), KeyError::Malformed);
    // EncryptedPrivateKeyInfo: the algorithm stands where the version is due.
    let pbes2 = seq(&[b"\x06\x09\x2a\x86\x48\x86\xf7\x0d\x01\x05\x0d"]);
    assert_eq!(refused(seq(&[&pbes2, &crate::der::wrap(OCTETS, &[0; 64])])), KeyError::Malformed);
    // PKCS#1: a sequence of integers.
    let pkcs1 = seq(&[&[2, 1, 0], &crate::der::integer(&[0xab; 256]), &crate::der::integer(&[1, 0, 1])]);
    assert_eq!(refused(pkcs1), KeyError::Malformed);
    assert!(PrivateKey::from_pkcs8(pkcs8.to_vec()).is_ok());
}

#[test]
fn keys_come_from_each_form_of_pem() {
    use crate::x509::KeyType;
    use aws_lc_rs::encoding::AsDer;
    let key = new_key();
    let pem_of = |kind: &str, der: &[u8]| pem::encode(&pem::Pem::new(kind, der.to_vec()));
    let public = |text: &str| PrivateKey::from_pem(text).unwrap().public_key().clone();
    assert_eq!(public(&key.expose_pem()), *key.public_key());

    let pair = aws_lc_rs::signature::EcdsaKeyPair::from_pkcs8(
        &aws_lc_rs::signature::ECDSA_P256_SHA256_ASN1_SIGNING,
        key.expose_pkcs8(),
    )
    .unwrap();
    let sec1: aws_lc_rs::encoding::EcPrivateKeyRfc5915Der<'_> = pair.private_key().as_der().unwrap();
    let parameters = pem_of("EC PARAMETERS", b"\x06\x08\x2a\x86\x48\xce\x3d\x03\x01\x07");
    assert_eq!(public(&(parameters + &pem_of("EC PRIVATE KEY", sec1.as_ref()))), *key.public_key());

    // PKCS#8 of RSA: the PKCS#1 document is the content of its last octet string.
    let rsa = PrivateKey::generate(KeyType::Rsa2048).unwrap();
    let pkcs1 = rsa.expose_pkcs8().get(26..).unwrap();
    assert_eq!(public(&pem_of("RSA PRIVATE KEY", pkcs1)), *rsa.public_key());

    let refused = |text: &str| PrivateKey::from_pem(text).map(|_| ()).unwrap_err();
    assert_eq!(refused(""), KeyError::NoPemKey);
    assert_eq!(refused(&pem_of("CERTIFICATE", b"x")), KeyError::NoPemKey);
    assert_eq!(refused(&pem_of("ENCRYPTED PRIVATE KEY", b"x")), KeyError::NoPemKey);
}
