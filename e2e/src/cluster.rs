//! The part of the clusters that differs.
//!
//! A scenario is written against [`Cluster`] and does not know whether it runs in the embedded
//! cluster, on real Kubernetes binaries or in kind. An implementation shows volumes and nodes, and
//! reaches the processes of the driver and the provider. All else is the Kubernetes API:
//! [`Namespace`](crate::namespace::Namespace).

use std::fmt;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

pub use embedded::HttpAnswer;
use embedded::api::Disturbance;

use crate::reader::{Reader, Readings};
use crate::tree::{Tree, View};

/// The interval of [`poll`].
const POLL: Duration = Duration::from_millis(25);

/// A process on a node that a scenario may watch and break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Component {
    /// The driver: container `secrets-store`.
    Driver,
    /// A provider by its container's name, `fake-provider` for ours.
    Provider(String),
}

impl Component {
    /// Returns the container's name in its DaemonSet.
    pub fn container(&self) -> &str {
        match self {
            Self::Driver => "secrets-store",
            Self::Provider(name) => name,
        }
    }
}

/// An action on a [`Component`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// SIGKILL. The process is started again, as after a crash.
    Kill,
    /// SIGTERM. The process is not started again.
    Stop,
    /// Starts a stopped process.
    Start,
}

/// The reason why a cluster did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server refused a request, or did not answer.
    #[error("{what}: {source}")]
    Api {
        /// The request.
        what: String,
        /// The answer.
        source: kube::Error,
    },
    /// A condition did not become true in time.
    #[error("after {after:?} still waiting for {what}; {last}")]
    Timeout {
        /// The condition.
        what: String,
        /// The time that was waited.
        after: Duration,
        /// The state at the last check.
        last: String,
    },
    /// A text is no manifest, or does not contain what was to be changed.
    #[error("manifest: {0}")]
    Manifest(String),
    /// This cluster cannot do it, or the pod, node or volume does not exist.
    #[error("{0}")]
    Impossible(String),
    /// A node did not do as told.
    #[error("node {node}: {reason}")]
    Node {
        /// The node's name.
        node: String,
        /// The error of the node.
        reason: String,
    },
    /// The cluster did not start.
    #[error("start of the cluster: {0}")]
    Start(String),
}

impl From<embedded::Error> for Error {
    fn from(error: embedded::Error) -> Self {
        match error {
            embedded::Error::Api { what, source } => Self::Api { what, source },
            embedded::Error::Manifest(reason) => Self::Manifest(reason),
            embedded::Error::Node { node, reason } => Self::Node { node, reason },
            embedded::Error::Start(reason) => Self::Start(reason),
        }
    }
}

/// The result of asking a cluster.
pub type Result<T> = std::result::Result<T, Error>;

/// A Kubernetes cluster with the driver and a provider on every node.
#[expect(
    async_fn_in_trait,
    reason = "no caller moves these futures between threads"
)]
pub trait Cluster {
    /// Returns `embedded`, `local` or `kind`.
    fn name(&self) -> &'static str;

    /// Returns an administrator's client.
    fn client(&self) -> kube::Client;

    /// Returns the names of the nodes that run pods.
    fn nodes(&self) -> Vec<String>;

    /// Runs `probe` as the user of a pod's container, with these arguments and after them the path
    /// of a mount, given as the container has it. The pod has to run. Returns what `probe` prints.
    async fn probe(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        arguments: &[String],
    ) -> Result<String>;

    /// Reads the tree below a path of a node; returns `None` when the path does not exist.
    async fn node_tree(&self, node: &str, path: &Path) -> Result<Option<Tree>>;

    /// Returns the mount points at and below a path of a node.
    async fn mounts(&self, node: &str, below: &Path) -> Result<Vec<PathBuf>>;

    /// Acts on a process; returns when it is gone or there again.
    async fn act(&self, node: &str, component: &Component, action: Action) -> Result<()>;

    /// Returns what a process has printed.
    async fn log(&self, node: &str, component: &Component) -> Result<String>;

    /// Sends a GET to a port of a process, over its pod's network.
    async fn get(
        &self,
        node: &str,
        component: &Component,
        port: u16,
        path: &str,
    ) -> Result<HttpAnswer>;

    /// Takes a node down without warning and brings it up again: its mounts are gone, its disk is
    /// not. Returns when the node and its driver are back.
    async fn reboot(&self, _node: &str) -> Result<()> {
        let reason = "the node is this machine, which is not rebooted";
        Err(Error::Impossible(reason.to_owned()))
    }

