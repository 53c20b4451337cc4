//! The forms in which a text may show a secret: as it is, escaped, or encoded.

use std::collections::BTreeSet;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD_NO_PAD, URL_SAFE_NO_PAD};
use serde_json::json;

/// The length in bytes from which a value is in a text only if it was put there.
const SHORTEST: usize = 8;

/// Returns the values that are long enough to be found in a text only if they were put there.
pub(super) fn telling(mut values: Vec<&str>) -> Vec<&str> {
    values.retain(|value| value.len() >= SHORTEST);
    values
}

/// Returns the forms in which a text may show values: whole or a line of them, as they are, escaped as
/// in JSON and in the reasons of findings, or encoded.
pub(super) fn forms(values: &[&str]) -> Vec<String> {
    let lines = values.iter().flat_map(|value| value.lines()).map(str::trim);
    let pieces: BTreeSet<&str> = telling(lines.chain(values.iter().copied()).collect())
        .into_iter()
        .collect();
    let mut forms = BTreeSet::new();
    for piece in pieces {
        let json = unquoted(&json!(piece).to_string());
        forms.extend([
            unquoted(&format!("{piece:?}")),
            unquoted(&format!("{json:?}")),
        ]);
        forms.extend([json, piece.to_owned()]);
        forms.extend(encodings(piece.as_bytes()));
    }
    forms.into_iter().collect()
}

/// Returns a text without its first and last character.
fn unquoted(text: &str) -> String {
    text.get(1..text.len() - 1).unwrap_or_default().to_owned()
}

/// Returns what encodings of any text with these bytes in it have in common: base64, hexadecimal and
/// decimal numbers, and the encoding of URLs.
fn encodings(bytes: &[u8]) -> Vec<String> {
    let mut encodings = vec![hex(bytes), hex(bytes).to_ascii_uppercase(), in_url(bytes)];
    let numbers: Vec<_> = bytes.iter().map(u8::to_string).collect();
    encodings.extend([numbers.join(" "), numbers.join(", "), numbers.join(",")]);
    for alphabet in [STANDARD_NO_PAD, URL_SAFE_NO_PAD] {
        // The first and the last digits depend on what is before and after the bytes.
        for (before, first) in [(0, 0), (1, 2), (2, 3)] {
            let digits = alphabet.encode([&vec![0; before][..], bytes].concat());
            let last = usize::from(!(before + bytes.len()).is_multiple_of(3));
            let digits = digits.get(first..digits.len() - last);
            encodings.extend(digits.map(str::to_owned));
        }
    }
    encodings
}

/// Returns the bytes as hexadecimal digits.
pub(super) fn hex(bytes: &[u8]) -> String {
    let digits = bytes.iter().map(|byte| format!("{byte:02x}"));
    digits.collect()
}

fn in_url(bytes: &[u8]) -> String {
    let encoded = bytes.iter().map(|&byte| {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            char::from(byte).to_string()
        } else {
            format!("%{byte:02X}")
        }
    });
    encoded.collect()
}

/// Returns whether a text begins with encoded bytes, and shows at least eight digits of them.
pub(super) fn begins_with_part(text: &str, bytes: &[u8]) -> bool {
    let part = bytes.get(..text.len()).unwrap_or(bytes);
    let encodings = encodings(part);
    text.len() >= SHORTEST
        && encodings.iter().any(|whole| {
            whole.starts_with(text) || (whole.len() >= SHORTEST && text.starts_with(&**whole))
        })
}

/// Returns a text with `<secret>` in the place of each of the values.
pub(super) fn hide(text: &str, values: &[String]) -> String {
    let mut hidden = String::new();
    let mut rest = text;
    while let Some(next) = rest.chars().next() {
        let found = values.iter().filter(|value| rest.starts_with(&***value));
        match found.map(String::len).max() {
            None | Some(0) => {
                hidden.push(next);
                rest = &rest[next.len_utf8()..];
            }
            Some(length) => {
                hidden.push_str("<secret>");
                rest = &rest[length..];
            }
        }
    }
    hidden
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    const PEM: &str =
        "-----BEGIN KEY-----\nsupersecretline1\nsupersecretline2\n-----END KEY-----\n";
    const JSON: &str = r#"{"password": "hunter2\\hunter2"}"#;

    /// A provider quotes a secret in any way, and a finding quotes the provider.
    #[rstest]
    fn secrets_are_hidden_however_they_are_quoted(
        #[values(PEM, JSON, "hunter2-hunter2", "with \u{202e} and \"quotes\"")] secret: &str,
        #[values(false, true)] as_json: bool,
        #[values(false, true)] as_debug: bool,
        #[values(false, true)] in_lines: bool,
    ) {
        let mut quoted = secret.to_owned();
        if in_lines {
            quoted = quoted.replace('\n', " in the middle\n");
        }
        if as_json {
            quoted = json!({"of": quoted}).to_string();
        }
        if as_debug {
            quoted = format!("failed: {quoted:?}");
        }
        let hidden = hide(&format!("it says {quoted}"), &forms(&[secret, "short"]));
        assert!(hidden.contains("<secret>"), "{hidden}");
        for piece in ["supersecret", "hunter2", "quotes"] {
            assert!(!hidden.contains(piece), "{hidden}");
        }
        assert!(hidden.starts_with("it says"));
    }

    /// Whatever stands before and after a secret, the encoded text has one of its forms.
    #[rstest]
    fn secrets_are_found_in_encoded_texts(
        #[values("hunter2-hunter2", "ßecret?>~~key", "12345678")] secret: &str,
        #[values("", "a", "jw", "jwt:")] before: &str,
        #[values("", "x", "yz", "\n..")] after: &str,
    ) {
        let text = format!("{before}{secret}{after}");
        let bytes = text.as_bytes();
        for encoded in [
            STANDARD_NO_PAD.encode(bytes),
            base64::engine::general_purpose::STANDARD.encode(bytes),
            URL_SAFE_NO_PAD.encode(bytes),
            hex(bytes),
            hex(bytes).to_uppercase(),
            in_url(bytes),
            format!("{bytes:?}"),
            json!(bytes).to_string(),
        ] {
            let found = forms(&[secret])
                .iter()
                .any(|form| encoded.contains(&**form));
            assert!(found, "{encoded}");
            let other = forms(&["another-secret"]);
            assert!(!other.iter().any(|form| encoded.contains(&**form)));
        }
    }
}
