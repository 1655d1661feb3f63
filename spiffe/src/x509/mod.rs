//! X.509: certificates, X509-SVIDs, signing requests, keys and serial numbers.
//!
//! Each is read once into an owned summary. What is checked here is the form and the SPIFFE
//! profile; whom a certificate is to be believed is decided in [`crate::verify`].

mod certificate;
mod csr;
mod key;
mod private_key;
mod serial;
mod svid;

pub use certificate::{Certificate, ExtendedKeyUsage, KeyUsage, X509Error};
pub use csr::{Csr, CsrError};
pub use key::{Curve, KeyError, KeyKind, KeyType, PublicKey, SignatureError, key_id_of};
pub(crate) use key::{sha1, without_leading_zeros};
pub use private_key::PrivateKey;
pub use serial::{Serial, SerialError};
pub use svid::{X509Svid, split_certificates};
