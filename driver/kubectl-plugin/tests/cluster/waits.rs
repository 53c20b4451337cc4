//! The situations of a pod that waits: for a provider that is away or has come back, for what events of the past
//! say, for something that is no volume. And what someone is told who may not look at the driver.

use serde_json::{Value, json};

use crate::{
    situations::{Change, refused},
    world::{World, ago},
};

const NO_SOCKET: &str = "failed to mount secrets store objects for pod shop/web: provider not found: provider \"vault\" has no socket vault.sock in /p; the sockets there are: none. Is the provider running on this node, and is spec.provider of the SecretProviderClass right?";
const NO_ANSWER: &str = "failed to mount secrets store objects for pod shop/web: provider \"vault\" at /p/vault.sock does not answer after 3 attempts (Connection refused (os error 111)); is the provider running on this node?";
const CACHE: &str = "MountVolume.SetUp failed for volume \"config\" : failed to sync configmap cache: timed out waiting for the condition";
const INTERVAL: &str = "secrets-store.csi.k8s.io/rotation-poll-interval";

/// Gives the last event an age and a number.
pub(crate) fn aged(world: &mut World, seconds: i64, count: i32) {
    let event = &mut world.others.last_mut().unwrap().1;
    event["lastTimestamp"] = ago(seconds);
    event["count"] = json!(count);
}

/// Lets the last event be about a container.
pub(crate) fn of_container(world: &mut World, field: &str) {
    world.others.last_mut().unwrap().1["involvedObject"]["fieldPath"] = json!(field);
}

/// Lets the pod, whose volume of the driver is mounted, wait for one of a ConfigMap.
fn waits_for_config(world: &mut World) {
    let (pod_status, status) = (world.pod_status.clone(), world.status.clone());
    world.with_config_map();
    world.not_started();
    (world.pod_status, world.status) = (pod_status, status);
}

/// Lets the container wait.
pub(crate) fn waits(world: &mut World, reason: &str, message: &str) {
    world.pod["status"]["phase"] = json!("Pending");
    world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    let status = &mut world.pod["status"]["containerStatuses"][0];
    status["ready"] = json!(false);
    status["state"] = json!({"waiting": {"reason": reason, "message": message}});
}

/// Gives the pod an init container in a state.
pub(crate) fn init(world: &mut World, restarts: i32, state: Value) {
    world.pod["spec"]["initContainers"] = json!([{"name": "migrate", "image": "migrate",
        "volumeMounts": [{"name": "secrets", "mountPath": "/mnt", "readOnly": true}]}]);
    waits(world, "PodInitializing", "");
    world.pod["status"]["initContainerStatuses"] = json!([{"name": "migrate", "image": "migrate", "imageID": "",
        "ready": false, "restartCount": restarts, "state": state}]);
}

/// Lets the pod have failed.
pub(crate) fn failed(world: &mut World, state: Value) {
    world.pod["status"]["phase"] = json!("Failed");
    world.pod["status"]["conditions"] = json!([]);
    let status = &mut world.pod["status"]["containerStatuses"][0];
    (status["ready"], status["state"]) = (json!(false), state);
    world.status["volumes"] = json!([]);
    world.pod_status = json!(null);
}

/// Lets the refreshes fail, with an event that says why.
fn stale(world: &mut World, class: &str, why: &str) {
    world.status["volumes"][0]["staleSince"] = ago(300);
    let said = format!(
        "the volume of SecretProviderClass {class} could not be refreshed and keeps the content of its last refresh or mount, 2026-11-26T22:00:00Z: {why}"
    );
    world.event("MountRotationFailed", &said);
}

/// Lets the person who asks see nothing of the driver's namespace.
pub(crate) fn unseen(world: &mut World) {
    world.forbidden = vec!["/daemonsets", "/kube-system/"];
}

/// Gives the class objects, which the driver refuses because of a path.
fn clash(world: &mut World, objects: &str, path: &str, why: &str) {
    refused(
        world,
        &format!("failed to write the files of pod shop/web: file {path:?} is refused: {why}"),
    );
    world.class["spec"]["parameters"] = json!({"objects": objects});
}

