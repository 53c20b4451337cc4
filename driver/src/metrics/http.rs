//! Serves `/metrics` and `/healthz`, each on its own address.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use http::{HeaderMap, HeaderValue, StatusCode, header};
use proto::csi::ProbeRequest;
use proto::csi::identity_client::IdentityClient;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tonic::transport;

use super::page::Format;
use super::{Metrics, server};
use crate::config::Endpoint;

/// The time that connecting to the CSI socket and the answer to `Probe` may take together. kubelet
/// gives up on `/healthz` after ten seconds.
const PROBE_TIMEOUT: Duration = Duration::from_secs(3);

/// Opens a listening socket for [`serve`] or [`serve_health`]. The unspecified IPv6 address means
/// IPv6 and IPv4, and IPv4 alone if the kernel has no IPv6.
///
/// # Errors
/// Fails if the address is in use, or is not an address of this machine.
pub async fn listen(addr: SocketAddr) -> io::Result<TcpListener> {
    match TcpListener::bind(addr).await {
        Err(error)
            if addr.ip() == Ipv6Addr::UNSPECIFIED
                && error.raw_os_error() == Some(libc::EAFNOSUPPORT) =>
        {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, addr.port())).await
        }
        result => result,
    }
}

/// Serves `/metrics` until `stop`, in the format that a request accepts.
///
/// # Errors
/// Fails if the listener ends.
pub async fn serve(
    listener: TcpListener,
    metrics: Metrics,
    stop: CancellationToken,
) -> io::Result<()> {
    let page = move |headers: &HeaderMap| {
        let format = Format::accepted(headers);
        let text = metrics.page(format);
        let mut page = server::text(StatusCode::OK, format.content_type(), text);
        let vary = HeaderValue::from_static("accept");
        page.headers_mut().insert(header::VARY, vary);
        std::future::ready(page)
    };
    server::serve(listener, "/metrics", page, stop).await
}

/// Serves `/healthz` until `stop`, as the livenessprobe sidecar does: each request opens a new
/// connection to the driver's CSI endpoint and calls `Probe`.
///
/// # Errors
/// Fails if the listener ends.
pub async fn serve_health(
    listener: TcpListener,
    csi: Endpoint,
    stop: CancellationToken,
) -> io::Result<()> {
    let page = move |_: &HeaderMap| {
        let csi = csi.clone();
        async move {
            match probe(&csi).await {
                Ok(()) => server::text(StatusCode::OK, server::PLAIN, "ok".to_owned()),
                Err(reason) => {
                    tracing::warn!(%reason, "not healthy");
                    server::text(StatusCode::INTERNAL_SERVER_ERROR, server::PLAIN, reason)
                }
            }
        }
    };
    server::serve(listener, "/healthz", page, stop).await
}

/// Calls `Probe` at the driver's CSI endpoint. An absent `ProbeResponse.ready` means ready, as the
/// CSI specification says.
async fn probe(csi: &Endpoint) -> Result<(), String> {
    let uri = match csi {
        Endpoint::Unix(path) => format!("unix://{}", path.display()),
        Endpoint::Tcp(addr) => format!("http://{addr}"),
    };
    let asked = async {
        let channel = transport::Endpoint::from_shared(uri)
            .map_err(|error| format!("the CSI endpoint has no usable address: {error}"))?
            .connect()
            .await
            .map_err(|error| format!("cannot connect to the CSI endpoint: {}", chain(&error)))?;
        let answer = IdentityClient::new(channel).probe(ProbeRequest {}).await;
        answer.map_err(|status| {
            format!(
                "the CSI endpoint answered {:?}: {}",
                status.code(),
                status.message()
            )
        })
    };
    let response = tokio::time::timeout(PROBE_TIMEOUT, asked)
        .await
        .map_err(|_| {
            format!(
                "the CSI endpoint did not answer within {} s",
                PROBE_TIMEOUT.as_secs()
            )
        })??;
    match response.into_inner().ready {
        Some(false) => Err("the CSI endpoint answered that it is not ready".to_owned()),
        Some(true) | None => Ok(()),
    }
}

