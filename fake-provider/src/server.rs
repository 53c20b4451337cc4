//! The server half of a provider: what each provider needs around the code that asks its store.
//!
//! A provider implements [`Provider`] and passes it to a [`Server`] with a [`Socket`]. The server
//! parses requests, answers `Version`, turns a [`Failure`] into what the driver understands, and
//! ends the calls when the process is told to stop. `examples/directory.rs` is a whole provider.
//!
//! The interface is [`provider.proto`](https://github.com/kubernetes-sigs/secrets-store-csi-driver/blob/main/provider/v1alpha1/service.proto)
//! of the Secrets Store CSI driver, served on a unix socket.

use std::fmt;
use std::future::Future;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::Request as HttpRequest;
use axum::middleware::{self, Next};
use axum::response::Response as HttpResponse;
use proto::provider::csi_driver_provider_server::{CsiDriverProvider, CsiDriverProviderServer};
use proto::provider::{File, MountRequest, VersionRequest, VersionResponse};
pub use proto::provider::{MountResponse, ObjectVersion};
use tokio::signal::unix::{SignalKind, signal};
use tokio_stream::wrappers::UnixListenerStream;
use tokio_stream::{Stream, StreamExt};
use tokio_util::sync::CancellationToken;
pub use tonic::Code;
use tonic::service::Routes;
use tonic::{Request as GrpcRequest, Response as GrpcResponse, Status};

mod request;
mod socket;

pub use request::{Pod, Request, Strings, TOKENS_KEY, Token};
pub use socket::Socket;

/// The time that calls under way have to end when the server is stopped.
pub const STOP_GRACE: Duration = Duration::from_secs(5);

/// The pause in accepting after the system had no descriptor or no memory.
const REST: Duration = Duration::from_millis(250);

/// The version of the provider interface.
pub const INTERFACE: &str = "v1alpha1";

/// The part of a provider that differs from others.
pub trait Provider: Send + Sync + 'static {
    /// Returns the provider's name and version. The server calls it for each `Version` call, which
    /// the driver uses as a health check.
    fn identity(&self) -> Identity;

    /// Fetches all objects of one volume. An answer is collected from [`Object`]s.
    ///
    /// The future is dropped when the driver no longer waits. Calls run concurrently.
    ///
    /// # Errors
    ///
    /// A [`Failure`], which the driver reports on the pod.
    fn mount(
        &self,
        request: Request,
    ) -> impl Future<Output = Result<MountResponse, Failure>> + Send;
}

impl<P: Provider> Provider for Arc<P> {
    fn identity(&self) -> Identity {
        P::identity(self)
    }

    fn mount(
        &self,
        request: Request,
    ) -> impl Future<Output = Result<MountResponse, Failure>> + Send {
        P::mount(self, request)
    }
}

/// The name and version of a provider, for people.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The provider's name.
    pub name: String,
    /// The version of its program.
    pub version: String,
}

/// One object of an answer: a file and its version. It has no [`Debug`](std::fmt::Debug), because
/// its content is secret.
#[derive(Clone, Default)]
pub struct Object {
    /// The object's name in the pod status, unique within the answer.
    pub id: String,
    /// The version that was fetched. It changes when the content does.
    pub version: String,
    /// The file's path below the volume's root: relative, without `.` and empty parts, and without
    /// parts that begin with `..`.
    pub path: String,
    /// The file's permission bits, or 0 to leave them to the driver.
    pub mode: u32,
    /// The file's content.
    pub contents: Vec<u8>,
}

impl FromIterator<Object> for MountResponse {
    fn from_iter<I: IntoIterator<Item = Object>>(objects: I) -> Self {
        let mut response = Self::default();
        for object in objects {
            response.object_version.push(ObjectVersion {
                id: object.id,
                version: object.version,
            });
            response.files.push(File {
                path: object.path,
                mode: object.mode.cast_signed(),
                contents: object.contents,
            });
        }
        response
    }
}

/// The reason why a volume cannot be mounted.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    /// A gRPC status. The driver tries again on [`Code::Unavailable`]. It shows the code and the
    /// beginning of the message on the pod, so the message says what the pod's owner can do. It
    /// must not contain a secret or a token.
    #[error("{}", .0.message())]
    Status(Status),
    /// An error code of the provider's own, in `MountResponse.error`. The driver counts failures
    /// by this code and has no message to show, so prefer a status.
    #[error("error code {0}")]
    ErrorCode(String),
}

impl Failure {
    /// Returns a failure with a gRPC code and a message.
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Self::Status(Status::new(code, message))
    }
}

