//! Rollouts, which need Kubernetes' own controllers: a new driver under running pods, and a
//! StatefulSet's pod that moves.

use e2e::cluster::Cluster as _;
use k8s_openapi::api::{
    apps::v1::DaemonSet,
    core::v1::{Node, Pod},
};
use kube::{
    ResourceExt,
    api::{Api, ListParams, Patch, PatchParams},
};
use serde_json::json;

use crate::{
    harness::{SOON, Scenario, scenario, until},
    objects::{MOUNT, class, pod, stateful_set},
    settings::Need,
};

const OBJECT: &str = "- {objectName: password, content: hunter2}";

/// Returns the UIDs of the driver's pods.
async fn drivers(s: &Scenario) -> Vec<String> {
    let pods = Api::<Pod>::namespaced(s.cluster.client(), "kube-system");
    let driver = ListParams::default().labels("app=csi-secrets-store");
    let mut uids: Vec<_> = pods
        .list(&driver)
        .await
        .unwrap()
        .iter()
        .filter_map(ResourceExt::uid)
        .collect();
    uids.sort();
    uids
}

/// Replaces the driver's pods one after the other, as an upgrade does.
async fn roll_out(s: &Scenario) {
    let before = drivers(s).await;
    let sets = Api::<DaemonSet>::namespaced(s.cluster.client(), "kube-system");
    let annotations = json!({"e2e/for": s.namespace.name()});
    let patch = json!({"spec": {"template": {"metadata": {"annotations": annotations}}}});
    sets.patch(
        "csi-secrets-store",
        &PatchParams::default(),
        &Patch::Merge(patch),
    )
    .await
    .unwrap();
    until("every driver is a new one", async || {
        let set = sets.get("csi-secrets-store").await.unwrap();
        let status = set.status.unwrap_or_default();
        let now = drivers(s).await;
        status.observed_generation == set.metadata.generation
            && status.updated_number_scheduled == Some(status.desired_number_scheduled)
            && status.number_available == Some(status.desired_number_scheduled)
            && now.len() == before.len()
            && now.iter().all(|uid| !before.contains(uid))
    })
    .await;
}

/// Running pods keep their volumes in the same mounts, the provider is not asked again, and the new
/// driver takes the volumes down.
#[tokio::test]
async fn a_new_driver_under_running_pods() {
    let s = scenario!([Need::Controllers, Need::Republish]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let (before, mounts) = (s.state("web").await, s.mounts().await);
    roll_out(&s).await;
    s.apply(pod("later", &["db"])).await;
    s.ready("later").await;
    let later = s.reads("later", MOUNT).await;
    assert_eq!(later.texts()["password"], "hunter2");
    s.delete("later").await;
    s.pod_statuses_left(1).await;
    // kubelet publishes the volumes again in this time.
    tokio::time::sleep(std::time::Duration::from_secs(3)).await;
    assert_eq!(s.state("web").await, before);
    assert_eq!(s.mounts().await, mounts, "the very same mount");
    assert_eq!(s.provider_calls("web").await, 1);
    s.delete("web").await;
    // The new driver's own pod is not a leftover.
    s.nothing_of_the_driver_is_left().await;
    s.no_pod_statuses().await;
}

/// The pod keeps its name and changes its node: the pod status follows it, and nothing is left on
/// the old node.
#[tokio::test]
async fn a_stateful_sets_pod_moves() {
    let s = scenario!([Need::Controllers, Need::Nodes(2)]);
    let nodes = s.cluster.nodes();
    let api = Api::<Node>::all(s.cluster.client());
    s.apply(class("db", OBJECT)).await;
    s.apply(stateful_set("web", &pod("web", &["db"]))).await;
    let mut statuses = Vec::new();
    // Only one node at a time is open to the scheduler.
    for (from, to) in [(None, 0), (Some(0), 1), (Some(1), 0)] {
        if let Some(from) = from {
            api.uncordon(&nodes[to]).await.unwrap();
            api.cordon(&nodes[from]).await.unwrap();
            let before = s.namespace.pod("web-0").await.unwrap().unwrap();
            s.namespace.delete_pod("web-0").await.unwrap();
            until("the pod is another", async || {
                let now = s.namespace.pod("web-0").await.unwrap();
                now.is_some_and(|now| now.uid() != before.uid())
            })
            .await;
        }
        s.ready("web-0").await;
        let pod = s.namespace.wait_ready("web-0", SOON).await;
        let node = pod.unwrap().spec.unwrap().node_name.unwrap();
        assert_eq!(node, nodes[to]);
        let tree = s.reads("web-0", MOUNT).await;
        assert_eq!(tree.texts()["password"], "hunter2");
        if let Some(from) = from {
            s.nothing_is_left_on(&nodes[from]).await;
        }
        until("one pod status is of this node", async || {
            let objects = s.pod_status_objects().await;
            let label = "internal.secrets-store.csi.k8s.io/node-name";
            objects.len() == 1 && objects[0].labels().get(label) == Some(&node)
        })
        .await;
        statuses.push(s.pod_statuses().await);
    }
    // On the first node again, the pod status is the same again.
    assert_eq!(statuses[0], statuses[2]);
    assert_ne!(statuses[0], statuses[1]);
}
