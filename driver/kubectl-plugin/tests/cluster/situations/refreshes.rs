//! The situations of mounted volumes whose content changes, or should.

use serde_json::{Value, json};

use super::{Change, controlled};
use crate::world::{World, ago};

/// Lets the container mount what an expression names, whose variable is of this source, of a volume that has content
/// since then.
fn expression(world: &mut World, expression: &str, variable: &Value) {
    let container = &mut world.pod["spec"]["containers"][0];
    container["volumeMounts"][0]["subPathExpr"] = json!(expression);
    container["env"] = json!([variable]);
    container["env"][0]["name"] = json!("POD");
    world.status["volumes"][0]["lastChange"] = ago(10);
    world.status["volumes"][0]["files"] = json!(["web.key"]);
}

pub(super) const REFRESHES: &[(&str, Change)] = &[
    ("kubelet is not asked to publish again", |world| {
        world.csi_driver["spec"]["requiresRepublish"] = json!(false);
    }),
    ("a refresh is overdue", |world| {
        world.status["volumes"][0]["lastSuccess"] = ago(3_000);
    }),
    ("new content under a subPath", |world| {
        world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("db/password");
        world.status["volumes"][0]["lastChange"] = ago(10);
    }),
    ("a subPath names no file", |world| {
        world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("password");
    }),
    ("a subPath names a directory", |world| {
        world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("db/");
    }),
    (
        "a subPath names none of the files that are known",
        |world| {
            world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("password");
            world.status["volumes"][0]["fileCount"] = json!(2);
        },
    ),
    ("calls of other pods fail as well", |world| {
        world.status["volumes"][0]["staleSince"] = ago(300);
        world.status["calls"] = json!([{"provider": "vault", "succeeded": 40,
            "failed": {"PERMISSION_DENIED": 11, "UNAVAILABLE": 1}}]);
        world.pod_status["metadata"]["annotations"]["secrets-store.csi.k8s.io/stale-reason"] =
            json!("provider vault: permission denied");
    }),
    ("the class says never", |world| {
        world.class["metadata"]["annotations"] =
            json!({"secrets-store.csi.k8s.io/rotation-poll-interval": "never"});
    }),
    ("a class has an interval, and rotation is off", |world| {
        world.status["refreshes"] = json!(false);
        world.class["metadata"]["annotations"] =
            json!({"secrets-store.csi.k8s.io/rotation-poll-interval": "5m"});
    }),
    ("annotations of a class are misspelt", |world| {
        world.class["metadata"]["annotations"] = json!({
            "secrets-store.csi.k8s.io/rotation-pol-interval": "5m",
            "secrets-store.csi.x-k8s.io/refresh": "1",
            "secrets-store.csi.x-k8s.io/note": "owned by team payments",
            "secrets-store.csi.k8s.io/send-object-versions": "true",
        });
    }),
    (
        "a class was edited after the mount, and rotation is off",
        |world| {
            world.status["refreshes"] = json!(false);
            world.class["metadata"]["managedFields"] = json!([{"manager": "kubectl", "time": ago(60),
            "operation": "Update", "apiVersion": "secrets-store.csi.x-k8s.io/v1", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:spec": {}}}]);
        },
    ),
    (
        "a class was labelled after the mount, and rotation is off",
        |world| {
            world.status["refreshes"] = json!(false);
            world.class["metadata"]["managedFields"] = json!([{"manager": "kubectl", "time": ago(60),
            "operation": "Update", "apiVersion": "secrets-store.csi.x-k8s.io/v1", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:metadata": {}}}]);
        },
    ),
    (
        "a class was edited after the mount, and rotation is on",
        |world| {
            world.class["metadata"]["managedFields"] = json!([{"manager": "kubectl", "time": ago(60),
            "operation": "Update", "apiVersion": "secrets-store.csi.x-k8s.io/v1", "fieldsType": "FieldsV1",
            "fieldsV1": {"f:spec": {}}}]);
        },
    ),
    ("a volume has an interval, and rotation is off", |world| {
        world.status["refreshes"] = json!(false);
        world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["secrets-store.csi.k8s.io/rotation-poll-interval"] =
            json!("5m");
    }),
    (
        "new content under a subPath, and a controller makes the pod again",
        |world| {
            controlled(world);
            world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("db/password");
            world.status["volumes"][0]["lastChange"] = ago(10);
        },
    ),
    ("calls of other pods fail, and this one is fine", |world| {
        world.status["calls"] =
            json!([{"provider": "vault", "succeeded": 44, "failed": {"UNAVAILABLE": 49}}]);
    }),
    ("a subPathExpr names no file", |world| {
        let name = json!({"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}});
        expression(world, "$(POD).kye", &name);
    }),
    ("a subPathExpr of a label names no file", |world| {
        world.pod["metadata"]["labels"] = json!({"app": "shop"});
        let label = json!({"valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['app']"}}});
        expression(world, "$(POD).key", &label);
    }),
    ("a subPathExpr of a literal names no file", |world| {
        expression(world, "$(POD).key", &json!({"value": "wbe"}));
    }),
    ("a subPathExpr names a file with new content", |world| {
        let name = json!({"valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}});
        expression(world, "$(POD).key", &name);
    }),
    ("a subPathExpr of a ConfigMap cannot be resolved", |world| {
        let key = json!({"valueFrom": {"configMapKeyRef": {"name": "web", "key": "pod"}}});
        expression(world, "$(POD).key", &key);
    }),
    ("a subPath names no file, and the content is new", |world| {
        world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("password");
        world.status["volumes"][0]["lastChange"] = ago(10);
    }),
    (
        "a subPathExpr of a variable of a variable names no file",
        |world| {
            expression(world, "$(FILE)", &json!({"value": "wbe"}));
            let env = world.pod["spec"]["containers"][0]["env"]
                .as_array_mut()
                .unwrap();
            env.push(json!({"name": "FILE", "value": "$(POD).key"}));
        },
    ),
    (
        "a container runs with a subPath that may name no file, and the driver may not be looked at",
        |world| {
            world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("fooo");
            world.forbidden = vec!["/daemonsets"];
        },
    ),
    (
        "a container runs with a subPathExpr that may name no file, and the driver may not be looked at",
        |world| {
            let label =
                json!({"valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['team']"}}});
            expression(world, "$(POD).key", &label);
            world.pod["metadata"]["labels"] = json!({"team": "shop"});
            world.forbidden = vec!["/exec?"];
        },
    ),
    (
        "a container runs with a subPathExpr of a ConfigMap, and the driver may not be looked at",
        |world| {
            let key = json!({"valueFrom": {"configMapKeyRef": {"name": "web", "key": "pod"}}});
            expression(world, "$(POD).key", &key);
            world.forbidden = vec!["/exec?"];
        },
    ),
];
