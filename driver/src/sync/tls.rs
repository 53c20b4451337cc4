//! Reads certificates and keys from mounted objects, which are PEM in any order, or PKCS#12.
//!
//! A Secret of type kubernetes.io/tls has `tls.crt`, the leaf first and then its chain, and
//! `tls.key`. Providers deliver both in one object or in two, keys before certificates, chains in
//! any order. Parts that do not belong together are refused with a sentence, and neither value is
//! ever empty. Nothing here reads files or the clock.

mod key;
mod pkcs12;

use std::fmt;

use der::{Decode as _, Encode as _};
use pem::{EncodeConfig, LineEnding, Pem};
use x509_cert::certificate::{CertificateInner, Raw};
use zeroize::Zeroizing;

use super::parsing::Caller;
use crate::secret::Secret;
use key::{Match, PrivateKey};

/// The size of the largest object that is read: no more fits into a Secret.
const MAX_BYTES: usize = 1024 * 1024;
/// The number of PEM blocks, certificates and keys that an object may have. A bundle of all public
/// authorities has about 150 certificates.
const MAX_BLOCKS: usize = 1_000;
const MAX_CERTIFICATES: usize = 500;
const MAX_KEYS: usize = 20;
/// The length of the longest label of a PEM block.
const MAX_LABEL: usize = 64;

/// The form in which a private key is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum KeyFormat {
    /// RSA as PKCS#1 and elliptic curves as SEC1, as the existing driver writes them; other
    /// kinds as PKCS#8.
    #[default]
    Traditional,
    /// The form that the object has; in PKCS#12 that is PKCS#8.
    Original,
}

/// The reason why an object cannot be used, as a sentence without any of the object's content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Unusable(String);

impl Unusable {
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

/// The certificates and keys of an object.
pub(super) struct Material {
    certificates: Vec<Certificate>,
    keys: Vec<PrivateKey>,
}

/// The two values of a Secret of type kubernetes.io/tls.
pub(super) struct Pair {
    /// `tls.crt`: PEM, the leaf first, then its chain, then all other certificates.
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

impl Material {
    /// Reads an object: as PEM if it has a PEM block, otherwise as PKCS#12 with an empty password.
    /// Ends early if no caller waits for it any more.
    ///
    /// # Errors
    /// Names what is wrong with the object, or the limit that it exceeds, and what to do.
    pub(super) fn read(object: &[u8], caller: &Caller) -> Result<Self, Unusable> {
        if object.trim_ascii().is_empty() {
            return unusable("it is empty");
        }
        if object.len() > MAX_BYTES {
            return unusable(format!(
                "it has {} bytes; a certificate and its chain may have {MAX_BYTES}",
                object.len()
            ));
        }
        let mut parts = Self {
            certificates: Vec::new(),
            keys: Vec::new(),
        };
        let blocks = pem_blocks(object)?;
        if let Some(why) = mistake(object, &blocks) {
            return unusable(why);
        }
        if blocks.is_empty() {
            let found = pkcs12::read(object, caller).map_err(Unusable)?;
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
                // Curve parameters, certificate requests and public keys are not needed.
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
            if self.certificates.len() == MAX_CERTIFICATES {
                return unusable(format!(
                    "it has more than {MAX_CERTIFICATES} certificates; store the leaf and its chain only"
                ));
            }
            self.certificates.push(certificate);
        }
        Ok(())
    }

