//! A cluster of Docker containers, made by kind from the configurations in `kind/`.
//!
//! It has a name and a Docker network of its own, which nothing leaves; a contributor's own
//! clusters are left alone. The nodes are looked at and broken from outside through Docker, pods
//! and objects through the API server.

mod fence;
mod node_image;
mod tools;

use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::BodyExt as _;
use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{Namespace, Pod};
use k8s_openapi::api::storage::v1::CSINode;
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, LogParams, Patch, PatchParams};
use serde_json::json;
use tokio::time::Instant;

use crate::binaries::workspace;
use crate::cluster::{
    Ability, Action, Cluster, Component, Error, HttpAnswer, Result, api as api_error, apply,
};
use crate::embedded::api::Disturbance;
use crate::embedded::{mount_points, read_manifests};
use crate::images::Images;
use crate::tree::{Tree, View};
use tools::{A_MOMENT, Tools};

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
const START_LIMIT: Duration = Duration::from_secs(180);
const POLL: Duration = Duration::from_millis(200);
const DRIVER_NAME: &str = "secrets-store.csi.k8s.io";
/// Where `probe` is put on every node.
const PROBE: &str = "/usr/local/bin/e2e-probe";
/// What `sh` says when a path of a node is not there.
const ABSENT: &str = "e2e: nothing there";
/// What of a failed run is worth reading besides logs. No Secrets.
const KEPT_KINDS: &str = "nodes,csinodes,csidrivers,namespaces,pods,daemonsets,events,\
     secretproviderclasses,secretproviderclasspodstatuses";

/// What a kind cluster is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Control plane and pods on one node, or two nodes for pods beside it.
    pub nodes: Nodes,
    /// The node image, or a version of `kind/node-images`; absent for the default.
    pub node_image: Option<String>,
    /// Whether to use a cluster that is there, and to leave it behind.
    pub keep: bool,
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
        })
    }
}

/// What is put into a cluster.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Load {
    /// Archives of images, as `docker save` writes them.
    pub images: Vec<PathBuf>,
    /// A static `probe`.
    pub probe: PathBuf,
    /// Applied in order, each with any number of documents.
    pub manifests: Vec<String>,
}

impl Load {
    /// What `deploy/` installs, in its lean form, and the fake provider.
    ///
    /// # Errors
    /// When a manifest cannot be read.
    pub fn standard(images: Images) -> Result<Self> {
        let deploy = workspace().join("deploy");
        let mut manifests = read_manifests(&deploy)?;
        manifests.retain(|manifest| !manifest.contains("kind: DaemonSet"));
        manifests.extend(read_manifests(&deploy.join("lean"))?);
        manifests.extend(read_manifests(&workspace().join("e2e/manifests"))?);
        Ok(Self {
            images: images
                .archives
                .into_iter()
                .map(|image| image.archive)
                .collect(),
            probe: images.probe,
            manifests,
        })
    }
}

/// A running kind cluster. It outlives this value: [`Kind::stop`] ends it.
pub struct Kind {
    tools: Tools,
    options: Options,
    node_image: String,
    client: kube::Client,
}

impl Kind {
    /// Makes a cluster, or takes the one that is there if it may, and installs into it; returns
    /// when every DaemonSet runs and the driver is registered on every node.
    ///
    /// # Errors
    /// [`Error::Start`] with what is missing or went wrong. The cluster is left for a look, and
    /// is replaced by the next start.
    pub async fn start(options: Options, load: &Load) -> Result<Self> {
        let tools = Tools::find().await?;
        let node_image = node_image::choose(&tools, options.node_image.as_deref()).await?;
        fence::put_up(&tools, &node_image).await?;
        let reused = options.keep && is_there(&tools, &options, &node_image).await?;
        if !reused {
            create(&tools, &options, &node_image).await?;
        }
        let client = connect(&tools).await?;
        let cluster = Self {
            tools,
            options,
            node_image,
            client,
        };
        if reused {
            cluster.clear().await?;
        }
        cluster.keep_pods_on_the_first_node().await?;
        cluster.install(load).await?;
        Ok(cluster)
    }

