//! Serves the CSI Identity and Node services on the driver's socket.
//!
//! This module checks the form of requests, parses them into a `PublishRequest` or an
//! `UnpublishRequest`, and turns an `Error` into a status. Each call gets one span, one log line for
//! its end, and one metrics guard, which counts a failure unless it is told otherwise.
//!
//! A call's work runs in a task of its own: a caller that goes away cannot leave an unfinished
//! volume behind, and a panic answers only its own call, with UNAVAILABLE.

mod request;

use std::{collections::HashMap, io, sync::Arc, time::Duration};

use proto::csi::{
    GetPluginCapabilitiesRequest, GetPluginCapabilitiesResponse, GetPluginInfoRequest,
    GetPluginInfoResponse, NodeExpandVolumeRequest, NodeExpandVolumeResponse,
    NodeGetCapabilitiesRequest, NodeGetCapabilitiesResponse, NodeGetInfoRequest,
    NodeGetInfoResponse, NodeGetVolumeStatsRequest, NodeGetVolumeStatsResponse,
    NodePublishVolumeRequest, NodePublishVolumeResponse, NodeServiceCapability,
    NodeStageVolumeRequest, NodeStageVolumeResponse, NodeUnpublishVolumeRequest,
    NodeUnpublishVolumeResponse, NodeUnstageVolumeRequest, NodeUnstageVolumeResponse, ProbeRequest,
    ProbeResponse,
    identity_server::{Identity, IdentityServer},
    node_server::{Node, NodeServer},
    node_service_capability::{self, Rpc, rpc},
};
use tokio::{
    net::{TcpListener, UnixListener},
    time::Instant,
};
use tokio_stream::wrappers::TcpListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, transport::Server};
use tracing::Instrument as _;

use crate::{
    config::Endpoint,
    error::Result,
    metrics::Metrics,
    socket::{Accepting, Renewed, SocketFile, listen_privately},
    volume::{Outcome, Volumes},
};
#[cfg(any(test, fuzzing))]
pub(crate) use request::fuzz as fuzz_requests;
use request::{POD_NAME, POD_NAMESPACE, deadline, publish_request, unpublish_request};

/// The time for which connections may stay open after `stop`, even if a client does not read its
/// socket. It is longer than calls may run on, and ends before Kubernetes kills the process.
const END_WITHIN: Duration = Duration::from_secs(25);

/// The implementation of the two services.
#[derive(Clone)]
pub struct Csi {
    /// The driver's name.
    pub driver_name: String,
    /// Its version.
    pub version: String,
    /// This node's name.
    pub node_id: String,
    /// The volumes of this node.
    pub volumes: Arc<Volumes>,
    /// The metrics that count calls.
    pub metrics: Metrics,
}

/// A listening socket for CSI.
pub enum Listener {
    /// A socket in the file system, which kubelet uses.
    Unix(UnixListener, SocketFile),
    /// A TCP socket, for tests from another machine.
    Tcp(TcpListener),
}

impl Listener {
    /// Binds an endpoint. Replaces a socket that an earlier run left or another driver has there, but
    /// no other file.
    ///
    /// # Errors
    /// The system's error, or that there is a file that is not a socket.
    pub async fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Tcp(address) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
            Endpoint::Unix(path) => {
                let (listener, file) = listen_privately(path)?;
                Ok(Self::Unix(listener, file))
            }
        }
    }
}

impl Csi {
    /// Serves until `stop`, then waits for running calls.
    ///
    /// # Errors
    /// When the transport fails.
    pub async fn serve(
        self,
        listener: Listener,
        stop: CancellationToken,
    ) -> Result<(), tonic::transport::Error> {
        let server = Server::builder()
            .add_service(IdentityServer::new(self.clone()))
            .add_service(NodeServer::new(self));
        let stopped = stop.clone().cancelled_owned();
        let overdue = async {
            stop.cancelled().await;
            tokio::time::sleep(END_WITHIN).await;
        };
        match listener {
            Listener::Tcp(listener) => {
                let incoming = Accepting::new("csi", TcpListenerStream::new(listener));
                tokio::select! {
                    served = server.serve_with_incoming_shutdown(incoming, stopped) => served,
                    () = overdue => Ok(()),
                }
            }
            Listener::Unix(listener, mut file) => {
                let (incoming, anew) = Renewed::new(listener);
                let incoming = Accepting::new("csi", incoming);
                let kept = async {
                    let stopped = stop.cancelled();
                    tokio::select! {
                        never = file.keep(anew) => match never {},
                        () = stopped => std::future::pending().await,
                    }
                };
                let served = tokio::select! {
                    served = server.serve_with_incoming_shutdown(incoming, stopped) => served,
                    () = overdue => Ok(()),
                    () = kept => Ok(()),
                };
                if let Err(error) = file.remove() {
                    tracing::warn!(%error, "the CSI socket could not be removed; the next driver replaces it");
                }
                served
            }
        }
    }
}

