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
use pkcs5::pbes2;
use ring::digest;
use zeroize::Zeroizing;

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

/// More rounds of key derivation than anybody uses; an archive must not occupy the node.
const MOST_ROUNDS: u32 = 5_000_000;
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
}

impl From<der::Error> for Failure {
    fn from(_: der::Error) -> Self {
        Self::Malformed
    }
}

/// Reads an archive.
pub(super) fn read(archive: &[u8]) -> Result<Found, String> {
    let mut found = Found::default();
    match read_archive(archive, &mut found) {
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
    }
}

fn read_archive(archive: &[u8], found: &mut Found) -> Result<(), Failure> {
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
        match kind {
            DATA => bags(<&OctetStringRef>::from_der(content)?.as_bytes(), found, 0)?,
            ENCRYPTED_DATA => {
                let bytes = encrypted_data(content)?;
                bags(&bytes, found, 0)?;
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

fn encrypted_data(der: &[u8]) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut data = fields(der)?;
    let _version: AnyRef<'_> = data.decode()?;
    let mut info = inside(data.decode()?)?;
    let _kind: ObjectIdentifier = info.decode()?;
    let algorithm: AnyRef<'_> = info.decode()?;
    // The implicit tag stands in for the OCTET STRING's own.
    let ciphertext = tagged_0(info.decode()?)?;
    decrypt(algorithm, ciphertext, |plain| fields(plain).is_ok())
}

fn bags(contents: &[u8], found: &mut Found, depth: usize) -> Result<(), Failure> {
    if depth > DEEPEST {
        return Err(Failure::Malformed);
    }
    let mut bags_in = fields(contents)?;
    while !bags_in.is_finished() {
        let mut bag = inside(bags_in.decode()?)?;
        let kind: ObjectIdentifier = bag.decode()?;
        let value = tagged_0(bag.decode()?)?;
        match kind {
            KEY_BAG => found.keys.push(Zeroizing::new(value.to_vec())),
            SHROUDED_KEY_BAG => {
                let mut shrouded = fields(value)?;
                let algorithm: AnyRef<'_> = shrouded.decode()?;
                let ciphertext: &OctetStringRef = shrouded.decode()?;
                let is_key = |plain: &[u8]| fields(plain).is_ok();
                let key = decrypt(algorithm, ciphertext.as_bytes(), is_key)?;
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
            SAFE_CONTENTS_BAG => bags(value, found, depth + 1)?,
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
    looks_right: impl Fn(&[u8]) -> bool,
) -> Result<Zeroizing<Vec<u8>>, Failure> {
    let mut identifier = inside(algorithm)?;
    let scheme: ObjectIdentifier = identifier.decode()?;
    let parameters: AnyRef<'_> = identifier.decode()?;
    if scheme == PBES2 {
        let parameters = pbes2::Parameters::from_der(&parameters.to_der()?)?;
        match &parameters.kdf {
            pbes2::Kdf::Pbkdf2(kdf) if kdf.iteration_count <= MOST_ROUNDS => {}
            _ => return Err(Failure::Scheme(scheme)),
        }
        let plain = parameters.decrypt(b"", ciphertext).map(Zeroizing::new);
        return plain
            .ok()
            .filter(|plain| looks_right(plain))
            .ok_or(Failure::Password);
    }
    let mut parameters = inside(parameters)?;
    let salt: &OctetStringRef = parameters.decode()?;
    let rounds: u32 = parameters.decode()?;
    if rounds > MOST_ROUNDS {
        return Err(Failure::Scheme(scheme));
    }
    for password in EMPTY {
        let derive = |purpose, length| derive(password, salt.as_bytes(), rounds, purpose, length);
        let plain = match scheme {
            SHA1_3DES => {
                unpad::<cbc::Decryptor<des::TdesEde3>>(&derive(1, 24), &derive(2, 8), ciphertext)
            }
            SHA1_2DES => {
                unpad::<cbc::Decryptor<des::TdesEde2>>(&derive(1, 16), &derive(2, 8), ciphertext)
            }
            SHA1_RC2_128 => unpad_rc2(&derive(1, 16), &derive(2, 8), ciphertext),
            SHA1_RC2_40 => unpad_rc2(&derive(1, 5), &derive(2, 8), ciphertext),
            other => return Err(Failure::Scheme(other)),
        };
        if let Some(plain) = plain.filter(|plain| looks_right(plain)) {
            return Ok(plain);
        }
    }
    Err(Failure::Password)
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
) -> Zeroizing<Vec<u8>> {
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
        let mut hash = sha1(&[&[purpose; BLOCK], &input]);
        for _ in 1..rounds {
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
    derived
}

#[cfg(test)]
mod tests {
    use super::*;
    use cbc::cipher::BlockModeEncrypt as _;
    use rstest::rstest;

    /// openssl writes only the first of the two, other tools also the second.
    #[rstest]
    #[case::one_nul(EMPTY[0])]
    #[case::no_bytes(EMPTY[1])]
    fn both_readings_of_no_password(#[case] password: &[u8]) {
        let salt = [7_u8; 8];
        let key = derive(password, &salt, 3, 1, 24);
        let iv = derive(password, &salt, 3, 2, 8);
        let plain = [0x30, 3, 2, 1, 5];
        let cipher = cbc::Encryptor::<des::TdesEde3>::new_from_slices(&key, &iv).unwrap();
        let ciphertext = cipher.encrypt_padded_vec::<Pkcs7>(&plain);
        let mut parameters = vec![0x04, 8];
        parameters.extend(salt);
        parameters.extend([0x02, 1, 3]);
        let mut identifier = SHA1_3DES.to_der().unwrap();
        identifier.extend([0x30, u8::try_from(parameters.len()).unwrap()]);
        identifier.extend(parameters);
        let algorithm = AnyRef::new(Tag::Sequence, &identifier).unwrap();
        let opened = decrypt(algorithm, &ciphertext, |plain| fields(plain).is_ok());
        assert!(opened.is_ok_and(|opened| opened.as_slice() == plain));
    }
}