    /// The cluster that an earlier start left behind or another process started, as it is.
    ///
    /// # Errors
    /// When there is none of this kind.
    pub async fn attach(options: Options) -> Result<Self> {
        let tools = Tools::find().await?;
        let node_image = node_image::choose(&tools, options.node_image.as_deref()).await?;
        if !is_there(&tools, &options, &node_image).await? {
            return Err(Error::Start(format!(
                "there is no kind cluster {NAME} like that"
            )));
        }
        let client = connect(&tools).await?;
        Ok(Self {
            tools,
            options,
            node_image,
            client,
        })
    }

    /// Deletes the cluster, its network and the fence; only says goodbye to one that is kept.
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
        let objects = self
            .kubectl(&["get", KEPT_KINDS, "--all-namespaces", "--output=yaml"])
            .await
            .map_err(failed)?;
        std::fs::write(dir.join("objects.yaml"), objects)
            .map_err(|error| failed(error.to_string()))?;
        let to = dir.as_os_str();
        let export = ["export".as_ref(), "logs".as_ref(), to];
        self.tools
            .kind(
                export.into_iter().chain(["--name".as_ref(), NAME.as_ref()]),
                A_MOMENT,
            )
            .await
            .map(|_| ())
            .map_err(failed)
    }

    /// What an earlier run left in a cluster that is used again: its namespaces, and containers
    /// of what may be new images of the same names.
    async fn clear(&self) -> Result<()> {
        let namespaces: Api<Namespace> = Api::all(self.client());
        let list = namespaces.list(&ListParams::default()).await;
        for namespace in list.map_err(api_error("list namespaces".to_owned()))? {
            let name = namespace.name_any();
            if name.starts_with("e2e-") && namespace.metadata.deletion_timestamp.is_none() {
                let deleted = namespaces.delete(&name, &DeleteParams::background()).await;
                deleted.map_err(api_error(format!("delete namespace {name}")))?;
            }
        }
        let sets: Api<DaemonSet> = Api::namespaced(self.client(), "kube-system");
        for name in ["csi-secrets-store", "fake-provider"] {
            if sets
                .get_opt(name)
                .await
                .map_err(api_error(format!("get DaemonSet {name}")))?
                .is_some()
            {
                let deleted = sets.delete(name, &DeleteParams::foreground()).await;
                deleted.map_err(api_error(format!("delete DaemonSet {name}")))?;
                let patience = Patience::new(format!("DaemonSet {name} to be gone"));
                while sets.get_opt(name).await.is_ok_and(|set| set.is_some()) {
                    patience.wait("its pods are being deleted").await?;
                }
            }
        }
        Ok(())
    }

    /// A scenario with one node looks at the first, so that is where the scheduler may place
    /// pods; those that name their node go there all the same. The cluster's DNS is switched
    /// off: see [`fence`].
    async fn keep_pods_on_the_first_node(&self) -> Result<()> {
        for other in self.nodes().iter().skip(1) {
            self.kubectl(&["cordon", other])
                .await
                .map_err(start_error)?;
        }
        self.kubectl(&[
            "-n",
            "kube-system",
            "scale",
            "deployment",
            "coredns",
            "--replicas=0",
        ])
        .await
        .map(|_| ())
        .map_err(start_error)
    }

    async fn install(&self, load: &Load) -> Result<()> {
        for image in &load.images {
            let args = ["load".as_ref(), "image-archive".as_ref(), image.as_os_str()];
            let name = ["--name".as_ref(), NAME.as_ref()];
            self.tools
                .kind(args.into_iter().chain(name), A_MOMENT)
                .await
                .map_err(start_error)?;
        }
        for node in self.options.nodes.names() {
            let to = format!("{node}:{PROBE}");
            self.tools
                .docker(
                    ["cp".as_ref(), load.probe.as_os_str(), to.as_ref()],
                    A_MOMENT,
                )
                .await
                .map_err(start_error)?;
        }
        for manifest in &load.manifests {
            apply(&self.client, "default", manifest).await?;
        }
        self.wait_installed(&self.options.nodes.names()).await
    }

    /// Waits until nodes have what every node has: the driver, registered, and the provider.
    async fn wait_installed(&self, nodes: &[String]) -> Result<()> {
        let what = format!("driver and provider to run on {}", nodes.join(", "));
        let patience = Patience::new(what);
        while let Err(lacking) = self.is_installed(nodes).await {
            patience.wait(&lacking).await?;
        }
        Ok(())
    }

    async fn is_installed(&self, nodes: &[String]) -> std::result::Result<(), String> {
        self.rolled_out().await?;
        for node in nodes {
            self.registered(node).await?;
        }
        Ok(())
    }

    /// Whether every DaemonSet of the cluster has all its pods; else, what is lacking.
    async fn rolled_out(&self) -> std::result::Result<(), String> {
        let sets: Api<DaemonSet> = Api::all(self.client());
        let list = sets.list(&ListParams::default()).await;
        for set in list.map_err(|error| error.to_string())? {
            let status = set.status.clone().unwrap_or_default();
            let wanted = status.desired_number_scheduled;
            let current = status.observed_generation == set.metadata.generation
                && status.updated_number_scheduled == Some(wanted);
            if !current || wanted == 0 || status.number_ready != wanted {
                return Err(format!(
                    "{} of {wanted} pods of DaemonSet {} are ready",
                    status.number_ready,
                    set.name_any()
                ));
            }
        }
        Ok(())
    }

    async fn registered(&self, node: &str) -> std::result::Result<(), String> {
        let csi_nodes: Api<CSINode> = Api::all(self.client());
        let csi_node = csi_nodes
            .get(node)
            .await
            .map_err(|error| error.to_string())?;
        if csi_node
            .spec
            .drivers
            .iter()
            .all(|driver| driver.name != DRIVER_NAME)
        {
            return Err(format!("driver {DRIVER_NAME} is not in CSINode {node}"));
        }
        let socket = Path::new("/var/run/secrets-store-csi-providers/e2e-provider.sock");
        match self.node_tree(node, socket).await {
            Ok(Some(_)) => Ok(()),
            Ok(None) => Err(format!("node {node} has no {}", socket.display())),
            Err(error) => Err(error.to_string()),
        }
    }

    /// The node image has kubectl, and the first node the administrator's credentials.
    async fn kubectl(&self, args: &[&str]) -> std::result::Result<String, String> {
        let node = format!("{NAME}-control-plane");
        let kubectl = ["kubectl", "--kubeconfig=/etc/kubernetes/admin.conf"];
        let kubectl = ["exec", node.as_str()].into_iter().chain(kubectl);
        let args = kubectl.chain(args.iter().copied());
        self.tools.docker(args, A_MOMENT).await
    }

    /// Runs a program on a node.
    async fn on(&self, node: &str, args: &[&str]) -> std::result::Result<String, String> {
        let args = ["exec", node].into_iter().chain(args.iter().copied());
        self.tools.docker(args, A_MOMENT).await
    }

    /// The pod on a node that has a component's container.
    async fn pod_of(&self, node: &str, component: &Component) -> Result<Pod> {
        let pods: Api<Pod> = Api::all(self.client());
        let there = ListParams::default().fields(&format!("spec.nodeName={node}"));
        let list = pods
            .list(&there)
            .await
            .map_err(api_error(format!("list pods of node {node}")))?;
        let container = component.container();
        let has = |pod: &Pod| {
            let spec = pod.spec.iter();
            spec.flat_map(|spec| &spec.containers)
                .any(|found| found.name == container)
        };
        list.into_iter()
            .find(|pod| pod.metadata.deletion_timestamp.is_none() && has(pod))
            .ok_or_else(|| {
                Error::Impossible(format!("no pod of node {node} has a container {container}"))
            })
    }

    /// The containerd id of a component's running container.
    async fn container_of(&self, node: &str, component: &Component) -> Result<Option<String>> {
        let pod = self.pod_of(node, component).await?;
        let statuses = pod.status.and_then(|status| status.container_statuses);
        let status = statuses
            .into_iter()
            .flatten()
            .find(|status| status.name == component.container());
        Ok(status
            .filter(|status| {
                status
                    .state
                    .as_ref()
                    .is_some_and(|state| state.running.is_some())
            })
            .and_then(|status| {
                Some(
                    status
                        .container_id?
                        .strip_prefix("containerd://")?
                        .to_owned(),
                )
            }))
    }

    /// Waits until another container than the one that was killed runs. kubelet lets a container
    /// that dies often wait ever longer; its pod is then made anew.
    async fn wait_restarted(&self, node: &str, component: &Component, killed: &str) -> Result<()> {
        let what = format!("container {} of {node} to come back", component.container());
        let patience = Patience::new(what);
        loop {
            let last = match self.container_of(node, component).await {
                Ok(Some(id)) if id != killed => break,
                Ok(_) => "no other container runs yet".to_owned(),
                Err(error) => error.to_string(),
            };
            self.do_not_let_wait(node, component).await?;
            patience.wait(&last).await?;
        }
        self.wait_installed(&[node.to_owned()]).await
    }

    async fn do_not_let_wait(&self, node: &str, component: &Component) -> Result<()> {
        let Ok(pod) = self.pod_of(node, component).await else {
            return Ok(());
        };
        if !backs_off(&pod, component) {
            return Ok(());
        }
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let pods: Api<Pod> = Api::namespaced(self.client(), &namespace);
        let now = DeleteParams::default().grace_period(0);
        let deleted = pods.delete(&name, &now).await;
        deleted
            .map(|_| ())
            .map_err(api_error(format!("delete pod {name}")))
    }
}

