//! Runs `doctor` against an API server whose objects are those of clusters in trouble.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use serde_json::{Value, json};

use crate::{
    situations::refused,
    world::{World, ago},
};

type Change = fn(&mut World);

/// Makes a service account of the driver whose pods get no token.
fn no_token_of_account(world: &mut World) {
    let account = json!({"metadata": {"name": "secrets-store-csi-driver"}, "automountServiceAccountToken": false});
    let path = "/api/v1/namespaces/kube-system/serviceaccounts/secrets-store-csi-driver";
    world.others.push((path.to_owned(), account));
}

const SITUATIONS: &[(&str, Change)] = &[
    ("all is well", |_| {}),
    ("the kinds are not installed", |world| world.remove_kinds()),
    ("the CSIDriver is missing", |world| {
        world.csi_driver = json!(null)
    }),
    ("the CSIDriver is wrong", |world| {
        world.csi_driver["spec"] = json!({"requiresRepublish": false, "fsGroupPolicy": "None"});
    }),
    ("the driver may not write Secrets", |world| {
        world.roles = vec!["rbac-secretproviderclass.yaml"];
    }),
    ("the driver may do nothing", |world| {
        world.roles = Vec::new()
    }),
    ("the DaemonSet fits no node", |world| {
        world.driver = json!(null);
        world.set_status = json!({"currentNumberScheduled": 0, "desiredNumberScheduled": 0,
            "numberMisscheduled": 0, "numberReady": 0});
    }),
    ("the driver's pod crashes", |world| {
        world.driver["status"] = json!({
            "phase": "Running", "conditions": [{"type": "Ready", "status": "False"}],
            "containerStatuses": [{"name": "secrets-store", "image": "", "imageID": "", "ready": false,
                "restartCount": 7, "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                "lastState": {"terminated": {"reason": "OOMKilled", "exitCode": 137}}}],
        });
    }),
    ("the driver's pod crashes in its first minute", |world| {
        let status = &mut world.driver["status"]["containerStatuses"][0];
        (status["ready"], status["restartCount"]) = (json!(false), json!(10));
        status["state"] = json!({"running": {"startedAt": ago(1)}});
        status["lastState"] =
            json!({"terminated": {"reason": "Error", "exitCode": 2, "finishedAt": ago(4)}});
        world.driver["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
    }),
    (
        "the driver's pod crashes, and is ready in between",
        |world| {
            let status = &mut world.driver["status"]["containerStatuses"][0];
            status["restartCount"] = json!(3);
            status["lastState"] =
                json!({"terminated": {"reason": "Error", "exitCode": 2, "finishedAt": ago(4)}});
        },
    ),
    (
        "the driver's pod has ended with an error for the first time",
        |world| {
            let status = &mut world.driver["status"]["containerStatuses"][0];
            status["ready"] = json!(false);
            status["state"] =
                json!({"terminated": {"reason": "Error", "exitCode": 2, "finishedAt": ago(4)}});
            world.driver["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
        },
    ),
    ("the driver's pod gets no token", |world| {
        world.driver["spec"]["automountServiceAccountToken"] = json!(false);
    }),
    ("the driver's service account gives no token", |world| {
        no_token_of_account(world);
    }),
    (
        "the service account gives no token, and the pod asks for one",
        |world| {
            no_token_of_account(world);
            world.driver["spec"]["automountServiceAccountToken"] = json!(true);
        },
    ),
    ("the pod gets no token, and has one of its own", |world| {
        world.driver["spec"]["automountServiceAccountToken"] = json!(false);
        world.driver["spec"]["containers"][0]["volumeMounts"] = json!([{"name": "own",
                "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}]);
    }),
    ("the driver has no token, says a pod that waits", |world| {
        refused(
            world,
            "cannot connect to the API server: failed to infer config: failed to read an incluster token; run in a cluster with a service account token, or give --kubeconfig",
        );
    }),
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
    ("the driver does not resolve the API server", |world| {
        refused(
            world,
            "the API server did not answer: client error (Connect): dns error: failed to lookup address information: Try again",
        );
    }),
    (
        "a network policy keeps the driver from the API server",
        |world| {
            refused(
                world,
                "the API server did not answer: no answer within 10 s",
            );
        },
    ),
    ("a pod waited for a driver, and is ready", |world| {
        let status = world.pod["status"].clone();
        refused(
            world,
            "the API server did not answer: no answer within 10 s",
        );
        world.pod["status"] = status;
    }),
    ("a pod waited for a driver some minutes ago", |world| {
        refused(
            world,
            "the API server did not answer: no answer within 10 s",
        );
        world.others[0].1["lastTimestamp"] = ago(200);
    }),
    (
        "a pod waited for a driver that was started anew since",
        |world| {
            refused(
                world,
                "cannot connect to the API server: failed to infer config: failed to read an incluster token; run in a cluster with a service account token, or give --kubeconfig",
            );
            // kubelet told it 20 seconds ago.
            world.driver["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] =
                ago(2);
        },
    ),
    (
        "a pod waits for a driver, and DaemonSets may not be read",
        |world| {
            refused(
                world,
                "the API server did not answer: no answer within 10 s",
            );
            world.event("FailedMount", "Unable to attach or mount volumes: unmounted volumes=[secrets], unattached volumes=[secrets]: timed out waiting for the condition");
            world.others[1].1["lastTimestamp"] = ago(5);
            world.forbidden = vec!["/daemonsets"];
        },
    ),
    (
        "a pod waits for a driver, and events may not be read",
        |world| {
            refused(
                world,
                "the API server did not answer: no answer within 10 s",
            );
            world.forbidden = vec!["/v1/events"];
        },
    ),
    ("kubelet does not know the driver", |world| {
        world.csi_node["spec"]["drivers"] = json!([])
    }),
    ("a class of a provider that no node has", |world| {
        world.class["spec"]["provider"] = json!("aws");
    }),
    ("a node in trouble", |world| {
        world.status["driver"] = json!({"path": "/csi/csi.sock", "answers": false, "error": "Connection refused (os error 111)"});
        world.status["providers"][0]["answers"] = json!(false);
        world.status["calls"] =
            json!([{"provider": "vault", "succeeded": 3, "failed": {"UNAVAILABLE": 30}}]);
        world.status["unseenBelow"] = json!("/var/lib/kubelet/pods");
        world.status["memory"]["used"] = json!(99_000_000);
        world.status["time"] = ago(7_230);
        world.status["volumes"][0]["staleSince"] = ago(600);
        world.status["volumes"][0]["mounted"] = json!(false);
    }),
    ("kubelet looks at no volume of a node", |world| {
        world.status["volumes"][0]["lastSuccess"] = ago(600 + 60 + 190);
    }),
    (
        "kubelet looks at no volume, and pods may not be read",
        |world| {
            world.status["volumes"][0]["lastSuccess"] = ago(600 + 60 + 190);
            world.forbidden = vec!["/namespaces/shop/pods"];
        },
    ),
    ("a volume is due, and kubelet is about to look", |world| {
        world.status["volumes"][0]["lastSuccess"] = ago(600 + 100);
    }),
    ("a volume that is never refreshed", |world| {
        world.status["volumes"][0]["lastSuccess"] = ago(9_000);
        world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["secrets-store.csi.k8s.io/rotation-poll-interval"] =
            json!("never");
    }),
    ("a class that is seldom refreshed", |world| {
        world.status["volumes"][0]["lastSuccess"] = ago(9_000);
        world.class["metadata"]["annotations"] =
            json!({"secrets-store.csi.k8s.io/rotation-poll-interval": "24h"});
    }),
    ("a volume is due, and its pod ends", |world| {
        world.status["volumes"][0]["lastSuccess"] = ago(9_000);
        world.pod["metadata"]["deletionTimestamp"] = ago(9_000);
    }),
    (
        "a volume is due, and the hook of its container runs",
        |world| {
            world.status["volumes"][0]["lastSuccess"] = ago(9_000);
            world.pod["spec"]["containers"][0]["lifecycle"] =
                json!({"postStart": {"exec": {"command": ["sleep", "inf"]}}});
            world.pod["status"]["containerStatuses"][0]["state"] =
                json!({"waiting": {"reason": "ContainerCreating"}});
        },
    ),
    (
        "a volume is due, and the driver has just been started",
        |world| {
            world.status["volumes"][0]["lastSuccess"] = ago(9_000);
            world.driver["status"]["containerStatuses"][0]["state"]["running"]["startedAt"] =
                ago(60);
        },
    ),
    ("the existing driver", |world| world.existing_driver = true),
    ("a pod status whose pod is gone", |world| {
        world.pod_status["metadata"]["ownerReferences"][0]["uid"] = json!("another");
    }),
    ("nothing may be read", |world| {
        world.forbidden = vec!["/apis/", "/api/v1"];
    }),
    (
        "the CSIDriver is missing, and DaemonSets may not be read",
        |world| {
            world.csi_driver = json!(null);
            world.forbidden = vec!["/daemonsets"];
        },
    ),
    ("only little may be read", |world| {
        world.forbidden = vec![
            "/exec?",
            "/customresourcedefinitions",
            "/subjectaccessreviews",
            "/csinodes",
            "/secretprovider",
        ];
    }),
];

#[tokio::test]
async fn each_situation_has_its_report() {
    let mut text = String::new();
    for (title, change) in SITUATIONS {
        let mut world = World::in_order();
        change(&mut world);
        let said = world.start().await.run(&["doctor"]).await;
        assert_eq!(said.stderr, "", "{title}");
        writeln!(text, "# {title}: exit code {}\n{}", said.code, said.stdout).unwrap();
    }
    insta::with_settings!({filters => vec![(r"\d{4}-\d\d-\d\dT[\d:]+Z( \([^)]*\))?", "[time]"), (r"version v[\d.]+", "version [version]")]}, {
        insta::assert_snapshot!(text);
    });
}

/// Of nodes that were not asked nothing is known.
#[tokio::test]
async fn nodes_that_are_not_asked_are_not_fine() {
    let said = World::in_order()
        .start()
        .await
        .run(&["doctor", "--nodes", "0"])
        .await;
    for expected in [
        "\nNothing is known to be wrong, but not all could be read",
        "\nNot known:\n  - what is on the nodes: none was asked (--nodes 0)",
    ] {
        assert!(said.stdout.contains(expected), "{}", said.stdout);
    }
    assert_eq!(said.code, 0);
}

/// The requests about a cluster do not grow with its nodes, beyond the pages of some lists.
#[tokio::test]
async fn a_large_cluster_is_sampled() {
    let mut world = World::in_order();
    world.more_nodes = 5_000;
    let running = world.start().await;
    let began = Instant::now();
    let said = running.run(&["doctor", "-o", "json"]).await;
    let took = began.elapsed();
    assert_eq!(said.stderr, "");
    let report: Value = serde_json::from_str(&said.stdout).unwrap();
    let looked = report["lookedAt"].to_string();
    assert!(
        looked.contains("2000 pods of the driver, and not the rest, of which 20 said"),
        "{looked}"
    );
    assert!(looked.contains("20 of these nodes were asked"), "{looked}");
    // 11 pages of CSINodes, 4 of pods, and two commands for each node that is asked.
    let requests = running.requests();
    assert!(requests < 100, "{requests}");
    // Some seconds on a quiet machine; a busy one gets more.
    assert!(took < Duration::from_secs(60), "{took:?}");
    assert_eq!(report["findings"], json!([]), "{report:#}");
    assert_eq!(said.code, 0);
}
