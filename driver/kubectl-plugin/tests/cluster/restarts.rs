//! The situations of a pod whose containers are started again and again, or that does not go once it is deleted: what
//! a probe, a hook or a finalizer does to it, and what comes before a driver that is away. Those that are good have
//! nothing wrong.

use serde_json::{Value, json};

use crate::{
    situations::Change,
    waits::{aged, failed, init, of_container, unseen, waits},
    world::{World, ago},
};

const LIVENESS: &str = "Liveness probe failed: HTTP probe failed with statuscode: 500";
const KILLS: &str = "Container main failed liveness probe, will be restarted";
const NO_PROGRAM: &str =
    "failed to create containerd task: exec: \"serve\": executable file not found in $PATH";

/// Lets somebody have deleted the pod.
fn deleted(world: &mut World, seconds: i64, finalizers: &[&str]) {
    world.pod["metadata"]["deletionTimestamp"] = ago(seconds);
    world.pod["metadata"]["deletionGracePeriodSeconds"] = json!(30);
    world.pod["metadata"]["finalizers"] = json!(finalizers);
}

/// Returns an end of a container that ran for so many seconds.
fn end(code: i32, seconds: i64, passed: i64) -> Value {
    let reason = if code == 0 { "Completed" } else { "Error" };
    json!({"terminated": {"exitCode": code, "reason": reason,
        "startedAt": ago(passed + seconds), "finishedAt": ago(passed)}})
}

/// Returns an end of a container that was not started.
fn never_ran() -> Value {
    json!({"terminated": {"exitCode": 128, "reason": "StartError", "message": NO_PROGRAM,
        "startedAt": "1970-01-01T00:00:00Z", "finishedAt": ago(20)}})
}

/// Lets the container have ended.
fn ended(world: &mut World) {
    world.pod["status"]["containerStatuses"][0]["state"] = end(0, 3_000, 590);
    world.pod["status"]["containerStatuses"][0]["ready"] = json!(false);
}

/// Lets the container run, once more after an end.
fn runs_again(world: &mut World, restarts: i32, since: i64, last: Value) {
    let status = &mut world.pod["status"]["containerStatuses"][0];
    status["restartCount"] = json!(restarts);
    status["state"] = json!({"running": {"startedAt": ago(since)}});
    status["lastState"] = last;
}

/// Lets the container wait for its next start after an end.
fn waits_again(world: &mut World, last: Value) {
    let said = "back-off 40s restarting failed container=main pod=web_shop(f0a0)";
    waits(world, "CrashLoopBackOff", said);
    world.pod["status"]["phase"] = json!("Running");
    let status = &mut world.pod["status"]["containerStatuses"][0];
    (status["restartCount"], status["lastState"]) = (json!(4), last);
}

/// Adds an event of the container.
fn event(world: &mut World, reason: &str, said: &str, seconds: i64) {
    world.event(reason, said);
    aged(world, seconds, 3);
    of_container(world, "spec.containers{main}");
}