fn backs_off(pod: &Pod, component: &Component) -> bool {
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    statuses
        .filter(|status| status.name == component.container())
        .filter_map(|status| status.state.as_ref()?.waiting.as_ref()?.reason.as_deref())
        .any(|reason| reason == "CrashLoopBackOff")
}

impl Cluster for Kind {
    fn name(&self) -> &'static str {
        "kind"
    }

    fn client(&self) -> kube::Client {
        self.client.clone()
    }

    fn nodes(&self) -> Vec<String> {
        let mut names = self.options.nodes.names();
        match self.options.nodes {
            Nodes::One => names,
            Nodes::Three => names.split_off(1),
        }
    }

    fn can(&self, ability: Ability) -> bool {
        match ability {
            Ability::LookAtNodes | Ability::Reboot => true,
            Ability::DisturbApi | Ability::StopProcesses => false,
        }
    }

    async fn tree(&self, namespace: &str, pod: &str, mount_path: &str, view: View) -> Result<Tree> {
        let mut args = vec!["-n", namespace, "exec", pod, "--", "/probe", "tree"];
        if view == View::Reader {
            args.push("--reader");
        }
        args.push(mount_path);
        let json = self.kubectl(&args).await.map_err(Error::Impossible)?;
        serde_json::from_str(&json)
            .map_err(|error| Error::Impossible(format!("probe in pod {namespace}/{pod}: {error}")))
    }

    async fn node_tree(&self, node: &str, path: &Path) -> Result<Option<Tree>> {
        let path = path.to_string_lossy();
        // A path may go while it is looked at.
        let look = format!(
            "{PROBE} tree \"$1\" || {{ [ -e \"$1\" ] && exit 1; echo '{ABSENT}' >&2; exit 1; }}"
        );
        let json = match self.on(node, &["sh", "-c", &look, "sh", &path]).await {
            Ok(json) => json,
            Err(reason) if reason.ends_with(ABSENT) => return Ok(None),
            Err(reason) => return Err(node_error(node, reason)),
        };
        serde_json::from_str(&json)
            .map(Some)
            .map_err(|error| node_error(node, format!("probe: {error}")))
    }

    async fn mounts(&self, node: &str, below: &Path) -> Result<Vec<PathBuf>> {
        let table = self
            .on(node, &["cat", "/proc/self/mountinfo"])
            .await
            .map_err(|reason| node_error(node, reason))?;
        Ok(mount_points(&table, below))
    }

    async fn act(&self, node: &str, component: &Component, action: Action) -> Result<()> {
        if action != Action::Kill {
            return Err(Error::Impossible(
                "kubelet starts what was stopped, at once".to_owned(),
            ));
        }
        let id = self.container_of(node, component).await?;
        let id = id.ok_or_else(|| {
            node_error(
                node,
                format!("container {} does not run", component.container()),
            )
        })?;
        self.on(
            node,
            &[
                "ctr",
                "--namespace",
                "k8s.io",
                "tasks",
                "kill",
                "--signal",
                "SIGKILL",
                &id,
            ],
        )
        .await
        .map_err(|reason| node_error(node, reason))?;
        self.wait_restarted(node, component, &id).await
    }

    async fn log(&self, node: &str, component: &Component) -> Result<String> {
        let pod = self.pod_of(node, component).await?;
        let name = pod.name_any();
        let pods: Api<Pod> = Api::namespaced(self.client(), &pod.namespace().unwrap_or_default());
        let mut params = LogParams {
            container: Some(component.container().to_owned()),
            ..LogParams::default()
        };
        let now = pods.logs(&name, &params).await;
        let now = now.map_err(api_error(format!("logs of pod {name}")))?;
        // What it printed before it was last restarted; an error where it never was.
        params.previous = true;
        let before = pods.logs(&name, &params).await.unwrap_or_default();
        Ok(before + &now)
    }

    async fn get(
        &self,
        node: &str,
        component: &Component,
        port: u16,
        path: &str,
    ) -> Result<HttpAnswer> {
        let pod = self.pod_of(node, component).await?;
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let proxy = format!("/api/v1/namespaces/{namespace}/pods/{name}:{port}/proxy{path}");
        let what = format!("GET {proxy}");
        let request = http::Request::get(proxy)
            .body(kube::client::Body::empty())
            .map_err(|error| Error::Impossible(format!("{what}: {error}")))?;
        let answer = self.client.send(request).await;
        let answer = answer.map_err(api_error(what.clone()))?;
        let status = answer.status().as_u16();
        let body = answer.into_body().collect().await;
        let body = body.map_err(api_error(what))?.to_bytes();
        Ok(HttpAnswer {
            status,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }

    async fn reboot(&self, node: &str) -> Result<()> {
        // So that what is waited for below is the new registration.
        let csi_nodes: Api<CSINode> = Api::all(self.client());
        let none = Patch::Merge(json!({"spec": {"drivers": []}}));
        csi_nodes
            .patch(node, &PatchParams::default(), &none)
            .await
            .map_err(api_error(format!("patch CSINode {node}")))?;
        self.tools
            .docker(["restart", "--time", "0", node], A_MOMENT)
            .await
            .map_err(|reason| node_error(node, reason))?;
        self.wait_installed(&[node.to_owned()]).await
    }

    async fn disturb_api(&self, _: Disturbance) -> Result<()> {
        Err(Error::Impossible(
            "kind's API server cannot be made to misbehave".to_owned(),
        ))
    }
}

/// Waiting for something, for [`START_LIMIT`] at most.
struct Patience {
    what: String,
    deadline: Instant,
}

impl Patience {
    fn new(what: String) -> Self {
        Self {
            what,
            deadline: Instant::now() + START_LIMIT,
        }
    }

    /// Until the next look; an error when it has been long enough.
    async fn wait(&self, last: &str) -> Result<()> {
        if Instant::now() > self.deadline {
            return Err(Error::Timeout {
                what: self.what.clone(),
                after: START_LIMIT,
                last: last.to_owned(),
            });
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }
}

/// Whether the cluster exists, has these nodes and is made from this image.
async fn is_there(tools: &Tools, options: &Options, node_image: &str) -> Result<bool> {
    let nodes = tools
        .kind(["get", "nodes", "--name", NAME], A_MOMENT)
        .await
        .map_err(start_error)?;
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
        let image = tools.docker(image, A_MOMENT).await.map_err(start_error)?;
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
        .map_err(start_error)
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
        .map_err(start_error)
}

/// A client with the credentials that kind keeps in the first node.
async fn connect(tools: &Tools) -> Result<kube::Client> {
    let failed =
        |error: &dyn std::fmt::Display| Error::Start(format!("kind's kubeconfig: {error}"));
    let yaml = tools
        .kind(["get", "kubeconfig", "--name", NAME], A_MOMENT)
        .await
        .map_err(start_error)?;
    let kubeconfig = kube::config::Kubeconfig::from_yaml(&yaml).map_err(|error| failed(&error))?;
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default())
        .await
        .map_err(|error| failed(&error))?;
    kube::Client::try_from(config).map_err(|error| failed(&error))
}

fn start_error(reason: String) -> Error {
    Error::Start(reason)
}

fn node_error(node: &str, reason: String) -> Error {
    Error::Node {
        node: node.to_owned(),
        reason,
    }
}
