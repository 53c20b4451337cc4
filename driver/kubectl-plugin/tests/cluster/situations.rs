//! The situations of a pod, each of which has a story.

use serde_json::json;

use crate::world::{World, ago};

pub(crate) type Change = fn(&mut World);

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

/// Gives the pod, which waits for its volumes, one of a Secret. That of the driver is mounted.
fn taken_by_volume(world: &mut World, volume: serde_json::Value) {
    let (pod_status, status) = (world.pod_status.clone(), world.status.clone());
    world.not_started();
    (world.pod_status, world.status) = (pod_status, status);
    let volumes = world.pod["spec"]["volumes"].as_array_mut().unwrap();
    volumes.push(volume);
}

/// Lets kubelet say that the volume cannot be mounted.
pub(crate) fn refused(world: &mut World, said: &str) {
    world.not_started();
    let begin =
        "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = ";
    world.event("FailedMount", &format!("{begin}{said}"));
}

/// The situations, each as a change of a pod whose volume is in order.
pub(crate) const SITUATIONS: &[(&str, Change)] = &[
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
        status["restartCount"] = json!(1);
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
    ("the Secret of nodePublishSecretRef is missing", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] = json!({"name": "login"});
        world.not_started();
    }),
    ("the provider's socket is dead", |world| {
        world.status["providers"][0]["answers"] = json!(false);
        world.status["providers"][0]["error"] = json!("Connection refused (os error 111)");
    }),
    ("kubelet does not say why", |world| world.not_started()),
    ("kubelet does not say why yet", |world| {
        world.not_started();
        world.pod["status"]["startTime"] = ago(60);
    }),
    ("the Secret is missing", |world| {
        world.secret = json!(null);
        world.event("FailedToCreateSecret", "Secret creds of SecretProviderClass db: The driver may write Secrets only when syncSecret.enabled is true");
    }),
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
    ("the class is gone", |world| world.class = json!(null)),
    ("the class says never", |world| {
        world.class["metadata"]["annotations"] =
            json!({"secrets-store.csi.k8s.io/rotation-poll-interval": "never"});
    }),
    ("the node's clock is wrong", |world| {
        world.status["time"] = ago(7_300)
    }),
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
    ("a volume with many files", |world| {
        let volume = &mut world.status["volumes"][0];
        volume["files"] = json!(["a", "b\u{202e}", "c/d"]);
        volume["fileCount"] = json!(20);
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
        "kubelet did not know the driver, and knows it now",
        |world| {
            world.not_started();
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name secrets-store.csi.k8s.io not found in the list of registered CSI drivers");
        },
    ),
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
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = failed to get secretproviderclass shop/db: secretproviderclasses.secrets-store.csi.x-k8s.io \"db\" is forbidden");
    }),
    ("the class is wrong, and may not be read", |world| {
        world.forbidden = vec!["/secretproviderclasses"];
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = InvalidArgument desc = SecretProviderClass shop/db: spec.parameters.objects is no list");
    }),
    ("somebody has unmounted the volume of a bare pod", |world| {
        world.status["volumes"][0]["mounted"] = json!(false);
    }),
    ("the provider's store is away", |world| {
        world.not_started();
        world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = failed to mount secrets store objects for pod shop/web: provider \"vault\" at /p/vault.sock answered UNAVAILABLE after 3 attempts: vault is sealed");
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
    ("the class's name has a control character", |world| {
        world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["secretProviderClass"] =
            json!("db\r\u{1b}[2J");
        world.not_started();
    }),
    ("the class's texts have control characters", |world| {
        world.class["spec"]["provider"] = json!("vault\r");
        world.class["spec"]["secretObjects"][0]["secretName"] = json!("creds\r");
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
];
