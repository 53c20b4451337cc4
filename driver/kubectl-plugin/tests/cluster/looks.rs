//! The situations of a pod that runs and whose refreshes have stopped, as kubelet fails before it asks the driver; and
//! those in which something else was taken for the reason.

use serde_json::{Value, json};

use crate::{
    situations::Change,
    waits::{aged, failed, of_container, unseen, waits},
    world::{World, ago},
};

const NO_LOGIN: &str = "MountVolume.SetUp failed for volume \"secrets\" : fetching NodePublishSecretRef shop/login failed: kubernetes.io/csi: failed to find the secret login in the namespace shop with error: secrets \"login\" not found";
const UNREGISTERED: &str = "MountVolume.SetUp failed for volume \"secrets\" : kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name secrets-store.csi.k8s.io not found in the list of registered CSI drivers";
const NO_CONFIG: &str =
    "MountVolume.SetUp failed for volume \"config\" : configmap \"web-config\" not found";
const STOPPED: &str = "Exec lifecycle hook ([sh -c until nc -z db 5432; do sleep 1; done]) for Container \"main\" failed - error: rpc error: code = Unknown desc = failed to exec in container: failed to create exec \"4f65\": cannot exec in a stopped state: unknown, message: \"\"";
const KILLED: &str = "Exec lifecycle hook ([sh -c until nc -z db 5432; do sleep 1; done]) for Container \"main\" failed - error: command 'sh -c until nc -z db 5432; do sleep 1; done' exited with 137: ";

/// Lets the volume need a Secret for the provider that is not there any more, as kubelet says it.
fn without_login(world: &mut World) {
    world.pod["spec"]["volumes"][0]["csi"]["nodePublishSecretRef"] = json!({"name": "login"});
    world.status["volumes"][0]["lastSuccess"] = ago(800);
    world.event("FailedMount", NO_LOGIN);
    aged(world, 40, 11);
}

/// Returns an end of a container.
fn end(code: i32) -> Value {
    let reason = if code == 0 { "Completed" } else { "Error" };
    json!({"terminated": {"exitCode": code, "reason": reason, "startedAt": ago(22), "finishedAt": ago(20)}})
}

/// Lets the hook of the container fail with these words, and its program end with this code.
fn hook(world: &mut World, said: &str, code: i32) {
    waits(world, "PostStartHookError", said);
    world.pod["status"]["phase"] = json!("Running");
    let status = &mut world.pod["status"]["containerStatuses"][0];
    (status["restartCount"], status["lastState"]) = (json!(3), end(code));
}

/// Lets the container mount a file by a subPath that the volume does not have, and end for it.
fn sub_path(world: &mut World) {
    waits(world, "CrashLoopBackOff", "back-off 40s");
    world.pod["status"]["phase"] = json!("Running");
    world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("fooo");
    let status = &mut world.pod["status"]["containerStatuses"][0];
    (status["restartCount"], status["lastState"]) = (json!(4), end(1));
}

/// Lets the class make a Secret, and the container take one of another name.
fn secret_names(world: &mut World, made: &str, taken: &str) {
    world.class["spec"]["secretObjects"][0]["secretName"] = json!(made);
    world.pod["spec"]["containers"][0]["env"] =
        json!([{"name": "PW", "valueFrom": {"secretKeyRef": {"name": taken, "key": "pw"}}}]);
    let said = format!("secret \"{taken}\" not found");
    waits(world, "CreateContainerConfigError", &said);
}

/// Lets the container run, and take a key of a Secret for its environment, with `optional: true`.
fn optional(world: &mut World, secret: &str, key: &str) {
    world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
        {"secretKeyRef": {"name": secret, "key": key, "optional": true}}}]);
}

/// Lets the Secret of the container's environment be made again, with content since so many seconds.
fn made_again(world: &mut World, since: i64) {
    world.pod["spec"]["containers"][0]["env"] =
        json!([{"name": "PW", "valueFrom": {"secretKeyRef": {"name": "creds", "key": "pw"}}}]);
    world.secret["metadata"]["creationTimestamp"] = ago(60);
    world.secret["metadata"]["annotations"] =
        json!({"secrets-store.csi.k8s.io/content-since": ago(since)});
}

