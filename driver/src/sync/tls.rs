//! A certificate's parts out of what a provider delivers: PEM in any order, or PKCS#12.
//!
//! A Secret of type kubernetes.io/tls wants `tls.crt`, the leaf first and then its chain, and
//! `tls.key`. Providers deliver both in one object or in two, keys before certificates, chains
//! in any order. What does not fit together is refused with a sentence, and nothing comes out
//! empty. Nothing here touches the system.

mod key;
mod pkcs12;

use std::fmt;

use der::{Decode as _, Encode as _};
use pem::{EncodeConfig, LineEnding, Pem};
use x509_cert::certificate::{CertificateInner, Raw};
use zeroize::Zeroizing;

use crate::secret::Secret;
use key::{Key, Match};

/// In which form a private key is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum KeyFormat {
    /// RSA as PKCS#1 and elliptic curves as SEC1, as the existing driver writes them; other
    /// kinds as PKCS#8.
    #[default]
    Traditional,
    /// As it came; out of PKCS#12 that is PKCS#8.
    Original,
}

/// Why an object has no usable parts. A sentence without any of the object's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unusable(String);

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn unusable<T>(why: impl Into<String>) -> Result<T, Unusable> {
    Err(Unusable(why.into()))
}

/// What an object holds.
pub(super) struct Parts {
    certificates: Vec<Certificate>,
    keys: Vec<Key>,
}

/// The two values of a Secret of type kubernetes.io/tls.
pub(super) struct Pair {
    /// `tls.crt`: PEM, the leaf first, then its chain, then whatever else there was.
    pub(super) certificate: Secret,
    /// `tls.key`: PEM.
    pub(super) key: Secret,
}

struct Certificate {
    der: Vec<u8>,
    parsed: CertificateInner<Raw>,
}

impl Parts {
    /// Reads an object: PEM when it has a PEM block, PKCS#12 with an empty password otherwise.
    ///
    /// # Errors
    /// Says what the object is, as far as that can be told, and what to do.
    pub(super) fn read(object: &[u8]) -> Result<Self, Unusable> {
        if object.trim_ascii().is_empty() {
            return unusable("it is empty");
        }
        let mut parts = Self {
            certificates: Vec::new(),
            keys: Vec::new(),
        };
        let blocks = pem_blocks(object);
        if blocks.is_empty() {
            let found = pkcs12::read(object).map_err(Unusable)?;
            for der in found.certificates {
                parts.add_certificate(der)?;
            }
            for der in &found.keys {
                parts.keys.push(Key::parse(der).map_err(Unusable)?);
            }
            return Ok(parts);
        }
        for (label, der) in blocks {
            match label.as_str() {
                "CERTIFICATE" | "X509 CERTIFICATE" => parts.add_certificate(der.to_vec())?,
                "ENCRYPTED PRIVATE KEY" => {
                    return unusable(
                        "its private key is encrypted with a passphrase; store the key without one",
                    );
                }
                label if label.ends_with("PRIVATE KEY") => {
                    parts.keys.push(Key::parse(&der).map_err(Unusable)?);
                }
                // Parameters of a curve, certificate requests, public keys.
                _ => {}
            }
        }
        Ok(parts)
    }

    fn add_certificate(&mut self, der: Vec<u8>) -> Result<(), Unusable> {
        let Ok(parsed) = CertificateInner::<Raw>::from_der(&der) else {
            return unusable("one of its certificates is not an X.509 certificate");
        };
        if self.certificates.iter().all(|known| known.der != der) {
            self.certificates.push(Certificate { der, parsed });
        }
        Ok(())
    }
}

