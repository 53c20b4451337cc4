//! The pod statuses of the pods that run, and of no others.

use std::collections::BTreeSet;

use kube::api::DynamicObject;
use serde_json::{Value, json};

use super::super::super::features;
use super::super::super::store::{CLASSES, OBJECTS};
use super::super::super::tenants::{WHO, volume_name};
use super::super::super::world::{Watched, World};
use super::{names, status_name};

/// The annotations of a pod status that tell of trouble while it lasts (docs/operating.md).
const TROUBLE: [&str; 2] = [
    "secrets-store.csi.k8s.io/stale-since",
    "secrets-store.csi.k8s.io/secrets-out-of-step-since",
];

/// The label of a pod status with the node of its pod.
const NODE: &str = "internal.secrets-store.csi.k8s.io/node-name";

/// Returns what is wrong with the statuses of the pods that run, and those of pods that are gone.
pub(super) fn wrong_statuses(
    world: &World,
    pods: &[Watched],
    statuses: &[DynamicObject],
) -> Vec<String> {
    let mut wrong = Vec::new();
    let mut expected = BTreeSet::from_iter(features::status_names(&world.namespace));
    for pod in pods {
        for class in &pod.classes {
            let name = status_name(world, pod, *class);
            if pod.ready {
                let found = statuses
                    .iter()
                    .find(|status| status.metadata.name.as_deref() == Some(&name));
                if let Some(how) = wrong_status(world, pod, *class, found) {
                    wrong.push(format!("pod status {name} {how}"));
                }
            }
            expected.insert(name);
        }
    }
    for status in statuses {
        let name = status.metadata.name.clone().unwrap_or_default();
        if !expected.contains(&name) {
            wrong.push(format!("pod status {name} is of a pod that is gone"));
        }
    }
    wrong
}

fn wrong_status(
    world: &World,
    pod: &Watched,
    class: usize,
    status: Option<&DynamicObject>,
) -> Option<String> {
    let Some(status) = status else {
        return Some("is missing".to_owned());
    };
    let owners = status.metadata.owner_references.iter().flatten();
    if !owners.into_iter().any(|owner| owner.uid == pod.uid) {
        return Some("is not owned by its pod".to_owned());
    }
    let state = &status.data["status"];
    let class_name = CLASSES.get(class).copied().unwrap_or_default();
    let target = embedded::target_path(&pod.uid, &volume_name(class));
    let said = json!({
        "mounted": true, "podName": pod.name, "secretProviderClassName": class_name,
        "targetPath": target,
    });
    for (field, expected) in said.as_object().into_iter().flatten() {
        if state[field] != *expected {
            return Some(format!(
                "has {field} {} instead of {expected}",
                state[field]
            ));
        }
    }
    let labels = status.metadata.labels.iter().flatten();
    if !labels
        .into_iter()
        .any(|(name, value)| name == NODE && *value == pod.node)
    {
        return Some(format!("has not label {NODE}: {}", pod.node));
    }
    let annotations = status.metadata.annotations.iter().flatten();
    if let Some((trouble, since)) = annotations
        .into_iter()
        .find(|(name, _)| TROUBLE.contains(&name.as_str()))
    {
        return Some(format!("still has {trouble}: {since}"));
    }
    let latest = format!("g{}", world.store.latest_number(class));
    for (object, _) in OBJECTS {
        let id = format!("secret/{class_name}-{object}");
        let objects = state["objects"].as_array();
        let version = objects
            .into_iter()
            .flatten()
            .find(|object| object["id"] == id.as_str())
            .map(|object| &object["version"]);
        if version != Some(&Value::from(latest.as_str())) {
            let version = version.cloned().unwrap_or_default();
            return Some(format!("has version {version} of {id} instead of {latest}"));
        }
    }
    let who = format!("secret/{class_name}-{WHO}");
    let mut ids = state["objects"].as_array().into_iter().flatten();
    if !ids.any(|object| object["id"] == who.as_str()) {
        return Some(format!("does not have {who}"));
    }
    let (number, expected) = (
        state["objects"].as_array().map_or(0, Vec::len),
        names(world, class).len(),
    );
    (number != expected).then(|| format!("has {number} objects instead of {expected}"))
}