#[tonic::async_trait]
impl Identity for Csi {
    async fn get_plugin_info(
        &self,
        _: Request<GetPluginInfoRequest>,
    ) -> Result<Response<GetPluginInfoResponse>, Status> {
        Ok(Response::new(GetPluginInfoResponse {
            name: self.driver_name.clone(),
            vendor_version: self.version.clone(),
            manifest: HashMap::new(),
        }))
    }

    /// Returns no capabilities: the driver is node-only, and kubelet uses neither a controller nor
    /// staging for inline volumes.
    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse::default()))
    }

    /// Returns whether the driver can publish.
    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        let healthy = self.volumes.check_health().await;
        if let Err(why) = &healthy {
            tracing::warn!("not ready: {why}");
        }
        let ready = Some(healthy.is_ok());
        Ok(Response::new(ProbeResponse { ready }))
    }
}

#[tonic::async_trait]
impl Node for Csi {
    async fn node_publish_volume(
        &self,
        request: Request<NodePublishVolumeRequest>,
    ) -> Result<Response<NodePublishVolumeResponse>, Status> {
        let deadline = deadline(request.metadata());
        let span = tracing::info_span!(
            "publish",
            volume_id = request.get_ref().volume_id,
            pod = pod_of(&request.get_ref().volume_context),
        );
        let (volumes, metrics) = (Arc::clone(&self.volumes), self.metrics.clone());
        to_the_end(span, async move |gone: CancellationToken| {
            let started = Instant::now();
            // The `Debug` of these types leaves secrets out.
            tracing::debug!(request = ?request.get_ref(), "asked to publish");
            let mut counted = metrics.publish();
            let request = request.into_inner();
            let (volume_id, target) = (request.volume_id.clone(), request.target_path.clone());
            let result = match publish_request(request, deadline, volumes.kubelet_root()) {
                Ok(request) => volumes.publish(&request, &mut counted, &gone).await,
                Err(error) => Err(volumes.refuse(&volume_id, &target, error).await),
            };
            match result {
                Ok(Outcome::AlreadyPublished) => {
                    tracing::debug!("already published");
                    counted.not_counted();
                }
                Ok(Outcome::Published) => {
                    tracing::info!(milliseconds = millis(started), "published");
                    counted.succeeded();
                }
                Ok(Outcome::Refreshed { changed }) => {
                    let milliseconds = millis(started);
                    if changed {
                        tracing::info!(milliseconds, "refreshed: the content changed");
                    } else {
                        tracing::debug!(milliseconds, "refreshed: nothing changed");
                    }
                    counted.succeeded();
                }
                // kubelet is not told, because the pod runs on with the content that it has.
                Ok(Outcome::Kept(error)) => counted.failed(error.reason().label()),
                Err(error) => {
                    tracing::error!(code = ?error.code(), milliseconds = millis(started), "failed to publish: {error}");
                    counted.failed(error.reason().label());
                    return Err(error);
                }
            }
            Ok(NodePublishVolumeResponse {})
        })
        .await
    }

    async fn node_unpublish_volume(
        &self,
        request: Request<NodeUnpublishVolumeRequest>,
    ) -> Result<Response<NodeUnpublishVolumeResponse>, Status> {
        let request = request.into_inner();
        let span = tracing::info_span!("unpublish", volume_id = request.volume_id);
        let (volumes, metrics) = (Arc::clone(&self.volumes), self.metrics.clone());
        to_the_end(span, async move |_| {
            tracing::debug!(?request, "asked to unpublish");
            let counted = metrics.unpublish();
            let target_path = request.target_path.clone();
            let result = match unpublish_request(request, volumes.kubelet_root()) {
                Ok(request) => volumes.unpublish(&request).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => {
                    tracing::info!(target_path, "unpublished");
                    counted.succeeded();
                    Ok(NodeUnpublishVolumeResponse {})
                }
                Err(error) => {
                    tracing::error!(code = ?error.code(), "failed to unpublish: {error}");
                    counted.failed();
                    Err(error)
                }
            }
        })
        .await
    }

