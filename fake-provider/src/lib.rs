//! A provider to test and to try the driver with: a gRPC server of
//! `v1alpha1.CSIDriverProvider` on a unix socket. It serves the objects it is told to,
//! rotates them, and misbehaves on request. It holds no real secret and guards none.
//!
//! Without any of the extensions below it answers as the provider of upstream's end-to-end
//! tests does: `foo` is `secret`, `fookey` is a mock public key, any other name is empty;
//! and it refuses callers whose `:authority` is not `localhost`.
//!
//! # The class parameter `objects`
//!
//! YAML with one key, `array`. Each entry is a map, or a string that is YAML of that map:
//!
//! | key | meaning |
//! |---|---|
//! | `objectName` | the object's name; its version's id is `secret/<objectName>` |
//! | `objectVersion` | ignored |
//! | `path` | the file's path, exactly as sent to the driver; default `objectName` |
//! | `mode` | octal digits, quoted or not; default 0, which on the wire means "none given" |
//! | `version` | default `v1` |
//! | `content` | the content as text |
//! | `contentBase64` | the content as base64 |
//! | `contentSize` | that many bytes of a fixed pattern |
//! | `contentFrom` | what the driver sent: `attributes`, `secrets`, `permission`, `targetPath` or `currentObjectVersion`; service account tokens appear as `<token>`; `tokenClaims`, for whom each token is, and `tokenDigests`, in which a renewal shows |
//!
//! An entry without a `content…` key is looked up in what was set over HTTP and in
//! [`Options::objects`], then in upstream's
//! table. Only objects of that table rotate on `/rotation`; all others change when the class
//! or the file changes, which is read again at every Mount, a directory as a whole: nothing is
//! watched, and nothing is remembered. If the class has no `objects`, all of [`Options::objects`] is served.
//!
//! # The class parameter `faults`
//!
//! A YAML list of maps; the same YAML can be put to `/faults` at run time for all classes:
//!
//! | key | meaning |
//! |---|---|
//! | `object` | only when this object is asked for |
//! | `times` | only in the first so many calls that one pod makes for one class |
//! | `delay` | wait first, for example `2s` or `1m30s` |
//! | `crash` | the process exits in mid-call |
//! | `hang` | never answer |
//! | `status` | fail with `{code: UNAVAILABLE, message: "..."}` |
//! | `errorCode` | succeed with `MountResponse.error.code` and nothing else |
//! | `badPath` | this path for the file of `object`, or for one more file |
//! | `oversize` | one more file, `oversize`, of that many bytes |
//! | `missingVersions` | no `object_version` |
//! | `writeFiles` | write the files below the target path, answer without files |
//!
//! # HTTP
//!
//! `/rotation?rotated=true` and `/validate-token-requests?audience=a,b` as upstream, and
//! `/objects?name=a&content=b` with an optional `&version=c`, which sets an object that goes before
//! those of [`Options::objects`], `/calls` (JSON), `/calls/reset`, `/faults` (PUT, DELETE).
//!
//! # The modules
//!
//! [`serve`] wires them: `socket` is the unix socket's life, `provider` answers the calls,
//! `objects`, `source` and `tokens` say what an object holds, `faults` what goes wrong, `calls` counts,
//! `control` is HTTP.

use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::extract::Request;
use axum::middleware::{self, Next};
use axum::response::Response;
use proto::provider::csi_driver_provider_server::CsiDriverProviderServer;
use tokio::net::TcpListener;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tonic::service::Routes;

mod calls;
mod control;
mod faults;
mod objects;
mod provider;
mod socket;
mod source;
mod tokens;

use provider::Provider;
use socket::Socket;
use source::Source;

/// How long calls that are under way when the provider is stopped may take to end.
const STOP_GRACE: Duration = Duration::from_secs(5);

/// What a provider is started with.
#[derive(Clone, Debug)]
pub struct Options {
    /// The unix socket to serve on, `<provider directory>/<provider name>.sock`. Missing
    /// parent directories are created; a stale socket is replaced.
    pub socket: PathBuf,
    /// Where to serve HTTP: `host:port`, or `:port` for all addresses. `None` for no HTTP.
    pub http_addr: Option<String>,
    /// A YAML file (list of `name`, `content` or `contentBase64`, `mode`, `version`) or a
    /// directory, in which every file is an object. Read again at every Mount.
    pub objects: Option<PathBuf>,
    /// Audiences, separated by commas, for which each Mount must bring a service account
    /// token. Empty to ask for none.
    pub token_audiences: String,
}

