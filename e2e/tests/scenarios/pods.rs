//! Pods of all kinds: with init containers, users of their own, a single file of a volume, jobs, many at
//! once, and authors who claim what is not so.

use std::time::{Duration, Instant};

use e2e::{
    cluster::{Cluster as _, Component},
    skipped::skip,
};
use k8s_openapi::api::core::v1::Pod as RunningPod;
use kube::api::{DeleteParams, LogParams, Patch, PatchParams};
use serde_json::{Value, json};

use crate::{
    harness::{SOON, Scenario, scenario, until},
    objects::{MOUNT, SecretObject, class, job, pod},
    settings::{Need, REFRESH_OFTEN},
};

const OBJECT: &str = "- {objectName: password, content: hunter2}";

/// The time in which `/healthz` and the sidecar's probe must answer.
const PROBE_WITHIN: Duration = Duration::from_secs(3);
/// The failed probes in a row that let kubelet restart the driver: `failureThreshold` of the manifests.
/// The probes of the test follow on each other faster than kubelet's, so that a machine without time for
/// the driver fails few of them, and a driver that is in its own way fails many.
const FAILED_PROBES: u32 = 5;

/// Returns what a container has printed.
async fn printed(s: &Scenario, pod: &str, container: &str) -> String {
    let params = LogParams {
        container: Some(container.to_owned()),
        ..LogParams::default()
    };
    let pods = s.namespace.api::<RunningPod>();
    pods.logs(pod, &params).await.unwrap()
}

/// Whatever the author of a pod writes under kubelet's keys, the provider hears what kubelet says.
#[tokio::test]
async fn kubelet_speaks_for_itself() {
    let s = Scenario::start().await;
    let attributes = "- {objectName: attributes, contentFrom: attributes}";
    s.apply(class("db", attributes)).await;
    let mut web = pod("web", &["db"]);
    let prefix = "csi.storage.k8s.io/";
    let keys = [
        "pod.name",
        "pod.namespace",
        "pod.uid",
        "serviceAccount.name",
        "ephemeral",
    ];
    for key in keys {
        web = web.attribute(&format!("{prefix}{key}"), "of the author");
    }
    web = web.attribute(&format!("{prefix}node.name"), "of the author");
    s.apply(web).await;
    s.ready("web").await;
    let sent = s.reads("web", MOUNT).await.texts()["attributes"].to_owned();
    assert!(!sent.contains("of the author"), "{sent}");
    let sent: Value = serde_json::from_str(&sent).unwrap();
    assert_eq!(sent[format!("{prefix}pod.name")], "web", "{sent}");
    assert_eq!(
        sent[format!("{prefix}pod.namespace")],
        s.namespace.name(),
        "{sent}"
    );

    let imitated = pod("imitated", &["db"]).attribute("CSI.storage.k8s.io/pod.namespace", "other");
    s.apply(imitated).await;
    let said = s
        .failed_mount("imitated", "resembles a key of kubelet")
        .await;
    assert!(said.contains("CSI.storage.k8s.io/pod.namespace"), "{said}");
}

/// A pod status is only written: a path and objects that somebody forged in it lead nowhere.
#[tokio::test]
async fn a_forged_pod_status_leads_nowhere() {
    let s = Scenario::start().await;
    s.apply(
        class("db", OBJECT).secret_objects([SecretObject::new("creds", &[("pw", "password")])]),
    )
    .await;
    let forged = json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClassPodStatus",
        "metadata": {"name": format!("web-{}-db", s.namespace)},
        "status": {
            "podName": "web",
            "secretProviderClassName": "db",
            "mounted": true,
            "targetPath": "/etc",
            "objects": [{"id": "passwd", "version": "v0"}, {"id": "shadow", "version": "v0"}],
        },
    });
    s.apply(&forged).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let status = s.pod_status_objects().await.remove(0);
    let target = status.data["status"]["targetPath"].as_str().unwrap();
    assert!(target.starts_with("/var/lib/kubelet/pods/"), "{target}");
    // Forged while the pod runs, it does not change what its end takes away.
    s.apply(&forged).await;
    s.namespace.reconcile("web").await.unwrap();
    s.delete("web").await;
    s.nothing_is_left().await;
    let etc = s.cluster.node_tree(&s.node(), "/etc/hosts".as_ref()).await;
    assert!(etc.unwrap().is_some(), "/etc was unmounted or removed");
}

