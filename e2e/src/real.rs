//! What clusters of real Kubernetes have in common: the driver and the provider run in pods of
//! DaemonSets, which are found, read, stopped and renewed through the API server.

use std::time::{Duration, Instant};

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerStatus, Namespace, Pod, ServiceAccount};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, LogParams, Patch, PatchParams};
use serde_json::json;

use crate::cluster::{Cluster, Component, Error, Result, api as api_error};
use crate::install::{DRIVER, NAMESPACE, STOPPED, classes, wait_rolled_out};

const POLL: Duration = Duration::from_millis(50);
/// For whatever kubelet or a controller has to do.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// The DaemonSet of the tests' provider.
const PROVIDER: &str = "fake-provider";

const KUBELET_PODS: &str = "/var/lib/kubelet/pods";
/// Of a path there that belongs to a CSI volume.
const CSI_VOLUMES: &str = "/volumes/kubernetes.io~csi/";

/// What of a failed run is worth reading besides logs. No Secrets.
pub(crate) const KEPT_KINDS: &str = "nodes,csinodes,csidrivers,namespaces,pods,daemonsets,events,\
     secretproviderclasses,secretproviderclasspodstatuses";

/// Waits for something, for so long in all.
pub(crate) struct Patience {
    what: String,
    limit: Duration,
    started: Instant,
}

impl Patience {
    /// For [`LIMIT`].
    pub(crate) fn new(what: String) -> Self {
        Self::of(what, LIMIT)
    }

    pub(crate) fn of(what: String, limit: Duration) -> Self {
        Self {
            what,
            limit,
            started: Instant::now(),
        }
    }

    /// Until the next look.
    ///
    /// # Errors
    /// When it has been long enough; with what was last seen.
    pub(crate) async fn wait(&self, last: &str) -> Result<()> {
        if self.started.elapsed() > self.limit {
            return Err(Error::Timeout {
                what: self.what.clone(),
                after: self.limit,
                last: last.to_owned(),
            });
        }
        tokio::time::sleep(POLL).await;
        Ok(())
    }
}

/// Makes the cluster as new: what earlier scenarios left is gone, driver and provider run and
/// have just been started.
///
/// # Errors
/// What does not go or does not come.
pub(crate) async fn renew(cluster: &impl Cluster) -> Result<()> {
    let client = &cluster.client();
    delete_namespaces(client).await?;
    delete_classes_of_default(client).await?;
    let sets = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE);
    let list = sets
        .list(&ListParams::default())
        .await
        .map_err(api_error("list DaemonSets".to_owned()))?;
    let mut old = Vec::new();
    for set in list {
        let name = set.name_any();
        if name == DRIVER || name == PROVIDER {
            run_daemon_set(client, &name, true).await?;
            old.extend(pods_of(client, &set).await?);
        } else if set.labels().contains_key("app") && name.ends_with("-provider") {
            old.extend(pods_of(client, &set).await?);
            sets.delete(&name, &DeleteParams::default())
                .await
                .map_err(api_error(format!("delete DaemonSet {name}")))?;
        }
    }
    // By the driver that is still there: the new one counts from nothing.
    for node in cluster.nodes() {
        wait_for_volumes_to_go(cluster, &node).await?;
    }
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    for pod in &old {
        let deleted = pods.delete(&pod.name_any(), &DeleteParams::default()).await;
        match deleted {
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            other => drop(other.map_err(api_error(format!("delete pod {}", pod.name_any())))?),
        }
    }
    let patience = Patience::new("pods of driver and provider to be replaced".to_owned());
    for pod in &old {
        while is_there(&pods, pod).await? {
            patience
                .wait(&format!("{} is there", pod.name_any()))
                .await?;
        }
    }
    wait_rolled_out(client, LIMIT).await?;
    // A DaemonSet says for a moment that it runs the pods that have just gone.
    for node in cluster.nodes() {
        for component in [Component::Driver, Component::Provider(PROVIDER.to_owned())] {
            wait_serving(cluster, &node, &component, LIMIT).await?;
        }
    }
    Ok(())
}

/// Waits until the driver or the tests' provider serves HTTP on a node. Their pods have no
/// readiness probe, so that they are ready when their process starts.
///
/// # Errors
/// When it does not after `limit`.
pub(crate) async fn wait_serving(
    cluster: &impl Cluster,
    node: &str,
    component: &Component,
    limit: Duration,
) -> Result<()> {
    let (port, path) = match component {
        Component::Driver => (8095, "/metrics"),
        Component::Provider(_) => (8080, "/calls"),
    };
    let patience = Patience::of(format!("{component:?} to serve on {node}"), limit);
    loop {
        let last = match cluster.get(node, component, port, path).await {
            Ok(answer) if answer.status == 200 => return Ok(()),
            // The API server's, which passes it on.
            Ok(answer) => format!("status {}: {}", answer.status, answer.body),
            Err(error) => error.to_string(),
        };
        patience.wait(&last).await?;
    }
}

