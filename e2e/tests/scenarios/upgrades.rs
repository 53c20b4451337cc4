//! Upgrades to this driver under running pods, from an earlier state of this repository and from
//! the existing driver. A pod's files, mounts and statuses must not change.

use std::time::Duration;

use e2e::{cluster::Cluster as _, images, install::Installation, previous};
use k8s_openapi::api::core::v1::Secret;
use kube::ResourceExt;

use crate::{
    harness::{Scenario, scenario, until},
    objects::{Class, MOUNT, SecretObject, class, pod},
    settings::Need,
};

/// Objects with modes: the existing driver makes a file without a mode unreadable.
const OBJECTS: &str = "\
- {objectName: password, content: hunter2, mode: \"0644\", version: \"3\"}
- {objectName: tls/key, content: \"-----BEGIN\", mode: \"0400\", version: \"1\"}";

/// The time in which kubelet publishes every volume again.
const A_FEW_LOOKS: Duration = Duration::from_secs(3);

/// Returns a class that declares a Secret, too.
fn syncing_class() -> Class {
    class("db", OBJECTS).secret_objects([SecretObject::new("db", &[("password", "password")])])
}

/// Returns the mount paths of the pod's two volumes.
fn volumes() -> [String; 2] {
    [MOUNT.to_owned(), format!("{MOUNT}-1")]
}

/// Returns everything that must not change: files, mounts, pod statuses and their UIDs.
async fn everything(s: &Scenario) -> (Vec<e2e::tree::Tree>, Vec<String>, String, Vec<String>) {
    let mut trees = Vec::new();
    for path in volumes() {
        trees.push(s.reads("web", &path).await);
    }
    let mut uids: Vec<_> = s
        .pod_status_objects()
        .await
        .iter()
        .filter_map(ResourceExt::uid)
        .collect();
    uids.sort();
    (trees, s.mounts().await, s.pod_statuses().await, uids)
}

/// Returns the Secret's UID and content.
async fn secret(s: &Scenario) -> Option<(Option<String>, String)> {
    let secrets = s.namespace.api::<Secret>();
    let secret = secrets.get_opt("db").await.unwrap()?;
    let data = secret.data.as_ref().unwrap()["password"].0.clone();
    Some((secret.uid(), String::from_utf8(data).unwrap()))
}

/// Runs a pod with two volumes under the installation `before`, installs this driver over it, and
/// checks the pod until it is gone. `syncs` says whether the earlier driver makes the Secret, too;
/// `calls` is the number of the provider's calls for the pod.
async fn replace(s: &Scenario, before: &Installation, syncs: bool, calls: u64) {
    s.cluster.install(before).await;
    s.apply(syncing_class()).await;
    s.apply(class("tls", OBJECTS)).await;
    s.apply(pod("web", &["db", "tls"])).await;
    s.ready("web").await;
    if syncs {
        until("the Secret is there", async || secret(s).await.is_some()).await;
    }
    let synced = secret(s).await;
    let mut earlier = everything(s).await;
    assert_eq!(earlier.0[0].texts()["password"], "hunter2");
    assert_eq!((earlier.1.len(), earlier.3.len()), (2, 2));

    s.cluster.install_standard().await;
    until("the new driver has a record of each volume", async || {
        s.records().await.len() == 2
    })
    .await;
    tokio::time::sleep(A_FEW_LOOKS).await;
    let mut now = everything(s).await;
    // The mounts are the same; their limits are those of the new driver.
    for lines in [&mut now.1, &mut earlier.1] {
        for line in lines {
            let mount = line.split_once(" - ").map(|(mount, _)| mount.to_owned());
            *line = mount.unwrap();
        }
    }
    assert_eq!(now, earlier);
    if synced.is_some() {
        assert_eq!(secret(s).await, synced);
    }
    // Both volumes belong to this pod.
    assert_eq!(s.provider_calls("web").await, calls);

    s.apply(pod("later", &["db"])).await;
    s.ready("later").await;
    let later = s.reads("later", MOUNT).await;
    assert_eq!(later.texts()["password"], "hunter2");
    s.delete("later").await;
    s.delete("web").await;
    // The new driver's own pod is not a leftover.
    s.nothing_of_the_driver_is_left().await;
    s.no_pod_statuses().await;
    until("the Secret went with the pod", async || {
        secret(s).await.is_none()
    })
    .await;
    let log = s.cluster.driver(&s.node()).log().await.unwrap();
    assert_eq!(log.matches("unpublished").count(), 3, "{log}");
}

#[tokio::test]
async fn from_an_earlier_commit() {
    let s = scenario!([Need::PreviousCommit, Need::Controllers, Need::Republish]);
    let reference = previous::reference().unwrap();
    let before = tokio::task::spawn_blocking(move || previous::commit(&reference));
    let before = before
        .await
        .unwrap()
        .unwrap_or_else(|error| panic!("{error}"));
    replace(&s, &before, false, 2).await;
}

/// It leaves no records: the content is written again, in the same mounts.
#[tokio::test]
async fn from_the_existing_driver() {
    let s = scenario!([Need::ExistingDriver, Need::Controllers, Need::Republish]);
    let images = tokio::task::spawn_blocking(|| images::build(|_| {}));
    let probe = images.await.unwrap().unwrap().probe;
    let driver = previous::upstream_driver();
    let before = previous::upstream(&driver, &probe).unwrap_or_else(|error| panic!("{error}"));
    replace(&s, &before, true, 4).await;
}
