//! Values of flags: how each type is read from the text after the `=`.
//!
//! Durations, numbers and switches are spelled as Go spells them. Every error is the end of a
//! sentence that starts with "invalid value for --flag: ".

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::Endpoint;

/// The place of a word among those that are allowed.
pub(super) fn one_of<const N: usize>(text: &str, words: [&str; N]) -> Result<usize, String> {
    words
        .iter()
        .position(|word| *word == text)
        .ok_or_else(|| format!("write {}", words.join(" or ")))
}

/// A type that a flag's value is read as.
pub(super) trait Value: Sized {
    fn read(text: &str) -> Result<Self, String>;
}

pub(super) fn put<T: Value>(place: &mut T, text: &str) -> Result<(), String> {
    *place = T::read(text)?;
    Ok(())
}

pub(super) fn check<T: Value>(text: &str) -> Result<(), String> {
    T::read(text).map(drop)
}

impl Value for String {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
}

impl Value for PathBuf {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text.into())
    }
}

/// Empty means absent.
impl Value for Option<PathBuf> {
    fn read(text: &str) -> Result<Self, String> {
        Ok(Some(text)
            .filter(|text| !text.is_empty())
            .map(PathBuf::from))
    }
}

/// A list separated by commas; empty entries do not count.
impl Value for Vec<PathBuf> {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text
            .split(',')
            .map(str::trim)
            .filter(|entry| !entry.is_empty())
            .map(PathBuf::from)
            .collect())
    }
}

/// The spellings of Go's `strconv.ParseBool`.
impl Value for bool {
    fn read(text: &str) -> Result<Self, String> {
        match text {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
            _ => Err("write true or false".to_owned()),
        }
    }
}

/// A count as Go reads it: decimal, or with the prefix 0x, 0o, 0b or 0.
impl Value for u64 {
    fn read(text: &str) -> Result<Self, String> {
        let (radix, digits) = match text.as_bytes() {
            [b'0', b'x' | b'X', ..] => (16, text.get(2..)),
            [b'0', b'o' | b'O', ..] => (8, text.get(2..)),
            [b'0', b'b' | b'B', ..] => (2, text.get(2..)),
            [b'0', _, ..] => (8, text.get(1..)),
            _ => (10, Some(text)),
        };
        digits
            .and_then(|digits| u64::from_str_radix(digits, radix).ok())
            .ok_or_else(|| "write a number, zero or more".to_owned())
    }
}

impl Value for u32 {
    fn read(text: &str) -> Result<Self, String> {
        u32::try_from(u64::read(text)?).map_err(|_| "the number is too large".to_owned())
    }
}

impl Value for u16 {
    fn read(text: &str) -> Result<Self, String> {
        u16::try_from(u64::read(text)?).map_err(|_| "the number is above 65535".to_owned())
    }
}

/// A duration as Go reads it: numbers with units, such as `1h30m` or `1.5s`.
impl Value for Duration {
    fn read(text: &str) -> Result<Self, String> {
        if text.starts_with('-') {
            return Err("the duration is negative".to_owned());
        }
        let unsigned = text.strip_prefix('+').unwrap_or(text);
        if unsigned == "0" {
            return Ok(Duration::ZERO);
        }
        let invalid = || "write a duration such as 30s, 2m or 1h30m".to_owned();
        let mut rest = unsigned;
        let mut total = Duration::ZERO;
        loop {
            let (number, after) = rest.split_at(rest.find(|c| !is_number(c)).ok_or_else(invalid)?);
            let (unit, after) = after.split_at(after.find(is_number).unwrap_or(after.len()));
            let term = duration_of(number, unit).ok_or_else(invalid)?;
            total = total.checked_add(term).ok_or_else(invalid)?;
            if after.is_empty() {
                return Ok(total);
            }
            rest = after;
        }
    }
}

fn is_number(c: char) -> bool {
    c.is_ascii_digit() || c == '.'
}

/// One term of a duration, rounded down to a nanosecond.
fn duration_of(number: &str, unit: &str) -> Option<Duration> {
    let unit: u64 = match unit {
        "ns" => 1,
        "us" | "µs" | "μs" => 1_000,
        "ms" => 1_000_000,
        "s" => 1_000_000_000,
        "m" => 60_000_000_000,
        "h" => 3_600_000_000_000,
        _ => return None,
    };
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    if whole.is_empty() && fraction.is_empty() || fraction.contains('.') {
        return None;
    }
    let whole: u64 = if whole.is_empty() {
        0
    } else {
        whole.parse().ok()?
    };
    // More digits than these are worth less than a nanosecond, whatever the unit.
    let (numerator, denominator) = fraction
        .chars()
        .take(15)
        .try_fold((0, 1), |(n, d), digit| {
            Some((n * 10 + u128::from(digit.to_digit(10)?), d * 10))
        })?;
    let fraction = u64::try_from(numerator * u128::from(unit) / denominator).ok()?;
    whole
        .checked_mul(unit)?
        .checked_add(fraction)
        .map(Duration::from_nanos)
}

impl Value for Endpoint {
    fn read(text: &str) -> Result<Self, String> {
        let (scheme, rest) = text
            .split_once("://")
            .ok_or("write unix://PATH or tcp://HOST:PORT")?;
        match scheme.to_ascii_lowercase().as_str() {
            "unix" => {
                let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
                if parts.is_empty() {
                    return Err("the path is missing".to_owned());
                }
                Ok(Endpoint::Unix(format!("/{}", parts.join("/")).into()))
            }
            "tcp" => Ok(Endpoint::Tcp(listening_address(rest)?)),
            _ => Err("the scheme must be unix:// or tcp://".to_owned()),
        }
    }
}

