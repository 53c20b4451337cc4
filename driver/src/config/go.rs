//! Reads values of flags as Go does, because installed manifests and charts rely on it.
//!
//! `driver/tests/go_syntax.json` has many spellings with the values that Go itself reads.

/// Reads the spellings of `strconv.ParseBool`.
pub(super) fn switch(text: &str) -> Option<bool> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Some(false),
        _ => None,
    }
}

/// Reads an integer as `strconv.ParseInt` with base 0: a sign, a prefix 0x, 0o, 0b or 0, and
/// underscores between digits.
pub(super) fn integer(text: &str) -> Option<i64> {
    let (negative, digits) = sign(text);
    let number = i128::from(unsigned(digits)?);
    i64::try_from(if negative { -number } else { number }).ok()
}

/// Reads an integer as `strconv.ParseUint` with base 0: as [`integer`], without a sign.
pub(super) fn unsigned(text: &str) -> Option<u64> {
    let prefix = text.get(..2).filter(|_| text.len() > 2).unwrap_or_default();
    let (radix, digits) = match prefix {
        "0x" | "0X" => (16, text.get(2..)?),
        "0o" | "0O" => (8, text.get(2..)?),
        "0b" | "0B" => (2, text.get(2..)?),
        _ if text.len() > 1 && text.starts_with('0') => (8, text.get(1..)?),
        _ => (10, text),
    };
    if digits.contains('_') && !underscores_are_between_digits(text) || digits.starts_with('+') {
        return None;
    }
    u64::from_str_radix(&digits.replace('_', ""), radix).ok()
}

fn underscores_are_between_digits(text: &str) -> bool {
    // The prefix of a base counts as a digit in front.
    let digits = ["0x", "0X", "0o", "0O", "0b", "0B"]
        .iter()
        .find_map(|prefix| text.strip_prefix(prefix))
        .unwrap_or(text);
    let starts_well = digits.len() < text.len() || !digits.starts_with('_');
    starts_well && !digits.ends_with('_') && !digits.contains("__")
}

/// Reads a verbosity as klog does: `strconv.ParseInt` with base 10, in 32 bits.
pub(super) fn level(text: &str) -> Option<i32> {
    let (_, digits) = sign(text);
    let plain = digits.bytes().all(|b| b.is_ascii_digit());
    if plain { text.parse().ok() } else { None }
}

/// Reads a duration as `time.ParseDuration`, in nanoseconds: numbers with units, such as `1h30m` or
/// `-1.5s`.
pub(super) fn duration(text: &str) -> Option<i64> {
    /// The largest magnitude in Go, which is that of the least duration.
    const MOST: u64 = 1 << 63;
    let (negative, mut rest) = sign(text);
    if rest.is_empty() {
        return None;
    }
    let mut total = 0_u64;
    while !rest.is_empty() && rest != "0" {
        let (whole, after) = split(rest, |c| c.is_ascii_digit());
        let (fraction, after) = match after.strip_prefix('.') {
            Some(after) => split(after, |c| c.is_ascii_digit()),
            None => ("", after),
        };
        if whole.is_empty() && fraction.is_empty() {
            return None;
        }
        let (unit, after) = split(after, |c| c != '.' && !c.is_ascii_digit());
        let unit: u64 = match unit {
            "ns" => 1,
            "us" | "µs" | "μs" => 1_000,
            "ms" => 1_000_000,
            "s" => 1_000_000_000,
            "m" => 60_000_000_000,
            "h" => 3_600_000_000_000,
            _ => return None,
        };
        let whole: u64 = if whole.is_empty() {
            0
        } else {
            whole.parse().ok()?
        };
        let term = whole.checked_mul(unit)?.checked_add(part(fraction, unit))?;
        total = total.checked_add(term).filter(|total| *total <= MOST)?;
        rest = after;
        // A zero without a unit is a duration only when it stands alone.
        if rest == "0" {
            return None;
        }
    }
    let total = i128::from(total);
    i64::try_from(if negative { -total } else { total }).ok()
}