    async fn node_get_capabilities(
        &self,
        _: Request<NodeGetCapabilitiesRequest>,
    ) -> Result<Response<NodeGetCapabilitiesResponse>, Status> {
        let offered = [rpc::Type::VolumeMountGroup];
        Ok(Response::new(NodeGetCapabilitiesResponse {
            capabilities: offered
                .into_iter()
                .map(|capability| NodeServiceCapability {
                    r#type: Some(node_service_capability::Type::Rpc(Rpc {
                        r#type: capability.into(),
                    })),
                })
                .collect(),
        }))
    }

    async fn node_get_info(
        &self,
        _: Request<NodeGetInfoRequest>,
    ) -> Result<Response<NodeGetInfoResponse>, Status> {
        Ok(Response::new(NodeGetInfoResponse {
            node_id: self.node_id.clone(),
            ..Default::default()
        }))
    }

    async fn node_stage_volume(
        &self,
        _: Request<NodeStageVolumeRequest>,
    ) -> Result<Response<NodeStageVolumeResponse>, Status> {
        Err(not_offered("NodeStageVolume"))
    }

    async fn node_unstage_volume(
        &self,
        _: Request<NodeUnstageVolumeRequest>,
    ) -> Result<Response<NodeUnstageVolumeResponse>, Status> {
        Err(not_offered("NodeUnstageVolume"))
    }

    async fn node_get_volume_stats(
        &self,
        _: Request<NodeGetVolumeStatsRequest>,
    ) -> Result<Response<NodeGetVolumeStatsResponse>, Status> {
        Err(not_offered("NodeGetVolumeStats"))
    }

    async fn node_expand_volume(
        &self,
        _: Request<NodeExpandVolumeRequest>,
    ) -> Result<Response<NodeExpandVolumeResponse>, Status> {
        Err(not_offered("NodeExpandVolume"))
    }
}

fn not_offered(call: &str) -> Status {
    Status::unimplemented(format!(
        "{call} is not offered by this driver; its volumes are inline and ephemeral"
    ))
}

/// Runs a call's work to its end, in a task of its own. The token that the work gets is cancelled when
/// the caller goes away.
async fn to_the_end<W, F, R>(span: tracing::Span, work: W) -> Result<Response<R>, Status>
where
    W: FnOnce(CancellationToken) -> F,
    F: Future<Output = Result<R>> + Send + 'static,
    R: Send + 'static,
{
    let gone = CancellationToken::new();
    let task = tokio::spawn(work(gone.clone()).instrument(span.clone()));
    let _caller = gone.drop_guard();
    match task.await {
        Ok(Ok(answer)) => Ok(Response::new(answer)),
        Ok(Err(error)) => Err(Status::new(error.code(), error.to_string())),
        Err(_) => {
            // The panic's text may contain a secret; the panic hook has logged the place.
            span.in_scope(|| {
                tracing::error!("a bug in the driver ended this call; nothing else is affected")
            });
            // Not final, because the call may have left a volume behind.
            Err(Status::unavailable(
                "a bug in the driver ended this call; see the driver's log on this node",
            ))
        }
    }
}

fn pod_of(context: &HashMap<String, String>) -> String {
    let part = |key| context.get(key).map_or("?", String::as_str);
    format!("{}/{}", part(POD_NAMESPACE), part(POD_NAME))
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::Code;

    #[tokio::test]
    async fn a_panic_answers_its_own_call_and_says_nothing_of_what_it_fell_over() {
        let span = tracing::Span::none();
        let ended: Result<Response<()>, Status> =
            to_the_end(span, async |_| panic!("canary-5f1c")).await;
        let status = ended.unwrap_err();
        assert_eq!(status.code(), Code::Unavailable);
        assert!(!status.message().contains("canary"), "{status}");
    }

    #[tokio::test]
    async fn a_caller_that_goes_away_is_noticed_by_the_work() {
        let (told, hears) = tokio::sync::oneshot::channel();
        let call = to_the_end(
            tracing::Span::none(),
            async move |gone: CancellationToken| {
                gone.cancelled().await;
                let _ = told.send(());
                Ok(())
            },
        );
        let waited = tokio::time::timeout(Duration::from_millis(50), call).await;
        assert!(waited.is_err(), "the work ended by itself");
        hears.await.unwrap();
    }
}