/// Files that only the group may read, for a container that may not run as root.
#[tokio::test]
async fn a_user_who_must_not_be_root_reads_by_the_group() {
    let s = scenario!([Need::OtherUsers]);
    let object = "- {objectName: password, content: hunter2, mode: '0440'}";
    s.apply(class("db", object)).await;
    let context = json!({"runAsNonRoot": true, "runAsUser": 1004, "fsGroup": 2000});
    s.apply(pod("web", &["db"]).with("securityContext", context))
        .await;
    s.ready("web").await;
    assert_eq!(s.reads("web", MOUNT).await.texts()["password"], "hunter2");
}

/// The pod is gone from the API before kubelet has ended it.
#[tokio::test]
async fn a_pod_that_is_deleted_by_force_leaves_nothing() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"]).with("terminationGracePeriodSeconds", 30.into()))
        .await;
    s.ready("web").await;
    let by_force = DeleteParams::default().grace_period(0);
    let pods = s.namespace.api::<RunningPod>();
    pods.delete("web", &by_force).await.unwrap();
    // One of the same name comes at once, and has its own volume.
    s.gone("web").await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    assert_eq!(s.reads("web", MOUNT).await.texts()["password"], "hunter2");
    s.delete("web").await;
    s.nothing_is_left().await;
    s.no_pod_statuses().await;
}

/// Init containers read the volume before the others start, and a container that is added later reads it
/// as well.
#[tokio::test]
async fn init_and_ephemeral_containers() {
    let s = scenario!([Need::Controllers]);
    s.apply(class("db", OBJECT)).await;
    let container = |name: &str| {
        json!({
            "name": name, "image": "probe:e2e", "args": ["tree", "--reader", MOUNT],
            "volumeMounts": [{"name": "secrets", "mountPath": MOUNT, "readOnly": true}],
        })
    };
    s.apply(pod("web", &["db"]).with("initContainers", json!([container("init")])))
        .await;
    s.ready("web").await;
    let said = printed(&s, "web", "init").await;
    assert!(said.contains("hunter2"), "{said}");
    let pods = s.namespace.api::<RunningPod>();
    let patch = json!({"spec": {"ephemeralContainers": [container("debug")]}});
    let (params, patch) = (PatchParams::default(), Patch::Strategic(patch));
    let patched = pods.patch_subresource("ephemeralcontainers", "web", &params, &patch);
    patched.await.unwrap();
    until("the ephemeral container has ended", async || {
        let pod = s.namespace.pod("web").await.unwrap().unwrap();
        let statuses = pod.status.unwrap().ephemeral_container_statuses;
        let states = statuses
            .into_iter()
            .flatten()
            .filter_map(|status| status.state);
        states.into_iter().any(|state| state.terminated.is_some())
    })
    .await;
    let said = printed(&s, "web", "debug").await;
    assert!(said.contains("hunter2"), "{said}");
}

/// The volume of a pod that has ended is taken away, although the pod's object stays.
#[tokio::test]
async fn a_job_that_has_ended_leaves_nothing() {
    let s = scenario!([Need::Controllers]);
    s.apply(class("db", OBJECT)).await;
    let mut once = pod("once", &["db"]);
    once.container()["args"] = json!(["tree", "--reader", MOUNT]);
    s.apply(job("once", &once)).await;
    let pods = s.namespace.api::<RunningPod>();
    until("the job's pod has succeeded", async || {
        let all = pods.list(&Default::default()).await.unwrap().items;
        let phases = all
            .iter()
            .filter_map(|pod| pod.status.as_ref()?.phase.as_deref());
        phases.into_iter().any(|phase| phase == "Succeeded")
    })
    .await;
    let name = pods.list(&Default::default()).await.unwrap().items[0]
        .metadata
        .name
        .clone();
    let said = printed(&s, &name.unwrap(), "main").await;
    assert!(said.contains("hunter2"), "{said}");
    // kubelet keeps the pod's directory as long as the pod's object exists.
    s.nothing_of_the_driver_is_left().await;
}