/// The situations, each as a change of a pod whose volume is in order.
pub(crate) const WAITS: &[(&str, Change)] = &[
    (
        "the provider's socket is away, and kubelet says so",
        |world| {
            refused(world, NO_SOCKET);
            world.status["providers"] = json!([]);
        },
    ),
    (
        "the provider does not answer, and kubelet says what it said before",
        |world| {
            refused(
                world,
                "failed to mount secrets store objects for pod shop/web: provider \"vault\" at /p/vault.sock answered PERMISSION_DENIED: no role",
            );
            world.status["providers"][0]["answers"] = json!(false);
        },
    ),
    ("the provider had no socket, and is there now", |world| {
        refused(world, NO_SOCKET);
    }),
    ("the provider did not answer, and does now", |world| {
        refused(world, NO_ANSWER);
    }),
    ("the class names another provider now", |world| {
        refused(world, &NO_SOCKET.replace("vault", "valut"));
    }),
    (
        "refreshes failed without the provider, which is there now",
        |world| stale(world, "db", NO_ANSWER),
    ),
    (
        "refreshes failed without the provider, which is still away",
        |world| {
            stale(world, "db", NO_ANSWER);
            world.status["providers"][0]["answers"] = json!(false);
        },
    ),
    (
        "refreshes fail, and the event is of a class with a longer name",
        |world| stale(world, "db-2", "no role"),
    ),
    (
        "refreshes fail, and the event is of an earlier time",
        |world| {
            stale(world, "db", "no role");
            aged(world, 400, 1);
        },
    ),
    (
        "a ConfigMap was not in kubelet's cache, and the driver's volume is refused",
        |world| {
            world.with_config_map();
            refused(world, "no role");
            world.event("FailedMount", CACHE);
            aged(world, 100, 1);
        },
    ),
    (
        "a Secret of another volume was not registered, and the driver's volume is refused",
        |world| {
            world.with_config_map();
            refused(world, "no role");
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"config\" : object \"shop\"/\"web-config\" not registered");
            aged(world, 200, 5);
        },
    ),
    ("a ConfigMap is not in kubelet's cache", |world| {
        waits_for_config(world);
        world.event("FailedMount", CACHE);
        aged(world, 5, 7);
    }),
    ("a ConfigMap is not in kubelet's cache for long", |world| {
        waits_for_config(world);
        world.event("FailedMount", CACHE);
        aged(world, 280, 20);
    }),
    (
        "a ConfigMap was missing, and kubelet waits for the driver's volume alone",
        |world| {
            world.with_config_map();
            refused(world, "no role");
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"config\" : configmap \"web-config\" not found");
            aged(world, 300, 6);
            world.event("FailedMount", "Unable to attach or mount volumes: unmounted volumes=[secrets], unattached volumes=[], failed to process volumes=[]: context deadline exceeded");
        },
    ),
    (
        "a ConfigMap was missing, and the pod has its sandbox now",
        |world| {
            waits_for_config(world);
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"config\" : configmap \"web-config\" not found");
            aged(world, 60, 6);
            world.pod["status"]["conditions"] = json!([{"type": "PodReadyToStartContainers",
                "status": "True", "lastTransitionTime": ago(30)}]);
        },
    ),
    (
        "a volume could not be mounted at first, and kubelet pulls the image now",
        |world| {
            world.forbidden = vec!["/daemonsets", "/secretproviderclasspodstatuses"];
            refused(world, "no role");
            aged(world, 60, 6);
            waits(world, "ImagePullBackOff", "Back-off pulling image \"shop\"");
            world.event("Pulling", "Pulling image \"shop\"");
        },
    ),
    ("the image is not there", |world| {
        waits(
            world,
            "ImagePullBackOff",
            "Back-off pulling image \"shop\": ErrImagePull: rpc error: code = NotFound desc = failed to pull and unpack image \"docker.io/library/shop:v9\": not found",
        );
    }),
    ("the registry refuses the image", |world| {
        waits(world, "ImagePullBackOff", "Back-off pulling image \"shop\"");
        world.event("Failed", "Failed to pull image \"other\": not found");
        of_container(world, "spec.containers{other}");
        world.event("Failed", "Failed to pull image \"shop\": pull access denied, repository does not exist or may require authorization");
        of_container(world, "spec.containers{main}");
    }),
    ("the name of the image cannot be one", |world| {
        waits(
            world,
            "InvalidImageName",
            "Failed to apply default image tag \"Shop:\": couldn't parse image name",
        );
    }),
    ("the image of an init container is not there", |world| {
        init(
            world,
            0,
            json!({"waiting": {"reason": "ErrImagePull", "message": "dial tcp: i/o timeout"}}),
        );
    }),
    ("the image is pulled for the first time", |world| {
        waits(world, "ContainerCreating", "");
        world.event("Pulling", "Pulling image \"shop\"");
        of_container(world, "spec.containers{main}");
    }),
    ("the image runs as root, and may not", |world| {
        waits(
            world,
            "CreateContainerConfigError",
            "container has runAsNonRoot and image will run as root (pod: \"web_shop(f0a0)\", container: main)",
        );
    }),
    ("the image has the name of a user", |world| {
        waits(
            world,
            "CreateContainerConfigError",
            "container has runAsNonRoot and image has non-numeric user (app), cannot verify user is non-root (pod: \"web_shop(f0a0)\", container: main)",
        );
    }),
    ("a variable takes a key of a Secret of others", |world| {
        waits(
            world,
            "CreateContainerConfigError",
            "couldn't find key token in Secret shop/other",
        );
    }),
    (
        "a variable takes a key that the class does not write",
        |world| {
            world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom": {"secretKeyRef": {"name": "creds", "key": "password"}}}]);
            waits(
                world,
                "CreateContainerConfigError",
                "couldn't find key password in Secret shop/creds",
            );
        },
    ),
    ("a variable takes a ConfigMap that is missing", |world| {
        waits(
            world,
            "CreateContainerConfigError",
            "configmap \"web-env\" not found",
        );
    }),
    (
        "a variable takes a ConfigMap of the name of a Secret of the class",
        |world| {
            waits(
                world,
                "CreateContainerConfigError",
                "configmap \"creds\" not found",
            );
        },
    ),
    ("a subPath of the volume cannot be used", |world| {
        waits(
            world,
            "CreateContainerConfigError",
            "failed to prepare subPath for volumeMount \"secrets\" of container \"main\"",
        );
    }),
    ("the program of a container is not there", |world| {
        waits(
            world,
            "RunContainerError",
            "failed to create containerd task: exec: \"serve\": executable file not found in $PATH",
        );
    }),
    ("an init container has failed for the first time", |world| {
        init(
            world,
            0,
            json!({"terminated": {"exitCode": 1, "reason": "Error", "startedAt": ago(9), "finishedAt": ago(5)}}),
        );
    }),
    ("an init container ends again and again", |world| {
        init(
            world,
            4,
            json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s restarting failed container"}}),
        );
        world.pod["status"]["initContainerStatuses"][0]["lastState"] = json!({"terminated": {"exitCode": 2, "reason": "Error", "startedAt": ago(40), "finishedAt": ago(30)}});
    }),
    ("an init container works", |world| {
        init(world, 0, json!({"running": {"startedAt": ago(9)}}));
    }),
    ("the pod of a Job has failed", |world| {
        failed(
            world,
            json!({"terminated": {"exitCode": 3, "reason": "Error", "startedAt": ago(90), "finishedAt": ago(60)}}),
        );
    }),
    ("a pod was evicted", |world| {
        failed(world, json!({"waiting": {"reason": "ContainerCreating"}}));
        world.pod["status"]["reason"] = json!("Evicted");
        world.pod["status"]["message"] = json!("The node was low on resource: memory.");
    }),
    (
        "the pod of a Job had no volume until its deadline",
        |world| {
            failed(world, json!({"waiting": {"reason": "ContainerCreating"}}));
            world.pod["status"]["reason"] = json!("DeadlineExceeded");
            world.event("FailedMount", "MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = Unavailable desc = no role");
        },
    ),
    (
        "the pod of a Job has ended, and its Secret is gone",
        |world| {
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "creds"}}]);
            failed(
                world,
                json!({"terminated": {"exitCode": 0, "reason": "Completed", "startedAt": ago(90), "finishedAt": ago(60)}}),
            );
            world.pod["status"]["phase"] = json!("Succeeded");
            world.secret = json!(null);
        },
    ),
    ("the network of the node is not ready", |world| {
        waits(world, "ContainerCreating", "");
        world.event(
            "FailedCreatePodSandBox",
            "Failed to create pod sandbox: plugin type=\"calico\" failed (add): timed out",
        );
    }),
    ("a pod without volumes of the driver has failed", |world| {
        world.pod["spec"]["volumes"] = json!([]);
        world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
        failed(
            world,
            json!({"terminated": {"exitCode": 3, "reason": "Error", "startedAt": ago(90), "finishedAt": ago(60)}}),
        );
    }),
    ("the pod is gated", |world| {
        world.pod["spec"]
            .as_object_mut()
            .unwrap()
            .remove("nodeName");
        world.pod["status"] = json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "status": "False",
            "reason": "SchedulingGated", "message": "Scheduling is blocked due to non-empty scheduling gates"}]});
        world.pod_status = json!(null);
    }),
    ("the driver may not be looked at", unseen),
    (
        "the driver may not be looked at, and the class has an interval",
        |world| {
            unseen(world);
            world.class["metadata"]["annotations"] = json!({INTERVAL: "5m"});
        },
    ),
    (
        "the driver may not be looked at, and the volume says never",
        |world| {
            unseen(world);
            world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"][INTERVAL] = json!("never");
        },
    ),
    (
        "the driver may not be looked at, and kubelet is not asked to publish again",
        |world| {
            unseen(world);
            world.csi_driver["spec"]["requiresRepublish"] = json!(false);
            world.class["metadata"]["annotations"] = json!({INTERVAL: "5m"});
        },
    ),
    (
        "the driver may not be looked at, and may be the existing one",
        |world| {
            unseen(world);
            world.csi_driver["spec"]["requiresRepublish"] = json!(false);
            world.pod_status["metadata"]["annotations"] = json!({});
        },
    ),
    (
        "the driver may not be looked at, a refresh is asked for, and rotation is off",
        |world| {
            unseen(world);
            world.csi_driver["spec"]["requiresRepublish"] = json!(false);
            world.class["metadata"]["annotations"] =
                json!({"secrets-store.csi.k8s.io/refresh": "now"});
        },
    ),
    (
        "the driver may not be looked at, and refreshes fail",
        |world| {
            unseen(world);
            world.pod_status["metadata"]["annotations"]["secrets-store.csi.k8s.io/stale-since"] =
                ago(300);
            world.pod_status["metadata"]["annotations"]["secrets-store.csi.k8s.io/stale-reason"] =
                json!("no role");
        },
    ),
    (
        "the driver may not be asked, and its arguments say that rotation is on",
        |world| {
            world.forbidden = vec!["/exec?"];
            world.driver["spec"]["containers"][0]["args"] =
                json!(["--endpoint=x", "--enable-secret-rotation=true"]);
        },
    ),
    (
        "the driver may not be asked, and its arguments say that rotation is off",
        |world| {
            world.forbidden = vec!["/exec?"];
            world.driver["spec"]["containers"][0]["args"] = json!(["--endpoint=x"]);
        },
    ),
    ("two aliases are one path", |world| {
        clash(
            world,
            "array:\n  - |\n    objectName: a\n    objectAlias: db\n  - |\n    objectName: b\n    objectAlias: db\n",
            "db",
            "the provider sent two files with this path",
        );
    }),
    (
        "one path is below another, and the driver may not be looked at",
        |world| {
            clash(
                world,
                "- objectName: other\n- objectName: db/password\n- objectName: db\n",
                "db",
                "it is a file, and another file's path needs it to be a directory",
            );
            unseen(world);
        },
    ),
    (
        "one path is below another, and the objects are not in the class",
        |world| {
            clash(
                world,
                "x",
                "db",
                "it is a file, and another file's path needs it to be a directory",
            );
        },
    ),
];
