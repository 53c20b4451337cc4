//! The wire: the CSI Identity and Node services on the driver's socket.
//!
//! This room checks a request's form, turns it into a [`PublishRequest`], and turns an [`Error`]
//! into a status. Protobuf stops here. Each call gets one span, one log line for its end, and
//! one metrics guard, which counts a failure unless told otherwise.
//!
//! A call's work runs in a task of its own: a caller that goes away cannot leave a half-made
//! volume behind, and a panic answers its own call with INTERNAL and harms no other.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

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
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, metadata::MetadataMap, transport::Server};
use tracing::Instrument as _;

use crate::{
    config::Endpoint,
    error::{Error, Result},
    metrics::Metrics,
    registration::listen_privately,
    secret::SecretMap,
    volume::{Outcome, PublishRequest, TOKENS, TargetPath, Volumes, record::Pod},
};

/// What kubelet puts into a volume's context (contract F.5).
const POD_NAME: &str = "csi.storage.k8s.io/pod.name";
const POD_NAMESPACE: &str = "csi.storage.k8s.io/pod.namespace";
const POD_UID: &str = "csi.storage.k8s.io/pod.uid";
/// The volume attribute that names the class.
const CLASS: &str = "secretProviderClass";

/// kubelet's deadline for a call, assumed for a caller that sends none.
const USUAL_DEADLINE: Duration = Duration::from_secs(120);

/// The two services.
#[derive(Clone)]
pub struct Csi {
    /// The driver's name.
    pub driver_name: String,
    /// Its version.
    pub version: String,
    /// This node's name.
    pub node_id: String,
    /// What does the work.
    pub volumes: Arc<Volumes>,
    /// Where it is counted.
    pub metrics: Metrics,
}

/// A socket on which CSI is served.
pub enum Listener {
    /// What kubelet uses.
    Unix(UnixListener, PathBuf),
    /// For tests from afar.
    Tcp(TcpListener),
}

impl Listener {
    /// Binds. A socket that an earlier run left is removed; anything else in its place is not.
    ///
    /// # Errors
    /// When there is something other than a socket, or the system refuses.
    pub async fn bind(endpoint: &Endpoint) -> io::Result<Self> {
        match endpoint {
            Endpoint::Tcp(address) => Ok(Self::Tcp(TcpListener::bind(address).await?)),
            Endpoint::Unix(path) => Ok(Self::Unix(listen_privately(path)?, path.clone())),
        }
    }
}

