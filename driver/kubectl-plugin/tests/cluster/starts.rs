//! The situations of a pod whose start is held up behind its volumes: which container it is, what blocks it now, and
//! what comes later.

use serde_json::{Value, json};

use crate::{
    situations::Change,
    waits::{aged, failed, init, of_container, waits},
    world::{World, ago},
};

const CREATING: &str = "ContainerCreating";
const RUNC: &str = "failed to create containerd task: failed to create shim task: OCI runtime create failed: runc create failed: unable to start container process: ";

/// Returns a variable of a key of the Secret that the class makes.
fn taken(secret: &str, key: &str) -> Value {
    json!([{"name": "PW", "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}])
}

/// Lets the init container be a sidecar.
fn sidecar(world: &mut World, state: Value) {
    init(world, 0, state);
    world.pod["spec"]["initContainers"][0]["restartPolicy"] = json!("Always");
}

/// Lets the pod have no sandbox, as kubelet says it.
fn without_sandbox(world: &mut World, said: &str) {
    waits(world, CREATING, "");
    world.event("FailedCreatePodSandBox", said);
}

/// Lets the hook of the container run since some seconds.
fn hook(world: &mut World, seconds: i64) {
    waits(world, CREATING, "");
    world.pod["spec"]["containers"][0]["lifecycle"] =
        json!({"postStart": {"exec": {"command": ["sleep", "3600"]}}});
    world.event("Started", "Started container main");
    aged(world, seconds, 1);
    of_container(world, "spec.containers{main}");
    world.others.last_mut().unwrap().1["type"] = json!("Normal");
}

/// Lets the runtime not start the container, which has a mount at this path.
fn not_started(world: &mut World, path: &str, said: &str) {
    world.pod["spec"]["containers"][0]["volumeMounts"][0]["mountPath"] = json!(path);
    waits(world, "RunContainerError", &format!("{RUNC}{said}"));
}

/// Returns an end of a container.
fn end(code: i32, reason: &str) -> Value {
    json!({"terminated": {"exitCode": code, "reason": reason, "startedAt": ago(40), "finishedAt": ago(30)}})
}

/// The situations, each as a change of a pod whose volume is in order.
pub(crate) const STARTS: &[(&str, Change)] = &[
    (
        "a sidecar takes a wrong key, and the container the right one",
        |world| {
            sidecar(
                world,
                json!({"waiting": {"reason": "CreateContainerConfigError",
            "message": "couldn't find key user in Secret shop/creds"}}),
            );
            world.pod["spec"]["initContainers"][0]["env"] = taken("creds", "user");
            world.pod["spec"]["containers"][0]["env"] = taken("creds", "pw");
        },
    ),
    (
        "an init container takes a wrong key, and the container another wrong one",
        |world| {
            init(
                world,
                0,
                json!({"waiting": {"reason": "CreateContainerConfigError",
            "message": "couldn't find key passwort in Secret shop/creds"}}),
            );
            world.pod["spec"]["initContainers"][0]["env"] = taken("creds", "passwort");
            world.pod["spec"]["containers"][0]["env"] = taken("creds", "user");
        },
    ),
    (
        "a container takes a key of basic-auth that the class does not write",
        |world| {
            world.class["spec"]["secretObjects"][0]["type"] = json!("kubernetes.io/basic-auth");
            world.class["spec"]["secretObjects"][0]["data"][0]["key"] = json!("password");
            world.pod["spec"]["containers"][0]["env"] = taken("creds", "username");
            waits(
                world,
                "CreateContainerConfigError",
                "couldn't find key username in Secret shop/creds",
            );
        },
    ),
    (
        "the node has no runtime for the class of the pod",
        |world| {
            without_sandbox(
                world,
                "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to get sandbox runtime: no runtime for \"gvisor\" is configured",
            );
            world.pod["spec"]["runtimeClassName"] = json!("gvisor");
        },
    ),
    ("the node has no user namespaces", |world| {
        without_sandbox(
            world,
            "Failed to create pod sandbox: the handler \"runc\" does not support user namespaces",
        );
        world.pod["spec"]["hostUsers"] = json!(false);
    }),
    (
        "the sandbox cannot be made, and nothing says whose matter it is",
        |world| {
            without_sandbox(
                world,
                "Failed to create pod sandbox: no space left on device",
            );
        },
    ),
    (
        "the network of the node is not ready, and the pod has a runtime class",
        |world| {
            without_sandbox(
                world,
                "Failed to create pod sandbox: rpc error: code = Unknown desc = failed to setup network for sandbox \"9a\": plugin type=\"calico\" failed (add): timed out",
            );
            world.pod["spec"]["runtimeClassName"] = json!("gvisor");
        },
    ),
    ("the sandbox could not be made some time ago", |world| {
        without_sandbox(
            world,
            "Failed to create pod sandbox: no space left on device",
        );
        aged(world, 1_200, 7);
    }),
    (
        "nothing says why the volume is not mounted, and a tool watches the cluster",
        |world| {
            world.not_started();
            world.event("PolicyViolation", "policy require-labels fails");
            world.others.last_mut().unwrap().1["source"] = json!({"component": "kyverno"});
        },
    ),
    (
        "the hook of a container runs, and rotation is off",
        |world| {
            hook(world, 600);
            world.status["refreshes"] = json!(false);
        },
    ),
    (
        "the hook of a container runs, and a refresh is due for long",
        |world| {
            hook(world, 3_000);
            world.status["volumes"][0]["lastSuccess"] = ago(3_100);
        },
    ),
    (
        "the hook of a container may run, and events cannot be read",
        |world| {
            hook(world, 600);
            world.forbidden = vec!["/events"];
        },
    ),
    ("the hook of a container has failed", |world| {
        hook(world, 60);
        world.event("FailedPostStartHook", "PostStartHook failed");
        aged(world, 50, 1);
        of_container(world, "spec.containers{main}");
    }),
    (
        "the sandbox could not be made at first, and the hook of a container runs",
        |world| {
            without_sandbox(world, "Failed to create pod sandbox: no runtime");
            aged(world, 500, 2);
            hook(world, 400);
        },
    ),
    (
        "the volume lies over the directory of the program",
        |world| {
            not_started(
                world,
                "/bin/",
                "exec: \"sleep\": executable file not found in $PATH: unknown",
            );
        },
    ),
    (
        "the volume lies over the directory of an absolute program",
        |world| {
            not_started(
                world,
                "/data",
                "exec: \"/data/server\": stat /data/server: no such file or directory: unknown",
            );
        },
    ),
    (
        "an absolute program is not there, and the volume is elsewhere",
        |world| {
            not_started(
                world,
                "/database",
                "exec: \"/data/server\": stat /data/server: no such file or directory: unknown",
            );
        },
    ),
    ("the volume lies over everything", |world| {
        not_started(
            world,
            "/",
            "error during container init: error mounting \"/var/lib/kubelet/pods/x/etc-hosts\" to rootfs at \"/etc/hosts\": mkdir /run/rootfs/etc: read-only file system: unknown",
        );
    }),
    ("the volume is mounted on a file", |world| {
        not_started(
            world,
            "/etc/passwd",
            "error during container init: error mounting \"/var/lib/kubelet/pods/x/mount\" to rootfs at \"/etc/passwd\": mount x:/etc/passwd (via /proc/self/fd/6), flags: 0x5001: not a directory: unknown",
        );
    }),
    ("another volume is mounted below the volume", |world| {
        let mounts = world.pod["spec"]["containers"][0]["volumeMounts"]
            .as_array_mut()
            .unwrap();
        mounts.push(json!({"name": "cache", "mountPath": "/mnt/s/cache"}));
        not_started(
            world,
            "/mnt/s",
            "error during container init: error mounting \"/var/lib/kubelet/pods/x/cache\" to rootfs at \"/mnt/s/cache\": mkdir /run/rootfs/mnt/s/cache: read-only file system: unknown",
        );
    }),
    ("the startup probe of a sidecar fails", |world| {
        sidecar(world, json!({"running": {"startedAt": ago(300)}}));
        world.pod["spec"]["initContainers"][0]["startupProbe"] =
            json!({"exec": {"command": ["false"]}});
        world.pod["status"]["initContainerStatuses"][0]["started"] = json!(false);
        world.event("Unhealthy", "Startup probe failed: ");
        of_container(world, "spec.initContainers{migrate}");
    }),
    ("the readiness probe of a sidecar fails", |world| {
        sidecar(world, json!({"running": {"startedAt": ago(300)}}));
        world.pod["spec"]["initContainers"][0]["readinessProbe"] =
            json!({"exec": {"command": ["cat", "/mnt/nope"]}});
        world.pod["status"]["initContainerStatuses"][0]["started"] = json!(true);
        let status = &mut world.pod["status"]["containerStatuses"][0];
        (status["ready"], status["state"]) =
            (json!(true), json!({"running": {"startedAt": ago(290)}}));
        world.event(
            "Unhealthy",
            "Readiness probe failed: cat: can't open '/mnt/nope'",
        );
        of_container(world, "spec.initContainers{migrate}");
    }),
    (
        "the images are pulled with a Secret of a similar name",
        |world| {
            world.pod["spec"]["imagePullSecrets"] = json!([{"name": "cred-s"}]);
            waits(
                world,
                "ImagePullBackOff",
                "Back-off pulling image \"shop\": ErrImagePull: 401 unauthorized",
            );
            world.event("FailedToRetrieveImagePullSecret", "Unable to retrieve some image pull secrets (cred-s); attempting to pull the image may not succeed.");
        },
    ),
    (
        "the images are pulled with a missing Secret, and are there",
        |world| {
            world.pod["spec"]["imagePullSecrets"] = json!([{"name": "cred-s"}]);
        },
    ),
    (
        "the images are pulled with a Secret, and Secrets may not be read",
        |world| {
            world.pod["spec"]["imagePullSecrets"] = json!([{"name": "cred-s"}]);
            world.forbidden = vec!["/secrets/"];
            waits(
                world,
                "ImagePullBackOff",
                "Back-off pulling image \"shop\": ErrImagePull: 401 unauthorized",
            );
            world.event("FailedToRetrieveImagePullSecret", "Unable to retrieve some image pull secrets (cred-s); attempting to pull the image may not succeed.");
        },
    ),
    (
        "the image of an init container is not there, and the container takes a wrong key",
        |world| {
            init(
                world,
                0,
                json!({"waiting": {"reason": "ImagePullBackOff", "message": "Back-off pulling image \"migrate\": not found"}}),
            );
            world.pod["spec"]["containers"][0]["env"] = taken("creds", "pass");
        },
    ),
    (
        "an init container ends again and again, and the container takes a Secret of a similar name",
        |world| {
            init(
                world,
                4,
                json!({"waiting": {"reason": "CrashLoopBackOff", "message": "back-off 40s"}}),
            );
            world.pod["status"]["initContainerStatuses"][0]["lastState"] = end(7, "Error");
            world.pod["spec"]["containers"][0]["env"] = taken("cred", "pw");
        },
    ),
    (
        "the sandbox cannot be made, and the container takes a Secret of a similar name",
        |world| {
            without_sandbox(
                world,
                "Failed to create pod sandbox: no runtime for \"gvisor\" is configured",
            );
            world.pod["spec"]["runtimeClassName"] = json!("gvisor");
            world.pod["spec"]["containers"][0]["env"] = taken("cred", "pw");
        },
    ),
    (
        "the driver's pod is away, and the container takes a wrong key of a Secret that is there",
        |world| {
            world.driver = json!(null);
            world.pod["spec"]["containers"][0]["env"] = taken("creds", "user");
            waits(
                world,
                "CreateContainerConfigError",
                "couldn't find key user in Secret shop/creds",
            );
        },
    ),
    ("an init container works for long", |world| {
        init(world, 0, json!({"running": {"startedAt": ago(780)}}));
    }),
    (
        "an init container works for long, and the container takes a wrong key",
        |world| {
            init(world, 0, json!({"running": {"startedAt": ago(780)}}));
            world.pod["spec"]["containers"][0]["env"] = taken("creds", "user");
        },
    ),
    ("a deleted pod may end yet", |world| {
        world.pod["metadata"]["deletionTimestamp"] = ago(-20);
        world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        world.pod["status"]["containerStatuses"][0]["ready"] = json!(false);
    }),
    (
        "a deleted pod should have ended some seconds ago",
        |world| {
            world.pod["metadata"]["deletionTimestamp"] = ago(5);
            world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
            world.pod["status"]["containerStatuses"][0]["ready"] = json!(false);
        },
    ),
    ("a pod was evicted while it ran", |world| {
        failed(world, end(137, "Error"));
        world.pod["status"]["reason"] = json!("Evicted");
        world.pod["status"]["message"] =
            json!("Usage of EmptyDir volume \"e\" exceeds the limit \"5Mi\".");
    }),
    ("the claim of a pod cannot be made", |world| {
        world.pod["spec"]
            .as_object_mut()
            .unwrap()
            .remove("nodeName");
        world.pod["status"] = json!({"phase": "Pending"});
        world.pod_status = json!(null);
        world.status["volumes"] = json!([]);
        world.event(
            "FailedResourceClaimCreation",
            "PodResourceClaim gpu: resource claim template \"gpu-tmpl\" not found",
        );
    }),
    ("no scheduler has the name that the pod names", |world| {
        let spec = world.pod["spec"].as_object_mut().unwrap();
        spec.remove("nodeName");
        spec.insert("schedulerName".to_owned(), json!("my-sched"));
        world.pod["status"] = json!({"phase": "Pending"});
        world.pod_status = json!(null);
        world.status["volumes"] = json!([]);
    }),
    ("the node has ended the container for its memory", |world| {
        waits(world, "CrashLoopBackOff", "back-off 40s");
        let status = &mut world.pod["status"]["containerStatuses"][0];
        (status["restartCount"], status["lastState"]) = (json!(4), end(137, "OOMKilled"));
        world.pod["spec"]["containers"][0]["resources"] = json!({"limits": {"memory": "16Mi"}});
    }),
    (
        "no container mounts a volume whose class is not there",
        |world| {
            world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
            world.class = json!(null);
            world.not_started();
        },
    ),
];
