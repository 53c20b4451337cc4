//! The API server and its nodes as one thing.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::api::storage::v1::CSINode;
use kube::api::{Api, ListParams, Patch, PatchParams};
use tokio::process::{Child, Command as Program};
use tokio::sync::Mutex;
use tokio::task::JoinSet;

use crate::api::{ApiServer, Exec, Output};
use crate::control::{Command, Control};
use crate::error::{Error, Result, api_error};
use crate::exchange::HttpAnswer;
use crate::kubelet::{self, backoff};
use crate::namespaces::KUBELET_ROOT;
use crate::node::{self, Settings, node_dir};
use crate::processes::{Container, Status};
use crate::{apply, controllers};

/// The time within which a node and the containers on it come up.
const START_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(20);

/// The parts of a [`Cluster`].
#[derive(Clone, Debug)]
pub struct Options {
    /// The number of nodes; their names are `node-1` and so on.
    pub nodes: usize,
    /// Manifests that are applied before the nodes start, each with any number of documents.
    pub manifests: Vec<String>,
    /// The deadline of every call of kubelet to a driver: two minutes, as in kubelet.
    pub csi_timeout: Duration,
    /// The interval at which kubelet republishes volumes of drivers that ask for it; it never does
    /// when absent.
    pub sync_period: Option<Duration>,
    /// The longest pause of kubelet between attempts at one volume: 122 seconds, as in kubelet.
    pub longest_pause: Duration,
    /// Whether the path of a registration socket is the authority of the calls to it, as with
    /// kubelet. Servers that check the authority, such as tonic's, refuse it.
    pub path_authority: bool,
    /// Executables by name. A container of a DaemonSet runs the one whose name is the last part of
    /// its image (`registry.example/csi/driver:v1` runs `driver`), and [`Cluster::exec`] finds them.
    pub programs: BTreeMap<String, PathBuf>,
    /// A directory of this machine that every node has at [`SHARED`](crate::SHARED), if there is one.
    pub shared: Option<PathBuf>,
    /// kubelet's root directory on every node, [`KUBELET_ROOT`](crate::KUBELET_ROOT) unless something
    /// else is tried. The manifests have to name the same.
    pub kubelet_root: PathBuf,
    /// An executable that calls [`take_over`](crate::take_over) first. It becomes the nodes.
    pub node_program: PathBuf,
}

impl Options {
    /// One node on which nothing runs.
    pub fn bare(node_program: PathBuf) -> Self {
        Self {
            nodes: 1,
            manifests: Vec::new(),
            csi_timeout: Duration::from_secs(120),
            sync_period: None,
            longest_pause: backoff::LONGEST,
            path_authority: true,
            programs: BTreeMap::new(),
            shared: None,
            kubelet_root: PathBuf::from(KUBELET_ROOT),
            node_program,
        }
    }
}

/// A running API server with nodes. Dropping it ends every process of it.
pub struct Cluster {
    nodes: BTreeMap<String, Node>,
    _controllers: JoinSet<()>,
    api: ApiServer,
    options: Options,
    // Last: it is removed when nobody uses it any more.
    state: tempfile::TempDir,
}

struct Node {
    control: Control,
    process: Mutex<Child>,
}

