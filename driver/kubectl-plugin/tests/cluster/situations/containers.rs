//! The situations of containers and other volumes, which the driver has no part in.

use serde_json::{Value, json};

use super::{Change, unscheduled};
use crate::world::{World, ago};

/// Lets a StatefulSet of these fields make the pod, whose revision is `own`, and have another template by now.
fn of_stateful_set(world: &mut World, spec: &Value, own: &str) {
    world.pod["metadata"]["labels"] = json!({"controller-revision-hash": own});
    world.pod["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "StatefulSet",
        "name": "web", "uid": "set", "controller": true}]);
    let mut set = json!({
        "metadata": {"name": "web", "uid": "set"},
        "status": {"replicas": 2, "updateRevision": "web-7f"},
        "spec": {"serviceName": "", "selector": {}, "template": {}},
    });
    let fields = set["spec"].as_object_mut().unwrap();
    fields.extend(spec.as_object().unwrap().clone());
    let path = "/apis/apps/v1/namespaces/shop/statefulsets/web".to_owned();
    world.answers.push((path, set));
}

/// Lets the volume need a Secret that its own class makes, and a workload make the pod.
fn waits_for_itself(world: &mut World, kind: &str, name: &str) {
    world.not_started();
    world.secret = Value::Null;
    world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] = json!({"name": "creds"});
    world.pod["metadata"]["ownerReferences"] =
        json!([{"apiVersion": "v1", "kind": kind, "name": name, "uid": name, "controller": true}]);
}

