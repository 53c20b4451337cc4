//! Tests with the fixtures that `fixtures/generate.sh` makes, which include the expected keys.

use super::*;
use rstest::rstest;

macro_rules! fixture {
    ($name:literal) => {
        include_bytes!(concat!("fixtures/", $name)).as_slice()
    };
}

fn joined(parts: &[&[u8]]) -> Vec<u8> {
    parts.concat()
}

fn read_or_not(object: &[u8]) -> Result<Material, Unusable> {
    Material::read(object, &Caller::default())
}

fn paired(certificates: &Material, keys: &Material, format: KeyFormat) -> Result<Pair, Unusable> {
    pair(certificates, keys, format, &Caller::default())
}

fn read(object: &[u8]) -> Material {
    read_or_not(object).unwrap_or_else(|error| panic!("{error}"))
}

fn both(object: &[u8], format: KeyFormat) -> (String, String) {
    let parts = read(object);
    let pair = paired(&parts, &parts, format).unwrap_or_else(|error| panic!("{error}"));
    let text = |secret: &Secret| String::from_utf8(secret.expose().to_vec()).unwrap();
    (text(&pair.certificate), text(&pair.key))
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

/// Upstream writes keys as openssl does with `-traditional`.
#[rstest]
#[case::rsa(
    fixture!("rsa.key.pem"), fixture!("rsa.crt.pem"), fixture!("rsa.traditional.pem")
)]
#[case::rsa_traditional(
    fixture!("rsa.traditional.pem"), fixture!("rsa.crt.pem"), fixture!("rsa.traditional.pem")
)]
#[case::p256(
    fixture!("prime256v1.key.pem"), fixture!("prime256v1.crt.pem"), fixture!("prime256v1.traditional.pem")
)]
#[case::p256_sec1(
    fixture!("prime256v1.traditional.pem"), fixture!("prime256v1.crt.pem"), fixture!("prime256v1.traditional.pem")
)]
#[case::p256_without_public_key(
    fixture!("bare.traditional.pem"), fixture!("prime256v1.crt.pem"), fixture!("prime256v1.traditional.pem")
)]
#[case::p256_pkcs8_without_public_key(
    fixture!("bare.key.pem"), fixture!("prime256v1.crt.pem"), fixture!("prime256v1.traditional.pem")
)]
#[case::p384(
    fixture!("secp384r1.key.pem"), fixture!("secp384r1.crt.pem"), fixture!("secp384r1.traditional.pem")
)]
#[case::p521(
    fixture!("secp521r1.key.pem"), fixture!("secp521r1.crt.pem"), fixture!("secp521r1.traditional.pem")
)]
#[case::ed25519(
    fixture!("ed25519.key.pem"), fixture!("ed25519.crt.pem"), fixture!("ed25519.key.pem")
)]
fn keys_are_written_as_upstream_does_or_as_they_came(
    #[case] key: &[u8],
    #[case] certificate: &[u8],
    #[case] traditional: &[u8],
) {
    let object = joined(&[key, certificate]);
    let (crt, written) = both(&object, KeyFormat::Traditional);
    assert_eq!(crt, text(certificate));
    assert_eq!(written, text(traditional));
    assert_eq!(both(&object, KeyFormat::Original).1, text(key));
}

#[test]
fn leaf_first_then_its_chain_whatever_the_order() {
    let (leaf, middle, root) = (
        fixture!("rsa.crt.pem"),
        fixture!("middle.crt.pem"),
        fixture!("root.crt.pem"),
    );
    let other = fixture!("ed25519.crt.pem");
    let key = fixture!("rsa.key.pem");
    let ordered = joined(&[leaf, middle, root]);
    for order in [
        [root, middle, leaf, key],
        [key, leaf, root, middle],
        [middle, key, root, leaf],
        [leaf, middle, root, key],
    ] {
        let (crt, _) = both(&joined(&order), KeyFormat::Traditional);
        assert_eq!(crt, text(&ordered));
    }
    // A repeated certificate is written once, one of another chain last, and text is skipped.
    let messy = joined(&[
        b"Bag Attributes\n  friendlyName: x\n",
        root,
        other,
        root,
        b"\r\n# leaf\r\n",
        leaf,
        middle,
        key,
    ]);
    let (crt, _) = both(&messy, KeyFormat::Traditional);
    assert_eq!(crt, text(&joined(&[leaf, middle, root, other])));
}

#[test]
fn certificate_and_key_may_come_from_two_objects() {
    let key = joined(&[fixture!("prime256v1.key.pem"), fixture!("rsa.key.pem")]);
    let pair = paired(
        &read(fixture!("rsa.crt.pem")),
        &read(&key),
        KeyFormat::Traditional,
    )
    .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(
        text(pair.key.expose()),
        text(fixture!("rsa.traditional.pem"))
    );
}