impl Options {
    /// Serves on `socket`, with no HTTP, upstream's objects and no demand for tokens.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            http_addr: None,
            objects: None,
            token_audiences: String::new(),
        }
    }
}

/// Why the provider could not start or had to stop.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// `--endpoint` is not a `unix://` URL with a path.
    #[error("endpoint {0:?} must be unix:// followed by the path of the socket")]
    Endpoint(String),
    /// `--name` cannot be the name of a provider's socket.
    #[error("provider name {0:?} must be a plain file name")]
    Name(String),
    /// Something that is not a socket is where the socket should be.
    #[error("{} exists and is not a socket; move it away or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error("cannot serve on {}: {source}", .path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The HTTP address could not be bound.
    #[error("cannot serve HTTP on {addr}: {source}")]
    Http {
        /// The address as given.
        addr: String,
        /// What the system said.
        source: io::Error,
    },
    /// [`Options::objects`] cannot be read or understood.
    #[error("objects in {}: {reason}", .path.display())]
    Objects {
        /// The file or directory at fault.
        path: PathBuf,
        /// What is wrong with it; never any of its content.
        reason: String,
    },
    /// The gRPC server failed while running.
    #[error("gRPC server: {0}")]
    Grpc(#[from] tonic::transport::Error),
}

/// The socket's path out of an endpoint as upstream's provider takes it,
/// `unix:///provider/e2e-provider.sock`.
///
/// # Errors
///
/// [`Error::Endpoint`] for any other scheme, or no path.
pub fn socket_of_endpoint(endpoint: &str) -> Result<PathBuf, Error> {
    match endpoint.strip_prefix("unix://") {
        Some(path) if !path.is_empty() => Ok(PathBuf::from(path)),
        _ => Err(Error::Endpoint(endpoint.to_owned())),
    }
}

/// The socket's path for provider `name` in the provider directory `dir`, where the driver
/// looks for it.
///
/// # Errors
///
/// [`Error::Name`] if `name` is empty, `.`, `..` or has a slash.
pub fn socket_of_name(dir: &Path, name: &str) -> Result<PathBuf, Error> {
    if name.is_empty() || name == "." || name == ".." || name.contains('/') {
        return Err(Error::Name(name.to_owned()));
    }
    Ok(dir.join(format!("{name}.sock")))
}

/// Serves until `stop` is cancelled, then lets calls end and removes the socket.
///
/// The fault `crash` ends the whole process, so a test that uses it runs the binary instead.
///
/// # Errors
///
/// Any [`Error`] that keeps it from starting, or ends it early.
pub async fn serve(options: Options, stop: CancellationToken) -> Result<(), Error> {
    bind(options).await?.run(stop).await
}

/// A provider whose addresses are bound, so that callers can connect. Its socket is removed
/// when it is dropped.
#[derive(Debug)]
pub struct Bound {
    socket: Socket,
    http: Option<TcpListener>,
    source: Option<Source>,
    token_audiences: String,
}

/// The first half of [`serve`]: everything that can fail because of the options.
///
/// # Errors
///
/// As [`serve`].
pub async fn bind(options: Options) -> Result<Bound, Error> {
    let source = options.objects.map(Source::new);
    if let Some(source) = &source {
        source.read().await?;
    }
    let http = match options.http_addr {
        Some(addr) => Some(
            listen_http(&addr)
                .await
                .map_err(|source| Error::Http { addr, source })?,
        ),
        None => None,
    };
    let socket = Socket::bind(options.socket)?;
    Ok(Bound {
        socket,
        http,
        source,
        token_audiences: options.token_audiences,
    })
}

