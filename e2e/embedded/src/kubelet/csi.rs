//! kubelet's side of CSI: a connection for each operation, a deadline for each call, and what an
//! error means for the volume.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use proto::csi::node_client::NodeClient;
use proto::csi::node_service_capability::{Type, rpc};
use proto::csi::{
    NodeGetCapabilitiesRequest, NodeGetInfoRequest, NodeGetInfoResponse, NodePublishVolumeRequest,
    NodeUnpublishVolumeRequest,
};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Code, Request, Status};

/// An error of a call, with kubelet's text and judgement.
#[derive(Clone, Debug)]
pub(crate) struct CallError {
    code: Code,
    message: String,
}

impl std::fmt::Display for CallError {
    /// Writes the text of grpc-go, which ends up in the pod's events.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "rpc error: code = {} desc = {}",
            go_name(self.code),
            self.message
        )
    }
}

impl CallError {
    /// Returns whether the driver may still have carried out, or be carrying out, the call: kubelet
    /// then keeps the volume's directory and calls again.
    pub(crate) fn is_uncertain(&self) -> bool {
        matches!(
            self.code,
            Code::Cancelled
                | Code::DeadlineExceeded
                | Code::Unavailable
                | Code::ResourceExhausted
                | Code::Aborted
        )
    }

    fn timed_out() -> Self {
        Self {
            code: Code::DeadlineExceeded,
            message: "context deadline exceeded".to_owned(),
        }
    }
}

impl From<Status> for CallError {
    fn from(status: Status) -> Self {
        use std::error::Error as _;
        // A status with a source was made here and not by the driver: the connection broke, or
        // the deadline in the request's own header was met. tonic names these otherwise than
        // the grpc-go in kubelet.
        let local = status.source().is_some();
        match status.code() {
            Code::Cancelled if status.message() == "Timeout expired" => Self::timed_out(),
            Code::Cancelled | Code::Unknown | Code::Internal if local => Self {
                code: Code::Unavailable,
                message: "error reading from server: EOF".to_owned(),
            },
            code => Self {
                code,
                message: status.message().to_owned(),
            },
        }
    }
}

/// A connection to a driver.
#[derive(Debug)]
pub(crate) struct Driver {
    client: NodeClient<Channel>,
    timeout: Duration,
}

impl Driver {
    /// Connects to the driver's socket; `timeout` bounds this and every call.
    pub(crate) async fn connect(socket: &Path, timeout: Duration) -> Result<Self, CallError> {
        let channel = connect(socket, timeout).await?;
        let client = NodeClient::new(channel);
        Ok(Self { client, timeout })
    }

    pub(crate) async fn node_info(&self) -> Result<NodeGetInfoResponse, CallError> {
        let mut client = self.client.clone();
        self.bounded(NodeGetInfoRequest {}, async |request| {
            client.node_get_info(request).await
        })
        .await
    }

    /// Returns whether the driver applies a pod's `fsGroup` itself (`VOLUME_MOUNT_GROUP`), for which
    /// kubelet asks before every publish.
    pub(crate) async fn mounts_groups(&self) -> Result<bool, CallError> {
        let mut client = self.client.clone();
        let response = self
            .bounded(NodeGetCapabilitiesRequest {}, async |request| {
                client.node_get_capabilities(request).await
            })
            .await?;
        let mut capabilities = response.capabilities.into_iter();
        Ok(capabilities.any(|capability| match capability.r#type {
            Some(Type::Rpc(call)) => call.r#type() == rpc::Type::VolumeMountGroup,
            _ => false,
        }))
    }

    pub(crate) async fn publish(&self, request: NodePublishVolumeRequest) -> Result<(), CallError> {
        let mut client = self.client.clone();
        self.bounded(request, async |request| {
            client.node_publish_volume(request).await
        })
        .await
        .map(drop)
    }

    pub(crate) async fn unpublish(
        &self,
        request: NodeUnpublishVolumeRequest,
    ) -> Result<(), CallError> {
        let mut client = self.client.clone();
        self.bounded(request, async |request| {
            client.node_unpublish_volume(request).await
        })
        .await
        .map(drop)
    }

    async fn bounded<Q, A>(
        &self,
        request: Q,
        call: impl AsyncFnOnce(Request<Q>) -> Result<tonic::Response<A>, Status>,
    ) -> Result<A, CallError> {
        let mut request = Request::new(request);
        request.set_timeout(self.timeout);
        match tokio::time::timeout(self.timeout, call(request)).await {
            Ok(Ok(response)) => Ok(response.into_inner()),
            Ok(Err(status)) => Err(status.into()),
            Err(_) => Err(CallError::timed_out()),
        }
    }
}

/// Opens a gRPC connection over a Unix socket, with the `:authority` `localhost`, as grpc-go does.
pub(crate) async fn connect(socket: &Path, timeout: Duration) -> Result<Channel, CallError> {
    connect_through(socket, timeout, |stream| stream).await
}

/// Does the same with a layer between the socket and the HTTP/2 library.
///
/// # Errors
/// Returns the errors of [`connect`].
pub(super) async fn connect_through<S>(
    socket: &Path,
    timeout: Duration,
    through: impl Fn(UnixStream) -> S + Clone + Send + 'static,
) -> Result<Channel, CallError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let path: PathBuf = socket.to_owned();
    let connector = tower::service_fn(move |_: Uri| {
        let (path, through) = (path.clone(), through.clone());
        async move {
            let stream = UnixStream::connect(path).await?;
            Ok::<_, io::Error>(TokioIo::new(through(stream)))
        }
    });
    let endpoint = Endpoint::from_static("http://localhost");
    let connecting = endpoint.connect_with_connector(connector);
    match tokio::time::timeout(timeout, connecting).await {
        Ok(Ok(channel)) => Ok(channel),
        Ok(Err(error)) => Err(CallError {
            code: Code::Unavailable,
            message: format!(
                "connection error: desc = \"transport: Error while dialing: dial unix {}: connect: {}\"",
                socket.display(),
                innermost(&error)
            ),
        }),
        Err(_) => Err(CallError::timed_out()),
    }
}

/// Returns the text of the last cause, as Go has it where it differs.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(deeper) = cause.source() {
        cause = deeper;
    }
    match cause
        .downcast_ref::<std::io::Error>()
        .map(std::io::Error::kind)
    {
        Some(std::io::ErrorKind::NotFound) => "no such file or directory".to_owned(),
        Some(std::io::ErrorKind::ConnectionRefused) => "connection refused".to_owned(),
        _ => cause.to_string(),
    }
}

/// Returns the name of a code in gRPC for Go.
fn go_name(code: Code) -> String {
    match code {
        Code::Ok => "OK".to_owned(),
        Code::Cancelled => "Canceled".to_owned(),
        other => format!("{other:?}"),
    }
}
