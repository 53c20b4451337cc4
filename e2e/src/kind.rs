//! The kind cluster: nodes in Docker containers, made by kind from the configurations in `kind/`.
//!
//! ```text
//! tools       docker and kind, and kubectl on the first node
//! layout      names and nodes
//! node_image  the image of the nodes
//! fence       the network, and the rule that keeps packets on this machine
//! node        the Cluster interface: nodes through Docker, pods through the API server
//! ```
//!
//! It has a name and a Docker network of its own; a contributor's own clusters are left alone.

mod fence;
mod layout;
mod node;
mod node_image;
mod tools;

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::binaries::{logs_dir, workspace};
use crate::cluster::{Cluster as _, Error, Result};
use crate::guard::{self, Lock};
use crate::images::Images;
use crate::install::{Form, Installation, install};
use crate::real::{LOGGED_KINDS, not_started};
use layout::{NAME, PROBE, START_LIMIT};
use tools::{A_MOMENT, Tools};

pub use layout::Nodes;
pub use node::Kind;
pub use node_image::IMAGE_VARIABLE;
pub use tools::KIND_VARIABLE;

/// Names the number of nodes, 1 or 3.
pub const NODES_VARIABLE: &str = "KIND_NODES";
/// Not empty: a cluster that exists is used again, and is not deleted at the end.
pub const KEEP_VARIABLE: &str = "E2E_KEEP";

/// The time in which kind has to make a cluster.
const CREATE_LIMIT: Duration = Duration::from_secs(300);
/// The line with which a guard says that it holds the lock.
const READY: &str = "ready";

/// The settings of a kind cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// The control plane and pods on one node, or two more nodes for pods.
    pub nodes: Nodes,
    /// The node image, or a version of `kind/node-images`; the default when absent.
    pub node_image: Option<String>,
    /// Whether to use a cluster that exists, and not to delete it at the end.
    pub keep: bool,
    /// An executable that, run as `<guard> guard`, calls [`guard()`]. Without one, the cluster outlives
    /// a process that is killed.
    pub guard: Option<PathBuf>,
}

impl Options {
    /// Returns the settings that `$KIND_NODES`, `$KIND_NODE_IMAGE` and `$E2E_KEEP` ask for.
    ///
    /// # Errors
    /// When there is no configuration with that number of nodes.
    pub fn from_env() -> Result<Self> {
        let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let nodes = match set(NODES_VARIABLE).as_deref() {
            None | Some("1") => Nodes::One,
            Some("3") => Nodes::Three,
            Some(other) => {
                return Err(Error::Start(format!(
                    "{NODES_VARIABLE}={other}: there are clusters of 1 and of 3 nodes"
                )));
            }
        };
        Ok(Self {
            nodes,
            node_image: set(IMAGE_VARIABLE),
            keep: set(KEEP_VARIABLE).is_some(),
            guard: None,
        })
    }
}

/// The programs that are put into a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Manifests and images.
    pub installation: Installation,
    /// The path of a static `probe`.
    pub probe: PathBuf,
}

impl Load {
    /// Reads `deploy/` and the fake provider.
    ///
    /// # Errors
    /// As of [`Installation::standard`].
    pub fn standard(images: &Images, form: &Form) -> Result<Self> {
        Ok(Self {
            installation: Installation::standard(images, form)?,
            probe: images.probe.clone(),
        })
    }
}

/// A running kind cluster. [`Running::stop`] ends it; a guard does when this process ends.
pub struct Running {
    tools: Tools,
    options: Options,
    node_image: String,
    /// An administrator's kubeconfig, in YAML.
    kubeconfig: String,
    _guard: Option<Child>,
}

impl Running {
    /// Makes a cluster, or uses one that exists if it may, and installs into it; returns when every
    /// DaemonSet runs and the driver is registered on every node.
    ///
    /// Calls `progress` with each step as it begins.
    ///
    /// # Errors
    /// [`Error::Start`] with what is missing or failed, and the folder with the cluster's logs. Without
    /// a guard the cluster stays for inspection; the next start replaces it.
    pub async fn start(
        options: Options,
        load: &Load,
        mut progress: impl FnMut(&str),
    ) -> Result<Self> {
        let tools = Tools::find().await?;
        let node_image = node_image::choose(&tools, options.node_image.as_deref()).await?;
        let guard = match options.guard.clone() {
            Some(program) => Some(spawn_guard(program).await?),
            None => None,
        };
        progress("network and fence");
        fence::put_up(&tools, &node_image).await?;
        if options.keep && is_there(&tools, &options, &node_image).await? {
            progress("the cluster that exists");
        } else {
            progress(&format!("nodes from {node_image}"));
            create(&tools, &options, &node_image).await?;
        }
        let kubeconfig = tools
            .kind(["get", "kubeconfig", "--name", NAME], A_MOMENT)
            .await
            .map_err(Error::Start)?;
        let running = Self {
            tools,
            options,
            node_image,
            kubeconfig,
            _guard: guard,
        };
        if let Err(error) = running.fill(load, &mut progress).await {
            let dir = logs_dir("start");
            return Err(not_started(&error, &dir, running.keep_logs(&dir).await));
        }
        Ok(running)
    }

