//! Drivers and nodes that go down at the worst moment. No pod starts with an empty or incomplete
//! volume, and no running pod loses its content.

use std::{os::fd::AsRawFd as _, path::PathBuf, time::Duration};

use e2e::cluster::Cluster as _;
use embedded::api::Disturbance;

use crate::{
    harness::{Scenario, scenario, until},
    objects::{MOUNT, class, pod},
    settings::Need,
};

const OBJECT: &str = "- {objectName: password, content: hunter2}";

#[tokio::test]
async fn killed_between_mount_and_write() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT).faults("- {hang: true, times: 1}"))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.provider_is_called("web").await;
    assert_eq!(s.mounts().await.len(), 1);
    s.cluster.driver(&s.node()).kill().await.unwrap();
    s.ready("web").await;
    insta::assert_snapshot!(s.state("web").await);
    assert_eq!(
        s.mounts().await.len(),
        1,
        "the mount was filled, not covered"
    );
}

#[tokio::test]
async fn killed_between_write_and_status() {
    let s = scenario!([Need::DisturbApi]);
    s.apply(class("db", OBJECT)).await;
    // Each answer takes long enough for the driver to be killed while it waits for the pod status.
    s.cluster
        .disturb_api(Disturbance::Slow(Duration::from_secs(4)))
        .await
        .unwrap();
    s.apply(pod("web", &["db"])).await;
    until("the files are written", async || s.written().await).await;
    assert!(s.pod_status_objects().await.is_empty() && s.records().await.is_empty());
    s.cluster.driver(&s.node()).kill().await.unwrap();
    s.cluster.disturb_api(Disturbance::None).await.unwrap();
    s.ready("web").await;
    insta::assert_snapshot!(s.state("web").await);
    assert_eq!(s.mounts().await.len(), 1);
}

#[tokio::test]
async fn killed_after_everything() {
    let s = scenario!([Need::Republish]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.state("web").await;
    s.cluster.driver(&s.node()).kill().await.unwrap();
    // kubelet publishes the volume again more than once in this time.
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(s.state("web").await, before);
    assert_eq!(
        s.provider_calls("web").await,
        1,
        "a published volume asks nobody"
    );
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// On SIGTERM, as in a rollout of the DaemonSet, the driver answers the running call first.
#[tokio::test]
async fn stopped_while_a_publish_runs() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT).faults("- {delay: 2s}")).await;
    s.apply(pod("web", &["db"])).await;
    s.provider_is_called("web").await;
    s.cluster.driver(&s.node()).stop().await.unwrap();
    assert_eq!(s.records().await.len(), 1, "the publish was finished");
    s.cluster.driver(&s.node()).start().await.unwrap();
    s.ready("web").await;
    assert_eq!(s.provider_calls("web").await, 1);
    s.delete("web").await;
    // On a real cluster, the driver has a new pod now, whose directory stays.
    until("the volume is gone", async || {
        s.mounts().await.is_empty() && s.records().await.is_empty()
    })
    .await;
}

/// A failed write of the pod status undoes the mount.
#[tokio::test]
async fn an_api_server_that_does_not_take_the_status() {
    let s = scenario!([Need::DisturbApi]);
    s.apply(class("db", OBJECT)).await;
    let refused = Disturbance::Fail {
        status: 500,
        verb: Some("create".to_owned()),
        resource: Some("secretproviderclasspodstatuses".to_owned()),
        times: u32::MAX,
    };
    s.cluster.disturb_api(refused).await.unwrap();
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(s.failed_mount("web", "rpc error").await);
    assert!(s.mounts().await.is_empty());
    s.cluster.disturb_api(Disturbance::None).await.unwrap();
    s.ready("web").await;
}

/// CSI and registration work without the API server; the error of a publish names what is missing.
#[tokio::test]
async fn an_api_server_that_is_away() {
    let s = scenario!([Need::DisturbApi]);
    s.apply(class("db", OBJECT)).await;
    s.cluster.disturb_api(Disturbance::Refuse).await.unwrap();
    s.cluster.driver(&s.node()).kill().await.unwrap();
    s.apply(pod("web", &["db"])).await;
    let event = s
        .failed_mount("web", "failed to get secretproviderclass")
        .await;
    assert!(
        event.contains("code = Unavailable") && event.contains("the API server did not answer"),
        "{event}"
    );
    s.cluster.disturb_api(Disturbance::None).await.unwrap();
    s.ready("web").await;
}

