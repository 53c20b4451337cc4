//! The situations of Secrets that classes make, and what takes them.

use serde_json::json;

use super::Change;
use crate::world::{World, ago};

/// Gives the pod, which waits for its volumes, one of a Secret. That of the driver is mounted.
fn taken_by_volume(world: &mut World, volume: serde_json::Value) {
    let (pod_status, status) = (world.pod_status.clone(), world.status.clone());
    world.not_started();
    (world.pod_status, world.status) = (pod_status, status);
    let volumes = world.pod["spec"]["volumes"].as_array_mut().unwrap();
    volumes.push(volume);
}

pub(super) const SECRETS: &[(&str, Change)] = &[
    (
        "a container takes a Secret, and none mounts the volume",
        |world| {
            world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
            world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
            {"secretKeyRef": {"name": "creds", "key": "pw"}}}]);
            world.secret = json!(null);
            world.not_started();
        },
    ),
    (
        "a container takes a key that the class does not write",
        |world| {
            world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
            {"secretKeyRef": {"name": "creds", "key": "password"}}}]);
            world.pod["status"]["containerStatuses"][0]["state"] =
                json!({"waiting": {"reason": "CreateContainerConfigError"}});
        },
    ),
    ("the Secret is missing", |world| {
        world.secret = json!(null);
        world.event("FailedToCreateSecret", "Secret creds of SecretProviderClass db: The driver may write Secrets only when syncSecret.enabled is true");
    }),
    ("a volume takes a Secret of a similar name", |world| {
        taken_by_volume(
            world,
            json!({"name": "tls", "secret": {"secretName": "cerds"}}),
        );
        world.event(
            "FailedMount",
            "MountVolume.SetUp failed for volume \"tls\" : secret \"cerds\" not found",
        );
    }),
    (
        "a projected volume takes a key that the class does not write",
        |world| {
            taken_by_volume(
                world,
                json!({"name": "tls", "projected": {"sources": [{"secret": {"name": "creds",
                "items": [{"key": "password", "path": "p"}]}}]}}),
            );
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"tls\" : references non-existent secret key: password");
        },
    ),
    (
        "a volume takes a Secret that has nothing to do with the class",
        |world| {
            taken_by_volume(
                world,
                json!({"name": "tls", "secret": {"secretName": "other"}}),
            );
            world.event(
                "FailedMount",
                "MountVolume.SetUp failed for volume \"tls\" : secret \"other\" not found",
            );
        },
    ),
    (
        "a volume takes a Secret that the driver has not made yet",
        |world| {
            world.secret = json!(null);
            taken_by_volume(
                world,
                json!({"name": "tls", "secret": {"secretName": "creds"}}),
            );
        },
    ),
    ("an optional Secret of a volume is not there", |world| {
        taken_by_volume(
            world,
            json!({"name": "tls", "secret": {"secretName": "cerds", "optional": true}}),
        );
    }),
    ("a quota refuses the Secret", |world| {
        world.secret = json!(null);
        world.event("FailedToCreateSecret", "Secret creds of SecretProviderClass db: the API server refuses it: ResourceQuota few is used up. To see it: kubectl describe quota -n shop few");
    }),
    ("an object of the Secret is not in the volume", |world| {
        world.secret = json!(null);
        world.event(
            "FailedToCreateSecret",
            "Secret creds of SecretProviderClass db: there is no object quota in the volume",
        );
    }),
    (
        "a Secret has new content since the container started",
        |world| {
            world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
            {"secretKeyRef": {"name": "creds", "key": "pw"}}}]);
            world.secret["metadata"]["managedFields"] = json!([{"manager": "csi-secrets-store", "time": ago(1_799),
            "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:data": {}}}]);
        },
    ),
    (
        "a Secret has a new owner since the container started",
        |world| {
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "creds"}}]);
            world.secret["metadata"]["managedFields"] = json!([{"manager": "csi-secrets-store", "time": ago(60),
            "operation": "Update", "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {}}}]);
            world.status["volumes"][0]["lastChange"] = ago(3_595);
        },
    ),
    (
        "a Secret was made anew since the container started",
        |world| {
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "creds"}}]);
            world.secret["metadata"]["creationTimestamp"] = ago(60);
        },
    ),
    (
        "a container waits for a Secret of a mounted volume",
        |world| {
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "creds"}}]);
            world.pod["status"]["containerStatuses"][0]["state"] =
                json!({"waiting": {"reason": "CreateContainerConfigError"}});
            world.secret = json!(null);
            world.event("FailedToCreateSecret", "Secret creds of SecretProviderClass db: The driver may write Secrets only when syncSecret.enabled is true");
        },
    ),
    (
        "a container waits for a Secret of a volume that was mounted just now",
        |world| {
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "creds"}}]);
            world.pod["status"]["containerStatuses"][0]["state"] =
                json!({"waiting": {"reason": "CreateContainerConfigError"}});
            world.pod_status["metadata"]["creationTimestamp"] = ago(1);
            world.secret = json!(null);
        },
    ),
];
