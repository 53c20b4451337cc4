//! Texts of others, as they may be shown.

/// Returns a text as one line in which nothing is invisible, which is cut after `most` characters.
pub(crate) fn one_line(text: &str, most: usize) -> String {
    let plain: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .collect();
    let words: Vec<_> = plain.split_whitespace().collect();
    let line = visible(&words.join(" "));
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

/// Returns a text in which what moves the cursor or cannot be seen is escaped, as `Debug` does it.
pub(crate) fn visible(text: &str) -> String {
    let mut seen = String::new();
    for c in text.chars() {
        match c {
            '"' | '\'' | '\\' => seen.push(c),
            _ => seen.extend(c.escape_debug()),
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_cannot_be_seen_is_escaped() {
        for (text, expected) in [
            ("a \"b\" \\ 'c' \u{e9}", "a \"b\" \\ 'c' \u{e9}"),
            ("shop\r", "shop\\r"),
            ("\u{1b}[2J", "\\u{1b}[2J"),
            ("a\u{202e}b", "a\\u{202e}b"),
        ] {
            assert_eq!(visible(text), expected);
        }
        assert_eq!(one_line("a\n\tb\u{202e} c", 40), "a b\\u{202e} c");
        assert_eq!(one_line("abcdef", 3), "abc...");
    }
}
