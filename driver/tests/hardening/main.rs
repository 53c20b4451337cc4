//! Checks the program as a process: the rights that it keeps, the directories and providers that it
//! trusts, and what a pod's author can say to it.
//!
//! The driver gets a mount namespace of its own, with `unshare` of util-linux, so that it may mount.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test")]

mod attributes;
mod directories;
mod peers;
mod process;
mod profile;
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "../api/server.rs"]
mod server;
mod wiping;

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use embedded::api::ApiServer;
use fake_provider::server::{
    Failure, Identity, MountResponse, Object, Provider, Request, Server, Socket,
};
use nix::unistd::geteuid;
use proto::csi::{
    NodePublishVolumeRequest, VolumeCapability,
    node_client::NodeClient,
    volume_capability::{AccessType, MountVolume},
};
use serde_json::{Value, json};
use tonic::{
    Status,
    transport::{Channel, Endpoint},
};

/// Longer than any step of these tests takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);
const UID: &str = "7a6ab1a5-0d1d-4a5a-9a7c-3d6c1f3e0a11";

/// A directory for a driver and all that it uses, with an API server that has a class.
struct Node {
    dir: tempfile::TempDir,
    api: ApiServer,
}

impl Node {
    /// Creates a node whose class `db` in the namespace `shop` names the provider `test`.
    async fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (api, kubeconfig) = server::serve(dir.path()).await;
        fs::write(dir.path().join("kubeconfig"), kubeconfig).unwrap();
        fs::create_dir(dir.path().join("providers")).unwrap();
        fs::create_dir(dir.path().join("plugin")).unwrap();
        let node = Self { dir, api };
        node.put_class("shop", "db", "test");
        node
    }

    fn put_class(&self, namespace: &str, name: &str, provider: &str) {
        server::put_namespace(&self.api, namespace);
        let class = json!({
            "apiVersion": "secrets-store.csi.x-k8s.io/v1", "kind": "SecretProviderClass",
            "metadata": {"name": name, "namespace": namespace, "uid": format!("{namespace}-{name}")},
            "spec": {"provider": provider, "parameters": {"of": format!("{namespace}/{name}")}},
        });
        let path = format!(
            "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/{namespace}/secretproviderclasses/{name}"
        );
        self.api.put(&path, class).unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Serves a provider, which answers with one object, in this process.
    fn serve(&self, name: &str) -> Recorder {
        let recorder = Recorder::default();
        let socket = Socket::bind(self.path("providers").join(format!("{name}.sock"))).unwrap();
        let server = Server::new(socket, recorder.clone());
        tokio::spawn(server.run(std::future::pending()));
        recorder
    }

    /// Returns the flags with which a driver runs here.
    fn flags(&self) -> Vec<String> {
        let path = |name: &str| self.path(name).display().to_string();
        vec![
            format!("--endpoint=unix://{}", path("plugin/csi.sock")),
            format!("--kubeconfig={}", path("kubeconfig")),
            format!("--provider-volume={}", path("providers")),
            "--additional-provider-volume-paths=".to_owned(),
            "--metrics-addr=".to_owned(),
            "--nodeid=node-1".to_owned(),
            "-v=5".to_owned(),
        ]
    }

    /// Returns the command that runs a driver as root of its mounts.
    fn command(&self) -> Command {
        let mut command = Command::new("unshare");
        if !geteuid().is_root() {
            command.args(["--user", "--map-root-user"]);
        }
        command.arg("--mount");
        command
    }

    /// Starts a driver with these flags besides those that it needs.
    fn driver(&self, flags: &[&str]) -> Driver {
        let mut command = self.command();
        command.arg(env!("CARGO_BIN_EXE_secrets-store-csi"));
        self.start(command, flags)
    }

    /// Starts the driver whose program is the last argument of a command.
    fn start(&self, mut command: Command, flags: &[&str]) -> Driver {
        command.args(self.flags()).args(flags);
        self.start_as_it_is(command)
    }

    /// Starts the driver that a command with all arguments starts.
    fn start_as_it_is(&self, mut command: Command) -> Driver {
        let log = self.path("log");
        let process = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(fs::File::create(&log).unwrap())
            .spawn()
            .unwrap();
        Driver {
            process,
            log,
            socket: self.path("plugin/csi.sock"),
        }
    }

    /// Returns kubelet's request for a volume of the class `db`, with further attributes, of which
    /// kubelet's own take precedence.
    fn request(&self, volume: &str, author: &[(&str, &str)]) -> NodePublishVolumeRequest {
        let of_volume = self
            .path("kubelet/pods")
            .join(UID)
            .join("volumes/kubernetes.io~csi")
            .join(volume);
        fs::create_dir_all(&of_volume).unwrap();
        let of_author = [("secretProviderClass", "db")].into_iter();
        let of_kubelet = [
            ("csi.storage.k8s.io/pod.name", "web"),
            ("csi.storage.k8s.io/pod.namespace", "shop"),
            ("csi.storage.k8s.io/pod.uid", UID),
            ("csi.storage.k8s.io/serviceAccount.name", "default"),
            ("csi.storage.k8s.io/ephemeral", "true"),
        ];
        let all = of_author.chain(author.iter().copied()).chain(of_kubelet);
        let owned = all.map(|(key, value)| (key.to_owned(), value.to_owned()));
        NodePublishVolumeRequest {
            volume_id: format!("csi-{volume}"),
            target_path: of_volume.join("mount").display().to_string(),
            readonly: true,
            volume_capability: Some(VolumeCapability::default()),
            volume_context: owned.collect::<HashMap<_, _>>(),
            ..Default::default()
        }
    }
}

