//! The situations of the node, the driver on it, and what may be read.

use serde_json::json;

use super::{Change, controlled, unscheduled};
use crate::world::ago;

pub(super) const GROUND: &[(&str, Change)] = &[
    ("all is well", |_| {}),
    ("the kinds are not installed", |world| {
        world.remove_kinds();
    }),
    ("the pod has no node", |world| {
        unscheduled(world, "0/3 nodes are available: 3 Insufficient memory.");
    }),
    ("the node is not ready", |world| {
        world.node["status"]["conditions"] = json!([{
            "type": "Ready", "status": "Unknown", "lastTransitionTime": ago(600),
            "message": "Kubelet stopped posting node status.",
        }]);
    }),
    ("the node is gone", |world| {
        controlled(world);
        world.node = json!(null);
    }),
    ("a bare pod names a node that does not exist", |world| {
        world.node = json!(null);
        world.not_started();
        world.pod["status"] = json!({"phase": "Pending"});
    }),
    ("a template names a node that does not exist", |world| {
        controlled(world);
        world.node = json!(null);
        world.not_started();
        world.pod["status"] = json!({"phase": "Pending"});
    }),
    ("there is no CSIDriver", |world| {
        world.csi_driver = json!(null)
    }),
    ("the CSIDriver lacks the pod", |world| {
        world.csi_driver["spec"]["podInfoOnMount"] = json!(false);
    }),
    ("the driver is not on the node", |world| {
        world.driver = json!(null);
        world.not_started();
    }),
    ("the driver was killed for its memory", |world| {
        world.driver["status"]["containerStatuses"][0]["state"] =
            json!({"waiting": {"reason": "CrashLoopBackOff"}});
        world.driver["status"]["containerStatuses"][0]["lastState"] =
            json!({"terminated": {"reason": "OOMKilled", "exitCode": 137}});
    }),
    ("the driver runs, and ends again and again", |world| {
        world.csi_node["spec"]["drivers"] = json!([]);
        world.not_started();
        let status = &mut world.driver["status"]["containerStatuses"][0];
        status["restartCount"] = json!(2);
        status["lastState"] =
            json!({"terminated": {"reason": "Error", "exitCode": 2, "finishedAt": ago(20)}});
    }),
    ("the driver has been started again once", |world| {
        let status = &mut world.driver["status"]["containerStatuses"][0];
        status["restartCount"] = json!(1);
        status["lastState"] =
            json!({"terminated": {"reason": "Error", "exitCode": 2, "finishedAt": ago(20)}});
    }),
    ("kubelet does not know the driver", |world| {
        world.csi_node["spec"]["drivers"] = json!([]);
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name secrets-store.csi.k8s.io not found in the list of registered CSI drivers");
    }),
    ("the existing driver is there", |world| {
        world.existing_driver = true
    }),
    ("commands in the driver's pod are forbidden", |world| {
        world.forbidden = vec!["/exec?"];
    }),
    ("only the pod may be read", |world| {
        world.forbidden = vec![
            "/events",
            "/secrets/",
            "/secretprovider",
            "/apis/storage",
            "/nodes",
            "/daemonsets",
        ];
    }),
    ("the driver is called otherwise", |world| {
        world.driver_namespace = "security"
    }),
    ("mounts do not leave the driver's container", |world| {
        world.status["unseenBelow"] = json!("/var/lib/kubelet/pods");
        world.not_started();
    }),
    ("kubelet does not say why", |world| world.not_started()),
    ("kubelet does not say why yet", |world| {
        world.not_started();
        world.pod["status"]["startTime"] = ago(60);
    }),
    ("the node's clock is wrong", |world| {
        world.status["time"] = ago(7_300)
    }),
    ("the driver's name is misspelt", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["driver"] = json!("secrets-store.csi.x-k8s.io");
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name secrets-store.csi.x-k8s.io not found in the list of registered CSI drivers");
    }),
    ("another driver of a similar name is registered", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["driver"] = json!("my-secret-store.example.com");
        world.csi_node["spec"]["drivers"] =
            json!([{"name": "my-secret-store.example.com", "nodeID": "node-1"}]);
        world.not_started();
    }),
    ("only the pod may be read, and it is not ready", |world| {
        world.forbidden = vec![
            "/events",
            "/secrets/",
            "/secretprovider",
            "/apis/storage",
            "/nodes",
            "/daemonsets",
        ];
        world.not_started();
    }),
    (
        "kubelet did not know the driver, and knows it now",
        |world| {
            world.not_started();
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name secrets-store.csi.k8s.io not found in the list of registered CSI drivers");
        },
    ),
];
