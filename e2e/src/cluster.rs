//! What a test can ask of a cluster, whichever it is.
//!
//! A scenario is written against [`Cluster`] and does not know whether it runs in the embedded
//! cluster, on real Kubernetes binaries or in kind. An implementation supplies what differs: how
//! one looks into a volume, and how one reaches the driver's and the provider's processes. All
//! else is the Kubernetes API and stands here once.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use embedded::HttpAnswer;
use embedded::api::Disturbance;
use embedded::is_ready;
use k8s_openapi::api::core::v1::{Event, Namespace, Pod};
use kube::ResourceExt;
use kube::api::{
    Api, DeleteParams, DynamicObject, ListParams, ObjectMeta, Patch, PatchParams, PostParams,
};

use crate::reader::{Readings, Wanted};
use crate::tree::{Tree, View};

/// Where a node keeps its pods.
const PODS: &str = "/var/lib/kubelet/pods";
/// Between two looks at what is waited for.
const POLL: Duration = Duration::from_millis(25);

/// A thing that not every cluster can do. A scenario that needs it is skipped where it is
/// missing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ability {
    /// [`Cluster::disturb_api`].
    DisturbApi,
    /// [`Cluster::reboot`].
    Reboot,
    /// [`Cluster::node_tree`] and [`Cluster::mounts`]: looking at a node outside of its pods.
    LookAtNodes,
    /// Containers that run as another user than root, with groups of their own.
    OtherUsers,
    /// [`Process::stop`], after which the process stays away until it is started.
    StopProcesses,
}

/// A process on a node that a scenario may watch and break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Component {
    /// The driver: container `secrets-store`.
    Driver,
    /// A provider by its container's name, `fake-provider` for ours.
    Provider(String),
}

impl Component {
    /// The container's name in its DaemonSet.
    pub fn container(&self) -> &str {
        match self {
            Self::Driver => "secrets-store",
            Self::Provider(name) => name,
        }
    }
}

/// What can be done to a [`Component`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// SIGKILL; it comes back by itself, as after a crash.
    Kill,
    /// SIGTERM, and it stays away.
    Stop,
    /// Undoes a stop.
    Start,
}

/// Why a cluster did not do as asked.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The API server's answer.
    #[error("{what}: {source}")]
    Api {
        /// What was asked.
        what: String,
        /// Its answer.
        source: kube::Error,
    },
    /// What was waited for did not come.
    #[error("after {after:?} still waiting for {what}; {last}")]
    Timeout {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
        /// What was seen instead.
        last: String,
    },
    /// A manifest is not one.
    #[error("manifest: {0}")]
    Manifest(String),
    /// This cluster lacks an [`Ability`], or the pod, node or volume is not there.
    #[error("{0}")]
    Impossible(String),
    /// A node did not do as told.
    #[error("node {node}: {reason}")]
    Node {
        /// The node's name.
        node: String,
        /// What happened.
        reason: String,
    },
    /// The cluster did not come up.
    #[error("start of the cluster: {0}")]
    Start(String),
}

/// The result of asking a cluster.
pub type Result<T> = std::result::Result<T, Error>;

/// A Kubernetes cluster with the driver and a provider on every node.
pub trait Cluster: Send + Sync {
    /// `embedded`, `local` or `kind`.
    fn name(&self) -> &'static str;

    /// An administrator's client.
    fn client(&self) -> kube::Client;

    /// Names of the nodes that run pods.
    fn nodes(&self) -> Vec<String>;

    /// Whether this cluster can do that.
    fn can(&self, ability: Ability) -> bool;

    /// What `probe` prints when it runs as the user of a pod's container, with these arguments
    /// and after them the path of a mount, given as the container has it. The pod must run.
    fn probe(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        arguments: &[String],
    ) -> impl Future<Output = Result<String>> + Send;

    /// What stands below a path of a node; none when nothing is there.
    fn node_tree(
        &self,
        node: &str,
        path: &Path,
    ) -> impl Future<Output = Result<Option<Tree>>> + Send;

    /// Mount points at and below a path of a node.
    fn mounts(&self, node: &str, below: &Path)
    -> impl Future<Output = Result<Vec<PathBuf>>> + Send;

    /// Acts on a process; returns when it is gone or there again.
    fn act(
        &self,
        node: &str,
        component: &Component,
        action: Action,
    ) -> impl Future<Output = Result<()>> + Send;

