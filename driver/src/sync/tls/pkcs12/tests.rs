//! Tests archives that openssl does not write.

use super::*;
use cbc::cipher::BlockModeEncrypt as _;
use proptest::prelude::*;
use rstest::rstest;

const PBKDF2: ObjectIdentifier = oid("1.2.840.113549.1.5.12");
const HMAC_SHA256: ObjectIdentifier = oid("1.2.840.113549.2.9");
const AES_256_CBC: ObjectIdentifier = oid("2.16.840.1.101.3.4.1.42");
const SALT: [u8; 8] = [7; 8];
const IV: [u8; 16] = [9; 16];

fn unlimited(caller: &Caller) -> Allowance<'_> {
    Allowance {
        rounds: u64::MAX,
        bags: u64::MAX,
        caller,
    }
}

/// Returns a DER value: its tag, length and content.
fn der(tag: u8, parts: &[&[u8]]) -> Vec<u8> {
    let content = parts.concat();
    let length = content.len().to_be_bytes();
    let length: Vec<u8> = length.into_iter().skip_while(|byte| *byte == 0).collect();
    let mut value = vec![tag];
    match content.len() {
        short @ 0..128 => value.push(u8::try_from(short).unwrap()),
        _ => {
            value.push(0x80 | u8::try_from(length.len()).unwrap());
            value.extend(length);
        }
    }
    value.extend(content);
    value
}

fn sequence(parts: &[&[u8]]) -> Vec<u8> {
    der(0x30, parts)
}

fn octets(content: &[u8]) -> Vec<u8> {
    der(0x04, &[content])
}

fn identifier(oid: ObjectIdentifier) -> Vec<u8> {
    oid.to_der().unwrap()
}

/// Returns an archive with these bags, not encrypted.
fn archive(bags: &[Vec<u8>]) -> Vec<u8> {
    let bags: Vec<&[u8]> = bags.iter().map(Vec::as_slice).collect();
    let content = |inner: &[u8]| sequence(&[&identifier(DATA), &der(0xa0, &[&octets(inner)])]);
    let contents = sequence(&[&content(&sequence(&bags))]);
    sequence(&[&3_u8.to_der().unwrap(), &content(&contents)])
}

fn bag(kind: ObjectIdentifier, value: &[u8]) -> Vec<u8> {
    sequence(&[&identifier(kind), &der(0xa0, &[value])])
}

fn modern(rounds: u32) -> Vec<u8> {
    let function = sequence(&[&identifier(HMAC_SHA256), &der(0x05, &[])]);
    let kdf = sequence(&[&octets(&SALT), &rounds.to_der().unwrap(), &function]);
    let kdf = sequence(&[&identifier(PBKDF2), &kdf]);
    let scheme = sequence(&[&identifier(AES_256_CBC), &octets(&IV)]);
    sequence(&[&identifier(PBES2), &sequence(&[&kdf, &scheme])])
}

fn older(scheme: ObjectIdentifier, rounds: u32) -> Vec<u8> {
    let parameters = sequence(&[&octets(&SALT), &rounds.to_der().unwrap()]);
    sequence(&[&identifier(scheme), &parameters])
}

fn encrypted(algorithm: &[u8], ciphertext: &[u8]) -> Vec<u8> {
    bag(
        SHROUDED_KEY_BAG,
        &sequence(&[algorithm, &octets(ciphertext)]),
    )
}

/// Returns a bag that claims to be encrypted with so many rounds.
fn claiming(rounds: u32) -> Vec<u8> {
    encrypted(&modern(rounds), &[0; 32])
}

fn claiming_the_older(scheme: ObjectIdentifier, rounds: u32) -> Vec<u8> {
    encrypted(&older(scheme, rounds), &[0; 32])
}

/// Returns a bag with something that looks like a key, encrypted as modern tools do.
fn shrouded(rounds: u32) -> Vec<u8> {
    let caller = Caller::default();
    let key = pbkdf2(
        hmac::HMAC_SHA256,
        &SALT,
        rounds,
        32,
        &mut unlimited(&caller),
    );
    let key = key.unwrap_or_else(|_| panic!("no key"));
    let cipher = cbc::Encryptor::<aes::Aes256>::new_from_slices(&key, &IV).unwrap();
    let ciphertext = cipher.encrypt_padded_vec::<Pkcs7>(&sequence(&[]));
    encrypted(&modern(rounds), &ciphertext)
}

