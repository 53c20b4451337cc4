//! The embedded cluster: an API server and a kubelet of our own, for tests without Kubernetes.
//!
//! ```text
//! test process                               one process per node, `e2e node`
//!   api           the API server      <----    kubelet      registers, publishes, reports
//!   controllers   pods onto nodes              daemonsets   manifests into containers
//!                                              processes    driver and provider, real binaries
//!   control       looks and breaks    ---->    control
//!                                              namespaces   mounts and network of its own
//! ```
//!
//! Everything the driver touches is real but the API server and the kubelet: its process, its
//! sockets, its mounts, the provider. Needs Linux, and root or user namespaces; nothing leaves
//! the machine.

pub mod api;
mod control;
mod controllers;
mod daemonsets;
mod kubelet;
mod namespaces;
pub mod node;
mod processes;

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::{CSINode, CSINodeDriver};
use kube::api::{Api, ListParams, Patch, PatchParams};
use tokio::process::{Child, Command as Program};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::binaries::{Binaries, workspace};
use crate::cluster::{
    Ability, Action, Cluster, Component, Error, HttpAnswer, Result, api as api_error, apply,
};
use crate::tree::{Tree, View};
use crate::user::User;
use api::{ApiServer, Disturbance};
use control::{Command, Control};
use namespaces::KUBELET_ROOT;
use processes::Container;
pub use processes::Status;

/// For a node and the containers on it to come up.
const START_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);
const DRIVER_NAME: &str = "secrets-store.csi.k8s.io";

/// What an embedded cluster is made of.
#[derive(Clone, Debug)]
pub struct Options {
    /// How many nodes; their names are `node-1` and so on.
    pub nodes: usize,
    /// Applied before the nodes start, each with any number of documents.
    pub manifests: Vec<String>,
    /// Deadline of every call of kubelet to a driver: two minutes, as in kubelet.
    pub csi_timeout: Duration,
    /// How often kubelet republishes volumes of drivers that ask for it; never when absent.
    pub sync_period: Option<Duration>,
}

impl Options {
    /// One node with what `deploy/` installs, and the fake provider.
    ///
    /// # Errors
    /// When a manifest cannot be read.
    pub fn standard() -> Result<Self> {
        let mut manifests = read_manifests(&workspace().join("deploy"))?;
        manifests.extend(read_manifests(&workspace().join("e2e/manifests"))?);
        Ok(Self {
            manifests,
            ..Self::bare()
        })
    }

    /// One node on which nothing runs.
    pub fn bare() -> Self {
        Self {
            nodes: 1,
            manifests: Vec::new(),
            csi_timeout: Duration::from_secs(120),
            sync_period: None,
        }
    }
}

/// The `*.yaml` files of a directory by name; those that define kinds come first.
pub(crate) fn read_manifests(dir: &Path) -> Result<Vec<String>> {
    let failed =
        |path: &Path, error: std::io::Error| Error::Start(format!("{}: {error}", path.display()));
    let mut paths = Vec::new();
    for entry in fs::read_dir(dir).map_err(|error| failed(dir, error))? {
        let path = entry.map_err(|error| failed(dir, error))?.path();
        if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            paths.push(path);
        }
    }
    paths.sort();
    let mut manifests = Vec::new();
    for path in paths {
        manifests.push(fs::read_to_string(&path).map_err(|error| failed(&path, error))?);
    }
    manifests.sort_by_key(|manifest| !manifest.contains("kind: CustomResourceDefinition"));
    Ok(manifests)
}

/// A running embedded cluster. Dropping it ends every process of it.
pub struct Embedded {
    nodes: BTreeMap<String, Node>,
    _controllers: JoinSet<()>,
    api: ApiServer,
    options: Options,
    binaries: Binaries,
    // Last: it is removed when nobody uses it any more.
    state: tempfile::TempDir,
}

struct Node {
    control: Control,
    process: Mutex<Child>,
}

