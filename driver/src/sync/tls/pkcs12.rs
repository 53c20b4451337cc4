//! Reads PKCS#12 (RFC 7292) with an empty password, the form in which some stores deliver
//! certificates.
//!
//! The schemes that occur in practice are supported: PBES2 (openssl 3, Java, modern stores), the
//! older ones with Triple DES and RC2, and no encryption at all. Tools disagree on whether an empty
//! password is one UTF-16 NUL or no bytes, so both are tried. The MAC is not verified: with a known
//! password it proves nothing, and a damaged key does not match its certificate.

use cbc::cipher::{BlockModeDecrypt, InnerIvInit, KeyIvInit, block_padding::Pkcs7};
use der::{
    Decode as _, Encode as _, Reader as _, SliceReader, Tag, TagNumber,
    asn1::{AnyRef, ObjectIdentifier, OctetStringRef},
};
use pkcs5::pbes2::{self, EncryptionScheme, Pbkdf2Prf};
use ring::{aead, digest, hmac};
use zeroize::Zeroizing;

use crate::sync::parsing::Caller;

const fn oid(text: &str) -> ObjectIdentifier {
    ObjectIdentifier::new_unwrap(text)
}

const DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.1");
const ENCRYPTED_DATA: ObjectIdentifier = oid("1.2.840.113549.1.7.6");
const KEY_BAG: ObjectIdentifier = oid("1.2.840.113549.1.12.10.1.1");
const SHROUDED_KEY_BAG: ObjectIdentifier = oid("1.2.840.113549.1.12.10.1.2");
const CERT_BAG: ObjectIdentifier = oid("1.2.840.113549.1.12.10.1.3");
const SAFE_CONTENTS_BAG: ObjectIdentifier = oid("1.2.840.113549.1.12.10.1.6");
const X509: ObjectIdentifier = oid("1.2.840.113549.1.9.22.1");
const PBES2: ObjectIdentifier = oid("1.2.840.113549.1.5.13");
const SHA1_3DES: ObjectIdentifier = oid("1.2.840.113549.1.12.1.3");
const SHA1_2DES: ObjectIdentifier = oid("1.2.840.113549.1.12.1.4");
const SHA1_RC2_128: ObjectIdentifier = oid("1.2.840.113549.1.12.1.5");
const SHA1_RC2_40: ObjectIdentifier = oid("1.2.840.113549.1.12.1.6");

/// The rounds of key derivation that an archive may take in all, in one to three seconds. It is a few
/// times as many as the most careful tools use, which is 600,000 for each part of an archive.
const MAX_ROUNDS: u64 = 4_000_000;
/// The number of rounds after which the work ends if no caller waits for it any more.
const ROUNDS_BETWEEN_CHECKS: u32 = 10_000;
/// The number of bags that an archive may have in all.
const MAX_BAGS: u64 = 1_000;
/// The number of levels to which bags may be nested.
const MAX_DEPTH: usize = 4;

/// The two forms of an empty password in the older schemes.
const EMPTY: [&[u8]; 2] = [&[0, 0], &[]];

/// The certificates and keys of an archive, in DER.
#[derive(Default)]
pub(super) struct Extracted {
    pub(super) certificates: Vec<Vec<u8>>,
    pub(super) keys: Vec<Zeroizing<Vec<u8>>>,
}

/// The reason why an archive could not be read.
enum ArchiveError {
    /// It does not follow the standard.
    Malformed,
    /// An empty password does not decrypt it.
    Password,
    /// It is encrypted with a scheme that is not supported.
    Scheme(ObjectIdentifier),
    /// It takes more rounds of key derivation than an archive may.
    Rounds,
    /// It has more bags than an archive may.
    Bags,
    /// No caller waits for it any more.
    GivenUp,
}

/// The rounds and bags that an archive may still take.
struct Allowance<'w> {
    rounds: u64,
    bags: u64,
    caller: &'w Caller,
}

