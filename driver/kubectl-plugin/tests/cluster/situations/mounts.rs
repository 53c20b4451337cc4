//! The situations of volumes that are not mounted, or with difficulty: the volume, its class and its provider.

use serde_json::{Value, json};

use super::{Change, refused};
use crate::world::{World, ago};

const OF_INTERVAL: &str = "SecretProviderClass shop/db: annotation secrets-store.csi.k8s.io/rotation-poll-interval is \"60\": it lacks a unit";
const NO_PARAMETERS: &str = "parameters not set in shop/db: set spec.parameters of the SecretProviderClass to what provider \"vault\" needs";

/// Lets somebody have changed fields of the class so many seconds ago.
fn edited(world: &mut World, seconds: i64, fields: Value) {
    world.class["metadata"]["managedFields"] = json!([{"manager": "kubectl-edit", "time": ago(seconds),
        "operation": "Update", "apiVersion": "secrets-store.csi.x-k8s.io/v1", "fieldsType": "FieldsV1",
        "fieldsV1": fields}]);
}

const NO_TOKEN: &str = "cannot connect to the API server: failed to infer config: failed to read an incluster token; run in a cluster with a service account token, or give --kubeconfig";

pub(super) const MOUNTS: &[(&str, Change)] = &[
    ("the volume names no class", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"] = json!({});
        world.not_started();
    }),
    ("the volume is not read-only", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["readOnly"] = json!(false);
        world.not_started();
    }),
    ("the class has no parameters", |world| {
        world.class["spec"]["parameters"] = json!({});
        world.not_started();
    }),
    ("the Secret of nodePublishSecretRef is missing", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] = json!({"name": "login"});
        world.not_started();
    }),
    (
        "the Secret of nodePublishSecretRef is what the class of the volume makes",
        |world| {
            world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] =
                json!({"name": "creds"});
            world.secret = json!(null);
            world.not_started();
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : fetching NodePublishSecretRef shop/creds failed: kubernetes.io/csi: failed to find the secret creds in the namespace shop with error: secrets \"creds\" not found");
        },
    ),
    (
        "the Secret of nodePublishSecretRef is what the class of another volume makes",
        |world| {
            let mut class = world.class.clone();
            class["metadata"]["name"] = json!("login");
            class["spec"]["secretObjects"][0]["secretName"] = json!("login");
            let path =
                "/apis/secrets-store.csi.x-k8s.io/v1/namespaces/shop/secretproviderclasses/login";
            world.others.push((path.to_owned(), class));
            let mut volume = world.pod["spec"]["volumes"][0].clone();
            volume["name"] = json!("first");
            volume["csi"]["volumeAttributes"]["secretProviderClass"] = json!("login");
            world.pod["spec"]["volumes"]
                .as_array_mut()
                .unwrap()
                .push(volume);
            let mounts = world.pod["spec"]["containers"][0]["volumeMounts"]
                .as_array_mut()
                .unwrap();
            mounts.push(json!({"name": "first", "mountPath": "/first", "readOnly": true}));
            world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] =
                json!({"name": "login"});
            world.not_started();
        },
    ),
    (
        "the pod's claim is bound to a PersistentVolume of the driver",
        |world| {
            world.pod["spec"]["volumes"] =
                json!([{"name": "secrets", "persistentVolumeClaim": {"claimName": "sec"}}]);
            world.not_started();
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"shop-pv\" : kubernetes.io/csi: mounter.SetUpAt failed to check volume lifecycle mode: volume mode \"Persistent\" not supported by driver secrets-store.csi.k8s.io (only supports [\"Ephemeral\"])");
        },
    ),
    (
        "no provider has a socket where the driver looks for it",
        |world| {
            world.providers_on_node = Some("/var/run/secrets-store-csi-provders");
            world.status["providers"] = json!([]);
            world.not_started();
        },
    ),
    ("the provider's socket is dead", |world| {
        world.status["providers"][0]["answers"] = json!(false);
        world.status["providers"][0]["error"] = json!("Connection refused (os error 111)");
    }),
    ("the class is gone", |world| world.class = json!(null)),
    ("a volume with many files", |world| {
        let volume = &mut world.status["volumes"][0];
        volume["files"] = json!(["a", "b\u{202e}", "c/d"]);
        volume["fileCount"] = json!(20);
    }),
    (
        "a mount fails, and the driver may not be looked at",
        |world| {
            world.forbidden = vec!["/daemonsets"];
            world.not_started();
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = the API server does not answer");
        },
    ),
    ("the provider refuses what the class asks for", |world| {
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = failed to mount secrets store objects for pod shop/web: provider \"vault\" at /p/vault.sock answered INVALID_ARGUMENT: no role is given");
    }),
    ("the class was missing, and exists now", |world| {
        refused(
            world,
            "failed to get secretproviderclass shop/db: secretproviderclasses.secrets-store.csi.x-k8s.io \"db\" not found; create it in the pod's namespace, or correct secretProviderClass in the pod's volumeAttributes",
        );
    }),
    (
        "the Secret of nodePublishSecretRef was missing, and exists now",
        |world| {
            world.not_started();
            world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] =
                json!({"name": "creds"});
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : fetching NodePublishSecretRef shop/creds failed: kubernetes.io/csi: failed to find the secret creds in the namespace shop with error: secrets \"creds\" not found");
        },
    ),
    ("the answer of the provider is too large", |world| {
        refused(
            world,
            "failed to mount secrets store objects for pod shop/web: provider \"vault\" at /p/vault.sock answered with more than 4194304 bytes; raise --max-call-recv-msg-size of the driver (chart value maxCallRecvMsgSize), or split the SecretProviderClass",
        );
    }),
    ("the provider names no object", |world| {
        refused(
            world,
            "failed to mount secrets store objects for pod shop/web: provider \"vault\": missing object versions: it answered without naming any object. Does the SecretProviderClass list at least one object?",
        );
    }),
    ("two files have one path", |world| {
        refused(
            world,
            "failed to mount secrets store objects for pod shop/web: provider \"vault\": file a is refused: the provider sent two files with this path",
        );
    }),
    ("a file would be outside of the volume", |world| {
        refused(
            world,
            "failed to mount secrets store objects for pod shop/web: provider \"vault\": file ../a is refused: the path has a \"..\" component",
        );
    }),
    ("an attribute of the volume is wrong", |world| {
        refused(
            world,
            "attribute mode in the pod's spec.volumes[].csi.volumeAttributes is wrong: it is not octal",
        );
    }),
    ("the provider needs a token", |world| {
        refused(
            world,
            "failed to mount secrets store objects for pod shop/web: provider \"aws\" at /p/aws.sock answered UNKNOWN: no token. No service account token was sent, because the CSIDriver asks for none; if this provider needs one, name its audience in spec.tokenRequests of the CSIDriver (chart value tokenRequests)",
        );
    }),
    (
        "a provider of a misspelt name has no socket, and the driver may not be looked at",
        |world| {
            world.forbidden = vec!["/daemonsets"];
            refused(
                world,
                "failed to mount secrets store objects for pod shop/web: provider not found: provider \"valut\" has no socket valut.sock in /p; the sockets there are: aws.sock, vault.sock. Is the provider running on this node, and is spec.provider of the SecretProviderClass right?",
            );
        },
    ),
    ("a provider has no socket", |world| {
        world.class["spec"]["provider"] = json!("valut");
        world.not_started();
    }),
    (
        "the driver may not read classes, and may not be looked at",
        |world| {
            world.forbidden = vec!["/daemonsets"];
            refused(
                world,
                "failed to get secretproviderclass shop/db: secretproviderclasses.secrets-store.csi.x-k8s.io \"db\" is forbidden: User \"x\" cannot get it; the driver's ClusterRole lacks this right: set the chart's value rbac.install to true, or apply deploy/rbac-secretproviderclass.yaml",
            );
        },
    ),
    ("the driver may not read classes", |world| {
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = failed to get secretproviderclass shop/db: secretproviderclasses.secrets-store.csi.x-k8s.io \"db\" is forbidden: User \"system:serviceaccount:kube-system:driver\" cannot get resource \"secretproviderclasses\" in API group \"secrets-store.csi.x-k8s.io\" in the namespace \"shop\"");
    }),
    ("the class is wrong, and may not be read", |world| {
        world.forbidden = vec!["/secretproviderclasses"];
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = InvalidArgument desc = SecretProviderClass shop/db: spec.parameters.objects is no list");
    }),
    ("a policy refuses the pod status", |world| {
        refused(
            world,
            "failed to write the pod status: secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io \"web-shop-db\" is forbidden: ValidatingAdmissionPolicy 'no-status' with binding 'no-status' denied request: no pod statuses here",
        );
    }),
    (
        "a policy refuses the pod status, and the driver may not be looked at",
        |world| {
            world.forbidden = vec!["/daemonsets"];
            refused(
                world,
                "failed to write the pod status: secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io \"web-shop-db\" is forbidden: ValidatingAdmissionPolicy 'no-status' with binding 'no-status' denied request: no pod statuses here",
            );
        },
    ),
    ("a webhook on pod statuses does not answer", |world| {
        refused(
            world,
            "failed to write the pod status: Internal error occurred: failed calling webhook \"status.example.com\": failed to call webhook: Post \"https://hook.audit.svc:443/?timeout=10s\": dial tcp 10.0.0.9:443: connect: connection refused",
        );
    }),
    ("a webhook refuses the pod status", |world| {
        refused(
            world,
            "failed to write the pod status: admission webhook \"status.example.com\" denied the request: User \"x\" cannot create resource \"secretproviderclasspodstatuses\"",
        );
    }),
    ("a quota refuses the pod status", |world| {
        refused(
            world,
            "failed to write the pod status: secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io \"web-shop-db\" is forbidden: exceeded quota: few, requested: count/secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io=1, used: 3, limited: 3",
        );
    }),
    ("somebody has unmounted the volume of a bare pod", |world| {
        world.status["volumes"][0]["mounted"] = json!(false);
    }),
    ("the provider's store is away", |world| {
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = failed to mount secrets store objects for pod shop/web: provider \"vault\" at /p/vault.sock answered UNAVAILABLE after 3 attempts: vault is sealed");
    }),
    ("the class's name has a control character", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["secretProviderClass"] =
            json!("db\r\u{1b}[2J");
        world.not_started();
    }),
    ("the class's texts have control characters", |world| {
        world.class["spec"]["provider"] = json!("vault\r");
        world.class["spec"]["secretObjects"][0]["secretName"] = json!("creds\r");
    }),
    ("a publish was cancelled by its caller", |world| {
        refused(
            world,
            "failed to mount secrets store objects for pod shop/web: the publish was cancelled: its caller went away, its pod is being deleted, or the volume is being unpublished",
        );
    }),
    (
        "the class was wrong, and its annotation is corrected",
        |world| {
            refused(world, OF_INTERVAL);
            edited(world, 10, json!({"f:metadata": {"f:annotations": {}}}));
        },
    ),
    ("the class was edited before the last attempt", |world| {
        refused(world, OF_INTERVAL);
        edited(world, 100, json!({"f:spec": {}}));
    }),
    ("the class had no parameters, and is made anew", |world| {
        refused(world, NO_PARAMETERS);
        world.class["metadata"]["creationTimestamp"] = ago(10);
    }),
    (
        "the provider refuses, and the class was edited since",
        |world| {
            refused(
                world,
                "failed to mount secrets store objects for pod shop/web: provider \"vault\" at /p/vault.sock answered INVALID_ARGUMENT: no role is given",
            );
            edited(world, 10, json!({"f:spec": {}}));
        },
    ),
    (
        "a policy refuses the pod status, and the class was edited since",
        |world| {
            refused(
                world,
                "failed to write the pod status: secretproviderclasspodstatuses.secrets-store.csi.x-k8s.io is forbidden: ValidatingAdmissionPolicy 'no-status' with binding 'no-status' denied request: no",
            );
            edited(world, 10, json!({"f:spec": {}}));
        },
    ),
    (
        "the volume is not read-only, and its class is not there",
        |world| {
            refused(
                world,
                "Readonly is not true in request: set `readOnly: true` in the pod's spec.volumes[].csi of this volume",
            );
            world.pod["spec"]["volumes"][0]["csi"]["readOnly"] = json!(false);
            world.class = json!(null);
        },
    ),
    (
        "the provider is misspelt, and the Secret of nodePublishSecretRef is missing",
        |world| {
            world.not_started();
            world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] =
                json!({"name": "login"});
            world.class["spec"]["provider"] = json!("valut");
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : fetching NodePublishSecretRef shop/login failed: kubernetes.io/csi: failed to find the secret login in the namespace shop with error: secrets \"login\" not found");
        },
    ),
    (
        "no container mounts the volume, which is not read-only either",
        |world| {
            world.not_started();
            world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
            world.pod["spec"]["volumes"][0]["csi"]["readOnly"] = json!(false);
        },
    ),
    ("the attribute of the class is misspelt", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"] =
            json!({"secretproviderclass": "db"});
        world.not_started();
    }),
    ("annotations of the driver are on the pod", |world| {
        world.pod["metadata"]["annotations"] = json!({
            "secrets-store.csi.k8s.io/rotation-poll-interval": "5m",
            "secrets-store.csi.k8s.io/refresh": "1",
            "example.com/refresh": "1",
        });
    }),
    (
        "the class is being deleted, and a finalizer keeps it",
        |world| {
            world.class["metadata"]["deletionTimestamp"] = ago(100);
            world.class["metadata"]["finalizers"] = json!(["example.com/keep"]);
        },
    ),
    ("the class names no provider", |world| {
        world.class["spec"]["provider"] = json!("");
        world.not_started();
    }),
    (
        "kubelet may not read the Secret of nodePublishSecretRef",
        |world| {
            world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] =
                json!({"name": "creds"});
            world.not_started();
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : fetching NodePublishSecretRef shop/creds failed: kubernetes.io/csi: failed to find the secret creds in the namespace shop with error: secrets \"creds\" is forbidden: User \"system:node:node-1\" cannot get resource \"secrets\" in API group \"\" in the namespace \"shop\": no relationship found between node 'node-1' and this object");
        },
    ),
    ("the driver has no token", |world| {
        refused(world, NO_TOKEN);
    }),
    (
        "the driver has no token, and may not be looked at",
        |world| {
            refused(world, NO_TOKEN);
            world.forbidden = vec!["/daemonsets"];
        },
    ),
    ("the driver's token has expired", |world| {
        refused(
            world,
            "Unauthorized; the API server does not accept the driver's credentials. Restart the driver's pod, which gives it a new service account token; with --kubeconfig, renew the credentials in that file",
        );
    }),
    ("the driver does not trust the API server", |world| {
        refused(
            world,
            "the API server did not answer: client error (Connect): invalid peer certificate: UnknownIssuer",
        );
    }),
];
