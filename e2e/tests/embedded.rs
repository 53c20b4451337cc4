//! The embedded cluster with `deploy/`, the driver and the provider: one test of the whole
//! `Cluster` interface. The scenarios are in `scenarios/`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::cluster::{Cluster, Error, wait_until};
use e2e::embedded::{Embedded, standard};
use e2e::namespace::Namespace;
use e2e::tree::View;
use embedded::Options;
use k8s_openapi::api::apps::v1::Deployment;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{DeleteParams, ListParams, Patch, PatchParams};
use rstest::rstest;

const NODE: &str = "node-1";
const PODS: &str = "/var/lib/kubelet/pods";
const LIMIT: Duration = Duration::from_secs(20);

const CLASS: &str = include_str!("manifests/class.yaml");
const POD: &str = include_str!("manifests/pod.yaml");

const DEPLOYMENT: &str = r"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template:
    metadata: {labels: {app: web}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
      - name: app
        image: probe:e2e
        volumeMounts: [{name: secrets, mountPath: /mnt/secrets-store, readOnly: true}]
      volumes:
      - name: secrets
        csi:
          driver: secrets-store.csi.k8s.io
          readOnly: true
          volumeAttributes: {secretProviderClass: class}
";

async fn start(nodes: usize) -> Embedded {
    let binaries = tokio::task::spawn_blocking(|| Binaries::find(|_| {}))
        .await
        .unwrap()
        .unwrap();
    let options = Options {
        nodes,
        ..standard(&binaries).unwrap()
    };
    Embedded::start(options).await.unwrap()
}

async fn secret(cluster: &Embedded, namespace: &str) -> Option<String> {
    let tree = cluster
        .tree(namespace, "pod", "/mnt/secrets-store", View::Reader)
        .await
        .unwrap();
    tree.texts().get("foo").map(|text| (*text).to_owned())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_secret_is_mounted_survives_a_reboot_and_leaves_nothing() {
    let cluster = start(1).await;
    let ns = Namespace::create(&cluster).await.unwrap();

    ns.apply(POD).await.unwrap();
    let missing = format!("failed to get secretproviderclass {ns}/class");
    let event = ns
        .wait_event("pod", "FailedMount", |text| text.contains(&missing), LIMIT)
        .await
        .unwrap();
    assert!(
        event
            .message
            .unwrap()
            .starts_with("MountVolume.SetUp failed for volume \"secrets\" : rpc error: code = ")
    );
    let error = ns
        .wait_ready("pod", Duration::from_millis(100))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, Error::Timeout { last, .. } if last.contains(&missing)),
        "{error}"
    );

    ns.apply(CLASS).await.unwrap();
    ns.wait_ready("pod", LIMIT).await.unwrap();
    assert_eq!(secret(&cluster, ns.name()).await.as_deref(), Some("secret"));
    assert_eq!(
        cluster.mounts(NODE, Path::new(PODS)).await.unwrap().len(),
        1
    );

    assert!(
        cluster
            .driver(NODE)
            .metrics()
            .await
            .unwrap()
            .contains("node_publish_total")
    );
    assert_eq!(
        cluster
            .driver(NODE)
            .get(9808, "/healthz")
            .await
            .unwrap()
            .status,
        200
    );
    assert_eq!(
        cluster
            .provider(NODE, "fake-provider")
            .get(8080, "/rotation?rotated=false")
            .await
            .unwrap()
            .status,
        200
    );

    cluster.driver(NODE).kill().await.unwrap();
    assert_eq!(secret(&cluster, ns.name()).await.as_deref(), Some("secret"));

    cluster.reboot(NODE).await.unwrap();
    ns.wait_ready("pod", LIMIT).await.unwrap();
    assert_eq!(secret(&cluster, ns.name()).await.as_deref(), Some("secret"));

    let pod = ns.pod("pod").await.unwrap().unwrap();
    ns.delete_pod("pod").await.unwrap();
    ns.wait_gone("pod", LIMIT).await.unwrap();
    cleaned_up(&cluster, &pod).await;
    assert_eq!(
        cluster.mounts(NODE, Path::new(PODS)).await.unwrap(),
        Vec::<PathBuf>::new()
    );
    let left = cluster
        .node_tree(NODE, Path::new(PODS))
        .await
        .unwrap()
        .unwrap();
    assert_eq!(left.entries.len(), 1, "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_spread_scaled_and_gone() {
    let cluster = start(2).await;
    let ns = Namespace::create(&cluster).await.unwrap();
    ns.apply(CLASS).await.unwrap();
    ns.apply(DEPLOYMENT).await.unwrap();
    let pods = ns.api::<Pod>();
    let deployments = ns.api::<Deployment>();
    let ready = async || {
        let status = deployments
            .get("web")
            .await
            .unwrap()
            .status
            .unwrap_or_default();
        status.ready_replicas.unwrap_or_default()
    };
    let all = ListParams::default().labels("app=web");
    eventually("both pods are ready", async || ready().await == 2).await;
    let list = pods.list(&all).await.unwrap().items;
    let nodes: BTreeSet<_> = list
        .iter()
        .map(|pod| pod.spec.clone().unwrap().node_name.unwrap())
        .collect();
    assert_eq!(nodes.into_iter().collect::<Vec<_>>(), ["node-1", "node-2"]);

    let one = Patch::Merge(serde_json::json!({"spec": {"replicas": 1}}));
    deployments
        .patch("web", &PatchParams::default(), &one)
        .await
        .unwrap();
    eventually("one pod is left", async || {
        pods.list(&all).await.unwrap().items.len() == 1
    })
    .await;
    deployments
        .delete("web", &DeleteParams::default())
        .await
        .unwrap();
    eventually("no pod is left", async || {
        pods.list(&all).await.unwrap().items.is_empty()
    })
    .await;
    for pod in &list {
        cleaned_up(&cluster, pod).await;
    }
}

async fn eventually(what: &str, check: impl AsyncFn() -> bool) {
    wait_until(what, LIMIT, check).await.unwrap();
}

/// Waits until a pod has neither a mount nor a directory on its node: a pod without grace period
/// leaves the API before that.
async fn cleaned_up(cluster: &Embedded, pod: &Pod) {
    let node = pod.spec.as_ref().unwrap().node_name.as_deref().unwrap();
    let dir = Path::new(PODS).join(pod.metadata.uid.as_deref().unwrap());
    eventually("the node is rid of the pod", async || {
        let mounts = cluster.mounts(node, &dir).await.unwrap();
        mounts.is_empty() && cluster.node_tree(node, &dir).await.unwrap().is_none()
    })
    .await;
}

/// Distributions keep kubelet in other directories: microk8s and k0s, for example. The manifests name it
/// as the chart does with `linux.kubeletRootDir`.
#[rstest]
#[case::microk8s("/var/snap/microk8s/common/var/lib/kubelet")]
#[case::k0s("/var/lib/k0s/kubelet")]
#[case::short("/k")]
#[tokio::test(flavor = "multi_thread")]
async fn kubelet_may_have_another_root_directory(#[case] root: &str) {
    let binaries = tokio::task::spawn_blocking(|| Binaries::find(|_| {}))
        .await
        .unwrap()
        .unwrap();
    let mut options = Options {
        kubelet_root: PathBuf::from(root),
        ..standard(&binaries).unwrap()
    };
    for manifest in &mut options.manifests {
        *manifest = manifest.replace(embedded::KUBELET_ROOT, root);
    }
    let cluster = Embedded::start(options).await.unwrap();
    let ns = Namespace::create(&cluster).await.unwrap();
    ns.apply(CLASS).await.unwrap();
    ns.apply(POD).await.unwrap();
    ns.wait_ready("pod", LIMIT).await.unwrap();
    assert_eq!(secret(&cluster, ns.name()).await.as_deref(), Some("secret"));
    let pods = Path::new(root).join("pods");
    let mounts = cluster.mounts(NODE, &pods).await.unwrap();
    assert_eq!(mounts.len(), 1, "{mounts:?}");

    cluster.driver(NODE).kill().await.unwrap();
    cluster.reboot(NODE).await.unwrap();
    ns.wait_ready("pod", LIMIT).await.unwrap();
    assert_eq!(secret(&cluster, ns.name()).await.as_deref(), Some("secret"));

    ns.delete_pod("pod").await.unwrap();
    ns.wait_gone("pod", LIMIT).await.unwrap();
    // kubelet takes volumes down after the pod's object has gone.
    eventually("record and mount are gone", async || {
        let files = cluster.exec(NODE, &["find", root, "-type", "f"]).await;
        let mounts = cluster.mounts(NODE, &pods).await;
        // `find` fails if a directory goes while it looks.
        files.is_ok_and(|files| !files.contains("/records/"))
            && mounts.is_ok_and(|mounts| mounts.is_empty())
    })
    .await;
    assert!(
        cluster
            .exec(NODE, &["test", "-e", embedded::KUBELET_ROOT])
            .await
            .is_err(),
        "somebody made {}",
        embedded::KUBELET_ROOT
    );
}
