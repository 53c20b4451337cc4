//! The [`Cluster`] interface over the embedded cluster: an API server and a kubelet of our own,
//! for tests without Kubernetes. Driver, provider and probe are the real executables.

use std::fs;
use std::path::{Path, PathBuf};

use embedded::api::{ApiServer, Disturbance};
use embedded::{Options, Status};
use k8s_openapi::api::core::v1::Pod;

use crate::binaries::{Binaries, workspace};
use crate::cluster::{Action, Cluster, Component, Error, HttpAnswer, Result, printed};
use crate::host::{copy_files, mount_points_in};
use crate::install::{Form, Installation, read_manifests};
use crate::manifest::change_object;
use crate::namespace::Namespace;
use crate::tree::{Tree, View};
use crate::user::User;

/// The driver's ClusterRole, and how many of its rules, the first ones, the driver uses.
const ROLE: &str = "secretproviderclasses-role";
const USED: usize = 4;
/// The kinds whose objects are kept of a failed scenario.
const KEPT_KINDS: [&str; 9] = [
    "nodes",
    "csinodes.storage.k8s.io",
    "csidrivers.storage.k8s.io",
    "namespaces",
    "pods",
    "daemonsets.apps",
    "events",
    "secretproviderclasses.secrets-store.csi.x-k8s.io",
    "secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io",
];

/// The manifests of a standard cluster: the lean form of `deploy/`, and the fake provider. The driver has
/// only the rights that it uses, and none of those for the existing driver: so the scenarios show that
/// these suffice.
///
/// # Errors
/// When a manifest cannot be read.
pub fn manifests() -> Result<Vec<String>> {
    let mut manifests = Installation::read(&workspace().join("deploy"), &Form::Lean)?.manifests;
    change_object(&mut manifests, "ClusterRole", ROLE, |role| {
        if let Some(rules) = role["rules"].as_array_mut() {
            rules.truncate(USED);
        }
    })?;
    manifests.extend(read_manifests(&workspace().join("e2e/manifests"))?);
    Ok(manifests)
}

/// One node with the standard manifests.
///
/// # Errors
/// When a manifest cannot be read.
pub fn standard(binaries: &Binaries) -> Result<Options> {
    Ok(Options {
        manifests: manifests()?,
        ..bare(binaries)
    })
}

/// One node on which nothing runs.
pub fn bare(binaries: &Binaries) -> Options {
    let programs = [
        ("secrets-store-csi", &binaries.driver),
        ("fake-provider", &binaries.fake_provider),
        ("probe", &binaries.probe),
    ];
    Options {
        programs: programs
            .map(|(name, path)| (name.to_owned(), path.clone()))
            .into(),
        ..Options::bare(binaries.e2e.clone())
    }
}

/// A running embedded cluster. Dropping it ends every process of it.
pub struct Embedded(embedded::Cluster);

impl Embedded {
    /// Starts a cluster; returns when every DaemonSet runs and the driver is registered on every
    /// node.
    ///
    /// # Errors
    /// [`Error::Start`] with the log of the node that did not come up.
    pub async fn start(options: Options) -> Result<Self> {
        Ok(Self(embedded::Cluster::start(options).await?))
    }

    /// The API server, for counting requests.
    pub fn api(&self) -> &ApiServer {
        self.0.api()
    }

    /// The root directory of a node's disk.
    pub fn disk(&self, node: &str) -> PathBuf {
        self.0.disk(node)
    }