/// The pair out of the object that `tls.crt` comes from and the one that `tls.key` comes from,
/// which may be the same.
///
/// # Errors
/// When one has no certificate or the other no key, or the key belongs to none of the
/// certificates.
pub(super) fn pair(
    certificates: &Parts,
    keys: &Parts,
    format: KeyFormat,
) -> Result<Pair, Unusable> {
    let certificates = &certificates.certificates;
    if certificates.is_empty() {
        return unusable("the object of tls.crt has no certificate");
    }
    if keys.keys.is_empty() {
        return unusable("the object of tls.key has no private key");
    }
    let mut unknown = None;
    for key in &keys.keys {
        for (at, certificate) in certificates.iter().enumerate() {
            let public = certificate.public_key();
            match key.belongs_to(&public.0, &public.1) {
                Match::Yes => {
                    return Ok(Pair {
                        certificate: chain(certificates, at)?,
                        key: key.pem(format, Some(&public.1)).map_err(Unusable)?,
                    });
                }
                Match::Unknown => unknown = unknown.or(Some((key, at, public.1))),
                Match::No => {}
            }
        }
    }
    // A kind of key that cannot be compared goes by what the bundle says.
    match unknown {
        Some((key, at, public)) => Ok(Pair {
            certificate: chain(certificates, at)?,
            key: key.pem(format, Some(&public)).map_err(Unusable)?,
        }),
        None => unusable(
            "the private key of tls.key belongs to none of the certificates of tls.crt; a server could not use them together",
        ),
    }
}

impl Certificate {
    /// The algorithm's identifier and the bits of the public key.
    fn public_key(&self) -> (String, Vec<u8>) {
        let info = self.parsed.tbs_certificate().subject_public_key_info();
        (
            info.algorithm.oid.to_string(),
            info.subject_public_key.raw_bytes().to_vec(),
        )
    }

    fn subject(&self) -> Vec<u8> {
        let name = self.parsed.tbs_certificate().subject().to_der();
        name.unwrap_or_default()
    }

    fn issuer(&self) -> Vec<u8> {
        let name = self.parsed.tbs_certificate().issuer().to_der();
        name.unwrap_or_default()
    }
}

/// The leaf, whoever issued it, and so on; then what belongs to no chain, in its order.
fn chain(certificates: &[Certificate], leaf: usize) -> Result<Secret, Unusable> {
    let mut rest: Vec<&Certificate> = certificates.iter().collect();
    let mut current = rest.remove(leaf);
    let mut ordered = vec![current];
    while current.issuer() != current.subject() {
        let issuer = current.issuer();
        let Some(at) = rest.iter().position(|other| other.subject() == issuer) else {
            break;
        };
        current = rest.remove(at);
        ordered.push(current);
    }
    ordered.extend(rest);
    let text = ordered.iter().fold(String::new(), |text, certificate| {
        text + &block("CERTIFICATE", certificate.der.clone())
    });
    Ok(text.into())
}

/// A PEM block as Go and openssl write it.
fn block(label: &str, der: Vec<u8>) -> String {
    let block = Pem::new(label, der);
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    let text = pem::encode_config(&block, config);
    drop(Zeroizing::new(block.into_contents()));
    text
}

/// The blocks of a text by label. A block that cannot be decoded is passed over, as other
/// readers do; so is text between blocks.
fn pem_blocks(text: &[u8]) -> Vec<(String, Zeroizing<Vec<u8>>)> {
    const BEGIN: &[u8] = b"-----BEGIN ";
    let find = |what: &[u8], from: usize| {
        let rest = text.get(from..)?;
        let at = rest.windows(what.len()).position(|window| window == what)?;
        Some(from + at)
    };
    let mut blocks = Vec::new();
    let mut at = 0;
    while let Some(begin) = find(BEGIN, at) {
        at = begin + BEGIN.len();
        let Some(label_end) = find(b"-----", at) else {
            break;
        };
        let Ok(label) = std::str::from_utf8(&text[at..label_end]) else {
            continue;
        };
        let end_line = format!("-----END {label}-----");
        let Some(end) = find(end_line.as_bytes(), label_end) else {
            continue;
        };
        let end = end + end_line.len();
        if let Ok(block) = pem::parse(&text[begin..end]) {
            blocks.push((label.to_owned(), Zeroizing::new(block.into_contents())));
            at = end;
        }
    }
    blocks
}

#[cfg(test)]
mod tests;