#[rstest]
#[case::modern(fixture!("modern.p12"))]
#[case::many_rounds(fixture!("many-rounds.p12"))]
#[case::modern_sha512(fixture!("modern-sha512.p12"))]
#[case::legacy_rc2_40(fixture!("legacy.p12"))]
#[case::triple_des(fixture!("triple-des.p12"))]
#[case::rc2_128(fixture!("rc2-128.p12"))]
#[case::plain(fixture!("plain.p12"))]
fn pkcs12_old_and_new(#[case] archive: &[u8]) {
    let (crt, key) = both(archive, KeyFormat::Traditional);
    let chain = joined(&[
        fixture!("rsa.crt.pem"),
        fixture!("middle.crt.pem"),
        fixture!("root.crt.pem"),
    ]);
    assert_eq!(crt, text(&chain));
    assert_eq!(key, text(fixture!("rsa.traditional.pem")));
    assert_eq!(
        both(archive, KeyFormat::Original).1,
        text(fixture!("rsa.key.pem"))
    );
}

#[test]
fn pkcs12_with_an_edwards_key() {
    let (crt, key) = both(fixture!("ed25519.p12"), KeyFormat::Traditional);
    assert_eq!(crt, text(fixture!("ed25519.crt.pem")));
    assert_eq!(key, text(fixture!("ed25519.key.pem")));
}

#[rstest]
#[case::empty(b"", "empty")]
#[case::blank(b" \n", "empty")]
#[case::garbage(b"not a certificate", "neither PEM nor PKCS#12")]
#[case::der_of_something_else(&[0x30, 3, 2, 1, 5], "neither PEM nor PKCS#12")]
#[case::deep(&[0x30; 4000], "neither PEM nor PKCS#12")]
#[case::with_a_password(fixture!("password.p12"), "empty password does not open")]
#[case::encrypted_key(fixture!("encrypted.key.pem"), "passphrase")]
#[case::encrypted_key_in_the_older_form(
    b"-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n",
    "passphrase"
)]
#[case::explicit_curve(fixture!("explicit.key.pem"), "named_curve")]
#[case::explicit_curve_in_sec1(fixture!("explicit.traditional.pem"), "named_curve")]
#[case::another_damaged_key(
    b"-----BEGIN EC PRIVATE KEY-----\nMAcCAQEEAgEC\n-----END EC PRIVATE KEY-----\n",
    "may be damaged"
)]
#[case::no_line_breaks(
    br"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
    "line breaks"
)]
#[case::pem_in_base64(
    b"LS0tLS1CRUdJTiBDRVJUSUZJQ0FURS0tLS0tCk1JSUIK",
    "PEM in base64; set encoding: base64"
)]
#[case::pkcs12_in_base64(
    b"MIIKfAIBAzCCCjIGCSqGSIb3\nDQEHAaCCCiM=",
    "PKCS#12 or of another binary form; set encoding: base64"
)]
#[case::trusted(
    b"-----BEGIN TRUSTED CERTIFICATE-----\nAAAA\n-----END TRUSTED CERTIFICATE-----\n",
    "openssl x509"
)]
#[case::no_key_in_a_key(
    b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
    "cannot be read"
)]
#[case::no_certificate_in_a_certificate(
    b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
    "X.509"
)]
fn an_object_without_certificates_is_refused(#[case] object: &[u8], #[case] why: &str) {
    let error = read_or_not(object).err().unwrap().to_string();
    assert!(error.contains(why), "{error}");
}

/// An archive that is cut off anywhere is an error, not a panic or a part of the content.
#[test]
fn a_damaged_archive_is_refused() {
    let whole = fixture!("modern.p12");
    for length in (0..whole.len()).step_by(97) {
        assert!(read_or_not(&whole[..length]).is_err(), "{length}");
    }
}

#[rstest]
#[case::no_key(fixture!("rsa.crt.pem"), fixture!("rsa.crt.pem"), "no private key")]
#[case::no_key_in_pkcs12(fixture!("no-key.p12"), fixture!("no-key.p12"), "no private key")]
#[case::no_certificate(fixture!("rsa.key.pem"), fixture!("rsa.key.pem"), "no certificate")]
#[case::another_rsa_or_ec_key(fixture!("prime256v1.crt.pem"), fixture!("rsa.key.pem"), "belongs to none")]
#[case::another_edwards_key(fixture!("ed25519.crt.pem"), b"-----BEGIN PRIVATE KEY-----\nMC4CAQAwBQYDK2VwBCIEIAABAgMEBQYHCAkKCwwNDg8QERITFBUWFxgZGhscHR4f\n-----END PRIVATE KEY-----\n", "belongs to none")]
#[case::another_curve(fixture!("prime256v1.crt.pem"), fixture!("secp521r1.key.pem"), "belongs to none")]
#[case::the_issuers(fixture!("chain.pem"), fixture!("prime256v1.key.pem"), "belongs to none")]
fn parts_that_do_not_fit_are_refused(
    #[case] certificate: &[u8],
    #[case] key: &[u8],
    #[case] why: &str,
) {
    let pair = paired(&read(certificate), &read(key), KeyFormat::Traditional);
    let error = pair.err().unwrap().to_string();
    assert!(error.contains(why), "{error}");
}

