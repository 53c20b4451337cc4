//! Asks the driver's pods what is on their nodes: some of them at a time, and not for ever.

use std::time::Duration;

use driver::status::Status;
use futures::{StreamExt as _, stream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::{Client, ResourceExt as _};
use tokio::time::{Instant, timeout_at};

use crate::{
    cluster::{Listed, Read},
    installation::{self, Installed, NodeSays, is_ready},
};

/// The pods that are asked at the same time.
const AT_ONCE: usize = 10;
/// The time after which no answer is waited for any more.
const ALL_WITHIN: Duration = Duration::from_secs(90);
/// The nodes that a line names.
const NAMED: usize = 3;

/// What the driver of a node says.
pub(super) struct Asked {
    pub(super) node: String,
    pub(super) says: NodeSays,
    /// The time of this machine when the answer came.
    pub(super) at: Timestamp,
    /// The time that it took to answer.
    pub(super) took: Duration,
    /// The time at which the driver's container was started.
    pub(super) started: Option<Timestamp>,
}

impl Asked {
    /// Returns what is on the node, if it is known.
    pub(super) fn status(&self) -> Option<&Status> {
        match &self.says {
            NodeSays::Status(status) => Some(status),
            _ => None,
        }
    }
}

/// Asks the drivers of some nodes: those first whose pods are not ready, and of the others some from all over
/// the list.
pub(super) async fn ask(
    client: &Client,
    installed: &Read<Vec<Installed>>,
    pods: &Read<Listed<Pod>>,
    most: usize,
) -> Vec<Asked> {
    let (Read::Is(sets), Read::Is(pods)) = (installed, pods) else {
        return Vec::new();
    };
    let deadline = Instant::now() + ALL_WITHIN;
    let each = stream::iter(chosen(&pods.items, most)).map(|pod| async move {
        let node = node_of(pod).unwrap_or_default().to_owned();
        let began = Instant::now();
        let container = container_of(sets, pod);
        let says = match timeout_at(deadline, installation::ask(client, pod, container)).await {
            Ok(says) => says,
            Err(_) => NodeSays::Unknown(format!(
                "there was no time for it within {} seconds",
                ALL_WITHIN.as_secs()
            )),
        };
        Asked {
            node,
            says,
            at: Timestamp::now(),
            took: began.elapsed(),
            started: started(pod, container),
        }
    });
    let mut asked: Vec<_> = each.buffer_unordered(AT_ONCE).collect().await;
    asked.sort_by(|a, b| a.node.cmp(&b.node));
    asked
}

/// Chooses pods that have a node and run.
fn chosen(pods: &[Pod], most: usize) -> Vec<&Pod> {
    let running = pods
        .iter()
        .filter(|pod| node_of(pod).is_some() && runs(pod));
    let (ready, ill): (Vec<&Pod>, Vec<&Pod>) = running.partition(|pod| is_ready(pod));
    let mut chosen: Vec<&Pod> = ill.into_iter().take(most).collect();
    let left = (most - chosen.len()).min(ready.len());
    chosen.extend((0..left).filter_map(|number| ready.get(number * ready.len() / left)));
    chosen
}

pub(super) fn node_of(pod: &Pod) -> Option<&str> {
    pod.spec.as_ref()?.node_name.as_deref()
}

/// Returns whether a container of a pod runs.
pub(super) fn runs(pod: &Pod) -> bool {
    let statuses = pod
        .status
        .iter()
        .flat_map(|status| status.container_statuses.iter().flatten());
    statuses.into_iter().any(|status| {
        status
            .state
            .as_ref()
            .is_some_and(|state| state.running.is_some())
    })
}

/// Returns when a container of a pod was started that runs.
pub(super) fn started(pod: &Pod, container: &str) -> Option<Timestamp> {
    let statuses = pod.status.as_ref()?.container_statuses.as_ref()?;
    let status = statuses.iter().find(|status| status.name == container)?;
    let running = status.state.as_ref()?.running.as_ref()?;
    running.started_at.as_ref().map(|time| time.0)
}

/// Returns the DaemonSet of a driver's pod.
pub(super) fn set_of<'a>(sets: &'a [Installed], pod: &Pod) -> Option<&'a Installed> {
    let owners = pod.owner_references();
    let is_of = |set: &&Installed| {
        let uid = set.set.uid();
        owners.iter().any(|owner| Some(&owner.uid) == uid.as_ref())
    };
    sets.iter().find(is_of).or(sets.first())
}

fn container_of<'a>(sets: &'a [Installed], pod: &Pod) -> &'a str {
    set_of(sets, pod).map_or("secrets-store", |set| set.container.as_str())
}

/// Names nodes: the first ones, and how many there are.
pub(super) fn named(nodes: &[impl AsRef<str>]) -> String {
    let shown: Vec<_> = nodes.iter().take(NAMED).map(AsRef::as_ref).collect();
    let more = nodes.len().saturating_sub(NAMED);
    let word = if nodes.len() == 1 { "node" } else { "nodes" };
    match more {
        0 => format!("{word} {}", shown.join(", ")),
        _ => format!("{word} {} and {more} more", shown.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(number: usize, ready: bool) -> Pod {
        let status = if ready { "True" } else { "False" };
        serde_json::from_value(json!({
            "metadata": {"name": format!("d-{number}")},
            "spec": {"nodeName": format!("node-{number}"), "containers": []},
            "status": {
                "conditions": [{"type": "Ready", "status": status}],
                "containerStatuses": [{
                    "name": "c", "image": "", "imageID": "", "ready": ready, "restartCount": 0,
                    "state": {"running": {}},
                }],
            },
        }))
        .unwrap()
    }

    #[test]
    fn ill_nodes_are_asked_first_and_others_from_all_over() {
        let pods: Vec<_> = (0..5_000)
            .map(|number| pod(number, number % 1_000 != 999))
            .collect();
        let chosen = chosen(&pods, 20);
        let numbers: Vec<usize> = chosen
            .iter()
            .map(|pod| pod.name_any()[2..].parse().unwrap())
            .collect();
        assert_eq!(numbers[..5], [999, 1_999, 2_999, 3_999, 4_999]);
        assert_eq!(numbers.len(), 20);
        assert!(numbers[19] > 4_000, "{numbers:?}");
        for most in [0, 1, 4, 5, 6, 4_999, 5_000, 9_999] {
            assert_eq!(super::chosen(&pods, most).len(), most.min(5_000), "{most}");
        }
    }

    #[test]
    fn many_nodes_are_counted() {
        assert_eq!(named(&["a"]), "node a");
        assert_eq!(named(&["a", "b", "c"]), "nodes a, b, c");
        assert_eq!(
            named(&["a", "b", "c", "d", "e"]),
            "nodes a, b, c and 2 more"
        );
    }
}