/// Returns an error and its causes in one line. tonic's own text is only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::csi::ProbeResponse;
    use proto::csi::identity_server::{Identity, IdentityServer};
    use rstest::rstest;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::{TcpStream, UnixListener};
    use tokio_stream::wrappers::UnixListenerStream;
    use tonic::{Request, Response, Status};

    /// Returns the status and the whole text of an answer.
    async fn http_get(addr: SocketAddr, path: &str) -> (u16, String) {
        http_get_with(addr, path, "").await
    }

    /// Sends a request with more header fields, each with a line end.
    async fn http_get_with(addr: SocketAddr, path: &str, fields: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(addr).await.unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: x\r\n{fields}Connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        (answer.split(' ').nth(1).unwrap().parse().unwrap(), answer)
    }

    async fn local() -> (TcpListener, SocketAddr) {
        let listener = listen("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let addr = listener.local_addr().unwrap();
        (listener, addr)
    }

    #[tokio::test]
    async fn metrics_are_served_until_stopped() {
        let (listener, addr) = local().await;
        let (metrics, stop) = (Metrics::new(), CancellationToken::new());
        let server = tokio::spawn(serve(listener, metrics.clone(), stop.clone()));
        metrics.unpublish().succeeded();
        let (status, answer) = http_get(addr, "/metrics").await;
        assert_eq!(status, 200);
        assert!(answer.contains("node_unpublish_total{"), "{answer}");
        let plain = "content-type: text/plain; version=0.0.4";
        assert!(answer.contains(plain), "{answer}");
        let accept = "Accept: text/plain;q=0.4\r\nAccept: application/openmetrics-text;q=0.5\r\n";
        let (status, answer) = http_get_with(addr, "/metrics", accept).await;
        assert_eq!(status, 200);
        let openmetrics = "content-type: application/openmetrics-text; version=1.0.0";
        assert!(answer.contains(openmetrics), "{answer}");
        assert!(answer.ends_with("# EOF\n"), "{answer}");
        assert_eq!(http_get(addr, "/").await.0, 404);
        stop.cancel();
        server.await.unwrap().unwrap();
        assert!(TcpStream::connect(addr).await.is_err());
    }

    #[tokio::test]
    async fn a_silent_client_does_not_hold_up_the_end() {
        let (listener, addr) = local().await;
        let stop = CancellationToken::new();
        let server = tokio::spawn(serve(listener, Metrics::new(), stop.clone()));
        let mut client = TcpStream::connect(addr).await.unwrap();
        client.write_all(b"GET /metr").await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        stop.cancel();
        tokio::time::timeout(Duration::from_secs(20), server)
            .await
            .unwrap()
            .unwrap()
            .unwrap();
    }

    #[derive(Clone, Copy)]
    enum Probed {
        Ready(Option<bool>),
        Refuse,
        Hang,
    }

    struct FakeCsi(Probed);

    #[tonic::async_trait]
    impl Identity for FakeCsi {
        async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
            match self.0 {
                Probed::Ready(ready) => Ok(Response::new(ProbeResponse { ready })),
                Probed::Refuse => Err(Status::failed_precondition("no API server")),
                Probed::Hang => std::future::pending().await,
            }
        }
    }

    #[rstest]
    #[case::ready_absent(Some(Probed::Ready(None)), 200, "ok")]
    #[case::ready(Some(Probed::Ready(Some(true))), 200, "ok")]
    #[case::not_ready(
        Some(Probed::Ready(Some(false))),
        500,
        "the CSI endpoint answered that it is not ready"
    )]
    #[case::error(
        Some(Probed::Refuse),
        500,
        "the CSI endpoint answered FailedPrecondition: no API server"
    )]
    #[case::hang(Some(Probed::Hang), 500, "the CSI endpoint did not answer within 3 s")]
    #[case::gone(None, 500, "No such file or directory (os error 2)")]
    #[tokio::test]
    async fn health_is_what_our_own_socket_answers(
        #[case] answer: Option<Probed>,
        #[case] status: u16,
        #[case] end: &str,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("csi.sock");
        if let Some(answer) = answer {
            let incoming = UnixListenerStream::new(UnixListener::bind(&socket).unwrap());
            let csi =
                transport::Server::builder().add_service(IdentityServer::new(FakeCsi(answer)));
            tokio::spawn(csi.serve_with_incoming(incoming));
        }
        let (listener, addr) = local().await;
        tokio::spawn(serve_health(
            listener,
            Endpoint::Unix(socket),
            CancellationToken::new(),
        ));
        assert_eq!(http_get(addr, "/metrics").await.0, 404);
        let started = tokio::time::Instant::now();
        let (got, text) = http_get(addr, "/healthz").await;
        assert_eq!(got, status, "{text}");
        assert!(text.ends_with(end), "{text}");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
}
