//! Checks whether the drivers can ask the API server.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::{
    super::{
        access::Silent,
        facts::Facts,
        nodes::{named, node_of, set_of, started},
    },
    Found,
};
use crate::{api_access::Cause, installation::Installed};

/// Where kubelet puts the token of a pod's service account.
const TOKEN: &str = "/var/run/secrets/kubernetes.io/serviceaccount";

pub(super) fn api_access(facts: &Facts, found: &mut Found<'_>) {
    let first = facts.installed.found().and_then(|sets| sets.first());
    let mut by_cause: BTreeMap<Cause, Vec<(String, Option<String>)>> = BTreeMap::new();
    for pod in facts.pods().filter(|pod| lacks_token(facts, pod)) {
        let node = node_of(pod).unwrap_or("no node").to_owned();
        by_cause
            .entry(Cause::NoToken)
            .or_default()
            .push((node, None));
    }
    let silent = facts.access.silent.found().into_iter().flatten();
    for silent in silent.filter(|silent| !is_over(facts, silent)) {
        let of_cause = by_cause.entry(silent.cause).or_default();
        if !of_cause.iter().any(|(node, _)| *node == silent.node) {
            of_cause.push((silent.node.clone(), Some(silent.pod.to_string())));
        }
    }
    for (cause, of_nodes) in by_cause {
        let waiting = of_nodes.iter().find_map(|(_, pod)| pod.clone());
        let waiting = waiting.map_or_else(String::new, |pod| format!("; pod {pod} waits for it"));
        let nodes: Vec<_> = of_nodes.into_iter().map(|(node, _)| node).collect();
        let pod = facts
            .pods()
            .find(|pod| node_of(pod) == nodes.first().map(String::as_str));
        let name = pod.map(kube::ResourceExt::name_any);
        let installed = pod.and_then(|pod| facts.set_of(pod)).or(first);
        let next = match installed {
            Some(installed) => cause.command(installed, name.as_deref()),
            None => "kubectl get daemonsets -A".to_owned(),
        };
        let what = format!(
            "on {}: {}. Until then, no volume is mounted there, and none is refreshed{waiting}",
            named(&nodes),
            cause.words()
        );
        found.add_of_nodes(nodes, what, next);
    }
}

/// Returns whether the driver of the node has been started since: it has not said so.
fn is_over(facts: &Facts, silent: &Silent) -> bool {
    let on_node = |pod: &&Pod| node_of(pod) == Some(&silent.node);
    let mut pods = facts.pods().filter(on_node);
    pods.any(|pod| {
        let set = facts.set_of(pod);
        let started = set.and_then(|set| started(pod, &set.container));
        started.is_some_and(|started| started > silent.at)
    })
}

/// Returns whether a driver's pod has no token, and no other way to the API server. Where kubelet mounts one, the API
/// server has added the mount to the pod.
fn lacks_token(facts: &Facts, pod: &Pod) -> bool {
    let (Some(spec), Some(set)) = (pod.spec.as_ref(), facts.set_of(pod)) else {
        return false;
    };
    let account = spec.service_account_name.clone();
    let account = account.unwrap_or_else(|| set.service_account());
    let account = (pod.namespace().unwrap_or_default(), account);
    let gets_one = spec
        .automount_service_account_token
        .unwrap_or_else(|| !facts.access.without_token.contains(&account));
    let mut containers = spec.containers.iter();
    let container = containers.find(|container| container.name == set.container);
    let has_other = container.is_none_or(|container| {
        let mut mounts = container.volume_mounts.iter().flatten();
        let args = container.args.iter().flatten();
        let mut args = args.chain(container.command.iter().flatten());
        mounts.any(|mount| mount.mount_path.trim_end_matches('/') == TOKEN)
            || args.any(|arg| arg.starts_with("--kubeconfig"))
    });
    !gets_one && !has_other
}

impl Facts {
    /// Returns the DaemonSet of a driver's pod.
    fn set_of(&self, pod: &Pod) -> Option<&Installed> {
        set_of(self.installed.found()?, pod)
    }
}
