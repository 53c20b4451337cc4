//! The node of the two containers: the directories that they share with kubelet, and an API server;
//! and the containers themselves.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use e2e::embedded::manifests;
use e2e::images;
use embedded::api::ApiServer;
use embedded::apply;
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Pod, ServiceAccount};
use kube::api::{Api, PostParams};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use proto::csi::identity_client::IdentityClient;
use proto::csi::node_client::NodeClient;
use proto::csi::volume_capability::{AccessType, MountVolume};
use proto::csi::{
    NodePublishVolumeRequest, NodeUnpublishVolumeRequest, ProbeRequest, VolumeCapability,
};
use testcontainers::bollard::query_parameters::KillContainerOptions;
use testcontainers::core::WaitFor;
use testcontainers::core::client::docker_client_instance;
use testcontainers::core::logs::LogFrame;
use testcontainers::runners::AsyncRunner;
use testcontainers::{ContainerAsync, ContainerRequest, GenericImage, ImageExt};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::task::JoinSet;
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

/// The driver's default name.
pub(crate) const DRIVER_NAME: &str = "secrets-store.csi.k8s.io";
const NODE_NAME: &str = "node-1";
const PROVIDER: &str = "fake";
const NAMESPACE: &str = "default";
/// kubelet's directory of pods in the container.
const PODS: &str = "/var/lib/kubelet/pods";
const LIMIT: Duration = Duration::from_secs(20);
/// The time between SIGTERM and SIGKILL.
const GRACE_SECONDS: i32 = 30;

