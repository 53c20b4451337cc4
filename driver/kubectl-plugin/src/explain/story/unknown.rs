//! What could not be read, and which right it takes.

use kube::ResourceExt as _;

use crate::{
    explain::{
        checks::{Next, next_refresh, rotates, unknown_files},
        facts::Facts,
    },
    installation::{DRIVER, NodeSays},
};

/// What the API server says to someone who lacks a right.
const FORBIDDEN: &str = "forbidden";

/// Returns what could not be read: once, however many objects it is about.
pub(super) fn of(facts: &Facts) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    let mut add = |what: &str, why: Option<&str>, right: &str| {
        let line = why.map(|why| match why {
            FORBIDDEN => format!("{what}: {why}; it takes {right}"),
            _ => format!("{what}: {why}"),
        });
        lines.extend(line.filter(|line| !lines.contains(line)));
    };
    let namespace = facts.pod.namespace().unwrap_or_default();
    let here = |right: &str| format!("{right} in namespace {namespace}");
    add(
        "the pod's events",
        facts.events.unknown(),
        &here("list events"),
    );
    for volume in &facts.volumes {
        add(
            &format!("class {}", volume.class_name),
            volume.class.unknown(),
            &here("get secretproviderclasses"),
        );
        add(
            "the pod statuses (SecretProviderClassPodStatus)",
            volume.pod_status.unknown(),
            &here("list secretproviderclasspodstatuses"),
        );
    }
    for (name, read) in &facts.secrets {
        add(
            &format!("whether Secret {name} exists"),
            read.unknown(),
            &here("get secrets"),
        );
    }
    if let Some(classes) = &facts.classes {
        add(
            "the classes of the namespace",
            classes.unknown(),
            &here("list secretproviderclasses"),
        );
    }
    if facts.volumes.is_empty() {
        return lines;
    }
    add(
        &format!("the CSIDriver {DRIVER}"),
        facts.csi_driver.unknown(),
        "get csidrivers",
    );
    add(
        "the driver's DaemonSet (name its namespace with --driver-namespace)",
        facts.installed.unknown(),
        "list daemonsets in its namespace",
    );
    if let Some(node) = &facts.node {
        add(
            &format!("node {}", node.name),
            node.node.unknown(),
            "get nodes",
        );
        add(
            &format!("the drivers of node {} (CSINode)", node.name),
            node.csi_node.unknown(),
            "get csinodes",
        );
        if facts.installed.unknown().is_none() {
            add(
                "the driver's pod on the node",
                node.driver.unknown(),
                "list pods in the driver's namespace",
            );
        }
        if let Some(NodeSays::Unknown(why)) = &node.says {
            add("what the driver on the node has recorded", Some(why), "");
        }
    }
    lines.extend(unknown_files(facts));
    lines.extend(of_node(facts));
    lines
}

/// Returns what the driver on the node alone knows, and the rights with which it can be asked.
fn of_node(facts: &Facts) -> Option<String> {
    let node = facts.node.as_ref()?;
    let rights = match &node.says {
        Some(NodeSays::Unknown(why)) if why.contains("pods/exec") => "create pods/exec",
        _ if facts.installed.unknown() == Some(FORBIDDEN) => {
            "list daemonsets, list pods and create pods/exec"
        }
        _ if node.driver.unknown() == Some(FORBIDDEN) => "list pods and create pods/exec",
        _ => return None,
    };
    let is_off = |volume| next_refresh(facts, volume) == Next::Off;
    let what = if facts.volumes.iter().all(is_off) {
        "whether the provider answers"
    } else if rotates(facts).is_some() {
        "when a refresh is due and whether the provider answers"
    } else {
        "whether rotation is on, when a refresh is due and whether the provider answers"
    };
    Some(format!(
        "{what}: the driver on the node knows it; asking it takes {rights} in the driver's namespace"
    ))
}