/// kubelet is done with a pod later than the API server is. A volume's directory goes after the
/// driver was called.
async fn wait_for_volumes_to_go(cluster: &impl Cluster, node: &str) -> Result<()> {
    let patience = Patience::new(format!("volumes on {node} to go"));
    loop {
        let last = match cluster.node_tree(node, KUBELET_PODS.as_ref()).await {
            Ok(tree) => {
                let entries = tree.into_iter().flat_map(|tree| tree.entries);
                let mut paths = entries.map(|entry| entry.path);
                match paths.find(|path| path.contains(CSI_VOLUMES)) {
                    Some(left) => format!("{left} is there"),
                    None => return Ok(()),
                }
            }
            // kubelet takes directories away while they are read.
            Err(error) => error.to_string(),
        };
        patience.wait(&last).await?;
    }
}

async fn is_there(pods: &Api<Pod>, pod: &Pod) -> Result<bool> {
    let now = pods.get_opt(&pod.name_any()).await;
    let now = now.map_err(api_error(format!("get pod {}", pod.name_any())))?;
    Ok(now.is_some_and(|now| now.uid() == pod.uid()))
}

async fn pods_of(client: &kube::Client, set: &DaemonSet) -> Result<Vec<Pod>> {
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let list = pods
        .list(&ListParams::default())
        .await
        .map_err(api_error(format!("list pods in {NAMESPACE}")))?;
    let is_of_set = |pod: &Pod| {
        let mut owners = pod.owner_references().iter();
        owners.any(|owner| Some(&owner.uid) == set.metadata.uid.as_ref())
    };
    Ok(list.items.into_iter().filter(is_of_set).collect())
}

async fn delete_namespaces(client: &kube::Client) -> Result<()> {
    let namespaces = Api::<Namespace>::all(client.clone());
    let list = namespaces
        .list(&ListParams::default())
        .await
        .map_err(api_error("list namespaces".to_owned()))?;
    let now = DeleteParams {
        grace_period_seconds: Some(0),
        ..DeleteParams::default()
    };
    for namespace in list {
        let name = namespace.name_any();
        if !name.starts_with("e2e-") || namespace.metadata.deletion_timestamp.is_some() {
            continue;
        }
        // Sooner than the namespace's own deletion would.
        let pods = Api::<Pod>::namespaced(client.clone(), &name);
        pods.delete_collection(&now, &ListParams::default())
            .await
            .map_err(api_error(format!("delete pods in {name}")))?;
        namespaces
            .delete(&name, &DeleteParams::default())
            .await
            .map_err(api_error(format!("delete namespace {name}")))?;
    }
    Ok(())
}

async fn delete_classes_of_default(client: &kube::Client) -> Result<()> {
    classes(client, "default")
        .delete_collection(&DeleteParams::default(), &ListParams::default())
        .await
        .map(drop)
        .map_err(api_error("delete classes in default".to_owned()))
}

/// Lets a DaemonSet run on the nodes or not, as an administrator stops one.
async fn run_daemon_set(client: &kube::Client, name: &str, run: bool) -> Result<()> {
    let value = match run {
        true => json!(null),
        false => json!("true"),
    };
    let patch = json!({"spec": {"template": {"spec": {"nodeSelector": {STOPPED: value}}}}});
    Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE)
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(drop)
        .map_err(api_error(format!("patch DaemonSet {name}")))
}

/// The DaemonSet to which a component's pod belongs.
fn daemon_set_of(component: &Component) -> &str {
    match component {
        Component::Driver => DRIVER,
        Component::Provider(name) => name,
    }
}

/// Takes a component's DaemonSet off all nodes; returns when its pod on this one is gone.
///
/// # Errors
/// When it does not run there, or does not go.
pub(crate) async fn stop(client: &kube::Client, node: &str, component: &Component) -> Result<()> {
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let set = daemon_set_of(component);
    let pod = running_pod_of(client, node, component).await?;
    run_daemon_set(client, set, false).await?;
    let patience = Patience::new(format!("{set} to stop on {node}"));
    while is_there(&pods, &pod).await? {
        patience.wait("its pod is there").await?;
    }
    Ok(())
}

/// Undoes [`stop`]; returns when the component serves and the driver is registered.
///
/// # Errors
/// When it does not come.
pub(crate) async fn start(cluster: &impl Cluster, node: &str, component: &Component) -> Result<()> {
    let client = &cluster.client();
    let set = daemon_set_of(component);
    run_daemon_set(client, set, true).await?;
    let patience = Patience::new(format!("{set} to start on {node}"));
    while pod_of(client, node, component).await?.is_none() {
        patience.wait("it has no pod there").await?;
    }
    wait_rolled_out(client, LIMIT).await?;
    wait_serving(cluster, node, component, LIMIT).await
}

