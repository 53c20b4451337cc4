//! A cluster of Docker containers, made by kind from the configurations in `kind/`.
//!
//! It has a name and a Docker network of its own, which nothing leaves; a contributor's own
//! clusters are left alone. The nodes are looked at and broken from outside through Docker, pods
//! and objects through the API server.

mod fence;
mod node;
mod node_image;
mod tools;

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};

use crate::binaries::{kept, workspace};
use crate::cluster::{Cluster as _, Error, Result};
use crate::images::Images;
use crate::install::{Form, Installation, install};
use crate::real::KEPT_KINDS;
use tools::{A_MOMENT, Tools};

pub use node::Kind;
pub use node_image::IMAGE_VARIABLE;
pub use tools::KIND_VARIABLE;

/// 1 or 3.
pub const NODES_VARIABLE: &str = "KIND_NODES";
/// Not empty: the cluster is used again if it is there, and stays when all is done.
pub const KEEP_VARIABLE: &str = "E2E_KEEP";

/// The cluster's name.
const NAME: &str = "e2e";
/// For kind to make a cluster.
const CREATE_LIMIT: Duration = Duration::from_secs(300);
/// For what is installed to run and be registered, and for a node to come back.
const START_LIMIT: Duration = Duration::from_secs(120);
/// A guard's word.
const READY: &str = "ready";
/// Where `probe` is put on every node.
const PROBE: &str = "/usr/local/bin/e2e-probe";
/// What a kind cluster is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Control plane and pods on one node, or two nodes for pods beside it.
    pub nodes: Nodes,
    /// The node image, or a version of `kind/node-images`; absent for the default.
    pub node_image: Option<String>,
    /// Whether to use a cluster that is there, and to leave it behind.
    pub keep: bool,
    /// An executable that, run as `<guard> guard`, calls [`guard`]; without one, nobody tears
    /// down when this process is gone.
    pub guard: Option<PathBuf>,
}

/// How many nodes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Nodes {
    /// `kind/one-node.yaml`.
    #[default]
    One,
    /// `kind/three-nodes.yaml`.
    Three,
}

impl Nodes {
    fn configuration(self) -> &'static str {
        match self {
            Self::One => "kind/one-node.yaml",
            Self::Three => "kind/three-nodes.yaml",
        }
    }

    /// All of them, as kind names them; those for pods are the last ones.
    fn names(self) -> Vec<String> {
        let suffixes: &[&str] = match self {
            Self::One => &["control-plane"],
            Self::Three => &["control-plane", "worker", "worker2"],
        };
        suffixes
            .iter()
            .map(|suffix| format!("{NAME}-{suffix}"))
            .collect()
    }

    /// Returns the names of the nodes that run the pods of scenarios.
    pub fn for_pods(self) -> Vec<String> {
        let mut names = self.names();
        match self {
            Self::One => names,
            Self::Three => names.split_off(1),
        }
    }
}

impl Options {
    /// What `$KIND_NODES`, `$KIND_NODE_IMAGE` and `$E2E_KEEP` ask for.
    ///
    /// # Errors
    /// When there is no cluster of so many nodes.
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

/// What is put into a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// What is installed.
    pub installation: Installation,
    /// A static `probe`.
    pub probe: PathBuf,
}

impl Load {
    /// What `deploy/` installs, and the fake provider.
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

/// A running kind cluster. [`Running::stop`] ends it, or the end of this process, if it is guarded.
pub struct Running {
    tools: Tools,
    options: Options,
    node_image: String,
    /// An administrator's, in YAML.
    kubeconfig: String,
    _guard: Option<Child>,
}

impl Running {
    /// Makes a cluster, or takes the one that is there if it may, and installs into it; returns
    /// when every DaemonSet runs and the driver is registered on every node.
    ///
    /// `progress` hears each step as it begins.
    ///
    /// # Errors
    /// [`Error::Start`] with what is missing or went wrong, and where the cluster's logs are kept.
    /// Without a guard the cluster is left for a look, and replaced by the next start.
    pub async fn start(
        options: Options,
        load: &Load,
        mut progress: impl FnMut(&str),
    ) -> Result<Self> {
        let tools = Tools::find().await?;
        let node_image = node_image::choose(&tools, options.node_image.as_deref()).await?;
        let guard = match &options.guard {
            Some(program) => Some(spawn_guard(program).await?),
            None => None,
        };
        progress("network and fence");
        fence::put_up(&tools, &node_image).await?;
        if options.keep && is_there(&tools, &options, &node_image).await? {
            progress("the cluster that is there");
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
            let dir = kept("start");
            let failed = match running.keep_logs(&dir).await {
                Ok(()) => format!("{error}; logs and objects are in {}", dir.display()),
                Err(not_kept) => format!("{error}; {not_kept}"),
            };
            return Err(Error::Start(failed));
        }
        Ok(running)
    }