    /// What a process has printed.
    fn log(&self, node: &str, component: &Component)
    -> impl Future<Output = Result<String>> + Send;

    /// A GET to a port of a process, over its pod's network.
    fn get(
        &self,
        node: &str,
        component: &Component,
        port: u16,
        path: &str,
    ) -> impl Future<Output = Result<HttpAnswer>> + Send;

    /// Takes a node down without warning and brings it up again: mounts are gone, its disk is
    /// not. Returns when the node and its driver are back.
    fn reboot(&self, node: &str) -> impl Future<Output = Result<()>> + Send;

    /// Makes the API server misbehave towards pods.
    fn disturb_api(&self, disturbance: Disturbance) -> impl Future<Output = Result<()>> + Send;

    /// What stands in a container's mount, as its user sees it.
    fn tree(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        view: View,
    ) -> impl Future<Output = Result<Tree>> + Send {
        async move {
            let arguments = view.arguments();
            printed(&self.probe(namespace, pod, mount_path, &arguments).await?)
        }
    }

    /// Reads files of a container's mount over and over, as its user, until one of them says so.
    fn read(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        wanted: &Wanted,
    ) -> impl Future<Output = Result<Readings>> + Send {
        async move {
            let arguments = wanted.arguments();
            printed(&self.probe(namespace, pod, mount_path, &arguments).await?)
        }
    }

    /// Makes a pod's kubelet look at it again at once.
    fn look_again(&self, namespace: &str, pod: &str) -> impl Future<Output = Result<()>> + Send {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        async move {
            let count = COUNT.fetch_add(1, Ordering::Relaxed).to_string();
            let annotations = serde_json::json!({"e2e/look-again": count});
            let patch = serde_json::json!({"metadata": {"annotations": annotations}});
            Api::<Pod>::namespaced(self.client(), namespace)
                .patch(pod, &PatchParams::default(), &Patch::Merge(patch))
                .await
                .map(drop)
                .map_err(api(format!("annotate pod {namespace}/{pod}")))
        }
    }

    /// The driver on a node.
    fn driver<'a>(&'a self, node: &'a str) -> Process<'a, Self> {
        Process {
            cluster: self,
            node,
            component: Component::Driver,
        }
    }

    /// A provider on a node, by its container's name.
    fn provider<'a>(&'a self, node: &'a str, name: &str) -> Process<'a, Self> {
        Process {
            cluster: self,
            node,
            component: Component::Provider(name.to_owned()),
        }
    }

    /// Makes a namespace for one scenario, of a name that no other has.
    fn namespace(&self) -> impl Future<Output = Result<String>> + Send {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        async move {
            let count = COUNT.fetch_add(1, Ordering::Relaxed);
            // Unique among the runs against a cluster that stays up, too.
            let moment = jiff::Timestamp::now().as_millisecond() & 0xff_ffff_ffff;
            let name = format!("e2e-{moment:x}-{count}");
            let namespace = Namespace {
                metadata: ObjectMeta {
                    name: Some(name.clone()),
                    ..ObjectMeta::default()
                },
                ..Namespace::default()
            };
            Api::<Namespace>::all(self.client())
                .create(&PostParams::default(), &namespace)
                .await
                .map_err(api(format!("create namespace {name}")))?;
            self.wait_namespace(&name).await?;
            Ok(name)
        }
    }

    /// Waits until a new namespace can have pods. Where controllers fill it, that is later.
    #[doc(hidden)]
    fn wait_namespace(&self, _: &str) -> impl Future<Output = Result<()>> + Send {
        std::future::ready(Ok(()))
    }

    /// Applies every document of a manifest, in its order. Objects that name no namespace go to
    /// the given one.
    fn apply(
        &self,
        namespace: &str,
        manifest: &str,
    ) -> impl Future<Output = Result<Vec<DynamicObject>>> + Send {
        async move { apply(&self.client(), namespace, manifest).await }
    }

    /// Deletes a pod with its own grace period; does not wait.
    fn delete_pod(&self, namespace: &str, name: &str) -> impl Future<Output = Result<()>> + Send {
        async move {
            let pods = Api::<Pod>::namespaced(self.client(), namespace);
            let deleted = pods.delete(name, &DeleteParams::default()).await;
            deleted
                .map(|_| ())
                .map_err(api(format!("delete pod {namespace}/{name}")))
        }
    }

