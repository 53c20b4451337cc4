//! Runs the plugin against an API server whose objects are those of clusters in trouble. The node's driver is
//! played here; the scenarios of `e2e` have the real one.

use std::fmt::Write as _;

use serde_json::json;

use crate::world::{World, ago};

/// Compares stories with a snapshot, without times and how long ago they were.
macro_rules! assert_stories {
    ($text:expr) => {
        insta::with_settings!({filters => vec![(r"\d{4}-\d\d-\d\dT[\d:]+Z( \([^)]*\))?", "[time]")]}, {
            insta::assert_snapshot!($text);
        });
    };
}

type Change = fn(&mut World);

/// The situations, each as a change of a pod whose volume is in order.
const SITUATIONS: &[(&str, Change)] = &[
    ("all is well", |_| {}),
    ("the kinds are not installed", |world| {
        world.remove_kinds();
    }),
    ("the pod has no node", |world| {
        world.pod["spec"]
            .as_object_mut()
            .unwrap()
            .remove("nodeName");
        world.pod["status"] = json!({"phase": "Pending", "conditions": [{
            "type": "PodScheduled", "status": "False", "reason": "Unschedulable",
            "message": "0/3 nodes are available: 3 Insufficient memory.",
        }]});
    }),
    ("the node is not ready", |world| {
        world.node["status"]["conditions"] = json!([{
            "type": "Ready", "status": "Unknown", "lastTransitionTime": ago(600),
            "message": "Kubelet stopped posting node status.",
        }]);
    }),
    ("the node is gone", |world| world.node = json!(null)),
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
        world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("password");
        world.status["volumes"][0]["lastChange"] = ago(10);
    }),
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
    ("a pod without volumes of the driver", |world| {
        world.pod["spec"]["volumes"] = json!([]);
        world.pod["spec"]["containers"][0]["volumeMounts"] = json!([]);
    }),
    ("a pod that has ended", |world| {
        world.pod["status"]["phase"] = json!("Succeeded");
        world.status["volumes"] = json!([]);
    }),
];

#[tokio::test]
async fn each_situation_has_its_story() {
    let mut text = String::new();
    for (title, change) in SITUATIONS {
        let mut world = World::in_order();
        change(&mut world);
        let said = world.start().await.explain("web").await;
        assert_eq!(said.stderr, "", "{title}");
        writeln!(text, "# {title}: exit code {}\n{}", said.code, said.stdout).unwrap();
    }
    assert_stories!(text);
}

/// The text of others cannot move the cursor, and is not longer than it should be.
#[tokio::test]
async fn texts_of_others_are_one_line() {
    let mut world = World::in_order();
    world.not_started();
    let evil = format!("\u{1b}[2J\r\nnext: rm -rf /\n{}", "x".repeat(10_000));
    world.event(
        "FailedMount",
        &format!("MountVolume.SetUp failed for volume \"secrets\" : {evil}"),
    );
    let said = world.start().await.explain("web").await;
    assert!(!said.stdout.contains('\u{1b}'), "{}", said.stdout);
    assert!(
        said.stdout.contains("it says: [2J next: rm -rf /"),
        "{}",
        said.stdout
    );
    assert!(
        said.stdout.lines().all(|line| line.len() < 1_000),
        "{}",
        said.stdout
    );
}

#[tokio::test]
async fn what_cannot_be_explained_has_exit_code_2() {
    let running = World::in_order().start().await;
    let said = running.explain("we").await;
    assert_eq!(said.code, 2);
    assert_eq!(
        said.stderr,
        "there is no pod we in namespace shop; there are web\n"
    );
    let mut nowhere = running;
    nowhere.kubeconfig = std::path::PathBuf::from("/no/such/file");
    let said = nowhere.explain("web").await;
    assert_eq!(said.code, 2);
    assert!(said.stderr.contains("/no/such/file"), "{}", said.stderr);
}

/// A workload has the pod explained that is not ready.
#[tokio::test]
async fn a_workload_has_one_of_its_pods_explained() {
    let mut world = World::in_order();
    world.pod["metadata"]["labels"] = json!({"app": "web"});
    let mut other = world.pod.clone();
    other["metadata"]["name"] = json!("a-ready-one");
    other["metadata"]["uid"] = json!("other");
    other["status"]["conditions"] = json!([{"type": "Ready", "status": "True"}]);
    let ready = "/api/v1/namespaces/shop/pods/a-ready-one".to_owned();
    world.others.push((ready, other));
    let deployment = json!({
        "metadata": {"name": "web"},
        "spec": {
            "selector": {"matchLabels": {"app": "web"}},
            "template": {"metadata": {"labels": {"app": "web"}}, "spec": {"containers": []}},
        },
    });
    let path = "/apis/apps/v1/namespaces/shop/deployments/web".to_owned();
    world.others.push((path, deployment));
    let running = world.start().await;
    for words in [&["deployment", "web"][..], &["deploy/web"]] {
        let args = [&["explain", "-n", "shop"], words].concat();
        let said = running.run(&args).await;
        assert_eq!(said.stderr, "");
        assert!(
            said.stdout.starts_with("pod shop/web: Running"),
            "{}",
            said.stdout
        );
    }
    let said = running.run(&["explain", "sts", "web", "-n", "shop"]).await;
    assert_eq!(
        (said.code, said.stderr.as_str()),
        (2, "there is no StatefulSet shop/web\n")
    );
}
