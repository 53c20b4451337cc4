//! Quotes text that others chose, with a bounded length.

use std::fmt::{self, Display};

/// Returns a text in quotes, escaped, and cut after `most` characters. A precision does not do that:
/// `Debug` of a text ignores it.
pub fn quoted(text: &str, most: usize) -> impl Display {
    Quoted { text, most }
}

struct Quoted<'a> {
    text: &'a str,
    most: usize,
}

impl Display for Quoted<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { text, most } = *self;
        match text.char_indices().nth(most) {
            None => write!(f, "{text:?}"),
            Some((end, _)) => write!(f, "{:?}... ({} bytes)", &text[..end], text.len()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_text_is_whole_or_cut(text in "(?s).{0,40}", most in 0_usize..40) {
            let quoted = quoted(&text, most).to_string();
            let start: String = text.chars().take(most).collect();
            let is_whole = start == text;
            let rest = quoted.strip_prefix(&format!("{start:?}"));
            let length = format!("... ({} bytes)", text.len());
            prop_assert_eq!(rest, Some(if is_whole { "" } else { &length }));
        }
    }
}