/// Returns the value of the digits after the point, computed as Go does, in floating point.
fn part(fraction: &str, unit: u64) -> u64 {
    let (mut value, mut scale) = (0_u64, 1_f64);
    for digit in fraction.bytes() {
        let next = value
            .checked_mul(10)
            .and_then(|value| value.checked_add(u64::from(digit - b'0')));
        match next.filter(|next| i64::try_from(*next).is_ok()) {
            Some(next) => value = next,
            None => break,
        }
        scale *= 10.0;
    }
    (value as f64 * (unit as f64 / scale)) as u64
}

fn sign(text: &str) -> (bool, &str) {
    match text.as_bytes() {
        [b'-', ..] => (true, &text[1..]),
        [b'+', ..] => (false, &text[1..]),
        _ => (false, text),
    }
}

fn split(text: &str, belongs: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|c| !belongs(c)).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use serde_json::{Value, json};

    /// Returns many spellings with the value that Go reads, or null if it refuses them.
    fn table(name: &str) -> Vec<(Value, Value)> {
        let table = include_str!("../../tests/go_syntax.json");
        let table: Value = serde_json::from_str(table).unwrap();
        let rows = table[name].as_array().unwrap();
        rows.iter()
            .map(|row| (row[0].clone(), row[1].clone()))
            .collect()
    }

    fn compare<T: Into<Value>>(name: &str, read: impl Fn(&str) -> Option<T>) {
        let wrong: Vec<_> = table(name)
            .into_iter()
            .map(|(text, expected)| {
                let ours = read(text.as_str().unwrap()).map_or(Value::Null, Into::into);
                (text, expected, ours)
            })
            .filter(|(_, expected, ours)| expected != ours)
            .collect();
        assert!(
            wrong.is_empty(),
            "{name}: text, Go's value, ours: {wrong:#?}"
        );
    }

    #[test]
    fn values_are_read_as_go_reads_them() {
        compare("bools", super::switch);
        compare("ints", super::integer);
        compare("uints", super::unsigned);
        compare("levels", super::level);
        compare("durations", super::duration);
    }

    #[test]
    fn command_lines_are_read_as_go_reads_them() {
        for (line, expected) in table("lines") {
            let words = line
                .as_array()
                .unwrap()
                .iter()
                .map(|word| word.as_str().unwrap().into());
            let ours = match Config::parse(words) {
                // Go ignores arguments that are not flags, and the flags after them.
                Err(exit) if exit.text.starts_with("unexpected argument") => {
                    assert_eq!(exit.code, 2, "{line}: {}", exit.text);
                    assert_ne!(expected["rest"], json!([]), "{line}");
                    continue;
                }
                Err(exit) => {
                    assert_eq!(exit.code, 2, "{line}: {}", exit.text);
                    Value::Null
                }
                Ok(config) => {
                    // A negative value that makes no sense counts as zero.
                    let at_least_zero = |value: &Value| value.as_i64().unwrap().max(0);
                    assert_eq!(
                        i64::from(config.verbosity),
                        at_least_zero(&expected["v"]),
                        "{line}"
                    );
                    let every = i64::try_from(config.rotation_poll_interval.as_nanos()).unwrap();
                    assert_eq!(
                        every,
                        at_least_zero(&expected["rotation-poll-interval"]),
                        "{line}"
                    );
                    json!({
                        "nodeid": config.node_id,
                        "v": expected["v"],
                        "log-format-json": config.log_format_json,
                        "rotation-poll-interval": expected["rotation-poll-interval"],
                        "max-call-recv-msg-size": config.max_call_recv_msg_size,
                        "rest": [],
                    })
                }
            };
            assert_eq!(ours, expected, "{line}");
        }
    }

    #[test]
    fn a_value_below_zero_is_reported() {
        let parse = |line: &str| Config::parse(line.split(' ').map(Into::into)).unwrap();
        let config = parse("-v=-1 --rotation-poll-interval=-1s --nodeid=-a --sync-interval=0");
        assert_eq!(config.below_zero(), ["v", "rotation-poll-interval"]);
        assert!(parse("-v=-1 -v=0").below_zero().is_empty());
    }
}