/// Gives a request the group of the pod.
fn with_group(mut request: NodePublishVolumeRequest, group: u32) -> NodePublishVolumeRequest {
    let mount = MountVolume {
        volume_mount_group: group.to_string(),
        ..Default::default()
    };
    request.volume_capability = Some(VolumeCapability {
        access_type: Some(AccessType::Mount(mount)),
        ..Default::default()
    });
    request
}

/// A driver's process, killed when dropped.
struct Driver {
    process: Child,
    log: PathBuf,
    socket: PathBuf,
}

impl Driver {
    /// Waits until the driver answers.
    async fn connect(&mut self) -> NodeClient<Channel> {
        let uri = format!("unix://{}", self.socket.display());
        let endpoint = Endpoint::from_shared(uri).unwrap();
        let since = Instant::now();
        loop {
            match endpoint.connect().await {
                Ok(channel) => return NodeClient::new(channel),
                Err(error) => {
                    let ended = self.process.try_wait().unwrap();
                    assert!(ended.is_none(), "{ended:?}: {}", self.log());
                    assert!(since.elapsed() < PATIENCE, "{error}: {}", self.log());
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            }
        }
    }

    async fn publish(&mut self, request: NodePublishVolumeRequest) -> Result<(), Status> {
        let mut csi = self.connect().await;
        csi.node_publish_volume(request).await.map(drop)
    }

    /// Waits for the end of a driver that cannot start. Returns its log.
    async fn fails(&mut self) -> String {
        let since = Instant::now();
        while self.process.try_wait().unwrap().is_none() {
            assert!(since.elapsed() < PATIENCE, "it runs: {}", self.log());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert!(!self.process.wait().unwrap().success());
        self.log()
    }

    fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// Waits until the log has a text, which is written a moment after what it tells of.
    async fn log_with(&self, text: &str) -> String {
        let since = Instant::now();
        loop {
            let log = self.log();
            if log.contains(text) {
                return log;
            }
            assert!(since.elapsed() < PATIENCE, "no {text:?}: {log}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    fn proc(&self, name: &str) -> PathBuf {
        Path::new("/proc")
            .join(self.process.id().to_string())
            .join(name)
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        // This fails only if the process has ended already.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A provider that records the attributes that it is sent.
#[derive(Clone, Default)]
struct Recorder {
    asked: Arc<Mutex<Vec<Value>>>,
}

impl Provider for Recorder {
    fn identity(&self) -> Identity {
        Identity {
            name: "test".to_owned(),
            version: "1".to_owned(),
        }
    }

    async fn mount(&self, request: Request) -> Result<MountResponse, Failure> {
        let attributes = serde_json::to_value(request.attributes()).unwrap();
        self.asked.lock().unwrap().push(attributes);
        let object = Object {
            id: "secret/object".to_owned(),
            version: "v1".to_owned(),
            path: "object".to_owned(),
            mode: 0o644,
            contents: b"content".to_vec(),
        };
        Ok([object].into_iter().collect())
    }
}