impl Embedded {
    /// Starts a cluster; returns when every DaemonSet runs and the driver is registered on every
    /// node.
    ///
    /// # Errors
    /// [`Error::Start`] with the log of the node that did not come up.
    pub async fn start(options: Options, binaries: Binaries) -> Result<Self> {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| Error::Start(format!("{what}: {error}"));
        // Short, because the paths of sockets below it may have 107 bytes at most.
        let state = tempfile::Builder::new()
            .prefix("e2e-")
            .tempdir()
            .map_err(|error| failed("make a state directory", &error))?;
        let api = ApiServer::start(state.path())
            .await
            .map_err(|error| failed("API server", &error))?;
        let ca = state.path().join("ca.crt");
        fs::write(&ca, api.ca_pem()).map_err(|error| failed("write ca.crt", &error))?;
        let client = api.client();
        for manifest in &options.manifests {
            apply(&client, "default", manifest).await?;
        }
        let names: Vec<String> = (1..=options.nodes)
            .map(|number| format!("node-{number}"))
            .collect();
        let mut nodes = BTreeMap::new();
        for name in &names {
            let process = spawn_node(state.path(), name, &options, &binaries)?;
            let socket = node::node_dir(state.path(), name).join("control.sock");
            nodes.insert(
                name.clone(),
                Node {
                    control: Control::new(socket),
                    process: Mutex::new(process),
                },
            );
        }
        let mut controllers = JoinSet::new();
        let controls = nodes
            .iter()
            .map(|(name, node)| (name.clone(), node.control.clone()))
            .collect();
        controllers.spawn(controllers::schedule(client.clone(), names.clone()));
        controllers.spawn(controllers::reconcile_workloads(client.clone()));
        controllers.spawn(controllers::report_daemon_sets(client, controls));
        let cluster = Self {
            nodes,
            _controllers: controllers,
            api,
            options,
            binaries,
            state,
        };
        for name in &names {
            cluster.wait_for_node(name).await?;
        }
        Ok(cluster)
    }

    /// The API server, to count requests.
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// Where the cluster keeps its sockets and each node's disk and logs, below
    /// `nodes/<name>/`.
    pub fn state(&self) -> &Path {
        self.state.path()
    }

