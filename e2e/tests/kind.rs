//! The kind cluster: one test of the whole `Cluster` interface, where `E2E_CLUSTER` is `kind`. The
//! scenarios are in `scenarios/`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::Path;
use std::time::Duration;

use e2e::cluster::Cluster;
use e2e::install::Form;
use e2e::kind::{Load, Options, Running};
use e2e::namespace::Namespace;
use e2e::tree::View;

const LIMIT: Duration = Duration::from_secs(60);
const PODS: &str = "/var/lib/kubelet/pods";

const CLASS: &str = include_str!("manifests/class.yaml");
const POD: &str = include_str!("manifests/pod.yaml");

#[tokio::test]
async fn what_the_interface_promises() {
    if std::env::var("E2E_CLUSTER").as_deref() != Ok("kind") {
        return e2e::skipped::skip("E2E_CLUSTER is not kind");
    }
    let options = Options::from_env().unwrap();
    let images = tokio::task::spawn_blocking(|| e2e::images::build(|_| {}));
    let load = Load::standard(&images.await.unwrap().unwrap(), &Form::from_env()).unwrap();
    let started = std::time::Instant::now();
    let running = Running::start(options, &load, |step| eprintln!("{step}"))
        .await
        .unwrap_or_else(|error| panic!("{error}"));
    let cluster = running.connect().await.unwrap();
    eprintln!("started after {:?}", started.elapsed());
    let node = cluster.nodes().remove(0);
    let namespace = Namespace::create(&cluster).await.unwrap();
    namespace.apply(CLASS).await.unwrap();
    namespace.apply(POD).await.unwrap();
    let pod = namespace.wait_ready("pod", LIMIT).await.unwrap();
    assert_eq!(pod.spec.unwrap().node_name.as_deref(), Some(node.as_str()));

    let path = "/mnt/secrets-store";
    let tree = cluster
        .tree(namespace.name(), "pod", path, View::Reader)
        .await;
    assert_eq!(tree.unwrap().texts()["foo"], "secret");
    let uid = pod.metadata.uid.clone().unwrap();
    let below = Path::new(PODS).join(&uid).join("volumes/kubernetes.io~csi");
    assert_eq!(
        cluster.mounts(&node, &below).await.unwrap(),
        [below.join("secrets/mount")]
    );
    let on_node = cluster.node_tree(&node, &below.join("secrets/mount")).await;
    let on_node = on_node.unwrap().unwrap();
    assert!(
        on_node
            .texts()
            .iter()
            .any(|(path, text)| path.ends_with("/foo") && *text == "secret")
    );
    let absent = cluster.node_tree(&node, "/no/such".as_ref()).await;
    assert_eq!(absent.unwrap(), None);

    let driver = cluster.driver(&node);
    assert!(
        driver
            .metrics()
            .await
            .unwrap()
            .contains("node_publish_total")
    );
    let provider = cluster.provider(&node, "fake-provider");
    assert_eq!(provider.get(8080, "/calls").await.unwrap().status, 200);
    assert_eq!(provider.get(8080, "/no-such").await.unwrap().status, 404);
    for _ in 0..3 {
        driver.kill().await.unwrap();
    }
    assert!(driver.log().await.unwrap().contains("listening"));
    provider.kill().await.unwrap();

    let started = std::time::Instant::now();
    cluster.reboot(&node).await.unwrap();
    eprintln!("rebooted after {:?}", started.elapsed());
    namespace.wait_ready("pod", LIMIT).await.unwrap();
    let tree = cluster
        .tree(namespace.name(), "pod", path, View::Reader)
        .await;
    assert_eq!(tree.unwrap().texts()["foo"], "secret");
    namespace.delete_pod("pod").await.unwrap();
    namespace.wait_gone("pod", LIMIT).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    running.keep_logs(dir.path()).await.unwrap();
    assert!(dir.path().join("objects.yaml").is_file());
    running.stop().await.unwrap();
}
