//! Checks the driver's pods: those that are not ready, and those that crash.

use std::collections::BTreeMap;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::{
    super::{
        facts::Facts,
        nodes::{named, node_of},
    },
    Found,
};
use crate::installation::{crash, is_ready};

/// The reason of a container that took more memory than it may.
const OUT_OF_MEMORY: &str = "OOMKilled";

pub(super) fn driver_pods(facts: &Facts, found: &mut Found<'_>) {
    let mut nodes_by_why: BTreeMap<String, Vec<(String, String)>> = BTreeMap::new();
    let wrong = facts
        .pods()
        .filter_map(|pod| Some((pod, wrong_with(pod, facts.now)?)));
    for (pod, (why, next)) in wrong {
        let node = node_of(pod).unwrap_or("no node").to_owned();
        nodes_by_why.entry(why).or_default().push((node, next));
    }
    for (why, pods) in nodes_by_why {
        let (nodes, mut next): (Vec<_>, Vec<_>) = pods.into_iter().unzip();
        let what = format!("on {}: {why}", named(&nodes));
        found.add_of_nodes(nodes, what, next.swap_remove(0));
    }
}

/// Returns why a pod is not ready, or that it crashes in between, in words that are the same for pods with the same
/// trouble, and the next command.
fn wrong_with(pod: &Pod, now: Timestamp) -> Option<(String, String)> {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let kubectl = format!("kubectl -n {namespace}");
    let statuses = pod.status.iter();
    let mut statuses = statuses.flat_map(|status| status.container_statuses.iter().flatten());
    // A container that is started again and again may be ready in between.
    let crashed = statuses.clone().find_map(|status| {
        let ended = crash(status, now)?;
        (!status.ready || status.restart_count >= 2).then_some((status, ended))
    });
    if let Some((status, ended)) = crashed {
        let container = &status.name;
        let is_of_memory = ended.reason.as_deref() == Some(OUT_OF_MEMORY);
        let (advice, next) = match (is_of_memory, status.restart_count) {
            (true, _) => (
                "raise its memory limit (linux.driver.resources.limits.memory)",
                format!("{kubectl} describe pod {name}"),
            ),
            (false, 0) => (
                "its log says why",
                format!("{kubectl} logs {name} -c {container}"),
            ),
            (false, _) => (
                "its log says why",
                format!("{kubectl} logs {name} -c {container} --previous"),
            ),
        };
        let often = match status.restart_count {
            0 | 1 => "has ended with",
            _ => "ends again and again, the last time with",
        };
        let reason = ended.reason.as_deref().unwrap_or("Error");
        let why = format!(
            "container {container} of the driver's pod {often} {reason}, exit code {}; {advice}",
            ended.exit_code
        );
        return Some((why, next));
    }
    if is_ready(pod) {
        return None;
    }
    let next = format!("{kubectl} describe pod {name}");
    let why = match statuses.find(|status| !status.ready) {
        Some(status) => {
            let waiting = status
                .state
                .as_ref()
                .and_then(|state| state.waiting.as_ref());
            let reason = waiting.and_then(|waiting| waiting.reason.as_deref());
            let reason = reason.unwrap_or("it does not answer its probes");
            format!("container {}: {reason}", status.name)
        }
        None => {
            let phase = pod
                .status
                .as_ref()
                .and_then(|status| status.phase.as_deref());
            format!("it is {}", phase.unwrap_or("Pending"))
        }
    };
    Some((format!("the driver's pod is not ready: {why}"), next))
}
