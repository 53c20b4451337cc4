//! The images in Docker: the containers of the driver and the fake provider share directories as on
//! a node, and the tests act as kubelet. They check what only containers have: an empty, read-only
//! root file system, few capabilities, mounts that reach the host, and signals to process 1. All
//! else is in the scenarios.

#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "all of this is a test"
)]

mod docker;
mod node;

use proto::csi::{GetPluginInfoRequest, NodeUnpublishVolumeRequest, ProbeRequest};
use tonic::Code;

use docker::on_docker;
use node::{DRIVER_NAME, Node, until};

#[test]
fn a_volume_is_published_to_the_host_and_taken_down_again() {
    on_docker(async || {
        let node = Node::new().await;
        let provider = node.provider().await;
        let driver = node.driver().await;
        let mut identity = driver.identity().await;
        let info = identity.get_plugin_info(GetPluginInfoRequest {}).await;
        assert_eq!(info.unwrap().into_inner().name, DRIVER_NAME);
        assert_eq!(driver.get("healthz").await, (200, "ok".to_owned()));

        let volume = node.volume("web", "").await;
        driver.publish(&volume).await.unwrap();
        assert!(volume.is_mounted(), "the mount stayed in the container");
        assert_eq!(volume.read("foo"), "secret");
        driver.publish(&volume).await.unwrap();
        assert_eq!(volume.read("foo"), "secret");

        driver.unpublish(&volume).await.unwrap();
        assert!(!volume.is_mounted());
        assert!(!volume.path().exists());
        driver.unpublish(&volume).await.unwrap();

        let (status, metrics) = driver.get("metrics").await;
        assert_eq!(status, 200);
        assert_eq!(
            metric(&metrics, "node_publish_total", "provider=\"fake\""),
            1
        );
        assert_eq!(metric(&metrics, "node_unpublish_total", ""), 2);

        let socket = node.provider_socket();
        assert!(socket.exists());
        assert_eq!(provider.stop().await, Some(0));
        assert!(!socket.exists(), "the provider left its socket");
    });
}

#[test]
fn without_an_api_server_only_a_publish_fails_and_says_why() {
    on_docker(async || {
        let node = Node::new().await;
        let driver = node.driver_without_api_server().await;
        let mut identity = driver.identity().await;
        let ready = identity.probe(ProbeRequest {}).await.unwrap().into_inner();
        assert_eq!(ready.ready, Some(true));

        let volume = node.volume("web", "").await;
        let error = driver.publish(&volume).await.unwrap_err();
        assert_eq!(error.code(), Code::Unavailable, "{error:?}");
        let text = error.message();
        assert!(
            text.starts_with(
                "failed to get secretproviderclass default/web: cannot connect to the API server: "
            ),
            "{text}"
        );
        assert!(
            text.ends_with("run in a cluster with a service account token, or give --kubeconfig"),
            "{text}"
        );
        assert!(!volume.is_mounted());
        driver.unpublish(&volume).await.unwrap();
    });
}

#[test]
fn a_provider_that_arrives_later_is_found() {
    on_docker(async || {
        let node = Node::new().await;
        let driver = node.driver().await;
        let volume = node.volume("web", "").await;
        let error = driver.publish(&volume).await.unwrap_err();
        assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
        let text = error.message();
        assert!(
            text.contains("provider \"fake\" has no socket fake.sock in "),
            "{text}"
        );
        assert!(!volume.is_mounted());
        assert!(!volume.path().exists(), "a failed publish left a directory");

        let _provider = node.provider().await;
        driver.publish(&volume).await.unwrap();
        assert_eq!(volume.read("foo"), "secret");
        driver.unpublish(&volume).await.unwrap();
    });
}

#[test]
fn sigterm_lets_a_running_publish_finish() {
    on_docker(async || {
        let node = Node::new().await;
        let _provider = node.provider().await;
        let driver = node.driver().await;
        let volume = node.volume("web", "[{delay: 3s}]").await;
        let running = tokio::spawn({
            let (node, request) = (driver.csi().await, volume.publish_request());
            async move { { node }.node_publish_volume(request).await }
        });
        // The driver mounts before it asks the provider, which answers after three seconds.
        until("the mount", || volume.is_mounted()).await;
        assert_eq!(driver.stop().await, Some(0));
        running.await.unwrap().unwrap();
        assert_eq!(volume.read("foo"), "secret");
        assert!(!node.csi_socket().exists(), "the driver left its socket");
    });
}

#[test]
fn a_killed_driver_finds_its_mounts_again() {
    on_docker(async || {
        let node = Node::new().await;
        let _provider = node.provider().await;
        let driver = node.driver().await;
        let done = node.volume("done", "").await;
        driver.publish(&done).await.unwrap();
        let half = node.volume("half", "[{times: 1, hang: true}]").await;
        let mut csi = driver.csi().await;
        let request = half.publish_request();
        let cut_off = tokio::spawn(async move { csi.node_publish_volume(request).await });
        until("the mount", || half.is_mounted()).await;
        let mounts = [done.mount_id(), half.mount_id()];

        driver.kill().await;
        assert!(cut_off.await.unwrap().is_err());
        assert_eq!(done.read("foo"), "secret", "a pod lost its content");
        driver.start_again().await;

        driver.publish(&done).await.unwrap();
        driver.publish(&half).await.unwrap();
        assert_eq!(half.read("foo"), "secret");
        assert_eq!(
            mounts,
            [done.mount_id(), half.mount_id()],
            "a container that holds a mount would not see what is in another one"
        );
        // The record outlived the process: the complete volume was not fetched again.
        let (_, metrics) = driver.get("metrics").await;
        assert_eq!(
            metric(&metrics, "node_publish_total", "provider=\"fake\""),
            1
        );

        for volume in [&done, &half] {
            driver.unpublish(volume).await.unwrap();
            assert!(!volume.is_mounted());
        }
    });
}

#[test]
fn a_target_path_outside_of_the_kubelets_pods_is_refused() {
    on_docker(async || {
        let node = Node::new().await;
        let driver = node.driver().await;
        let request = NodeUnpublishVolumeRequest {
            volume_id: "csi-1".to_owned(),
            target_path: "/csi".to_owned(),
        };
        let answer = driver.csi().await.node_unpublish_volume(request).await;
        assert_eq!(answer.unwrap_err().code(), Code::InvalidArgument);
        assert!(node.csi_socket().exists());
    });
}

/// Returns the value of a counter's series that has a label; of the first, if the label is empty.
fn metric(page: &str, name: &str, label: &str) -> u64 {
    let line = page
        .lines()
        .find(|line| line.starts_with(&format!("{name}{{")) && line.contains(label))
        .unwrap_or_else(|| panic!("no {name} with {label} in\n{page}"));
    line.rsplit(' ').next().unwrap().parse().unwrap()
}
