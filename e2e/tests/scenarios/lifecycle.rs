//! Pods that are deleted, come back, and move.

use std::time::Duration;

use e2e::cluster::Cluster as _;
use serde_json::json;

use crate::{
    harness::{Scenario, scenario},
    objects::{MOUNT, class, pod},
    settings::Need,
};

const OBJECT: &str = "- {objectName: password, content: hunter2}";

#[tokio::test]
async fn a_deleted_pod_leaves_nothing() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    insta::assert_snapshot!("a_running_pod_on_its_node", s.leftovers(&s.node()).await);
    let pod = s.namespace.pod("web").await.unwrap().unwrap();
    s.delete("web").await;
    s.nothing_is_left().await;
    s.no_pod_statuses().await;
    let log = s.cluster.driver(&s.node()).log().await.unwrap();
    // On a shared cluster, the driver may still unpublish a volume of an earlier scenario.
    let of_this_pod = format!("/pods/{}/", pod.metadata.uid.unwrap());
    let unpublished = |line: &&str| line.contains("\"unpublished\"") && line.contains(&of_this_pod);
    assert_eq!(log.lines().filter(unpublished).count(), 1, "{log}");
    let counted = s.metric("node_unpublish_total", &[]).await;
    assert!(counted >= 1.0);
    if s.cluster.name() == "embedded" {
        assert_eq!(counted, 1.0, "the driver is this scenario's own");
    }
    assert!(log.lines().all(|line| !line.starts_with('E')), "{log}");
}

/// Unpublish needs neither the provider nor the API server.
#[tokio::test]
async fn unpublish_needs_nobody() {
    let s = scenario!([Need::DisturbApi]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    s.cluster
        .provider(&s.node(), "fake-provider")
        .stop()
        .await
        .unwrap();
    s.cluster
        .disturb_api(embedded::api::Disturbance::Refuse)
        .await
        .unwrap();
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// A hung provider delays the deletion of a pod until kubelet's deadline at most.
#[tokio::test]
async fn a_pod_deleted_while_its_publish_hangs() {
    let s = scenario!([Need::CsiTimeout(Duration::from_secs(5))]);
    s.apply(class("db", OBJECT).faults("- {hang: true}")).await;
    s.apply(pod("web", &["db"])).await;
    s.provider_is_called("web").await;
    s.namespace.delete_pod("web").await.unwrap();
    s.gone("web").await;
    s.nothing_is_left().await;
    assert!(s.pod_status_objects().await.is_empty());
}

/// A StatefulSet's pod comes back on another node, as another pod with the same name.
#[tokio::test]
async fn the_same_pod_name_on_another_node() {
    let s = scenario!([Need::Nodes(2)]);
    s.apply(class("db", OBJECT)).await;
    let nodes = s.cluster.nodes();
    s.apply(pod("web-0", &["db"]).on_node(&nodes[0])).await;
    s.ready("web-0").await;
    let before = s.pod_statuses().await;
    s.delete("web-0").await;
    s.apply(pod("web-0", &["db"]).on_node(&nodes[1])).await;
    s.ready("web-0").await;
    insta::assert_snapshot!(before + &s.pod_statuses().await);
    s.nothing_is_left_on(&nodes[0]).await;
}

/// The pod status of an earlier pod with that name on another node is taken over; labels that
/// others have set stay.
#[tokio::test]
async fn a_pod_status_that_another_node_left_is_taken_over() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT)).await;
    let labels = json!({
        "internal.secrets-store.csi.k8s.io/node-name": "another-node",
        "team": "shop",
    });
    let target = "/var/lib/kubelet/pods/00000000-0000-0000-0000-000000000000/volumes/kubernetes.io~csi/secrets/mount";
    s.apply(json!({
        "apiVersion": "secrets-store.csi.x-k8s.io/v1",
        "kind": "SecretProviderClassPodStatus",
        "metadata": {"name": format!("web-0-{}-db", s.namespace), "labels": labels},
        "status": {
            "podName": "web-0",
            "secretProviderClassName": "db",
            "mounted": true,
            "targetPath": target,
            "objects": [{"id": "secret/gone", "version": "v0"}],
        },
    }))
    .await;
    s.apply(pod("web-0", &["db"])).await;
    s.ready("web-0").await;
    insta::assert_snapshot!(s.pod_statuses().await);
}

/// A name that is too long for the API gets a readable beginning and a hash.
#[tokio::test]
async fn a_name_too_long_for_a_pod_status() {
    let s = Scenario::start().await;
    // kubelet cannot start a pod with a longer name: the name of its log directory consists of
    // namespace, name and UID.
    let (web, db) = (
        format!("web-{}", "w".repeat(150)),
        format!("db-{}", "d".repeat(200)),
    );
    s.apply(class(&db, OBJECT)).await;
    s.apply(pod(&web, &[&db])).await;
    s.ready(&web).await;
    assert_eq!(s.reads(&web, MOUNT).await.texts()["password"], "hunter2");
    let statuses = s.pod_status_objects().await;
    let name = statuses[0].metadata.name.as_deref().unwrap();
    assert!(name.starts_with("web-www") && name.len() == 253, "{name}");
    assert_eq!(statuses[0].data["status"]["podName"], web.as_str());
}