impl Allowance<'_> {
    fn take_rounds(&mut self, rounds: u32) -> Result<(), ArchiveError> {
        self.rounds = self
            .rounds
            .checked_sub(rounds.into())
            .ok_or(ArchiveError::Rounds)?;
        Ok(())
    }

    fn take_bag(&mut self) -> Result<(), ArchiveError> {
        self.bags = self.bags.checked_sub(1).ok_or(ArchiveError::Bags)?;
        self.check_caller()
    }

    fn check_caller(&self) -> Result<(), ArchiveError> {
        if self.caller.is_gone() {
            return Err(ArchiveError::GivenUp);
        }
        Ok(())
    }
}

impl From<der::Error> for ArchiveError {
    fn from(_: der::Error) -> Self {
        Self::Malformed
    }
}

/// Reads an archive. Ends early if no caller waits for it any more.
///
/// # Errors
/// Names what is wrong with the archive, or the limit that it exceeds, and what to do.
pub(super) fn read(archive: &[u8], caller: &Caller) -> Result<Extracted, String> {
    let mut extracted = Extracted::default();
    let mut allowance = Allowance {
        rounds: MAX_ROUNDS,
        bags: MAX_BAGS,
        caller,
    };
    match read_archive(archive, &mut extracted, &mut allowance) {
        Ok(()) => Ok(extracted),
        Err(ArchiveError::Malformed) => {
            Err("it is neither PEM nor PKCS#12, or it is damaged".to_owned())
        }
        Err(ArchiveError::Password) => Err(
            "it is PKCS#12 that an empty password does not open; store it without a password, or as PEM".to_owned(),
        ),
        Err(ArchiveError::Scheme(oid)) => Err(format!(
            "it is PKCS#12 encrypted with a scheme that is not supported (OID {oid}); export it with AES-256-CBC, or store it as PEM"
        )),
        Err(ArchiveError::Rounds) => Err(format!(
            "it is PKCS#12 that takes more than {MAX_ROUNDS} rounds of key derivation in all; export it with fewer, or store it as PEM"
        )),
        Err(ArchiveError::Bags) => Err(format!(
            "it is PKCS#12 with more than {MAX_BAGS} bags; store what is needed of it only"
        )),
        Err(ArchiveError::GivenUp) => Err("it was cancelled, because no caller waits for it".to_owned()),
    }
}

fn read_archive(
    archive: &[u8],
    extracted: &mut Extracted,
    allowance: &mut Allowance<'_>,
) -> Result<(), ArchiveError> {
    let mut fields = fields(archive)?;
    let _version: AnyRef<'_> = fields.decode()?;
    let (kind, content) = content_info(fields.decode()?)?;
    if kind != DATA {
        return Err(ArchiveError::Malformed);
    }
    let safe = <&OctetStringRef>::from_der(content)?;
    let mut contents = self::fields(safe.as_bytes())?;
    while !contents.is_finished() {
        let (kind, content) = content_info(contents.decode()?)?;
        allowance.take_bag()?;
        match kind {
            DATA => {
                let bytes = <&OctetStringRef>::from_der(content)?.as_bytes();
                bags(bytes, extracted, allowance, 0)?;
            }
            ENCRYPTED_DATA => {
                let bytes = encrypted_data(content, allowance)?;
                bags(&bytes, extracted, allowance, 0)?;
            }
            // It is encrypted with a public key.
            _ => return Err(ArchiveError::Scheme(kind)),
        }
    }
    Ok(())
}

/// Returns a reader of the fields of a SEQUENCE.
fn fields(bytes: &[u8]) -> Result<SliceReader<'_>, ArchiveError> {
    let any = AnyRef::from_der(bytes)?;
    inside(any)
}

