//! Reads from the driver's metrics page how its calls to providers ended.

use std::{
    collections::BTreeMap,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    time::Duration,
};

use serde::{Deserialize, Serialize};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpStream,
    time::timeout,
};

/// The time that the page may take, and its largest size.
const WITHIN: Duration = Duration::from_secs(2);
const MAX_PAGE: u64 = 8 << 20;
/// The metric that counts the calls, with the labels `provider` and `outcome`.
const COUNT: &str = "secrets_store_provider_call_duration_seconds_count{";

/// How the calls to a provider ended since the driver started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Calls {
    /// The provider's name.
    pub provider: String,
    /// The calls that succeeded.
    pub succeeded: u64,
    /// The calls that did not, by gRPC code.
    pub failed: BTreeMap<String, u64>,
}

/// Reads the page that is served at an address of this container.
pub(super) async fn read(address: SocketAddr) -> io::Result<Vec<Calls>> {
    let hosts: &[IpAddr] = match address.ip() {
        ip if !ip.is_unspecified() => &[ip],
        _ => &[
            IpAddr::V4(Ipv4Addr::LOCALHOST),
            IpAddr::V6(Ipv6Addr::LOCALHOST),
        ],
    };
    let page = async {
        let mut failed = None;
        for host in hosts {
            match get(SocketAddr::new(*host, address.port())).await {
                Ok(page) => return Ok(page),
                Err(error) => failed = Some(error),
            }
        }
        Err(failed.unwrap_or_else(|| io::ErrorKind::NotFound.into()))
    };
    let page = timeout(WITHIN, page).await;
    Ok(parse(
        &page.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))?,
    ))
}

async fn get(address: SocketAddr) -> io::Result<String> {
    let mut stream = TcpStream::connect(address).await?;
    let request = b"GET /metrics HTTP/1.0\r\nHost: localhost\r\nAccept: text/plain\r\n\r\n";
    stream.write_all(request).await?;
    let mut page = String::new();
    stream.take(MAX_PAGE).read_to_string(&mut page).await?;
    Ok(page)
}

/// Returns the calls that a page counts, by provider. Other lines mean nothing to it.
fn parse(page: &str) -> Vec<Calls> {
    let mut all: BTreeMap<String, Calls> = BTreeMap::new();
    for line in page.lines() {
        let Some((labels, count)) = line
            .strip_prefix(COUNT)
            .and_then(|rest| rest.rsplit_once("} "))
        else {
            continue;
        };
        let label = |name: &str| {
            let mut labels = labels.split(',');
            labels.find_map(|label| {
                label
                    .strip_prefix(name)?
                    .strip_prefix("=\"")?
                    .strip_suffix('"')
            })
        };
        let (Some(provider), Some(outcome), Ok(count)) =
            (label("provider"), label("outcome"), count.trim().parse())
        else {
            continue;
        };
        let calls = all.entry(provider.to_owned()).or_insert_with(|| Calls {
            provider: provider.to_owned(),
            ..Calls::default()
        });
        match outcome {
            "OK" => calls.succeeded = count,
            _ => {
                calls.failed.insert(outcome.to_owned(), count);
            }
        }
    }
    all.into_values().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn calls_are_counted_by_provider_and_outcome() {
        let page = "HTTP/1.0 200 OK\r\n\r\n# HELP x\n\
            secrets_store_provider_call_duration_seconds_count{provider=\"vault\",outcome=\"OK\"} 7\n\
            secrets_store_provider_call_duration_seconds_count{provider=\"vault\",outcome=\"NOT_FOUND\"} 2\n\
            secrets_store_provider_call_duration_seconds_sum{provider=\"vault\",outcome=\"OK\"} 0.5\n\
            secrets_store_provider_call_duration_seconds_count{outcome=\"UNKNOWN\",provider=\"aws\"} 1\n";
        let calls = |provider: &str, succeeded, failed: &[(&str, u64)]| Calls {
            provider: provider.to_owned(),
            succeeded,
            failed: failed
                .iter()
                .map(|(code, count)| ((*code).to_owned(), *count))
                .collect(),
        };
        let expected = [
            calls("aws", 0, &[("UNKNOWN", 1)]),
            calls("vault", 7, &[("NOT_FOUND", 2)]),
        ];
        assert_eq!(parse(page), expected);
    }

    proptest! {
        #[test]
        fn any_page_is_read(lines in prop::collection::vec("(secrets_store_provider_call_duration_seconds_count\\{)?[a-z=\",} 0-9\\{]{0,40}", 0..8)) {
            parse(&lines.join("\n"));
        }
    }
}