impl Csi {
    /// Serves until `stop`, then finishes the calls that run.
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
        let stopped = stop.cancelled_owned();
        match listener {
            Listener::Tcp(listener) => {
                server
                    .serve_with_incoming_shutdown(TcpListenerStream::new(listener), stopped)
                    .await
            }
            Listener::Unix(listener, path) => {
                let served = server
                    .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stopped)
                    .await;
                if let Err(error) = std::fs::remove_file(&path) {
                    tracing::debug!(path = %path.display(), %error, "the socket was gone already");
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

    /// None: the driver is node-only, and kubelet uses neither a controller nor staging for
    /// inline volumes.
    async fn get_plugin_capabilities(
        &self,
        _: Request<GetPluginCapabilitiesRequest>,
    ) -> Result<Response<GetPluginCapabilitiesResponse>, Status> {
        Ok(Response::new(GetPluginCapabilitiesResponse::default()))
    }

    async fn probe(&self, _: Request<ProbeRequest>) -> Result<Response<ProbeResponse>, Status> {
        Ok(Response::new(ProbeResponse { ready: Some(true) }))
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
            let mut counted = metrics.publish();
            let result = match publish_request(request.into_inner(), deadline, volumes.kubelet_root.as_deref()) {
                Ok(request) => volumes.publish(&request, &mut counted, &gone).await,
                Err(error) => Err(error),
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
            let counted = metrics.unpublish();
            let result = match unpublish_request(&request, volumes.kubelet_root.as_deref()) {
                Ok(target) => volumes.unpublish(&request.volume_id, &target).await,
                Err(error) => Err(error),
            };
            match result {
                Ok(()) => {
                    tracing::info!(target_path = request.target_path, "unpublished");
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
        let offered: [rpc::Type; 0] = [];
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

/// Runs a call's work in a task of its own, to its end. The token it gets is cancelled when the
/// caller goes away.
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
            // The panic's own text may hold anything; the hook has logged where it was.
            span.in_scope(|| {
                tracing::error!("a bug in the driver ended this call; nothing else is affected")
            });
            Err(Status::internal(
                "a bug in the driver ended this call; see the driver's log on this node",
            ))
        }
    }
}

/// Checks the form of a publish, in the order of contract F.5; `readOnly` before anything is read.
fn publish_request(
    request: NodePublishVolumeRequest,
    deadline: Instant,
    root: Option<&Path>,
) -> Result<PublishRequest> {
    if request.volume_capability.is_none() {
        return Err(Error::invalid("Volume capability missing in request"));
    }
    if request.volume_id.is_empty() {
        return Err(Error::invalid("Volume ID missing in request"));
    }
    if request.target_path.is_empty() {
        return Err(Error::invalid("Target path missing in request"));
    }
    if request.volume_context.is_empty() {
        return Err(Error::invalid("Volume attributes missing in request"));
    }
    if !request.readonly {
        return Err(Error::invalid(
            "Readonly is not true in request: set `readOnly: true` in the pod's spec.volumes[].csi of this volume",
        ));
    }
    let mut attributes: SecretMap = request.volume_context.into_iter().collect();
    let mut secrets: SecretMap = request.secrets.into_iter().collect();
    // Since Kubernetes 1.35 tokens may come in `secrets`. They leave both maps, so that a
    // provider gets them once, where it looks for them.
    let in_context = attributes.remove(TOKENS);
    let tokens = secrets
        .remove(TOKENS)
        .or(in_context)
        .filter(|tokens| !tokens.is_empty());

    let required = |key: &str| match attributes.expose(key) {
        Some(value) if !value.is_empty() => Ok(value.to_owned()),
        _ => Err(Error::invalid(format!(
            "{key} missing in request: the CSIDriver object of this driver needs `podInfoOnMount: true`"
        ))),
    };
    let class = match attributes.expose(CLASS) {
        Some(class) if !class.is_empty() => class.to_owned(),
        _ => {
            return Err(Error::invalid(
                "secretProviderClass is not set: name the SecretProviderClass in the pod's spec.volumes[].csi.volumeAttributes.secretProviderClass",
            ));
        }
    };
    let pod = Pod {
        name: required(POD_NAME)?,
        namespace: required(POD_NAMESPACE)?,
        uid: required(POD_UID)?,
    };
    Ok(PublishRequest {
        target: TargetPath::parse(&request.target_path, root, Some(&pod.uid))?,
        volume_id: request.volume_id,
        pod,
        class,
        attributes,
        secrets,
        tokens,
        deadline,
    })
}

fn unpublish_request(
    request: &NodeUnpublishVolumeRequest,
    root: Option<&Path>,
) -> Result<TargetPath> {
    if request.volume_id.is_empty() {
        return Err(Error::invalid("Volume ID missing in request"));
    }
    if request.target_path.is_empty() {
        return Err(Error::invalid("Target path missing in request"));
    }
    TargetPath::parse(&request.target_path, root, None)
}

fn pod_of(context: &HashMap<String, String>) -> String {
    let part = |key| context.get(key).map_or("?", String::as_str);
    format!("{}/{}", part(POD_NAMESPACE), part(POD_NAME))
}

fn millis(since: Instant) -> u64 {
    u64::try_from(since.elapsed().as_millis()).unwrap_or(u64::MAX)
}

/// When a provider must have answered for the call to end within its caller's deadline: a fifth
/// of the time, at most ten seconds, is kept for what comes after.
fn deadline(metadata: &MetadataMap) -> Instant {
    let whole = metadata
        .get("grpc-timeout")
        .and_then(|value| grpc_timeout(value.to_str().ok()?))
        .map_or(USUAL_DEADLINE, |timeout| timeout.min(USUAL_DEADLINE));
    let kept = (whole / 5).min(Duration::from_secs(10));
    Instant::now() + (whole - kept)
}

/// The header that carries a deadline: up to eight digits and a unit (gRPC over HTTP/2).
fn grpc_timeout(value: &str) -> Option<Duration> {
    let (digits, unit) = value.split_at_checked(value.len().checked_sub(1)?)?;
    let amount: u64 = digits.parse().ok()?;
    match unit {
        "H" => amount.checked_mul(3600).map(Duration::from_secs),
        "M" => amount.checked_mul(60).map(Duration::from_secs),
        "S" => Some(Duration::from_secs(amount)),
        "m" => Some(Duration::from_millis(amount)),
        "u" => Some(Duration::from_micros(amount)),
        "n" => Some(Duration::from_nanos(amount)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::csi::VolumeCapability;
    use rstest::rstest;
    use tonic::Code;

    fn wanted() -> NodePublishVolumeRequest {
        let context = [
            (POD_NAME, "web"),
            (POD_NAMESPACE, "shop"),
            (POD_UID, "u-1"),
            (CLASS, "vault"),
            ("mine", "kept"),
        ];
        NodePublishVolumeRequest {
            volume_id: "csi-1".into(),
            target_path: "/var/lib/kubelet/pods/u-1/volumes/kubernetes.io~csi/s/mount".into(),
            volume_capability: Some(VolumeCapability::default()),
            readonly: true,
            volume_context: context.map(|(k, v)| (k.to_owned(), v.to_owned())).into(),
            ..Default::default()
        }
    }

    fn parse(request: NodePublishVolumeRequest) -> Result<PublishRequest> {
        publish_request(request, Instant::now(), None)
    }

    #[rstest]
    #[case::capability(|r: &mut NodePublishVolumeRequest| r.volume_capability = None, "Volume capability missing")]
    #[case::id(|r: &mut NodePublishVolumeRequest| r.volume_id.clear(), "Volume ID missing")]
    #[case::target(|r: &mut NodePublishVolumeRequest| r.target_path.clear(), "Target path missing")]
    #[case::context(|r: &mut NodePublishVolumeRequest| r.volume_context.clear(), "Volume attributes missing")]
    #[case::read_only(|r: &mut NodePublishVolumeRequest| r.readonly = false, "readOnly: true")]
    #[case::class(|r: &mut NodePublishVolumeRequest| { r.volume_context.remove(CLASS); }, "secretProviderClass is not set")]
    #[case::pod_info(|r: &mut NodePublishVolumeRequest| { r.volume_context.remove(POD_UID); }, "podInfoOnMount")]
    #[case::another_pods_target(|r: &mut NodePublishVolumeRequest| { r.volume_context.insert(POD_UID.into(), "u-2".into()); }, "does not belong")]
    fn what_is_wrong_with_a_request_is_named(
        #[case] spoil: fn(&mut NodePublishVolumeRequest),
        #[case] why: &str,
    ) {
        let mut request = wanted();
        spoil(&mut request);
        let error = parse(request).err().unwrap();
        assert!(error.to_string().contains(why), "{error}");
        assert_eq!(error.code(), Code::InvalidArgument);
    }

    #[rstest]
    #[case::nowhere(None, None, None)]
    #[case::in_the_context(Some("context"), None, Some("context"))]
    #[case::in_secrets(None, Some("secrets"), Some("secrets"))]
    #[case::secrets_first(Some("context"), Some("secrets"), Some("secrets"))]
    #[case::empty(Some(""), None, None)]
    fn tokens_are_taken_out_of_both_maps(
        #[case] context: Option<&str>,
        #[case] secrets: Option<&str>,
        #[case] expected: Option<&str>,
    ) {
        let mut request = wanted();
        if let Some(tokens) = context {
            request.volume_context.insert(TOKENS.into(), tokens.into());
        }
        if let Some(tokens) = secrets {
            request.secrets.insert(TOKENS.into(), tokens.into());
        }
        let parsed = parse(request).ok().unwrap();
        assert_eq!(parsed.tokens.as_ref().map(|t| t.as_str()), expected);
        assert_eq!(parsed.attributes.expose(TOKENS), None);
        assert_eq!(parsed.attributes.expose("mine"), Some("kept"));
        assert!(parsed.secrets.is_empty());
    }

    #[tokio::test]
    async fn a_panic_answers_its_own_call_and_says_nothing_of_what_it_fell_over() {
        let span = tracing::Span::none();
        let ended: Result<Response<()>, Status> =
            to_the_end(span, async |_| panic!("canary-5f1c")).await;
        let status = ended.unwrap_err();
        assert_eq!(status.code(), Code::Internal);
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

    #[rstest]
    #[case::kubelets("119999m", Some(Duration::from_millis(119_999)))]
    #[case::seconds("5S", Some(Duration::from_secs(5)))]
    #[case::hours("1H", Some(Duration::from_secs(3600)))]
    #[case::nanos("99999999n", Some(Duration::from_nanos(99_999_999)))]
    #[case::no_unit("5", None)]
    #[case::no_digits("S", None)]
    #[case::empty("", None)]
    #[case::not_ascii("5µ", None)]
    fn deadlines(#[case] header: &str, #[case] expected: Option<Duration>) {
        assert_eq!(grpc_timeout(header), expected);
    }
}
