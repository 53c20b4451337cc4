//! Reads PKCS#12 (RFC 7292) with an empty password, as stores deliver certificates.
//!
//! Read are the schemes that are met in practice: PBES2 (openssl 3, Java, modern stores), the
//! older ones with Triple DES and RC2, and no encryption at all. Tools disagree on what an empty
//! password is, one UTF-16 NUL or no bytes, so both are tried. The MAC is not verified: with a
//! password that everybody knows it proves nothing, and a damaged key is found out when it is
//! compared with its certificate.

use cbc::cipher::{BlockModeDecrypt, InnerIvInit, KeyIvInit, block_padding::Pkcs7};
use der::{
    Decode as _, Encode as _, Reader as _, SliceReader, Tag, TagNumber,
    asn1::{AnyRef, ObjectIdentifier, OctetStringRef},
};
use pkcs5::pbes2::{self, EncryptionScheme, Pbkdf2Prf};
use ring::{aead, digest, hmac};
use zeroize::Zeroizing;

use crate::sync::parsing::Waiting;

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

/// How many rounds of key derivation an archive may take in all: a few times what the most
/// careful tools ask for, which is 600,000 for each of its parts, and one to three seconds.
const MOST_ROUNDS: u64 = 4_000_000;
/// After how many rounds it is asked whether anybody still waits.
const BETWEEN_QUESTIONS: u32 = 10_000;
/// How many bags an archive may have in all.
const MOST_BAGS: u64 = 1_000;
/// How deep bags may lie in bags.
const DEEPEST: usize = 4;

/// The two readings of "no password", as the older schemes are fed them.
const EMPTY: [&[u8]; 2] = [&[0, 0], &[]];

/// What an archive holds: DER.
#[derive(Default)]
pub(super) struct Found {
    pub(super) certificates: Vec<Vec<u8>>,
    pub(super) keys: Vec<Zeroizing<Vec<u8>>>,
}

/// Why an archive could not be read.
enum Failure {
    /// It is not what the standard describes.
    Malformed,
    /// It cannot be decrypted.
    Password,
    /// It is encrypted in a way that is not read here.
    Scheme(ObjectIdentifier),
    /// Its keys take more rounds than are spent on one archive.
    Rounds,
    /// It has more bags than are read of one archive.
    Bags,
    /// Nobody waits for it any more.
    GivenUp,
}

/// What may still be spent on an archive.
struct Budget<'w> {
    rounds: u64,
    bags: u64,
    waiting: &'w Waiting,
}

impl Budget<'_> {
    fn take_rounds(&mut self, rounds: u32) -> Result<(), Failure> {
        self.rounds = self
            .rounds
            .checked_sub(rounds.into())
            .ok_or(Failure::Rounds)?;
        Ok(())
    }

    fn take_bag(&mut self) -> Result<(), Failure> {
        self.bags = self.bags.checked_sub(1).ok_or(Failure::Bags)?;
        self.still_wanted()
    }

    fn still_wanted(&self) -> Result<(), Failure> {
        match self.waiting.is_over() {
            true => Err(Failure::GivenUp),
            false => Ok(()),
        }
    }
}

impl From<der::Error> for Failure {
    fn from(_: der::Error) -> Self {
        Self::Malformed
    }
}

/// Reads an archive, as long as somebody waits for it.
///
/// # Errors
/// Says what is wrong with it, or which limit it does not keep to, and what to do.
pub(super) fn read(archive: &[u8], waiting: &Waiting) -> Result<Found, String> {
    let mut found = Found::default();
    let mut budget = Budget {
        rounds: MOST_ROUNDS,
        bags: MOST_BAGS,
        waiting,
    };
    match read_archive(archive, &mut found, &mut budget) {
        Ok(()) => Ok(found),
        Err(Failure::Malformed) => {
            Err("it is neither PEM nor PKCS#12, or it is damaged".to_owned())
        }
        Err(Failure::Password) => Err(
            "it is PKCS#12 that an empty password does not open; store it without a password, or as PEM".to_owned(),
        ),
        Err(Failure::Scheme(oid)) => Err(format!(
            "it is PKCS#12 encrypted with a scheme that is not supported (OID {oid}); export it with AES-256-CBC, or store it as PEM"
        )),
        Err(Failure::Rounds) => Err(format!(
            "it is PKCS#12 that takes more than {MOST_ROUNDS} rounds of key derivation in all; export it with fewer, or store it as PEM"
        )),
        Err(Failure::Bags) => Err(format!(
            "it is PKCS#12 with more than {MOST_BAGS} bags; store what is needed of it only"
        )),
        Err(Failure::GivenUp) => Err("it was given up, because nobody waits for it".to_owned()),
    }
}