    /// A pod as it is now; none when there is none.
    fn pod(&self, namespace: &str, name: &str) -> impl Future<Output = Result<Option<Pod>>> + Send {
        async move {
            let pods = Api::<Pod>::namespaced(self.client(), namespace);
            pods.get_opt(name)
                .await
                .map_err(api(format!("get pod {namespace}/{name}")))
        }
    }

    /// Waits until a pod is ready.
    ///
    /// The error of a timeout shows the pod's state and events.
    fn wait_ready(
        &self,
        namespace: &str,
        name: &str,
        limit: Duration,
    ) -> impl Future<Output = Result<Pod>> + Send {
        async move {
            let what = format!("pod {namespace}/{name} to be ready");
            let ready = |pod: Option<Pod>| pod.filter(is_ready);
            self.wait_pod(namespace, name, &what, limit, ready).await
        }
    }

    /// Waits until there is no pod of that name.
    fn wait_gone(
        &self,
        namespace: &str,
        name: &str,
        limit: Duration,
    ) -> impl Future<Output = Result<()>> + Send {
        async move {
            let what = format!("pod {namespace}/{name} to be gone");
            let gone = |pod: Option<Pod>| pod.is_none().then_some(());
            self.wait_pod(namespace, name, &what, limit, gone).await
        }
    }

    /// Waits until nothing of a pod is left on its node: no mount and no directory. A pod
    /// without grace period leaves the API before that. Needs [`Ability::LookAtNodes`].
    fn wait_cleaned_up(
        &self,
        pod: &Pod,
        limit: Duration,
    ) -> impl Future<Output = Result<()>> + Send {
        async move {
            let what = format!("node to be rid of pod {}", pod.name_any());
            let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
            let node = node
                .ok_or_else(|| Error::Impossible(format!("pod {} has no node", pod.name_any())))?;
            let dir = Path::new(PODS).join(pod.uid().unwrap_or_default());
            let deadline = tokio::time::Instant::now() + limit;
            loop {
                let mounts = self.mounts(node, &dir).await?;
                let tree = self.node_tree(node, &dir).await?;
                if mounts.is_empty() && tree.is_none() {
                    return Ok(());
                }
                if tokio::time::Instant::now() > deadline {
                    let paths = tree.map(|tree| tree.entries).unwrap_or_default();
                    let paths: Vec<_> = paths.into_iter().map(|entry| entry.path).collect();
                    return Err(Error::Timeout {
                        what,
                        after: limit,
                        last: format!(
                            "in {} there are mounts {mounts:?} and {paths:?}",
                            dir.display()
                        ),
                    });
                }
                tokio::time::sleep(POLL).await;
            }
        }
    }

    /// Waits for an event on a pod, by its reason and what its message says.
    fn wait_event(
        &self,
        namespace: &str,
        pod: &str,
        reason: &str,
        message: impl Fn(&str) -> bool + Send + Sync,
        limit: Duration,
    ) -> impl Future<Output = Result<Event>> + Send {
        async move {
            let deadline = tokio::time::Instant::now() + limit;
            loop {
                let events = self.events(namespace, pod).await?;
                let found = events.iter().find(|event| {
                    event.reason.as_deref() == Some(reason)
                        && message(event.message.as_deref().unwrap_or_default())
                });
                if let Some(event) = found {
                    return Ok(event.clone());
                }
                if tokio::time::Instant::now() > deadline {
                    return Err(Error::Timeout {
                        what: format!("an event {reason} on pod {namespace}/{pod}"),
                        after: limit,
                        last: describe_events(&events),
                    });
                }
                tokio::time::sleep(POLL).await;
            }
        }
    }

    /// All events on pods of that name.
    fn events(
        &self,
        namespace: &str,
        pod: &str,
    ) -> impl Future<Output = Result<Vec<Event>>> + Send {
        async move {
            let events = Api::<Event>::namespaced(self.client(), namespace);
            let about = ListParams::default().fields(&format!("involvedObject.name={pod}"));
            let list = events
                .list(&about)
                .await
                .map_err(api(format!("list events in {namespace}")))?;
            Ok(list.items)
        }
    }