    /// What the containers of a node do.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn containers(&self, node: &str) -> Result<Vec<Status>> {
        self.send(node, Command::Containers).await
    }

    /// Empties the directory in which kubelet finds its plugins' sockets.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn wipe_plugins(&self, node: &str) -> Result<()> {
        self.send(node, Command::WipePlugins).await
    }

    /// What the node itself has printed: kubelet's log, as it were.
    ///
    /// # Errors
    /// When there is no such node.
    pub fn node_log(&self, node: &str) -> Result<String> {
        let path = node_log(self.state.path(), node);
        fs::read_to_string(&path)
            .map_err(|error| refused(node, &format_args!("{}: {error}", path.display())))
    }

    async fn send<T: serde::de::DeserializeOwned>(
        &self,
        node: &str,
        command: Command,
    ) -> Result<T> {
        let control = &self.node(node)?.control;
        control
            .send(&command)
            .await
            .map_err(|error| refused(node, &error))
    }

    fn node(&self, name: &str) -> Result<&Node> {
        self.nodes
            .get(name)
            .ok_or_else(|| Error::Impossible(format!("there is no node {name}")))
    }

    /// Takes back what the API says of a node that went without a word, as the node controller
    /// does: its pods are not ready, its drivers not registered. What is waited for from then on
    /// is new.
    async fn declare_down(&self, name: &str) -> Result<()> {
        let csi_nodes: Api<CSINode> = Api::all(self.client());
        let none = Patch::Merge(serde_json::json!({"spec": {"drivers": []}}));
        csi_nodes
            .patch(name, &PatchParams::default(), &none)
            .await
            .map_err(api_error(format!("patch CSINode {name}")))?;
        let of_node = ListParams::default().fields(&format!("spec.nodeName={name}"));
        let pods: Api<Pod> = Api::all(self.client());
        let pods = pods
            .list(&of_node)
            .await
            .map_err(api_error(format!("list pods of node {name}")))?;
        for pod in pods {
            let mut conditions = pod
                .status
                .and_then(|status| status.conditions)
                .unwrap_or_default();
            for condition in &mut conditions {
                if condition.type_ == "Ready" {
                    condition.status = "False".to_owned();
                }
            }
            let (pod_name, namespace) = (
                pod.metadata.name.unwrap_or_default(),
                pod.metadata.namespace.unwrap_or_default(),
            );
            let status = Patch::Merge(serde_json::json!({"status": {"conditions": conditions}}));
            Api::<Pod>::namespaced(self.client(), &namespace)
                .patch_status(&pod_name, &PatchParams::default(), &status)
                .await
                .map_err(api_error(format!(
                    "patch status of pod {namespace}/{pod_name}"
                )))?;
        }
        Ok(())
    }

    /// Waits until a node runs all that the DaemonSets want there and has registered the driver,
    /// if it is among that.
    async fn wait_for_node(&self, name: &str) -> Result<()> {
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        let node = self.node(name)?;
        let sets: Api<DaemonSet> = Api::all(self.client());
        let sets = sets
            .list(&ListParams::default())
            .await
            .map_err(api_error("list DaemonSets".to_owned()))?;
        let wanted: Vec<Container> = sets
            .iter()
            .flat_map(|set| controllers::containers_of(set, name))
            .collect();
        loop {
            let lacking = self.lacking(name, &wanted).await;
            let Some(lacking) = lacking else {
                return Ok(());
            };
            let ended = node.process.lock().await.try_wait().ok().flatten();
            if ended.is_some() || tokio::time::Instant::now() > deadline {
                let log = self.node_log(name).unwrap_or_default();
                let tail: Vec<_> = log.lines().rev().take(20).collect();
                let tail = tail.into_iter().rev().collect::<Vec<_>>().join("\n");
                return Err(Error::Start(match ended {
                    Some(_) => format!("node {name}: {tail}"),
                    None => format!("node {name} lacks {lacking} after {START_LIMIT:?}:\n{tail}"),
                }));
            }
            tokio::time::sleep(POLL).await;
        }
    }

    /// The first thing that a node lacks.
    async fn lacking(&self, name: &str, wanted: &[Container]) -> Option<String> {
        let statuses = match self.containers(name).await {
            Ok(statuses) => statuses,
            Err(error) => return Some(error.to_string()),
        };
        let nodes: Api<CSINode> = Api::all(self.client());
        let Some(csi_node) = nodes.get_opt(name).await.ok().flatten() else {
            return Some("its CSINode".to_owned());
        };
        for container in wanted {
            let runs = |status: &Status| status.name == container.name && status.pid.is_some();
            if !statuses.iter().any(runs) {
                return Some(format!("a process of container {}", container.name));
            }
            let registered = |driver: &CSINodeDriver| driver.name == DRIVER_NAME;
            if container.flag("registration-dir").is_some()
                && !csi_node.spec.drivers.iter().any(registered)
            {
                return Some(format!("driver {DRIVER_NAME} in its CSINode"));
            }
            if let Some(socket) = container.provider_socket() {
                let tree = self.node_tree(name, &socket).await.ok().flatten();
                if tree.is_none() {
                    return Some(format!("the provider's socket {}", socket.display()));
                }
            }
        }
        None
    }
}

