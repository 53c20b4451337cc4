//! What can be wrong with a cluster and its nodes.

mod access;
mod cluster;
mod looks;
mod node;
mod pods;

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod;
use kube::ResourceExt as _;

use super::{
    Finding,
    facts::Facts,
    nodes::{Asked, named, node_of},
};
use crate::installation::TELL;

/// A check of the cluster.
type OfCluster = fn(&Facts, &mut Found<'_>);
/// A check of a node: what is wrong there. Nodes with the same words are one finding.
type OfNode = fn(&Asked) -> Vec<Words>;

/// What is wrong on a node, and the next command if it is not the one that shows what is on the node.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Words {
    what: String,
    next: Option<String>,
}

impl Words {
    /// Returns words about a pod, which can be explained.
    fn of_pod(what: String, pod: &driver::record::Pod) -> Self {
        let (name, namespace) = (&pod.name, &pod.namespace);
        let next = format!("kubectl secrets-store explain pod {name} -n {namespace}");
        Self {
            what,
            next: Some(next),
        }
    }
}

impl From<String> for Words {
    fn from(what: String) -> Self {
        Self { what, next: None }
    }
}

const OF_CLUSTER: &[(&str, OfCluster)] = &[
    ("kinds", cluster::kinds),
    ("csi-driver", cluster::csi_driver),
    ("installed", cluster::installed),
    ("two-drivers", cluster::two_drivers),
    ("rollout", cluster::rollout),
    ("rights", cluster::rights),
    ("driver-pods", pods::driver_pods),
    ("api-access", access::api_access),
    ("registration", cluster::registration),
    ("versions", cluster::versions),
    ("republish", cluster::republish),
    ("audiences", cluster::audiences),
    ("providers", cluster::providers),
    ("pod-statuses", cluster::pod_statuses),
    ("overdue", looks::overdue),
];

const OF_NODE: &[(&str, OfNode)] = &[
    ("driver-socket", node::socket),
    ("provider-socket", node::provider_sockets),
    ("provider-calls", node::provider_calls),
    ("mount-propagation", node::propagation),
    ("memory", node::memory),
    ("clock", node::clock),
    ("stale", node::stale),
    ("mount-gone", node::mount_gone),
];

/// The findings so far.
struct Found<'a> {
    check: &'static str,
    all: &'a mut Vec<Finding>,
}

impl Found<'_> {
    fn add(&mut self, what: impl Into<String>, next: impl Into<String>) {
        self.add_of_nodes(Vec::new(), what, next);
    }

    fn add_of_nodes(
        &mut self,
        nodes: Vec<String>,
        what: impl Into<String>,
        next: impl Into<String>,
    ) {
        self.all.push(Finding {
            check: self.check,
            nodes,
            what: what.into(),
            next: next.into(),
        });
    }
}

/// Finds what is wrong, from the ground up.
pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut all = Vec::new();
    for (check, of_cluster) in OF_CLUSTER {
        let all = &mut all;
        of_cluster(facts, &mut Found { check, all });
    }
    for (check, of_node) in OF_NODE {
        let mut nodes_by_words: BTreeMap<Words, Vec<String>> = BTreeMap::new();
        for asked in &facts.asked {
            for words in of_node(asked) {
                nodes_by_words
                    .entry(words)
                    .or_default()
                    .push(asked.node.clone());
            }
        }
        let all = &mut all;
        let mut found = Found { check, all };
        for (words, nodes) in nodes_by_words {
            let what = format!("on {}: {}", named(&nodes), words.what);
            let first = nodes.first().map_or("", String::as_str);
            let next = words.next.unwrap_or_else(|| facts.status_of(first));
            found.add_of_nodes(nodes, what, next);
        }
    }
    // Who may not see the driver may not mend it either.
    if facts.installed.unknown().is_some() {
        for finding in &mut all {
            finding.next = format!("{TELL}: {}", finding.what);
        }
    }
    all
}

impl Facts {
    /// Returns the command that shows what is on a node.
    fn status_of(&self, node: &str) -> String {
        let pods = self.pods.found().into_iter().flat_map(|pods| &pods.items);
        let pod = pods.into_iter().find(|pod| node_of(pod) == Some(node));
        let set = self.installed.found().and_then(|sets| sets.first());
        match (pod, set) {
            (Some(pod), Some(set)) => format!(
                "kubectl -n {} exec {} -c {} -- /secrets-store-csi status --json",
                pod.namespace().unwrap_or_default(),
                pod.name_any(),
                set.container
            ),
            _ => format!("kubectl describe node {node}"),
        }
    }

    fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.found().into_iter().flat_map(|pods| &pods.items)
    }
}