/// The situations, each as a change of a pod whose volume is in order.
pub(crate) const LOOKS: &[(&str, Change)] = &[
    (
        "the Secret of nodePublishSecretRef was deleted while the pod runs",
        without_login,
    ),
    (
        "the Secret of nodePublishSecretRef was deleted, and the driver may not be looked at",
        |world| {
            without_login(world);
            unseen(world);
        },
    ),
    (
        "the Secret of nodePublishSecretRef was deleted, and Secrets may not be read",
        |world| {
            without_login(world);
            unseen(world);
            world.forbidden.push("/secrets/");
        },
    ),
    (
        "the Secret of nodePublishSecretRef was deleted, and kubelet does not ask again",
        |world| {
            without_login(world);
            world.others.clear();
            world.csi_driver["spec"]["requiresRepublish"] = json!(false);
            world.status["refreshes"] = json!(false);
        },
    ),
    (
        "the Secret of nodePublishSecretRef was deleted, and is there again",
        |world| {
            without_login(world);
            let login = json!({"metadata": {"name": "login"}, "type": "Opaque"});
            let path = "/api/v1/namespaces/shop/secrets/login".to_owned();
            world.others.push((path, login));
        },
    ),
    (
        "the Secret of nodePublishSecretRef was away, and the volume was refreshed since",
        |world| {
            without_login(world);
            let login = json!({"metadata": {"name": "login"}, "type": "Opaque"});
            let path = "/api/v1/namespaces/shop/secrets/login".to_owned();
            world.others.push((path, login));
            world.status["volumes"][0]["lastSuccess"] = ago(20);
        },
    ),
    (
        "somebody has made an event of a time that no clock shows, and kubelet's event is there, too",
        |world| {
            world.event("FailedMount", "of somebody else");
            if let Some((_, event)) = world.others.last_mut() {
                event["lastTimestamp"] = json!("9999-12-31T23:59:59Z");
            }
            without_login(world);
        },
    ),
    (
        "a refresh is three minutes overdue, and no event says why",
        |world| world.status["volumes"][0]["lastSuccess"] = ago(600 + 60 + 190),
    ),
    (
        "a refresh is due, and kubelet's next look is yet to come",
        |world| world.status["volumes"][0]["lastSuccess"] = ago(600 + 60 + 90),
    ),
    (
        "kubelet does not know the driver while the pod runs, and nobody may look at it",
        |world| {
            unseen(world);
            world.forbidden.extend(["/nodes", "/csinodes"]);
            world.event("FailedMount", UNREGISTERED);
        },
    ),
    (
        "kubelet did not know the driver while it was replaced, and knows it now",
        |world| world.event("FailedMount", UNREGISTERED),
    ),
    ("a ConfigMap was deleted while the pod runs", |world| {
        world.with_config_map();
        world.event("FailedMount", NO_CONFIG);
    }),
    (
        "a ConfigMap was missing while the pod runs, some time ago",
        |world| {
            world.with_config_map();
            world.event("FailedMount", NO_CONFIG);
            aged(world, 200, 5);
        },
    ),
    (
        "a ConfigMap was deleted, and the container is started again and again",
        |world| {
            world.with_config_map();
            world.event("FailedMount", NO_CONFIG);
            sub_path(world);
            world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("");
            world.pod["status"]["conditions"] = json!([{"type": "PodReadyToStartContainers",
                "status": "True", "lastTransitionTime": ago(3_000)}]);
        },
    ),
    ("the program ends before its hook is run", |world| {
        hook(world, STOPPED, 1);
    }),
    ("the program ends while its hook runs", |world| {
        hook(world, KILLED, 1);
    }),
    (
        "the program ends without an error before its hook is run",
        |world| hook(world, STOPPED, 0),
    ),
    (
        "the hook fails, and kubelet ends the container for it",
        |world| {
            hook(world, &KILLED.replace("137", "7"), 137);
        },
    ),
    (
        "the hook and the program fail, and nothing says which was first",
        |world| hook(world, &KILLED.replace("137", "7"), 3),
    ),
    ("the hook was killed, and so was the container", |world| {
        hook(world, KILLED, 137);
    }),
    (
        "the program ends again and again, and the events say only that the hook failed",
        |world| {
            hook(world, "", 1);
            world.pod["status"]["containerStatuses"][0]["state"] =
                json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}});
            world.event("FailedPostStartHook", "PostStartHook failed");
            of_container(world, "spec.containers{main}");
        },
    ),
    (
        "a container ends for a subPath that names no file",
        sub_path,
    ),
    (
        "a container ends for a subPath that names no file, and the driver may not be looked at",
        |world| {
            sub_path(world);
            unseen(world);
        },
    ),
    (
        "a subPath names an object of the pod status, and the driver may not be looked at",
        |world| {
            sub_path(world);
            unseen(world);
            world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("password");
        },
    ),
    (
        "a deleted pod has ended, a probe failed later, and nobody may look at the driver",
        |world| {
            failed(world, end(137));
            world.pod_status = World::in_order().pod_status;
            unseen(world);
            world.forbidden.extend(["/nodes", "/csinodes"]);
            world.pod["metadata"]["deletionTimestamp"] = ago(80);
            world.pod["status"]["containerStatuses"][0]["state"]["terminated"]["startedAt"] =
                ago(3_000);
            world.event("FailedMount", UNREGISTERED);
            aged(world, 30, 9);
            world.event("Unhealthy", "Liveness probe failed: timeout");
            of_container(world, "spec.containers{main}");
            world.event("Killing", "Stopping container main");
            of_container(world, "spec.containers{main}");
        },
    ),
    (
        "a finalizer keeps a deleted pod that has ended, and nobody may look at the driver",
        |world| {
            failed(world, end(137));
            world.pod_status = World::in_order().pod_status;
            unseen(world);
            world.pod["metadata"]["deletionTimestamp"] = ago(80);
            world.pod["metadata"]["finalizers"] = json!(["shop.example.com/drain"]);
        },
    ),
    ("the class makes a Secret of an impossible name", |world| {
        secret_names(world, "Foo_Secret", "foo-secret");
    }),
    (
        "the class makes a Secret of an impossible name, which is taken",
        |world| secret_names(world, "Foo_Secret", "Foo_Secret"),
    ),
    (
        "a Secret was deleted and made again with the same content",
        |world| made_again(world, 9_000),
    ),
    (
        "a Secret was made again with content that is newer than the container",
        |world| made_again(world, 60),
    ),
    (
        "a variable takes a Secret with the name of the class",
        |world| {
            secret_names(world, "creds", "db");
        },
    ),
    (
        "the key that a variable takes was corrected in the class",
        |world| {
            secret_names(world, "creds", "creds");
            let said = "couldn't find key pw in Secret shop/creds";
            waits(world, "CreateContainerConfigError", said);
        },
    ),
    ("a container ends without its optional key", |world| {
        sub_path(world);
        world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("");
        world.pod["spec"]["containers"][0]["env"] = json!([{"name": "PW", "valueFrom":
            {"secretKeyRef": {"name": "creds", "key": "password", "optional": true}}}]);
    }),
    ("a container runs without its optional key", |world| {
        optional(world, "creds", "password");
    }),
    (
        "a container runs without an optional Secret of a similar name",
        |world| {
            optional(world, "cerds", "pw");
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "cerds", "optional": true}}]);
        },
    ),
    (
        "a container runs without an optional Secret of another name",
        |world| {
            optional(world, "sentry", "dsn");
        },
    ),
    ("a container runs with its optional key", |world| {
        optional(world, "creds", "pw");
    }),
    ("a container waits that takes an optional key", |world| {
        optional(world, "creds", "password");
        waits(world, "ContainerCreating", "");
    }),
    ("the program of a Job has just done its work", |world| {
        world.pod["spec"]["restartPolicy"] = json!("Never");
        world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        let status = &mut world.pod["status"]["containerStatuses"][0];
        (status["ready"], status["state"]) = (json!(false), end(0));
    }),
    (
        "one container ends with an error, and another one is not ready yet",
        |world| {
            sub_path(world);
            world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("");
            let containers = world.pod["spec"]["containers"].as_array_mut().unwrap();
            containers.push(json!({"name": "slow", "image": "shop",
                "readinessProbe": {"exec": {"command": ["true"]}}}));
            let statuses = &mut world.pod["status"]["containerStatuses"];
            statuses.as_array_mut().unwrap().push(
                json!({"name": "slow", "image": "shop", "imageID": "", "ready": false,
                "restartCount": 0, "state": {"running": {"startedAt": ago(9)}}}),
            );
        },
    ),
];