fn keys_within(archive: &[u8], rounds: u64, bags: u64) -> Result<usize, ArchiveError> {
    let mut extracted = Extracted::default();
    let caller = Caller::default();
    let mut allowance = Allowance {
        rounds,
        bags,
        caller: &caller,
    };
    read_archive(archive, &mut extracted, &mut allowance)?;
    Ok(extracted.keys.len())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// The sum of all rounds counts, however they are spread over the bags.
    #[test]
    fn rounds_are_counted_over_the_whole_archive(each in prop::collection::vec(1_u32..200, 1..20)) {
        let bags: Vec<_> = each.iter().map(|rounds| shrouded(*rounds)).collect();
        let archive = archive(&bags);
        let sum = each.iter().copied().map(u64::from).sum();
        prop_assert!(matches!(keys_within(&archive, sum, 1000), Ok(keys) if keys == each.len()));
        prop_assert!(matches!(keys_within(&archive, sum - 1, 1000), Err(ArchiveError::Rounds)));
    }

    #[test]
    fn bags_are_counted_wherever_they_lie(counts in prop::collection::vec(0_usize..10, 1..10)) {
        let safe = |count: usize| {
            let empty = bag(KEY_BAG, &sequence(&[]));
            bag(SAFE_CONTENTS_BAG, &sequence(&vec![empty.as_slice(); count]))
        };
        let keys: usize = counts.iter().sum();
        let bags: Vec<_> = counts.iter().copied().map(safe).collect();
        let archive = archive(&bags);
        let all = u64::try_from(keys + counts.len() + 1).unwrap();
        prop_assert!(matches!(keys_within(&archive, 0, all), Ok(found) if found == keys));
        prop_assert!(matches!(keys_within(&archive, 0, all - 1), Err(ArchiveError::Bags)));
    }
}

/// Too many rounds are refused before they are computed, and the error names the limit.
#[rstest]
#[case::modern(claiming(u32::MAX))]
#[case::triple_des(claiming_the_older(SHA1_3DES, u32::MAX))]
#[case::rc2(claiming_the_older(SHA1_RC2_40, u32::MAX))]
fn more_rounds_than_an_archive_may_take(#[case] bag: Vec<u8>) {
    let bags = [shrouded(1_000), bag];
    let error = read(&archive(&bags), &Caller::default()).err().unwrap();
    assert!(error.contains(&MAX_ROUNDS.to_string()), "{error}");
}

#[test]
fn more_bags_than_an_archive_may_have() {
    let bags = vec![bag(KEY_BAG, &sequence(&[])); 2_000];
    let error = read(&archive(&bags), &Caller::default()).err().unwrap();
    assert!(error.contains(&MAX_BAGS.to_string()), "{error}");
}

#[rstest]
#[case::modern(modern(u32::MAX))]
#[case::triple_des(older(SHA1_3DES, u32::MAX))]
fn work_without_a_caller_is_given_up(#[case] algorithm: Vec<u8>) {
    let caller = Caller::gone();
    let algorithm = AnyRef::from_der(&algorithm).unwrap();
    let decrypted = decrypt(algorithm, &[0; 32], &mut unlimited(&caller), |_| true);
    assert!(matches!(decrypted, Err(ArchiveError::GivenUp)));
}

/// openssl writes only the first of the two forms, other tools also the second.
#[rstest]
#[case::one_nul(EMPTY[0])]
#[case::no_bytes(EMPTY[1])]
fn both_forms_of_an_empty_password(#[case] password: &[u8]) {
    let caller = Caller::default();
    let mut allowance = unlimited(&caller);
    let mut derive = |purpose, length| {
        let derived = derive(password, &SALT, 3, purpose, length, &mut allowance);
        derived.unwrap_or_else(|_| panic!("no key"))
    };
    let (key, iv) = (derive(1, 24), derive(2, 8));
    let plain = [0x30, 3, 2, 1, 5];
    let cipher = cbc::Encryptor::<des::TdesEde3>::new_from_slices(&key, &iv).unwrap();
    let ciphertext = cipher.encrypt_padded_vec::<Pkcs7>(&plain);
    let algorithm = older(SHA1_3DES, 3);
    let algorithm = AnyRef::from_der(&algorithm).unwrap();
    let opened = decrypt(algorithm, &ciphertext, &mut allowance, |plain| {
        fields(plain).is_ok()
    });
    assert!(opened.is_ok_and(|opened| opened.as_slice() == plain));
}