    /// Copies `probe` to the nodes, and installs manifests and images.
    async fn fill(&self, load: &Load, progress: &mut impl FnMut(&str)) -> Result<()> {
        self.calm().await?;
        for node in self.options.nodes.names() {
            let to = format!("{node}:{PROBE}");
            let args = ["cp".as_ref(), load.probe.as_os_str(), to.as_ref()];
            let copied = self.tools.docker(args, A_MOMENT).await;
            copied.map_err(Error::Start)?;
        }
        progress("images, the driver and the provider");
        self.install(&load.installation).await
    }

    /// Installs over what is installed; returns when all of it runs and the driver is registered.
    ///
    /// # Errors
    /// When the API server refuses an object, or something does not run in time.
    pub async fn install(&self, installation: &Installation) -> Result<()> {
        for image in &installation.images {
            let archive = image.archive.as_os_str();
            let args = ["load".as_ref(), "image-archive".as_ref(), archive];
            let name = ["--name".as_ref(), NAME.as_ref()];
            let loaded = self
                .tools
                .kind(args.into_iter().chain(name), A_MOMENT)
                .await;
            loaded.map_err(Error::Start)?;
        }
        let client = self.connect().await?.client();
        install(&client, &installation.manifests, START_LIMIT).await
    }

    /// Returns an administrator's kubeconfig, in YAML.
    pub fn kubeconfig(&self) -> &str {
        &self.kubeconfig
    }

    /// Connects to the cluster, for one runtime.
    ///
    /// # Errors
    /// When kind's kubeconfig cannot be used.
    pub async fn connect(&self) -> Result<Kind> {
        Kind::connect(self.tools.clone(), self.options.nodes, &self.kubeconfig).await
    }

    /// Deletes the cluster, its network and the rule, unless it is to be kept.
    ///
    /// # Errors
    /// When Docker cannot delete something.
    pub async fn stop(self) -> Result<()> {
        if self.options.keep {
            return Ok(());
        }
        delete(&self.tools).await?;
        fence::take_down(&self.tools, &self.node_image).await
    }

    /// Writes the logs of every node and container, and all objects but Secrets, into a folder.
    ///
    /// # Errors
    /// When they cannot be read or written.
    pub async fn keep_logs(&self, dir: &Path) -> Result<()> {
        let failed = |reason: String| Error::Start(format!("keep logs: {reason}"));
        std::fs::create_dir_all(dir).map_err(|error| failed(error.to_string()))?;
        let export = ["export".as_ref(), "logs".as_ref(), dir.as_os_str()];
        let name = ["--name".as_ref(), NAME.as_ref()];
        self.tools
            .kind(export.into_iter().chain(name), A_MOMENT)
            .await
            .map_err(failed)?;
        let objects = ["get", LOGGED_KINDS, "--all-namespaces", "--output=yaml"];
        let objects = self.tools.kubectl(&objects).await.map_err(failed)?;
        std::fs::write(dir.join("objects.yaml"), objects).map_err(|error| failed(error.to_string()))
    }

    /// Keeps the scheduler off all nodes but the first, which is the one that scenarios with one node
    /// look at; a pod that names its node runs there all the same. Switches the cluster's DNS off: see
    /// [`fence`].
    async fn calm(&self) -> Result<()> {
        for other in self.options.nodes.for_pods().iter().skip(1) {
            let cordoned = self.tools.kubectl(&["cordon", other]).await;
            cordoned.map_err(Error::Start)?;
        }
        let scale = [
            "-n",
            "kube-system",
            "scale",
            "deployment",
            "coredns",
            "--replicas=0",
        ];
        let scaled = self.tools.kubectl(&scale).await;
        scaled.map(drop).map_err(Error::Start)
    }
}