/// The pod of a component on a node that is not on its way out.
///
/// # Errors
/// When the API server does not answer.
pub(crate) async fn pod_of(
    client: &kube::Client,
    node: &str,
    component: &Component,
) -> Result<Option<Pod>> {
    let there = ListParams::default().fields(&format!("spec.nodeName={node}"));
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE)
        .list(&there)
        .await
        .map_err(api_error(format!("list pods in {NAMESPACE}")))?;
    let has_it = |pod: &Pod| {
        let spec = pod.spec.iter();
        spec.flat_map(|spec| &spec.containers)
            .any(|container| container.name == component.container())
    };
    let mut pods = pods.items.into_iter();
    Ok(pods.find(|pod| pod.metadata.deletion_timestamp.is_none() && has_it(pod)))
}

/// The same where there has to be one.
///
/// # Errors
/// When there is none.
pub(crate) async fn running_pod_of(
    client: &kube::Client,
    node: &str,
    component: &Component,
) -> Result<Pod> {
    let pod = pod_of(client, node, component).await?;
    pod.ok_or_else(|| {
        Error::Impossible(format!("{} does not run on {node}", component.container()))
    })
}

/// The containerd id of a component's container.
///
/// # Errors
/// When it does not run.
pub(crate) async fn container_of(
    client: &kube::Client,
    node: &str,
    component: &Component,
) -> Result<String> {
    let pod = running_pod_of(client, node, component).await?;
    running_container(pod, component).ok_or_else(|| {
        Error::Impossible(format!("{} does not run on {node}", component.container()))
    })
}

fn running_container(pod: Pod, component: &Component) -> Option<String> {
    let status = status_of(pod, component)?;
    status.state?.running?;
    let id = status.container_id?;
    Some(id.trim_start_matches("containerd://").to_owned())
}

/// Waits until another container of a component runs than the one with this id, and kubelet says
/// so: before that it refuses to show a log.
///
/// # Errors
/// When none comes.
pub(crate) async fn wait_replaced(
    client: &kube::Client,
    node: &str,
    component: &Component,
    id: &str,
) -> Result<()> {
    let patience = Patience::new(format!("{} to come back on {node}", component.container()));
    loop {
        if let Some(pod) = pod_of(client, node, component).await? {
            match running_container(pod.clone(), component) {
                Some(new) if new != id => return Ok(()),
                _ => do_not_let_wait(client, pod, component).await?,
            }
        }
        patience.wait("no other container runs").await?;
    }
}

/// kubelet lets a container that dies often wait ever longer; its pod is then made anew.
async fn do_not_let_wait(client: &kube::Client, pod: Pod, component: &Component) -> Result<()> {
    let name = pod.name_any();
    let waiting = status_of(pod, component).and_then(|status| status.state?.waiting);
    if waiting.and_then(|waiting| waiting.reason).as_deref() != Some("CrashLoopBackOff") {
        return Ok(());
    }
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let now = DeleteParams::default().grace_period(0);
    let deleted = pods.delete(&name, &now).await;
    deleted
        .map(drop)
        .map_err(api_error(format!("delete pod {name}")))
}

/// What kubelet says of a component's container.
fn status_of(pod: Pod, component: &Component) -> Option<ContainerStatus> {
    let statuses = pod.status?.container_statuses?;
    statuses
        .into_iter()
        .find(|status| status.name == component.container())
}

/// The log of the container before its last restart, which is all that kubelet keeps, and that
/// since.
///
/// # Errors
/// When it does not run, or kubelet has no log.
pub(crate) async fn log(
    client: &kube::Client,
    node: &str,
    component: &Component,
) -> Result<String> {
    let pod = running_pod_of(client, node, component).await?;
    let name = pod.name_any();
    let restarted = status_of(pod, component).is_some_and(|status| status.restart_count > 0);
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let mut text = String::new();
    for previous in [true, false] {
        if previous && !restarted {
            continue;
        }
        let params = LogParams {
            container: Some(component.container().to_owned()),
            previous,
            ..LogParams::default()
        };
        let log = pods.logs(&name, &params).await;
        text += &log.map_err(api_error(format!("logs of pod {name}")))?;
    }
    Ok(text)
}

/// Waits until a new namespace can have pods: a pod is refused without the account, and waits
/// with a complaint without the authority.
///
/// # Errors
/// When the controllers do not fill it.
pub(crate) async fn wait_namespace(client: &kube::Client, namespace: &str) -> Result<()> {
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let patience = Patience::new(format!("namespace {namespace} to be filled"));
    loop {
        let account = accounts
            .get_opt("default")
            .await
            .map_err(api_error(format!("get ServiceAccount in {namespace}")))?;
        let authority = maps
            .get_opt("kube-root-ca.crt")
            .await
            .map_err(api_error(format!("get ConfigMap in {namespace}")))?;
        if account.is_some() && authority.is_some() {
            return Ok(());
        }
        patience
            .wait("it has no service account or no authority")
            .await?;
    }
}