/// An address to serve HTTP at; empty and `0` mean not at all.
pub(super) fn address(text: &str) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() || text == "0" {
        Ok(None)
    } else {
        listening_address(text).map(Some)
    }
}

/// `HOST:PORT` where an empty host means all addresses, which is what Go makes of it.
fn listening_address(text: &str) -> Result<SocketAddr, String> {
    let (host, port) = text.rsplit_once(':').ok_or("write HOST:PORT or :PORT")?;
    let port: u16 = port
        .parse()
        .map_err(|_| "the port must be a number up to 65535".to_owned())?;
    let host = match host {
        "" => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        "localhost" => IpAddr::V4(Ipv4Addr::LOCALHOST),
        host => {
            let bare = host
                .strip_prefix('[')
                .and_then(|host| host.strip_suffix(']'))
                .unwrap_or(host);
            bare.parse()
                .map_err(|_| "the host must be an IP address or localhost".to_owned())?
        }
    };
    Ok(SocketAddr::new(host, port))
}

pub(super) fn prometheus(text: &str) -> Result<(), String> {
    if text.eq_ignore_ascii_case("prometheus") {
        Ok(())
    } else {
        Err("the only metrics backend is Prometheus".to_owned())
    }
}

/// The form that CSI gives to `GetPluginInfoResponse.name`. The name becomes part of a file name.
pub(super) fn driver_name(text: &str) -> Result<String, String> {
    let plain = |c: char| c.is_ascii_alphanumeric();
    let valid = text.len() <= 63
        && text.starts_with(plain)
        && text.ends_with(plain)
        && text.chars().all(|c| plain(c) || c == '-' || c == '.');
    if valid {
        Ok(text.to_owned())
    } else {
        Err(
            "write 1 to 63 letters, digits, dashes and dots, with a letter or digit at both ends"
                .to_owned(),
        )
    }
}

pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') {
        Ok(text.into())
    } else {
        Err("the path must start with /".to_owned())
    }
}

pub(super) fn size(text: &str) -> Result<usize, String> {
    match u32::read(text)? {
        0 => Err("no answer has no bytes".to_owned()),
        bytes => usize::try_from(bytes).map_err(|_| "the number is too large".to_owned()),
    }
}

/// How many calls may be in flight.
pub(super) fn count(text: &str) -> Result<usize, String> {
    match u32::read(text)? {
        0 => Err("then nothing could ever be called".to_owned()),
        count => usize::try_from(count).map_err(|_| "the number is too large".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case("2m", Ok(Duration::from_secs(120)))]
    #[case("1h30m", Ok(Duration::from_secs(5400)))]
    #[case("1.5s", Ok(Duration::from_millis(1500)))]
    #[case("100ms", Ok(Duration::from_millis(100)))]
    #[case(".5h", Ok(Duration::from_secs(1800)))]
    #[case("1.m", Ok(Duration::from_secs(60)))]
    #[case("3us2ns", Ok(Duration::from_nanos(3002)))]
    #[case("0.1234567890123s", Ok(Duration::from_nanos(123_456_789)))]
    #[case("0", Ok(Duration::ZERO))]
    #[case("+1s", Ok(Duration::from_secs(1)))]
    #[case("", Err(()))]
    #[case("2", Err(()))]
    #[case("m", Err(()))]
    #[case(".s", Err(()))]
    #[case("1.2.3s", Err(()))]
    #[case("1d", Err(()))]
    #[case("1s ", Err(()))]
    #[case("-1s", Err(()))]
    #[case("99999999999999h", Err(()))]
    fn durations(#[case] text: &str, #[case] expected: Result<Duration, ()>) {
        assert_eq!(Duration::read(text).map_err(drop), expected);
    }

    #[rstest]
    #[case("unix://tmp/csi.sock", Ok(Endpoint::Unix("/tmp/csi.sock".into())))]
    #[case("unix:///csi/csi.sock", Ok(Endpoint::Unix("/csi/csi.sock".into())))]
    #[case("UNIX:////csi//csi.sock", Ok(Endpoint::Unix("/csi/csi.sock".into())))]
    #[case("tcp://127.0.0.1:10", Ok(Endpoint::Tcp("127.0.0.1:10".parse().unwrap())))]
    #[case("Tcp://:10", Ok(Endpoint::Tcp("[::]:10".parse().unwrap())))]
    #[case("unix://", Err(()))]
    #[case("http://a:1", Err(()))]
    #[case("/csi/csi.sock", Err(()))]
    #[case("tcp://nowhere", Err(()))]
    fn endpoints(#[case] text: &str, #[case] expected: Result<Endpoint, ()>) {
        assert_eq!(Endpoint::read(text).map_err(drop), expected);
    }

    #[rstest]
    #[case(":8095", Ok(Some("[::]:8095")))]
    #[case("0.0.0.0:9808", Ok(Some("0.0.0.0:9808")))]
    #[case("[::1]:1", Ok(Some("[::1]:1")))]
    #[case("localhost:1", Ok(Some("127.0.0.1:1")))]
    #[case("", Ok(None))]
    #[case("0", Ok(None))]
    #[case("8095", Err(()))]
    #[case("example.org:80", Err(()))]
    #[case(":65536", Err(()))]
    fn addresses(#[case] text: &str, #[case] expected: Result<Option<&str>, ()>) {
        let expected = expected.map(|addr| addr.map(|addr| addr.parse().unwrap()));
        assert_eq!(address(text).map_err(drop), expected);
    }
}