/// The reason why a server cannot start or has to stop. `Debug` shows the same sentence as `Display`,
/// because a `main` that returns an error prints it with `Debug`.
#[derive(thiserror::Error)]
pub enum Error {
    /// Something that is not a socket is where the socket should be.
    #[error("{} exists and is not a socket; move it away or choose another path", .0.display())]
    NotASocket(PathBuf),
    /// The socket could not be made.
    #[error("cannot serve on {}: {source}", .path.display())]
    Socket {
        /// The socket's path.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The gRPC server failed while running.
    #[error("gRPC server: {0}")]
    Grpc(#[from] tonic::transport::Error),
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A provider and the socket it serves.
#[derive(Debug)]
pub struct Server<P> {
    socket: Socket,
    provider: P,
    requires_localhost: bool,
}

impl<P: Provider> Server<P> {
    /// Returns a server that answers once it [runs](Server::run).
    pub fn new(socket: Socket, provider: P) -> Self {
        Self {
            socket,
            provider,
            requires_localhost: false,
        }
    }

    /// Refuses callers whose `:authority` is not `localhost`. Drivers send `localhost`, as Go's
    /// gRPC client does for a unix socket; few providers check it.
    pub fn require_localhost(mut self) -> Self {
        self.requires_localhost = true;
        self
    }

    /// Serves until `stop` completes. Calls under way then have [`STOP_GRACE`] to end. The socket
    /// is removed last.
    ///
    /// # Errors
    ///
    /// [`Error::Grpc`] or [`Error::Socket`] if it cannot serve.
    pub async fn run(mut self, stop: impl Future<Output = ()>) -> Result<(), Error> {
        tracing::info!(socket = %self.socket.path().display(), "serving");
        let stopping = CancellationToken::new();
        let service = CsiDriverProviderServer::new(Service(self.provider));
        let mut routes = Routes::new(service);
        if self.requires_localhost {
            let router = routes.into_axum_router();
            routes = Routes::from(router.layer(middleware::from_fn(refuse_other_authorities)));
        }
        let serving = tonic::transport::Server::builder()
            .add_routes(routes)
            .serve_with_incoming_shutdown(
                resting(UnixListenerStream::new(self.socket.take_listener()?)),
                stopping.clone().cancelled_owned(),
            );
        let grace_is_over = async {
            stop.await;
            stopping.cancel();
            tokio::time::sleep(STOP_GRACE).await;
        };
        tokio::select! {
            ended = serving => {
                ended?;
                tracing::info!("stopped");
            }
            () = grace_is_over => tracing::warn!(grace = ?STOP_GRACE, "stopped with connections still open"),
        }
        Ok(())
    }
}

/// Adds a pause after each connection that could not be accepted. Without it, a process without
/// free descriptors would try again all the time.
fn resting<C>(connections: impl Stream<Item = io::Result<C>>) -> impl Stream<Item = io::Result<C>> {
    connections.then(|connection| async {
        if let Err(error) = &connection {
            tracing::warn!(%error, "no connection can be accepted at the moment; trying again");
            tokio::time::sleep(REST).await;
        }
        connection
    })
}

/// Returns a future that completes when the process gets SIGTERM or SIGINT.
///
/// # Errors
///
/// The system's error if the signals cannot be handled.
pub fn termination() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        tracing::info!("stopping");
    })
}

async fn refuse_other_authorities(request: HttpRequest, next: Next) -> HttpResponse {
    match request.uri().authority() {
        Some(authority) if authority.as_str() == "localhost" => next.run(request).await,
        other => {
            let sent = other.map_or("nothing", |authority| authority.as_str());
            tracing::warn!(authority = sent, "refused a caller");
            Status::unknown(format!(":authority must be localhost, got {sent}")).into_http()
        }
    }
}

/// The gRPC service around a provider.
struct Service<P>(P);

#[tonic::async_trait]
impl<P: Provider> CsiDriverProvider for Service<P> {
    async fn version(
        &self,
        _: GrpcRequest<VersionRequest>,
    ) -> Result<GrpcResponse<VersionResponse>, Status> {
        let Identity { name, version } = self.0.identity();
        Ok(GrpcResponse::new(VersionResponse {
            version: INTERFACE.to_owned(),
            runtime_name: name,
            runtime_version: version,
        }))
    }

    async fn mount(
        &self,
        request: GrpcRequest<MountRequest>,
    ) -> Result<GrpcResponse<MountResponse>, Status> {
        let answer = match Request::parse(request.into_inner()) {
            Ok(request) => self.0.mount(request).await,
            Err(failure) => Err(failure),
        };
        match answer {
            Ok(response) => {
                tracing::debug!(files = response.files.len(), "Mount");
                Ok(GrpcResponse::new(response))
            }
            Err(Failure::ErrorCode(code)) => {
                tracing::info!(error_code = code, "Mount failed");
                Ok(GrpcResponse::new(MountResponse {
                    error: Some(proto::provider::Error { code }),
                    ..MountResponse::default()
                }))
            }
            Err(Failure::Status(status)) => {
                tracing::info!(code = ?status.code(), reason = status.message(), "Mount failed");
                Err(status)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn accepting_rests_after_an_error_and_goes_on() {
        let arrived = [Ok(1), Err(io::Error::from_raw_os_error(24)), Ok(2)];
        let started = std::time::Instant::now();
        let accepted: Vec<_> = resting(tokio_stream::iter(arrived)).collect().await;
        let numbers: Vec<_> = accepted.into_iter().filter_map(Result::ok).collect();
        assert_eq!(numbers, [1, 2]);
        assert!(started.elapsed() >= REST);
    }
}