/// Waits until something holds.
pub(crate) async fn until(what: &str, mut so: impl FnMut() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !so() {
        assert!(Instant::now() < deadline, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The directories of a node, and an API server on a port of this machine's loopback.
pub(crate) struct Node {
    root: tempfile::TempDir,
    api: ApiServer,
    _relay: JoinSet<()>,
}

impl Node {
    pub(crate) async fn new() -> Self {
        let root = tempfile::Builder::new().prefix("e2e-").tempdir().unwrap();
        for dir in ["plugin", "providers", "pods"] {
            fs::create_dir(root.path().join(dir)).unwrap();
        }
        // Mounts of the driver in its container have to appear here, and mounts that exist here
        // have to appear in a container that starts again.
        let pods = root.path().join("pods");
        let nothing = None::<&str>;
        mount(Some(&pods), &pods, nothing, MsFlags::MS_BIND, nothing).unwrap();
        mount(nothing, &pods, nothing, MsFlags::MS_SHARED, nothing).unwrap();

        let api = ApiServer::start(&root.path().join("api")).await.unwrap();
        for manifest in manifests().unwrap() {
            apply(&api.client(), "default", &manifest).await.unwrap();
        }
        let mut relay = JoinSet::new();
        let address = relay_to(&mut relay, root.path().join("api/pods.sock")).await;
        let kubeconfig = kubeconfig(&api, address).await;
        fs::write(root.path().join("kubeconfig"), kubeconfig).unwrap();
        Self {
            root,
            api,
            _relay: relay,
        }
    }

    pub(crate) fn csi_socket(&self) -> PathBuf {
        self.root.path().join("plugin/csi.sock")
    }

    pub(crate) fn provider_socket(&self) -> PathBuf {
        self.root.path().join(format!("providers/{PROVIDER}.sock"))
    }

    /// Starts the driver with the capability to mount, and no other.
    pub(crate) async fn driver(&self) -> Driver {
        let port = free_port();
        let health = free_port();
        let request = self
            .driver_request()
            // The API server, /metrics and /healthz are on the loopback.
            .with_network("host")
            .with_cmd([
                "--endpoint=unix:///csi/csi.sock".to_owned(),
                format!("--nodeid={NODE_NAME}"),
                "--kubelet-root-dir=/var/lib/kubelet".to_owned(),
                "--kubeconfig=/etc/kubeconfig".to_owned(),
                format!("--metrics-addr=127.0.0.1:{port}"),
                format!("--healthz-addr=127.0.0.1:{health}"),
            ]);
        self.start_driver(request, port, health).await
    }

    /// Starts the driver without an API server and without a network.
    pub(crate) async fn driver_without_api_server(&self) -> Driver {
        let request = self.driver_request().with_network("none").with_cmd([
            "--endpoint=unix:///csi/csi.sock".to_owned(),
            format!("--nodeid={NODE_NAME}"),
        ]);
        self.start_driver(request, 0, 0).await
    }

    fn driver_request(&self) -> ContainerRequest<GenericImage> {
        let request = hardened(images::DRIVER, "\"listening\"").with_cap_add("SYS_ADMIN");
        let binds = [
            ("plugin", "/csi", "rw"),
            ("providers", "/var/run/secrets-store-csi-providers", "rw"),
            ("pods", PODS, "rshared"),
            ("kubeconfig", "/etc/kubeconfig", "ro"),
        ];
        self.bound(request, &binds)
    }

    async fn start_driver(
        &self,
        request: ContainerRequest<GenericImage>,
        metrics: u16,
        health: u16,
    ) -> Driver {
        Driver {
            container: request.start().await.unwrap(),
            socket: self.csi_socket(),
            metrics,
            health,
        }
    }

    /// Starts the provider; returns when it serves.
    pub(crate) async fn provider(&self) -> Provider {
        let request = hardened(images::FAKE_PROVIDER, "serving")
            .with_network("none")
            .with_cmd([
                "--dir=/providers".to_owned(),
                format!("--name={PROVIDER}"),
                "--http-addr=".to_owned(),
            ]);
        let request = self.bound(request, &[("providers", "/providers", "rw")]);
        Provider(request.start().await.unwrap())
    }

    /// Adds directories of the node to a container: their names here, their paths there, and
    /// options.
    fn bound(
        &self,
        request: ContainerRequest<GenericImage>,
        binds: &[(&str, &str, &str)],
    ) -> ContainerRequest<GenericImage> {
        let binds: Vec<String> = binds
            .iter()
            .map(|(ours, theirs, how)| {
                format!("{}/{ours}:{theirs}:{how}", self.root.path().display())
            })
            .collect();
        request.with_host_config_modifier(move |config| config.binds = Some(binds.clone()))
    }

    /// Makes a class and a pod of this name, and the directory that kubelet makes before a publish.
    /// The documentation of the fake provider's crate describes `faults`.
    pub(crate) async fn volume(&self, name: &str, faults: &str) -> Volume {
        let manifest = format!(
            r#"
apiVersion: secrets-store.csi.x-k8s.io/v1
kind: SecretProviderClass
metadata: {{name: {name}}}
spec:
  provider: {PROVIDER}
  parameters:
    objects: "array: [{{objectName: foo}}]"
    faults: "{faults}"
---
apiVersion: v1
kind: ServiceAccount
metadata: {{name: default}}
---
apiVersion: v1
kind: Pod
metadata: {{name: {name}}}
spec:
  nodeName: {NODE_NAME}
  containers: [{{name: app, image: "probe:e2e"}}]
"#
        );
        apply(&self.api.client(), NAMESPACE, &manifest)
            .await
            .unwrap();
        let pods: Api<Pod> = Api::namespaced(self.api.client(), NAMESPACE);
        let uid = pods.get(name).await.unwrap().metadata.uid.unwrap();
        let below = format!("{uid}/volumes/kubernetes.io~csi/secrets/mount");
        let on_host = self.root.path().join("pods").join(&below);
        fs::create_dir_all(on_host.parent().unwrap()).unwrap();
        Volume {
            name: name.to_owned(),
            uid,
            on_host,
            target: format!("{PODS}/{below}"),
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        // Detaches the mounts below it, too.
        if let Err(error) = umount2(&self.root.path().join("pods"), MntFlags::MNT_DETACH) {
            eprintln!("{} stays mounted: {error}", self.root.path().display());
        }
    }
}

/// Returns the settings of every container: a read-only root file system and no capabilities. It
/// has started when its log contains the line.
fn hardened(image: &str, line: &str) -> ContainerRequest<GenericImage> {
    let (name, tag) = image.split_once(':').unwrap();
    GenericImage::new(name, tag)
        .with_wait_for(WaitFor::message_on_stderr(line))
        // Shown when the test fails.
        .with_log_consumer(|frame: &LogFrame| eprint!("{}", String::from_utf8_lossy(frame.bytes())))
        .with_readonly_rootfs(true)
        .with_cap_drop("ALL")
        .with_security_opt("no-new-privileges")
        // Docker's default profile forbids mount(2), whatever the capabilities.
        .with_security_opt("apparmor=unconfined")
        .with_startup_timeout(LIMIT)
}

/// A running driver; removed when dropped.
pub(crate) struct Driver {
    container: ContainerAsync<GenericImage>,
    socket: PathBuf,
    metrics: u16,
    health: u16,
}

impl Driver {
    async fn channel(&self) -> Channel {
        let uri = format!("unix://{}", self.socket.display());
        Endpoint::from_shared(uri).unwrap().connect().await.unwrap()
    }

    pub(crate) async fn identity(&self) -> IdentityClient<Channel> {
        IdentityClient::new(self.channel().await)
    }

    pub(crate) async fn csi(&self) -> NodeClient<Channel> {
        NodeClient::new(self.channel().await)
    }

    pub(crate) async fn publish(&self, volume: &Volume) -> Result<(), Status> {
        let request = volume.publish_request();
        let answer = self.csi().await.node_publish_volume(request).await;
        answer.map(|_: Response<_>| ())
    }

    pub(crate) async fn unpublish(&self, volume: &Volume) -> Result<(), Status> {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume.id(),
            target_path: volume.target.clone(),
        };
        let answer = self.csi().await.node_unpublish_volume(request).await;
        answer.map(|_: Response<_>| ())
    }

    /// Returns status and body of `/metrics` or `/healthz`.
    pub(crate) async fn get(&self, page: &str) -> (u16, String) {
        let port = match page {
            "metrics" => self.metrics,
            _ => self.health,
        };
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, port))
            .await
            .unwrap();
        let request =
            format!("GET /{page} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        (status, body.to_owned())
    }

    /// Sends SIGTERM; returns the exit code.
    pub(crate) async fn stop(&self) -> Option<i64> {
        stop(&self.container).await
    }

    /// Sends SIGKILL; returns when the process is gone.
    pub(crate) async fn kill(&self) {
        let docker = docker_client_instance().await.unwrap();
        let options = KillContainerOptions {
            signal: "SIGKILL".to_owned(),
        };
        let id = self.container.id();
        docker.kill_container(id, Some(options)).await.unwrap();
        let deadline = Instant::now() + LIMIT;
        while self.container.is_running().await.unwrap() {
            assert!(Instant::now() < deadline, "it survived SIGKILL");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Starts the same container again; returns when it answers.
    pub(crate) async fn start_again(&self) {
        self.container.start().await.unwrap();
        let deadline = Instant::now() + LIMIT;
        let endpoint = Endpoint::from_shared(format!("unix://{}", self.socket.display())).unwrap();
        while let Err(error) = IdentityClient::new(endpoint.connect_lazy())
            .probe(ProbeRequest {})
            .await
        {
            assert!(Instant::now() < deadline, "it does not come back: {error}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
}

/// A running provider; removed when dropped.
pub(crate) struct Provider(ContainerAsync<GenericImage>);

impl Provider {
    /// Sends SIGTERM; returns the exit code.
    pub(crate) async fn stop(&self) -> Option<i64> {
        stop(&self.0).await
    }
}

async fn stop(container: &ContainerAsync<GenericImage>) -> Option<i64> {
    container
        .stop_with_timeout(Some(GRACE_SECONDS))
        .await
        .unwrap();
    container.exit_code().await.unwrap()
}

/// A volume of a pod.
pub(crate) struct Volume {
    name: String,
    uid: String,
    on_host: PathBuf,
    target: String,
}

impl Volume {
    fn id(&self) -> String {
        format!("csi-{}", self.uid)
    }

    /// Returns the request that kubelet sends.
    pub(crate) fn publish_request(&self) -> NodePublishVolumeRequest {
        let context = [
            ("csi.storage.k8s.io/pod.name", self.name.as_str()),
            ("csi.storage.k8s.io/pod.namespace", NAMESPACE),
            ("csi.storage.k8s.io/pod.uid", &self.uid),
            ("secretProviderClass", &self.name),
        ];
        NodePublishVolumeRequest {
            volume_id: self.id(),
            target_path: self.target.clone(),
            readonly: true,
            volume_capability: Some(VolumeCapability {
                access_type: Some(AccessType::Mount(MountVolume::default())),
                ..Default::default()
            }),
            volume_context: context
                .map(|(key, value)| (key.to_owned(), value.to_owned()))
                .into(),
            ..Default::default()
        }
    }

    /// Returns the path of the volume on the host.
    pub(crate) fn path(&self) -> &Path {
        &self.on_host
    }

    /// Reads a file of the volume on the host.
    pub(crate) fn read(&self, file: &str) -> String {
        fs::read_to_string(self.on_host.join(file)).unwrap()
    }

    pub(crate) fn is_mounted(&self) -> bool {
        self.mount_line().is_some()
    }

    /// Returns the mount's id, which no other mount has at the same time.
    pub(crate) fn mount_id(&self) -> String {
        let line = self.mount_line().expect("a mount");
        line.split(' ').next().unwrap().to_owned()
    }

    fn mount_line(&self) -> Option<String> {
        let here = self.on_host.display().to_string();
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let mut lines = mounts.lines();
        let line = lines.find(|line| line.split(' ').nth(4) == Some(&here))?;
        Some(line.to_owned())
    }
}

/// Serves a unix socket on a port of the loopback.
async fn relay_to(tasks: &mut JoinSet<()>, socket: PathBuf) -> SocketAddr {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = listener.local_addr().unwrap();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut outer, _)) = listener.accept().await {
            let socket = socket.clone();
            connections.spawn(async move {
                let mut inner = UnixStream::connect(socket).await.unwrap();
                // Either end may hang up at any time.
                let _ = copy_bidirectional(&mut outer, &mut inner).await;
            });
        }
    });
    address
}

/// Returns a kubeconfig with the rights of the driver's service account.
async fn kubeconfig(api: &ApiServer, address: SocketAddr) -> String {
    let accounts: Api<ServiceAccount> = Api::namespaced(api.client(), "kube-system");
    let request = TokenRequest {
        spec: Some(TokenRequestSpec::default()),
        ..Default::default()
    };
    let token = accounts
        .create_token_request("secrets-store-csi-driver", &PostParams::default(), &request)
        .await
        .unwrap();
    serde_json::json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "driver"}}],
        "clusters": [{"name": "test", "cluster": {
            "server": format!("https://{address}"),
            "certificate-authority-data": base64(api.ca_pem()),
        }}],
        "users": [{"name": "driver", "user": {"token": token.status.unwrap().token}}],
    })
    .to_string()
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

/// Returns a free port. Another process may take it before it is used, but the kernel does not hand
/// it out soon.
fn free_port() -> u16 {
    let listener = std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
    listener.local_addr().unwrap().port()
}
