//! Reads the value of a flag, of each type, from the text after the `=`.
//!
//! Durations, numbers and switches are spelled as in Go. Every error is the end of a sentence that
//! starts with "invalid value for --flag: ".

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use super::{Endpoint, RepublishErrors, SyncErrors, go};

/// A type of the value of a flag.
pub(super) trait FlagValue: Sized {
    fn read(text: &str) -> Result<Self, String>;
}

/// Reads a value into a setting.
pub(super) fn put<T: FlagValue>(setting: &mut T, text: &str) -> Result<(), String> {
    *setting = T::read(text)?;
    Ok(())
}

/// Checks the value of a flag that has no effect.
pub(super) fn check<T: FlagValue>(text: &str) -> Result<(), String> {
    T::read(text).map(drop)
}

impl FlagValue for String {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }
}

impl FlagValue for PathBuf {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text.into())
    }
}

/// An empty text is `None`.
impl FlagValue for Option<PathBuf> {
    fn read(text: &str) -> Result<Self, String> {
        Ok(Some(text)
            .filter(|text| !text.is_empty())
            .map(PathBuf::from))
    }
}

/// A list that is separated by commas. Empty entries do not count.
impl FlagValue for Vec<PathBuf> {
    fn read(text: &str) -> Result<Self, String> {
        Ok(text
            .split(',')
            .map(str::trim)
            .filter(|entry| !entry.is_empty())
            .map(PathBuf::from)
            .collect())
    }
}

impl FlagValue for bool {
    fn read(text: &str) -> Result<Self, String> {
        go::switch(text).ok_or_else(|| "write true or false".to_owned())
    }
}

impl FlagValue for i64 {
    fn read(text: &str) -> Result<Self, String> {
        go::integer(text).ok_or_else(|| "write a number".to_owned())
    }
}

impl FlagValue for u64 {
    fn read(text: &str) -> Result<Self, String> {
        go::unsigned(text).ok_or_else(|| "write a number, zero or more".to_owned())
    }
}

/// A negative duration counts as zero.
impl FlagValue for Duration {
    fn read(text: &str) -> Result<Self, String> {
        let nanoseconds = go::duration(text)
            .ok_or_else(|| "write a duration such as 30s, 2m or 1h30m".to_owned())?;
        Ok(Duration::from_nanos(
            u64::try_from(nanoseconds).unwrap_or(0),
        ))
    }
}

/// Reads a list of user IDs that is separated by commas, or `any`.
pub(super) fn uids(text: &str) -> Result<Option<Vec<u32>>, String> {
    if text == "any" {
        return Ok(None);
    }
    let entries = text.split(',').map(str::trim);
    let uids = entries.filter(|entry| !entry.is_empty()).map(|entry| {
        let uid = entry.parse().ok().filter(|_| !entry.starts_with('+'));
        uid.ok_or_else(|| format!("{entry:?} is not a user ID; write numbers, or any"))
    });
    uids.collect::<Result<_, _>>().map(Some)
}

/// Reads the verbosity of the log. A negative number counts as zero.
pub(super) fn verbosity(text: &str) -> Result<u32, String> {
    let level = go::level(text).ok_or_else(|| "write a number".to_owned())?;
    Ok(u32::try_from(level).unwrap_or(0))
}

impl FlagValue for RepublishErrors {
    fn read(text: &str) -> Result<Self, String> {
        match text {
            "mask" => Ok(Self::Mask),
            "surface" => Ok(Self::Surface),
            _ => Err("write mask or surface".to_owned()),
        }
    }
}

impl FlagValue for SyncErrors {
    fn read(text: &str) -> Result<Self, String> {
        match text {
            "report" => Ok(Self::Report),
            "fail" => Ok(Self::Fail),
            _ => Err("write report or fail".to_owned()),
        }
    }
}

impl FlagValue for Endpoint {
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

/// Reads the address of an HTTP server. An empty text and `0` mean that nothing is served.
pub(super) fn address(text: &str) -> Result<Option<SocketAddr>, String> {
    if text.is_empty() || text == "0" {
        Ok(None)
    } else {
        listening_address(text).map(Some)
    }
}

/// Reads `HOST:PORT`. An empty host means all addresses, as in Go.
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

/// Accepts the only metrics backend that there is.
pub(super) fn prometheus(text: &str) -> Result<(), String> {
    if text.eq_ignore_ascii_case("prometheus") {
        Ok(())
    } else {
        Err("the only metrics backend is Prometheus".to_owned())
    }
}

/// Reads a name in the form that CSI requires of `GetPluginInfoResponse.name`. The name becomes
/// part of a file name.
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

/// Reads an absolute path.
pub(super) fn absolute(text: &str) -> Result<PathBuf, String> {
    if text.starts_with('/') {
        Ok(text.into())
    } else {
        Err("the path must start with /".to_owned())
    }
}

/// Reads a number of bytes.
pub(super) fn size(text: &str) -> Result<usize, String> {
    number(text, "the size must be at least 1")
}

/// Reads a number of calls.
pub(super) fn count(text: &str) -> Result<usize, String> {
    number(text, "the number must be at least 1")
}

/// Reads a number from 1 to the largest of 32 bits, on every machine.
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