pub(super) const CONTAINERS: &[(&str, Change)] = &[
    ("the pod should have ended", |world| {
        world.pod["metadata"]["deletionTimestamp"] = ago(600);
        world.pod["metadata"]["deletionGracePeriodSeconds"] = json!(30);
    }),
    ("the container crashes", |world| {
        world.pod["status"]["containerStatuses"][0]["state"] =
            json!({"waiting": {"reason": "CrashLoopBackOff"}});
    }),
    ("the container has just crashed", |world| {
        let status = &mut world.pod["status"]["containerStatuses"][0];
        status["ready"] = json!(false);
        status["restartCount"] = json!(2);
        status["state"] =
            json!({"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": ago(5)}});
    }),
    ("a container crashes, and is ready in between", |world| {
        let status = &mut world.pod["status"]["containerStatuses"][0];
        status["restartCount"] = json!(2);
        status["state"] = json!({"running": {"startedAt": ago(30)}});
        status["lastState"] =
            json!({"terminated": {"exitCode": 137, "reason": "Error", "finishedAt": ago(45)}});
    }),
    ("a container has crashed a long time ago", |world| {
        let status = &mut world.pod["status"]["containerStatuses"][0];
        status["restartCount"] = json!(2);
        status["lastState"] =
            json!({"terminated": {"exitCode": 1, "reason": "Error", "finishedAt": ago(700)}});
    }),
    (
        "a container that mounts nothing crashes and runs again",
        |world| {
            let other = json!({"name": "other", "image": "shop"});
            let containers = world.pod["spec"]["containers"].as_array_mut().unwrap();
            containers.push(other);
            let status = json!({"name": "other", "image": "shop", "imageID": "", "ready": false, "restartCount": 3,
            "state": {"running": {}}, "lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}});
            let statuses = world.pod["status"]["containerStatuses"]
                .as_array_mut()
                .unwrap();
            statuses.push(status);
        },
    ),
    ("an init container fails", |world| {
        let init = json!([{"name": "proxy", "image": "shop", "restartPolicy": "Always"},
            {"name": "migrate", "image": "shop"}]);
        world.pod["spec"]["initContainers"] = init;
        let statuses = json!([
            {"name": "proxy", "image": "shop", "imageID": "", "ready": true, "restartCount": 0,
                "started": true, "state": {"running": {}}},
            {"name": "migrate", "image": "shop", "imageID": "", "ready": false, "restartCount": 3,
                "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]);
        world.pod["status"]["initContainerStatuses"] = statuses;
    }),
    ("a pod without volumes of the driver", |world| {
        world.pod["spec"]["volumes"] = json!([]);
        world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
    }),
    (
        "a deleted pod has ended, and no driver takes its volume down",
        |world| {
            world.pod["metadata"]["deletionTimestamp"] = ago(600);
            world.pod["metadata"]["deletionGracePeriodSeconds"] = json!(30);
            world.pod["status"]["phase"] = json!("Failed");
            world.driver = json!(null);
        },
    ),
    ("a pod that has ended", |world| {
        world.pod["status"]["phase"] = json!("Succeeded");
        world.status["volumes"] = json!([]);
    }),
    ("a ConfigMap is missing", |world| {
        world.with_config_map();
        let (pod_status, status) = (world.pod_status.clone(), world.status.clone());
        world.not_started();
        (world.pod_status, world.status) = (pod_status, status);
        world.event(
            "FailedMount",
            "MountVolume.SetUp failed for volume \"config\" : configmap \"web-config\" not found",
        );
    }),
    (
        "a claim cannot be attached, and the driver's volume waits as well",
        |world| {
            world.with_config_map();
            world.not_started();
            world.event("FailedMount", "Unable to attach or mount volumes: unmounted volumes=[config secrets], unattached volumes=[]: timed out waiting for the condition");
        },
    ),
    (
        "a volume takes a ConfigMap of the name of a Secret of the class",
        |world| {
            world.with_config_map();
            let (pod_status, status) = (world.pod_status.clone(), world.status.clone());
            world.not_started();
            (world.pod_status, world.status) = (pod_status, status);
            world.pod["spec"]["volumes"][1]["configMap"]["name"] = json!("creds");
            world.event(
                "FailedMount",
                "MountVolume.SetUp failed for volume \"config\" : configmap \"creds\" not found",
            );
        },
    ),
    ("a ConfigMap was missing, and the pod is ready", |world| {
        world.with_config_map();
        world.pod["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] = ago(10);
        world.event(
            "FailedMount",
            "MountVolume.SetUp failed for volume \"config\" : configmap \"web-config\" not found",
        );
    }),
    (
        "a pod without volumes of the driver waits for a claim",
        |world| {
            world.pod["spec"]["volumes"] = json!([]);
            world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
            unscheduled(world, "pod has unbound immediate PersistentVolumeClaims");
        },
    ),
    (
        "a pod that is not ready is of an earlier template of its StatefulSet",
        |world| {
            world.not_started();
            of_stateful_set(world, &json!({}), "web-5d");
            world.class = Value::Null;
        },
    ),
    (
        "a pod is of an earlier template of a StatefulSet that replaces none by itself",
        |world| {
            world.not_started();
            let spec = json!({"updateStrategy": {"type": "OnDelete"}});
            of_stateful_set(world, &spec, "web-5d");
        },
    ),
    (
        "a StatefulSet replaces pods of an earlier template that are not ready",
        |world| {
            world.not_started();
            let spec = json!({"podManagementPolicy": "Parallel"});
            of_stateful_set(world, &spec, "web-5d");
        },
    ),
    (
        "a pod is of the present template of its StatefulSet",
        |world| {
            world.not_started();
            of_stateful_set(world, &json!({}), "web-7f");
        },
    ),
    (
        "a pod that is ready is of an earlier template of its StatefulSet",
        |world| {
            of_stateful_set(world, &json!({}), "web-5d");
        },
    ),
    ("the pod of a Job cannot start as it is", |world| {
        waits_for_itself(world, "Job", "migrate-2026");
    }),
    ("the pod of a CronJob cannot start as it is", |world| {
        waits_for_itself(world, "Job", "nightly-29871240");
    }),
    ("the pod of a StatefulSet cannot start as it is", |world| {
        waits_for_itself(world, "StatefulSet", "web");
    }),
    ("the pod of a DaemonSet cannot start as it is", |world| {
        waits_for_itself(world, "DaemonSet", "agent");
    }),
];