fn read_archive(archive: &[u8], found: &mut Found, budget: &mut Budget<'_>) -> Result<(), Failure> {
    let mut fields = fields(archive)?;
    let _version: AnyRef<'_> = fields.decode()?;
    let (kind, content) = content_info(fields.decode()?)?;
    if kind != DATA {
        return Err(Failure::Malformed);
    }
    let safe = <&OctetStringRef>::from_der(content)?;
    let mut contents = self::fields(safe.as_bytes())?;
    while !contents.is_finished() {
        let (kind, content) = content_info(contents.decode()?)?;
        budget.take_bag()?;
        match kind {
            DATA => {
                let bytes = <&OctetStringRef>::from_der(content)?.as_bytes();
                bags(bytes, found, budget, 0)?;
            }
            ENCRYPTED_DATA => {
                let bytes = encrypted_data(content, budget)?;
                bags(&bytes, found, budget, 0)?;
            }
            // Encrypted for somebody's public key.
            _ => return Err(Failure::Scheme(kind)),
        }
    }
    Ok(())
}

/// A reader of what is inside a SEQUENCE.
fn fields(bytes: &[u8]) -> Result<SliceReader<'_>, Failure> {
    let any = AnyRef::from_der(bytes)?;
    inside(any)
}

fn inside(any: AnyRef<'_>) -> Result<SliceReader<'_>, Failure> {
    if any.header().tag() != Tag::Sequence {
        return Err(Failure::Malformed);
    }
    Ok(SliceReader::new(any.value())?)
}

/// A ContentInfo's type, and its content as DER.
fn content_info(any: AnyRef<'_>) -> Result<(ObjectIdentifier, &[u8]), Failure> {
    let mut fields = inside(any)?;
    Ok((fields.decode()?, tagged_0(fields.decode()?)?))
}

/// What is inside an explicit tag 0.
fn tagged_0(any: AnyRef<'_>) -> Result<&[u8], Failure> {
    match any.header().tag() {
        Tag::ContextSpecific {
            number: TagNumber(0),
            ..
        } => Ok(any.value()),
        _ => Err(Failure::Malformed),
    }
}

fn encrypted_data(der: &[u8], budget: &mut Budget<'_>) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut data = fields(der)?;
    let _version: AnyRef<'_> = data.decode()?;
    let mut info = inside(data.decode()?)?;
    let _kind: ObjectIdentifier = info.decode()?;
    let algorithm: AnyRef<'_> = info.decode()?;
    // The implicit tag stands in for the OCTET STRING's own.
    let ciphertext = tagged_0(info.decode()?)?;
    decrypt(algorithm, ciphertext, budget, |plain| fields(plain).is_ok())
}

fn bags(
    contents: &[u8],
    found: &mut Found,
    budget: &mut Budget<'_>,
    depth: usize,
) -> Result<(), Failure> {
    if depth > DEEPEST {
        return Err(Failure::Malformed);
    }
    let mut bags_in = fields(contents)?;
    while !bags_in.is_finished() {
        let mut bag = inside(bags_in.decode()?)?;
        budget.take_bag()?;
        let kind: ObjectIdentifier = bag.decode()?;
        let value = tagged_0(bag.decode()?)?;
        match kind {
            KEY_BAG => found.keys.push(Zeroizing::new(value.to_vec())),
            SHROUDED_KEY_BAG => {
                let mut shrouded = fields(value)?;
                let algorithm: AnyRef<'_> = shrouded.decode()?;
                let ciphertext: &OctetStringRef = shrouded.decode()?;
                let is_key = |plain: &[u8]| fields(plain).is_ok();
                let key = decrypt(algorithm, ciphertext.as_bytes(), budget, is_key)?;
                found.keys.push(key);
            }
            CERT_BAG => {
                let mut cert = fields(value)?;
                let kind: ObjectIdentifier = cert.decode()?;
                if kind == X509 {
                    let der = <&OctetStringRef>::from_der(tagged_0(cert.decode()?)?)?;
                    found.certificates.push(der.as_bytes().to_vec());
                }
            }
            SAFE_CONTENTS_BAG => bags(value, found, budget, depth + 1)?,
            // Revocation lists and other secrets.
            _ => {}
        }
    }
    Ok(())
}

/// Decrypts with an empty password, in the first reading of that whose result looks right.
fn decrypt(
    algorithm: AnyRef<'_>,
    ciphertext: &[u8],
    budget: &mut Budget<'_>,
    looks_right: impl Fn(&[u8]) -> bool,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut identifier = inside(algorithm)?;
    let scheme: ObjectIdentifier = identifier.decode()?;
    let parameters: AnyRef<'_> = identifier.decode()?;
    if scheme == PBES2 {
        let parameters = pbes2::Parameters::from_der(&parameters.to_der()?)?;
        let plain = decrypt_pbes2(&parameters, ciphertext, budget)?;
        return plain
            .filter(|plain| looks_right(plain))
            .ok_or(Failure::Password);
    }
    let mut parameters = inside(parameters)?;
    let salt: &OctetStringRef = parameters.decode()?;
    let rounds: u32 = parameters.decode()?;
    for password in EMPTY {
        let mut derive = |purpose, length| {
            let salt = salt.as_bytes();
            derive(password, salt, rounds, purpose, length, budget)
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
            other => return Err(Failure::Scheme(other)),
        };
        if let Some(plain) = plain.filter(|plain| looks_right(plain)) {
            return Ok(plain);
        }
    }
    Err(Failure::Password)
}

/// Decrypts with the scheme of RFC 8018, 6.2. None when the password is another.
fn decrypt_pbes2(
    parameters: &pbes2::Parameters,
    ciphertext: &[u8],
    budget: &mut Budget<'_>,
) -> Result<Option<Zeroizing<Vec<u8>>>, Failure> {
    let scheme = parameters.encryption;
    let pbes2::Kdf::Pbkdf2(kdf) = &parameters.kdf else {
        return Err(Failure::Scheme(parameters.kdf.oid()));
    };
    let function = match kdf.prf {
        Pbkdf2Prf::HmacWithSha1 => hmac::HMAC_SHA1_FOR_LEGACY_USE_ONLY,
        Pbkdf2Prf::HmacWithSha256 => hmac::HMAC_SHA256,
        Pbkdf2Prf::HmacWithSha384 => hmac::HMAC_SHA384,
        Pbkdf2Prf::HmacWithSha512 => hmac::HMAC_SHA512,
        other => return Err(Failure::Scheme(other.oid())),
    };
    let length = scheme.key_size();
    if kdf.key_length.is_some_and(|own| usize::from(own) != length) {
        return Err(Failure::Malformed);
    }
    let (salt, rounds) = (kdf.salt.as_ref(), kdf.iteration_count);
    let key = pbkdf2(function, salt, rounds, length, budget)?;
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
        other => return Err(Failure::Scheme(other.oid())),
    })
}

