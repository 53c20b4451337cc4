//! Looking at the machine this process runs on, or at the namespaces it is in: mount points, and
//! what listens on an address.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

use crate::cluster::HttpAnswer;

/// For an answer of something that runs on this machine.
const FETCH_TIMEOUT: Duration = Duration::from_secs(10);

/// Mount points at and below a path, in the order they were mounted.
///
/// # Errors
/// When the kernel's table cannot be read.
pub(crate) fn mount_points(below: &Path) -> io::Result<Vec<PathBuf>> {
    let table = std::fs::read_to_string("/proc/self/mountinfo")?;
    Ok(mount_points_in(&table, below))
}

/// The same of a table that was read elsewhere.
pub(crate) fn mount_points_in(table: &str, below: &Path) -> Vec<PathBuf> {
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|path| PathBuf::from(unescape(path)))
        .filter(|path| path.starts_with(below))
        .collect()
}

/// Undoes the kernel's `\040` for characters that would break its columns.
fn unescape(path: &str) -> String {
    [
        ("\\040", " "),
        ("\\011", "\t"),
        ("\\012", "\n"),
        ("\\134", "\\"),
    ]
    .iter()
    .fold(path.to_owned(), |path, (code, character)| {
        path.replace(code, character)
    })
}

/// A GET without TLS. The error is a sentence.
pub(crate) async fn fetch(address: SocketAddr, path: &str) -> Result<HttpAnswer, String> {
    let failed = |reason: String| format!("GET http://{address}{path}: {reason}");
    let request = Request::get(path)
        .header(header::HOST, address.to_string())
        .body(Full::default())
        .map_err(|error| failed(error.to_string()))?;
    let exchanged = async {
        let stream = TcpStream::connect(address)
            .await
            .map_err(|error| error.to_string())?;
        exchange(stream, request).await
    };
    let (status, body) = tokio::time::timeout(FETCH_TIMEOUT, exchanged)
        .await
        .map_err(|_| failed(format!("no answer within {FETCH_TIMEOUT:?}")))?
        .map_err(failed)?;
    Ok(HttpAnswer {
        status: status.as_u16(),
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// One request and its answer over a connection of their own.
pub(crate) async fn exchange<S>(
    stream: S,
    request: Request<Full<Bytes>>,
) -> Result<(StatusCode, Bytes), String>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let io = TokioIo::new(stream);
    let (mut sender, connection) = hyper::client::conn::http1::handshake(io)
        .await
        .map_err(|error| error.to_string())?;
    // Ends with the exchange; what went wrong with it is told to the sender as well.
    let connection = tokio::spawn(connection);
    let answer = async {
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        Ok((status, answer.into_body().collect().await?.to_bytes()))
    };
    let answer: hyper::Result<_> = answer.await;
    connection.abort();
    answer.map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_below_a_path_are_told_from_its_neighbours() {
        let table = "\
            1 0 8:1 / / rw - ext4 /dev/sda rw\n\
            2 1 0:9 / /var/lib/kubelet/pods/u/mount rw shared:1 - tmpfs tmpfs rw\n\
            3 1 0:9 / /var/lib/kubelet/pods/a\\040b rw - tmpfs tmpfs rw\n\
            4 1 0:9 / /var/lib/kubelet/pods-too rw - tmpfs tmpfs rw\n";
        assert_eq!(
            mount_points_in(table, Path::new("/var/lib/kubelet/pods")),
            [
                Path::new("/var/lib/kubelet/pods/u/mount"),
                Path::new("/var/lib/kubelet/pods/a b")
            ]
        );
    }
}
