//! The part that local and kind share: driver and provider run in pods of DaemonSets, which are found,
//! read, stopped and renewed through the API server.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ConfigMap, ContainerStatus, Namespace, Pod, ServiceAccount};
use kube::ResourceExt;
use kube::api::{Api, DeleteParams, ListParams, LogParams, Patch, PatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::json;

use crate::cluster::{Cluster, Component, Error, Result, api as api_error, poll};
use crate::install::{DRIVER, NAMESPACE, STOPPED, classes, wait_rolled_out};

/// The time in which kubelet or a controller has to do something.
pub(crate) const LIMIT: Duration = Duration::from_secs(60);
/// The name of the DaemonSet of the tests' provider.
const PROVIDER: &str = "fake-provider";

const KUBELET_PODS: &str = "/var/lib/kubelet/pods";
/// The part of a path below it that belongs to a CSI volume.
const CSI_VOLUMES: &str = "/volumes/kubernetes.io~csi/";

/// The kinds of objects that are kept of a failed run. Secrets are not among them.
pub(crate) const LOGGED_KINDS: &str = "nodes,csinodes,csidrivers,namespaces,pods,daemonsets,events,\
     secretproviderclasses,secretproviderclasspodstatuses";

/// Returns an administrator's client. It belongs to the runtime in which it is made.
///
/// # Errors
/// When the kubeconfig cannot be used.
pub(crate) async fn client(kubeconfig: Kubeconfig) -> Result<kube::Client> {
    let failed = |error: &dyn std::fmt::Display| Error::Start(format!("kubeconfig: {error}"));
    let config = kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .map_err(|error| failed(&error))?;
    kube::Client::try_from(config).map_err(|error| failed(&error))
}

/// Returns the error of a cluster that did not start, with the folder of its logs, or why there are
/// none.
pub(crate) fn not_started(error: &Error, dir: &Path, logs: Result<()>) -> Error {
    Error::Start(match logs {
        Ok(()) => format!("{error}; logs and objects are in {}", dir.display()),
        Err(not_kept) => format!("{error}; {not_kept}"),
    })
}

/// Makes the cluster as new: deletes what earlier scenarios left, and replaces the pods of driver and
/// provider.
///
/// # Errors
/// When something is not gone, or not there, in time.
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
    // By the driver that is still there: the new one's counters begin at zero.
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
    for pod in &old {
        wait_pod_gone(&pods, pod).await?;
    }
    wait_rolled_out(client, LIMIT).await?;
    // The status of a DaemonSet still counts, for a moment, the pods that have just gone.
    for node in cluster.nodes() {
        for component in [Component::Driver, Component::Provider(PROVIDER.to_owned())] {
            wait_serving(cluster, &node, &component, LIMIT).await?;
        }
    }
    Ok(())
}

/// Deletes what earlier scenarios left, and keeps the pods of driver and providers.
///
/// # Errors
/// When something is not gone in time.
pub(crate) async fn tidy(cluster: &impl Cluster) -> Result<()> {
    let client = &cluster.client();
    delete_namespaces(client).await?;
    delete_classes_of_default(client).await?;
    for node in cluster.nodes() {
        wait_for_volumes_to_go(cluster, &node).await?;
    }
    Ok(())
}

/// Waits until the driver or the tests' provider serves HTTP on a node. Their pods have no readiness
/// probe, so that they are ready as soon as their processes start.
///
/// # Errors
/// When it does not serve after `limit`.
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
    let what = format!("{component:?} to serve on {node}");
    poll(&what, limit, async || {
        let answer = cluster.get(node, component, port, path).await;
        Ok(match answer {
            Ok(answer) if answer.status == 200 => ControlFlow::Break(()),
            // An API server that passes the request on answers itself.
            Ok(answer) => {
                ControlFlow::Continue(format!("status {}: {}", answer.status, answer.body))
            }
            Err(error) => ControlFlow::Continue(error.to_string()),
        })
    })
    .await
}

/// Waits until no pod has a volume on a node. kubelet takes a pod's volumes down after the pod has
/// left the API server, and removes a volume's directory after it has called the driver.
async fn wait_for_volumes_to_go(cluster: &impl Cluster, node: &str) -> Result<()> {
    poll(&format!("volumes on {node} to go"), LIMIT, async || {
        let tree = match cluster.node_tree(node, KUBELET_PODS.as_ref()).await {
            Ok(tree) => tree,
            // kubelet removes directories while they are read.
            Err(error) => return Ok(ControlFlow::Continue(error.to_string())),
        };
        let entries = tree.into_iter().flat_map(|tree| tree.entries);
        let mut paths = entries.map(|entry| entry.path);
        Ok(match paths.find(|path| path.contains(CSI_VOLUMES)) {
            Some(left) => ControlFlow::Continue(format!("{left} exists")),
            None => ControlFlow::Break(()),
        })
    })
    .await
}

