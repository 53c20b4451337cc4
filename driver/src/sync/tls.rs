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

use super::parsing::Waiting;
use crate::secret::Secret;
use key::{Key, Match};

/// An object with certificates is not read beyond this: no more fits into a Secret.
const MOST_BYTES: usize = 1024 * 1024;
/// How many PEM blocks, certificates and keys an object may have. A bundle of all public
/// authorities has about 150 certificates.
const MOST_BLOCKS: usize = 1_000;
const MOST_CERTIFICATES: usize = 500;
const MOST_KEYS: usize = 20;
/// Longer labels are none.
const LONGEST_LABEL: usize = 64;

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

impl Unusable {
    /// For this reason.
    pub(super) fn because(why: impl Into<String>) -> Self {
        Self(why.into())
    }
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn unusable<T>(why: impl Into<String>) -> Result<T, Unusable> {
    Err(Unusable::because(why))
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
    subject: Vec<u8>,
    issuer: Vec<u8>,
    /// The identifier of the public key's algorithm.
    algorithm: String,
    public_key: Vec<u8>,
}

impl Parts {
    /// Reads an object, as long as somebody waits for it: PEM when it has a PEM block, PKCS#12
    /// with an empty password otherwise.
    ///
    /// # Errors
    /// Says what the object is, as far as that can be told, or which limit it does not keep to,
    /// and what to do.
    pub(super) fn read(object: &[u8], waiting: &Waiting) -> Result<Self, Unusable> {
        if object.trim_ascii().is_empty() {
            return unusable("it is empty");
        }
        if object.len() > MOST_BYTES {
            return unusable(format!(
                "it has {} bytes; a certificate and its chain may have {MOST_BYTES}",
                object.len()
            ));
        }
        let mut parts = Self {
            certificates: Vec::new(),
            keys: Vec::new(),
        };
        let blocks = pem_blocks(object)?;
        if blocks.is_empty() {
            let found = pkcs12::read(object, waiting).map_err(Unusable)?;
            for der in found.certificates {
                parts.add_certificate(der)?;
            }
            for der in &found.keys {
                parts.add_key(der)?;
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
                label if label.ends_with("PRIVATE KEY") => parts.add_key(&der)?,
                // Parameters of a curve, certificate requests, public keys.
                _ => {}
            }
        }
        Ok(parts)
    }

    fn add_certificate(&mut self, der: Vec<u8>) -> Result<(), Unusable> {
        let Some(certificate) = Certificate::read(der) else {
            return unusable("one of its certificates is not an X.509 certificate");
        };
        let is_new = |known: &Certificate| known.der != certificate.der;
        if self.certificates.iter().all(is_new) {
            if self.certificates.len() == MOST_CERTIFICATES {
                return unusable(format!(
                    "it has more than {MOST_CERTIFICATES} certificates; store the leaf and its chain only"
                ));
            }
            self.certificates.push(certificate);
        }
        Ok(())
    }

    fn add_key(&mut self, der: &[u8]) -> Result<(), Unusable> {
        if self.keys.len() == MOST_KEYS {
            return unusable(format!(
                "it has more than {MOST_KEYS} private keys; store the certificate's own only"
            ));
        }
        self.keys.push(Key::parse(der).map_err(Unusable)?);
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
    waiting: &Waiting,
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
            if waiting.is_over() {
                return unusable("it was given up, because nobody waits for it");
            }
            let public = &certificate.public_key;
            match key.belongs_to(&certificate.algorithm, public) {
                Match::Yes => {
                    return Ok(Pair {
                        certificate: chain(certificates, at),
                        key: key.pem(format, Some(public)).map_err(Unusable)?,
                    });
                }
                Match::Unknown => unknown = unknown.or(Some((key, at, public))),
                Match::No => {}
            }
        }
    }
    // A kind of key that cannot be compared goes by what the bundle says.
    match unknown {
        Some((key, at, public)) => Ok(Pair {
            certificate: chain(certificates, at),
            key: key.pem(format, Some(public)).map_err(Unusable)?,
        }),
        None => unusable(
            "the private key of tls.key belongs to none of the certificates of tls.crt; a server could not use them together",
        ),
    }
}