impl Bound {
    /// Where HTTP is served, with the real port if the options said port 0.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http
            .as_ref()
            .and_then(|listener| listener.local_addr().ok())
    }

    /// The second half of [`serve`].
    ///
    /// # Errors
    ///
    /// As [`serve`].
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), Error> {
        let http_addr = self.http_addr();
        let provider = Arc::new(Provider::new(
            self.source,
            self.token_audiences,
            stop.clone(),
        ));
        tracing::info!(socket = %self.socket.path().display(), http = ?http_addr, "serving");

        let grpc = tonic::transport::Server::builder()
            .add_routes(grpc_routes(Arc::clone(&provider)))
            .serve_with_incoming_shutdown(
                UnixListenerStream::new(self.socket.take_listener()?),
                stop.clone().cancelled_owned(),
            );
        let http = async {
            let Some(listener) = self.http else {
                return Ok(());
            };
            axum::serve(listener, control::router(provider))
                .with_graceful_shutdown(stop.clone().cancelled_owned())
                .await
                .map_err(|source| Error::Http {
                    addr: http_addr.map(|addr| addr.to_string()).unwrap_or_default(),
                    source,
                })
        };
        let grace_is_over = async {
            stop.cancelled().await;
            tokio::time::sleep(STOP_GRACE).await;
        };

        tokio::select! {
            ended = async { tokio::try_join!(async { Ok(grpc.await?) }, http) } => {
                ended?;
                tracing::info!("stopped");
            }
            () = grace_is_over => tracing::warn!(grace = ?STOP_GRACE, "stopped with connections still open"),
        }
        Ok(())
    }
}

/// `:8080` means all addresses, as in Go: IPv6 and IPv4, or IPv4 alone on a host without IPv6.
async fn listen_http(addr: &str) -> io::Result<TcpListener> {
    if !addr.starts_with(':') {
        return TcpListener::bind(addr).await;
    }
    match TcpListener::bind(format!("[::]{addr}")).await {
        Err(error) if error.kind() != io::ErrorKind::AddrInUse => {
            TcpListener::bind(format!("0.0.0.0{addr}")).await
        }
        bound => bound,
    }
}

fn grpc_routes(provider: Arc<Provider>) -> Routes {
    let service = CsiDriverProviderServer::from_arc(provider);
    let router = Routes::new(service)
        .into_axum_router()
        .layer(middleware::from_fn(require_localhost));
    Routes::from(router)
}

/// Go's gRPC client sends `localhost` for a unix socket, and upstream's provider insists on it.
/// A driver that sends anything else would fail with some real providers, so it must fail here.
async fn require_localhost(request: Request, next: Next) -> Response {
    match request.uri().authority() {
        Some(authority) if authority.as_str() == "localhost" => next.run(request).await,
        other => {
            let sent = other.map_or("nothing", |authority| authority.as_str());
            tracing::warn!(authority = sent, "refused a caller");
            Status::unknown(format!(":authority must be localhost, got {sent}")).into_http()
        }
    }
}

/// Locks, also after a panic elsewhere: all that is guarded so is whole between statements.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use rstest::rstest;

    #[rstest]
    #[case(
        "unix:///provider/e2e-provider.sock",
        Some("/provider/e2e-provider.sock")
    )]
    #[case("unix://run/x.sock", Some("run/x.sock"))]
    #[case("unix://", None)]
    #[case("unix:/run/x.sock", None)]
    #[case("tcp://127.0.0.1:1", None)]
    #[case("/run/x.sock", None)]
    fn only_unix_endpoints_are_taken(#[case] endpoint: &str, #[case] socket: Option<&str>) {
        assert_eq!(socket_of_endpoint(endpoint).ok(), socket.map(PathBuf::from));
    }

    #[rstest]
    #[case("fake", Some("/p/fake.sock"))]
    #[case("", None)]
    #[case("..", None)]
    #[case("a/b", None)]
    fn a_name_stays_in_its_directory(#[case] name: &str, #[case] socket: Option<&str>) {
        assert_eq!(
            socket_of_name(Path::new("/p"), name).ok(),
            socket.map(PathBuf::from)
        );
    }

    #[tokio::test]
    async fn a_port_alone_means_all_addresses() {
        let listener = listen_http(":0").await.unwrap();
        assert!(listener.local_addr().unwrap().ip().is_unspecified());
    }
}
