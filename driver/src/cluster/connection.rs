//! The connections to the API server. Whoever answers there does not decide how much of this process's time
//! an answer takes.
//!
//! The HTTP library reads interim answers (`100 Continue`) and the digits of a chunk's size for as long as there
//! are any, and does nothing else meanwhile. So what is read after each request is bounded, and a connection
//! without a pause lets others have their turn.

use std::{
    error::Error as StdError,
    fmt, io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use http::Uri;
use http_body_util::{LengthLimitError, Limited};
use hyper::rt::{Read, ReadBuf, ReadBufCursor, Write};
use hyper_util::{
    client::legacy::{
        self,
        connect::{Connected, Connection},
    },
    rt::TokioExecutor,
};
use kube::{
    Client, Config,
    client::{Body, ConfigExt as _, retry::RetryPolicy},
};
use tower::{
    BoxError, Layer as _, Service, ServiceExt as _, retry::RetryLayer, util::option_layer,
};
use zeroize::Zeroizing;

use super::request::{LARGEST_ANSWER, MAX_REQUESTS};

/// The most bytes that are read after a request: an answer with its heads, and the sizes of its chunks.
const LARGEST_EXCHANGE: usize = LARGEST_ANSWER + LARGEST_ANSWER / 4;

/// The time limit of a connection and its TLS handshake.
const CONNECTED_WITHIN: Duration = Duration::from_secs(30);

/// The bytes that are read at once before others have their turn.
const LARGEST_RUN: usize = 256 * 1024;

/// The bytes that one call reads.
const LARGEST_READ: usize = 16 * 1024;

/// Says that more than [`LARGEST_EXCHANGE`] bytes came after a request.
#[derive(Debug)]
struct TooLong;

impl fmt::Display for TooLong {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "more than {LARGEST_EXCHANGE} bytes came after a request")
    }
}

impl StdError for TooLong {}

/// Returns whether the innermost cause of a failure is that an answer is larger than any object.
pub(super) fn is_too_long(innermost: &(dyn StdError + 'static)) -> bool {
    let io = innermost.downcast_ref::<io::Error>();
    let inner = io.and_then(io::Error::get_ref);
    innermost.is::<LengthLimitError>() || inner.is_some_and(|inner| inner.is::<TooLong>())
}

/// Makes a client of an API server, as [`kube::client::ClientBuilder`] does, with bounded connections.
///
/// # Errors
/// When the configuration has credentials or certificates that cannot be used, or asks for a proxy.
pub(super) fn connect(config: &Config) -> Result<Client, BoxError> {
    if let Some(proxy) = &config.proxy_url {
        let scheme = proxy.scheme_str().unwrap_or("unknown");
        return Err(format!("proxy-url: proxies ({scheme}) are not supported").into());
    }
    let connector = BoundedConnector(config.rustls_https_connector()?);
    // More requests run at a time only while some hang, and each connection takes memory.
    let client: legacy::Client<_, Body> = legacy::Client::builder(TokioExecutor::new())
        .pool_max_idle_per_host(MAX_REQUESTS)
        .build(connector);
    let service = config
        .extra_headers_layer()?
        .layer(client.map_err(BoxError::from));
    let service = option_layer(config.auth_layer()?).layer(service);
    let service = RetryLayer::new(RetryPolicy::server_retry()).layer(service);
    let service = config.base_uri_layer().layer(service);
    let service = service.map_response(|answer: http::Response<_>| {
        answer.map(|body| Limited::new(body, LARGEST_ANSWER))
    });
    Ok(Client::new(service, config.default_namespace.clone()))
}

/// Makes connections that are bounded.
#[derive(Clone)]
struct BoundedConnector<C>(C);

impl<C> Service<Uri> for BoundedConnector<C>
where
    C: Service<Uri, Error = BoxError>,
    C::Future: Send + 'static,
{
    type Response = Bounded<C::Response>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.0.call(uri);
        // The library goes on with a connection that no request waits for any more.
        let connecting = tokio::time::timeout(CONNECTED_WITHIN, connecting);
        Box::pin(async move { Ok(Bounded::new(connecting.await??)) })
    }
}

/// A connection of which a bounded number of bytes is read after each request.
struct Bounded<S> {
    stream: S,
    /// The bytes that have been read since the last write.
    read: usize,
    /// The bytes that have been read since others had their turn.
    run: usize,
}

impl<S> Bounded<S> {
    fn new(stream: S) -> Self {
        let (read, run) = (0, 0);
        Self { stream, read, run }
    }
}

impl<S: Read + Unpin> Read for Bounded<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut into: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read > LARGEST_EXCHANGE {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, TooLong)));
        }
        if self.run > LARGEST_RUN {
            self.run = 0;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        // An answer may be a Secret.
        let mut bytes = Zeroizing::new([0; LARGEST_READ]);
        let room = into.remaining().min(LARGEST_READ);
        let mut part = ReadBuf::new(bytes.get_mut(..room).unwrap_or_default());
        let read = Pin::new(&mut self.stream).poll_read(context, part.unfilled());
        if read.is_pending() {
            self.run = 0;
        }
        ready!(read)?;
        into.put_slice(part.filled());
        self.read += part.filled().len();
        self.run += part.filled().len();
        Poll::Ready(Ok(()))
    }
}

impl<S: Write + Unpin> Write for Bounded<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.read = 0;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.read = 0;
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

impl<S: Connection> Connection for Bounded<S> {
    fn connected(&self) -> Connected {
        self.stream.connected()
    }
}
