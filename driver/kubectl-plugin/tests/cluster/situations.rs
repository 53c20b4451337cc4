//! The situations of a pod, each of which has a story.

mod containers;
mod ground;
mod mounts;
mod refreshes;
mod secrets;

use serde_json::json;

use crate::world::World;

pub(crate) type Change = fn(&mut World);

/// The situations, each as a change of a pod whose volume is in order.
pub(crate) fn situations() -> impl Iterator<Item = &'static (&'static str, Change)> {
    let all = [
        ground::GROUND,
        mounts::MOUNTS,
        secrets::SECRETS,
        refreshes::REFRESHES,
        containers::CONTAINERS,
    ];
    all.into_iter().flatten()
}

/// Lets the scheduler refuse the pod, in its words.
fn unscheduled(world: &mut World, message: &str) {
    world.pod["spec"]
        .as_object_mut()
        .unwrap()
        .remove("nodeName");
    world.pod["status"] = json!({"phase": "Pending", "conditions": [{
        "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
        "message": message,
    }]});
}

/// Lets a controller make the pod again.
fn controlled(world: &mut World) {
    world.pod["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet",
        "name": "web-5d", "uid": "rs", "controller": true}]);
}

/// Lets kubelet say that the volume cannot be mounted.
pub(crate) fn refused(world: &mut World, said: &str) {
    world.not_started();
    let begin =
        "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = ";
    world.event("FailedMount", &format!("{begin}{said}"));
}