/// The key derivation of RFC 8018, 5.2, with an empty password. Written here because no library
/// lets go of it halfway.
fn pbkdf2(
    function: hmac::Algorithm,
    salt: &[u8],
    rounds: u32,
    length: usize,
    budget: &mut Budget<'_>,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let password = hmac::Key::new(function, b"");
    let mut derived = Zeroizing::new(Vec::with_capacity(length + 64));
    for block in 1_u32.. {
        budget.take_rounds(rounds)?;
        let mut context = hmac::Context::with_key(&password);
        context.update(salt);
        context.update(&block.to_be_bytes());
        let mut last = context.sign();
        let mut sum = Zeroizing::new(last.as_ref().to_vec());
        for round in 1..rounds {
            if round % BETWEEN_QUESTIONS == 0 {
                budget.still_wanted()?;
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

/// RC2 with as many effective bits as the key has.
fn unpad_rc2(key: &[u8], iv: &[u8], ciphertext: &[u8]) -> Option<Zeroizing<Vec<u8>>> {
    let cipher = rc2::Rc2::new_with_eff_key_len(key, key.len() * 8);
    let iv = iv.try_into().ok()?;
    let cipher = <cbc::Decryptor<rc2::Rc2> as InnerIvInit>::inner_iv_init(cipher, iv);
    let plain = cipher.decrypt_padded_vec::<Pkcs7>(ciphertext).ok()?;
    Some(Zeroizing::new(plain))
}

/// The key derivation of RFC 7292, appendix B.2, with SHA-1. `purpose` is 1 for a key and 2 for
/// an initialization vector.
fn derive(
    password: &[u8],
    salt: &[u8],
    rounds: u32,
    purpose: u8,
    length: usize,
    budget: &mut Budget<'_>,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    const BLOCK: usize = 64;
    let sha1 = |parts: &[&[u8]]| {
        let mut context = digest::Context::new(&digest::SHA1_FOR_LEGACY_USE_ONLY);
        parts.iter().for_each(|part| context.update(part));
        context.finish()
    };
    // Each text repeated to fill whole blocks.
    let filled = |text: &[u8]| -> Vec<u8> {
        let length = text.len().div_ceil(BLOCK) * BLOCK;
        text.iter().copied().cycle().take(length).collect()
    };
    let mut input = Zeroizing::new([filled(salt), filled(password)].concat());
    let mut derived = Zeroizing::new(Vec::with_capacity(length + 20));
    while derived.len() < length {
        budget.take_rounds(rounds)?;
        let mut hash = sha1(&[&[purpose; BLOCK], &input]);
        for round in 1..rounds {
            if round % BETWEEN_QUESTIONS == 0 {
                budget.still_wanted()?;
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
