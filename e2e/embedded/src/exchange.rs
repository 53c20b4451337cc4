//! HTTP without TLS, one connection for each request.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper_util::rt::TokioIo;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

/// The deadline of [`get`].
const GET_TIMEOUT: Duration = Duration::from_secs(10);

/// An answer over HTTP.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HttpAnswer {
    /// The status code.
    pub status: u16,
    /// The body as text.
    pub body: String,
}

/// Sends a GET without TLS.
///
/// # Errors
/// A sentence that names the address when there is no answer within ten seconds.
pub async fn get(address: SocketAddr, path: &str) -> Result<HttpAnswer, String> {
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
    let (status, body) = tokio::time::timeout(GET_TIMEOUT, exchanged)
        .await
        .map_err(|_| failed(format!("no answer within {GET_TIMEOUT:?}")))?
        .map_err(failed)?;
    Ok(HttpAnswer {
        status: status.as_u16(),
        body: String::from_utf8_lossy(&body).into_owned(),
    })
}

/// Sends one request over a connection and returns its answer.
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
    // It ends with the exchange; the sender hears of its errors, too.
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