/// After a reboot, the tmpfs is gone, while directories and records still exist: the volume is
/// published again.
#[tokio::test]
async fn a_node_that_reboots() {
    let s = scenario!([Need::Reboot]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.state("web").await;
    let calls = s.provider_calls("web").await;
    s.cluster.reboot(&s.node()).await.unwrap();
    until("the volume is mounted again", async || {
        s.mounts().await.len() == 1 && s.written().await
    })
    .await;
    assert_eq!(s.state("web").await, before);
    assert_eq!(
        (calls, s.provider_calls("web").await),
        (1, 1),
        "the provider was restarted and asked once more"
    );
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// A pod that is deleted while its node is down is torn down from the files on disk.
#[tokio::test]
async fn unpublish_after_a_reboot() {
    let s = scenario!([Need::Reboot]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    s.cluster
        .provider(&s.node(), "fake-provider")
        .stop()
        .await
        .unwrap();
    s.namespace.delete_pod("web").await.unwrap();
    s.cluster.reboot(&s.node()).await.unwrap();
    s.gone("web").await;
    s.nothing_is_left().await;
}

/// A volume of an earlier driver has a mount and no record. The driver takes it over in the same
/// mount, because the running container holds that.
#[tokio::test]
async fn a_volume_of_an_earlier_driver() {
    let s = scenario!([Need::Republish]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.state("web").await;
    let held = s.hold_volume().await;
    s.forget_records().await;
    until("the volume is recorded", async || {
        s.records().await.len() == 1
    })
    .await;
    assert_eq!(s.state("web").await, before);
    // A container reads its volume through the mount that it holds, not through the path. On
    // clusters where this process cannot hold it, the comparison above reads in the pod's
    // container.
    if let Some(held) = &held {
        let through = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
        let text = std::fs::read_to_string(through.join("password"));
        assert_eq!(text.unwrap(), "hunter2");
    }
    assert_eq!(s.mounts().await.len(), 1);
    drop(held);
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// If the class is gone, too, the content stays, and the error is not final, so that kubelet keeps
/// the volume.
#[tokio::test]
async fn a_volume_of_an_earlier_driver_whose_class_is_gone() {
    let s = scenario!([Need::Republish]);
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let before = s.volume("web", MOUNT).await;
    s.delete_class("db").await;
    s.forget_records().await;
    let event = s
        .failed_mount("web", "failed to get secretproviderclass")
        .await;
    assert!(
        event.contains("code = Unavailable"),
        "not final, so that kubelet cleans nothing away: {event}"
    );
    assert_eq!(s.volume("web", MOUNT).await, before);
    s.delete("web").await;
    s.nothing_is_left().await;
}

/// After a restart, kubelet finds the driver and its volumes again.
#[tokio::test]
async fn a_kubelet_that_restarts() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    let (before, mounts) = (s.state("web").await, s.mounts().await);
    s.cluster.restart_kubelet().await;
    s.apply(pod("later", &["db"])).await;
    s.ready("later").await;
    s.delete("later").await;
    s.pod_statuses_left(1).await;
    assert_eq!(s.state("web").await, before);
    s.delete("web").await;
    s.nothing_is_left().await;
    assert_eq!(mounts.len(), 1);
}

/// The driver registers itself again after kubelet's directory of plugins was emptied, which the
/// registrar of Kubernetes does not notice.
#[tokio::test]
async fn a_wiped_plugin_directory() {
    let s = scenario!([Need::OwnRegistration]);
    s.apply(class("db", OBJECT)).await;
    let directory = "/var/lib/kubelet/plugins_registry";
    let sockets = s.files(directory).await;
    assert_eq!(sockets.len(), 1);
    for socket in sockets {
        s.cluster.remove_file(&s.node(), &socket).await;
    }
    until("the driver offers itself again", async || {
        s.files(directory).await.len() == 1
    })
    .await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    assert_eq!(s.reads("web", MOUNT).await.texts()["password"], "hunter2");
}