    /// Makes the API server misbehave towards pods.
    async fn disturb_api(&self, _disturbance: Disturbance) -> Result<()> {
        let reason = "the API server is a real one, which does not misbehave";
        Err(Error::Impossible(reason.to_owned()))
    }

    /// Waits until a new namespace can have pods: where controllers fill it, that is later.
    async fn wait_namespace(&self, _namespace: &str) -> Result<()> {
        Ok(())
    }

    /// Reads the tree of a container's mount, as its user.
    async fn tree(&self, namespace: &str, pod: &str, mount_path: &str, view: View) -> Result<Tree> {
        let arguments = view.arguments();
        let json = self.probe(namespace, pod, mount_path, &arguments).await?;
        printed::<Option<Tree>>(&json)?.ok_or_else(|| {
            Error::Impossible(format!("pod {namespace}/{pod}: there is no {mount_path}"))
        })
    }

    /// Reads files of a container's mount all the time, as its user, until they contain the last
    /// number.
    async fn read(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        reader: &Reader,
    ) -> Result<Readings> {
        let arguments = reader.arguments();
        printed(&self.probe(namespace, pod, mount_path, &arguments).await?)
    }

    /// Returns the driver on a node.
    fn driver<'a>(&'a self, node: &'a str) -> Process<'a, Self> {
        Process {
            cluster: self,
            node,
            component: Component::Driver,
        }
    }

    /// Returns a provider on a node, by its container's name.
    fn provider<'a>(&'a self, node: &'a str, name: &str) -> Process<'a, Self> {
        Process {
            cluster: self,
            node,
            component: Component::Provider(name.to_owned()),
        }
    }
}

/// Parses what `probe` printed.
pub(crate) fn printed<T: serde::de::DeserializeOwned>(json: &str) -> Result<T> {
    serde_json::from_str(json)
        .map_err(|error| Error::Impossible(format!("probe's output: {error}")))
}

/// Calls `check` until it breaks with a value; it continues with the state that it saw.
///
/// # Errors
/// [`Error::Timeout`] with the last state, or an error of `check`.
pub async fn poll<T>(
    what: &str,
    limit: Duration,
    mut check: impl AsyncFnMut() -> Result<ControlFlow<T, String>>,
) -> Result<T> {
    let started = Instant::now();
    loop {
        match check().await? {
            ControlFlow::Break(value) => return Ok(value),
            ControlFlow::Continue(last) if started.elapsed() > limit => {
                return Err(Error::Timeout {
                    what: what.to_owned(),
                    after: limit,
                    last,
                });
            }
            ControlFlow::Continue(_) => tokio::time::sleep(POLL).await,
        }
    }
}

/// Polls until something holds.
///
/// # Errors
/// [`Error::Timeout`] when it does not hold in time.
pub async fn wait_until(what: &str, limit: Duration, holds: impl AsyncFn() -> bool) -> Result<()> {
    poll(what, limit, async || {
        Ok(if holds().await {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue("it does not hold".to_owned())
        })
    })
    .await
}

/// A component on a node, to be watched and broken.
pub struct Process<'a, C: ?Sized> {
    cluster: &'a C,
    node: &'a str,
    component: Component,
}

impl<C: Cluster + ?Sized> Process<'_, C> {
    /// Sends SIGKILL; the process is started again. Returns when the killed one is gone.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn kill(&self) -> Result<()> {
        self.act(Action::Kill).await
    }

    /// Stops the process until [`start`](Self::start).
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn stop(&self) -> Result<()> {
        self.act(Action::Stop).await
    }

    /// Starts the stopped process.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn start(&self) -> Result<()> {
        self.act(Action::Start).await
    }

    async fn act(&self, action: Action) -> Result<()> {
        self.cluster.act(self.node, &self.component, action).await
    }

    /// Returns what the process has printed.
    ///
    /// # Errors
    /// When it never ran.
    pub async fn log(&self) -> Result<String> {
        self.cluster.log(self.node, &self.component).await
    }

    /// Sends a GET to one of its ports.
    ///
    /// # Errors
    /// When no server answers there; a status of 400 and more is an answer.
    pub async fn get(&self, port: u16, path: &str) -> Result<HttpAnswer> {
        let cluster = self.cluster;
        cluster.get(self.node, &self.component, port, path).await
    }

    /// Returns the driver's metrics, in the text format of Prometheus.
    ///
    /// # Errors
    /// When no server answers on the metrics port.
    pub async fn metrics(&self) -> Result<String> {
        Ok(self.get(8095, "/metrics").await?.body)
    }
}

impl<C: ?Sized> fmt::Debug for Process<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on {}", self.component, self.node)
    }
}

/// Returns the conversion of a client's error, with the request.
pub(crate) fn api(what: String) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Api { what, source }
}