    /// Looks at a pod until `reached` has a result.
    #[doc(hidden)]
    fn wait_pod<T: Send>(
        &self,
        namespace: &str,
        name: &str,
        what: &str,
        limit: Duration,
        reached: impl Fn(Option<Pod>) -> Option<T> + Send + Sync,
    ) -> impl Future<Output = Result<T>> + Send {
        async move {
            let deadline = tokio::time::Instant::now() + limit;
            loop {
                let pod = self.pod(namespace, name).await?;
                let last = pod
                    .as_ref()
                    .map_or_else(|| "there is none".to_owned(), describe);
                if let Some(result) = reached(pod) {
                    return Ok(result);
                }
                if tokio::time::Instant::now() > deadline {
                    let events = describe_events(&self.events(namespace, name).await?);
                    return Err(Error::Timeout {
                        what: what.to_owned(),
                        after: limit,
                        last: format!("{last}; {events}"),
                    });
                }
                tokio::time::sleep(POLL).await;
            }
        }
    }
}

pub(crate) fn printed<T: serde::de::DeserializeOwned>(json: &str) -> Result<T> {
    serde_json::from_str(json)
        .map_err(|error| Error::Impossible(format!("probe's output: {error}")))
}

/// A component of a node, to be watched and broken.
pub struct Process<'a, C: ?Sized> {
    cluster: &'a C,
    node: &'a str,
    component: Component,
}

impl<C: Cluster + ?Sized> Process<'_, C> {
    /// SIGKILL; it comes back by itself. Returns when it is gone.
    ///
    /// # Errors
    /// When it does not run.
    pub async fn kill(&self) -> Result<()> {
        self.cluster
            .act(self.node, &self.component, Action::Kill)
            .await
    }

    /// Stops it until it is started again. Needs [`Ability::StopProcesses`].
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn stop(&self) -> Result<()> {
        self.cluster
            .act(self.node, &self.component, Action::Stop)
            .await
    }

    /// Starts it again.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn start(&self) -> Result<()> {
        self.cluster
            .act(self.node, &self.component, Action::Start)
            .await
    }

    /// What it has printed.
    ///
    /// # Errors
    /// When it never ran.
    pub async fn log(&self) -> Result<String> {
        self.cluster.log(self.node, &self.component).await
    }

    /// A GET to one of its ports.
    ///
    /// # Errors
    /// When nobody answers there; a status of 400 and more is an answer.
    pub async fn get(&self, port: u16, path: &str) -> Result<HttpAnswer> {
        self.cluster
            .get(self.node, &self.component, port, path)
            .await
    }

    /// The driver's metrics, as Prometheus' text.
    ///
    /// # Errors
    /// When nobody answers on the metrics port.
    pub async fn metrics(&self) -> Result<String> {
        Ok(self.get(8095, "/metrics").await?.body)
    }
}

impl<C: ?Sized> fmt::Debug for Process<'_, C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} on {}", self.component, self.node)
    }
}

/// Applies every document of a manifest by server-side apply.
///
/// # Errors
/// [`Error::Manifest`] for what is no object, [`Error::Api`] for what the server refuses.
pub async fn apply(
    client: &kube::Client,
    namespace: &str,
    manifest: &str,
) -> Result<Vec<DynamicObject>> {
    Ok(embedded::apply(client, namespace, manifest).await?)
}

pub(crate) fn api(what: String) -> impl FnOnce(kube::Error) -> Error {
    move |source| Error::Api { what, source }
}

fn describe(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let waiting: Vec<_> = status
        .container_statuses
        .iter()
        .flatten()
        .filter_map(|container| container.state.as_ref()?.waiting.as_ref()?.reason.clone())
        .collect();
    format!(
        "it is {} on node {}, {}waiting: {waiting:?}",
        status.phase.unwrap_or_default(),
        pod.spec
            .as_ref()
            .and_then(|spec| spec.node_name.as_deref())
            .unwrap_or("none"),
        if pod.metadata.deletion_timestamp.is_some() {
            "being deleted, "
        } else {
            ""
        },
    )
}

fn describe_events(events: &[Event]) -> String {
    let lines: Vec<_> = events
        .iter()
        .map(|event| {
            format!(
                "{} ({}): {}",
                event.reason.as_deref().unwrap_or_default(),
                event.count.unwrap_or(1),
                event.message.as_deref().unwrap_or_default()
            )
        })
        .collect();
    format!("events: {lines:?}")
}
