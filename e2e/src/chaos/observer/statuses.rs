//! Checks the pod statuses of pods that have just begun.

use kube::Api;
use kube::api::DynamicObject;

use super::super::lock;
use super::super::world::{Watched, World};
use super::calm::status_name;

/// Checks that the pod statuses of a pod that became ready belong to it, and not to an earlier pod of the
/// same name, with which they would go.
pub(super) async fn judge_owner(world: &World, statuses: &Api<DynamicObject>, pod: &Watched) {
    // Who is told the past writes what was right then.
    if world.lied_since(pod.created) {
        return;
    }
    for class in &pod.classes {
        let name = status_name(world, pod, *class);
        let Ok(Some(status)) = statuses.get_opt(&name).await else {
            continue;
        };
        // A pod that has gone meanwhile may have a successor, whose status it is now.
        let is_there = lock(&world.pods).get(&pod.uid).is_some_and(|now| now.ready);
        if !is_there {
            return;
        }
        world.log.checked("owners of pod statuses", 1);
        let owners = status.metadata.owner_references.unwrap_or_default();
        if !owners.iter().any(|owner| owner.uid == pod.uid) {
            let text = format!(
                "pod status {name} is not owned by pod {} ({})",
                pod.name, pod.uid
            );
            world.log.find("a pod status belongs to its pod", text);
        }
    }
}
