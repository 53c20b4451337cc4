//! Whether what is installed runs, and what keeps it from that.

use std::ops::ControlFlow;
use std::time::Duration;

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::{ContainerStatus, Node, NodeCondition, Pod};
use k8s_openapi::api::storage::v1::CSINode;
use kube::ResourceExt;
use kube::api::{Api, ListParams};

use super::{DRIVER, DRIVER_NAME, NAMESPACE, STOPPED};
use crate::cluster::{Result, api, poll};

/// Waits until the pods of every DaemonSet run its current template, and kubelet has registered the
/// driver.
///
/// # Errors
/// When something is missing after `limit`.
pub(crate) async fn wait_rolled_out(client: &kube::Client, limit: Duration) -> Result<()> {
    poll("what is installed to run", limit, async || {
        Ok(match missing(client).await? {
            Some(missing) => ControlFlow::Continue(format!("missing: {missing}")),
            None => ControlFlow::Break(()),
        })
    })
    .await
}

/// Returns what [`wait_rolled_out`] waits for, if anything.
///
/// # Errors
/// When the API server does not answer.
pub(crate) async fn missing(client: &kube::Client) -> Result<Option<String>> {
    let sets = Api::<DaemonSet>::namespaced(client.clone(), NAMESPACE);
    let sets = sets
        .list(&ListParams::default())
        .await
        .map_err(api("list DaemonSets".to_owned()))?;
    for set in &sets {
        if !is_rolled_out(set) {
            let why = why(client, set).await?;
            return Ok(Some(format!("pods of DaemonSet {}: {why}", set.name_any())));
        }
    }
    if sets.iter().all(|set| set.name_any() != DRIVER) {
        return Ok(None);
    }
    let nodes = Api::<CSINode>::all(client.clone())
        .list(&ListParams::default())
        .await
        .map_err(api("list CSINodes".to_owned()))?;
    let unregistered = |node: &&CSINode| {
        let mut drivers = node.spec.drivers.iter();
        drivers.all(|driver| driver.name != DRIVER_NAME)
    };
    Ok(nodes
        .iter()
        .find(unregistered)
        .map(|node| format!("registration of {DRIVER_NAME} on {}", node.name_any())))
}

fn is_rolled_out(set: &DaemonSet) -> bool {
    let Some(status) = &set.status else {
        return false;
    };
    let desired = status.desired_number_scheduled;
    if is_stopped(set) {
        return status.observed_generation == set.metadata.generation && desired == 0;
    }
    status.observed_generation == set.metadata.generation
        && desired > 0
        && status.updated_number_scheduled == Some(desired)
        && status.number_ready == desired
        && status.number_available == Some(desired)
}

/// Returns whether a scenario has taken it off all nodes.
fn is_stopped(set: &DaemonSet) -> bool {
    let spec = set.spec.template.spec.as_ref();
    let selector = spec.and_then(|spec| spec.node_selector.as_ref());
    selector.is_some_and(|labels| labels.contains_key(STOPPED))
}

/// Returns what is known about a DaemonSet that does not run: its pods, and the conditions of the
/// nodes that keep pods away, a full disk for example.
async fn why(client: &kube::Client, set: &DaemonSet) -> Result<String> {
    let pods = Api::<Pod>::namespaced(client.clone(), NAMESPACE);
    let pods = pods
        .list(&ListParams::default())
        .await
        .map_err(api("list pods".to_owned()))?;
    let nodes = Api::<Node>::all(client.clone())
        .list(&ListParams::default())
        .await
        .map_err(api("list nodes".to_owned()))?;
    let of_set = |pod: &&Pod| {
        let mut owners = pod.owner_references().iter();
        owners.any(|owner| Some(&owner.uid) == set.metadata.uid.as_ref())
    };
    let mut lines: Vec<_> = pods.iter().filter(of_set).map(state).collect();
    if lines.is_empty() {
        lines.push("it has no pods".to_owned());
    }
    for node in &nodes {
        let conditions = node.status.iter().flat_map(|status| &status.conditions);
        for condition in conditions.flatten().filter(|condition| is_bad(condition)) {
            let message = condition.message.as_deref().unwrap_or_default();
            let (node, kind, status) = (node.name_any(), &condition.type_, &condition.status);
            lines.push(format!("node {node} has {kind} {status}: {message}"));
        }
    }
    Ok(lines.join("; "))
}

/// Returns a pod's phase, and why it or its containers do not run.
fn state(pod: &Pod) -> String {
    let status = pod.status.clone().unwrap_or_default();
    let mut state = format!("{} is {}", pod.name_any(), status.phase.unwrap_or_default());
    if pod.metadata.deletion_timestamp.is_some() {
        state.push_str(", being deleted");
    }
    for text in [status.reason, status.message].into_iter().flatten() {
        state.push_str(&format!(", {text}"));
    }
    for container in status.container_statuses.unwrap_or_default() {
        if !container.ready {
            state.push_str(&format!(", {}", not_ready(&container)));
        }
    }
    state
}

fn not_ready(container: &ContainerStatus) -> String {
    let state = container.state.clone().unwrap_or_default();
    let (reason, message) = match (state.waiting, state.terminated) {
        (Some(waiting), _) => (waiting.reason, waiting.message),
        (_, Some(ended)) => (ended.reason, ended.message),
        _ => (Some("not ready".to_owned()), None),
    };
    let (reason, message) = (reason.unwrap_or_default(), message.unwrap_or_default());
    let restarts = container.restart_count;
    let name = &container.name;
    format!("container {name} (restarts: {restarts}): {reason} {message}")
}

/// Returns whether a node's condition keeps pods away.
fn is_bad(condition: &NodeCondition) -> bool {
    let good = if condition.type_ == "Ready" {
        "True"
    } else {
        "False"
    };
    condition.status != good
}