impl Certificate {
    fn read(der: Vec<u8>) -> Option<Self> {
        let parsed = CertificateInner::<Raw>::from_der(&der).ok()?;
        let signed = parsed.tbs_certificate();
        let info = signed.subject_public_key_info();
        Some(Self {
            subject: signed.subject().to_der().ok()?,
            issuer: signed.issuer().to_der().ok()?,
            algorithm: info.algorithm.oid.to_string(),
            public_key: info.subject_public_key.raw_bytes().to_vec(),
            der,
        })
    }
}

/// The leaf, whoever issued it, and so on; then what belongs to no chain, in its order.
fn chain(certificates: &[Certificate], leaf: usize) -> Secret {
    let mut rest: Vec<&Certificate> = certificates.iter().collect();
    let mut current = rest.remove(leaf);
    let mut ordered = vec![current];
    while current.issuer != current.subject {
        let is_issuer = |other: &&Certificate| other.subject == current.issuer;
        let Some(at) = rest.iter().position(is_issuer) else {
            break;
        };
        current = rest.remove(at);
        ordered.push(current);
    }
    ordered.extend(rest);
    let text = ordered.iter().fold(String::new(), |text, certificate| {
        text + &block("CERTIFICATE", certificate.der.clone())
    });
    text.into()
}

/// A PEM block as Go and openssl write it.
fn block(label: &str, der: Vec<u8>) -> String {
    let block = Pem::new(label, der);
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    let text = pem::encode_config(&block, config);
    drop(Zeroizing::new(block.into_contents()));
    text
}

/// A label, and what a block of that label holds.
type Block = (String, Zeroizing<Vec<u8>>);

/// The blocks of a text by label. A block that cannot be decoded is passed over, as other
/// readers do; so is text between blocks, and a beginning with another before its end.
///
/// Each byte is looked at a fixed number of times, whatever the text is.
fn pem_blocks(text: &[u8]) -> Result<Vec<Block>, Unusable> {
    const BEGIN: &[u8] = b"-----BEGIN ";
    const END: &[u8] = b"-----END ";
    const DASHES: &[u8] = b"-----";
    let mut blocks = Vec::new();
    let mut end = find(text, END, 0);
    let mut begins = find(text, BEGIN, 0);
    while let Some(begin) = begins {
        let inside = begin + BEGIN.len();
        begins = find(text, BEGIN, inside);
        if end.is_some_and(|end| end < inside) {
            end = find(text, END, inside);
        }
        let Some(end) = end else { break };
        if begins.is_some_and(|next| next < end) {
            continue;
        }
        let line = &text[inside..end.min(inside + LONGEST_LABEL + DASHES.len())];
        let Some(length) = find(line, DASHES, 0) else {
            continue;
        };
        let Ok(label) = std::str::from_utf8(&text[inside..inside + length]) else {
            continue;
        };
        let end_line = format!("-----END {label}-----");
        if !text[end..].starts_with(end_line.as_bytes()) {
            continue;
        }
        if let Ok(block) = pem::parse(&text[begin..end + end_line.len()]) {
            if blocks.len() == MOST_BLOCKS {
                return unusable(format!(
                    "it has more than {MOST_BLOCKS} PEM blocks; store the certificate, its chain and its key only"
                ));
            }
            blocks.push((label.to_owned(), Zeroizing::new(block.into_contents())));
        }
    }
    Ok(blocks)
}

/// Where something stands in a text, from a place on.
fn find(text: &[u8], what: &[u8], from: usize) -> Option<usize> {
    let rest = text.get(from..)?;
    let at = rest.windows(what.len()).position(|window| window == what)?;
    Some(from + at)
}

#[cfg(test)]
mod tests;
