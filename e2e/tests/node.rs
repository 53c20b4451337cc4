//! The node of the embedded cluster: namespaces, paths, processes, reboot. A shell script stands in
//! for the driver.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use e2e::binaries::Binaries;
use e2e::cluster::{Action, Cluster, Component, wait_until};
use e2e::embedded::{Embedded, bare};
use e2e::namespace::Namespace;
use embedded::Status;

const NODE: &str = "node-1";
const LIMIT: Duration = Duration::from_secs(20);

const SCRIPT: &str = r#"#!/bin/sh
set -e
trap 'echo stopped; exit 0' TERM
echo "$KUBE_NODE_NAME: $*"
echo boot >> /csi/boots
cat /var/run/secrets/kubernetes.io/serviceaccount/namespace; echo
echo tmp > /run/only-this-boot
target=/var/lib/kubelet/pods/uid/mount
mkdir -p $target
grep -q " $target " /proc/self/mountinfo || mount -t tmpfs -o mode=0755 none $target
printf secret > $target/file
echo up
while :; do sleep 0.05; done
"#;

const MANIFEST: &str = r"
apiVersion: v1
kind: ServiceAccount
metadata: {name: script, namespace: kube-system}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: script, namespace: kube-system}
spec:
  selector: {matchLabels: {app: script}}
  template:
    metadata: {labels: {app: script}}
    spec:
      serviceAccountName: script
      containers:
      - name: secrets-store
        image: secrets-store-csi:e2e
        args: ['--nodeid=$(KUBE_NODE_NAME)']
        env:
        - name: KUBE_NODE_NAME
          valueFrom: {fieldRef: {fieldPath: spec.nodeName}}
        volumeMounts:
        - {name: plugin-dir, mountPath: /csi}
        - {name: pods, mountPath: /var/lib/kubelet/pods, mountPropagation: Bidirectional}
      volumes:
      - {name: plugin-dir, hostPath: {path: /var/lib/kubelet/plugins/csi-secrets-store/}}
      - {name: pods, hostPath: {path: /var/lib/kubelet/pods}}
";

fn executable(dir: &Path, name: &str, text: &str) -> PathBuf {
    let path = dir.join(name);
    fs::write(&path, text).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    path
}

async fn eventually(what: &str, check: impl AsyncFn() -> bool) {
    wait_until(what, LIMIT, check).await.unwrap();
}

async fn boots(cluster: &Embedded) -> usize {
    let dir = Path::new("/var/lib/kubelet/plugins/csi-secrets-store");
    let tree = cluster
        .node_tree(NODE, dir)
        .await
        .unwrap()
        .unwrap_or_default();
    tree.texts()
        .get("boots")
        .map_or(0, |text| text.lines().count())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_a_world_of_its_own_that_survives_a_reboot() {
    let scripts = tempfile::tempdir().unwrap();
    let binaries = Binaries {
        driver: executable(scripts.path(), "driver", SCRIPT),
        fake_provider: executable(scripts.path(), "provider", "#!/bin/sh\nexit 1\n"),
        probe: env!("CARGO_BIN_EXE_probe").into(),
        e2e: env!("CARGO_BIN_EXE_e2e").into(),
    };
    let cluster = Embedded::start(bare(&binaries)).await.unwrap();
    Namespace::of(cluster.client(), "default")
        .apply(MANIFEST)
        .await
        .unwrap();
    let pods = Path::new("/var/lib/kubelet/pods");
    let target = pods.join("uid/mount");
    let up = async || {
        cluster
            .driver(NODE)
            .log()
            .await
            .is_ok_and(|log| log.ends_with("up\n"))
    };
    eventually("the script runs", up).await;

    // Mounts of the container reach the node, and its files are on the node's disk.
    assert_eq!(
        cluster.mounts(NODE, pods).await.unwrap(),
        std::slice::from_ref(&target)
    );
    let tree = cluster.node_tree(NODE, &target).await.unwrap().unwrap();
    assert_eq!(tree.texts(), BTreeMap::from([("file", "secret")]));
    assert_eq!(tree.get(".").unwrap().mode, "0755");
    assert!(
        !Path::new("/var/lib/kubelet/pods/uid").exists(),
        "nothing of it on the host"
    );
    let log = cluster.driver(NODE).log().await.unwrap();
    assert_eq!(log, "node-1: --nodeid=node-1\nkube-system\nup\n");

    // The node has a loopback only, on which no process of the host listens.
    let net = cluster
        .node_tree(NODE, Path::new("/proc/net/dev"))
        .await
        .unwrap()
        .unwrap();
    let table = net.texts()["."];
    let interfaces: Vec<_> = table
        .lines()
        .filter_map(|line| Some(line.split_once(':')?.0.trim()))
        .collect();
    assert_eq!(interfaces, ["lo"]);
    let error = cluster.driver(NODE).metrics().await.unwrap_err();
    assert!(error.to_string().contains("refused"), "{error}");

    cluster.driver(NODE).kill().await.unwrap();
    eventually("it is restarted", async || boots(&cluster).await == 2).await;
    eventually("it runs again", async || {
        matches!(
            &cluster.containers(NODE).await.unwrap()[..],
            [Status {
                pid: Some(_),
                restarts: 1,
                ..
            }]
        )
    })
    .await;

    eventually("it runs", up).await;
    cluster
        .act(NODE, &Component::Driver, Action::Stop)
        .await
        .unwrap();
    assert!(
        cluster
            .driver(NODE)
            .log()
            .await
            .unwrap()
            .ends_with("stopped\n")
    );
    assert_eq!(cluster.containers(NODE).await.unwrap()[0].pid, None);
    // A mount outlives the process that has made it.
    assert_eq!(
        cluster.mounts(NODE, pods).await.unwrap(),
        std::slice::from_ref(&target)
    );
    cluster.driver(NODE).start().await.unwrap();
    eventually("it runs", up).await;

    let before = boots(&cluster).await;
    cluster.driver(NODE).stop().await.unwrap();
    cluster.reboot(NODE).await.unwrap();
    eventually("it runs after the reboot", async || {
        boots(&cluster).await == before + 1
    })
    .await;
    let run = Path::new("/run/only-this-boot");
    eventually("it has written to /run", async || {
        cluster.node_tree(NODE, run).await.unwrap().is_some()
    })
    .await;
    eventually("it has mounted again", async || {
        cluster.mounts(NODE, pods).await.unwrap() == std::slice::from_ref(&target)
    })
    .await;
}