#[test]
fn a_block_that_cannot_be_decoded_is_skipped() {
    let object = joined(&[
        b"-----BEGIN CERTIFICATE-----\n!!!\n-----END CERTIFICATE-----\n-----BEGIN X-----\n",
        fixture!("rsa.crt.pem"),
        fixture!("rsa.key.pem"),
    ]);
    let (crt, _) = both(&object, KeyFormat::Traditional);
    assert_eq!(crt, text(fixture!("rsa.crt.pem")));
}

/// Tests texts of a Secret's size that repeat one piece and end with another.
#[rstest]
#[case::begins("-----BEGIN X-----", "")]
#[case::begins_of_certificates("-----BEGIN CERTIFICATE-----\n", "")]
#[case::begins_and_one_end("-----BEGIN X-----\n", "-----END X-----")]
#[case::ends("-----END X-----\n", "")]
#[case::ends_after_a_begin("-----END Y-----", "-----BEGIN X-----")]
#[case::empty_blocks("-----BEGIN X-----\n-----END X-----\n", "")]
#[case::other_ends("-----BEGIN X-----\n-----END Y-----\n", "")]
#[case::without_labels("-----BEGIN -----", "-----END -----")]
#[case::dashes("-", "")]
#[case::almost("-----BEGIN", "")]
#[case::labels_without_end("-----BEGIN a", "-----END a-----")]
#[case::headers("-----BEGIN X-----\n\na: b\n\n", "-----END X-----")]
#[case::anything("A", "")]
#[case::lines("\n", "-----BEGIN X-----\n-----END X-----")]
#[case::sequences("0\u{30}\u{3}\u{2}", "")]
fn a_text_of_any_kind_is_read_in_no_time(#[case] piece: &str, #[case] last: &str) {
    let text = piece.repeat((MAX_BYTES - last.len()) / piece.len()) + last;
    let started = std::time::Instant::now();
    let blocks = read_or_not(text.as_bytes());
    // It takes a hundredth of a second on an idle machine. A quadratic algorithm takes hours.
    let took = started.elapsed();
    assert!(took < std::time::Duration::from_secs(30), "{took:?}");
    assert!(blocks.is_err() || blocks.is_ok_and(|parts| parts.certificates.is_empty()));
}

#[rstest]
#[case::certificates(fixture!("rsa.crt.pem"), MAX_BLOCKS + 1, "PEM blocks")]
#[case::keys(fixture!("ed25519.key.pem"), MAX_KEYS + 1, "private keys")]
fn more_parts_than_are_read(#[case] part: &[u8], #[case] count: usize, #[case] what: &str) {
    let error = read_or_not(&part.repeat(count)).err().unwrap().to_string();
    assert!(error.contains(what), "{error}");
}

#[test]
fn more_bytes_than_are_read() {
    let object = joined(&[&vec![b' '; MAX_BYTES], fixture!("rsa.crt.pem")]);
    let error = read_or_not(&object).err().unwrap().to_string();
    assert!(error.contains(&MAX_BYTES.to_string()), "{error}");
}

mod generated {
    use super::*;
    use proptest::prelude::*;

    /// Returns pieces of texts, with and without certificates.
    fn pieces() -> impl Strategy<Value = Vec<Vec<u8>>> {
        let piece = prop_oneof![
            Just(fixture!("rsa.crt.pem").to_vec()),
            Just(fixture!("middle.crt.pem").to_vec()),
            Just(fixture!("rsa.key.pem").to_vec()),
            Just(b"-----BEGIN CERTIFICATE-----\n".to_vec()),
            Just(b"-----END CERTIFICATE-----\n".to_vec()),
            Just(b"-----BEGIN X-----\n!\n-----END X-----\n".to_vec()),
            prop::collection::vec(any::<u8>(), 0..40),
            "[-A-Z \n]{0,30}".prop_map(String::into_bytes),
        ];
        prop::collection::vec(piece, 0..30)
    }

    proptest! {
        /// A whole block is found whatever stands before it, except an unfinished block.
        #[test]
        fn whole_blocks_are_found_in_any_company(pieces in pieces()) {
            let mut text = Vec::new();
            let mut whole = 0;
            for piece in &pieces {
                text.extend(piece);
                text.push(b'\n');
                whole += usize::from(piece.starts_with(b"-----BEGIN") && piece.len() > 100);
            }
            let found = pem_blocks(&text).unwrap_or_else(|error| panic!("{error}"));
            let found = found.iter().filter(|(_, der)| der.len() > 50).count();
            prop_assert_eq!(found, whole);
        }
    }
}
