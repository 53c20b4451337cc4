//! The notations that classes and files of objects use: YAML, base64 and octal modes.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::de::DeserializeOwned;

/// Parses YAML. The error names only the place, because the parser's own message quotes the input.
pub(super) fn parse_yaml<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    let options = serde_saphyr::options! { with_snippet: false };
    serde_saphyr::from_str_with_options(text, options).map_err(|error| match error.location() {
        Some(at) => format!(
            "YAML not understood at line {}, column {}",
            at.line(),
            at.column()
        ),
        None => "YAML not understood".to_owned(),
    })
}

/// Decodes `contentBase64`, with the spaces and line ends that YAML's block scalars have.
pub(super) fn decode_base64(text: &str) -> Result<Vec<u8>, String> {
    let compact: String = text.split_whitespace().collect();
    STANDARD
        .decode(compact)
        .map_err(|_| "contentBase64 is not base64".to_owned())
}

/// Parses octal digits in any of the usual forms: `"0640"`, `0640`, `640`, `0o640`.
pub(super) fn parse_mode(text: &str) -> Result<u32, String> {
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let octal = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    let mode = octal
        .then(|| i32::from_str_radix(digits, 8).ok())
        .flatten()
        .map(i32::cast_unsigned);
    mode.ok_or_else(|| "mode must be octal digits, such as \"0640\"".to_owned())
}