    fn add_key(&mut self, der: &[u8]) -> Result<(), Unusable> {
        if self.keys.len() == MAX_KEYS {
            return unusable(format!(
                "it has more than {MAX_KEYS} private keys; store the certificate's own only"
            ));
        }
        self.keys.push(PrivateKey::parse(der).map_err(Unusable)?);
        Ok(())
    }
}

/// Returns what is wrong with an object in one of the usual ways, and how to store it instead.
fn mistake(object: &[u8], blocks: &[Block]) -> Option<&'static str> {
    let has = |what: &[u8]| find(object, what, 0).is_some();
    if blocks.is_empty() && has(b"-----BEGIN ") && has(b"\\n") {
        return Some(
            "it is PEM with the two characters \\n where line breaks must be; store it with line breaks",
        );
    }
    let text = object.trim_ascii();
    let is_base64 = |b: &u8| b.is_ascii_alphanumeric() || b"+/=\r\n".contains(b);
    if blocks.is_empty() && text.iter().all(is_base64) {
        // The encoded beginnings of "-----BEGIN", and of a long structure in DER.
        if text.starts_with(b"LS0tLS1CRUdJT") {
            return Some(
                "it is PEM in base64; set encoding: base64 in this entry of secretObjects",
            );
        }
        if text.starts_with(b"MI") {
            return Some(
                "it is base64 of PKCS#12 or of another binary form; set encoding: base64 in this entry of secretObjects",
            );
        }
    }
    if has(b"Proc-Type: 4,ENCRYPTED") {
        return Some("its private key is encrypted with a passphrase; store the key without one");
    }
    let is = |label: &str| blocks.iter().any(|(found, _)| found == label);
    (is("TRUSTED CERTIFICATE") && !is("CERTIFICATE") && !is("X509 CERTIFICATE")).then_some(
        "its certificate is a TRUSTED CERTIFICATE, which only openssl reads; convert it with openssl x509 -in FILE -out FILE",
    )
}

/// Finds a key and the certificate that it belongs to, in the object that `tls.crt` comes from and
/// the one that `tls.key` comes from, which may be the same.
///
/// # Errors
/// Fails if one has no certificate or the other no key, or the key belongs to none of the certificates.
pub(super) fn pair(
    certificates: &Material,
    keys: &Material,
    format: KeyFormat,
    caller: &Caller,
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
            if caller.is_gone() {
                return unusable("it was cancelled, because no caller waits for it");
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
    // A key of a kind that cannot be compared is taken for that of the first certificate.
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

/// Returns the leaf, its issuer, and so on; then the other certificates in their order.
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

/// Returns a PEM block as Go and openssl write it.
fn block(label: &str, der: Vec<u8>) -> String {
    let block = Pem::new(label, der);
    let config = EncodeConfig::new().set_line_ending(LineEnding::LF);
    let text = pem::encode_config(&block, config);
    drop(Zeroizing::new(block.into_contents()));
    text
}

/// The label and the content of a PEM block.
type Block = (String, Zeroizing<Vec<u8>>);

/// Returns the PEM blocks of a text. Like other readers, it skips a block that cannot be decoded, the
/// text between blocks, and a begin line that is followed by another before its end line.
///
/// Each byte is read a fixed number of times, whatever the text is.
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
        let line = &text[inside..end.min(inside + MAX_LABEL + DASHES.len())];
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
            if blocks.len() == MAX_BLOCKS {
                return unusable(format!(
                    "it has more than {MAX_BLOCKS} PEM blocks; store the certificate, its chain and its key only"
                ));
            }
            blocks.push((label.to_owned(), Zeroizing::new(block.into_contents())));
        }
    }
    Ok(blocks)
}

/// Returns the first position of a pattern in a text, from a position on.
fn find(text: &[u8], what: &[u8], from: usize) -> Option<usize> {
    let rest = text.get(from..)?;
    let at = rest.windows(what.len()).position(|window| window == what)?;
    Some(from + at)
}

/// Reads bytes as an object with certificates and keys.
#[cfg(any(test, fuzzing))]
pub(crate) fn fuzz(bytes: &[u8]) {
    use crate::fuzz::assert_readable;

    let caller = Caller::default();
    let material = match Material::read(bytes, &caller) {
        Ok(material) => material,
        Err(why) => return assert_readable(&why),
    };
    for format in [KeyFormat::Traditional, KeyFormat::Original] {
        match pair(&material, &material, format, &caller) {
            Ok(Pair { certificate, key }) => {
                // What comes out can be read, and belongs together.
                let read = |value: &Secret| Material::read(value.expose(), &caller);
                let (Ok(certificate), Ok(key)) = (read(&certificate), read(&key)) else {
                    unreachable!("a value of the pair cannot be read");
                };
                assert_eq!(key.keys.len(), 1);
                assert!(pair(&certificate, &key, format, &caller).is_ok());
            }
            Err(why) => assert_readable(&why),
        }
    }
}

#[cfg(test)]
mod tests;