    /// Returns the state of every container of a node.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn containers(&self, node: &str) -> Result<Vec<Status>> {
        Ok(self.0.containers(node).await?)
    }

    /// Returns the process of a node, which sees its mounts; another one after a reboot.
    ///
    /// # Errors
    /// When the node is down.
    pub async fn process(&self, node: &str) -> Result<u32> {
        Ok(self.0.process(node).await?)
    }

    /// Writes the logs of all nodes, and the objects but no Secrets, into a directory.
    ///
    /// # Errors
    /// When they cannot be read or written.
    pub fn keep_logs(&self, dir: &Path) -> Result<()> {
        let failed = |error: std::io::Error| Error::Start(format!("keep logs: {error}"));
        for node in self.0.nodes() {
            copy_files(&self.0.logs(&node), &dir.join("logs").join(node)).map_err(failed)?;
        }
        let objects: serde_json::Map<_, _> = KEPT_KINDS
            .map(|kind| (kind.to_owned(), self.api().all(kind).into()))
            .into_iter()
            .collect();
        let objects =
            serde_json::to_string_pretty(&objects).map_err(|error| failed(error.into()))?;
        fs::write(dir.join("objects.json"), objects).map_err(failed)
    }

    /// Starts a node's kubelet anew; the containers go on.
    ///
    /// # Errors
    /// When the node does not answer.
    pub async fn restart_kubelet(&self, node: &str) -> Result<()> {
        Ok(self.0.restart_kubelet(node).await?)
    }

    /// Runs a program on a node, as root, and returns what it prints.
    ///
    /// # Errors
    /// Returns what it prints to standard error when it fails.
    pub async fn exec(&self, node: &str, command: &[&str]) -> Result<String> {
        Ok(self.0.exec(node, command).await?)
    }

    /// Decides whether the mounts of a component's next processes stay in its container.
    ///
    /// # Errors
    /// When the node does not run it.
    pub async fn isolate(&self, node: &str, component: &Component, isolated: bool) -> Result<()> {
        let container = component.container();
        Ok(self.0.isolate(node, container, isolated).await?)
    }

    /// Gives a component's next processes these arguments besides those of its manifest.
    ///
    /// # Errors
    /// When the node does not run it.
    pub async fn add_arguments(
        &self,
        node: &str,
        component: &Component,
        arguments: &[&str],
    ) -> Result<()> {
        let container = component.container();
        Ok(self.0.add_arguments(node, container, arguments).await?)
    }

    async fn probe_on(&self, node: &str, arguments: &[String], path: &Path) -> Result<String> {
        let path = path.to_string_lossy();
        let arguments = arguments.iter().map(String::as_str);
        let command: Vec<&str> = ["probe"]
            .into_iter()
            .chain(arguments)
            .chain([&*path])
            .collect();
        Ok(self.0.exec(node, &command).await?)
    }
}

impl Cluster for Embedded {
    fn name(&self) -> &'static str {
        "embedded"
    }

    fn client(&self) -> kube::Client {
        self.0.client()
    }

    fn nodes(&self) -> Vec<String> {
        self.0.nodes()
    }

    async fn probe(
        &self,
        namespace: &str,
        pod: &str,
        mount_path: &str,
        arguments: &[String],
    ) -> Result<String> {
        let name = format!("pod {namespace}/{pod}");
        let found = Namespace::of(self.client(), namespace).pod(pod).await?;
        let found = found.ok_or_else(|| Error::Impossible(format!("there is no {name}")))?;
        let (node, path) = volume_of(&self.0, &found, mount_path).ok_or_else(|| {
            Error::Impossible(format!(
                "{name} has no CSI volume at {mount_path} on a node"
            ))
        })?;
        let user = User::of(&found)
            .map_err(|error| Error::Impossible(format!("{name} has a user id: {error}")))?;
        let arguments: Vec<_> = user
            .arguments()
            .into_iter()
            .chain(arguments.iter().cloned())
            .collect();
        self.probe_on(&node, &arguments, &path).await
    }

    async fn node_tree(&self, node: &str, path: &Path) -> Result<Option<Tree>> {
        let json = self.probe_on(node, &View::Disk.arguments(), path).await?;
        printed(&json)
    }

    async fn mounts(&self, node: &str, below: &Path) -> Result<Vec<PathBuf>> {
        let table = self.0.exec(node, &["cat", "/proc/self/mountinfo"]).await?;
        Ok(mount_points_in(&table, below))
    }

    async fn act(&self, node: &str, component: &Component, action: Action) -> Result<()> {
        let container = component.container();
        match action {
            Action::Kill => self.0.kill(node, container).await?,
            Action::Stop => self.0.stop_container(node, container).await?,
            Action::Start => self.0.start_container(node, container).await?,
        }
        Ok(())
    }

    async fn log(&self, node: &str, component: &Component) -> Result<String> {
        Ok(self.0.log(node, component.container()).await?)
    }

    /// All containers share the node's loopback.
    async fn get(&self, node: &str, _: &Component, port: u16, path: &str) -> Result<HttpAnswer> {
        Ok(self.0.get(node, port, path).await?)
    }

    async fn reboot(&self, node: &str) -> Result<()> {
        Ok(self.0.reboot(node).await?)
    }

    async fn disturb_api(&self, disturbance: Disturbance) -> Result<()> {
        self.api().disturb(disturbance);
        Ok(())
    }
}

/// The node and the path of what a pod's containers see at a mount path.
fn volume_of(
    cluster: &embedded::Cluster,
    pod: &Pod,
    mount_path: &str,
) -> Option<(String, PathBuf)> {
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
    let mut path = cluster.target_path(pod.metadata.uid.as_deref()?, &volume.name);
    if let Some(sub_path) = &mount.sub_path {
        path.push(sub_path);
    }
    Some((spec.node_name.clone()?, path))
}