/// Runs the guard: waits until the process that started it is gone, and deletes the cluster, unless it
/// is to be kept.
///
/// One guard runs at a time: it prints `ready` when an earlier one, which may still be deleting the
/// cluster of the same name, is done.
///
/// # Errors
/// When something cannot be deleted.
pub async fn guard() -> Result<()> {
    let _held = lock()?;
    println!("{READY}");
    guard::wait_for_parent();
    if Options::from_env()?.keep {
        return Ok(());
    }
    undo().await
}

/// Takes the lock that a process holds while it makes or deletes the cluster.
fn lock() -> Result<Lock> {
    Lock::take(&std::env::temp_dir().join("e2e-kind.lock"), || ())
}

/// Starts a guard; returns when it holds the lock.
async fn spawn_guard(program: PathBuf) -> Result<Child> {
    let spawned = tokio::task::spawn_blocking(move || {
        let mut child = guard::spawn(&program, Stdio::piped())?;
        let mut line = String::new();
        if let Some(stdout) = child.stdout.take() {
            // Its end is no line, and reported below.
            let _read = BufReader::new(stdout).read_line(&mut line);
        }
        if line.trim_end() != READY {
            let reason = format!("the guard {} failed", program.display());
            return Err(Error::Start(reason));
        }
        Ok(child)
    });
    spawned
        .await
        .map_err(|error| Error::Start(format!("the guard: {error}")))?
}

/// Deletes the cluster of an earlier run, if there is one, its network and the rule. Waits for a guard
/// that does the same.
///
/// # Errors
/// When Docker or kind is missing, or cannot delete something.
pub async fn tear_down() -> Result<()> {
    let _held = lock()?;
    undo().await
}

async fn undo() -> Result<()> {
    let tools = Tools::find().await?;
    let options = Options::from_env()?;
    let node_image = node_image::choose(&tools, options.node_image.as_deref()).await?;
    delete(&tools).await?;
    fence::take_down(&tools, &node_image).await
}

/// Returns whether the cluster exists with these nodes, made from this image.
async fn is_there(tools: &Tools, options: &Options, node_image: &str) -> Result<bool> {
    let nodes = tools
        .kind(["get", "nodes", "--name", NAME], A_MOMENT)
        .await
        .map_err(Error::Start)?;
    let mut nodes: Vec<&str> = nodes.lines().collect();
    nodes.sort_unstable();
    if nodes != options.nodes.names() {
        return Ok(false);
    }
    for node in nodes {
        let image = [
            "inspect",
            "--format",
            "{{.State.Running}} {{.Config.Image}}",
            node,
        ];
        let image = tools.docker(image, A_MOMENT).await.map_err(Error::Start)?;
        if image.trim() != format!("true {node_image}") {
            return Ok(false);
        }
    }
    Ok(true)
}

async fn create(tools: &Tools, options: &Options, node_image: &str) -> Result<()> {
    // A run that was killed may have left one.
    delete(tools).await?;
    let failed = |error: std::io::Error| Error::Start(format!("kind's kubeconfig: {error}"));
    // Without one, kind would change the user's own kubeconfig.
    let scratch = tempfile::tempdir().map_err(failed)?;
    let kubeconfig = scratch.path().join("kubeconfig");
    let configuration = workspace().join(options.nodes.configuration());
    let args = [
        "create", "cluster", "--name", NAME, "--image", node_image, "--wait", "120s",
    ];
    let files = [
        "--config".as_ref(),
        configuration.as_os_str(),
        "--kubeconfig".as_ref(),
        kubeconfig.as_os_str(),
    ];
    let args = args.iter().map(AsRef::as_ref).chain(files);
    tools
        .kind(args, CREATE_LIMIT)
        .await
        .map(|_| ())
        .map_err(Error::Start)
}

async fn delete(tools: &Tools) -> Result<()> {
    let failed = |error: std::io::Error| Error::Start(format!("kind's kubeconfig: {error}"));
    let scratch = tempfile::tempdir().map_err(failed)?;
    let kubeconfig = scratch.path().join("kubeconfig");
    let args = ["delete", "cluster", "--name", NAME, "--kubeconfig"];
    let args = args.iter().map(AsRef::as_ref);
    tools
        .kind(args.chain([kubeconfig.as_os_str()]), A_MOMENT)
        .await
        .map(|_| ())
        .map_err(Error::Start)
}
