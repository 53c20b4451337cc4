//! The patterns of the chart's schema. They are few, so that no engine for regular expressions is needed.

struct Pattern {
    pattern: &'static str,
    /// What fits, for a message. `None`: the number that the text stands for says it.
    words: Option<&'static str>,
    fits: fn(&str) -> bool,
}

const KNOWN: [Pattern; 7] = [
    Pattern {
        pattern: "^[0-9]+$",
        words: None,
        fits: is_digits,
    },
    Pattern {
        pattern: "^[-+]?[0-9]+$",
        words: None,
        fits: |text| is_digits(text.strip_prefix(['-', '+']).unwrap_or(text)),
    },
    Pattern {
        pattern: "^/",
        words: Some("a path that begins with /"),
        fits: |text| text.starts_with('/'),
    },
    Pattern {
        pattern: r"^$|^0$|^(localhost|[0-9.]*|\[[0-9a-fA-F:.]+\]):([0-9]{1,4}|[1-5][0-9]{4}|6[0-4][0-9]{3}|65[0-4][0-9]{2}|655[0-2][0-9]|6553[0-5])$",
        words: Some("an address such as \":8095\", or 0 for no metrics"),
        fits: is_address,
    },
    Pattern {
        pattern: "^([-+]?(0|([0-9.]+(ns|us|µs|μs|ms|s|m|h))+))?$",
        words: Some("a duration such as 2m"),
        fits: is_duration,
    },
    Pattern {
        pattern: "^(any|[0-9, ]*)$",
        words: Some("any, or the numbers of users with commas between them, such as \"0,1000\""),
        fits: |text| text == "any" || text.chars().all(|c| c.is_ascii_digit() || ", ".contains(c)),
    },
    Pattern {
        pattern: "^(sha256:[0-9a-f]{64})?$",
        words: Some("a digest: sha256: and 64 hexadecimal digits in lower case"),
        fits: is_digest,
    },
];

/// Returns whether a text fits a pattern. `None` if the pattern is not known here.
pub(super) fn fits(pattern: &str, text: &str) -> Option<bool> {
    let known = KNOWN.iter().find(|known| known.pattern == pattern)?;
    Some((known.fits)(text))
}

/// Returns what fits a pattern, in words.
pub(super) fn words(pattern: &str) -> Option<&'static str> {
    let known = KNOWN.iter().find(|known| known.pattern == pattern)?;
    known.words
}

fn is_digits(text: &str) -> bool {
    !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit())
}

fn is_address(text: &str) -> bool {
    let Some((host, port)) = text.rsplit_once(':') else {
        return ["", "0"].contains(&text);
    };
    let inside = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'));
    let is_host = match inside {
        Some(inside) => {
            !inside.is_empty()
                && inside
                    .chars()
                    .all(|c| c.is_ascii_hexdigit() || ":.".contains(c))
        }
        None => host == "localhost" || host.chars().all(|c| c.is_ascii_digit() || c == '.'),
    };
    let is_short = port.len() < 5 || !port.starts_with('0');
    is_host && is_digits(port) && is_short && port.parse::<u16>().is_ok()
}

fn is_digest(text: &str) -> bool {
    let is_hex = |c: u8| c.is_ascii_digit() || (b'a'..=b'f').contains(&c);
    let digits = text.strip_prefix("sha256:");
    text.is_empty() || digits.is_some_and(|digits| digits.len() == 64 && digits.bytes().all(is_hex))
}

fn is_duration(text: &str) -> bool {
    let mut rest = text.strip_prefix(['-', '+']).unwrap_or(text);
    if rest == "0" || text.is_empty() {
        return true;
    }
    if rest.is_empty() {
        return false;
    }
    while !rest.is_empty() {
        let unit = rest.trim_start_matches(|c: char| c.is_ascii_digit() || c == '.');
        let units = ["ns", "us", "µs", "μs", "ms", "s", "m", "h"];
        let after = units.iter().find_map(|name| unit.strip_prefix(name));
        match after {
            Some(after) if unit.len() < rest.len() => rest = after,
            _ => return false,
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_fit_as_they_fit_the_regular_expressions() {
        let [digits, signed, path, address, duration, users, digest] =
            KNOWN.map(|known| known.pattern);
        let sha = format!("sha256:{}", "09af".repeat(16));
        let longer = format!("{sha}0");
        for (pattern, good, bad) in [
            (
                digits,
                &["0", "9808"][..],
                &["", "-1", "+1", "1 ", "1.5", "x"][..],
            ),
            (signed, &["0", "-1", "+5"], &["", "-", "--1", "1-"]),
            (path, &["/", "/var/lib"], &["", "var", " /"]),
            (
                address,
                &[
                    "",
                    "0",
                    ":8095",
                    "0.0.0.0:8095",
                    "localhost:1",
                    "[::1]:80",
                    "[fe80::1.2]:80",
                    ":65535",
                    ":0080",
                ],
                &[
                    ":65536", ":00080", "8095", ":", "1", "host:80", "[]:80", "[::1]", "[x]:80",
                    "a:b:80", "[:80",
                ],
            ),
            (
                duration,
                &[
                    "", "0", "-0", "2m", "1h30m", "1.5s", "10ms", "5µs", "5μs", "+2m", "1m1s1ms",
                    ".s",
                ],
                &[
                    "-", "2", "m", "2 m", "2m ", "2min", "1d", "00", "2m3", "1h-2m",
                ],
            ),
            (
                users,
                &["any", "", "0,1000", "0, 1"],
                &["root", "any,0", "-1"],
            ),
            (
                digest,
                &["", &sha],
                &[
                    "sha256:",
                    "sha256:0123",
                    &sha[1..],
                    &sha.to_uppercase(),
                    &longer,
                ],
            ),
        ] {
            for text in good {
                assert_eq!(fits(pattern, text), Some(true), "{pattern} {text:?}");
            }
            for text in bad {
                assert_eq!(fits(pattern, text), Some(false), "{pattern} {text:?}");
            }
        }
        assert_eq!(fits("^x$", "x"), None);
    }
}
