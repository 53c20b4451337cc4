//! Checks whether versions reveal the content of objects. A pod status shows versions to everybody who
//! may view the namespace.

use md5::Md5;
use sha1::Sha1;
use sha2::{Digest, Sha224, Sha256, Sha384, Sha512};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};

use super::forms::{begins_with_part, forms, hex};
use super::{Finding, Subject, failed};

/// The number of versions and of files that are compared. A part of a digest is in one of many
/// versions by chance.
const MOST: usize = 64;

/// The shortest part of a digest that is in a version for no other reason.
const PART: usize = 8;

/// The shortest version that may be the beginning of a digest as a whole.
const SHORTEST: usize = 6;

pub(super) async fn reveal_nothing(subject: &Subject) -> Result<(), Finding> {
    let answer = subject.first().await?;
    if answer.versions.is_empty() {
        return Err(Finding::Skipped("versions-present failed".to_owned()));
    }
    for file in answer.files.iter().take(MOST) {
        let signs = Signs::of(&file.contents);
        for version in answer.versions.iter().take(MOST) {
            if let Some(what) = signs.shown_by(&version.version) {
                let (id, path) = (&version.id, &file.path);
                return Err(failed(format!(
                    "the version of {id:?} shows {what} of {path:?}; use a counter, a time, or an \
                     HMAC with a key that the node does not show"
                )));
            }
        }
    }
    Ok(())
}

/// That by which a version reveals a content: the content itself, and its digests, which anybody can
/// compute of a guess.
struct Signs<'a> {
    contents: [&'a [u8]; 2],
    digests: Vec<(&'static str, Vec<u8>)>,
}

impl<'a> Signs<'a> {
    fn of(content: &'a [u8]) -> Self {
        // A file may have a line break that the object in the store does not have.
        let contents = [content, content.trim_ascii()];
        let different = if contents[0] == contents[1] { 1 } else { 2 };
        let digests = contents.iter().take(different).flat_map(|content| {
            [
                ("the MD5 digest", Md5::digest(content).to_vec()),
                ("the SHA-1 digest", Sha1::digest(content).to_vec()),
                ("the SHA-224 digest", Sha224::digest(content).to_vec()),
                ("the SHA-256 digest", Sha256::digest(content).to_vec()),
                ("the SHA-384 digest", Sha384::digest(content).to_vec()),
                ("the SHA-512 digest", Sha512::digest(content).to_vec()),
            ]
        });
        Self {
            digests: digests.collect(),
            contents,
        }
    }

    /// Returns what a version shows.
    fn shown_by(&self, version: &str) -> Option<&'static str> {
        let mut contents = self.contents.iter();
        if contents.any(|content| shows(version, content)) {
            return Some("the content");
        }
        let mut digests = self.digests.iter();
        digests
            .find(|(_, digest)| shows_digest(version, digest))
            .map(|(name, _)| *name)
    }
}

fn shows(version: &str, content: &[u8]) -> bool {
    let text = String::from_utf8_lossy(content);
    let is_part = version.len() >= PART && text.contains(version);
    let is_whole = content.len() >= SHORTEST && version == text;
    let has_whole = || {
        content.len() <= version.len() && forms(&[&*text]).iter().any(|form| version.contains(form))
    };
    is_part || is_whole || begins_with_part(version, content) || has_whole()
}

fn shows_digest(version: &str, digest: &[u8]) -> bool {
    let digits = hex(digest);
    let lower = version.to_ascii_lowercase();
    let in_hex = lower.contains(&digits[..PART])
        || lower.contains(&digits[digits.len() - PART..])
        || (lower.len() >= SHORTEST && digits.starts_with(&lower));
    in_hex
        || [STANDARD_NO_PAD, URL_SAFE_NO_PAD]
            .iter()
            .any(|alphabet| version.contains(&alphabet.encode(digest)[..PART]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use base64::engine::general_purpose::STANDARD;
    use rstest::rstest;

    const CONTENT: &str = "correct horse battery staple";

    fn digest(name: &str, content: &str) -> Vec<u8> {
        match name {
            "md5" => Md5::digest(content).to_vec(),
            "sha1" => Sha1::digest(content).to_vec(),
            "sha256" => Sha256::digest(content).to_vec(),
            _ => Sha512::digest(content).to_vec(),
        }
    }

    #[rstest]
    fn a_digest_is_found_in_any_writing(
        #[values("md5", "sha1", "sha256", "sha512")] name: &str,
        #[values("hex", "HEX", "base64", "url")] writing: &str,
        #[values(6, 7, 8, 10, 12, 999)] length: usize,
        #[values("", "v1-", "sha256:")] before: &str,
        #[values("", "\n")] line_break: &str,
    ) {
        let digest = digest(name, CONTENT);
        let whole = match writing {
            "hex" => hex(&digest),
            "HEX" => hex(&digest).to_uppercase(),
            "base64" => STANDARD.encode(&digest),
            _ => URL_SAFE_NO_PAD.encode(&digest),
        };
        let cut = whole.get(..length).unwrap_or(&whole);
        let is_hex = writing.eq_ignore_ascii_case("hex");
        if length < PART && !(is_hex && before.is_empty()) {
            return;
        }
        let content = format!("{CONTENT}{line_break}");
        let shown = Signs::of(content.as_bytes()).shown_by(&format!("{before}{cut}"));
        assert!(shown.is_some_and(|what| what.contains("digest")), "{cut}");
    }

    #[rstest]
    #[case::whole(CONTENT.to_owned())]
    #[case::with_more(format!("v:{CONTENT}:1"))]
    #[case::a_part(CONTENT[3..12].to_owned())]
    #[case::base64(STANDARD.encode(CONTENT))]
    #[case::base64_cut(STANDARD.encode(CONTENT)[..9].to_owned())]
    #[case::hex(hex(CONTENT.as_bytes()))]
    #[case::hex_cut(hex(CONTENT.as_bytes())[..11].to_owned())]
    fn the_content_is_found(#[case] version: String) {
        let shown = Signs::of(CONTENT.as_bytes()).shown_by(&version);
        assert_eq!(shown, Some("the content"));
    }

    /// Versions of stores, and an HMAC.
    #[rstest]
    #[case("1")]
    #[case("v1")]
    #[case("20261126")]
    #[case("1764172800.123456789")]
    #[case("b6c0b1d4-4f0e-4f0e-9a57-5c1f2d9b7e11")]
    #[case("projects/shop/secrets/user/versions/3")]
    #[case("_jAQqIQ9nW4nCr1pzL2cHuy4ZKfdXY5P1T9v7fKpXqI=")]
    #[case("")]
    fn other_versions_reveal_nothing(
        #[case] version: &str,
        #[values(CONTENT, "", "1", "true", "v1\n", "20261126-4")] content: &str,
    ) {
        if content.starts_with("20261126") && version == "20261126" {
            return;
        }
        let shown = Signs::of(content.as_bytes()).shown_by(version);
        assert_eq!(shown, None, "{version:?} of {content:?}");
    }
}