    /// Images and what they run in.
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

    /// Installs, over what is installed; returns when all of it runs and the driver is registered.
    ///
    /// # Errors
    /// What the API server refuses or does not come up.
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

    /// A way to the cluster, for one runtime.
    ///
    /// # Errors
    /// When kind's kubeconfig cannot be used.
    pub async fn connect(&self) -> Result<Kind> {
        Kind::connect(self.tools.clone(), self.options.nodes, &self.kubeconfig).await
    }

    /// Deletes the cluster, its network and the fence, unless it is to be kept.
    ///
    /// # Errors
    /// When Docker does not let go of something.
    pub async fn stop(self) -> Result<()> {
        if self.options.keep {
            return Ok(());
        }
        delete(&self.tools).await?;
        fence::take_down(&self.tools, &self.node_image).await
    }

    /// Writes the logs of every node and container, and the objects without the Secrets, into a
    /// folder.
    ///
    /// # Errors
    /// When they cannot be had or written.
    pub async fn keep_logs(&self, dir: &Path) -> Result<()> {
        let failed = |reason: String| Error::Start(format!("keep logs: {reason}"));
        std::fs::create_dir_all(dir).map_err(|error| failed(error.to_string()))?;
        let export = ["export".as_ref(), "logs".as_ref(), dir.as_os_str()];
        let name = ["--name".as_ref(), NAME.as_ref()];
        self.tools
            .kind(export.into_iter().chain(name), A_MOMENT)
            .await
            .map_err(failed)?;
        let objects = ["get", KEPT_KINDS, "--all-namespaces", "--output=yaml"];
        let objects = kubectl(&self.tools, &objects).await.map_err(failed)?;
        std::fs::write(dir.join("objects.yaml"), objects).map_err(|error| failed(error.to_string()))
    }

    /// A scenario with one node looks at the first, so that is where the scheduler may place
    /// pods; those that name their node go there all the same. The cluster's DNS is switched
    /// off: see [`fence`].
    async fn calm(&self) -> Result<()> {
        for other in self.options.nodes.for_pods().iter().skip(1) {
            let cordoned = kubectl(&self.tools, &["cordon", other]).await;
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
        let scaled = kubectl(&self.tools, &scale).await;
        scaled.map(drop).map_err(Error::Start)
    }
}

/// Waits until the process that made the cluster is gone, which closes standard input, and deletes
/// the cluster, unless it is to be kept.
///
/// One guard at a time: it says `ready` when an earlier one, which may still be deleting the
/// cluster of the same name, is done.
///
/// # Errors
/// What could not be deleted.
pub async fn guard() -> Result<()> {
    let _held = lock()?;
    println!("{READY}");
    let _gone = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
    if Options::from_env()?.keep {
        return Ok(());
    }
    undo().await
}

/// Held by whoever makes or deletes the cluster, until the file is dropped.
fn lock() -> Result<File> {
    let path = std::env::temp_dir().join("e2e-kind.lock");
    let failed = |error: std::io::Error| Error::Start(format!("{}: {error}", path.display()));
    let lock = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(failed)?;
    lock.lock().map_err(failed)?;
    Ok(lock)
}

async fn spawn_guard(program: &Path) -> Result<Child> {
    let failed =
        |error: std::io::Error| Error::Start(format!("guard {}: {error}", program.display()));
    let mut guard = Command::new(program)
        .arg("guard")
        // An interrupt at the terminal is for the test, and its end for the guard.
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    if let Some(stdout) = guard.stdout.take() {
        let mut lines = BufReader::new(stdout).lines();
        if lines.next_line().await.map_err(failed)?.as_deref() != Some(READY) {
            return Err(Error::Start("the guard did not take its post".to_owned()));
        }
    }
    Ok(guard)
}

/// Deletes the cluster of an earlier run, if there is one, its network and the fence. Waits for a
/// guard that is at it.
///
/// # Errors
/// When Docker or kind is not there, or does not let go of something.
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

/// The node image has kubectl, and the first node the administrator's credentials.
async fn kubectl(tools: &Tools, args: &[&str]) -> std::result::Result<String, String> {
    let node = format!("{NAME}-control-plane");
    let kubectl = ["kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"];
    let kubectl = ["exec", node.as_str()].into_iter().chain(kubectl);
    tools
        .docker(kubectl.chain(args.iter().copied()), A_MOMENT)
        .await
}

/// Whether the cluster exists, has these nodes and is made from this image.
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
    // Of a run that was cut short.
    delete(tools).await?;
    let failed = |error: std::io::Error| Error::Start(format!("kind's kubeconfig: {error}"));
    // kind would write into the user's own otherwise.
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