impl Cluster for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn client(&self) -> kube::Client {
        self.api.client()
    }

    fn nodes(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// Another user's namespace has this user only.
    fn can(&self, ability: Ability) -> bool {
        ability != Ability::OtherUsers || nix::unistd::geteuid().is_root()
    }

    async fn probe(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        arguments: &[String],
    ) -> Result<String> {
        let name = format!("pod {namespace}/{pod}");
        let found = self.pod(namespace, pod).await?;
        let found = found.ok_or_else(|| Error::Impossible(format!("there is no {name}")))?;
        let (node, path) = volume_of(&found, mount_path).ok_or_else(|| {
            Error::Impossible(format!(
                "{name} has no CSI volume at {mount_path} on a node"
            ))
        })?;
        let user = User::of(&found)
            .map_err(|error| Error::Impossible(format!("{name} has a user id: {error}")))?;
        let command = Command::Probe {
            arguments: arguments.to_vec(),
            path,
            user,
        };
        self.send(&node, command).await
    }

    async fn node_tree(&self, node: &str, path: &Path) -> Result<Option<Tree>> {
        let command = Command::Tree {
            path: path.to_owned(),
            view: View::Disk,
        };
        self.send(node, command).await
    }

    async fn mounts(&self, node: &str, below: &Path) -> Result<Vec<PathBuf>> {
        let command = Command::Mounts {
            below: below.to_owned(),
        };
        self.send(node, command).await
    }

    async fn act(&self, node: &str, component: &Component, action: Action) -> Result<()> {
        let container = component.container().to_owned();
        let command = match action {
            Action::Kill => Command::Kill { container },
            Action::Stop => Command::Stop { container },
            Action::Start => Command::Start { container },
        };
        self.send(node, command).await
    }

    async fn log(&self, node: &str, component: &Component) -> Result<String> {
        let container = component.container().to_owned();
        self.send(node, Command::Log { container }).await
    }

    /// All containers share the node's loopback.
    async fn get(&self, node: &str, _: &Component, port: u16, path: &str) -> Result<HttpAnswer> {
        let path = path.to_owned();
        self.send(node, Command::Fetch { port, path }).await
    }

    async fn reboot(&self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        {
            let mut process = node.process.lock().await;
            process
                .kill()
                .await
                .map_err(|error| refused(name, &error))?;
            self.declare_down(name).await?;
            *process = spawn_node(self.state.path(), name, &self.options, &self.binaries)?;
        }
        self.wait_for_node(name).await
    }

    async fn disturb_api(&self, disturbance: Disturbance) -> Result<()> {
        self.api.disturb(disturbance);
        Ok(())
    }
}

/// The node and the path of what a pod's containers see at a mount path.
fn volume_of(pod: &Pod, mount_path: &str) -> Option<(String, PathBuf)> {
    let spec = pod.spec.as_ref()?;
    let mounts = spec
        .containers
        .iter()
        .flat_map(|container| container.volume_mounts.iter().flatten());
    let mount = mounts
        .into_iter()
        .find(|mount| mount.mount_path == mount_path)?;
    let volumes = spec.volumes.iter().flatten();
    let volume = volumes
        .into_iter()
        .find(|volume| volume.name == mount.name && volume.csi.is_some())?;
    let uid = pod.metadata.uid.as_deref()?;
    let mut path = kubelet::target(Path::new(KUBELET_ROOT), uid, &volume.name);
    if let Some(sub_path) = &mount.sub_path {
        path.push(sub_path);
    }
    Some((spec.node_name.clone()?, path))
}

fn spawn_node(state: &Path, name: &str, options: &Options, binaries: &Binaries) -> Result<Child> {
    let failed = |error: std::io::Error| Error::Start(format!("start node {name}: {error}"));
    let log = node_log(state, name);
    fs::create_dir_all(log.parent().unwrap_or(state)).map_err(failed)?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(failed)?;
    let millis = |duration: Duration| duration.as_millis().to_string();
    Program::new(&binaries.e2e)
        .arg("node")
        .arg("--state")
        .arg(state)
        .args(["--name", name])
        .arg("--driver")
        .arg(&binaries.driver)
        .arg("--fake-provider")
        .arg(&binaries.fake_provider)
        .arg("--probe")
        .arg(&binaries.probe)
        .args(["--csi-timeout-ms", &millis(options.csi_timeout)])
        .args([
            "--sync-period-ms",
            &millis(options.sync_period.unwrap_or_default()),
        ])
        // The node lives as long as the other end of this pipe.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)
}

fn node_log(state: &Path, name: &str) -> PathBuf {
    node::node_dir(state, name).join("logs").join("node.log")
}

fn refused(node: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Node {
        node: node.to_owned(),
        reason: reason.to_string(),
    }
}