/// Kubernetes binds the file that was there when the container started: it stays as it was, while the
/// volume follows the store. An event says so, once.
#[tokio::test]
async fn a_file_at_a_sub_path_stays_as_it_was() {
    let s = scenario!([Need::Republish, REFRESH_OFTEN]);
    // The embedded kubelet starts no containers, so it binds nothing.
    let is_bound = s.cluster.name() != "embedded";
    s.apply(class("db", OBJECT)).await;
    let mut web = pod("web", &["db"]);
    let mounts = web.container()["volumeMounts"].as_array_mut().unwrap();
    mounts.push(json!({
        "name": "secrets", "mountPath": "/mnt/one", "subPath": "password", "readOnly": true,
    }));
    s.apply(web).await;
    s.ready("web").await;
    for content in ["hunter3", "hunter4"] {
        let changed = OBJECT.replace("hunter2", content);
        s.apply(class("db", &changed)).await;
        until("the volume has the new content", async || {
            s.namespace.reconcile("web").await.unwrap();
            tokio::time::sleep(Duration::from_millis(500)).await;
            s.reads("web", MOUNT).await.texts()["password"] == content
        })
        .await;
    }
    if is_bound {
        assert_eq!(s.reads("web", "/mnt/one").await.texts()["."], "hunter2");
    }
    let reason = "MountSubPathNotRefreshed";
    let says = |said: &str| said.contains("container \"main\" mounts with subPath");
    let event = s.namespace.wait_event("web", reason, says, SOON).await;
    let event = event.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(event.count.unwrap_or(1), 1, "{event:?}");
    let events = s.namespace.events("web").await.unwrap();
    let of_reason = events
        .iter()
        .filter(|event| event.reason.as_deref() == Some(reason));
    assert_eq!(of_reason.count(), 1, "{events:?}");
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// A pod with a user namespace of its own reads its volume, with its group, and follows the store. Where
/// the kernel or the runtime cannot do that, the test is skipped with the reason.
#[tokio::test]
async fn a_pod_with_users_of_its_own() {
    let s = scenario!([Need::Controllers, Need::Republish, REFRESH_OFTEN]);
    let object = "- {objectName: password, content: hunter2, mode: '0440'}";
    s.apply(class("db", object)).await;
    let context = json!({"runAsUser": 1004, "runAsGroup": 1004, "fsGroup": 2000});
    let web = pod("web", &["db"]).with("hostUsers", false.into());
    s.apply(web.with("securityContext", context)).await;
    if let Err(error) = s.namespace.wait_ready("web", SOON).await {
        let events = s.namespace.events("web").await.unwrap();
        let cannot = [
            "user namespace",
            "userns",
            "idmap",
            "mount_setattr",
            "hostUsers",
        ];
        let why = events.iter().filter_map(|event| event.message.as_deref());
        let why = why
            .into_iter()
            .find(|said| cannot.iter().any(|word| said.contains(word)));
        let why = why.unwrap_or_else(|| panic!("{error}"));
        skip(&format!("no user namespaces for pods here: {why}"));
        return;
    }
    assert_eq!(s.reads("web", MOUNT).await.texts()["password"], "hunter2");
    s.apply(class("db", &object.replace("hunter2", "hunter3")))
        .await;
    until("the volume has the new content", async || {
        s.namespace.reconcile("web").await.unwrap();
        tokio::time::sleep(Duration::from_millis(500)).await;
        s.reads("web", MOUNT).await.texts()["password"] == "hunter3"
    })
    .await;
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// Sixty pods start at once, and kubelet's probe of the driver is answered all the time, with the CPU
/// limit of the manifests where there is one.
#[tokio::test]
async fn probes_are_answered_while_sixty_pods_start() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT)).await;
    let names: Vec<String> = (0..60).map(|number| format!("web-{number}")).collect();
    let node = s.node();
    let start = async {
        for name in &names {
            s.apply(pod(name, &["db"])).await;
        }
        for name in &names {
            s.ready(name).await;
        }
    };
    let (mut probes, mut slowest) = (0, Duration::ZERO);
    let (mut in_a_row, mut longest, mut last) = (0, 0, String::new());
    let probing = async {
        loop {
            let since = Instant::now();
            let answer = s
                .cluster
                .get(&node, &Component::Driver, 9808, "/healthz")
                .await;
            let answer = answer.unwrap_or_else(|error| panic!("{error}"));
            let took = since.elapsed();
            probes += 1;
            slowest = slowest.max(took);
            if answer.status == 200 && took < PROBE_WITHIN {
                in_a_row = 0;
            } else {
                in_a_row += 1;
                longest = longest.max(in_a_row);
                last = format!("{} after {took:.1?}: {}", answer.status, answer.body);
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    };
    tokio::select! {
        () = start => {}
        () = probing => unreachable!("it does not end"),
    }
    println!(
        "{probes} probes while 60 pods started, the slowest took {slowest:.1?}, {longest} in a row failed"
    );
    assert!(
        probes > 0 && longest < FAILED_PROBES,
        "{longest} probes in a row failed, the last with {last}"
    );
    for name in &names {
        s.namespace.delete_pod(name).await.unwrap();
    }
    for name in &names {
        s.gone(name).await;
    }
    s.nothing_is_left().await;
}