impl Cluster {
    /// Starts a cluster; returns when every DaemonSet runs on every node, the sockets of flags
    /// `--endpoint` are there, and the drivers among them are registered.
    ///
    /// # Errors
    /// [`Error::Start`] with the log of the node that did not come up.
    pub async fn start(options: Options) -> Result<Self> {
        let failed =
            |what: &str, error: &dyn std::fmt::Display| Error::Start(format!("{what}: {error}"));
        // Short, because the paths of sockets below it may have 107 bytes at most.
        let state = tempfile::Builder::new()
            .prefix("k8s-")
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
            let process = spawn_node(state.path(), name, &options)?;
            let socket = node_dir(state.path(), name).join("control.sock");
            nodes.insert(
                name.clone(),
                Node {
                    control: Control::new(socket),
                    process: Mutex::new(process),
                },
            );
        }
        let mut controllers = JoinSet::new();
        controllers.spawn(controllers::schedule(client.clone(), names.clone()));
        controllers.spawn(controllers::reconcile_workloads(client.clone()));
        controllers.spawn(controllers::reconcile_daemon_sets(
            client,
            names.clone(),
            options.programs.clone(),
        ));
        let reached: BTreeMap<_, _> = nodes
            .iter()
            .map(|(name, node): (&String, &Node)| (name.clone(), node.control.clone()))
            .collect();
        api.run_commands(move |exec| run_in_pod(reached.clone(), exec));
        let cluster = Self {
            nodes,
            _controllers: controllers,
            api,
            options,
            state,
        };
        for name in &names {
            cluster.wait_for_node(name).await?;
        }
        Ok(cluster)
    }

    /// The API server, for counting and disturbing requests.
    pub fn api(&self) -> &ApiServer {
        &self.api
    }

    /// An administrator's client.
    pub fn client(&self) -> kube::Client {
        self.api.client()
    }

    /// The names of the nodes.
    pub fn nodes(&self) -> Vec<String> {
        self.nodes.keys().cloned().collect()
    }

    /// The root directory of a node's disk, as this process sees it: without what is mounted there.
    pub fn disk(&self, node: &str) -> PathBuf {
        node_dir(self.state.path(), node).join("root")
    }

    /// The directory with the logs of a node and its containers.
    pub fn logs(&self, node: &str) -> PathBuf {
        node_dir(self.state.path(), node).join("logs")
    }

    /// Returns the state of every container of a node.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn containers(&self, node: &str) -> Result<Vec<Status>> {
        self.send(node, Command::Containers).await
    }

    /// Runs a program among the mounts of a node, as root, and returns what it prints.
    ///
    /// # Errors
    /// Returns what it prints to standard error when it fails.
    pub async fn exec(&self, node: &str, arguments: &[&str]) -> Result<String> {
        let arguments = arguments.iter().map(|&argument| argument.to_owned());
        let arguments = arguments.collect();
        self.send(node, Command::Exec { arguments }).await
    }

    /// Kills a container's process with SIGKILL; returns when it is gone. It is started again, as
    /// after any crash.
    ///
    /// # Errors
    /// When there is no such process.
    pub async fn kill(&self, node: &str, container: &str) -> Result<()> {
        let container = container.to_owned();
        self.send(node, Command::Kill { container }).await
    }

    /// Stops a container with SIGTERM, and SIGKILL after 30 seconds; returns when it is gone. It
    /// stays away until [`Cluster::start_container`].
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn stop_container(&self, node: &str, container: &str) -> Result<()> {
        let container = container.to_owned();
        self.send(node, Command::Stop { container }).await
    }

    /// Starts a stopped container; returns when it has a process.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn start_container(&self, node: &str, container: &str) -> Result<()> {
        let container = container.to_owned();
        self.send(node, Command::Start { container }).await
    }

    /// Decides whether the mounts of a container's next processes stay within it, as those of a container
    /// without `mountPropagation: Bidirectional`. The process that runs keeps those that it has.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn isolate(&self, node: &str, container: &str, isolated: bool) -> Result<()> {
        let container = container.to_owned();
        let command = Command::Isolate {
            container,
            isolated,
        };
        self.send(node, command).await
    }

    /// Gives a container's next processes these arguments besides those of its manifest. The process that
    /// runs keeps those that it has.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn add_arguments(
        &self,
        node: &str,
        container: &str,
        arguments: &[&str],
    ) -> Result<()> {
        let command = Command::AddArgs {
            container: container.to_owned(),
            arguments: arguments
                .iter()
                .map(|&argument| argument.to_owned())
                .collect(),
        };
        self.send(node, command).await
    }

    /// Returns all that a container has printed.
    ///
    /// # Errors
    /// When there is no such container.
    pub async fn log(&self, node: &str, container: &str) -> Result<String> {
        let container = container.to_owned();
        self.send(node, Command::Log { container }).await
    }

    /// Sends a GET to a port of a node's loopback, which all its containers share.
    ///
    /// # Errors
    /// When there is no answer.
    pub async fn get(&self, node: &str, port: u16, path: &str) -> Result<HttpAnswer> {
        let path = path.to_owned();
        self.send(node, Command::Get { port, path }).await
    }

    /// Takes a node down without warning and brings it up again: mounts and `/run` are gone, its
    /// disk is not. Returns when all that [`Cluster::start`] waits for is there again.
    ///
    /// # Errors
    /// Returns the errors of [`Cluster::start`].
    pub async fn reboot(&self, name: &str) -> Result<()> {
        let node = self.node(name)?;
        {
            let mut process = node.process.lock().await;
            process
                .kill()
                .await
                .map_err(|error| refused(name, &error))?;
            let declared = self.declare_down(name).await;
            // Also a node that nobody has heard of comes back.
            *process = spawn_node(self.state.path(), name, &self.options)?;
            declared?;
        }
        self.wait_for_node(name).await
    }

    /// Starts a node's kubelet anew, as after a crash or an upgrade of it: its calls break off, the
    /// containers go on. Does not wait until the driver is registered again.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn restart_kubelet(&self, node: &str) -> Result<()> {
        self.send(node, Command::RestartKubelet).await
    }

    /// Returns the process of a node, among whose mounts its kubelet is; another one after a reboot.
    ///
    /// # Errors
    /// When there is no such node, or it is down.
    pub async fn process(&self, name: &str) -> Result<u32> {
        let process = self.node(name)?.process.lock().await;
        process.id().ok_or_else(|| refused(name, &"it is down"))
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
            .ok_or_else(|| refused(name, &"there is no such node"))
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

    /// Returns the path at which a driver is told to mount a volume of a pod here.
    pub fn target_path(&self, pod_uid: &str, volume: &str) -> PathBuf {
        kubelet::target(&self.options.kubelet_root, pod_uid, volume)
    }

    /// Waits until a node runs all that the DaemonSets want there.
    async fn wait_for_node(&self, name: &str) -> Result<()> {
        let deadline = tokio::time::Instant::now() + START_LIMIT;
        let node = self.node(name)?;
        let sets: Api<DaemonSet> = Api::all(self.client());
        let sets = sets
            .list(&ListParams::default())
            .await
            .map_err(api_error("list DaemonSets".to_owned()))?;
        let desired: Vec<Container> = sets
            .iter()
            .flat_map(|set| controllers::containers_of(set, name, &self.options.programs))
            .collect();
        loop {
            let lacking = self.lacking(name, &desired).await;
            let Some(lacking) = lacking else {
                return Ok(());
            };
            let ended = node.process.lock().await.try_wait().ok().flatten();
            if ended.is_some() || tokio::time::Instant::now() > deadline {
                let log = fs::read_to_string(node_log(self.state.path(), name)).unwrap_or_default();
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

    /// Returns the first thing that a node lacks.
    async fn lacking(&self, node: &str, desired: &[Container]) -> Option<String> {
        let statuses = match self.containers(node).await {
            Ok(statuses) => statuses,
            Err(error) => return Some(error.to_string()),
        };
        let nodes: Api<CSINode> = Api::all(self.client());
        let Some(csi_node) = nodes.get_opt(node).await.ok().flatten() else {
            return Some("its CSINode".to_owned());
        };
        for container in desired {
            let name = &container.name;
            let runs = |status: &Status| status.name == *name && status.pid.is_some();
            if !statuses.iter().any(runs) {
                return Some(format!("a process of container {name}"));
            }
            if let Some(socket) = container.endpoint() {
                let socket = socket.to_string_lossy();
                if self.exec(node, &["test", "-S", &socket]).await.is_err() {
                    return Some(format!("the socket {socket} of container {name}"));
                }
            }
        }
        let drivers = desired
            .iter()
            .filter(|container| container.has(&self.options.kubelet_root.join("plugins_registry")));
        (csi_node.spec.drivers.len() < drivers.count())
            .then(|| "a driver in its CSINode".to_owned())
    }
}

/// Runs a command in a container of a pod. Only the containers of DaemonSets run.
async fn run_in_pod(
    nodes: BTreeMap<String, Control>,
    exec: Exec,
) -> std::result::Result<Output, String> {
    let node = exec.pod["spec"]["nodeName"].as_str().unwrap_or_default();
    let control = nodes
        .get(node)
        .ok_or_else(|| format!("there is no node {node:?}"))?;
    let command = Command::ExecIn {
        container: exec.container,
        arguments: exec.command,
    };
    control
        .send(&command)
        .await
        .map_err(|error| error.to_string())
}

fn spawn_node(state: &Path, name: &str, options: &Options) -> Result<Child> {
    let failed = |error: std::io::Error| Error::Start(format!("start node {name}: {error}"));
    let log = node_log(state, name);
    fs::create_dir_all(log.parent().unwrap_or(state)).map_err(failed)?;
    let log = OpenOptions::new()
        .create(true)
        .append(true)
        .open(log)
        .map_err(failed)?;
    let settings = Settings {
        state: state.to_owned(),
        name: name.to_owned(),
        programs: options.programs.clone(),
        shared: options.shared.clone(),
        kubelet_root: options.kubelet_root.clone(),
        csi_timeout: options.csi_timeout,
        sync_period: options.sync_period,
        longest_pause: options.longest_pause,
        path_authority: options.path_authority,
    };
    let settings = serde_json::to_string(&settings).map_err(|error| failed(error.into()))?;
    Program::new(&options.node_program)
        .arg(node::NODE)
        .arg(settings)
        // The node lives as long as the other end of this pipe.
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(log)
        .kill_on_drop(true)
        .spawn()
        .map_err(failed)
}

fn node_log(state: &Path, name: &str) -> PathBuf {
    node_dir(state, name).join("logs").join("node.log")
}

fn refused(node: &str, reason: &dyn std::fmt::Display) -> Error {
    Error::Node {
        node: node.to_owned(),
        reason: reason.to_string(),
    }
}
