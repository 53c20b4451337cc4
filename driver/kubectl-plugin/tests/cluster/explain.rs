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

/// The situations, each as a change of a pod whose volume is in order.
const SITUATIONS: &[(&str, Change)] = &[
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
    ("the container has just crashed", |world| {
        let status = &mut world.pod["status"]["containerStatuses"][0];
        status["ready"] = json!(false);
        status["restartCount"] = json!(2);
        status["state"] = json!({"terminated": {"exitCode": 1, "reason": "Error"}});
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
    ("a ConfigMap was missing, and the pod is ready", |world| {
        world.with_config_map();
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
    ("a volume has an interval, and rotation is off", |world| {
        world.status["refreshes"] = json!(false);
        world.pod["spec"]["volumes"][0]["csi"]["volumeAttributes"]["secrets-store.csi.k8s.io/rotation-poll-interval"] =
            json!("5m");
    }),
    (
        "new content under a subPath, and a controller makes the pod again",
        |world| {
            world.pod["metadata"]["ownerReferences"] = json!([{"apiVersion": "apps/v1", "kind": "ReplicaSet",
            "name": "web-5d", "uid": "rs", "controller": true}]);
            world.pod["spec"]["containers"][0]["volumeMounts"][0]["subPath"] = json!("password");
            world.status["volumes"][0]["lastChange"] = ago(10);
        },
    ),
    ("calls of other pods fail, and this one is fine", |world| {
        world.status["calls"] =
            json!([{"provider": "vault", "succeeded": 44, "failed": {"UNAVAILABLE": 49}}]);
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
    world.pod["status"]["conditions"] = json!([{"type": "Ready", "status": "False"}]);
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

/// Returns a workload that selects pods of a label.
fn workload(name: &str, app: &str) -> serde_json::Value {
    json!({
        "metadata": {"name": name, "uid": name},
        "spec": {
            "serviceName": "", "schedule": "* * * * *",
            "jobTemplate": {"spec": {"template": {}}},
            "selector": {"matchLabels": {"app": app}},
            "template": {"metadata": {"labels": {"app": app}}, "spec": {"containers": []}},
        },
    })
}

/// A workload without pods has the event that says why.
#[tokio::test]
async fn a_workload_without_pods_says_why() {
    const WHY: &str = "pods \"web-5d-\" is forbidden: exceeded quota";
    let mut world = World::in_order();
    for (path, name) in [
        ("deployments", "web"),
        ("statefulsets", "db"),
        ("deployments", "idle"),
    ] {
        let path = format!("/apis/apps/v1/namespaces/shop/{path}/{name}");
        world.others.push((path, workload(name, "none")));
    }
    for (kind, name) in [
        ("ReplicaSet", "web-5d"),
        ("ReplicaSet", "web-other-5d"),
        ("StatefulSet", "db"),
    ] {
        let object = json!({"kind": kind, "namespace": "shop", "name": name, "uid": name});
        world.event_of(&object, "FailedCreate", WHY);
    }
    let running = world.start().await;
    for (kind, name, maker) in [
        ("deployment", "web", "ReplicaSet web-5d"),
        ("sts", "db", "StatefulSet db"),
    ] {
        let said = running.run(&["explain", kind, name, "-n", "shop"]).await;
        assert_eq!(
            (said.code, said.stderr.as_str()),
            (1, ""),
            "{}",
            said.stdout
        );
        let expected = format!(
            "  - {maker} cannot make its pods\n    it says: {WHY}\n    next:    kubectl -n shop describe "
        );
        assert!(said.stdout.contains(&expected), "{}", said.stdout);
    }
    let said = running.run(&["explain", "deploy/idle", "-n", "shop"]).await;
    assert_eq!(said.code, 2);
    assert!(
        said.stderr
            .starts_with("Deployment shop/idle has no pods, and no event says"),
        "{}",
        said.stderr
    );
}

/// A CronJob has the pod of its newest Job explained.
#[tokio::test]
async fn a_cron_job_has_its_newest_job_explained() {
    let mut world = World::in_order();
    world.pod["metadata"]["labels"] = json!({"app": "newest"});
    let batch = "/apis/batch/v1/namespaces/shop";
    for name in ["nightly", "weekly"] {
        let path = format!("{batch}/cronjobs/{name}");
        world.answers.push((path, workload(name, name)));
    }
    let mut jobs = Vec::new();
    for (name, owner, age) in [
        ("a", "nightly", 900),
        ("newest", "nightly", 60),
        ("z", "other", 1),
    ] {
        let mut job = workload(name, name);
        job["metadata"]["creationTimestamp"] = ago(age);
        job["metadata"]["ownerReferences"] =
            json!([{"apiVersion": "batch/v1", "kind": "CronJob", "name": owner, "uid": owner}]);
        let path = format!("{batch}/jobs/{name}");
        world.answers.push((path, job.clone()));
        jobs.push(job);
    }
    let all = json!({"metadata": {}, "items": jobs});
    world.answers.push((format!("{batch}/jobs"), all));
    let running = world.start().await;
    let said = running
        .run(&["explain", "cronjob", "nightly", "-n", "shop"])
        .await;
    assert_eq!(said.stderr, "");
    assert!(
        said.stdout.starts_with("pod shop/web: Running"),
        "{}",
        said.stdout
    );
    let said = running.run(&["explain", "cj/weekly", "-n", "shop"]).await;
    assert_eq!(said.code, 2);
    assert!(
        said.stderr
            .starts_with("CronJob shop/weekly has run no Job yet"),
        "{}",
        said.stderr
    );
}

/// The first line says what is wrong with a command line; the usage follows.
#[tokio::test]
async fn a_wrong_command_line_has_its_reason_first() {
    let running = World::in_order().start().await;
    for (words, why) in [
        (
            &["explain", "pod", "-n", "t01"][..],
            "the pod's name is missing: explain pod NAME",
        ),
        (
            &["explain", "deploy/"],
            "the deploy's name is missing: explain deploy NAME",
        ),
        (&["explain"], "the pod's name is missing: explain pod NAME"),
        (
            &["explain", "pod", "a", "b"],
            "explain takes one kind and one name, and not pod a b",
        ),
        (
            &["explain", "service", "a"],
            "\"service\" is not explained; a pod or its workload is",
        ),
        (
            &["doctor", "node-1"],
            "doctor takes no \"node-1\"; it examines the whole cluster",
        ),
        (
            &["lint"],
            "lint needs a file, a directory, or - for standard input",
        ),
        (
            &["explian", "pod"],
            "\"explian\" is not a command; they are explain, doctor and lint",
        ),
        (&["explain", "--what"], "--what is not known"),
    ] {
        let said = running.run(words).await;
        assert_eq!(said.code, 2, "{words:?}");
        let mut lines = said.stderr.lines();
        assert_eq!(lines.next(), Some(why), "{words:?}");
        assert!(lines.any(|line| line == "usage:"), "{words:?}");
    }
    let said = running.explain("web\r").await;
    assert_eq!(
        (said.code, said.stderr.as_str()),
        (2, "\"web\\r\" cannot be the name of a pod\n")
    );
}
