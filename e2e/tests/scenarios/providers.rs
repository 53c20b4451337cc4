//! Providers that are missing, late, wrong or slow.

use std::{path::Path, time::Duration};

use e2e::manifest;
use rstest::rstest;
use serde_json::json;

use crate::{
    harness::{Scenario, scenario},
    objects::{MOUNT, class, pod},
    settings::Need,
};

const OBJECT: &str = "- {objectName: password, content: hunter2}";

#[tokio::test]
async fn an_unknown_provider_that_arrives() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT).provider("late")).await;
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(s.failed_mount("web", "rpc error").await);
    let provider = manifest::parse(include_str!("../../manifests/fake-provider.yaml"));
    let mut late = provider.unwrap().remove(1);
    late["metadata"]["name"] = "late-provider".into();
    let container = &mut late["spec"]["template"]["spec"]["containers"][0];
    container["name"] = "late-provider".into();
    container["args"] = json!(["--endpoint=unix:///provider/late.sock", "--http-addr="]);
    s.apply(late).await;
    s.ready("web").await;
    assert_eq!(s.reads("web", MOUNT).await.texts()["password"], "hunter2");
}

#[tokio::test]
async fn a_name_that_is_no_providers() {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT).provider("../../csi/csi")).await;
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(s.failed_mount("web", "rpc error").await);
}

/// A provider's error reaches kubelet with its code, and the pod starts once the provider works
/// again.
#[rstest]
#[case::not_found("not_found", "- {status: {code: NOT_FOUND, message: no such secret}}")]
#[case::denied(
    "denied",
    "- {status: {code: PERMISSION_DENIED, message: role csi may not read}}"
)]
#[case::exhausted(
    "exhausted",
    "- {status: {code: RESOURCE_EXHAUSTED, message: throttled}}"
)]
#[case::unavailable("unavailable", "- {status: {code: UNAVAILABLE, message: sealed}}")]
#[case::error_code("error_code", "- {errorCode: AuthenticationFailed}")]
#[case::missing_versions("missing_versions", "- {missingVersions: true}")]
#[case::oversize("oversize", "- {oversize: 5000000}")]
#[case::crash("crash", "- {crash: true}")]
#[tokio::test]
async fn provider_errors(#[case] name: &str, #[case] fault: &str) {
    let s = Scenario::start().await;
    s.apply(class("db", OBJECT).faults(fault)).await;
    s.apply(pod("web", &["db"])).await;
    let event = s.failed_mount("web", "rpc error").await;
    // The error of a broken connection depends on the moment.
    insta::with_settings!({filters => vec![(r"attempts \(.*\);", "attempts ([how]);")]}, {
        insta::assert_snapshot!(format!("provider_error_{name}"), event);
    });
    s.nothing_of_the_driver_is_left().await;
    assert!(s.pod_status_objects().await.is_empty());

    s.apply(class("db", OBJECT)).await;
    s.ready("web").await;
    assert_eq!(s.reads("web", MOUNT).await.texts()["password"], "hunter2");
    insta::assert_snapshot!("provider_is_well_again", s.pod_statuses().await);
}

/// The driver retries UNAVAILABLE within the same call, so that the pod does not wait for kubelet.
#[tokio::test]
async fn a_moment_of_unavailability_is_bridged() {
    let s = Scenario::start().await;
    let fault = "- {times: 2, status: {code: UNAVAILABLE, message: restarting}}";
    s.apply(class("db", OBJECT).faults(fault)).await;
    s.apply(pod("web", &["db"])).await;
    s.ready("web").await;
    assert_eq!(s.provider_calls("web").await, 3);
    assert!(
        s.namespace
            .events("web")
            .await
            .unwrap()
            .iter()
            .all(|e| e.reason.as_deref() != Some("FailedMount"))
    );
}

/// A socket that no process listens on fails in seconds, not at kubelet's deadline.
#[tokio::test]
async fn a_dead_socket_fails_in_seconds() {
    let s = Scenario::start().await;
    // The driver searches this directory before the one with the provider's socket.
    let socket = Path::new("/etc/kubernetes/secrets-store-csi-providers/e2e-provider.sock");
    s.cluster.leave_dead_socket(&s.node(), socket).await;
    s.apply(class("db", OBJECT)).await;
    let started = std::time::Instant::now();
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(s.failed_mount("web", "rpc error").await);
    assert!(started.elapsed().as_secs() < 10, "{:?}", started.elapsed());
    s.cluster.remove_file(&s.node(), socket).await;
    s.ready("web").await;
}

/// A call to a provider ends before kubelet's deadline, and the error names the provider.
#[tokio::test]
async fn a_provider_that_never_answers() {
    let s = scenario!([Need::CsiTimeout(Duration::from_secs(3))]);
    s.apply(class("db", OBJECT).faults("- {hang: true}")).await;
    s.apply(pod("web", &["db"])).await;
    insta::assert_snapshot!(s.failed_mount("web", "rpc error").await);
    s.namespace.delete_pod("web").await.unwrap();
    s.gone("web").await;
    s.nothing_is_left().await;
}

/// The class names objects and the provider sends no file: the pod does not start with an empty
/// volume.
#[tokio::test]
async fn an_answer_without_files_is_not_a_mounted_volume() {
    let s = Scenario::start().await;
    s.apply(class("db", "- {objectName: ../outside, content: x}").faults("- {writeFiles: true}"))
        .await;
    s.apply(pod("web", &["db"])).await;
    s.failed_mount("web", "rpc error").await;
    s.nothing_of_the_driver_is_left().await;
}
