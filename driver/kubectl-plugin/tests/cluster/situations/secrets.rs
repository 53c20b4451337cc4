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

/// Gives the class two more Secrets, and lets the container wait for the last one. The pod status says why they are not
/// made.
fn several(world: &mut World, reason: &str) {
    let class = world.class["spec"]["secretObjects"].as_array_mut().unwrap();
    for name in ["a-first", "login"] {
        class.push(json!({"secretName": name, "type": "Opaque",
            "data": [{"objectName": "fo", "key": "pw"}]}));
    }
    world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
        {"secretKeyRef": {"name": "login", "key": "pw"}}}]);
    waits(world);
    out_of_step(world, reason);
}

/// Lets the container wait for what its environment takes.
fn waits(world: &mut World) {
    world.pod["status"]["containerStatuses"][0]["state"] =
        json!({"waiting": {"reason": "CreateContainerConfigError"}});
    world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
}

/// Lets the pod status say why Secrets are not as the class says.
fn out_of_step(world: &mut World, reason: &str) {
    let annotations = &mut world.pod_status["metadata"]["annotations"];
    annotations["secrets-store.csi.k8s.io/secrets-out-of-step-since"] = ago(400);
    annotations["secrets-store.csi.k8s.io/secrets-out-of-step-reason"] = json!(reason);
}

/// Puts a Secret into the cluster.
fn secret(world: &mut World, name: &str, metadata: serde_json::Value) {
    let mut secret = json!({"metadata": metadata, "type": "Opaque"});
    secret["metadata"]["name"] = json!(name);
    let path = format!("/api/v1/namespaces/shop/secrets/{name}");
    world.others.push((path, secret));
}

/// Returns the metadata of a Secret of the driver with these keys, written so many seconds ago.
fn of_driver(seconds: i64, keys: &[&str]) -> serde_json::Value {
    let keys = keys.iter().map(|key| (format!("f:{key}"), json!({})));
    let keys: serde_json::Map<_, _> = keys.collect();
    json!({
        "labels": {"secrets-store.csi.k8s.io/managed": "true"},
        "managedFields": [{"manager": "csi-secrets-store", "time": ago(seconds), "operation": "Update",
            "apiVersion": "v1", "fieldsType": "FieldsV1", "fieldsV1": {"f:data": keys}}],
    })
}

/// Lets the driver say of the Secret of the class, which exists, that it is not as the class says.
fn said_of_creds(world: &mut World, cause: &str) {
    out_of_step(
        world,
        &format!("SecretProviderClass db, Secret creds: {cause}"),
    );
}

/// Lets the container take the key `pw` of a Secret into its environment.
fn takes(world: &mut World, secret: &str) {
    world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
        {"secretKeyRef": {"name": secret, "key": "pw"}}}]);
}

/// Adds a class that makes Secret db.
fn other_class(world: &mut World) {
    let mut class = world.class.clone();
    class["metadata"]["name"] = json!("jobs");
    class["spec"]["secretObjects"][0]["secretName"] = json!("db");
    let path = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasses/jobs";
    world.others.push((path.to_owned(), class));
}

