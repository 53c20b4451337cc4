//! Reads private keys, finds their certificates, and writes them in several forms.

use der::{Decode as _, Encode as _, SliceReader, Tag, TagNumber, asn1::AnyRef};
use pkcs1::RsaPrivateKey;
use pkcs8::{ObjectIdentifier, PrivateKeyInfoRef};
use ring::{
    rand::SystemRandom,
    signature::{
        ECDSA_P256_SHA256_ASN1_SIGNING, ECDSA_P384_SHA384_ASN1_SIGNING, EcdsaKeyPair,
        Ed25519KeyPair,
    },
};
use sec1::{EcParameters, EcPrivateKey};
use zeroize::Zeroizing;

use super::{KeyFormat, block};
use crate::secret::Secret;

/// The algorithms of keys (RFC 3279, RFC 5480, RFC 8410).
const RSA: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.113549.1.1.1");
const EC: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.2.1");
const ED25519: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.101.112");
/// The curves (RFC 5480) whose keys can be checked against a public key.
const P256: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.2.840.10045.3.1.7");
const P384: ObjectIdentifier = ObjectIdentifier::new_unwrap("1.3.132.0.34");

/// A private key.
pub(super) struct PrivateKey {
    kind: Kind,
    /// The key as it was read.
    original: Zeroizing<Vec<u8>>,
    original_label: &'static str,
}

enum Kind {
    /// A key in PKCS#1.
    Rsa(Zeroizing<Vec<u8>>),
    Ec {
        /// The key in SEC1, in which the curve and the public key may be missing.
        sec1: Zeroizing<Vec<u8>>,
        curve: ObjectIdentifier,
    },
    /// The seed of the key.
    Ed25519(Zeroizing<Vec<u8>>),
    /// A key of another kind in PKCS#8.
    Other(ObjectIdentifier),
}

/// Whether a key belongs to a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Match {
    Yes,
    No,
    /// The kind of key cannot be compared.
    Unknown,
}

impl PrivateKey {
    /// Reads a key in PKCS#8, PKCS#1 or SEC1. The PEM label is ignored, because it may be wrong.
    pub(super) fn parse(der: &[u8]) -> Result<Self, String> {
        let (kind, original_label) = parse(der).ok_or_else(|| {
            if has_explicit_curve(der) {
                "its private key spells out its curve instead of naming it, which servers refuse; write it again with openssl ec -in FILE -param_enc named_curve -out FILE"
            } else {
                "its private key cannot be read as PKCS#8, PKCS#1 or SEC1; it may be damaged"
            }
        })?;
        Ok(Self {
            kind,
            original: Zeroizing::new(der.to_vec()),
            original_label,
        })
    }

    /// Returns whether this is the key of a certificate with that public key.
    pub(super) fn belongs_to(&self, algorithm: &str, public: &[u8]) -> Match {
        let oid = match &self.kind {
            Kind::Rsa(_) => RSA,
            Kind::Ec { .. } => EC,
            Kind::Ed25519(_) => ED25519,
            Kind::Other(oid) => *oid,
        };
        if oid.to_string() != algorithm {
            return Match::No;
        }
        let matches = match &self.kind {
            Kind::Rsa(der) => rsa_matches(der, public),
            Kind::Ec { sec1, curve } => ec_matches(sec1, *curve, public),
            Kind::Ed25519(seed) => Some(
                // Checks that the public key is the seed's.
                Ed25519KeyPair::from_seed_and_public_key(seed, public).is_ok(),
            ),
            Kind::Other(_) => None,
        };
        match matches {
            Some(true) => Match::Yes,
            Some(false) => Match::No,
            None => Match::Unknown,
        }
    }