fn inside(any: AnyRef<'_>) -> Result<SliceReader<'_>, ArchiveError> {
    if any.header().tag() != Tag::Sequence {
        return Err(ArchiveError::Malformed);
    }
    Ok(SliceReader::new(any.value())?)
}

/// Returns the type of a ContentInfo, and its content as DER.
fn content_info(any: AnyRef<'_>) -> Result<(ObjectIdentifier, &[u8]), ArchiveError> {
    let mut fields = inside(any)?;
    Ok((fields.decode()?, tagged_0(fields.decode()?)?))
}

/// Returns the content of an explicit tag 0.
fn tagged_0(any: AnyRef<'_>) -> Result<&[u8], ArchiveError> {
    match any.header().tag() {
        Tag::ContextSpecific {
            number: TagNumber(0),
            ..
        } => Ok(any.value()),
        _ => Err(ArchiveError::Malformed),
    }
}

fn encrypted_data(
    der: &[u8],
    allowance: &mut Allowance<'_>,
) -> Result<Zeroizing<Vec<u8>>, ArchiveError> {
    let mut data = fields(der)?;
    let _version: AnyRef<'_> = data.decode()?;
    let mut info = inside(data.decode()?)?;
    let _kind: ObjectIdentifier = info.decode()?;
    let algorithm: AnyRef<'_> = info.decode()?;
    // The implicit tag stands in for the OCTET STRING's own.
    let ciphertext = tagged_0(info.decode()?)?;
    decrypt(algorithm, ciphertext, allowance, |plain| {
        fields(plain).is_ok()
    })
}

fn bags(
    contents: &[u8],
    extracted: &mut Extracted,
    allowance: &mut Allowance<'_>,
    depth: usize,
) -> Result<(), ArchiveError> {
    if depth > MAX_DEPTH {
        return Err(ArchiveError::Malformed);
    }
    let mut bags_in = fields(contents)?;
    while !bags_in.is_finished() {
        let mut bag = inside(bags_in.decode()?)?;
        allowance.take_bag()?;
        let kind: ObjectIdentifier = bag.decode()?;
        let value = tagged_0(bag.decode()?)?;
        match kind {
            KEY_BAG => extracted.keys.push(Zeroizing::new(value.to_vec())),
            SHROUDED_KEY_BAG => {
                let mut shrouded = fields(value)?;
                let algorithm: AnyRef<'_> = shrouded.decode()?;
                let ciphertext: &OctetStringRef = shrouded.decode()?;
                let is_key = |plain: &[u8]| fields(plain).is_ok();
                let key = decrypt(algorithm, ciphertext.as_bytes(), allowance, is_key)?;
                extracted.keys.push(key);
            }
            CERT_BAG => {
                let mut cert = fields(value)?;
                let kind: ObjectIdentifier = cert.decode()?;
                if kind == X509 {
                    let der = <&OctetStringRef>::from_der(tagged_0(cert.decode()?)?)?;
                    extracted.certificates.push(der.as_bytes().to_vec());
                }
            }
            SAFE_CONTENTS_BAG => bags(value, extracted, allowance, depth + 1)?,
            // Revocation lists and other secrets are not needed.
            _ => {}
        }
    }
    Ok(())
}

/// Decrypts with an empty password, in the form for which the result looks right.
fn decrypt(
    algorithm: AnyRef<'_>,
    ciphertext: &[u8],
    allowance: &mut Allowance<'_>,
    looks_right: impl Fn(&[u8]) -> bool,
) -> Result<Zeroizing<Vec<u8>>, ArchiveError> {
    let mut identifier = inside(algorithm)?;
    let scheme: ObjectIdentifier = identifier.decode()?;
    let parameters: AnyRef<'_> = identifier.decode()?;
    if scheme == PBES2 {
        let parameters = pbes2::Parameters::from_der(&parameters.to_der()?)?;
        let plain = decrypt_pbes2(&parameters, ciphertext, allowance)?;
        return plain
            .filter(|plain| looks_right(plain))
            .ok_or(ArchiveError::Password);
    }
    let mut parameters = inside(parameters)?;
    let salt: &OctetStringRef = parameters.decode()?;
    let rounds: u32 = parameters.decode()?;
    for password in EMPTY {
        let mut derive = |purpose, length| {
            let salt = salt.as_bytes();
            derive(password, salt, rounds, purpose, length, allowance)
        };
        let plain = match scheme {
            SHA1_3DES => {
                unpad::<cbc::Decryptor<des::TdesEde3>>(&derive(1, 24)?, &derive(2, 8)?, ciphertext)
            }
            SHA1_2DES => {
                unpad::<cbc::Decryptor<des::TdesEde2>>(&derive(1, 16)?, &derive(2, 8)?, ciphertext)
            }
            SHA1_RC2_128 => unpad_rc2(&derive(1, 16)?, &derive(2, 8)?, ciphertext),
            SHA1_RC2_40 => unpad_rc2(&derive(1, 5)?, &derive(2, 8)?, ciphertext),
            other => return Err(ArchiveError::Scheme(other)),
        };
        if let Some(plain) = plain.filter(|plain| looks_right(plain)) {
            return Ok(plain);
        }
    }
    Err(ArchiveError::Password)
}

/// Decrypts with the scheme of RFC 8018, 6.2. Returns `None` if the password is another.
fn decrypt_pbes2(
    parameters: &pbes2::Parameters,
    ciphertext: &[u8],
    allowance: &mut Allowance<'_>,
) -> Result<Option<Zeroizing<Vec<u8>>>, ArchiveError> {
    let scheme = parameters.encryption;
    let pbes2::Kdf::Pbkdf2(kdf) = &parameters.kdf else {
        return Err(ArchiveError::Scheme(parameters.kdf.oid()));
    };
    let function = match kdf.prf {
        Pbkdf2Prf::HmacWithSha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        Pbkdf2Prf::HmacWithSha256 => hmac::HMAC_SHA256,
        Pbkdf2Prf::HmacWithSha384 => hmac::HMAC_SHA384,
        Pbkdf2Prf::HmacWithSha512 => hmac::HMAC_SHA512,
        other => return Err(ArchiveError::Scheme(other.oid())),
    };
    let length = scheme.key_size();
    if kdf.key_length.is_some_and(|own| usize::from(own) != length) {
        return Err(ArchiveError::Malformed);
    }
    let (salt, rounds) = (kdf.salt.as_ref(), kdf.iteration_count);
    let key = pbkdf2(function, salt, rounds, length, allowance)?;
    Ok(match scheme {
        EncryptionScheme::Aes128Cbc { iv } => {
            unpad::<cbc::Decryptor<aes::Aes128>>(&key, &iv, ciphertext)
        }
        EncryptionScheme::Aes192Cbc { iv } => {
            unpad::<cbc::Decryptor<aes::Aes192>>(&key, &iv, ciphertext)
        }
        EncryptionScheme::Aes256Cbc { iv } => {
            unpad::<cbc::Decryptor<aes::Aes256>>(&key, &iv, ciphertext)
        }
        EncryptionScheme::DesEde3Cbc { iv } => {
            unpad::<cbc::Decryptor<des::TdesEde3>>(&key, &iv, ciphertext)
        }
        EncryptionScheme::Aes128Gcm { nonce } => {
            opened(&aead::AES_128_GCM, &key, nonce, ciphertext)
        }
        EncryptionScheme::Aes256Gcm { nonce } => {
            opened(&aead::AES_256_GCM, &key, nonce, ciphertext)
        }
        other => return Err(ArchiveError::Scheme(other.oid())),
    })
}

/// Derives a key as in RFC 8018, 5.2, with an empty password. It is implemented here because no
/// library can end it early.
fn pbkdf2(
    function: hmac::Algorithm,
    salt: &[u8],
    rounds: u32,
    length: usize,
    allowance: &mut Allowance<'_>,
) -> Result<Zeroizing<Vec<u8>>, ArchiveError> {
    let password = hmac::Key::new(function, b"");
    let mut derived = Zeroizing::new(Vec::with_capacity(length + 64));
    for block in 1_u32.. {
        allowance.take_rounds(rounds)?;
        let mut context = hmac::Context::with_key(&password);
        context.update(salt);
        context.update(&block.to_be_bytes());
        let mut last = context.sign();
        let mut sum = Zeroizing::new(last.as_ref().to_vec());
        for round in 1..rounds {
            if round % ROUNDS_BETWEEN_CHECKS == 0 {
                allowance.check_caller()?;
            }
            last = hmac::sign(&password, last.as_ref());
            for (byte, add) in sum.iter_mut().zip(last.as_ref()) {
                *byte ^= add;
            }
        }
        derived.extend_from_slice(&sum);
        if derived.len() >= length {
            break;
        }
    }
    derived.truncate(length);
    Ok(derived)
}

fn opened(
    algorithm: &'static aead::Algorithm,
    key: &[u8],
    nonce: [u8; aead::NONCE_LEN],
    ciphertext: &[u8],
) -> Option<Zeroizing<Vec<u8>>> {
    let key = aead::LessSafeKey::new(aead::UnboundKey::new(algorithm, key).ok()?);
    let mut buffer = Zeroizing::new(ciphertext.to_vec());
    let nonce = aead::Nonce::assume_unique_for_key(nonce);
    let plain = key.open_in_place(nonce, aead::Aad::empty(), &mut buffer);
    let length = plain.ok()?.len();
    buffer.truncate(length);
    Some(buffer)
}

fn unpad<C>(key: &[u8], iv: &[u8], ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>>
where
    C: KeyIvInit + BlockModeDecrypt,
{
    let cipher = C::new_from_slices(key, iv).ok()?;
    let plain = cipher.decrypt_padded_vec::<Pkcs7>(ciphertext).ok()?;
    Some(Zeroizing::new(plain))
}

/// Decrypts with RC2, with as many effective bits as the key has.
fn unpad_rc2(key: &[u8], iv: &[u8], ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let cipher = rc2::Rc2::new_with_eff_key_len(key, key.len() * 8);
    let iv = iv.try_into().ok()?;
    let cipher = <cbc::Decryptor<rc2::Rc2> as InnerIvInit>::inner_iv_init(cipher, iv);
    let plain = cipher.decrypt_padded_vec::<Pkcs7>(ciphertext).ok()?;
    Some(Zeroizing::new(plain))
}

/// Derives a key as in RFC 7292, appendix B.2, with SHA-1. `purpose` is 1 for a key and 2 for an
/// initialization vector.
fn derive(
    password: &[u8],
    salt: &[u8],
    rounds: u32,
    purpose: u8,
    length: usize,
    allowance: &mut Allowance<'_>,
) -> Result<Zeroizing<Vec<u8>>, ArchiveError> {
    const BLOCK: usize = 64;
    let sha1 = |parts: &[&[u8]]| {
        let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
        parts.iter().for_each(|part| context.update(part));
        context.finish()
    };
    // Repeats a text to fill whole blocks.
    let filled = |text: &[u8]| -> Vec<u8> {
        let length = text.len().div_ceil(BLOCK) * BLOCK;
        text.iter().copied().cycle().take(length).collect()
    };
    let mut input = Zeroizing::new([filled(salt), filled(password)].concat());
    let mut derived = Zeroizing::new(Vec::with_capacity(length + 20));
    while derived.len() < length {
        allowance.take_rounds(rounds)?;
        let mut hash = sha1(&[&[purpose; BLOCK], &input]);
        for round in 1..rounds {
            if round % ROUNDS_BETWEEN_CHECKS == 0 {
                allowance.check_caller()?;
            }
            hash = sha1(&[hash.as_ref()]);
        }
        derived.extend_from_slice(hash.as_ref());
        let adjustment = filled(hash.as_ref());
        for block in input.chunks_mut(BLOCK) {
            // block = block + adjustment + 1, as big-endian numbers.
            let mut carry = 1_u16;
            for (byte, add) in block.iter_mut().zip(&adjustment).rev() {
                carry += u16::from(*byte) + u16::from(*add);
                *byte = carry.to_le_bytes()[0];
                carry >>= 8;
            }
        }
    }
    derived.truncate(length);
    Ok(derived)
}

#[cfg(test)]
mod tests;