/// Waits until a pod is gone; another one of its name may be there.
async fn wait_pod_gone(pods: &Api<Pod>, pod: &Pod) -> Result<()> {
    let name = pod.name_any();
    poll(&format!("pod {name} to be gone"), LIMIT, async || {
        let now = pods.get_opt(&name).await;
        let now = now.map_err(api_error(format!("get pod {name}")))?;
        Ok(match now {
            Some(now) if now.uid() == pod.uid() => ControlFlow::Continue("it exists".to_owned()),
            _ => ControlFlow::Break(()),
        })
    })
    .await
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
        // Sooner than with the deletion of the namespace.
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

/// Takes a DaemonSet off all nodes, as an administrator does, by a label that no node has; or undoes
/// that.
async fn run_daemon_set(client: &kube::Client, name: &str, run: bool) -> Result<()> {
    let value = if run { json!(null) } else { json!("true") };
    let patch = json!({"spec": {"template": {"spec": {"nodeSelector": {STOPPED: value}}}}});
    Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE)
        .patch(name, &PatchParams::default(), &Patch::Merge(patch))
        .await
        .map(drop)
        .map_err(api_error(format!("patch DaemonSet {name}")))
}

/// Returns the DaemonSet to which a component's pods belong.
fn daemon_set_of(component: &Component) -> &str {
    match component {
        Component::Driver => DRIVER,
        Component::Provider(name) => name,
    }
}

/// Takes a component's DaemonSet off all nodes; returns when its pod on this one is gone.
///
/// # Errors
/// When it does not run there, or is not gone in time.
pub(crate) async fn stop(client: &kube::Client, node: &str, component: &Component) -> Result<()> {
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let set = daemon_set_of(component);
    let pod = running_pod_of(client, node, component).await?;
    run_daemon_set(client, set, false).await?;
    wait_pod_gone(&pods, &pod).await
}

/// Undoes [`stop`]; returns when the component serves and the driver is registered.
///
/// # Errors
/// When that does not happen in time.
pub(crate) async fn start(cluster: &impl Cluster, node: &str, component: &Component) -> Result<()> {
    let client = &cluster.client();
    let set = daemon_set_of(component);
    run_daemon_set(client, set, true).await?;
    poll(&format!("{set} to start on {node}"), LIMIT, async || {
        Ok(match pod_of(client, node, component).await? {
            Some(_) => ControlFlow::Break(()),
            None => ControlFlow::Continue("it has no pod there".to_owned()),
        })
    })
    .await?;
    wait_rolled_out(client, LIMIT).await?;
    wait_serving(cluster, node, component, LIMIT).await
}

/// Returns the pod of a component on a node, unless it is being deleted.
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

/// Returns the pod of a component that has to run on a node.
///
/// # Errors
/// When it does not run there.
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

/// Returns the containerd id of a component's container.
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

/// Waits until another container of a component runs than the one with this id, and kubelet reports
/// it: before that it refuses to show a log.
///
/// # Errors
/// When no other container runs in time.
pub(crate) async fn wait_replaced(
    client: &kube::Client,
    node: &str,
    component: &Component,
    id: &str,
) -> Result<()> {
    let what = format!("{} to come back on {node}", component.container());
    poll(&what, LIMIT, async || {
        if let Some(pod) = pod_of(client, node, component).await? {
            match running_container(pod.clone(), component) {
                Some(new) if new != id => return Ok(ControlFlow::Break(())),
                _ => shorten_backoff(client, pod, component).await?,
            }
        }
        Ok(ControlFlow::Continue("no other container runs".to_owned()))
    })
    .await
}

/// Deletes a pod whose container kubelet does not start yet because it died often; its DaemonSet makes
/// another pod.
async fn shorten_backoff(client: &kube::Client, pod: Pod, component: &Component) -> Result<()> {
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

/// Returns the status of a component's container.
fn status_of(pod: Pod, component: &Component) -> Option<ContainerStatus> {
    let statuses = pod.status?.container_statuses?;
    statuses
        .into_iter()
        .find(|status| status.name == component.container())
}

/// Returns the log of the container before its last restart, the oldest that kubelet keeps, and since.
///
/// # Errors
/// When the component does not run, or kubelet has no log.
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

/// Waits until a new namespace has what a pod needs: a pod is refused without the service account, and
/// not started without the certificate authority.
///
/// # Errors
/// When the controllers do not make them in time.
pub(crate) async fn wait_namespace(client: &kube::Client, namespace: &str) -> Result<()> {
    let accounts = Api::<ServiceAccount>::namespaced(client.clone(), namespace);
    let maps = Api::<ConfigMap>::namespaced(client.clone(), namespace);
    let what = format!("namespace {namespace} to be filled");
    poll(&what, LIMIT, async || {
        let account = accounts
            .get_opt("default")
            .await
            .map_err(api_error(format!("get ServiceAccount in {namespace}")))?;
        let authority = maps
            .get_opt("kube-root-ca.crt")
            .await
            .map_err(api_error(format!("get ConfigMap in {namespace}")))?;
        Ok(match (account, authority) {
            (Some(_), Some(_)) => ControlFlow::Break(()),
            (None, _) => ControlFlow::Continue("it has no service account".to_owned()),
            (_, None) => ControlFlow::Continue("it has no authority".to_owned()),
        })
    })
    .await
}