const NOT_MADE: &str = "a Secret of this name exists that the driver did not make; it stays as it is. To hand it to the driver, which then replaces its data: kubectl annotate secret -n shop creds secrets-store.csi.k8s.io/adopt=true";
const FIRST: &str = "SecretProviderClass db, Secret a-first: a Secret of this name exists that the driver did not make; it stays as it is. To hand it to the driver, which then replaces its data: kubectl annotate secret -n shop a-first secrets-store.csi.k8s.io/adopt=true";
const LOGIN: &str = "SecretProviderClass db, Secret login: there is no object fo in the volume";

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
    (
        "two Secrets fail, and the pod waits for the second",
        |world| {
            several(world, &format!("{FIRST}\n{LOGIN}"));
            secret(world, "a-first", json!({}));
        },
    ),
    (
        "two Secrets fail, and a driver of a former version names the first",
        |world| {
            several(world, &format!("2 Secrets. {FIRST}"));
            secret(world, "a-first", json!({}));
            world.event("FailedToCreateSecret", FIRST);
            world.event("FailedToCreateSecret", LOGIN);
        },
    ),
    (
        "two Secrets fail, and a volume of the pod takes the second",
        |world| {
            several(world, &format!("{FIRST}\n{LOGIN}"));
            secret(world, "a-first", json!({}));
            world.pod["spec"]["containers"][0]["env"] = json!([]);
            taken_by_volume(
                world,
                json!({"name": "tls", "secret": {"secretName": "login"}}),
            );
            world.event(
                "FailedMount",
                "MountVolume.SetUp failed for volume \"tls\" : secret \"login\" not found",
            );
        },
    ),
    (
        "another Secret fails than the one that the pod waits for",
        |world| {
            several(world, FIRST);
            secret(world, "a-first", json!({}));
        },
    ),
    (
        "the first Secret has been adopted, and the reason of it stays",
        |world| {
            several(world, FIRST);
            secret(world, "a-first", of_driver(100, &["pw"]));
            world.event("FailedToCreateSecret", FIRST);
            world.event("FailedToCreateSecret", LOGIN);
        },
    ),
    (
        "a Secret has been written since, and the reason of it stays",
        |world| {
            said_of_creds(world, "there is no object password in the volume");
            world.secret["metadata"] = of_driver(100, &["pw"]);
            world.secret["metadata"]["name"] = json!("creds");
        },
    ),
    (
        "a Secret has been written before, and lacks a key",
        |world| {
            said_of_creds(world, "there is no object password in the volume");
            world.secret["metadata"] = of_driver(100, &["old"]);
            world.secret["metadata"]["name"] = json!("creds");
        },
    ),
    ("an impossible name has been corrected since", |world| {
        let of_name = "SecretProviderClass db: secretName \"my_db\" cannot be the name of a Secret: use lower case letters, digits, \"-\" and \".\"";
        several(world, &format!("2 Secrets. {of_name}"));
        world.event("FailedToCreateSecret", LOGIN);
        secret(world, "a-first", of_driver(100, &["pw"]));
    }),
    ("an impossible name, and another Secret fails", |world| {
        world.class["spec"]["secretObjects"][0]["secretName"] = json!("my_db");
        let of_name = "SecretProviderClass db: secretName \"my_db\" cannot be the name of a Secret: use lower case letters, digits, \"-\" and \".\"";
        several(world, &format!("{of_name}\n{LOGIN}"));
        secret(world, "a-first", of_driver(100, &["pw"]));
    }),
    ("more Secrets fail than are named", |world| {
        several(world, &format!("{FIRST}\n{LOGIN}\nand 3 more"));
        secret(world, "a-first", json!({}));
    }),
    ("all Secrets of the class fail", |world| {
        several(
            world,
            "SecretProviderClass db: a file of the volume cannot be read",
        );
        secret(world, "a-first", of_driver(1_000, &["pw"]));
    }),
    ("a Secret is somebody else's", |world| {
        said_of_creds(
            world,
            "a Secret of this name exists that the driver did not make; it stays as it is. To hand it to the driver, which then replaces its data: kubectl annotate secret -n shop creds secrets-store.csi.k8s.io/adopt=true",
        );
    }),
    ("a Secret is held by a finalizer", |world| {
        said_of_creds(
            world,
            "it is being deleted; it is made again when it is gone",
        );
        world.secret["metadata"]["deletionTimestamp"] = ago(300);
        world.secret["metadata"]["finalizers"] = json!(["example.com/keep"]);
    }),
    ("a Secret is immutable", |world| {
        said_of_creds(
            world,
            "the Secret is immutable, so that its content cannot be changed, and immutable cannot be set back to false. Delete it, and the driver makes it anew: kubectl delete secret -n shop creds",
        );
    }),
    ("a Secret has another type, and a finalizer", |world| {
        said_of_creds(
            world,
            "its type cannot be changed to kubernetes.io/tls, and the existing Secret is kept: finalizer \"example.com/keep\" keeps the Secret from being deleted",
        );
        world.secret["metadata"]["finalizers"] = json!(["example.com/keep"]);
    }),
    (
        "a Secret has another type, and a policy refuses it",
        |world| {
            said_of_creds(
                world,
                "its type cannot be changed to kubernetes.io/tls, and the existing Secret is kept: the dry run was refused: ValidatingAdmissionPolicy no-tls with binding no-tls denied it, HTTP 422 Invalid; the rest of the message is not repeated because it may quote the content",
            );
        },
    ),
    ("a type was refused before", |world| {
        said_of_creds(
            world,
            "its type cannot be changed to kubernetes.io/tls, and the existing Secret is kept: a new Secret of that type has been refused before, and the former one was put back. To try again: kubectl annotate secret -n shop creds secrets-store.csi.k8s.io/refused-type-",
        );
    }),
    ("another class makes the Secret", |world| {
        said_of_creds(
            world,
            "SecretProviderClass other makes other content of this Secret, and it is left as it is; give one of the two another secretName",
        );
    }),
    ("a policy refuses the Secret", |world| {
        world.secret = json!(null);
        said_of_creds(
            world,
            "the API server refuses it: ValidatingAdmissionPolicy no-secrets with binding no-secrets denied it, HTTP 422 Invalid; the rest of the message is not repeated because it may quote the content. To read it, try other content: kubectl create secret generic -n shop creds --from-literal=KEY=x --dry-run=server. Or ask those who run the policy",
        );
    }),
    (
        "a webhook refuses the Secret, and the driver may not be looked at",
        |world| {
            world.forbidden = vec!["/daemonsets"];
            world.secret = json!(null);
            said_of_creds(
                world,
                "the API server refuses it: admission webhook no.example.com denied it, HTTP 403 Forbidden; the rest of the message is not repeated because it may quote the content",
            );
        },
    ),
    ("a webhook on Secrets does not answer", |world| {
        world.secret = json!(null);
        said_of_creds(
            world,
            "admission webhook no.example.com could not be called, HTTP 500 InternalError; the rest of the message is not repeated because it may quote the content. Look at the webhook's pods",
        );
    }),
    (
        "a key is not in somebody else's Secret, for which the container waits",
        |world| {
            said_of_creds(
                world,
                "a Secret of this name exists that the driver did not make; it stays as it is. To hand it to the driver, which then replaces its data: kubectl annotate secret -n shop creds secrets-store.csi.k8s.io/adopt=true",
            );
            world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
                {"secretKeyRef": {"name": "creds", "key": "pw"}}}]);
            waits(world);
            world.pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"] =
                json!("couldn't find key pw in Secret shop/creds");
        },
    ),
    (
        "a Secret could not be made, and only events may be read of it",
        |world| {
            world.forbidden = vec!["/secrets/", "/secretproviderclass", "/daemonsets"];
            several(world, LOGIN);
            world.pod["status"]["containerStatuses"][0]["state"]["waiting"]["message"] =
                json!("secret \"login\" not found");
            world.event("FailedToCreateSecret", LOGIN);
        },
    ),
    (
        "two Secrets fail, and pod statuses may not be read",
        |world| {
            world.forbidden = vec!["/secretproviderclasspodstatuses"];
            several(world, FIRST);
            secret(world, "a-first", json!({}));
            world.event("FailedToCreateSecret", FIRST);
            world.event("FailedToCreateSecret", LOGIN);
        },
    ),
    ("a reason was cut, and the event has all of it", |world| {
        let cut = LOGIN.get(..LOGIN.len() - 10).unwrap();
        several(world, &format!("{FIRST}\n{cut}…"));
        secret(world, "a-first", json!({}));
        world.event("FailedToCreateSecret", LOGIN);
    }),
    (
        "a reason is newer than what the driver wrote last",
        |world| {
            said_of_creds(world, "there is no object password in the volume");
            world.secret["metadata"] = of_driver(100, &["pw"]);
            world.secret["metadata"]["name"] = json!("creds");
            world.pod_status["metadata"]["managedFields"] = json!([{"manager": "csi-secrets-store",
            "time": ago(50), "operation": "Update", "apiVersion": "secrets-store.csi.x-k8s.io/v1",
            "fieldsType": "FieldsV1", "fieldsV1": {"f:metadata": {"f:annotations":
                {"f:secrets-store.csi.k8s.io/secrets-out-of-step-reason": {}}}}}]);
        },
    ),
    (
        "a container takes a Secret that the class does not make any more",
        |world| {
            takes(world, "db");
            secret(world, "db", of_driver(1_000, &["pw"]));
        },
    ),
    (
        "a container of a Deployment takes a Secret that the class does not make any more, and Deployments and nodes may not be read",
        |world| {
            takes(world, "db");
            secret(world, "db", of_driver(1_000, &["pw"]));
            world.forbidden = vec!["/daemonsets", "/nodes", "/csinodes", "/csidrivers"];
            world.pod["metadata"]["labels"] = json!({"pod-template-hash": "5d"});
            super::controlled(world);
        },
    ),
    (
        "a volume and the images take Secrets that no class makes any more, and the class makes none",
        |world| {
            world.class["spec"]["secretObjects"] = json!([]);
            let volumes = world.pod["spec"]["volumes"].as_array_mut().unwrap();
            volumes.push(json!({"name": "tls", "secret": {"secretName": "web-tls"}}));
            world.pod["spec"]["imagePullSecrets"] = json!([{"name": "pull"}]);
            for name in ["web-tls", "pull"] {
                secret(world, name, of_driver(1_000, &["pw"]));
            }
        },
    ),
    (
        "a container takes a Secret of a class that another pod mounts",
        |world| {
            takes(world, "db");
            secret(world, "db", of_driver(1_000, &["pw"]));
            other_class(world);
            let mut status = world.pod_status.clone();
            status["metadata"]["name"] = json!("job-shop-jobs");
            status["metadata"]["ownerReferences"][0]["uid"] = json!("job");
            status["status"]["podName"] = json!("job");
            status["status"]["secretProviderClassName"] = json!("jobs");
            let path = "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasspodstatuses/job-shop-jobs";
            world.others.push((path.to_owned(), status));
        },
    ),
    (
        "a container takes a Secret of a class that no pod mounts",
        |world| {
            takes(world, "db");
            secret(world, "db", of_driver(1_000, &["pw"]));
            other_class(world);
        },
    ),
    (
        "a container takes a Secret that somebody else made",
        |world| {
            takes(world, "db");
            secret(world, "db", json!({}));
        },
    ),
    (
        "a container takes a Secret that somebody else writes now",
        |world| {
            takes(world, "db");
            let mut metadata = of_driver(1_000, &["pw"]);
            metadata["managedFields"][0]["manager"] = json!("external-secrets");
            secret(world, "db", metadata);
        },
    ),
    (
        "a pod without volumes takes a Secret that no class makes any more",
        |world| {
            takes(world, "db");
            secret(world, "db", of_driver(1_000, &["pw"]));
            world.pod["spec"]["volumes"] = json!([]);
            world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
        },
    ),
    (
        "a container takes a Secret of a class that is gone",
        |world| {
            takes(world, "creds");
            world.secret["metadata"] = of_driver(1_000, &["pw"]);
            world.secret["metadata"]["name"] = json!("creds");
            world.secret["metadata"]["annotations"] =
                json!({"secrets-store.csi.k8s.io/class": "db"});
            world.class = json!(null);
        },
    ),
    (
        "classes may not be listed, and the class does not make the Secret any more",
        |world| {
            takes(world, "db");
            secret(world, "db", of_driver(1_000, &["pw"]));
            world.forbidden = vec!["/secretproviderclasses?"];
        },
    ),
    (
        "a container runs with a key that the class does not write any more",
        |world| {
            takes(world, "creds");
            world.secret["metadata"] = of_driver(100, &["password"]);
            world.secret["metadata"]["name"] = json!("creds");
            world.class["spec"]["secretObjects"][0]["data"][0]["key"] = json!("password");
        },
    ),
    (
        "a Secret of the driver has lost its label and its annotations",
        |world| {
            said_of_creds(world, NOT_MADE);
            world.secret["metadata"] = of_driver(1_000, &["pw"]);
            world.secret["metadata"]["name"] = json!("creds");
            world.secret["metadata"]["labels"] = json!({});
        },
    ),
    (
        "a Secret of the driver has lost its label, and only its owner tells",
        |world| {
            said_of_creds(world, NOT_MADE);
            world.secret["metadata"]["ownerReferences"] = json!([{"kind": "SecretProviderClassPodStatus",
                "apiVersion": "secrets-store.csi.x-k8s.io/v1", "name": "web-shop-db", "uid": "s"}]);
        },
    ),
    (
        "a Secret of the driver has lost its label, and somebody else writes it",
        |world| {
            said_of_creds(world, NOT_MADE);
            world.secret["metadata"] = of_driver(1_000, &["pw"]);
            world.secret["metadata"]["name"] = json!("creds");
            world.secret["metadata"]["labels"] = json!({});
            world.secret["metadata"]["managedFields"][0]["manager"] = json!("kubectl-replace");
            world.secret["metadata"]["ownerReferences"] = json!([{"kind": "SecretProviderClassPodStatus",
                "apiVersion": "secrets-store.csi.x-k8s.io/v1", "name": "web-shop-db", "uid": "s"}]);
        },
    ),
];
