//! Writes bytes as text.

use std::fmt::Write as _;

/// Returns bytes as lower-case hexadecimal digits, two for each.
pub fn digits(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut digits, byte| {
        // Writing to a string cannot fail.
        let _ = write!(digits, "{byte:02x}");
        digits
    })
}