    /// Returns the key as PEM. `public` is added to a key of an elliptic curve that lacks it.
    pub(super) fn pem(&self, format: KeyFormat, public: Option<&[u8]>) -> Result<Secret, String> {
        let original = || block(self.original_label, self.original.to_vec());
        let text = match (format, &self.kind) {
            (KeyFormat::Original, _) | (_, Kind::Ed25519(_) | Kind::Other(_)) => original(),
            (KeyFormat::Traditional, Kind::Rsa(der)) => block("RSA PRIVATE KEY", der.to_vec()),
            (KeyFormat::Traditional, Kind::Ec { sec1, curve }) => {
                let mut key =
                    EcPrivateKey::from_der(sec1).map_err(|_| "its private key is damaged")?;
                key.parameters = Some(EcParameters::NamedCurve(*curve));
                key.public_key = key.public_key.or(public);
                let der = key
                    .to_der()
                    .map_err(|_| "its private key cannot be written as SEC1")?;
                block("EC PRIVATE KEY", der)
            }
        };
        Ok(text.into())
    }
}

fn parse(der: &[u8]) -> Option<(Kind, &'static str)> {
    if let Ok(info) = PrivateKeyInfoRef::from_der(der) {
        let inner = Zeroizing::new(info.private_key.as_bytes().to_vec());
        let kind = match info.algorithm.oid {
            RSA => {
                RsaPrivateKey::<der::asn1::UintRef<'_>>::from_der(&inner).ok()?;
                Kind::Rsa(inner)
            }
            EC => {
                EcPrivateKey::from_der(&inner).ok()?;
                let curve = info.algorithm.parameters_oid().ok()?;
                Kind::Ec { sec1: inner, curve }
            }
            ED25519 => {
                let seed = <&der::asn1::OctetStringRef>::from_der(&inner).ok()?;
                Kind::Ed25519(Zeroizing::new(seed.as_bytes().to_vec()))
            }
            other => Kind::Other(other),
        };
        return Some((kind, "PRIVATE KEY"));
    }
    if RsaPrivateKey::<der::asn1::UintRef<'_>>::from_der(der).is_ok() {
        let der = Zeroizing::new(der.to_vec());
        return Some((Kind::Rsa(der), "RSA PRIVATE KEY"));
    }
    let key = EcPrivateKey::from_der(der).ok()?;
    let Some(EcParameters::NamedCurve(curve)) = key.parameters else {
        return None;
    };
    let sec1 = Zeroizing::new(der.to_vec());
    Some((Kind::Ec { sec1, curve }, "EC PRIVATE KEY"))
}

/// Returns whether a key of an elliptic curve has the curve's parameters in the place of its name.
fn has_explicit_curve(der: &[u8]) -> bool {
    if let Ok(info) = PrivateKeyInfoRef::from_der(der) {
        return info.algorithm.oid == EC && info.algorithm.parameters_oid().is_err();
    }
    let parameters = || {
        let mut fields = SliceReader::new(AnyRef::from_der(der).ok()?.value()).ok()?;
        let (_version, _key) = (
            AnyRef::decode(&mut fields).ok()?,
            AnyRef::decode(&mut fields).ok()?,
        );
        let field = AnyRef::decode(&mut fields).ok()?;
        let is_first = field.header().tag()
            == Tag::ContextSpecific {
                constructed: true,
                number: TagNumber(0),
            };
        is_first
            .then(|| AnyRef::from_der(field.value()).ok())
            .flatten()
    };
    parameters().is_some_and(|parameters| parameters.header().tag() == Tag::Sequence)
}

fn rsa_matches(key: &[u8], public: &[u8]) -> Option<bool> {
    let key = RsaPrivateKey::<der::asn1::UintRef<'_>>::from_der(key).ok()?;
    let public = pkcs1::RsaPublicKey::<der::asn1::UintRef<'_>>::from_der(public).ok()?;
    Some(key.modulus == public.modulus && key.public_exponent == public.public_exponent)
}

fn ec_matches(sec1: &[u8], curve: ObjectIdentifier, public: &[u8]) -> Option<bool> {
    let key = EcPrivateKey::from_der(sec1).ok()?;
    let algorithm = match curve {
        P256 => &ECDSA_P256_SHA256_ASN1_SIGNING,
        P384 => &ECDSA_P384_SHA384_ASN1_SIGNING,
        // Other curves are compared by the public key that the key brings, if it brings one.
        _ => return key.public_key.map(|own| own == public),
    };
    // Computes the public key and compares.
    let random = SystemRandom::new();
    let pair =
        EcdsaKeyPair::from_private_key_and_public_key(algorithm, key.private_key, public, &random);
    Some(pair.is_ok())
}
