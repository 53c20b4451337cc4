//! The situations of a pod whose driver is being replaced, is not known to kubelet or could not do its part.

use serde_json::{Value, json};

use crate::{
    situations::{Change, refused},
    waits::{aged, unseen},
    world::{World, ago},
};

const UNREGISTERED: &str = "MountVolume.SetUp failed for volume \"secrets\" : kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name secrets-store.csi.k8s.io not found in the list of registered CSI drivers";

/// Lets kubelet not know the driver.
fn unregistered(world: &mut World) {
    world.csi_node["spec"]["drivers"] = json!([]);
    world.not_started();
    world.event("FailedMount", UNREGISTERED);
}

/// Returns an end of a container.
fn end(code: i32, reason: &str) -> Value {
    json!({"terminated": {"exitCode": code, "reason": reason, "startedAt": ago(40), "finishedAt": ago(30)}})
}

/// Lets the driver's pod be new, and its container end with this code so often.
fn crashed(world: &mut World, times: i32, code: i32, state: Value) {
    unregistered(world);
    world.driver["metadata"]["creationTimestamp"] = ago(40);
    let status = &mut world.driver["status"]["containerStatuses"][0];
    status["restartCount"] = json!(times);
    (status["state"], status["lastState"]) = (state, end(code, "Error"));
}

/// The situations, each as a change of a pod whose volume is in order.
pub(crate) const DRIVERS: &[(&str, Change)] = &[
    (
        "the driver's pod is ending, and the next one is not there yet",
        |world| {
            unregistered(world);
            world.driver["metadata"]["deletionTimestamp"] = ago(5);
        },
    ),
    ("the image of the driver is not there", |world| {
        unregistered(world);
        let status = &mut world.driver["status"]["containerStatuses"][0];
        (status["ready"], status["state"]) = (
            json!(false),
            json!({"waiting": {"reason": "ImagePullBackOff",
            "message": "Back-off pulling image \"secrets-store-csi\""}}),
        );
    }),
    (
        "the driver's pod is ending, and the volume is mounted",
        |world| {
            world.csi_node["spec"]["drivers"] = json!([]);
            world.driver["metadata"]["deletionTimestamp"] = ago(5);
        },
    ),
    (
        "the driver has just been started, and kubelet does not know it yet",
        |world| {
            unregistered(world);
            world.driver["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] =
                ago(11);
        },
    ),
    (
        "the driver has crashed twice in its first minute, and runs now",
        |world| crashed(world, 2, 2, json!({"running": {"startedAt": ago(2)}})),
    ),
    ("the driver has crashed once, and runs now", |world| {
        crashed(world, 1, 2, json!({"running": {"startedAt": ago(2)}}));
    }),
    (
        "the driver has been killed once, and has just been started",
        |world| crashed(world, 1, 143, json!({"running": {"startedAt": ago(2)}})),
    ),
    (
        "the driver has crashed in its first minute, and waits",
        |world| {
            let waiting = json!({"waiting": {"reason": "CrashLoopBackOff"}});
            crashed(world, 3, 2, waiting);
        },
    ),
    ("the driver has just crashed for the first time", |world| {
        crashed(world, 0, 2, end(2, "Error"));
        let status = &mut world.driver["status"]["containerStatuses"][0];
        status["lastState"] = json!({});
    }),
    (
        "the driver is being rolled out, and the node has none for now",
        |world| {
            unregistered(world);
            world.driver = json!(null);
            world.set_status["currentNumberScheduled"] = json!(0);
        },
    ),
    (
        "a refresh is due for long, and the driver has just been started",
        |world| {
            world.status["volumes"][0]["lastSuccess"] = ago(3_000);
            world.driver["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] =
                ago(11);
        },
    ),
    (
        "the class of a mounted volume has lost its parameters",
        |world| {
            world.class["spec"]["parameters"] = json!({});
            world.status["volumes"][0]["staleSince"] = ago(300);
            world.pod_status["metadata"]["annotations"]["secrets-store.csi.k8s.io/stale-reason"] = json!(
                "parameters not set in shop/db: set spec.parameters of the SecretProviderClass to what provider \"vault\" needs"
            );
        },
    ),
    (
        "the class of a mounted volume has lost its parameters, and the driver may not be looked at",
        |world| {
            unseen(world);
            world.class["spec"]["parameters"] = json!({});
            world.pod_status["metadata"]["annotations"]["secrets-store.csi.k8s.io/stale-since"] =
                ago(300);
            world.pod_status["metadata"]["annotations"]["secrets-store.csi.k8s.io/stale-reason"] = json!(
                "parameters not set in shop/db: set spec.parameters of the SecretProviderClass to what provider \"vault\" needs"
            );
        },
    ),
    (
        "a deleted pod has ended, kubelet does not know the driver, and nobody may look at it",
        |world| {
            unseen(world);
            world.forbidden.extend(["/nodes", "/csinodes"]);
            world.pod["metadata"]["deletionTimestamp"] = ago(80);
            world.pod["status"]["phase"] = json!("Failed");
            let status = &mut world.pod["status"]["containerStatuses"][0];
            (status["ready"], status["state"]) = (json!(false), end(137, "Error"));
            world.event("FailedMount", UNREGISTERED);
            aged(world, 10, 9);
        },
    ),
    ("the name of the provider ends with a space", |world| {
        refused(
            world,
            "invalid provider: provider \"vault \" is not a provider name",
        );
        world.class["spec"]["provider"] = json!("vault ");
    }),
    (
        "the class of a mounted volume is gone, and its refreshes fail",
        |world| {
            world.class = json!(null);
            world.status["volumes"][0]["staleSince"] = ago(300);
            world.pod_status["metadata"]["annotations"]["secrets-store.csi.k8s.io/stale-reason"] = json!(
                "failed to get secretproviderclass shop/db: secretproviderclasses.secrets-store.csi.x-k8s.io \"db\" not found; create it in the pod's namespace, or correct secretProviderClass in the pod's volumeAttributes"
            );
        },
    ),
    (
        "a volume takes a Secret that the driver could not make",
        |world| {
            let (pod_status, status) = (world.pod_status.clone(), world.status.clone());
            world.not_started();
            (world.pod_status, world.status) = (pod_status, status);
            let volumes = world.pod["spec"]["volumes"].as_array_mut().unwrap();
            volumes.push(json!({"name": "p", "secret": {"secretName": "creds"}}));
            world.secret = json!(null);
            world.event(
                "FailedToCreateSecret",
                "Secret creds of SecretProviderClass db: there is no object \"bar\" in the volume",
            );
            world.event(
                "FailedMount",
                "MountVolume.SetUp failed for volume \"p\" : secret \"creds\" not found",
            );
        },
    ),
];