/// The situations, each as a change of a pod whose volume is in order.
pub(crate) const RESTARTS: &[(&str, Change)] = &[
    (
        "a finalizer keeps a deleted pod, and the driver may not be looked at",
        |world| {
            deleted(world, 600, &["shop.example.com/drain", "batch/other"]);
            ended(world);
            unseen(world);
        },
    ),
    (
        "a finalizer keeps a deleted pod, and the driver has nothing of it",
        |world| {
            deleted(world, 600, &["shop.example.com/drain"]);
            ended(world);
            world.status["volumes"] = json!([]);
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "creds"}}]);
            world.secret = json!(null);
        },
    ),
    (
        "a finalizer keeps a deleted pod, and its volume is mounted as well",
        |world| deleted(world, 600, &["shop.example.com/drain"]),
    ),
    ("a deleted pod with a finalizer may end yet", |world| {
        deleted(world, -20, &["shop.example.com/drain"]);
    }),
    (
        "the containers of a deleted pod have ended, and the driver may not be looked at",
        |world| {
            deleted(world, 600, &[]);
            ended(world);
            unseen(world);
        },
    ),
    (
        "the containers of a deleted pod run, and the driver may not be looked at",
        |world| {
            deleted(world, 600, &[]);
            unseen(world);
        },
    ),
    ("the hook of a container fails", |world| {
        waits(
            world,
            "PostStartHookError",
            "Exec lifecycle hook ([/bin/warm-up]) for Container \"main\" failed - error: command '/bin/warm-up' exited with 7",
        );
    }),
    (
        "the hook of a container fails, and its program ends without an error",
        |world| {
            waits_again(world, end(0, 1, 20));
            event(world, "FailedPostStartHook", "PostStartHook failed", 20);
        },
    ),
    (
        "the hook of a container fails, and kubelet leaves out its later events",
        |world| {
            waits_again(world, end(137, 1, 20));
            event(world, "FailedPostStartHook", "PostStartHook failed", 200);
        },
    ),
    (
        "the hook of a container failed once, and its program ends by itself now",
        |world| {
            waits_again(world, end(2, 60, 20));
            event(world, "FailedPostStartHook", "PostStartHook failed", 200);
        },
    ),
    (
        "the hook for the end of a container failed, and it runs",
        |world| event(world, "FailedPreStopHook", "PreStopHook failed", 100),
    ),
    ("a probe ends the container again and again", |world| {
        runs_again(world, 4, 20, end(137, 40, 22));
        event(world, "Unhealthy", LIVENESS, 25);
        event(world, "Killing", KILLS, 24);
    }),
    ("a probe has ended the container once", |world| {
        runs_again(world, 1, 20, end(0, 40, 22));
        event(world, "Killing", KILLS, 24);
    }),
    (
        "the startup probe ends the container, which waits for its next start",
        |world| {
            waits_again(world, end(137, 40, 22));
            event(
                world,
                "Unhealthy",
                "Startup probe failed: connection refused",
                25,
            );
        },
    ),
    (
        "a probe ended the container, which has got over it",
        |world| {
            runs_again(world, 1, 400, end(137, 40, 402));
            event(world, "Unhealthy", LIVENESS, 405);
        },
    ),
    (
        "a program ended until what it needs was there, and runs now",
        |world| runs_again(world, 4, 300, end(1, 5, 305)),
    ),
    (
        "a probe could not be asked, and the program ended once",
        |world| {
            runs_again(world, 1, 20, end(1, 40, 22));
            event(world, "Unhealthy", "Liveness probe errored: deadline", 25);
        },
    ),
    ("a probe ended the container a long time ago", |world| {
        runs_again(world, 5, 700, end(137, 40, 702));
        event(world, "Unhealthy", LIVENESS, 705);
    }),
    ("a probe failed once, and ended nothing", |world| {
        event(world, "Unhealthy", LIVENESS, 100);
    }),
    ("a probe of another container fails", |world| {
        runs_again(world, 1, 20, end(0, 40, 22));
        event(world, "Unhealthy", LIVENESS, 25);
        of_container(world, "spec.containers{other}");
    }),
    ("a program ends without an error, and runs", |world| {
        runs_again(world, 5, 1, end(0, 2, 60));
    }),
    (
        "a program has just ended without an error, once more",
        |world| {
            let status = &mut world.pod["status"]["containerStatuses"][0];
            status["restartCount"] = json!(5);
            status["state"] = end(0, 2, 1);
        },
    ),
    (
        "a program of a Job has ended after some attempts, beside one that runs",
        |world| {
            world.pod["spec"]["restartPolicy"] = json!("OnFailure");
            world.pod["spec"]["containers"]
                .as_array_mut()
                .unwrap()
                .push(json!({"name": "other", "image": "shop"}));
            let statuses = &mut world.pod["status"]["containerStatuses"];
            let mut other = statuses[0].clone();
            (other["name"], other["restartCount"]) = (json!("other"), json!(4));
            (other["state"], other["lastState"]) = (end(0, 5, 10), end(1, 5, 60));
            statuses.as_array_mut().unwrap().push(other);
        },
    ),
    ("a program ends each day, and is started again", |world| {
        runs_again(world, 7, 298, end(0, 86_400, 300));
    }),
    ("an init container runs once more", |world| {
        init(world, 4, json!({"running": {"startedAt": ago(2)}}));
        world.pod["status"]["initContainerStatuses"][0]["lastState"] = end(1, 5, 30);
    }),
    (
        "an init container has done its work after some attempts",
        |world| {
            init(world, 4, end(0, 5, 20));
            world.pod["status"]["initContainerStatuses"][0]["ready"] = json!(true);
        },
    ),
    (
        "the program of a container is not there, and it is tried again",
        |world| waits_again(world, never_ran()),
    ),
    (
        "the program of a container of a Job is not there",
        |world| failed(world, never_ran()),
    ),
    ("a variable takes a Secret of a similar name", |world| {
        world.pod["spec"]["containers"][0]["env"] =
            json!([{"name": "PW", "valueFrom": {"secretKeyRef": {"name": "cred", "key": "pw"}}}]);
        waits(
            world,
            "CreateContainerConfigError",
            "secret \"cred\" not found",
        );
    }),
    (
        "the driver's pod is away, and the image is not there",
        |world| {
            world.driver = json!(null);
            waits(
                world,
                "ImagePullBackOff",
                "Back-off pulling image \"shop\": not found",
            );
        },
    ),
    (
        "the driver's pod is away, and the container crashes",
        |world| {
            world.driver = json!(null);
            waits_again(world, end(1, 5, 20));
        },
    ),
    (
        "the driver's pod is away, and the container waits for its Secret",
        |world| {
            world.driver = json!(null);
            world.secret = json!(null);
            world.pod["spec"]["containers"][0]["envFrom"] =
                json!([{"secretRef": {"name": "creds"}}]);
            waits(
                world,
                "CreateContainerConfigError",
                "secret \"creds\" not found",
            );
        },
    ),
    (
        "the driver's pod is away, and Secrets may not be read",
        |world| {
            world.driver = json!(null);
            world.forbidden = vec!["/secrets/"];
            waits(
                world,
                "CreateContainerConfigError",
                "secret \"creds\" not found",
            );
        },
    ),
    ("a container is not ready, as its probe says", |world| {
        world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        world.pod["status"]["containerStatuses"][0]["ready"] = json!(false);
        event(
            world,
            "Unhealthy",
            "Readiness probe failed: dial tcp 10.0.0.7:8080: connect: connection refused",
            20,
        );
    }),
];
