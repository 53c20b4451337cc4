//! Values of flags: how each type is read from the text after the `=`.
//!
//! Durations, numbers and switches are spelled as Go spells them. Every error is the end of a
//! sentence that starts with "invalid value for --flag: ".

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::{Endpoint, go};

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

impl Value for bool {
    fn read(text: &str) -> Result<Self, String> {
        go::switch(text).ok_or_else(|| "write true or false".to_owned())
    }
}

impl Value for i64 {
    fn read(text: &str) -> Result<Self, String> {
        go::integer(text).ok_or_else(|| "write a number".to_owned())
    }
}

impl Value for u64 {
    fn read(text: &str) -> Result<Self, String> {
        go::unsigned(text).ok_or_else(|| "write a number, zero or more".to_owned())
    }
}

/// Less than nothing counts as nothing.
impl Value for Duration {
    fn read(text: &str) -> Result<Self, String> {
        let nanoseconds = go::duration(text)
            .ok_or_else(|| "write a duration such as 30s, 2m or 1h30m".to_owned())?;
        Ok(Duration::from_nanos(
            u64::try_from(nanoseconds).unwrap_or(0),
        ))
    }
}

/// How much is logged. Less than nothing counts as nothing.
pub(super) fn verbosity(text: &str) -> Result<u32, String> {
    let level = go::level(text).ok_or_else(|| "write a number".to_owned())?;
    Ok(u32::try_from(level).unwrap_or(0))
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

/// A number of bytes.
pub(super) fn size(text: &str) -> Result<usize, String> {
    number(text, "the size must be at least 1")
}

/// How many calls may be in flight.
pub(super) fn count(text: &str) -> Result<usize, String> {
    number(text, "the number must be at least 1")
}

/// A number from 1 to what 32 bits hold, whatever this machine's words are.
fn number(text: &str, too_small: &str) -> Result<usize, String> {
    match i64::read(text)? {
        ..=0 => Err(too_small.to_owned()),
        number => u32::try_from(number)
            .ok()
            .and_then(|number| usize::try_from(number).ok())
            .ok_or_else(|| "the number is too large".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

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
